"""Interruptible runs: whoever asks gets the latest answer at once, whatever the stage in flight is
doing.
"""

import gc
import math
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fakes
from fakes import (
    PATIENCE_S,
    WHOLE,
    FakeNetwork,
    FakeRun,
    Hold,
    X,
    costs_of,
    elsewhere,
    hold,
    runner_of,
    wait_until,
    workers,
)
from impatient.clock import Deadline, FakeClock
from impatient.errors import NoAnswerInTime, RunError
from impatient.networks import attach_exits
from impatient.policies import ThresholdPolicy
from impatient.runtime import InterruptibleRun, Runner, interruptible, profile
from toys import ToyBackbone

pytestmark = pytest.mark.usefixtures("no_thread_stays")


def wait_for_waiters(run: InterruptibleRun, count: int) -> None:
    wait_until(lambda: len(run._changed._waiters) == count)  # type: ignore[attr-defined]


# --- interrupt ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reached", [1, 2, 3])
def test_an_interrupt_gives_the_latest_answer_while_the_next_stage_is_stuck(
    network: FakeNetwork, reached: int
) -> None:
    stuck = hold(network, f"stage {reached}")
    with runner_of(network).start(X) as run:
        stuck.wait_reached()
        answer = run.interrupt()
        assert not stuck.released
        stuck.release()
    assert (answer.exit, answer.stopped_by, answer.deadline_met) == (reached - 1, "interrupt", True)
    # every head on the way is paid
    assert answer.elapsed_s == reached * 1.5
    assert torch.equal(answer.output, network.outputs[reached - 1])


def test_a_stage_that_nobody_waits_for_ends_the_run_without_its_head(network: FakeNetwork) -> None:
    stuck = hold(network, "stage 1")
    run = runner_of(network).start(X)
    stuck.wait_reached()
    run.interrupt()
    stuck.release()
    network.wait_closed()
    assert network.ran == ["stage 0", "head 0", "stage 1"]


def test_an_interrupt_before_the_first_exit_waits_for_it(network: FakeNetwork) -> None:
    stuck = hold(network, "stage 0")
    run = runner_of(network).start(X)
    answer = elsewhere(run.interrupt)
    wait_for_waiters(run, 1)
    assert not answer.done()
    stuck.release()
    assert answer.result(PATIENCE_S).exit == 0
    network.wait_closed()
    assert network.ran == ["stage 0", "head 0"]


def test_when_told_to_an_interrupt_before_the_first_exit_raises_at_once(
    network: FakeNetwork,
) -> None:
    stuck = hold(network, "stage 0")
    run = runner_of(network, when_late="raise").start(X)
    stuck.wait_reached()
    for _ in range(2):
        with pytest.raises(NoAnswerInTime, match="no exit had answered"):
            run.interrupt()
    stuck.release()
    network.wait_closed()
    assert network.ran == ["stage 0"]


def test_two_interrupts_give_the_same_answer(network: FakeNetwork) -> None:
    stuck = hold(network, "stage 2")
    run = runner_of(network).start(X)
    stuck.wait_reached()
    first = run.interrupt()
    stuck.release()
    network.wait_closed()
    assert run.interrupt() is first
    assert run.result() is first
    assert run.latest() is first


def test_interrupts_from_several_threads_give_the_same_answer(network: FakeNetwork) -> None:
    stuck = hold(network, "stage 0")
    run = runner_of(network).start(X)
    answers = [elsewhere(run.interrupt) for _ in range(3)]
    wait_for_waiters(run, 3)
    stuck.release()
    assert len({id(answer.result(PATIENCE_S)) for answer in answers}) == 1


def test_an_interrupt_after_the_end_gives_the_final_answer(network: FakeNetwork) -> None:
    run = runner_of(network).start(X)
    network.wait_closed()
    answer = run.interrupt()
    assert (answer.exit, answer.stopped_by, answer.elapsed_s) == (3, "final", 6.0)
    assert network.ran == WHOLE


def test_an_interrupt_releases_who_waits_for_the_result(network: FakeNetwork) -> None:
    stuck = hold(network, "stage 1")
    run = runner_of(network).start(X)
    stuck.wait_reached()
    result = elsewhere(run.result)
    wait_for_waiters(run, 1)
    answer = run.interrupt()
    assert result.result(PATIENCE_S) is answer
    assert not stuck.released
    stuck.release()


# --- result and latest ----------------------------------------------------------------------------


def test_without_a_deadline_the_result_is_the_final_answer(network: FakeNetwork) -> None:
    answer = runner_of(network).start(X).result()
    assert (answer.exit, answer.stopped_by, answer.deadline_met) == (3, "final", True)
    assert network.ran == WHOLE


def test_at_the_deadline_the_result_is_there_while_a_stage_overruns(
    network: FakeNetwork, clock: FakeClock
) -> None:
    stuck = hold(network, "stage 1")
    run = runner_of(network).start(X, deadline=Deadline.after(3.0, clock))
    stuck.wait_reached()
    result = elsewhere(run.result)
    wait_for_waiters(run, 1)
    # 2.5: not yet
    clock.advance(1.0)
    assert not result.done()
    clock.advance(0.5)
    answer = result.result(PATIENCE_S)
    assert not stuck.released
    assert (answer.exit, answer.stopped_by, answer.deadline_met, answer.elapsed_s) == (
        0,
        "deadline",
        True,
        1.5,
    )
    stuck.release()
    network.wait_closed()
    assert network.ran == ["stage 0", "head 0", "stage 1"]


def test_an_answer_that_came_too_late_does_not_displace_one_in_time(
    network: FakeNetwork, clock: FakeClock
) -> None:
    network.heads_s[1] = 9.0
    run = runner_of(network).start(X, deadline=Deadline.after(3.0, clock))
    # nobody was waiting when the deadline came
    network.wait_closed()
    answer = run.result()
    assert (answer.exit, answer.stopped_by, answer.deadline_met) == (0, "deadline", True)
    assert network.ran == ["stage 0", "head 0", "stage 1", "head 1"]


def test_an_answer_at_the_very_deadline_is_in_time(network: FakeNetwork, clock: FakeClock) -> None:
    run = runner_of(network).start(X, deadline=Deadline.after(3.0, clock))
    network.wait_closed()
    answer = run.interrupt()
    assert (answer.exit, answer.stopped_by, answer.deadline_met, answer.elapsed_s) == (
        1,
        "deadline",
        True,
        3.0,
    )


def test_past_its_deadline_a_run_begins_no_stage(network: FakeNetwork, clock: FakeClock) -> None:
    runner_of(network).start(X, deadline=Deadline.after(3.5, clock))
    network.wait_closed()
    assert network.ran == ["stage 0", "head 0", "stage 1", "head 1", "stage 2"]


def test_a_deadline_before_the_first_exit_gets_it_late(
    network: FakeNetwork, clock: FakeClock
) -> None:
    answer = runner_of(network).start(X, deadline=Deadline.after(1.0, clock)).result()
    assert (answer.exit, answer.stopped_by, answer.deadline_met) == (0, "deadline", False)
    network.wait_closed()
    assert network.ran == ["stage 0", "head 0"]


def test_when_told_to_a_deadline_before_the_first_exit_raises_at_the_deadline(
    network: FakeNetwork, clock: FakeClock
) -> None:
    stuck = hold(network, "stage 0")
    run = runner_of(network, when_late="raise").start(X, deadline=Deadline.after(1.0, clock))
    stuck.wait_reached()
    clock.advance(1.0)
    with pytest.raises(NoAnswerInTime, match=r"after 1000\.000 ms"):
        run.result()
    stuck.release()


def test_latest_shows_what_is_there_and_stops_nothing(network: FakeNetwork) -> None:
    first = hold(network, "stage 0")
    second = hold(network, "stage 1")
    run = runner_of(network).start(X)
    first.wait_reached()
    assert run.latest() is None
    first.release()
    second.wait_reached()
    latest = run.latest()
    assert latest is not None
    assert latest.exit == 0
    second.release()
    assert run.result().exit == 3


# --- policies -------------------------------------------------------------------------------------


def test_a_policy_stops_a_run(clock: FakeClock) -> None:
    outputs = torch.tensor([[[0.0, 0.0]], [[9.0, 0.0]], [[9.0, 0.0]]])
    network = FakeNetwork(clock, [1.0] * 3, [0.5] * 3, outputs)
    policy = ThresholdPolicy(score="max_probability", thresholds=(0.9, 0.9, -math.inf))
    answer = runner_of(network, policy=policy).start(X).result()
    assert (answer.exit, answer.stopped_by) == (1, "policy")
    network.wait_closed()
    assert network.ran == ["stage 0", "head 0", "stage 1", "head 1"]


@pytest.mark.parametrize("seed", range(5))
def test_each_sample_keeps_the_output_of_the_exit_where_it_stopped(
    clock: FakeClock, seed: int
) -> None:
    outputs = 3 * torch.randn(3, 6, 3, generator=torch.Generator().manual_seed(seed))
    policy = ThresholdPolicy(score="margin", thresholds=(0.6, 0.6, -math.inf))
    answer = (
        runner_of(FakeNetwork(clock, [1.0] * 3, outputs=outputs), policy=policy)
        .start(torch.zeros(6, 1))
        .result()
    )
    exits = policy.exits_of(outputs)
    assert answer.exits == tuple(exits.tolist())
    assert torch.equal(answer.output, outputs[exits, torch.arange(6)])


def test_an_interrupted_batch_has_the_latest_output_of_samples_that_go_on(clock: FakeClock) -> None:
    outputs = torch.tensor(
        [[[9.0, 0.0], [0.0, 0.0]], [[8.0, 0.0], [0.1, 0.0]], [[7.0, 0.0], [0.2, 0.0]]]
    )
    network = FakeNetwork(clock, [1.0] * 3, outputs=outputs)
    policy = ThresholdPolicy(score="max_probability", thresholds=(0.9, 0.9, -math.inf))
    stuck = hold(network, "stage 2")
    with runner_of(network, policy=policy).start(torch.zeros(2, 1)) as run:
        stuck.wait_reached()
        answer = run.interrupt()
        stuck.release()
    assert (answer.exits, answer.exit) == ((0, 1), 1)
    assert torch.equal(answer.output, torch.stack([outputs[0, 0], outputs[1, 1]]))


# --- leaving, closing, queueing -------------------------------------------------------------------


def test_leaving_the_block_abandons_the_run_at_its_next_exit(network: FakeNetwork) -> None:
    stuck = hold(network, "stage 1")
    with runner_of(network).start(X):
        stuck.wait_reached()
    stuck.release()
    network.wait_closed()
    assert network.ran == ["stage 0", "head 0", "stage 1"]


def test_an_answer_may_be_asked_for_after_leaving_the_block(network: FakeNetwork) -> None:
    stuck = hold(network, "stage 1")
    with runner_of(network).start(X) as run:
        stuck.wait_reached()
    assert run.result().exit == run.interrupt().exit == 0
    assert not stuck.released
    stuck.release()


def test_a_run_left_before_its_first_exit_has_no_answer(network: FakeNetwork) -> None:
    stuck = hold(network, "stage 0")
    with runner_of(network).start(X) as run:
        stuck.wait_reached()
    stuck.release()
    with pytest.raises(RunError, match="closed before its first exit"):
        run.result()
    assert network.ran == ["stage 0"]


def test_a_second_run_queues_and_its_deadline_ticks_meanwhile(
    network: FakeNetwork, clock: FakeClock
) -> None:
    stuck = hold(network, "stage 0")
    runner = runner_of(network)
    first = runner.start(X)
    stuck.wait_reached()
    second = runner.start(X, deadline=Deadline.after(2.0, clock))
    clock.advance(3.0)
    stuck.release()
    assert first.result().exit == 3
    answer = second.result()
    assert (answer.exit, answer.deadline_met) == (0, False)
    # the 3 above, the first run's 6, and its own 1.5
    assert answer.elapsed_s == 10.5
    network.wait_closed()
    network.wait_closed()
    assert network.ran == [*WHOLE, "stage 0", "head 0"]


def test_a_run_that_was_left_in_the_queue_never_begins(network: FakeNetwork) -> None:
    stuck = hold(network, "stage 0")
    runner = runner_of(network)
    first = runner.start(X)
    stuck.wait_reached()
    with runner.start(X):
        pass
    stuck.release()
    first.result()
    assert runner.start(X).result().exit == 3
    assert network.ran == [*WHOLE, *WHOLE]


def test_runs_on_one_runner_answer_in_order_from_one_thread(network: FakeNetwork) -> None:
    names = []
    network.at["stage 0"] = lambda: names.append(threading.get_ident())
    runner = runner_of(network)
    runs = [runner.start(X) for _ in range(5)]
    assert [run.result().exit for run in runs] == [3] * 5
    assert len(set(names)) == 1
    assert network.ran == WHOLE * 5


def test_runs_begun_from_several_threads_share_one_worker(network: FakeNetwork) -> None:
    runner = runner_of(network)
    stuck = hold(network, "stage 0")
    begun = [elsewhere(lambda: runner.start(X)) for _ in range(8)]
    runs = [future.result(PATIENCE_S) for future in begun]
    assert len(workers()) == 1
    stuck.release()
    assert {run.result().exit for run in runs} == {3}


def test_closing_ends_the_run_in_flight_at_its_next_exit_and_the_thread(
    network: FakeNetwork,
) -> None:
    stuck = hold(network, "stage 1")
    runner = runner_of(network)
    run = runner.start(X)
    queued = runner.start(X)
    stuck.wait_reached()
    (thread,) = workers()
    runner.close()
    # at once, with the stage still stuck
    assert run.result().exit == 0
    assert run.result().stopped_by == "interrupt"
    stuck.release()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert network.ran == ["stage 0", "head 0", "stage 1"]
    with pytest.raises(RunError, match="closed before its first exit"):
        queued.result()


def test_a_closed_runner_can_be_closed_again_and_started_again(network: FakeNetwork) -> None:
    runner = runner_of(network)
    runner.close()
    with runner:
        assert runner.start(X).result().exit == 3
    runner.close()
    assert runner.start(X).result().exit == 3
    assert runner.run(X).exit == 3


def test_a_run_begun_while_a_closed_one_is_still_stuck_does_not_wait_for_it(
    network: FakeNetwork,
) -> None:
    stuck = hold(network, "stage 1")
    runner = runner_of(network)
    runner.start(X)
    stuck.wait_reached()
    runner.close()
    network.at.clear()
    assert runner.start(X).result().exit == 3
    stuck.release()


# --- errors ---------------------------------------------------------------------------------------


def fail() -> None:
    raise ValueError("the model is broken")


@pytest.mark.parametrize("part", ["stage 0", "head 0", "stage 2"])
@pytest.mark.parametrize("ask", [InterruptibleRun.result, InterruptibleRun.interrupt])
def test_an_error_in_the_model_comes_out_and_the_worker_survives_it(
    network: FakeNetwork, part: str, ask: object
) -> None:
    network.at[part] = fail
    runner = runner_of(network)
    run = runner.start(X)
    network.wait_closed()
    for _ in range(2):
        with pytest.raises(ValueError, match="the model is broken"):
            ask(run)  # type: ignore[operator]
    network.at.clear()
    assert runner.start(X).result().exit == 3


def test_when_late_runs_raise_an_error_in_the_model_is_still_told(network: FakeNetwork) -> None:
    network.at["stage 0"] = fail
    run = runner_of(network, when_late="raise").start(X)
    network.wait_closed()
    with pytest.raises(ValueError, match="the model is broken"):
        run.result()


def test_an_error_after_the_answer_was_given_changes_nothing(network: FakeNetwork) -> None:
    stuck = hold(network, "stage 1")
    run = runner_of(network).start(X)
    stuck.wait_reached()
    answer = run.interrupt()
    network.at["stage 2"] = fail
    stuck.release()
    network.wait_closed()
    assert run.interrupt() is answer


def test_an_error_past_the_deadline_does_not_take_back_the_answer(
    network: FakeNetwork, clock: FakeClock
) -> None:
    def overrun_and_fail() -> None:
        clock.advance(9.0)
        fail()

    network.at["stage 1"] = overrun_and_fail
    run = runner_of(network).start(X, deadline=Deadline.after(3.0, clock))
    network.wait_closed()
    assert (run.result().exit, run.result().stopped_by) == (0, "deadline")


def test_an_error_in_a_contract_run_comes_out_at_once(network: FakeNetwork) -> None:
    network.at["stage 1"] = fail
    with pytest.raises(ValueError, match="the model is broken"):
        runner_of(network).run(X)


class ScalesInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(8, 3)
        self.at_the_end = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.classifier(x).mul_(2.0)
        self.at_the_end()
        return scaled


def test_a_posted_answer_stays_what_it_was_when_a_later_stage_writes_over_it(
    clock: FakeClock,
) -> None:
    model = ScalesInPlace().eval()
    network = attach_exits(
        model, after=["classifier"], heads=[lambda *_: nn.Identity()], example=torch.zeros(1, 8)
    )
    model.at_the_end = stuck = Hold()
    x = torch.randn(1, 8)
    with Runner(network, costs_of([1.0, 1.0]), any_profile=True, clock=clock).start(x) as run:
        stuck.wait_reached()
        answer = run.interrupt()
        stuck.release()
    torch.testing.assert_close(answer.output, model.classifier(x), rtol=0, atol=0)


# --- cancelling a stage in flight -----------------------------------------------------------------


class Cancelled(Exception):
    """What an engine raises in the thread whose call was ended."""


class CancellableRun(FakeRun):
    """The run of a fake network whose stuck stage gives up when told to."""

    def __init__(self, network: "CancellableNetwork") -> None:
        super().__init__(network)
        self.network = network

    def cancel(self) -> None:
        self.network.cancelled.append(self)
        self.network.give_up.set()


class CancellableNetwork(FakeNetwork):
    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock, [1.0] * 4, [0.5] * 4)
        self.give_up = threading.Event()
        self.reached = threading.Event()
        self.cancelled = list[CancellableRun]()

    def exits(self, x: Any, *, keep: bool = False) -> CancellableRun:
        return CancellableRun(self)

    def stuck(self) -> None:
        self.reached.set()
        assert self.give_up.wait(PATIENCE_S)
        raise Cancelled


@pytest.fixture
def engine(clock: FakeClock) -> CancellableNetwork:
    return CancellableNetwork(clock)


@pytest.mark.parametrize("ask", ["interrupt", "close", "leave", "deadline"])
def test_a_stage_in_flight_is_cancelled_when_nobody_wants_more(
    engine: CancellableNetwork, clock: FakeClock, ask: str
) -> None:
    engine.at["stage 2"] = engine.stuck
    runner = runner_of(engine)
    run = runner.start(X, deadline=Deadline.after(5.0, clock))
    assert engine.reached.wait(PATIENCE_S)
    if ask == "close":
        run.close()
    elif ask == "leave":
        with run:
            pass
    elif ask == "deadline":
        clock.advance(5.0)
    answer = run.interrupt() if ask == "interrupt" else run.result()
    assert (answer.exit, answer.deadline_met) == (1, True)
    engine.wait_closed()
    engine.at.clear()
    # the worker is free
    assert runner.start(X).result().exit == 3
    assert run.result() is answer


def test_a_queued_run_begins_when_the_one_before_it_is_cancelled(
    engine: CancellableNetwork,
) -> None:
    engine.at["stage 1"] = engine.stuck
    runner = runner_of(engine)
    first = runner.start(X)
    second = runner.start(X)
    assert engine.reached.wait(PATIENCE_S)
    engine.at.clear()
    first.interrupt()
    assert second.result().exit == 3


def test_closing_the_runner_cancels_the_stage_in_flight(engine: CancellableNetwork) -> None:
    engine.at["stage 1"] = engine.stuck
    runner = runner_of(engine)
    run = runner.start(X)
    assert engine.reached.wait(PATIENCE_S)
    (thread,) = workers()
    runner.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert run.result().exit == 0


def test_a_run_that_has_ended_cancels_nothing(engine: CancellableNetwork) -> None:
    with runner_of(engine).start(X) as run:
        engine.wait_closed()
        run.result()
        run.interrupt()
    assert engine.cancelled == []


def test_a_first_stage_is_not_cancelled_while_its_answer_is_waited_for(
    engine: CancellableNetwork,
) -> None:
    stuck = hold(engine, "stage 0")
    run = runner_of(engine).start(X)
    answer = elsewhere(run.interrupt)
    wait_for_waiters(run, 1)
    assert engine.cancelled == []
    stuck.release()
    assert answer.result(PATIENCE_S).exit == 0


def test_a_first_stage_is_cancelled_when_its_answer_would_be_too_late(
    engine: CancellableNetwork,
) -> None:
    engine.at["stage 0"] = engine.stuck
    run = runner_of(engine, when_late="raise").start(X)
    assert engine.reached.wait(PATIENCE_S)
    with pytest.raises(NoAnswerInTime):
        run.interrupt()
    engine.wait_closed()


def test_a_stage_of_a_resumable_run_is_not_lost(engine: CancellableNetwork) -> None:
    stuck = hold(engine, "stage 1")
    runner = runner_of(engine)
    run = runner.start(X, resumable=True)
    stuck.wait_reached()
    assert run.interrupt().exit == 0
    assert engine.cancelled == []
    stuck.release()
    assert run.refine().result().exit == 3
    stuck = hold(engine, "stage 1")
    run = runner.start(X, resumable=True)
    stuck.wait_reached()
    # but one that is closed is wanted no more
    run.close()
    assert len(engine.cancelled) == 1
    stuck.release()


def test_a_cancellation_that_nobody_asked_for_is_an_error(engine: CancellableNetwork) -> None:
    engine.at["stage 1"] = engine.stuck
    run = runner_of(engine).start(X)
    assert engine.reached.wait(PATIENCE_S)
    engine.give_up.set()
    with pytest.raises(Cancelled):
        run.result()


# --- threads and memory ---------------------------------------------------------------------------


def test_a_thousand_runs_take_one_thread(clock: FakeClock) -> None:
    before = threading.active_count()
    runner = runner_of(FakeNetwork(clock, [0.0, 0.0]))
    for _ in range(1000):
        with runner.start(X) as run:
            run.interrupt()
    assert threading.active_count() <= before + 1


def test_opening_and_closing_leaves_no_threads(network: FakeNetwork) -> None:
    runner = runner_of(network)
    for _ in range(50):
        with runner:
            runner.start(X).result()
    wait_until(lambda: not workers())


def test_a_forgotten_runner_ends_its_thread(network: FakeNetwork) -> None:
    runner = runner_of(network)
    assert runner.start(X).result().exit == 3
    (thread,) = workers()
    gone = weakref.ref(runner)
    del runner
    gc.collect()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert gone() is None


def test_a_run_outlives_the_runner_that_began_it(network: FakeNetwork) -> None:
    stuck = hold(network, "stage 1")
    run = runner_of(network).start(X)
    stuck.wait_reached()
    gc.collect()
    stuck.release()
    assert run.result().exit == 3


def test_an_idle_runner_keeps_no_input_alive(network: FakeNetwork) -> None:
    runner = runner_of(network)
    x = torch.zeros(1, 1)
    runner.start(x).result()
    gone = weakref.ref(x)
    del x
    wait_until(lambda: gone() is None)


# --- the real thing -------------------------------------------------------------------------------


@pytest.fixture
def real(toy: ToyBackbone) -> Iterator[Runner]:
    network = attach_exits(toy.eval(), after=["blocks.0", "blocks.2"], example=torch.zeros(1, 8))
    with Runner(network, profile(network, torch.randn(1, 8), repeats=3, warm_up=1)) as runner:
        yield runner


def test_on_a_real_clock_a_run_with_time_to_spare_is_the_network_itself(real: Runner) -> None:
    x = torch.randn(1, 8)
    with real.start(x, deadline=Deadline.after(60.0)) as run:
        answer = run.result()
    assert (answer.exit, answer.stopped_by, answer.deadline_met) == (2, "final", True)
    assert 0.0 < answer.elapsed_s < 60.0
    torch.testing.assert_close(answer.output, real.network.backbone(x), rtol=0, atol=0)  # type: ignore[attr-defined]


class Sticky(nn.Module):
    """A classifier on a backbone that can be held still."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.backbone.blocks):
            if index == 2 and not self.go_on.is_set():
                self.entered.set()
                assert self.go_on.wait(PATIENCE_S)
            x = block(x)
        return self.backbone.classifier(x)


def test_on_a_real_clock_the_result_comes_at_the_deadline_while_a_stage_is_stuck(
    toy: ToyBackbone,
) -> None:
    model = Sticky(toy).eval()
    network = attach_exits(
        model, after=["backbone.blocks.0", "backbone.blocks.2"], example=torch.zeros(1, 8)
    )
    runner = Runner(network, profile(network, torch.randn(1, 8), repeats=3, warm_up=1))
    model.go_on.clear()
    x = torch.randn(1, 8)
    # the first run on a new thread may take long
    with runner.start(x) as warm:
        model.entered.wait(PATIENCE_S)
        assert warm.interrupt().exit == 0
        model.go_on.set()
    runner.start(x).result()
    model.entered.clear()
    model.go_on.clear()
    with runner.start(x, deadline=Deadline.after(1.0)) as run:
        answer = run.result()
        assert not model.go_on.is_set()
        model.go_on.set()
    assert (answer.exit, answer.stopped_by, answer.deadline_met) == (0, "deadline", True)
    torch.testing.assert_close(answer.output, network(x)[0], rtol=0, atol=0)


ENDLESS = """
import threading, torch
from torch import nn
from fakes import costs_of
from impatient import Runner, attach_exits

torch.set_num_threads(1)
running = threading.Event()

class Slow(nn.Module):
    slow = False

    def forward(self, x):
        if self.slow:
            running.set()
            for _ in range(2000):  # a few milliseconds inside torch
                x = x + 0
        return x

blocks = [nn.Sequential(nn.Linear(8, 8), Slow()) for _ in range(40)]
backbone = nn.Sequential(*blocks, nn.Linear(8, 3))
names = [str(index) for index in range(40)]
network = attach_exits(backbone, after=names, example=torch.zeros(1, 8)).eval()
Slow.slow = True
runner = Runner(network, costs_of([0.001] * network.num_exits), any_profile=True)
run, queued = runner.start(torch.zeros(1, 8)), runner.start(torch.zeros(1, 8))
assert running.wait(20)
{ask}
"""


@pytest.mark.slow
@pytest.mark.parametrize("ask", ["", "runner.close()"])
def test_the_interpreter_ends_cleanly_with_a_run_in_flight(ask: str) -> None:
    code = textwrap.dedent(ENDLESS).replace("{ask}", ask)
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(fakes.__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_interpreter_ends_although_a_stage_never_does(
    monkeypatch: pytest.MonkeyPatch, network: FakeNetwork
) -> None:
    monkeypatch.setattr(interruptible, "END_S", 0.01)
    stuck = hold(network, "stage 1")
    stubborn = runner_of(network)
    stubborn.start(X)
    stuck.wait_reached()
    stubborn._worker.end()
    assert workers()
    stuck.release()


def test_whoever_waits_for_the_result_is_not_woken_by_the_exits_on_the_way(
    network: FakeNetwork,
) -> None:
    first = hold(network, "stage 0")
    last = hold(network, "stage 3")
    with runner_of(network).start(X) as run:
        first.wait_reached()
        answer = elsewhere(run.result)
        wait_for_waiters(run, 1)
        (waiter,) = run._changed._waiters  # type: ignore[attr-defined]
        first.release()
        last.wait_reached()
        assert [*run._changed._waiters] == [waiter]  # type: ignore[attr-defined]
        latest = run.latest()
        assert latest is not None
        assert latest.exit == 2
        last.release()
        assert answer.result(PATIENCE_S).stopped_by == "final"
