"""A small network, some digits and a brief recipe: training in a second."""

import dataclasses
import functools
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from impatient.networks import MultiExitNetwork, attach_exits
from impatient.training import Data, History, Recipe, fit, load_data
from impatient.training.examples import ArrayExamples


class SmallNet(nn.Module):
    """Three convolutions with batch norm and dropout on [B, 1, 8, 8]."""

    def __init__(self, width: int = 8, dropout: float = 0.1) -> None:
        super().__init__()

        def block(inside: int, stride: int) -> nn.Module:
            convolution = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(dropout))

        self.blocks = nn.Sequential(block(1, 1), block(width, 2), block(width, 1))
        self.classifier = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(x).mean((2, 3)))


def small(
    seed: int = 0, after: tuple[str, ...] = ("blocks.0", "blocks.1"), **options: Any
) -> MultiExitNetwork:
    torch.manual_seed(seed)
    backbone = SmallNet(**options)
    return attach_exits(backbone, after=list(after), example=torch.zeros(1, 1, 8, 8))


@functools.cache
def digits(seed: int = 0) -> Data:
    return load_data("digits", seed=seed)


def few(seed: int = 0) -> Data:
    """The first 88 training and 32 validation digits: six batches of 16 with a last one of 8."""
    whole = digits(seed)
    splits = {
        split: ArrayExamples(
            whole.examples(split).take(range(count)), whole.examples(split).labels[:count].clone()
        )
        for split, count in (("train", 88), ("validation", 32), ("test", 32))
    }
    return dataclasses.replace(whole, splits=splits)


def on_cpu(**options: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, **options)


BRIEF = Recipe(epochs=3, batch_size=16, lr=0.05, augment="crop", seed=5)
MIXED = dataclasses.replace(BRIEF, regime="mixed", epochs=4)
# batches per epoch
STEPS = 6


def train(
    network: nn.Module, data: Data | None = None, recipe: Recipe = BRIEF, **options: Any
) -> History:
    return fit(
        network, data or few(), recipe=recipe, progress=False, **{"fabric": on_cpu(), **options}
    )


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
