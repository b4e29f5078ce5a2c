"""A backbone that is quick enough for thousands of runs."""

import torch
from torch import Tensor, nn


class ToyBackbone(nn.Module):
    """Four small blocks and a classifier on [B, 8]; quick enough for thousands of runs."""

    def __init__(self, num_classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4)
        )
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.classifier(x)


def mlp(num_classes: int = 3, inputs: int = 8, width: int = 32) -> nn.Sequential:
    """Make a multilayer perceptron of three blocks and a linear layer."""
    sizes = [inputs, width, width]
    blocks = [nn.Sequential(nn.Linear(size, width), nn.ReLU()) for size in sizes]
    return nn.Sequential(*blocks, nn.Linear(width, num_classes))


class Compared(nn.Module):
    """A classifier of two arrays [B, 4], which it takes by name."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.classifier = nn.Linear(8, num_classes)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        x = torch.cat([left, right], 1)
        for block in self.blocks:
            x = block(x)
        return self.classifier(x)
