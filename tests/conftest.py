"""Shared by all tests: a toy backbone, seeds, one torch thread (tiny networks gain nothing from more)."""

import pytest
import torch
from torch import Tensor, nn


class ToyBackbone(nn.Module):
    """Four small blocks and a classifier on [B, 8]; quick enough for thousands of runs."""

    def __init__(self, num_classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4))
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.classifier(x)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def toy() -> ToyBackbone:
    return ToyBackbone()


@pytest.fixture
def toy_input() -> Tensor:
    return torch.randn(5, 8)
