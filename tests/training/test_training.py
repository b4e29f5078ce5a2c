"""The training loop: what it learns, what moves, and that stopping and going on changes nothing,
not one bit.
"""

import csv
import dataclasses
import functools
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from impatient.budgets import exit_weights, uniform
from impatient.errors import StaleInput, StorageError, TrainingDiverged, TrainingError
from impatient.files import read_header, read_tensors, write_tensors
from impatient.networks import MultiExitNetwork
from impatient.training import History, Recipe, fit, loop
from impatient.training.augmentation import augmented
from impatient.training.examples import ArrayExamples
from impatient.training.loop import checked_weights
from impatient.training.progress import TrainingProgress
from impatient.training.weights import STATIC, sieve
from small_training import BRIEF, MIXED, STEPS, digits, few, on_cpu, small, state, train


def changed(before: dict[str, Tensor], network: nn.Module) -> set[str]:
    """Names of parameters and buffers that are no longer the same bits."""
    return {
        name for name, value in network.state_dict().items() if not torch.equal(value, before[name])
    }


def plain(history: History) -> list[dict[str, Any]]:
    """Everything reported but the time it took."""
    return [{**dataclasses.asdict(entry), "seconds": None} for entry in history.epochs]


# --- learning -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned() -> tuple[MultiExitNetwork, History]:
    # made before the fixture that does so for every test
    torch.set_num_threads(1)
    network = small(width=16, dropout=0.0)
    return network, train(network, digits(), Recipe(epochs=5, batch_size=64, lr=0.2))


def test_training_lowers_the_loss_of_every_exit(learned):
    _, history = learned
    first = history.epochs[0]
    last = history.epochs[-1]
    assert all(
        after < 0.97 * before
        for before, after in zip(first.train_loss, last.train_loss, strict=True)
    )
    assert last.train_loss[-1] < 0.3 * first.train_loss[-1]
    assert all(
        after < before
        for before, after in zip(first.validation_loss, last.validation_loss, strict=True)
    )


def test_a_tiny_network_learns_the_digits_and_deeper_exits_learn_them_better(learned):
    _, history = learned
    first, second, last = history.epochs[-1].validation_accuracy
    assert last > 0.9
    assert first < second < last
    # more than twice what guessing gives
    assert first > 0.25


def test_what_is_reported_is_what_the_network_does(learned):
    network, history = learned
    inputs, labels = next(digits().batches("validation", 1000))
    with torch.no_grad():
        outputs = network(inputs)
    hits = [(output.argmax(1) == labels).double().mean().item() for output in outputs]
    losses = [nn.functional.cross_entropy(output, labels).item() for output in outputs]
    assert history.epochs[-1].validation_accuracy == pytest.approx(hits, abs=1e-9)
    assert history.epochs[-1].validation_loss == pytest.approx(losses, rel=1e-4)


def test_epochs_are_counted_from_one_and_the_rate_falls(learned):
    _, history = learned
    assert [entry.epoch for entry in history.epochs] == [1, 2, 3, 4, 5]
    assert {entry.phase for entry in history.epochs} == {"joint"}
    rates = [entry.lr for entry in history.epochs]
    assert rates == sorted(rates, reverse=True)
    assert all(entry.seconds > 0 for entry in history.epochs)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    networks = [small() for _ in range(3)]
    histories = [
        train(network, recipe=dataclasses.replace(BRIEF, seed=seed, epochs=1))
        for network, seed in zip(networks, (1, 1, 2), strict=True)
    ]
    assert changed(state(networks[0]), networks[1]) == set()
    assert plain(histories[0]) == plain(histories[1]) != plain(histories[2])


def test_validation_is_only_reported():
    one = small()
    other = small()
    mixed_up = few()
    mixed_up.examples("validation").labels.random_(0, 10)
    first = train(one)
    second = train(other, mixed_up)
    assert changed(state(one), other) == set()
    assert first.epochs[-1].validation_loss != second.epochs[-1].validation_loss


def test_half_precision_trains():
    network = small()
    history = train(
        network,
        recipe=dataclasses.replace(BRIEF, epochs=6, augment="none"),
        fabric=on_cpu(precision="bf16-mixed"),
    )
    assert history.epochs[-1].train_loss[-1] < 0.9 * history.epochs[0].train_loss[-1]
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_the_default_fabric_and_the_progress_bar_will_do(capfd):
    history = fit(small(), few(), recipe=dataclasses.replace(BRIEF, epochs=1))
    assert len(history.epochs) == 1
    assert "epoch 1/1 joint" in capfd.readouterr().err


def test_channels_last_clipping_smoothing_and_steps_train():
    recipe = dataclasses.replace(
        BRIEF, channels_last=True, clip_norm=1.0, label_smoothing=0.1, schedule="step", epochs=6
    )
    history = train(small(), recipe=recipe)
    assert history.epochs[-1].train_loss[-1] < history.epochs[0].train_loss[-1]


def test_clipping_bounds_the_step():
    before = small()
    recipe = Recipe(
        epochs=1, batch_size=88, lr=1.0, momentum=0.0, weight_decay=0.0, warmup=0.0, clip_norm=1e-3
    )
    after = small()
    train(after, recipe=recipe)
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    )
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_a_last_batch_of_one_sample_is_left_out_for_batch_norm():
    data = few()
    data.splits["train"] = ArrayExamples(
        data.examples("train").take(range(33)), data.examples("train").labels[:33]
    )
    train(small(), data, dataclasses.replace(BRIEF, epochs=1))


def test_training_works_outside_the_main_thread():
    done = []
    thread = threading.Thread(
        target=lambda: done.append(train(small(), recipe=dataclasses.replace(BRIEF, epochs=1)))
    )
    thread.start()
    thread.join(60)
    assert len(done[0].epochs) == 1


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATIC)
def test_a_scheme_is_known_by_its_name(name):
    assert checked_weights(name, 5, 100) == STATIC[name](5)


def test_a_name_and_its_numbers_train_alike():
    one = small()
    other = small()
    recipe = dataclasses.replace(BRIEF, epochs=1)
    train(one, recipe=recipe, weights="sieve")
    train(other, recipe=recipe, weights=list(sieve(3)))
    assert changed(state(one), other) == set()
    assert changed(state(small()), one)


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ("heavy", "cannot read 'heavy' as exit weights"),
        ([1.0, 1.0], "2 exit weights for 3 exits"),
        ([1.0] * 4, "4 exit weights for 3 exits"),
        ([], "0 exit weights"),
        ([1.0, -0.1, 1.0], "not negative"),
        ([0.0, 0.0, 0.0], "one must be positive"),
        ([1.0, float("nan"), 1.0], "must be finite"),
    ],
)
def test_weights_that_make_no_sense_are_refused_before_anything_moves(weights, complaint):
    network = small()
    before = state(network)
    with pytest.raises(TrainingError, match=complaint):
        train(network, weights=weights)
    assert changed(before, network) == set()
    assert network.training


def test_an_exit_that_no_budget_ends_at_is_not_trained():
    weights = exit_weights(uniform(0.002, 0.010), [0.001, 0.002, 0.006])
    assert weights == pytest.approx((0.0, 0.5, 0.5))
    network = small()
    before = state(network)
    train(network, weights=weights, recipe=dataclasses.replace(BRIEF, weight_decay=0.0, epochs=1))
    moved = changed(before, network)
    assert not {name for name in moved if name.startswith("heads.0.")}
    assert {name for name in moved if name.startswith("heads.1.")}


def test_weights_scale_the_step_as_they_are():
    """One plain step of gradient descent on one batch moves the last layer in proportion to the
    last exit's weight.
    """
    recipe = Recipe(epochs=1, batch_size=88, lr=0.01, momentum=0.0, weight_decay=0.0, warmup=0.0)
    moves = []
    for weight in (1.0, 4.0):
        network = small(dropout=0.0)
        before = state(network)
        train(network, weights=[1.0, 1.0, weight], recipe=recipe)
        moves.append(
            network.backbone.classifier.weight.detach() - before["backbone.classifier.weight"]
        )
    torch.testing.assert_close(moves[1], 4.0 * moves[0], rtol=1e-3, atol=1e-6)
    assert moves[0].abs().max() > 0


# --- regimes: what moves --------------------------------------------------------------------------


def test_joint_training_moves_everything():
    network = small()
    before = state(network)
    train(network)
    assert changed(before, network) == set(before)


def test_frozen_training_moves_no_bit_of_the_backbone_batch_norm_statistics_included():
    network = small()
    before = state(network)
    history = train(network, recipe=dataclasses.replace(BRIEF, regime="frozen"))
    moved = changed(before, network)
    assert moved == {name for name in before if name.startswith("heads.")}
    assert {entry.phase for entry in history.epochs} == {"heads"}
    assert history.epochs[-1].train_loss[0] < history.epochs[0].train_loss[0]


def test_frozen_training_of_a_network_without_heads_is_refused():
    alone = small(after=())
    with pytest.raises(
        TrainingError, match="nothing to train in the phase 'heads' of the regime 'frozen'"
    ):
        train(alone, recipe=dataclasses.replace(BRIEF, regime="frozen"))
    assert all(parameter.requires_grad for parameter in alone.parameters())


def test_mixed_training_trains_the_backbone_alone_first_and_then_everything():
    network = small()
    before = state(network)
    with power_cut_after(epoch=2), pytest.raises(PowerCut):
        train(network, recipe=MIXED)
    assert not {name for name in changed(before, network) if name.startswith("heads.")}
    finished = small()
    history = train(finished, recipe=MIXED)
    assert [entry.phase for entry in history.epochs] == ["backbone", "backbone", "joint", "joint"]
    assert changed(before, finished) == set(before)


def test_the_first_phase_of_mixed_training_is_training_on_the_last_exit():
    mixed = small()
    alone = small()
    with power_cut_after(epoch=2), pytest.raises(PowerCut):
        train(mixed, recipe=MIXED)
    train(alone, recipe=dataclasses.replace(BRIEF, epochs=2), weights=[0.0, 0.0, 1.0])
    assert changed(state(alone.backbone), mixed.backbone) == set()
    assert changed(state(small().backbone), mixed.backbone)


@pytest.mark.parametrize(
    "recipe",
    [BRIEF, MIXED, dataclasses.replace(BRIEF, regime="frozen")],
    ids=lambda recipe: recipe.regime,
)
def test_afterwards_the_network_is_in_eval_mode_with_the_flags_it_had(recipe):
    network = small()
    network.backbone.blocks[0].requires_grad_(False)
    network.heads[1].requires_grad_(False)
    before = state(network)
    flags = [parameter.requires_grad for parameter in network.parameters()]
    train(network, recipe=recipe)
    assert not any(module.training for module in network.modules())
    assert [parameter.requires_grad for parameter in network.parameters()] == flags
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen
    # who froze a layer meant it
    assert not frozen & changed(before, network)


def test_flags_come_back_after_an_error_too():
    network = small()
    with power_cut_after(epoch=1), pytest.raises(PowerCut):
        train(network, recipe=dataclasses.replace(BRIEF, regime="frozen"))
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not network.training


# --- stopping and going on ------------------------------------------------------------------------


class PowerCut(Exception):
    """Simulates the end of the process, after an epoch's checkpoint."""


class power_cut_after(pytest.MonkeyPatch):
    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.at = epoch

    def __enter__(self) -> None:
        def shown(_self: TrainingProgress, metrics: Any) -> None:
            if metrics.epoch == self.at:
                raise PowerCut

        self.setattr(TrainingProgress, "epoch", shown)

    def __exit__(self, *_: object) -> None:
        self.undo()


class ctrl_c_in_step(pytest.MonkeyPatch):
    """Sends real signals while the given step (from 0, over all epochs) is computed."""

    def __init__(self, step: int, times: int = 1) -> None:
        super().__init__()
        self.at = step
        self.times = times
        self.seen = 0

    def __enter__(self) -> None:
        update = loop._Training._update

        def pressed(training: Any, *args: Any) -> Tensor:
            if self.seen == self.at:
                for _ in range(self.times):
                    os.kill(os.getpid(), signal.SIGINT)
            self.seen += 1
            return update(training, *args)

        self.setattr(loop._Training, "_update", pressed)

    def __exit__(self, *_: object) -> None:
        self.undo()


@functools.cache
def uninterrupted(recipe: Recipe) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    network = small()
    history = train(network, recipe=recipe)
    return state(network), plain(history)


def assert_goes_on_bit_for_bit(recipe: Recipe, checkpoint: Path) -> None:
    """Another process, here another network, takes the checkpoint up and ends where an
    uninterrupted run ends.
    """
    final, reported = uninterrupted(recipe)
    network = small(seed=99)
    # random state is another, too
    torch.rand(7)
    history = train(network, recipe=recipe, checkpoint=checkpoint)
    assert changed(final, network) == set()
    assert plain(history) == reported


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "epoch"), [(BRIEF, 1), (BRIEF, 2), (BRIEF, 3), (MIXED, 1), (MIXED, 2), (MIXED, 3)]
)
def test_a_run_stopped_after_an_epoch_goes_on_bit_for_bit(tmp_path, recipe, epoch):
    with power_cut_after(epoch), pytest.raises(PowerCut):
        train(small(), recipe=recipe, checkpoint=tmp_path / "checkpoint")
    assert len(read_header(tmp_path / "checkpoint")["history"]) == epoch
    assert_goes_on_bit_for_bit(recipe, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("recipe", "step"),
    [
        (BRIEF, 0),
        (BRIEF, STEPS + 2),
        (MIXED, 3),
        (MIXED, 2 * STEPS - 1),
        (MIXED, 2 * STEPS),
        (MIXED, 3 * STEPS + 4),
    ],
)
def test_a_run_stopped_by_ctrl_c_goes_on_bit_for_bit(tmp_path, recipe, step):
    before = signal.getsignal(signal.SIGINT)
    with ctrl_c_in_step(step), pytest.raises(KeyboardInterrupt):
        train(small(), recipe=recipe, checkpoint=tmp_path / "checkpoint")
    assert signal.getsignal(signal.SIGINT) is before
    header = read_header(tmp_path / "checkpoint")
    # the step under way was finished, no other
    assert len(header["history"]) * STEPS + header["step"] == step + 1
    assert_goes_on_bit_for_bit(recipe, tmp_path / "checkpoint")


def test_a_run_may_be_stopped_again_and_again(tmp_path):
    for step in (1, 3, 5, 2):
        with ctrl_c_in_step(step), pytest.raises(KeyboardInterrupt):
            train(small(), recipe=BRIEF, checkpoint=tmp_path / "checkpoint")
    assert_goes_on_bit_for_bit(BRIEF, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    "changes", [{"regime": "frozen"}, {"channels_last": True}, {"momentum": 0.0}], ids=str
)
def test_other_recipes_go_on_bit_for_bit_too(tmp_path, changes):
    recipe = dataclasses.replace(BRIEF, epochs=2, **changes)
    with ctrl_c_in_step(STEPS + 1), pytest.raises(KeyboardInterrupt):
        train(small(), recipe=recipe, checkpoint=tmp_path / "checkpoint")
    assert_goes_on_bit_for_bit(recipe, tmp_path / "checkpoint")


def test_a_checkpoint_changes_nothing_by_being_written(tmp_path):
    network = small()
    train(network, checkpoint=tmp_path / "checkpoint")
    assert changed(uninterrupted(BRIEF)[0], network) == set()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_finished_run_is_taken_up_and_not_trained_again(tmp_path, monkeypatch):
    train(small(), checkpoint=tmp_path / "checkpoint")
    monkeypatch.setattr(loop._Training, "_update", lambda *_: pytest.fail("trained again"))
    assert_goes_on_bit_for_bit(BRIEF, tmp_path / "checkpoint")


def test_ctrl_c_without_a_checkpoint_just_stops():
    with ctrl_c_in_step(1), pytest.raises(KeyboardInterrupt):
        train(small())


def test_a_second_ctrl_c_interrupts_at_once_and_leaves_the_old_checkpoint(tmp_path):
    press = ctrl_c_in_step(STEPS + 2, times=2)
    with press, pytest.raises(KeyboardInterrupt):
        train(small(), checkpoint=tmp_path / "checkpoint")
    header = read_header(tmp_path / "checkpoint")
    # of the first epoch's end
    assert (len(header["history"]), header["step"]) == (1, 0)
    # the step under way was not finished
    assert press.seen == STEPS + 2
    assert_goes_on_bit_for_bit(BRIEF, tmp_path / "checkpoint")


def test_a_second_ctrl_c_while_the_checkpoint_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    with power_cut_after(1), pytest.raises(PowerCut):
        train(small(), checkpoint=tmp_path / "checkpoint")
    before = (tmp_path / "checkpoint").read_bytes()

    def interrupted(_tensors: Any, name: str, **_: Any) -> None:
        Path(name).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with ctrl_c_in_step(1), pytest.raises(KeyboardInterrupt):
        train(small(), checkpoint=tmp_path / "checkpoint")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"checkpoint": before}
    assert_goes_on_bit_for_bit(BRIEF, tmp_path / "checkpoint")


def test_a_full_disk_stops_the_run_with_the_old_checkpoint(tmp_path, monkeypatch):
    with power_cut_after(1), pytest.raises(PowerCut):
        train(small(), checkpoint=tmp_path / "checkpoint")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        train(small(), checkpoint=tmp_path / "checkpoint")
    monkeypatch.undo()
    assert_goes_on_bit_for_bit(BRIEF, tmp_path / "checkpoint")


# --- checkpoints of something else ----------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("begun") / "checkpoint"
    with power_cut_after(1), pytest.raises(PowerCut):
        train(small(), checkpoint=path)
    return path.read_bytes()


OTHERS: dict[str, Callable[[], tuple[MultiExitNetwork, dict[str, Any]]]] = {
    "recipe": lambda: (small(), {"recipe": dataclasses.replace(BRIEF, lr=0.06)}),
    "weights": lambda: (small(), {"weights": "sieve"}),
    "data": lambda: (small(), {"data": few(seed=1)}),
    "network": lambda: (small(width=4), {}),
    "exits": lambda: (small(after=("blocks.0", "blocks.2")), {}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path, begun, what):
    (tmp_path / "checkpoint").write_bytes(begun)
    network, options = OTHERS[what]()
    before = state(network)
    with pytest.raises(
        StaleInput,
        match=rf"was made with another {what}: .* or delete the checkpoint to start again",
    ):
        train(network, checkpoint=tmp_path / "checkpoint", **options)
    assert changed(before, network) == set()
    assert (tmp_path / "checkpoint").read_bytes() == begun


def test_another_number_of_processes_is_another_run(tmp_path, begun):
    (tmp_path / "whole").write_bytes(begun)
    tensors, header = read_tensors(tmp_path / "whole")
    write_tensors(tmp_path / "checkpoint", tensors, {**header, "processes": 2})
    with pytest.raises(StaleInput, match="another processes: 2, but here it is 1"):
        train(small(), checkpoint=tmp_path / "checkpoint")


def test_a_file_of_another_kind_is_refused(tmp_path):
    write_tensors(tmp_path / "checkpoint", {"a": torch.ones(1)}, {"kind": "recording"})
    with pytest.raises(StaleInput, match="another recipe: None"):
        train(small(), checkpoint=tmp_path / "checkpoint")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path, begun, share):
    (tmp_path / "checkpoint").write_bytes(begun[: int(share * len(begun))])
    with pytest.raises(StorageError, match="damaged or is another file"):
        train(small(), checkpoint=tmp_path / "checkpoint")


def test_a_pickle_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint").write_bytes(pickle.dumps({"model": {}}))
    with pytest.raises(StorageError, match="damaged or is another file"):
        train(small(), checkpoint=tmp_path / "checkpoint")


def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path, begun):
    (tmp_path / "whole").write_bytes(begun)
    tensors, header = read_tensors(tmp_path / "whole")
    for missing in ("model/heads.0.1.weight", "random/cpu"):
        assert missing in tensors
        write_tensors(
            tmp_path / "checkpoint",
            {name: tensors[name] for name in tensors if name != missing},
            header,
        )
        with pytest.raises(StorageError):
            train(small(), checkpoint=tmp_path / "checkpoint")


# --- divergence -----------------------------------------------------------------------------------


def test_weights_that_are_not_numbers_are_noticed_in_the_first_step():
    network = small()
    with torch.no_grad():
        network.backbone.classifier.weight[0, 0] = float("nan")
    with pytest.raises(
        TrainingDiverged,
        match=(
            r"the loss became NaN or infinite \(per exit: \[.*nan\].*Lower lr .*check inputs "
            r"and "
            r"weights for NaN"
        ),
    ):
        train(network)
    assert not network.training


def test_inputs_that_are_not_numbers_stop_the_run_with_the_checkpoint_intact(tmp_path, begun):
    (tmp_path / "checkpoint").write_bytes(begun)
    data = few()
    spoilt = data.examples("train").take(range(88)).float()
    spoilt[40] = float("nan")
    data = dataclasses.replace(
        data, splits={**data.splits, "train": ArrayExamples(spoilt, data.examples("train").labels)}
    )
    with pytest.raises(TrainingDiverged):
        train(small(), data, checkpoint=tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint").read_bytes() == begun
    assert_goes_on_bit_for_bit(BRIEF, tmp_path / "checkpoint")


def test_a_rate_that_is_far_too_high_is_noticed():
    with pytest.raises(TrainingDiverged, match=r"now 1e\+30"):
        train(small(), recipe=dataclasses.replace(BRIEF, lr=1e30, warmup=0.0, schedule="step"))


def test_a_last_step_that_spoils_the_weights_is_noticed_and_not_saved(tmp_path):
    """The loss of the only step is fine; what it did to the weights shows on the validation split
    alone.
    """
    recipe = Recipe(epochs=1, batch_size=88, lr=1e38, warmup=0.0)
    with pytest.raises(TrainingDiverged, match="validation"):
        train(small(), recipe=recipe, checkpoint=tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


# --- the table of metrics -------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def assert_table_is(path: Path, history: History) -> None:
    wanted = [
        (entry.epoch, entry.phase, split, exit, losses[exit], hits[exit])
        for entry in history.epochs
        for split, losses, hits in (
            ("train", entry.train_loss, entry.train_accuracy),
            ("validation", entry.validation_loss, entry.validation_accuracy),
        )
        for exit in range(len(losses))
    ]
    for row, (epoch, phase, split, exit, loss, accuracy) in zip(rows_of(path), wanted, strict=True):
        assert (int(row["epoch"]), row["phase"], row["split"], int(row["exit"])) == (
            epoch,
            phase,
            split,
            exit,
        )
        assert float(row["loss"]) == pytest.approx(loss, abs=1e-6)
        assert float(row["accuracy"]) == pytest.approx(accuracy, abs=1e-6)
        assert float(row["seconds"]) >= 0
        assert float(row["lr"]) == pytest.approx(history.epochs[epoch - 1].lr, rel=1e-5)


def test_the_table_holds_what_the_history_holds(tmp_path):
    history = train(small(), recipe=MIXED, metrics_csv=tmp_path / "metrics.csv")
    assert len(rows_of(tmp_path / "metrics.csv")) == 4 * 2 * 3
    assert_table_is(tmp_path / "metrics.csv", history)


def test_a_run_that_went_on_has_the_whole_table(tmp_path):
    files = {"checkpoint": tmp_path / "checkpoint", "metrics_csv": tmp_path / "metrics.csv"}
    with ctrl_c_in_step(STEPS + 2), pytest.raises(KeyboardInterrupt):
        train(small(), **files)
    assert len(rows_of(tmp_path / "metrics.csv")) == 1 * 2 * 3
    assert_table_is(tmp_path / "metrics.csv", train(small(), **files))


def test_a_table_that_was_lost_is_written_again_from_a_finished_run(tmp_path):
    train(small(), checkpoint=tmp_path / "checkpoint")
    history = train(
        small(), checkpoint=tmp_path / "checkpoint", metrics_csv=tmp_path / "metrics.csv"
    )
    assert_table_is(tmp_path / "metrics.csv", history)


# --- augmentation ---------------------------------------------------------------------------------


def shifts(image: Tensor, most: int) -> list[Tensor]:
    """All shifts of an image [C, H, W] by up to `most` pixels, with zeros moved in."""
    padded = nn.functional.pad(image, (most,) * 4)
    height, width = image.shape[1:]
    return [
        padded[:, y : y + height, x : x + width]
        for y in range(2 * most + 1)
        for x in range(2 * most + 1)
    ]


@pytest.mark.parametrize("how", ["crop", "crop-flip"])
def test_all_shifts_and_both_directions_are_equally_likely(how):
    image = torch.rand(1, 1, 8, 8) + 0.5
    torch.manual_seed(4)
    moved = augmented(image.expand(9000, -1, -1, -1), how)
    wanted = shifts(image[0], 1) + (shifts(image[0].flip(2), 1) if how == "crop-flip" else [])
    counts = [int((moved == shift).flatten(1).all(1).sum()) for shift in wanted]
    assert sum(counts) == 9000
    mean = 9000 / len(wanted)
    # five standard deviations of one count
    assert all(abs(count - mean) < 5 * mean**0.5 for count in counts)


def test_height_and_width_are_each_shifted_by_up_to_an_eighth_of_their_own():
    image = torch.zeros(1, 1, 24, 8)
    image[0, 0, 12, 4] = 1.0
    places = augmented(image.expand(500, -1, -1, -1), "crop").nonzero()
    assert set(places[:, 2].tolist()) == set(range(9, 16))
    assert set(places[:, 3].tolist()) == {3, 4, 5}


@pytest.mark.parametrize("size", [8, 16])
def test_a_crop_is_a_shift_by_up_to_an_eighth(size):
    images = torch.rand(24, 3, size, size) + 0.5
    for image, moved in zip(images, augmented(images, "crop"), strict=True):
        assert sum(torch.equal(moved, shift) for shift in shifts(image, size // 8)) == 1


def test_a_flip_mirrors_about_half_of_the_images():
    images = torch.rand(64, 1, 8, 8) + 0.5
    mirrored = 0
    for image, moved in zip(images, augmented(images, "crop-flip"), strict=True):
        upright = any(torch.equal(moved, shift) for shift in shifts(image, 1))
        assert upright or any(torch.equal(moved, shift) for shift in shifts(image.flip(2), 1))
        mirrored += not upright
    assert 16 <= mirrored <= 48


@pytest.mark.parametrize("how", ["crop", "crop-flip"])
def test_every_image_is_moved_its_own_way_by_the_seed(how):
    image = torch.rand(1, 1, 8, 8).expand(32, -1, -1, -1).contiguous()
    torch.manual_seed(3)
    first = augmented(image, how)
    assert len({row.numpy().tobytes() for row in first}) > 4
    torch.manual_seed(3)
    assert torch.equal(augmented(image, how), first)
    assert not torch.equal(augmented(image, how), first)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 6, 10), (1, 1, 3, 3), (2, 2, 17, 5)])
def test_augmented_images_keep_shape_and_type(shape):
    images = torch.rand(shape)
    for how in ("none", "crop", "crop-flip"):
        out = augmented(images, how)
        assert (out.shape, out.dtype) == (images.shape, images.dtype)


def test_without_augmentation_the_images_are_the_same_ones():
    images = torch.rand(2, 1, 8, 8)
    assert augmented(images, "none") is images
    assert augmented(torch.ones(2, 5), "none").shape == (2, 5)


@pytest.mark.parametrize("shape", [(4, 8), (4, 8, 8), (4, 1, 8, 8, 8)])
def test_what_is_no_image_cannot_be_augmented(shape):
    with pytest.raises(TrainingError, match="is for images"):
        augmented(torch.zeros(shape), "crop")


# --- several processes ----------------------------------------------------------------------------

TWO = """
    import sys
    from pathlib import Path
    import torch
    from lightning_fabric import Fabric
    from impatient.files import write_json, write_tensors
    from impatient.training import fit
    from two import made, recipe

    folder = Path(sys.argv[1])

    def work(fabric):
        network, data = made()
        history = fit(
            network, data, recipe=recipe(batch_size=8), fabric=fabric, progress=False,
            checkpoint=folder / "checkpoint", metrics_csv=folder / "metrics.csv",
        )
        write_tensors(folder / f"rank{fabric.global_rank}", network.state_dict(), {
            "loss": [list(entry.train_loss) for entry in history.epochs],
            "world": fabric.world_size,
        })

    if __name__ == "__main__":
        torch.set_num_threads(1)
        Fabric(accelerator="cpu", devices=2, strategy="ddp_fork").launch(work)
"""

MADE = """
    import torch
    from torch import nn
    from impatient.networks import attach_exits
    from impatient.training import Data, Preprocess, Recipe
    from impatient.training.examples import ArrayExamples

    def made():
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)]
        backbone = nn.Sequential(*blocks, nn.Linear(8, 3))
        network = attach_exits(backbone, after=["0", "1"], example=torch.zeros(1, 8))
        x = torch.randn(80, 8)
        examples = ArrayExamples(x, x[:, :3].argmax(1))
        preprocess = Preprocess(mean=(0.0,), std=(1.0,))
        splits = dict.fromkeys(("train", "validation", "test"), examples)
        data = Data(
            name="toy",
            splits=splits,
            class_names=("a", "b", "c"),
            preprocess=preprocess,
            fingerprint="f",
        )
        return network, data

    def recipe(batch_size):
        return Recipe(epochs=8, batch_size=batch_size, lr=0.3, regime="mixed", weight_decay=0.0)
"""


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path, monkeypatch):
    """Without noise and batch norm, averaged gradients of two halves are the gradient of the whole
    batch.
    """
    (tmp_path / "run.py").write_text(textwrap.dedent(TWO))
    (tmp_path / "two.py").write_text(textwrap.dedent(MADE))
    environment = {**os.environ, "PYTHONPATH": str(Path(loop.__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "run.py", str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (first, header), (second, other) = (read_tensors(tmp_path / f"rank{rank}") for rank in (0, 1))
    assert header["world"] == 2
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert header["loss"] == other["loss"]
    assert header["loss"][-1][-1] < 0.8 * header["loss"][0][-1]
    monkeypatch.syspath_prepend(tmp_path)
    from two import made, recipe

    network, data = made()
    history = train(network, data, recipe(batch_size=16))
    for name, value in network.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
    assert header["loss"][-1] == pytest.approx(history.epochs[-1].train_loss, rel=1e-4)
    assert len(rows_of(tmp_path / "metrics.csv")) == 8 * 2 * 3
    with pytest.raises(StaleInput, match="another processes: 2"):
        train(network, data, recipe(batch_size=8), checkpoint=tmp_path / "checkpoint")
