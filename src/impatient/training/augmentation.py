"""Augment training images by random changes that keep their class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from impatient.errors import TrainingError


def augmented(images: Any, how: str) -> Any:
    """Shift and mirror each image of a batch at random.

    A shift is by up to an eighth of the height and of the width, and fills the border with zeros.

    Args:
        images: a batch of images [B, C, H, W]; with "none" any inputs.
        how: "none", "crop" (shift each image) or "crop-flip" (also mirror half of them).
    Raises:
        TrainingError: if the inputs are not images.
    """
    if how == "none":
        return images
    if not isinstance(images, Tensor) or images.dim() != 4:
        is_tensor = isinstance(images, Tensor)
        got = f"shape {tuple(images.shape)}" if is_tensor else "several arrays"
        raise TrainingError(f"augment={how!r} is for images [B,C,H,W]; the inputs have {got}.")
    count, channels, height, width = images.shape
    most_down = max(1, height // 8)
    most_across = max(1, width // 8)
    padded = F.pad(images, (most_across, most_across, most_down, most_down))
    # Drawn on the CPU, so that a seed gives the same images on every device.
    across_B = (torch.rand(count) * (2 * most_across + 1)).long()
    down_B = (torch.rand(count) * (2 * most_down + 1)).long()
    columns_BW = across_B[:, None] + torch.arange(width)
    if how == "crop-flip":
        mirrored_B = torch.rand(count) < 0.5
        columns_BW = torch.where(mirrored_B[:, None], columns_BW.flip(1), columns_BW)
    rows_BH = down_B[:, None] + torch.arange(height)
    places_BHW = rows_BH[:, :, None] * padded.shape[3] + columns_BW[:, None, :]
    places = places_BHW.view(count, 1, -1).expand(-1, channels, -1).to(images.device)
    return padded.flatten(2).gather(2, places).view_as(images)
