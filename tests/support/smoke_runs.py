"""The smoke scale of a paper's command, run once and looked at by several tests."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from papers.command import start

Command = Callable[..., None]


@dataclass(frozen=True)
class Done:
    """How a command ended, and all that it printed."""

    exit_code: int
    output: str


def invoke(main: Command, arguments: Sequence[str]) -> Done:
    """Run a paper's command in this process."""
    printed = io.StringIO()
    code = 0
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            start(main, arguments)
        except SystemExit as exit:
            code = int(exit.code or 0)
    return Done(code, printed.getvalue())


def smoke_arguments(folder: Path, *options: str) -> list[str]:
    """Return the arguments of a smoke run into a folder."""
    return ["--scale", "smoke", *options, "--out", f"{folder}/out", "--runs", f"{folder}/runs"]


def run_smoke(main: Command, folder: Path, *options: str) -> list[str]:
    """Run all of the smoke scale into a folder; returns the arguments, to run it again with."""
    arguments = smoke_arguments(folder, *options, "--workers", "1")
    done = invoke(main, arguments)
    assert done.exit_code == 0, done.output
    return arguments


def assert_only_lost_runs_again(main: Command, arguments: Sequence[str], lost: Path) -> None:
    """Run again without one job's result: it alone runs, and finds the same."""
    before = {path: path.stat().st_mtime_ns for path in lost.parent.parent.rglob("result.json")}
    old = lost.read_text()
    lost.unlink()
    assert invoke(main, arguments).exit_code == 0
    assert {path for path in before if path.stat().st_mtime_ns != before[path]} == {lost}
    # seeded
    assert _without_times(lost.read_text()) == _without_times(old)


def _without_times(text: str) -> list[str]:
    # the checksum is of the seconds, too
    lines = text.splitlines()
    return [line for line in lines if '"seconds"' not in line and '"checksum"' not in line]


def read(file: Path) -> Iterator[dict[str, str]]:
    with file.open() as rows:
        yield from csv.DictReader(rows)
