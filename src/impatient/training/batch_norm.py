"""Batch norm that training has left behind: notice it, and bring it up to date."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from impatient.anytime import Network
from impatient.inputs import evaluating
from impatient.networks.recalibration import batch_norms, recalibrate, recalibrated
from impatient.progress import tracked
from impatient.training.data import Data, Split
from impatient.training.history import History
from impatient.training.losses import summed_quality
from impatient.trees import map_leaves

# Validation this far below training is looked into, and so much gained is said.
GAP = 0.05
GAIN = 0.02
# So many training samples show whether statistics are out of date.
ENOUGH = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalibrated:
    """What new batch-norm statistics change on the validation split.

    Attributes:
        quality_name: what quality is called, such as "accuracy".
        before: quality per exit with the statistics that training left.
        after: quality per exit with those of the training split.
        samples: number of validation samples.
    """

    quality_name: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    samples: int

    @property
    def is_better(self) -> bool:
        """Whether an exit gains more than chance would explain."""
        least = GAIN + 0.5 / math.sqrt(self.samples)
        return max(self._gains) > least

    @property
    def _gains(self) -> list[float]:
        return [after - before for before, after in zip(self.before, self.after, strict=True)]

    def __str__(self) -> str:
        """Say what the exit that changes most gains."""
        exit = max(range(len(self.before)), key=self._gains.__getitem__)
        return (
            f"exit {exit} has {self.before[exit]:.1%} {self.quality_name} on the validation split "
            f"with the statistics that training left, and {self.after[exit]:.1%} with those of the "
            "training split"
        )


def recalibrate_on(
    network: Network,
    data: Data,
    *,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Recalibrated:
    """Compute a network's batch-norm statistics anew from a training split, in place.

    Args:
        network: the network, trained.
        data: its data set; the training split is passed through it, without augmentation.
        batch_size: samples per batch, as many as in training.
        seed: seed of their order.
        progress: whether to show progress.
    """
    before = mean_quality(network, data, "validation")
    inputs = training_inputs(network, data, batch_size=batch_size, seed=seed)
    count = -(-data.size("train") // batch_size)
    shown = tracked(inputs, "recalibrating", total=count, unit="batches", wanted=progress)
    recalibrate(network, shown)
    return _compared(network, data, before)


def behind(
    network: Network, data: Data, history: History, *, batch_size: int, seed: int = 0
) -> Recalibrated | None:
    """Notice batch norm that has not caught up with training.

    Only where validation is far below training are statistics computed anew, to compare; the
    network keeps its own.

    Args:
        network: the network, trained.
        data: its data set.
        history: what training reported.
        batch_size: samples per batch, as many as in training.
        seed: seed of their order.
    """
    if not history.epochs or not batch_norms(network):
        return None
    last = history.epochs[-1]
    pairs = zip(last.train_accuracy, last.validation_accuracy, strict=True)
    if max(train - validation for train, validation in pairs) <= GAP:
        return None
    # Not from the history: the statistics may have been computed anew since.
    before = mean_quality(network, data, "validation")
    some = training_inputs(network, data, batch_size=batch_size, seed=seed, most=ENOUGH)
    with recalibrated(network, some):
        found = _compared(network, data, before)
    return found if found.is_better else None


def _compared(network: Network, data: Data, before: tuple[float, ...]) -> Recalibrated:
    return Recalibrated(
        quality_name=network.task.quality_name,
        before=before,
        after=mean_quality(network, data, "validation"),
        samples=data.size("validation"),
    )


def training_inputs(
    network: Network, data: Data, *, batch_size: int, seed: int = 0, most: int | None = None
) -> Iterator[Any]:
    """Yield batches of training inputs in a random order, on the network's device.

    In their own order samples of one class often stand together, and a batch of one class has other
    statistics than those of training.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(data.size("train"), generator=generator)[:most]
    for indices in order.split(batch_size):
        # Of a single sample no variance can be computed.
        if len(indices) > 1 or len(order) == 1:
            yield _on_device(
                network, data.preprocess(data.examples("train").take(indices.tolist()))
            )


@torch.no_grad()
def mean_quality(network: Network, data: Data, split: Split) -> tuple[float, ...]:
    """Return the mean quality of every exit on a split."""
    sums = torch.zeros(network.num_exits, dtype=torch.float64)
    with evaluating(network):
        for inputs, labels in data.batches(split, 512):
            outputs = network(_on_device(network, inputs))
            hits = summed_quality(network.task, outputs, _on_device(network, labels))
            sums += hits.double().cpu()
    return tuple((sums / data.size(split)).tolist())


def _on_device(network: Network, tree: Any) -> Any:
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    return map_leaves(lambda value: value.to(device), tree)
