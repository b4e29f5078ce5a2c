"""What training with exits may do to gradients where an exit branches off; values stay the same to
the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from impatient.errors import NetworkError


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientFlow:
    """How the gradients of early exits and of what is deeper meet in the backbone.

    Attributes:
        equilibrium: at exit k of K (0-based), weigh the head's gradient 1 / (K - k) and that of
            everything deeper (K - k - 1) / (K - k), so that their sum does not grow with the number
            of exits.
        detach: share of the channels, the last ones, whose gradient from everything deeper is
            dropped, so that a part of the features is the early exits' own.
    Raises:
        NetworkError: if `detach` is no share below 1.
    Source:
        `equilibrium`: Li et al. 2019 (Improved techniques for training adaptive deep networks).
        `detach`: deep feature surgery (DFS), which keeps a ratio of 1 - detach, one half.
    """

    equilibrium: bool = False
    detach: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.detach < 1.0:
            raise NetworkError(
                f"detach={self.detach}; expected 0 or a share of the channels below 1, such as 0.5."
            )

    def into_head(self, features: Tensor, exit: int, count: int) -> Tensor:
        """The features as this early exit's head sees them."""
        return _scaled(features, 1.0 / (count - exit)) if self.equilibrium else features

    def onward(self, features: Tensor, exit: int, count: int, channel_dim: int) -> Tensor:
        """The features as everything deeper sees them."""
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
    """The same values; their gradient is multiplied on the way back."""
    if not features.requires_grad:
        return features
    # a copy: a later in-place operation must not meet a hook, nor change what the head was given
    copy = features.clone()
    copy.register_hook(lambda gradient: gradient * factor)
    return copy
