"""What training reported, epoch by epoch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochMetrics:
    """Loss and accuracy of every exit in one epoch.

    Attributes:
        epoch: number of the epoch, from 1.
        phase: name of the phase: "joint", "heads" or "backbone".
        lr: learning rate of the last step.
        seconds: time of the epoch, validation included.
        train_loss: mean loss per exit on the training batches, measured during training.
        train_accuracy: accuracy per exit on the training batches, measured during training.
        validation_loss: mean loss per exit on the validation split after the epoch.
        validation_accuracy: accuracy per exit on the validation split after the epoch.
    """

    epoch: int
    phase: str
    lr: float
    seconds: float
    train_loss: tuple[float, ...]
    train_accuracy: tuple[float, ...]
    validation_loss: tuple[float, ...]
    validation_accuracy: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Metrics of a training run, one entry per epoch."""

    epochs: tuple[EpochMetrics, ...]

    def to_csv(self) -> str:
        """Write the metrics as CSV, one row per epoch, split and exit."""
        lines = ["epoch,phase,lr,seconds,split,exit,loss,accuracy"]
        for entry in self.epochs:
            epoch = f"{entry.epoch},{entry.phase},{entry.lr:.6g},{entry.seconds:.3f}"
            for split, losses, accuracies in (
                ("train", entry.train_loss, entry.train_accuracy),
                ("validation", entry.validation_loss, entry.validation_accuracy),
            ):
                lines += [
                    f"{epoch},{split},{exit},{loss:.6f},{accuracy:.6f}"
                    for exit, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True))
                ]
        return "\n".join([*lines, ""])
