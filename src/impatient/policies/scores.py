"""Scores: how sure an output is, from the output alone; higher is surer, 1 is certain."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

ScoreName = Literal["max_probability", "margin", "entropy"]


def max_probability(outputs: Float[Tensor, "... C"]) -> Float[Tensor, "..."]:
    """Largest class probability, in [1/C, 1]."""
    return outputs.float().softmax(-1).amax(-1)


def margin(outputs: Float[Tensor, "... C"]) -> Float[Tensor, "..."]:
    """Difference between the two largest class probabilities, in [0, 1]."""
    if outputs.shape[-1] < 2:
        return torch.ones(outputs.shape[:-1], device=outputs.device)
    first, second = outputs.float().softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return first - second


def entropy(outputs: Float[Tensor, "... C"]) -> Float[Tensor, "..."]:
    """One minus the entropy of the class probabilities over its maximum, in [0, 1]: a score, so surer is higher."""
    if outputs.shape[-1] < 2:
        return torch.ones(outputs.shape[:-1], device=outputs.device)
    logs = outputs.float().log_softmax(-1)
    return 1.0 + (logs.exp() * logs).sum(-1) / math.log(outputs.shape[-1])


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"max_probability": max_probability, "margin": margin, "entropy": entropy}
