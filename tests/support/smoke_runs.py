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


def run_smoke(main: Command, folder: Path, *options: str) -> list[str]:
    """Run all of the smoke scale into a folder; returns the arguments, to run it again with."""
    arguments = [
        "--scale",
        "smoke",
        *options,
        "--workers",
        "1",
        "--out",
        f"{folder}/out",
        "--runs",
        f"{folder}/runs",
    ]
    done = invoke(main, arguments)
    assert done.exit_code == 0, done.output
    return arguments


def read(file: Path) -> Iterator[dict[str, str]]:
    with file.open() as rows:
        yield from csv.DictReader(rows)
