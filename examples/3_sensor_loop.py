"""Run a sensor loop at 30 frames a second, with AnytimeNet and with a static network.

AnytimeNet answers in the time that other tasks leave. The static network is often late.

python examples/3_sensor_loop.py

The other tasks are made up: how much of each frame they leave is drawn beforehand. The networks are
not: they run on this machine, by its clock, in turn on the same frames. The time left is scaled to
what the static network takes here, so that on a slower or faster machine the picture is the same:
it fits in two thirds of the frames, and is late in the others.

Run it on a machine with a processor to spare. Where other programs hold the loop up for longer than
a frame's time left, the runner, which plans by the p99 it has measured, stops after the first
iterations, and now and then is late like any program.

What to look at is who answers when. The digits are so easy that a static network small enough for
every frame would be as good on them; it pays to go on in a larger network where the task needs one.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import impatient
from impatient.evaluation.plots import BLUE, INK, MUTED, VERMILION, save_figure, styled
from impatient.networks import AnytimeNet
from impatient.networks.growth import in_turn
from impatient.runtime import every
from impatient.training.data import Split

# each gives a picture per frame
SENSORS = 16
# of the time left: what overruns its p99, by which the runner plans, does so by little as a rule
TOLD = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What a network made of a frame."""

    left_s: float
    taken_s: float
    # the one that answered
    iteration: int
    # share of its pictures; 0 if the answer was late: a lost frame
    right: float

    @property
    def on_time(self) -> bool:
        return self.taken_s <= self.left_s


def trained(data: impatient.Data, epochs: int, **options: Any) -> AnytimeNet:
    torch.manual_seed(0)
    network = AnytimeNet(data.num_classes, width=8, in_channels=1, **options)
    recipe = impatient.Recipe(epochs=epochs, batch_size=64, lr=0.1)
    impatient.fit(network, data, weights="inverse_square", recipe=recipe, progress=False)
    return network.cpu()


def runner(network: AnytimeNet, x: torch.Tensor, repeats: int) -> impatient.Runner:
    return impatient.Runner(
        network, impatient.profile(network, x, batch_sizes=[SENSORS], repeats=repeats)
    )


def time_left(whole_s: float, frames: int, rate: float) -> np.ndarray:
    """Seconds that the other tasks leave of each frame, in two thirds of them `whole_s` or more: a
    slow wave and bursts.
    """
    random = np.random.default_rng(0)
    load = (
        0.3
        + 0.15 * np.sin(2.0 * np.pi * np.arange(frames) / (8.0 * rate))
        + random.normal(0.0, 0.02, frames)
    )
    for start in np.flatnonzero(random.random(frames) < 1.0 / rate):
        load[start : start + random.integers(3, 12)] += random.uniform(0.1, 0.2)
    left = 1.0 - load.clip(0.05, 0.6)
    return left * whole_s / np.quantile(left, 1 / 3)


def drawn_frames(
    data: impatient.Data, split: Split, frames: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pictures and labels of each frame."""
    examples = data.examples(split)
    random = np.random.default_rng(1)
    places = random.integers(0, data.size(split), (frames, SENSORS)).tolist()
    return [(data.preprocess(examples.take(chosen)), examples.labels[chosen]) for chosen in places]


def run_loop(
    runners: Mapping[str, impatient.Runner],
    frames: Sequence[tuple[torch.Tensor, torch.Tensor]],
    left_s: Sequence[float],
    rate: float,
) -> dict[str, list[Frame]]:
    made: dict[str, list[Frame]] = {name: [] for name in runners}
    # Every frame counts here. A camera's loop reads every(1 / rate, latest(camera)), which leaves
    # out what it is too late for.
    loop = every(1.0 / rate, zip(frames, left_s, strict=True), overruns="catch_up")
    for number, ((x, labels), left) in enumerate(loop):
        # neither is always the first
        for name in sorted(runners, reverse=number % 2 == 1):
            answer = runners[name].run(x, deadline=impatient.Deadline.after(left * TOLD))
            hits = (answer.output.argmax(1) == labels).double().mean().item()
            right = hits if answer.elapsed_s <= left else 0.0
            made[name].append(
                Frame(left_s=left, taken_s=answer.elapsed_s, iteration=answer.exit, right=right)
            )
    return made


def report(made: Mapping[str, list[Frame]]) -> None:
    print(
        f"{'':12}{'on time':>10}{'accuracy':>10}{'iteration':>11}   (a late answer is a wrong one)"
    )
    for name, frames in made.items():
        on_time, right, iteration = np.mean(
            [(frame.on_time, frame.right, frame.iteration + 1) for frame in frames], axis=0
        )
        print(f"{name:12}{on_time:10.1%}{right:10.1%}{iteration:11.1f}")


def draw(made: Mapping[str, list[Frame]], names: Sequence[str], rate: float) -> Figure:
    """Draw the time left and taken per frame, and below it the iteration that answered."""
    left_ms = 1e3 * np.array([frame.left_s for frame in made["AnytimeNet"]])
    seconds = np.arange(len(left_ms)) / rate
    top = 1.4 * left_ms.max()
    with styled():
        figure = Figure(figsize=(7.2, 5.4), dpi=100, layout="constrained")
        figure.suptitle(
            "Every frame has its own deadline", x=0.012, ha="left", size=11.5, weight="bold"
        )
        times, iterations = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        times.step(
            seconds,
            left_ms,
            where="mid",
            color=INK,
            linewidth=0.8,
            label="time left by the other tasks",
        )
        for name, colour in (("static", MUTED), ("AnytimeNet", BLUE)):
            taken_ms = 1e3 * np.array([frame.taken_s for frame in made[name]])
            late = np.array([not frame.on_time for frame in made[name]])
            times.plot(
                seconds[~late],
                taken_ms[~late],
                ".",
                color=colour,
                markersize=3.5,
                label=f"{name}, on time",
            )
            marker, size, late_colour = (
                ("x", 3.5, VERMILION) if name == "static" else ("*", 8.0, BLUE)
            )
            # at most at the top: a hold-up of the machine may be many times longer than a frame
            times.plot(
                seconds[late],
                taken_ms[late].clip(max=top),
                marker,
                color=late_colour,
                markersize=size,
                label=f"{name}, late: {late.sum()}",
            )
        times.set_ylim(0.0, 1.02 * top)
        times.set_ylabel("ms")
        iterations.plot(
            seconds,
            [frame.iteration for frame in made["AnytimeNet"]],
            ".",
            color=BLUE,
            markersize=3.5,
        )
        iterations.set_yticks(range(len(names)), names)
        iterations.set_ylabel("blocks that answered")
        iterations.grid(axis="y")
        iterations.set_xlabel(f"seconds, {rate:g} frames in each")
        figure.legend(*times.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def main(
    seconds: float = 20.0,
    rate: float = 30.0,
    blocks: Sequence[int] = (8, 8, 8),
    epochs: int = 6,
    repeats: int = 300,
    figure: str = "runs/sensor_loop.png",
) -> dict[str, list[Frame]]:
    data = impatient.load_data("digits")
    anytime = trained(data, epochs, schedule=in_turn(blocks))
    # in one iteration: a BaseResNet, run whole
    static = trained(data, epochs, schedule=[blocks])
    hits = impatient.record(anytime, data, split="test").quality.mean(1).tolist()
    print("AnytimeNet by iteration:", " ".join(f"{value:.1%}" for value in hits))

    frames = drawn_frames(data, "test", round(seconds * rate))
    runners = {
        "AnytimeNet": runner(anytime, frames[0][0], repeats),
        "static": runner(static, frames[0][0], repeats),
    }
    # timed at the loop's own pace, where runs take longer than one right after the other; the
    # runners see it, too
    rehearsal = drawn_frames(data, "validation", 1 + repeats // 4)
    rehearsed = run_loop(runners, rehearsal, [math.inf] * len(rehearsal), rate)
    whole_s = statistics.median(frame.taken_s for frame in rehearsed["static"])
    made = run_loop(runners, frames, time_left(whole_s, len(frames), rate).tolist(), rate)
    report(made)
    save_figure(draw(made, anytime.exit_names, rate), figure)
    print(f"see {figure}")
    return made


if __name__ == "__main__":
    main()
