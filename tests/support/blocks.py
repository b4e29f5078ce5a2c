"""A network in double precision whose samples stop at different exits."""

import torch
from torch import Tensor, nn

from impatient.networks import MultiExitNetwork, attach_exits

WIDTH = 6
CLASSES = 3
MOST = 8


class Blocks(nn.Module):
    """Four blocks in double precision, so that batches of any size agree; writes down how many rows
    each ran on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)
        )
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.double()
        self.rows: list[int] = []
        for block in self.blocks:
            block.register_forward_pre_hook(lambda _, args: self.rows.append(len(args[0])))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) * 2.0
        return self.classifier(x) * 3.0


def attach(model: nn.Module) -> MultiExitNetwork:
    network = attach_exits(
        model, after=["blocks.0", "blocks.1", "blocks.2"], example=torch.zeros(1, WIDTH).double()
    ).eval()
    for head in network.heads:
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=2.0)
    return network


def made() -> MultiExitNetwork:
    torch.manual_seed(0)
    return attach(Blocks())


NETWORK = made()
NETWORK.shrinks(torch.zeros(1, WIDTH).double())


def x_of(batch: int, seed: int = 0) -> Tensor:
    return 2.0 * torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed)).double()
