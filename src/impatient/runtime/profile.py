"""Measure what stages and heads cost on this machine, in turn.

The untouched backbone runs in turn with them, so that a change of the machine affects both alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn

from impatient import checks
from impatient.anytime import Network, check_network, stage_traffic
from impatient.clock import SYSTEM_CLOCK, Clock, interleaved
from impatient.costs import NOISE_LIMIT, BatchCosts, CostProfile, Noise, Quantiles
from impatient.counting import count_macs, count_traffic
from impatient.errors import CostError, ExitNotReached, StaleInput
from impatient.inputs import call_model, evaluating, input_tensor, resized, synchronise
from impatient.progress import tracked
from impatient.provenance import Provenance, dtype_of, machine, provenance, versions
from impatient.runtime.joules import EnergyMeter, joules_per_run

log = logging.getLogger(__name__)

# Repeats at each batch size that are made however long they take.
LEAST_REPEATS = 20


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
    """Measure every stage, every head and the untouched backbone, and count their work.

    MACs and bytes are counted. Each repeat runs the untouched backbone and the staged network with
    all heads, so that a change in the machine's speed affects both alike. The order alternates, so
    every second time the untouched backbone runs twice in a row. These pairs (A/A) give the noise
    of the profile. A warning is logged where their median ratio may differ from 1 by more than 5 %:
    the machine was too noisy for any conclusion. The times include the cost of staging itself.

    Args:
        network: network from `attach_exits` or `to_engine`. It is measured in eval mode, in
            inference mode, on the device of its parameters. In an engine, operators cannot be
            observed: bytes are left out, and the network without exits is taken to cost the sum of
            its stages.
        x: example input; its first sample is repeated to the batch sizes.
        batch_sizes: batch sizes to measure, each on its own.
        repeats: number of repeats at each batch size. The p99 of fewer than 100 is their maximum.
        warm_up: number of repeats before them that are not counted.
        max_seconds: stop measuring a batch size after this many seconds and at least 20 repeats.
        energy: meter with which joules are measured, too, at batch size 1, for 3 s per exit;
            `impatient.experimental.energy` has some.
        progress: whether to show a progress bar.
        clock: clock to measure with.
    Returns:
        Means and quantiles, with the machine that they belong to.
    Raises:
        CostError: if there is no repeat or no batch size, or the meter is none.
        EnergyUnavailable: if the meter does not move.

    Sync:
        Waits for the device around every stage and head.
    """
    listed = isinstance(batch_sizes, Iterable) and bool(batch_sizes)
    if not listed or min((repeats, *batch_sizes)) < 1 or warm_up < 0:
        raise CostError(
            f"repeats={repeats}, batch_sizes={batch_sizes}, warm_up={warm_up}; expected at "
            "least 1 repeat, at least one batch size, each at least 1, and a warm-up of 0 or more."
        )
    if energy is not None and not isinstance(energy, EnergyMeter):
        raise CostError(
            f"energy={energy!r}; expected a meter (name, begin() and end()), such as "
            'impatient.experimental.energy.find_meter("cpu").'
        )
    check_network(network)
    stopwatch = _Stopwatch(clock, _device_of(network, x))
    one = resized(x, 1)
    counted = _count(network, one)
    batches = {}
    with evaluating(network):
        for size in batch_sizes:
            sized = resized(x, size)
            # Warmed up before the clock for `max_seconds` starts.
            list(_rounds(network, sized, stopwatch, repeats=0, warm_up=warm_up))
            rounds = []
            begin = clock.now()
            shown = tracked(
                _rounds(network, sized, stopwatch, repeats=repeats),
                f"profiling batch size {size}",
                total=repeats,
                unit="rounds",
                wanted=progress,
                between=True,
            )
            with contextlib.closing(shown):
                for times_s in shown:
                    rounds.append(times_s)
                    if len(rounds) >= LEAST_REPEATS and clock.now() - begin > max_seconds:
                        break
            batches[size] = _batch_costs(rounds, network.num_exits)
        _warn_if_noisy(batches)
        joules = _measure_energy(network, one, energy, stopwatch) if energy else {}
    return CostProfile(
        exits=network.exit_names,
        batches=batches,
        provenance=_provenance(network, stopwatch.device),
        **counted,
        **joules,
    )


@dataclass(frozen=True, slots=True)
class _Stopwatch:
    """Measure times on a device."""

    clock: Clock
    device: torch.device

    def now(self) -> float:
        """Return the present instant, when the device has completed its work."""
        synchronise(self.device)
        return self.clock.now()

    def whole(self, model: nn.Module, x: Any) -> float:
        """Measure the seconds of one call of a model."""
        with torch.inference_mode():
            begin = self.clock.now()
            call_model(model, x)
            return self.now() - begin

    def parts(self, network: Network, x: Any) -> list[float]:
        """Measure the seconds of each stage, followed by those of each head."""
        stages: list[float] = []
        heads: list[float] = []
        before = self.clock.now()
        with torch.inference_mode(), network.exits(x) as run:
            for exit in run:
                last = exit.index == network.num_exits - 1
                if last:
                    # The last output belongs to its stage, which mostly has computed it already.
                    exit.output()
                arrived = self.now()
                exit.output()
                answered = self.now()
                stages.append(arrived - before)
                heads.append(0.0 if last else answered - arrived)
                before = self.clock.now()
        if len(stages) != network.num_exits:
            raise ExitNotReached(
                f"the example reached {len(stages)} of {network.num_exits} exits; profile with an "
                "input that reaches all of them."
            )
        return stages + heads


def _rounds(
    network: Network, x: Any, stopwatch: _Stopwatch, *, repeats: int, warm_up: int = 0
) -> Iterator[list[float]]:
    """Measure in turn the untouched backbone, and all stages and heads."""
    ways = (
        lambda: [stopwatch.whole(network.exit_free, x)],
        lambda: stopwatch.parts(network, x),
    )
    for whole, parts in interleaved(ways, repeats=repeats, warm_up=warm_up):
        yield whole + parts


def _batch_costs(rounds: Sequence[Sequence[float]], num_exits: int) -> BatchCosts:
    whole, *parts = zip(*rounds, strict=True)
    return BatchCosts(
        stages=tuple(map(Quantiles.of, parts[:num_exits])),
        heads=tuple(map(Quantiles.of, parts[num_exits:])),
        exit_free=Quantiles.of(whole),
        noise=Noise.of(whole),
    )


def _count(network: Network, x: Any) -> dict[str, Any]:
    """Count MACs, parameters and bytes per sample, by their names in a profile."""
    facts = network.stage_facts(x)
    counted: dict[str, Any] = {
        name: tuple(getattr(fact, name) for fact in facts)
        for name in ("stage_macs", "head_macs", "stage_parameters", "head_parameters")
    }
    if network.engine != "eager":
        # Only torch's operators can be observed.
        return counted
    stage_bytes, head_bytes = stage_traffic(network, x)
    return counted | {
        "exit_free_macs": count_macs(network.exit_free, x),
        "stage_bytes": stage_bytes,
        "head_bytes": head_bytes,
        "exit_free_bytes": count_traffic(network.exit_free, x),
    }


def _warn_if_noisy(batches: Mapping[int, BatchCosts]) -> None:
    """Warn once, with the numbers of the batch size that is worst."""
    noisy = {
        size: costs.noise
        for size, costs in batches.items()
        if costs.noise is not None and costs.noise.too_noisy
    }
    if not noisy:
        return
    worst = max(noisy, key=lambda size: noisy[size].aa_high - noisy[size].aa_low)
    log.warning(
        "the machine was too noisy to say anything at batch size %s: the same network against "
        "itself took %.3f times as long at %d (95 %% interval %.3f to %.3f; expected within 1 +- "
        "%g). Stop what else is running, or allow more repeats, and measure again (`impatient "
        "profile --force`; `impatient serve` measures at every start).",
        ", ".join(map(str, noisy)),
        noisy[worst].aa_ratio,
        worst,
        noisy[worst].aa_low,
        noisy[worst].aa_high,
        NOISE_LIMIT,
    )


def _measure_energy(
    network: Network, x: Any, meter: EnergyMeter, stopwatch: _Stopwatch
) -> dict[str, Any]:
    """Measure the joules of stages and heads, by their names in a profile.

    They are differences between runs to neighbouring exits. Where such a difference of measured
    values is below 0, it counts as 0.
    """

    def run(last: int, head: bool) -> None:
        with torch.inference_mode(), network.exits(x) as exits:
            for exit in exits:
                if exit.index == last:
                    if head:
                        exit.output()
                    break
        synchronise(stopwatch.device)

    count = network.num_exits
    to_stage = [functools.partial(run, index, False) for index in range(count)]
    # The last exit has no separate head.
    to_head = [functools.partial(run, index, True) for index in range(count - 1)]
    whole = functools.partial(stopwatch.whole, network.exit_free, x)
    joules = joules_per_run(meter, [*to_stage, *to_head, whole], clock=stopwatch.clock)
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
    made = provenance(
        network=network.structure_fingerprint,
        dtype=dtype_of(network),
        engine=network.engine,
        **_machine(str(device), network.threads),
    )
    return dataclasses.replace(made, versions=_versions(network.engine))


def _machine(device: str, threads: int | None) -> dict[str, Any]:
    """Describe the machine, with the engine's threads if it has its own."""
    here = machine(device)
    return {**here, "threads": threads or here["threads"]}


def _versions(engine: str) -> dict[str, str]:
    """Return the versions of Python, torch, impatient and the package of the engine."""
    found = versions()
    # The rest of an engine's name says how its sessions are made, and its precision.
    package = engine.partition("-")[0]
    if package in ("onnxruntime", "openvino"):
        # Not found if it is installed under another name, such as onnxruntime-gpu.
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _device_of(network: Network, x: Any) -> torch.device:
    parameter = next(iter(network.parameters()), None)
    return parameter.device if parameter is not None else input_tensor(x).device


def time_in_turn(
    models: Sequence[nn.Module],
    x: Any,
    *,
    repeats: int = 300,
    warm_up: int = 20,
    progress: bool = False,
    clock: Clock = SYSTEM_CLOCK,
) -> tuple[float, ...]:
    """Measure the mean seconds of several models on one input, in turn.

    Taking turns exposes all models to the same changes of the machine.

    Args:
        models: models on one device, which run in eval mode.
        x: example input.
        repeats: number of measured runs of each model.
        warm_up: number of runs before them that are not counted.
        progress: whether to show a progress bar.
        clock: clock to measure with.

    Sync:
        Waits for the device after every run.
    """
    checks.at_least(CostError, 1, repeats=repeats)
    checks.at_least(CostError, 0, warm_up=warm_up)
    stopwatch = _Stopwatch(clock, input_tensor(x).device)
    runs = [functools.partial(stopwatch.whole, model, x) for model in models]
    with contextlib.ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluating(model))
        rounds = interleaved(runs, repeats=repeats, warm_up=warm_up)
        shown = tracked(
            rounds, "timing networks", total=repeats, unit="rounds", wanted=progress, between=True
        )
        times = list(shown)
    return tuple(sum(row) / repeats for row in zip(*times, strict=True))


def check_profile(costs: CostProfile, network: Network, remedy: str) -> None:
    """Check that a profile belongs to this network, its engine, and this machine.

    Args:
        costs: profile to check.
        network: network that the profile should belong to.
        remedy: what to do if it does not, for the error message.
    Raises:
        StaleInput: if anything differs, thread count and versions included.
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
    # The fingerprint does not depend on the places of the exits.
    if network.exit_names != costs.exits:
        raise StaleInput(
            f"the cost profile was made with exits after {', '.join(costs.exits)}, but here they "
            f"are after {', '.join(network.exit_names)}. To fix this, {remedy}."
        )
    check_machine(costs, remedy, network.threads)


def check_machine(costs: CostProfile, remedy: str, threads: int | None = None) -> None:
    """Check that a profile was measured on this machine.

    Args:
        costs: profile to check.
        remedy: what to do if it was not, for the error message.
        threads: thread count of an engine; None for torch's.
    Raises:
        StaleInput: if the machine, the thread count or the versions differ.
    """
    made = costs.provenance
    device = made.device or "cpu"
    if device.startswith("cuda") and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise StaleInput(
            f"the cost profile was made on {device}, which this machine does not have. To fix "
            f"this, {remedy}."
        )
    here = _machine(device, threads)
    made.require(
        "the cost profile",
        remedy,
        processor=here["processor"],
        threads=here["threads"],
        versions=_versions(made.engine),
    )
