"""Whether the next exit still fits, on a machine that may have become slower than its profile says."""

from __future__ import annotations

import bisect
import collections
import math
import threading
from collections.abc import Sequence

# Time kept back from every deadline for handing the answer over.
RESERVE_S = 100e-6

# The quantile that a statistic of measured times stands for; the largest of n is taken for the last
# that n could tell.
QUANTILES = {"mean": 0.5, "p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 0.999}


class SlowdownEstimator:
    """How many times as long as profiled a stage may take now: a quantile of what the latest stages
    took, at least 1.

    The scale is the quantile of the ratios measured / profiled over the latest 2 / (1 - quantile)
    stages (at least 50), their second largest at most. A stage as drawn at random as those before
    it takes longer than that with the wanted probability, whatever the distribution; only a change
    must be waited for. A load shows at its second stage (at 0.9 the fifth), since the largest
    ratios count, and is forgotten when the window has passed: 200 stages at the 0.99 quantile, 2000
    at 0.999. One descheduled stage alone moves nothing. To begin with, the window is full of 1: the
    profile is believed until it is wrong.

    Args:
        quantile: which one, above 0 and below 1: that of the profiled times.
    Source:
        The order statistic of split conformal prediction (Vovk et al. 2005), over a moving window.
        It was chosen by simulation over steps in the direction of each error (adaptive conformal
        inference, Gibbs and Candes 2021), which are either slow to fall after a load or high
        without one.
    Thread:
        May be used from any thread.
    """

    # a ratio: what a suspended machine measures must not become infinite
    LARGEST = 100.0

    def __init__(self, quantile: float) -> None:
        if not 0.0 < quantile < 1.0:
            raise ValueError(
                f"quantile={quantile!r}; expected a number above 0 and below 1, such as 0.99."
            )
        count = max(50, round(2.0 / (1.0 - quantile)))
        self._place = min(count, math.ceil((count + 1) * quantile)) - 1
        self._lock = threading.Lock()
        self._latest = collections.deque([1.0] * count)
        self._sorted = [1.0] * count

    @property
    def scale(self) -> float:
        """What profiled costs are to be multiplied by; at least 1, since a quicker machine has time
        left.
        """
        return self._sorted[self._place]

    def observe(self, ratio: float) -> None:
        """Take note of a stage that took `ratio` times what was profiled."""
        ratio = min(max(1.0, ratio), self.LARGEST)
        with self._lock:
            gone = self._latest.popleft()
            self._latest.append(ratio)
            if ratio != gone:
                # first: who reads the scale meanwhile must not find too few
                bisect.insort(self._sorted, ratio)
                del self._sorted[bisect.bisect_left(self._sorted, gone)]

    def forget(self) -> None:
        """Believe a little less in what was seen: for when a slow machine is given nothing to do,
        and so shows nothing.
        """
        with self._lock:
            self._latest = collections.deque(1.0 + 0.95 * (ratio - 1.0) for ratio in self._latest)
            self._sorted = sorted(self._latest)


class TimePredictor:
    """Whether the next exit still fits, on a machine that may have become slower than its profile
    says.

    Args:
        next_s: per exit, the quantile of the cost of its stage and head, from the exit before.
        quantile: which one, above 0 and below 1.
        stage_s: per exit, the quantile of the cost of its stage alone; by default `next_s`.
        drift: how much slower the machine is now; by default a new one. Batch sizes share one.
    """

    def __init__(
        self,
        next_s: Sequence[float],
        quantile: float,
        stage_s: Sequence[float] | None = None,
        drift: SlowdownEstimator | None = None,
    ) -> None:
        self._next_s = tuple(next_s)
        self._stage_s = self._next_s if stage_s is None else tuple(stage_s)
        self.drift = SlowdownEstimator(quantile) if drift is None else drift

    @property
    def scale(self) -> float:
        """How many times as long as profiled the next stage may take; at least 1."""
        return self.drift.scale

    def needs_s(self, exit: int) -> float:
        """Seconds to allow for an exit from the one before; 0 beyond the last."""
        return self._next_s[exit] * self.scale if exit < len(self._next_s) else 0.0

    def fits(self, exit: int, now: float, deadline: float, reserve_s: float) -> bool:
        """Whether this exit's answer is there, with the reserve left, by the instant `deadline`;
        one beyond the last is.
        """
        return exit >= len(self._next_s) or now + self.needs_s(exit) + reserve_s <= deadline

    def observe(self, exit: int, measured_s: float, *, answered: bool = False) -> None:
        """Take note of what the stage of an exit has just taken, or its stage and head where it
        `answered`.
        """
        expected = (self._next_s if answered else self._stage_s)[exit]
        if expected > 0.0:
            self.drift.observe(measured_s / expected)
