"""Data sets of tensors, without a loader."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


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
