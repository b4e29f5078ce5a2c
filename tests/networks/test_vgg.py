"""Plain convolutions: our small VGG, and torchvision's large ones at the papers' resolution."""

import pytest
import torch
from torch import nn

from impatient.errors import ModelSpecError
from impatient.networks import attach_exits, load_model
from impatient.networks.placement import every
from impatient.networks.vgg import SmallVGG

CLASSES = 5


def facts_of(network: SmallVGG, side: int) -> list[object]:
    x = torch.ones(1, network.blocks[0][0].in_channels, side, side)
    after = [f"blocks.{index}" for index in range(len(network.blocks) - 1)]
    return attach_exits(network, after=after, example=x).stage_facts(x)


@pytest.mark.parametrize("side", [8, 28, 32, 45])
def test_images_of_any_size_are_taken(side: int) -> None:
    assert SmallVGG(CLASSES, width=4)(torch.randn(2, 3, side, side)).shape == (2, CLASSES)


def test_layers_are_those_counted_by_hand() -> None:
    facts = facts_of(SmallVGG(in_channels=1), 28)
    places = [28**2, 14**2, 7**2, 7**2, 3**2, 3**2]
    convolutions = [1 * 16, 16 * 32, 32 * 64, 64 * 64, 64 * 128, 128 * 128]
    macs = [9 * weights * n for weights, n in zip(convolutions, places, strict=True)]
    macs[-1] += 128 * 10
    assert [fact.stage_macs for fact in facts] == macs
    assert 4e6 < sum(macs) < 6e6
    assert [fact.features[1:] for fact in facts] == [
        (16, 14, 14),
        (32, 7, 7),
        (64, 7, 7),
        (64, 3, 3),
        (128, 3, 3),
        (10,),
    ]
    norms = 2 * (16 + 32 + 64 + 64 + 128 + 128)
    assert (
        sum(fact.stage_parameters for fact in facts)
        == 9 * sum(convolutions) + norms + 128 * 10 + 10
    )


def test_vgg_11_has_its_eight_layers_and_widths() -> None:
    network = SmallVGG(width=64, blocks=(1, 1, 2, 2, 2))
    assert [block[0].out_channels for block in network.blocks] == [
        64,
        128,
        256,
        256,
        512,
        512,
        512,
        512,
    ]
    assert [len(block) == 4 for block in network.blocks] == [
        True,
        True,
        False,
        True,
        False,
        True,
        False,
        False,
    ]


def test_output_is_the_mean_of_the_last_map_and_a_linear_layer() -> None:
    network = SmallVGG(CLASSES, width=4).eval()
    x = torch.randn(2, 3, 28, 28)
    features = x
    for block in network.blocks:
        features = block(features)
    torch.testing.assert_close(network(x), network.classifier(features.mean((2, 3))))
    assert network(x).std() > 1e-3


@pytest.mark.parametrize("count", [2, 4, 6])
def test_exits_go_after_layers_by_themselves(count: int) -> None:
    x = torch.randn(2, 1, 28, 28)
    network = attach_exits(SmallVGG(in_channels=1), example=x, count=count).eval()
    assert set(network.exit_names) <= {*(f"blocks.{index}" for index in range(6)), "output"}
    assert network.num_exits == count
    assert torch.equal(network(x)[-1], network.backbone(x))


def test_exits_go_a_period_apart() -> None:
    cuts = every(SmallVGG(width=2), torch.ones(1, 3, 28, 28), 2)
    assert [str(cut) for cut in cuts] == ["blocks.1", "blocks.3"]


def test_all_layers_learn() -> None:
    network = SmallVGG(CLASSES, width=4)
    network(torch.randn(4, 3, 28, 28)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 0},
        {"num_classes": 0},
        {"in_channels": -1},
        {"blocks": ()},
        {"blocks": [1, 0]},
        {"blocks": 3},
        {"blocks": "12"},
        {"width": 1.5},
        {"width": [16]},
        {"blocks": [1.0]},
        {"blocks": None},
    ],
)
def test_sizes_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(
        ModelSpecError, match=r"^SmallVGG\(.*expected whole numbers of at least 1. blocks is a list"
    ):
        SmallVGG(**wrong)


# --- the large ones -------------------------------------------------------------------------------


def torchvision_model(name: str) -> nn.Module:
    """Build torchvision's model with uniform instead of normal weights.

    Drawing its 130 million normal weights would take as long as the rest of the test.
    """
    with torch.device("meta"):
        model = load_model(f"torchvision:{name}", num_classes=CLASSES)
    for layer in model.to_empty(device="cpu").modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    return model.eval()


# smaller images and classifiers, in both modes and with gradients: test_exactness.py
# it takes 7.6 GMACs at 224
@pytest.mark.slow
@pytest.mark.parametrize(("name", "placed_at"), [("alexnet", 224), ("vgg11_bn", 64)])
def test_torchvisions_plain_networks_take_exits_at_the_papers_resolution(
    name: str, placed_at: int
) -> None:
    model = torchvision_model(name)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        untouched = model(x)
        network = attach_exits(
            model, example=x[..., :placed_at, :placed_at], after="auto", count=4
        ).eval()
        outputs = network(x)
        assert torch.equal(outputs[-1], untouched)
        assert torch.equal(model(x), untouched)
    assert untouched.std() > 1e-3
    assert all(name.startswith(("features.", "classifier.")) for name in network.exit_names[:-1])
    assert [output.shape for output in outputs] == [(1, CLASSES)] * 4
