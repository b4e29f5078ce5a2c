"""Temperatures, and recordings under a rule: planted temperatures are found, and probabilities get
better.
"""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from impatient.ensembling import RULED_OUT, Rule, combine
from impatient.errors import PolicyError, StaleInput
from impatient.evaluation import evaluate
from impatient.evaluation.derived import calibrated, ensembled
from impatient.evaluation.metrics import expected_calibration_error
from impatient.policies import fit_thresholds
from impatient.policies.calibration import RANGE, fit_temperatures
from recordings import costs_of, drawn, recording_of

PLANTED = (0.3, 1.0, 4.0)
COSTS = costs_of([1.0] * 3, [0.0] * 3)


def honest(samples: int = 20_000, seed: int = 0, exits: int = 3, **rest):
    """Labels are drawn from the very probabilities of every exit."""
    random = torch.Generator().manual_seed(seed)
    outputs = 1.5 * torch.randn(samples, 5, generator=random)
    labels = torch.multinomial(outputs.softmax(-1), 1, generator=random)[:, 0]
    return recording_of(outputs.expand(exits, samples, 5).clone(), labels, **rest)


def miscalibrated(**rest):
    recording = honest(**rest)
    return recording.with_outputs(recording.outputs * torch.tensor(PLANTED)[:, None, None])


def calibration_errors(recording) -> list[float]:
    return [
        expected_calibration_error(
            output.softmax(-1).amax(-1), output.argmax(-1) == recording.labels
        )
        for output in recording.outputs
    ]


# --- temperatures ---------------------------------------------------------------------------------


def test_planted_temperatures_are_found():
    assert fit_temperatures(miscalibrated()) == pytest.approx(PLANTED, rel=0.03)


def test_fitted_temperatures_scale_with_the_outputs():
    recording = drawn(500, 3)
    hotter = recording.with_outputs(10 * recording.outputs)
    assert fit_temperatures(hotter) == pytest.approx(
        [10 * value for value in fit_temperatures(recording)], rel=1e-3
    )


def test_no_other_temperature_is_likelier():
    recording = drawn(300, 5)

    def loss(output: Tensor, temperature: float) -> float:
        return float(
            torch.nn.functional.cross_entropy(output.double() / temperature, recording.labels)
        )

    for output, fitted in zip(recording.outputs, fit_temperatures(recording), strict=True):
        grid = torch.logspace(-2, 2, 201).tolist()
        assert loss(output, fitted) <= min(loss(output, value) for value in grid) + 1e-9


def test_calibration_helps_on_samples_it_has_not_seen():
    fitted = fit_temperatures(miscalibrated(seed=1))
    unseen = miscalibrated(seed=2, split="test")
    before = calibration_errors(unseen)
    after = calibration_errors(calibrated(unseen, fitted))
    assert before[0] > 0.1
    assert before[2] > 0.1
    assert max(after) < 0.02


def test_exits_that_are_always_right_or_wrong_get_temperatures_within_the_range():
    labels = torch.arange(10) % 2
    outputs = torch.tensor([1.0, -1.0])[:, None, None] * torch.nn.functional.one_hot(labels, 2)
    right, wrong = fit_temperatures(recording_of(outputs, labels))
    assert RANGE[0] <= right < 0.1
    assert wrong == pytest.approx(RANGE[1], rel=0.01)


def test_samples_whose_class_is_ruled_out_do_not_decide():
    honestly = honest(2000)
    spoilt = honestly.outputs.clone()
    spoilt[:, :100] = torch.where(torch.arange(5) == honestly.labels[:100, None], RULED_OUT, 0.0)
    rest = honestly.take(torch.arange(100, 2000))
    assert fit_temperatures(honestly.with_outputs(spoilt)) == fit_temperatures(rest)


def test_where_all_are_ruled_out_nothing_is_changed():
    outputs = torch.tensor([[[RULED_OUT, 0.0]]])
    assert fit_temperatures(recording_of(outputs, torch.tensor([0]))) == (1.0,)


# --- before and after combining -------------------------------------------------------------------


# many classes, few true ones ruled out: far too modest at first
@pytest.mark.parametrize(
    ("rule", "gains", "classes"),
    [
        ("boosted", (1.0, 1.5, 2.0, 2.5), 10),
        ("geometric", (1.0, 1.5, 2.0, 2.5), 10),
        (
            "poe",
            (3.0, 4.0, 5.0, 6.0, 6.0),
            100,
        ),
    ],
)
def test_a_rule_that_spoils_calibration_is_mended_after_it(rule, gains, classes):
    fitting, unseen = (drawn(2000, seed, gains=gains, classes=classes) for seed in (1, 2))
    after = fit_temperatures(ensembled(fitting, rule))
    raw = ensembled(unseen, rule)
    mended = ensembled(unseen, rule, recalibration=after)
    assert sum(calibration_errors(mended)) < sum(calibration_errors(raw)) / 2
    assert mended.outputs.argmax(-1).equal(raw.outputs.argmax(-1))


def test_before_and_after_are_both_one_line():
    recording = miscalibrated(samples=2000)
    before = fit_temperatures(recording)
    after = fit_temperatures(ensembled(recording, "geometric", temperatures=before))
    # calibrated, the exits say the same, and so does their mean: nothing is left to mend
    assert after == pytest.approx((1.0, 1.0, 1.0), rel=0.01)


# --- recordings under a rule ----------------------------------------------------------------------


def test_an_ensembled_recording_is_the_combined_outputs_of_the_same_samples():
    features = tuple(torch.randn(20, 2) for _ in range(4))
    recording = drawn(20, 0, features=features)
    made = ensembled(recording, "poe", temperatures=[1.0, 2.0, 3.0, 4.0], recalibration=[2.0] * 4)
    by_hand = combine(
        recording.outputs, "poe", temperatures=[1.0, 2.0, 3.0, 4.0], recalibration=[2.0] * 4
    )
    assert made.outputs.equal(by_hand)
    assert made.labels.equal(recording.labels)
    assert (made.split, made.exits, made.features) == (recording.split, recording.exits, features)
    assert made.provenance.data == recording.provenance.data


def test_each_way_of_combining_is_a_network_of_its_own():
    recording = honest(20)
    made = [
        recording,
        ensembled(recording, "poe"),
        ensembled(recording, "geometric"),
        calibrated(recording, [2.0] * 3),
        ensembled(recording, Rule(name="geometric", weights="depth")),
        ensembled(recording, "poe", temperatures=[2.0] * 3),
        ensembled(recording, "poe", recalibration=[2.0] * 3),
        ensembled(
            dataclasses.replace(
                recording,
                provenance=(
                    dataclasses.replace(recording.provenance, weights="others", network="other")
                ),
            ),
            "poe",
        ),
    ]
    for name in ("weights", "network"):
        assert len({getattr(entry.provenance, name) for entry in made}) == len(made)
    again = ensembled(recording, Rule(name="poe"))
    assert again.provenance == ensembled(recording, "poe").provenance


def test_what_is_not_known_stays_unknown():
    recording = honest(20)
    bare = dataclasses.replace(
        recording, provenance=dataclasses.replace(recording.provenance, weights=None, network=None)
    )
    made = ensembled(bare, "poe").provenance
    assert (made.weights, made.network) == (None, None)


def test_a_policy_of_the_exits_alone_is_refused_and_one_of_the_ensemble_is_not():
    fitting = miscalibrated(samples=500)
    judging = miscalibrated(samples=500, seed=1, split="test")
    alone = fit_thresholds(fitting, COSTS, max_accuracy_loss=0.1)
    together = fit_thresholds(ensembled(fitting, "geometric"), COSTS, max_accuracy_loss=0.1)
    with pytest.raises(StaleInput, match="set of weights"):
        evaluate(ensembled(judging, "geometric"), COSTS, alone)
    with pytest.raises(StaleInput, match="set of weights"):
        evaluate(judging, COSTS, together)
    assert evaluate(ensembled(judging, "geometric"), COSTS, together)["policy"].accuracy.value > 0.3


@pytest.mark.parametrize("temperatures", [[1.0], [1.0, 1.0, 0.0], [1.0, 1.0, math.nan]])
def test_wrong_temperatures_are_refused(temperatures):
    for refused in (
        lambda: calibrated(honest(5), temperatures),
        lambda: ensembled(honest(5), "poe", temperatures=temperatures),
    ):
        with pytest.raises(PolicyError, match="3 exits"):
            refused()
