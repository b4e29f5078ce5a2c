"""Losses of several exits and learning-rate schedules, against numbers worked out by hand."""

import math

import pytest
import torch

from impatient.errors import TrainingError
from impatient.training import Recipe, schedules
from impatient.training.losses import exit_hits, exit_losses, weighted_loss

LABELS = torch.tensor([0, 1])
# right twice
SURE = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
# knows nothing; argmax picks class 0
UNSURE = torch.zeros(2, 2)
WRONG = -SURE

# --- losses ---------------------------------------------------------------------------------------


def test_losses_are_mean_cross_entropies_per_exit():
    right = math.log1p(math.exp(-4.0))
    wrong = math.log1p(math.exp(4.0))
    assert exit_losses([SURE, UNSURE, WRONG], LABELS).tolist() == pytest.approx(
        [right, math.log(2), wrong], rel=1e-5
    )
    # right once, wrong once
    half = torch.tensor([[4.0, 0.0], [4.0, 0.0]])
    assert exit_losses([half], LABELS).item() == pytest.approx((right + wrong) / 2, rel=1e-5)


def test_label_smoothing_mixes_in_the_uniform_target():
    right = math.log1p(math.exp(-4.0))
    wrong = math.log1p(math.exp(4.0))
    smooth = exit_losses([SURE], LABELS, 0.2)
    assert smooth.item() == pytest.approx(0.9 * right + 0.1 * wrong, rel=1e-5)


def test_losses_of_half_precision_outputs_are_computed_in_full():
    outputs = torch.randn(4, 3)
    labels = torch.tensor([0, 1, 2, 0])
    losses = exit_losses([outputs.bfloat16()], labels)
    assert losses.dtype == torch.float32
    assert losses.item() == exit_losses([outputs.bfloat16().float()], labels).item()


def test_the_weighted_loss_is_the_weighted_sum():
    assert (
        weighted_loss(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.0, 0.25])).item() == 1.5
    )


def test_gradients_are_scaled_by_the_weights_and_an_exit_of_weight_zero_gets_none():
    outputs = [torch.randn(2, 2, requires_grad=True) for _ in range(3)]
    weighted_loss(exit_losses(outputs, LABELS), torch.tensor([0.0, 1.0, 3.0])).backward()
    alone = [output.detach().clone().requires_grad_() for output in outputs]
    for output in alone:
        torch.nn.functional.cross_entropy(output, LABELS).backward()
    for output, by_itself, weight in zip(outputs, alone, (0.0, 1.0, 3.0), strict=True):
        torch.testing.assert_close(output.grad, weight * by_itself.grad)
        assert by_itself.grad.abs().max() > 0


def test_hits_count_the_samples_each_exit_gets_right():
    assert exit_hits([SURE, UNSURE, WRONG], LABELS).tolist() == [2, 1, 0]


def test_a_single_sample_and_a_single_exit_will_do():
    assert exit_hits([SURE[:1]], LABELS[:1]).tolist() == [1]
    assert exit_losses([UNSURE[:1]], LABELS[:1]).tolist() == pytest.approx([math.log(2)])


# --- schedules ------------------------------------------------------------------------------------


def test_cosine_falls_from_one_to_zero_through_a_half():
    assert [schedules.cosine(done) for done in (0.0, 1 / 3, 0.5, 2 / 3, 1.0)] == pytest.approx(
        [1.0, 0.75, 0.5, 0.25, 0.0]
    )


def test_cosine_stays_at_its_ends_outside_the_training():
    assert (schedules.cosine(-0.5), schedules.cosine(1.5)) == (1.0, 0.0)


def test_steps_fall_to_a_tenth_at_every_milestone():
    rates = [schedules.step(done) for done in (0.0, 0.499, 0.5, 0.749, 0.75, 1.0)]
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01, 0.01])
    assert schedules.step(0.6, milestones=(0.2, 0.4, 0.9), factor=0.5) == 0.25


def test_warm_up_grows_linearly_to_the_factor_it_was_given():
    assert schedules.warmed_up(0.0, 1.0, 0.1) == pytest.approx(0.01)
    assert schedules.warmed_up(0.05, 0.8, 0.1) == pytest.approx(0.8 * 0.51)
    assert schedules.warmed_up(0.1, 0.8, 0.1) == 0.8
    assert schedules.warmed_up(0.9, 0.3, 0.1) == 0.3


def test_warm_up_never_exceeds_the_factor_and_never_is_zero():
    for step in range(101):
        assert 0.0 < schedules.warmed_up(step / 100, 0.5, 0.3) <= 0.5


def test_without_warm_up_the_factor_is_as_it_was():
    assert schedules.warmed_up(0.0, 0.7, 0.0) == 0.7


def test_a_recipe_multiplies_rate_schedule_and_warm_up():
    cosine = Recipe(lr=0.2, warmup=0.5)
    assert schedules.learning_rate(cosine, 0.25) == pytest.approx(
        0.2 * schedules.cosine(0.25) * 0.251 / 0.5
    )
    assert schedules.learning_rate(cosine, 0.75) == pytest.approx(0.2 * schedules.cosine(0.75))
    assert schedules.learning_rate(
        Recipe(lr=0.2, warmup=0.0, schedule="step"), 0.6
    ) == pytest.approx(0.02)


@pytest.mark.parametrize("schedule", ["step:30,60", "step:30,60:0.1"])
def test_a_rate_falls_after_the_epochs_that_are_said(schedule):
    recipe = Recipe(epochs=90, lr=1.0, warmup=0.0, schedule=schedule)
    rates = [schedules.learning_rate(recipe, epoch / 90) for epoch in range(90)]
    assert rates[:30] == [1.0] * 30
    assert rates[30:60] == pytest.approx([0.1] * 30)
    assert rates[60:] == pytest.approx([0.01] * 30)
    # as of torch, and to another share
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60], gamma=0.2)
    fifth = Recipe(epochs=90, lr=1.0, warmup=0.0, schedule="step:30,60:0.2")
    for epoch in range(90):
        mine = schedules.learning_rate(fifth, epoch / 90)
        assert mine == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    # epochs count from the beginning of a phase
    assert schedules.learning_rate(recipe, 0.5, epochs=60) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "schedule", ["stairs", "step:", "step:60,30", "step:0", "step:5:2", "step:5:0.1:9", "cosine:5"]
)
def test_a_schedule_that_makes_no_sense_is_refused(schedule):
    with pytest.raises(TrainingError, match=r"expected cosine, step, or step:30,60"):
        Recipe(epochs=90, schedule=schedule)


def test_a_step_that_never_comes_is_refused():
    with pytest.raises(TrainingError, match="falls after 60 epochs, but a phase has 50"):
        Recipe(epochs=50, schedule="step:30,60")
    with pytest.raises(TrainingError, match="falls after 30 epochs, but a phase has 25"):
        Recipe(epochs=50, regime="mixed", schedule="step:30")


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "share", "turn"),
    [(10, 0.5, 5), (2, 0.5, 1), (2, 0.9, 1), (3, 0.01, 1), (10, 0.99, 9), (8, 0.25, 2)],
)
def test_the_mixed_regime_has_two_phases_of_at_least_one_epoch(epochs, share, turn):
    recipe = Recipe(regime="mixed", epochs=epochs, backbone_share=share)
    assert recipe.phases() == [("backbone", 0, turn), ("joint", turn, epochs)]


def test_the_other_regimes_have_one_phase():
    assert Recipe(regime="joint", epochs=3).phases() == [("joint", 0, 3)]
    assert Recipe(regime="frozen", epochs=3).phases() == [("heads", 0, 3)]


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"epochs": -1},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": -0.1},
        {"lr": math.nan},
        {"lr": math.inf},
        {"schedule": "exponential"},
        {"regime": "alternating"},
        {"augment": "mixup"},
        {"warmup": 1.0},
        {"warmup": -0.1},
        {"warmup": math.nan},
        {"backbone_share": 0.0},
        {"backbone_share": 1.0},
        {"backbone_share": math.nan},
        {"regime": "mixed", "epochs": 1},
        {"momentum": -0.1},
        {"momentum": 1.0},
        {"momentum": math.nan},
        {"weight_decay": -1e-4},
        {"weight_decay": math.nan},
        {"label_smoothing": 1.5},
        {"label_smoothing": -0.1},
        {"clip_norm": 0.0},
        {"clip_norm": -1.0},
        {"clip_norm": math.nan},
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be_followed_is_refused(bad):
    with pytest.raises(
        TrainingError, match=next(reversed(bad)) if "regime" not in bad else "regime|mixed"
    ):
        Recipe(**bad)
