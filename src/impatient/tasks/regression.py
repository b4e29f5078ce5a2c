"""Numbers per sample, from outputs [B, D] or [B]."""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from impatient import checks
from impatient.errors import TaskError
from impatient.tasks.task import Task, check_array


@functools.cache
def regression(scale: float | None = None, tolerance: float | None = None) -> Task:
    """Make the task of predicting numbers.

    Outputs and targets are [B, D] or [B]. A sample's error is the root of its mean squared error.
    Quality falls with it as exp(-error / scale), or is 1 where it is at most the tolerance.
    Losses are squared errors. Summary: RMSE, MAE, and R2 of all numbers together.

    An output alone does not say how sure it is. The only score by itself is "constant", the same
    for all; `record` adds "agreement" with the exit before, and learned gates on features predict
    the quality.

    Args:
        scale: error at which quality is 0.37, in units of the targets; 1 by default.
        tolerance: in place of a scale, the largest error that is still right.
    Raises:
        TaskError: if both are given, or one is not positive.
    Example:
        >>> outputs, targets = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.2], [5.0]])
        >>> regression(tolerance=0.5).quality(outputs, targets).tolist()
        [1.0, 0.0]
    """
    given = {"scale": scale, "tolerance": tolerance}
    options = {name: float(value) for name, value in given.items() if value is not None}
    if len(options) > 1:
        raise TaskError(f"scale={scale} and tolerance={tolerance}; expected one of them.")
    checks.positive(TaskError, **options)
    return Task(
        name=":".join(["regression", *(f"{name}={value!r}" for name, value in options.items())]),
        losses=lambda output, target: _squared(output, target).mean(1),
        quality=functools.partial(quality, scale=scale or 1.0, tolerance=tolerance),
        scores={"constant": constant},
        quality_name="quality" if tolerance is None else f"within {tolerance:g}",
        distance=lambda output, other: _apart(output, other).mean(1).sqrt(),
        statistics=statistics,
        summary=summary,
        ideal=lambda target, output: target.float().reshape(output.shape),
        # whole numbers are classes, until somebody says otherwise
        check_targets=functools.partial(
            check_array, dims=0, whole=False, expected="real numbers, also whole ones as float32"
        ),
    )


def quality(
    output: Tensor, target: Tensor, *, scale: float = 1.0, tolerance: float | None = None
) -> Float[Tensor, "B"]:
    """Compute how near each answer is, in [0, 1]."""
    error = _squared(output, target).mean(1).sqrt()
    return torch.exp(-error / scale) if tolerance is None else (error <= tolerance).float()


def constant(output: Tensor) -> Float[Tensor, "B"]:
    """Return 0 for every sample: the output alone does not say how sure it is."""
    return torch.zeros(output.shape[0], device=output.device)


def statistics(output: Tensor, target: Tensor) -> Float[Tensor, "B 5"]:
    """Sum squared errors, absolute errors, numbers, targets and their squares."""
    squared = _squared(output, target)
    truth = target.reshape(squared.shape).double()
    count = torch.full((len(truth),), float(truth.shape[1]), dtype=torch.float64)
    sums = [squared.sum(1), squared.sqrt().sum(1), count, truth.sum(1), (truth**2).sum(1)]
    return torch.stack([value.double().to(count.device) for value in sums], 1)


def summary(sums: Float[Tensor, "5"]) -> dict[str, float]:
    """Compute RMSE, MAE and R2 from sums of `statistics`.

    R2 is not a number where all targets are equal.
    """
    squared, absolute, count, total, squares = sums.tolist()
    spread = squares - total**2 / count
    return {
        "RMSE": math.sqrt(squared / count),
        "MAE": absolute / count,
        "R2": 1.0 - squared / spread if spread > 0 else math.nan,
    }


def _squared(output: Tensor, target: Tensor) -> Float[Tensor, "B D"]:
    """Square the differences from targets, one row of numbers per sample."""
    if not bool(torch.isfinite(target).all()):
        raise TaskError("targets that are NaN or infinite; leave these samples out.")
    return _apart(output, target)


def _apart(output: Tensor, other: Tensor) -> Float[Tensor, "B D"]:
    """Square the differences.

    Nothing here depends on values, so that engines compute it, too.
    """
    one, two = (value.float().reshape(value.shape[0], -1) for value in (output, other))
    if one.shape != two.shape:
        raise TaskError(
            f"targets of shape {tuple(other.shape)} for outputs of shape {tuple(output.shape)}; "
            "expected a number for each output."
        )
    return (one - two) ** 2
