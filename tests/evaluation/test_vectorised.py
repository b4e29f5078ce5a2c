"""Many budgets and policies at once: the numbers of `evaluate`, one by one."""

import math
import random

import numpy as np
import pytest
import torch

from impatient import budgets
from impatient.errors import (
    CostOrderError,
    PolicyError,
    RecordingError,
    SplitReuseError,
    StaleInput,
)
from impatient.evaluation import evaluate
from impatient.evaluation.vectorised import expected_accuracies, judge_policies
from impatient.policies import ThresholdPolicy, fit_thresholds
from impatient.tasks.scores import SCORES
from recordings import costs_of, drawn, recording_of, sure

INF = math.inf
COSTS = costs_of(
    [1.0, 1.5, 0.5, 2.0], [0.3, 0.2, 0.1, 0.0], stage_macs=[10, 20, 30, 40], head_macs=[1, 2, 3, 0]
)
# contract costs 1.3, 3.7, 3.1, 5.0: exit 1 costs more than exit 2
OVERTAKEN = costs_of([1.0, 1.5, 0.5, 2.0], [0.3, 1.2, 0.1, 0.0])


def many_budgets(count, seed=0):
    draw = random.Random(seed)
    made = []
    for index in range(count):
        shape = [*budgets.STANDARD, "log_uniform", "point", "empirical"][index % 7]
        if shape == "point":
            made.append(budgets.point(draw.choice([1.3, 3.1, draw.uniform(0.5, 8.0)])))
        elif shape == "empirical":
            made.append(
                budgets.empirical([draw.uniform(0.5, 8.0) for _ in range(draw.randint(1, 9))])
            )
        else:
            low = draw.uniform(0.1, 4.0)
            made.append(getattr(budgets, shape)(low, low + draw.uniform(0.1, 5.0)))
    return made


def many_policies(recording, count, seed=0):
    """Thresholds among the scores that occur, so that ties matter, with closed exits and exits that
    take all.
    """
    draw = random.Random(seed)
    scores = {name: score(recording.outputs).tolist() for name, score in SCORES.items()}
    made = []
    for _ in range(count):
        name = draw.choice(list(SCORES))
        bounds = [draw.choice([INF, -INF, 0.5, *draw.sample(row, 6)]) for row in scores[name][:-1]]
        made.append(ThresholdPolicy(score=name, thresholds=(*bounds, -INF)))
    return made


# --- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("costs", [COSTS, OVERTAKEN], ids=["increasing", "overtaken"])
def test_expected_accuracies_are_those_of_evaluate(costs):
    recording = drawn(300, seed=1, split="test")
    made = many_budgets(70)
    found = {
        "interruptible": expected_accuracies(recording, costs.interruptible_s(), made),
        "contract": expected_accuracies(recording, costs.contract_s(), made),
    }
    rows = evaluate(
        recording, costs, budgets={str(index): budget for index, budget in enumerate(made)}
    ).under_budgets
    for name, accuracies in found.items():
        wanted = [row.accuracy.value for row in rows if row.name == name]
        assert len(set(wanted)) > 40
        assert accuracies.tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_expected_accuracies_are_those_of_one_budget_at_a_time():
    recording = drawn(300, seed=2)
    made = many_budgets(21)
    cost = COSTS.interruptible_s()
    exits = recording.quality.double().mean(1).tolist()
    for credit in (0.0, 0.2):
        wanted = [
            budgets.expected_accuracy(budget, cost, exits, without_answer=credit) for budget in made
        ]
        assert expected_accuracies(
            recording, cost, made, without_answer=credit
        ).tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_right_and_wrong_may_be_given_instead_of_a_recording():
    """Under a policy a sample holds on to the answer with which it left."""
    recording = drawn(200, seed=3, split="test")
    made = many_budgets(14)
    policy = ThresholdPolicy(score="margin", thresholds=(0.6, 0.4, 0.3, -INF))
    held = torch.minimum(torch.arange(4)[:, None], policy.exits_of(recording.outputs)[None])
    hits = recording.quality[held, torch.arange(200)]
    rows = evaluate(
        recording, COSTS, policy, budgets={str(index): entry for index, entry in enumerate(made)}
    ).under_budgets
    wanted = [row.accuracy.value for row in rows if row.name == "policy"]
    assert expected_accuracies(hits, COSTS.interruptible_s(), made).tolist() == pytest.approx(
        wanted, rel=1e-12, abs=1e-12
    )


def test_no_budgets_give_no_numbers():
    assert expected_accuracies(drawn(10, seed=4), COSTS.interruptible_s(), []).shape == (0,)


def test_costs_must_be_those_of_the_exits():
    with pytest.raises(RecordingError, match="4 exits were recorded, but 2 costs"):
        expected_accuracies(drawn(10, seed=4), [1.0, 2.0], [budgets.point(1.0)])
    with pytest.raises(CostOrderError):
        expected_accuracies(drawn(10, seed=4), [0.0, 1.0, 2.0, 3.0], [budgets.point(1.0)])


# --- policies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["mean", "p99"])
def test_outcomes_are_the_rows_of_evaluate(statistic):
    recording = drawn(250, seed=5, split="test")
    policies = many_policies(recording, 60)
    outcomes = judge_policies(recording, COSTS, policies, statistic=statistic)
    named = {str(index): policy for index, policy in enumerate(policies)}
    rows = evaluate(recording, COSTS, named, statistic=statistic, budgets={}).of("policy")
    assert len(outcomes) == len(rows) == 60
    assert outcomes.accuracy.tolist() == [row.accuracy.value for row in rows]
    assert outcomes.shares.tolist() == [list(row.shares) for row in rows]
    for name in ("interruptible_s", "contract_s", "macs"):
        assert getattr(outcomes, name).tolist() == pytest.approx(
            [getattr(row, name) for row in rows], rel=1e-12, abs=1e-12
        ), name
    assert len({row.accuracy.value for row in rows}) > 20


def test_outcomes_by_hand():
    right = [[1, 0, 0, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    surety = [
        [0.92, 0.65, 0.71, 0.82, 0.55],
        [0.92, 0.91, 0.65, 0.58, 0.57],
        [0.95, 0.94, 0.91, 0.61, 0.55],
    ]
    costs = costs_of(
        [1.0, 2.0, 3.0], [0.5, 0.25, 0.0], stage_macs=[10, 20, 30], head_macs=[1, 2, 0]
    )
    policies = [
        # 0 and 3 leave first, exit 1 is closed
        ThresholdPolicy(score="max_probability", thresholds=(0.75, INF, -INF)),
        # all but the last leave first
        ThresholdPolicy(score="max_probability", thresholds=(0.6, 0.9, -INF)),
        ThresholdPolicy(score="max_probability", thresholds=(INF, INF, -INF)),
    ]
    outcomes = judge_policies(recording_of(*sure(right, surety), split="test"), costs, policies)
    assert outcomes.accuracy.tolist() == [4 / 5, 2 / 5, 3 / 5]
    assert outcomes.shares.tolist() == [[0.4, 0, 0.6], [0.8, 0, 0.2], [0, 0, 1]]
    assert outcomes.interruptible_s.tolist() == pytest.approx(
        [(3 + 3 * 6.75) / 5, (4 * 1.5 + 6.75) / 5, 6.75]
    )
    assert outcomes.contract_s.tolist() == pytest.approx(
        [(3 + 3 * 6.5) / 5, (4 * 1.5 + 6.75) / 5, 6.0]
    )
    assert outcomes.macs.tolist() == pytest.approx([(22 + 3 * 61) / 5, (44 + 63) / 5, 60])


@pytest.mark.parametrize("bound", [0.7, 0.1, 1e300, -1e300, 0.3])
def test_thresholds_are_compared_in_the_precision_of_the_scores(bound):
    """0.7 is more than the nearest float32, as which a score of 0.7 is stored."""
    recording = recording_of(*sure([[1] * 3, [1] * 3], [[0.7, 0.7, 0.6], [0.9] * 3]), split="test")
    policy = ThresholdPolicy(score="max_probability", thresholds=(bound, -INF))
    exits = policy.exits_of(recording.outputs)
    outcomes = judge_policies(recording, costs_of([1.0, 1.0], [0.0, 0.0]), [policy])
    assert outcomes.shares[0].tolist() == (torch.bincount(exits, minlength=2).double() / 3).tolist()


def test_fitted_policies_reach_what_they_say():
    fitted_on = drawn(400, seed=6)
    costs = COSTS
    policies = [
        fit_thresholds(fitted_on, costs, max_accuracy_loss=loss) for loss in (0.01, 0.05, 0.2)
    ]
    # the same samples, so that what was reached there is reached here
    same = drawn(400, seed=6, split="renamed")
    outcomes = judge_policies(same, costs, policies)
    assert outcomes.accuracy.tolist() == pytest.approx(
        [policy.target["accuracy"] for policy in policies]
    )
    assert outcomes.contract_s.tolist() == pytest.approx(
        [policy.target["mean_cost"] for policy in policies]
    )
    assert np.all(np.diff(outcomes.contract_s.numpy()) < 0)


def test_no_policies_give_no_outcomes():
    outcomes = judge_policies(drawn(10, seed=7), COSTS, [])
    assert len(outcomes) == 0
    assert outcomes.shares.shape == (0, 4)


# --- what is refused ------------------------------------------------------------------------------


def test_a_policy_is_not_judged_on_the_split_it_was_fitted_on_nor_on_other_weights():
    policy = fit_thresholds(drawn(100, seed=8), COSTS, max_accuracy_loss=0.1)
    with pytest.raises(SplitReuseError, match="policy '1'"):
        judge_policies(
            drawn(50, seed=9),
            COSTS,
            [ThresholdPolicy(score="margin", thresholds=(0.5, 0.5, 0.5, -INF)), policy],
        )
    with pytest.raises(StaleInput, match="another set of weights"):
        judge_policies(drawn(50, seed=9, split="test", weights="newer"), COSTS, [policy])


def test_other_numbers_of_exits_are_refused():
    short = ThresholdPolicy(score="margin", thresholds=(0.5, -INF))
    with pytest.raises(PolicyError, match="2 exits, the recording has 4"):
        judge_policies(drawn(10, seed=10), COSTS, [short])
    with pytest.raises(RecordingError, match="4 exits, the cost profile 2"):
        judge_policies(drawn(10, seed=10), costs_of([1.0, 1.0], [0.0, 0.0]), [short])
