"""Keep the share of late answers at a rate that the user has chosen."""

from __future__ import annotations

import bisect
import collections
import math
import threading
from collections.abc import Sequence

from impatient import checks
from impatient.costs import BatchCosts, Quantiles
from impatient.errors import RunError
from impatient.portable.timing import SlowdownEstimator

# Stages that are remembered, so that a load or an interruption is forgotten when they have passed.
WINDOW = 200
# How much one late answer changes the logarithm of the share of stages that may take longer.
STEP = 0.5
# The largest share; with it, planning is by the median.
MOST = 0.5


class MissRate(SlowdownEstimator):
    """Estimate by how much medians of the profile are to be multiplied to be late at a rate.

    The scale is a quantile of measured time over profiled median of the latest stages. Which
    quantile, late answers decide: each makes it higher, and each answer in time a little lower, so
    that the steps cancel at the asked rate. What was late although the first exit alone answered
    changes nothing, because no rule could have answered earlier.

    Args:
        rate: share of answers that may be late, between 0 and 1.
        spread: ratios to the median that the profile has seen, until there are measured ones.
    Source:
        The update of adaptive conformal inference (Gibbs and Candes 2021). We differ: it acts on
        the logarithm of the level, and on a moving window, so that nothing is remembered longer.
    Thread:
        May be used from any thread.
    """

    def __init__(self, rate: float, spread: Sequence[float] = (1.0,)) -> None:
        checks.true_share(RunError, miss_rate=rate)
        self._rate = rate
        # The share of stages that may take longer than the scale allows.
        self._lock = threading.Lock()
        self._beyond = rate
        count = len(spread)
        self._latest = collections.deque(spread[place * count // WINDOW] for place in range(WINDOW))
        self._sorted = sorted(self._latest)
        self._place = 0
        self._choose()

    def observe(self, ratio: float) -> None:
        """Record that a stage took `ratio` times its profiled median."""
        ratio = min(ratio, self.LARGEST)
        with self._lock:
            gone = self._latest.popleft()
            self._latest.append(ratio)
            # Insert before deleting: another thread may read the scale meanwhile.
            bisect.insort(self._sorted, ratio)
            del self._sorted[bisect.bisect_left(self._sorted, gone)]

    def answered(self, *, late: bool, exit: int) -> None:
        """Record whether an answer with a deadline was late.

        Args:
            late: whether it was.
            exit: the exit that answered.
        """
        if late and exit == 0:
            return
        with self._lock:
            change = STEP * (self._rate - late)
            self._beyond = min(MOST, max(0.5 / WINDOW, self._beyond * math.exp(change)))
            self._choose()

    def forget(self) -> None:
        """Move the ratios a little towards 1, as for a slow machine that measures nothing new."""
        with self._lock:
            self._latest = collections.deque(1.0 + 0.95 * (ratio - 1.0) for ratio in self._latest)
            self._sorted = sorted(self._latest)

    def _choose(self) -> None:
        self._place = min(WINDOW - 1, math.ceil((1.0 - self._beyond) * WINDOW))


def spread_of(costs: BatchCosts) -> list[float]:
    """Return ratios to the median that a profile has seen, in steps of half a percent."""
    parts = [part for part in costs.stages if part.p50 > 0.0]
    if not parts:
        return [1.0]

    def ratio(quantile: float) -> float:
        return sum(_at(part, quantile) / part.p50 for part in parts) / len(parts)

    return [ratio((place + 0.5) / WINDOW) for place in range(WINDOW)]


def _at(part: Quantiles, quantile: float) -> float:
    known = ((0.5, part.p50), (0.9, part.p90), (0.99, part.p99), (1.0, part.p999))
    return next(value for bound, value in known if quantile <= bound)
