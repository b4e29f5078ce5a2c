"""Measure what stages and heads cost on this machine, in turn.

The untouched backbone runs in turn with them, so that a change of the machine meets both alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from impatient.anytime import Network, check_network, stage_traffic
from impatient.clock import SYSTEM_CLOCK, Clock, interleaved
from impatient.costs import NOISE_LIMIT, BatchCosts, CostProfile, Noise, Quantiles
from impatient.counting import count_macs, count_traffic
from impatient.errors import CostError, ExitNotReached, StaleInput
from impatient.inputs import call_model, evaluating, first_tensor, resized, synchronise
from impatient.provenance import Provenance, machine, provenance, versions
from impatient.runtime.joules import EnergyMeter, joules_per_run

log = logging.getLogger(__name__)


def profile(
    network: Network,
    x: Any,
    *,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 300,
    warm_up: int = 20,
    max_seconds: float = 30.0,
    energy: EnergyMeter | None = None,
    progress: bool = False,
    clock: Clock = SYSTEM_CLOCK,
) -> CostProfile:
    """Measure every stage, every head and the untouched backbone, and count multiply-accumulates
    and bytes.

    Each repeat runs the untouched backbone and then, or before, the staged network with all heads,
    so that a change in the machine's speed meets both alike. The order alternates, so every second
    time the untouched backbone runs twice on end: from these pairs (A/A) comes the noise of the
        profile. Where their median ratio may be further than 5 % from 1, a warning is
    logged: the machine was too noisy to say anything. The times include what staging itself costs.

    Args:
        network: from `attach_exits` or `to_engine`; measured in eval mode, in inference mode, on
            the device its parameters are on. In an engine, operators are not seen: bytes are left
            out, and the whole is taken to be the sum of its stages.
        x: an example input; its first sample is repeated to the batch sizes asked for.
        batch_sizes: each is measured by itself.
        repeats: at each batch size; the p99 of fewer than 100 is their maximum.
        warm_up: repeats that are not counted.
        max_seconds: stop measuring a batch size after this long, with at least 20 repeats.
        energy: a meter; with it joules are measured, too, at batch size 1, 3 s for each exit.
            `impatient.experimental.energy` has some.
        progress: show a bar.
    Returns:
        Means and quantiles with the machine they belong to.
    Raises:
        EnergyUnavailable: if the meter does not move.

    Sync:
        Waits for the device around every stage and head.
    """
    if min((repeats, *batch_sizes)) < 1 or not batch_sizes or warm_up < 0:
        raise CostError(
            f"repeats={repeats}, batch_sizes={tuple(batch_sizes)}, warm_up={warm_up}; expected at "
            f"least 1 repeat, at least one "
            "batch size, each at least 1, and a warm-up of 0 or more."
        )
    if energy is not None and not isinstance(energy, EnergyMeter):
        raise CostError(
            f"energy={energy!r}; expected a meter (name, begin() and end()), such as "
            f'impatient.experimental.energy.find_meter("cpu").'
        )
    check_network(network)
    device = _device_of(network, x)
    one = resized(x, 1)
    counted = _count(network, one)
    batches = {}
    with evaluating(network), Progress(transient=True, disable=not progress) as bar:
        for size in batch_sizes:
            task = bar.add_task(f"profiling batch size {size}", total=repeats)
            batches[size] = _measure(
                network,
                resized(x, size),
                device,
                repeats,
                warm_up,
                max_seconds,
                clock,
                lambda task=task: bar.advance(task),
            )
            _warn_if_noisy(batches[size].noise, size)
        joules = _measure_energy(network, one, device, energy, clock) if energy else {}
    return CostProfile(
        exits=network.exit_names,
        batches=batches,
        provenance=_provenance(network, device),
        **counted,
        **joules,
    )


def _count(network: Network, x: Any) -> dict[str, Any]:
    """What is counted and not measured, per sample, by its name in a profile."""
    facts = network.stage_facts(x)
    counted: dict[str, Any] = {
        name: tuple(getattr(fact, name) for fact in facts)
        for name in ("stage_macs", "head_macs", "stage_parameters", "head_parameters")
    }
    if network.engine != "eager":
        # no operator of torch's is called that could be seen
        return counted
    stage_bytes, head_bytes = stage_traffic(network, x)
    return counted | {
        "exit_free_macs": count_macs(network.exit_free, x),
        "stage_bytes": stage_bytes,
        "head_bytes": head_bytes,
        "exit_free_bytes": count_traffic(network.exit_free, x),
    }


def _warn_if_noisy(noise: Noise | None, size: int) -> None:
    if noise is not None and noise.too_noisy:
        log.warning(
            "the machine was too noisy to say anything at batch size %d: the same network against "
            "itself took %.3f times as "
            "long (95 %% interval %.3f to %.3f; within 1 +- %g is needed). Stop what else is "
            "running, or allow more repeats, "
            "and profile again (on the command line with --force).",
            size,
            noise.aa_ratio,
            noise.aa_low,
            noise.aa_high,
            NOISE_LIMIT,
        )


def _measure_energy(
    network: Network, x: Any, device: torch.device, meter: EnergyMeter, clock: Clock
) -> dict[str, Any]:
    """Joules of stages and heads, by their names in a profile: differences between runs that go so
    far and no further.

    Differences of measured numbers may come out below 0; they count as 0.
    """

    def run(last: int, head: bool) -> None:
        with torch.inference_mode(), network.exits(x) as exits:
            for exit in exits:
                if exit.index == last:
                    if head:
                        exit.output()
                    break
        synchronise(device)

    count = network.num_exits
    to_stage = [functools.partial(run, index, False) for index in range(count)]
    # the last exit's output is there anyway
    to_head = [functools.partial(run, index, True) for index in range(count - 1)]
    whole = functools.partial(_time_whole, network.exit_free, x, device, clock)
    joules = joules_per_run(meter, [*to_stage, *to_head, whole], clock=clock)
    reached = list(itertools.accumulate(joules[:count], max))
    return {
        "stage_energy_j": tuple(
            after - before for before, after in itertools.pairwise([0.0, *reached])
        ),
        "head_energy_j": (
            *(max(0.0, up - to) for to, up in zip(reached, joules[count:-1], strict=False)),
            0.0,
        ),
        "exit_free_energy_j": joules[-1],
        "energy_meter": meter.name,
    }


def _provenance(network: Network, device: torch.device) -> Provenance:
    dtype = next((str(p.dtype).removeprefix("torch.") for p in network.parameters()), None)
    made = provenance(
        network=network.structure_fingerprint,
        dtype=dtype,
        engine=network.engine,
        **_machine(str(device), network.threads),
    )
    return dataclasses.replace(made, versions=_versions(network.engine))


def _machine(device: str, threads: int | None) -> dict[str, Any]:
    """As `provenance.machine`, with the threads of the engine where it has its own."""
    here = machine(device)
    return {**here, "threads": threads or here["threads"]}


def _versions(engine: str) -> dict[str, str]:
    """Versions of Python, torch and impatient, and of the engine where it is a package of its own."""
    # behind the hyphen: how its sessions are, and its precision
    package = engine.partition("-")[0]
    if package not in ("onnxruntime", "openvino"):
        return versions()
    try:
        return {**versions(), package: metadata.version(package)}
    except metadata.PackageNotFoundError:
        # under another name, such as onnxruntime-gpu
        return versions()


def _device_of(network: Network, x: Any) -> torch.device:
    parameter = next(iter(network.parameters()), None)
    return parameter.device if parameter is not None else first_tensor(x).device


def _measure(
    network: Network,
    x: Any,
    device: torch.device,
    repeats: int,
    warm_up: int,
    max_seconds: float,
    clock: Clock,
    advance: Any,
) -> BatchCosts:
    count = network.num_exits
    ways: tuple[Callable[[], list[float]], ...] = (
        lambda: [_time_whole(network.exit_free, x, device, clock)],
        lambda: _time_staged(network, x, device, clock),
    )
    # first, since it does not use up the time
    list(interleaved(ways, repeats=0, warm_up=warm_up))
    rounds = []
    begin = clock.now()
    for exit_free, parts in interleaved(ways, repeats=repeats):
        rounds.append(exit_free + parts)
        advance()
        if len(rounds) >= 20 and clock.now() - begin > max_seconds:
            break
    whole, *parts_s = zip(*rounds, strict=True)
    return BatchCosts(
        stages=tuple(map(Quantiles.of, parts_s[:count])),
        heads=tuple(map(Quantiles.of, parts_s[count:])),
        exit_free=Quantiles.of(whole),
        noise=Noise.of(whole),
    )


def time_in_turn(
    models: Sequence[nn.Module],
    x: Any,
    *,
    repeats: int = 300,
    warm_up: int = 20,
    clock: Clock = SYSTEM_CLOCK,
) -> tuple[float, ...]:
    """Mean seconds of each of several models on one input, run in turn, so that all meet the
    machine's changes alike.

    Args:
        models: on one device; run in eval mode.
        x: an example input.

    Sync:
        Waits for the device after every run.
    """
    if repeats < 1 or warm_up < 0:
        raise CostError(
            f"repeats={repeats}, warm_up={warm_up}; expected at least 1 repeat and a warm-up of 0 "
            f"or more."
        )
    device = first_tensor(x).device
    runs = [functools.partial(_time_whole, model, x, device, clock) for model in models]
    with contextlib.ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluating(model))
        rounds = list(interleaved(runs, repeats=repeats, warm_up=warm_up))
    return tuple(sum(times) / repeats for times in zip(*rounds, strict=True))


def _time_whole(backbone: nn.Module, x: Any, device: torch.device, clock: Clock) -> float:
    with torch.inference_mode():
        begin = clock.now()
        call_model(backbone, x)
        synchronise(device)
        return clock.now() - begin


def _time_staged(
    network: Network,
    x: Any,
    device: torch.device,
    clock: Clock,
) -> list[float]:
    """Seconds of each stage, and behind them of each head."""
    stages: list[float] = []
    heads: list[float] = []
    before = clock.now()
    with torch.inference_mode(), network.exits(x) as run:
        for exit in run:
            last = exit.index == network.num_exits - 1
            if last:
                # it belongs to its stage, which mostly has computed it
                exit.output()
            synchronise(device)
            arrived = clock.now()
            exit.output()
            synchronise(device)
            answered = clock.now()
            stages.append(arrived - before)
            heads.append(0.0 if last else answered - arrived)
            before = clock.now()
    if len(stages) != network.num_exits:
        raise ExitNotReached(
            f"the example came to {len(stages)} of {network.num_exits} exits; profile with an input "
            f"that comes to all of them."
        )
    return stages + heads


def check_profile(costs: CostProfile, network: Network, remedy: str) -> None:
    """Raise StaleInput unless a profile belongs to this network, engine, machine, thread count and
    these versions.
    """
    made = costs.provenance
    device = next((str(tensor.device) for tensor in network.state_dict().values()), made.device)
    made.require(
        "the cost profile",
        remedy,
        engine=network.engine,
        network=network.structure_fingerprint,
        device=device,
    )
    # the fingerprint knows no cuts
    if network.exit_names != costs.exits:
        raise StaleInput(
            f"the cost profile was made with exits after {', '.join(costs.exits)}, but here they "
            f"are after "
            f"{', '.join(network.exit_names)}. To mend it, {remedy}."
        )
    check_machine(costs, remedy, network.threads)


def check_machine(costs: CostProfile, remedy: str, threads: int | None = None) -> None:
    """Raise StaleInput unless a profile was measured on this machine, with this thread count and
    these versions.

    Args:
        threads: of an engine that has a thread count of its own; None for torch's.
    """
    device = costs.provenance.device or "cpu"
    made = costs.provenance
    if device.startswith("cuda") and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise StaleInput(
            f"the cost profile was made on {device}, which this machine does not have. To mend it, "
            f"{remedy}."
        )
    here = _machine(device, threads)
    made.require(
        "the cost profile",
        remedy,
        processor=here["processor"],
        threads=here["threads"],
        versions=_versions(made.engine),
    )
