"""Measure the joules of a run, with a meter from the caller."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from impatient.clock import SYSTEM_CLOCK, Clock, interleaved
from impatient.errors import EnergyUnavailable

# Seconds. The counters of GPUs change only some ten times a second.
WINDOW_S = 0.5
ROUNDS = 3


@runtime_checkable
class EnergyMeter(Protocol):
    """A meter of joules between two moments.

    Attributes:
        name: description of the meter and of what it measures.
    """

    @property
    def name(self) -> str: ...

    def begin(self) -> None: ...

    def end(self) -> float:
        """Return the joules since `begin`."""
        ...


def joules_per_run(
    meter: EnergyMeter,
    jobs: Sequence[Callable[[], object]],
    *,
    window_s: float = WINDOW_S,
    rounds: int = ROUNDS,
    clock: Clock = SYSTEM_CLOCK,
) -> tuple[float, ...]:
    """Measure the joules of one run of each of several jobs.

    Each job is repeated for a time window, in turn with the others.

    Args:
        meter: meter to read.
        jobs: functions to measure, which wait for the device before they return.
        window_s: least seconds of a window, which holds at least one run.
        rounds: number of windows of each job; the median counts.
        clock: clock to measure windows with.
    Raises:
        EnergyUnavailable: if the meter did not change in a window.
    """
    windows = [functools.partial(_in_window, meter, job, window_s, clock) for job in jobs]
    measured = interleaved(windows, repeats=rounds)
    return tuple(map(statistics.median, zip(*measured, strict=True)))


def _in_window(
    meter: EnergyMeter, job: Callable[[], object], window_s: float, clock: Clock
) -> float:
    runs = 0
    begin = clock.now()
    meter.begin()
    while runs == 0 or clock.now() - begin < window_s:
        job()
        runs += 1
    joules = meter.end()
    if not joules > 0.0:
        raise EnergyUnavailable(
            f"{meter.name} measured {joules} J in {clock.now() - begin:.3g} s; it does not move "
            "here."
        )
    return joules / runs
