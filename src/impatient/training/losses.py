"""Losses of several exits, as plain functions for anybody's own loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def exit_losses(
    outputs_K: Sequence[Float[Tensor, "B C"]], labels_B: Int[Tensor, "B"], label_smoothing: float = 0.0
) -> Float[Tensor, "K"]:
    """Mean cross-entropy of every exit, shape [K]."""
    return torch.stack([F.cross_entropy(output.float(), labels_B, label_smoothing=label_smoothing) for output in outputs_K])


def weighted_loss(losses_K: Float[Tensor, "K"], weights_K: Float[Tensor, "K"]) -> Float[Tensor, ""]:
    """Sum over exits of weight times loss.

    Source:
        Impatient DNNs: with weights from `impatient.exit_weights`, the expected loss under the budget distribution.
    """
    return (losses_K * weights_K).sum()


def exit_hits(outputs_K: Sequence[Float[Tensor, "B C"]], labels_B: Int[Tensor, "B"]) -> Int[Tensor, "K"]:
    """Number of samples each exit gets right, shape [K]."""
    return torch.stack([(output.argmax(1) == labels_B).sum() for output in outputs_K])
