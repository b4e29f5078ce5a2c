"""Runs that are abandoned are unwound and leave nothing in memory."""

import contextlib
import gc
import itertools
import subprocess
import sys
import weakref
from collections.abc import Callable

import greenlet
import pytest
import torch
from torch import Tensor, nn

from impatient.networks import MultiExitNetwork
from staging import (
    CLASSES,
    WIDTH,
    Unwinding,
    assert_same,
    attach,
    by_break,
    linear,
    modes,
    paused_runs,
    staged,
    toy_network,
    unwinding,
    x_of,
)


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(entry), Tensor) for entry in gc.get_objects())


def by_del(network: MultiExitNetwork, x: Tensor) -> None:
    walk = network.exits(x)
    next(walk)
    del walk


def by_close(network: MultiExitNetwork, x: Tensor) -> None:
    walk = network.exits(x)
    next(walk)
    walk.close()


def by_with(network: MultiExitNetwork, x: Tensor) -> None:
    with network.exits(x) as walk:
        next(walk)


def by_error(network: MultiExitNetwork, x: Tensor) -> None:
    with contextlib.suppress(KeyError), network.exits(x) as walk:
        next(walk)
        raise KeyError


abandoned = pytest.mark.parametrize("abandon", [by_break, by_del, by_close, by_with, by_error])


@abandoned
def test_abandoned_run_runs_the_models_finally_and_frees_what_it_held(
    abandon: Callable[..., None],
) -> None:
    network = unwinding()
    before = paused_runs()
    abandon(network, x_of())
    assert network.backbone.unwound == 1
    assert [held() for held in network.backbone.held] == [None, None]
    assert paused_runs() == before


@abandoned
def test_network_is_usable_after_an_abandoned_run(abandon: Callable[..., None]) -> None:
    network = unwinding()
    x = x_of()
    expected = staged(network, x)
    abandon(network, x_of())
    assert_same(staged(network, x), expected)
    assert_same(network(x), expected)


def test_paused_run_does_hold_its_activations() -> None:
    network = unwinding()
    before = paused_runs()
    walk = network.exits(x_of())
    next(walk)
    assert None not in [held() for held in network.backbone.held]
    assert paused_runs() == before + 1
    walk.close()


def test_an_exit_somebody_holds_does_not_keep_its_run_alive() -> None:
    network = unwinding()
    before = paused_runs()
    x = x_of()
    for exit in network.exits(x):  # noqa: B007  the loop variable outlives the loop
        break
    assert network.backbone.unwound == 1
    assert paused_runs() == before
    assert_same([exit.output()], [network(x)[0]])


def test_output_of_the_last_exit_reached_can_be_asked_after_close(
    toy: nn.Module, toy_input: Tensor
) -> None:
    network = toy_network(toy)
    with network.exits(toy_input) as walk:
        exit = next(walk)
    assert_same([exit.output()], [network(toy_input)[0]])


def test_finished_run_frees_its_input_and_its_greenlet(toy: nn.Module) -> None:
    network = toy_network(toy)
    x = x_of()
    before = paused_runs()
    held = weakref.ref(x)
    with torch.no_grad():
        walk = network.exits(x)
        list(walk)
    del x
    assert held() is None
    assert paused_runs() == before


def test_closed_run_gives_nothing_more_and_may_be_closed_again(
    toy: nn.Module, toy_input: Tensor
) -> None:
    walk = toy_network(toy).exits(toy_input)
    next(walk)
    walk.close()
    walk.close()
    assert list(walk) == []


def test_run_that_never_started_can_be_closed_and_dropped() -> None:
    network = unwinding()
    walk = network.exits(x_of())
    walk.close()
    assert list(walk) == []
    assert network.backbone.held == []
    network.exits(x_of())


class Swallowing(nn.Module):
    """Catches everything around its blocks, as careless code does."""

    def __init__(self) -> None:
        super().__init__()
        self.block = linear()
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.swallowed: list[type] = []

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            try:
                x = self.block(x)
            except BaseException as error:
                self.swallowed.append(type(error))
        return self.classifier(x)


def test_model_that_swallows_everything_is_still_ended() -> None:
    network = attach(Swallowing(), "block@0", "block@1", "block@3")
    before = paused_runs()
    by_close(network, x_of())
    # thrown in once, and again at each cut it came to
    assert network.backbone.swallowed == [greenlet.GreenletExit] * 3
    assert paused_runs() == before
    network.backbone.swallowed.clear()
    assert len(staged(network, x_of())) == 4
    assert network.backbone.swallowed == []


def test_error_in_the_models_cleanup_reaches_who_closes() -> None:
    class Careless(Unwinding):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            except greenlet.GreenletExit:
                raise OSError("cleanup") from None

    walk = attach(Careless(), "a").exits(x_of())
    next(walk)
    outside = modes()
    with pytest.raises(OSError, match="cleanup"):
        walk.close()
    assert modes() == outside


def test_two_hundred_abandoned_runs_leave_nothing_behind() -> None:
    network = unwinding()
    x = x_of()
    by_break(network, x)
    network.backbone.held.clear()
    greenlets = paused_runs()
    tensors = live_tensors()
    for abandon in itertools.islice(itertools.cycle([by_break, by_del, by_close, by_with]), 200):
        abandon(network, x)
    network.backbone.held.clear()
    assert paused_runs() == greenlets
    assert live_tensors() == tensors
    assert network.backbone.unwound == 201


@pytest.mark.slow
def test_paused_run_at_the_end_of_the_program_is_silent() -> None:
    program = """
import torch
from torch import nn
from impatient.networks import attach_exits
backbone = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
network = attach_exits(backbone, example=torch.zeros(1, 8), after=["0"])
walk = network.exits(torch.zeros(1, 8))
exit = next(walk)
print("paused")
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "paused\n", "")
