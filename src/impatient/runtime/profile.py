"""Measuring what stages and heads cost, on this machine, interleaved with the untouched backbone."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from impatient.clock import SYSTEM_CLOCK, Clock
from impatient.costs import BatchCosts, CostProfile, Quantiles
from impatient.errors import CostError, ExitNotReached, StaleInput
from impatient.networks.describe import DescribedNetwork, count_macs
from impatient.networks.placement import evaluating
from impatient.networks.stages import call_model, first_tensor
from impatient.provenance import fingerprint_structure, machine, provenance


def profile(
    network: DescribedNetwork,
    x: Any,
    *,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 300,
    warm_up: int = 20,
    max_seconds: float = 30.0,
    progress: bool = False,
    clock: Clock = SYSTEM_CLOCK,
) -> CostProfile:
    """Measure every stage, every head and the untouched backbone.

    Each repeat runs the untouched backbone and then, or before, the staged network with all heads, so that a change in the
    machine's speed meets both alike. The times include what staging itself costs.

    Args:
        network: from `attach_exits`; measured in eval mode, in inference mode, on the device its parameters are on.
        x: an example input; its first sample is repeated to the batch sizes asked for.
        batch_sizes: each is measured by itself.
        repeats: at each batch size; the p99 of fewer than 100 is their maximum.
        warm_up: repeats that are not counted.
        max_seconds: stop measuring a batch size after this long, with at least 20 repeats.
        progress: show a bar.
    Returns:
        Means and quantiles with the machine they belong to.

    Sync:
        Waits for the device around every stage and head.
    """
    if min((repeats, *batch_sizes)) < 1 or not batch_sizes or warm_up < 0:
        raise CostError(
            f"repeats={repeats}, batch_sizes={tuple(batch_sizes)}, warm_up={warm_up}; needed: at least 1 repeat, at least one "
            "batch size, each at least 1, and a warm-up of 0 or more."
        )
    device = _device_of(network, x)
    facts, exit_free_macs = network.stage_facts(resized(x, 1)), count_macs(network.backbone, resized(x, 1))
    batches = {}
    with evaluating(network), Progress(transient=True, disable=not progress) as bar:
        for size in batch_sizes:
            task = bar.add_task(f"profiling batch size {size}", total=repeats)
            batches[size] = _measure(network, resized(x, size), device, repeats, warm_up, max_seconds, clock,
                                     lambda task=task: bar.advance(task))  # fmt: skip
    dtype = next((str(p.dtype).removeprefix("torch.") for p in network.parameters()), None)
    return CostProfile(
        exits=network.exit_names, batches=batches,
        stage_macs=tuple(fact.stage_macs for fact in facts), head_macs=tuple(fact.head_macs for fact in facts),
        stage_parameters=tuple(fact.stage_parameters for fact in facts),
        head_parameters=tuple(fact.head_parameters for fact in facts), exit_free_macs=exit_free_macs,
        provenance=provenance(network=fingerprint_structure(network.state_dict()), dtype=dtype, **machine(str(device))),
    )  # fmt: skip


def _device_of(network: DescribedNetwork, x: Any) -> torch.device:
    parameter = next(iter(network.parameters()), None)
    return parameter.device if parameter is not None else first_tensor(x).device


def resized(x: Any, batch_size: int) -> Any:
    """An input of another batch size: the first sample, repeated."""
    if isinstance(x, Tensor):
        return x[:1].expand(batch_size, *x.shape[1:]).contiguous()
    if isinstance(x, Mapping):
        return {name: resized(value, batch_size) for name, value in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(resized(value, batch_size) for value in x)
    return x


def _measure(
    network: DescribedNetwork, x: Any, device: torch.device, repeats: int, warm_up: int, max_seconds: float, clock: Clock,
    advance: Any,
) -> BatchCosts:  # fmt: skip
    count = network.num_exits
    stages: list[list[float]] = [[] for _ in range(count)]
    heads: list[list[float]] = [[] for _ in range(count)]
    whole: list[float] = []
    begin = clock.now()
    for repeat in range(-warm_up, repeats):
        if repeat == 0:
            for times in (*stages, *heads, whole):
                times.clear()
            begin = clock.now()
        # alternate the order: whatever ran last has warmed the caches for the next
        for part in ("whole", "staged") if repeat % 2 else ("staged", "whole"):
            if part == "whole":
                whole.append(_time_whole(network.backbone, x, device, clock))
            else:
                _time_staged(network, x, device, clock, stages, heads)
        if repeat >= 0:
            advance()
        if repeat >= 19 and clock.now() - begin > max_seconds:
            break
    return BatchCosts(
        stages=tuple(Quantiles.of(times) for times in stages), heads=tuple(Quantiles.of(times) for times in heads),
        exit_free=Quantiles.of(whole),
    )  # fmt: skip


def time_in_turn(
    models: Sequence[nn.Module], x: Any, *, repeats: int = 300, warm_up: int = 20, clock: Clock = SYSTEM_CLOCK
) -> tuple[float, ...]:
    """Mean seconds of each of several models on one input, run in turn, so that all meet the machine's changes alike.

    Args:
        models: on one device; run in eval mode.
        x: an example input.

    Sync:
        Waits for the device after every run.
    """
    if repeats < 1 or warm_up < 0:
        raise CostError(f"repeats={repeats}, warm_up={warm_up}; needed: at least 1 repeat and a warm-up of 0 or more.")
    device = first_tensor(x).device
    times: list[list[float]] = [[] for _ in models]
    with contextlib.ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluating(model))
        for repeat in range(-warm_up, repeats):
            for place in range(len(models)) if repeat % 2 else reversed(range(len(models))):
                taken = _time_whole(models[place], x, device, clock)
                if repeat >= 0:
                    times[place].append(taken)
    return tuple(sum(values) / repeats for values in times)


def _time_whole(backbone: nn.Module, x: Any, device: torch.device, clock: Clock) -> float:
    with torch.inference_mode():
        begin = clock.now()
        call_model(backbone, x)
        synchronise(device)
        return clock.now() - begin


def _time_staged(
    network: DescribedNetwork, x: Any, device: torch.device, clock: Clock, stages: list[list[float]], heads: list[list[float]]
) -> None:
    reached = 0
    before = clock.now()
    with torch.inference_mode(), network.exits(x) as run:
        for exit in run:
            synchronise(device)
            arrived = clock.now()
            exit.output()
            synchronise(device)
            answered = clock.now()
            stages[exit.index].append(arrived - before)
            # the last exit's output is the backbone's own: asking for it costs nothing
            heads[exit.index].append(answered - arrived if exit.index < network.num_exits - 1 else 0.0)
            before, reached = clock.now(), reached + 1
    if reached != network.num_exits:
        raise ExitNotReached(
            f"the example came to {reached} of {network.num_exits} exits; profile with an input that comes to all of them."
        )


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; until then the time says nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_profile(costs: CostProfile, network: Any, remedy: str) -> None:
    """Raise StaleInput unless a profile belongs to this network, machine, thread count and torch version."""
    tensors, made = network.state_dict(), costs.provenance
    device = next((str(tensor.device) for tensor in tensors.values()), made.device)
    made.require("the cost profile", remedy, network=fingerprint_structure(tensors), device=device)
    names = getattr(network, "exit_names", costs.exits)  # the fingerprint knows no cuts
    if names != costs.exits:
        raise StaleInput(
            f"the cost profile was made with exits after {', '.join(costs.exits)}, but here they are after "
            f"{', '.join(names)}. To mend it, {remedy}."
        )
    check_machine(costs, remedy)


def check_machine(costs: CostProfile, remedy: str) -> None:
    """Raise StaleInput unless a profile was measured on this machine, with this thread count and these versions."""
    device = costs.provenance.device or "cpu"
    if device.startswith("cuda") and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise StaleInput(f"the cost profile was made on {device}, which this machine does not have. To mend it, {remedy}.")
    here = provenance(**machine(device))
    costs.provenance.require(
        "the cost profile", remedy, processor=here.processor, threads=here.threads, versions=dict(here.versions)
    )
