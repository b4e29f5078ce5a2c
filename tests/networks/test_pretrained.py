"""Trained weights of torchvision, timm and transformers, and classifiers of another width."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from impatient.errors import ModelSpecError
from impatient.networks import load_model, load_with_weights
from pretrained import cached_torchvision, timm_folder, transformers_folder

# by source: the model in its folder, its spec, its classifier, and its classes
Made = tuple[nn.Module, str, set[str], int]


def made(source: str, folder: Path, patch: pytest.MonkeyPatch) -> Made:
    if source == "timm":
        model = timm_folder(folder / "model")
        return model, f"timm:{folder}/model:pretrained=true", {"fc.weight", "fc.bias"}, 5
    if source == "transformers":
        model = transformers_folder(folder / "model")
        names = {"classifier.1.weight", "classifier.1.bias"}
        return model, f"transformers:{folder}/model", names, 5
    model = cached_torchvision(folder, patch, source)
    names = {"fc.weight", "fc.bias"} if "shuffle" in source else {"classifier.1.weight"}
    return model, f"torchvision:{source}:weights=DEFAULT", names | {"classifier.1.bias"}, 1000


SOURCES = ("shufflenet_v2_x0_5", "squeezenet1_1", "timm", "transformers")


@pytest.mark.parametrize("source", SOURCES)
def test_a_classifier_of_another_width_starts_anew_and_the_rest_is_as_trained(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, spec, classifier, classes = made(source, tmp_path, monkeypatch)
    loaded = load_with_weights(spec, num_classes=3)
    assert loaded.trained
    assert set(loaded.fresh) == classifier & theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        mine = loaded.model.state_dict()[name]
        if name in loaded.fresh:
            assert mine.shape == (3, *value.shape[1:])
        else:
            assert torch.equal(mine, value), name
    with torch.no_grad():
        output = loaded.model.eval()(torch.rand(2, 3, 64, 64))
    assert getattr(output, "logits", output).shape == (2, 3)
    assert f"is {classes} wide there and 3 here: it starts anew" in " ".join(loaded.notes)
    given = loaded.given(spec)
    assert given is not None
    assert set(given.replaced) == set(loaded.fresh)
    assert set(given.loaded) == theirs.state_dict().keys() - set(loaded.fresh)


@pytest.mark.parametrize("source", SOURCES)
def test_a_classifier_of_the_same_width_is_kept(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, spec, _, classes = made(source, tmp_path, monkeypatch)
    for wanted in (None, classes):
        loaded = load_with_weights(spec, num_classes=wanted)
        assert loaded.fresh == ()
        assert f"the classifier came with them, {classes} wide" in loaded.notes[0]
        mine = loaded.model.state_dict()
        assert all(torch.equal(mine[name], value) for name, value in theirs.state_dict().items())


def test_the_width_that_a_spec_says_goes_before_the_datas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_torchvision(tmp_path, monkeypatch)
    spec = "torchvision:shufflenet_v2_x0_5:weights=DEFAULT,num_classes=7"
    assert load_model(spec, num_classes=3).fc.out_features == 7


def test_timm_says_what_it_does_to_the_first_layer(tmp_path: Path) -> None:
    timm_folder(tmp_path / "model")
    loaded = load_with_weights(
        f"timm:{tmp_path}/model:pretrained=true", num_classes=5, in_channels=1
    )
    assert "has 1 input channels here and 3 there: timm adapts" in loaded.notes[0]
    # in small letters, false is no text that is true
    untrained = load_with_weights(f"timm:{tmp_path}/model:pretrained=false", num_classes=3)
    assert not untrained.trained
    assert untrained.given("x") is None


def test_what_a_checkpoint_of_transformers_lacks_starts_anew_and_is_said(tmp_path: Path) -> None:
    theirs: Any = transformers_folder(tmp_path / "whole")
    # as of a model that was trained for something else: no classifier at all
    theirs.resnet.save_pretrained(tmp_path / "body")
    loaded = load_with_weights(f"transformers:{tmp_path}/body", num_classes=4)
    assert set(loaded.fresh) == {"classifier.1.weight", "classifier.1.bias"}
    assert "lack classifier.1." in loaded.notes[0]
    mine = loaded.model.state_dict()
    assert torch.equal(
        mine["resnet.embedder.embedder.convolution.weight"],
        theirs.state_dict()["resnet.embedder.embedder.convolution.weight"],
    )


def edited(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_weights_of_another_architecture_are_no_classifier_to_replace(tmp_path: Path) -> None:
    transformers_folder(tmp_path / "wider")
    edited(tmp_path / "wider/config.json", lambda config: config.update(hidden_sizes=[8, 24]))
    with pytest.raises(
        ModelSpecError, match=r"have other shapes than the model: .*\[16\], not \[24\]"
    ):
        load_with_weights(f"transformers:{tmp_path}/wider", num_classes=5)
    transformers_folder(tmp_path / "deeper")
    edited(tmp_path / "deeper/config.json", lambda config: config.update(depths=[1, 9]))
    with pytest.raises(ModelSpecError, match=r"lack \d+ of the \d+ tensors of ResNetForImage"):
        load_with_weights(f"transformers:{tmp_path}/deeper", num_classes=5)
