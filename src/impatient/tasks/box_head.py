"""A head that finds objects: from features at a cut to classes and boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from impatient.errors import TaskError


class BoxHead(nn.Module):
    """Logits and boxes of Q queries, [B, Q, C + 1 + 4], as `detection` takes them.

    Features [B, Q, D] of as many rows as the answer has, such as those of a decoder's layers, are
    the queries. Otherwise queries of the head's own look at all positions of maps [B, C, H, W] or
    tokens [B, T, D]; where a query looks is where its box begins.

    Args:
        features: features at the cut, of example samples.
        answer: the network's answer to them.
    Raises:
        TaskError: if the features have another number of dimensions.
    """

    def __init__(self, features: Tensor, answer: Tensor, width: int = 64) -> None:
        super().__init__()
        if features.dim() not in (3, 4):
            raise TaskError(
                f"features of shape {tuple(features.shape)}; expected [B, Q, D], [B, T, D] or maps "
                "[B, C, H, W]. Attach the exit where there are positions, or give a head of your "
                "own: attach_exits(..., heads=lambda features, outputs: MODULE)."
            )
        count, outputs = answer.shape[1:]
        self.are_queries = features.dim() == 3 and features.shape[1] == count
        channels = features.shape[1 if features.dim() == 4 else 2]
        if self.are_queries:
            width = channels
            self.norm = nn.LayerNorm(width)
        else:
            self.positions = nn.Linear(channels, 2 * width)
            self.queries = nn.Parameter(torch.randn(count, width))
            self.places = nn.Linear(2, 2 * width)
        self.classes = nn.Linear(width, outputs - 4)
        self.boxes = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits and boxes."""
        if self.are_queries:
            queries = self.norm(features)
            raw = self.boxes(queries)
        else:
            queries, centres = self._looked(features)
            raw = self.boxes(queries) + nn.functional.pad(torch.logit(centres, 1e-3), (0, 2))
        return torch.cat([self.classes(queries), raw.sigmoid()], -1)

    def _looked(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Let every query look at the positions.

        Returns:
            What it saw, [B, Q, width], and where, [B, Q, 2].
        """
        places = _places(features)
        tokens = features.flatten(2).transpose(1, 2) if features.dim() == 4 else features
        keys, values = (self.positions(tokens) + self.places(places)).relu().chunk(2, -1)
        width = self.queries.shape[1]
        weights = (self.queries @ keys.transpose(1, 2) / math.sqrt(width)).softmax(-1)
        return weights @ values, weights @ places


def _places(features: Tensor) -> Tensor:
    """Return where positions lie, as shares of width and height, [H x W, 2].

    Rows for tokens.
    """
    height, width = features.shape[2:] if features.dim() == 4 else (1, features.shape[1])
    down = (torch.arange(height, device=features.device, dtype=features.dtype) + 0.5) / height
    right = (torch.arange(width, device=features.device, dtype=features.dtype) + 0.5) / width
    grid = torch.stack([right.expand(height, width), down[:, None].expand(height, width)], -1)
    return grid.reshape(-1, 2)
