"""Small networks for the table of tasks, for specs such as "task_models:painter"."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def perceptron(num_classes: int, inputs: int, width: int = 64) -> nn.Sequential:
    """Four hidden layers for rows of numbers."""
    sizes = [inputs, *[width] * 3]
    blocks = [nn.Sequential(nn.Linear(size, width), nn.ReLU()) for size in sizes]
    return nn.Sequential(*blocks, nn.Linear(width, num_classes))


def painter(num_classes: int, width: int = 32) -> nn.Sequential:
    """A class for every pixel, from maps of half the size."""
    blocks = [layer(3, width, 2), *(layer(width, width) for _ in range(4))]
    return nn.Sequential(*blocks, nn.Conv2d(width, num_classes, 1), nn.Upsample(scale_factor=2))


class Finder(nn.Module):
    """A small detector of the DETR family, for images of 32 x 32."""

    def __init__(self, num_classes: int, width: int = 64, queries: int = 8, depth: int = 4) -> None:
        super().__init__()
        self.maps = nn.Sequential(layer(3, 32), layer(32, width, 2), layer(width, width, 2))
        self.places = nn.Parameter(0.5 * torch.randn(64, width))
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, 4, 128, 0.0, batch_first=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, num_classes + 1)
        self.boxes = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        memory = self.maps(images).flatten(2).transpose(1, 2) + self.places
        queries = self.queries.expand(images.shape[0], -1, -1)
        for each in self.layers:
            queries = each(queries, memory)
        queries = self.norm(queries)
        return {"logits": self.classes(queries), "boxes": self.boxes(queries).sigmoid()}


class Cleaner(nn.Module):
    """A loop that makes a picture a little cleaner at every turn.

    Each turn adds a correction to the last picture, or, with `anew`, to the noisy one. The same
    layers make all turns, so that corrections which add up go too far at the last turns where the
    first ones are to be large.
    """

    def __init__(self, turns: int = 5, width: int = 16, anew: bool = False) -> None:
        super().__init__()
        self.turns = turns
        self.anew = anew
        self.begin = nn.Conv2d(3, width, 3, padding=1)
        self.look = nn.Conv2d(width + 3, width, 3, padding=1)
        self.change = nn.Conv2d(width, 3, 3, padding=1)
        self.turn = nn.Identity()

    def forward(self, noisy: Tensor) -> Tensor:
        picture = noisy
        state = self.begin(noisy)
        for _ in range(self.turns):
            state = state + self.look(torch.cat([picture, state], 1)).relu()
            picture = self.turn((noisy if self.anew else picture) + self.change(state))
        return picture
