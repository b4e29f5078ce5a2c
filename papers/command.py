"""What the papers' commands have in common: options, clean stops, and where tables go."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import tyro
from rich.console import Console

from impatient.errors import ImpatientError
from impatient.verbs.options import Flag, Positive, PositiveOrNone
from papers.results import fill


class ScaleName(StrEnum):
    """How much is trained."""

    smoke = "smoke"
    cpu = "cpu"
    gpu = "gpu"


Out = Annotated[
    Path | None,
    tyro.conf.arg(
        help="Folder of tables and figures; by default the paper folder's own, and its card is "
        "filled."
    ),
]
Runs = Annotated[
    Path, tyro.conf.arg(help="Folder of checkpoints, recordings and results of single runs.")
]
Workers = Annotated[Positive, tyro.conf.arg(help="Runs at a time; measurements run alone.")]
Seeds = Annotated[PositiveOrNone, tyro.conf.arg(help="How many seeds; by default the scale's.")]
Publish = Annotated[
    Flag, tyro.conf.arg(help="Only write the tables of what is finished; run nothing.")
]


def start(main: Callable[..., None], arguments: Sequence[str] | None = None) -> None:
    """Call a paper's command with the options of the command line."""
    config = (tyro.conf.DisallowNone, tyro.conf.HelptextFromCommentsOff)
    tyro.cli(main, args=arguments, config=config)


def carry_out(
    run: Callable[[], object],
    write: Callable[[Path], str],
    *,
    card: Path,
    scale: ScaleName,
    out: Path | None,
    publish: bool,
    part: str = "",
) -> NoReturn:
    """Run what is missing, then write the tables of what is finished.

    The tables are written also after an error or Ctrl-C.

    Args:
        run: everything that takes time.
        write: all tables into a folder; returns them as a page.
        card: the paper's README.md, whose marks the page fills, but for smoke runs and other
            folders.
        publish: leave `run` out.
        part: of the scale, with tables and marks of its own; by default all of it.
    Raises:
        SystemExit: always; its code says how it ended.
    """
    code = 0
    name = f"{scale.value}-{part}" if part else scale.value
    try:
        if not publish:
            run()
    except ImpatientError as error:
        say(f"Error: {error}")
        code = 1
    except KeyboardInterrupt:
        say("Stopped. What is finished is kept; the same command goes on.")
        code = 130
    try:
        page = write(out or card.parent / "results" / name)
        if out is None and scale is not ScaleName.smoke:
            fill(card, name, page)
    except ImpatientError as error:
        say(f"Error: {error}")
        raise SystemExit(1) from error
    # as it is: a table drawn for a terminal would be cut to its width
    sys.stdout.write(page + "\n")
    raise SystemExit(code)


def say(text: str) -> None:
    """To the standard error."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
