"""Boxes in pictures: their corners, and how much of them overlaps.

A box is its centre, width and height, as shares of the picture's width and height.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# against a division by the area of boxes that are points
LEAST_AREA = 1e-9


def corners(boxes: Float[Tensor, "... 4"]) -> Float[Tensor, "... 4"]:
    """Return left, top, right and bottom of boxes.

    Example:
        >>> corners(torch.tensor([0.5, 0.5, 0.5, 1.0])).tolist()
        [0.25, 0.0, 0.75, 1.0]
    """
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def overlaps(
    one: Float[Tensor, "*B N 4"], other: Float[Tensor, "*B M 4"]
) -> Float[Tensor, "*B N M"]:
    """Compute intersection over union of every box with every other, in [0, 1]."""
    shared, either, _ = _areas(one[..., :, None, :], other[..., None, :, :])
    return shared / either.clamp(min=LEAST_AREA)


def generalised_overlaps(
    one: Float[Tensor, "... 4"], other: Float[Tensor, "... 4"]
) -> Float[Tensor, "..."]:
    """Compute the generalised intersection over union of pairs of boxes, in [-1, 1].

    It has a gradient also where boxes do not touch.

    Source:
        Rezatofighi et al. 2019.
    """
    shared, either, around = _areas(one, other)
    overlap = shared / either.clamp(min=LEAST_AREA)
    return overlap - (around - either) / around.clamp(min=LEAST_AREA)


def _areas(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the areas of intersection, union, and the box around both."""
    (first, second) = corners(one), corners(other)
    inner = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(
        first[..., :2], second[..., :2]
    )
    outer = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(
        first[..., :2], second[..., :2]
    )
    shared = inner.clamp(min=0).prod(-1)
    areas = one[..., 2:].clamp(min=0).prod(-1) + other[..., 2:].clamp(min=0).prod(-1)
    return shared, areas - shared, outer.clamp(min=0).prod(-1)
