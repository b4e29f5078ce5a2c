"""The command `python -m papers.anytimenet`.

It runs every training and measurement that is missing, and writes tables and figures.
"""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import tyro

from papers.anytimenet import recipe, tables, times
from papers.command import Out, Publish, Runs, ScaleName, Seeds, Workers, carry_out, start
from papers.data import ROOT
from papers.jobs import finished, run_jobs

HERE = Path(__file__).parent


class Table(StrEnum):
    """What is run."""

    blocks = "blocks"
    time = "time"
    accuracy = "accuracy"
    all = "all"


def main(
    scale: Annotated[
        ScaleName,
        tyro.conf.arg(
            help="smoke: seconds, on digits; cpu: 45 minutes on two cores; gpu: the paper's."
        ),
    ],
    table: Annotated[
        Table,
        tyro.conf.arg(
            help="What to run: blocks, nothing; time, the measurements, when nothing else runs; "
            "accuracy, the "
            "trainings. Whatever is finished is written."
        ),
    ] = Table.all,
    out: Out = None,
    runs: Runs = ROOT / "runs" / "papers" / "anytimenet",
    workers: Workers = 2,
    seeds: Seeds = None,
    publish: Publish = False,
) -> None:
    """Reproduce tables I and II, and figures 3 and 4.

    Stop with Ctrl-C at any time. The same command continues.
    """
    settings = recipe.SCALES[scale.value]
    settings = dataclasses.replace(settings, seeds=seeds or settings.seeds)
    folder = runs / scale.value
    everything = [*times.jobs(settings), *recipe.jobs(settings)]

    def run() -> None:
        if table in (Table.time, Table.all):
            # first and one by one, before anything else runs
            run_jobs(times.jobs(settings), folder, workers=1)
        if table in (Table.accuracy, Table.all):
            run_jobs(recipe.jobs(settings), folder, workers=workers)

    carry_out(
        run,
        lambda into: tables.write(settings, finished(everything, folder), into),
        card=HERE / "README.md",
        scale=scale,
        out=out,
        publish=publish,
    )


if __name__ == "__main__":
    start(main)
