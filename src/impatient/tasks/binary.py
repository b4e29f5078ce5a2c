"""Yes or no per sample, from one logit [B, 1] or [B]."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from impatient.errors import TaskError
from impatient.tasks.task import Task
from impatient.tasks.words import CERTAIN

# true positives, false positives, false negatives, all samples, right ones
STATISTICS = 5


@functools.cache
def binary() -> Task:
    """Make the task of one yes or no per sample.

    Outputs are one logit per sample, [B, 1] or [B]; targets are 0 or 1, [B] or [B, 1].
    Quality is 1 where the sign of the logit is right. Summary: accuracy, F1.
    """
    return Task(
        name="binary",
        losses=losses,
        quality=quality,
        scores={"max_probability": max_probability},
        quality_name="accuracy",
        distance=lambda output, other: (column(output).sigmoid() - column(other).sigmoid()).abs(),
        statistics=statistics,
        summary=summary,
        says=said,
        ideal=lambda target, output: (2 * target.float() - 1).reshape(output.shape) * CERTAIN,
        check_targets=check_targets,
    )


def losses(output: Tensor, target: Tensor) -> Float[Tensor, "B"]:
    """Compute the binary cross-entropy of each sample."""
    return F.binary_cross_entropy_with_logits(
        column(output).float(), _truth(target), reduction="none"
    )


def quality(output: Tensor, target: Tensor) -> Float[Tensor, "B"]:
    """Compute 1 where the answer is right, else 0."""
    return ((column(output) > 0) == (_truth(target) > 0.5)).float()


def max_probability(output: Tensor) -> Float[Tensor, "B"]:
    """Probability of the answer, in [0.5, 1]."""
    return column(output).float().abs().sigmoid()


def statistics(output: Tensor, target: Tensor) -> Float[Tensor, "B 5"]:
    """Count true and false positives, false negatives, samples and right answers."""
    said = column(output) > 0
    true = _truth(target) > 0.5
    ones = torch.ones_like(said)
    return torch.stack([said & true, said & ~true, ~said & true, ones, said == true], 1).double()


def summary(sums: Float[Tensor, "5"]) -> dict[str, float]:
    """Compute accuracy and F1 from sums of `statistics`."""
    hit, alarm, miss, count, right = sums.tolist()
    return {"accuracy": right / count, "F1": f1(hit, alarm, miss)}


def said(output: Tensor, names: Sequence[str]) -> str:
    """Say the likelier of two names, or yes or no, and its probability.

    Example:
        >>> said(torch.tensor([[2.0]]), ())
        'yes (88 %)'
    """
    no, yes = names if len(names) == 2 else ("no", "yes")
    sure = float(max_probability(output)[0])
    return f"{yes if float(column(output)[0]) > 0 else no} ({100 * sure:.0f} %)"


def f1(hit: float, alarm: float, miss: float) -> float:
    """Compute F1 of true positives, false positives and false negatives.

    1 where there is none.
    """
    return 2 * hit / (2 * hit + alarm + miss) if hit + alarm + miss else 1.0


def column(output: Tensor) -> Float[Tensor, "B"]:
    """Return the one number per sample of an output [B, 1] or [B].

    Raises:
        TaskError: if there are several.
    """
    if output.dim() == 2 and output.shape[1] == 1:
        return output[:, 0]
    if output.dim() == 1:
        return output
    raise TaskError(f"an output of shape {tuple(output.shape)}; expected one number per sample.")


def check_targets(targets: Any) -> None:
    """Raise TaskError unless targets are 0 or 1, one per sample."""
    if not isinstance(targets, Tensor) or targets[:1].numel() != 1:
        shape = f" of shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else ""
        raise TaskError(f"targets{shape}; expected a 0 or 1 for each sample, [N] or [N, 1].")
    _truth(targets.flatten())


def _truth(target: Tensor) -> Float[Tensor, "B"]:
    values = column(target).float()
    if not bool(((values == 0) | (values == 1)).all()):
        raise TaskError(
            f"targets from {float(values.min()):g} to {float(values.max()):g}; expected 0 and 1."
        )
    return values
