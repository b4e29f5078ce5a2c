"""Bounds on mean losses, and tests of them, from conservative to aggressive candidates.

`impatient.policies.risk` is what they are for. All work on leading dimensions, so that a thousand
splits are one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from impatient import checks
from impatient.errors import PolicyError

# losses [..., N], epsilon -> [...]
PValues = Callable[[Tensor, float], Tensor]


# A bettor who aims exactly at 1 / delta ends just below it; measured: 1.02 to 1.2 do equally well.
GOAL = 1.05


# --- p-values of "the mean loss is above epsilon" -------------------------------------------------


def binomial_p_values(losses: Float[Tensor, "*batch N"], epsilon: float) -> Float[Tensor, "*batch"]:
    """Compute exact p-values for losses that are 0 or 1.

    They are P(Binomial(N, epsilon) <= number of losses).

    Source:
        Learn then Test (Angelopoulos et al. 2021). For such losses this is below Hoeffding's tail,
        and below Bentkus' by a factor of e.
    Example:
        >>> round(float(binomial_p_values(torch.tensor([0.0] * 9 + [1.0]), 0.5)), 6)  # 11 / 1024
        0.010742
    """
    from scipy.special import bdtr

    require(bool(((losses == 0) | (losses == 1)).all()), "the binomial tail needs losses of 0 or 1")
    return torch.from_numpy(
        np.asarray(bdtr(losses.double().sum(-1).numpy(), losses.shape[-1], epsilon))
    )


def hoeffding_bentkus_p_values(
    losses: Float[Tensor, "*batch N"], epsilon: float
) -> Float[Tensor, "*batch"]:
    """Compute p-values for losses from 0 to 1, from their mean alone.

    They are the smaller of Hoeffding's and Bentkus' tails.

    Source:
        Learn then Test (Angelopoulos et al. 2021), after Bates et al. 2021 (RCPS).
    Example:
        >>> round(float(hoeffding_bentkus_p_values(torch.zeros(100), 0.02)), 6)  # 0.98 ** 100
        0.13262
    """
    from scipy.special import bdtr, rel_entr

    require(
        bool(((losses >= 0) & (losses <= 1)).all()),
        "Hoeffding's and Bentkus' inequalities need losses from 0 to 1",
    )
    count = losses.shape[-1]
    total = losses.double().sum(-1).numpy()
    mean = np.minimum(total / count, epsilon)
    hoeffding = np.exp(-count * (rel_entr(mean, epsilon) + rel_entr(1.0 - mean, 1.0 - epsilon)))
    # a sum that is whole but for rounding stays so
    bentkus = math.e * bdtr(np.ceil(total - 1e-9), count, epsilon)
    return torch.from_numpy(np.asarray(np.minimum(hoeffding, bentkus)))


def betting_p_values(
    losses: Float[Tensor, "*batch N"], epsilon: float, delta: float = 0.05
) -> Float[Tensor, "*batch"]:
    """Compute p-values for any losses of at most 1, by betting.

    Each is one over the greatest wealth of a bettor against the mean. Losses may be negative.

    With a stake s in [0, wealth] set from earlier losses, wealth changes by -s (loss - epsilon). It
    stays above 0, since loss - epsilon < 1, and does not rise on average where the mean loss is
    epsilon or more: there, it reaches 1 / p with a probability of at most p (Ville). No lower end
    of the losses is needed, so signed gaps are not rescaled to [0, 1], which would halve all
    stakes.

    Stakes are those that make it likeliest to reach 1 / delta with the last loss. They follow from
    the wealth, the losses that are left and the variance so far, and not from the mean.

    Args:
        losses: independent losses, in an order that says nothing about them.
        epsilon: the mean that is bet against, from 0 to 1.
        delta: level for which the stakes are set; p-values are valid at any other too, but hardly
            go below it.
    Source:
        Browne 1999, Reaching goals by a deadline, for the stakes; Waudby-Smith and Ramdas 2024 for
        the test, with other stakes. We differ: losses need no lower end.
    Example:
        With full stakes from the start it would be 1.05 ** -60 = 0.054.

        >>> round(float(betting_p_values(torch.zeros(60), 0.05)), 3)
        0.056
    """
    require(bool((losses <= 1).all()), "betting needs losses of at most 1")
    left, goal = losses.shape[-1], GOAL / delta
    variances = _variances_before(losses)
    gains = (epsilon - losses.double()).unbind(-1)
    wealth = torch.ones(losses.shape[:-1], dtype=torch.float64)
    best = wealth
    for gain, variance in zip(gains, variances.unbind(-1), strict=True):
        place = torch.special.ndtri((wealth / goal).clamp(1e-12, 1.0 - 1e-9))
        density = torch.exp(-place.square() / 2) / math.sqrt(2 * math.pi)
        stakes = torch.minimum(goal * density / (variance * left).sqrt(), wealth)
        # who has reached the level bets no more
        wealth = torch.where(wealth >= 1.0 / delta, wealth, wealth + stakes * gain)
        best = torch.maximum(best, wealth)
        left -= 1
    return (1.0 / best).clamp(max=1.0)


def waudby_smith_ramdas_bound(
    losses: Float[Tensor, "*batch N"], delta: float = 0.05
) -> Float[Tensor, "*batch"]:
    """Bound mean losses from above, with confidence 1 - delta.

    A bound is the least mean in [0, 1] against which betting wins 1 / delta.

    Each holds with probability 1 - delta. It adapts to the variance of the losses, and may be far
    below Hoeffding's.

    Args:
        losses: losses of at most 1, signed ones too; independent, in an order that says nothing
            about them.
        delta: probability that a bound is below its mean.
    Returns:
        Bounds from 0 to 1, to within 1e-12 above the root.
    Source:
        Waudby-Smith and Ramdas 2024, as in Bates et al. 2021 (RCPS). We differ: see
        `betting_p_values`.
    Example:
        >>> losses = torch.tensor([0.0, 0.0, 0.0, 1.0]).repeat(100)
        >>> round(float(waudby_smith_ramdas_bound(losses)), 3)
        0.306
    """
    stakes = _stakes(losses, delta)
    enough = -math.log(delta)
    low = torch.zeros(losses.shape[:-1], dtype=torch.float64)
    high = torch.where(_log_wealth(losses, low, stakes) >= enough, 0.0, torch.ones_like(low))
    # wealth does not fall with the mean bet against
    for _ in range(40):
        middle = (low + high) / 2
        wins = _log_wealth(losses, middle, stakes) >= enough
        low = torch.where(wins, low, middle)
        high = torch.where(wins, middle, high)
    return high


def _stakes(losses: Float[Tensor, "*batch N"], delta: float) -> Float[Tensor, "*batch N"]:
    """Each from the losses before it."""
    require(bool((losses <= 1).all()), "betting needs losses of at most 1")
    before = _variances_before(losses)
    return (-2 * math.log(delta) / (losses.shape[-1] * before)).sqrt().clamp(max=1.0)


def _variances_before(losses: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch N"]:
    """Estimate the variance at each loss from the losses before it."""
    x = losses.double()
    count = torch.arange(1, losses.shape[-1] + 1, dtype=torch.float64) + 1
    means = (0.5 + x.cumsum(-1)) / count
    variances = (0.25 + (x - means).square().cumsum(-1)) / count
    return torch.cat([torch.full_like(variances[..., :1], 0.25), variances[..., :-1]], -1)


def _log_wealth(
    losses: Float[Tensor, "*batch N"],
    mean: Float[Tensor, "*#batch"],
    stakes: Float[Tensor, "*batch N"],
) -> Float[Tensor, "*batch"]:
    """Find the greatest logarithm of the wealth on the way.

    It is -inf where all was lost at once.
    """
    return torch.log1p(-stakes * (losses.double() - mean[..., None])).cumsum(-1).amax(-1)


# --- which candidates pass ------------------------------------------------------------------------


def learn_then_test(
    losses: Float[Tensor, "*batch J N"],
    *,
    epsilon: float,
    delta: float = 0.05,
    p_values: PValues = hoeffding_bentkus_p_values,
) -> Bool[Tensor, "*batch J"]:
    """Accept candidates in their order until the first fails a test.

    With probability 1 - delta, the mean losses of all that are accepted are at most epsilon.

    Args:
        losses: losses of J candidates from conservative to aggressive, in an order that these
            losses had no part in. They need not be monotone.
        epsilon: most mean loss allowed.
        delta: probability that any that passes loses more.
        p_values: valid for these losses: `binomial_p_values` (0 or 1), `hoeffding_bentkus_p_values`
            (from 0 to 1) or `betting_p_values` (at most 1, signed too).
    Returns:
        True for those that pass, which are the first ones.
    Source:
        Learn then Test (Angelopoulos et al. 2021), fixed sequence testing.
    Example:
        >>> losses = torch.tensor([[0.0] * 200, [1.0] * 20 + [0.0] * 180, [0.0] * 200])
        >>> learn_then_test(losses, epsilon=0.05).tolist()
        [True, False, False]
    """
    checks.true_share(PolicyError, epsilon=epsilon, delta=delta)
    passes = p_values(losses, epsilon) <= delta
    # until the first failure
    return passes.int().cumprod(-1).bool()


def conformal_risk_control(
    losses: Float[Tensor, "*batch J N"], *, epsilon: float
) -> Bool[Tensor, "*batch J"]:
    """Accept candidates whose mean loss is at most epsilon in expectation.

    The expectation is over calibration splits, for the last one accepted.

    No statement with probability 1 - delta: on many splits, up to about half, the one chosen loses
    more than epsilon.

    Args:
        losses: losses of at most 1, of J candidates from conservative to aggressive. A candidate is
            charged, sample by sample, the greatest loss of those up to it, and at least 0, that of
            the full network: what comes of it is monotone, as the proof needs it.
        epsilon: most expected mean loss.
    Returns:
        True for those that pass, which are the first ones.
    Source:
        Angelopoulos et al. 2022, theorem 1: mean loss <= ((n + 1) epsilon - B) / n, with B = 1.
    Example:
        >>> losses = torch.tensor([[0.0] * 19, [1.0] + [0.0] * 18])
        >>> conformal_risk_control(losses, epsilon=0.05).tolist()
        [True, False]
    """
    checks.true_share(PolicyError, epsilon=epsilon)
    # room for rounding alone
    return expected_bound(losses) <= epsilon * (1 + 1e-12)


def expected_bound(losses: Float[Tensor, "*batch J N"]) -> Float[Tensor, "*batch J"]:
    """Bound mean losses from above, in expectation.

    `conformal_risk_control` compares these bounds with epsilon.
    """
    require(bool((losses <= 1).all()), "conformal risk control needs losses of at most 1")
    charged = losses.double().cummax(-2).values.clamp(min=0.0)
    return (charged.sum(-1) + 1) / (losses.shape[-1] + 1)


def require(holds: bool, need: str) -> None:
    """Raise PolicyError unless losses are what a method needs."""
    if not holds:
        raise PolicyError(f"{need}; others were given. Scale them, or take another method.")
