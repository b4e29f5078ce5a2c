"""Evaluation: every number against one computed by hand or by simulation."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats

from impatient import budgets
from impatient.errors import (
    BudgetError,
    CostError,
    PolicyError,
    RecordingError,
    SplitReuseError,
    StaleInput,
    StorageError,
)
from impatient.evaluation import (
    Evaluation,
    StaticBaseline,
    evaluate,
    true_label_probabilities,
)
from impatient.evaluation.metrics import expected_calibration_error, mean, mean_share, proportion
from impatient.files import write_json
from impatient.policies import ThresholdPolicy, fit_thresholds
from impatient.policies.policy import STOP
from impatient.policies.routing import SelectionPolicy
from impatient.policies.topology import Topology
from impatient.store import from_plain, to_plain
from recordings import costs_of, drawn, recording_of, sure

INF = math.inf

# five samples at three exits: the last sample is too hard for all of them
RIGHT = [[1, 0, 0, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
SURETY = [
    [0.92, 0.65, 0.71, 0.82, 0.55],
    [0.92, 0.91, 0.65, 0.58, 0.57],
    [0.95, 0.94, 0.91, 0.61, 0.55],
]
COSTS = costs_of(
    [1.0, 2.0, 3.0], [0.5, 0.25, 0.0], exit_free_s=5.0, stage_macs=[10, 20, 30], head_macs=[1, 2, 0]
)
# samples 0 and 3 leave at exit 0
POLICY = ThresholdPolicy(score="max_probability", thresholds=(0.75, INF, -INF))


def hand_made(**rest):
    return recording_of(*sure(RIGHT, SURETY), **{"split": "test", **rest})


def trained_alone(**rest):
    return recording_of(
        *sure([[1, 1, 1, 1, 0]], [[0.9, 0.9, 0.9, 0.9, 0.9]]),
        **{"split": "test", "weights": "own", **rest},
    )


@pytest.fixture(scope="module")
def judged():
    return evaluate(hand_made(), COSTS, {"mine": POLICY}, exit_free=trained_alone())


# --- rows, by hand --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "accuracy", "interruptible", "contract", "macs", "shares"),
    [
        ("exit 0", "exit", 2 / 5, 1.5, 1.5, 11, (1, 0, 0)),
        ("exit 1", "exit", 2 / 5, 3.75, 3.25, 32, (0, 1, 0)),
        ("exit 2", "exit", 3 / 5, 6.75, 6.0, 60, (0, 0, 1)),
        # two leave at exit 0, three go on past the closed exit 1: its head is paid in an
        # interruptible run only
        (
            "mine",
            "policy",
            4 / 5,
            (2 * 1.5 + 3 * 6.75) / 5,
            (2 * 1.5 + 3 * 6.5) / 5,
            (2 * 11 + 3 * 61) / 5,
            (0.4, 0, 0.6),
        ),
        ("no exits, same weights", "exit_free", 3 / 5, 5.0, 5.0, 60, (0, 0, 1)),
        ("no exits, trained alone", "exit_free", 4 / 5, 5.0, 5.0, 60, (0, 0, 1)),
        # right first at exits 0, 1, 2, 0; where none is right, the oracle does not wait
        (
            "oracle",
            "oracle",
            4 / 5,
            (3 * 1.5 + 3.75 + 6.75) / 5,
            (3 * 1.5 + 3.25 + 6.0) / 5,
            (3 * 11 + 32 + 60) / 5,
            (0.6, 0.2, 0.2),
        ),
    ],
)
def test_a_row_is_what_one_computes_by_hand(
    judged, name, kind, accuracy, interruptible, contract, macs, shares
):
    row = judged[name]
    assert row.kind == kind
    assert (row.accuracy.value, row.interruptible_s, row.contract_s, row.macs) == pytest.approx(
        (accuracy, interruptible, contract, macs)
    )
    assert row.shares == pytest.approx(shares)


@pytest.mark.parametrize("in_notebook", [False, True])
def test_values_print_as_people_read_them(judged, in_notebook, monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: in_notebook)
    recording = hand_made()
    for columns in ("80", "100"):
        monkeypatch.setenv("COLUMNS", columns)
        lines = str(judged).splitlines()
        assert max(map(len, lines)) <= int(columns)
    for row in judged.rows:
        (line,) = (line for line in lines if line.startswith(row.name))
        assert f"{100 * row.accuracy.value:.1f}" in line
    for value in (judged, recording, COSTS):
        assert len(repr(value)) < 300
    assert "0.400, 0.400, 0.600" in repr(recording)
    assert "1.5e+03 3.25e+03 6e+03 ms" in repr(COSTS)


def test_calibration_errors_are_those_of_the_answers_given(judged):
    # every surety of exit 0 falls into a bin of its own; at exit 2, 0.95, 0.94 and all others do
    # too, but for none
    gaps = [1 - 0.92, 0.65, 0.71, 1 - 0.82, 0.55]
    assert judged["exit 0"].calibration_error == pytest.approx(sum(gaps) / 5)
    # the policy answers with 0.92 and 0.82 of exit 0 and with 0.94, 0.91, 0.55 of exit 2; 0.92 and
    # 0.91 share a bin
    shared = abs(2 - 0.92 - 0.91)
    assert judged["mine"].calibration_error == pytest.approx(
        (shared + (1 - 0.82) + (1 - 0.94) + 0.55) / 5
    )
    # all five of 0.9 in one bin, four right
    assert judged["no exits, trained alone"].calibration_error == pytest.approx(0.1)


def test_rows_come_exits_first_then_policies_and_what_to_compare_with(judged):
    assert [row.name for row in judged.rows] == [
        "exit 0",
        "exit 1",
        "exit 2",
        "mine",
        "no exits, same weights",
        "no exits, trained alone",
        "oracle",
    ]
    assert [row.name for row in judged.of("exit_free")] == [
        "no exits, same weights",
        "no exits, trained alone",
    ]
    with pytest.raises(KeyError, match="oracle"):
        judged["exit 7"]


@pytest.mark.parametrize("policies", [None, {}, POLICY])
def test_the_network_without_exits_and_the_oracle_are_always_there(policies):
    evaluation = evaluate(hand_made(), COSTS, policies)
    assert len(evaluation.of("exit_free")) == len(evaluation.of("oracle")) == 1
    assert {"no exits, same weights", "static oracle"} <= {
        row.name for row in evaluation.under_budgets
    }
    assert [row.name for row in evaluation.of("policy")] == (["policy"] if policies else [])


def test_the_oracle_is_never_worse_and_a_policy_never_better():
    recording = drawn(500, seed=1, split="test")
    costs = costs_of([1.0] * 4, [0.1] * 3 + [0.0])
    policies = {
        f"{loss}": fit_thresholds(drawn(500, seed=2), costs, max_accuracy_loss=loss)
        for loss in (0.02, 0.1)
    }
    evaluation = evaluate(recording, costs, policies)
    best = evaluation["oracle"].accuracy.value
    assert all(row.accuracy.value <= best for row in evaluation.rows)
    assert sum(evaluation["0.1"].shares) == pytest.approx(1.0)
    assert (
        evaluation["0.1"].contract_s
        < evaluation["0.02"].contract_s
        < evaluation["exit 3"].contract_s
    )


def test_how_much_each_way_gives_to_the_truth_and_evaluations_made_before_that():
    recording = hand_made()
    evaluation = evaluate(recording, COSTS, {"mine": POLICY})
    true = true_label_probabilities(recording.outputs, recording.labels)
    assert [row.p_true for row in evaluation.of("exit")] == [mean_share(exit) for exit in true]
    left = POLICY.exits_of(recording.outputs)
    assert evaluation["mine"].p_true.value == pytest.approx(
        float(true[left, torch.arange(len(left))].mean())
    )
    assert evaluation["no exits, same weights"].p_true == evaluation.of("exit")[-1].p_true
    old = to_plain(evaluation)
    del old["schema"]
    for row in old["rows"]:
        del row["p_true"]
    assert {row.p_true for row in from_plain(old, Evaluation).rows} == {None}


# --- under budgets --------------------------------------------------------------------------------


def held(budgets_s, cost):
    """The deepest exit that each budget pays for, by trying; -1 where there is none."""
    fits = np.asarray(cost)[:, None] <= budgets_s
    return np.where(fits.any(0), len(cost) - 1 - fits[::-1].argmax(0), -1)


def simulated(hits, cost, drawn_s, leaves=None):
    """Mean and standard error of right answers in time; nobody computes on after leaving."""
    exits = held(drawn_s, cost)
    last = hits.shape[0] - 1 if leaves is None else leaves[:, None]
    answered = (
        np.minimum(exits, last)
        if leaves is not None
        else np.broadcast_to(exits, (hits.shape[1], len(drawn_s)))
    )
    right = np.where(
        answered >= 0, np.take_along_axis(hits.T, np.maximum(answered, 0), 1), 0.0
    ).mean(0)
    return right.mean(), right.std() / math.sqrt(len(drawn_s))


DISTRIBUTIONS = {
    **budgets.standard(8.0),
    "log_uniform": budgets.log_uniform(0.5, 20.0),
    "empirical": budgets.empirical([1.5, 3.0, 3.75, 7.0]),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_expected_accuracies_are_those_of_sampled_budgets(name):
    budget = DISTRIBUTIONS[name]
    evaluation = evaluate(
        hand_made(), COSTS, {"mine": POLICY}, exit_free=trained_alone(), budgets={name: budget}
    )
    found = {row.name: row.accuracy.value for row in evaluation.under_budgets}
    times = budget.sample(20_000, seed=3)
    hits = np.array(RIGHT, dtype=float)
    # here deeper is never less accurate
    ways = {
        "interruptible": simulated(hits, [1.5, 3.75, 6.75], times),
        "contract": simulated(hits, [1.5, 3.25, 6.0], times),
        "mine": simulated(hits, [1.5, 3.75, 6.75], times, leaves=np.array([0, 2, 2, 0, 2])),
        "static oracle": simulated(hits, [1.5, 3.25, 6.0], times),
        "no exits, same weights": simulated(hits[-1:], [5.0], times),
        "no exits, trained alone": simulated(np.array([[1.0, 1, 1, 1, 0]]), [5.0], times),
    }
    assert set(found) == set(ways)
    for way, (value, error) in ways.items():
        assert found[way] == pytest.approx(value, abs=4 * error + 1e-12), way


def test_a_point_budget_pays_for_an_exit_that_costs_exactly_as_much():
    rows = evaluate(
        hand_made(), COSTS, budgets={"3.25": budgets.point(3.25), "1.4": budgets.point(1.4)}
    ).under_budgets
    found = {(row.budget, row.name): row.accuracy.value for row in rows}
    assert found["3.25", "contract"] == pytest.approx(2 / 5)
    assert found["3.25", "no exits, same weights"] == 0.0
    assert found["1.4", "interruptible"] == 0.0


def test_the_static_oracle_takes_the_best_exit_that_fits_not_the_deepest():
    overthinking = recording_of(
        *sure([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], [[0.9] * 4] * 3), split="test"
    )
    evaluation = evaluate(overthinking, COSTS, budgets={"always": budgets.point(10.0)})
    found = {row.name: row.accuracy.value for row in evaluation.under_budgets}
    assert (found["static oracle"], found["contract"]) == (1.0, 0.5)


def test_an_exit_whose_head_makes_it_dearer_than_a_deeper_one_is_no_error():
    """In contract mode the cheap last stage overtakes the head before it."""
    costs = costs_of([1.0, 2.0, 0.2], [0.5, 1.0, 0.0], exit_free_s=3.2)
    assert costs.contract_s() == pytest.approx((1.5, 4.0, 3.2))
    budget = budgets.uniform(0.0, 5.0)
    evaluation = evaluate(hand_made(), costs, {"mine": POLICY}, budgets={"uniform": budget})
    found = {row.name: row.accuracy.value for row in evaluation.under_budgets}
    assert found["contract"] == pytest.approx(0.4 * (3.2 - 1.5) / 5 + 0.6 * (5 - 3.2) / 5)


def test_by_default_the_standard_budgets_reach_a_quarter_beyond_the_last_exit(judged):
    assert set(judged.budgets) == set(budgets.STANDARD)
    assert {budget.high for budget in judged.budgets.values()} == {1.25 * 6.75}


def test_intervals_under_budgets_stay_between_nothing_and_all():
    recording = recording_of(*sure([[1, 1, 1, 0]], [[0.9] * 4]), split="test")
    rows = evaluate(
        recording, costs_of([1.0], [0.0]), budgets={"ample": budgets.point(9.0)}
    ).under_budgets
    assert all(
        0.0 <= row.accuracy.low <= row.accuracy.value <= row.accuracy.high <= 1.0 for row in rows
    )


# --- what is refused ------------------------------------------------------------------------------


def fitted(**rest):
    return fit_thresholds(
        drawn(200, seed=4, gains=(1.0, 2.0, 3.0), classes=3, **rest), COSTS, max_accuracy_loss=0.1
    )


def test_a_policy_is_not_judged_on_the_split_it_was_fitted_on():
    recording = drawn(50, seed=5, gains=(1.0, 2.0, 3.0), classes=3)
    with pytest.raises(SplitReuseError, match=r"'validation'.*split='test'"):
        evaluate(recording, COSTS, fitted())
    evaluate(drawn(50, seed=5, gains=(1.0, 2.0, 3.0), classes=3, data="other"), COSTS, fitted())
    evaluate(drawn(50, seed=5, gains=(1.0, 2.0, 3.0), classes=3, split="test"), COSTS, fitted())


def test_a_policy_of_other_weights_is_stale():
    with pytest.raises(
        StaleInput, match=r"policy 'mine' was made with another set of weights.*fit it again"
    ):
        evaluate(hand_made(), COSTS, {"mine": fitted(weights="older")})


def test_other_numbers_of_exits_are_refused():
    with pytest.raises(PolicyError, match="'policy' is for 2 exits, the recording has 3"):
        evaluate(hand_made(), COSTS, ThresholdPolicy(score="margin", thresholds=(0.5, -INF)))
    with pytest.raises(RecordingError, match="3 exits, the cost profile 2"):
        evaluate(hand_made(), costs_of([1.0, 1.0], [0.0, 0.0]))


def test_the_network_without_exits_is_compared_on_the_same_samples():
    with pytest.raises(RecordingError, match="'validation'"):
        evaluate(hand_made(), COSTS, exit_free=trained_alone(split="validation"))
    with pytest.raises(StaleInput, match="data"):
        evaluate(hand_made(), COSTS, exit_free=trained_alone(data="other"))


# --- files ----------------------------------------------------------------------------------------


def test_a_saved_evaluation_comes_back(tmp_path, judged):
    for evaluation in (judged, evaluate(hand_made(), COSTS, budgets=DISTRIBUTIONS)):
        evaluation.save(tmp_path / "evaluation.json")
        assert Evaluation.load(tmp_path / "evaluation.json") == evaluation


@pytest.mark.parametrize("value", [{}, {"kind": "evaluation", "rows": [{"name": "exit 0"}]}])
def test_another_file_is_no_evaluation(tmp_path, value):
    write_json(tmp_path / "evaluation.json", value)
    with pytest.raises(StorageError, match=r"no evaluation .*impatient evaluate"):
        Evaluation.load(tmp_path / "evaluation.json")
    with pytest.raises(StorageError):
        Evaluation.load(tmp_path / "nothing.json")


# --- metrics --------------------------------------------------------------------------------------


def wilson_coverage(share, count):
    """P(the interval holds the true share), over all outcomes."""
    inside = [
        proportion(float(hits), count).low <= share <= proportion(float(hits), count).high
        for hits in range(count + 1)
    ]
    return float(stats.binom.pmf(np.arange(count + 1), count, share)[inside].sum())


@pytest.mark.parametrize("count", [20, 100, 500])
def test_wilson_intervals_hold_the_truth_as_often_as_they_say(count):
    covered = [wilson_coverage(share, count) for share in np.linspace(0.02, 0.98, 97)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)
    # near 0 and 1 it dips, as is known (Brown, Cai, DasGupta 2001)
    assert min(covered) > 0.83


def test_wilson_intervals_hold_the_truth_in_simulated_draws():
    hits = np.random.default_rng(0).binomial(200, 0.9, size=4000)
    covered = [
        proportion(float(hit), 200).low <= 0.9 <= proportion(float(hit), 200).high for hit in hits
    ]
    assert np.mean(covered) == pytest.approx(
        wilson_coverage(0.9, 200), abs=4 * math.sqrt(0.05 * 0.95 / 4000)
    )


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_all_or_nothing_still_has_an_interval(count):
    nothing = proportion(0.0, count)
    everything = proportion(float(count), count)
    assert (nothing.value, nothing.low, everything.value, everything.high) == (0.0, 0.0, 1.0, 1.0)
    assert nothing.high == pytest.approx(1 - everything.low)
    assert nothing.high == pytest.approx(3.84 / (count + 3.84), abs=1e-3)


def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says():
    estimates = [
        mean(row) for row in torch.rand(2000, 60, generator=torch.Generator().manual_seed(0))
    ]
    covered = np.mean([estimate.low <= 0.5 <= estimate.high for estimate in estimates])
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / 2000))


def test_one_value_has_no_interval():
    assert (mean(torch.tensor([0.3])).low, mean(torch.tensor([0.3])).high) == (-INF, INF)


def test_calibration_error_by_hand():
    # bins of a tenth: 0.92 and 0.98 (one right of two: 0.95 against 0.5), 0.55 (right), 0.31 and
    # 0.39 (none right)
    confidence = torch.tensor([0.92, 0.98, 0.55, 0.31, 0.39])
    correct = torch.tensor([True, False, True, False, False])
    expected = (2 * abs(0.95 - 0.5) + 1 * abs(0.55 - 1.0) + 2 * abs(0.35 - 0.0)) / 5
    assert expected_calibration_error(confidence, correct, bins=10) == pytest.approx(expected)


def test_calibration_error_is_nothing_where_confidence_is_right():
    confidence = torch.tensor([0.75] * 4 + [0.25] * 4)
    correct = torch.tensor([True, True, True, False, True, False, False, False])
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.0)


def test_a_confidence_between_two_bins_counts_to_the_lower():
    # one bin from 0.25 to 0.5: accuracy 0.5 against 0.475
    both = torch.tensor([0.45, 0.5])
    assert expected_calibration_error(both, torch.tensor([False, True]), bins=4) == pytest.approx(
        0.025
    )


def test_calibration_error_counts_certainty_and_its_opposite():
    assert expected_calibration_error(
        torch.tensor([1.0, 0.0]), torch.tensor([False, True])
    ) == pytest.approx(1.0)


# --- other networks to compare with ---------------------------------------------------------------


def test_another_network_is_judged_by_its_last_exit_and_its_own_cost():
    other = StaticBaseline(recording=trained_alone(), time_s=1.25, macs=7.0)
    evaluation = evaluate(
        hand_made(),
        COSTS,
        static={"small": other},
        exit_free=trained_alone(),
        budgets={"point": budgets.point(1.25)},
    )
    row = evaluation["small"]
    alone = evaluation["no exits, trained alone"]
    assert (row.kind, row.accuracy, row.contract_s, row.interruptible_s, row.macs) == (
        "static",
        alone.accuracy,
        1.25,
        1.25,
        7.0,
    )
    expected = {entry.name: entry.accuracy.value for entry in evaluation.under_budgets}
    # it fits
    assert expected["small"] == alone.accuracy.value
    # it takes 5 s
    assert expected["no exits, trained alone"] == 0.0


def test_where_exits_answer_together_the_last_one_does_not_stand_for_the_backbone():
    names = [row.name for row in evaluate(hand_made(), COSTS, same_weights=False).rows]
    assert names == ["exit 0", "exit 1", "exit 2", "oracle"]


def test_another_network_must_have_been_recorded_on_the_same_split():
    other = StaticBaseline(recording=trained_alone(split="validation"), time_s=1.0, macs=1.0)
    with pytest.raises(RecordingError, match="record the same split"):
        evaluate(hand_made(), COSTS, static={"small": other})


# --- budgets of other costs -----------------------------------------------------------------------


ALL_COSTS = dataclasses.replace(
    COSTS,
    stage_macs=(1000, 2000, 3000),
    head_macs=(500, 250, 0),
    exit_free_macs=5000,
    stage_bytes=(1_000_000, 2_000_000, 3_000_000),
    head_bytes=(500_000, 250_000, 0),
    exit_free_bytes=5_000_000,
    stage_energy_j=(0.125, 0.25, 0.375),
    head_energy_j=(0.0625, 0.03125, 0.0),
    exit_free_energy_j=0.625,
)


@pytest.mark.parametrize(("cost", "unit"), [("macs", 1e3), ("bytes", 1e6), ("energy", 0.125)])
@pytest.mark.parametrize("high", [2.0, 6.6, 10.0])
def test_budgets_of_another_cost_give_what_budgets_of_time_do_where_costs_are_in_proportion(
    cost, unit, high
):
    named = {
        "time": budgets.uniform(0.0, high),
        "other": budgets.uniform(0.0, high * unit, cost=cost),
    }
    both = evaluate(
        hand_made(), ALL_COSTS, {"mine": POLICY}, exit_free=trained_alone(), budgets=named
    )
    found = {(row.budget, row.name): row.accuracy for row in both.under_budgets}
    names = {name for _, name in found}
    assert {
        "interruptible",
        "contract",
        "static oracle",
        "mine",
        "no exits, same weights",
        "no exits, trained alone",
    } == names
    assert 0.0 < found["time", "contract"].value < 0.6
    for name in names:
        assert dataclasses.astuple(found["time", name]) == pytest.approx(
            dataclasses.astuple(found["other", name])
        )


def test_of_another_network_bytes_are_not_known(tmp_path):
    named = {cost: budgets.uniform(0.0, 1e9, cost=cost) for cost in ("macs", "bytes")}
    other = StaticBaseline(recording=trained_alone(), time_s=1.0, macs=10.0)
    judged = evaluate(hand_made(), ALL_COSTS, static={"small": other}, budgets=named)
    assert {row.budget for row in judged.under_budgets if row.name == "small"} == {"macs"}
    judged.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json").budgets == named


def test_budgets_of_a_cost_that_the_profile_lacks_are_refused():
    with pytest.raises(CostError, match="says nothing about energy"):
        evaluate(hand_made(), COSTS, budgets={"energy": budgets.point(1.0, cost="energy")})


# --- budgets of single samples --------------------------------------------------------------------


def test_every_way_to_answer_is_judged_under_the_samples_own_budgets():
    recording = drawn(200, seed=5, split="test")
    costs = costs_of([1.0, 1.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5])
    policy = ThresholdPolicy(score="max_probability", thresholds=(0.6, 0.6, 0.6, -math.inf))
    budgets_s = torch.linspace(0.5, 8.0, 200, dtype=torch.float64)
    found = evaluate(
        recording, costs, policy, budgets={"own": budgets.per_sample(budgets_s.tolist())}
    )
    hits = recording.quality
    interruptible = [1.5, 3.0, 4.5, 6.0]
    contract = [1.5, 2.5, 3.5, 4.5]
    stops = policy.exits_on(recording)
    by_hand = {"interruptible": 0.0, "contract": 0.0, "policy": 0.0}
    for sample, budget_s in enumerate(budgets_s.tolist()):
        for name, times, last in (
            ("interruptible", interruptible, 3),
            ("contract", contract, 3),
            ("policy", interruptible, int(stops[sample])),
        ):
            paid = [exit for exit in range(last + 1) if times[exit] <= budget_s]
            by_hand[name] += float(hits[paid[-1], sample]) / 200 if paid else 0.0
    rows = {row.name: row.accuracy.value for row in found.under_budgets}
    assert {name: rows[name] for name in by_hand} == pytest.approx(by_hand)
    assert found.budgets["own"].mean_s() == pytest.approx(4.25)
    with pytest.raises(BudgetError, match="budgets of 3 samples, the recording 200"):
        evaluate(recording, costs, budgets={"own": budgets.per_sample([1.0, 2.0, 3.0])})


def test_samples_with_budgets_of_their_own_are_sent_from_network_to_network():
    recording = drawn(200, seed=5, split="test")
    policy = SelectionPolicy(
        topology=Topology.full(4),
        moves=((2,), (), (STOP,), ()),
        decisions={},
        node_s=(1.0, 2.0, 3.0, 4.0),
    )
    budgets_s = torch.linspace(0.5, 8.0, 200, dtype=torch.float64)
    found = evaluate(
        recording,
        costs_of([1.0, 2.0, 3.0, 4.0], [0.0] * 4),
        policy,
        budgets={"own": budgets.per_sample(budgets_s.tolist())},
    )
    # network 0 answers at 1, network 2 at 4
    first, last = recording.quality[0].double(), recording.quality[2].double()
    by_hand = torch.where(budgets_s < 1.0, 0.0, torch.where(budgets_s < 4.0, first, last))
    rows = {row.name: row.accuracy.value for row in found.under_budgets}
    assert rows["policy"] == pytest.approx(float(by_hand.mean()))
