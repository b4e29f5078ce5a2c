"""Show a progress bar and one line per epoch, with metrics per exit."""

from __future__ import annotations

from typing import Self

from torch import Tensor

from impatient.progress import display
from impatient.training.history import EpochMetrics


class TrainingProgress:
    """Progress of training on the terminal, or nothing if not wanted."""

    def __init__(self, wanted: bool, epochs: int) -> None:
        self._wanted = wanted
        self._epochs = epochs
        self._bar = display(wanted)

    def __enter__(self) -> Self:
        self._bar.__enter__()
        self._task = self._bar.add_task("training", total=self._epochs, unit="epochs", note="")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__(None, None, None)

    def step(self, epoch: int, phase: str, share: float, means: Tensor) -> None:
        """Show that another batch is done.

        Args:
            epoch: number of the running epoch, from 0.
            phase: name of the running phase.
            share: share of the epoch that is done.
            means: mean loss and mean accuracy per exit so far in this epoch, shape [2, K].
        """
        if self._wanted:
            loss, accuracy = means.tolist()
            text = f"loss {_row(loss, '.2f')}  accuracy % {_row(accuracy, '.0%')}"
            self._bar.update(
                self._task,
                completed=epoch + share,
                note=text,
                description=f"epoch {epoch + 1}/{self._epochs} {phase}",
            )

    def epoch(self, metrics: EpochMetrics) -> None:
        """Print the metrics of an epoch that is done."""
        if self._wanted:
            self._bar.console.print(
                f"epoch {metrics.epoch}/{self._epochs} {metrics.phase:8} {metrics.seconds:6.1f} "
                f"s  train loss {_row(metrics.train_loss, '.2f')}  validation accuracy % "
                f"{_row(metrics.validation_accuracy, '.1%')}",
                highlight=False,
                soft_wrap=True,
            )


def _row(values: list[float] | tuple[float, ...], style: str) -> str:
    return " ".join(format(value, style).rstrip("%") for value in values)
