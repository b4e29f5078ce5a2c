"""Modes of torch and context variables do not leak at a pause."""

import contextvars
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from impatient.networks import MultiExitNetwork
from staging import (
    CLASSES,
    MODES,
    WIDTH,
    Containing,
    Counting,
    Modal,
    assert_same,
    attach,
    every_mode,
    linear,
    modal,
    modes,
    plainly_seen,
    some_mode,
    staged,
    toy_network,
    x_of,
)


@some_mode
def test_modes_do_make_a_difference_here(mode: str) -> None:
    seen, _ = plainly_seen(modal(mode), x_of())
    assert seen[1] != seen[0]
    assert seen[3] == seen[0]


@some_mode
def test_mode_entered_by_the_model_does_not_leak_to_the_caller(mode: str) -> None:
    outside = modes()
    network = modal(mode)
    for _ in network.exits(x_of()):
        assert modes() == outside
    assert modes() == outside


@every_mode
@pytest.mark.parametrize("callers", MODES)
def test_model_finds_its_modes_again_whatever_the_caller_does_between(
    mode: str, callers: str
) -> None:
    network = modal(mode)
    x = x_of()
    seen, output = plainly_seen(network, x)
    network.backbone.seen.clear()
    walk = network.exits(x)
    last = None
    for exit in walk:
        last = exit
        with MODES[callers]():
            torch.ones(2).sum()
    assert network.backbone.seen == seen
    assert_same([last.output()], [output])


@every_mode
@pytest.mark.parametrize("callers", MODES)
# in which the model enters its mode, stays in it, leaves it
@pytest.mark.parametrize("step", [1, 2, 3])
def test_callers_mode_around_one_step_neither_leaks_in_nor_is_lost(
    mode: str, callers: str, step: int
) -> None:
    network = modal(mode)
    x = x_of()
    seen, output = plainly_seen(network, x)
    network.backbone.seen.clear()
    outside = modes()
    walk = network.exits(x)
    for _ in range(step):
        next(walk)
        assert modes() == outside
    with MODES[callers]():
        entered = modes()
        last = next(walk)
        assert modes() == entered
    assert modes() == outside
    *_, last = last, *walk
    assert modes() == outside
    assert network.backbone.seen == seen
    assert_same([last.output()], [output])
    assert last.output().requires_grad == output.requires_grad


@some_mode
def test_modes_of_caller_and_model_may_overlap_without_nesting(mode: str) -> None:
    network = modal(mode)
    outside = modes()
    seen, _ = plainly_seen(network, x_of())
    network.backbone.seen.clear()
    walk = network.exits(x_of())
    # the model has entered its mode
    next(walk), next(walk)
    with MODES["no_grad"]():
        within = modes()
        # ... and left it
        next(walk), next(walk)
        assert modes() == within
    next(walk)
    assert modes() == outside
    assert network.backbone.seen == seen


@some_mode
def test_modes_are_put_back_when_a_paused_run_is_closed(mode: str) -> None:
    outside = modes()
    walk = modal(mode).exits(x_of())
    next(walk), next(walk)
    with MODES["inference"]():
        within = modes()
        walk.close()
        assert modes() == within
    assert modes() == outside


@every_mode
def test_a_run_keeps_the_modes_in_which_it_was_asked_for(mode: str) -> None:
    network = modal("nothing")
    x = x_of()
    with MODES[mode]():
        seen, output = plainly_seen(network, x)
        network.backbone.seen.clear()
        walk = network.exits(x)
    *_, last = walk
    assert network.backbone.seen == seen
    assert last.output().dtype == output.dtype
    assert last.output().is_inference() == output.is_inference()
    assert last.output().requires_grad == output.requires_grad


@pytest.mark.parametrize(
    "inside", [True, False], ids=["entered by the model", "entered by the caller"]
)
def test_weights_cast_by_autocast_in_a_run_are_not_used_after_they_changed(inside: bool) -> None:
    network = attach(Modal("autocast" if inside else "nothing"), "before", "inside", "also_inside")
    x = x_of()
    with MODES["nothing" if inside else "autocast"]():
        walk = network.exits(x)
    for _ in range(3):
        next(walk)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    with MODES["autocast"]():
        again = network.backbone.also_inside(x)
    with MODES["autocast"]():
        assert_same([again], [network.backbone.also_inside(x)])
    walk.close()


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_survive_a_step_taken_under_no_grad(
    toy: nn.Module, toy_input: Tensor, keep: bool
) -> None:
    network = toy_network(toy)
    walk = network.exits(toy_input, keep=keep)
    with torch.no_grad():
        exit = next(walk)
    exit.output().sum().backward()
    assert toy.blocks[0][0].weight.grad.abs().sum() > 0


@every_mode
def test_forward_runs_heads_in_the_callers_modes_not_in_the_models(mode: str) -> None:
    network = attach(Modal(mode), "inside", heads=lambda features, classes: Counting())
    outside = modes()
    network.heads[0].seen.clear()
    network(x_of())
    assert network.heads[0].seen == [outside]


@every_mode
@pytest.mark.parametrize("asked_in", MODES)
def test_heads_run_in_the_modes_in_which_the_run_was_asked_for(
    counted: MultiExitNetwork, mode: str, asked_in: str
) -> None:
    x = x_of()
    with MODES[mode]():
        begun_in = modes()
        walk = counted.exits(x)
        exit = next(walk)
    with MODES[asked_in]():
        exit.output()
        next(walk).output()
    assert [*counted.heads[0].seen, *counted.heads[1].seen] == [begun_in] * 2
    walk.close()


def test_asking_a_head_leaves_the_callers_modes_alone(
    counted: MultiExitNetwork, toy_input: Tensor
) -> None:
    with torch.inference_mode():
        exit = next(counted.exits(toy_input))
    with MODES["autocast"](), torch.no_grad():
        before = modes()
        exit.output()
        assert modes() == before


request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="nobody")


class Asking(nn.Module):
    """Reads and sets a context variable in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = linear()
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.seen: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(request_id.get())
        token = request_id.set("the model")
        x = self.block(x)
        self.seen.append(request_id.get())
        request_id.reset(token)
        return self.classifier(x)


@pytest.fixture
def request_of_caller() -> Iterator[None]:
    token = request_id.set("caller")
    yield
    request_id.reset(token)


def test_callers_context_variables_are_visible_in_the_model(request_of_caller: None) -> None:
    network = attach(Asking(), "block")
    for run in (network, lambda x: staged(network, x)):
        network.backbone.seen.clear()
        run(x_of())
        assert network.backbone.seen == ["caller", "the model"]


def test_context_variables_set_by_the_model_or_between_exits_stay_apart(
    request_of_caller: None,
) -> None:
    network = attach(Asking(), "block")
    network.backbone.seen.clear()
    walk = network.exits(x_of())
    next(walk)
    assert request_id.get() == "caller"
    token = request_id.set("somebody else")
    next(walk)
    assert network.backbone.seen == ["caller", "the model"]
    assert request_id.get() == "somebody else"
    request_id.reset(token)


def test_context_variables_reach_a_network_inside_a_staged_model(request_of_caller: None) -> None:
    inner = attach(Asking(), "block")
    outer = attach(Containing(inner, lambda network, x: network(x)[-1]), "before")
    inner.backbone.seen.clear()
    list(outer.exits(x_of()))
    assert inner.backbone.seen == ["caller", "the model"]
