"""Any number of labels per sample, from a logit for each, [B, C]."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from impatient.errors import TaskError
from impatient.tasks.binary import f1
from impatient.tasks.task import Task
from impatient.tasks.words import CERTAIN, class_name, listed


@functools.cache
def multi_label() -> Task:
    """Make the task of any number of labels per sample.

    Outputs are a logit per label, targets are 0 or 1, both [B, C]. Quality is the share of a
    sample's labels that are right. Summary: that share, F1 over all labels (micro), and the share
    of samples of which all labels are right.
    """
    return Task(
        name="multi_label",
        losses=losses,
        quality=quality,
        scores={"mean_probability": mean_probability, "least_probability": least_probability},
        quality_name="labels right",
        distance=lambda output, other: (output.sigmoid() - other.sigmoid()).abs().mean(1),
        statistics=statistics,
        summary=summary,
        says=said,
        ideal=lambda target, output: (2 * target.float() - 1).reshape(output.shape) * CERTAIN,
        check_targets=check_targets,
    )


def losses(output: Float[Tensor, "B C"], target: Tensor) -> Float[Tensor, "B"]:
    """Compute the mean binary cross-entropy of each sample."""
    truth = _truth(output, target)
    return F.binary_cross_entropy_with_logits(output.float(), truth, reduction="none").mean(1)


def quality(output: Float[Tensor, "B C"], target: Tensor) -> Float[Tensor, "B"]:
    """Compute the share of labels that are right."""
    return ((output > 0) == (_truth(output, target) > 0.5)).float().mean(1)


def mean_probability(output: Float[Tensor, "B C"]) -> Float[Tensor, "B"]:
    """Mean probability of the answers, in [0.5, 1]."""
    return output.float().abs().sigmoid().mean(1)


def least_probability(output: Float[Tensor, "B C"]) -> Float[Tensor, "B"]:
    """Probability of the least sure answer, in [0.5, 1]."""
    return output.float().abs().sigmoid().amin(1)


def statistics(output: Float[Tensor, "B C"], target: Tensor) -> Float[Tensor, "B 7"]:
    """Count hits, false alarms, misses, labels, right labels.

    Samples all right, and samples.
    """
    said = output > 0
    true = _truth(output, target) > 0.5
    right = said == true
    counts = [said & true, said & ~true, ~said & true, torch.ones_like(said), right]
    exact = right.all(1)
    rows = [*(count.sum(1) for count in counts), exact, torch.ones_like(exact)]
    return torch.stack(rows, 1).double()


def summary(sums: Float[Tensor, "7"]) -> dict[str, float]:
    """Compute the share of right labels, F1, and the share of exact samples."""
    hit, alarm, miss, labels, right, exact, samples = sums.tolist()
    return {
        "labels right": right / labels,
        "F1": f1(hit, alarm, miss),
        "samples all right": exact / samples,
    }


def said(output: Float[Tensor, "1 C"], names: Sequence[str]) -> str:
    """Name the labels that hold."""
    found = (output[0] > 0).nonzero()[:, 0].tolist()
    return listed((class_name(names, label) for label in found), "none")


def check_targets(targets: Any) -> None:
    """Raise TaskError unless targets are 0 or 1, one per sample and label."""
    if not isinstance(targets, Tensor) or targets.dim() != 2:
        shape = f" of shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else ""
        raise TaskError(f"targets{shape}; expected a 0 or 1 for every label, [N, C].")
    _truth(targets, targets)


def _truth(output: Tensor, target: Tensor) -> Tensor:
    if output.dim() != 2 or target.shape != output.shape:
        raise TaskError(
            f"targets of shape {tuple(target.shape)} for outputs of shape {tuple(output.shape)}; "
            "expected both [B, C], a 0 or 1 for every label."
        )
    if not bool(((target == 0) | (target == 1)).all()):
        raise TaskError("targets other than 0 and 1; expected a 0 or 1 for every label.")
    return target.float()
