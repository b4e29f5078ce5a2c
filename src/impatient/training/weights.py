"""Static exit weights: L exits to L loss weights, shallowest first, the last exit's weight always
1.

`rescaled` gives any of them another sum or another share of the last exit; `every` and `spread` are
for networks of which only some exits predict. Weights that follow from time budgets come from
`impatient.exit_weights`, weights that change while training from `impatient.training.balancing`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from impatient.errors import TrainingError

Total = Literal["as_is", "last", "all", "log"]
TOTALS: tuple[str, ...] = get_args(Total)


def const(count: int) -> tuple[float, ...]:
    """Every exit weighs 1. Source: CONST of Anytime Neural Networks (ANN)."""
    return (1.0,) * _positive(count)


def linear(count: int) -> tuple[float, ...]:
    """From 1/4 at the first exit to 1 at the last, in equal steps. Source: LINEAR of ANN, as in the
    authors' code.
    """
    if _positive(count) == 1:
        return (1.0,)
    return tuple(0.25 + 0.75 * index / (count - 1) for index in range(count))


def half_end(count: int) -> tuple[float, ...]:
    """Half of the total weight on the last exit, the rest spread evenly. Source: HALF-END of ANN."""
    if _positive(count) == 1:
        return (1.0,)
    return (*(1.0 / (count - 1) for _ in range(count - 1)), 1.0)


def sieve(count: int) -> tuple[float, ...]:
    """Heavier at the halves, then the quarters, then the eighths, ... of the depth; half of the
    total on the last exit.

    Starting from zeros, for p = 2, 4, 8, ... add 1 at every position round(k L / p), 0 < k < p
    (1-based, halves rounded up), until all early positions are positive.

    Source:
        SIEVE of ANN, section 3; the text's formula, not the authors' code, whose two variants
        differ from it off powers of two.
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

    Where L is a power of two, the first L / 2**k exits, two at least, hold at least 2**-k of the
    early weight.

    Source:
        EXP-LIN of ANN, identified with `recursive_heavy_end` of the authors' code.
    """
    if _positive(count) == 1:
        return (1.0,)
    weights = [1.0] * count
    place = count - 1
    mass = float(count)
    while True:
        weights[place] += mass
        if place == 0:
            break
        place = place // 2
        mass = mass / 2
    weights[3 * count // 4 - 1] += count / 8
    early = sum(weights[:-1])
    return (*(weight / early for weight in weights[:-1]), 1.0)


def inverse_square(count: int) -> tuple[float, ...]:
    """1 / (L - j + 1)**2 for the j-th exit. Source: AnytimeNet, equation 3, whose lower summation
    index is 1.
    """
    _positive(count)
    return tuple(1.0 / (count - index) ** 2 for index in range(count))


def rescaled(
    weights: Sequence[float], *, last_to_early: float | None = None, total: Total = "as_is"
) -> tuple[float, ...]:
    """The same early weights among themselves, with another share of the last exit or another sum.

    A sum is a learning rate in disguise; two schemes are comparable only under the same convention.

    Args:
        weights: of any scheme, length L.
        last_to_early: the last exit's weight over the sum of all others, positive; None leaves it.
            A single exit has no others and stays as it is.
        total: "as_is"; "last", so that the last exit weighs 1; "all", so that the sum is 1; "log",
            so that it is log2(L + 1).
    Raises:
        TrainingError: if that is impossible, because what is to be scaled weighs nothing.
    Source:
        Anytime Neural Networks, the authors' `last_weight_to_early_sum` and normalisations, of
        which "last" "seems to work the best".
    Example:
        >>> rescaled(sieve(4), last_to_early=2.0)
        (0.25, 0.5, 0.25, 2.0)
        >>> rescaled(const(3), total="log")
        (0.6666666666666666, 0.6666666666666666, 0.6666666666666666)
    """
    made = check_weights(weights, len(weights))
    if total not in TOTALS:
        raise TrainingError(f"total={total!r}; expected one of {', '.join(TOTALS)}.")
    if last_to_early is not None and len(made) > 1:
        if not 0.0 < last_to_early < math.inf:
            raise TrainingError(
                f"last_to_early={last_to_early}; expected a positive number, such as 1."
            )
        made = (*made[:-1], last_to_early * _not_zero(sum(made[:-1]), "the early exits", made))
    if total == "as_is":
        return made
    unit = _not_zero(made[-1], "the last exit", made) if total == "last" else sum(made)
    wanted = math.log2(len(made) + 1) if total == "log" else 1.0
    return tuple(wanted * weight / unit for weight in made)


def every(count: int, period: int) -> tuple[int, ...]:
    """The exits, from 0, that predict when only one in `period` does; the last always does.

    Source:
        Anytime Neural Networks, "stack-s": 1 + (L - 1) // s predictors.
    Example:
        >>> every(8, 3)
        (1, 4, 7)
    """
    if period < 1:
        raise TrainingError(f"one exit in {period} is to predict; expected a period of at least 1.")
    return tuple(range((_positive(count) - 1) % period, count, period))


def spread(weights: Sequence[float], exits: Sequence[int], count: int) -> tuple[float, ...]:
    """The weights of some exits among all; the others weigh 0.

    Args:
        weights: one per exit that predicts.
        exits: which ones these are, from 0, in any order, such as `every` gives.
        count: of all exits.
    Raises:
        TrainingError: if the numbers do not agree, or an exit is named twice or does not exist.
    Example:
        >>> spread(half_end(3), every(8, 3), 8)
        (0.0, 0.5, 0.0, 0.0, 0.5, 0.0, 0.0, 1.0)
    """
    if len(set(exits)) != len(exits) or not all(0 <= exit < count for exit in exits):
        raise TrainingError(f"exits {tuple(exits)}; expected different ones from 0 to {count - 1}.")
    given = dict(zip(exits, check_weights(weights, len(exits)), strict=True))
    return tuple(given.get(index, 0.0) for index in range(count))


def only(exit: int, count: int) -> tuple[float, ...]:
    """All weight on one exit, from 0. Source: OPT of ANN, a network trained for exactly one depth."""
    return spread((1.0,), (exit,), _positive(count))


def parse_weights(text: str, count: int) -> tuple[float, ...]:
    """Read exit weights from one word: a static scheme or numbers, and after a colon what
    `rescaled` takes.

    Args:
        text: such as "sieve", "1,0.5,1" or "sieve:last_to_early=2,total=all".
        count: of the exits.
    Raises:
        TrainingError: if the text is neither, or does not fit the number of exits.
    Example:
        >>> parse_weights("half_end:total=all", 3)
        (0.25, 0.25, 0.5)
        >>> parse_weights("1,0.5,1", 3)
        (1.0, 0.5, 1.0)
    """
    scheme, colon, rest = text.partition(":")
    options = dict(part.split("=", 1) for part in rest.split(",") if "=" in part)
    if colon and (
        len(options) != len(rest.split(",")) or not set(options) <= {"last_to_early", "total"}
    ):
        raise TrainingError(
            f"cannot read the options of the exit weights {text!r}; expected last_to_early=NUMBER "
            f"and total=one of {', '.join(TOTALS)}, separated by commas, such as "
            "sieve:last_to_early=2,total=all."
        )
    try:
        made = (
            STATIC[scheme](count)
            if scheme in STATIC
            else [float(part) for part in scheme.split(",")]
        )
        ratio = float(options["last_to_early"]) if "last_to_early" in options else None
    except ValueError as error:
        raise TrainingError(
            f"cannot read {text!r} as exit weights ({error}); expected one of {', '.join(STATIC)}, "
            f"or {count} numbers separated by commas, such as 1,0.5,1."
        ) from error
    return rescaled(
        check_weights(made, count),
        last_to_early=ratio,
        total=options.get("total", "as_is"),  # type: ignore[arg-type]
    )


def check_weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """Return the weights as floats if they are K finite, non-negative numbers, not all zero.

    Raises:
        TrainingError: otherwise.
    """
    values = tuple(float(weight) for weight in weights)
    if len(values) != count:
        raise TrainingError(
            f"{len(values)} exit weights for {count} exits; give one per exit, shallowest first."
        )
    if not all(math.isfinite(value) and value >= 0.0 for value in values) or not any(values):
        raise TrainingError(
            f"exit weights {values} must be finite and not negative, and one must be positive."
        )
    return values


def _positive(count: int) -> int:
    if count < 1:
        raise TrainingError(f"{count} exits; expected at least 1.")
    return count


def _not_zero(weight: float, whose: str, weights: tuple[float, ...]) -> float:
    if weight <= 0.0:
        raise TrainingError(
            f"cannot rescale the exit weights {weights}: the weight of {whose} is 0; leave this "
            "option out."
        )
    return weight


STATIC = {
    "uniform": const,
    "const": const,
    "linear": linear,
    "half_end": half_end,
    "sieve": sieve,
    "exp_lin": exp_lin,
    "inverse_square": inverse_square,
}
