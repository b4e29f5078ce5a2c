"""Tables of all exits and samples that are filled batch by batch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from impatient.errors import RecordingError
from impatient.tasks import Task
from impatient.tasks.task import AGREEMENT


class BatchTable:
    """A table [K, N, ...] that is filled batch by batch, in memory that is taken once.

    Args:
        samples: number of samples, N.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._table: Tensor | None = None
        self._filled = 0

    def add(self, rows_K: Sequence[Tensor]) -> None:
        """Add one batch, [B, ...] of each of K exits.

        Raises:
            RecordingError: if its shape differs from that of the batches before, or if there are
                more samples than expected.
        """
        if self._table is None:
            shape = (len(rows_K), self._samples, *rows_K[0].shape[1:])
            self._table = torch.empty(shape, dtype=rows_K[0].dtype)
        end = self._filled + len(rows_K[0])
        room = self._table[:, self._filled : end]
        for place, rows in zip(room, rows_K, strict=True):
            if place.shape != rows.shape:
                raise RecordingError(
                    f"a batch of shape {tuple(rows.shape)} after {self._filled} of "
                    f"{self._samples} samples; expected {tuple(place.shape)}. All samples must "
                    "have outputs, targets and features of one shape to be kept, and the split "
                    "as many samples as its size says."
                )
            place.copy_(rows)
        self._filled = end

    def whole(self) -> Tensor:
        """Return the table of all samples that came.

        Raises:
            RecordingError: if there were none.
        """
        if self._table is None:
            raise RecordingError("no samples; expected at least one.")
        return self._table[:, : self._filled].contiguous()


class Tables:
    """Quality, scores and statistics of all exits, collected batch by batch.

    Args:
        task: what outputs mean.
        samples: number of samples.
    """

    def __init__(self, task: Task, samples: int) -> None:
        self._task = task
        self._quality = BatchTable(samples)
        self._scores: dict[str, BatchTable] = defaultdict(lambda: BatchTable(samples))
        # None where the task has none.
        self._statistics = None if task.statistics is None else BatchTable(samples)

    def add(self, outputs: Iterable[Any], targets: Any) -> None:
        """Judge one batch: the outputs of all exits, shallow to deep."""
        rows = []
        before: Any = None
        for output in outputs:
            quality, scores, statistics = self._task.tables(output, targets)
            if self._task.distance is not None and not self._task.is_logits:
                # sure if the answer has hardly changed; the first exit has nothing to agree with
                sure = torch.full_like(quality, -math.inf)
                if before is not None:
                    sure = -self._task.distance(output, before).float()
                scores = scores | {AGREEMENT: sure}
            before = output
            rows.append((quality, scores, statistics))
        qualities, scored, statistics_K = zip(*rows, strict=True)
        self._quality.add(qualities)
        for name in scored[0]:
            self._scores[name].add([scores[name] for scores in scored])
        if self._statistics is not None:
            self._statistics.add(statistics_K)

    def joined(self) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Return all tables, [K, N] and [K, N, S]."""
        return (
            self._quality.whole(),
            {name: table.whole() for name, table in self._scores.items()},
            None if self._statistics is None else self._statistics.whole(),
        )
