"""The command `python run.py` of an exported directory."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .answers import Answer
from .bundle import Bundle
from .errors import BundleError
from .staged import Array, Inputs
from .thresholds import probabilities
from .timing import QUANTILES

# Numbers of an output that are shown.
MOST = 8


def main(directory: Path, arguments: Sequence[str] | None = None) -> None:
    """Run the network in a directory on an input from the command line."""
    parser = argparse.ArgumentParser(
        description="Run the exported network in this directory, against the clock."
    )
    parser.add_argument(
        "input",
        help="a picture; or a .npy file of an array with its batch dimension, as the network takes "
        "it (or raw, of type uint8), or a .npz file of arrays by input name",
    )
    parser.add_argument(
        "--deadline-ms", type=float, help="deadline in milliseconds; default: run to the end"
    )
    parser.add_argument(
        "--statistic",
        default="p99",
        choices=QUANTILES,
        help="quantile of the measured costs that must fit before the deadline",
    )
    parser.add_argument("--no-policy", action="store_true", help="ignore the exported policy")
    parser.add_argument("--threads", type=int, help="threads per stage; default: as exported")
    parser.add_argument(
        "--profile", action="store_true", help="measure costs here first and write costs.json"
    )
    parser.add_argument(
        "--any-profile",
        action="store_true",
        help="accept costs that were measured on another machine or with other threads",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    try:
        bundle = Bundle(directory, given.threads)
        x = _input(bundle, given.input)
        if given.profile:
            bundle.save_costs(bundle.profile(x))
        bundle.warm_up(x)
        deadline_s = None if given.deadline_ms is None else given.deadline_ms * 1e-3
        answer = bundle.run(
            x,
            deadline_s=deadline_s,
            statistic=given.statistic,
            policy=not given.no_policy,
            any_profile=given.any_profile,
        )
    except BundleError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write((_as_json if given.json else _as_text)(answer, bundle) + "\n")


def _input(bundle: Bundle, path: str) -> Inputs:
    if Path(path).suffix.lower() not in (".npy", ".npz"):
        return bundle.read(path)
    loaded = _load(path)
    if isinstance(loaded, np.ndarray) and loaded.dtype == np.uint8 and bundle.preparation:
        return bundle.preparation(loaded)
    return loaded


def _load(path: str) -> Inputs:
    try:
        with Path(path).open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else dict(loaded)
    except Exception as error:
        # numpy reads headers as Python and archives as zip, and raises what these raise;
        # of a file that is none of its own it says to unpickle it, which nobody should
        reason = "it holds no plain array" if type(error) is ValueError else error
        raise BundleError(
            f"cannot read {path}: {reason}. Expected a file written by numpy.save or numpy.savez."
        ) from error


def _as_json(answer: Answer[Array], bundle: Bundle) -> str:
    said: dict[str, Any] = {"output": answer.output.tolist()}
    if bundle.has_classes:
        shares = probabilities(answer.output)
        best = shares.argmax(-1).tolist()
        said = {"class": best, "probabilities": shares.tolist()}
        if bundle.class_names:
            said["class_name"] = [bundle.class_names[place] for place in best]
    return json.dumps(
        said
        | {
            "exit": answer.exit,
            "exits": answer.exits,
            "elapsed_ms": answer.elapsed_s * 1e3,
            "stopped_by": answer.stopped_by,
            "deadline_met": answer.deadline_met,
        }
    )


def _as_text(answer: Answer[Array], bundle: Bundle) -> str:
    lines = _classes(answer, bundle) if bundle.has_classes else _numbers(answer)
    met = "" if answer.deadline_met else ", after the deadline"
    return "\n".join(
        [*lines, f"{answer.elapsed_s * 1e3:.3f} ms, stopped by {answer.stopped_by}{met}"]
    )


def _classes(answer: Answer[Array], bundle: Bundle) -> list[str]:
    """Name the likeliest classes of each sample."""
    names = bundle.class_names or tuple(map(str, range(bundle.num_classes)))
    lines = []
    for row, exit in zip(probabilities(answer.output), answer.exits, strict=True):
        best = np.argsort(-row)[:5]
        shares = ", ".join(f"{names[place]}: {row[place]:.4f}" for place in best)
        lines.append(f"class {names[best[0]]} from exit {exit}; {shares}")
    # A name may hold what moves a terminal's cursor.
    return [line if line.isprintable() else repr(line) for line in lines]


def _numbers(answer: Answer[Array]) -> list[str]:
    """List the first numbers of each sample's output.

    All are in the JSON.
    """
    lines = []
    for row, exit in zip(answer.output, answer.exits, strict=True):
        first = ", ".join(f"{number:.4g}" for number in row.flatten()[:MOST])
        more = f", ... (shape {list(row.shape)})" if row.size > MOST else ""
        lines.append(f"{first}{more} from exit {exit}")
    return lines
