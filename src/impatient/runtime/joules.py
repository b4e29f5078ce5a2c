"""Joules of a run, by a meter that the caller brings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from impatient.clock import SYSTEM_CLOCK, Clock
from impatient.errors import EnergyUnavailable

# the counters of GPUs move only some ten times a second
WINDOW_S = 0.5
ROUNDS = 3


@runtime_checkable
class EnergyMeter(Protocol):
    """Measure joules between two moments.

    Attributes:
        name: what is measured by what, in words.
    """

    @property
    def name(self) -> str: ...

    def begin(self) -> None: ...

    def end(self) -> float:
        """Joules since `begin`."""
        ...


def joules_per_run(
    meter: EnergyMeter,
    jobs: Sequence[Callable[[], object]],
    *,
    window_s: float = WINDOW_S,
    rounds: int = ROUNDS,
    clock: Clock = SYSTEM_CLOCK,
) -> tuple[float, ...]:
    """Joules of one run of each of several jobs: each is run over and over for a window, in turn
    with the others.

    Args:
        jobs: each waits for the device before it returns.
        window_s: at least so long, and at least one run.
        rounds: windows of each job; the median counts.
    Raises:
        EnergyUnavailable: if the meter did not move in a window.
    """
    measured: list[list[float]] = [[] for _ in jobs]
    for turn in range(rounds):
        for place in range(len(jobs)) if turn % 2 else reversed(range(len(jobs))):
            measured[place].append(_in_window(meter, jobs[place], window_s, clock))
    return tuple(statistics.median(values) for values in measured)


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
            f"here."
        )
    return joules / runs
