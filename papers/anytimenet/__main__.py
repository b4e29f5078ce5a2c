"""`python -m papers.anytimenet`: every training and measurement that is missing, then the tables and figures."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

from impatient.errors import ImpatientError, StorageError
from impatient.files import read_json
from papers.anytimenet import recipe, tables, times
from papers.data import ROOT
from papers.jobs import Job, run_jobs
from papers.results import fill

HERE = Path(__file__).parent


class ScaleName(StrEnum):
    """How much is trained."""

    smoke = "smoke"
    cpu = "cpu"
    gpu = "gpu"


class Table(StrEnum):
    """What is run."""

    blocks = "blocks"
    time = "time"
    accuracy = "accuracy"
    all = "all"


def main(
    scale: Annotated[
        ScaleName, typer.Option(help="smoke: seconds, on digits; cpu: 45 minutes on two cores; gpu: the paper's.")
    ],
    table: Annotated[
        Table,
        typer.Option(
            help="What to run: blocks, nothing; time, the measurements, when nothing else runs; accuracy, the "
            "trainings. Whatever is finished is written."
        ),
    ] = Table.all,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of tables and figures; by default the paper folder's own, and its card is filled."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of checkpoints and results of single runs.")] = ROOT
    / "runs"
    / "papers"
    / "anytimenet",
    workers: Annotated[int, typer.Option(min=1, help="Trainings at a time.")] = 2,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds; by default the scale's.")] = None,
    publish: Annotated[bool, typer.Option(help="Only write the tables of what is finished; run nothing.")] = False,
) -> None:
    """Tables I and II, figures 3 and 4. Stop with Ctrl-C at any time; the same command goes on."""
    settings = recipe.SCALES[scale.value]
    settings = dataclasses.replace(settings, seeds=seeds or settings.seeds)
    folder, code = runs / scale.value, 0
    try:
        if table in (Table.time, Table.all) and not publish:
            run_jobs(times.jobs(settings), folder, workers=1)  # first and one by one, before anything else runs
        if table in (Table.accuracy, Table.all) and not publish:
            run_jobs(recipe.jobs(settings), folder, workers=workers)
    except ImpatientError as error:
        _say(f"Error: {error}")
        code = 1
    except KeyboardInterrupt:
        _say("Stopped. What is finished is kept; the same command goes on.")
        code = 130
    try:
        page = tables.write(
            settings, finished([*times.jobs(settings), *recipe.jobs(settings)], folder), out or HERE / "results" / scale.value
        )
        if out is None and scale is not ScaleName.smoke:
            fill(HERE / "README.md", scale.value, page)
    except ImpatientError as error:
        _say(f"Error: {error}")
        raise typer.Exit(1) from error
    Console().print(Markdown(page))
    raise typer.Exit(code)


def _say(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def finished(jobs: Sequence[Job], folder: Path) -> dict[str, Any]:
    """Results of those jobs that have one of these very arguments."""
    results = {}
    for job in jobs:
        with contextlib.suppress(StorageError):
            stored = read_json(folder / job.name / "result.json")
            results.update({job.name: stored["result"]} if stored["fingerprint"] == job.fingerprint() else {})
    return results


if __name__ == "__main__":
    typer.run(main)
