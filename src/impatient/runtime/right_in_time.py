"""Choose how deep to go so that most answers are right and in time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from impatient.errors import RunError
from impatient.portable.timing import TimePredictor
from impatient.runtime.miss_rate import LatestRatios

# Points of time left at which values are known, evenly apart.
POINTS = 256
# The longest time left that is looked at, over the median time of all exits.
LONGEST = 2.5


class RightInTime(TimePredictor):
    """Continue where more answers are then right and in time than by answering now.

    Answering at an exit is worth its accuracy times the probability that its head is in time. Going
    on is worth what is expected at the next exit, where the same choice is made again with the time
    that is left then. Both are known for every time left (stochastic dynamic programming, from the
    last exit to the first). A stage is taken to last its profiled median times one of the latest
    200 ratios of measured time over median, whichever the stage, independent of those before.

    One exit is computed anew after each answer that it was asked for, the deepest first, so that no
    answer waits for all.

    Args:
        next_s: for each exit, the median time of its stage and head together.
        stage_s: for each exit, the median time of its stage alone.
        accuracy: share of right answers of each exit.
        latest: the latest ratios, which several batch sizes share.
    Raises:
        RunError: if there is not one accuracy from 0 to 1 per exit.
    """

    def __init__(
        self,
        next_s: Sequence[float],
        stage_s: Sequence[float],
        accuracy: Sequence[float] | Tensor,
        latest: LatestRatios,
    ) -> None:
        super().__init__(next_s, 0.5, stage_s, latest)
        self._latest = latest
        self._accuracy = [float(share) for share in accuracy]
        if len(self._accuracy) != len(self._next_s) or not all(
            0.0 <= share <= 1.0 for share in self._accuracy
        ):
            raise RunError(
                f"accuracy={self._accuracy} for {len(self._next_s)} exits; expected a share of "
                "right answers from 0 to 1 for each, such as recording.quality.mean(1)."
            )
        self._whole_s = sum(self._stage_s) + max(
            both - stage for both, stage in zip(self._next_s, self._stage_s, strict=True)
        )
        # For each exit, the seconds between two points, what the best choice is worth there, and
        # whether that is to go on.
        self._worth = [(1.0, np.zeros(POINTS), [False] * POINTS)] * len(self._next_s)
        self._turn = 0
        for _ in self._worth:
            self._renew()
        # Whether an answer has depended on it since: other batch sizes have predictors, too.
        self._asked = False
        latest.renewals.append(self._renew_if_asked)

    def fits(self, exit: int, now: float, deadline: float, reserve_s: float) -> bool:
        """Tell whether going on to an exit is worth more than answering before it."""
        if exit == 0 or exit >= len(self._next_s):
            return super().fits(exit, now, deadline, reserve_s)
        self._asked = True
        step_s, _, goes_on = self._worth[exit - 1]
        place = int((deadline - reserve_s - now) / step_s)
        return place >= 0 and goes_on[min(place, POINTS - 1)]

    def _renew_if_asked(self) -> None:
        if self._asked:
            self._asked = False
            self._renew()

    def _renew(self) -> None:
        """Compute anew what one exit is worth, the one before that of the last call."""
        self._turn = (self._turn or len(self._worth)) - 1
        exit = self._turn
        ratios, weights = self._latest.grouped()
        step_s = LONGEST * max(1.0, float(ratios @ weights)) * self._whole_s / POINTS
        left_s = step_s * np.arange(POINTS)
        head_s = self._next_s[exit] - self._stage_s[exit]
        answer = self._accuracy[exit] * ((head_s * ratios <= left_s[:, None]) @ weights)
        if exit + 1 == len(self._worth):
            self._worth[exit] = step_s, answer, [False] * POINTS
            return
        next_step_s, next_worth, _ = self._worth[exit + 1]
        after_s = left_s[:, None] - self._stage_s[exit + 1] * ratios
        points_s = next_step_s * np.arange(POINTS)
        later = np.interp(after_s, points_s, next_worth, left=0.0) @ weights
        self._worth[exit] = step_s, np.maximum(answer, later), (later > answer).tolist()
