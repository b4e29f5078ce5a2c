"""`python -m papers.impatient_dnn`: every run of Table 1 that is missing, then the tables."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from impatient.errors import ImpatientError
from papers.data import ROOT
from papers.impatient_dnn import recipe, tables
from papers.results import fill

HERE = Path(__file__).parent
RUNS = ROOT / "runs" / "papers" / "impatient_dnn"


class ScaleName(StrEnum):
    """How much is trained."""

    smoke = "smoke"
    cpu = "cpu"
    gpu = "gpu"


class Table(StrEnum):
    """What is written."""

    table1 = "table1"
    exits = "exits"
    all = "all"


app = typer.Typer(add_completion=False)


@app.command()
def main(
    scale: Annotated[
        ScaleName,
        typer.Option(help="smoke: seconds, on digits; cpu: half an hour on two cores; gpu: hours."),
    ],
    table: Annotated[Table, typer.Option(help="Which tables and figures to write.")] = Table.all,
    out: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Folder of tables and figures; by default the paper folder's own, and its card is "
                "filled."
            )
        ),
    ] = None,
    runs: Annotated[
        Path, typer.Option(help="Folder of checkpoints and results of single runs.")
    ] = RUNS,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; by default the scale's.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many seeds; by default the scale's.")
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
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped. What is finished is kept; the same command goes on.")
        raise typer.Exit(130) from None
    folder = out or HERE / "results" / scale.value
    page = tables.write(
        settings.pairs, results, range(seeds or settings.seeds), folder, table.value
    )
    if out is None and scale is not ScaleName.smoke:
        fill(HERE / "README.md", scale.value, page)
    console.print(Markdown(page))
    console.print(f"wrote {folder}", soft_wrap=True)


if __name__ == "__main__":
    app()
