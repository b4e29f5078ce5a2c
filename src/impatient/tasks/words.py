"""Say answers of single samples in a few words, and show them over a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from impatient.tasks.boxes import corners

# a logit whose answer is certain
CERTAIN = 30.0
# of many numbers so many are said
MOST_NUMBERS = 8


def class_name(names: Sequence[str], place: int) -> str:
    """Name a class, by its number where it has no name."""
    return names[place] if place < len(names) else f"class {place}"


def numbers(output: Tensor, names: Sequence[str] = ()) -> str:  # noqa: ARG001  numbers have none
    """Say the numbers of an output, the first of them where there are many.

    Example:
        >>> numbers(torch.tensor([[0.5, 2.0]]))
        '0.5, 2'
    """
    values = output.float().flatten().tolist()
    said = ", ".join(f"{value:.4g}" for value in values[:MOST_NUMBERS])
    return said if len(values) <= MOST_NUMBERS else f"{said}, ... ({len(values)} numbers)"


def listed(parts: Iterable[str], none: str) -> str:
    """Join what was found, or say that there is nothing."""
    return ", ".join(parts) or none


def outlines(
    boxes: Float[Tensor, "M 4"], labels: Int[Tensor, "M"], size: tuple[int, int]
) -> Int[Tensor, "H W"]:
    """Draw the edges of boxes over a picture of some height and width.

    Returns:
        Numbers of colours: the class plus one at an edge, 0 elsewhere.
    """
    height, width = size
    layer = torch.zeros(height, width, dtype=torch.long)
    scale = torch.tensor([width, height, width, height])
    # the surest come first, and lie on top
    for box, label in reversed(list(zip(boxes.cpu(), labels.tolist(), strict=True))):
        left, top, right, bottom = (corners(box) * scale).round().long().tolist()
        left, right = (min(max(end, 0), width - 1) for end in (left, right - 1))
        top, bottom = (min(max(end, 0), height - 1) for end in (top, bottom - 1))
        layer[[top, bottom], left : right + 1] = label + 1
        layer[top : bottom + 1, [left, right]] = label + 1
    return layer
