"""Learning-rate schedules, as pure functions of the share of training done."""

from __future__ import annotations

import math
from collections.abc import Sequence

from impatient.recipe import Recipe


def cosine(done: float) -> float:
    """Decrease from 1 to 0 along half a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * min(max(done, 0.0), 1.0)))


def step(done: float, milestones: Sequence[float] = (0.5, 0.75), factor: float = 0.1) -> float:
    """Multiply 1 by `factor` at every milestone passed, in the unit of `done`."""
    return factor ** sum(done >= milestone for milestone in milestones)


def warmed_up(done: float, factor: float, share: float) -> float:
    """Let a factor grow linearly from near 0 at the start of training.

    Args:
        done: share of training that is done, from 0 to 1.
        factor: value without the warm-up.
        share: share of training that the warm-up takes.
    """
    return factor * min(1.0, (done + 1e-3) / share) if share > 0 and done < share else factor


def learning_rate(recipe: Recipe, done: float, epochs: int | None = None) -> float:
    """Give a recipe's learning rate when this share of a phase is done.

    Args:
        recipe: the recipe.
        done: share of the phase that is done, from 0 to 1.
        epochs: epochs of the phase; by default all of the recipe's.
    """
    length = epochs or recipe.epochs
    steps = recipe.steps(length)
    if steps is None:
        factor = cosine(done)
    else:
        # The share of an epoch that begins may be less by rounding.
        factor = step(done * length + 1e-6, steps.epochs, steps.factor)
    return recipe.lr * warmed_up(done, factor, recipe.warmup)
