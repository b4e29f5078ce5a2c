"""The tail of known distributions is bounded as often as promised, and refused where it is none."""

import functools

import numpy as np
import pytest
from scipy.stats import genpareto

from fakes import FakeNetwork, X
from impatient.clock import FakeClock
from impatient.errors import CostError
from impatient.runtime.tail import LEVEL, Tail, fit_tail, ljung_box, tail_beyond, times_to_exits

RARE = 1e-4


def drawn(shape: float, seed: int, count: int = 2000) -> np.ndarray:
    return 1.0 + genpareto.rvs(shape, scale=0.1, size=count, random_state=seed)


@functools.cache
def fitted() -> Tail:
    return fit_tail(drawn(0.0, 3))


@pytest.mark.parametrize("shape", [-0.2, 0.0, 0.2])
def test_bounds_of_known_tails_hold_as_often_as_they_say(shape: float) -> None:
    truth_s = 1.0 + genpareto.isf(RARE, shape, scale=0.1)
    times = above = below = late = 40
    for seed in range(times):
        tail = tail_beyond(drawn(shape, seed), 0.1)
        bound = tail.bound_s(RARE)
        above -= bound.high < truth_s
        below -= bound.low > truth_s
        late -= tail.late(truth_s).high < RARE
    # 95 % of 40 is 38; fewer than 34 come once in 300 such tests
    assert min(above, below, late) >= 34
    # and it is no empty promise
    assert bound.high < 1.0 + 3.0 * (truth_s - 1.0)


def test_bound_and_probability_are_two_sides_of_one_curve() -> None:
    tail = fitted()
    bound = tail.bound_s(1e-3)
    assert tail.late(bound.value).value == pytest.approx(1e-3, rel=1e-6)
    assert tail.late(bound.high).high == pytest.approx(1e-3, rel=0.02)
    assert [check.name for check in tail.checks] == [
        "times are independent",
        "long times are independent",
        "both halves are alike",
        "the tail is generalised Pareto",
    ]
    assert all(check.passed for check in tail.checks)
    # a deadline that was often missed is counted, not extrapolated
    often = tail.late(1.05)
    assert often.value == (tail.times_s > 1.05).mean()
    assert often.low < often.value < often.high


def test_beyond_the_end_of_a_tail_that_ends_hardly_anything_is_expected() -> None:
    tail = tail_beyond(drawn(-0.4, 0), 0.1)
    never = tail.late(1.0 + 10.0 * (tail.times_s.max() - 1.0))
    assert 0.0 <= never.low < never.high == tail.rarest


@pytest.mark.parametrize("probability", [1e-6, 0.2])
def test_what_is_too_rare_or_no_tail_is_refused(probability: float) -> None:
    with pytest.raises(CostError, match=r"expected from 5e-06 to 0\.1"):
        fitted().bound_s(probability)


def test_independent_times_pass_the_test_of_independence_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    refuted = sum(ljung_box(rng.random(1000)) < 0.05 for _ in range(400))
    assert 8 <= refuted <= 34


def loaded(rng: np.random.Generator) -> np.ndarray:
    """Times that depend on those before, as under a load that comes and goes."""
    level = np.zeros(2000)
    for place in range(1, len(level)):
        level[place] = 0.9 * level[place - 1] + rng.normal()
    return 1.0 + 0.01 * level + rng.exponential(0.01, len(level))


def slower(rng: np.random.Generator) -> np.ndarray:
    times = rng.exponential(1.0, 2000)
    return times * np.where(np.arange(2000) < 1000, 1.0, 1.5)


def in_steps(rng: np.random.Generator) -> np.ndarray:
    """Times that were read from a coarse clock, so that their tail is made of steps."""
    return np.ceil(2.0 * rng.exponential(1.0, 2000))


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (loaded, "times are independent: refuted"),
        (slower, "both halves are alike: refuted"),
        (in_steps, r"longest 10\.0%: Anderson-Darling, p = 0\.005"),
        (lambda rng: 1.0 + rng.pareto(1.0, 2000), "shape below 0.5"),
        (lambda rng: np.ones(2000), "times are independent: refuted"),
        (lambda rng: rng.random(999), r"shape \(999,\); expected at least 1000"),
        (lambda rng: np.append(rng.random(1000), np.nan), "finite"),
    ],
)
def test_times_that_break_an_assumption_are_refused(times, said: str) -> None:
    with pytest.raises(CostError, match=said):
        fit_tail(times(np.random.default_rng(0)))


def test_a_check_fails_below_its_level() -> None:
    assert fitted().checks[0].p >= LEVEL


def test_runs_to_each_exit_are_timed_in_turn() -> None:
    clock = FakeClock()
    network = FakeNetwork(clock, [1.0, 2.0, 4.0], [0.5, 0.5, 0.5])
    times_s = times_to_exits(network, X, runs=3, pause_s=1e-6, clock=clock)
    assert times_s.tolist() == [[1.5] * 3, [3.5] * 3, [7.5] * 3]
    with pytest.raises(CostError, match="runs=0"):
        times_to_exits(network, X, runs=0)
