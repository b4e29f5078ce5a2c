"""The queue of an ensemble of growing depth, played out: the truth for its formulas."""

import heapq
import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlayedQueue:
    """Networks on workers, played out.

    Attributes:
        depths: of the networks, in units of time of one worker, in the order of the queue.
        begins: when each network begins.
        competitive_from: r, the share of its depth from which a network is as good as the best.
        end: when a worker asks for one network more than there are. Nothing is said of budgets
            beyond.
    """

    depths: np.ndarray
    begins: np.ndarray
    competitive_from: float
    end: float

    @property
    def first(self) -> float:
        """The smallest budget that buys an answer."""
        return float((self.begins + self.competitive_from * self.depths).min())

    def depth(self, budgets: np.ndarray) -> np.ndarray:
        """Depth of the network whose answer the ensemble's equals, after each budget; 0 before the
        first answer.
        """
        come_to = np.minimum(budgets[:, None] - self.begins, self.depths)
        return np.asarray(
            np.where(come_to >= self.competitive_from * self.depths, come_to, 0.0).max(1)
        )

    def inflation(self, budgets: np.ndarray) -> np.ndarray:
        """C(B) at each budget; infinite before the first answer."""
        depth = self.depth(budgets)
        return np.asarray(
            np.divide(budgets, depth, out=np.full(len(budgets), math.inf), where=depth > 0.0)
        )

    @property
    def sup(self) -> float:
        """Largest inflation over all budgets that buy an answer, in the limit from below too."""
        left, right, begin, depth, running = self._pieces()
        at_ends = [
            np.where(running, end / np.where(running, end - begin, 1.0), end / depth)
            for end in (left, right)
        ]
        return float(np.max(at_ends))

    @property
    def mean(self) -> float:
        """Mean inflation over budgets that are uniform from the first answer to the end."""
        left, right, begin, depth, running = self._pieces()
        grown = np.where(running, (right - begin) / np.where(running, left - begin, 1.0), 1.0)
        while_running = right - left + begin * np.log(grown)
        areas = np.where(running, while_running, (right**2 - left**2) / (2.0 * depth))
        return float(areas.sum() / (self.end - self.first))

    def _pieces(self) -> tuple[np.ndarray, ...]:
        """Stretches of budgets in which one network answers: from, to, its begin and depth, and
        whether it is running.
        """
        # as deep as one before it
        overtakes = (self.begins[:, None] + self.depths)[np.tri(len(self.depths), dtype=bool)]
        moments = np.concatenate(
            [[self.first, self.end], self.begins + self.competitive_from * self.depths, overtakes]
        )
        moments = np.unique(moments[(moments >= self.first) & (moments <= self.end)])
        left = moments[:-1]
        right = moments[1:]
        come_to = (left + right)[:, None] / 2.0 - self.begins
        able = come_to >= self.competitive_from * self.depths
        leader = np.where(able, np.minimum(come_to, self.depths), 0.0).argmax(1)
        begin = self.begins[leader]
        depth = self.depths[leader]
        return left, right, begin, depth, (left + right) / 2.0 - begin < depth


def play(
    base: float, members: int, *, workers: int = 1, competitive_from: float | None = None
) -> PlayedQueue:
    """Play the queue: networks of depth 1, b, b², ..., each taken by the worker that is idle first.

    With more members its supremum and its mean come nearer to `sup` and `mean`.
    """
    share = 1.0 / base if competitive_from is None else competitive_from
    depths = base ** np.arange(float(members))
    begins = []
    idle_at = [0.0] * workers
    for depth in depths:
        begins.append(heapq.heappop(idle_at))
        heapq.heappush(idle_at, begins[-1] + float(depth))
    return PlayedQueue(
        depths=depths, begins=np.array(begins), competitive_from=share, end=idle_at[0]
    )
