"""The mechanism that pauses an untouched forward.

Its known traps have a file each.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from impatient.networks import MultiExitNetwork
from staging import (
    CLASSES,
    WIDTH,
    assert_same,
    attach,
    linear,
    modal,
    staged,
    toy_network,
    x_of,
)


class Logged(nn.Module):
    """Blocks that write their number down when they run."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(linear() for _ in range(blocks))
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            self.log.append(index)
            x = block(x).tanh()
        self.log.append(-1)
        return self.classifier(x)


def test_nothing_deeper_is_computed_until_it_is_asked_for() -> None:
    network = attach(Logged(), "blocks.0", "blocks.1")
    log = network.backbone.log
    log.clear()
    walk = network.exits(x_of())
    assert log == []
    next(walk)
    assert log == [0]
    next(walk)
    assert log == [0, 1]
    next(walk)
    assert log == [0, 1, 2, -1]


def test_exits_come_shallow_to_deep_and_then_end(toy: nn.Module, toy_input: Tensor) -> None:
    walk = toy_network(toy).exits(toy_input)
    assert [exit.index for exit in walk] == [0, 1, 2]
    assert list(walk) == []


def test_staged_outputs_equal_those_of_forward_and_of_hand_written_stages(
    toy: nn.Module, toy_input: Tensor
) -> None:
    network = toy_network(toy)
    first = toy.blocks[0](toy_input)
    third = toy.blocks[2](toy.blocks[1](first))
    by_hand = [
        network.heads[0](first),
        network.heads[1](third),
        toy.classifier(toy.blocks[3](third)),
    ]
    assert_same(staged(network, toy_input), by_hand)
    assert_same(network(toy_input), by_hand)


def test_features_are_what_the_module_at_the_cut_gave(toy: nn.Module, toy_input: Tensor) -> None:
    exit = next(toy_network(toy).exits(toy_input))
    assert_same([exit.features], [toy.blocks[0](toy_input)])


def test_last_exit_needs_no_head_and_its_features_are_the_output(
    toy: nn.Module, toy_input: Tensor
) -> None:
    *_, last = toy_network(toy).exits(toy_input)
    assert last.features is last.output()
    assert_same([last.output()], [toy(toy_input)])


def test_network_without_early_exits_gives_the_backbones_output(
    toy: nn.Module, toy_input: Tensor
) -> None:
    network = attach(toy)
    assert_same(staged(network, toy_input), [toy(toy_input)])
    assert_same(network(toy_input), [toy(toy_input)])


def test_gradients_of_a_staged_training_step_equal_those_of_forward(
    toy: nn.Module, toy_input: Tensor
) -> None:
    network = toy_network(toy)
    gradients = []
    for outputs in (staged(network, toy_input), network(toy_input)):
        network.zero_grad()
        sum(output.square().sum() for output in outputs).backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other)


def test_exit_tells_whether_its_output_is_computed(toy: nn.Module, toy_input: Tensor) -> None:
    exit = next(toy_network(toy).exits(toy_input))
    assert repr(exit) == "StagedExit(index=0, features=(5, 8), output=not computed)"
    exit.output()
    assert "output=computed" in repr(exit)


def test_backbone_called_by_itself_is_not_disturbed_by_its_hooks(
    toy: nn.Module, toy_input: Tensor
) -> None:
    before = toy(toy_input)
    network = toy_network(toy)
    assert network.backbone is toy
    assert_same([toy(toy_input)], [before])


def calls(network: MultiExitNetwork) -> list[int]:
    return [len(head.seen) for head in network.heads]


def test_output_is_computed_once(counted: MultiExitNetwork, toy_input: Tensor) -> None:
    for exit in counted.exits(toy_input):
        assert exit.output() is exit.output()
    assert calls(counted) == [1, 1]


def test_heads_nobody_asks_never_run(counted: MultiExitNetwork, toy_input: Tensor) -> None:
    for exit in counted.exits(toy_input):
        if exit.index == 1:
            exit.output()
    assert calls(counted) == [0, 1]


def test_kept_features_do_not_run_heads_either(
    counted: MultiExitNetwork, toy_input: Tensor
) -> None:
    list(counted.exits(toy_input, keep=True))
    assert calls(counted) == [0, 0]


def test_forward_runs_each_head_once(counted: MultiExitNetwork, toy_input: Tensor) -> None:
    counted(toy_input)
    assert calls(counted) == [1, 1]


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_heads_learn_behind_a_part_of_the_model_that_does_not(mode: str) -> None:
    network = modal(mode)
    x = x_of()
    for run in (
        network,
        lambda x: [exit.output() for exit in list(network.exits(x, keep=True))],
        lambda x: staged(network, x),
    ):
        network.zero_grad()
        sum(output.float().sum() for output in run(x)).backward()
        assert [bool(head[-1].weight.grad.abs().sum() > 0) for head in network.heads] == [True] * 4


@pytest.mark.parametrize("order", ["0101010", "0011011", "1000111", "1110001"])
def test_interleaved_runs_of_one_network_equal_sequential_ones(order: str) -> None:
    network = modal("no_grad")
    inputs = [x_of(2), x_of(3)]
    expected = [staged(network, x) for x in inputs]
    walks = [network.exits(x) for x in inputs]
    outputs: list[list[Tensor]] = [[], []]
    for which in map(int, order + "01" * 5):
        exit = next(walks[which], None)
        if exit is not None:
            outputs[which].append(exit.output())
    assert_same(outputs[0], expected[0])
    assert_same(outputs[1], expected[1])


def test_a_forward_between_two_exits_does_not_disturb_the_run(
    toy: nn.Module, toy_input: Tensor
) -> None:
    network = toy_network(toy)
    expected = network(toy_input)
    other = x_of(2)
    outputs = []
    for exit in network.exits(toy_input):
        outputs.append(exit.output())
        network(other)
        toy(other)
    assert_same(outputs, expected)


def test_copied_network_has_exits_of_its_own(toy: nn.Module, toy_input: Tensor) -> None:
    network = toy_network(toy)
    expected = [output.detach().clone() for output in network(toy_input)]
    twin = copy.deepcopy(network)
    assert_same(staged(twin, toy_input), expected)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    assert_same(staged(twin, toy_input), expected)
    assert_same(twin(toy_input), expected)
    assert not torch.equal(network(toy_input)[0], expected[0])
    assert len(twin.backbone.blocks[0]._forward_hooks) == 1


def test_gradients_of_a_copy_stay_in_the_copy(toy: nn.Module, toy_input: Tensor) -> None:
    network = toy_network(toy)
    twin = copy.deepcopy(network)
    sum(output.sum() for output in staged(twin, toy_input)).backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(parameter.grad is not None for parameter in twin.parameters())


def test_network_can_be_copied_while_a_run_is_paused(toy: nn.Module, toy_input: Tensor) -> None:
    network = toy_network(toy)
    expected = network(toy_input)
    walk = network.exits(toy_input)
    outputs = [next(walk).output()]
    assert_same(staged(copy.deepcopy(network), toy_input), expected)
    assert_same([*outputs, *(exit.output() for exit in walk)], expected)


def test_state_goes_into_another_network_of_the_same_build(
    toy: nn.Module, toy_input: Tensor
) -> None:
    network = toy_network(toy)
    other = toy_network(type(toy)())
    assert not torch.equal(other(toy_input)[0], network(toy_input)[0])
    other.load_state_dict(network.state_dict(), strict=True)
    assert_same(staged(other, toy_input), network(toy_input))


def test_backbones_state_keeps_its_names(toy: nn.Module) -> None:
    names = list(toy.state_dict())
    network = toy_network(toy)
    assert list(network.backbone.state_dict()) == names
    assert [
        key.removeprefix("backbone.") for key in network.state_dict() if key.startswith("backbone.")
    ] == names


def test_two_networks_may_share_one_backbone(toy: nn.Module, toy_input: Tensor) -> None:
    one = attach(toy, "blocks.0", "blocks.1")
    other = attach(toy, "blocks.1", "blocks.3")
    expected_one = one(toy_input)
    expected_other = other(toy_input)
    walks = [one.exits(toy_input), other.exits(toy_input)]
    outputs = [(a.output(), b.output()) for a, b in zip(*walks, strict=True)]
    assert_same([a for a, _ in outputs], expected_one)
    assert_same([b for _, b in outputs], expected_other)
    assert len(toy.blocks[1]._forward_hooks) == 1
