"""Change gradients where an exit branches off, without changing values.

The values stay the same to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from impatient import checks
from impatient.errors import NetworkError


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientFlow:
    """How gradients of early exits and deeper layers meet in the backbone.

    Attributes:
        equilibrium: weigh the gradients at exit k of K (0-based): by 1 / (K - k) for the head and
            by (K - k - 1) / (K - k) for the deeper layers, so that their sum does not grow with the
            number of exits.
        detach: share of the channels, counted from the last, that get no gradient from deeper
            layers, so that this part of the features belongs to the early exits.
    Raises:
        NetworkError: if `detach` is negative, or 1 or more.
    Source:
        `equilibrium`: Li et al. 2019 (Improved techniques for training adaptive deep networks).
        `detach`: deep feature surgery (DFS), which keeps a ratio of 1 - detach, one half.
    """

    equilibrium: bool = False
    detach: float = 0.0

    def __post_init__(self) -> None:
        checks.share_below_one(NetworkError, detach=self.detach)

    def into_head(self, features: Tensor, exit: int, count: int) -> Tensor:
        """Return the features for the head of this early exit."""
        return _scaled(features, 1.0 / (count - exit)) if self.equilibrium else features

    def onward(self, features: Tensor, exit: int, count: int, channel_dim: int) -> Tensor:
        """Return the features for the deeper layers."""
        if self.equilibrium:
            features = _scaled(features, (count - exit - 1.0) / (count - exit))
        if self.detach:
            channels = features.shape[channel_dim]
            cut = math.floor(self.detach * channels)
            kept, own = features.split([channels - cut, cut], channel_dim)
            features = torch.cat([kept, own.detach()], channel_dim)
        return features


PLAIN = GradientFlow()


def _scaled(features: Tensor, factor: float) -> Tensor:
    """Return the same values, with their gradient multiplied by a factor."""
    if not features.requires_grad:
        return features
    # A copy, because a later in-place operation must not run on a tensor with a hook, nor change
    # the features that the head was given.
    copy = features.clone()
    copy.register_hook(lambda gradient: gradient * factor)
    return copy
