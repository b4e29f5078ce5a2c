"""A VGG for small images, with possible exits after every convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from impatient.networks.building import check_sizes, initialise_convolutions


class SmallVGG(nn.Module):
    """A small VGG: stages of conv3x3-BN-ReLU layers and a linear classifier.

    There is 2x2 max pooling between the stages, and a mean over the remaining positions at the end.
    Each member of `blocks` is one layer; the last layer of each stage except the last also pools.
    So `attach_exits` finds as many places as there are layers, and a head after a pooling layer
    gets the smaller map.

    Args:
        num_classes: width of the output.
        width: channels of the first stage, doubled at each stage up to 8 times, as in VGG.
        blocks: layers per stage; VGG-11 has (1, 1, 2, 2, 2). Images must have at least
            2 ** (stages - 1) pixels a side.
        in_channels: channels of the image.
    Raises:
        ModelSpecError: if a size is not a whole number of at least 1.
    Source:
        Simonyan and Zisserman 2015. We differ: batch norm, a global mean in place of the fully
        connected layers, and by default VGG-11 without its last stage, which would see a single
        pixel of a 28-pixel image.
    Example:
        >>> SmallVGG(in_channels=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        width: int = 16,
        blocks: Sequence[int] = (1, 1, 2, 2),
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_sizes(
            "SmallVGG",
            ("blocks", blocks),
            num_classes=num_classes,
            width=width,
            in_channels=in_channels,
        )
        widths = [
            width * 2 ** min(stage, 3) for stage, count in enumerate(blocks) for _ in range(count)
        ]
        pooled = [index == count - 1 for count in blocks for index in range(count)]
        pooled[-1] = False
        shapes = zip([in_channels, *widths], widths, pooled, strict=False)
        self.blocks = nn.ModuleList(
            _layer(inputs, outputs, pool=pool) for inputs, outputs, pool in shapes
        )
        self.classifier = nn.Linear(widths[-1], num_classes)
        initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Compute outputs [B, num_classes] from images [B, in_channels, H, W]."""
        for block in self.blocks:
            x = block(x)
        return torch.as_tensor(self.classifier(x.mean((2, 3))))


def _layer(inputs: int, outputs: int, *, pool: bool) -> nn.Module:
    layer = nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
    return layer.append(nn.MaxPool2d(2)) if pool else layer
