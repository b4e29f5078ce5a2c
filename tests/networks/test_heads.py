"""Heads, layouts, and the counts of MACs and parameters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from impatient.errors import (
    ClassCountMismatch,
    ExitNotReached,
    HeadError,
    ImpatientError,
    NetworkError,
)
from impatient.networks import FeatureShape, MultiExitNetwork, attach_exits
from impatient.networks.heads import (
    HEADS,
    ChannelsFirst,
    MSDNetHead,
    Pool,
    build_head,
    check_head,
    guess_layout,
    mlp,
)
from impatient.networks.stages import Cut

CLASSES = 5
SHAPES = {
    "NCHW": (3, 6, 9, 7),
    "NHWC": (3, 9, 7, 6),
    "NTD": (3, 4, 6),
    "NCT": (3, 6, 4),
    "ND": (3, 6),
    "NCTHW": (3, 6, 2, 5, 4),
    "NTHWC": (3, 2, 5, 4, 6),
}
READ_MAPS_ONLY = ("adaptive", "rescale", "msdnet")
# makes no outputs of its own: the features are the answer
OF_LOOPS = "identity"
MAKING = [name for name in HEADS if name != OF_LOOPS]
every_layout = pytest.mark.parametrize("layout", SHAPES)


def features_of(layout: str) -> Tensor:
    return torch.randn(SHAPES[layout], requires_grad=True)


def heads_for(layout: str) -> list[str]:
    return [name for name in MAKING if name not in READ_MAPS_ONLY or len(layout) == 4]


def shape_of(layout: str) -> FeatureShape:
    return FeatureShape(SHAPES[layout], layout)


# --- layouts --------------------------------------------------------------------------------------


def block(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


# square: the last layer decides
# a permutation followed the convolution
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
        (
            (2, 8, 8, 8),
            block(nn.Linear(3, 8), nn.Conv2d(3, 8, 1)),
            "NCHW",
        ),
        ((2, 8, 8, 8), block(nn.Conv2d(3, 8, 1), nn.Linear(3, 8)), "NHWC"),
        ((2, 8, 8, 8), nn.Identity(), "NCHW"),
        (
            (2, 4, 4, 8),
            block(nn.Conv2d(3, 8, 1), nn.GELU()),
            "NHWC",
        ),
        # no dimension fits the width
        ((2, 6, 4, 7), block(nn.Conv2d(3, 99, 1)), "NCHW"),
        # sound
        ((2, 8, 30), block(nn.Conv1d(3, 8, 3), nn.GELU()), "NCT"),
        # its norm permutes
        ((2, 8, 30), block(nn.Conv1d(3, 8, 3), nn.LayerNorm(8)), "NCT"),
        ((2, 5, 8), block(nn.Conv1d(3, 8, 1), nn.LayerNorm(8)), "NTD"),
        # square: the last layer decides
        ((2, 8, 8), nn.Conv1d(3, 8, 3), "NCT"),
        ((2, 8, 8), nn.Linear(3, 8), "NTD"),
        ((2, 5, 8), nn.Identity(), "NTD"),
        ((2, 6, 7), nn.Conv1d(3, 99, 1), "NTD"),
        ((2, 8, 4, 7, 7), block(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8)), "NCTHW"),
        ((2, 4, 7, 7, 8), block(nn.LayerNorm(8), nn.Linear(8, 8)), "NTHWC"),
        ((2, 8, 4, 7, 7), nn.ReLU(), "NCTHW"),
    ],
)
def test_layout_is_told_by_shape_and_last_layer(
    shape: tuple[int, ...], module: nn.Module, layout: str
) -> None:
    assert guess_layout(torch.zeros(shape), module) == layout


@pytest.mark.parametrize("shape", [(2,), (2, 3, 4, 5, 6, 7)])
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
    """Like Swin, but of ambiguous layout, with as many channels as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x).permute(0, 2, 3, 1))
        return self.classifier(x.mean((1, 2)))


def test_layout_of_square_features_can_be_said() -> None:
    x = torch.randn(2, 3, 8, 8)
    guessed = attach_exits(ChannelsLast(), after=["stem", "block"], example=x)
    assert guessed.layouts == ("NCHW", "NHWC")
    assert attach_exits(ChannelsLast(), after=["block"], example=x, layout="NCHW").layouts == (
        "NCHW",
    )
    features = guessed.backbone.block(guessed.backbone.stem(x).permute(0, 2, 3, 1))
    torch.testing.assert_close(guessed(x)[1], guessed.heads[1][1](features.mean((1, 2))))


def test_layout_is_said_of_features_with_as_many_dimensions_only() -> None:
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 8), nn.Linear(8, CLASSES)
    )
    assert attach_exits(
        backbone, after=["0", "2"], example=torch.ones(1, 3, 8, 8), layout="NCHW"
    ).layouts == ("NCHW", "ND")


# --- heads ----------------------------------------------------------------------------------------


@every_layout
def test_pool_means_over_space_or_tokens(layout: str) -> None:
    features = features_of(layout)
    pooled = Pool(layout)(features)
    assert pooled.shape == (3, 6)
    channels_last = features.movedim(1, -1) if layout.startswith("NC") else features
    torch.testing.assert_close(pooled, channels_last.reshape(3, -1, 6).mean(1))
    assert layout in repr(Pool(layout))


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for layout in SHAPES for name in heads_for(layout)]
)
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
    wider = {
        "NCHW": (1, 6, 20, 5),
        "NHWC": (1, 20, 5, 6),
        "NTD": (1, 11, 6),
        "NCT": (1, 6, 11),
        "ND": (1, 6),
        "NCTHW": (1, 6, 3, 7, 8),
        "NTHWC": (1, 3, 7, 8, 6),
    }[layout]
    for name in sorted(set(heads_for(layout)) - {"flatten"}):
        assert build_head(name, shape_of(layout), CLASSES).eval()(torch.randn(wider)).shape == (
            1,
            CLASSES,
        )


def test_linear_head_is_a_mean_and_a_matrix() -> None:
    head = build_head("linear", shape_of("NTD"), CLASSES)
    features = features_of("NTD")
    torch.testing.assert_close(
        head(features), functional.linear(features.mean(1), head[1].weight, head[1].bias)
    )


def test_relu_linear_head_rectifies_before_it_pools() -> None:
    head = build_head("relu_linear", shape_of("NCHW"), CLASSES)
    features = features_of("NCHW")
    torch.testing.assert_close(head(features), head[-1](features.relu().mean((2, 3))))
    assert not torch.allclose(head(features), head[-1](features.mean((2, 3)).relu()))


def test_msdnet_head_reads_channels_last_as_it_reads_channels_first() -> None:
    first = MSDNetHead(shape_of("NCHW"), CLASSES).eval()
    last = MSDNetHead(shape_of("NHWC"), CLASSES).eval()
    last.load_state_dict(first.state_dict())
    features = torch.randn(SHAPES["NCHW"])
    torch.testing.assert_close(first(features), last(features.permute(0, 2, 3, 1)))
    assert [layer.stride for layer in first.convolutions if isinstance(layer, nn.Conv2d)] == [
        (2, 2),
        (2, 2),
    ]
    assert first.classifier.in_features == 128


@pytest.mark.parametrize("layout", ["NTD", "NCT", "ND", "NCTHW"])
@pytest.mark.parametrize("name", READ_MAPS_ONLY)
def test_heads_that_read_maps_refuse_others_and_name_other_heads(name: str, layout: str) -> None:
    with pytest.raises(
        HeadError,
        match=rf"the {name} head got features .*{layout}; expected maps.*"
        r"heads='linear' or heads='mlp'",
    ):
        build_head(name, shape_of(layout), CLASSES)


@every_layout
def test_channels_come_first_whatever_the_layout(layout: str) -> None:
    features = features_of(layout)
    first = ChannelsFirst(layout)(features)
    assert first.dim() == 4
    assert first.shape[:2] == (3, 6)
    torch.testing.assert_close(first.mean((2, 3)), Pool(layout)(features))
    channels_last = features.movedim(1, -1) if layout.startswith("NC") else features
    assert torch.equal(first.flatten(2).transpose(1, 2), channels_last.reshape(3, -1, 6))
    assert layout in repr(ChannelsFirst(layout))


@pytest.mark.parametrize("name", ["adaptive", "conv1x1", "rescale", "msdnet"])
def test_heads_read_channels_last_as_they_read_channels_first(name: str) -> None:
    first, last = (
        build_head(name, shape_of(layout), CLASSES).eval() for layout in ("NCHW", "NHWC")
    )
    last.load_state_dict(dict(zip(last.state_dict(), first.state_dict().values(), strict=True)))
    features = torch.randn(SHAPES["NCHW"])
    torch.testing.assert_close(first(features), last(features.permute(0, 2, 3, 1)))


def test_dropout_of_the_mlp_is_in_training_only_and_between_its_layers() -> None:
    head = build_head("mlp_dropout", shape_of("ND"), CLASSES)
    plain = build_head("mlp", shape_of("ND"), CLASSES)
    plain.load_state_dict(dict(zip(plain.state_dict(), head.state_dict().values(), strict=True)))
    features = features_of("ND")
    assert not torch.allclose(head(features), plain(features))
    torch.testing.assert_close(head.eval()(features), plain(features))
    assert [type(layer) for layer in head] == [Pool, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert mlp(shape_of("ND"), CLASSES, dropout=0.3)[3].p == 0.3
    # no place for a dropout of nothing
    assert [type(layer) for layer in plain] == [
        Pool,
        nn.Linear,
        nn.ReLU,
        nn.Linear,
    ]


@every_layout
def test_flatten_head_weighs_every_feature_by_itself(layout: str) -> None:
    head = build_head("flatten", shape_of(layout), CLASSES)
    features = features_of(layout)
    torch.testing.assert_close(
        head(features), functional.linear(features.reshape(3, -1), head[1].weight, head[1].bias)
    )
    output = head(features)[0, 0]
    (gradient,) = torch.autograd.grad(output, features)
    assert gradient[0].unique().numel() == features[0].numel()


def test_flatten_head_refuses_another_resolution() -> None:
    head = build_head("flatten", shape_of("NCHW"), CLASSES)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        head(torch.randn(3, 6, 9, 8))


def test_adaptive_head_means_over_quarters() -> None:
    head = build_head("adaptive", FeatureShape((3, 6, 8, 4), "NCHW"), CLASSES)
    features = torch.randn(3, 6, 8, 4)
    upper = features[:, :, :4]
    lower = features[:, :, 4:]
    quarters = [
        quarter.mean((2, 3))
        for half in (upper, lower)
        for quarter in (half[..., :2], half[..., 2:])
    ]
    torch.testing.assert_close(head(features), head[-1](torch.stack(quarters, 2).flatten(1)))


@pytest.mark.parametrize(
    ("shape", "layout", "inputs"),
    [
        ((1, 6, 1, 1), "NCHW", 6),
        ((1, 6, 1, 5), "NCHW", 12),
        ((1, 6, 5, 1), "NCHW", 12),
        ((1, 6, 2, 3), "NCHW", 24),
        ((1, 1, 5, 6), "NHWC", 12),
        ((1, 7, 7, 6), "NHWC", 24),
    ],
)
def test_adaptive_head_never_makes_more_places_than_there_are(
    shape: tuple[int, ...], layout: Any, inputs: int
) -> None:
    head = build_head("adaptive", FeatureShape(shape, layout), CLASSES)
    assert head[-1].in_features == inputs
    assert head(torch.randn(shape)).shape == (1, CLASSES)


@every_layout
def test_conv1x1_head_is_a_linear_layer_at_every_place(layout: str) -> None:
    head = build_head("conv1x1", shape_of(layout), CLASSES).eval()
    features = features_of(layout)
    convolution, linear = (
        next(layer for layer in head if isinstance(layer, kind)) for kind in (nn.Conv2d, nn.Linear)
    )
    places = features.movedim(1, -1) if layout.startswith("NC") else features
    # untrained: divides by sqrt(1 + eps)
    norm = next(layer for layer in head if isinstance(layer, nn.BatchNorm2d))
    wide = (
        functional.linear(places.reshape(3, -1, 6), convolution.weight[:, :, 0, 0])
        / (1 + norm.eps) ** 0.5
    )
    torch.testing.assert_close(head(features), linear(wide.relu().mean(1)))
    assert convolution.out_channels == 12


def test_rescale_head_reads_a_map_brought_to_seven_by_seven() -> None:
    rescale, conv1x1 = (
        build_head(name, shape_of("NCHW"), CLASSES).eval() for name in ("rescale", "conv1x1")
    )
    conv1x1.load_state_dict(
        dict(zip(conv1x1.state_dict(), rescale.state_dict().values(), strict=True))
    )
    features = torch.randn(SHAPES["NCHW"])
    small = functional.interpolate(features, (7, 7), mode="bilinear")
    torch.testing.assert_close(rescale(features), conv1x1(small))
    assert not torch.allclose(rescale(features), conv1x1(features))


def test_msdnet_head_on_a_token_model_is_refused_on_attaching(toy: nn.Module) -> None:
    with pytest.raises(HeadError, match=r"the msdnet head got features .* expected maps"):
        attach_exits(toy, after=["blocks.1"], example=torch.ones(1, 8), heads="msdnet")


def test_unknown_head_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        HeadError, match=rf"unknown head 'conv'; expected one of {', '.join(HEADS)}, or a callable"
    ):
        build_head("conv", shape_of("ND"), CLASSES)


# --- heads of one's own ---------------------------------------------------------------------------


def attach(backbone: nn.Module, heads: Any, **more: Any) -> MultiExitNetwork:
    return attach_exits(
        backbone, after=["blocks.0", "blocks.2"], heads=heads, example=torch.ones(2, 8), **more
    )


def test_head_of_ones_own_is_told_shape_layout_and_classes(
    toy: nn.Module, toy_input: Tensor
) -> None:
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
    with pytest.raises(
        HeadError, match=rf"{len(heads)} heads for 2 early exits \(\['blocks\.0', 'blocks\.2'\]\)"
    ):
        attach(toy, heads)


def test_network_built_by_hand_needs_a_head_and_a_layout_per_cut(toy: nn.Module) -> None:
    with pytest.raises(HeadError, match="1 heads and 2 layouts for 2 cuts"):
        MultiExitNetwork(
            toy, [nn.Linear(8, 3)], [Cut("blocks.0"), Cut("blocks.1")], ["ND", "ND"], 3
        )


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (
            lambda features, classes: nn.Linear(9, classes),
            r"head at blocks\.0 fails on features of shape \(2, 8\)",
        ),
        (
            lambda features, classes: nn.Linear(8, classes + 1),
            r"head at blocks\.0 gives \(2, 4\); expected shape \(2, 3\)",
        ),
        (lambda features, classes: nn.Flatten(0), r"gives \(16,\); expected"),
        (lambda features, classes: nn.LSTM(8, classes), r"gives tuple; expected"),
        (
            lambda features, classes: lambda x: x[:, :classes],
            r"returned a function; expected a torch\.nn\.Module",
        ),
    ],
    ids=["wrong input", "wrong width", "wrong shape", "no tensor", "no module"],
)
def test_head_that_does_not_fit_is_refused(
    toy: nn.Module, build: Callable[..., Any], complaint: str
) -> None:
    with pytest.raises(HeadError, match=complaint):
        attach(toy, build)


def test_checking_a_head_leaves_the_modes_of_its_parts_and_its_statistics() -> None:
    frozen = nn.BatchNorm1d(6)
    head = nn.Sequential(nn.Linear(6, 6), frozen, nn.BatchNorm1d(6), nn.Linear(6, CLASSES))
    frozen.eval()
    check_head(head, torch.randn(3, 6), (1, CLASSES), "somewhere")
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
            self.texts = Texts()
            self.classifier = nn.Linear(8, 3)

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
    torch.testing.assert_close(
        pooled[1], network.backbone.block(stem.permute(0, 2, 3, 1)).mean((1, 2))
    )
    torch.testing.assert_close(pooled[2], network.backbone(x))


# --- classes --------------------------------------------------------------------------------------


def test_number_of_classes_is_the_backbones(toy: nn.Module) -> None:
    assert (
        attach(toy, "linear").num_classes == attach(toy, "linear", num_classes=3).num_classes == 3
    )


def test_another_number_of_classes_is_refused_with_what_to_do(toy: nn.Module) -> None:
    with pytest.raises(
        ClassCountMismatch,
        match=r"gives 3 classes; expected num_classes=10.*replace its last layer",
    ):
        attach(toy, "linear", num_classes=10)


@pytest.mark.parametrize("last", [nn.Flatten(0), nn.Unflatten(1, (1, 3))])
def test_output_that_is_not_two_dimensional_is_refused(last: nn.Module) -> None:
    with pytest.raises(ClassCountMismatch, match=r"shape \(.*expected \[B, num_classes\]"):
        attach_exits(nn.Sequential(nn.Linear(8, 3), last), after=[], example=torch.ones(2, 8))


def test_backbone_that_is_no_module_is_refused() -> None:
    with pytest.raises(
        ImpatientError, match=r"backbone is a function; expected a torch\.nn\.Module"
    ):
        attach_exits(lambda x: x, example=torch.ones(1, 8))


# --- what it is made of ---------------------------------------------------------------------------


class Counted(nn.Module):
    """A model that is small enough to count by hand.

    It has two convolutions, one of them in two groups, and a linear layer, for 8x8 images.
    """

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
# 6: of the layer never called
STAGE_PARAMETERS = [
    8 * 3 * 9 + 8 + 6,
    16 + 16 * 4 * 9,
    16 * CLASSES + CLASSES,
]


@pytest.fixture
def counted() -> MultiExitNetwork:
    return attach_exits(
        Counted(),
        after=["first", "second"],
        heads=["linear", "mlp"],
        example=torch.ones(1, 3, 8, 8),
    )


@pytest.mark.parametrize("batch", [1, 4])
def test_multiplications_are_those_counted_by_hand(counted: MultiExitNetwork, batch: int) -> None:
    facts = counted.stage_facts(torch.ones(batch, 3, 8, 8))
    assert [fact.exit for fact in facts] == ["first", "second", "output"]
    assert [fact.features for fact in facts] == [
        (batch, 8, 8, 8),
        (batch, 16, 4, 4),
        (batch, CLASSES),
    ]
    assert [fact.stage_macs for fact in facts] == STAGE_MACS
    assert [fact.head_macs for fact in facts] == HEAD_MACS


def test_parameters_belong_to_the_stage_that_first_uses_them_and_add_up(
    counted: MultiExitNetwork,
) -> None:
    facts = counted.stage_facts(torch.ones(1, 3, 8, 8))
    assert [fact.stage_parameters for fact in facts] == STAGE_PARAMETERS
    total = sum(fact.stage_parameters + fact.head_parameters for fact in facts)
    assert total == sum(parameter.numel() for parameter in counted.parameters())


def test_parameters_of_a_shared_block_count_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(8, 8)
            self.classifier = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.block(self.block(self.block(x))))

    network = attach_exits(Shared(), after=["block@0", "block@2"], example=torch.ones(1, 8))
    facts = network.stage_facts(torch.ones(1, 8))
    assert [fact.stage_parameters for fact in facts] == [72, 0, 27]
    assert [fact.stage_macs for fact in facts] == [64, 128, 24]


class Features(nn.Module):
    """A layer whose output has 6 channels in a given layout.

    It has maps of 80 places, 4 tokens, or a vector.
    """

    def __init__(self, layout: str) -> None:
        super().__init__()
        convolutions = {"NCT": nn.Conv1d, "NCHW": nn.Conv2d, "NCTHW": nn.Conv3d}
        self.layer = convolutions[layout](6, 6, 1) if layout in convolutions else nn.Linear(6, 6)
        self.classifier = nn.Linear(6, CLASSES)
        self.channels_first = layout in convolutions

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return self.classifier(
            (x.movedim(1, -1) if self.channels_first else x).reshape(len(x), -1, 6).mean(1)
        )


MLP_MACS = 6 * 128 + 128 * CLASSES
MSDNET_MACS = 9 * 6 * 128 * (4 * 5) + 9 * 128 * 128 * (2 * 3) + 128 * CLASSES
# on maps of 6 channels and 80 places, on 4 tokens of 6, on 6 numbers
HEAD_MACS_BY_HAND = {
    "linear": (6 * CLASSES, 6 * CLASSES, 6 * CLASSES),
    "relu_linear": (6 * CLASSES, 6 * CLASSES, 6 * CLASSES),
    "mlp": (MLP_MACS, MLP_MACS, MLP_MACS),
    "mlp_dropout": (MLP_MACS, MLP_MACS, MLP_MACS),
    "flatten": (6 * 80 * CLASSES, 6 * 4 * CLASSES, 6 * CLASSES),
    "adaptive": (6 * 4 * CLASSES, None, None),
    "conv1x1": (6 * 12 * 80 + 12 * CLASSES, 6 * 12 * 4 + 12 * CLASSES, 6 * 12 + 12 * CLASSES),
    "rescale": (6 * 12 * 49 + 12 * CLASSES, None, None),
    "msdnet": (MSDNET_MACS, None, None),
}
FEATURES = {
    "NCHW": (2, 6, 8, 10),
    "NHWC": (2, 8, 10, 6),
    "NTD": (2, 4, 6),
    "NCT": (2, 6, 4),
    "ND": (2, 6),
    "NCTHW": (2, 6, 2, 8, 5),
    "NTHWC": (2, 2, 8, 5, 6),
}


def test_every_head_has_its_cost_counted_by_hand() -> None:
    assert set(HEAD_MACS_BY_HAND) == set(MAKING)


@every_layout
def test_the_head_of_loops_gives_the_features_as_they_are(layout: str) -> None:
    features = features_of(layout)
    assert HEADS[OF_LOOPS](shape_of(layout), CLASSES)(features) is features


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for layout in SHAPES for name in heads_for(layout)]
)
def test_cost_of_every_head_is_that_counted_by_hand(name: str, layout: str) -> None:
    x = torch.ones(FEATURES[layout])
    network = attach_exits(Features(layout), after=["layer"], heads=name, example=x)
    facts = network.stage_facts(x)
    maps, tokens, vectors = HEAD_MACS_BY_HAND[name]
    assert facts[0].head_macs == {"NTD": tokens, "NCT": tokens, "ND": vectors}.get(layout, maps)
    assert facts[1].head_macs == 0


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.attention(x, x, x, need_weights=self.training)
        return self.classifier(x.mean(1))


def test_multiplications_of_attention_are_counted() -> None:
    tokens = 6
    width = 16
    network = attach_exits(Attending(), after=["attention"], example=torch.ones(1, tokens, width))
    facts = network.stage_facts(torch.ones(2, tokens, width))
    projections = 4 * tokens * width * width
    products = 2 * tokens * tokens * width
    assert [fact.stage_macs for fact in facts] == [projections + products, width * CLASSES]


def test_description_has_the_numbers_the_totals_and_the_mechanism(
    counted: MultiExitNetwork,
) -> None:
    text = counted.describe(torch.ones(2, 3, 8, 8))
    lines = text.splitlines()
    assert [line.split()[:2] for line in lines[2:5]] == [
        ["0", "first"],
        ["1", "second"],
        ["2", "output"],
    ]
    for number in (
        *STAGE_MACS,
        *HEAD_MACS,
        *STAGE_PARAMETERS,
        sum(STAGE_MACS),
        sum(HEAD_MACS),
        sum(STAGE_PARAMETERS),
    ):
        assert f"{number:,}" in text
    assert "8x8x8" in lines[2]
    assert "Pool + Linear" in lines[2]
    assert "Pool + Linear + ReLU + Linear" in lines[3]
    assert "(the backbone's own)" in lines[4]
    assert "to the end of Counted" in lines[-2]
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
            self.sometimes = nn.Linear(8, 8)
            self.always = nn.Linear(8, 8)
            self.classifier = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.always(self.sometimes(x) if x[0, 0] > 0 else x))

    network = attach_exits(Skipping(), after=["sometimes", "always"], example=torch.ones(1, 8))
    with pytest.raises(ExitNotReached, match="2 of 3 exits"):
        network.describe(-torch.ones(1, 8))


def test_a_network_that_has_exits_already_is_refused() -> None:
    backbone = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    network = attach_exits(backbone, after=["0"], example=torch.ones(1, 8))
    with pytest.raises(NetworkError, match=r"has exits already; .*attach_exits\(network\.backbone"):
        attach_exits(network, after=["backbone.0"], example=torch.ones(1, 8))
