"""The metrics of Anytime Neural Networks, against numbers worked out by hand and by drawing."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from impatient.errors import CostOrderError, RecordingError
from papers.anytime_neural_networks.milestones import (
    WinRate,
    error_at,
    milestones,
    opt_plus,
    relative_increase,
    win_rate,
)

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
shares = st.floats(0.0, 1.0)
curves = st.lists(
    st.tuples(st.floats(1e-3, 1e3), shares), min_size=1, max_size=8, unique_by=lambda pair: pair[0]
).map(sorted)
places = st.lists(st.floats(0.0, 2e3), min_size=1, max_size=10)

# --- errors at given costs ------------------------------------------------------------------------


def test_between_two_predictions_the_error_lies_on_the_line_between_them():
    assert error_at(
        [1.0, 3.0, 4.0], [0.5, 0.3, 0.2], [1.0, 1.5, 2.0, 3.0, 3.25, 4.0]
    ) == pytest.approx((0.5, 0.45, 0.4, 0.3, 0.275, 0.2))


def test_before_the_first_prediction_there_is_no_answer_and_after_the_last_no_better_one():
    assert error_at([1.0, 3.0], [0.5, 0.3], [0.0, math.nextafter(1.0, 0.0), 1.0, 3.1, 1e9]) == (
        1.0,
        1.0,
        0.5,
        0.3,
        0.3,
    )


@quick
@given(curves, places)
def test_interpolated_errors_lie_between_their_neighbours(curve, at):
    costs, errors = zip(*curve, strict=True)
    for place, error in zip(at, error_at(costs, errors, at), strict=True):
        before = [own for cost, own in curve if cost <= place]
        after = [own for cost, own in curve if cost >= place]
        near = [before[-1] if before else 1.0, *([after[0]] if before and after else [])]
        assert min(near) - 1e-12 <= error <= max(near) + 1e-12


@pytest.mark.parametrize(
    ("costs", "errors", "complaint"),
    [
        ([1.0, 1.0], [0.5, 0.4], CostOrderError),
        ([2.0, 1.0], [0.5, 0.4], CostOrderError),
        ([], [], CostOrderError),
        ([1.0, 2.0], [0.5], RecordingError),
        ([1.0], [12.0], RecordingError),
        ([1.0], [math.nan], RecordingError),
        ([1.0], [-0.1], RecordingError),
    ],
)
def test_a_curve_that_is_none_is_refused(costs, errors, complaint):
    with pytest.raises(complaint):
        error_at(costs, errors, [1.0])
    with pytest.raises(complaint):
        milestones(costs, errors, [1.0], [0.5], at=[1.0])
    with pytest.raises(complaint):
        milestones([5.0], [0.5], costs, errors, at=[1.0])


# --- OPT+ -----------------------------------------------------------------------------------------


@quick
@given(st.lists(curves, min_size=1, max_size=3), places)
def test_opt_plus_is_the_best_network_that_is_cheap_enough(collections, at):
    networks = [pair for curve in collections for pair in curve]
    wanted = [
        min([error for cost, error in networks if cost <= place], default=1.0) for place in at
    ]
    assert list(opt_plus([tuple(zip(*curve, strict=True)) for curve in collections], at)) == wanted


def test_of_networks_that_cost_the_same_opt_plus_takes_the_better():
    assert opt_plus([([2.0], [0.3]), ([2.0], [0.2])], [1.9, 2.0]) == (1.0, 0.2)


@pytest.mark.parametrize(
    "collections",
    [
        [],
        [([], [])],
        [([0.0], [0.5])],
        [([math.inf], [0.5])],
        [([1.0], [0.5, 0.4])],
        [([1.0], [50.0])],
    ],
)
def test_opt_plus_of_no_networks_is_refused(collections):
    with pytest.raises(RecordingError):
        opt_plus(collections, [1.0])


# --- milestones -----------------------------------------------------------------------------------


def test_milestones_by_hand():
    # a whole cost of 8: places 2, 4, 6, 8; ours there: .5, .35, .25, .22; OPT: .4, .3, .25, .2
    found = milestones([1, 3, 5, 7, 8], [0.6, 0.4, 0.3, 0.2, 0.22], [2, 4, 8], [0.4, 0.3, 0.2])
    assert found == pytest.approx((25.0, 100 * 0.05 / 0.3, 0.0, 10.0))


def test_milestones_are_shares_of_our_own_cost_and_opt_may_end_sooner():
    """Without heads on the way, OPT's deepest network costs less than ours."""
    assert milestones([5, 10], [0.3, 0.2], [4, 8], [0.2, 0.1], at=(0.5, 1.0)) == pytest.approx(
        (100 * (0.3 / 0.175 - 1), 100.0)
    )


@quick
@given(curves.filter(lambda curve: all(error > 0 for _, error in curve)), st.floats(1e-3, 1e3))
def test_opt_itself_is_no_worse_than_opt_in_any_unit(curve, unit):
    costs, errors = zip(*curve, strict=True)
    late = [1.0] if len(costs) == 1 else [(costs[0] / costs[-1] + 1) / 2, 1.0]
    assert milestones(costs, errors, costs, errors, at=late) == (0.0,) * len(late)
    scaled = [cost * unit for cost in costs]
    if len(set(scaled)) == len(scaled):
        assert milestones(scaled, errors, scaled, errors, at=late) == (0.0,) * len(late)


def test_a_milestone_before_the_first_separate_network_is_refused():
    with pytest.raises(
        RecordingError,
        match=r"milestone at cost 2 lies before OPT's first network \(3\).*train a network",
    ):
        milestones([1, 8], [0.6, 0.2], [3, 8], [0.4, 0.2])


def test_against_a_reference_without_errors_any_error_is_infinitely_more():
    assert relative_increase([0.1, 0.0, 0.3, 0.15], [0.0, 0.0, 0.2, 0.3]) == (
        math.inf,
        0.0,
        pytest.approx(50.0),
        -50.0,
    )


# --- win rates ------------------------------------------------------------------------------------


def test_a_win_rate_by_hand():
    won = win_rate([0.1] * 60 + [0.3] * 20 + [0.2] * 20, [0.2] * 100)
    assert (won.wins, won.ties, won.pairs, won.rate) == (60, 20, 100, 0.7)
    assert won.low == pytest.approx(0.7 - math.sqrt(math.log(20) / 200))
    assert won.p_value == pytest.approx(math.exp(-8))


def test_who_wins_no_more_than_half_shows_nothing():
    assert (
        WinRate(wins=0, ties=10, pairs=10).p_value
        == WinRate(wins=2, ties=0, pairs=10).p_value
        == 1.0
    )
    assert WinRate(wins=1, ties=0, pairs=10).low == 0.0


@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=30))
@quick
def test_what_one_wins_the_other_loses(pairs):
    ours, theirs = zip(*pairs, strict=True)
    one = win_rate(ours, theirs)
    other = win_rate(theirs, ours)
    assert one.rate + other.rate == pytest.approx(1.0)
    assert one.ties == other.ties
    assert one.low <= one.rate


@pytest.mark.parametrize(
    ("pairs", "rate", "delta"), list(itertools.product([5, 30, 200], [0.2, 0.5, 0.8], [0.05, 0.3]))
)
def test_the_bound_is_wrong_no_more_often_than_it_says(pairs, rate, delta):
    """Over all outcomes of a binomial law: P(low > true rate) <= delta, and P(p <= delta) <= delta
    for a coin.
    """
    law = stats.binom.pmf(np.arange(pairs + 1), pairs, rate)
    outcomes = [WinRate(wins=wins, ties=0, pairs=pairs, delta=delta) for wins in range(pairs + 1)]
    assert law[[outcome.low > rate for outcome in outcomes]].sum() <= delta
    if rate <= 0.5:
        assert law[[outcome.p_value <= delta for outcome in outcomes]].sum() <= delta


def test_bound_and_p_value_say_the_same():
    """The lower bound leaves a half exactly when the p-value falls below delta."""
    for wins, delta in itertools.product(range(51), (0.01, 0.05, 0.2)):
        outcome = WinRate(wins=wins, ties=0, pairs=50, delta=delta)
        assert (outcome.low > 0.5) == (outcome.p_value < delta)


@pytest.mark.parametrize(
    ("ours", "theirs"), [([], []), ([0.1], [0.1, 0.2]), ([math.nan], [0.1]), ([0.1], [math.nan])]
)
def test_errors_without_a_partner_are_refused(ours, theirs):
    with pytest.raises(RecordingError, match="pairs, at least one"):
        win_rate(ours, theirs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"pairs": 0, "wins": 0},
        {"wins": 3, "pairs": 2},
        {"ties": -1},
        {"delta": 0.0},
        {"delta": 1.0},
    ],
)
def test_a_win_rate_that_cannot_be_is_refused(wrong):
    with pytest.raises(RecordingError):
        WinRate(**{"wins": 1, "ties": 0, "pairs": 2, **wrong})


def test_increases_that_are_infinite_can_be_compared():
    assert win_rate([math.inf, 3.0], [math.inf, math.inf]) == WinRate(wins=1, ties=1, pairs=2)
