"""What more time buys: accuracy gained per millisecond from one exit, or network, to the next.

Source:
    Bolukbasi et al. 2017, figure 5. They find that it falls less from layer to layer of one
    network than from network to network, and that selection saves more for that reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure

from impatient.evaluation.plots import BLUE, styled
from papers.results import spread

GAINED = "gained since the one before, points per ms"


def gains(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Compute the points of accuracy per millisecond from each row to the next.

    Args:
        rows: with "s" and "accuracy", from the one that takes the least time on.
    Returns:
        One number fewer than rows, NaN where the next takes no more time.
    Example:
        >>> gains([{"s": 0.001, "accuracy": 0.5}, {"s": 0.003, "accuracy": 0.75}])
        [12.5]
    """
    return [
        100.0 * (after["accuracy"] - before["accuracy"]) / (1e3 * (after["s"] - before["s"]))
        if after["s"] > before["s"]
        else math.nan
        for before, after in pairwise(rows)
    ]


def gain_texts(splits: Sequence[Mapping[str, Any]], what: str) -> list[str]:
    """Format the gains of all splits for a table.

    Nothing stands before the first row, nor where a row takes no more time than the one before.
    """
    columns = zip(*(gains(split[what]) for split in splits), strict=True)
    return [
        "",
        *("" if any(map(math.isnan, column)) else spread(column).text(2) for column in columns),
    ]


def draw_gains(title: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the points gained per millisecond over the time in which they are gained."""
    with styled():
        figure = Figure(figsize=(7.2, 3.6), dpi=100, layout="constrained")
        figure.suptitle(title, x=0.012, ha="left", size=11.5, weight="bold")
        axes = figure.add_subplot()
        axes.stairs(gains(rows), [1e3 * row["s"] for row in rows], fill=True, color=BLUE, alpha=0.6)
        axes.set(
            xlim=(0.0, None),
            xlabel="time until the answer, ms",
            ylabel="accuracy gained, points per ms",
        )
        axes.grid(axis="y")
    return figure
