"""Draw figures of an evaluation and of a cost profile.

Each function returns a `Figure`; nothing is shown, and no state is kept.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from impatient.budgets import Budget
from impatient.characters import visible
from impatient.costs import CostProfile, Quantiles, Statistic
from impatient.errors import StorageError
from impatient.evaluation.evaluate import Evaluation, Kind, Row
from impatient.files import written_whole
from impatient.table import milliseconds, percent

# Okabe and Ito's colours, distinct with every common kind of colour blindness; these read on
# white and on black
BLUE = "#0072b2"
ORANGE = "#e69f00"
GREEN = "#009e73"
VERMILION = "#d55e00"
PURPLE = "#cc79a7"
SKY = "#56b4e9"
# ink and paper are the page's; white is always white
INK = "#22262b"
PAPER = "#ffffff"
MUTED = "#808890"
WHITE = "#fefefe"
# colour, marker and size of the points of each kind of row, the first one's first
LOOKS: dict[Kind, list[tuple[str, str, float]]] = {
    "policy": [
        (ORANGE, "s", 7.5),
        (GREEN, "D", 7.5),
        (PURPLE, "v", 7.5),
        (SKY, "<", 7.5),
        (VERMILION, ">", 7.5),
        (MUTED, "h", 7.5),
    ],
    "exit_free": [(VERMILION, "*", 14.0), (INK, "X", 9.5)],
    "static": [(MUTED, "^", 8.0), (MUTED, "p", 8.0), (MUTED, "d", 8.0)],
    "oracle": [(MUTED, "P", 8.0)],
}
# 720 px at 100 dpi, the width of a page of text
WIDTH_INCHES = 7.2
# times further apart than this are shown on a logarithmic axis
LOG_BEYOND = 20.0
# share of the height that the budgets take
SHADE = 0.22

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": False,
    "axes.labelcolor": INK,
    "axes.labelsize": 10.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": PAPER,
    "font.family": ["DejaVu Sans"],
    "font.size": 10.0,
    "grid.alpha": 0.28,
    "grid.color": MUTED,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "impatient",
    "text.color": INK,
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Use this module's look while figures are made or written.

    The caller's own settings come back afterwards.
    """
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # names may be in any script
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def accuracy_time(evaluation: Evaluation, budget: tuple[str, Budget] | None = None) -> Figure:
    """Draw accuracy over time.

    Exits are steps; policies, networks without exits and the oracle are points, with 95 %
    intervals.

    Args:
        budget: name and distribution of the time budgets to draw along the bottom.
    """
    with styled():
        figure, axes = _figure(_curve_title(evaluation), 4.6)
        axes.set_xlabel("time per sample, ms")
        axes.set_ylabel(evaluation.quality_name)
        right = _limits(axes, evaluation, budget)
        axes.grid(axis="y")
        _draw_exits(axes, evaluation.of("exit"), right)
        for kind, looks in LOOKS.items():
            for row, look in zip(evaluation.of(kind), itertools.cycle(looks), strict=False):
                _point(axes, row, *look)
        if budget:
            _draw_budget(axes, *budget)
        _legend(figure, axes, "exits,", "policy", "no", "static", "oracle:")
    return figure


def exit_shares(evaluation: Evaluation) -> Figure:
    """Draw the shares of samples that exits answer.

    There is a bar for every policy and the oracle.
    """
    rows = [*evaluation.of("policy"), *evaluation.of("oracle")]
    exits = len(evaluation.of("exit"))
    with styled():
        figure, axes = _figure(
            _shares_title(evaluation), 1.7 + 0.42 * len(rows) + 0.22 * math.ceil(exits / 6)
        )
        left = np.zeros(len(rows))
        for exit, colour in enumerate(_shades(exits)):
            shares = np.array([row.shares[exit] for row in rows])
            bars = axes.barh(
                range(len(rows)),
                shares,
                left=left,
                height=0.66,
                color=colour,
                edgecolor=PAPER,
                label=f"exit {exit}",
            )
            # a narrow bar has no room
            labels = [percent(share, 0) if share >= 0.05 else "" for share in shares]
            axes.bar_label(bars, labels, label_type="center", color=_on(colour), size=9.5)
            left += shares
        axes.set_yticks(range(len(rows)), [_short(row.name, 28) for row in rows])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlim(0.0, 1.0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value, 0)))
        axes.set_xlabel("share of the samples")
        _legend(figure, axes, columns=min(exits, 6))
    return figure


def predicted_true(true: Sequence[float], said: Mapping[str, Sequence[float]]) -> Figure:
    """Draw what exits say of some numbers against the true ones.

    Args:
        true: the numbers, [N].
        said: by the name of an exit, what it says of each.
    """
    with styled():
        figure, axes = _figure("Predicted against true", 4.2)
        ends = [min(true), max(true)]
        axes.plot(ends, ends, color=MUTED, linewidth=1.0)
        looks = ((ORANGE, "s"), (BLUE, "o"))
        for (name, values), (colour, marker) in zip(said.items(), looks, strict=False):
            axes.scatter(true, values, s=16, color=colour, marker=marker, alpha=0.65, label=name)
        axes.set_xlabel("true")
        axes.set_ylabel("predicted")
        _legend(figure, axes)
    return figure


def where_time_goes(costs: CostProfile, batch_size: int = 1) -> Figure:
    """Draw when each stage and each head runs if all of them do.

    There is one row per exit, beside the time of the untouched backbone.
    """
    batch = costs.at(batch_size)
    with styled():
        figure, axes = _figure(_costs_title(costs, batch_size), 1.9 + 0.36 * costs.num_exits)
        rows = np.arange(costs.num_exits)
        stages = _ms(batch.stages, "mean")
        heads = _ms(batch.heads, "mean")
        ends = np.cumsum(stages + heads)
        axes.barh(
            rows, stages, left=ends - heads - stages, height=0.62, color=BLUE, label="stage, mean"
        )
        axes.barh(rows, heads, left=ends - heads, height=0.62, color=ORANGE, label="head, mean")
        slow = np.maximum(_ms(batch.stages, "p99") + _ms(batch.heads, "p99") - stages - heads, 0.0)
        axes.errorbar(
            ends,
            rows,
            xerr=[0 * slow, slow],
            fmt="none",
            ecolor=MUTED,
            elinewidth=1.1,
            capsize=3,
            label="to p99",
        )
        whole = batch.exit_free.mean * 1e3
        axes.axvline(
            whole,
            color=VERMILION,
            linewidth=1.6,
            linestyle=(0, (5, 2)),
            label="without exits, mean",
        )
        _clip(axes, ends + slow, max(float(ends[-1]), whole))
        axes.set_yticks(
            rows, [f"exit {k}: {_tail(name, 20)}" for k, name in enumerate(costs.exits)]
        )
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_xlabel(
            f"time since the start, ms (batch size {batch_size}, n = {batch.exit_free.n})"
        )
        _legend(figure, axes, "stage,", "head,", "to", columns=4)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG or SVG, whole or not at all.

    Figures of equal values give equal bytes.

    Raises:
        StorageError: if the name ends in neither .png nor .svg, or the file cannot be written.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise StorageError(
            f"cannot write a figure as {Path(path).name!r}; expected a name that ends in .png or "
            ".svg."
        )
    # dates and versions inside would make equal figures differ
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with styled(), written_whole(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=200, metadata=metadata)


def _figure(title: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=100, layout="constrained")
    figure.suptitle(title, x=0.012, ha="left", size=11.5, weight="bold")
    return figure, figure.add_subplot()


def _legend(figure: Figure, axes: Axes, *first: str, columns: int = 3) -> None:
    """Put a legend below the axes, where it hides nothing.

    Labels that begin with a word of `first` lead.
    """
    entries = zip(*axes.get_legend_handles_labels(), strict=True)
    rank = {word: place for place, word in enumerate(first)}
    handles, labels = zip(
        *sorted(entries, key=lambda entry: rank.get(entry[1].split()[0], len(rank))), strict=True
    )
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=columns,
        handletextpad=0.5,
        columnspacing=1.4,
        borderaxespad=0.3,
    )


def _clip(axes: Axes, slow_ends: np.ndarray, longest: float) -> None:
    """End the axis soon after the longest mean.

    One slow run in a hundred must not squeeze all else to the left.
    """
    right = min(1.04 * max(float(slow_ends.max()), longest), 1.35 * longest)
    axes.set_xlim(0.0, right)
    for row, end in enumerate(slow_ends):
        if end > right:
            axes.text(
                right,
                row - 0.08,
                f"{end:.3g} ms \N{RIGHTWARDS ARROW}",
                ha="right",
                va="bottom",
                size=8.5,
            )


def _limits(axes: Axes, evaluation: Evaluation, budget: tuple[str, Budget] | None) -> float:
    """Set the scales of accuracy over time, and return the right end, ms."""
    times = [
        time * 1e3
        for row in evaluation.rows
        for time in (row.contract_s, row.interruptible_s)
        if time > 0.0
    ]
    first = min(times)
    last = max(times)
    # budgets beyond twice the last exit change nothing that is drawn
    right = max(1.06 * last, min(budget[1].high * 1e3, 2.0 * last) if budget else 0.0)
    if last > LOG_BEYOND * first:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(first / 1.4, right)
    else:
        axes.set_xlim(0.0, right)
    bounds = [
        bound
        for row in evaluation.rows
        for bound in (row.accuracy.low, row.accuracy.high)
        if math.isfinite(bound)
    ]
    low = min(bounds)
    high = min(max(bounds), 1.0)
    room = max(high - low, 0.01)
    shaded = budget is not None and budget[1].shape != "point"
    axes.set_ylim(low - room * (SHADE + 0.1 if shaded else 0.06), high + 0.05 * room)
    ticks = MaxNLocator(nbins=7, steps=[1, 2, 5, 10]).tick_values(*axes.get_ylim())
    axes.set_yticks(
        [tick for tick in ticks if axes.get_ylim()[0] <= tick <= 1.0 + 1e-9 and tick >= 0.0]
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g} %"))
    return right


def _draw_exits(axes: Axes, rows: Sequence[Row], right: float) -> None:
    times = [row.interruptible_s * 1e3 for row in rows]
    held = [row.accuracy.value for row in rows]
    axes.step([*times, right], [*held, held[-1]], where="post", color=BLUE, linewidth=1.8, zorder=3)
    _points(
        axes,
        rows,
        times,
        label="exits, all heads run",
        color=BLUE,
        marker="o",
        markersize=11,
        elinewidth=1.2,
        zorder=4,
    )
    contract = [row.contract_s * 1e3 for row in rows]
    axes.plot(
        contract,
        held,
        linestyle="none",
        marker="o",
        markersize=6,
        markerfacecolor=PAPER,
        markeredgecolor=BLUE,
        alpha=0.75,
        zorder=3.5,
        label="exits, only that head runs",
    )
    for index, place in enumerate(zip(times, held, strict=True)):
        axes.annotate(
            f"{index}",
            place,
            color=WHITE,
            ha="center",
            va="center_baseline",
            size=8.5,
            weight="bold",
            zorder=4.5,
        )


def _point(axes: Axes, row: Row, colour: str, marker: str, size: float) -> None:
    labels = {"policy": f"policy {row.name}", "oracle": "oracle: cheapest right exit"}
    _points(
        axes,
        [row],
        [row.contract_s * 1e3],
        label=_short(labels.get(row.kind, row.name), 40),
        color=colour,
        marker=marker,
        markersize=size,
        markeredgecolor=PAPER,
        markeredgewidth=0.8,
        elinewidth=1.1,
        zorder=5,
    )


def _points(axes: Axes, rows: Sequence[Row], times: Sequence[float], **look: Any) -> None:
    values = np.array([row.accuracy.value for row in rows])
    low = values - [row.accuracy.low for row in rows]
    high = np.array([row.accuracy.high for row in rows]) - values
    axes.errorbar(
        times,
        values,
        yerr=np.nan_to_num([low, high], posinf=0.0),
        linestyle="none",
        capsize=0,
        **look,
    )


def _draw_budget(axes: Axes, name: str, budget: Budget) -> None:
    """Draw budgets along the bottom.

    One budget is a line, a log a histogram; others show their density.
    """
    left, right = axes.get_xlim()
    label = f"budgets: {_short(name, 30)}"
    logarithmic = axes.get_xscale() == "log"
    if budget.shape == "point":
        axes.axvline(
            budget.high * 1e3,
            color=MUTED,
            linewidth=1.4,
            linestyle=(0, (2, 2)),
            label=label,
            zorder=1,
        )
        return
    bottom = axes.twinx()
    bottom.set_axis_off()
    edges = np.geomspace(left, right, 241) if logarithmic else np.linspace(left, right, 241)
    if budget.samples_s:
        edges = edges[::6]
        heights = np.histogram(np.asarray(budget.samples_s) * 1e3, bins=edges)[0].astype(float)
    else:
        # on a logarithmic axis the density per logarithm, so that equal areas stay equal
        # probabilities
        middle = (edges[1:] + edges[:-1]) / 2
        heights = budget.density(middle / 1e3) * (middle if logarithmic else 1.0)
    bottom.stairs(heights, edges, fill=True, color=MUTED, alpha=0.3, linewidth=0.0)
    bottom.set_ylim(0.0, max(float(heights.max()), 1e-12) / (0.8 * SHADE))
    axes.fill_between([], [], color=MUTED, alpha=0.3, linewidth=0.0, label=label)


def _curve_title(evaluation: Evaluation) -> str:
    exits = evaluation.of("exit")
    alone = evaluation.of("exit_free")
    ends = [exits[0], exits[-1]] if len(exits) > 1 else [exits[0]]
    right = "right after" if evaluation.quality_name == "accuracy" else "after"
    title = ", ".join(
        f"{percent(row.accuracy.value)} {right} {milliseconds(row.interruptible_s)}" for row in ends
    )
    if not alone:
        return title
    return (
        f"{title};\nwithout exits {percent(alone[-1].accuracy.value)} after "
        f"{milliseconds(alone[-1].contract_s)}"
    )


def _shares_title(evaluation: Evaluation) -> str:
    policies = evaluation.of("policy")
    row = policies[0] if policies else evaluation.of("oracle")[0]
    what = f"Policy {_short(row.name, 30)}" if policies else "An oracle"
    return f"{what} answers\n{percent(1.0 - row.shares[-1], 0)} of the samples before the last exit"


def _costs_title(costs: CostProfile, batch_size: int) -> str:
    whole = costs.exit_free_s(batch_size=batch_size)
    staged = costs.interruptible_s(batch_size=batch_size)[-1]
    more = staged / whole - 1.0
    change = f"{percent(more, 0)} more than" if more >= 0.005 else "no more than"
    return (
        f"Stages and heads together take {milliseconds(staged)},\n{change} without exits "
        f"({milliseconds(whole)})"
    )


def _ms(parts: Sequence[Quantiles], statistic: Statistic) -> np.ndarray:
    return np.array([part.of_statistic(statistic) * 1e3 for part in parts])


def _shades(count: int) -> list[str]:
    """Choose colours from shallow to deep, each lighter than before."""
    places = np.linspace(0.28, 0.95, count) if count > 1 else [0.5]
    return [to_hex(mpl.colormaps["viridis"](place)) for place in places]


def _on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#101010" if 0.299 * red + 0.587 * green + 0.114 * blue > 125 else WHITE


def _short(text: str, most: int) -> str:
    # matplotlib draws no halves of characters
    text = visible(text)
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    # matplotlib hides labels that start with _
    return f"\u200b{text}" if text.startswith("_") else text


def _tail(text: str, most: int) -> str:
    # the end of a module's name tells it from its neighbours
    text = visible(text)
    return text if len(text) <= most else f"…{text[1 - most :]}"
