"""What travels in the page: exact for every threshold that the page offers, and small."""

import base64
import dataclasses
import math

import numpy as np
import pytest
import torch

from impatient.evaluation import Recording
from impatient.evaluation.payload import CLOSED, MOST_BYTES, make_payload
from impatient.policies import ThresholdPolicy, fit_gates, fit_thresholds
from impatient.provenance import provenance
from recordings import costs_of, drawn, recording_of, sure

COSTS = costs_of([1e-3] * 4, [1e-4] * 3 + [0.0])


def numbers(text):
    return np.frombuffer(base64.b64decode(text), np.uint8)


def stops(content, family, step, rows):
    """The exits as the page computes them."""
    codes = numbers(content["scores"][family["score"]]).reshape(-1, rows)
    passed = codes >= np.asarray(family["codes"][step])[:, None]
    return np.vstack([passed, np.ones((1, rows), bool)]).argmax(0)


def policies(recording):
    return {
        "fitted": fit_thresholds(recording, COSTS, max_accuracy_loss=0.02),
        "margin": ThresholdPolicy(score="margin", thresholds=(0.5, math.inf, 0.25, -math.inf)),
        "open": ThresholdPolicy(
            score="max_probability", thresholds=(-math.inf, 0.5, 0.5, -math.inf)
        ),
    }


def test_every_step_of_every_family_stops_where_full_precision_does():
    recording = drawn(2000, seed=2, split="test")
    payload = make_payload(recording, COSTS, policies(drawn(500, seed=1)))
    assert [family.name for family in payload.families] == [
        "fitted",
        "margin",
        "open",
        "one threshold for all exits",
    ]
    for family, made in zip(payload.families, payload.content["families"], strict=True):
        assert len(family.steps) == len(made["codes"]) > 40
        for step, policy in enumerate(family.steps):
            expected = policy.exits_on(recording).numpy()
            assert (stops(payload.content, made, step, 2000) == expected).all()


def test_a_fitted_policy_is_among_the_steps_as_it_is():
    named = policies(drawn(500, seed=1))
    payload = make_payload(drawn(100, seed=2, split="test"), COSTS, named)
    for family in payload.families[:-1]:
        assert family.steps[family.start] == named[family.name]
        assert family.words[family.start] == "as fitted"
        assert family.fitted
    assert not payload.families[-1].fitted


def test_steps_go_from_bold_to_careful():
    recording = drawn(500, seed=2, split="test")
    for family in make_payload(recording, COSTS, policies(drawn(500, seed=1))).families:
        depths = [float(step.exits_on(recording).double().mean()) for step in family.steps]
        assert depths == sorted(depths)


def test_closed_exits_let_nobody_out():
    payload = make_payload(drawn(50, seed=2, split="test"), COSTS, policies(drawn(500, seed=1)))
    margin = payload.content["families"][1]
    assert {codes[1] for codes in margin["codes"]} == {CLOSED}


def test_right_and_wrong_are_bits():
    recording = drawn(1001, seed=3, split="test")
    content = make_payload(recording, COSTS, {}).content
    bits = np.unpackbits(numbers(content["quality"]))[: 4 * 1001].reshape(4, 1001)
    assert content["bits"]
    assert (bits == recording.quality.numpy()).all()


def test_a_large_recording_travels_in_part_and_says_so():
    recording = drawn(40_000, seed=4, split="test")
    payload = make_payload(recording, COSTS, {}, keep=[7, 39_999])
    content = payload.content
    assert content["recorded"] == 40_000
    assert {7, 39_999} <= set(payload.rows.tolist())
    assert content["samples"] == len(payload.rows) == len(np.unique(payload.rows)) < 40_000
    sent = sum(len(numbers(text)) for text in content["scores"].values())
    assert sent + len(numbers(content["quality"])) <= MOST_BYTES
    family = payload.families[0]
    found = stops(content, content["families"][0], family.start, content["samples"])
    expected = family.steps[family.start].exits_on(recording).numpy()[payload.rows]
    assert (found == expected).all()


def test_other_policies_travel_as_the_exits_where_they_stop():
    fitted_on = drawn(500, seed=1)
    recording = drawn(300, seed=2, split="test")
    gates = fit_gates(fitted_on, COSTS, mean_time_s=2e-3)
    (point,) = make_payload(recording, COSTS, {"gates": gates}).content["points"]
    outcome = gates.outcome(recording, COSTS)
    assert (numbers(point["stops"]) == outcome.exits.numpy()).all()
    assert point["time"] == pytest.approx(1e3 * float(outcome.contract_s.mean()))
    mean = np.asarray(point["until"])[numbers(point["stops"])].mean()
    assert mean == pytest.approx(point["time"])


def test_what_is_guaranteed_grows_with_the_level_and_needs_samples():
    family = make_payload(drawn(5000, seed=5, split="test"), COSTS, {}).families[0]
    assert None not in family.certified
    # a larger loss allows bolder steps, which come first
    assert sorted(family.certified, reverse=True) == list(family.certified)
    assert family.certified[-1] < len(family.steps)
    few = make_payload(drawn(30, seed=5, split="test"), COSTS, {}).families[0]
    assert few.certified == (None,) * 4


def test_a_guarantee_is_kept_on_new_samples():
    """The validity of the switch: chosen on one recording, it holds on a large other one."""
    large = drawn(50_000, seed=100, split="new")
    quality = large.quality.numpy()
    broken = 0
    for seed in range(20):
        family = make_payload(drawn(2000, seed=seed, split="test"), COSTS, {}).families[0]
        limit = family.certified[1]
        if limit is None or limit == len(family.steps):
            continue
        exits = family.steps[limit].exits_on(large).numpy()
        lost = np.maximum(quality[-1] - quality[exits, np.arange(len(exits))], 0.0).mean()
        broken += lost > 0.01
    # five in a hundred may fail; four or more of twenty would have a chance of 1.6 %
    assert broken <= 3


def test_one_exit_has_no_dial():
    recording = recording_of(*sure([[1, 0, 1]], [[0.9] * 3]), split="test")
    payload = make_payload(recording, costs_of([1e-3], [0.0]), {})
    assert payload.families == ()
    assert payload.content["scores"] == {}


def test_times_are_in_milliseconds():
    batch = COSTS.at()
    costs = dataclasses.replace(COSTS, batches={2: batch, 4: batch})
    times = make_payload(drawn(50, seed=2, split="test"), costs, {}).content["times"]
    assert times["mean"] == {"stages": [1.0] * 4, "heads": [0.1] * 3 + [0.0]}
    assert times["batch"] == 2


def graded(samples, seed, split="validation"):
    """Numbers with an error that shrinks with depth, judged by how far off they are."""
    random = torch.Generator().manual_seed(seed)
    truth = torch.randn(samples, generator=random)
    noise = torch.randn(3, samples, generator=random) * torch.tensor([1.0, 0.5, 0.2])[:, None]
    return Recording.of(
        (truth + noise)[..., None],
        truth[:, None],
        split=split,
        task="regression",
        provenance=provenance(network="network", weights="weights", data="data"),
    )


def test_graded_qualities_travel_as_bytes_and_other_scores_have_dials_too():
    costs = costs_of([1e-3] * 3, [1e-4, 1e-4, 0.0])
    recording = graded(800, seed=2, split="test")
    fitted_on = graded(400, seed=1)
    fitted = fit_thresholds(fitted_on, costs, mean_time_s=2.4e-3, score="agreement")
    payload = make_payload(recording, costs, {"fitted": fitted})
    content = payload.content
    assert not content["bits"]
    quality = numbers(content["quality"]).reshape(3, 800) / 255
    assert np.abs(quality - recording.quality.numpy()).max() <= 0.5 / 255 + 1e-6
    assert np.abs(quality.mean(1) - recording.quality.mean(1).numpy()).max() < 0.001
    for family, made in zip(payload.families, content["families"], strict=True):
        # their scores have no known range, so nothing is shown of them
        assert family.certified == ()
        depths = [float(step.exits_on(recording).double().mean()) for step in family.steps]
        assert depths == sorted(depths)
        for step, policy in enumerate(family.steps):
            expected = policy.exits_on(recording).numpy()
            assert (stops(content, made, step, 800) == expected).all()
    assert payload.families[0].words[payload.families[0].start] == "as fitted"
