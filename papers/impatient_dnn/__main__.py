"""`python -m papers.impatient_dnn`: every run of Table 1 that is missing, then the tables."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import tyro

from impatient.verbs.options import PositiveOrNone
from papers.command import Out, Publish, Runs, ScaleName, Seeds, carry_out, start
from papers.data import ROOT
from papers.impatient_dnn import recipe, tables

HERE = Path(__file__).parent
RUNS = ROOT / "runs" / "papers" / "impatient_dnn"


class Table(StrEnum):
    """What is written."""

    table1 = "table1"
    exits = "exits"
    all = "all"


def main(
    scale: Annotated[
        ScaleName,
        tyro.conf.arg(
            help="smoke: seconds, on digits; cpu: half an hour on two cores; gpu: hours."
        ),
    ],
    table: Annotated[Table, tyro.conf.arg(help="Which tables and figures to write.")] = Table.all,
    out: Out = None,
    runs: Runs = RUNS,
    workers: Annotated[
        PositiveOrNone, tyro.conf.arg(help="Runs at a time; by default the scale's.")
    ] = None,
    seeds: Seeds = None,
    publish: Publish = False,
) -> None:
    """Reproduce Table 1 of Impatient DNNs.

    Stop with Ctrl-C at any time. The same command continues.
    """
    settings = recipe.SCALES[scale.value]
    settings = dataclasses.replace(
        settings, workers=workers or settings.workers, seeds=seeds or settings.seeds
    )
    folder = runs / scale.value
    carry_out(
        lambda: recipe.run(settings, folder),
        lambda into: tables.write(
            settings.pairs,
            recipe.results_so_far(settings, folder),
            range(settings.seeds),
            into,
            table.value,
        ),
        card=HERE / "README.md",
        scale=scale,
        out=out,
        publish=publish,
    )


if __name__ == "__main__":
    start(main)
