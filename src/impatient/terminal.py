"""Tables in the terminal, as wide as it is."""

from __future__ import annotations

import io
import shutil
import textwrap
from typing import Literal

import rich.table
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from impatient.characters import visible
from impatient.table import Cell, Column, Table

# spaces between two columns
GAP = 2
# a first column is folded rather than wider than this, where the terminal is narrow
NARROW_NAMES = 24


def as_text(table: Table, *, rest: str) -> str:
    """Draw a table without colours, as wide as the terminal, or 100 where there is none.

    Args:
        table: what is drawn.
        rest: where the columns are that do not fit.
    """
    width = shutil.get_terminal_size((100, 24)).columns
    page = io.StringIO()
    # in a notebook rich would show the table there, and write nothing
    console = Console(file=page, width=width, color_system=None, force_jupyter=False)
    console.print(rich_table(table, width, rest))
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def rich_table(table: Table, width: int, rest: str = "--json has all") -> rich.table.Table:
    """Draw a table for a terminal of some width.

    Where it is too wide, details go below their cells and titles are folded; then optional columns
    are left out, which a note below says, with where the rest is; then names are folded.
    """
    shown = table.shown_in("terminal")
    if _width(shown, wide=True) <= width:
        return _drawn(shown, wide=True)
    left_out: list[str] = []
    while _width(shown, wide=False) > width:
        optional = [
            index
            for index, column in enumerate(shown.columns)
            if isinstance(column, Column) and column.optional
        ]
        if not optional:
            break
        left_out.insert(0, _words(shown.columns[optional[-1]]))
        shown = shown.keep([k for k in range(len(shown.columns)) if k != optional[-1]])
    note = f"not shown at this width: {', '.join(left_out)}; {rest}" if left_out else None
    return _drawn(shown, wide=False, note=note)


def _drawn(table: Table, *, wide: bool, note: str | None = None) -> rich.table.Table:
    made = rich.table.Table(
        title=Text(visible(table.title), style="italic"),
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, GAP - 1, 0, 0),
        caption=None if note is None else Text(note),
        caption_justify="left",
    )
    for index, title in enumerate(table.columns):
        # folded, not cut off: names that begin alike stay apart
        justify: Literal["left", "right"] = "left" if index < table.left else "right"
        made.add_column(
            Text(_title(table, index, wide)),
            justify=justify,
            overflow="fold",
            # a number and its unit stay together
            no_wrap=index >= table.left and not _is_long(title),
        )
    for row in table.rows:
        made.add_row(*(_text(cell, wide) for cell in row))
    return made


def _width(table: Table, *, wide: bool) -> int:
    """Count the characters that a table needs, its longest names folded if it is narrow."""
    total = GAP * (len(table.columns) - 1)
    for index in range(len(table.columns)):
        cells = max((_cells(_text(row[index], wide).plain) for row in table.rows), default=0)
        if not wide and index < table.left:
            cells = min(cells, NARROW_NAMES)
        if not wide and _is_long(table.columns[index]):
            cells = min(cells, 12)
        total += max(cells, _cells(_title(table, index, wide)))
    return total


def _cells(text: str) -> int:
    return max(map(cell_len, text.splitlines()), default=0)


def _is_long(column: str | Cell | Column) -> bool:
    return isinstance(column, Column) and column.folds


def _words(cell: str | Cell | Column) -> str:
    return cell.title if isinstance(cell, Column) else _text(cell, wide=True).plain


def _title(table: Table, index: int, wide: bool) -> str:
    """Fold a title to the width of what stands below it."""
    title = table.columns[index]
    if wide:
        return _words(title)
    below = max((_cells(_text(row[index], wide).plain) for row in table.rows), default=0)
    if _is_long(title):
        below = min(below, 12)
    text = _text(title, wide) if isinstance(title, Cell) else Text(_words(title))
    lines = (
        textwrap.wrap(line, max(below, 6), break_long_words=False, break_on_hyphens=False)
        for line in text.plain.splitlines()
    )
    return "\n".join("\n".join(folded) for folded in lines)


def _text(cell: str | Cell | Column, wide: bool) -> Text:
    # no markup: names may have brackets of their own
    if not isinstance(cell, Cell):
        return Text(visible(str(cell)))
    detail = f" ({cell.detail})" if wide else f"\n{cell.detail}"
    text = f"{cell.text}{detail}" if cell.detail else cell.text
    return Text(visible(text), style="bold" if cell.strong else "")
