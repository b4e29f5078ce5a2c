"""The last exit equals the untouched model, bit for bit.

A comparison of zeros proves nothing. So each model is first shown to be informative: its output
varies and depends on the features at every cut, and its parameters get gradients.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impatient.inputs import call_model, first_tensor, output_tensor
from impatient.networks import MultiExitNetwork, attach_exits, load_model
from impatient.networks.specs import import_torchvision

pytestmark = pytest.mark.slow

CLASSES = 7
Batch = Callable[[int], Any]


# --- the models -----------------------------------------------------------------------------------


def images(size: int) -> Batch:
    return lambda batch: torch.randn(batch, 3, size, size)


def tokens(batch: int) -> Tensor:
    return torch.randint(1, 64, (batch, 9))


def masked_tokens(batch: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, 9, dtype=torch.long)
    mask[0, 5:] = 0
    return {"input_ids": tokens(batch), "attention_mask": mask}


def small_transformer(name: str, **more: Any) -> Callable[[], nn.Module]:
    options = {
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        **more,
    }
    return spec(f"transformers:{name}", **options)


def spec(name: str, **options: Any) -> Callable[[], nn.Module]:
    listed = ",".join(f"{key}={value}".replace(" ", "") for key, value in options.items())
    return lambda: load_model(f"{name}:{listed}", num_classes=CLASSES)


def narrow_classifier(name: str, features: int) -> Callable[[], nn.Module]:
    """A torchvision model with 30 million parameters fewer in its classifier."""

    def build() -> nn.Module:
        with torch.device("meta"):
            model = load_model(f"torchvision:{name}")
            model.classifier = nn.Sequential(
                nn.Dropout(), nn.Linear(features, 16), nn.ReLU(inplace=True), nn.Linear(16, CLASSES)
            )
        model = model.to_empty(device="cpu")
        for layer in model.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        return model

    return build


def small_swin() -> nn.Module:
    models = import_torchvision().models
    return models.SwinTransformer(
        [2, 2], 16, [1, 2, 2], [1, 2, 2], [4, 4], stochastic_depth_prob=0.3, num_classes=CLASSES
    )


def small_vit() -> nn.Module:
    models = import_torchvision().models
    return models.VisionTransformer(32, 8, 4, 2, 32, 64, dropout=0.1, num_classes=CLASSES)


class UntilSmall(nn.Module):
    """A model whose control flow depends on the data.

    One block is called until its input has shrunk, and others only for some inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.2)
        )
        self.seldom = nn.Conv2d(8, 8, 1)
        self.often = nn.Conv2d(8, 8, 1)
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        times = 0
        while times < 2 or (times < 5 and float(x.detach().abs().mean()) > 0.3):
            x = x + self.block(x)
            times += 1
        x = self.seldom(x) if times == 7 else self.often(x)
        return {"times": torch.tensor(times), "logits": self.classifier(x.mean((2, 3)))}


class SharedBlock(nn.Module):
    """One block called four times, and not the last thing that happens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 16)
        self.shared = nn.Linear(16, 16)
        self.tail = nn.Linear(16, 16)
        self.drop = nn.Dropout(0.1)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(4):
            x = x + self.drop(torch.tanh(self.shared(x)))
        return self.classifier(self.tail(x).tanh())


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and where it is cut."""

    build: Callable[[], nn.Module]
    batch: Batch
    after: Any = "auto"
    count: int = 4


CASES = {
    "resnet18": Case(spec("torchvision:resnet18"), images(32)),
    "vgg11": Case(narrow_classifier("vgg11", 512 * 7 * 7), images(32)),
    "vgg11_bn, cut before in-place ReLU": Case(
        narrow_classifier("vgg11_bn", 512 * 7 * 7),
        images(32),
        ["features.1", "features.12", "features.22"],
    ),
    "alexnet": Case(narrow_classifier("alexnet", 256 * 6 * 6), images(64), count=3),
    "densenet121": Case(spec("torchvision:densenet121", memory_efficient=False), images(32)),
    "googlenet": Case(spec("torchvision:googlenet"), images(32)),
    "mobilenet_v2": Case(spec("torchvision:mobilenet_v2"), images(32)),
    "mobilenet_v3_small": Case(spec("torchvision:mobilenet_v3_small"), images(32)),
    "efficientnet_b0": Case(spec("torchvision:efficientnet_b0"), images(32)),
    "regnet_y_400mf": Case(spec("torchvision:regnet_y_400mf"), images(32)),
    "shufflenet_v2": Case(spec("torchvision:shufflenet_v2_x0_5"), images(32)),
    "squeezenet": Case(spec("torchvision:squeezenet1_1"), images(40)),
    "swin": Case(small_swin, images(32)),
    "vit": Case(small_vit, images(32), count=3),
    "convnext": Case(
        spec("transformers:ConvNextConfig", hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 2, 1]),
        images(64),
    ),
    "hf_resnet": Case(
        spec(
            "transformers:ResNetConfig",
            embedding_size=8,
            hidden_sizes=[8, 16, 24],
            depths=[1, 2, 2],
        ),
        images(32),
    ),
    "hf_vit": Case(
        small_transformer("ViTConfig", image_size=32, patch_size=8, hidden_dropout_prob=0.1),
        images(32),
    ),
    "hf_swin": Case(
        spec(
            "transformers:SwinConfig",
            image_size=32,
            patch_size=2,
            embed_dim=8,
            depths=[1, 3],
            num_heads=[1, 2],
        ),
        images(32),
        count=3,
    ),
    "bert": Case(small_transformer("BertConfig", vocab_size=64), tokens),
    "bert, masked": Case(small_transformer("BertConfig", vocab_size=64), masked_tokens, count=3),
    "distilbert": Case(
        spec(
            "transformers:DistilBertConfig",
            n_layers=4,
            dim=32,
            n_heads=2,
            hidden_dim=64,
            vocab_size=64,
        ),
        masked_tokens,
    ),
    "albert": Case(small_transformer("AlbertConfig", embedding_size=16, vocab_size=64), tokens),
    "albert, named calls": Case(
        small_transformer("AlbertConfig", embedding_size=16, vocab_size=64),
        tokens,
        ["albert.encoder.albert_layer_groups.0@0", "albert.encoder.albert_layer_groups.0@2"],
    ),
    "control flow": Case(UntilSmall, images(8), ["stem", "block@1", "often"]),
    "shared block": Case(
        SharedBlock, lambda batch: torch.randn(batch, 12), ["shared@0", "shared@2", "tail"]
    ),
}


@dataclass
class Pair:
    """A model nobody touched, the same model with exits, and inputs."""

    untouched: nn.Module
    network: MultiExitNetwork
    batch: Batch

    def begin(self, *, training: bool) -> None:
        """Put both in one mode and one state, statistics included."""
        self.untouched.load_state_dict(self.network.backbone.state_dict(), strict=True)
        self.untouched.train(training)
        self.network.train(training)


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> Pair:
    case = CASES[request.param]
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", category=DeprecationWarning, module="transformers|torchvision"
        )
        model = case.build()
    make_informative(model, case.batch)
    untouched = copy.deepcopy(model)
    network = attach_exits(model, example=case.batch(2), after=case.after, count=case.count)
    assert network.num_exits == (case.count if case.after == "auto" else len(case.after) + 1)
    return Pair(untouched, network, case.batch)


def make_informative(model: nn.Module, batch: Batch) -> None:
    """Give a fresh model weights and statistics with which its output varies."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.abs().sum():
            nn.init.normal_(layer.weight, std=0.1)
    for parameter in model.parameters():
        if not parameter.abs().sum():
            # biases, position embeddings, class tokens
            nn.init.normal_(parameter, std=0.02)
    norms = [
        layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
    for momentum in (1.0, 0.1):
        for norm in norms:
            norm.momentum = momentum
        with torch.no_grad():
            call_model(model.train(), batch(16))


def untouched_output(pair: Pair, x: Any) -> Tensor:
    torch.manual_seed(3)
    return output_tensor(call_model(pair.untouched, x))


def staged_outputs(pair: Pair, x: Any) -> list[Tensor]:
    torch.manual_seed(3)
    return [exit.output() for exit in pair.network.exits(x)]


def all_outputs(pair: Pair, x: Any) -> list[Tensor]:
    torch.manual_seed(3)
    return list(pair.network(x))


WAYS = pytest.mark.parametrize("outputs", [staged_outputs, all_outputs])


def difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def assert_informative(output: Tensor) -> None:
    assert output.isfinite().all()
    assert output.std(dim=0).mean() > 1e-4, "it answers the same to everything"
    assert output.std(dim=1).mean() > 1e-3, "it answers the same for every class"


# --- the comparisons are informative --------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_output_varies_over_inputs_and_classes(pair: Pair, training: bool) -> None:
    pair.begin(training=training)
    with torch.no_grad():
        assert_informative(untouched_output(pair, pair.batch(3)))


def test_output_hangs_on_the_features_at_every_cut(pair: Pair) -> None:
    pair.begin(training=False)
    x = pair.batch(2)
    with torch.no_grad():
        before = staged_outputs(pair, x)
        for cut in pair.network.cuts:
            hook = pair.network.backbone.get_submodule(cut.module).register_forward_hook(noisy)
            after = staged_outputs(pair, x)
            hook.remove()
            assert difference(after[-1], before[-1]) > 1e-4 * float(before[-1].abs().max()), cut


def noisy(module: nn.Module, args: Any, output: Any) -> None:
    features = first_tensor(output)
    features += features.abs().mean() * torch.randn_like(features)


# --- and the promise holds ------------------------------------------------------------------------


@WAYS
def test_last_output_is_exact_in_eval_mode(
    pair: Pair, outputs: Callable[[Pair, Any], list[Tensor]]
) -> None:
    pair.begin(training=False)
    for batch in (2, 1, 5):
        x = pair.batch(batch)
        with torch.no_grad():
            got = outputs(pair, x)
            truth = untouched_output(pair, x)
        assert [tuple(output.shape) for output in got] == [
            (batch, CLASSES)
        ] * pair.network.num_exits
        assert difference(got[-1], truth) == 0.0
    assert_informative(truth)


def test_staged_early_outputs_equal_those_of_forward(pair: Pair) -> None:
    pair.begin(training=False)
    x = pair.batch(3)
    with torch.no_grad():
        for staged, all_at_once in zip(staged_outputs(pair, x), all_outputs(pair, x), strict=True):
            assert difference(staged, all_at_once) == 0.0
            assert_informative(staged)


@WAYS
def test_training_step_is_exact_in_output_gradients_and_buffers(
    pair: Pair, outputs: Callable[[Pair, Any], list[Tensor]]
) -> None:
    pair.begin(training=True)
    x = pair.batch(4)
    backbone = pair.network.backbone
    target = torch.randn(4, CLASSES)
    pair.untouched.zero_grad()
    pair.network.zero_grad()
    truth = untouched_output(pair, x)
    got = outputs(pair, x)[-1]
    assert difference(got, truth) == 0.0
    (truth - target).square().sum().backward()
    (got - target).square().sum().backward()
    assert_gradients_are_equal(backbone, pair.untouched)
    assert all(parameter.grad is None for parameter in pair.network.heads.parameters())
    for (name, ours), (_, theirs) in zip(
        backbone.named_buffers(), pair.untouched.named_buffers(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def assert_gradients_are_equal(ours: nn.Module, untouched: nn.Module) -> None:
    moved = 0
    truths = dict(untouched.named_parameters())
    for name, parameter in ours.named_parameters():
        truth = truths[name].grad
        assert (parameter.grad is None) == (truth is None), name
        if truth is not None:
            assert difference(parameter.grad, truth) == 0.0, name
            moved += bool(truth.abs().max() > 0)
    assert moved > 0.8 * len(truths), "most gradients are zero, and their comparison says nothing"


def test_backbones_state_keeps_its_keys_and_goes_back_into_the_model(pair: Pair) -> None:
    state = pair.network.backbone.state_dict()
    assert list(state) == list(pair.untouched.state_dict())
    pair.untouched.load_state_dict(state, strict=True)


@pytest.mark.parametrize("training", [False, True])
def test_run_stopped_halfway_leaves_the_next_one_exact(pair: Pair, training: bool) -> None:
    pair.begin(training=training)
    x = pair.batch(3)
    for stop in range(pair.network.num_exits - 1):
        with pair.network.exits(pair.batch(2)) as walk:
            for _ in range(stop + 1):
                next(walk).output()
    # in training, the stopped runs moved statistics
    pair.begin(training=training)
    with torch.no_grad():
        truth = untouched_output(pair, x)
        assert difference(staged_outputs(pair, x)[-1], truth) == 0.0
    assert_informative(truth)


def test_albert_is_cut_between_calls_of_its_one_block() -> None:
    case = CASES["albert"]
    network = attach_exits(case.build(), example=case.batch(2), count=4)
    names = {cut.module for cut in network.cuts}
    assert len(names) == 1
    assert len({cut.call for cut in network.cuts}) == 3


def test_features_of_swin_are_read_channels_last() -> None:
    network = attach_exits(small_swin(), example=images(32)(1), count=4)
    assert set(network.layouts) == {"NHWC"}
