"""Batch norm that training has left behind is noticed, and brought up to date."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from impatient.networks.recalibration import batch_norms, recalibrated
from impatient.training import Recipe
from impatient.training.batch_norm import behind, mean_quality, recalibrate_on, training_inputs
from impatient.training.examples import ArrayExamples
from small_training import digits, small, state, train

# enough to learn, too little for a momentum of 0.01: the first statistics still weigh 80 %
SHORT = Recipe(epochs=2, batch_size=128, lr=0.1, weight_decay=0.0)


def with_momentum(momentum: float) -> Any:
    network = small(width=16, dropout=0.0)
    for norm in batch_norms(network):
        norm.momentum = momentum
    return network


def test_batch_norm_that_lags_is_said_and_its_statistics_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = with_momentum(0.01)
    history = train(network, digits(), SHORT)
    last = history.epochs[-1]
    assert last.train_accuracy[-1] > last.validation_accuracy[-1] + 0.2
    assert "batch norm has not caught up with training: exit" in caplog.text
    assert "impatient recalibrate DIR" in caplog.text
    # looking has changed nothing
    before = state(network)
    found = behind(network, digits(), history, batch_size=128)
    assert found is not None
    assert found.before == pytest.approx(last.validation_accuracy)
    assert all(torch.equal(before[name], value) for name, value in state(network).items())
    # and what it promises comes true
    changed = recalibrate_on(network, digits(), batch_size=128)
    assert mean_quality(network, digits(), "validation") == pytest.approx(changed.after)
    assert changed.after[-1] > max(last.train_accuracy[-1] - 0.05, changed.before[-1] + 0.2)
    assert behind(network, digits(), history, batch_size=128) is None


def test_the_statistics_are_those_of_the_training_split() -> None:
    network = with_momentum(0.01)
    recalibrate_on(network, digits(), batch_size=128)
    first = network.backbone.blocks[0][1]
    x = digits().preprocess(digits().examples("train").take(range(digits().size("train"))))
    with torch.no_grad():
        seen = network.backbone.blocks[0][0](x).transpose(0, 1).flatten(1)
    # the last batch is smaller, and weighs as much as the others
    torch.testing.assert_close(first.running_mean, seen.mean(1), atol=0.02, rtol=0.0)
    torch.testing.assert_close(first.running_var, seen.var(1), atol=0.0, rtol=0.05)
    assert (first.momentum, network.training) == (0.01, network.training)


def test_learning_by_heart_is_no_lag(caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = digits()
    splits = {
        split: ArrayExamples(
            whole.examples(split).take(range(count)),
            torch.randint(0, 10, (count,), generator=generator),
        )
        for split, count in (("train", 64), ("validation", 64), ("test", 32))
    }
    data = dataclasses.replace(whole, splits=splits)
    network = small(width=32, dropout=0.0)
    history = train(network, data, Recipe(epochs=40, batch_size=16, lr=0.1, weight_decay=0.0))
    last = history.epochs[-1]
    assert last.train_accuracy[-1] > last.validation_accuracy[-1] + 0.3
    assert "batch norm" not in caplog.text


def test_a_batch_has_samples_of_all_classes_and_never_one_alone() -> None:
    whole = digits()
    labels = whole.examples("train").labels
    order = labels.argsort(stable=True)[:1401]
    examples = whole.examples("train").subset(order)
    data = dataclasses.replace(whole, splits={**whole.splits, "train": examples})
    network = small()
    sizes = [len(x) for x in training_inputs(network, data, batch_size=20)]
    assert sum(sizes) in (len(order), len(order) - 1)
    assert min(sizes) > 1
    # in their own order the first batch would be zeros alone
    first = next(training_inputs(network, data, batch_size=20))
    zeros = next(iter(data.batches("train", 20)))[0]
    assert not torch.equal(first, zeros)
    assert first.mean() != pytest.approx(zeros.mean().item(), abs=1e-6)


def test_statistics_come_back_after_an_error() -> None:
    network = nn.Sequential(nn.BatchNorm1d(3))
    before = state(network)

    def fail() -> None:
        with recalibrated(network, [torch.randn(5, 3)]):
            assert not torch.equal(network[0].running_mean, before["0.running_mean"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(before[name], value) for name, value in state(network).items())
