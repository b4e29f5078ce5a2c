"""Exceptions come out, and everything can be used again."""

import pytest
import torch
from torch import Tensor, nn

from impatient.networks.stages import _thread
from staging import (
    WIDTH,
    Modal,
    assert_same,
    attach,
    every_mode,
    modes,
    paused_runs,
    staged,
    toy_network,
    x_of,
)


class Failing(Modal):
    """Raises in its mode, after its first cut there."""

    def __init__(self, mode: str) -> None:
        super().__init__(mode)
        self.error: BaseException | None = None

    def _note(self, x: Tensor) -> Tensor:
        super()._note(x)
        if self.error is not None and len(self.seen) == 3:
            raise self.error
        return x


@every_mode
@pytest.mark.parametrize(
    "error", [ValueError("of the model"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
def test_exception_of_the_model_propagates_and_the_callers_modes_come_back(
    mode: str, error: BaseException
) -> None:
    network = attach(Failing(mode), "before", "inside")
    x = x_of()
    outside = modes()
    before = paused_runs()
    expected = network(x)
    network.backbone.error = error
    network.backbone.seen.clear()
    walk = network.exits(x)
    next(walk), next(walk)
    with pytest.raises(type(error)) as caught:
        next(walk)
    assert caught.value is error
    assert modes() == outside
    assert list(walk) == []
    assert paused_runs() == before
    network.backbone.error = None
    assert_same(staged(network, x), expected)


def test_exception_in_the_first_stage_propagates(toy: nn.Module) -> None:
    network = toy_network(toy)
    outside = modes()
    with pytest.raises(RuntimeError, match="shapes"):
        next(network.exits(torch.randn(2, WIDTH + 1)))
    assert modes() == outside


def test_exception_of_model_or_head_leaves_no_trace_in_forward(
    toy: nn.Module, toy_input: Tensor
) -> None:
    network = toy_network(toy)
    expected = network(toy_input)
    with pytest.raises(RuntimeError):
        network(torch.randn(2, WIDTH + 1))
    network.heads[1].forward = lambda features: 1 / 0
    with pytest.raises(ZeroDivisionError):
        network(toy_input)
    assert _thread.stack == []
    del network.heads[1].forward
    assert_same(network(toy_input), expected)


def test_exception_of_a_head_does_not_end_the_run(toy: nn.Module, toy_input: Tensor) -> None:
    network = toy_network(toy)
    expected = network(toy_input)
    network.heads[0].forward = lambda features: 1 / 0
    walk = network.exits(toy_input)
    with pytest.raises(ZeroDivisionError):
        next(walk).output()
    assert_same([exit.output() for exit in walk], expected[1:])
