"""MobileNet v1 as `attach_exits` takes it, and the ImageNet weights of the shared data.

Howard et al. 2017. The weights have batch norm folded in, so there is none.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

# output channels and stride of the 13 pairs of a depthwise and a pointwise convolution, at width 1
PAIRS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)
# a block ends before each of these pairs: six blocks
CUTS = (2, 4, 6, 8, 11)


class MobileNet(nn.Module):
    """MobileNet v1 for small images, which it enlarges first.

    Args:
        num_classes: number of classes.
        in_channels: channels of the images.
        width: share of the paper's channels.
        size: height and width after enlarging.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, width: float = 0.25, size: int = 128
    ) -> None:
        super().__init__()
        self.size = size
        stem = round(32 * width)
        pairs = []
        channels = stem
        for wide, stride in PAIRS:
            out = round(wide * width)
            pairs.append((_convolution(channels, channels, 3, stride, channels), out))
            channels = out
        layers = [
            nn.Sequential(*depthwise, *_convolution(depthwise[-2].out_channels, out, 1, 1, 1))
            for depthwise, out in pairs
        ]
        layers[0] = nn.Sequential(*_convolution(in_channels, stem, 3, 2, 1), *layers[0])
        self.blocks = nn.ModuleList(
            nn.Sequential(*layers[begin:end]) for begin, end in pairwise((0, *CUTS, len(PAIRS)))
        )
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.interpolate(images, size=self.size, mode="bilinear", align_corners=False)
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean((2, 3)))

    def convolutions(self) -> list[nn.Conv2d]:
        """All convolutions, from input to output."""
        return [layer for layer in self.blocks.modules() if isinstance(layer, nn.Conv2d)]


def _convolution(
    channels: int, out: int, kernel: int, stride: int, groups: int
) -> tuple[nn.Module, ...]:
    """Pad as TensorFlow does for even sizes: with stride 2, behind only."""
    before, behind = ((kernel - stride) // 2, (kernel - 1) // 2) if kernel > 1 else (0, 0)
    return (
        nn.ZeroPad2d((before, behind, before, behind)),
        nn.Conv2d(channels, out, kernel, stride, groups=groups),
        nn.ReLU6(),
    )


def imagenet_weights(network: MobileNet, file: Path) -> None:
    """Load the convolutions of a quantised MobileNet.

    The classifier stays as it is.

    Args:
        network: of three channels and the same width.
        file: mobilenets_imagenet_u8.npz of the shared data.
    """
    stored = np.load(file)
    operations = json.loads(stored["mnv1_025_128.json"].tobytes())["ops"]
    keyed = [operation for operation in operations if "key" in operation]
    # the last one is the classifier of the 1,000 classes
    for layer, operation in zip(network.convolutions(), keyed[:-1], strict=True):
        key = operation["key"]
        weight = stored[f"{key}.w"].astype(np.float32) - stored[f"{key}.w_zero"].astype(np.float32)
        weight = weight * stored[f"{key}.w_scale"]
        order = (3, 0, 1, 2) if operation["op"].startswith("DEPTHWISE") else (0, 3, 1, 2)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight.transpose(order).copy()))
            layer.bias.copy_(torch.from_numpy(stored[f"{key}.b"]))  # type: ignore[union-attr]
