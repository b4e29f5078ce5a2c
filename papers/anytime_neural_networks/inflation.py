"""What an ensemble of growing depth (EANN) costs over the network made for the budget.

Networks of depth 1, b, b², ... run from a queue, shallow to deep, on M workers; an idle worker
takes the next. A network of depth L answers, from a share r of its depth on, as well as the best
network made for the depth it has come to. Whoever knew the budget B would spend all of it on one
network of depth B; the ensemble's answer is that of a network of depth B / C(B). C is the
**inflation** of cost.

A budget is time on the wall, counted in the time one worker takes for one unit of depth. With M
workers M times as much is computed in it, and the comparison is still with one network on one
worker: C falls with M because the work of others is not counted. All workers are equally fast,
whoever else works: true for M cores, not for M threads on one core or one GPU.

All numbers are for the steady state, after many networks; the first few start earlier, and have
less inflation.
"""

from __future__ import annotations

import math

from impatient.errors import CostError


def sup(base: float, *, competitive_from: float | None = None, workers: int = 1) -> float:
    """Largest inflation over all budgets: b / (b^M - 1) + max(r b, 1).

    Args:
        base: b, the growth of depth from one network to the next, above 1.
        competitive_from: r, the share of its depth from which on a network answers as well as one
            made for that depth, in (0, 1]; a share below 1/b does no better than 1/b, because the
            network before has come further. By default 1/b.
        workers: M.
    Returns:
        The supremum: reached in the limit just before a network becomes competitive.
    Raises:
        CostError: if there is no such ensemble.
    Source:
        EANN (Hu et al.), proposition, for r = 1/b and M = 1. General r and M are ours: network k
        begins at b^k / (b^M - 1).
    Example:
        >>> sup(2.0), sup(2.0, competitive_from=1.0), sup(2.0, workers=2)
        (3.0, 4.0, 1.6666666666666665)
    """
    share = _share(base, competitive_from, workers)
    return base * _begin(base, workers) + share * base


def mean(base: float, *, competitive_from: float | None = None, workers: int = 1) -> float:
    """Compute the mean inflation over uniform budgets.

    They go from 0 to the moment at which a worker takes a new network.

    Over budgets up to another moment it differs a little: C(B) repeats in every step from B to b B,
    and is not constant.

    Args:
        base, competitive_from, workers: as for `sup`.
    Returns:
        The mean; for M = 1 it is b (r / (b - 1) + r² / 2) + ln(1 / r) / (b - 1) + 1 - r.
    Raises:
        CostError: if there is no such ensemble.
    Source:
        EANN (Hu et al.), proposition, for r = 1/b and M = 1. General r and M are ours.
    Example:
        >>> round(mean(2.0), 3), round(mean(2.0, competitive_from=1.0), 3)
        (2.443, 3.0)
        >>> round(mean(2.0, workers=2), 3)
        1.472
    """
    share = _share(base, competitive_from, workers)
    begin = _begin(base, workers)
    # A cycle lasts from the moment at which the network of depth 1 becomes competitive to that of
    # the next. The cycles before are the same but smaller, each by b, so all of them together are 1
    # / (b - 1) of one.
    first = begin + share
    before = _integral(first, base * first, begin) / (base - 1.0)
    # the moment within that cycle when one is taken
    end = begin * base ** math.ceil(math.log(first / begin, base))
    return (before + _integral(first, end, begin)) / end


def ann_sup(base: float) -> float:
    """Compute the largest inflation of anytime networks, 2 + 1 / (b - 1).

    These networks are competitive from 1/b of their depth on.
    """
    return sup(base)


def ann_mean(base: float) -> float:
    """Compute the mean inflation of these anytime networks.

    It is 1 - 1 / (2b) + (1 + ln b) / (b - 1).
    """
    return mean(base)


def plain_sup(base: float) -> float:
    """Compute the largest inflation of plain networks, b² / (b - 1).

    Plain networks answer only at their end. The least value is 4, with b = 2.
    """
    return sup(base, competitive_from=1.0)


def plain_mean(base: float) -> float:
    """Compute the mean inflation of plain networks.

    It is 1 + 1 / (b - 1) + b / 2. The least value is 1.5 + sqrt 2, with b = 1 + sqrt 2.

    The least value is 1.5 + sqrt 2, with b = 1 + sqrt 2.
    """
    return mean(base, competitive_from=1.0)


def _share(base: float, competitive_from: float | None, workers: int) -> float:
    """From which share of its depth on a network's answer is the ensemble's."""
    _checked_base(base, workers)
    return (
        1.0 / base
        if competitive_from is None
        else max(_checked_share(competitive_from), 1.0 / base)
    )


def _checked_base(base: float, workers: int) -> None:
    if not 1.0 < base < math.inf or workers < 1:
        raise CostError(
            f"base {base} and {workers} workers; expected a base above 1, such as 2.0, and at "
            "least 1 worker."
        )


def _checked_share(competitive_from: float) -> float:
    if not 0.0 < competitive_from <= 1.0:
        raise CostError(
            f"competitive_from={competitive_from}; expected a share of the network's depth, (0, 1]."
        )
    return competitive_from


def _begin(base: float, workers: int) -> float:
    """Return when the network of depth 1 begins, in the steady state.

    It begins at the end of the network M places before it.
    """
    return 1.0 / (base**workers - 1.0)


def _integral(since: float, until: float, begin: float) -> float:
    """Integrate the inflation within the cycle of the network of depth 1.

    The cycle starts when that network becomes competitive.
    """
    running_until = min(until, begin + 1.0)
    running = running_until - since + begin * math.log((running_until - begin) / (since - begin))
    return running + max(0.0, until**2 - (begin + 1.0) ** 2) / 2.0
