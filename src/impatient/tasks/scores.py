"""Say how sure an output is: higher is surer, 1 is certain."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


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
    """One minus the entropy over its maximum, in [0, 1].

    It is a score, so higher is surer.
    """
    if outputs.shape[-1] < 2:
        return torch.ones(outputs.shape[:-1], device=outputs.device)
    logs = outputs.float().log_softmax(-1)
    return 1.0 + (logs.exp() * logs).sum(-1) / math.log(outputs.shape[-1])


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_probability": max_probability,
    "margin": margin,
    "entropy": entropy,
}

# log-probability of a class that is not there: 0 as a probability, in single precision
NEVER_CHOSEN = -110.0


def confidence_features(outputs: Float[Tensor, "B C"]) -> Float[Tensor, "B 6"]:
    """How sure an output is, in six numbers.

    Returns:
        The three largest probabilities, the margin between the first two, the entropy score, and
        the margin of their logarithms, which still tells sure from very sure where probabilities
        are all but 1.
    Example:
        >>> confidence_features(torch.tensor([[0.5, 0.25, 0.25]]).log()).round(decimals=2).tolist()
        [[0.5, 0.25, 0.25, 0.25, 0.05000000074505806, 0.6899999976158142]]
    """
    logs = outputs.float().log_softmax(-1)
    # fewer classes have no second or third
    if logs.shape[1] < 3:
        logs = torch.nn.functional.pad(logs, (0, 3 - logs.shape[1]), value=NEVER_CHOSEN)
    top_logs = logs.topk(3, dim=1).values
    (first, second, _) = top_logs.unbind(1)
    top = top_logs.exp()
    entropy = 1.0 + (logs.exp() * logs).sum(1) / math.log(max(outputs.shape[1], 2))
    rest = torch.stack(
        [top[:, 0] - top[:, 1], entropy, (first - second).clamp(max=-NEVER_CHOSEN)], 1
    )
    return torch.cat([top, rest], 1)
