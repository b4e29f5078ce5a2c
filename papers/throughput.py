"""How many images a second a network learns from, by precision and memory layout.

Half precision is faster only where the processor has instructions for it, so the long trainings
measure before they choose.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from impatient.files import read_json, write_json
from impatient.provenance import machine

Precision = Literal["32-true", "bf16-mixed"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How a training step is computed: precision, memory layout, and whether by torch.compile."""

    precision: Precision
    channels_last: bool
    compiled: bool = False


def step_rates(
    network: nn.Module, images: Tensor, labels: Tensor, *, modes: Sequence[Mode], repeats: int
) -> dict[Mode, list[float]]:
    """Measure images a second in whole training steps of every mode.

    The modes take turns, after one step each that is not counted. The network is left changed.

    Returns:
        `repeats` figures of each mode, in the order in which they were measured.
    """
    steps = {mode: _steps(network, images, labels, mode) for mode in modes}
    found: dict[Mode, list[float]] = {mode: [] for mode in modes}
    for repeat in range(-1, repeats):
        for mode in modes:
            seconds = next(steps[mode])
            if repeat >= 0:
                found[mode].append(len(images) / seconds)
    return found


def _steps(network: nn.Module, images: Tensor, labels: Tensor, mode: Mode) -> Iterator[float]:
    """Train a step whenever asked, and yield its seconds."""
    layout = torch.channels_last if mode.channels_last else torch.contiguous_format
    inputs = images.to(memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    called = torch.compile(network) if mode.compiled else network
    while True:
        network.train().to(memory_format=layout)  # type: ignore[call-overload]
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode.precision == "bf16-mixed"):
            losses = [nn.functional.cross_entropy(out.float(), labels) for out in called(inputs)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        yield time.perf_counter() - begin


def chosen_precision(
    network: nn.Module, images: Tensor, labels: Tensor, file: Path, *, repeats: int = 5
) -> Precision:
    """Return the faster precision on this machine, channels-last, and keep the measurement.

    A measurement that is there already is obeyed, wherever it was made: a training that goes on
    keeps its precision.

    Args:
        file: JSON file with images a second (the median) of either precision, processor, threads
            and choice.
    """
    if not file.is_file():
        modes = [Mode(precision=precision, channels_last=True) for precision in PRECISIONS]
        rates = step_rates(network, images, labels, modes=modes, repeats=repeats)
        medians = {mode.precision: statistics.median(rates[mode]) for mode in modes}
        found = {
            "images_per_second": medians,
            "all": {mode.precision: rates[mode] for mode in modes},
            "batch": len(images),
            "threads": torch.get_num_threads(),
            "processor": machine("cpu")["processor"],
            "precision": max(medians, key=medians.__getitem__),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
    return cast("Precision", read_json(file)["precision"])
