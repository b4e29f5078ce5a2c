"""Order the training samples of an epoch, texts of similar lengths together."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

# Batches among whose samples those of similar lengths are looked for. Fewer would leave more
# padding, more would put the same texts together in every epoch.
POOL = 50


def batches_of_epoch(
    count: int,
    batch_size: int,
    *,
    seed: int,
    lengths: Int[Tensor, "N"] | None = None,
    process: tuple[int, int] = (0, 1),
) -> list[Int[Tensor, "B"]]:
    """Draw the batches of one process, the same ones every time.

    With lengths, samples of similar lengths share a batch, so that little of it is padding. Each
    sample comes once, and the order of the batches says nothing of lengths.

    Args:
        count: number of samples.
        batch_size: samples per batch; one batch may be smaller.
        seed: seed of this epoch.
        lengths: length of each sample where batches are padded.
        process: number of this process, and how many there are.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    rank, world = process
    order = order[: count - count % world][rank::world]
    if lengths is not None:
        order = _by_length(order, lengths, batch_size * POOL)
    batches = list(order.split(batch_size))
    # Batch norm cannot train on a single sample.
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches.pop()
    if lengths is None:
        return batches
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def _by_length(order: Tensor, lengths: Tensor, pool: int) -> Tensor:
    """Sort by length within pools of samples."""
    return torch.cat([part[lengths[part].argsort(stable=True)] for part in order.split(pool)])
