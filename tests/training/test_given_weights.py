"""Weights that people bring: how they are read and compared, and how training goes on from them."""

import argparse
import dataclasses
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
from torch import Tensor, nn

import impatient
from impatient.errors import (
    ImpatientError,
    ModelSpecError,
    NetworkError,
    StaleInput,
    StorageError,
    TrainingError,
)
from impatient.files import read_tensors, write_tensors
from impatient.networks import load_weights
from small_training import BRIEF, SmallNet, few, on_cpu, small, state, train

States = dict[str, Tensor]
# how people save a model's weights: a file name, and what writes it
WRAPPINGS: dict[str, tuple[str, Callable[[States, Path], None]]] = {
    "plain": ("a.pt", torch.save),
    "ordered": ("a.pth", lambda own, file: torch.save(OrderedDict(own), file)),
    "state_dict": ("a.pt", lambda own, file: torch.save({"state_dict": own, "epoch": 3}, file)),
    "model": ("a.bin", lambda own, file: torch.save({"model": own, "optimizer": {}}, file)),
    "net": ("a.tar", lambda own, file: torch.save({"net": own, "acc": 93.1}, file)),
    "data parallel": ("a.pt", lambda own, file: torch.save(under("module.", own), file)),
    "compiled": ("a.pt", lambda own, file: torch.save(under("_orig_mod.", own), file)),
    "two of them": ("a.pt", lambda own, file: torch.save(under("module._orig_mod.", own), file)),
    "Lightning": (
        "a.ckpt",
        lambda own, file: torch.save(
            {
                "epoch": 3,
                "state_dict": {**under("model.", own), "criterion.weight": torch.ones(10)},
                "hyper_parameters": {"lr": 0.1},
                "callbacks": {},
            },
            file,
        ),
    ),
    "safetensors": ("a.safetensors", lambda own, file: save_file(own, str(file))),
    "safetensors of Hugging Face": (
        "a.safetensors",
        lambda own, file: save_file(under("model.", own), str(file), metadata={"format": "pt"}),
    ),
    "before torch counted batches": (
        "a.pt",
        lambda own, file: torch.save(
            {n: v for n, v in own.items() if "num_batches" not in n}, file
        ),
    ),
    "an entry of another name": (
        "a.pt",
        lambda own, file: torch.save({"params_ema": own, "epoch": 3}, file),
    ),
    "averaged beside": (
        "a.pt",
        lambda own, file: torch.save({"ema": zeros(own), "state_dict": own}, file),
    ),
    "deep inside": (
        "a.th",
        lambda own, file: torch.save({"nets": {"student": {"params": own}}}, file),
    ),
    "another prefix": (
        "a.PT",
        lambda own, file: torch.save(under("module.student.", own), file),
    ),
    "a number among them": (
        "a.pkl",
        lambda own, file: torch.save({**own, "epoch": 3, "note": None}, file),
    ),
    "options and numbers of numpy": (
        "a.pth",
        lambda own, file: torch.save(
            {
                "model": own,
                "args": argparse.Namespace(lr=0.1),
                "best": np.float64(0.9),
                "losses": np.arange(3.0),
            },
            file,
        ),
    ),
    "sharded": (
        "a.pt",
        lambda own, file: torch.save(under("_fsdp_wrapped_module.", own), file),
    ),
    "blocks that are compiled and computed again": (
        "A.SAFETENSORS",
        lambda own, file: save_file(
            {
                name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module._orig_mod."): value
                for name, value in own.items()
            },
            str(file),
        ),
    ),
}


def under(prefix: str, own: States) -> States:
    return {prefix + name: value for name, value in own.items()}


def zeros(own: States) -> States:
    return {name: torch.zeros_like(value) for name, value in own.items()}


def net(seed: int, **options: Any) -> SmallNet:
    torch.manual_seed(seed)
    return SmallNet(**options)


def is_same(one: nn.Module, other: nn.Module) -> bool:
    there = other.state_dict()
    return all(torch.equal(value, there[name]) for name, value in one.state_dict().items())


def saved(value: Any, folder: Path, name: str = "a.pt") -> Path:
    torch.save(value, folder / name)
    return folder / name


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_read_from_their_usual_wrappings(tmp_path: Path, wrapping: str) -> None:
    name, write = WRAPPINGS[wrapping]
    theirs, mine = net(1), net(2)
    write(theirs.state_dict(), tmp_path / name)
    assert not is_same(theirs, mine)
    given = load_weights(mine, tmp_path / name)
    assert is_same(theirs, mine)
    assert given.replaced == ()
    assert given.left == (("criterion.weight",) if wrapping == "Lightning" else ())
    assert len(list(given.parameters())) == len(list(mine.parameters()))


def test_a_run_directory_gives_its_backbone_or_all_of_it(tmp_path: Path) -> None:
    network = small(seed=1)
    write_tensors(tmp_path / "weights.safetensors", network.state_dict(), {"kind": "weights"})
    mine = net(2)
    given = load_weights(mine, tmp_path)
    assert is_same(network.backbone, mine)
    assert all(name.startswith("heads.") for name in given.left)
    assert given.left
    other = small(seed=3)
    assert load_weights(other, tmp_path / "weights.safetensors").left == ()
    assert is_same(network, other)


def test_half_precision_is_converted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, mine = net(1), net(2)
    file = saved(theirs.bfloat16().state_dict(), tmp_path)
    with caplog.at_level("INFO"):
        load_weights(mine, file)
    assert mine.classifier.weight.dtype == torch.float32
    assert torch.equal(mine.classifier.weight, theirs.classifier.weight.float())
    assert "bfloat16 to float32" in caplog.text


def test_the_entry_is_said_and_those_that_fit_as_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = net(1).state_dict()
    file = saved({"state_dict": own, "averaged": {"ema": zeros(own)}}, tmp_path)
    with caplog.at_level("INFO"):
        load_weights(net(2), file)
    assert "entry state_dict: " in caplog.text
    assert "left away, though it fits as well: the entry averaged.ema" in caplog.text


def test_a_tied_weight_that_safetensors_leaves_out_is_there(tmp_path: Path) -> None:
    def tied(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
        model[2].weight = model[0].weight
        return model

    theirs, mine = tied(1), tied(2)
    save_file({"0.weight": theirs[0].weight.detach()}, str(tmp_path / "a.safetensors"))
    load_weights(mine, tmp_path / "a.safetensors")
    assert is_same(theirs, mine)


def test_a_classifier_of_another_width_stays_as_it_is_and_both_widths_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, mine = net(1), net(2)
    theirs.classifier = nn.Linear(8, 1000)
    before = state(mine.classifier)
    with caplog.at_level("INFO"):
        given = load_weights(mine, saved(theirs.state_dict(), tmp_path), num_classes=10)
    assert given.replaced == ("classifier.weight", "classifier.bias")
    assert list(given.replaced_parameters()) == [mine.classifier.weight, mine.classifier.bias]
    assert all(torch.equal(before[name], value) for name, value in state(mine.classifier).items())
    assert is_same(theirs.blocks, mine.blocks)
    assert "1000 wide there and 10 here" in caplog.text


def without(own: States, name: str) -> States:
    return {key: value for key, value in own.items() if key != name}


def inside_itself() -> dict[str, Any]:
    entries: dict[str, Any] = {}
    entries["model"] = entries
    return entries


WRONG: dict[str, tuple[Callable[[States], Any], type[ImpatientError], str]] = {
    "missing": (
        lambda own: without(own, "blocks.1.0.weight"),
        NetworkError,
        r"1 missing: blocks\.1\.0\.weight\. Expected .* Build the model",
    ),
    "unexpected": (
        lambda own: {**own, "extra.weight": torch.ones(1)},
        NetworkError,
        r"1 unexpected: extra\.weight",
    ),
    "another model": (
        lambda own: {"conv1.weight": torch.ones(1)},
        NetworkError,
        r"no name is the same\. It has conv1\.weight; expected blocks\.0\.0\.weight, .* others",
    ),
    "another shape inside": (
        lambda own: {**own, "blocks.0.0.weight": torch.ones(8, 3, 3, 3)},
        NetworkError,
        r"of another shape: blocks\.0\.0\.weight \[8, 3, 3, 3\], not \[8, 1, 3, 3\]",
    ),
    "whole numbers": (
        lambda own: {**own, "classifier.bias": torch.ones(10, dtype=torch.int64)},
        NetworkError,
        r"of another type: classifier\.bias torch\.int64, not torch\.float32",
    ),
    "not finite": (
        lambda own: {**own, "classifier.bias": torch.full((10,), torch.nan)},
        ModelSpecError,
        r"NaN or infinite weights in 'classifier\.bias'",
    ),
    "two entries": (
        lambda own: {"model": own, "net": zeros(own)},
        StorageError,
        r"several entries \(model, net\).*torch\.save\(checkpoint\['model'\], FILE\)",
    ),
    "two models": (
        lambda own: {**under("model.", own), **under("net.", own)},
        NetworkError,
        r"several models, under 'model\.' and 'net\.'",
    ),
    "two entries of unusual names": (
        lambda own: {"teacher": own, "student": zeros(own)},
        StorageError,
        r"several entries \(teacher, student\).*torch\.save\(checkpoint\['teacher'\], FILE\)",
    ),
    "no weights": (
        lambda own: {"epoch": 3, "history": {"loss": [0.5]}},
        StorageError,
        r"has the entries epoch, history, none of which holds weights",
    ),
    "an entry that holds itself": (
        lambda own: inside_itself(),
        StorageError,
        r"has the entries model, none of which holds weights",
    ),
    "sparse": (
        lambda own: {**own, "classifier.weight": own["classifier.weight"].to_sparse()},
        NetworkError,
        r"of another type: classifier\.weight torch\.sparse_coo, not torch\.float32",
    ),
    "without values": (
        lambda own: {**own, "classifier.weight": own["classifier.weight"].to("meta")},
        NetworkError,
        r"classifier\.weight torch\.float32 without values \(meta\), not torch\.float32",
    ),
    "negative variances": (
        lambda own: {name: -1 - v if "running_var" in name else v for name, v in own.items()},
        ModelSpecError,
        r"negative variances in 'blocks\.0\.1\.running_var'; expected none",
    ),
    "a tensor": (lambda own: torch.ones(3), StorageError, "holds a Tensor; expected named tensors"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path: Path, what: str) -> None:
    change, kind, message = WRONG[what]
    mine = net(2)
    before = state(mine)
    with pytest.raises(kind, match=message):
        load_weights(mine, saved(change(net(1).state_dict()), tmp_path))
    assert all(torch.equal(before[name], value) for name, value in state(mine).items())


def test_an_inner_layer_of_another_width_is_no_classifier(tmp_path: Path) -> None:
    def mlp(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 10))

    with pytest.raises(NetworkError, match=r"0\.weight \[16, 6\], not \[10, 6\]"):
        load_weights(mlp(10), saved(mlp(16).state_dict(), tmp_path), num_classes=10)
    # and one that has not the data's number of classes is none
    theirs, mine = nn.Linear(6, 3), nn.Linear(6, 4)
    with pytest.raises(NetworkError, match=r"of another shape: weight \[3, 6\], not \[4, 6\]"):
        load_weights(mine, saved(theirs.state_dict(), tmp_path), num_classes=5)


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.file, "caught"))


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))]
)
def test_nothing_in_a_file_runs(tmp_path: Path, save: Callable[[Any, Path], Any]) -> None:
    save({"state_dict": net(1).state_dict(), "x": Trap(tmp_path / "caught")}, tmp_path / "a.pt")
    with pytest.raises(
        StorageError, match=r"something in it would have to run.*where you trust it"
    ):
        load_weights(net(2), tmp_path / "a.pt")
    assert not (tmp_path / "caught").exists()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.ckpt"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, share: float) -> None:
    own = net(1).state_dict()
    if name == "a.safetensors":
        save_file(own, str(tmp_path / name))
    else:
        torch.save(own, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(StorageError, match=r"cannot be read"):
        load_weights(net(2), tmp_path / name)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no file .*Check the path"):
        load_weights(net(2), tmp_path / "a.pt")
    with pytest.raises(StorageError, match="has no trained weights"):
        load_weights(net(2), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(StorageError, match=r"ends in '\.json'; expected \.safetensors"):
        load_weights(net(2), tmp_path / "model.safetensors.index.json")


# --- training from them ---------------------------------------------------------------------------

# a single step of 16 samples, whose gradient alone counts
STEP = dataclasses.replace(
    BRIEF, epochs=1, batch_size=88, weight_decay=0.0, warmup=0.0, augment="none", momentum=0.0
)


def trained(folder: Path, recipe: impatient.Recipe, **options: Any) -> tuple[States, States]:
    """Train from given weights; returns the parameters before and after."""
    network = small(dropout=0.0)
    given = load_weights(network.backbone, saved(net(1).state_dict(), folder))
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    train(network, recipe=recipe, given=given, **options)
    return before, {name: value.detach() for name, value in network.named_parameters()}


def test_the_backbone_learns_at_its_own_rate_and_the_heads_at_theirs(tmp_path: Path) -> None:
    before, usual = trained(tmp_path, STEP)
    _, slow = trained(tmp_path, dataclasses.replace(STEP, backbone_lr=STEP.lr / 10))
    for name, start in before.items():
        factor = 0.1 if name.startswith("backbone.") else 1.0
        torch.testing.assert_close(
            slow[name] - start, factor * (usual[name] - start), atol=1e-7, rtol=1e-3
        )
    assert any((usual[name] != before[name]).any() for name in before if "backbone" in name)


def test_the_momentum_is_plain_or_nesterovs(tmp_path: Path) -> None:
    # of its first step Nesterov's goes 1 + momentum times as far
    recipe = dataclasses.replace(STEP, momentum=0.5, lr=0.01)
    before, nesterov = trained(tmp_path, recipe)
    _, plain = trained(tmp_path, dataclasses.replace(recipe, nesterov=False))
    for name, start in before.items():
        torch.testing.assert_close(
            nesterov[name] - start, 1.5 * (plain[name] - start), atol=1e-7, rtol=1e-3
        )


def test_the_first_step_of_adamw_is_as_long_as_its_rate(tmp_path: Path) -> None:
    recipe = dataclasses.replace(STEP, optimizer="adamw", lr=0.001, backbone_lr=0.0001)
    before, after = trained(tmp_path, recipe)
    for name, rate in (("backbone.classifier.weight", 0.0001), ("heads.0.1.weight", 0.001)):
        steps = (after[name] - before[name]).abs()
        assert steps.median().item() == pytest.approx(rate, rel=0.01), (name, list(before))
    # its decay does not go through the gradient: a tenth of the rate, of each weight
    _, decayed = trained(tmp_path, dataclasses.replace(recipe, weight_decay=0.1))
    name = "heads.0.1.weight"
    torch.testing.assert_close(
        decayed[name] - after[name], -0.001 * 0.1 * before[name], atol=1e-7, rtol=1e-3
    )


def test_adamw_with_given_weights_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(
        BRIEF, optimizer="adamw", lr=0.002, backbone_lr=0.0005, epochs=3, head_decay="scaled"
    )
    _, whole = trained(tmp_path, recipe)
    checkpoint = tmp_path / "checkpoint"

    def stopped(_training: Any) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        # after the first epoch is saved
        patch.setattr(impatient.training.loop._Training, "_write_metrics", stopped)
        with pytest.raises(PowerCut):
            trained(tmp_path, recipe, checkpoint=checkpoint)
    _, resumed = trained(tmp_path, recipe, checkpoint=checkpoint)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    # from other weights it does not go on
    network = small(dropout=0.0)
    given = load_weights(network.backbone, saved(net(7).state_dict(), tmp_path))
    with pytest.raises(StaleInput, match="another given"):
        train(network, recipe=recipe, given=given, checkpoint=checkpoint)


class PowerCut(Exception):
    pass


def test_a_checkpoint_from_before_these_options_goes_on(tmp_path: Path) -> None:
    train(small(), checkpoint=tmp_path / "new")
    tensors, header = read_tensors(tmp_path / "new")
    for name in ("optimizer", "nesterov", "backbone_lr"):
        del header["recipe"][name]
    del header["given"]
    write_tensors(tmp_path / "old", tensors, header)
    assert len(train(small(), checkpoint=tmp_path / "old").epochs) == BRIEF.epochs
    # but not with options that it did not have
    with pytest.raises(StaleInput, match=r"another recipe: \{'nesterov': True\}, but here"):
        train(
            small(),
            recipe=dataclasses.replace(BRIEF, nesterov=False),
            checkpoint=tmp_path / "old",
        )


def test_in_the_frozen_regime_a_replaced_classifier_learns_and_nothing_else_of_the_backbone(
    tmp_path: Path,
) -> None:
    theirs = net(1)
    theirs.classifier = nn.Linear(8, 1000)
    file = saved(theirs.state_dict(), tmp_path)
    network = small()
    given = load_weights(network.backbone, file)
    before = state(network.backbone)
    recipe = dataclasses.replace(BRIEF, regime="frozen")
    history = train(network, recipe=recipe, given=given)
    moved = {
        name
        for name, value in network.backbone.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert moved == {"classifier.weight", "classifier.bias"}
    assert history.epochs[-1].train_loss[-1] < history.epochs[0].train_loss[-1]
    # without a word about it, it is part of the backbone, which stays
    again = small()
    load_weights(again.backbone, file)
    before = state(again.backbone)
    train(again, recipe=recipe)
    assert all(torch.equal(before[name], value) for name, value in state(again.backbone).items())


def test_given_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    other = net(3)
    given = load_weights(other, saved(net(1).state_dict(), tmp_path))
    with pytest.raises(TrainingError, match=r"none of whose parameters is the network's"):
        train(small(), given=given)
    with pytest.raises(TrainingError, match=r"backbone_lr=0\.01 is for parameters"):
        train(small(), recipe=dataclasses.replace(BRIEF, backbone_lr=0.01))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precisions_that_change_the_weights_are_refused(precision: Any) -> None:
    network = small()
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    with pytest.raises(TrainingError, match=r"expected float32\..*bf16-mixed or 32-true"):
        train(network, fabric=fabric)
    assert network.backbone.classifier.weight.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*float32:UserWarning")
def test_mixed_precision_is_not(tmp_path: Path) -> None:
    network = small()
    train(
        network, few(), dataclasses.replace(BRIEF, epochs=1), fabric=on_cpu(precision="bf16-mixed")
    )
    assert network.backbone.classifier.weight.dtype == torch.float32
