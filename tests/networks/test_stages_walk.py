"""Straight runs do what paused ones do, whatever the model, its hooks, or a visit do."""

import contextvars
import copy
import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impatient.anytime import Exit, Run
from impatient.errors import ExitPassed, NetworkError
from impatient.networks import MultiExitNetwork, StagedRun
from impatient.networks.stages import _thread
from impatient.policies import ThresholdPolicy
from impatient.policies.policy import Policy
from impatient.runtime import ContractRun, Runner, profile
from staging import (
    CLASSES,
    WIDTH,
    Containing,
    Modal,
    assert_same,
    attach,
    every_mode,
    in_thread,
    linear,
    modes,
    paused_runs,
    staged,
    toy_network,
    unwinding,
    x_of,
)

Walk = Callable[[StagedRun, Callable[[Exit], bool]], None]
# The loop that pauses at every exit, which any run has, and what staged runs do in its place.
both = pytest.mark.parametrize("walk", [Run.walk, StagedRun.walk], ids=["paused", "straight"])


def until(exit: int, outputs: list[Tensor]) -> Callable[[Exit], bool]:
    """Take outputs, and stop at an exit."""

    def visit(here: Exit) -> bool:
        outputs.append(here.output())
        return here.index == exit

    return visit


def visited(network: MultiExitNetwork, x: Any, walk: Walk, stop: int = 99) -> list[Tensor]:
    outputs: list[Tensor] = []
    walk(network.exits(x), until(stop, outputs))
    return outputs


@both
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_outputs_are_those_of_the_exits_and_nothing_deeper_runs(
    toy: nn.Module, toy_input: Tensor, walk: Walk, stop: int
) -> None:
    network = toy_network(toy)
    expected = network(toy_input)
    ran = [0]
    toy.blocks[3].register_forward_hook(lambda *_: ran.append(1))
    assert_same(visited(network, toy_input, walk, stop), expected[: stop + 1])
    assert len(ran) == 1 + (stop == 2)
    assert _thread.stack == []


@both
def test_a_run_that_has_walked_is_over_and_keeps_nothing(toy: nn.Module, walk: Walk) -> None:
    network = toy_network(toy)
    x = x_of()
    held = weakref.ref(x)
    run = network.exits(x)
    with torch.no_grad():
        walk(run, until(1, []))
    del x
    gc.collect()
    assert held() is None
    assert list(run) == []
    run.close()


def test_a_run_that_was_begun_walks_on_from_where_it_is(toy: nn.Module, toy_input: Tensor) -> None:
    network = toy_network(toy)
    run = network.exits(toy_input)
    outputs = [next(run).output()]
    run.walk(until(99, outputs))
    assert_same(outputs, network(toy_input))


def test_an_exit_that_was_passed_says_so(toy: nn.Module, toy_input: Tensor) -> None:
    seen: list[Exit] = []
    toy_network(toy).exits(toy_input).walk(lambda here: bool(seen.append(here)))
    with pytest.raises(ExitPassed, match="is at exit 2"):
        seen[0].output()


@both
def test_a_head_that_was_replaced_answers(toy: nn.Module, toy_input: Tensor, walk: Walk) -> None:
    network = toy_network(toy)
    before = visited(network, toy_input, walk)
    network.heads[1] = copy.deepcopy(network.heads[0])
    expected = network(toy_input)
    assert not torch.equal(expected[1], before[1])
    assert_same(visited(network, toy_input, walk), expected)
    # and in a copy, the copy's own
    copied = copy.deepcopy(network)
    copied.heads[1] = copy.deepcopy(copied.heads[0]).requires_grad_(False).apply(zeroed)
    assert not visited(copied, toy_input, walk)[1].any()
    assert_same(visited(network, toy_input, walk), expected)


def zeroed(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()


# --- exceptions -----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("error", [ValueError("model"), KeyboardInterrupt()], ids=type)
def test_an_exception_of_the_model_comes_out(
    toy: nn.Module, toy_input: Tensor, walk: Walk, error: BaseException
) -> None:
    network = toy_network(toy)
    expected = network(toy_input)

    def fail(*_: Any) -> None:
        raise error

    hook = toy.blocks[1].register_forward_hook(fail)
    outside = modes()
    outputs: list[Tensor] = []
    with pytest.raises(type(error)) as caught:
        walk(network.exits(toy_input), until(99, outputs))
    assert caught.value is error
    assert len(outputs) == 1
    assert (modes(), _thread.stack) == (outside, [])
    hook.remove()
    assert_same(visited(network, toy_input, walk), expected)


class Catching(nn.Module):
    """Catches what its blocks raise, as careless code does."""

    def __init__(self, caught: type[BaseException]) -> None:
        super().__init__()
        self.block = linear()
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.kind = caught
        self.caught = 0
        self.cleaned = 0

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            try:
                x = self.block(x)
            except self.kind:
                self.caught += 1
            finally:
                self.cleaned += 1
        return self.classifier(x)


@both
@pytest.mark.parametrize("kind", [Exception, BaseException])
def test_a_model_that_catches_everything_is_left_all_the_same(
    walk: Walk, kind: type[BaseException]
) -> None:
    network = attach(Catching(kind), "block@0", "block@1", "block@2")
    x = x_of()
    expected = network(x)
    backbone = network.backbone
    backbone.caught = backbone.cleaned = 0
    assert_same(visited(network, x, walk, 1), expected[:2])
    # From the second call on: left once, or again at each cut that comes.
    assert (backbone.caught, backbone.cleaned) == ((0, 2) if kind is Exception else (2, 3))


@both
@pytest.mark.parametrize("kind", [Exception, BaseException])
def test_an_error_of_a_visit_is_not_the_models_to_catch(
    walk: Walk, kind: type[BaseException]
) -> None:
    network = attach(Catching(kind), "block@0", "block@1")
    visits = itertools.count()
    error = ZeroDivisionError("of the policy")

    def fail(_: Exit) -> bool:
        next(visits)
        raise error

    with pytest.raises(ZeroDivisionError) as caught:
        walk(network.exits(x_of()), fail)
    assert caught.value is error
    assert next(visits) == 1
    assert _thread.stack == []


@both
def test_what_a_model_cleans_up_is_cleaned_up_and_freed(walk: Walk) -> None:
    network = unwinding()
    visited(network, x_of(), walk, 0)
    assert network.backbone.unwound == 1
    assert [held() for held in network.backbone.held] == [None, None]


@both
def test_an_error_in_the_models_cleanup_comes_out(walk: Walk) -> None:
    network = unwinding()
    plain = network.backbone.forward

    def careless(x: Tensor) -> Tensor:
        try:
            return plain(x)
        except BaseException:
            raise OSError("cleanup") from None

    network.backbone.forward = careless
    with pytest.raises(OSError, match="cleanup"):
        visited(network, x_of(), walk, 0)
    assert _thread.stack == []


class Generating(nn.Module):
    """Runs its blocks in a generator, which closes something at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(), linear()
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.closed = 0

    def steps(self, x: Tensor) -> Any:
        try:
            yield (x := self.first(x))
            yield self.second(x)
        finally:
            self.closed += 1

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps(x):
            x = step
        return self.classifier(x)


@both
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_cuts_inside_a_generator_leave_it_closed(walk: Walk, stop: int) -> None:
    network = attach(Generating(), "first", "second")
    x = x_of()
    expected = network(x)
    network.backbone.closed = 0
    assert_same(visited(network, x, walk, stop), expected[: stop + 1])
    assert network.backbone.closed == 1


# --- modes, hooks, threads ------------------------------------------------------------------------


@both
@every_mode
@pytest.mark.parametrize("stop", [1, 99])
def test_heads_run_in_the_callers_modes_and_these_come_back(
    walk: Walk, mode: str, stop: int
) -> None:
    network = attach(Modal(mode), "before", "inside", "also_inside", "after")
    x = x_of()
    outside = modes()
    seen: list[Any] = []

    def visit(exit: Exit) -> bool:
        seen.append(modes())
        exit.output()
        return exit.index == stop

    walk(network.exits(x), visit)
    assert seen == [outside] * len(seen)
    assert modes() == outside


@both
@pytest.mark.parametrize("stop", [0, 99])
def test_modes_that_a_model_sets_and_leaves_set_do_not_reach_the_caller(
    walk: Walk, stop: int
) -> None:
    class Leaky(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            torch.set_grad_enabled(False)
            torch.set_autocast_cache_enabled(False)
            torch.set_autocast_enabled("cpu", True)
            return super().forward(x)

    outside = modes()
    network = attach(nn.Sequential(linear(), nn.Linear(WIDTH, CLASSES)), "0")
    network.backbone.__class__ = Leaky
    x = x_of()
    # A plain call does leak.
    assert in_thread(lambda: (network.backbone(x), modes())[1]) != outside
    outputs: list[Tensor] = []

    def visit(exit: Exit) -> bool:
        # In the caller's modes there are no casts, and the features were cast.
        outputs.append(exit.features)
        return exit.index == stop

    walk(network.exits(x), visit)
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    assert modes() == outside


@both
def test_hooks_of_the_users_own_see_and_change_what_they_do_in_a_plain_call(
    toy: nn.Module, toy_input: Tensor, walk: Walk
) -> None:
    calls: list[str] = []
    toy.blocks[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    toy.blocks[0].register_forward_hook(lambda _, __, output: output * 2, prepend=True)
    network = toy_network(toy)
    toy.blocks[0].register_forward_hook(lambda _, __, output: calls.append("after") or output + 1)
    expected = network(toy_input)
    calls.clear()
    assert_same(visited(network, toy_input, walk), expected)
    assert calls == ["before", "after"]
    calls.clear()
    # What the cut leaves, later hooks of that module do not see.
    assert_same(visited(network, toy_input, walk, 0), expected[:1])
    assert calls == ["before"]


def straight(network: MultiExitNetwork, x: Tensor) -> Tensor:
    return visited(network, x, StagedRun.walk, 1)[-1]


def paused(network: MultiExitNetwork, x: Tensor) -> Tensor:
    return visited(network, x, Run.walk, 1)[-1]


@both
@pytest.mark.parametrize("use", [straight, paused, lambda network, x: network(x)[-1]])
def test_a_run_inside_a_run(
    toy: nn.Module, walk: Walk, use: Callable[[MultiExitNetwork, Tensor], Tensor]
) -> None:
    inner = toy_network(toy)
    outer = attach(Containing(inner, use), "before", "after")
    x = x_of()
    expected = outer(x)
    for stop in (0, 1, 2):
        assert_same(visited(outer, x, walk, stop), expected[: stop + 1])
    assert _thread.stack == []


@both
def test_a_visit_may_run_the_same_network(toy: nn.Module, toy_input: Tensor, walk: Walk) -> None:
    network = toy_network(toy)
    expected = network(toy_input)
    seen: list[list[Tensor]] = []

    def visit(exit: Exit) -> bool:
        seen.append([exit.output(), *visited(network, toy_input, StagedRun.walk)])
        seen.append([exit.output(), *staged(network, toy_input)])
        return False

    walk(network.exits(toy_input), visit)
    assert len(seen) == 6
    for index, outputs in enumerate(seen):
        assert_same(outputs, [expected[index // 2], *expected])


@both
def test_threads_walk_the_same_network_at_once(toy: nn.Module, walk: Walk) -> None:
    network = toy_network(toy)
    inputs = [x_of(2), x_of(3)]
    expected = [network(x) for x in inputs]
    together = threading.Barrier(2)
    outputs: list[list[Tensor]] = [[], []]

    def run(which: int) -> None:
        def visit(exit: Exit) -> bool:
            together.wait(timeout=20)
            outputs[which].append(exit.output())
            return False

        walk(network.exits(inputs[which]), visit)

    threads = [threading.Thread(target=run, args=(which,), daemon=True) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    for which in (0, 1):
        assert_same(outputs[which], expected[which])


@both
def test_parts_that_torch_compiles_are_left_between_them(walk: Walk, toy: nn.Module) -> None:
    network = toy_network(toy)
    x = x_of()
    expected = [output.detach() for output in network(x)]
    for index in (1, 2):
        toy.blocks[index][0].compile(backend="eager")
    with torch.no_grad():
        assert_same(visited(network, x, walk), expected)
        assert_same(visited(network, x, walk, 1), expected[:2])


@both
def test_rows_that_are_kept_go_on_alone(toy: nn.Module, toy_input: Tensor, walk: Walk) -> None:
    network = toy_network(toy).eval()
    expected = network(toy_input)
    rows = torch.tensor([2, 0])
    run = network.exits(toy_input)
    outputs: list[Tensor] = []

    def visit(exit: Exit) -> bool:
        outputs.append(exit.output())
        if exit.index == 0:
            run.keep(rows)
        return False

    walk(run, visit)
    assert outputs[0].shape[0] == len(toy_input)
    torch.testing.assert_close(outputs[1], expected[1][rows])
    torch.testing.assert_close(outputs[2], expected[2][rows])
    with pytest.raises(NetworkError, match="between two exits"):
        run.keep(rows)


# --- greenlets that are kept ----------------------------------------------------------------------


def test_the_next_paused_run_uses_the_same_greenlet_in_its_own_context(
    toy: nn.Module, toy_input: Tensor
) -> None:
    variable = contextvars.ContextVar("variable", default=0)
    seen: list[int] = []
    toy.blocks[0].register_forward_hook(lambda *_: seen.append(variable.get()))
    network = toy_network(toy)
    used = []
    for value in (1, 2):
        variable.set(value)
        run = network.exits(toy_input)
        next(run)
        used.append(run._runner)
        run.close()
    assert used[0] is used[1]
    assert seen[-2:] == [1, 2]


def test_a_thread_that_ends_ends_its_kept_greenlet(toy: nn.Module, toy_input: Tensor) -> None:
    before = paused_runs()

    def run() -> Any:
        list(toy_network(toy).exits(toy_input))
        return weakref.ref(_thread.idle)

    kept = in_thread(run)
    gc.collect()
    assert kept() is None
    assert paused_runs() == before


# --- runners --------------------------------------------------------------------------------------


class Drawing(Policy):
    """Stops at random exits, differently in every run.

    Fails where it is told to.
    """

    num_exits = 3

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.fails = False

    def looks_at(self, exit: int) -> bool:
        return exit < 2

    def stops(self, exit: int, outputs: Any = None, pooled: Any = None) -> Tensor:
        if self.fails:
            raise ZeroDivisionError
        return torch.rand(len(outputs), generator=self.generator) < 0.5


@pytest.mark.parametrize("batch", [1, 5])
def test_runner_answers_straight_as_it_does_paused(toy: nn.Module, batch: int) -> None:
    network = toy_network(toy).eval()
    policy = Drawing()
    costs = profile(network, x_of(1), batch_sizes=[1, 5], repeats=3)
    runner = Runner(network, costs, policy, compaction="always")
    found = []
    for once in (True, False):
        policy.generator.manual_seed(3)
        torch.manual_seed(5)
        for _ in range(30):
            x = x_of(batch)
            if once:
                answer = runner.run(x)
            else:
                with ContractRun(runner, x) as opened:
                    answer = opened.run()
            found.append((answer.exits, answer.stopped_by, answer.output))
    assert len({exits for exits, _, _ in found}) > 2
    for (exits, why, output), (others, other_why, other) in zip(
        found[:30], found[30:], strict=True
    ):
        assert (exits, why) == (others, other_why)
        torch.testing.assert_close(output, other, rtol=0, atol=0)


def test_an_error_of_the_policy_ends_the_run_and_the_runner_goes_on(
    toy: nn.Module, toy_input: Tensor
) -> None:
    network = toy_network(toy).eval()
    policy = Drawing()
    runner = Runner(network, profile(network, toy_input, batch_sizes=[5], repeats=3), policy)
    policy.fails = True
    before = paused_runs()
    with pytest.raises(ZeroDivisionError):
        runner.run(toy_input)
    assert (paused_runs(), _thread.stack) == (before, [])
    policy.fails = False
    assert runner.run(toy_input).output.shape == (len(toy_input), CLASSES)


def test_an_answer_says_where_its_time_went(toy: nn.Module, toy_input: Tensor) -> None:
    network = toy_network(toy).eval()
    policy = ThresholdPolicy(score="margin", thresholds=(2.0, 2.0, -float("inf")))
    runner = Runner(network, profile(network, toy_input, batch_sizes=[5], repeats=3), policy)
    answer = runner.run(toy_input)
    assert answer.spent is not None
    parts = answer.spent[1:4]
    assert min(parts) > 0.0
    assert sum(parts) < answer.elapsed_s
    assert answer.spent.first_s > 0.0
