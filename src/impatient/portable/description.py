"""Read and check the description in bundle.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .checksums import check_file, fits_its_checksum, with_checksum
from .errors import BundleError
from .forms import (
    ANY,
    BOUND,
    FILE,
    FLAG,
    NUMBER,
    POSITIVE,
    SECONDS,
    TEXT,
    Entry,
    Form,
    Maybe,
    Pair,
    misfit,
    one_of,
    whole,
)
from .parts import ENGINES
from .sessions import SESSIONS
from .staged import Wiring
from .thresholds import Thresholds

SCHEMA = 1
EXPORT = "export the network again with `impatient export`"

_WIRING: dict[str, Form] = {
    "inputs": [TEXT],
    "takes": [[TEXT]],
    "gives": [[TEXT]],
    "features": [TEXT],
    "batch_dims": {ANY: Maybe(whole(0, 100))},
}
_POLICY: dict[str, Form] = {
    "score": TEXT,
    "thresholds": [BOUND],
    "compares": FLAG,
    "compare": Maybe(FILE),
}
_RESIZING: dict[str, Form] = {
    "how": one_of("fit", "shorter", "stretch"),
    "before": Pair(whole(0, 2**15)),
    "interpolation": one_of("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"),
    "rounds_down": FLAG,
}
_PREPROCESS: dict[str, Form] = {
    "mean": [NUMBER],
    "std": [POSITIVE],
    "channels_at": Entry("1 or -1", lambda value: type(value) is int and value in (1, -1)),
    "size": Maybe(Pair(whole(1, 2**15))),
    "channels": whole(0, 2**15),
    "resizing": _RESIZING,
}
_TENSOR: dict[str, Form] = {"name": TEXT, "dtype": TEXT, "shape": [Maybe(whole(0))]}
_DESCRIPTION: dict[str, Form] = {
    "engine": one_of(*ENGINES, *SESSIONS),
    "exits": [TEXT],
    "num_classes": whole(0),
    "class_names?": [TEXT],
    "has_classes?": FLAG,
    "inputs": [_TENSOR],
    "outputs?": [_TENSOR],
    "preprocess?": Maybe(_PREPROCESS),
    "wiring": _WIRING,
    "whole": Maybe(FILE),
    "threads": whole(1, 1024),
    "policy": Maybe(_POLICY),
    "costs?": Maybe({ANY: {}}),
    "files?": {ANY: TEXT},
    "provenance?": Maybe({}),
}
_IN_PARTS: dict[str, Form] = {"stages": [FILE], "heads": [Maybe(FILE)]}
_IN_ONE_SESSION: dict[str, Form] = {"session": FILE}
_QUANTILES: dict[str, Form] = {
    **dict.fromkeys(("mean", "p50", "p90", "p99", "p999", "max"), SECONDS),
    "n": whole(1),
}
# Measured at one batch size.
COSTS: dict[str, Form] = {"stages": [_QUANTILES], "heads": [_QUANTILES]}
# The file costs.json.
MEASURED: dict[str, Form] = {"costs": {ANY: {}}, "provenance": {}}


def read_description(directory: Path) -> dict[str, Any]:
    """Read bundle.json and check that the directory is complete."""
    path = directory / "bundle.json"
    value = read(path, "impatient_bundle", EXPORT)
    problem = _problem(value, directory)
    if problem is not None:
        raise BundleError(f"{path}: {problem}. {EXPORT[0].upper()}{EXPORT[1:]}.")
    return value


def _problem(value: Mapping[str, Any], directory: Path) -> str | None:
    """Say what is wrong with a description, or None if it is valid."""
    streamed = value.get("engine") in SESSIONS
    found = misfit(value, _DESCRIPTION | (_IN_ONE_SESSION if streamed else _IN_PARTS))
    if found is not None:
        return found
    wiring = wiring_of(value["wiring"])
    problem = _wrong_count(value, wiring, streamed) or _wrong_wiring(value, wiring)
    if problem is not None:
        return problem
    files = [
        *([value["session"]] if streamed else [*value["stages"], *value["heads"]]),
        value["whole"],
        value["policy"] and value["policy"]["compare"],
    ]
    missing = [name for name in files if name is not None and not (directory / name).is_file()]
    if missing:
        return f"there is no file {missing[0]} in {directory}"
    # Parts of the network are compared when they are loaded.
    checksums = value.get("files") or {}
    for name in checksums.keys() - {*files}:
        if not name.endswith(".data") and (directory / name).exists():
            check_file(directory, name, checksums)
    return None


def _wrong_count(value: Mapping[str, Any], wiring: Wiring, streamed: bool) -> str | None:
    """Say which list does not have an entry for each exit, class or channel."""
    rows = {} if streamed else {"stages": value["stages"], "heads": value["heads"]}
    rows |= {"takes": wiring.takes, "gives": wiring.gives, "features": wiring.features}
    rows |= {"thresholds": value["policy"]["thresholds"]} if value["policy"] else {}
    count = len(value["exits"])
    for name, row in rows.items():
        if len(row) != count or not count:
            return f"{len(row)} {name} for {count} exits; expected one of each per exit"
    if not streamed and [head is None for head in value["heads"]] != [False] * (count - 1) + [True]:
        return f"the heads are {value['heads']}; expected a file for each exit but the last"
    names = value.get("class_names") or []
    if len(names) not in (0, value["num_classes"]):
        return f"{len(names)} class names for {value['num_classes']} classes"
    if value.get("preprocess"):
        mean, std, channels = (value["preprocess"][name] for name in ("mean", "std", "channels"))
        if len(mean) != len(std) or (channels and len(mean) not in (0, channels)):
            return f"{len(mean)} means and {len(std)} deviations for {channels} channels"
    return None


def _wrong_wiring(value: Mapping[str, Any], wiring: Wiring) -> str | None:
    """Say which value of the wiring is taken before it is there."""
    if sorted(spec["name"] for spec in value["inputs"]) != sorted(wiring.inputs):
        return f"the inputs are not those of the wiring, {list(wiring.inputs)}"
    dims = {spec["name"]: len(spec["shape"]) for spec in value["inputs"]}
    unknown = [name for name in wiring.inputs if name not in wiring.batch_dims]
    if unknown:
        return f"the batch dimension of input {unknown[0]!r} is missing"
    batches = {name: wiring.batch_dims[name] for name in wiring.inputs}
    if all(dim is None for dim in batches.values()):
        return "no input has a batch dimension; expected at least one"
    beyond = [name for name, dim in batches.items() if dim is not None and dim >= dims[name]]
    if beyond:
        return f"input {beyond[0]!r} has {dims[beyond[0]]} dimensions, too few for its batch's"
    known = set(wiring.inputs)
    for takes, gives, features in zip(wiring.takes, wiring.gives, wiring.features, strict=True):
        lacking = (
            sorted({*takes} - known)
            + sorted({features} - known - {*gives})
            + sorted({*gives} - {*wiring.batch_dims})
        )
        if lacking:
            return (
                f"no stage gives the value {lacking[0]!r} before it is taken, or its batch "
                "dimension is missing"
            )
        known |= {*gives}
    return None


def policy_of(value: Mapping[str, Any] | None) -> Thresholds | None:
    """Read a policy from JSON."""
    if value is None:
        return None
    return Thresholds(
        score=value["score"],
        thresholds=tuple(map(float, value["thresholds"])),
        compares=value["compares"],
    )


def wiring_of(value: Mapping[str, Any]) -> Wiring:
    """Read a wiring from JSON."""
    return Wiring(
        inputs=tuple(value["inputs"]),
        takes=tuple(map(tuple, value["takes"])),
        gives=tuple(map(tuple, value["gives"])),
        features=tuple(value["features"]),
        batch_dims=dict(value["batch_dims"]),
    )


def check_input(name: str, array: Any, spec: Mapping[str, Any]) -> None:
    """Check type and shape of an input against the description.

    Raises:
        BundleError: if the input does not fit.
    """
    expected = (
        f"expected a numpy array, {spec['dtype']}, shape "
        f"{['any' if size is None else size for size in spec['shape']]}"
    )
    if not isinstance(array, np.ndarray):
        raise BundleError(f"input {name!r} is a {type(array).__name__}; {expected}.")
    fits = len(array.shape) == len(spec["shape"]) and all(
        size in (None, given) for size, given in zip(spec["shape"], array.shape, strict=True)
    )
    if array.dtype.name != spec["dtype"] or not fits:
        raise BundleError(
            f"input {name!r} is {array.dtype.name}, shape {list(array.shape)}; {expected}. Convert "
            "it first."
        )


def check_lengths(
    given: Mapping[str, np.ndarray[Any, Any]], specs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Check that inputs of any length have the same one.

    Raises:
        BundleError: if they differ.
    """
    lengths = {
        name: given[name].shape[1]
        for name, spec in specs.items()
        if len(spec["shape"]) > 1 and spec["shape"][:2] == [None, None]
    }
    if len({*lengths.values()}) > 1:
        raise BundleError(
            f"inputs of different lengths, {lengths}; expected one length for tokens and what goes "
            "with them."
        )


def native(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Give an array the byte order of this machine, in which engines read it."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def read(path: Path, kind: str, remedy: str) -> dict[str, Any]:
    """Read a JSON file of this kind and of the current schema.

    Args:
        path: path of the file.
        kind: expected entry "kind" of the file.
        remedy: what to do if the file cannot be used, for the error message.
    Raises:
        BundleError: if the file cannot be read, or has another kind or schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(
            f"cannot read {path}: {error}. Expected a complete JSON file; {remedy}."
        ) from error
    found = (
        (value.get("kind"), value.get("schema"))
        if isinstance(value, dict)
        else type(value).__name__
    )
    if found != (kind, SCHEMA):
        raise BundleError(f"{path} holds {found}; expected {(kind, SCHEMA)}; {remedy}.")
    assert isinstance(value, dict)
    # Only files of 0.1.0 have none, and those list no checksums of other files.
    has_one = value.pop("checksum", None) is not None or "files" in value
    if has_one and not fits_its_checksum(text):
        raise BundleError(
            f"{path} does not fit its checksum: it was damaged, or changed by hand; {remedy}."
        )
    return value


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file and its checksum atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        text = json.dumps(with_checksum(value), indent=1) + "\n"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise BundleError(
            f"cannot write {path}: {error}. Nothing was changed; free some space or copy the "
            "directory."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
