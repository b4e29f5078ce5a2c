"""Data sets of tensors, without a loader, and a plain way to train on them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from impatient.networks import MultiExitNetwork
from impatient.training.losses import task_losses


@dataclass
class Plain:
    """Inputs and targets of any kind, in three splits that differ."""

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    fingerprint: str = "plain"

    def size(self, split: str) -> int:
        return len(self.inputs[split])

    def batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(
            self.inputs[split].split(batch_size), self.targets[split].split(batch_size), strict=True
        )


def teach(network: MultiExitNetwork, data: Plain, *, steps: int, lr: float) -> None:
    """Train all exits alike on the whole training split at each step, then set eval mode."""
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    for _ in range(steps):
        losses = task_losses(network.task, network(data.inputs["train"]), data.targets["train"])
        optimizer.zero_grad()
        losses.mean(1).sum().backward()
        optimizer.step()
    network.eval()
