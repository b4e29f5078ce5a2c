"""Recordings and cost profiles with known truths, made without a network."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from impatient.costs import BatchCosts, CostProfile, Quantiles
from impatient.evaluation import Recording
from impatient.provenance import provenance


def exactly(seconds: float) -> Quantiles:
    return Quantiles.of([seconds])


def costs_of(
    stages_s: Sequence[float],
    heads_s: Sequence[float],
    *,
    exit_free_s: float | None = None,
    stage_macs: Sequence[int] | None = None,
    head_macs: Sequence[int] | None = None,
) -> CostProfile:
    """A profile in which every run takes exactly these times."""
    zeros = (0,) * len(stages_s)
    batch = BatchCosts(
        stages=tuple(map(exactly, stages_s)),
        heads=tuple(map(exactly, heads_s)),
        exit_free=exactly(sum(stages_s) if exit_free_s is None else exit_free_s),
    )
    return CostProfile(
        exits=(*(f"block{k}" for k in range(len(stages_s) - 1)), "output"),
        batches={1: batch},
        stage_macs=tuple(stage_macs or zeros),
        head_macs=tuple(head_macs or zeros),
        stage_parameters=zeros,
        head_parameters=zeros,
        provenance=provenance(network="network", device="cpu", processor="abacus", threads=1),
    )


def recording_of(
    outputs: Tensor,
    labels: Tensor,
    *,
    split: str = "validation",
    weights: str = "weights",
    data: str = "data",
    **rest: Any,
) -> Recording:
    return Recording.of(
        outputs,
        labels,
        split=split,
        exits=(*(f"block{k}" for k in range(len(outputs) - 1)), "output"),
        provenance=provenance(network="network", weights=weights, data=data),
        **rest,
    )


def sure(
    right: Sequence[Sequence[bool | int]], probabilities: Sequence[Sequence[float]]
) -> tuple[Tensor, Tensor]:
    """Outputs [K, N, 2] and labels [N]: which answers are right, and the probability that each
    gives to its answer.
    """
    labels = torch.arange(len(right[0])) % 2
    answers = torch.where(torch.tensor(right).bool(), labels, 1 - labels)
    odds = torch.tensor(probabilities, dtype=torch.float64).logit().float()
    return torch.nn.functional.one_hot(answers, 2) * odds[..., None], labels


def drawn(
    samples: int,
    seed: int,
    *,
    gains: Sequence[float] = (1.0, 2.0, 3.0, 4.0),
    classes: int = 5,
    **rest: Any,
) -> Recording:
    """Samples of one law: deeper exits raise the true class by more, all over the same noise of the
    sample and their own.
    """
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=random)
    shared = torch.randn(samples, classes, generator=random)
    outputs = shared + torch.randn(len(gains), samples, classes, generator=random)
    outputs[:, torch.arange(samples), labels] += torch.tensor(gains)[:, None]
    return recording_of(outputs, labels, **rest)


def in_top(recording: Recording, top: int) -> np.ndarray:
    """Say of every answer [K, N] whether fewer than `top` classes are likelier than the truth."""
    outputs = recording.logits().numpy()
    places = np.broadcast_to(recording.labels.numpy()[:, None], (*outputs.shape[:2], 1))
    return (outputs > np.take_along_axis(outputs, places, -1)).sum(-1) < top


@dataclasses.dataclass
class Samples:
    """A data set of random inputs."""

    inputs: Tensor
    labels: Tensor
    fingerprint: str = "random"

    def size(self, split: str) -> int:
        return len(self.labels)

    def batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.inputs.split(batch_size), self.labels.split(batch_size), strict=True)
