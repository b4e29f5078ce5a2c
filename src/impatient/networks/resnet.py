"""The pre-activation ResNets of Anytime Neural Networks.

There are networks of (n, c) for small images, and ANN-14 to ANN-152 for large ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impatient import checks
from impatient.errors import ModelSpecError
from impatient.networks.building import check_sizes, initialise_convolutions

BlockKind = Literal["basic", "bottleneck"]
StemKind = Literal["cifar", "imagenet"]
ShortcutKind = Literal["pooled", "projection"]


class PooledShortcut(nn.Module):
    """A shortcut without parameters, of average pooling and zero-padding.

    It averages over stride x stride pixels where a block down-samples, and adds channels of zeros
    where a block widens.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        if self.padding:
            x = F.pad(x, (0, 0, 0, 0, self.padding // 2, self.padding - self.padding // 2))
        return x

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding}"


def _shortcut(kind: ShortcutKind, inputs: int, outputs: int, stride: int) -> nn.Module:
    if kind == "pooled" or (stride == 1 and inputs == outputs):
        return PooledShortcut(inputs, outputs, stride)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class PreActBlock(nn.Module):
    """A block of BN-ReLU-conv3x3-BN-ReLU-conv3x3-BN plus a shortcut of the input.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        stride: stride of the first convolution.
        shortcut: "pooled" for a `PooledShortcut`, or "projection" for a strided 1x1 convolution
            with BN where the shape changes.
    Source:
        Anytime Neural Networks (Hu et al.), the basic unit as in the authors' code.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, shortcut: ShortcutKind = "pooled"
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(shortcut, inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.bn3(self.conv2(F.relu(self.bn2(out))))
        return torch.as_tensor(out + self.shortcut(x))


class PreActBottleneck(nn.Module):
    """A bottleneck block of three convolutions plus a shortcut of the input.

    The layers are BN-ReLU-conv1x1-BN-ReLU-conv3x3-BN-ReLU-conv1x1-BN, with a quarter of the output
    channels inside.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        stride: stride of the 3x3 convolution.
        shortcut: "pooled" (average and zeros), as in the paper's appendix, or "projection" (1x1
            convolution and BN on the block's input, where the shape changes), as in the authors'
            code.
    Source:
        Anytime Neural Networks (Hu et al.), the unit of the ImageNet networks.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, shortcut: ShortcutKind = "pooled"
    ) -> None:
        super().__init__()
        width = outputs // 4
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(shortcut, inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.bn4(self.conv3(F.relu(self.bn3(out))))
        return torch.as_tensor(out + self.shortcut(x))


# Each kind of block, with its number of output channels per channel of the stage.
_BLOCKS: Mapping[str, tuple[type[PreActBlock] | type[PreActBottleneck], int]] = {
    "basic": (PreActBlock, 1),
    "bottleneck": (PreActBottleneck, 4),
}


class PreActResNet(nn.Module):
    """A pre-activation ResNet of (n, c), by default with 6n + 2 layers.

    The first stage has c channels, and each further stage twice as many as the one before.

    Args:
        num_classes: width of the output.
        n: blocks per stage: a number for each of three stages, or a sequence with a number for each
            stage.
        c: channels of the first stage; a bottleneck gives four times as many.
        in_channels: channels of the image.
        block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1).
        stem: "cifar" (3x3 convolution) or "imagenet" (7x7 of stride 2, BN, ReLU, 3x3 max pooling of
            stride 2).
        shortcut: "pooled" or "projection", as explained at the blocks.
        depth: number of blocks to keep, followed by a classifier: the network that OPT trains for
            one exit. With the same seed, these blocks have the same weights as in the complete
            network.
    Raises:
        ModelSpecError: if a size is not a whole number of at least 1, a name is unknown, or depth
            exceeds the number of blocks.
    Source:
        He et al. 2016 (identity mappings), with the choices of Anytime Neural Networks: no norm
        after the small stem, a norm at the end of each block, ReLU before pooling.
    Example:
        >>> whole, truncated = PreActResNet(n=[1, 2], c=4), PreActResNet(n=[1, 2], c=4, depth=1)
        >>> len(whole.blocks), len(truncated.blocks), truncated.classifier.in_features
        (3, 1, 4)
    """

    def __init__(
        self,
        num_classes: int = 10,
        n: int | Sequence[int] = 3,
        c: int = 16,
        in_channels: int = 3,
        *,
        block: BlockKind = "basic",
        stem: StemKind = "cifar",
        shortcut: ShortcutKind = "pooled",
        depth: int | None = None,
    ) -> None:
        super().__init__()
        counts = (n,) * 3 if isinstance(n, int) else n
        check_sizes(
            "PreActResNet", ("n", counts), num_classes=num_classes, c=c, in_channels=in_channels
        )
        checks.one_of(ModelSpecError, _BLOCKS, block=block)
        checks.one_of(ModelSpecError, _STEMS, stem=stem)
        checks.one_of(ModelSpecError, ("pooled", "projection"), shortcut=shortcut)
        build, expansion = _BLOCKS[block]
        self.stem = _STEMS[stem](in_channels, c)
        widths = [
            c * 2**stage * expansion for stage, count in enumerate(counts) for _ in range(count)
        ]
        strides = [
            2 if stage and not index else 1
            for stage, count in enumerate(counts)
            for index in range(count)
        ]
        shapes = zip([c, *widths], widths, strides, strict=False)
        blocks = [build(inputs, outputs, stride, shortcut) for inputs, outputs, stride in shapes]
        self.blocks = nn.ModuleList(blocks)
        self.classifier = nn.Linear(widths[-1], num_classes)
        initialise_convolutions(self)
        if depth is None:
            return
        if type(depth) is not int or not 1 <= depth <= len(blocks):
            raise ModelSpecError(
                f"PreActResNet(depth={depth!r}); expected a whole number of blocks from 1 to "
                f"{len(blocks)}, or None for all of them."
            )
        if depth < len(blocks):
            # After the complete network has been initialised, so that these blocks have its
            # weights.
            self.blocks = self.blocks[:depth]
            self.classifier = nn.Linear(widths[depth - 1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute outputs [B, num_classes] from images [B, in_channels, H, W]."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return torch.as_tensor(self.classifier(F.relu(x).mean((2, 3))))


def _small_stem(in_channels: int, c: int) -> nn.Module:
    return nn.Conv2d(in_channels, c, 3, 1, 1, bias=False)


def _large_stem(in_channels: int, c: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, c, 7, 2, 3, bias=False),
        nn.BatchNorm2d(c),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
    )


_STEMS = {"cifar": _small_stem, "imagenet": _large_stem}


class ImageNetResNet(NamedTuple):
    """One of the paper's ImageNet networks.

    Attributes:
        n: blocks per stage.
        period: number of blocks from one exit to the next (see `placement.every`).
    """

    n: tuple[int, ...]
    period: int


IMAGENET_RESNETS: Mapping[int, ImageNetResNet] = {
    14: ImageNetResNet((1, 1, 1, 1), 1),
    26: ImageNetResNet((2, 2, 2, 2), 2),
    50: ImageNetResNet((3, 4, 6, 3), 2),
    101: ImageNetResNet((3, 4, 23, 3), 3),
    152: ImageNetResNet((3, 8, 36, 3), 5),
}


def preact_resnet_imagenet(
    num_classes: int = 1000,
    layers: int = 50,
    c: int = 64,
    in_channels: int = 3,
    *,
    shortcut: ShortcutKind = "pooled",
    depth: int | None = None,
) -> PreActResNet:
    """Build one of the paper's bottleneck networks for 224-pixel images.

    Args:
        num_classes: width of the output.
        layers: number of layers: 14, 26, 50, 101 or 152. It counts the stem, three convolutions per
            block and the classifier; `IMAGENET_RESNETS` has the blocks and the paper's prediction
            period.
        c: channels of the stem; 64 in the paper.
        in_channels: channels of the image.
        shortcut: "pooled" or "projection", as for `PreActBottleneck`.
        depth: number of blocks to keep, as for `PreActResNet`.
    Raises:
        ModelSpecError: if the paper has no network with so many layers, or an option is out of
            range.
    Source:
        Anytime Neural Networks (Hu et al.), ANN-26, 50 and 101; 14 and 152 from the authors' code.
    Example:
        >>> network = preact_resnet_imagenet(num_classes=5, layers=26, c=4)
        >>> len(network.blocks), IMAGENET_RESNETS[26].period
        (8, 2)
    """
    if layers not in IMAGENET_RESNETS:
        known = ", ".join(map(str, IMAGENET_RESNETS))
        raise ModelSpecError(
            f"no ImageNet network of layers={layers!r}; expected one of {known}, or "
            "PreActResNet(n=[...], block='bottleneck', stem='imagenet') for another."
        )
    return PreActResNet(
        num_classes,
        IMAGENET_RESNETS[layers].n,
        c,
        in_channels,
        block="bottleneck",
        stem="imagenet",
        shortcut=shortcut,
        depth=depth,
    )
