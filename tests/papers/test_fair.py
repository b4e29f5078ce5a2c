"""Weightings at each one's best learning rate: which rate is chosen, and what is compared."""

import dataclasses
import itertools

import numpy as np
import pytest

from impatient.training.weights import parse_weights
from papers.anytime_neural_networks import fair
from papers.anytime_neural_networks.fair import ALTERNATING, AS_LONG, METHODS, OPT

SCALE = dataclasses.replace(fair.SCALES["smoke"], rates=(0.01, 0.1, 1.0))


def results(test_errors, best):
    """Results of every method, rate and seed, the validation error least at the method's best."""
    found = {}
    for method in METHODS:
        for rate in SCALE.rates:
            for seed in range(SCALE.seeds):
                exits = 1 if method == OPT else SCALE.blocks
                test = test_errors.get(method, 0.5) + 0.01 * seed
                found[fair.job(method, rate, seed, SCALE).name] = {
                    "validation_error": [0.2 if rate == best[method] else 0.4] * exits,
                    # another rate would look best on the test split
                    "test_error": [test if rate == best[method] else 0.0] * exits,
                    "stage_macs": [1] * exits,
                }
    return found


def test_every_method_gets_the_rate_that_is_best_on_validation() -> None:
    best = dict(zip(METHODS, itertools.cycle(SCALE.rates), strict=False))
    chosen = fair.best_rates(SCALE, results({}, best))
    assert {method: rate for method, (rate, _) in chosen.items()} == best
    rows = fair.summarised(SCALE, results({"const": 0.3}, best))
    const = [row for row in rows if row["method"] == "const"]
    assert [row["rate"] for row in const] == [best["const"]] * SCALE.seeds
    assert [row[1.0] for row in const] == pytest.approx([30.0, 31.0])


def test_milestones_are_those_of_the_deepest_exit_within_a_share_of_the_cost() -> None:
    result = {"test_error": [0.4, 0.3, 0.2, 0.1], "stage_macs": [1, 1, 1, 1]}
    assert fair.milestone_errors(result) == pytest.approx([40.0, 30.0, 20.0, 10.0])
    # the second exit costs more than half
    result["stage_macs"] = [1, 2, 0.5, 0.5]
    assert fair.milestone_errors(result) == pytest.approx([40.0, 40.0, 30.0, 10.0])
    alone = fair.milestone_errors({"test_error": [0.1], "stage_macs": [4]})
    assert np.isnan(alone[:3]).all()
    assert alone[3] == 10.0


def test_static_weights_are_as_large_as_alternating_ones_in_the_mean() -> None:
    scale = fair.SCALES["cpu"]
    assert (scale.blocks, fair.net_of(ALTERNATING, scale).sampler) == (16, "alternating")
    static = parse_weights(fair.net_of(AS_LONG, scale).weights, scale.blocks)
    drawn = parse_weights(fair.net_of(ALTERNATING, scale).weights, scale.blocks)
    recipe = dataclasses.replace(fair.Recipe(), sampler="alternating")
    # the exit that is drawn, with a probability as its weight, gets a share of the sum more
    total = sum(drawn)
    mean = [w + recipe.sampler_gamma * total * w / total for w in drawn]
    assert static == pytest.approx(mean)
    # 16 exits are what it takes for them to differ
    assert parse_weights("exp_lin", 16)[:8] != parse_weights("sieve", 16)[:8]


def test_the_page_compares_in_pairs_of_seeds() -> None:
    best = dict.fromkeys(METHODS, 0.1)
    errors = {ALTERNATING: 0.4, AS_LONG: 0.42, "sieve": 0.3, "exp_lin": 0.3, OPT: 0.2}
    rows = fair.summarised(SCALE, results(errors, best))
    text = fair.page(SCALE, rows, "abacus")
    assert "second half: -2.0 ± 0.0 points of error, better in 4 of 4 pairs, equal in 0" in text
    assert "first half: +0.0 ± 0.0 points of error, better in 0 of 4 pairs, equal in 4" in text
    assert "at the end: +10.0 ± 0.0 points of error, better in 0 of 2 pairs" in text
    assert f"| {OPT} | 0.1 |  |  |  | 20.5 ± 0.7 |" in text


def test_the_page_leaves_out_shares_without_an_exit() -> None:
    best = dict.fromkeys(METHODS, 0.1)
    rows = fair.summarised(SCALE, results({"sieve": 0.3, "exp_lin": 0.32}, best))
    rows = [{**row, 0.25: float("nan")} for row in rows]
    text = fair.page(SCALE, rows, "abacus")
    assert "first half: +2.0 ± 0.0 points of error, better in 0 of 2 pairs, equal in 0" in text


def test_a_training_with_written_weights_runs(tmp_path) -> None:
    job = fair.job(AS_LONG, 0.1, 0, fair.SCALES["smoke"])
    result = job.call(**job.arguments, folder=tmp_path)
    assert len(result["test_error"]) == fair.SCALES["smoke"].blocks
    assert result["train_loss"][0] > 0.0


def test_rates_may_be_chosen_by_shorter_trainings() -> None:
    scale = dataclasses.replace(SCALE, trial_epochs=3)
    short = fair.trial("const", 0.1, scale)
    assert short.arguments["training"].epochs == 3
    assert short.name != fair.job("const", 0.1, 0, scale).name
    found = {
        fair.trial(method, rate, scale).name: {"validation_error": [abs(rate - 0.1)]}
        for method in METHODS
        for rate in scale.rates
    }
    assert {rate for rate, _ in fair.best_rates(scale, found).values()} == {0.1}
    assert fair.trial("const", 0.1, SCALE) == fair.job("const", 0.1, 0, SCALE)
