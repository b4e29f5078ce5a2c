"""The command line on weights that people bring: train --init, --backbone-lr and --optimizer."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_model

from command_line import TINY, Call
from impatient.files import read_json, read_tensors
from impatient.networks.specs import import_torchvision
from impatient.verbs.run_directory import RunDirectory
from pretrained import pictures, timm_folder

ONE = [*TINY[:4], "--epochs", "1", "--batch-size", "64", "--quiet"]
FROZEN = [*ONE, "--no-exit-free", "--regime", "frozen"]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pictures of eight by eight in four classes."""
    file = tmp_path_factory.mktemp("data") / "four.npz"
    numbers = np.random.default_rng(0)
    y = np.tile(np.arange(4), 50)
    x = (numbers.random((200, 8, 8)) * 100 + 40 * y[:, None, None]).astype(np.uint8)
    np.savez(file, x_train=x, y_train=y, x_test=x[:40], y_test=y[:40])
    return f"npz:{file}"


def test_heads_are_trained_on_the_backbone_of_another_run(
    call: Call, finished: Path, tmp_path: Path
) -> None:
    code, text = call("train", tmp_path, *FROZEN, "--init", finished)
    assert code == 0, text
    assert "begin with 'backbone.'" in text
    theirs, mine = (
        read_tensors(folder / "weights.safetensors")[0] for folder in (finished, tmp_path)
    )
    backbone = [name for name in mine if name.startswith("backbone.")]
    assert backbone
    assert all(torch.equal(theirs[name], mine[name]) for name in backbone)
    assert read_json(tmp_path / "training.json")["init"] == str(finished)
    # it goes on, and with nothing else
    assert call("train", tmp_path, *FROZEN, "--init", finished)[0] == 0
    code, text = call("train", tmp_path, *FROZEN)
    assert code == 1
    assert f"was begun with --init {finished}, not (none)" in text


def test_a_file_for_other_classes_gives_everything_but_the_classifier(
    call: Call, finished: Path, tmp_path: Path, four: str
) -> None:
    backbone = RunDirectory(finished).network()[0].backbone
    torch.save({"state_dict": backbone.state_dict()}, tmp_path / "ten.pt")
    options = ["--data", four, "--init", tmp_path / "ten.pt"]
    code, text = call("train", tmp_path / "run", *FROZEN, *options)
    assert code == 0, text
    assert "is 10 wide there and 4 here" in text
    mine = RunDirectory(tmp_path / "run").network()[0].backbone
    assert torch.equal(mine.stem.weight, backbone.stem.weight)
    # the exit-free backbone begins there, too, and all of it may go slowly
    slow = ["--backbone-lr", "1e-12", "--weight-decay", "0", "--optimizer", "adamw", "--lr", "1e-3"]
    code, text = call("train", tmp_path / "joint", *ONE, *options, *slow)
    assert code == 0, text
    for network in (
        RunDirectory(tmp_path / "joint").network()[0],
        RunDirectory(tmp_path / "joint").exit_free.network()[0],
    ):
        torch.testing.assert_close(network.backbone.stem.weight, backbone.stem.weight)
        assert network.backbone.classifier.out_features == 4


@pytest.mark.slow
def test_a_network_with_exits_of_its_own_takes_weights_for_all_of_them(
    call: Call, tmp_path: Path, four: str
) -> None:
    model = ["--model", "impatient:anytimenet:schedule=1-1/2-2,width=4"]
    recipe = ["--epochs", "1", "--batch-size", "64", "--quiet"]
    code, text = call("train", tmp_path / "ten", *model, *recipe, "--no-exit-free")
    assert code == 0, text
    code, text = call(
        "train", tmp_path / "four", *model, *recipe, "--data", four, "--init", tmp_path / "ten"
    )
    assert code == 0, text
    assert "is 10 wide there and 4 here" in text


def test_heads_and_a_replaced_classifier_are_trained_on_a_librarys_weights(
    call: Call, tmp_path: Path, four: str
) -> None:
    theirs = timm_folder(tmp_path / "model").state_dict()
    model = ["--model", f"timm:{tmp_path}/model:pretrained=true", "--exits", "2"]
    # it goes through twice: training begins, and goes on from its checkpoint
    for _ in range(2):
        code, text = call("train", tmp_path / "run", *FROZEN, *model, "--data", four)
        assert code == 0, text
    assert "the classifier (fc.weight, fc.bias) is 5 wide there and 4 here" in text
    backbone = RunDirectory(tmp_path / "run").network()[0].backbone.state_dict()
    assert {name for name in theirs if not torch.equal(theirs[name], backbone[name])} == {
        "conv1.0.weight",
        "fc.weight",
        "fc.bias",
    }
    assert backbone["fc.weight"].shape[0] == 4
    # and it may learn more slowly than the rest
    slow = ["--backbone-lr", "1e-12", "--weight-decay", "0", "--no-exit-free"]
    code, text = call("train", tmp_path / "joint", *ONE, *model, "--data", four, *slow)
    assert code == 0, text
    torch.testing.assert_close(
        RunDirectory(tmp_path / "joint")
        .network()[0]
        .backbone.state_dict()["layer1.0.conv1.weight"],
        theirs["layer1.0.conv1.weight"],
    )


def test_a_network_trained_elsewhere_is_as_good_inside_as_outside(
    call: Call, tmp_path: Path
) -> None:
    import_torchvision()
    import timm

    about = {"mean": [0.3, 0.4, 0.5], "std": [0.1, 0.2, 0.3], "input_size": (3, 32, 32)}
    model = timm_folder(tmp_path / "model", classes=2, **about)
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=about))
    files = pictures(tmp_path / "drawn", count=40)
    # outside it is always right: it has said itself which class each picture is of
    with torch.no_grad():
        outputs = model(torch.stack([theirs(Image.open(file)) for file in files]))
    middle = (outputs[:, 1] - outputs[:, 0]).median()
    answers = [int(output[1] - output[0] > middle) for output in outputs]
    model.fc.bias.data += torch.tensor([middle / 2, -middle / 2])
    save_model(model, str(tmp_path / "model" / "model.safetensors"))
    for file, answer in zip(files, answers, strict=True):
        new = tmp_path / "pictures" / file.parts[-3] / f"class{answer}" / f"{answer}{file.name}"
        new.parent.mkdir(parents=True, exist_ok=True)
        file.rename(new)
    accuracies = {}
    for name, options in (("theirs", ""), ("other", ":normalise=fit")):
        run = tmp_path / name
        code, text = call(
            *("train", run, "--data", f"imagefolder:{tmp_path}/pictures{options}", "--quiet"),
            *("--model", f"timm:{tmp_path}/model:pretrained=true", "--exits", "2", "--epochs", "1"),
            *("--regime", "frozen", "--no-exit-free"),
        )
        assert code == 0, text
        assert call("record", run, "--splits", "test", "--quiet")[0] == 0
        recording = RunDirectory(run).recording("test")
        accuracies[name] = recording.quality[-1].float().mean().item()
    assert accuracies["theirs"] == 1.0
    assert accuracies["other"] < 0.9
    assert "were made for the mean 0.3, 0.4, 0.5 and the deviation 0.1, 0.2, 0.3" in text


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--regime", "frozen"], "impatient:resnet:n=1,c=8 is drawn at random; expected a trained"),
        (["--backbone-lr", "0.01"], "backbone_lr=0.01 is for parameters that came from given"),
        (["--init", "none.pt"], "there is no file none.pt"),
        (["--precision", "bf16-true"], "turns the weights into bfloat16; expected float32"),
        (["--optimizer", "adamw", "--backbone-lr", "-1"], "backbone_lr=-1.0"),
    ],
)
def test_a_refusal_is_one_message_and_leaves_the_old_run(
    call: Call, finished: Path, tmp_path: Path, options: list[str], complaint: str
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    code, text = call("train", run, *ONE, "--restart", *options)
    assert code == 1
    assert text.count("error (") == 1
    assert complaint in text
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_run_does_not_begin_with_itself(call: Call, run_dir: Path) -> None:
    code, text = call("train", run_dir, *ONE, "--restart", "--init", run_dir)
    assert code == 1
    assert "whose weights this training writes" in text
