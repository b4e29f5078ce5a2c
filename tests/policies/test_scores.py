"""Scores: higher is surer, on one scale whatever the number of classes."""

import math

import pytest
import torch

from impatient.tasks.scores import SCORES, entropy, margin, max_probability

EVERY = pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
# softmax gives these probabilities back
OUTPUTS = torch.tensor([[0.8, 0.1, 0.1], [0.5, 0.3, 0.2]]).log()


def test_the_largest_probability():
    assert max_probability(OUTPUTS).tolist() == pytest.approx([0.8, 0.5])


def test_the_margin_is_between_the_two_largest():
    assert margin(OUTPUTS).tolist() == pytest.approx([0.7, 0.2], abs=1e-6)


def test_entropy_is_turned_round_and_scaled_to_its_maximum():
    bits = [-sum(p * math.log(p) for p in row) for row in ([0.8, 0.1, 0.1], [0.5, 0.3, 0.2])]
    assert entropy(OUTPUTS).tolist() == pytest.approx(
        [1 - value / math.log(3) for value in bits], abs=1e-6
    )


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_equal_outputs_are_the_least_sure(classes):
    outputs = torch.full((4, classes), 7.0)
    assert max_probability(outputs).tolist() == pytest.approx([1 / classes] * 4)
    assert margin(outputs).tolist() == [0.0] * 4
    assert entropy(outputs).tolist() == pytest.approx([0.0] * 4, abs=1e-5)


@EVERY
def test_one_class_far_ahead_is_certain(score):
    assert score(torch.tensor([[0.0, 1e4, 0.0], [0.0, 0.0, 3e38]])).tolist() == [1.0, 1.0]


@EVERY
def test_a_single_class_is_certain(score):
    assert score(torch.randn(2, 3, 1)).tolist() == [[1.0] * 3] * 2


@EVERY
def test_scores_stay_in_their_range_and_keep_the_leading_shape(score):
    values = score(torch.randn(3, 50, 7) * 10)
    assert values.shape == (3, 50)
    assert bool((values >= -1e-6).all())
    assert bool((values <= 1 + 1e-6).all())


@EVERY
def test_the_further_the_outputs_are_apart_the_surer(score):
    outputs = torch.randn(200, 6)
    scores = torch.stack([score(outputs * scale) for scale in (0.5, 1.0, 2.0, 4.0)])
    assert bool((scores.diff(dim=0) > 0).all())


@EVERY
def test_a_constant_and_the_order_of_classes_do_not_matter(score):
    outputs = torch.randn(20, 6)
    torch.testing.assert_close(score(outputs + 3.0), score(outputs))
    torch.testing.assert_close(score(outputs.flip(-1)), score(outputs))


@EVERY
def test_half_precision_is_scored_in_single(score):
    outputs = torch.randn(20, 6).half()
    values = score(outputs)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, score(outputs.float()))
