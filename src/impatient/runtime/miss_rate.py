"""Keep the share of late answers at a rate that the user has chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

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
# Sizes of the groups of sorted ratios that one mean stands for.
GROUPS = (*[15] * 12, *[2] * 10)


class LatestRatios(SlowdownEstimator):
    """How many times their profiled medians the latest stages took; the scale is their median.

    Args:
        spread: ratios that the profile has seen, until there are measured ones.
    Attributes:
        renewals: called after every answer, to follow the ratios.
    Thread:
        May be used from any thread.
    """

    def __init__(self, spread: Sequence[float] = (1.0,)) -> None:
        count = len(spread)
        self._start([spread[place * count // WINDOW] for place in range(WINDOW)])
        self._place = WINDOW // 2
        self.renewals: list[Callable[[], object]] = []

    def _counted(self, ratio: float) -> float:
        return min(ratio, self.LARGEST)

    # Every answer counts, late or not, from whichever exit.
    def answered(self, *, late: bool, exit: int) -> None:  # noqa: ARG002
        """Let those that follow the ratios look at them."""
        with self._lock:
            for renew in self.renewals:
                renew()

    def grouped(self) -> tuple[np.ndarray, np.ndarray]:
        """Return means of groups of similar ratios, small groups in the tail, and their shares."""
        self._catch_up()
        ratios = np.array(self._sorted[:WINDOW])
        starts = np.concatenate([[0], np.cumsum(GROUPS)[:-1]])
        return np.add.reduceat(ratios, starts) / GROUPS, np.array(GROUPS) / WINDOW


class MissRate(LatestRatios):
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
    """

    def __init__(self, rate: float, spread: Sequence[float] = (1.0,)) -> None:
        checks.true_share(RunError, miss_rate=rate)
        super().__init__(spread)
        self._rate = rate
        # The share of stages that may take longer than the scale allows.
        self._beyond = rate
        self._choose()

    def answered(self, *, late: bool, exit: int) -> None:
        """Adjust the scale after an answer with a deadline."""
        if late and exit == 0:
            return
        with self._lock:
            change = STEP * (self._rate - late)
            self._beyond = min(MOST, max(0.5 / WINDOW, self._beyond * math.exp(change)))
            self._choose()

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
