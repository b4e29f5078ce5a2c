"""Heads on a frozen network, trained on features that are computed once.

The backbone does not change, so neither do the features at its cuts. Each head is then trained by
itself, until the loss on the validation split has stopped falling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from impatient import Data, MultiExitNetwork
from impatient.training.data import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """When the training of a head ends.

    Attributes:
        lr: learning rate at first.
        patience: epochs without a smaller validation loss, after which the rate falls to a fifth.
        falls: how often it falls; at the next time training ends.
        longest: epochs, at most.
    """

    lr: float = 0.1
    patience: int = 1
    falls: int = 2
    longest: int = 40
    batch_size: int = 128


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What one exit sees of a split: features [N, ...] in bf16, with labels."""

    values: Tensor
    labels: Int[Tensor, "N"]

    def batch(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return some of the samples."""
        return self.values[places], self.labels[places]


def features_of(
    network: MultiExitNetwork, data: Data, split: Split, batch_size: int
) -> list[Features]:
    """Run a split through the backbone once, and keep the features at every cut."""
    network.eval()
    labels = data.examples(split).labels
    kept: list[Tensor] = []
    begin = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for x, _ in data.batches(split, batch_size):
            for exit in network.exits(x):
                if exit.index == network.num_exits - 1:
                    continue
                if exit.index == len(kept):
                    shape = (len(labels), *exit.features.shape[1:])
                    kept.append(torch.empty(shape, dtype=torch.bfloat16))
                kept[exit.index][begin : begin + len(x)] = exit.features
            begin += len(x)
    return [Features(values, labels) for values in kept]


def train_head(
    head: nn.Module, train: Features, validation: Features, how: Stopping, seed: int
) -> dict[str, list[float]]:
    """Train a head in place until it stops improving, and leave it as it was at its best.

    Returns:
        "train_loss" and "validation_loss" of every epoch.
    """
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        head.parameters(), lr=how.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    history: dict[str, list[float]] = {"train_loss": [], "validation_loss": []}
    least = math.inf
    best = _copy(head)
    waited = falls = 0
    while falls <= how.falls and len(history["train_loss"]) < how.longest:
        history["train_loss"].append(_epoch(head, train, optimizer, random, how.batch_size))
        loss = _loss(head, validation, how.batch_size)
        history["validation_loss"].append(loss)
        waited += 1
        if loss < least:
            least = loss
            best = _copy(head)
            waited = 0
        elif waited == how.patience:
            # a lower rate goes on from the best
            head.load_state_dict(best)
            waited = 0
            falls += 1
            optimizer.param_groups[0]["lr"] /= 5
    head.load_state_dict(best)
    head.eval()
    return history


def _epoch(
    head: nn.Module,
    train: Features,
    optimizer: torch.optim.Optimizer,
    random: torch.Generator,
    batch_size: int,
) -> float:
    head.train()
    total = 0.0
    order = torch.randperm(len(train.labels), generator=random)
    for places in order.split(batch_size):
        values, labels = train.batch(places)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(head(values).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach()) * len(places)
    return total / len(order)


@torch.inference_mode()
def _loss(head: nn.Module, split: Features, batch_size: int) -> float:
    head.eval()
    total = 0.0
    for places in torch.arange(len(split.labels)).split(batch_size):
        values, labels = split.batch(places)
        with torch.autocast("cpu", torch.bfloat16):
            output = head(values).float()
        total += float(F.cross_entropy(output, labels, reduction="sum"))
    return total / len(split.labels)


def _copy(head: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}
