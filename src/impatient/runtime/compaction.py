"""Decide when taking finished samples out of a batch saves time.

It does where the stages ahead save more time than copying the other samples costs.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from impatient import checks
from impatient.costs import BatchCosts, CostProfile
from impatient.errors import RunError

When = Literal["auto", "never", "always"]

# Assumed speed of copying. One thread copied 8e9 bytes/s (index_select of 32 feature maps of
# resnet50). A quarter of that is conservative, and a stage still takes a hundred times as long as
# the copying.
COPY_BYTES_PER_S = 2e9
# Assumed time for choosing the rows and passing them on, whatever their number.
KEEP_S = 50e-6


def covering(sizes: Iterable[int], rows: int) -> int | None:
    """Return the smallest of these batch sizes that holds a number of rows.

    Its cost is an upper bound. None if all are smaller.

    Example:
        >>> covering([1, 8, 32], 5), covering([1, 8, 32], 33)
        (8, None)
    """
    return min((size for size in sizes if size >= rows), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compaction:
    """A rule that says when a batch continues with fewer rows.

    "auto" compares the time of all stages ahead at the present number of rows and at the reduced
    one, each as the sum of the stages' medians. The batch continues with fewer rows if the
    difference is more than copying them costs. (With means, a few disturbed repeats at one size
    could decide.) The rule assumes that the remaining samples continue to the last exit, and counts
    no heads. Between two profiled batch sizes, times are interpolated. Below the smallest one, the
    line through the two smallest is extended, but never faster than in proportion to the rows. A
    single profiled size says nothing about fewer rows. On a CPU they are then assumed to cost in
    proportion (measured, resnet50 at 32 rows: 0.94 to 1.19 times that); on any other device, as
    much as all of them. Profile more batch sizes there.

    Attributes:
        costs: profile of this machine, at several batch sizes where possible.
        when: "auto" applies the rule; "always" and "never" ignore it.
        buckets: the only numbers of rows that may run, for engines with fixed shapes; empty allows
            any number. A batch continues with the next larger bucket, filled up with copies of a
            row whose outputs are dropped.
        copy_bytes_per_s: assumed speed of copying features.
        keep_s: assumed fixed time of every copying.
    Raises:
        RunError: if `when` is unknown or a bucket is smaller than 1.
    """

    costs: CostProfile
    when: When = "auto"
    buckets: tuple[int, ...] = ()
    copy_bytes_per_s: float = COPY_BYTES_PER_S
    keep_s: float = KEEP_S
    _ahead_s: dict[int, tuple[float, ...]] = dataclasses.field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        checks.one_of(RunError, When, compaction=self.when)
        if any(bucket < 1 for bucket in self.buckets):
            raise RunError(f"buckets={self.buckets}; expected numbers of rows, each at least 1.")
        object.__setattr__(
            self,
            "_ahead_s",
            {size: _ahead(costs) for size, costs in sorted(self.costs.batches.items())},
        )

    def size(self, exit: int, rows: int, left: int, row_bytes: float) -> int:
        """Return the number of rows to continue with after an exit.

        Args:
            exit: number of the exit that was just passed.
            rows: number of rows that ran up to here, with the copies that fill the batch up.
            left: number of samples that have not finished.
            row_bytes: size of one sample's features at this exit.
        """
        reduced = covering(self.buckets, left) if self.buckets else left
        if self.when == "never" or reduced is None or reduced >= rows:
            return rows
        price_s = self.keep_s + reduced * row_bytes / self.copy_bytes_per_s
        saves = (
            self.when == "always"
            or self.ahead_s(exit, rows) - self.ahead_s(exit, reduced) > price_s
        )
        return reduced if saves else rows

    def ahead_s(self, exit: int, rows: int) -> float:
        """Estimate the seconds of all stages after an exit."""
        sizes = tuple(self._ahead_s)
        place = bisect.bisect_left(sizes, rows)
        if place == len(sizes):
            return self._ahead_s[sizes[-1]][exit] * rows / sizes[-1]
        if place > 0:
            return self._on_line(exit, rows, sizes[place - 1], sizes[place])
        least = self._ahead_s[sizes[0]][exit]
        proportional = least * rows / sizes[0]
        if len(sizes) == 1:
            return proportional if (self.costs.provenance.device or "cpu") == "cpu" else least
        return min(least, max(proportional, self._on_line(exit, rows, sizes[0], sizes[1])))

    def _on_line(self, exit: int, rows: int, first: int, second: int) -> float:
        low = self._ahead_s[first][exit]
        high = self._ahead_s[second][exit]
        return low + (high - low) * (rows - first) / (second - first)


def _ahead(costs: BatchCosts) -> tuple[float, ...]:
    """Sum the median seconds of all stages after each exit."""
    later = [stage.p50 for stage in costs.stages[1:]]
    return tuple(itertools.accumulate(reversed(later), initial=0.0))[::-1]
