"""The papers' residual networks: outputs, sizes, and their first blocks alone."""

import pytest
import torch
import torch.nn.functional as functional
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from impatient.errors import ExitNotFound, ModelSpecError
from impatient.networks import PreActResNet, attach_exits
from impatient.networks.placement import every
from impatient.networks.resnet import (
    IMAGENET_RESNETS,
    PreActBlock,
    PreActBottleneck,
    preact_resnet_imagenet,
)
from impatient.networks.stages import Cut

CLASSES = 5


def parameters_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def macs_on_nothing(network: nn.Module, side: int) -> int:
    """Multiply-accumulates of one image, without computing them."""
    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() // 2


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 9, 11])
def test_block_halves_the_resolution_rounding_up(side: int) -> None:
    x = torch.randn(2, 4, side, side)
    assert PreActBlock(4, 4)(x).shape == x.shape
    assert PreActBlock(4, 8, stride=2)(x).shape == (2, 8, -(-side // 2), -(-side // 2))


def test_blocks_shortcut_is_the_average_padded_with_zeros() -> None:
    down = PreActBlock(2, 5, stride=2)
    # only the shortcut is left
    nn.init.zeros_(down.conv2.weight)
    x = torch.randn(1, 2, 4, 4)
    output = down(x)
    torch.testing.assert_close(output[:, 1:3], functional.avg_pool2d(x, 2))
    assert output[:, [0, 3, 4]].abs().sum() == 0


def test_block_without_downsampling_adds_its_input() -> None:
    plain = PreActBlock(3, 3)
    x = torch.randn(2, 3, 4, 4)
    out = plain.conv2(plain.bn2(plain.conv1(plain.bn1(x).relu())).relu())
    torch.testing.assert_close(plain(x), x + plain.bn3(out))


def test_bottleneck_is_three_convolutions_between_norms_with_the_stride_in_the_middle() -> None:
    block = PreActBottleneck(8, 8)
    x = torch.randn(2, 8, 5, 5)
    out = block.conv2(block.bn2(block.conv1(block.bn1(x).relu())).relu())
    torch.testing.assert_close(block(x), x + block.bn4(block.conv3(block.bn3(out).relu())))
    down = PreActBottleneck(8, 16, stride=2)
    assert [down.get_submodule(f"conv{i}").kernel_size[0] for i in (1, 2, 3)] == [1, 3, 1]
    assert [down.get_submodule(f"conv{i}").stride[0] for i in (1, 2, 3)] == [1, 2, 1]
    assert [down.get_submodule(f"conv{i}").out_channels for i in (1, 2, 3)] == [4, 4, 16]


@pytest.mark.parametrize("side", [8, 9])
def test_bottleneck_halves_the_resolution_rounding_up(side: int) -> None:
    for shortcut in ("pooled", "projection"):
        assert PreActBottleneck(4, 8, 2, shortcut)(torch.randn(2, 4, side, side)).shape == (
            2,
            8,
            -(-side // 2),
            -(-side // 2),
        )


def test_bottlenecks_pooled_shortcut_is_padded_even_where_nothing_is_pooled() -> None:
    wider = PreActBottleneck(2, 8)
    # only the shortcut is left
    nn.init.zeros_(wider.conv3.weight)
    x = torch.randn(1, 2, 4, 4)
    output = wider(x)
    torch.testing.assert_close(output[:, 3:5], x)
    assert output[:, [0, 1, 2, 5, 6, 7]].abs().sum() == 0


@pytest.mark.parametrize("build", [PreActBlock, PreActBottleneck])
@pytest.mark.parametrize(("outputs", "stride"), [(8, 2), (16, 1), (16, 2)])
def test_projection_is_a_strided_convolution_with_a_norm_where_the_shape_changes(
    build: type[nn.Module], outputs: int, stride: int
) -> None:
    block = build(8, outputs, stride, "projection")
    last = [layer for name, layer in block.named_children() if name.startswith("conv")][-1]
    nn.init.zeros_(last.weight)
    x = torch.randn(2, 8, 6, 6)
    convolution, norm = block.shortcut
    expected = norm(functional.conv2d(x, convolution.weight, stride=stride))
    torch.testing.assert_close(block(x), expected)
    assert expected.std() > 0
    same = build(8, 8, 1, "projection")
    assert not list(same.shortcut.parameters())
    assert torch.equal(same.shortcut(x), x)


# --- (n, c) ---------------------------------------------------------------------------------------


def test_weights_of_a_seed_and_their_names_are_those_of_the_first_version() -> None:
    torch.manual_seed(0)
    network = PreActResNet(n=1, c=8)
    state = network.state_dict()
    block = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["bn1", "conv1", "bn2", "conv2", "bn3"]
    of_block = [
        f"{name}.{entry}" for name in names for entry in (block if name[0] == "b" else ["weight"])
    ]
    expected = [f"blocks.{index}.{entry}" for index in range(3) for entry in of_block]
    assert list(state) == ["stem.weight", *expected, "classifier.weight", "classifier.bias"]
    assert sum(value.double().abs().sum().item() for value in state.values()) == pytest.approx(
        1749.7559853945381, rel=1e-6
    )
    x = torch.randn(2, 3, 8, 8)
    assert network.eval()(x).sum().item() == pytest.approx(0.08929577469825745, abs=1e-4)


def convolutions(network: nn.Module) -> int:
    return sum(isinstance(layer, nn.Conv2d) for layer in network.modules())


@pytest.mark.parametrize(("n", "c"), [(1, 4), (3, 16), (5, 8)])
def test_network_has_six_n_plus_two_layers_and_the_parameters_counted_by_hand(
    n: int, c: int
) -> None:
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
    resnet_20 = 269_722
    norm_of_the_stem = 2 * 16
    third_norms = 2 * (3 * 16 + 16 + 2 * 32 + 32 + 2 * 64)
    parameters = sum(parameter.numel() for parameter in PreActResNet(n=3, c=16).parameters())
    assert parameters == resnet_20 - norm_of_the_stem + third_norms


@pytest.mark.parametrize("side", [8, 13])
def test_network_gives_features_of_doubling_width_and_halving_size(side: int) -> None:
    network = PreActResNet(num_classes=CLASSES, n=2, c=4)
    x = torch.randn(2, 3, side, side)
    after = [f"blocks.{i}" for i in range(6)]
    facts = attach_exits(network, after=after, heads="relu_linear", example=x).stage_facts(x)
    half = -(-side // 2)
    sizes = [(4, side)] * 2 + [(8, half)] * 2 + [(16, -(-half // 2))] * 2
    assert [fact.features for fact in facts[:-1]] == [
        (2, width, size, size) for width, size in sizes
    ]
    assert facts[-1].features == (2, CLASSES)


def test_network_takes_other_images_and_learns() -> None:
    network = PreActResNet(num_classes=CLASSES, n=1, c=4, in_channels=1)
    output = network(torch.randn(4, 1, 8, 8))
    assert output.std() > 1e-3
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("n", "strides"), [([2], [1, 1]), ([1, 2], [1, 2, 1]), ((1, 1, 3, 1), [1, 2, 2, 1, 1, 2])]
)
def test_stages_may_be_any_number_and_differ_in_length(n: list[int], strides: list[int]) -> None:
    network = PreActResNet(CLASSES, n=n, c=4)
    assert [block.conv1.stride[0] for block in network.blocks] == strides
    assert network.classifier.in_features == 4 * 2 ** (len(n) - 1)
    assert network(torch.randn(2, 3, 16, 16)).shape == (2, CLASSES)


def test_three_equal_stages_are_the_same_network_however_said() -> None:
    networks = []
    for n in (2, [2, 2, 2]):
        torch.manual_seed(1)
        networks.append(PreActResNet(n=n, c=4).state_dict())
    assert all(
        torch.equal(networks[0][name], networks[1][name])
        for name in networks[0].keys() | networks[1].keys()
    )


def test_bottlenecks_are_four_times_as_wide_outside() -> None:
    network = PreActResNet(CLASSES, n=[1, 2], c=4, block="bottleneck")
    assert [
        (block.conv1.in_channels, block.conv2.in_channels, block.conv3.out_channels)
        for block in network.blocks
    ] == [(4, 4, 16), (16, 8, 32), (32, 8, 32)]
    assert network.classifier.in_features == 32
    output = network(torch.randn(4, 3, 8, 8))
    output.square().sum().backward()
    assert output.std() > 1e-3
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"c": 0}, {"num_classes": 0}, {"in_channels": -1}, {"n": []}, {"n": [3, 0]}]
)
def test_sizes_below_one_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ModelSpecError, match="expected whole numbers of at least 1"):
        PreActResNet(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"n": 2.5}, {"c": "16"}, {"n": [1, 2.0]}, {"n": "3"}, {"c": True}, {"c": None}, {"c": [16]}],
)
def test_sizes_that_are_no_whole_numbers_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(
        ModelSpecError, match=r"^PreActResNet\(.*expected whole numbers of at least 1"
    ):
        PreActResNet(**wrong)


@pytest.mark.parametrize(
    ("wrong", "known"),
    [
        ({"block": "wide"}, "basic, bottleneck"),
        ({"stem": "big"}, "cifar, imagenet"),
        ({"shortcut": "none"}, "pooled, projection"),
    ],
)
def test_unknown_variants_are_refused_with_the_known_ones(
    wrong: dict[str, str], known: str
) -> None:
    with pytest.raises(ModelSpecError, match=rf"{next(iter(wrong))}='.*expected one of {known}\."):
        PreActResNet(**wrong)


# --- cut short ------------------------------------------------------------------------------------


def seeded(**options: object) -> PreActResNet:
    torch.manual_seed(3)
    return PreActResNet(CLASSES, c=4, **options)


@pytest.mark.parametrize(
    "options", [{"n": 2}, {"n": [1, 2, 1], "block": "bottleneck"}], ids=["basic", "bottleneck"]
)
def test_network_cut_short_computes_what_the_whole_gives_at_that_exit(
    options: dict[str, object],
) -> None:
    whole = seeded(**options)
    depths = range(1, len(whole.blocks))
    after = [f"blocks.{depth - 1}" for depth in depths]
    network = attach_exits(
        whole, after=after, heads="relu_linear", example=torch.ones(1, 3, 8, 8)
    ).eval()
    x = torch.randn(4, 3, 8, 8)
    facts = network.stage_facts(x)
    for depth, output in zip(depths, network(x), strict=False):
        short = seeded(**options, depth=depth).eval()
        short.classifier.load_state_dict(network.heads[depth - 1][-1].state_dict())
        assert len(short.blocks) == depth
        assert torch.equal(short(x), output)
        costs = sum(fact.stage_macs for fact in facts[:depth]) + facts[depth - 1].head_macs
        (alone,) = attach_exits(short, after=[], example=x).stage_facts(x)
        assert alone.stage_macs == costs


def test_network_cut_short_has_the_weights_of_the_whole_and_only_them() -> None:
    whole = seeded(n=2).state_dict()
    short = seeded(n=2, depth=3).state_dict()
    kept = [name for name in whole if not name.startswith(("blocks.3", "blocks.4", "blocks.5"))]
    assert list(short) == kept
    assert all(
        torch.equal(short[name], whole[name]) for name in kept if not name.startswith("classifier")
    )
    assert short["classifier.weight"].shape == (CLASSES, 8)


def test_network_of_its_full_depth_is_the_whole() -> None:
    whole = seeded(n=2).state_dict()
    full = seeded(n=2, depth=6).state_dict()
    assert list(whole) == list(full)
    assert all(torch.equal(whole[name], full[name]) for name in whole)


@pytest.mark.parametrize("depth", [0, -1, 7, 2.0, "3", True])
def test_depth_that_is_not_there_is_refused_with_the_range(depth: object) -> None:
    with pytest.raises(ModelSpecError, match=r"depth=.*from 1 to 6, or None"):
        PreActResNet(n=2, c=4, depth=depth)


# --- for ImageNet ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", IMAGENET_RESNETS)
def test_imagenet_networks_have_as_many_layers_as_their_names_say(layers: int) -> None:
    with torch.device("meta"):
        network = preact_resnet_imagenet(layers=layers)
    assert convolutions(network) + 1 == layers
    assert network.classifier.in_features == 2048


# torchvision's resnet50 and resnet101 have the same convolutions, but for the place of the norms
@pytest.mark.parametrize(("layers", "parameters"), [(50, 25_557_032), (101, 44_549_160)])
def test_imagenet_networks_have_the_parameters_of_the_known_ones_but_for_their_norms(
    layers: int, parameters: int
) -> None:
    with torch.device("meta"):
        network, pooled = (
            preact_resnet_imagenet(layers=layers, shortcut=kind)
            for kind in ("projection", "pooled")
        )
    first_norms = 2 * sum(block.bn1.num_features for block in network.blocks)
    assert parameters_of(network) == parameters + first_norms
    projections = sum(
        (inputs + 2) * outputs
        for inputs, outputs in ((64, 256), (256, 512), (512, 1024), (1024, 2048))
    )
    assert parameters_of(pooled) == parameters_of(network) - projections


def test_fifty_layers_multiply_as_often_as_the_known_ones() -> None:
    with torch.device("meta"):
        network = preact_resnet_imagenet(layers=50, shortcut="projection")
    assert macs_on_nothing(network, 224) == 4_089_184_256


def test_large_stem_quarters_the_resolution_and_its_norm_follows_its_convolution() -> None:
    network = preact_resnet_imagenet(CLASSES, layers=14, c=4)
    assert [type(layer) for layer in network.stem] == [
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.ReLU,
        nn.MaxPool2d,
    ]
    x = torch.randn(2, 3, 64, 64)
    after = ["stem", "blocks.0", "blocks.1", "blocks.2"]
    facts = attach_exits(network, after=after, example=x).stage_facts(x)
    assert [fact.features[1:] for fact in facts[:-1]] == [
        (4, 16, 16),
        (16, 16, 16),
        (32, 8, 8),
        (64, 4, 4),
    ]


def test_imagenet_networks_can_be_cut_short_and_take_other_images() -> None:
    network = preact_resnet_imagenet(CLASSES, layers=26, c=4, in_channels=1, depth=3)
    assert len(network.blocks) == 3
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, CLASSES)


@pytest.mark.parametrize("layers", [18, "50", None])
def test_imagenet_networks_the_paper_does_not_have_are_refused(layers: object) -> None:
    with pytest.raises(ModelSpecError, match=r"layers=.*14, 26, 50, 101, 152.*PreActResNet\(n=\["):
        preact_resnet_imagenet(layers=layers)


# --- the prediction period ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "period", "predictors"),
    [
        (2, 1, [0, 1, 2, 3, 4, 5]),
        (2, 2, [1, 3, 5]),
        (2, 3, [2, 5]),
        (2, 4, [1, 5]),
        (2, 5, [0, 5]),
        ([3, 4], 3, [0, 3, 6]),
        ([1, 1], 1, [0, 1]),
    ],
)
def test_period_counts_back_from_the_last_block_which_the_output_follows(
    n: int | list[int], period: int, predictors: list[int]
) -> None:
    network = PreActResNet(n=n, c=2)
    cuts = every(network, torch.ones(1, 3, 4, 4), period)
    assert cuts == [Cut(f"blocks.{index}") for index in predictors[:-1]]
    assert len(cuts) + 1 == 1 + (len(network.blocks) - 1) // period


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "exits"), [(14, 4), (26, 4), (50, 8), (101, 11), (152, 10)])
def test_papers_periods_of_the_imagenet_networks(layers: int, exits: int) -> None:
    network = preact_resnet_imagenet(layers=layers, c=1)
    assert (
        len(every(network, torch.ones(1, 3, 32, 32), IMAGENET_RESNETS[layers].period)) + 1 == exits
    )


@pytest.mark.parametrize("period", [0, -1, 6, 100])
def test_period_that_leaves_no_early_exit_is_refused(period: int) -> None:
    with pytest.raises(
        ExitNotFound, match=rf"a period of {period} blocks; PreActResNet has 6 .*expected 1 to 5"
    ):
        every(PreActResNet(n=2, c=2), torch.ones(1, 3, 4, 4), period)
