"""Draw the README's pictures, light and dark, from the zoo's recordings and measured times.

    python docs/draw_readme_figure.py

The times are those of examples/cifar10, which `examples/cifar10/make.py` measures. The pictures are
legible at half their width: few things, each named where it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from impatient import CostProfile, Evaluation, Recording
from impatient.evaluation import judge_policies
from impatient.evaluation.plots import save_figure, styled
from impatient.networks.zoo import zoo_folder
from impatient.policies.risk import threshold_family

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "cifar10"
NETWORK = "anytimenet-cifar10"


class Look(NamedTuple):
    """Colours of a page: those of the report."""

    ink: str
    soft: str
    line: str
    blue: str
    bad: str


LOOKS = {
    "light": Look("#16181c", "#5f656d", "#dcd9d2", "#0a66d6", "#cf4f1f"),
    "dark": Look("#eceae6", "#a5a9b0", "#3a3d43", "#5aa9ff", "#ef7a4a"),
}
SIZE = 17.0


class Points(NamedTuple):
    """Milliseconds, and accuracies from 0 to 1."""

    times: Sequence[float]
    accuracies: Sequence[float]


class Shown(NamedTuple):
    """What a picture shows.

    Attributes:
        exits: what a run holds, exit by exit.
        sure: runs that stop when they are sure, from bold to careful, at their mean time.
        free: the same weights without exits.
    """

    exits: Points
    sure: Points
    free: Points


def shown() -> Shown:
    evaluation = Evaluation.load(EXAMPLE / "evaluation.json")
    costs = CostProfile.load(EXAMPLE / "profile.json")
    recording = Recording.load(zoo_folder(NETWORK) / "recordings" / "test.safetensors")
    grid = [*np.linspace(0.2, 0.9, 36), *(1.0 - np.geomspace(0.1, 1e-3, 15))]
    # one threshold for all exits, which is not fitted to the samples it is judged on
    judged = judge_policies(recording, costs, threshold_family(len(costs.exits), grid=grid)[::-1])
    free = evaluation["no exits, same weights"]
    exits = evaluation.of("exit")
    return Shown(
        exits=Points(
            [row.interruptible_s * 1e3 for row in exits], [row.accuracy.value for row in exits]
        ),
        sure=Points((judged.contract_s * 1e3).tolist(), judged.accuracy.tolist()),
        free=Points([free.contract_s * 1e3], [free.accuracy.value]),
    )


def accuracy_time(values: Shown, look: Look) -> Figure:
    with styled():
        figure = Figure(figsize=(8.0, 4.6), dpi=100, layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.subplots()
        times, held = values.exits
        right = 1.12 * times[-1]
        axes.step(
            [*times, right], [*held, held[-1]], where="post", color=look.soft, lw=2.5, alpha=0.6
        )
        axes.plot(times, held, "o", color=look.soft, markersize=12)
        axes.plot(*values.sure, color=look.blue, lw=4.5)
        axes.plot(*values.free, "X", color=look.bad, markersize=15)
        _dress(axes, look, right, values)
        low = held[0] + 0.2 * (held[-1] - held[0])
        _say(axes, right, low, "at any moment: an answer", look.soft, (-4, 0), "right")
        high = held[0] + 0.75 * (held[-1] - held[0])
        place = int(np.abs(np.asarray(values.sure.accuracies) - high).argmin())
        bold = (values.sure.times[place], values.sure.accuracies[place])
        _say(axes, *bold, "stop when sure", look.blue, (-12, 8), "right")
        free = (values.free.times[0], values.free.accuracies[0])
        _say(axes, *free, "without exits: this, or nothing", look.bad, (0, 16), "center")
    return figure


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


def _dress(axes: Axes, look: Look, right: float, values: Shown) -> None:
    every = [value for points in values for value in points.accuracies]
    lowest, highest = min(every), max(every)
    axes.set_xlim(0.0, right)
    # room for what is said above
    axes.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.25 * (highest - lowest))
    axes.yaxis.set_major_locator(MultipleLocator(0.1 if highest - lowest > 0.15 else 0.05))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ms"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.0f} %"))
    axes.tick_params(labelsize=SIZE, labelcolor=look.soft, length=0, pad=8)
    axes.grid(axis="y", color=look.line, alpha=1.0, linewidth=1.0)
    axes.spines[:].set_visible(False)
    axes.set_title("accuracy of the answer, by time", color=look.ink, size=SIZE, loc="left", pad=12)


def main() -> None:
    values = shown()
    for name, look in LOOKS.items():
        save_figure(accuracy_time(values, look), ROOT / f"docs/img/accuracy-time-{name}.svg")


if __name__ == "__main__":
    main()
