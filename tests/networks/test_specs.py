"""Models by name, from every source, and what a bad name is told."""

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from impatient.errors import ModelSpecError
from impatient.networks import PreActResNet, attach_exits, load_model
from impatient.networks import specs as specs_module
from impatient.networks.anytimenet import AnytimeNet, BaseResNet
from impatient.networks.resnet import PreActBottleneck
from impatient.networks.specs import import_torchvision
from impatient.networks.vgg import SmallVGG

TINY_BERT = (
    "num_hidden_layers=2,hidden_size=16,num_attention_heads=2,intermediate_size=32,vocab_size=32"
)
TINY_VIT = f"{TINY_BERT.rpartition(',')[0]},image_size=16,patch_size=8"
IMAGE = torch.ones(1, 3, 32, 32)


def outputs(model: nn.Module, x: Any = IMAGE) -> Any:
    with torch.no_grad():
        output = model.eval()(x)
    return getattr(output, "logits", output)


# --- this library's own ---------------------------------------------------------------------------


def test_own_network_takes_options() -> None:
    model = load_model("impatient:resnet:n=1,c=4,num_classes=7")
    assert isinstance(model, PreActResNet)
    assert len(model.blocks) == 3
    assert outputs(model).shape == (1, 7)


def test_what_the_caller_knows_is_passed_on_unless_the_spec_says_otherwise() -> None:
    assert outputs(load_model("impatient:resnet:n=1,c=4", num_classes=6)).shape == (1, 6)
    assert outputs(load_model("impatient:resnet:n=1,c=4,num_classes=7", num_classes=6)).shape == (
        1,
        7,
    )
    assert load_model("impatient:resnet:n=1,c=4", in_channels=1).stem.in_channels == 1


def test_own_networks_of_the_papers_have_names() -> None:
    resnet = load_model(
        "impatient:resnet:n=[1,2],c=4,block=bottleneck,shortcut=projection,stem=imagenet,depth=2"
    )
    assert isinstance(resnet, PreActResNet)
    assert [type(block) for block in resnet.blocks] == [PreActBottleneck] * 2
    assert len(load_model("impatient:resnet_imagenet:layers=26,c=4", num_classes=6).blocks) == 8
    assert outputs(load_model("impatient:resnet_imagenet:layers=14,c=4", num_classes=6)).shape == (
        1,
        6,
    )
    vgg = load_model("impatient:vgg:width=4,blocks=[1,2]", num_classes=6, in_channels=1)
    assert isinstance(vgg, SmallVGG)
    assert outputs(vgg, torch.ones(1, 1, 28, 28)).shape == (1, 6)
    assert len(vgg.blocks) == 3


def test_unknown_own_network_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ModelSpecError,
        match=r"no network 'lenet' in impatient; expected one of anytimenet, .*, resnet, .*vgg\.",
    ):
        load_model("impatient:lenet")


@pytest.mark.parametrize(
    "schedule", ["1-1/2-1/2-2", "[(1,1),(2,1),(2,2)]", "((1, 1), (2, 1), (2, 2))"]
)
def test_schedules_of_growing_networks_are_text_or_lists_in_lists(schedule: str) -> None:
    network = load_model(
        f"impatient:anytimenet:schedule={schedule},width=4", num_classes=6, in_channels=1
    )
    assert isinstance(network, AnytimeNet)
    assert network.exit_names == ("1-1", "2-1", "2-2")
    assert outputs(network.backbone, torch.ones(1, 1, 8, 8)).shape == (1, 6)
    assert isinstance(load_model("impatient:base_resnet:blocks=[2,1],width=4"), BaseResNet)
    with pytest.raises(ModelSpecError, match="cannot read the schedule 'soon'"):
        load_model("impatient:anytimenet:schedule=soon")


def test_option_the_network_does_not_take_is_refused_by_name() -> None:
    with pytest.raises(
        ModelSpecError,
        match=r"cannot build the model 'impatient:resnet:height=3': TypeError.*height",
    ):
        load_model("impatient:resnet:height=3")


def test_errors_of_our_own_networks_stay_as_they_are() -> None:
    with pytest.raises(ModelSpecError, match=r"^PreActResNet\(.*n=\(0, 0, 0\).*at least 1"):
        load_model("impatient:resnet:n=0")


# --- torchvision ----------------------------------------------------------------------------------


def test_torchvision_model_takes_classes_and_options() -> None:
    model = load_model("torchvision:mobilenet_v3_small:dropout=0.5", num_classes=4)
    assert outputs(model).shape == (1, 4)
    assert model.classifier[2].p == 0.5
    assert outputs(load_model("torchvision:squeezenet1_1:num_classes=9", num_classes=4)).shape == (
        1,
        9,
    )


@pytest.mark.filterwarnings("ignore:Scipy.*:UserWarning")
def test_torchvision_models_with_auxiliary_outputs_come_without_them() -> None:
    model = load_model("torchvision:googlenet", num_classes=4)
    assert isinstance(model.train()(torch.randn(2, 3, 64, 64)), torch.Tensor)


def test_misspelt_torchvision_model_is_refused_with_near_names() -> None:
    with pytest.raises(
        ModelSpecError, match=r"torchvision has no model 'resnet5'. Similar names: .*resnet50"
    ):
        load_model("torchvision:resnet5")
    with pytest.raises(ModelSpecError, match=r"has no model 'qqqqqq'. It has \d+ others"):
        load_model("torchvision:qqqqqq")


def test_importing_torchvision_twice_gives_the_same_one() -> None:
    assert import_torchvision() is import_torchvision()


# --- timm -----------------------------------------------------------------------------------------


def test_timm_model_takes_classes_and_channels() -> None:
    model = load_model("timm:test_resnet", num_classes=4, in_channels=1)
    assert outputs(model, torch.ones(1, 1, 32, 32)).shape == (1, 4)
    assert outputs(load_model("timm:test_resnet:num_classes=9", num_classes=4)).shape == (1, 9)


def test_misspelt_timm_model_is_refused_with_near_names() -> None:
    with pytest.raises(
        ModelSpecError, match=r"timm has no model 'tst_resnet'. Similar names: .*test_resnet"
    ):
        load_model("timm:tst_resnet")


# --- transformers ---------------------------------------------------------------------------------


def test_configuration_class_gives_a_classifier_of_its_kind() -> None:
    text = load_model(f"transformers:BertConfig:{TINY_BERT}", num_classes=4)
    assert type(text).__name__ == "BertForSequenceClassification"
    assert outputs(text, torch.ones(2, 3, dtype=torch.long)).shape == (2, 4)
    image = load_model(f"transformers:ViTConfig:{TINY_VIT}", num_classes=4)
    assert type(image).__name__ == "ViTForImageClassification"
    assert outputs(image, torch.ones(2, 3, 16, 16)).shape == (2, 4)


def test_options_may_be_lists() -> None:
    model = load_model(
        "transformers:ResNetConfig:embedding_size=4,hidden_sizes=[4,8],depths=[1,2],layer_type=basic",
        num_classes=4,
    )
    assert model.config.hidden_sizes == [4, 8]
    assert model.config.depths == [1, 2]
    assert model.config.layer_type == "basic"
    assert outputs(model).shape == (1, 4)


def test_local_configuration_file_gives_random_weights(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    options = dict(entry.split("=") for entry in TINY_BERT.split(","))
    file.write_text(
        json.dumps({"model_type": "bert", **{key: int(value) for key, value in options.items()}})
    )
    model = load_model(f"transformers:{file}", num_classes=4)
    assert model.config.num_hidden_layers == 2
    assert outputs(model, torch.ones(2, 3, dtype=torch.long)).shape == (2, 4)


def test_classes_of_the_spec_win_in_transformers_too() -> None:
    assert (
        load_model(
            f"transformers:BertConfig:{TINY_BERT},num_labels=9", num_classes=4
        ).config.num_labels
        == 9
    )


def test_configuration_that_cannot_be_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ModelSpecError, match=r"cannot build the model .*: ValueError.*hidden size.*multiple"
    ):
        load_model("transformers:BertConfig:hidden_size=17,num_attention_heads=2")


def test_configuration_file_that_is_not_there_is_refused_without_looking_elsewhere() -> None:
    with pytest.raises(ModelSpecError, match=r"no configuration file no_such_folder/config\.json"):
        load_model("transformers:no_such_folder/config.json")


# --- a user's own ---------------------------------------------------------------------------------

MODULE = """
from torch import nn

WIDTH = 8

class Model(nn.Sequential):
    def __init__(self, num_classes=3, width=WIDTH):
        super().__init__(nn.Linear(4, width), nn.Linear(width, num_classes))

def build(depth, num_classes=3):
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)), nn.Linear(4, num_classes))

def without_options():
    return nn.Linear(4, 2)

def failing():
    raise RuntimeError("no licence")

def text():
    return "a model"
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module in the working folder."""
    (tmp_path / "own_models_for_tests.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    monkeypatch.delitem(sys.modules, "own_models_for_tests", raising=False)
    importlib.invalidate_caches()
    return "own_models_for_tests"


def test_module_in_the_working_folder_is_found(own: str) -> None:
    assert len(load_model(f"{own}:build:depth=2")) == 3


def test_class_or_function_may_be_the_factory(own: str) -> None:
    assert load_model(f"{own}:Model:width=5")[0].out_features == 5
    assert load_model(f"{own}:without_options").out_features == 2


def test_factory_is_told_the_classes_only_when_it_asks(own: str) -> None:
    assert load_model(f"{own}:Model", num_classes=6, in_channels=1)[1].out_features == 6
    assert load_model(f"{own}:without_options", num_classes=6).out_features == 2


def test_module_of_a_package_is_found(
    tmp_path: Path, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "own_package_for_tests"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "models.py").write_text(MODULE)
    importlib.invalidate_caches()
    assert load_model("own_package_for_tests.models:without_options").out_features == 2
    for name in ("own_package_for_tests", "own_package_for_tests.models"):
        monkeypatch.delitem(sys.modules, name)


def test_loaded_model_can_be_given_exits(own: str) -> None:
    network = attach_exits(
        load_model(f"{own}:build:depth=3"), after=["0", "1"], example=torch.ones(1, 4)
    )
    assert network.num_exits == 3


@pytest.mark.parametrize(
    ("rest", "complaint"),
    [
        ("Modell", r"has no factory 'Modell'; expected one of its callables: .*Model.*build"),
        ("WIDTH", r"has no factory 'WIDTH'; expected one of its callables"),
        ("failing", r"cannot build the model .*: RuntimeError: no licence"),
        ("text", r"returned a str; expected a torch\.nn\.Module"),
        ("build", r"cannot build the model .*: TypeError: .*depth"),
        ("build:depth=2,height=3", r"cannot build the model .*: TypeError: .*height"),
        ("build:depth=two", r"cannot build the model .*: TypeError"),
    ],
)
def test_factory_that_gives_no_model_is_refused_with_the_reason(
    own: str, rest: str, complaint: str
) -> None:
    with pytest.raises(ModelSpecError, match=complaint) as caught:
        load_model(f"{own}:{rest}")
    assert own in str(caught.value)


def test_module_that_fails_on_import_is_refused_with_the_reason(own: str, tmp_path: Path) -> None:
    (tmp_path / "broken_for_tests.py").write_text("import a_package_nobody_has")
    (tmp_path / "wrong_for_tests.py").write_text("1 / 0")
    importlib.invalidate_caches()
    with pytest.raises(ModelSpecError, match="a_package_nobody_has"):
        load_model("broken_for_tests:build")
    with pytest.raises(ModelSpecError, match="ZeroDivisionError"):
        load_model("wrong_for_tests:build")


# --- specs that cannot be read --------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["", "resnet50", ":resnet50", "torchvision:", "torchvision", "::", "impatient::n=3"]
)
def test_spec_without_source_or_name_is_refused_with_examples(spec: str) -> None:
    message = (
        rf"cannot read the model spec '{re.escape(spec)}'; expected "
        rf"SOURCE:NAME.*impatient:resnet.*mypackage"
    )
    with pytest.raises(ModelSpecError, match=message):
        load_model(spec)


@pytest.mark.parametrize("option", ["n", "n:5", "=5", "2n=5", "n 5", "[1,2]"])
def test_unreadable_option_is_refused_with_an_example(option: str) -> None:
    with pytest.raises(
        ModelSpecError,
        match=rf"cannot read the option '{re.escape(option)}' of .*key=value, such as n=5",
    ):
        load_model(f"impatient:resnet:c=4,{option}")


@pytest.mark.parametrize("options", ["", ",", "n=1,", ",n=1,,c=4"])
def test_empty_options_do_no_harm(options: str) -> None:
    assert isinstance(load_model(f"impatient:resnet:{options}"), PreActResNet)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("0.5", 0.5),
        ("True", True),
        ("None", None),
        ("'a b'", "a b"),
        ("DEFAULT", "DEFAULT"),
        ("a/b-1", "a/b-1"),
        ("[1,2]", [1, 2]),
        ("(1,2)", (1, 2)),
        ("[]", []),
        ("", ""),
    ],
)
def test_option_values_are_literals_or_else_text(text: str, value: Any) -> None:
    assert specs_module._parse(f"a:b:first={text},last=1") == (
        "a",
        "b",
        {"first": value, "last": 1},
    )


def test_unknown_source_is_refused_naming_what_cannot_be_imported() -> None:
    with pytest.raises(
        ModelSpecError,
        match=r"'tourchvision:resnet50'.*No module named 'tourchvision'.*in this folder\?",
    ):
        load_model("tourchvision:resnet50")


@pytest.mark.parametrize("source", ["timm", "transformers", "torchvision"])
def test_missing_library_is_refused_with_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    # what Python does for a module that must not be imported
    monkeypatch.setitem(sys.modules, source, None)
    with pytest.raises(ModelSpecError, match=rf"cannot be imported.*pip install {source}\."):
        load_model(f"{source}:resnet18")


def test_error_is_a_value_error_and_keeps_its_cause(own: str) -> None:
    with pytest.raises(ValueError, match="no licence") as caught:
        load_model(f"{own}:failing")
    assert isinstance(caught.value.__cause__, RuntimeError)
