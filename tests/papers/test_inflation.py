"""Inflation of cost: the paper's closed forms, the general ones, and the schedule played out,
against each other.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impatient.errors import CostError
from papers.anytime_neural_networks import inflation
from papers.anytime_neural_networks.inflation import mean, sup
from played_queue import play

BASES = (1.5, 2.0, 3.0, 4.0)
# the last is so deep that the first few make no difference
MEMBERS = {
    1.5: 60,
    2.0: 36,
    3.0: 24,
    4.0: 20,
}
# of what is left of the first few networks: M / b ** (members - M), and their share of the mean
TOLERANCE = 1e-6

bases = st.floats(1.2, 6.0)
shares = st.floats(0.02, 1.0)
workers = st.integers(1, 4)


# --- formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "largest", "average"),
    [(1.5, 4.0, 3.478), (2.0, 3.0, 2.443), (3.0, 2.5, 1.883), (4.0, 7 / 3, 1.670)],
)
def test_anytime_networks_have_the_papers_inflation(base, largest, average):
    assert inflation.ann_sup(base) == pytest.approx(largest) == pytest.approx(2 + 1 / (base - 1))
    assert inflation.ann_mean(base) == pytest.approx(average, abs=5e-4)
    assert inflation.ann_mean(base) == pytest.approx(
        1 - 1 / (2 * base) + (1 + math.log(base)) / (base - 1)
    )


@pytest.mark.parametrize("base", BASES)
def test_plain_networks_have_the_papers_inflation(base):
    assert inflation.plain_sup(base) == pytest.approx(base**2 / (base - 1))
    assert inflation.plain_mean(base) == pytest.approx(1 + 1 / (base - 1) + base / 2)


def test_plain_networks_are_best_at_the_papers_bases():
    grid = np.linspace(1.1, 6.0, 4901)
    assert grid[np.argmin([inflation.plain_sup(base) for base in grid])] == pytest.approx(
        2.0, abs=1e-3
    )
    assert grid[np.argmin([inflation.plain_mean(base) for base in grid])] == pytest.approx(
        1 + math.sqrt(2), abs=1e-3
    )
    assert inflation.plain_mean(1 + math.sqrt(2)) == pytest.approx(1.5 + math.sqrt(2))


@given(bases, shares)
def test_one_worker_has_the_general_closed_form(base, share):
    r = max(share, 1 / base)
    assert sup(base, competitive_from=share) == pytest.approx(base / (base - 1) + r * base)
    assert mean(base, competitive_from=share) == pytest.approx(
        base * (r / (base - 1) + r**2 / 2) + math.log(1 / r) / (base - 1) + 1 - r
    )


@pytest.mark.parametrize(("count", "largest"), [(1, 3.0), (2, 5 / 3), (3, 9 / 7), (4, 17 / 15)])
def test_workers_lower_the_largest_inflation(count, largest):
    assert sup(2.0, workers=count) == pytest.approx(largest)
    # the paper's "effectively increases b" is an upper bound
    assert sup(2.0, workers=count) <= sup(2.0**count) + 1e-12


# --- against the schedule -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("share", [None, 0.1, 0.5, 0.8, 1.0])
def test_the_schedule_agrees_with_the_formulas(base, share, count):
    schedule = play(base, MEMBERS[base], workers=count, competitive_from=share)
    assert schedule.sup == pytest.approx(
        sup(base, competitive_from=share, workers=count), abs=TOLERANCE
    )
    assert schedule.mean == pytest.approx(
        mean(base, competitive_from=share, workers=count), abs=TOLERANCE
    )


@settings(max_examples=50)
@given(bases, shares, workers)
def test_the_schedule_agrees_for_any_base_share_and_number_of_workers(base, share, count):
    members = math.ceil(20.0 / math.log(base))
    schedule = play(base, members, workers=count, competitive_from=share)
    assert schedule.sup == pytest.approx(sup(base, competitive_from=share, workers=count), abs=1e-5)
    assert schedule.mean == pytest.approx(
        mean(base, competitive_from=share, workers=count), abs=1e-4
    )


@settings(max_examples=30)
@given(bases, shares, workers, st.integers(8, 12))
def test_sup_and_mean_of_a_schedule_are_those_of_its_curve(base, share, count, members):
    """The pieces are integrated by formula; here the curve itself is, on a grid."""
    schedule = play(base, members, workers=count, competitive_from=share)
    edges = np.linspace(schedule.first, schedule.end, 200_001)
    curve = schedule.inflation((edges[1:] + edges[:-1]) / 2)
    assert curve.max() <= schedule.sup + 1e-9
    assert curve.max() == pytest.approx(schedule.sup, rel=5e-3)
    assert curve.mean() == pytest.approx(schedule.mean, rel=1e-4)


def test_a_schedule_played_by_hand():
    # depths 1 2 4 8 on two workers: A runs 0-1 the first, 1-5 the third; B runs 0-2 the second,
    # 2-10 the fourth
    schedule = play(2.0, 4, workers=2)
    assert schedule.begins.tolist() == [0.0, 0.0, 1.0, 2.0]
    assert (schedule.first, schedule.end) == (0.5, 5.0)
    budgets = np.array([0.4, 0.5, 1.0, 2.0, 2.9, 3.5, 5.0])
    assert schedule.depth(budgets).tolist() == [0.0, 0.5, 1.0, 2.0, 2.0, 2.5, 4.0]
    assert schedule.inflation(budgets).tolist() == [math.inf, 1.0, 1.0, 1.0, 1.45, 1.4, 1.25]
    # at 3, as the third becomes competitive
    assert schedule.sup == 1.5
    # up to 2 the second keeps pace; to 3 its last answer; to 5 the third
    areas = 1.5 + (9 - 4) / 4 + (2 + math.log(2))
    assert schedule.mean == pytest.approx(areas / 4.5)


def test_plain_networks_answer_only_at_their_end():
    schedule = play(3.0, 4, competitive_from=1.0)
    assert schedule.begins.tolist() == [0.0, 1.0, 4.0, 13.0]
    assert schedule.inflation(np.array([1.0, 2.0, 4.0, 12.0, 13.0])).tolist() == [
        1.0,
        2.0,
        4 / 3,
        4.0,
        13 / 9,
    ]


@settings(max_examples=30)
@given(bases, shares, workers)
def test_few_networks_have_less_inflation_than_many(base, share, count):
    for members in (2 * count, 3 * count, 5 * count):
        schedule = play(base, members, workers=count, competitive_from=share)
        assert (
            1.0 - 1e-12 <= schedule.sup <= sup(base, competitive_from=share, workers=count) + 1e-9
        )


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [1.0, 0.5, -2.0, math.inf, math.nan])
def test_bases_that_do_not_grow_are_refused(base):
    with pytest.raises(CostError, match="a base above 1"):
        sup(base)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.1, math.nan])
def test_shares_outside_a_network_are_refused(share):
    with pytest.raises(CostError, match="a share of the network's depth"):
        mean(2.0, competitive_from=share)


def test_an_ensemble_without_workers_is_refused():
    with pytest.raises(CostError, match="at least 1 worker"):
        mean(2.0, workers=0)
