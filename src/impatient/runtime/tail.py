"""Say how often a time is exceeded that was hardly ever measured: a fit of the tail.

Above a high threshold, times of one distribution follow a generalised Pareto distribution (Pickands
1975). Real-time engineers call what it gives a probabilistic worst-case execution time (pWCET): a
time that a run exceeds with at most a given probability. The fit extrapolates, so it is refused
where its assumptions do not hold for what was measured.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from impatient import checks
from impatient.anytime import Network, begin
from impatient.clock import SYSTEM_CLOCK, Clock, interleaved
from impatient.errors import CostError
from impatient.evaluation.metrics import Estimate, proportion
from impatient.inputs import evaluating, input_tensor, synchronise
from impatient.progress import tracked

# Times that are needed, and of these beyond the threshold.
LEAST_TIMES = 1000
LEAST_BEYOND = 50
# Shares of the times beyond the thresholds that are tried, the first that fits is taken.
SHARES = (0.1, 0.05, 0.025, 0.01)
# A check fails where its p-value is below; one check in a hundred fails although all is well.
LEVEL = 0.01
# Autocorrelations that are looked at.
LAGS = 10
# Simulated samples for the p-value of the fit.
SIMULATED = 199
# From here on, the variance of the times would be infinite.
HEAVIEST = 0.5
# How much rarer than once in all measured runs an event may be.
FURTHEST = 100.0
# Shapes among which the likelihood is profiled.
_SHAPES = (-0.99, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One assumption of the fit, and whether what was measured speaks against it.

    Attributes:
        name: the assumption.
        p: p-value of the test; small where the assumption does not hold.
    """

    name: str
    p: float

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against it at the 1 % level."""
        return self.p >= LEVEL


@dataclass(frozen=True, kw_only=True, eq=False)
class Tail:
    """The tail of measured times, above a threshold.

    Attributes:
        times_s: the times, [N].
        threshold_s: where the tail begins.
        shape: 0 for an exponential tail, below 0 for one that ends, above 0 for a heavier one.
        scale_s: mean of the excess, if the shape is 0.
        checks: the assumptions that were checked.
    """

    times_s: np.ndarray
    threshold_s: float
    shape: float
    scale_s: float
    checks: tuple[Check, ...] = ()

    @functools.cached_property
    def excess_s(self) -> np.ndarray:
        """Seconds beyond the threshold, of the times that are beyond it."""
        return self.times_s[self.times_s > self.threshold_s] - self.threshold_s

    @property
    def share(self) -> float:
        """Share of the times beyond the threshold."""
        return len(self.excess_s) / len(self.times_s)

    @property
    def rarest(self) -> float:
        """Smallest probability of which anything is claimed."""
        return 1.0 / (FURTHEST * len(self.times_s))

    def late(self, deadline_s: float) -> Estimate:
        """Estimate the probability that a run takes longer than a deadline.

        Returns:
            The most likely probability, and its 90 % interval: it is above `high` with 5 %. Beyond
            the threshold, `high` is at least a hundredth of one in all runs.
        """
        checks.positive(CostError, deadline_s=deadline_s)
        excess_s = deadline_s - self.threshold_s
        if excess_s <= 0.0:
            return proportion(int((self.times_s > deadline_s).sum()), len(self.times_s))
        from scipy.stats import genpareto

        value = float(genpareto.sf(excess_s, self.shape, scale=self.scale_s))

        def deviance(log_ratio: float) -> float:
            return self._deviance(excess_s, log_ratio)

        # Nothing below can be told from 0.
        least = math.log(1e-15)
        start = max(least, math.log(value)) if value > 0.0 else least
        high = _where(deviance, start, -1e-9)
        low = _where(deviance, start, least)
        most = max(self.rarest, self.share * math.exp(high))
        return Estimate(self.share * value, self.share * math.exp(low), most)

    def bound_s(self, probability: float) -> Estimate:
        """Estimate the time that a run exceeds with a probability: the pWCET.

        Returns:
            The most likely time and its 90 % interval, in seconds: the time is above `high` with
            5 %, so promise that.
        Raises:
            CostError: if the probability is not below the share of times beyond the threshold, or
                if the event is 100 times rarer than once in all that was measured.
        """
        if not self.rarest <= probability < self.share:
            raise CostError(
                f"probability={probability:g} from {len(self.times_s)} times; expected from "
                f"{self.rarest:g} to {self.share:g}. For rarer events, measure more runs; for more "
                "frequent ones, take a quantile of the times."
            )
        log_ratio = math.log(probability / self.share)
        value = self.scale_s * _growth(self.shape, log_ratio)

        def deviance(log_excess: float) -> float:
            return self._deviance(math.exp(log_excess), log_ratio)

        start = math.log(value)
        low, high = (_where(deviance, start, start + step) for step in (-7.0, 7.0))
        return Estimate(
            self.threshold_s + value,
            self.threshold_s + math.exp(low),
            self.threshold_s + math.exp(high),
        )

    def _deviance(self, excess_s: float, log_ratio: float) -> float:
        """Twice the log-likelihood lost if that excess has that probability."""
        from scipy.optimize import minimize_scalar

        excesses_s = self.excess_s

        def lost(shape: float) -> float:
            return -_likelihood(excesses_s, shape, excess_s / _growth(shape, log_ratio))

        best = float(minimize_scalar(lost, bounds=_SHAPES, method="bounded").fun)
        return 2.0 * (best + _likelihood(excesses_s, self.shape, self.scale_s))


def fit_tail(times_s: Sequence[float] | np.ndarray) -> Tail:
    """Fit the tail of times that were measured one after the other.

    The assumptions are checked at the 1 % level each: times do not depend on those before them
    (Ljung-Box, of the ranks and of which times are among the longest tenth); both halves are alike
    (Kolmogorov-Smirnov); and the generalised Pareto distribution fits (Anderson-Darling, its
    p-value simulated). The threshold is the lowest of those beyond which lie 10, 5, 2.5 and 1 % of
    the times that fits and has at least 50 of them. No test proves an assumption: it only fails to
    refute it.

    Args:
        times_s: at least 1,000 times in the order in which they were measured, seconds.
    Raises:
        CostError: if there are too few times, if they are no finite numbers, or if an assumption
            does not hold.
    """
    times = np.asarray(times_s, dtype=np.float64)
    if times.ndim != 1 or len(times) < LEAST_TIMES or not np.isfinite(times).all():
        raise CostError(
            f"times of shape {times.shape}; expected at least {LEAST_TIMES} finite numbers of "
            "seconds. Measure more runs."
        )
    found = _checks_of_order(times)
    _refuse(found)
    tried = []
    for share in SHARES:
        tail = tail_beyond(times, share)
        if len(tail.excess_s) < LEAST_BEYOND:
            tried.append(f"{share:.1%}: only {len(tail.excess_s)} times beyond the threshold")
            break
        if tail.shape >= HEAVIEST:
            tried.append(f"{share:.1%}: shape {tail.shape:.2f}")
            continue
        check = _goodness(tail)
        if check.passed:
            return dataclasses.replace(tail, checks=(*found, check))
        tried.append(f"{share:.1%}: Anderson-Darling, p = {check.p:.3f}")
    raise CostError(
        f"no tail of the {len(times)} times follows a generalised Pareto distribution with a shape "
        f"below {HEAVIEST:g} (longest {'; '.join(tried)}): they come from several causes, such as "
        "runs with and without an interruption. Take other work off the machine, try "
        "real_time=True, or promise no more than the share that was measured."
    )


def tail_beyond(times_s: np.ndarray, share: float) -> Tail:
    """Fit the tail beyond which a share of the times lies, and check nothing."""
    from scipy.stats import genpareto

    threshold_s = float(np.quantile(times_s, 1.0 - share))
    excess_s = times_s[times_s > threshold_s] - threshold_s
    # In units of the mean, since the search has an absolute precision.
    unit = float(excess_s.mean()) if len(excess_s) else 1.0
    shape, _, scale = genpareto.fit(excess_s / unit, 0.1, floc=0.0, scale=1.0)
    return Tail(
        times_s=times_s, threshold_s=threshold_s, shape=float(shape), scale_s=float(scale) * unit
    )


def times_to_exits(
    network: Network,
    x: Any,
    *,
    runs: int = 5000,
    pause_s: float = 0.0,
    progress: bool = False,
    clock: Clock = SYSTEM_CLOCK,
) -> np.ndarray:
    """Measure how long contract runs to each exit take, in turn.

    Args:
        network: network from `attach_exits`, or a `Network` of your own; measured in eval mode.
        x: example input.
        runs: runs to each exit.
        pause_s: seconds of sleep before each run.
        progress: whether to show a progress bar.
        clock: clock to measure with.
    Returns:
        Seconds, [K, runs].
    Raises:
        CostError: if fewer than 1 run is asked for.
    """
    checks.at_least(CostError, 1, runs=runs)
    device = input_tensor(x).device

    def timed(last: int) -> float:
        if pause_s:
            time.sleep(pause_s)
        start = clock.now()
        with begin(network, x) as run:
            for exit in run:
                if exit.index == last:
                    exit.output()
                    break
        synchronise(device)
        return clock.now() - start

    ways = [functools.partial(timed, index) for index in range(network.num_exits)]
    with evaluating(network), torch.inference_mode():
        rounds = interleaved(ways, repeats=runs, warm_up=20)
        shown = tracked(
            rounds, "measuring runs", total=runs, unit="rounds", wanted=progress, between=True
        )
        return np.array(list(shown)).T


def _growth(shape: float, log_ratio: float) -> float:
    """Excess, in scales, that a share exp(log_ratio) of the excesses is beyond."""
    return -log_ratio if abs(shape) < 1e-9 else math.expm1(-shape * log_ratio) / shape


def _likelihood(excess_s: np.ndarray, shape: float, scale_s: float) -> float:
    """Log-likelihood of excesses; a large negative number where one is impossible."""
    steps = shape * excess_s / scale_s
    if abs(shape) < 1e-9:
        return float(-len(excess_s) * math.log(scale_s) - excess_s.sum() / scale_s)
    if steps.min() <= -1.0:
        # Finite, and less so the further away, so that a search finds its way.
        return -1e12 * (1.0 - float(steps.min()))
    growing = (1.0 + 1.0 / shape) * float(np.log1p(steps).sum())
    return -len(excess_s) * math.log(scale_s) - growing


def _where(deviance: Callable[[float], float], start: float, end: float) -> float:
    """Find where a deviance that grows towards `end` reaches that of a 90 % interval."""
    from scipy.optimize import brentq
    from scipy.stats import chi2

    bound = float(chi2.ppf(0.9, 1))
    if start == end or deviance(end) <= bound:
        return end
    if deviance(start) >= bound:
        # Even the smallest probability that can be told from 0 is unlikely: the tail ends before.
        return start
    return float(brentq(lambda place: deviance(place) - bound, start, end, xtol=1e-4))


# --- checks ---------------------------------------------------------------------------------------


def _checks_of_order(times_s: np.ndarray) -> tuple[Check, ...]:
    from scipy.stats import ks_2samp, rankdata

    half = len(times_s) // 2
    longest = (times_s > np.quantile(times_s, 0.9)).astype(np.float64)
    return (
        Check(name="times are independent", p=ljung_box(rankdata(times_s))),
        Check(name="long times are independent", p=ljung_box(longest)),
        Check(
            name="both halves are alike", p=float(ks_2samp(times_s[:half], times_s[half:]).pvalue)
        ),
    )


def ljung_box(values: np.ndarray) -> float:
    """Return the p-value of the Ljung-Box test that values are not autocorrelated.

    Source:
        Ljung and Box 1978, with 10 lags.
    """
    from scipy.stats import chi2

    count = len(values)
    centred = values - values.mean()
    power = float(centred @ centred)
    if power == 0.0:
        return 0.0
    lags = range(1, LAGS + 1)
    squares = [(float(centred[lag:] @ centred[:-lag]) / power) ** 2 / (count - lag) for lag in lags]
    return float(chi2.sf(count * (count + 2) * sum(squares), LAGS))


def _goodness(tail: Tail) -> Check:
    """Test the fit by Anderson and Darling; the p-value is simulated, as the fit is estimated."""
    from scipy.stats import genpareto, goodness_of_fit

    found = goodness_of_fit(
        genpareto,
        tail.excess_s / tail.scale_s,
        known_params={"loc": 0.0},
        guessed_params={"c": tail.shape, "scale": 1.0},
        statistic="ad",
        n_mc_samples=SIMULATED,
        random_state=np.random.default_rng(0),
    )
    return Check(name="the tail is generalised Pareto", p=float(found.pvalue))


def _refuse(found: Sequence[Check]) -> None:
    failed = [check for check in found if not check.passed]
    if failed:
        said = "; ".join(f"{check.name}: refuted, p = {check.p:.2g}" for check in failed)
        raise CostError(
            f"the times do not allow a fit of their tail ({said}). Pause between runs, thin them "
            "(times[::10]), measure when the load does not change, or promise no more than the "
            "share that was measured."
        )
