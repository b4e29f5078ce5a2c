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
from impatient.costs import CostProfile
from impatient.errors import RunError

When = Literal["auto", "never", "always"]

# What copying is assumed to cost. One thread copied 8e9 bytes/s (index_select of 32 feature maps of
# resnet50): a quarter of that is the safe side, and a stage takes a hundred times as long as the
# copying all the same.
COPY_BYTES_PER_S = 2e9
# choosing the rows and handing them over, whatever their number
KEEP_S = 50e-6


def covering(sizes: Iterable[int], rows: int) -> int | None:
    """The least of these batch sizes that is at least as large: its cost is an upper bound. None if
    there is none.

    Example:
        >>> covering([1, 8, 32], 5), covering([1, 8, 32], 33)
        (8, None)
    """
    return min((size for size in sizes if size >= rows), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compaction:
    """The rule that says with how many rows a batch goes on when some of its samples have finished.

    "auto" compares the time of all stages ahead at the present number of rows and at the reduced
    one, each the sum of the stages' medians, and goes on with fewer rows if the difference is more
    than copying them costs. (Means would let a few disturbed repeats at one size decide.) It takes
    it that the samples still going go on to the last exit, and counts no heads. Between two
    profiled batch sizes times are interpolated. Below the smallest one the line through the two
    smallest goes on, but never faster than in proportion to the rows. A single profiled size says
    nothing of
    fewer rows: on a CPU they are taken to cost in proportion (measured, resnet50 at 32 rows: 0.94
    to 1.19 times that), on any other device as much as all of them; profile more batch sizes there.

    Attributes:
        costs: measured on this machine, at several batch sizes where possible.
        when: "auto"; "always" and "never" leave the rule out.
        buckets: the only numbers of rows that may run, for engines that want fixed shapes; a batch
            goes on with the next larger one, filled up with copies of a row whose outputs are
            dropped. Empty: any number.
        copy_bytes_per_s, keep_s: assumed speed of copying the features, and time of doing so at
            all.
    Raises:
        RunError: if `when` or a bucket is not possible.
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
            {size: _ahead(self.costs, size) for size in sorted(self.costs.batches)},
        )

    def size(self, exit: int, rows: int, left: int, row_bytes: float) -> int:
        """With how many rows to go on after an exit: `rows`, or fewer.

        Args:
            exit: just passed.
            rows: that ran up to here, fillers included.
            left: samples that have not finished.
            row_bytes: size of one sample's features at this exit.
        """
        reduced = left if not self.buckets else covering(self.buckets, left)
        if self.when == "never" or reduced is None or reduced >= rows:
            return rows
        price_s = self.keep_s + reduced * row_bytes / self.copy_bytes_per_s
        saves = (
            self.when == "always"
            or self.ahead_s(exit, rows) - self.ahead_s(exit, reduced) > price_s
        )
        return reduced if saves else rows

    def ahead_s(self, exit: int, rows: int) -> float:
        """Estimated seconds of all stages after an exit, for this many rows."""
        sizes = tuple(self._ahead_s)
        place = bisect.bisect_left(sizes, rows)
        if place == len(sizes):
            return self._ahead_s[sizes[-1]][exit] * rows / sizes[-1]
        if place == 0:
            return self._below(exit, rows, sizes)
        return self._on_line(exit, rows, sizes[place - 1], sizes[place])

    def _below(self, exit: int, rows: int, sizes: tuple[int, ...]) -> float:
        least = self._ahead_s[sizes[0]][exit]
        proportional = least * rows / sizes[0]
        if len(sizes) == 1:
            return proportional if (self.costs.provenance.device or "cpu") == "cpu" else least
        return min(least, max(proportional, self._on_line(exit, rows, sizes[0], sizes[1])))

    def _on_line(self, exit: int, rows: int, first: int, second: int) -> float:
        low = self._ahead_s[first][exit]
        high = self._ahead_s[second][exit]
        return low + (high - low) * (rows - first) / (second - first)


def _ahead(costs: CostProfile, size: int) -> tuple[float, ...]:
    """Per exit, the sum of the median seconds of all stages after it."""
    stages = [stage.p50 for stage in costs.batches[size].stages]
    return tuple(itertools.accumulate(reversed(stages[1:]), initial=0.0))[::-1]
