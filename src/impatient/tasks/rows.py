"""Scores of one sample in plain numbers: for a few classes several times faster than tensors.

A runner decides about one sample at a time, and there calling an operator takes longer than what it
computes. These functions compute in double precision what `impatient.tasks.scores` computes in
single precision, so the two may differ in the last digits (`CLOSE`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from impatient.tasks.scores import NEVER_CHOSEN

# Up to so many classes plain numbers are faster (measured by benchmarks/decisions.py).
MOST_CLASSES = 64
# Scores that differ by less than this may compare otherwise in single precision.
CLOSE = 1e-4

Row = list[float]


def row_of(output: Tensor) -> Row | None:
    """Return the outputs of the only sample, or None where tensors are faster.

    Example:
        >>> import torch
        >>> row_of(torch.tensor([[0.5, 2.0]])), row_of(torch.zeros(2, 3))
        ([0.5, 2.0], None)
    """
    if not output.is_cpu or output.numel() > MOST_CLASSES or output.dim() != 2:
        return None
    rows: list[Row] = output.tolist()
    return rows[0] if len(rows) == 1 and len(rows[0]) > 1 else None


def max_probability(row: Row) -> float:
    """Compute the largest class probability."""
    largest = max(row)
    if abs(largest) < 300.0:
        # All in C; only infinities and what is far from any output need the longer way.
        return math.exp(largest) / sum(map(math.exp, row))
    return 1.0 / sum([math.exp(value - largest) for value in row])


def margin(row: Row) -> float:
    """Compute the difference between the two largest class probabilities."""
    first, second = sorted(row)[-1:-3:-1]
    return (1.0 - math.exp(second - first)) / sum([math.exp(value - first) for value in row])


def entropy(row: Row) -> float:
    """Compute one minus the entropy over its maximum."""
    return _confidence(row, log_probabilities(row))


def log_probabilities(row: Row) -> Row:
    """Compute the logarithms of the class probabilities."""
    largest = max(row)
    below = largest + math.log(sum([math.exp(value - largest) for value in row]))
    return [value - below for value in row]


def confidence_features(row: Row) -> Row:
    """Compute `impatient.tasks.scores.confidence_features` of one sample.

    Example:
        >>> [round(number, 2) for number in confidence_features([1.0, 1.0, 0.0])]
        [0.42, 0.42, 0.16, 0.0, 0.07, 0.0]
    """
    logs = log_probabilities(row)
    first, second, third = sorted([*logs, NEVER_CHOSEN] if len(logs) < 3 else logs)[-1:-4:-1]
    top = math.exp(first)
    next_to_top = math.exp(second)
    return [
        top,
        next_to_top,
        math.exp(third),
        top - next_to_top,
        _confidence(row, logs),
        min(first - second, -NEVER_CHOSEN),
    ]


def _confidence(row: Row, logs: Row) -> float:
    spread = sum([math.exp(log) * log for log in logs])
    return 1.0 + spread / math.log(len(row))


SCORES: dict[str, Callable[[Row], float]] = {
    "max_probability": max_probability,
    "margin": margin,
    "entropy": entropy,
}
