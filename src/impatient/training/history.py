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

    def rows(self) -> tuple[tuple[float, ...], ...]:
        """Give all that is measured per exit."""
        return (
            self.train_loss,
            self.train_accuracy,
            self.validation_loss,
            self.validation_accuracy,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """How far a training run is, as its checkpoint says.

    Attributes:
        step: batches of the running epoch that are done.
        seconds: time that they took.
        sums: losses and hits per exit, summed over these batches.
        history: the epochs that are done.
    """

    step: int
    seconds: float
    sums: tuple[tuple[float, ...], ...]
    history: tuple[EpochMetrics, ...]

    def check(self, exits: int, epochs: int) -> None:
        """Refuse a state that no run of so many exits and epochs reaches.

        Raises:
            ValueError: if there are more epochs, or rows are not of one number per exit.
        """
        rows = [*self.sums, *(row for entry in self.history for row in entry.rows())]
        if len(self.sums) != 2 or any(len(row) != exits for row in rows):
            raise ValueError(f"expected losses and hits of {exits} exits")
        if not self.step >= 0 or not 0 <= len(self.history) <= epochs:
            raise ValueError(f"{len(self.history)} epochs and {self.step} steps are done")


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
