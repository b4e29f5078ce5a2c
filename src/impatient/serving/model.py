"""What the scheduler knows of a network: what its exits cost, and what they are worth."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from impatient.costs import CostProfile, Statistic
from impatient.errors import ServingError


@dataclass(frozen=True, slots=True, kw_only=True)
class GainTable:
    """Expected quality of later exits, given how sure an exit looks.

    Attributes:
        bounds: per exit, the score bounds between its bins, increasing.
        quality: per exit and bin, the mean quality of all K exits on the samples of the bin.
    """

    bounds: tuple[tuple[float, ...], ...]
    quality: tuple[tuple[tuple[float, ...], ...], ...]

    def expected(self, exit: int, score: float) -> tuple[float, ...]:
        """Return the expected quality of all K exits for a sample with this score."""
        return self.quality[exit][bisect.bisect_right(self.bounds[exit], score)]

    @classmethod
    def of(cls, quality_KN: np.ndarray, scores_KN: np.ndarray, bins: int = 10) -> Self:
        """Estimate it from recorded samples, with about as many samples in each bin.

        Args:
            quality_KN: quality of each exit's answer in [0, 1], shape [K, N].
            scores_KN: how sure each exit looked, shape [K, N].
            bins: most bins per exit; equal scores share a bin.
        """
        bounds = []
        means = []
        for scores in scores_KN:
            edges = np.unique(np.quantile(scores, np.linspace(0, 1, bins + 1)[1:-1]))
            place = np.searchsorted(edges, scores, side="right")
            # A bin without a sample takes the mean of all.
            means.append(
                tuple(
                    tuple(
                        float(value)
                        for value in quality_KN[
                            :, (place == number) if (place == number).any() else slice(None)
                        ].mean(1)
                    )
                    for number in range(len(edges) + 1)
                )
            )
            bounds.append(tuple(float(edge) for edge in edges))
        return cls(bounds=tuple(bounds), quality=tuple(means))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A network as the scheduler sees it.

    Attributes:
        name: the name by which requests ask for it.
        stages_s: per batch size, usual seconds of each exit's stage.
        heads_s: per batch size, usual seconds of each exit's head; empty if `stages_s` has them in.
            Only the head of the last exit of a work is run.
        quality: mean quality of each exit's answer, in [0, 1].
        gains: expected quality given an exit's score; None if scores say nothing.
        max_batch: most samples in one batch.
        merges: whether requests at one depth may be joined in a batch though they began apart.
    Raises:
        ServingError: if the numbers of exits differ, or there is no cost or no place in a batch.
    """

    name: str
    stages_s: Mapping[int, tuple[float, ...]]
    quality: tuple[float, ...]
    gains: GainTable | None = None
    max_batch: int = 8
    merges: bool = False
    heads_s: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    # by rows, what `_times_of` has computed
    _known: dict[int, tuple[list[float], list[float]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        counts = {len(row) for row in self.stages_s.values()} | {len(self.quality)}
        if len(counts) != 1 or not self.stages_s or not self.quality:
            raise ServingError(
                f"the model {self.name!r} has costs and qualities of {sorted(counts)} exits; "
                "expected one cost per exit and batch size, and one quality per exit."
            )
        if self.heads_s and (
            self.heads_s.keys() != self.stages_s.keys()
            or {len(row) for row in self.heads_s.values()} != counts
        ):
            raise ServingError(
                f"the model {self.name!r} has heads of the batch sizes {sorted(self.heads_s)} and "
                f"stages of {sorted(self.stages_s)}; expected one head per exit for the same sizes."
            )
        if self.max_batch < 1 or min(self.stages_s) < 1:
            raise ServingError(
                f"the model {self.name!r} has max_batch={self.max_batch} and costs of the batch "
                f"sizes {sorted(self.stages_s)}; expected numbers of at least 1."
            )

    @property
    def num_exits(self) -> int:
        return len(self.quality)

    @property
    def deepening(self) -> float:
        """Return the quality gained per second between the first exit and the last, at least 0."""
        gain = max(0.0, self.quality[-1] - self.quality[0])
        return gain and gain / self.work_s(1, self.num_exits - 1, 1)

    def work_s(self, first: int, last: int, rows: int) -> float:
        """Return usual seconds of the stages from one exit to another, and of the last one's head.

        Args:
            first: first exit that is computed.
            last: last exit that is computed.
            rows: samples in the batch; between profiled sizes the cost is interpolated, and beyond
                the largest it grows in proportion.
        """
        known = self._known.get(rows)
        if known is None:
            known = self._known[rows] = self._times_of(rows)
        until, heads = known
        return until[last + 1] - until[first] + heads[last]

    def _times_of(self, rows: int) -> tuple[list[float], list[float]]:
        """Return the seconds before each exit's stage and after the last, and those of heads."""
        sizes = sorted(self.stages_s)
        beyond = max(1.0, rows / sizes[-1])

        def usual(table: Mapping[int, tuple[float, ...]]) -> list[float]:
            columns = zip(*(table[size] for size in sizes), strict=True)
            return [float(np.interp(rows, sizes, column)) * beyond for column in columns]

        until = list(itertools.accumulate(usual(self.stages_s), initial=0.0))
        return until, usual(self.heads_s) if self.heads_s else [0.0] * self.num_exits

    def scaled(self, factor: float) -> Self:
        """Return the same model on a machine that is slower by a factor."""

        def slower(table: Mapping[int, tuple[float, ...]]) -> dict[int, tuple[float, ...]]:
            return {size: tuple(s * factor for s in row) for size, row in table.items()}

        return dataclasses.replace(
            self, stages_s=slower(self.stages_s), heads_s=slower(self.heads_s)
        )

    @classmethod
    def of(
        cls,
        name: str,
        costs: CostProfile,
        quality: Sequence[float],
        *,
        gains: GainTable | None = None,
        statistic: Statistic = "p50",
        max_batch: int = 8,
    ) -> Self:
        """Take the costs from a profile.

        Args:
            name: the name by which requests ask for it.
            costs: the network's cost profile, at several batch sizes where possible.
            quality: mean quality of each exit's answer.
            gains: expected quality given an exit's score.
            statistic: statistic of the measured times by which work is planned. A refusal is
                certain to be no answer, so it is decided by the median, not by a high quantile.
            max_batch: most samples in one batch.
        """
        stages = {}
        heads = {}
        for size in costs.batches:
            stages[size], heads[size] = costs.parts("time", statistic=statistic, batch_size=size)
        return cls(
            name=name,
            stages_s=stages,
            heads_s=heads,
            quality=tuple(quality),
            gains=gains,
            max_batch=max_batch,
        )
