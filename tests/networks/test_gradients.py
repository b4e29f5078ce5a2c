"""Gradients at the exits follow the formulas, and values stay the same."""

import math

import pytest
import torch
from torch import Tensor, nn

from impatient.errors import NetworkError
from impatient.networks import MultiExitNetwork, attach_exits
from impatient.networks.gradients import PLAIN, GradientFlow
from toys import ToyBackbone

FLOWS = [
    GradientFlow(equilibrium=True),
    GradientFlow(detach=0.5),
    GradientFlow(equilibrium=True, detach=0.25),
]
COUNT = 4


def network_of(toy: ToyBackbone) -> MultiExitNetwork:
    return attach_exits(toy, after=["blocks.0", "blocks.1", "blocks.2"], example=torch.zeros(1, 8))


def first_gradient(
    network: MultiExitNetwork, x: Tensor, weights: tuple[float, ...], flow: GradientFlow
) -> Tensor:
    """Of the first block, which every exit trains."""
    network.zero_grad()
    outputs = network(x, gradients=flow)
    sum(
        weight * output.square().mean() for weight, output in zip(weights, outputs, strict=True)
    ).backward()
    gradient = network.backbone.blocks[0][0].weight.grad
    assert gradient is not None
    return gradient.clone()


def one_hot(exit: int) -> tuple[float, ...]:
    return tuple(float(index == exit) for index in range(COUNT))


@pytest.mark.parametrize("flow", FLOWS)
def test_no_value_changes(toy: ToyBackbone, toy_input: Tensor, flow: GradientFlow) -> None:
    network = network_of(toy)
    for plain, changed in zip(network(toy_input), network(toy_input, gradients=flow), strict=True):
        assert torch.equal(plain, changed)


def test_in_equilibrium_every_exit_has_the_same_share_of_the_gradient_of_the_first_block(
    toy: ToyBackbone, toy_input: Tensor
) -> None:
    # 1/(K-k) at the own head, and (K-j-1)/(K-j) at every exit j passed before: for each exit the
    # product is 1/K
    network = network_of(toy)
    flow = GradientFlow(equilibrium=True)
    for exit in range(COUNT):
        plain = first_gradient(network, toy_input, one_hot(exit), PLAIN)
        assert plain.abs().sum() > 0
        torch.testing.assert_close(
            first_gradient(network, toy_input, one_hot(exit), flow), plain / COUNT
        )


def test_in_equilibrium_what_lies_after_the_last_cut_meets_no_early_exit(
    toy: ToyBackbone, toy_input: Tensor
) -> None:
    network = network_of(toy)
    gradients = []
    for flow in (PLAIN, GradientFlow(equilibrium=True)):
        network.zero_grad()
        sum(output.square().mean() for output in network(toy_input, gradients=flow)).backward()
        gradients.append(network.backbone.classifier.weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("detach", "kept"), [(0.5, 4), (0.25, 6), (0.9, 1), (0.1, 8)])
def test_detached_channels_get_no_gradient_from_what_is_deeper(
    toy: ToyBackbone, toy_input: Tensor, detach: float, kept: int
) -> None:
    assert kept == 8 - math.floor(8 * detach)
    network = network_of(toy)
    deeper = first_gradient(network, toy_input, one_hot(3), GradientFlow(detach=detach))
    # rows are output channels of the first block
    assert not deeper[kept:].any()
    own = first_gradient(network, toy_input, one_hot(0), GradientFlow(detach=detach))
    # the exit's own head trains all
    assert torch.equal(own, first_gradient(network, toy_input, one_hot(0), PLAIN))


def test_channels_are_found_in_images() -> None:
    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)]
            )
            self.classifier = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.classifier(x.mean((2, 3)))

    x = torch.randn(2, 3, 6, 6)
    network = attach_exits(Convolutions(), after=["blocks.0"], example=x)
    network(x, gradients=GradientFlow(detach=0.5))[1].sum().backward()
    gradient = network.backbone.blocks[0].weight.grad
    assert gradient[:2].any()
    assert not gradient[2:].any()


def test_an_operation_in_place_after_the_cut_changes_neither_values_nor_heads() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.relu = nn.ReLU(inplace=True)
            self.classifier = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.relu(self.first(x)))

    x = torch.randn(3, 4)
    network = attach_exits(InPlace(), after=["first"], example=x)
    plain = [output.detach().clone() for output in network(x)]
    for flow in FLOWS:
        outputs = network(x, gradients=flow)
        assert all(torch.equal(before, after) for before, after in zip(plain, outputs, strict=True))
        sum(output.sum() for output in outputs).backward()


def test_a_block_that_gives_several_tensors_passes_the_others_on() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Pair()
            self.classifier = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            features, other = self.block(x)
            return self.classifier(features + other)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Linear(4, 4)
            self.right = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(x)

    x = torch.randn(3, 4)
    network = attach_exits(Pairs(), after=["block"], example=x)
    network(x, gradients=GradientFlow(equilibrium=True))[1].sum().backward()
    left = network.backbone.block.left.weight.grad
    right = network.backbone.block.right.weight.grad
    # only the features lie on the exit's way
    torch.testing.assert_close(left, right / 2)


def test_without_gradients_there_is_nothing_to_do(toy: ToyBackbone, toy_input: Tensor) -> None:
    network = network_of(toy)
    with torch.no_grad():
        for plain, changed in zip(
            network(toy_input), network(toy_input, gradients=FLOWS[2]), strict=True
        ):
            assert torch.equal(plain, changed)


@pytest.mark.parametrize("detach", [-0.1, 1.0, math.nan])
def test_senseless_shares_are_refused(detach: float) -> None:
    with pytest.raises(NetworkError, match="detach"):
        GradientFlow(detach=detach)
