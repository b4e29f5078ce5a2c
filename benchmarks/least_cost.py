"""The least mean cost that tests of candidates leave, however good the tests are.

Candidates cost less from one to the next, so that the mean cost follows from how often candidate j
or a cheaper one is chosen. A valid rule may do that only where it can rule out, but for an error of
delta, laws under which j and all cheaper candidates lose epsilon or more. One such law is made of
the true one by the weights exp(tilt * loss of j). By Neyman and Pearson the most powerful test
between the two looks at the sum of the losses of j alone. No rule chooses j or a cheaper one more
often than this test, which knows both laws and may toss a coin, tells them apart. This holds for
every candidate that keeps epsilon.

Of candidates that do not keep it, the same tests are taken. A rule could choose the cheapest of all
whenever a coin of probability delta says so, whatever the data are. That would be valid, too, and
cost less; it is no test, and is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# losses are rounded to this part of 1
STEPS = 1000
# standard deviations of a sum that a table of its probabilities covers; beyond are 1e-15
COVERED = 16
# weights of exp(100) for a loss of 1 leave nothing of the true law
MOST_TILT = 100.0
VALUES = np.arange(-STEPS, STEPS + 1) / STEPS


@dataclass(frozen=True, slots=True)
class Tilted:
    """The losses of a candidate, and of all cheaper ones by them.

    Attributes:
        shares: probability of each of VALUES as its loss.
        others: mean loss of it and each cheaper one where its loss is so, times that probability,
            shape [I, V].
    """

    shares: np.ndarray
    others: np.ndarray

    @classmethod
    def of(cls, losses: np.ndarray, place: int) -> Tilted:
        """Count the losses of the candidate at a place of all, [J, N]."""
        bins = np.rint(losses[place] * STEPS).astype(int) + STEPS
        samples = losses.shape[1]
        # the candidate's own losses are rounded in both
        cheaper = [np.bincount(bins, each, len(VALUES)) / samples for each in losses[place + 1 :]]
        shares = np.bincount(bins, minlength=len(VALUES)) / samples
        return cls(shares, np.stack([shares * VALUES, *cheaper]))

    def least_mean(self, tilt: float) -> float:
        """Return the least mean loss of these candidates under weights exp(tilt * loss)."""
        weights = np.exp(tilt * VALUES)
        return float((self.others @ weights).min() / (self.shares @ weights))

    def tilt(self, epsilon: float) -> float | None:
        """Find weights under which none of them loses less than epsilon, if there are any."""
        if self.least_mean(MOST_TILT) < epsilon:
            return None
        low, high = -MOST_TILT, MOST_TILT
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if self.least_mean(middle) >= epsilon else (middle, high)
        return high


def power(losses: np.ndarray, place: int, *, epsilon: float, delta: float, size: int) -> float:
    """Compute how often the most powerful test lets this candidate pass.

    Args:
        losses: losses of all candidates on all samples there are, [J, N], at most 1 in size.
        place: the candidate's place.
        epsilon: most mean loss.
        delta: probability with which it may be exceeded.
        size: samples on which the rule chooses.
    """
    law = Tilted.of(losses, place)
    tilt = law.tilt(epsilon)
    if tilt is None:
        return 1.0
    weights = law.shares * np.exp(tilt * VALUES)
    true, first = sums(law.shares, size)
    other, begin = sums(weights / weights.sum(), size)
    # the test says "keeps epsilon" up to a sum, and there by a coin
    below = other.cumsum()
    cut = int(np.searchsorted(below, delta))
    before = below[cut - 1] if cut else 0.0
    share = (delta - before) / other[cut]
    place_of_cut = cut + begin - first
    if not 0 <= place_of_cut < len(true):
        return 0.0 if place_of_cut < 0 else 1.0
    return float(true[:place_of_cut].sum() + share * true[place_of_cut])


def sums(shares: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """Compute the law of a sum of losses, from that of one of them.

    Returns:
        Probabilities of sums around their mean, in steps, and the first of these sums.
    """
    mean = float(shares @ VALUES)
    deviation = math.sqrt(max(float(shares @ VALUES**2) - mean**2, 0.0) * size)
    length = 2 ** math.ceil(math.log2(max(COVERED * deviation * STEPS, 2 * len(VALUES))))
    table = np.fft.irfft(np.fft.rfft(shares, length) ** size, length).clip(0.0)
    first = round(mean * size * STEPS) - length // 2
    # place p of the table holds all sums that are p - size * STEPS, up to whole lengths
    return np.roll(table, -((first + size * STEPS) % length)), first


def least_cost(
    losses: np.ndarray,
    costs: np.ndarray,
    full_cost: float,
    *,
    epsilon: float,
    delta: float,
    size: int,
) -> float:
    """Compute the mean cost that the most powerful tests leave.

    Args:
        losses: losses of all candidates on all samples there are, [J, N].
        costs: their mean costs, falling, [J].
        full_cost: cost of the full network, which is chosen where no candidate is.
        epsilon, delta, size: see `power`.
    """
    chosen = [
        power(losses, place, epsilon=epsilon, delta=delta, size=size) for place in range(len(costs))
    ]
    # a cheaper one is chosen no more often than one that is not as cheap
    saved = np.diff(np.concatenate([[full_cost], costs]))
    return float(full_cost + (saved * np.minimum.accumulate(chosen)).sum())
