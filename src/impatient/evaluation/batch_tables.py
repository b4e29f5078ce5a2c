"""Tables of all exits and samples that are filled batch by batch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from impatient.errors import RecordingError
from impatient.tasks import Task
from impatient.tasks.task import AGREEMENT

# quality, scores by name and statistics, of each exit
Judged = tuple[Sequence[Tensor], Mapping[str, Sequence[Tensor]], Sequence[Any]]
# numbers of a batch's logits up to which all exits are judged in one call
FEW = 1 << 20


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

    def add(self, outputs: Sequence[Any], targets: Any) -> None:
        """Judge one batch: the outputs of all exits, shallow to deep."""
        judge = self._at_once if self._are_few(outputs, targets) else self._one_by_one
        qualities, scores, statistics = judge(outputs, targets)
        self._quality.add(qualities)
        for name, rows in scores.items():
            self._scores[name].add(rows)
        if self._statistics is not None:
            self._statistics.add(statistics)

    def _are_few(self, outputs: Sequence[Any], targets: Any) -> bool:
        """Tell whether these are few logits, alike in all exits."""
        if not self._task.is_logits or any(each.shape != outputs[0].shape for each in outputs):
            return False
        return len(targets) == len(outputs[0]) and len(outputs) * outputs[0].numel() <= FEW

    def _at_once(self, outputs: Sequence[Tensor], targets: Tensor) -> Judged:
        """Judge all exits in one call, which is faster where a call is longer than its numbers."""
        exits = len(outputs)
        stacked = torch.cat(list(outputs))
        quality, scores, statistics = self._task.tables(stacked, targets.repeat(exits))
        tables = {name: table.chunk(exits) for name, table in scores.items()}
        return quality.chunk(exits), tables, () if statistics is None else statistics.chunk(exits)

    def _one_by_one(self, outputs: Sequence[Any], targets: Any) -> Judged:
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
        tables = {name: [scores[name] for scores in scored] for name in scored[0]}
        return qualities, tables, statistics_K

    def joined(self) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Return all tables, [K, N] and [K, N, S]."""
        return (
            self._quality.whole(),
            {name: table.whole() for name, table in self._scores.items()},
            None if self._statistics is None else self._statistics.whole(),
        )
