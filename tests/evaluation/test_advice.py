"""What to do next: every sentence follows from numbers, and only from these."""

import dataclasses
import math

import pytest

from impatient import budgets
from impatient.costs import Noise
from impatient.evaluation import StaticBaseline, evaluate
from impatient.evaluation.advice import (
    advice,
    bolder,
    missed_targets,
    points_to_guarantee,
    without_loss,
)
from impatient.evaluation.payload import make_payload
from impatient.policies import ThresholdPolicy
from impatient.policies.targets import FittedTo
from recordings import costs_of, recording_of, sure

COSTS = costs_of([1e-3] * 3, [1e-4, 1e-4, 0.0], exit_free_s=3e-3)


def said(rights, bounds, *, costs=COSTS, surety=None, budget=None, **rest):
    surety = surety or [[0.9] * len(rights[0])] * len(rights)
    recording = recording_of(*sure(rights, surety), split="test")
    policies = {
        str(bound): ThresholdPolicy(score="max_probability", thresholds=bound) for bound in bounds
    }
    judged = evaluate(recording, costs, policies, **rest)
    return " ".join(advice(judged, costs, budget)).replace("\N{NO-BREAK SPACE}", " ")


ALL_EARLY = (0.8, math.inf, -math.inf)
NONE_EARLY = (0.99, math.inf, -math.inf)
RIGHT = [[1] * 100] * 3


def test_exits_pay_where_a_policy_saves_time():
    words = said(RIGHT, [ALL_EARLY])
    assert "takes 63 % less time than the network without exits, with as much" in words


def test_a_policy_that_loses_more_than_it_was_fitted_to_is_named():
    half = [[1] * 95 + [0] * 5, [1] * 100, [1] * 100]
    recording = recording_of(*sure(half, [[0.9] * 100] * 3), split="test")
    policies = {"early": ThresholdPolicy(score="max_probability", thresholds=ALL_EARLY)}
    judged = evaluate(recording, COSTS, policies)

    def words(name, wanted, policy="early"):
        fitted = FittedTo(name=name, wanted=wanted, samples=50)
        return " ".join(missed_targets(judged, {policy: fitted})).replace("\N{NO-BREAK SPACE}", " ")

    missed = words("max_accuracy_loss", 0.01)
    assert "Policy early was to lose at most 1 point of accuracy, and here 5.0 are lost" in missed
    assert "on the 50 samples that it was fitted to, and these are 100 others" in missed
    assert "`impatient fit DIR --max-loss 12 --delta 0.05`" in missed
    # just kept, no target of its own, and another kind of target
    assert words("max_accuracy_loss", 0.05) == ""
    assert words("max_accuracy_loss", 0.01, "another") == ""
    assert words("mean_time_s", 1.1e-3) == ""
    slow = words("mean_time_s", 1e-3)
    assert "was to take 1.00 ms on average, and here it is 1.10 ms: the target was met" in slow


def test_several_policies_that_miss_their_targets_are_named_in_one_sentence():
    half = [[1] * 95 + [0] * 5, [1] * 100, [1] * 100]
    recording = recording_of(*sure(half, [[0.9] * 100] * 3), split="test")
    policies = {
        name: ThresholdPolicy(score="max_probability", thresholds=bounds)
        for name, bounds in {"a": ALL_EARLY, "b": ALL_EARLY, "c": NONE_EARLY}.items()
    }
    targets = {
        name: FittedTo(name="max_accuracy_loss", wanted=wanted, samples=50)
        for name, wanted in {"a": 0.01, "b": 0.03, "c": 0.01}.items()
    }
    (sentence,) = missed_targets(evaluate(recording, COSTS, policies), targets)
    assert sentence.startswith(
        "Policies a and b were to lose at most 1 and 3 points of accuracy, and here 5.0 and 5.0 are"
    )
    assert "`impatient fit DIR --max-loss 12 --delta 0.05`" in sentence


@pytest.mark.parametrize(
    ("surety", "free_s", "words"),
    [
        # exit 0 is always right and sure: 1.1 ms
        (0.9, 3e-3, "exits save at most 63 % of the time: the fastest thresholds with as much"),
        (0.9, 1.1e-3, "exits gain nothing: the fastest thresholds"),
        (0.9, 1e-3, "exits cost at least 10 % of the time: the fastest thresholds"),
    ],
)
def test_it_says_what_exits_gain_where_nothing_may_be_lost(surety, free_s, words):
    recording = recording_of(*sure(RIGHT, [[surety] * 100] * 3), split="test")
    costs = costs_of([1e-3] * 3, [1e-4, 1e-4, 0.0], exit_free_s=free_s)
    policies = {"mine": ThresholdPolicy(score="max_probability", thresholds=ALL_EARLY)}
    families = make_payload(recording, costs, policies).families
    judged = evaluate(recording, costs, policies)
    sentence = without_loss(judged, families, recording, costs).replace("\N{NO-BREAK SPACE}", " ")
    assert f"Where nothing may be lost, {words}" in sentence
    assert "1.10 ms" in sentence


def test_thresholds_that_all_lose_something_are_named():
    # the network without exits is another one, and right on all
    wrong = [[1] * 50 + [0] * 50] * 3
    recording = recording_of(*sure(wrong, [[0.9] * 100] * 3), split="test")
    alone = recording_of(*sure([[1] * 100], [[0.9] * 100]), split="test")
    policies = {"mine": ThresholdPolicy(score="max_probability", thresholds=ALL_EARLY)}
    families = make_payload(recording, COSTS, policies).families
    judged = evaluate(recording, COSTS, policies, exit_free=alone)
    assert "No thresholds on this page reach the accuracy of the best network" in without_loss(
        judged, families, recording, COSTS
    )
    assert without_loss(judged, (), recording, COSTS) == ""


def test_exits_save_nothing_where_no_sample_leaves():
    words = said(RIGHT, [NONE_EARLY])
    assert "Exits save no time on average here" in words
    assert "exit 0 is there after 1.10 ms, with 100.0 %" in words


def test_exits_do_not_pay_by_answers_that_are_much_worse():
    # half of the early answers are wrong, and all leave early
    words = said([[1] * 50 + [0] * 50, [1] * 100, [1] * 100], [ALL_EARLY])
    assert "Exits pay here" not in words
    assert "No policy here comes within 2 points of the best accuracy, 100.0 %: (0.8" in words
    assert "takes 63 % less time for 50.0 points less accuracy. Exits still pay where" in words


def test_without_a_policy_it_says_to_fit_one():
    assert "`impatient fit`" in said(RIGHT, [])


def test_exits_that_never_answer_are_named():
    assert "Exit 1 never answers under any policy" in said(RIGHT, [ALL_EARLY])
    both = said(RIGHT, [(math.inf, math.inf, -math.inf)])
    assert "Exits 0 and 1 never answer under any policy: if no deadline needs them" in both
    assert "never answer" not in said(RIGHT, [ALL_EARLY, (math.inf, 0.8, -math.inf)])


def test_an_exit_that_is_surely_worse_than_a_shallower_one_is_named():
    worse = [[1] * 100, [1] * 50 + [0] * 50, [1] * 100]
    assert "Exit 1 is surely worse than a shallower one" in said(worse, [])
    slightly = [[1] * 100, [1] * 99 + [0], [1] * 100]
    assert "surely" not in said(slightly, [])


@pytest.mark.parametrize(("low", "late"), [(0.0, True), (1.2e-3, False)])
def test_a_first_exit_that_comes_too_late_is_named(low, late):
    words = said(RIGHT, [], budget=("mine", budgets.uniform(low, 2.2e-3)))
    assert ("comes too late for 50 % of your budgets (mine)" in words) == late


def test_a_static_network_that_beats_exits_is_named():
    better = recording_of(*sure([[1] * 100], [[0.9] * 100]), split="test")
    rights = [[0] * 50 + [1] * 50, [0] * 50 + [1] * 50, [1] * 100]
    baseline = StaticBaseline(recording=better, time_s=2.1e-3, macs=1.0)
    words = said(rights, [], static={"small": baseline})
    assert "Network 'small' is surely better than exit 1 in no more time" in words


def test_noise_is_named():
    noise = Noise(aa_ratio=1.0, aa_low=0.8, aa_high=1.2, spread=0.3, n=50)
    batch = dataclasses.replace(COSTS.at(), noise=noise)
    words = said(RIGHT, [], costs=dataclasses.replace(COSTS, batches={1: batch}))
    assert "too noisy" in words


def test_bolder_thresholds_that_lose_nothing_are_named():
    # exit 0 is always right, and 70 % sure
    recording = recording_of(*sure(RIGHT, [[0.7] * 100, [0.9] * 100, [0.9] * 100]), split="test")
    careful = ThresholdPolicy(score="max_probability", thresholds=(0.9, 0.95, -math.inf))
    bold = ThresholdPolicy(score="max_probability", thresholds=(0.6, 0.6, -math.inf))

    def sentences(policy):
        families = make_payload(recording, COSTS, {"mine": policy}).families[:1]
        return bolder(families, recording, COSTS)

    (sentence,) = sentences(careful)
    assert "Policy mine could be" in sentence
    assert "times as bold and lose nothing on these samples" in sentence
    assert sentences(bold) == ()


def test_a_last_exit_that_the_early_ones_hold_back_is_told_what_helps():
    def words(alone):
        trained = recording_of(*sure([alone], [[0.9] * 100]), split="test")
        return said([[1] * 60 + [0] * 40] * 3, [NONE_EARLY], exit_free=trained)

    helped = words([1] * 95 + [0] * 5)
    assert "The last exit reaches 60.0 %, the network without exits 95.0 % when" in helped
    assert "--weights half_end" in helped
    # within what chance explains
    assert "hold it back" not in words([1] * 65 + [0] * 35)


@pytest.mark.parametrize(
    ("samples", "points"),
    # where half of the samples can show what was wanted, it is asked for
    [(1200, 0.5), (600, 1), (50, 12)],
)
def test_the_guarantee_that_is_advised_can_be_shown_on_as_many_samples(samples, points):
    wanted = 0.005
    asked = points_to_guarantee(FittedTo(name="max_accuracy_loss", wanted=wanted, samples=samples))
    assert asked == points
    assert (1 - asked / 100) ** (samples // 2) <= 0.05
