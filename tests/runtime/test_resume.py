"""Runs that were stopped go on from where they were: nothing is computed twice, and answers given
before stay as they were.
"""

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fakes import (
    PATIENCE_S,
    WHOLE,
    FakeNetwork,
    Hold,
    X,
    costs_of,
    hold,
    runner_of,
    wait_until,
    workers,
)
from impatient.clock import Deadline, FakeClock
from impatient.errors import NoAnswerInTime, RunError
from impatient.networks import MultiExitNetwork, attach_exits
from impatient.policies import ThresholdPolicy
from impatient.runtime import Answer, ContractRun, InterruptibleRun, Runner, profile
from impatient.runtime.runner import RESERVE_S
from toys import ToyBackbone

pytestmark = pytest.mark.usefixtures("no_thread_stays")


def go_on(
    opened: ContractRun, clock: FakeClock, seconds: float = math.inf, **options: Any
) -> Answer:
    return opened.run(deadline=Deadline(clock.now() + seconds + RESERVE_S), **options)


def policy_of(*thresholds: float) -> ThresholdPolicy:
    return ThresholdPolicy(score="max_probability", thresholds=(*thresholds, -math.inf))


def sure(*sureness: float) -> Tensor:
    """Outputs [K, 1, 2] whose largest probability is as given."""
    return torch.tensor([[[math.log(p / (1 - p)), 0.0]] for p in sureness])


# --- contract runs --------------------------------------------------------------------------------


def test_an_answer_is_refined_without_computing_anything_twice(
    network: FakeNetwork, clock: FakeClock
) -> None:
    with runner_of(network).open(X) as opened:
        first = go_on(opened, clock, 2.5)
        second = go_on(opened, clock)
    assert (first.exit, first.stopped_by, first.elapsed_s) == (1, "deadline", 2.5)
    assert (second.exit, second.stopped_by, second.elapsed_s) == (3, "final", 2.5)
    assert network.ran == ["stage 0", "stage 1", "head 1", "stage 2", "stage 3", "head 3"]
    assert torch.equal(first.output, network.outputs[1])
    assert torch.equal(second.output, network.outputs[3])


def test_where_nothing_more_fits_the_answer_is_the_same_again(
    network: FakeNetwork, clock: FakeClock
) -> None:
    with runner_of(network).open(X) as opened:
        first = go_on(opened, clock, 2.5)
        again = go_on(opened, clock, 1.4)
    assert (again.exit, again.stopped_by, again.elapsed_s, again.deadline_met) == (
        1,
        "deadline",
        0.0,
        True,
    )
    assert torch.equal(again.output, first.output)
    assert network.ran == ["stage 0", "stage 1", "head 1"]


def test_where_nothing_is_left_the_last_answer_comes_again(
    network: FakeNetwork, clock: FakeClock
) -> None:
    with runner_of(network).open(X) as opened:
        answers = [go_on(opened, clock) for _ in range(2)]
    assert [(answer.exit, answer.stopped_by) for answer in answers] == [(3, "final")] * 2
    assert torch.equal(answers[0].output, answers[1].output)
    assert len(network.ran) == 5


@settings(max_examples=100, deadline=None)
@given(
    budgets=st.lists(st.floats(0.0, 4.0), min_size=1, max_size=6),
    costs=st.lists(st.floats(0.1, 1.0), min_size=1, max_size=5),
)
def test_every_answer_is_the_deepest_that_fits_and_every_part_runs_once(
    budgets: list[float], costs: list[float]
) -> None:
    clock = FakeClock()
    network = FakeNetwork(clock, costs, [0.25] * len(costs))
    at = -1
    with runner_of(network).open(X) as opened:
        for budget in budgets:
            now = clock.now()
            deepest = max(at, 0)
            end = now + budget + RESERVE_S
            now += costs[0] if at < 0 else 0.0
            while deepest + 1 < len(costs) and now + (costs[deepest + 1] + 0.25) + RESERVE_S <= end:
                deepest += 1
                now += costs[deepest]
            answer = go_on(opened, clock, budget)
            assert (answer.exit, answer.exits) == (deepest, (deepest,))
            assert torch.equal(answer.output, network.outputs[deepest])
            at = deepest
    assert len(set(network.ran)) == len(network.ran)


def test_a_late_refinement_is_no_reason_to_raise_since_there_is_an_answer(
    network: FakeNetwork, clock: FakeClock
) -> None:
    with runner_of(network, when_late="raise").open(X) as opened:
        with pytest.raises(NoAnswerInTime):
            go_on(opened, clock, 1.0)
        assert network.ran == []
        # the run is none the worse for it
        assert go_on(opened, clock, 1.5).exit == 0
        late = go_on(opened, clock, -1.0)
    assert (late.exit, late.deadline_met) == (0, False)


def test_a_closed_run_does_not_go_on(network: FakeNetwork, clock: FakeClock) -> None:
    with runner_of(network).open(X) as opened:
        go_on(opened, clock, 2.5)
    network.wait_closed()
    with pytest.raises(RunError, match="was closed"):
        go_on(opened, clock)
    assert network.ran == ["stage 0", "stage 1", "head 1"]


def test_a_policy_that_stopped_stays_so_until_it_is_overridden(clock: FakeClock) -> None:
    network = FakeNetwork(clock, [1.0] * 4, [0.5] * 4, sure(0.8, 0.9, 0.6, 0.95))
    with runner_of(network, policy=policy_of(0.7, 0.7, 0.7)).open(X) as opened:
        answers = [
            go_on(opened, clock),
            go_on(opened, clock),
            go_on(opened, clock, policy=policy_of(0.85, 0.85, 0.85)),
        ]
        answers.append(go_on(opened, clock, policy=None))
    assert [(answer.exit, answer.stopped_by) for answer in answers] == [
        (0, "policy"),
        (0, "policy"),
        (1, "policy"),
        (3, "final"),
    ]
    assert [part for part in network.ran if part.startswith("head")] == [
        "head 0",
        "head 1",
        "head 3",
    ]


@pytest.mark.parametrize("compaction", ["never", "auto"])
def test_samples_that_a_policy_has_stopped_go_on_without_it(
    clock: FakeClock, compaction: str
) -> None:
    outputs = torch.cat([sure(0.9, 0.91, 0.92), sure(0.6, 0.61, 0.62)], dim=1)
    network = FakeNetwork(clock, [1.0] * 3, [0.0] * 3, outputs)
    with runner_of(network, policy=policy_of(0.7, 0.7), compaction=compaction).open(
        torch.zeros(2, 1)
    ) as opened:
        first = go_on(opened, clock, 2.0)
        assert first.exits == (0, 1)
        second = go_on(opened, clock, policy=None)
    assert first.exits == (0, 1)
    assert torch.equal(first.output, torch.stack([outputs[0, 0], outputs[1, 1]]))
    assert second.exits == (2, 2)
    assert torch.equal(second.output, outputs[2])


@pytest.fixture
def real(toy: ToyBackbone) -> MultiExitNetwork:
    return attach_exits(toy, after=["blocks.0", "blocks.2"], example=torch.zeros(1, 8)).eval()


def test_samples_that_were_taken_out_of_the_batch_keep_their_outputs(
    real: MultiExitNetwork,
) -> None:
    x = torch.randn(4, 8)
    whole = [output.detach() for output in real(x)]
    margins = whole[0].softmax(1).max(1).values.sort().values
    # the surer half stops at the first exit
    policy = policy_of(float(margins[1:3].mean()), math.inf)
    costs = profile(real, x, batch_sizes=[1, 2, 4], repeats=1, warm_up=0)
    stopped = whole[0].softmax(1).max(1).values >= policy.thresholds[0]
    runner = Runner(real, costs, policy, compaction="always")
    for depth in (0, 1):
        with runner.open(x) as opened:
            first = opened.run(limits=macs_up_to(runner, depth))
            second = opened.run(policy=None)
        assert first.stopped_by == "limit"
        assert first.exits == tuple(torch.where(stopped, 0, depth).tolist())
        # at the first exit they had stopped, but were still there
        kept = torch.where(stopped, 0, 2) if depth else torch.full((4,), 2)
        assert second.exits == tuple(kept.tolist())
        torch.testing.assert_close(second.output, torch.stack(whole)[kept, torch.arange(4)])


class ScalesInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x).mul_(2.0)


def test_an_answer_stays_what_it_was_when_a_later_stage_writes_over_it(clock: FakeClock) -> None:
    model = ScalesInPlace().eval()
    network = attach_exits(
        model, after=["classifier"], heads=[lambda *_: nn.Identity()], example=torch.zeros(1, 8)
    )
    x = torch.randn(1, 8)
    with Runner(network, costs_of([1.0, 1.0]), any_profile=True, clock=clock).open(x) as opened:
        first = go_on(opened, clock, 0.5)
        second = go_on(opened, clock)
    torch.testing.assert_close(first.output, model.classifier(x), rtol=0, atol=0)
    torch.testing.assert_close(second.output, 2.0 * first.output, rtol=0, atol=0)


def test_runs_that_are_open_at_a_time_are_independent_and_leave_no_mode_behind(
    real: MultiExitNetwork,
) -> None:
    inputs = [torch.randn(1, 8) for _ in range(3)]
    runner = Runner(real, profile(real, inputs[0], repeats=1, warm_up=0))
    opened = [runner.open(x) for x in inputs]
    for depth in range(3):
        for x, one in zip(inputs, opened, strict=True):
            expected = real(x)[depth].detach()
            answer = one.run(
                deadline=Deadline(0.0) if depth == 0 else Deadline.after(60.0),
                limits=macs_up_to(runner, depth),
            )
            assert answer.exit == depth
            torch.testing.assert_close(answer.output, expected, rtol=0, atol=0)
            assert not torch.is_inference_mode_enabled()
    for one in opened:
        one.close()


def macs_up_to(runner: Runner, exit: int) -> dict[Any, float]:
    """A limit that allows this exit and no deeper one, after every head on the way."""
    return {"macs": runner.costs.cumulative("macs", "interruptible")[exit]}


# --- interruptible runs ---------------------------------------------------------------------------


def stopped_at(
    network: FakeNetwork, exit: int, runner: Runner | None = None, **options: Any
) -> tuple[InterruptibleRun, Answer]:
    """A resumable run, interrupted while the stage after an exit was in flight, which has ended
    since.
    """
    stuck = hold(network, f"stage {exit + 1}")
    run = (runner or runner_of(network, **options)).start(X, resumable=True)
    stuck.wait_reached()
    answer = run.interrupt()
    stuck.release()
    wait_until(lambda: run._finished)
    return run, answer


def test_an_interrupted_run_is_refined_without_computing_anything_twice(
    network: FakeNetwork,
) -> None:
    run, first = stopped_at(network, 1)
    assert (first.exit, first.stopped_by) == (1, "interrupt")
    # the stage in flight is not lost, its head waits
    assert network.ran == [*WHOLE[:4], "stage 2"]
    second = run.refine().result()
    assert (second.exit, second.stopped_by, second.deadline_met) == (3, "final", True)
    # head 2, stage 3, head 3, from the second call on
    assert second.elapsed_s == 2.0
    assert network.ran == WHOLE
    assert torch.equal(first.output, network.outputs[1])
    assert run.refine().result().exit == 3
    network.wait_closed()


def test_a_run_may_be_refined_while_its_stage_is_in_flight(network: FakeNetwork) -> None:
    stuck = hold(network, "stage 1")
    run = runner_of(network).start(X, resumable=True)
    stuck.wait_reached()
    assert run.interrupt().exit == 0
    assert run.refine().latest() is not None
    # nothing deeper has answered meanwhile
    assert run.interrupt().exit == 0
    run.refine()
    stuck.release()
    assert run.result().exit == 3
    assert network.ran == WHOLE


def test_a_deadline_stops_a_refinement_and_another_goes_on(
    network: FakeNetwork, clock: FakeClock
) -> None:
    run = runner_of(network).start(X, deadline=Deadline.after(1.5, clock), resumable=True)
    wait_until(lambda: run._finished)
    first = run.result()
    wait_until(lambda: run._finished)
    run.refine(deadline=Deadline.after(1.5, clock))
    wait_until(lambda: run._finished)
    second = run.result()
    run.refine(deadline=Deadline.after(0.0 + 1e-9, clock))
    clock.advance(1.0)
    third = run.result()
    assert [
        (answer.exit, answer.stopped_by, answer.deadline_met) for answer in (first, second, third)
    ] == [(0, "deadline", True), (1, "deadline", True), (1, "deadline", True)]
    assert (first.elapsed_s, second.elapsed_s, third.elapsed_s) == (1.5, 1.5, 0.0)
    assert run.refine().result().exit == 3
    assert network.ran == WHOLE


def test_other_runs_go_on_while_one_waits(network: FakeNetwork) -> None:
    runner = runner_of(network)
    first, _ = stopped_at(network, 0, runner)
    network.at.clear()
    second, _ = stopped_at(network, 2, runner)
    network.at.clear()
    assert runner.start(X).result().exit == 3
    assert first.refine().result().exit == 3
    assert second.refine().result().exit == 3
    assert len(workers()) == 1
    assert sorted(network.ran) == sorted(WHOLE * 3)


def test_a_policy_that_stopped_a_started_run_is_overridden(clock: FakeClock) -> None:
    network = FakeNetwork(clock, [1.0] * 3, [0.5] * 3, sure(0.8, 0.9, 0.95))
    run = runner_of(network, policy=policy_of(0.7, 0.7)).start(X, resumable=True)
    assert (run.result().exit, run.result().stopped_by) == (0, "policy")
    again = run.refine().result()
    assert (again.exit, again.stopped_by) == (0, "policy")
    assert run.refine(policy=policy_of(0.85, 0.85)).result().exit == 1
    last = run.refine(policy=None).result()
    assert (last.exit, last.stopped_by) == (2, "final")
    assert network.ran == WHOLE[:6]


def test_a_final_answer_that_came_too_late_is_there_for_the_next_who_asks(
    network: FakeNetwork, clock: FakeClock
) -> None:
    run = runner_of(network).start(X, deadline=Deadline.after(5.75, clock), resumable=True)
    wait_until(lambda: run._finished)
    assert (run.result().exit, run.result().stopped_by) == (2, "deadline")
    wait_until(lambda: run._finished)
    last = run.refine().result()
    assert (last.exit, last.stopped_by) == (3, "final")
    assert network.ran == WHOLE


def test_an_error_while_refining_comes_out_and_the_worker_survives_it(network: FakeNetwork) -> None:
    runner = runner_of(network)
    run, _ = stopped_at(network, 0, runner)

    def fail() -> None:
        raise ValueError("the model is broken")

    network.at = {"stage 2": fail}
    with pytest.raises(ValueError, match="the model is broken"):
        run.refine().result()
    with pytest.raises(ValueError, match="the model is broken"):
        run.refine()
    network.at.clear()
    assert runner.start(X).result().exit == 3


def test_a_run_that_failed_when_nobody_wanted_more_says_so_when_it_is_to_go_on(
    network: FakeNetwork,
) -> None:
    def fail() -> None:
        stuck()
        raise ValueError("the model is broken")

    stuck = Hold()
    network.at["stage 1"] = fail
    run = runner_of(network).start(X, resumable=True)
    stuck.wait_reached()
    assert run.interrupt().exit == 0
    stuck.release()
    wait_until(lambda: run._finished)
    assert run.result().exit == 0
    with pytest.raises(ValueError, match="the model is broken"):
        run.refine()


def test_when_late_runs_raise_a_refinement_may_still_get_the_answer(
    network: FakeNetwork, clock: FakeClock
) -> None:
    stuck = hold(network, "stage 0")
    run = runner_of(network, when_late="raise").start(X, resumable=True)
    stuck.wait_reached()
    with pytest.raises(NoAnswerInTime):
        run.interrupt()
    run.refine()
    stuck.release()
    assert run.result().exit == 3
    assert network.ran == WHOLE


def test_what_cannot_be_refined_says_why(network: FakeNetwork) -> None:
    runner = runner_of(network)
    run = runner.start(X)
    run.result()
    with pytest.raises(RunError, match="resumable=True"):
        run.refine()
    stuck = hold(network, "stage 1")
    run = runner.start(X, resumable=True)
    stuck.wait_reached()
    with pytest.raises(RunError, match="has not been stopped"):
        run.refine()
    stuck.release()
    run.result()
    run.close()
    with pytest.raises(RunError, match="was closed"):
        run.refine()


# --- nothing is left behind -----------------------------------------------------------------------


def test_closing_a_run_that_waits_throws_it_away(network: FakeNetwork) -> None:
    runner = runner_of(network)
    run, answer = stopped_at(network, 0, runner)
    run.close()
    network.wait_closed()
    run.close()
    assert run.result() is answer
    assert network.ran == [*WHOLE[:2], "stage 1"]


def test_a_run_that_nobody_holds_any_more_is_thrown_away(network: FakeNetwork) -> None:
    runner = runner_of(network)
    run, _ = stopped_at(network, 0, runner)
    del run
    network.wait_closed()
    assert len(workers()) == 1


def test_closing_the_runner_throws_away_what_waits_and_ends_the_thread(
    network: FakeNetwork,
) -> None:
    runner = runner_of(network)
    run, _ = stopped_at(network, 0, runner)
    (thread,) = workers()
    runner.close()
    network.wait_closed()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    with pytest.raises(RunError, match="its runner was"):
        run.refine()


def test_a_run_that_waits_keeps_its_runner_alive_and_both_can_be_forgotten(
    network: FakeNetwork,
) -> None:
    run, _ = stopped_at(network, 0)
    gc.collect()
    assert run.refine().result().exit == 3
    run, _ = stopped_at(network, 0)
    # the first runner's is gone
    wait_until(lambda: len(workers()) == 1)
    (thread,) = workers()
    del run
    network.wait_closed()
    network.wait_closed()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_real_runs_that_wait_are_unwound_on_their_own_thread(real: MultiExitNetwork) -> None:
    """A greenlet dropped on another thread keeps its memory, and warns: an error here."""
    x = torch.randn(1, 8)
    runner = Runner(real, profile(real, x, repeats=1, warm_up=0))
    runs = [runner.start(x, resumable=True, limits=macs_up_to(runner, 0)) for _ in range(20)]
    assert {run.result().stopped_by for run in runs} == {"limit"}
    walks = [weakref.ref(run._state._run) for run in runs]
    for run in runs[:5]:
        answer = run.refine().result()
        torch.testing.assert_close(answer.output, real.backbone(x), rtol=0, atol=0)
    runs[5].close()
    del runs[6:15], run
    wait_until(lambda: sum(walk() is not None for walk in walks) == 5)
    runner.close()
    wait_until(lambda: all(walk() is None for walk in walks))
