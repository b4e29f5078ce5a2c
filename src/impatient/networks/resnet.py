"""The pre-activation ResNet (n, c) of Anytime Neural Networks, for small images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impatient.errors import ModelSpecError


class PreActBlock(nn.Module):
    """BN-ReLU-conv3x3-BN-ReLU-conv3x3-BN plus the input; when down-sampling, plus its 2x2 average, zero-padded in channels.

    Source:
        Anytime Neural Networks (Hu et al.), the basic unit as in the authors' code.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.bn3(self.conv2(F.relu(self.bn2(out))))
        return torch.as_tensor(out + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        if self.padding:
            x = F.pad(x, (0, 0, 0, 0, self.padding // 2, self.padding - self.padding // 2))
        return x


class PreActResNet(nn.Module):
    """Three stages of n blocks; c channels, doubled at each stage; 6n + 2 layers.

    Args:
        num_classes: width of the output.
        n: blocks per stage.
        c: channels of the first stage.
        in_channels: of the image.
    Source:
        He et al. 2016 (identity mappings), with the choices of Anytime Neural Networks: no norm after the stem, a norm
        at the end of each block, ReLU before pooling.
    """

    def __init__(self, num_classes: int = 10, n: int = 3, c: int = 16, in_channels: int = 3) -> None:
        super().__init__()
        if min(num_classes, n, c, in_channels) < 1:
            raise ModelSpecError(
                f"PreActResNet(num_classes={num_classes}, n={n}, c={c}, in_channels={in_channels}): all must be at least 1."
            )
        self.stem = nn.Conv2d(in_channels, c, 3, 1, 1, bias=False)
        blocks: list[nn.Module] = []
        inputs = c
        for stage in range(3):
            outputs = c * 2**stage
            for index in range(n):
                blocks.append(PreActBlock(inputs, outputs, stride=2 if stage and not index else 1))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] to outputs [B, num_classes]."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return torch.as_tensor(self.classifier(F.relu(x).mean((2, 3))))
