"""The smoke scale of a paper's command, run once and looked at by several tests."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import typer
from typer.testing import CliRunner


def app_of(main: Callable[..., None]) -> typer.Typer:
    made = typer.Typer()
    made.command()(main)
    return made


def run_smoke(app: typer.Typer, folder: Path, *options: str) -> list[str]:
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
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return arguments


def read(file: Path) -> Iterator[dict[str, str]]:
    with file.open() as rows:
        yield from csv.DictReader(rows)
