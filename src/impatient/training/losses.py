"""Losses of several exits, as plain functions for any training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from impatient.tasks import Task, classification


def sample_losses(
    outputs_K: Sequence[Float[Tensor, "B C"]],
    labels_B: Int[Tensor, "B"],
    label_smoothing: float = 0.0,
) -> Float[Tensor, "K B"]:
    """Compute the cross-entropy of every exit on every sample, shape [K, B]."""
    outputs = torch.stack([output.float() for output in outputs_K])
    labels = labels_B.repeat(len(outputs))
    losses = F.cross_entropy(
        outputs.flatten(0, 1), labels, label_smoothing=label_smoothing, reduction="none"
    )
    return losses.view(outputs.shape[:2])


def exit_losses(
    outputs_K: Sequence[Float[Tensor, "B C"]],
    labels_B: Int[Tensor, "B"],
    label_smoothing: float = 0.0,
) -> Float[Tensor, "K"]:
    """Compute the mean cross-entropy of every exit, shape [K]."""
    return sample_losses(outputs_K, labels_B, label_smoothing).mean(1)


def weighted_loss(losses_K: Float[Tensor, "K"], weights_K: Float[Tensor, "K"]) -> Float[Tensor, ""]:
    """Sum over exits of weight times loss.

    Source:
        Impatient DNNs: with weights from `impatient.exit_weights`, the expected loss under the
            budget distribution.
    """
    return (losses_K * weights_K).sum()


def weighted_sample_loss(
    losses_KB: Float[Tensor, "K B"], weights_BK: Float[Tensor, "B K"]
) -> Float[Tensor, ""]:
    """Weigh the exits' losses by weights per sample, and average over samples.

    Source:
        Impatient DNNs, budgets that depend on the input: p(t | x) in place of p(t).
    """
    return (losses_KB * weights_BK.T).sum(0).mean()


def distillation_losses(
    outputs_K: Sequence[Float[Tensor, "B C"]], temperature: float = 1.0
) -> Float[Tensor, "K B"]:
    """Compute how far each exit's class probabilities are from the last exit's.

    This is the Kullback-Leibler divergence at a temperature, shape [K, B]. It is multiplied by the
    squared temperature, so that gradients keep their size. The last exit has divergence 0 and gets
    no gradient.

    Source:
        Hinton et al. 2015; from the last exit to the earlier ones as in Zhang et al. 2019 (Be your
        own teacher).
    """
    outputs = torch.stack([output.float() for output in outputs_K])
    teacher = F.log_softmax(outputs[-1].detach() / temperature, -1)
    student = F.log_softmax(outputs / temperature, -1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1) * temperature**2
    return torch.cat([divergence[:-1], torch.zeros_like(divergence[-1:])])


def distilled(
    losses_KB: Float[Tensor, "K B"],
    outputs_K: Sequence[Float[Tensor, "B C"]],
    share: float,
    temperature: float = 1.0,
) -> Float[Tensor, "K B"]:
    """Replace a share of the early losses by learning from the last exit.

    Args:
        losses_KB: loss of every exit on every sample.
        outputs_K: output of every exit.
        share: share of the early exits' losses that is replaced, from 0 to 1.
        temperature: softmax temperature of the distillation.
    """
    shares = torch.full((len(losses_KB), 1), share, device=losses_KB.device)
    shares[-1] = 0.0
    return (1.0 - shares) * losses_KB + shares * distillation_losses(outputs_K, temperature)


def exit_hits(
    outputs_K: Sequence[Float[Tensor, "B C"]], labels_B: Int[Tensor, "B"], top: int = 1
) -> Int[Tensor, "K"]:
    """Count the samples that each exit classifies correctly, shape [K].

    Args:
        outputs_K: output of every exit.
        labels_B: true classes.
        top: how many classes an answer may name.
    """
    quality = classification(top).quality
    return torch.stack([quality(output, labels_B).sum() for output in outputs_K]).long()


def task_losses(
    task: Task, outputs_K: Sequence[Any], targets: Any, label_smoothing: float = 0.0
) -> Float[Tensor, "K B"]:
    """Compute the loss of every exit on every sample by a task, shape [K, B]."""
    if task.is_logits:
        return sample_losses(outputs_K, targets, label_smoothing)
    return torch.stack([task.losses(output, targets) for output in outputs_K])


def summed_quality(task: Task, outputs_K: Sequence[Any], targets: Any) -> Float[Tensor, "K"]:
    """Sum the quality of every exit over the samples, shape [K]."""
    with torch.no_grad():
        return torch.stack([task.quality(output, targets).sum() for output in outputs_K]).float()
