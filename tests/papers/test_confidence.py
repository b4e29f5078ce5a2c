"""Confidence: by hand, against plain loops and scipy; what is left out."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from impatient.errors import RecordingError
from impatient.evaluation.metrics import Estimate, mean, true_label_probabilities
from papers.anytimenet.confidence import class_confidence, correlation
from recordings import drawn, recording_of

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def logits_of(probabilities: list[list[list[float]]]) -> Tensor:
    return torch.tensor(probabilities).log()


# class 1 has no sample. Probabilities of the truth: 0.7, 0.2, 0.6, 0.3 at the first exit, 0.8, 0.4,
# 0.9, 0.1 at the second
BY_HAND = logits_of(
    [
        [[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.2, 0.2, 0.6], [0.5, 0.2, 0.3]],
        [[0.8, 0.1, 0.1], [0.4, 0.3, 0.3], [0.05, 0.05, 0.9], [0.6, 0.3, 0.1]],
    ]
)
LABELS = torch.tensor([0, 0, 2, 2])


def outputs_and_labels(
    seed: int, exits: int, classes: int, samples: int, scale: float
) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return scale * torch.randn(exits, samples, classes, generator=random), torch.randint(
        classes, (samples,), generator=random
    )


pairs = st.builds(
    outputs_and_labels,
    st.integers(0, 10_000),
    exits=st.integers(1, 4),
    classes=st.integers(1, 6),
    samples=st.integers(1, 30),
    scale=st.sampled_from([0.0, 1.0, 10.0, 300.0]),
)


# --- the probability of the truth -----------------------------------------------------------------


def test_probabilities_of_the_truth_by_hand():
    found = true_label_probabilities(BY_HAND, LABELS)
    torch.testing.assert_close(found, torch.tensor([[0.7, 0.2, 0.6, 0.3], [0.8, 0.4, 0.9, 0.1]]))


@quick
@given(pairs)
def test_they_are_one_softmax_entry_each(pair):
    recording = recording_of(*pair)
    found = true_label_probabilities(recording.outputs, recording.labels)
    one_by_one = [
        [output[sample].softmax(0)[label] for sample, label in enumerate(recording.labels)]
        for output in recording.outputs.double()
    ]
    torch.testing.assert_close(
        found.double(), torch.tensor(one_by_one).double(), atol=1e-5, rtol=1e-4
    )
    assert (found >= 0.0).all()
    assert (found <= 1.0).all()


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_without_an_output_is_refused(label):
    with pytest.raises(RecordingError, match=f"{label}.*3 outputs"):
        true_label_probabilities(BY_HAND, torch.tensor([0, 1, 2, label]))


# --- class by class -------------------------------------------------------------------------------


def test_classes_by_hand():
    found = class_confidence(recording_of(BY_HAND, LABELS, split="test"))
    assert (found.classes, found.absent, found.counts.tolist()) == ((0, 2), (1,), [2, 0, 2])
    assert (found.exits, found.split) == (("block0", "output"), "test")
    torch.testing.assert_close(
        found.confidence[:, [0, 2]], torch.tensor([[0.45, 0.45], [0.6, 0.5]]).double()
    )
    assert found.accuracy[:, [0, 2]].tolist() == [[0.5, 0.5], [1.0, 0.5]]
    assert found.confidence[:, 1].isnan().all()
    assert found.accuracy[:, 1].isnan().all()
    assert [overall.value for overall in found.overall] == pytest.approx([0.45, 0.55])
    assert [sure.value for sure in found.max_probability] == pytest.approx(
        [(0.7 + 0.7 + 0.6 + 0.5) / 4, (0.8 + 0.4 + 0.9 + 0.6) / 4]
    )
    # two classes lie on a line, whatever they are
    assert found.correlations == (None, None)


@quick
@given(pairs)
def test_classes_are_those_of_a_plain_loop(pair):
    recording = recording_of(*pair)
    found = class_confidence(recording)
    true = true_label_probabilities(recording.outputs, recording.labels).double()
    hits = recording.quality.double()
    assert set(found.classes) == set(recording.labels.tolist())
    assert sorted(found.classes + found.absent) == list(range(recording.outputs.shape[2]))
    for label in found.classes:
        here = recording.labels == label
        assert found.counts[label] == here.sum()
        torch.testing.assert_close(found.confidence[:, label], true[:, here].mean(1))
        torch.testing.assert_close(found.accuracy[:, label], hits[:, here].mean(1))
    # weighted with their counts, the classes are everything
    weights = found.counts.double() / found.counts.sum()
    torch.testing.assert_close((found.confidence.nan_to_num() * weights).sum(1), true.mean(1))
    torch.testing.assert_close((found.accuracy.nan_to_num() * weights).sum(1), hits.mean(1))


@quick
@given(pairs)
def test_overall_confidence_is_a_mean_with_an_interval_of_probabilities(pair):
    recording = recording_of(*pair)
    found = class_confidence(recording)
    true = true_label_probabilities(recording.outputs, recording.labels)
    surest = recording.outputs.softmax(-1).amax(-1)
    for estimates, values in ((found.overall, true), (found.max_probability, surest)):
        for estimate, of_exit in zip(estimates, values, strict=True):
            plain = mean(of_exit)
            assert estimate == Estimate(plain.value, max(plain.low, 0.0), min(plain.high, 1.0))
            assert 0.0 <= estimate.low <= estimate.high <= 1.0
    for sure, overall in zip(found.max_probability, found.overall, strict=True):
        # no class is surer than the surest
        assert sure.value >= overall.value - 1e-6


def test_confidence_rises_with_what_exits_know():
    overall = class_confidence(drawn(3000, seed=1)).overall
    assert all(low.high < high.low for low, high in itertools.pairwise(overall))


# --- correlations ---------------------------------------------------------------------------------


@quick
@given(st.integers(0, 10_000), st.integers(4, 40), st.sampled_from([0.0, 0.3, 3.0]))
def test_correlation_and_interval_are_those_of_scipy(seed, count, noise):
    random = torch.Generator().manual_seed(seed)
    first = torch.rand(count, generator=random)
    second = first + noise * torch.randn(count, generator=random) if noise else 1.0 - first.double()
    found = correlation(first, second)
    known = stats.pearsonr(first.double(), second.double())
    interval = known.confidence_interval()
    assert (found.value, found.low, found.high) == pytest.approx(
        (known.statistic, interval.low, interval.high), abs=1e-6
    )
    assert found.low <= found.value <= found.high


def test_a_straight_line_correlates_wholly():
    line = torch.arange(5.0)
    assert correlation(line, 2 * line + 1).value == pytest.approx(1.0, abs=1e-12)
    assert correlation(line, -line).value == pytest.approx(-1.0, abs=1e-12)


@pytest.mark.parametrize("values", [[0.1] * 7, [1.0] * 5, [0.0] * 4, [0.1 + 0.2, 0.3, 0.3, 0.3]])
def test_where_nothing_varies_there_is_no_correlation(values):
    """Equal values, and those that differ in their last digit alone."""
    constant = torch.tensor(values, dtype=torch.float64)
    other = torch.arange(float(len(values)))
    assert correlation(constant, other) is None
    assert correlation(other, constant) is None


def test_few_pairs_say_little():
    assert correlation(torch.tensor([0.1, 0.9]), torch.tensor([0.2, 0.8])) is None
    three = correlation(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.7, 0.8]))
    assert (three.low, three.high) == (-1.0, 1.0)


def test_correlations_are_over_classes_with_samples_each_counted_once():
    recording = drawn(400, seed=2, classes=8)
    labels = torch.where(recording.labels == 3, 4, recording.labels)
    recording = recording.with_outputs(recording.outputs, labels)
    found = class_confidence(recording)
    assert found.absent == (3,)
    for exit, estimate in enumerate(found.correlations):
        x = found.confidence[exit, list(found.classes)]
        y = found.accuracy[exit, list(found.classes)]
        assert estimate.value == pytest.approx(stats.pearsonr(x, y).statistic)


def test_classes_that_do_not_differ_correlate_as_single_samples_do():
    """What a high correlation over classes must be measured against."""
    found = class_confidence(drawn(10_000, seed=3, gains=(1.0, 3.0), classes=100))
    for over_classes, over_samples in zip(
        found.correlations, found.sample_correlations, strict=True
    ):
        assert over_classes.low < over_samples.value < over_classes.high
        assert over_samples.value > 0.5


def test_classes_that_do_differ_correlate_more_than_single_samples():
    """Half of the classes are twice as easy; all noise of samples averages out."""
    labels = torch.arange(20_000) % 20
    outputs = torch.randn(1, 20_000, 20)
    outputs[0, torch.arange(20_000), labels] += 1.0 + 2.0 * (labels % 2)
    found = class_confidence(recording_of(outputs, labels))
    assert found.correlations[0].low > 0.95 > found.sample_correlations[0].high
