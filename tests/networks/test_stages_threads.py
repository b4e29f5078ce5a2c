"""A paused run belongs to its thread."""

import threading
from typing import Any

import greenlet
import pytest
import torch
from torch import Tensor, nn

from impatient.networks import StagedRun
from staging import (
    assert_same,
    in_thread,
    modal,
    modes,
    paused_runs,
    staged,
    toy_network,
    unwinding,
    x_of,
)


def test_resuming_on_another_thread_is_refused_and_the_owner_goes_on(
    toy: nn.Module, toy_input: Tensor
) -> None:
    network = toy_network(toy)
    outside = modes()
    with torch.no_grad():
        walk = network.exits(toy_input)
        outputs = [next(walk).output()]
        error = in_thread(lambda: next(walk))
        assert isinstance(error, greenlet.error)
        assert "thread" in str(error)
        outputs += [exit.output() for exit in walk]
    assert_same(outputs, network(toy_input))
    assert modes() == outside


def test_modes_of_a_thread_that_is_refused_are_untouched() -> None:
    walk = modal("inference").exits(x_of())
    next(walk), next(walk)

    def refused() -> tuple[Any, Any]:
        before = modes()
        with pytest.raises(greenlet.error):
            next(walk)
        return before, modes()

    before, after = in_thread(refused)
    assert before == after
    walk.close()


def test_closing_on_another_thread_is_refused_and_the_owner_still_can() -> None:
    network = unwinding()
    walk = network.exits(x_of())
    next(walk)
    assert isinstance(in_thread(walk.close), greenlet.error)
    assert network.backbone.unwound == 0
    walk.close()
    assert network.backbone.unwound == 1


def test_finished_run_may_be_closed_and_dropped_anywhere(toy: nn.Module, toy_input: Tensor) -> None:
    walk = toy_network(toy).exits(toy_input)
    list(walk)
    assert in_thread(walk.close) is None
    assert in_thread(lambda: next(walk, "nothing more")) == "nothing more"


def test_dropping_a_paused_run_on_another_thread_warns(toy: nn.Module, toy_input: Tensor) -> None:
    before = paused_runs()
    walk = toy_network(toy).exits(toy_input)
    next(walk)
    box = [walk]
    forward = walk._runner
    del walk
    with pytest.warns(ResourceWarning, match="another thread"):
        in_thread(box.clear)
    assert paused_runs() == before + 1
    # what close() would have done; other tests count the runs that are paused
    forward.throw()
    assert paused_runs() == before


def test_run_whose_thread_has_ended_is_refused_and_warns_when_dropped(
    toy: nn.Module, toy_input: Tensor
) -> None:
    def begun() -> StagedRun:
        walk = toy_network(toy).exits(toy_input)
        next(walk)
        return walk

    # greenlet itself crashes the interpreter here
    walk = in_thread(begun)
    with pytest.raises(greenlet.error):
        next(walk)
    with pytest.raises(greenlet.error):
        walk.close()
    with pytest.warns(ResourceWarning, match="another thread"):
        del walk


def test_run_asked_for_here_may_be_advanced_elsewhere_in_the_modes_of_here(
    toy: nn.Module, toy_input: Tensor
) -> None:
    network = toy_network(toy)
    with torch.inference_mode():
        walk = network.exits(toy_input)
        expected = network(toy_input)
    outputs = in_thread(lambda: [exit.output() for exit in walk])
    assert_same(outputs, expected)
    assert all(output.is_inference() for output in outputs)


def test_threads_may_each_run_the_same_network() -> None:
    network = modal("autocast")
    inputs = [x_of(2), x_of(3)]
    expected = [staged(network, x) for x in inputs]
    barrier = threading.Barrier(2)
    outputs: list[list[Tensor]] = [[], []]

    def run(which: int) -> None:
        walk = network.exits(inputs[which])
        for _ in range(network.num_exits):
            # both are paused at the same exit
            barrier.wait(timeout=20)
            outputs[which].append(next(walk).output())
        outputs[which] += network(inputs[which])

    threads = [threading.Thread(target=run, args=(which,), daemon=True) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    for which in (0, 1):
        assert_same(outputs[which], [*expected[which], *expected[which]])
