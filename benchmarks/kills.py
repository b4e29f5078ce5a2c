"""Kill every verb at every rename and at random moments.

The same command again must go on.

    # about half an hour
    python benchmarks/kills.py
    # some of them; the page keeps the other rows, each with the commit that it was measured at
    python benchmarks/kills.py --verb export --verb ensemble
    # seconds, to see that it runs
    python benchmarks/kills.py --smoke

Each verb runs in a forked process on a copy of a run directory, and is killed (SIGKILL) just before
and just after each of its renames, and at moments drawn over its running time. Then the same
command runs again. It must end well, and leave what an undisturbed run leaves: the same files,
hidden ones counted, with the same content but for dates and measured times. Where the killed one
had left all of that already, the second may be refused, as `export` is without `--force`. After
that, two processes train into one directory at once: one of them must be refused.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Loaded before the processes are forked, to save each of them the time.
import lightning_fabric  # noqa: F401
import matplotlib.figure  # noqa: F401
import numpy as np
import onnxruntime  # noqa: F401
import sklearn.datasets
import sklearn.linear_model  # noqa: F401
import torch
import torch.export

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.fuzz import STEPS, TRAINED, call
from impatient.files import read_json, read_tensors
from impatient.provenance import fingerprint_tensors

Row = dict[str, object]
Command = Sequence[object]
# Entries that differ between two equal runs: dates, measured times, and what is computed from them.
MEASURED = {
    *("created", "seconds", "costs", "fingerprint", "weights_file"),
    # What is measured of the members of a selection.
    *("node_s", "mean_cost"),
}
# Files of measured times, of gates that were fitted with theirs, and pages that show them.
TIMED = re.compile(
    r"(profile\S*|evaluation|costs)\.json|gates\.(json|safetensors)|report\.html|metrics\.csv"
)


# The row of processes that train into one directory at once.
TWO = "two trainings at once"


@dataclass(frozen=True)
class Verb:
    """A command, and the directory that it is run on.

    Attributes:
        name: what it is called here.
        before: the directory as it is before, beside the one that is worked on.
        command: the command, with "RUN" for that one and "OTHER" for a finished one.
    """

    name: str
    before: Path
    command: Command

    def arguments(self, folder: Path) -> list[object]:
        """Put directories into the command."""
        places = {"RUN": folder / "run", "OTHER": folder / "other"}
        return [places.get(str(part), part) for part in self.command]


def in_child(work: Callable[[], int], *, kill_after_s: float | None = None) -> int:
    """Do work in a forked process.

    Returns its exit code, or minus the signal that ended it.
    """
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = work()
        finally:
            os._exit(code)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_verb(verb: Verb, folder: Path, said: Path) -> int:
    """Run the command in this process, and keep what it printed."""
    code, printed = call(*verb.arguments(folder))
    said.write_text(printed)
    return code


def die_at_rename(number: int, *, before: bool) -> None:
    """Kill this process just before or just after the rename of this number."""
    left = [number]
    for name in ("rename", "replace"):
        kept = getattr(os, name)

        def renamed(*places: Any, kept: Callable[..., None] = kept, **options: Any) -> None:
            left[0] -= 1
            if left[0] < 0 and before:
                os.kill(os.getpid(), signal.SIGKILL)
            kept(*places, **options)
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, name, renamed)


def count_renames(verb: Verb, folder: Path, said: Path) -> tuple[int, float]:
    """Run a verb undisturbed.

    Returns how often it renames, and its time in seconds.
    """
    count_file = said.with_suffix(".count")

    def counted() -> int:
        count = [0]
        for name in ("rename", "replace"):
            kept = getattr(os, name)

            def renamed(*places: Any, kept: Callable[..., None] = kept, **options: Any) -> None:
                count[0] += 1
                kept(*places, **options)

            setattr(os, name, renamed)
        code = run_verb(verb, folder, said)
        count_file.write_text(str(count[0]))
        return code

    started = time.perf_counter()
    if in_child(counted):
        raise RuntimeError(f"{verb.name} failed undisturbed: {said.read_text()}")
    return int(count_file.read_text()), time.perf_counter() - started


# --- what a directory holds -----------------------------------------------------------------------


def content(directory: Path) -> dict[str, object]:
    """Give what files hold, but for dates and measured times."""
    return {
        _name(file.relative_to(directory)): _held(file)
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def _name(file: Path) -> str:
    """Name a file, gates without the ending that follows from their measured times."""
    return str(file.with_suffix("") if file.stem == "gates" else file)


def _held(file: Path) -> object:
    if TIMED.fullmatch(file.name) or file.suffix in (".onnx", ".pyc"):
        return "measured"
    if file.suffix == ".safetensors":
        tensors, header = read_tensors(file)
        return fingerprint_tensors(tensors), _undated(header)
    if file.suffix == ".json":
        return _undated(read_json(file))
    return file.read_bytes()


def _undated(entry: Any) -> Any:
    if isinstance(entry, dict):
        return {key: _undated(part) for key, part in entry.items() if key not in MEASURED}
    return [_undated(part) for part in entry] if isinstance(entry, list) else entry


def differing(found: dict[str, object], wanted: dict[str, object]) -> list[str]:
    """Name the files that are missing, too many or different."""
    return [
        f"{name} {'differs' if name in found and name in wanted else 'missing'}"
        if name in wanted
        else f"{name} left behind"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]


# --- kills ----------------------------------------------------------------------------------------


def fresh(verb: Verb, folder: Path) -> None:
    """Put the directory back as it is before the verb."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    if verb.before.is_dir():
        shutil.copytree(verb.before, folder / "run")


def killed(verb: Verb, folder: Path, random_kills: int, dice: random.Random) -> Row:
    """Kill one verb at every rename and so many times at random, and run it again each time."""
    said = folder / "said.txt"
    fresh(verb, folder)
    renames, takes_s = count_renames(verb, folder, said)
    wanted = content(folder / "run")
    problems: list[str] = []
    died = 0
    for where, kill in _ways(verb, folder, renames, takes_s, random_kills, dice):
        fresh(verb, folder)
        died += kill() == -signal.SIGKILL
        complete = content(folder / "run") == wanted
        code = in_child(lambda: run_verb(verb, folder, said))
        if code and not complete:
            problems.append(f"{where}: the same command again: {said.read_text()[-300:]}")
            continue
        problems += [f"{where}: {name}" for name in differing(content(folder / "run"), wanted)]
    for problem in problems:
        print(f"PROBLEM {verb.name} {problem}", flush=True)
    return {
        "verb": verb.name,
        "renames": renames,
        "kills": died,
        "ended before the kill": 2 * renames + random_kills - died,
        "problems": len(problems),
    }


def _ways(
    verb: Verb, folder: Path, renames: int, takes_s: float, random_kills: int, dice: random.Random
) -> Iterator[tuple[str, Callable[[], int]]]:
    said = folder / "said.txt"

    def at(number: int, before: bool) -> Callable[[], int]:
        def work() -> int:
            die_at_rename(number, before=before)
            return run_verb(verb, folder, said)

        return lambda: in_child(work)

    for number in range(renames):
        for before in (True, False):
            yield f"{'before' if before else 'after'} rename {number}", at(number, before)
    for _ in range(random_kills):
        moment = dice.uniform(0.0, takes_s)
        yield (
            f"after {moment:.3f} s",
            lambda moment=moment: in_child(
                lambda: run_verb(verb, folder, said), kill_after_s=moment
            ),
        )


def two_at_once(folder: Path, times: int, dice: random.Random) -> Row:
    """Train twice into one directory at the same time."""
    verb = Verb("train", folder / "none", ("train", "RUN", *TRAINED))
    outcomes: list[tuple[int, int]] = []
    problems = 0
    wanted: dict[str, object] | None = None
    for _ in range(times):
        fresh(verb, folder)
        children = []
        for index in range(2):
            child = os.fork()
            if child == 0:
                os._exit(run_verb(verb, folder, folder / f"said{index}.txt"))
            children.append(child)
            time.sleep(dice.uniform(0.0, 0.2))
        codes = tuple(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        texts = [(folder / f"said{index}.txt").read_text() for index in range(2)]
        found = content(folder / "run")
        wanted = wanted or found
        trained = sum("trained:" in text for text in texts)
        right = sorted(codes) == [0, 1] and trained == 1 and found == wanted
        refused = any("another process works on" in text for text in texts)
        problems += not (right and refused)
        outcomes.append((min(codes), max(codes)))
        if not (right and refused):
            print(f"PROBLEM two trainings: {codes} {[text[-200:] for text in texts]}", flush=True)
    return {"verb": TWO, "times": times, "problems": problems}


def verbs(folder: Path) -> list[Verb]:
    """Run every verb once, and keep the directory as it is before each."""
    made = []
    run = folder / "run"
    for index, (name, *options) in enumerate(STEPS):
        before = folder / f"before{index}"
        if run.is_dir():
            shutil.copytree(run, before)
        label = " ".join([name, *(each for each in options if each in ("--delta", "--learner"))])
        made.append(Verb(label, before, (name, "RUN", *options)))
        # Threads of an engine would not survive in forked processes, so nothing runs in this one.
        if in_child(lambda: run_verb(made[-1], folder, folder / "said.txt")):
            raise RuntimeError((folder / "said.txt").read_text())
    shutil.copytree(run, folder / "other")
    restart = ("train", "RUN", *TRAINED, "--restart")
    made.append(Verb("train --restart", folder / "other", restart))
    made.append(Verb("export --force", folder / "other", ("export", *_again(STEPS[-1]), "--force")))
    ensemble = ("ensemble", "RUN", "OTHER", "--rule", "geometric")
    made.append(Verb("ensemble", folder / "none", ensemble))
    select = ("select", "RUN", "OTHER", "OTHER", "--repeats", 20, "--quiet")
    made.append(Verb("select", folder / "none", select))
    made.append(Verb("recalibrate", folder / "other", ("recalibrate", "RUN", "--quiet")))
    outputs = save_outputs(folder / "outputs.npz")
    imported = ("import", outputs, "--into", "RUN", "--costs-ms", "1,2,4")
    made.append(Verb("import", folder / "none", imported))
    return made


def save_outputs(file: Path) -> Path:
    """Write outputs of three exits, as another program would have computed them."""
    random = np.random.default_rng(0)
    targets = random.integers(10, size=2000)
    outputs = random.normal(size=(3, 2000, 10))
    splits = np.where(np.arange(2000) < 1000, "validation", "test")
    np.savez(file, outputs=outputs, targets=targets, splits=splits)
    return file


def _again(step: Sequence[str]) -> tuple[str, ...]:
    return ("RUN", *step[1:])


def main() -> None:
    """Kill, run again, compare, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two verbs; writes nothing")
    parser.add_argument("--random", type=int, default=10, help="random kills of each verb")
    parser.add_argument("--pairs", type=int, default=20, help="trainings at once")
    parser.add_argument("--verb", action="append", help="only this one, which the page calls so")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    dice = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = verbs(folder)
        if asked.smoke:
            chosen = [verb for verb in chosen if verb.name == "fit"]
        order = [*(verb.name for verb in chosen), TWO]
        for name in asked.verb or order:
            if name == TWO:
                row = two_at_once(folder, 1 if asked.smoke else asked.pairs, dice)
            else:
                verb = next(verb for verb in chosen if verb.name == name)
                row = killed(verb, folder, 2 if asked.smoke else asked.random, dice)
            print(json.dumps(row), flush=True)
            if not asked.smoke:
                write_page(row, order)


def write_page(row: Row, order: Sequence[str]) -> None:
    """Write the page with this row, and the others as they are there."""
    sys.path.insert(0, str(Path(__file__).parent))
    from common import RESULTS, commit, write_results

    rows: dict[str, Row] = {}
    if (RESULTS / "kills.csv").is_file():
        with (RESULTS / "kills.csv").open(encoding="utf-8") as file:
            rows = {each["verb"]: dict(each) for each in csv.DictReader(file)}
    rows[str(row["verb"])] = row | {"commit": commit()}
    columns = dict.fromkeys(("verb", "renames", "kills", "ended before the kill", "times"), "")
    known = [columns | rows[name] for name in order if name in rows]
    write_results("kills", "Killed verbs", str(__doc__), known)


if __name__ == "__main__":
    main()
