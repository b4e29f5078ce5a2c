"""Static exit weights: L exits to L loss weights, shallowest first, the last exit's weight always 1.

Weights that follow from time budgets come from `impatient.exit_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from impatient.errors import TrainingError


def const(count: int) -> tuple[float, ...]:
    """Every exit weighs 1. Source: CONST of Anytime Neural Networks (ANN)."""
    return (1.0,) * _positive(count)


def linear(count: int) -> tuple[float, ...]:
    """From 1/4 at the first exit to 1 at the last, in equal steps. Source: LINEAR of ANN, as in the authors' code."""
    if _positive(count) == 1:
        return (1.0,)
    return tuple(0.25 + 0.75 * index / (count - 1) for index in range(count))


def half_end(count: int) -> tuple[float, ...]:
    """Half of the total weight on the last exit, the rest spread evenly. Source: HALF-END of ANN."""
    if _positive(count) == 1:
        return (1.0,)
    return (*(1.0 / (count - 1) for _ in range(count - 1)), 1.0)


def sieve(count: int) -> tuple[float, ...]:
    """Heavier at the halves, then the quarters, then the eighths, ... of the depth; half of the total on the last exit.

    Starting from zeros, for p = 2, 4, 8, ... add 1 at every position round(k L / p), 0 < k < p (1-based, halves rounded
    up), until all early positions are positive.

    Source:
        SIEVE of ANN, section 3; the text's formula, not the authors' code, whose two variants differ from it off powers
        of two.
    Example:
        >>> [round(26 * weight) for weight in sieve(16)[:-1]]
        [1, 2, 1, 3, 1, 2, 1, 4, 1, 2, 1, 3, 1, 2, 1]
    """
    if _positive(count) == 1:
        return (1.0,)
    early = [0] * (count - 1)
    parts = 2
    while 0 in early:
        for index in range(1, parts):
            place = math.floor(index * count / parts + 0.5)
            if 1 <= place < count:
                early[place - 1] += 1
        parts *= 2
    return (*(weight / sum(early) for weight in early), 1.0)


def exp_lin(count: int) -> tuple[float, ...]:
    """One everywhere plus L, L/2, L/4, ... at L, L/2, L/4, ...; half of the total on the last exit.

    Where L is a power of two, the first L / 2**k exits, two at least, hold at least 2**-k of the early weight.

    Source:
        EXP-LIN of ANN, identified with `recursive_heavy_end` of the authors' code.
    """
    if _positive(count) == 1:
        return (1.0,)
    weights = [1.0] * count
    place, mass = count - 1, float(count)
    while True:
        weights[place] += mass
        if place == 0:
            break
        place, mass = place // 2, mass / 2
    weights[3 * count // 4 - 1] += count / 8
    early = sum(weights[:-1])
    return (*(weight / early for weight in weights[:-1]), 1.0)


def inverse_square(count: int) -> tuple[float, ...]:
    """1 / (L - j + 1)**2 for the j-th exit. Source: AnytimeNet, equation 3, whose lower summation index is 1."""
    _positive(count)
    return tuple(1.0 / (count - index) ** 2 for index in range(count))


def check_weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """Return the weights as floats if they are K finite, non-negative numbers, not all zero.

    Raises:
        TrainingError: otherwise.
    """
    values = tuple(float(weight) for weight in weights)
    if len(values) != count:
        raise TrainingError(f"{len(values)} exit weights for {count} exits; give one per exit, shallowest first.")
    if not all(math.isfinite(value) and value >= 0.0 for value in values) or not any(values):
        raise TrainingError(f"exit weights {values} must be finite and not negative, and one must be positive.")
    return values


def _positive(count: int) -> int:
    if count < 1:
        raise TrainingError(f"{count} exits; needed: at least 1.")
    return count


STATIC = {
    "uniform": const, "const": const, "linear": linear, "half_end": half_end, "sieve": sieve, "exp_lin": exp_lin,
    "inverse_square": inverse_square,
}  # fmt: skip
