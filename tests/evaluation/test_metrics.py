"""Conditional monotonicity: against hand-made probabilities and a plain loop over all pairs."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from impatient.ensembling import combine
from impatient.errors import RecordingError
from impatient.evaluation.metrics import conditional_monotonicity, largest_falls, proportion

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def with_truth_at(probabilities: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Outputs [K, N, 3] that give these probabilities [K][N] to class 1, and labels that say so."""
    true = torch.tensor(probabilities)
    rest = (1 - true) / 2
    return torch.stack([rest, true, rest], -1).log(), torch.ones(true.shape[1], dtype=torch.long)


# falls by hand: never; 0.3 between neighbours; 0.2 and then 0.3, from first to last 0.5; up and
# down again 0.4
FALLS = with_truth_at([[0.2, 0.8, 0.8, 0.1], [0.5, 0.5, 0.6, 0.5], [0.9, 0.6, 0.3, 0.1]])


def test_the_largest_fall_is_between_any_two_exits_not_only_neighbours():
    torch.testing.assert_close(largest_falls(*FALLS), torch.tensor([0.0, 0.3, 0.5, 0.4]))


def test_violations_and_falls_by_hand():
    found = conditional_monotonicity(*FALLS, tolerances=(0.0, 0.35, 0.45, 0.9))
    assert found.tolerances == (0.0, 0.35, 0.45, 0.9)
    assert found.violations == (
        proportion(3, 4),
        proportion(2, 4),
        proportion(1, 4),
        proportion(0, 4),
    )
    assert found.mean_fall.value == pytest.approx(0.3)
    assert found.fall_max == pytest.approx(0.5)
    # linear between the third and the fourth of four
    assert found.fall_p95 == pytest.approx(0.4 + 0.85 * 0.1)


def test_without_labels_the_last_exit_says_which_class():
    # the last exit answers 0 for samples 2 and 3 (of 0 and 2, equal, the first): 0.1 to 0.35, and
    # 0.45, 0.25, 0.45
    torch.testing.assert_close(largest_falls(FALLS[0]), torch.tensor([0.0, 0.3, 0.0, 0.2]))
    agreed = torch.tensor([1, 1, 0, 0])
    assert largest_falls(FALLS[0]).equal(largest_falls(FALLS[0], agreed))


@quick
@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([0.3, 3.0, 30.0]))
def test_falls_are_those_of_all_pairs(seed, exits, scale):
    random = torch.Generator().manual_seed(seed)
    outputs = scale * torch.randn(exits, 5, 4, generator=random)
    labels = torch.randint(4, (5,), generator=random)
    true = outputs.double().softmax(-1)[:, torch.arange(5), labels]
    pairs = [true[i] - true[j] for j in range(exits) for i in range(j + 1)]
    torch.testing.assert_close(
        largest_falls(outputs, labels).double(), torch.stack(pairs).amax(0), atol=1e-5, rtol=1e-5
    )


def test_one_exit_never_falls():
    found = conditional_monotonicity(torch.randn(1, 9, 4), torch.randint(4, (9,)))
    assert found.fall_max == found.mean_fall.value == 0.0
    assert all(violation.value == 0.0 for violation in found.violations)


def test_a_product_falls_less_often_than_exits_alone():
    labels = torch.arange(2000) % 10
    outputs = 2.0 * torch.randn(7, 2000, 10)
    outputs[:, torch.arange(2000), labels] += torch.linspace(2.0, 5.0, 7)[:, None]
    alone = conditional_monotonicity(outputs, labels, tolerances=[0.1])
    product = conditional_monotonicity(combine(outputs, "poe"), labels, tolerances=[0.1])
    assert product.violations[0].high < alone.violations[0].low / 2


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_without_an_output_are_refused(label):
    with pytest.raises(RecordingError, match="3 outputs"):
        largest_falls(FALLS[0], torch.tensor([0, 1, 2, label]))


def test_a_large_recording_takes_less_than_a_second():
    outputs = torch.randn(16, 10_000, 100)
    labels = torch.randint(100, (10_000,))
    began = time.process_time()
    conditional_monotonicity(outputs, labels, tolerances=torch.linspace(0, 1, 1000).tolist())
    # of this process: the machine may be busy
    assert time.process_time() - began < 1.0
