"""Table II: the time of every iteration.

It is measured in turn with BASELINE, the sub-networks alone and the single parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from impatient.clock import SYSTEM_CLOCK, Clock
from impatient.inputs import evaluating, synchronise
from impatient.networks import growth
from impatient.networks.anytimenet import AnytimeNet, SectionedNetwork, block_macs, block_times
from impatient.provenance import machine
from papers.anytimenet.recipe import Net, Scale, Timing
from papers.jobs import Job
from papers.results import Claim

# what caching is to save at least, what it may cost at most
SAVED = 2.5
OVERHEAD = 1.20
# seconds a block over the test set, AnytimeNet and BASELINE (Table II); 38 blocks and 26 make a
# whole run
PAPER_BLOCKS = {"CIFAR-10": (0.063, 0.084), "GTSRB": (0.153, 0.212), "SFCARS": (0.098, 0.123)}


def jobs(scale: Scale) -> list[Job]:
    """One measurement per network and batch size, to be run when nothing else runs."""
    return [
        Job(name(net, batch), measure, {"net": net, "timing": scale.timing, "batch": batch})
        for net in scale.timing.nets
        for batch in scale.timing.batches
    ]


def name(net: Net, batch: int = 1) -> str:
    """Name of a measurement's job."""
    return f"time-w{net.width}-{net.schedule.names[-1]}-b{batch}"


def in_words(net: Net, batch: int) -> str:
    """Describe a network and its batch size in words."""
    return (
        f"{net.width} channels, blocks {net.schedule.names[-1]}, {batch} "
        f"image{'s' if batch > 1 else ''} at a time"
    )


def measure(net: Net, timing: Timing, batch: int, *, folder: Path) -> dict[str, Any]:
    """Time one network, whose weights do not matter.

    Returns:
        What `timed` says, repeat by repeat, and the multiply-accumulates up to each iteration over
        those of BASELINE.
    """
    del folder
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    network = AnytimeNet(
        schedule=net.counts, width=net.width, in_channels=timing.shape[0], norms="shared"
    ).to(device)
    x = torch.randn(batch, *timing.shape, device=device)
    counted = growth.costs(network.schedule, block_macs(network.backbone, x))
    return {
        **timed(network, x, repeats=max(20, timing.repeats // batch), warm_up=timing.warm_up),
        "batch": batch,
        "macs": [cost / counted.plain for cost in counted.cumulative],
        "exits": list(network.exit_names),
        **machine(device),
    }


def timed(
    network: AnytimeNet, x: Tensor, *, repeats: int, warm_up: int, clock: Clock = SYSTEM_CLOCK
) -> dict[str, list[Any]]:
    """Measure the seconds of several calls in each repeat, in turn.

    Taking turns exposes all calls to the same changes of the machine's speed.

    Returns:
        "plain": of BASELINE. Per iteration: "cumulative": until its answer, all those before being
        posted too; "alone": of its sub-network run plainly; "predicted": what it adds by the cost
        model, from parts timed one by one.
    """
    alone = [*sub_networks(network)]
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: _seconds(network.backbone, x, clock),
        "cumulative": lambda: _answers(network, x, clock),
        "alone": lambda: [_seconds(part, x, clock) for part in alone],
        "predicted": lambda: _predicted(network, x, clock),
    }
    measured: dict[str, list[Any]] = {what: [] for what in ways}
    with evaluating(network), torch.inference_mode():
        for repeat in range(-warm_up, repeats):
            # alternate the order: whatever ran last has warmed the caches for the next
            for what in ways if repeat % 2 else reversed(ways):
                value = ways[what]()
                if repeat >= 0:
                    measured[what].append(value)
    return measured


def sub_networks(network: AnytimeNet) -> Iterator[SectionedNetwork]:
    """Each iteration's network as one that is run plainly, of the same modules."""
    for counts in network.schedule.counts:
        blocks = [
            list(section)[:count]
            for section, count in zip(network.backbone.sections, counts, strict=True)
        ]  # type: ignore[call-overload]  # ModuleLists
        yield SectionedNetwork(network.backbone.stem, blocks, network.backbone.out)


def _seconds(model: nn.Module, x: Tensor, clock: Clock) -> float:
    begin = clock.now()
    model(x)
    synchronise(x.device)
    return clock.now() - begin


def _answers(network: AnytimeNet, x: Tensor, clock: Clock) -> list[float]:
    begin = clock.now()
    times = []
    with network.exits(x) as run:
        for exit in run:
            exit.output()
            synchronise(x.device)
            times.append(clock.now() - begin)
    return times


def _predicted(network: AnytimeNet, x: Tensor, clock: Clock) -> list[float]:
    parts = block_times(network.backbone, x, repeats=1, warm_up=0, clock=clock)
    return list(growth.costs(network.schedule, parts).per_iteration)


# --- from measurements to the table ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Middle:
    """Median of repeats, and the quantiles between which eight in ten of them lie."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Self:
        low, median, high = np.quantile(values, [0.1, 0.5, 0.9])
        return cls(float(median), float(low), float(high))

    def text(self, digits: int = 2, scale: float = 1.0) -> str:
        median, low, high = (
            f"{scale * value:.{digits}f}" for value in (self.median, self.low, self.high)
        )
        return f"{median} ({low} to {high})"


def table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Make a row for each iteration.

    The time so far is compared with BASELINE's of the same repeat, and the iteration's time with
    its prediction.
    """
    plain, cumulative, predicted = (
        np.asarray(result[what]) for what in ("plain", "cumulative", "predicted")
    )
    steps = np.diff(cumulative, axis=1, prepend=0.0)
    rows = []
    for index, blocks in enumerate(result["exits"]):
        step = Middle.of(steps[:, index])
        expected = Middle.of(predicted[:, index])
        rows.append(
            {
                "iteration": index + 1,
                "blocks": blocks,
                "seconds so far": Middle.of(cumulative[:, index]),
                "over BASELINE": Middle.of(cumulative[:, index] / plain),
                "MACs over BASELINE": result["macs"][index],
                "seconds": step,
                "predicted": expected,
                "over predicted": Middle.of(steps[:, index] / predicted[:, index]),
                "within the spread": "yes" if step.low <= expected.median <= step.high else "no",
            }
        )
    return rows


def over_baseline(result: Mapping[str, Any]) -> list[float]:
    """Median time until each iteration's answer over BASELINE's of the same repeat."""
    return [row["over BASELINE"].median for row in table(result)]


def per_part(net: Net, result: Mapping[str, Any]) -> tuple[float, float]:
    """Return the median seconds per executed part.

    They are those of BASELINE and of a complete run of AnytimeNet.
    """
    whole = [row[-1] for row in result["cumulative"]]
    counts = sum(net.schedule.final) + 2, sum(map(len, growth.trace(net.schedule)))
    return Middle.of(result["plain"]).median / counts[0], Middle.of(whole).median / counts[1]


def claims(net: Net, result: Mapping[str, Any]) -> Iterator[Claim]:
    """Judge the claims about time, by medians."""
    of = in_words(net, result["batch"])
    plain, cumulative, alone = (
        np.asarray(result[what]) for what in ("plain", "cumulative", "alone")
    )
    saved = Middle.of(alone.sum(1) / cumulative[:, -1])
    overhead = Middle.of(cumulative[:, -1] / plain)
    off = [str(row["iteration"]) for row in table(result) if row["within the spread"] == "no"]
    paper = ", ".join(
        f"{data} {38 * ours / (26 * theirs) - 1:+.1%}"
        for data, (ours, theirs) in PAPER_BLOCKS.items()
    )
    yield Claim(
        (
            f"the cached run is at least {SAVED} times cheaper than its sub-networks one after the "
            f"other ({of})"
        ),
        "our aim",
        f"{saved.text()} times",
        "yes" if saved.median >= SAVED else "no",
    )
    yield Claim(
        f"all iterations take at most {OVERHEAD:.2f} of BASELINE ({of})",
        paper,
        overhead.text(3),
        "yes" if overhead.median <= OVERHEAD else "no",
    )
    if len(result["exits"]) == 7:
        ratio = Middle.of(cumulative[:, 4] / plain)
        yield Claim(
            f"iteration 5 has taken about as long as BASELINE, within a tenth ({of})",
            "yes",
            f"{ratio.text()} of BASELINE",
            "yes" if abs(ratio.median - 1.0) <= 0.1 else "no",
        )
    yield Claim(
        f"each iteration costs what the model predicts, within the spread ({of})",
        "our aim",
        f"not iteration {', '.join(off)}" if off else "all",
        "no" if off else "yes",
    )
