"""Compute batch-norm statistics anew, where training has not brought them up to date."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from impatient.errors import NetworkError
from impatient.inputs import evaluating


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """List the batch norms that keep statistics of what they have seen."""
    return [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]


def recalibrate(network: nn.Module, batches: Iterable[Any]) -> None:
    """Compute the batch-norm statistics again from data, in place, after training.

    No weight is changed. Each statistic becomes the mean over all batches. In a network that grows
    in iterations, it is the mean over all iterations that share it; with `norms="own"` the
    statistics of an iteration are those of its own inputs. Meanwhile, batch norm normalises by the
    batch, as in training, and dropout is off.

    Args:
        network: network whose forward runs everything that has statistics, such as all exits.
        batches: batches of training inputs without augmentation, as large as those of training.
    Raises:
        NetworkError: if there are no batches.
    Source:
        As after stochastic weight averaging (Izmailov et al. 2018).
    Example:
        >>> network = nn.Sequential(nn.BatchNorm1d(2))
        >>> recalibrate(network, [torch.tensor([[1.0, 3.0], [3.0, 5.0]])])
        >>> network[0].running_mean
        tensor([2., 4.])
    """
    norms = batch_norms(network)
    momenta = [norm.momentum for norm in norms]
    inputs = iter(batches)
    first = next(inputs, None)
    if first is None:
        raise NetworkError("no batches to recalibrate with; expected at least one batch of inputs.")
    with evaluating(network), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            # In torch, a momentum of None means the mean of all batches.
            norm.momentum = None
            norm.train()
        try:
            for batch in itertools.chain([first], inputs):
                network(batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


@contextlib.contextmanager
def recalibrated(network: nn.Module, batches: Iterable[Any]) -> Iterator[None]:
    """Recalibrate a network within a block, and put its statistics back to the last bit."""
    before = [
        {name: value.clone() for name, value in norm.named_buffers(recurse=False)}
        for norm in batch_norms(network)
    ]
    try:
        recalibrate(network, batches)
        yield
    finally:
        for norm, buffers in zip(batch_norms(network), before, strict=True):
            for name, value in norm.named_buffers(recurse=False):
                value.copy_(buffers[name])
