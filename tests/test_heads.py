"""What reads the features at a cut, what a network is made of in numbers, and the papers' own backbone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from impatient.errors import ClassCountMismatch, ExitNotReached, HeadError, ImpatientError, ModelSpecError
from impatient.networks import FeatureShape, MultiExitNetwork, PreActResNet, attach_exits
from impatient.networks.describe import stage_facts
from impatient.networks.heads import HEADS, MSDNetHead, Pool, build_head, check_head, guess_layout
from impatient.networks.resnet import PreActBlock
from impatient.networks.stages import Cut

CLASSES = 5
SHAPES = {"NCHW": (3, 6, 9, 7), "NHWC": (3, 9, 7, 6), "NTD": (3, 4, 6), "ND": (3, 6)}
every_layout = pytest.mark.parametrize("layout", SHAPES)


def features_of(layout: str) -> Tensor:
    return torch.randn(SHAPES[layout], requires_grad=True)


def heads_for(layout: str) -> list[str]:
    return [name for name in HEADS if name != "msdnet" or len(layout) == 4]


def shape_of(layout: str) -> FeatureShape:
    return FeatureShape(SHAPES[layout], layout)


# --- layouts --------------------------------------------------------------------------------------------------------


def block(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("shape", "module", "layout"),
    [
        ((2, 8), nn.Linear(3, 8), "ND"),
        ((2, 5, 8), nn.Linear(3, 8), "NTD"),
        ((2, 8, 4, 4), nn.Conv2d(3, 8, 1), "NCHW"),
        ((2, 8, 5, 3), block(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()), "NCHW"),
        ((2, 4, 4, 8), block(nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)), "NHWC"),
        ((2, 7, 5, 8), block(nn.Conv2d(3, 8, 1), nn.LayerNorm(8)), "NHWC"),
        ((2, 8, 4, 4), block(nn.LayerNorm(4), nn.Conv2d(3, 8, 1)), "NCHW"),
        ((2, 8, 4, 4), nn.ReLU(), "NCHW"),
        ((2, 8, 8, 8), block(nn.Linear(3, 8), nn.Conv2d(3, 8, 1)), "NCHW"),  # square: the last layer decides
        ((2, 8, 8, 8), block(nn.Conv2d(3, 8, 1), nn.Linear(3, 8)), "NHWC"),
        ((2, 8, 8, 8), nn.Identity(), "NCHW"),
        ((2, 4, 4, 8), block(nn.Conv2d(3, 8, 1), nn.GELU()), "NHWC"),  # a permutation followed the convolution
        ((2, 6, 4, 7), block(nn.Conv2d(3, 99, 1)), "NCHW"),  # no dimension fits the width
    ],
)
def test_layout_is_told_by_shape_and_last_layer(shape: tuple[int, ...], module: nn.Module, layout: str) -> None:
    assert guess_layout(torch.zeros(shape), module) == layout


@pytest.mark.parametrize("shape", [(2,), (2, 3, 4, 5, 6)])
def test_other_numbers_of_dimensions_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(HeadError, match=rf"{len(shape)} dimensions.*callable"):
        guess_layout(torch.zeros(shape), nn.ReLU())


def test_features_that_are_no_floating_point_are_refused() -> None:
    with pytest.raises(HeadError, match="int64"):
        guess_layout(torch.zeros(2, 3, dtype=torch.long), nn.ReLU())


@every_layout
def test_channels_are_found_in_every_layout(layout: str) -> None:
    assert shape_of(layout).channels == 6
    assert repr(shape_of(layout)).endswith(f" {layout}")


def test_layout_must_fit_the_shape() -> None:
    with pytest.raises(HeadError, match=r"NCHW needs 4 dimensions.*\(2, 3\)"):
        FeatureShape((2, 3), "NCHW")


class ChannelsLast(nn.Module):
    """Like Swin, but with as many channels as rows, so that nothing tells its layout for sure."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block, self.classifier = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x).permute(0, 2, 3, 1))
        return self.classifier(x.mean((1, 2)))


def test_layout_of_square_features_can_be_said() -> None:
    x = torch.randn(2, 3, 8, 8)
    guessed = attach_exits(ChannelsLast(), after=["stem", "block"], example=x)
    assert guessed.layouts == ("NCHW", "NHWC")
    assert attach_exits(ChannelsLast(), after=["block"], example=x, layout="NCHW").layouts == ("NCHW",)
    features = guessed.backbone.block(guessed.backbone.stem(x).permute(0, 2, 3, 1))
    torch.testing.assert_close(guessed(x)[1], guessed.heads[1][1](features.mean((1, 2))))


def test_layout_is_said_of_four_dimensions_only() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 8), nn.Linear(8, CLASSES))
    assert attach_exits(backbone, after=["0", "2"], example=torch.ones(1, 3, 8, 8), layout="NCHW").layouts == ("NCHW", "ND")


# --- heads ----------------------------------------------------------------------------------------------------------


@every_layout
def test_pool_means_over_space_or_tokens(layout: str) -> None:
    features = features_of(layout)
    pooled = Pool(layout)(features)
    assert pooled.shape == (3, 6)
    channels_last = features.movedim(1, -1) if layout == "NCHW" else features
    torch.testing.assert_close(pooled, channels_last.reshape(3, -1, 6).mean(1))
    assert layout in repr(Pool(layout))


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for layout in SHAPES for name in heads_for(layout)])
def test_every_head_gives_outputs_and_gradients(name: str, layout: str) -> None:
    features = features_of(layout)
    head = build_head(name, shape_of(layout), CLASSES)
    output = head(features)
    assert output.shape == (3, CLASSES)
    assert output.std() > 0
    output.square().sum().backward()
    for tensor in (features, *head.parameters()):
        assert tensor.grad.abs().sum() > 0


@every_layout
def test_heads_do_not_depend_on_the_number_of_samples_or_the_resolution(layout: str) -> None:
    wider = {"NCHW": (1, 6, 20, 5), "NHWC": (1, 20, 5, 6), "NTD": (1, 11, 6), "ND": (1, 6)}[layout]
    for name in heads_for(layout):
        assert build_head(name, shape_of(layout), CLASSES).eval()(torch.randn(wider)).shape == (1, CLASSES)


def test_linear_head_is_a_mean_and_a_matrix() -> None:
    head, features = build_head("linear", shape_of("NTD"), CLASSES), features_of("NTD")
    torch.testing.assert_close(head(features), functional.linear(features.mean(1), head[1].weight, head[1].bias))


def test_relu_linear_head_rectifies_before_it_pools() -> None:
    head, features = build_head("relu_linear", shape_of("NCHW"), CLASSES), features_of("NCHW")
    torch.testing.assert_close(head(features), head[-1](features.relu().mean((2, 3))))
    assert not torch.allclose(head(features), head[-1](features.mean((2, 3)).relu()))


def test_msdnet_head_reads_channels_last_as_it_reads_channels_first() -> None:
    first, last = MSDNetHead(shape_of("NCHW"), CLASSES).eval(), MSDNetHead(shape_of("NHWC"), CLASSES).eval()
    last.load_state_dict(first.state_dict())
    features = torch.randn(SHAPES["NCHW"])
    torch.testing.assert_close(first(features), last(features.permute(0, 2, 3, 1)))
    assert [layer.stride for layer in first.convolutions if isinstance(layer, nn.Conv2d)] == [(2, 2), (2, 2)]
    assert first.classifier.in_features == 128


@pytest.mark.parametrize("layout", ["NTD", "ND"])
def test_msdnet_head_on_tokens_is_refused_with_other_heads(layout: str) -> None:
    with pytest.raises(HeadError, match=rf"convolutions.*{layout}.*heads='linear' or heads='mlp'"):
        build_head("msdnet", shape_of(layout), CLASSES)


def test_msdnet_head_on_a_token_model_is_refused_on_attaching(toy: nn.Module) -> None:
    with pytest.raises(HeadError, match="convolutions"):
        attach_exits(toy, after=["blocks.1"], example=torch.ones(1, 8), heads="msdnet")


def test_unknown_head_is_refused_with_the_known_ones() -> None:
    with pytest.raises(HeadError, match=r"unknown head 'conv'; needed: one of linear, relu_linear, mlp, msdnet, or a callable"):
        build_head("conv", shape_of("ND"), CLASSES)


# --- heads of one's own ---------------------------------------------------------------------------------------------


def attach(backbone: nn.Module, heads: Any, **more: Any) -> MultiExitNetwork:
    return attach_exits(backbone, after=["blocks.0", "blocks.2"], heads=heads, example=torch.ones(2, 8), **more)


def test_head_of_ones_own_is_told_shape_layout_and_classes(toy: nn.Module, toy_input: Tensor) -> None:
    told: list[tuple[str, int, int]] = []

    def own(features: FeatureShape, num_classes: int) -> nn.Module:
        told.append((features.layout, features.channels, num_classes))
        return nn.Linear(features.channels, num_classes, bias=False)

    network = attach(toy, own)
    assert told == [("ND", 8, 3)] * 2
    assert [type(head) for head in network.heads] == [nn.Linear] * 2
    assert [output.shape for output in network(toy_input)] == [(5, 3)] * 3


def test_each_exit_may_have_its_own_head(toy: nn.Module) -> None:
    network = attach(toy, ["mlp", lambda features, classes: nn.Linear(features.channels, classes)])
    assert [len(list(network.heads[0])), type(network.heads[1])] == [4, nn.Linear]


@pytest.mark.parametrize("heads", [["linear"], ["linear"] * 3, []])
def test_wrong_number_of_heads_is_refused(toy: nn.Module, heads: list[str]) -> None:
    with pytest.raises(HeadError, match=rf"{len(heads)} heads for 2 early exits \(\['blocks\.0', 'blocks\.2'\]\)"):
        attach(toy, heads)


def test_network_built_by_hand_needs_a_head_and_a_layout_per_cut(toy: nn.Module) -> None:
    with pytest.raises(HeadError, match="1 heads for 2 cuts"):
        MultiExitNetwork(toy, [nn.Linear(8, 3)], [Cut("blocks.0"), Cut("blocks.1")], ["ND", "ND"], 3)


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda features, classes: nn.Linear(9, classes), r"head at blocks\.0 fails on features of shape \(2, 8\)"),
        (lambda features, classes: nn.Linear(8, classes + 1), r"head at blocks\.0 gives \(2, 4\); needed: shape \(2, 3\)"),
        (lambda features, classes: nn.Flatten(0), r"gives \(16,\); needed"),
        (lambda features, classes: nn.LSTM(8, classes), r"gives tuple; needed"),
        (lambda features, classes: lambda x: x[:, :classes], r"factory returned a function; needed: a torch\.nn\.Module"),
    ],
    ids=["wrong input", "wrong width", "wrong shape", "no tensor", "no module"],
)
def test_head_that_does_not_fit_is_refused(toy: nn.Module, build: Callable[..., Any], complaint: str) -> None:
    with pytest.raises(HeadError, match=complaint):
        attach(toy, build)


def test_checking_a_head_leaves_the_modes_of_its_parts_and_its_statistics() -> None:
    frozen = nn.BatchNorm1d(6)
    head = nn.Sequential(nn.Linear(6, 6), frozen, nn.BatchNorm1d(6), nn.Linear(6, CLASSES))
    frozen.eval()
    check_head(head, torch.randn(3, 6), CLASSES, "somewhere")
    assert [layer.training for layer in head] == [True, False, True, True]
    assert head[2].num_batches_tracked == 0


def test_heads_take_the_dtype_of_their_features() -> None:
    backbone = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)).double()
    network = attach_exits(backbone, after=["0"], example=torch.ones(1, 8, dtype=torch.double))
    assert {parameter.dtype for parameter in network.heads.parameters()} == {torch.double}
    assert network(torch.ones(2, 8, dtype=torch.double))[0].dtype == torch.double


def test_cut_without_a_tensor_is_refused() -> None:
    class Texts(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "no tensor"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.texts, self.classifier = Texts(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.texts(x)
            return self.classifier(x)

    with pytest.raises(HeadError, match="'texts' gives no tensor"):
        attach_exits(Model(), after=["texts"], example=torch.ones(1, 8))


def test_pooled_features_are_what_gates_look_at() -> None:
    x = torch.randn(2, 3, 8, 8)
    network = attach_exits(ChannelsLast(), after=["stem", "block"], example=x)
    pooled = [network.pooled(exit) for exit in network.exits(x)]
    stem = network.backbone.stem(x)
    torch.testing.assert_close(pooled[0], stem.mean((2, 3)))
    torch.testing.assert_close(pooled[1], network.backbone.block(stem.permute(0, 2, 3, 1)).mean((1, 2)))
    torch.testing.assert_close(pooled[2], network.backbone(x))


# --- classes --------------------------------------------------------------------------------------------------------


def test_number_of_classes_is_the_backbones(toy: nn.Module) -> None:
    assert attach(toy, "linear").num_classes == attach(toy, "linear", num_classes=3).num_classes == 3


def test_another_number_of_classes_is_refused_with_what_to_do(toy: nn.Module) -> None:
    with pytest.raises(ClassCountMismatch, match=r"gives 3 classes, but num_classes=10.*replace its last layer"):
        attach(toy, "linear", num_classes=10)


@pytest.mark.parametrize("last", [nn.Flatten(0), nn.Unflatten(1, (1, 3))])
def test_output_that_is_not_two_dimensional_is_refused(last: nn.Module) -> None:
    with pytest.raises(ClassCountMismatch, match=r"shape \(.*needed: \[B, num_classes\]"):
        attach_exits(nn.Sequential(nn.Linear(8, 3), last), after=[], example=torch.ones(2, 8))


def test_backbone_that_is_no_module_is_refused() -> None:
    with pytest.raises(ImpatientError, match=r"backbone is a function; needed: a torch\.nn\.Module"):
        attach_exits(lambda x: x, example=torch.ones(1, 8))


# --- what it is made of ---------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """Small enough to count by hand: 8x8 images, two convolutions (one of them in two groups), a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2, bias=False)
        self.fc = nn.Linear(16, CLASSES)
        self.never = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x)).relu())
        return self.fc(x.mean((2, 3)))


STAGE_MACS = [8 * 3 * 9 * 64, 16 * 4 * 9 * 16, 16 * CLASSES]
HEAD_MACS = [8 * CLASSES, 16 * 128 + 128 * CLASSES, 0]
STAGE_PARAMETERS = [8 * 3 * 9 + 8 + 6, 16 + 16 * 4 * 9, 16 * CLASSES + CLASSES]  # 6: of the layer never called


@pytest.fixture
def counted() -> MultiExitNetwork:
    return attach_exits(Counted(), after=["first", "second"], heads=["linear", "mlp"], example=torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize("batch", [1, 4])
def test_multiplications_are_those_counted_by_hand(counted: MultiExitNetwork, batch: int) -> None:
    facts = stage_facts(counted, torch.ones(batch, 3, 8, 8))
    assert [fact.exit for fact in facts] == ["first", "second", "output"]
    assert [fact.features for fact in facts] == [(batch, 8, 8, 8), (batch, 16, 4, 4), (batch, CLASSES)]
    assert [fact.stage_macs for fact in facts] == STAGE_MACS
    assert [fact.head_macs for fact in facts] == HEAD_MACS


def test_parameters_belong_to_the_stage_that_first_uses_them_and_add_up(counted: MultiExitNetwork) -> None:
    facts = stage_facts(counted, torch.ones(1, 3, 8, 8))
    assert [fact.stage_parameters for fact in facts] == STAGE_PARAMETERS
    total = sum(fact.stage_parameters + fact.head_parameters for fact in facts)
    assert total == sum(parameter.numel() for parameter in counted.parameters())


def test_parameters_of_a_shared_block_count_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.classifier = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.block(self.block(self.block(x))))

    network = attach_exits(Shared(), after=["block@0", "block@2"], example=torch.ones(1, 8))
    facts = stage_facts(network, torch.ones(1, 8))
    assert [fact.stage_parameters for fact in facts] == [72, 0, 27]
    assert [fact.stage_macs for fact in facts] == [64, 128, 24]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.classifier = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.attention(x, x, x, need_weights=self.training)
        return self.classifier(x.mean(1))


def test_multiplications_of_attention_are_counted() -> None:
    tokens, width = 6, 16
    network = attach_exits(Attending(), after=["attention"], example=torch.ones(1, tokens, width))
    facts = stage_facts(network, torch.ones(2, tokens, width))
    projections, products = 4 * tokens * width * width, 2 * tokens * tokens * width
    assert [fact.stage_macs for fact in facts] == [projections + products, width * CLASSES]


def test_description_has_the_numbers_the_totals_and_the_mechanism(counted: MultiExitNetwork) -> None:
    text = counted.describe(torch.ones(2, 3, 8, 8))
    lines = text.splitlines()
    assert [line.split()[:2] for line in lines[2:5]] == [["0", "first"], ["1", "second"], ["2", "output"]]
    for number in (*STAGE_MACS, *HEAD_MACS, *STAGE_PARAMETERS, sum(STAGE_MACS), sum(HEAD_MACS), sum(STAGE_PARAMETERS)):
        assert f"{number:,}" in text
    assert "8x8x8" in lines[2]
    assert "Pool + Linear" in lines[2]
    assert "Pool + Linear + ReLU + Linear" in lines[3]
    assert "(the backbone's own)" in lines[4]
    assert "backbone Counted" in lines[-2]
    assert "greenlet" in lines[-1]
    assert "after 2 modules" in lines[-1]


def test_description_leaves_network_and_settings_as_they_were(counted: MultiExitNetwork) -> None:
    counted.train()
    counted.backbone.norm.eval()
    modes = [module.training for module in counted.modules()]
    state = {name: value.clone() for name, value in counted.state_dict().items()}
    hooks = sum(len(module._forward_pre_hooks) for module in counted.modules())
    counted.describe(torch.randn(2, 3, 8, 8))
    assert [module.training for module in counted.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in counted.state_dict().items())
    assert sum(len(module._forward_pre_hooks) for module in counted.modules()) == hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_describing_an_input_that_misses_an_exit_is_refused() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sometimes, self.always, self.classifier = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.always(self.sometimes(x) if x[0, 0] > 0 else x))

    network = attach_exits(Skipping(), after=["sometimes", "always"], example=torch.ones(1, 8))
    with pytest.raises(ExitNotReached, match="1 of 2 early exits"):
        network.describe(-torch.ones(1, 8))


# --- the papers' backbone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 9, 11])
def test_block_halves_the_resolution_rounding_up(side: int) -> None:
    x = torch.randn(2, 4, side, side)
    assert PreActBlock(4, 4)(x).shape == x.shape
    assert PreActBlock(4, 8, stride=2)(x).shape == (2, 8, -(-side // 2), -(-side // 2))


def test_blocks_shortcut_is_the_average_padded_with_zeros() -> None:
    down = PreActBlock(2, 5, stride=2)
    nn.init.zeros_(down.conv2.weight)  # only the shortcut is left
    x = torch.randn(1, 2, 4, 4)
    output = down(x)
    torch.testing.assert_close(output[:, 1:3], functional.avg_pool2d(x, 2))
    assert output[:, [0, 3, 4]].abs().sum() == 0


def test_block_without_downsampling_adds_its_input() -> None:
    plain = PreActBlock(3, 3)
    x = torch.randn(2, 3, 4, 4)
    out = plain.conv2(plain.bn2(plain.conv1(plain.bn1(x).relu())).relu())
    torch.testing.assert_close(plain(x), x + plain.bn3(out))


def convolutions(network: nn.Module) -> int:
    return sum(isinstance(layer, nn.Conv2d) for layer in network.modules())


@pytest.mark.parametrize(("n", "c"), [(1, 4), (3, 16), (5, 8)])
def test_network_has_six_n_plus_two_layers_and_the_parameters_counted_by_hand(n: int, c: int) -> None:
    network = PreActResNet(num_classes=10, n=n, c=c)
    assert convolutions(network) + 1 == 6 * n + 2
    expected = 27 * c + 4 * c * 10 + 10
    inputs = c
    for stage in range(3):
        width = c * 2**stage
        for _ in range(n):
            expected += 9 * inputs * width + 9 * width * width + 2 * (inputs + width + width)
            inputs = width
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_twenty_layers_have_the_parameters_of_resnet_20_but_for_its_norms() -> None:
    resnet_20, norm_of_the_stem, third_norms = 269_722, 2 * 16, 2 * (3 * 16 + 16 + 2 * 32 + 32 + 2 * 64)
    parameters = sum(parameter.numel() for parameter in PreActResNet(n=3, c=16).parameters())
    assert parameters == resnet_20 - norm_of_the_stem + third_norms


@pytest.mark.parametrize("side", [8, 13])
def test_network_gives_features_of_doubling_width_and_halving_size(side: int) -> None:
    network = PreActResNet(num_classes=CLASSES, n=2, c=4)
    x = torch.randn(2, 3, side, side)
    facts = stage_facts(attach_exits(network, after=[f"blocks.{i}" for i in range(6)], heads="relu_linear", example=x), x)
    half = -(-side // 2)
    sizes = [(4, side)] * 2 + [(8, half)] * 2 + [(16, -(-half // 2))] * 2
    assert [fact.features for fact in facts[:-1]] == [(2, width, size, size) for width, size in sizes]
    assert facts[-1].features == (2, CLASSES)


def test_network_takes_other_images_and_learns() -> None:
    network = PreActResNet(num_classes=CLASSES, n=1, c=4, in_channels=1)
    output = network(torch.randn(4, 1, 8, 8))
    assert output.std() > 1e-3
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("wrong", [{"n": 0}, {"c": 0}, {"num_classes": 0}, {"in_channels": -1}])
def test_sizes_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ModelSpecError, match="all must be at least 1"):
        PreActResNet(**wrong)
