"""The metrics of Anytime Neural Networks.

They are errors at shares of the cost against OPT, and how often one scheme wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from impatient.costs import check_increasing
from impatient.errors import RecordingError

QUARTERS = (0.25, 0.5, 0.75, 1.0)


def error_at(
    costs: Sequence[float], errors: Sequence[float], at: Sequence[float]
) -> tuple[float, ...]:
    """Return the error of an anytime curve at given costs.

    It is interpolated linearly between the two neighbouring predictions.

    Args:
        costs: cumulative cost of each prediction, in any one unit, strictly increasing, length K.
        errors: share of wrong answers of each prediction, in [0, 1].
        at: costs in the same unit, length M.
    Returns:
        M errors. Before the first prediction there is no answer, which counts as wrong: 1. After
        the last, its error.
    Raises:
        CostOrderError: if the costs do not increase strictly.
        RecordingError: if the errors are not as many shares.
    Source:
        Anytime Neural Networks, sec. 4 ("bi-linearly interpolated"). We differ: the paper's
        milestones never lie before the first prediction, so what to do there is our choice; it is
        that of `expected_accuracy`.
    Example:
        >>> error_at([1.0, 2.0, 4.0], [0.5, 0.25, 0.125], at=[0.5, 1.5, 3.0, 9.0])
        (1.0, 0.375, 0.1875, 0.125)
    """
    known = check_increasing(costs)
    return tuple(np.interp(at, known, _checked(errors, len(known)), left=1.0).tolist())


def opt_plus(
    collections: Sequence[tuple[Sequence[float], Sequence[float]]], at: Sequence[float]
) -> tuple[float, ...]:
    """Return OPT+, the least error of any network that costs no more.

    What an ensemble of anytime networks is compared with: networks of several widths and depths,
    each trained for itself.

    Args:
        collections: pairs of costs and errors, in any order of cost; one pair per family of
            networks.
        at: costs in the same unit, length M.
    Returns:
        M errors, never rising with cost; 1 where no network is cheap enough. Networks cannot be
        interpolated: steps.
    Raises:
        RecordingError: if there is no network, or errors and costs do not fit.
    Source:
        Anytime Neural Networks, OPT+ in the experiments on EANN.
    Example:
        >>> opt_plus([([1.0, 4.0], [0.5, 0.2]), ([3.0, 2.0], [0.1, 0.3])], at=[0.5, 1.0, 2.5, 9.0])
        (1.0, 0.5, 0.3, 0.1)
    """
    pairs = [
        pair
        for costs, errors in collections
        for pair in zip(costs, _checked(errors, len(costs)), strict=True)
    ]
    if not pairs or not all(math.isfinite(cost) and cost > 0 for cost, _ in pairs):
        raise RecordingError(
            "OPT+ needs at least one separately trained network, each with a positive finite cost."
        )
    costs, errors = np.array(sorted(pairs)).T
    least = np.concatenate([[1.0], np.minimum.accumulate(errors)])
    return tuple(least[np.searchsorted(costs, at, side="right")].tolist())


def relative_increase(errors: Sequence[float], reference: Sequence[float]) -> tuple[float, ...]:
    """Compute by how many per cent errors exceed those of a reference.

    It is negative where they are lower.

    Where the reference makes no error, it is 0 if there is none here either, else infinite.

    Example:
        >>> relative_increase([0.375, 0.125, 0.0], [0.25, 0.25, 0.0])
        (50.0, -50.0, 0.0)
    """
    known = _checked(errors, len(reference))
    return tuple(
        100.0 * (own - other) / other if other > 0 else (math.inf if own > 0 else 0.0)
        for own, other in zip(known, _checked(reference, len(known)), strict=True)
    )


def milestones(
    costs: Sequence[float],
    errors: Sequence[float],
    opt_costs: Sequence[float],
    opt_errors: Sequence[float],
    *,
    at: Sequence[float] = QUARTERS,
) -> tuple[float, ...]:
    """Compute the relative increase of an anytime network's error over OPT.

    It is in per cent, at shares of the network's complete cost.

    OPT are networks trained separately, each for one depth alone: what an anytime network would be
    if its losses did not get into each other's way. Average over networks and data sets for the
    paper's table.

    Args:
        costs, errors: of the anytime network's predictions, as in `error_at`.
        opt_costs, opt_errors: of the separately trained networks, shallow to deep; interpolated
            likewise.
        at: shares of the last prediction's cost.
    Returns:
        One number per share.
    Raises:
        CostOrderError: if costs do not increase strictly.
        RecordingError: if a milestone lies before OPT's first network, so that there is nothing to
            compare with.
    Source:
        Anytime Neural Networks, the table of relative increases over OPT; 1/4, 1/2, 3/4 and 1 of
        the cost.
    Example:
        >>> opt = {"opt_costs": [1, 2, 4], "opt_errors": [0.5, 0.25, 0.25]}
        >>> milestones([1, 2, 3, 4], [0.5, 0.5, 0.25, 0.25], **opt)
        (0.0, 100.0, 0.0, 0.0)
    """
    whole = check_increasing(costs)[-1]
    first = check_increasing(opt_costs)[0]
    places = [share * whole for share in at]
    early = [place for place in places if place < first]
    if early:
        raise RecordingError(
            f"the milestone at cost {early[0]:g} lies before OPT's first network ({first:g}); "
            "train a network for that depth or a smaller one, or ask for later milestones."
        )
    return relative_increase(
        error_at(costs, errors, places), error_at(opt_costs, opt_errors, places)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """How often one scheme beats another, and how sure that is, by Hoeffding's inequality.

    The bounds hold for independent pairs. Milestones of one network, or seeds of one data set, are
    not quite that: with such pairs read them as too confident.

    Attributes:
        wins: pairs with the smaller error.
        ties: pairs with equal errors; each counts half.
        pairs: all of them, n.
        delta: chance that the true rate is below `low`.
    """

    wins: int
    ties: int
    pairs: int
    delta: float = 0.05

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.wins < 0 or self.ties < 0 or self.wins + self.ties > self.pairs:
            raise RecordingError(
                f"{self.wins} wins and {self.ties} ties of {self.pairs} pairs; expected at least "
                "one pair."
            )
        if not 0.0 < self.delta < 1.0:
            raise RecordingError(
                f"delta={self.delta}; expected the chance of an error, between 0 and 1, such as "
                "0.05."
            )

    @property
    def rate(self) -> float:
        """Share of pairs won."""
        return (self.wins + self.ties / 2) / self.pairs

    @property
    def low(self) -> float:
        """Lower confidence bound of the true rate, at 1 - delta."""
        return max(0.0, self.rate - math.sqrt(-math.log(self.delta) / (2 * self.pairs)))

    @property
    def p_value(self) -> float:
        """Bound the probability of winning this often if each pair were a fair coin.

        It is 1 for half of the pairs or fewer.
        """
        return math.exp(-2 * self.pairs * max(0.0, self.rate - 0.5) ** 2)


def win_rate(ours: Sequence[float], theirs: Sequence[float], *, delta: float = 0.05) -> WinRate:
    """Compare two schemes over (network, data set, milestone) pairs.

    The schemes are, for example, alternating and static weights.

    Args:
        ours, theirs: errors, or relative increases of errors, of the same pairs in the same order;
            lower wins.
        delta: chance of error of the lower confidence bound.
    Raises:
        RecordingError: if there is no pair, or one without a partner, or one that is not a number.
    Source:
        Anytime Neural Networks, the comparison of AANN with static weights. We differ: the paper
        does not say what it does with ties.
    Example:
        >>> won = win_rate([0.10, 0.20, 0.30, 0.40], [0.11, 0.21, 0.30, 0.39])
        >>> won.rate, round(won.low, 3), round(won.p_value, 3)
        (0.625, 0.013, 0.882)
    """
    if (
        len(ours) != len(theirs)
        or len(ours) == 0
        or any(math.isnan(error) for error in (*ours, *theirs))
    ):
        raise RecordingError(
            f"{len(ours)} errors against {len(theirs)}; expected pairs, at least one, in the same "
            "order and without NaN."
        )
    wins = sum(own < other for own, other in zip(ours, theirs, strict=True))
    ties = sum(own == other for own, other in zip(ours, theirs, strict=True))
    return WinRate(wins=wins, ties=ties, pairs=len(ours), delta=delta)


def _checked(errors: Sequence[float], count: int) -> tuple[float, ...]:
    """Return errors as floats after checking that they are `count` shares."""
    known = tuple(float(error) for error in errors)
    if len(known) != count or not all(0.0 <= error <= 1.0 for error in known):
        raise RecordingError(
            f"errors {known} for {count} costs; expected one share of wrong answers, in [0, 1], "
            "for each."
        )
    return known
