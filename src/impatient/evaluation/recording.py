"""Record the outputs of all exits on one named split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from impatient.anytime import Network, check_network
from impatient.errors import ONE_COLUMN, ClassCountMismatch, RecordingError
from impatient.evaluation.metrics import check_labels
from impatient.progress import tracked
from impatient.provenance import Provenance, provenance
from impatient.store import Stored


class LabelledData(Protocol):
    """What recording needs of a data set."""

    @property
    def fingerprint(self) -> str: ...

    def size(self, split: Any) -> int: ...

    def batches(self, split: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recording(Stored, made_by="`impatient record`"):
    """Outputs of all exits on one split of one data set.

    Attributes:
        outputs: before softmax, float32, shape [K, N, C].
        labels: true classes, shape [N].
        split: the split's name; a policy fitted on it is not judged on it.
        exits: names of the exits.
        features: pooled features per exit, each [N, D], or empty.
        provenance: weights, data, versions.
    """

    outputs: Float[Tensor, "K N C"]
    labels: Int[Tensor, "N"]
    split: str
    exits: tuple[str, ...]
    features: tuple[Tensor, ...] = ()
    provenance: Provenance

    def __post_init__(self) -> None:
        expected = (len(self.exits), len(self.labels))
        if self.outputs.dim() != 3 or self.outputs.shape[:2] != expected or len(self.labels) == 0:
            raise RecordingError(
                f"outputs of shape {tuple(self.outputs.shape)} do not fit {len(self.exits)} exits "
                f"and {len(self.labels)} labels; expected [K, N, C] with at least one sample."
            )
        for index, output in enumerate(self.outputs):
            if not torch.isfinite(output).all():
                raise RecordingError(
                    f"exit {index} ({self.exits[index]}) gives NaN or infinite outputs; check the "
                    "weights, or train again with a lower learning rate."
                )
        check_labels(self.labels, self.outputs.shape[2])

    def hits(self) -> Float[Tensor, "K N"]:
        """1 where an exit is right, else 0."""
        return (self.outputs.argmax(-1) == self.labels).float()


def record(
    network: Network,
    data: LabelledData,
    *,
    split: str = "validation",
    features: bool = False,
    batch_size: int = 256,
    device: str = "cpu",
    progress: bool = False,
) -> Recording:
    """Run a network over one split and keep the outputs of all exits.

    Args:
        network: the result of `attach_exits`, or a `Network` of your own; it is put in eval mode.
        data: the result of `load_data`.
        split: "train", "validation" or "test".
        features: keep the pooled features of every exit too, for learned gates.
        batch_size: samples at a time.
        device: where the network is.
        progress: show a bar.
    Raises:
        RecordingError: if an exit gives NaN or infinite outputs, or is not reached by every input.
    """
    check_network(network)
    if network.num_classes == 1:
        raise ClassCountMismatch(
            "the network has one output column; expected the logits of two or more classes. "
            f"{ONE_COLUMN}"
        )
    network.eval()
    outputs: list[list[Tensor]] = [[] for _ in range(network.num_exits)]
    kept: list[list[Tensor]] = [[] for _ in range(network.num_exits)]
    labels = []
    batches = data.batches(split, batch_size)
    count = -(-data.size(split) // batch_size)
    for inputs, targets in tracked(
        batches, f"recording {split}", total=count, unit="batches", wanted=progress
    ):
        with torch.inference_mode(), network.exits(inputs.to(device)) as run:
            for exit in run:
                outputs[exit.index].append(exit.output().float().cpu())
                if features:
                    kept[exit.index].append(network.pooled(exit).float().cpu())
        labels.append(targets)
        classes = outputs[0][-1].shape[1] if outputs[0] else None
        if classes is not None and len(targets) and int(targets.max()) >= classes:
            raise ClassCountMismatch(
                f"{split} has the label {int(targets.max())} for {classes} outputs of the "
                f"network; expected labels from 0 to {classes - 1}. Record a network with an "
                "output for every class."
            )
    answered = [sum(map(len, parts)) for parts in outputs]
    if len(set(answered)) > 1:
        raise RecordingError(
            f"of {data.size(split)} samples the exits answered {answered}; record a network whose "
            "inputs all come to every exit."
        )
    return Recording(
        outputs=torch.stack([torch.cat(parts) for parts in outputs]).clone(),
        labels=torch.cat(labels),
        split=split,
        exits=network.exit_names,
        features=tuple(torch.cat(parts) for parts in kept) if features else (),
        provenance=provenance(
            data=data.fingerprint,
            device=device,
            network=network.structure_fingerprint,
            weights=network.weights_fingerprint,
            engine=network.engine,
        ),
    )
