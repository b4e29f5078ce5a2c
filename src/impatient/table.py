"""Tables as data, shown by the terminal and by the report alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell that is more than a text.

    Attributes:
        text: What is shown.
        detail: What stands beside it, smaller.
        strong: Whether it stands out.
    """

    text: str
    detail: str = ""
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """A column that is not shown everywhere.

    Attributes:
        title: What is in it.
        only: The only place where it is shown; None where it is shown in all.
        optional: Whether a narrow terminal may leave it out; the last such column goes first.
        folds: Whether its cells are lists, which may be folded.
    """

    title: str
    only: Literal["terminal", "page"] | None = None
    optional: bool = False
    folds: bool = False


Row = Sequence[str | Cell]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What a table says, without how it looks.

    Attributes:
        title: What the table is about.
        columns: Titles of the columns.
        rows: A cell for each column.
        left: How many columns are aligned to the left.
        kinds: What each row is, such as "policy"; empty if all are alike.
    """

    title: str
    columns: Sequence[str | Cell | Column]
    rows: Sequence[Row]
    left: int = 1
    kinds: Sequence[str] = ()

    def shown_in(self, place: Literal["terminal", "page"]) -> Table:
        """Leave out the columns that are only for another place.

        On a page those without any text are left out, too.
        """
        shown = [
            not isinstance(column, Column)
            or (
                column.only in (None, place)
                and (place != "page" or any(row[index] != "" for row in self.rows))
            )
            for index, column in enumerate(self.columns)
        ]
        return self.keep([index for index, is_shown in enumerate(shown) if is_shown])

    def keep(self, kept: Sequence[int]) -> Table:
        """Leave out all columns but these."""
        return replace(
            self,
            columns=[self.columns[index] for index in kept],
            rows=[[row[index] for index in kept] for row in self.rows],
        )


def percent(share: float, digits: int = 1) -> str:
    """Write a share for people, its unit on the same line."""
    return f"{share * 100:.{digits}f}\N{NO-BREAK SPACE}%"


def points(share: float) -> str:
    """Write a share that is lost or gained for people, in points.

    Example:
        >>> points(0.01), points(0.025)
        ('1 point', '2.5 points')
    """
    return f"{share * 100:g} point{'' if share == 0.01 else 's'}"


def milliseconds(seconds: float) -> str:
    """Write a time for people: three digits, with its unit."""
    return f"{three_digits(seconds)}\N{NO-BREAK SPACE}ms"


def three_digits(seconds: float) -> str:
    """Write a time in ms with three digits, without the unit."""
    number = seconds * 1e3
    return f"{number:#.3g}".rstrip(".") if number < 1e3 else f"{number:.0f}"


def grouped(number: int) -> str:
    """Write a whole number for people: its thousands apart."""
    return f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def in_ms(seconds: float) -> str:
    """Write a time in ms with three decimals, without the unit."""
    return f"{seconds * 1e3:.3f}"
