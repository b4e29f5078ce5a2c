"""Draw the README's pictures, light and dark, from examples/cifar10/evaluation.json.

    python docs/draw_readme_figure.py

They are legible at half their width: few things, each named where it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from impatient import Evaluation
from impatient.evaluation.evaluate import Row
from impatient.evaluation.plots import save_figure, styled

ROOT = Path(__file__).parent.parent


class Look(NamedTuple):
    """Colours of a page: those of the report."""

    ink: str
    soft: str
    line: str
    blue: str
    good: str
    bad: str


LOOKS = {
    "light": Look("#16181c", "#5f656d", "#dcd9d2", "#0a66d6", "#12876a", "#cf4f1f"),
    "dark": Look("#eceae6", "#a5a9b0", "#3a3d43", "#5aa9ff", "#2fb391", "#ef7a4a"),
}
SIZE = 17.0


def accuracy_time(evaluation: Evaluation, look: Look) -> Figure:
    with styled():
        figure = Figure(figsize=(8.0, 4.6), dpi=100, layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.subplots()
        exits = evaluation.of("exit")
        times = [row.interruptible_s * 1e3 for row in exits]
        held = [row.accuracy.value for row in exits]
        right = 1.2 * times[-1]
        axes.step(
            [*times, right], [*held, held[-1]], where="post", color=look.soft, lw=2.5, alpha=0.6
        )
        axes.plot(times, held, "o", color=look.soft, markersize=13)
        policies = sorted(evaluation.of("policy"), key=lambda row: row.contract_s)
        axes.plot(*_points(policies), "o", color=look.blue, markersize=14)
        alone = [row for row in evaluation.of("exit_free") if "alone" in row.name]
        axes.plot(*_points(alone), "X", color=look.bad, markersize=14)
        _say(axes, times[0], held[0], "first exit", look.soft, (12, -26))
        _say(axes, times[-1], held[-1], "last exit", look.soft, (-4, -30))
        row = policies[0]
        name = "stop when sure"
        _say(axes, row.contract_s * 1e3, row.accuracy.value, name, look.blue, (-14, -5), "right")
        for row in alone:
            name = "without exits: this, or nothing"
            _say(axes, row.contract_s * 1e3, row.accuracy.value, name, look.bad, (-14, 6), "right")
        _dress(axes, look, right)
    return figure


def _points(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row.contract_s * 1e3 for row in rows], [row.accuracy.value for row in rows]


def _say(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    colour: str,
    offset: tuple[float, float],
    side: str = "left",
) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=offset,
        textcoords="offset points",
        color=colour,
        size=SIZE,
        weight="bold",
        ha=side,
    )


def _dress(axes: Axes, look: Look, right: float) -> None:
    axes.set_xlim(0.0, right)
    axes.set_ylim(0.5, 0.9)
    axes.set_yticks([0.5, 0.6, 0.7, 0.8, 0.9])
    axes.set_xticks([0.0, 1.0, 2.0, 3.0, 4.0])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ms"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g} %"))
    axes.tick_params(labelsize=SIZE, labelcolor=look.soft, length=0, pad=8)
    axes.grid(axis="y", color=look.line, alpha=1.0, linewidth=1.0)
    axes.spines[:].set_visible(False)
    axes.set_title("accuracy of the answer, by time", color=look.ink, size=SIZE, loc="left", pad=12)


def main() -> None:
    evaluation = Evaluation.load(ROOT / "examples/cifar10/evaluation.json")
    for name, look in LOOKS.items():
        save_figure(accuracy_time(evaluation, look), ROOT / f"docs/img/accuracy-time-{name}.svg")


if __name__ == "__main__":
    main()
