"""Static exit weights: schemes that map L exits to L loss weights.

The weights are listed shallowest exit first, and the last exit always weighs 1. `rescaled` gives
them another sum or another share of the last exit. `every` and `spread` are for networks in which
only some exits predict. Weights that follow from time budgets come from `impatient.exit_weights`;
weights that change during training come from `impatient.training.balancing`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from impatient import checks
from impatient.errors import TrainingError

Total = Literal["as_is", "last", "all", "log"]
TOTALS: tuple[str, ...] = get_args(Total)


def const(count: int) -> tuple[float, ...]:
    """Weigh every exit 1.

    Source:
        CONST of Anytime Neural Networks (ANN).
    """
    return (1.0,) * _positive(count)


def linear(count: int) -> tuple[float, ...]:
    """Increase the weight in equal steps from 1/4 to 1.

    Source:
        LINEAR of ANN, as in the authors' code.
    """
    if _positive(count) == 1:
        return (1.0,)
    return tuple(0.25 + 0.75 * index / (count - 1) for index in range(count))


def half_end(count: int) -> tuple[float, ...]:
    """Put half of the weight on the last exit and spread the rest.

    Source:
        HALF-END of ANN.
    """
    if _positive(count) == 1:
        return (1.0,)
    return (*(1.0 / (count - 1) for _ in range(count - 1)), 1.0)


def sieve(count: int) -> tuple[float, ...]:
    """Weigh the halves of the depth most, then quarters, eighths and so on.

    Starting from zeros, for p = 2, 4, 8, ... add 1 at every position round(k L / p), 0 < k < p
    (1-based, halves rounded up), until all early positions are positive. The last exit gets half of
    the total weight.

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
    """Weigh every exit 1, plus L / 2**k at position L / 2**k.

    The last exit gets half of the total weight. Where L is a power of two, the first L / 2**k exits
    (at least two) hold at least 2**-k of the early weight.

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
    """Weigh the j-th exit 1 / (L - j + 1)**2.

    Source:
        AnytimeNet, equation 3, whose lower summation index is 1.
    """
    _positive(count)
    return tuple(1.0 / (count - index) ** 2 for index in range(count))


def rescaled(
    weights: Sequence[float], *, last_to_early: float | None = None, total: Total = "as_is"
) -> tuple[float, ...]:
    """Change the last exit's share or the sum of exit weights.

    The ratios among the early weights stay as they are. The sum of the weights acts like a learning
    rate, so two schemes are comparable only under the same convention.

    Args:
        weights: exit weights of any scheme, length L.
        last_to_early: positive ratio of the last exit's weight to the sum of all others; None
            leaves it as it is. A single exit has no others and keeps its weight.
        total: what the weights are scaled to. "as_is" scales nothing, "last" makes the last exit
            weigh 1, "all" makes the sum 1, and "log" makes the sum log2(L + 1).
    Raises:
        TrainingError: if the weights to be scaled are 0.
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
    checks.one_of(TrainingError, TOTALS, total=total)
    if last_to_early is not None and len(made) > 1:
        checks.positive(TrainingError, last_to_early=last_to_early)
        made = (*made[:-1], last_to_early * _not_zero(sum(made[:-1]), "the early exits", made))
    if total == "as_is":
        return made
    unit = _not_zero(made[-1], "the last exit", made) if total == "last" else sum(made)
    wanted = math.log2(len(made) + 1) if total == "log" else 1.0
    return tuple(wanted * weight / unit for weight in made)


def every(count: int, period: int) -> tuple[int, ...]:
    """Return the exits that predict when only one in `period` does.

    Exits are counted from 0. The last exit always predicts.

    Source:
        Anytime Neural Networks, "stack-s": 1 + (L - 1) // s predictors.
    Example:
        >>> every(8, 3)
        (1, 4, 7)
    """
    checks.at_least(TrainingError, 1, period=period)
    return tuple(range((_positive(count) - 1) % period, count, period))


def spread(weights: Sequence[float], exits: Sequence[int], count: int) -> tuple[float, ...]:
    """Extend the weights of some exits to all exits with zeros.

    Args:
        weights: weight of each exit that predicts.
        exits: indices of the exits that predict, from 0, in any order, such as `every` returns.
        count: number of all exits.
    Raises:
        TrainingError: if the counts do not agree, or an exit is named twice or does not exist.
    Example:
        >>> spread(half_end(3), every(8, 3), 8)
        (0.0, 0.5, 0.0, 0.0, 0.5, 0.0, 0.0, 1.0)
    """
    if len(set(exits)) != len(exits) or not all(0 <= exit < count for exit in exits):
        raise TrainingError(f"exits {tuple(exits)}; expected different ones from 0 to {count - 1}.")
    given = dict(zip(exits, check_weights(weights, len(exits)), strict=True))
    return tuple(given.get(index, 0.0) for index in range(count))


def only(exit: int, count: int) -> tuple[float, ...]:
    """Put all weight on one exit, counted from 0.

    Source:
        OPT of ANN, a network trained for exactly one depth.
    """
    return spread((1.0,), (exit,), _positive(count))


def parse_weights(text: str, count: int) -> tuple[float, ...]:
    """Read exit weights from the name of a static scheme or from numbers.

    Args:
        text: a scheme or comma-separated numbers, with options of `rescaled` after a colon, such as
            "sieve", "1,0.5,1" or "sieve:last_to_early=2,total=all".
        count: number of exits.
    Raises:
        TrainingError: if the text cannot be read or does not fit the number of exits.
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
            f"adaloss, or {count} numbers separated by commas, such as 1,0.5,1."
        ) from error
    return rescaled(
        check_weights(made, count),
        last_to_early=ratio,
        total=options.get("total", "as_is"),  # type: ignore[arg-type]
    )


def check_weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """Return exit weights as floats after checking them.

    Raises:
        TrainingError: if they are not `count` finite, non-negative numbers, or all are 0.
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
