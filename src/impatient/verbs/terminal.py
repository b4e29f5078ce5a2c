"""Tables in the terminal."""

from __future__ import annotations

from typing import Literal

import rich.table
from rich.text import Text

from impatient.table import Cell, Column, Table


def rich_table(table: Table) -> rich.table.Table:
    """Draw a table for the terminal."""
    shown = table.shown_in("terminal")
    made = rich.table.Table(
        title=Text(shown.title, style="italic"), title_justify="left", header_style="bold"
    )
    for index, title in enumerate(shown.columns):
        # folded, not cut off: names that begin alike stay apart
        justify: Literal["left", "right"] = "left" if index < shown.left else "right"
        made.add_column(_text(title), justify=justify, overflow="fold")
    for row in shown.rows:
        made.add_row(*map(_text, row))
    return made


def _text(cell: str | Cell | Column) -> Text:
    # no markup: names may have brackets of their own
    if not isinstance(cell, Cell):
        return Text(str(cell))
    text = f"{cell.text} ({cell.detail})" if cell.detail else cell.text
    return Text(text, style="bold" if cell.strong else "")
