"""Linear SVMs on recorded features: what they decide, what they are trained on, and what they
refuse.
"""

import dataclasses
import logging
import math

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from impatient.errors import RecordingError, SplitReuseError, StaleInput
from impatient.evaluation import Recording, evaluate
from impatient.policies import fit_thresholds
from papers.impatient_dnn import probes
from papers.impatient_dnn.probes import linear_probes
from recordings import costs_of, recording_of

# of the features of two exits: the deeper one tells classes better apart
NOISE = (3.0, 1.0)


def featured(
    samples, seed, *, classes=4, width=6, split="test", noise=NOISE, labels=None, wide=None, **rest
):
    """A recording whose own outputs know nothing, and whose features are one place per class and
    noise.
    """
    random = torch.Generator().manual_seed(seed)
    places = 2.0 * torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    drawn = (
        torch.randint(classes, (samples,), generator=random)
        if labels is None
        else torch.as_tensor(labels)
    )
    features = tuple(
        places[drawn] + scale * torch.randn(samples, width, generator=random) for scale in noise
    )
    outputs = torch.zeros(len(noise), samples, wide or classes)
    return recording_of(outputs, drawn, split=split, features=features, **rest)


def accuracies(recording):
    return recording.quality.mean(1).tolist()


@pytest.fixture(scope="module")
def splits():
    return (
        featured(400, 1, split="train"),
        featured(200, 2, split="validation"),
        featured(300, 3, split="test"),
    )


# --- what they decide -----------------------------------------------------------------------------


def test_outputs_are_scikit_learns_decision_functions(splits):
    train, _, test = splits
    (probed,) = linear_probes(train, None, test, C=[0.01])
    for exit in range(2):
        scaler = StandardScaler().fit(train.features[exit].double().numpy())
        machine = LinearSVC(C=0.01, dual=False).fit(
            scaler.transform(train.features[exit].double().numpy()), train.labels
        )
        wanted = machine.decision_function(scaler.transform(test.features[exit].double().numpy()))
        assert probed.outputs[exit].numpy() == pytest.approx(wanted, abs=1e-5)
    assert probed.outputs.dtype == torch.float32


def test_they_find_what_the_features_know_and_more_in_the_deeper_ones(splits):
    (probed,) = linear_probes(splits[0], splits[1], splits[2])
    shallow, deep = accuracies(probed)
    assert accuracies(splits[2])[0] < 0.35
    assert 0.45 < shallow < deep - 0.2
    assert deep > 0.9


def test_all_but_the_outputs_and_the_weights_stays(splits):
    train, validation, test = splits
    probed = linear_probes(train, validation, validation, test)
    assert [entry.split for entry in probed] == ["validation", "test"]
    for before, after in zip((validation, test), probed, strict=True):
        assert after.exits == before.exits
        assert torch.equal(after.labels, before.labels)
        assert all(
            torch.equal(one, other)
            for one, other in zip(after.features, before.features, strict=True)
        )
        assert after.provenance == dataclasses.replace(
            before.provenance, weights=after.provenance.weights
        )


def test_everything_else_works_on_what_comes_out(splits, tmp_path):
    validation, test = linear_probes(splits[0], splits[1], splits[1], splits[2])
    costs = costs_of([1.0, 1.0], [0.1, 0.0])
    policy = fit_thresholds(validation, costs, max_accuracy_loss=0.02)
    row = evaluate(test, costs, policy)["policy"]
    assert 0.0 < row.shares[0] < 1.0
    assert row.accuracy.value > 0.85
    test.save(tmp_path / "probed.safetensors")
    assert torch.equal(Recording.load(tmp_path / "probed.safetensors").outputs, test.outputs)


def test_with_two_classes_the_decisions_are_opposite_and_right():
    train = featured(200, 1, classes=2, split="train")
    test = featured(200, 2, classes=2)
    (probed,) = linear_probes(train, None, test)
    assert torch.equal(probed.outputs[..., 0], -probed.outputs[..., 1])
    assert accuracies(probed)[1] > 0.9


def test_a_class_that_was_not_there_to_learn_is_never_the_answer():
    # 0, 1, 3
    train = featured(
        300, 1, labels=torch.arange(300) % 3 + (torch.arange(300) % 3 == 2), wide=5, split="train"
    )
    test = featured(200, 2, wide=5)
    (probed,) = linear_probes(train, featured(100, 3, wide=5, split="validation"), test)
    assert set(probed.outputs.argmax(-1).flatten().tolist()) == {0, 1, 3}
    least = probed.outputs[..., [0, 1, 3]].amin(-1)
    assert torch.allclose(
        probed.outputs[..., [2, 4]], (least - 1.0)[..., None].expand(-1, -1, 2), atol=1e-5
    )
    seen = torch.isin(test.labels, torch.tensor([0, 1, 3]))
    assert probed.quality[1][seen].mean() > 0.9


def test_two_classes_of_many_and_one_class_of_many():
    test = featured(100, 2)
    # 0 and 2
    (two,) = linear_probes(
        featured(200, 1, labels=torch.arange(200) % 2 * 2, split="train"), None, test
    )
    assert two.quality[1][(test.labels == 0) | (test.labels == 2)].mean() > 0.9
    assert set(two.outputs.argmax(-1).flatten().tolist()) == {0, 2}
    (one,) = linear_probes(featured(50, 1, labels=torch.full((50,), 2), split="train"), None, test)
    assert one.outputs.argmax(-1).unique().tolist() == [2]


# --- how they are trained -------------------------------------------------------------------------


def test_units_and_offsets_of_features_do_not_matter(splits):
    train, validation, test = splits
    factor = torch.logspace(-6, 6, 6)
    offset = torch.linspace(-5, 5, 6)

    def stretched(recording):
        return dataclasses.replace(
            recording, features=tuple((entry + offset) * factor for entry in recording.features)
        )

    (plain,) = linear_probes(train, validation, test)
    (other,) = linear_probes(stretched(train), stretched(validation), stretched(test))
    assert torch.allclose(plain.outputs, other.outputs, atol=2e-3)


def test_only_the_training_recording_standardises(splits):
    """What is judged with it must not change the answer to a sample."""
    train, _, test = splits
    shifted = dataclasses.replace(
        test, features=tuple(torch.cat([entry[:150], 100 + entry[150:]]) for entry in test.features)
    )
    (plain,) = linear_probes(train, None, test)
    (half,) = linear_probes(train, None, shifted)
    assert torch.equal(plain.outputs[:, :150], half.outputs[:, :150])


def test_constant_features_change_nothing_even_where_they_are_not_constant_later(splits):
    train, _, test = splits

    def widened(recording, values):
        return dataclasses.replace(
            recording, features=tuple(torch.cat([entry, values], 1) for entry in recording.features)
        )

    dead = widened(train, torch.tensor([[0.0, 7.1]]).expand(400, 2))
    alive = widened(test, torch.linspace(-9, 9, 600).reshape(300, 2))
    (plain,) = linear_probes(train, None, test)
    (other,) = linear_probes(dead, None, alive)
    assert torch.allclose(plain.outputs, other.outputs, atol=1e-4)


def test_validation_chooses_the_strength_of_each_exit_and_the_smallest_of_equals(splits, caplog):
    train, validation, test = splits
    grid = (1e-6, 1e-4, 1e-2, 1.0)
    with caplog.at_level(logging.INFO, logger="papers.impatient_dnn.probes"):
        (chosen,) = linear_probes(train, validation, test, C=grid[::-1])
    alone = [linear_probes(train, None, validation, test, C=[strength]) for strength in grid]
    for exit in range(2):
        reached = [accuracies(held)[exit] for held, _ in alone]
        assert len(set(reached)) > 1
        # the first, so the smallest
        best = int(np.argmax(reached))
        assert torch.equal(chosen.outputs[exit], alone[best][1].outputs[exit])
        assert f"C = {grid[best]:g} of" in caplog.messages[exit]


def test_without_validation_the_middle_strength_is_taken(splits):
    train, _, test = splits
    (middle,) = linear_probes(train, None, test, C=[10.0, 1e-5, 1e-3])
    (alone,) = linear_probes(train, None, test, C=[1e-3])
    assert torch.equal(middle.outputs, alone.outputs)


def test_the_same_recordings_give_the_same_numbers_even_with_few_samples():
    """With fewer samples than features, another solver runs, which draws."""
    train = featured(60, 1, width=90, split="train")
    test = featured(50, 2, width=90)
    (one,) = linear_probes(train, None, test)
    (other,) = linear_probes(train, None, test)
    assert torch.equal(one.outputs, other.outputs)
    assert one.provenance.weights == other.provenance.weights
    assert accuracies(one)[1] > 0.9


def test_strengths_that_do_not_converge_are_left_out_and_named(splits, monkeypatch, caplog):
    train, validation, test = splits
    limit = probes.LinearSVC

    def impatient_svm(**options):
        return limit(**{**options, "max_iter": 1 if options["C"] > 0.5 else 1000})

    monkeypatch.setattr(probes, "LinearSVC", impatient_svm)
    (kept,) = linear_probes(train, validation, test, C=[1e-3, 1.0])
    (alone,) = linear_probes(train, validation, test, C=[1e-3])
    assert torch.equal(kept.outputs, alone.outputs)
    assert "exit block0: the SVMs with C = 1 did not converge and are left out" in caplog.messages
    with pytest.raises(
        RecordingError, match=r"no SVM of exit block0 converged with C=\(1\.0,\); give smaller C"
    ):
        linear_probes(train, None, test, C=[1.0])


# --- whose weights they are -----------------------------------------------------------------------


def test_a_policy_of_one_network_is_refused_for_the_other(splits):
    train, validation, test = splits
    probed = linear_probes(train, validation, test)[0]
    elsewhere = linear_probes(
        train.with_outputs(train.outputs, train.labels.flip(0)), validation, test
    )[0]
    assert (
        len({test.provenance.weights, probed.provenance.weights, elsewhere.provenance.weights}) == 3
    )
    costs = costs_of([1.0, 1.0], [0.1, 0.0])
    policy = fit_thresholds(
        linear_probes(train, validation, validation)[0], costs, max_accuracy_loss=0.05
    )
    assert evaluate(probed, costs, policy).of("policy")
    for other in (test, elsewhere):
        with pytest.raises(StaleInput, match="another set of weights"):
            evaluate(other, costs, policy)


def test_the_same_features_of_other_weights_give_another_fingerprint(splits):
    train, _, test = splits
    renamed = [
        dataclasses.replace(
            entry, provenance=dataclasses.replace(entry.provenance, weights="other")
        )
        for entry in (train, test)
    ]
    (one,) = linear_probes(train, None, test)
    (other,) = linear_probes(renamed[0], None, renamed[1])
    assert torch.equal(one.outputs, other.outputs)
    assert one.provenance.weights != other.provenance.weights


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2])
def test_recordings_without_features_are_told_how_to_get_them(splits, place):
    given = [
        dataclasses.replace(entry, features=()) if index == place else entry
        for index, entry in enumerate(splits)
    ]
    with pytest.raises(
        RecordingError, match=r"features of 0 of 2 exits.*record\(\.\.\., features=True\)"
    ):
        linear_probes(*given)


def test_the_training_split_neither_chooses_nor_judges(splits):
    train, validation, test = splits
    for given in ((train, train, test), (train, validation, featured(50, 9, split="train"))):
        with pytest.raises(SplitReuseError, match="split 'train' trains the SVMs"):
            linear_probes(*given)


def test_recordings_that_do_not_belong_together_are_refused(splits):
    train, validation, test = splits
    with pytest.raises(
        StaleInput,
        match=r"split 'test' was made with another set of weights.*with the same network",
    ):
        linear_probes(train, validation, featured(20, 4, weights="other"))
    with pytest.raises(RecordingError, match="the SVMs are for"):
        linear_probes(train, featured(20, 4, width=7, split="validation"), test)
    with pytest.raises(RecordingError, match="the SVMs are for"):
        linear_probes(train, validation, featured(20, 4, wide=9))
    with pytest.raises(RecordingError, match="the SVMs are for"):
        linear_probes(train, validation, featured(20, 4, noise=(1.0, 1.0, 1.0)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_no_numbers_are_refused(splits, value):
    broken = dataclasses.replace(
        splits[2], features=(splits[2].features[0], torch.full((300, 6), value))
    )
    with pytest.raises(RecordingError, match="NaN or infinite features"):
        linear_probes(splits[0], splits[1], broken)


@pytest.mark.parametrize("strengths", [[], [0.0], [-1.0, 1.0], [math.nan], [math.inf]])
def test_strengths_must_be_positive(splits, strengths):
    with pytest.raises(RecordingError, match="positive finite strength"):
        linear_probes(*splits, C=strengths)
