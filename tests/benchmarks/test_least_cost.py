"""What the most powerful tests leave, against exact tests of losses of 0 and 1."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

SIZE, EPSILON, DELTA = 400, 0.05, 0.05


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("least_cost")


def nested(*risks: float, samples: int = 10_000) -> np.ndarray:
    """Losses of 0 and 1, each candidate losing where the one before it loses."""
    places = np.arange(samples)
    return np.stack([(places < risk * samples).astype(float) for risk in risks])


def exact(risk: float) -> float:
    """Power of the randomised binomial test at a risk."""
    cut = int(stats.binom.ppf(DELTA, SIZE, EPSILON))
    below = stats.binom.cdf(cut - 1, SIZE, EPSILON)
    share = (DELTA - below) / stats.binom.pmf(cut, SIZE, EPSILON)
    return stats.binom.cdf(cut - 1, SIZE, risk) + share * stats.binom.pmf(cut, SIZE, risk)


@pytest.mark.parametrize("risk", [0.01, 0.02, 0.049, 0.06])
def test_of_losses_of_0_and_1_it_is_the_power_of_the_binomial_test(
    script: ModuleType, risk: float
) -> None:
    found = script.power(nested(risk, 0.2), 0, epsilon=EPSILON, delta=DELTA, size=SIZE)
    assert found == pytest.approx(exact(risk), abs=1e-6)


def test_nothing_is_said_where_a_cheaper_candidate_never_loses(script: ModuleType) -> None:
    losses = nested(0.01, 0.0)
    assert script.power(losses, 0, epsilon=EPSILON, delta=DELTA, size=SIZE) == 1.0


def test_costs_follow_from_how_often_each_is_chosen(script: ModuleType) -> None:
    found = script.least_cost(
        nested(0.02, 0.03), np.array([3.0, 1.0]), 4.0, epsilon=EPSILON, delta=DELTA, size=SIZE
    )
    assert found == pytest.approx(4.0 - exact(0.02) - 2.0 * exact(0.03), abs=1e-5)


def test_the_law_of_a_sum_has_its_mean_and_deviation(script: ModuleType) -> None:
    shares = np.zeros(2001)
    shares[[700, 1000, 1800]] = 0.2, 0.5, 0.3
    table, first = script.sums(shares, 50)
    places = (np.arange(len(table)) + first) / 1000
    mean = 0.3 * 0.8 - 0.2 * 0.3
    assert table.sum() == pytest.approx(1.0)
    assert table @ places == pytest.approx(50 * mean)
    variance = 0.3 * 0.64 + 0.2 * 0.09 - mean**2
    assert table @ (places - 50 * mean) ** 2 == pytest.approx(50 * variance)
