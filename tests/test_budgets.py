"""Distributions over time budgets, and the two sides of one integral."""

import itertools
import json
import math
from collections.abc import Callable
from time import process_time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from impatient import budgets
from impatient.budgets import (
    STANDARD,
    STEEPNESS,
    Budget,
    deepest_for_some,
    exit_weights,
    exit_weights_many,
    expected_accuracy,
    parse_budget,
    standard,
)
from impatient.costs import BatchCosts, CostProfile, Quantiles
from impatient.errors import BudgetError, CostOrderError, StorageError
from impatient.provenance import provenance
from impatient.store import from_plain, to_plain

COSTS = (1.0, 2.0, 4.0, 8.0)
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def share_small(u: float) -> float:
    """P(budget < u) on [0, 1] when the density falls as exp(-4 u)."""
    return (1 - math.exp(-STEEPNESS * u)) / (1 - math.exp(-STEEPNESS))


def share_normal(u: float) -> float:
    """P(budget < u) on [0, 1] for a normal around 1/2 with deviation 1/6, cut off at its ends."""
    return 0.5 + 0.5 * math.erf(6 * (u - 0.5) / math.sqrt(2)) / math.erf(3 / math.sqrt(2))


# P(budget < t) on [1, 9], written down by hand
BY_HAND: dict[str, Callable[[float], float]] = {
    "uniform": lambda t: (t - 1) / 8,
    "small_likely": lambda t: share_small((t - 1) / 8),
    "large_likely": lambda t: 1 - share_small((9 - t) / 8),
    "normal": lambda t: share_normal((t - 1) / 8),
    "log_uniform": lambda t: math.log(t) / math.log(9),
}


def over(shape: str, low: float = 1.0, high: float = 9.0) -> Budget:
    made = getattr(budgets, shape)(low, high)
    assert isinstance(made, Budget)
    return made


# --- distributions --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", BY_HAND)
def test_probabilities_are_those_worked_out_by_hand(shape):
    for time in (1.0, 1.5, 3.0, 5.0, 8.9, 9.0):
        assert over(shape).probability_below(time) == pytest.approx(BY_HAND[shape](time), abs=1e-12)


@pytest.mark.parametrize("shape", BY_HAND)
def test_no_budget_lies_outside_the_range(shape):
    budget = over(shape)
    assert [budget.probability_below(time) for time in (0.0, 0.99, 9.01, 1e9)] == [
        0.0,
        0.0,
        1.0,
        1.0,
    ]
    drawn = budget.sample(1000)
    assert drawn.min() >= 1.0
    assert drawn.max() <= 9.0


@pytest.mark.parametrize("shape", BY_HAND)
def test_draws_mean_and_density_belong_to_the_same_distribution(shape):
    budget = over(shape)
    times = np.linspace(1.0, 9.0, 2001)
    assert np.trapezoid(budget.density(times), times) == pytest.approx(1.0, abs=1e-4)
    assert np.trapezoid(times * budget.density(times), times) == pytest.approx(
        budget.mean_s(), abs=1e-3
    )
    drawn = budget.sample(40_000, seed=1)
    assert drawn.mean() == pytest.approx(budget.mean_s(), abs=5 * drawn.std() / 200)
    assert (drawn < 3.0).mean() == pytest.approx(BY_HAND[shape](3.0), abs=5 * 0.5 / 200)


SCIPY: dict[str, Callable[[float, float], Any]] = {
    "uniform": lambda low, high: stats.uniform(low, high - low),
    "small_likely": lambda low, high: stats.truncexpon(STEEPNESS, low, (high - low) / STEEPNESS),
    # the mirror image, read from the other end in the tests
    "large_likely": lambda low, high: stats.truncexpon(STEEPNESS, low, (high - low) / STEEPNESS),
    "normal": lambda low, high: stats.truncnorm(-3.0, 3.0, (low + high) / 2, (high - low) / 6),
    "log_uniform": lambda low, high: stats.loguniform(low, high),
}
ENDS = [(1.0, 9.0), (1e-4, 0.010), (1e-9, 1e3), (3.0, 3.003)]


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("shape", SCIPY)
def test_arrays_of_probabilities_are_scipys_and_the_same_as_one_by_one(shape, ends):
    budget = over(shape, *ends)
    (low, high) = ends
    times = np.array(
        [
            0.0,
            low,
            *np.linspace(low, high, 97),
            *np.geomspace(low, high, 98),
            high,
            2 * high,
            math.inf,
        ]
    )
    found = budget.probability_below(times)
    theirs = SCIPY[shape](low, high)
    mirrored = shape == "large_likely"
    wanted = theirs.sf(low + high - times) if mirrored else theirs.cdf(times)
    # not closer: scipy divides logarithms and differences that nearly cancel where the ends lie
    # close together
    assert found == pytest.approx(wanted, rel=0, abs=1e-12)
    assert found == pytest.approx(
        [budget.probability_below(time) for time in times.tolist()], rel=0, abs=1e-15
    )
    assert budget.probability_below(times.reshape(4, -1)) == pytest.approx(
        found.reshape(4, -1), rel=0, abs=1e-15
    )


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("shape", SCIPY)
def test_density_mean_and_quantiles_are_scipys(shape, ends):
    budget = over(shape, *ends)
    (low, high) = ends
    theirs = SCIPY[shape](low, high)
    total = low + high
    mirrored = shape == "large_likely"
    times = np.linspace(low, high, 99)[1:-1]
    wanted = theirs.pdf(total - times if mirrored else times)
    assert budget.density(times) == pytest.approx(wanted, rel=1e-10)
    assert budget.density(np.array([low / 2, 2 * high])).tolist() == [0.0, 0.0]
    mean = total - theirs.mean() if mirrored else theirs.mean()
    assert budget.mean_s() == pytest.approx(mean, rel=1e-10)
    shares = np.random.default_rng(7).random(50)
    drawn = total - theirs.isf(shares) if mirrored else theirs.ppf(shares)
    assert budget.sample(50, seed=7) == pytest.approx(drawn, rel=1e-10)


def test_arrays_of_probabilities_of_a_log_count_what_is_strictly_below():
    budget = budgets.empirical([1.0, 2.0, 2.0, 4.0])
    found = budget.probability_below(np.array([[0.5, 1.0, 1.5], [2.0, 2.5, 9.0]]))
    assert found.tolist() == [[0.0, 0.0, 0.25], [0.25, 0.75, 1.0]]
    assert isinstance(budget.probability_below(2.0), float)
    assert isinstance(over("normal").probability_below(2.0), float)


def test_draws_depend_on_the_seed_alone():
    budget = over("normal")
    assert np.array_equal(budget.sample(5, seed=3), budget.sample(5, seed=3))
    assert not np.array_equal(budget.sample(5, seed=3), budget.sample(5, seed=4))


def test_means_of_the_four_standard_shapes_are_ordered_as_their_names_say():
    means = {shape: budget.mean_s() for shape, budget in standard(0.010).items()}
    assert tuple(means) == STANDARD
    assert means["small_likely"] < means["uniform"] < means["large_likely"]
    assert means["uniform"] == pytest.approx(0.005)
    assert means["normal"] == pytest.approx(0.005)
    assert means["small_likely"] + means["large_likely"] == pytest.approx(0.010)
    assert means["small_likely"] == pytest.approx(
        0.010 * (1 / STEEPNESS - 1 / (math.exp(STEEPNESS) - 1))
    )


def test_density_of_small_likely_falls_by_exp_4_and_large_likely_mirrors_it():
    small = over("small_likely").density(np.array([1.0, 9.0]))
    large = over("large_likely").density(np.array([1.0, 9.0]))
    assert small[0] / small[1] == pytest.approx(math.exp(4.0))
    assert large == pytest.approx(small[::-1])


def test_a_budget_of_exactly_an_exits_cost_pays_for_that_exit():
    assert exit_weights(budgets.point(2.0), COSTS) == (0.0, 1.0, 0.0, 0.0)
    assert exit_weights(budgets.point(math.nextafter(2.0, 0.0)), COSTS) == (1.0, 0.0, 0.0, 0.0)


def test_an_empirical_budget_counts_its_log_ties_included():
    budget = budgets.empirical([2.0, 1.0, 2.0, 0.5, 9.0, 3.999, 4.0, 2.0])
    assert [budget.probability_below(time) for time in (0.5, 0.6, 2.0, 2.1, 9.0, 9.1)] == [
        0.0,
        1 / 8,
        2 / 8,
        5 / 8,
        7 / 8,
        1.0,
    ]
    assert exit_weights(budget, COSTS) == (1 / 8, 4 / 8, 1 / 8, 1 / 8)
    assert budget.mean_s() == pytest.approx(24.499 / 8)
    assert set(budget.sample(200)) <= {0.5, 1.0, 2.0, 3.999, 4.0, 9.0}
    assert budget.density(np.array([2.0])).tolist() == [0.0]


# --- exit weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", BY_HAND)
def test_weights_are_the_probability_of_each_stretch_between_exits(shape):
    cdf = BY_HAND[shape]
    wanted = (cdf(2.0) - cdf(1.0), cdf(4.0) - cdf(2.0), cdf(8.0) - cdf(4.0), 1 - cdf(8.0))
    assert exit_weights(over(shape), COSTS) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    "budget", [*map(over, BY_HAND), budgets.point(3.0), budgets.empirical([0.5, 3.0, 3.0])]
)
def test_weights_add_up_to_the_share_of_budgets_that_pay_for_the_first_exit(budget):
    costs = (2.5, 4.0, 8.0)
    assert sum(exit_weights(budget, costs)) == pytest.approx(
        1.0 - budget.probability_below(2.5), abs=1e-12
    )
    assert sum(exit_weights(budget, costs, normalise=True)) == pytest.approx(1.0, abs=1e-12)


def test_normalising_keeps_the_proportions():
    plain, whole = (
        exit_weights(budgets.uniform(0.0, 10.0), COSTS, normalise=flag) for flag in (False, True)
    )
    assert plain == (0.1, 0.2, 0.4, 0.2)
    assert whole == pytest.approx([weight / 0.9 for weight in plain])


def test_budgets_that_pay_for_no_exit_weigh_nothing_and_cannot_be_normalised():
    poor = budgets.uniform(0.0, 0.5)
    assert exit_weights(poor, COSTS) == (0.0, 0.0, 0.0, 0.0)
    with pytest.raises(
        BudgetError, match=r"no budget between 0 and 0\.5 s pays for the cheapest exit \(1 s\)"
    ):
        exit_weights(poor, COSTS, normalise=True)


def test_budgets_that_always_pay_for_the_last_exit_put_all_weight_on_it():
    assert exit_weights(budgets.uniform(8.0, 20.0), COSTS) == (0.0, 0.0, 0.0, 1.0)


def test_contract_and_interruptible_costs_give_different_weights():
    def seconds(value: float) -> Quantiles:
        return Quantiles.of([value])

    batch = BatchCosts(
        stages=(seconds(1.0),) * 3,
        heads=(seconds(0.5), seconds(0.5), seconds(0.0)),
        exit_free=seconds(3.0),
    )
    integers = dict.fromkeys(
        ("stage_macs", "head_macs", "stage_parameters", "head_parameters"), (1, 1, 1)
    )
    costs = CostProfile(
        exits=("a", "b", "output"), batches={1: batch}, provenance=provenance(), **integers
    )
    budget = budgets.uniform(0.0, 5.0)
    # exits at 1.5, 2.5, 3
    assert exit_weights(budget, costs.contract_s()) == pytest.approx((0.2, 0.1, 0.4))
    # exits at 1.5, 3, 4
    assert exit_weights(budget, costs.interruptible_s()) == pytest.approx((0.3, 0.2, 0.2))


def test_an_exit_that_costs_as_much_as_a_deeper_one_weighs_nothing():
    budget = budgets.uniform(0.0, 10.0)
    assert exit_weights(budget, [1.0, 4.0, 3.0, 3.0, 8.0]) == (0.2, 0.0, 0.0, 0.5, 0.2)
    assert exit_weights(budget, [2.0, 1.0]) == (0.0, 0.9)
    with pytest.raises(BudgetError, match=r"pays for the cheapest exit \(3 s\)"):
        exit_weights(budgets.uniform(0.0, 2.5), [4.0, 3.0], normalise=True)


@given(
    st.lists(st.floats(0.1, 12.0), min_size=1, max_size=6),
    st.lists(st.floats(0.0, 12.0), min_size=1, max_size=20),
)
def test_in_any_order_of_costs_weights_count_the_deepest_affordable_exit(costs, log):
    log = [budget + 0.01 for budget in log]
    deepest = [
        max((exit for exit, cost in enumerate(costs) if cost <= budget), default=None)
        for budget in log
    ]
    wanted = [deepest.count(exit) / len(log) for exit in range(len(costs))]
    assert exit_weights(budgets.empirical(log), costs) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("costs", [[], [0.0, 1.0], [-1.0, 1.0], [1.0, math.nan], [1.0, math.inf]])
def test_costs_that_are_not_positive_are_refused(costs):
    with pytest.raises(CostOrderError, match="cumulative costs must"):
        exit_weights(budgets.uniform(0.0, 10.0), costs)


# --- many budgets at once -------------------------------------------------------------------------


def test_weights_of_many_budgets_are_their_own_in_their_order():
    mixed = [
        budgets.point(4.0),
        over("normal"),
        budgets.uniform(0.0, 10.0),
        budgets.empirical([1.0, 9.0]),
        over("normal"),
        over("uniform"),
        budgets.point(0.5),
    ]
    for normalise in (False, True):
        made = mixed[:-1] if normalise else mixed
        found = exit_weights_many(made, COSTS, normalise=normalise)
        wanted = np.array([exit_weights(budget, COSTS, normalise=normalise) for budget in made])
        assert found == pytest.approx(wanted, rel=0, abs=3e-15)
    assert exit_weights_many(mixed, COSTS)[[0, 2, 3, 6]].tolist() == [
        [0.0, 0.0, 1.0, 0.0],
        [0.1, 0.2, 0.4, 0.2],
        [0.5, 0.0, 0.0, 0.5],
        [0.0] * 4,
    ]


def test_of_many_budgets_the_one_that_pays_for_nothing_is_named():
    with pytest.raises(
        BudgetError, match=r"no budget between 0\.25 and 0\.5 s pays for the cheapest exit \(1 s\)"
    ):
        exit_weights_many([over("uniform"), budgets.uniform(0.25, 0.5)], COSTS, normalise=True)


def test_no_budgets_have_no_weights():
    assert exit_weights_many([], COSTS).shape == (0, 4)
    with pytest.raises(CostOrderError):
        exit_weights_many([], [2.0, -1.0])


def test_a_thousand_budgets_and_sixteen_exits_take_far_less_than_half_a_second():
    costs = np.linspace(0.5, 10.0, 16).tolist()
    log = np.linspace(0.1, 12.0, 500).tolist()
    many = [over(shape, 0.1 + index / 400, 10.0) for index in range(160) for shape in BY_HAND]
    many += [budgets.empirical(log)] * 100 + [
        budgets.point(1.0 + index / 100) for index in range(100)
    ]
    # the processor's own time: other processes do not count
    begin = process_time()
    assert exit_weights_many(many, costs).shape == (1000, 16)
    assert process_time() - begin < 0.5


def test_an_exit_dearer_than_a_deeper_one_is_never_the_deepest_that_fits():
    for costs in ([1.5, 4.0, 3.2], [1.0], [3.0, 2.0, 1.0], [1.0, 1.0, 2.0], COSTS):
        deepest = {
            max((k for k, cost in enumerate(costs) if cost <= budget), default=None)
            for budget in np.linspace(0, 9, 901)
        }
        assert set(deepest_for_some(costs)) == deepest - {None}


# --- expected accuracy ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*BY_HAND, "point", "empirical"])
@pytest.mark.parametrize("without_answer", [0.0, 0.1])
def test_expected_accuracy_is_the_mean_over_drawn_budgets(shape, without_answer):
    made = {"point": budgets.point(4.0), "empirical": budgets.empirical([1.0, 2.5, 2.5, 7.0])}
    budget = made.get(shape) or over(shape)
    costs = (2.0, 2.5, 6.0)
    accuracies = (0.5, 0.75, 0.95)
    drawn = budget.sample(40_000, seed=2)
    answer = np.array([without_answer, *accuracies])[np.searchsorted(costs, drawn, side="right")]
    error = 5 * answer.std() / math.sqrt(len(drawn)) + 1e-12
    assert expected_accuracy(
        budget, costs, accuracies, without_answer=without_answer
    ) == pytest.approx(answer.mean(), abs=error)


def test_a_missing_answer_counts_as_a_failure_unless_credited():
    budget = budgets.uniform(0.0, 10.0)
    assert expected_accuracy(budget, [5.0], [0.8]) == pytest.approx(0.4)
    assert expected_accuracy(budget, [5.0], [0.8], without_answer=0.1) == pytest.approx(0.45)


def test_accuracies_must_be_as_many_as_exits():
    with pytest.raises(BudgetError, match="expected one per exit"):
        expected_accuracy(budgets.uniform(0.0, 10.0), COSTS, [0.5, 0.6])


# --- properties -----------------------------------------------------------------------------------

times = st.floats(1e-6, 1e3)
increasing = st.lists(times, min_size=1, max_size=8, unique=True).map(sorted)
ranges = (
    st.tuples(times, times)
    .filter(lambda pair: pair[1] > pair[0] * 1.001 or pair[0] > pair[1] * 1.001)
    .map(sorted)
)
any_budget = st.one_of(
    st.builds(lambda shape, ends: over(shape, *ends), st.sampled_from(sorted(BY_HAND)), ranges),
    times.map(budgets.point),
    st.lists(times, min_size=1, max_size=20).map(budgets.empirical),
)


@quick
@given(any_budget, increasing)
def test_weights_are_probabilities(budget, costs):
    weights = exit_weights(budget, costs)
    assert len(weights) == len(costs)
    assert all(0.0 <= weight <= 1.0 for weight in weights)
    assert sum(weights) == pytest.approx(1.0 - budget.probability_below(costs[0]), abs=1e-9)


@quick
@given(st.lists(any_budget, max_size=6), increasing)
def test_weights_of_any_budgets_are_the_chances_of_each_stretch(some, costs):
    found = exit_weights_many(some, costs)
    assert found.shape == (len(some), len(costs))
    for row, budget in zip(found, some, strict=True):
        below = [*(budget.probability_below(cost) for cost in costs), 1.0]
        assert row == pytest.approx(
            [after - before for before, after in itertools.pairwise(below)], rel=0, abs=1e-14
        )


@quick
@given(any_budget, increasing, st.floats(1.0, 100.0))
def test_dearer_exits_never_gain_depth(budget, costs, factor):
    """The chance to reach at least exit k falls when everything costs more."""
    before = exit_weights(budget, costs)
    after = exit_weights(budget, [cost * factor for cost in costs])
    for k in range(len(costs)):
        assert sum(after[k:]) <= sum(before[k:]) + 1e-9


@quick
@given(any_budget, increasing, st.data())
def test_expected_accuracy_lies_between_the_worst_and_the_best_outcome(budget, costs, data):
    accuracies = data.draw(st.lists(st.floats(0.0, 1.0), min_size=len(costs), max_size=len(costs)))
    value = expected_accuracy(budget, costs, accuracies)
    assert -1e-9 <= value <= max(accuracies) + 1e-9


@quick
@given(any_budget)
def test_any_budget_survives_json(budget):
    assert from_plain(json.loads(json.dumps(to_plain(budget))), Budget) == budget


@quick
@given(any_budget, times, times)
def test_probabilities_never_fall_with_time(budget, one, other):
    early, late = sorted((one, other))
    assert 0.0 <= budget.probability_below(early) <= budget.probability_below(late) <= 1.0


# --- what is refused ------------------------------------------------------------------------------

BAD_RANGES = [
    (0.0, 0.0),
    (2.0, 1.0),
    (-1.0, 1.0),
    (-2.0, -1.0),
    (math.nan, 1.0),
    (0.0, math.nan),
    (0.0, math.inf),
    ("0", "1"),
    (0.0, True),
]


@pytest.mark.parametrize(("shape", "ends"), list(itertools.product(BY_HAND, BAD_RANGES)))
def test_a_range_that_is_empty_negative_or_no_number_is_refused(shape, ends):
    with pytest.raises(BudgetError, match="budget"):
        over(shape, *ends)


def test_a_log_uniform_budget_cannot_begin_at_zero():
    with pytest.raises(BudgetError, match="lower end of a log-uniform budget"):
        budgets.log_uniform(0.0, 1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "soon", "5", True])
def test_a_point_or_a_logged_budget_must_be_a_positive_time(value):
    with pytest.raises(BudgetError, match="budget"):
        budgets.point(value)
    with pytest.raises(BudgetError, match="budget"):
        budgets.empirical([1.0, value])


def test_an_empty_log_is_refused():
    with pytest.raises(BudgetError, match="the log of budgets is empty"):
        budgets.empirical([])


# --- files ----------------------------------------------------------------------------------------


def test_a_budget_survives_its_file(tmp_path):
    for budget in (over("normal"), budgets.empirical([0.1, 0.2, 0.2])):
        budget.save(tmp_path / "budget.json")
        assert Budget.load(tmp_path / "budget.json") == budget


MALFORMED = [
    {},
    {"shape": "uniform"},
    {"shape": "gamma", "low": 0.0, "high": 1.0, "samples_s": []},
    {"shape": "uniform", "low": 0.0, "high": 1.0, "samples_s": [], "extra": 1},
    {"shape": "uniform", "low": "a", "high": 1.0, "samples_s": []},
    {"shape": "uniform", "low": 1.0, "high": 1.0, "samples_s": []},
    {"shape": "log_uniform", "low": 0.0, "high": 1.0, "samples_s": []},
    {"shape": "uniform", "low": 0.0, "high": 1.0, "samples_s": [0.5]},
    {"shape": "point", "low": 1.0, "high": 1.0, "samples_s": []},
    {"shape": "empirical", "low": 1.0, "high": 3.0, "samples_s": [3.0, 1.0]},
    {"shape": "empirical", "low": 1.0, "high": 3.0, "samples_s": [1.0, "b"]},
    {"shape": "empirical", "low": 1.0, "high": 3.0, "samples_s": [0.5, 3.0]},
]


@pytest.mark.parametrize("value", MALFORMED, ids=lambda value: json.dumps(value)[:60])
def test_a_malformed_budget_is_refused(tmp_path, value):
    with pytest.raises(StorageError, match="is no budget"):
        from_plain(value, Budget)


def test_a_budget_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StorageError, match="none"):
        Budget.load(tmp_path / "none.json")


# --- one word on the command line -----------------------------------------------------------------


@pytest.mark.parametrize("shape", BY_HAND)
def test_a_shape_is_read_with_its_ends_in_milliseconds(shape):
    assert parse_budget(f"{shape}:2:16") == over(shape, 0.002, 0.016)


def test_a_point_is_read_in_milliseconds():
    assert parse_budget("point:8") == budgets.point(0.008)
    assert parse_budget("uniform:0:0.5").high == 0.0005


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("uniform:0:40mmacs", budgets.uniform(0.0, 40e6, cost="macs")),
        ("point:1.5MB", budgets.point(1.5e6, cost="bytes")),
        ("large_likely:9:70mJ", budgets.large_likely(0.009, 0.07, cost="energy")),
        ("normal:9:70ms", budgets.normal(0.009, 0.07)),
        ("log_uniform:1e-1:1e3mb", budgets.log_uniform(1e5, 1e9, cost="bytes")),
        ("small_likely:0:5.mj", budgets.small_likely(0.0, 0.005, cost="energy")),
    ],
)
def test_a_unit_says_what_is_limited(text, wanted):
    assert parse_budget(text) == wanted


@pytest.mark.parametrize(
    "text",
    ["uniform:0:10parsecs", "point:3s", "uniform:0mmacs:40mmacs", "uniform:0:40 mmacs", "point:mj"],
)
def test_an_unknown_or_misplaced_unit_is_refused(text):
    with pytest.raises(BudgetError, match=r"unknown unit|not a number"):
        parse_budget(text)


def test_an_unknown_unit_is_told_the_known_ones():
    with pytest.raises(
        BudgetError,
        match=(
            "unknown unit 'parsecs' in '0:10parsecs'; expected one of ms, mmacs, mb, mj, or none "
            "for ms"
        ),
    ):
        parse_budget("uniform:0:10parsecs")


def test_a_budget_of_another_cost_comes_back_from_its_file(tmp_path):
    for budget in (
        budgets.uniform(0.0, 4e7, cost="macs"),
        budgets.empirical([0.5, 0.25], cost="energy"),
    ):
        budget.save(tmp_path / "budget.json")
        assert Budget.load(tmp_path / "budget.json") == budget
    value = to_plain(budgets.uniform(0.0, 1.0))
    assert (value.pop("cost"), value.pop("schema")) == ("time", 2)
    # from before budgets had costs
    assert from_plain(value, Budget).cost == "time"
    with pytest.raises(
        BudgetError, match="cost='money'; expected one of time, macs, bytes, energy"
    ):
        budgets.point(1.0, cost="money")


def test_a_log_is_read_one_budget_a_line_in_milliseconds(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("8\n\n 4.0 \n8\n")
    assert parse_budget(f"log:{log}") == budgets.empirical([0.004, 0.008, 0.008])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "uniform",
        "uniform:",
        "uniform:1",
        "uniform:1:2:3",
        "uniform:a:b",
        "uniform:2:1",
        "uniform:-1:1",
        "uniform:nan:1",
        "uniform:0:inf",
        "gamma:1:2",
        "point",
        "point:",
        "point:0",
        "point:1:2",
        "point:x",
        "log_uniform:0:1",
        "log:",
        "log:/none/such/file",
        "empirical:1:2",
        "8",
    ],
)
def test_a_word_that_is_no_budget_is_refused(text):
    with pytest.raises(BudgetError):
        parse_budget(text)


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        (b"", "empty"),
        (b"8\nsoon\n", "not a number"),
        (b"8\n-1\n", "logged budget"),
        (b"nan", "logged budget"),
        (b"\xff\xfe", "not a number"),
    ],
)
def test_a_log_that_holds_no_budgets_is_refused(tmp_path, written, complaint):
    (tmp_path / "log").write_bytes(written)
    with pytest.raises(BudgetError, match=complaint):
        parse_budget(f"log:{tmp_path / 'log'}")


def test_a_word_that_is_no_budget_is_told_what_would_be():
    with pytest.raises(
        BudgetError,
        match=r"SHAPE:LOW:HIGH in milliseconds \(uniform:0:10\), point:T \(point:8\), or log:FILE",
    ):
        parse_budget("gamma:1:2")


# --- budgets of single samples --------------------------------------------------------------------

SAMPLE_COSTS = (1.0, 2.0, 4.0)
QUALITY = np.random.default_rng(0).random((3, 50))


def test_known_budgets_give_each_sample_its_deepest_affordable_exit() -> None:
    budgets_s = np.random.default_rng(1).uniform(0.2, 6.0, 50)
    budgets_s[:2] = 0.0, math.inf
    by_hand = []
    for sample, budget_s in enumerate(budgets_s):
        paid = [exit for exit, cost in enumerate(SAMPLE_COSTS) if cost <= budget_s]
        by_hand.append(QUALITY[paid[-1], sample] if paid else 0.25)
    found = expected_accuracy(
        budgets.per_sample(budgets_s), SAMPLE_COSTS, QUALITY, without_answer=0.25
    )
    assert found == pytest.approx(np.mean(by_hand))


def test_distributions_per_sample_are_the_mean_over_drawn_budgets() -> None:
    laws = [budgets.uniform(0.0, 2.0 + sample / 10) for sample in range(50)]
    found = expected_accuracy(budgets.per_sample(laws), SAMPLE_COSTS, QUALITY)
    draws = np.stack([law.sample(20_000, seed) for seed, law in enumerate(laws)])
    known = [
        expected_accuracy(budgets.per_sample(draws[:, place] + 1e-12), SAMPLE_COSTS, QUALITY)
        for place in range(200)
    ]
    # each is a mean over 50 samples; 200 of them have a standard error of about 0.003
    assert found == pytest.approx(np.mean(known), abs=0.015)
    same = budgets.per_sample([budgets.uniform(0.0, 5.0)] * 50)
    assert expected_accuracy(same, SAMPLE_COSTS, QUALITY) == pytest.approx(
        expected_accuracy(budgets.uniform(0.0, 5.0), SAMPLE_COSTS, QUALITY.mean(1))
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: budgets.per_sample([]), "no samples"),
        (lambda: budgets.per_sample([1.0, -1.0]), "positive"),
        (
            lambda: budgets.per_sample([budgets.point(1.0), budgets.point(1.0, cost="macs")]),
            "budgets of macs, time",
        ),
        (
            lambda: expected_accuracy(budgets.per_sample([1.0] * 3), SAMPLE_COSTS, QUALITY),
            r"budgets of 3 samples; expected \[K, N\]",
        ),
        (
            lambda: expected_accuracy(budgets.point(1.0), SAMPLE_COSTS, QUALITY),
            "expected one per exit",
        ),
    ],
)
def test_budgets_of_single_samples_that_do_not_fit_are_refused(call: Any, said: str) -> None:
    with pytest.raises(BudgetError, match=said):
        call()
