"""Functions that the benchmark scripts share.

They time calls in turn, run cases in separate processes, and write a CSV with its page.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from impatient.engines.export import export, load_engine, to_engine
from impatient.engines.network import EngineNetwork
from impatient.files import read_json, write_json, write_text
from impatient.networks import MultiExitNetwork
from impatient.provenance import fingerprint_tensors, machine, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# git-ignored: exported networks, trained weights, finished cases
KEPT = ROOT / "runs" / "bench"
# for scripts that use the papers' data and networks
sys.path.insert(0, str(ROOT))

Row = dict[str, object]
# by name and number of things in it
Calls = Mapping[tuple[str, int], Callable[[], object]]
M = TypeVar("M", bound=nn.Module)


def commit(checkout: Path = ROOT) -> str:
    """Return the commit of a checkout, with "-dirty" if its code was changed.

    Pages are no code: a script that has just written one row of its page may write the next.
    """
    described = _git(checkout, "describe", "--always")
    pages = (":(exclude)benchmarks/results", ":(exclude)docs")
    changed = _git(checkout, "status", "--porcelain", "--untracked-files=no", "--", ".", *pages)
    return (described or "unknown") + ("-dirty" if changed else "")


def _git(checkout: Path, *command: str) -> str:
    """Return what a command of git prints, or nothing where it fails."""
    called = ["git", *command]
    ended = subprocess.run(called, capture_output=True, text=True, cwd=checkout, check=False)
    return ended.stdout.strip()


def facts() -> str:
    """Machine, versions, commit, date and command, as one paragraph."""
    here = machine("cpu")
    engines = {
        name: metadata.version(name)
        for name in ("onnxruntime", "openvino")
        if name in sys.modules or _installed(name)
    }
    command = " ".join(["python", *_script(sys.argv[0]), *sys.argv[1:]])
    return (
        f"{here['processor']}, {torch.get_num_threads()} torch threads at the end; "
        f"{platform.system()} {platform.release()}; "
        f"{', '.join(f'{name} {version}' for name, version in (versions() | engines).items())}; "
        f"commit {commit()}; {datetime.now(UTC):%Y-%m-%d}. Command: `{command}`"
    )


def _script(called: str) -> list[str]:
    """Return a script's name from the root of its checkout on, if it has one."""
    whole = Path(called).absolute()
    named = str(whole.relative_to(ROOT)) if whole.is_relative_to(ROOT) else called
    return [named] if called else []


def _installed(name: str) -> bool:
    return any(metadata.packages_distributions().get(name, ()))


def write_results(name: str, title: str, text: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Write results/NAME.csv and results/NAME.md with the same rows.

    Entries that a row does not have stay empty.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    rows = [{column: row.get(column, "") for column in columns} for row in rows]
    stream = io.StringIO()
    table = csv.DictWriter(stream, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(RESULTS / f"{name}.csv", stream.getvalue())
    lines = [
        f"# {title}",
        "",
        text.strip(),
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    write_text(RESULTS / f"{name}.md", "\n".join([*lines, "", facts(), ""]))
    print(f"wrote {RESULTS / name}.csv and .md")


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Compute the median with its 95 % interval by order statistics.

    The interval is binomial and makes no assumption on the distribution.
    """
    ordered = np.sort(np.asarray(values))
    half = 0.98 * np.sqrt(len(ordered))
    low = int(max(0, len(ordered) / 2 - half))
    high = int(min(len(ordered) - 1, len(ordered) / 2 + half))
    return float(np.median(ordered)), float(ordered[low]), float(ordered[high])


def ratio_of_means(values: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
    """Compute the ratio of two means of paired values, with its 95 % interval.

    It compares the times of a complete workload, by the delta method.
    """
    ratio = float(values.mean() / base.mean())
    half = (
        1.96
        * float(np.std(values - ratio * base, ddof=1))
        / np.sqrt(len(base))
        / float(base.mean())
    )
    return ratio, ratio - half, ratio + half


def with_interval(values: Sequence[float], digits: int = 4) -> str:
    """Format the median with its 95 % interval."""
    middle, low, high = median_interval(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    most_s: float = float("inf"),
    warm_up: int = 3,
) -> dict[str, np.ndarray]:
    """Measure the seconds of several calls, each once a round in random order.

    So all calls are exposed to the same changes of the machine.

    Args:
        calls: by name; ask for the same one under two names for an A/A comparison.
        rounds: that are counted, after the warm-up.
        most_s: begin no further round after so many seconds, once there are five.
    """
    wall, _ = in_turn_by_both_clocks(calls, rounds=rounds, most_s=most_s, warm_up=warm_up)
    return wall


def in_turn_by_both_clocks(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    most_s: float = float("inf"),
    warm_up: int = 3,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Measure several calls as `in_turn` does, in seconds of the wall and of this thread."""
    order = np.random.default_rng(0)
    names = list(calls)
    wall: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for number in range(-warm_up, rounds):
        begin = time.perf_counter() if number == 0 else begin
        if number >= 5 and time.perf_counter() - begin > most_s:
            break
        for name in order.permutation(names):
            spent = time.thread_time()
            before = time.perf_counter()
            calls[name]()
            taken = time.perf_counter() - before
            spent = time.thread_time() - spent
            if number >= 0:
                wall[name].append(taken)
                processor[name].append(spent)
    return (
        {name: np.array(values) for name, values in wall.items()},
        {name: np.array(values) for name, values in processor.items()},
    )


def repeated(
    workload: Callable[[int], Calls], *, seeds: int, repeats: int
) -> dict[tuple[str, int], Row]:
    """Measure the calls of a workload by their key, over all seeds and repeats.

    The first run of each does not count.

    Args:
        workload: the calls for a seed.
    """
    times: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for seed in range(seeds):
        calls = workload(seed)
        for repeat in range(repeats + 1):
            for what, call in calls.items():
                taken = _wall_and_processor_s(call)
                # the first one warms up
                if repeat:
                    times[what].append(taken)
    return {what: _spread(taken) for what, taken in times.items()}


def _wall_and_processor_s(call: Callable[[], object]) -> tuple[float, float]:
    """Measure wall-clock and processor time, which differ if other work runs."""
    wall = time.perf_counter()
    processor = time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def _spread(taken: Sequence[tuple[float, float]]) -> Row:
    wall, processor = zip(*taken, strict=True)
    return {
        "n": len(taken),
        "min s": f"{min(wall):.4f}",
        "median s": f"{statistics.median(wall):.4f}",
        "max s": f"{max(wall):.4f}",
        "median processor s": f"{statistics.median(processor):.4f}",
    }


def twin(model: M) -> M:
    """Copy a model with the same tensors and without forward hooks."""
    copied = copy.deepcopy(
        model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    )
    for module in copied.modules():
        module._forward_hooks.clear()
    return copied


def in_engine(
    network: MultiExitNetwork,
    engine: str,
    *,
    example: Tensor,
    threads: int,
    key: str,
    precision: str = "fp32",
) -> MultiExitNetwork | EngineNetwork:
    """Export a network to an engine once, and load it from then on.

    Args:
        key: name of the network and its cuts; other weights are noticed without it.
    """
    if engine in ("eager", "compile"):
        return to_engine(network, engine, example=example, threads=threads)
    folder = engine_folder(
        network, engine, example=example, threads=threads, key=key, precision=precision
    )
    return load_engine(folder, threads=threads)


def engine_folder(
    network: MultiExitNetwork,
    engine: str,
    *,
    example: Tensor,
    threads: int,
    key: str,
    precision: str = "fp32",
) -> Path:
    """Export a network to an engine, unless that was done, and return where it is.

    It is kept under runs/bench/engines, because exporting resnet50 takes a minute.
    """
    weights = fingerprint_tensors(network.state_dict())
    folder = KEPT / "engines" / f"{key}-{engine}-{precision}-{weights}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        export(
            network, folder, engine=engine, example=example, threads=threads, precision=precision
        )
    return folder


def run_cases(
    name: str,
    title: str,
    text: str,
    cases: Mapping[str, tuple[Any, ...]],
    measure: Callable[..., Sequence[Row]],
    *,
    smoke: Sequence[str],
    prepare: Callable[[], object] | None = None,
) -> None:
    """Run the command line of a benchmark, with a separate process for each case.

    A process can set its thread pools only once. Finished cases are kept for the commit they were
    measured on, and the page is written after each, so a stopped run continues where it was.

    Args:
        name, title, text: of the page.
        cases: arguments of `measure`, by the case's name.
        measure: gives the rows of a case; takes `smoke=True` for a run of seconds.
        smoke: the cases that show that everything runs.
        prepare: makes what takes long and is kept: exports, trained weights.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument(
        "--smoke", action="store_true", help="seconds, to see that it runs; writes nothing"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="only make what is kept: exports, trained weights"
    )
    parser.add_argument("--again", action="store_true", help="measure finished cases again")
    parser.add_argument("--case", choices=[*cases], help="measure this one only")
    # where a case puts its rows
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.into:
        write_json(asked.into, {"rows": list(measure(*cases[asked.case], smoke=asked.smoke))})
    elif asked.prepare:
        if prepare is not None:
            prepare()
    elif asked.smoke:
        with tempfile.TemporaryDirectory() as folder:
            for case in [asked.case] if asked.case else smoke:
                _show(_case(case, Path(folder), "--smoke"))
    else:
        _all_cases(name, title, text, cases, asked)


def _all_cases(
    name: str, title: str, text: str, cases: Mapping[str, object], asked: argparse.Namespace
) -> None:
    folder = KEPT / "cases" / name / commit()
    folder.mkdir(parents=True, exist_ok=True)
    for case in [asked.case] if asked.case else cases:
        path = folder / f"{case}.json"
        if asked.again or not path.is_file():
            _show(_case(case, folder))
        done = [folder / f"{case}.json" for case in cases if (folder / f"{case}.json").is_file()]
        write_results(name, title, text, [row for path in done for row in read_json(path)["rows"]])


def _case(case: str, folder: Path, *options: str) -> list[Row]:
    path = folder / f"{case}.json"
    print(f"{case} ...", flush=True)
    subprocess.run(
        [sys.executable, sys.argv[0], "--case", case, "--into", str(path), *options], check=True
    )
    rows: list[Row] = read_json(path)["rows"]
    return rows


def _show(rows: Sequence[Row]) -> None:
    for row in rows:
        print("  " + ", ".join(f"{column}: {value}" for column, value in row.items()), flush=True)
