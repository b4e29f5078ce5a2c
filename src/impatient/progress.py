"""The one display of progress: what runs, how far it is, how fast, and how long it still takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import ParamSpec, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Entry = TypeVar("Entry")
Given = ParamSpec("Given")
Found = TypeVar("Found")


class SpeedColumn(ProgressColumn):
    """How many units are done in a second."""

    def render(self, task: Task) -> Text:
        """Write the speed, once it is known."""
        speed = task.finished_speed or task.speed
        if speed is None:
            return Text("")
        number = f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
        return Text(f"{number} {task.fields.get('unit', 'steps')}/s", style="progress.data.speed")


# Seconds between two drawings of a display that draws between entries alone. What is timed after a
# drawing finds the caches cold, and one in a hundred would make the p99.
PAUSE_S = 1.0


def display(wanted: bool, *, between: bool = False) -> Progress:
    """Make the display, on the error stream, so that results can be piped.

    It is shown on a terminal alone, and disappears when all is done. Add tasks with
    `add_task(description, total=..., unit="samples")`; a task may have a text beside its numbers,
    as `note`.

    Args:
        wanted: whether it is shown at all.
        between: whether it is drawn only when asked to; else a thread draws it.
    """
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(20),
        TaskProgressColumn(),
        SpeedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        transient=True,
        # into a pipe an empty line would be written when all is done
        disable=not (wanted and console.is_interactive),
        auto_refresh=not between,
    )


def tracked(
    entries: Iterable[Entry],
    description: str,
    *,
    total: int,
    unit: str,
    wanted: bool,
    between: bool = False,
) -> Generator[Entry]:
    """Give entries one by one, and show how many have been worked on.

    Args:
        entries: what is worked on.
        description: what is done with them.
        total: how many there are.
        unit: what they are called, in plural.
        wanted: whether anything is shown.
        between: whether it is drawn between entries alone, because what is done with one is timed.
    """
    with display(wanted, between=between) as shown:
        task = shown.add_task(description, total=total, unit=unit, note="")
        drawn_s = -PAUSE_S
        for entry in entries:
            yield entry
            shown.advance(task)
            if between and shown.get_time() - drawn_s >= PAUSE_S:
                shown.refresh()
                drawn_s = shown.get_time()


@contextlib.contextmanager
def counted(
    work: Callable[Given, Found], description: str, *, total: int, unit: str, wanted: bool
) -> Iterator[Callable[Given, Found]]:
    """Give work that is done again and again, and show how often it was.

    Args:
        work: what is done.
        description: what is done by it all.
        total: how often it is done, at most.
        unit: what is counted, in plural.
        wanted: whether anything is shown.
    """
    with display(wanted) as shown:
        task = shown.add_task(description, total=total, unit=unit, note="")

        def counting(*arguments: Given.args, **options: Given.kwargs) -> Found:
            found = work(*arguments, **options)
            shown.advance(task)
            return found

        yield counting


@contextlib.contextmanager
def waiting(description: str, *, wanted: bool) -> Iterator[None]:
    """Show that one piece of work is being done, of which nobody knows how long it takes."""
    with display(wanted) as shown:
        shown.add_task(description, total=None, unit="", note="")
        yield
