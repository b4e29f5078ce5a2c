"""Predict whether the next exit still fits before the deadline.

The prediction allows for a machine that has become slower than its profile.
"""

from __future__ import annotations

import bisect
import collections
import math
import threading
from collections.abc import Callable, Sequence

# Time reserved before every deadline for returning the answer.
RESERVE_S = 100e-6

# So many new ratios are sorted in one by one.
FEW = 20

# The quantile that each statistic of measured times stands for. The largest time counts as p999.
QUANTILES = {"mean": 0.5, "p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 0.999}


class SlowdownEstimator:
    """Estimate how many times slower than profiled the machine is now.

    The scale is a quantile of the ratios measured / profiled over the latest 2 / (1 - quantile)
    stages (at least 50), at most their second largest. If the next stage comes from
    the same distribution as those in the window, whatever that is, it exceeds the scale with
    probability 1 - quantile. Only a change of the distribution takes time to show. A load shows at
    its second stage (at 0.9, at its fifth), because the largest ratios count. It is forgotten when
    the window has passed: after 200 stages at the 0.99 quantile, after 2000 at 0.999. A single
    descheduled stage changes nothing. At first the window is filled with 1, so the profile is
    trusted until measured times differ.

    A profile made in a bad moment is corrected, too: when all stages of the window were clearly
    faster, the scale is below 1. Ratios below 1 are rounded up in steps of 20 %.

    Args:
        quantile: quantile of the profiled times, above 0 and below 1.
    Source:
        The order statistic of split conformal prediction (Vovk et al. 2005), over a moving window.
        It was chosen by simulation over steps in the direction of each error (adaptive conformal
        inference, Gibbs and Candes 2021), which are either slow to fall after a load or high
        without one.
    Attributes:
        observe: function to call with the ratio of a stage, measured over profiled time.
    Thread:
        May be used from any thread.
    """

    # Largest ratio that counts, so that times measured across a suspension stay finite; likewise
    # the smallest is one in so many.
    LARGEST = 100.0
    # The first ratio below 1 that counts, and the factor to the next: less is not worth a miss.
    STEP = 0.8

    def __init__(self, quantile: float) -> None:
        if not 0.0 < quantile < 1.0:
            raise ValueError(
                f"quantile={quantile!r}; expected a number above 0 and below 1, such as 0.99."
            )
        count = max(50, round(2.0 / (1.0 - quantile)))
        self._place = min(count, math.ceil((count + 1) * quantile)) - 1
        self._start([1.0] * count)

    def _start(self, ratios: Sequence[float]) -> None:
        """Begin with a window of ratios."""
        self._lock = threading.RLock()
        self._latest = collections.deque(ratios, maxlen=len(ratios))
        self._sorted = sorted(ratios)
        # What was observed and is not in the window yet, at most as much as fits there.
        self._new: collections.deque[float] = collections.deque(maxlen=len(ratios))
        # A function in C, because it is called at every exit, where the caches are cold.
        self.observe: Callable[[float], None] = self._new.append

    @property
    def scale(self) -> float:
        """Return the factor by which to multiply profiled costs.

        It is below 1 where the profile was made in a bad moment.
        """
        if self._new:
            self._catch_up()
        return self._sorted[self._place]

    def _catch_up(self) -> None:
        """Move the window over all that was observed, which waits until somebody asks."""
        with self._lock:
            if len(self._new) > FEW:
                count = len(self._new)
                self._latest.extend([self._counted(self._new.popleft()) for _ in range(count)])
                self._sorted = sorted(self._latest)
            while self._new:
                ratio = self._counted(self._new.popleft())
                gone = self._latest[0]
                self._latest.append(ratio)
                if ratio != gone:
                    # Insert before deleting: another thread that reads the scale meanwhile must
                    # not find too few entries.
                    bisect.insort(self._sorted, ratio)
                    del self._sorted[bisect.bisect_left(self._sorted, gone)]

    def _counted(self, ratio: float) -> float:
        """Return as what a ratio counts."""
        if ratio < self.STEP:
            return _STEPS[bisect.bisect_left(_STEPS, ratio)]
        return min(max(1.0, ratio), self.LARGEST)

    def answered(self, *, late: bool, exit: int) -> None:
        """Record whether an answer with a deadline was late, for estimates that learn from that.

        Args:
            late: whether it was.
            exit: the exit that answered.
        """

    def forget(self) -> None:
        """Move the estimate a little towards 1.

        This is for a slow machine that gets no work, and so measures nothing new.
        """
        with self._lock:
            self._catch_up()
            self._latest.extend([1.0 + 0.95 * (ratio - 1.0) for ratio in self._latest])
            self._sorted = sorted(self._latest)


# Ratios below 1, from the smallest that counts.
_STEPS = [SlowdownEstimator.STEP**power for power in range(20, 0, -1)]


class TimePredictor:
    """Predict whether the next exit still fits before the deadline.

    Args:
        next_s: for each exit, the quantile of the time from the exit before it, its stage and head
            together.
        quantile: quantile of these times, above 0 and below 1.
        stage_s: for each exit, the quantile of the time of its stage alone; the default is
            `next_s`.
        drift: estimate of how much slower the machine is now, which predictors of several batch
            sizes may share; the default is a new one.
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
        """Return how many times longer than profiled the next stage may take."""
        return self.drift.scale

    def needs_s(self, exit: int) -> float:
        """Return the seconds to allow for an exit, 0 beyond the last exit."""
        return self._next_s[exit] * self.scale if exit < len(self._next_s) else 0.0

    def head_s(self, exit: int) -> float:
        """Return the seconds to allow for the head of an exit, and for asking the policy there."""
        return (self._next_s[exit] - self._stage_s[exit]) * self.scale

    def fits(self, exit: int, now: float, deadline: float, reserve_s: float) -> bool:
        """Tell whether an exit can answer before the deadline.

        Args:
            exit: number of the exit; one beyond the last always fits.
            now: present instant, in seconds.
            deadline: instant of the deadline, in seconds.
            reserve_s: seconds that must be left after the answer.
        """
        if exit >= len(self._next_s):
            return True
        return now + self._next_s[exit] * self.drift.scale + reserve_s <= deadline

    def observe(self, exit: int, measured_s: float, *, answered: bool = False) -> None:
        """Record the measured time of an exit.

        Args:
            exit: number of the exit.
            measured_s: seconds that its stage took, or its stage and head if it answered.
            answered: whether the time includes the head.
        """
        expected = (self._next_s if answered else self._stage_s)[exit]
        if expected > 0.0:
            self.drift.observe(measured_s / expected)
