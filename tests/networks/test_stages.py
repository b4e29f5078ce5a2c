"""The mechanism that pauses an untouched forward, and one test per trap it is known to have."""

import contextlib
import contextvars
import copy
import functools
import gc
import itertools
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import greenlet
import pytest
import torch
from torch import Tensor, nn

from impatient.errors import ExitNotReached, ExitPassed, NetworkError
from impatient.networks import MultiExitNetwork, Walk, attach_exits
from impatient.networks.describe import stage_facts
from impatient.networks.stages import Cut, _Forward, _taps, call_model, first_tensor, output_tensor

WIDTH = 8
CLASSES = 3


@pytest.fixture(scope="module", autouse=True)
def _collecting_is_quick() -> Iterator[None]:
    gc.collect()
    # what the libraries made at import is left out of every collection and count here
    gc.freeze()
    yield
    gc.unfreeze()


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def x_of(batch: int = 4) -> Tensor:
    return torch.randn(batch, WIDTH)


def attach(
    model: nn.Module, *after: str, heads: Any = "linear", example: Any = None
) -> MultiExitNetwork:
    return attach_exits(
        model, after=list(after), heads=heads, example=x_of(1) if example is None else example
    )


def staged(network: MultiExitNetwork, x: Any) -> list[Tensor]:
    return [exit.output() for exit in network.exits(x)]


def assert_same(left: Any, right: Any) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        # two constants would be equal for nothing
        assert a.std() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def toy_network(toy: nn.Module, **options: Any) -> MultiExitNetwork:
    return attach(toy, "blocks.0", "blocks.2", **options)


# --- the iterator ---------------------------------------------------------------------------------


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
    assert repr(exit) == "Exit(index=0, features=(5, 8), output=not computed)"
    exit.output()
    assert "output=computed" in repr(exit)


def test_backbone_called_by_itself_is_not_disturbed_by_its_hooks(
    toy: nn.Module, toy_input: Tensor
) -> None:
    before = toy(toy_input)
    network = toy_network(toy)
    assert network.backbone is toy
    assert_same([toy(toy_input)], [before])


# --- (a) modes ------------------------------------------------------------------------------------

MODES: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "half_autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
    "uncached_autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False),
}
some_mode = pytest.mark.parametrize("mode", [name for name in MODES if name != "nothing"])
every_mode = pytest.mark.parametrize("mode", MODES)


def modes() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
    )


class Modal(nn.Module):
    """Runs two of its blocks in a mode of its own, and writes down in which modes each part found
    itself.
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.before = linear()
        self.inside = linear()
        self.also_inside = linear()
        self.after = linear()
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self._note(self.before(x))
        with MODES[self.mode]():
            x = self._note(self.inside(x))
            x = self._note(self.also_inside(x))
        x = self._note(self.after(x.clone().float()))
        return self.classifier(x)

    def _note(self, x: Tensor) -> Tensor:
        self.seen.append(modes())
        return x


@functools.cache
def modal(mode: str) -> MultiExitNetwork:
    return attach(Modal(mode), "before", "inside", "also_inside", "after")


def plainly_seen(network: MultiExitNetwork, x: Tensor) -> tuple[list[Any], Tensor]:
    network.backbone.seen.clear()
    output = network.backbone(x)
    return list(network.backbone.seen), output


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


# --- (b) abandoned runs ---------------------------------------------------------------------------


class Activation:
    """Something large in a model's forward whose life can be watched."""


class Unwinding(nn.Module):
    """Notes that it was unwound, and whether what it holds in forward is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.a = linear()
        self.b = linear()
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.held: list[weakref.ref[Any]] = []
        self.unwound = 0

    def forward(self, x: Tensor) -> Tensor:
        activation = Activation()
        inner = x * 2
        self.held += [weakref.ref(activation), weakref.ref(inner)]
        try:
            x = self.a(inner)
            x = self.b(x)
        finally:
            self.unwound += 1
        return self.classifier(x)


def unwinding() -> MultiExitNetwork:
    network = attach(Unwinding(), "a", "b")
    network.backbone.unwound = 0
    network.backbone.held.clear()
    return network


def paused_runs() -> int:
    gc.collect()
    return sum(issubclass(type(entry), _Forward) and not entry.dead for entry in gc.get_objects())


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(entry), Tensor) for entry in gc.get_objects())


def by_break(network: MultiExitNetwork, x: Tensor) -> None:
    for _ in network.exits(x):
        break


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


def test_paused_run_at_the_end_of_the_program_is_silent() -> None:
    program = """
import torch
from torch import nn
from impatient.networks import attach_exits
network = attach_exits(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), example=torch.zeros(1, 8), after=["0"])
walk = network.exits(torch.zeros(1, 8))
exit = next(walk)
print("paused")
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "paused\n", "")


# --- (c) other threads ----------------------------------------------------------------------------


def in_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the exception it raises, on a thread of its own that must end."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive(), "it hangs"
    return results.pop()


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
    def begun() -> Walk:
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


# --- (d) in-place operations after a cut ----------------------------------------------------------


def in_place(inplace: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(4 * 4 * 4, CLASSES)
    )


@pytest.fixture
def overwriting() -> tuple[MultiExitNetwork, Tensor, Tensor]:
    """A network that overwrites its exit's features, an input, and the right output of that exit."""
    x = torch.randn(5, 2, 6, 6)
    network = attach(in_place(), "0", example=x)
    with torch.no_grad():
        features = network.backbone[0](x)
        right = network.heads[0](features)
        wrong = network.heads[0](features.relu())
    assert (right - wrong).abs().min() > 1e-3
    return network, x, right


def test_output_asked_at_once_is_right(
    overwriting: tuple[MultiExitNetwork, Tensor, Tensor],
) -> None:
    network, x, right = overwriting
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_same([staged(network, x)[0]], [right])


def test_output_asked_at_once_can_be_read_again_later(
    overwriting: tuple[MultiExitNetwork, Tensor, Tensor],
) -> None:
    network, x, right = overwriting
    walk = network.exits(x)
    exit = next(walk)
    exit.output()
    list(walk)
    assert_same([exit.output()], [right])


def test_output_asked_after_the_run_went_on_is_refused(
    overwriting: tuple[MultiExitNetwork, Tensor, Tensor],
) -> None:
    network, x, _ = overwriting
    early, _ = network.exits(x)
    with pytest.raises(ExitPassed, match=r"exit 0 was passed \(the run is at exit 1\).*keep=True"):
        early.output()


def test_kept_features_give_the_right_output_later(
    overwriting: tuple[MultiExitNetwork, Tensor, Tensor],
) -> None:
    network, x, right = overwriting
    early, last = network.exits(x, keep=True)
    assert_same([early.output()], [right])
    assert_same([last.output()], [network.backbone(x)])


def test_forward_gives_the_right_output_in_training(
    overwriting: tuple[MultiExitNetwork, Tensor, Tensor],
) -> None:
    network, x, right = overwriting
    assert_same(network.train()(x), [right, network.backbone(x)])


def test_gradients_are_those_of_a_model_that_does_not_overwrite(
    overwriting: tuple[MultiExitNetwork, Tensor, Tensor],
) -> None:
    network, x, _ = overwriting
    careful = attach(in_place(inplace=False), "0", example=x)
    careful.load_state_dict(network.state_dict())
    for run in (
        lambda n: n(x),
        lambda n: staged(n, x),
        lambda n: [e.output() for e in list(n.exits(x, keep=True))],
    ):
        for one in (network, careful):
            one.zero_grad()
            sum(output.square().sum() for output in run(one)).backward()
        for ours, truth in zip(network.parameters(), careful.parameters(), strict=True):
            assert truth.grad.abs().sum() > 0
            torch.testing.assert_close(ours.grad, truth.grad)


class FailsLate(nn.Module):
    """Overwrites its features and then fails."""

    def __init__(self) -> None:
        super().__init__()
        self.block = linear()
        self.relu = nn.ReLU(inplace=True)
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.block(x))
        if self.fails:
            raise MemoryError("later stage")
        return self.classifier(x)


def test_output_after_a_later_stage_failed_is_refused_unless_kept() -> None:
    network = attach(FailsLate(), "block")
    x = x_of()
    right = network(x)[0]
    network.backbone.fails = True
    for keep in (False, True):
        walk = network.exits(x, keep=keep)
        exit = next(walk)
        with pytest.raises(MemoryError):
            next(walk)
        if keep:
            assert_same([exit.output()], [right])
        else:
            with pytest.raises(ExitPassed, match="failed in a later stage"):
                exit.output()


# --- (e) heads ------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A head that counts its calls and notes the modes it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)
        self.seen: list[Any] = []

    def forward(self, features: Tensor) -> Tensor:
        self.seen.append(modes())
        return self.layer(features)


@pytest.fixture
def counted(toy: nn.Module) -> MultiExitNetwork:
    network = toy_network(toy, heads=lambda features, classes: Counting())
    for head in network.heads:
        head.seen.clear()
    return network


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


# --- (f) context variables ------------------------------------------------------------------------

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


# --- (g) several runs at once ---------------------------------------------------------------------


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


# --- (h) exceptions -------------------------------------------------------------------------------


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
    assert _taps.stack == []
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


# --- (i) a network inside a model -----------------------------------------------------------------


class Containing(nn.Module):
    """A model that uses a network with exits in its own forward, in a way of its own."""

    def __init__(
        self, inner: MultiExitNetwork, use: Callable[[MultiExitNetwork, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.before = linear()
        self.inner = inner
        self.after = nn.Linear(CLASSES, WIDTH)
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        x = self.after(self.use(self.inner, x))
        return self.classifier(x)


def last_of_forward(network: MultiExitNetwork, x: Tensor) -> Tensor:
    return network(x)[-1]


def sum_of_exits(network: MultiExitNetwork, x: Tensor) -> Tensor:
    return sum(staged(network, x))


def first_exit(network: MultiExitNetwork, x: Tensor) -> Tensor:
    return next(network.exits(x)).output()


def just_the_backbone(network: MultiExitNetwork, x: Tensor) -> Tensor:
    return network.backbone(x)


uses = pytest.mark.parametrize(
    "use", [last_of_forward, sum_of_exits, first_exit, just_the_backbone]
)


@uses
def test_network_inside_a_model_with_exits_runs_as_it_does_alone(
    toy: nn.Module, use: Callable[..., Tensor]
) -> None:
    inner = toy_network(toy)
    model = Containing(inner, use)
    x = x_of()
    plain = model(x)
    outer = attach(model, "before", "after")
    before = model.before(x)
    after = model.after(use(inner, before))
    by_hand = [outer.heads[0](before), outer.heads[1](after), plain]
    assert_same(outer(x), by_hand)
    assert_same(staged(outer, x), by_hand)


def test_outer_run_may_pause_while_an_inner_one_is_paused(toy: nn.Module) -> None:
    class Alternating(Containing):
        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            for exit in self.inner.exits(x):
                # the outer cut
                x = self.after(exit.output())
            return self.classifier(x)

    model = Alternating(toy_network(toy), last_of_forward)
    x = x_of()
    plain = model(x)
    outer = attach(model, "before", "after@0", "after@2")
    before = paused_runs()
    assert_same([staged(outer, x)[-1]], [plain])
    assert_same(staged(outer, x), outer(x))
    walk = outer.exits(x)
    next(walk), next(walk)
    assert paused_runs() == before + 2
    walk.close()
    assert paused_runs() == before


# --- (j) copies -----------------------------------------------------------------------------------


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


# --- (k) control flow that depends on the data ----------------------------------------------------


class Halting(nn.Module):
    """Calls one block until the input has shrunk enough, then perhaps a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.block = linear()
        self.late = linear()
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        times = int(x[0, 0])
        while times > 0:
            x = torch.tanh(self.block(x))
            times = times - 1
        if x.shape[0] > 2:
            x = self.late(x)
        return self.classifier(x)


def halting_input(times: int, batch: int = 4) -> Tensor:
    x = x_of(batch)
    x[0, 0] = times
    return x


@pytest.fixture
def halting() -> MultiExitNetwork:
    return attach(Halting(), "block@0", "block@1", "block@3", "late", example=halting_input(4))


@pytest.mark.parametrize(
    ("times", "batch", "reached"),
    [
        (4, 4, [0, 1, 2, 3, 4]),
        (9, 4, [0, 1, 2, 3, 4]),
        (3, 4, [0, 1, 3, 4]),
        (1, 4, [0, 3, 4]),
        (0, 4, [3, 4]),
        (4, 2, [0, 1, 2, 4]),
        (0, 1, [4]),
    ],
)
def test_exits_an_input_never_comes_to_are_left_out(
    halting: MultiExitNetwork, times: int, batch: int, reached: list[int]
) -> None:
    x = halting_input(times, batch)
    exits = [(exit.index, exit.output()) for exit in halting.exits(x)]
    assert [index for index, _ in exits] == reached
    assert_same([exits[-1][1]], [halting.backbone(x)])


def test_exit_after_the_second_call_sees_the_second_calls_output(halting: MultiExitNetwork) -> None:
    x = halting_input(4)
    block = halting.backbone.block
    first = block(x)
    features = [exit.features.clone() for exit in halting.exits(x)]
    assert_same(features[:2], [first, block(first.tanh())])


def test_forward_names_the_exits_that_were_not_reached(halting: MultiExitNetwork) -> None:
    with pytest.raises(ExitNotReached, match="never came to block@1, block@3;"):
        halting(halting_input(1))
    assert len(halting(halting_input(5))) == 5


def test_call_numbers_begin_anew_with_each_run(halting: MultiExitNetwork) -> None:
    x = halting_input(4)
    by_break(halting, x)
    halting(x)
    halting.backbone(x)
    assert_same(staged(halting, x), halting(x))


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("layer1", ("layer1", None)),
        ("a.b@2", ("a.b", 2)),
        ("a@0", ("a", 0)),
        ("odd@name", ("odd@name", None)),
        ("@1", ("", 1)),
    ],
)
def test_cut_is_read_from_text(text: str, cut: tuple[str, int | None]) -> None:
    assert Cut.parse(text) == cut


def test_cut_shows_the_call_only_when_it_is_not_the_first() -> None:
    assert [str(Cut("a")), str(Cut("a", 2))] == ["a", "a@2"]


# --- (l) inputs and outputs that are not one tensor -----------------------------------------------


@dataclass
class Answer:
    loss: Tensor | None
    logits: Tensor


@dataclass
class Hidden:
    note: str
    hidden: Tensor


class Shaped(nn.Module):
    """Takes two tensors, one by keyword, and gives its output in the form asked for."""

    def __init__(
        self, form: Callable[[Tensor], Any], inner_form: Callable[[Tensor], Any] = lambda x: x
    ) -> None:
        super().__init__()
        self.block = Wrapped(inner_form)
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.form = form

    def forward(self, first: Tensor, second: Tensor | None = None) -> Any:
        features = self.block(first if second is None else first - second)
        return self.form(self.classifier(first_tensor(features)))


class Wrapped(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = linear()
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.layer(x))


def unchanged(x: Tensor) -> Tensor:
    return x


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": unchanged,
    "tuple": lambda x: (x, None),
    "late in a tuple": lambda x: (None, "note", x, x * 2),
    "dict with logits": lambda x: {"loss": x.sum(), "logits": x},
    "dict without": lambda x: {"note": 1, "scores": x},
    "dataclass with logits": lambda x: Answer(x.sum(), x),
}


@pytest.mark.parametrize("form", FORMS)
def test_output_is_found_in_every_form(form: str) -> None:
    model = Shaped(FORMS[form])
    x = x_of()
    network = attach(model, "block")
    truth = model.classifier(model.block(x))
    assert_same([network(x)[-1], staged(network, x)[-1]], [truth, truth])
    assert [fact.features for fact in stage_facts(network, x)] == [(4, WIDTH), (4, CLASSES)]


@pytest.mark.parametrize(
    "form",
    [
        unchanged,
        lambda x: (x, None),
        lambda x: [None, x],
        lambda x: {"hidden": x},
        lambda x: Hidden("", x),
    ],
)
def test_features_are_found_in_every_form(form: Callable[[Tensor], Any]) -> None:
    model = Shaped(unchanged, form)
    x = x_of()
    network = attach(model, "block")
    truth = network.heads[0](model.block.layer(x))
    assert_same([network(x)[0], staged(network, x)[0]], [truth, truth])


def test_mappings_are_passed_as_keywords_and_sequences_as_positions() -> None:
    model = Shaped(unchanged)
    first = x_of()
    second = x_of()
    named = {"second": second, "first": first}
    network = attach(model, "block", example=named)
    truth = [network.heads[0](model.block(first - second)), model(first, second)]
    for x in (named, (first, second), [first, second]):
        assert_same(staged(network, x), truth)
        assert_same(network(x), truth)


def test_auto_placement_works_on_mappings(toy: nn.Module, toy_input: Tensor) -> None:
    network = attach_exits(toy, example={"x": toy_input}, count=3)
    assert_same(staged(network, {"x": toy_input}), network(toy_input))


def test_output_without_a_tensor_is_refused() -> None:
    with pytest.raises(NetworkError, match="without a tensor"):
        attach(Shaped(lambda x: {"note": 1}), "block")
    with pytest.raises(NetworkError, match="int without a tensor"):
        output_tensor(3)


def test_call_model_passes_one_tensor_as_it_is() -> None:
    assert call_model(lambda x: x, 7) == 7
    assert call_model(lambda *xs: xs, (1, 2)) == (1, 2)
    assert call_model(lambda **xs: xs, {"a": 1}) == {"a": 1}
