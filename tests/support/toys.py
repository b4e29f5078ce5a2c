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


class Refiner(nn.Module):
    """A loop that makes its answer, an image of the input's size, better by one step."""

    def __init__(self, turns: int, width: int = 4) -> None:
        super().__init__()
        self.turns = turns
        self.begin = nn.Conv2d(1, width, 3, padding=1)
        self.step = Refining(width)

    def forward(self, x: Tensor) -> Tensor:
        answer, state = x, self.begin(x)
        for _ in range(self.turns):
            answer, state = self.step(answer, state)
        return answer


class Refining(nn.Module):
    """One turn, which returns its answer first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.look = nn.Conv2d(width + 1, width, 3, padding=1)
        self.change = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, answer: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = state + self.look(torch.cat([answer, state], 1)).relu()
        return answer + self.change(state), state


def refiner(turns: int = 3) -> Refiner:
    """Build a loop, for specs such as "toys:refiner:turns=3"."""
    return Refiner(turns)
