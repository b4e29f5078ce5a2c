"""Measure what each real-time setting gains on this machine, with and without it in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from impatient import checks
from impatient.anytime import Network, begin
from impatient.clock import SYSTEM_CLOCK, Clock, interleaved
from impatient.errors import CostError
from impatient.inputs import evaluating, input_tensor, synchronise
from impatient.progress import display
from impatient.runtime.real_time import NAMES, Name, RealTime, Setting

What = Literal["waking up", "first exit", "whole network"]
WHATS: tuple[What, ...] = ("waking up", "first exit", "whole network")
Quantile = Literal["p50", "p99", "p99.9"]
QUANTILES: dict[Quantile, float] = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}

# Seconds of sleep before every run, as in a loop that waits for its sensor.
SLEEP_S = 0.002
# Runs of a block, between two changes of a setting.
BLOCK = 25
# A quantile is shown from so many runs beyond it, and so many pairs of blocks.
BEYOND = 5
PAIRS = 8
# Resampled blocks, for the interval of a ratio.
RESAMPLES = 500

# Seconds of one kind, by block and run, with a setting and without.
Times = np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How many times as long something took with a setting, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["shorter", "longer", "cannot tell apart"]:
        """Return what the interval allows to say."""
        if self.high < 1.0:
            return "shorter"
        return "longer" if self.low > 1.0 else "cannot tell apart"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What one setting changed.

    Attributes:
        setting: what became of it; None for a comparison of nothing with nothing (A/A).
        runs: number of runs with it; as many were without it.
        ratios: time with it over time without it, by what was measured and quantile. A quantile of
            too few runs is left out; all are where the setting is not in force.
    """

    setting: Setting | None
    runs: int
    ratios: dict[What, dict[Quantile, Ratio]]

    @property
    def is_worth_setting(self) -> bool:
        """Whether some p99 became shorter, and none longer."""
        verdicts = [found["p99"].verdict for found in self.ratios.values() if "p99" in found]
        return self.setting is not None and "shorter" in verdicts and "longer" not in verdicts


def tune(
    network: Network,
    x: Any,
    names: Sequence[Name] = NAMES,
    *,
    runs: int = 2000,
    max_seconds: float = 30.0,
    progress: bool = False,
    clock: Clock = SYSTEM_CLOCK,
) -> list[Tuned]:
    """Measure what each setting gains, and compare nothing with nothing as a control.

    Every run sleeps for 2 ms; how late it wakes up, its first exit and the whole network with all
    heads are measured. Blocks of 25 runs with and without the setting take turns, and begin in
    turn. The intervals resample pairs of blocks, because runs of one block are alike.

    Args:
        network: network from `attach_exits`, or a `Network` of your own; measured in eval mode.
        x: example input.
        names: settings to measure.
        runs: runs with each setting; p50 wants 200, p99 500 and p99.9 5,000.
        max_seconds: stop measuring a setting after this many seconds and at least 8 pairs.
        progress: whether to show a progress bar.
        clock: clock to measure with.
    Raises:
        RunError: if there is no setting of a name.
        CostError: if fewer than 1 run is asked for.
    Thread:
        Call it where nothing else runs in the process: settings are of all its threads.
    """
    checks.at_least(CostError, 1, runs=runs)
    asked: list[tuple[Name, ...]] = [(), *((name,) for name in names)]
    found = []
    with evaluating(network), torch.inference_mode(), display(progress, between=True) as bar:
        task = bar.add_task("measuring settings", total=len(asked), unit="settings", note="")
        for some in asked:
            bar.update(task, note=some[0] if some else "nothing", refresh=True)
            found.append(_tuned(network, x, some, runs, max_seconds, clock))
            bar.advance(task)
    return found


def _tuned(
    network: Network,
    x: Any,
    names: tuple[Name, ...],
    runs: int,
    max_seconds: float,
    clock: Clock,
) -> Tuned:
    with RealTime(names) as settings:
        setting = settings.settings[0] if names else None
    if setting is not None and (not setting.done or setting.name == "governor"):
        # There is nothing to measure.
        return Tuned(setting=setting, runs=0, ratios={})

    def block() -> list[list[float]]:
        return [_times(network, x, clock) for _ in range(BLOCK)]

    def block_with() -> list[list[float]]:
        with RealTime(names) as settings, settings.quiet:
            return block()

    blocks = block_with, block
    # Warmed up before the clock for `max_seconds` starts.
    list(interleaved(blocks, repeats=0, warm_up=1))
    pairs = []
    start = clock.now()
    for pair in interleaved(blocks, repeats=-(-runs // BLOCK)):
        pairs.append(pair)
        if len(pairs) >= PAIRS and clock.now() - start > max_seconds:
            break
    # By pair, way, run and what was measured.
    times_s = np.array(pairs)
    ratios = {
        what: _ratios(times_s[:, 0, :, place], times_s[:, 1, :, place])
        for place, what in enumerate(WHATS)
    }
    return Tuned(setting=setting, runs=len(pairs) * BLOCK, ratios=ratios)


def _times(network: Network, x: Any, clock: Clock) -> list[float]:
    """Measure seconds of waking up late, of the first exit, and of the whole network."""
    asleep = clock.now()
    time.sleep(SLEEP_S)
    woken = clock.now()
    device = input_tensor(x).device
    answered = woken
    with begin(network, x) as run:
        for exit in run:
            exit.output()
            if exit.index == 0:
                synchronise(device)
                answered = clock.now()
    synchronise(device)
    return [woken - asleep - SLEEP_S, answered - woken, clock.now() - woken]


def _ratios(with_s: Times, without_s: Times) -> dict[Quantile, Ratio]:
    """Compare quantiles of two tables of times, [blocks, runs]."""
    count = with_s.size
    return {
        name: _ratio(with_s, without_s, quantile)
        for name, quantile in QUANTILES.items()
        if count * (1.0 - quantile) >= BEYOND and len(with_s) >= PAIRS
    }


def _ratio(with_s: Times, without_s: Times, quantile: float) -> Ratio:
    draws = np.random.default_rng(0).integers(len(with_s), size=(RESAMPLES, len(with_s)))
    # The first row is what was measured, the others resample its pairs of blocks.
    draws = np.vstack([np.arange(len(with_s)), draws])
    above, below = (
        np.quantile(times_s[draws].reshape(len(draws), -1), quantile, axis=1)
        for times_s in (with_s, without_s)
    )
    low, high = np.quantile(above[1:] / below[1:], [0.025, 0.975])
    return Ratio(value=float(above[0] / below[0]), low=float(low), high=float(high))
