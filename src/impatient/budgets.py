"""Distributions p(t) over time budgets, and the two sides of one integral.

`exit_weights` gives the probability that each exit is the deepest one that a random budget can pay
for. Training with these weights minimises the expected loss of the answer that a caller receives.
`expected_accuracy` is the same sum over accuracies. `exit_weights_many` computes the weights of
thousands of budgets at once.

A budget is a time, or a number of multiply-accumulates, bytes or joules. It is compared with costs
of the same kind.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from impatient import checks
from impatient.clock import positive_seconds
from impatient.costs import UNITS, Cost, check_positive
from impatient.errors import BudgetError
from impatient.store import Stored

# E-folds of the exponential across the range. The paper Impatient DNNs gives no parameters. Its row
# means (0.26 T for small budgets likely, 0.905 T for large) are far steeper than a linear ramp, and
# close to this.
STEEPNESS = 4.0


# What stands for no limit, of any cost: sums of it are finite.
UNLIMITED = 1e300


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget(Stored, made_by="impatient.budgets"):
    """A distribution over budgets.

    Make one with a function of this module: `uniform`, `small_likely`, `large_likely`, `normal`,
    `log_uniform`, `point`, `empirical`. Where seconds are named here, a budget of another cost is
    in the unit of that cost.

    Attributes:
        shape: name of the function that makes such a budget.
        low: smallest budget, seconds.
        high: largest budget, seconds.
        samples_s: all budgets of a log in order, seconds; empty for a distribution with a formula.
        cost: what is limited.
    """

    shape: str
    low: float
    high: float
    samples_s: tuple[float, ...] = ()
    cost: Cost = "time"

    def __post_init__(self) -> None:
        checks.one_of(BudgetError, (*_SHAPES, *_LISTED), shape=self.shape)
        checks.one_of(BudgetError, Cost, cost=self.cost)
        span = f"{self.low} to {self.high} s"
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise BudgetError(
                f"budget range {span} is not finite; give seconds, such as 0.0 to 0.010."
            )
        if not 0.0 <= self.low <= self.high or self.high <= 0.0:
            raise BudgetError(
                f"budget range {span} is empty or negative; expected 0 <= low < high, in seconds."
            )
        ends = (self.samples_s[0], self.samples_s[-1]) if self.samples_s else None
        if self.shape in _LISTED:
            in_order = list(self.samples_s) == sorted(self.samples_s)
            if ends != (self.low, self.high) or not in_order or self.low == 0.0:
                raise BudgetError(
                    f"a budget of shape {self.shape} needs its samples in order; use point() or "
                    "empirical()."
                )
        elif ends or self.low == self.high or (self.shape == "log_uniform" and self.low == 0.0):
            raise BudgetError(
                f"no budget of shape {self.shape} has the range {span} and samples {ends}."
            )

    @overload
    def probability_below(self, time_s: float) -> float: ...
    @overload
    def probability_below(self, time_s: np.ndarray) -> np.ndarray: ...
    def probability_below(self, time_s: float | np.ndarray) -> float | np.ndarray:
        """Return P(budget < time_s).

        It is strictly below, so that a budget of exactly an exit's cost pays for this exit.

        Args:
            time_s: one time, or an array of any shape.
        Returns:
            One probability, or an array of the same shape.
        """
        times = np.asarray(time_s, dtype=np.float64)
        below = _all_below([self], times.ravel()).reshape(times.shape)
        return below if times.ndim else float(below)

    def mean_s(self) -> float:
        """Return the mean budget, seconds."""
        if self.samples_s:
            return float(np.mean(self.samples_s))
        return _SHAPES[self.shape].mean(self.low, self.high)

    def density(self, times_s: np.ndarray) -> np.ndarray:
        """Return the probability density at some times, 1/s, for plots.

        Empirical and point budgets have no density and give zeros.
        """
        if self.samples_s:
            return np.zeros_like(times_s)
        inside = (times_s >= self.low) & (times_s <= self.high)
        times = np.clip(times_s, self.low, self.high)
        density = _SHAPES[self.shape].density(times, self.low, self.high)
        return np.asarray(np.where(inside, density, 0.0))

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """Draw budgets, seconds, shape [count]."""
        random = np.random.default_rng(seed)
        if self.samples_s:
            return random.choice(np.asarray(self.samples_s), size=count)
        drawn = _SHAPES[self.shape].quantile(random.random(count), self.low, self.high)
        return np.asarray(np.clip(drawn, self.low, self.high))


class _Shape(NamedTuple):
    """A distribution from low to high in closed form.

    A distribution of scipy takes a millisecond to set up.
    """

    # P(budget < time) for times from low to high.
    below: Callable[[np.ndarray, Any, Any], np.ndarray]
    density: Callable[[np.ndarray, float, float], np.ndarray]
    mean: Callable[[float, float], float]
    # The inverse of `below`.
    quantile: Callable[[np.ndarray, float, float], np.ndarray]


def _share(times: np.ndarray, low: Any, high: Any) -> np.ndarray:
    return np.asarray((times - low) / (high - low))


_UNIFORM = _Shape(
    below=_share,
    density=lambda times, low, high: np.full_like(times, 1.0 / (high - low)),
    mean=lambda low, high: (low + high) / 2.0,
    quantile=lambda shares, low, high: low + shares * (high - low),
)


def _exponential(rate: float) -> _Shape:
    """Make a density that changes by the factor exp(rate) from low to high."""
    total = math.expm1(rate)
    return _Shape(
        below=lambda times, low, high: np.expm1(rate * _share(times, low, high)) / total,
        density=lambda times, low, high: (
            rate / total / (high - low) * np.exp(rate * _share(times, low, high))
        ),
        mean=lambda low, high: low + (high - low) * (1.0 + 1.0 / total - 1.0 / rate),
        quantile=lambda shares, low, high: low + (high - low) * np.log1p(shares * total) / rate,
    )


def _normal(deviations: float) -> _Shape:
    """Make a normal distribution, cut off at some standard deviations on each side."""

    def below(times: np.ndarray, low: Any, high: Any) -> np.ndarray:
        # The import takes 0.1 s, and no other shape needs it.
        from scipy.special import ndtr

        tail = ndtr(-deviations)
        inside = ndtr(2.0 * deviations * _share(times, low, high) - deviations)
        return np.asarray((inside - tail) / (1.0 - 2.0 * tail))

    def density(times: np.ndarray, low: float, high: float) -> np.ndarray:
        unit = 2.0 * deviations * _share(times, low, high) - deviations
        inside = math.erf(deviations / math.sqrt(2.0)) * (high - low) / (2.0 * deviations)
        return np.asarray(np.exp(-0.5 * unit**2) / (math.sqrt(2.0 * math.pi) * inside))

    def quantile(shares: np.ndarray, low: float, high: float) -> np.ndarray:
        from scipy.special import ndtr, ndtri

        tail = ndtr(-deviations)
        unit = ndtri(tail + shares * (1.0 - 2.0 * tail))
        return np.asarray((low + high) / 2.0 + (high - low) / (2.0 * deviations) * unit)

    return _Shape(below, density, _UNIFORM.mean, quantile)


def _log_ratio(low: Any, high: Any) -> Any:
    """Return the natural logarithm of high / low."""
    # log1p, not log, because the ends may lie close together.
    return np.log1p((high - low) / low)


_LOG_UNIFORM = _Shape(
    below=lambda times, low, high: _log_ratio(low, times) / _log_ratio(low, high),
    density=lambda times, low, high: 1.0 / (times * _log_ratio(low, high)),
    mean=lambda low, high: float((high - low) / _log_ratio(low, high)),
    quantile=lambda shares, low, high: low * np.exp(shares * _log_ratio(low, high)),
)
_SHAPES = {
    "uniform": _UNIFORM,
    "small_likely": _exponential(-STEEPNESS),
    "large_likely": _exponential(STEEPNESS),
    "normal": _normal(3.0),
    "log_uniform": _LOG_UNIFORM,
}
# Shapes of budgets that are listed, not drawn from a formula.
_LISTED = ("point", "empirical")


def _all_below(budgets: Sequence[Budget], times_s: np.ndarray) -> np.ndarray:
    """Return P(budget < time) of budgets [B] at times [T], shape [B, T].

    Budgets of one shape are computed together.
    """
    below = np.empty((len(budgets), len(times_s)))
    members: dict[str, list[int]] = defaultdict(list)
    for row, budget in enumerate(budgets):
        members[budget.shape].append(row)
    for shape, rows in members.items():
        if shape in _LISTED:
            for row in rows:
                samples = budgets[row].samples_s
                # bisect, not searchsorted, so that a long log is not copied for a few times.
                counts = [bisect_left(samples, time) for time in times_s.tolist()]
                below[row] = np.divide(counts, len(samples))
        else:
            low = np.array([[budgets[row].low] for row in rows])
            high = np.array([[budgets[row].high] for row in rows])
            inside = _SHAPES[shape].below(np.clip(times_s, low, high), low, high)
            below[rows] = np.where(times_s >= high, 1.0, np.minimum(inside, 1.0))
    return below


def _over(shape: str, low_s: float, high_s: float, cost: Cost = "time") -> Budget:
    low = checks.as_number(low_s)
    high = checks.as_number(high_s)
    if not low < high:
        raise BudgetError(
            f"budget range {low_s!r} to {high_s!r} s is empty or not a number; expected low < "
            "high, in seconds."
        )
    return Budget(shape=shape, low=low, high=high, cost=cost)


def uniform(low_s: float, high_s: float, *, cost: Cost = "time") -> Budget:
    """Make every budget between two times equally likely.

    Args:
        low_s: smallest budget, in seconds or in the unit of `cost`.
        high_s: largest budget, in seconds or in the unit of `cost`.
        cost: what is limited.
    """
    return _over("uniform", low_s, high_s, cost)


def small_likely(low_s: float, high_s: float, *, cost: Cost = "time") -> Budget:
    """Make small budgets likely.

    The density falls exponentially, by exp(4) across the range.

    Source:
        Impatient DNNs, Table 1. We differ: the paper gives no formula; see STEEPNESS.
    """
    return _over("small_likely", low_s, high_s, cost)


def large_likely(low_s: float, high_s: float, *, cost: Cost = "time") -> Budget:
    """Make large budgets likely, as the mirror image of `small_likely`."""
    return _over("large_likely", low_s, high_s, cost)


def normal(low_s: float, high_s: float, *, cost: Cost = "time") -> Budget:
    """Make a normal distribution around the middle of the range.

    The ends of the range are three standard deviations away, and the rest is cut off.
    """
    return _over("normal", low_s, high_s, cost)


def log_uniform(low_s: float, high_s: float, *, cost: Cost = "time") -> Budget:
    """Make every order of magnitude between two positive times equally likely."""
    positive_seconds(low_s, "lower end of a log-uniform budget")
    return _over("log_uniform", low_s, high_s, cost)


def point(budget_s: float, *, cost: Cost = "time") -> Budget:
    """Make a budget that is always the same."""
    seconds = positive_seconds(budget_s, "budget")
    return Budget(shape="point", low=seconds, high=seconds, samples_s=(seconds,), cost=cost)


def empirical(budgets_s: Sequence[float], *, cost: Cost = "time") -> Budget:
    """Make the budgets of a log as likely as they were frequent."""
    samples = tuple(sorted(positive_seconds(value, "a logged budget") for value in budgets_s))
    if not samples:
        raise BudgetError("the log of budgets is empty; expected at least one time in seconds.")
    return Budget(shape="empirical", low=samples[0], high=samples[-1], samples_s=samples, cost=cost)


@dataclass(frozen=True, slots=True)
class SampleBudgets:
    """A distribution of budgets for each sample, p(t | x), made by `per_sample`.

    Attributes:
        each: the budget of every sample.
    """

    each: tuple[Budget, ...]

    def __post_init__(self) -> None:
        costs = {budget.cost for budget in self.each}
        if len(costs) != 1:
            raise BudgetError(
                f"budgets of {', '.join(sorted(costs)) or 'no samples'}; expected one kind of cost "
                "for all samples."
            )

    def __len__(self) -> int:
        return len(self.each)

    @property
    def cost(self) -> Cost:
        """What is limited."""
        return self.each[0].cost

    def take(self, rows: Sequence[int]) -> SampleBudgets:
        """Return the budgets of some samples."""
        return SampleBudgets(tuple(self.each[row] for row in rows))

    def weights(self, costs_s: Sequence[float]) -> np.ndarray:
        """Compute the exit weights of every sample, shape [N, K], as in `exit_weights_many`."""
        different = list(dict.fromkeys(self.each))
        rows = {budget: row for row, budget in enumerate(different)}
        return exit_weights_many(different, costs_s)[[rows[budget] for budget in self.each]]

    def summary(self) -> Budget:
        """Return the distribution of the samples' mean budgets, for tables and plots.

        Samples without a limit are left out, unless there are no others.
        """
        means = [budget.mean_s() for budget in self.each]
        limited = [mean for mean in means if mean < UNLIMITED]
        return empirical(limited or means, cost=self.cost)


def per_sample(
    budgets: Sequence[float] | Sequence[Budget] | np.ndarray, *, cost: Cost = "time"
) -> SampleBudgets:
    """Make the budgets of single samples: numbers that are known, or distributions p(t | x).

    Args:
        budgets: one per sample, in seconds or in the unit of `cost`, infinity for no limit; or one
            distribution each.
        cost: what numbers limit; distributions say it themselves.
    Raises:
        BudgetError: if there are none, a number is negative or NaN, or kinds of cost differ.
    Source:
        Impatient DNNs: individual budgets, given a priori for each test example.
    Example:
        >>> expected_accuracy(per_sample([1.0, 5.0]), [1.0, 4.0], [[1.0, 0.0], [1.0, 1.0]])
        1.0
    """
    return SampleBudgets(
        tuple(
            # a budget of 0 pays for nothing, and so does the smallest number
            budget
            if isinstance(budget, Budget)
            else point(min(checks.as_number(budget), UNLIMITED) or 5e-324, cost=cost)
            for budget in budgets
        )
    )


STANDARD = ("uniform", "small_likely", "large_likely", "normal")


def standard(horizon_s: float) -> dict[str, Budget]:
    """Make the four shapes of Impatient DNNs' Table 1 on [0, horizon].

    By convention, the horizon is the time of the whole network.
    """
    return {shape: _over(shape, 0.0, horizon_s) for shape in STANDARD}


def exit_weights(
    budget: Budget, costs_s: Sequence[float], *, normalise: bool = False
) -> tuple[float, ...]:
    """Compute the probability that each exit is the deepest affordable one.

    Weighting the loss of exit k by w[k] makes the joint loss the expected loss of the answer a
    caller receives.

    Args:
        budget: distribution p(t) of budgets.
        costs_s: cumulative cost of each exit, seconds, length K: `costs.interruptible_s()` when the
            budget is not known in advance, `costs.contract_s()` when it is. An exit that costs at
            least as much as a deeper one gets 0: see `deepest_for_some`.
        normalise: whether the weights are divided by their sum. Otherwise their sum is
            1 - P(budget < min(costs_s)), because a budget below every exit buys no answer.
    Returns:
        K weights, shallowest exit first.
    Raises:
        CostOrderError: if costs are not finite and positive.
        BudgetError: if no budget can pay for any exit and the weights are to be normalised.
    Source:
        Amthor, Rodner, Denzler 2016 (Impatient DNNs): the risk under p(t). With budgets independent
        of the input it is the sum over exits of P(t[k] <= budget < t[k+1]) times the exit's
        expected loss.
    Example:
        >>> exit_weights(uniform(0.0, 10.0), costs_s=[1.0, 2.0, 4.0, 8.0])
        (0.1, 0.2, 0.4, 0.2)
        >>> # a costly head at the second exit, whose budgets the third one takes better
        >>> exit_weights(uniform(0.0, 10.0), costs_s=[1.0, 4.0, 3.0])
        (0.2, 0.0, 0.7)
    """
    return tuple(exit_weights_many([budget], costs_s, normalise=normalise)[0].tolist())


def exit_weights_many(
    budgets: Sequence[Budget], costs_s: Sequence[float], *, normalise: bool = False
) -> np.ndarray:
    """Compute `exit_weights` of many budgets at once.

    The budgets are a sweep over distributions, or one distribution per sample. If the budget
    depends on the input, p(t | x), row i has the weights of sample i's losses.

    Args:
        budgets: B distributions of any shapes.
        costs_s: cumulative cost of each exit, as in `exit_weights`.
        normalise: whether each row is divided by its sum, as in `exit_weights`.
    Returns:
        Weights, float64, shape [B, K]; row i is `exit_weights(budgets[i], costs_s)`.
    Raises:
        CostOrderError: if costs are not finite and positive.
        BudgetError: if a budget can pay for no exit and the weights are to be normalised.
    Source:
        Impatient DNNs: the risk under p(x, y, t), there with t independent of (x, y).
    Example:
        >>> budgets = [uniform(0.0, 10.0), point(4.0)]
        >>> exit_weights_many(budgets, costs_s=[1.0, 2.0, 4.0, 8.0]).tolist()
        [[0.1, 0.2, 0.4, 0.2], [0.0, 0.0, 1.0, 0.0]]
    """
    costs = check_positive(costs_s)
    kept = list(deepest_for_some(costs))
    below = _all_below(budgets, np.asarray([costs[exit] for exit in kept]))
    weights = np.zeros((len(budgets), len(costs)))
    # Rounded, so that 0.1, 0.2 and 0.4 come out exactly.
    weights[:, kept] = np.round(np.diff(below, axis=1, append=1.0), 15)
    if not normalise:
        return weights
    totals = weights.sum(axis=1)
    for budget, total in zip(budgets, totals.tolist(), strict=True):
        if total <= 0.0:
            raise BudgetError(
                f"no budget between {budget.low:g} and {budget.high:g} s pays for the cheapest "
                f"exit ({costs[kept[0]]:g} s); use larger budgets or an earlier exit."
            )
    return np.asarray(weights / totals[:, None])


def deepest_for_some(costs_s: Sequence[float]) -> tuple[int, ...]:
    """Return the exits that cost less than every deeper one.

    No other exit is ever the deepest that a budget can pay for. In contract mode, an expensive head
    can make an exit cost more than a deeper one. Then only the exits returned here get weights.

    Example:
        >>> deepest_for_some([1.5, 4.0, 3.2])
        (0, 2)
    """
    costs = [*costs_s, math.inf]
    return tuple(exit for exit, own in enumerate(costs_s) if own < min(costs[exit + 1 :]))


def expected_accuracy(
    budget: Budget | SampleBudgets,
    costs_s: Sequence[float],
    accuracies: Sequence[float] | Sequence[Sequence[float]] | np.ndarray,
    *,
    without_answer: float = 0.0,
) -> float:
    """Compute the expected accuracy of the answer under random budgets.

    Args:
        budget: distribution p(t) of budgets, or those of single samples, p(t | x).
        costs_s: cumulative cost of each exit, as in `exit_weights`.
        accuracies: accuracy of each exit, in [0, 1], length K; with budgets of single samples the
            quality of each exit's answer to each sample, [K, N].
        without_answer: accuracy counted for budgets that are too small for any exit; 0 counts them
            as failures.
    Returns:
        A number in [0, 1].
    Raises:
        BudgetError: if the accuracies have another shape.
        CostOrderError: if costs are not finite and positive.
    Source:
        Impatient DNNs, Table 1's metric.
    """
    if isinstance(budget, SampleBudgets):
        return _expected_quality(budget, costs_s, np.asarray(accuracies), without_answer)
    weights = exit_weights(budget, costs_s)
    shares = np.asarray(accuracies, dtype=np.float64)
    if shares.shape != (len(weights),):
        raise BudgetError(
            f"accuracies of shape {shares.shape} for {len(weights)} exits; expected one per exit. "
            "Budgets of single samples, which take [K, N], come from per_sample."
        )
    pairs = zip(weights, shares.tolist(), strict=True)
    answered: float = sum(weight * accuracy for weight, accuracy in pairs)
    return answered + (1.0 - sum(weights)) * without_answer


def _expected_quality(
    budgets: SampleBudgets, costs_s: Sequence[float], quality: np.ndarray, without_answer: float
) -> float:
    """Average the expected quality of every sample under its own budgets."""
    if quality.shape != (len(costs_s), len(budgets)):
        raise BudgetError(
            f"qualities of shape {quality.shape} for {len(costs_s)} exits and budgets of "
            f"{len(budgets)} samples; expected [K, N], such as recording.quality."
        )
    weights = budgets.weights(costs_s)
    answered = (weights * quality.T).sum(1) + (1.0 - weights.sum(1)) * without_answer
    return float(answered.mean())


def parse_budget(text: str) -> Budget:
    """Read a budget from text.

    The text is "SHAPE:LOW:HIGH" or "point:T" with times in milliseconds, or "log:FILE" with a text
    file of one budget in milliseconds per line. A unit after the last number limits something else:
    "uniform:0:40mmacs" is in millions of multiply-accumulates, "mb" is megabytes moved (10^6 bytes)
    and "mj" is millijoules; "ms" is allowed, too. These units are only for command lines.

    Example:
        >>> parse_budget("uniform:0:10").high
        0.01
        >>> budget = parse_budget("uniform:0:40mmacs")
        >>> budget.cost, budget.high
        ('macs', 40000000.0)
    """
    shape, _, rest = text.partition(":")
    try:
        if shape == "log":
            lines = Path(rest).read_text(encoding="utf-8").split()
            return empirical([float(line) / 1e3 for line in lines])
        amounts, cost, scale = _without_unit(rest)
        # Division if the unit is small, because 9 / 1000 is 0.009 and 9 * 0.001 is not.
        numbers = [
            float(part) * scale if scale >= 1.0 else float(part) / round(1.0 / scale)
            for part in amounts.split(":")
            if amounts
        ]
        if shape == "point" and len(numbers) == 1:
            return point(numbers[0], cost=cost)
        if shape in _RANGES and len(numbers) == 2:
            return _RANGES[shape](*numbers, cost=cost)
    except OSError as error:
        raise BudgetError(f"cannot read the log of budgets {rest!r}: {error.strerror}.") from error
    except BudgetError:
        raise
    except ValueError as error:
        raise BudgetError(f"{text!r} holds something that is not a number ({error}).") from error
    raise BudgetError(
        f"cannot read {text!r} as a budget; expected one of {', '.join(_RANGES)} as SHAPE:LOW:HIGH "
        "in milliseconds (uniform:0:10), point:T (point:8), or log:FILE."
    )


def _without_unit(text: str) -> tuple[str, Cost, float]:
    """Split numbers from their unit, and return them with its cost and size."""
    found = re.search(r"(?<=[\d.])[a-z]+$", text, re.IGNORECASE)
    unit = found[0].lower() if found else "ms"
    if unit not in UNITS:
        raise BudgetError(
            f"unknown unit {unit!r} in {text!r}; expected one of {', '.join(UNITS)}, or none for "
            "ms."
        )
    return text[: found.start()] if found else text, *UNITS[unit]


_RANGES = {
    "uniform": uniform,
    "small_likely": small_likely,
    "large_likely": large_likely,
    "normal": normal,
    "log_uniform": log_uniform,
}
