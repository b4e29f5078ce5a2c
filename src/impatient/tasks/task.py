"""The one value that says what an output means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from impatient.errors import TaskError
from impatient.tasks.words import numbers

# output, target -> one number per sample, [B]; [B, S] for statistics
Judge = Callable[[Any, Any], Tensor]
# the score that compares an output with that of the exit before, by the task's distance
AGREEMENT = "agreement"
# output -> one number per sample, [B]
Score = Callable[[Any], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What an output means: how wrong it is, how good, and how sure it looks.

    Outputs and targets are tensors, or trees of them (`impatient.trees`), the samples first.

    Attributes:
        name: name with options, such as "regression:tolerance=0.5"; it goes into recordings and
            policies.
        losses: loss of each sample, [B], for training.
        quality: how good each answer is, [B], from 0 to 1: what policies trade for time. Its mean
            is what tables show; it need not be the metric of the whole data set.
        scores: by name, how sure each output looks, [B], without targets; higher is surer. The
            first is used unless another is named.
        quality_name: what the mean quality is called in tables.
        looks: what gates see of an output, [B, D]; by default all scores.
        head: makes an exit's head from the features of its stage and an output of the network, both
            of example samples; by default a pooled or dense linear head by their shapes.
        distance: how far outputs are from others, [B]: for distillation and agreement.
        statistics: numbers of each sample, [B, S], from which the metrics of the data set follow.
        summary: metrics of the data set by name, from the sums of `statistics`, [S].
        overall: metrics by name that are no sums, such as AP, from the `statistics` of all samples,
            [N, S].
        reads: makes one tensor of what a model returns, where its answer is several.
        outputs_for: how many outputs a network needs for some targets; by default their columns.
        says: the answer of one sample in a few words, from its output [1, ...] and the names of the
            classes, if there are any; by default its numbers.
        layer: what the output of one sample looks like over a picture of some height and width:
            whole numbers [H, W] that stand for colours, 0 where nothing is.
        ideal: the output that would be right, from the target of one sample and an output of it, so
            that what is true can be said and shown like an answer.
        is_logits: whether outputs are logits of two or more classes, of which each sample has one.
        check_targets: raises TaskError if the targets of a split are not of this task, whatever the
            outputs; by default any are taken.
    Example:
        >>> task = Task(
        ...     name="halves",
        ...     losses=lambda output, target: (output[:, 0] - target) ** 2,
        ...     quality=lambda output, target: ((output[:, 0] - target).abs() <= 0.5).float(),
        ...     scores={"small": lambda output: -output[:, 0].abs()},
        ... )
        >>> task.default_score
        'small'
    """

    name: str
    losses: Judge
    quality: Judge
    scores: Mapping[str, Score]
    quality_name: str = "quality"
    looks: Callable[[Any], Float[Tensor, "B D"]] | None = None
    head: Callable[[Any, Any], nn.Module] | None = None
    distance: Judge | None = None
    statistics: Judge | None = None
    summary: Callable[[Float[Tensor, "S"]], Mapping[str, float]] | None = None
    overall: Callable[[Float[Tensor, "N S"]], Mapping[str, float]] | None = None
    reads: Callable[[Any], Tensor] | None = None
    outputs_for: Callable[[Any], int] | None = None
    says: Callable[[Any, Sequence[str]], str] = numbers
    layer: Callable[[Any, tuple[int, int]], Int[Tensor, "H W"]] | None = None
    ideal: Callable[[Any, Any], Any] | None = None
    is_logits: bool = False
    check_targets: Callable[[Any], object] | None = None

    def __post_init__(self) -> None:
        if not self.scores:
            raise TaskError(
                f"task {self.name!r} has no scores; expected at least one function that says how "
                "sure an output looks."
            )
        if (self.statistics is None) != (self.summary is None):
            raise TaskError(
                f"task {self.name!r} has only one of statistics and summary; expected both or none."
            )

    def metrics(self, statistics: Float[Tensor, "N S"] | None) -> Mapping[str, float]:
        """Compute the metrics of a data set from the statistics of its samples."""
        if statistics is None or self.summary is None:
            return {}
        found = dict(self.summary(statistics.sum(0)))
        return found | dict(self.overall(statistics) if self.overall else {})

    @property
    def default_score(self) -> str:
        """The name of the score that is used unless another is named."""
        return next(iter(self.scores))

    def score(self, name: str) -> Score:
        """Return a score by name.

        Raises:
            TaskError: if there is none of this name.
        """
        if name not in self.scores:
            raise TaskError(
                f"score={name!r}; task {self.name!r} has {', '.join(self.scores)}. Name one of "
                "these."
            )
        return self.scores[name]

    def seen(self, output: Any) -> Float[Tensor, "B D"]:
        """Collect what a gate sees of an output, one row of numbers per sample."""
        if self.looks is not None:
            return self.looks(output)
        return torch.stack([score(output).float() for score in self.scores.values()], 1)

    def tables(self, output: Any, target: Any) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Judge one exit's outputs.

        Returns:
            Quality [B], float32; scores [B] by name, float32; statistics [B, S], float64, or None.
        Raises:
            TaskError: if there are not as many targets as outputs, or a function gives numbers of
                another shape, not finite ones, or a quality that is not from 0 to 1.
        """
        are_tensors = isinstance(output, Tensor) and isinstance(target, Tensor)
        if are_tensors and output.shape[:1] != target.shape[:1]:
            raise TaskError(
                f"targets of shape {tuple(target.shape)} for outputs of shape "
                f"{tuple(output.shape)}; expected as many targets as outputs."
            )
        quality = self._checked("quality", self.quality(output, target).float())
        if len(quality) and not 0.0 <= float(quality.min()) <= float(quality.max()) <= 1.0:
            raise TaskError(
                f"the quality of task {self.name!r} goes from {float(quality.min()):g} to "
                f"{float(quality.max()):g}; expected numbers from 0 to 1."
            )
        scores = {
            name: self._checked(f"score {name!r}", score(output).float(), len(quality))
            for name, score in self.scores.items()
        }
        if self.statistics is None:
            return quality, scores, None
        statistics = self.statistics(output, target).double()
        if statistics.dim() != 2 or len(statistics) != len(quality):
            raise TaskError(
                f"the statistics of task {self.name!r} have shape {tuple(statistics.shape)} for "
                f"{len(quality)} samples; expected [B, S]."
            )
        return quality, scores, statistics

    def _checked(self, what: str, values: Tensor, count: int | None = None) -> Tensor:
        if values.dim() != 1 or count not in (None, len(values)):
            expected = "[B]" if count is None else f"[{count}]"
            raise TaskError(
                f"the {what} of task {self.name!r} has shape {tuple(values.shape)}; expected one "
                f"number per sample, {expected}."
            )
        if not bool(torch.isfinite(values).all()):
            raise TaskError(
                f"the {what} of task {self.name!r} is NaN or infinite for some samples; check the "
                "targets and the network's weights."
            )
        return values


def check_array(targets: Any, *, dims: int, whole: bool, expected: str) -> Tensor:
    """Return targets that are one array of whole numbers, or one of real numbers.

    Args:
        targets: those of a split.
        dims: number of dimensions, the samples' among them; 0 for any.
        whole: whether they are whole numbers.
        expected: what they should be, for the error.
    Raises:
        TaskError: if they are something else.
    """
    if not isinstance(targets, Tensor):
        raise TaskError(f"targets in a {type(targets).__name__}; expected {expected}.")
    if dims not in (0, targets.dim()) or targets.is_floating_point() == whole:
        kind = str(targets.dtype).removeprefix("torch.")
        raise TaskError(
            f"targets of shape {tuple(targets.shape)} and type {kind}; expected {expected}."
        )
    return targets
