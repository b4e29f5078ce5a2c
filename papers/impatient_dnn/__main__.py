"""`python -m papers.impatient_dnn`: every run of Table 1 that is missing, then the tables."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markdown import Markdown

from impatient.errors import ImpatientError
from impatient.verbs.options import PositiveOrNone
from papers.command import Out, ScaleName, start
from papers.data import ROOT
from papers.impatient_dnn import recipe, tables
from papers.results import fill

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
    runs: Annotated[
        Path, tyro.conf.arg(help="Folder of checkpoints and results of single runs.")
    ] = RUNS,
    workers: Annotated[
        PositiveOrNone, tyro.conf.arg(help="Runs at a time; by default the scale's.")
    ] = None,
    seeds: Annotated[
        PositiveOrNone, tyro.conf.arg(help="How many seeds; by default the scale's.")
    ] = None,
) -> None:
    """Reproduce Table 1 of Impatient DNNs.

    Stop with Ctrl-C at any time. The same command continues.
    """
    console = Console()
    settings = recipe.SCALES[scale.value]
    try:
        results = recipe.run(settings, runs / scale.value, workers=workers, seeds=seeds)
    except ImpatientError as error:
        Console(stderr=True).print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped. What is finished is kept; the same command goes on.")
        raise SystemExit(130) from None
    folder = out or HERE / "results" / scale.value
    page = tables.write(
        settings.pairs, results, range(seeds or settings.seeds), folder, table.value
    )
    if out is None and scale is not ScaleName.smoke:
        fill(HERE / "README.md", scale.value, page)
    console.print(Markdown(page))
    console.print(f"wrote {folder}", soft_wrap=True)


if __name__ == "__main__":
    start(main)
