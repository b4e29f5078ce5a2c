"""One of several classes per sample, from logits [B, C]."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from impatient import checks
from impatient.errors import RecordingError, TaskError
from impatient.tasks.scores import SCORES, confidence_features
from impatient.tasks.task import Task, check_array
from impatient.tasks.words import CERTAIN, class_name


@functools.cache
def classification(top: int = 1) -> Task:
    """Make the task of naming one class per sample.

    Targets are class numbers, int64 [B]. Quality is 1 where the true class is among the `top`
    likeliest, else 0.

    Args:
        top: how many classes an answer may name.
    Raises:
        TaskError: if `top` is not a positive whole number.
    Example:
        >>> logits = torch.tensor([[0.1, 0.7, 0.2]])
        >>> [float(classification(top).quality(logits, torch.tensor([2]))) for top in (1, 2)]
        [0.0, 1.0]
    """
    checks.at_least(TaskError, 1, top=top)
    return Task(
        name="classification" if top == 1 else f"classification:top={top}",
        losses=losses,
        quality=functools.partial(quality, top=top),
        scores=SCORES,
        quality_name="accuracy" if top == 1 else f"top-{top} accuracy",
        looks=confidence_features,
        distance=distance,
        says=said,
        ideal=lambda target, output: CERTAIN * F.one_hot(target, output.shape[1]).float(),
        is_logits=True,
        check_targets=functools.partial(
            check_array, dims=1, whole=True, expected="the number of a class for each sample, [N]"
        ),
    )


def top_of(task: str) -> int:
    """Return how many classes an answer may name, from the name of a classification.

    Example:
        >>> top_of("classification"), top_of("classification:top=5")
        (1, 5)
    """
    return int(task.partition("top=")[2] or 1)


def check_top(task: str, classes: int) -> None:
    """Raise TaskError if an answer may name all classes, by the name of a classification."""
    top = top_of(task)
    if top > 1 and top >= classes:
        raise TaskError(
            f"top={top} takes every answer for right, since there are {classes} classes; "
            f"expected fewer than {classes}."
        )


def top_probability(output: Float[Tensor, "*B C"], top: int) -> Float[Tensor, "*B"]:
    """Compute the probability that the true class is among the `top` likeliest ones."""
    likeliest = output.float().softmax(-1).topk(min(top, output.shape[-1]), dim=-1).values
    return likeliest.sum(-1).clamp(max=1.0)


def losses(output: Float[Tensor, "B C"], target: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Compute the cross-entropy of each sample."""
    return F.cross_entropy(output.float(), target, reduction="none")


def quality(
    output: Float[Tensor, "B C"], target: Int[Tensor, "B"], top: int = 1
) -> Float[Tensor, "B"]:
    """Compute 1 where the target is among the likeliest classes, else 0.

    Raises:
        RecordingError: if a target has no output.
    """
    check_labels(target, output.shape[-1])
    if top == 1:
        return (output.argmax(-1) == target).float()
    # of equal outputs only `top` count, as in a list of answers
    best = output.topk(min(top, output.shape[-1]), dim=-1).indices
    return (best == target[..., None]).any(-1).float()


def said(output: Float[Tensor, "1 C"], names: Sequence[str]) -> str:
    """Name the likeliest class."""
    return class_name(names, int(output[0].argmax()))


def distance(output: Float[Tensor, "B C"], other: Float[Tensor, "B C"]) -> Float[Tensor, "B"]:
    """Compute half the sum of differences of the class probabilities, in [0, 1]."""
    return (output.float().softmax(-1) - other.float().softmax(-1)).abs().sum(-1) / 2


def sum_of_shares(outputs: Float[Tensor, "*B C"]) -> float | None:
    """Return what all rows sum to if they are probabilities or per cent, else None.

    A softmax on top of these makes the surest answers look unsure.

    Example:
        >>> sum_of_shares(torch.tensor([[25.0, 75.0]])), sum_of_shares(torch.tensor([[-1.0, 2.0]]))
        (100.0, None)
    """
    # without a table as large as the outputs
    sums = outputs.sum(-1, dtype=torch.float32)
    for whole in (1.0, 100.0):
        if sums.numel() and bool(((sums - whole).abs() < 1e-3 * whole).all()):
            return whole if float(outputs.min()) >= 0.0 else None
    return None


def check_labels(labels: Int[Tensor, "N"], classes: int) -> None:
    """Raise RecordingError unless every label is one of the classes."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise RecordingError(
            f"labels of type {labels.dtype}; expected whole numbers, the true classes. For other "
            "targets name the task, such as task='regression'."
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise RecordingError(
            f"labels go from {int(labels.min())} to {int(labels.max())} for {classes} outputs; "
            f"expected whole numbers from 0 to {classes - 1}. Number the classes from 0."
        )
