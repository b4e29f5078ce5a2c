"""Compare a network in an engine with the same network in torch: outputs and times."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from impatient.clock import SYSTEM_CLOCK, Clock, interleaved
from impatient.engines.network import EngineNetwork
from impatient.errors import ExportFailed, NoEffectWarning
from impatient.inputs import batch_size_of, call_model, evaluating
from impatient.networks.multi_exit import MultiExitNetwork
from impatient.progress import tracked
from impatient.trees import map_samples

# As a share of the largest output. Rounding in another order gives 1e-6, a wrong graph far more.
TOLERANCE = 1e-4
# The same in steps between numbers, for networks in fewer bits.
TOLERANCE_STEPS = 20
# Runs of `engine_times` that do not count.
WARM_UP = 20


def check_agreement(
    network: MultiExitNetwork,
    made: EngineNetwork,
    example: Any,
    precision: str = "fp32",
    *,
    sizes: Sequence[int] = (1, 3),
) -> list[float]:
    """Check that two networks' outputs agree, and return the differences.

    Raises:
        ExportFailed: if a difference is larger than rounding explains, or not a number.
    """
    # No noise in 8 bits: it would exceed the ranges that were determined.
    agreement = differences(network, made, example, noise=precision == "fp32", sizes=sizes)
    tolerance = tolerance_of(network) if precision == "fp32" else float("inf")
    for index, found in enumerate(agreement):
        # "not <=" instead of ">", to catch NaN
        if not found <= tolerance:
            raise ExportFailed(
                f"in {made.engine} exit {index} ({network.exit_names[index]}) differs from the "
                f"network by {found:.2g} of its largest output; expected at most {tolerance:g}. "
                'Use engine="eager", and please report the model.'
            )
    return agreement


def tolerance_of(network: torch.nn.Module) -> float:
    """Return the largest difference that rounding explains, as a share of the largest output."""
    dtypes = {value.dtype for value in network.parameters() if value.is_floating_point()}
    steps = (torch.finfo(dtype).eps for dtype in dtypes)
    return max(TOLERANCE, TOLERANCE_STEPS * max(steps, default=0.0))


def differences(
    network: MultiExitNetwork,
    made: EngineNetwork,
    example: Any,
    *,
    noise: bool = True,
    sizes: Sequence[int] = (1, 3),
) -> list[float]:
    """Return the largest difference between two networks' outputs for each exit.

    A difference is a share of the largest output. The network without exits counts with the last
    exit.

    Args:
        network: a network.
        made: the same network in an engine.
        example: an example input.
        noise: whether to add noise to the example.
        sizes: batch sizes to compare at, besides that of the example.
    """
    found = []
    for size in dict.fromkeys((*sizes, batch_size_of(example))):
        x = varied(example, size, noise)
        with evaluating(network), torch.inference_mode():
            wanted = network(x)
            with made.exits(x) as run:
                given = [exit.output() for exit in run]
            whole = call_model(made.backbone, x)
        apart = [_largest(here - there) for here, there in zip(wanted, given, strict=True)]
        alone = _largest(wanted[-1] - whole)
        apart[-1] = float(np.maximum(apart[-1], alone))
        spread = [_largest(here - here[:1]) for here in wanted]
        found.append((apart, spread, [_largest(here) for here in wanted]))
    # numpy's maxima, because Python's would lose NaN.
    most = np.max(found, axis=0).tolist()
    for index, (_, spread, _) in enumerate(zip(*most, strict=True)):
        if spread == 0.0:
            warnings.warn(
                f"exit {index} ({network.exit_names[index]}) gives the same output for every "
                "input, so comparing it shows nothing; expected a trained network.",
                NoEffectWarning,
                stacklevel=2,
            )
    return [apart / (scale or 1.0) for apart, _, scale in zip(*most, strict=True)]


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def varied(x: Any, size: int, noise: bool = True) -> Any:
    """Make an input of another batch size from an example.

    With noise, the samples differ from the example's: noise is added to floating-point numbers,
    and whole numbers (tokens) are put in another order.
    """
    generator = torch.Generator().manual_seed(size)
    batch = batch_size_of(x)

    def vary(value: Tensor) -> Tensor:
        rows = value[torch.arange(size) % batch]
        if not noise:
            return rows
        if rows.is_floating_point():
            return rows + torch.randn(rows.shape, generator=generator).to(rows) * (
                float(rows.std()) or 1.0
            )
        if rows.dtype == torch.bool or rows.dim() < 2:
            return rows
        order = torch.stack(
            [torch.randperm(rows[0].numel(), generator=generator) for _ in range(size)]
        )
        return rows.flatten(1).gather(1, order).view_as(rows)

    return map_samples(vary, x)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimes:
    """Times of one exit in an engine and in torch.

    Attributes:
        name: name of the exit; "no exits" for the network without exits.
        agreement: largest difference of the outputs, as a share of the largest output.
        engine_s: median seconds of the exit's stage and head in the engine.
        eager_s: median seconds of the exit's stage and head in torch.
    """

    name: str
    agreement: float
    engine_s: float
    eager_s: float


def engine_times(
    network: MultiExitNetwork,
    made: EngineNetwork,
    agreement: Sequence[float],
    x: Any,
    *,
    repeats: int = 300,
    progress: bool = False,
    clock: Clock = SYSTEM_CLOCK,
) -> tuple[EngineTimes, ...]:
    """Measure a network in torch and in another engine by turns.

    Taking turns exposes both to the same changes of the machine.

    Args:
        network: network in torch, on the CPU.
        made: the same network in the engine.
        agreement: differences of the outputs from `differences`, reported beside the times.
        x: one input.
        repeats: number of measured runs.
        progress: whether to show a progress bar.
        clock: clock to measure with.
    """
    runs = [functools.partial(_times_of_one_run, each, x, clock) for each in (network, made)]
    with evaluating(network), torch.inference_mode():
        rounds = interleaved(runs, repeats=repeats, warm_up=WARM_UP)
        shown = tracked(
            rounds,
            f"timing {made.engine} beside torch",
            total=repeats,
            unit="rounds",
            wanted=progress,
            between=True,
        )
        times = list(shown)
    eager, engine = np.median(times, axis=0).tolist()
    names = (*network.exit_names, "no exits")
    apart = (*agreement, agreement[-1])
    return tuple(
        EngineTimes(name=name, agreement=difference, engine_s=engine_s, eager_s=eager_s)
        for name, difference, engine_s, eager_s in zip(names, apart, engine, eager, strict=True)
    )


def _times_of_one_run(network: Any, x: Any, clock: Clock) -> list[float]:
    """Measure the seconds of each exit and of the network without exits."""
    instants = [clock.now()]
    with network.exits(x) as run:
        for exit in run:
            exit.output()
            instants.append(clock.now())
    call_model(network.backbone, x)
    instants.append(clock.now())
    return [later - before for before, later in itertools.pairwise(instants)]
