"""A vector per sample, [B, D], that is to point where a given one does."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from impatient.errors import TaskError
from impatient.tasks.regression import constant
from impatient.tasks.task import Task, check_array


@functools.cache
def embedding() -> Task:
    """Make the task of giving a vector that points where the target does.

    Outputs and targets are [B, D]. Targets are vectors of a teacher, or of the last exit. Quality
    is (1 + cosine) / 2. An output alone does not say how sure it is: use the score "agreement" with
    the exit before, which `record` adds, or gates on features.
    """
    return Task(
        name="embedding",
        losses=lambda output, target: 1.0 - cosine(output, target),
        quality=lambda output, target: ((1.0 + cosine(output, target)) / 2).clamp(0.0, 1.0),
        scores={"constant": constant},
        quality_name="agreement with target",
        distance=lambda output, other: 1.0 - _cosine(output, other),
        ideal=lambda target, output: target.float().reshape(output.shape),
        check_targets=functools.partial(
            check_array, dims=2, whole=False, expected="a vector of real numbers each, [N, D]"
        ),
    )


def cosine(output: Float[Tensor, "B D"], target: Float[Tensor, "B D"]) -> Float[Tensor, "B"]:
    """Compute the cosine of the angle between vectors."""
    if output.dim() != 2 or output.shape != target.shape:
        raise TaskError(
            f"targets of shape {tuple(target.shape)} for outputs of shape {tuple(output.shape)}; "
            "expected both [B, D]."
        )
    if not bool(torch.isfinite(target).all()):
        raise TaskError("targets that are NaN or infinite; leave these samples out.")
    return _cosine(output, target)


def _cosine(output: Tensor, other: Tensor) -> Float[Tensor, "B"]:
    """Compute the cosine.

    Nothing here depends on values, so that engines compute it, too.
    """
    return F.cosine_similarity(output.float(), other.float(), dim=1)
