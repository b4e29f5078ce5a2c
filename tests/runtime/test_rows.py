"""A deadline or a limit for each row of a batch."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from blocks import Blocks, attach, x_of
from fakes import FakeNetwork, costs_of, runner_of
from impatient.clock import NEVER, Deadline, FakeClock
from impatient.costs import CostProfile
from impatient.errors import BudgetError, NoAnswerInTime, RunError
from impatient.networks.cascade import Cascade
from impatient.policies import ThresholdPolicy
from impatient.policies.policy import STOP
from impatient.policies.routing import SelectionPolicy
from impatient.policies.topology import Topology
from impatient.runtime import Runner
from impatient.runtime.runner import RESERVE_S

# stages take 1 s each, heads 0.5 s: alone, exit k answers at k + 1.5
ROWS = 6


def network_of(rows: int = ROWS) -> FakeNetwork:
    outputs = torch.arange(4.0)[:, None, None] * torch.ones(4, rows, 3)
    return FakeNetwork(FakeClock(), [1.0] * 4, [0.5] * 4, outputs)


def at(*seconds: float) -> list[Deadline]:
    return [Deadline(each + RESERVE_S) for each in seconds]


def test_rows_leave_when_their_own_deadline_is_spent() -> None:
    network = network_of(4)
    x = torch.zeros(4, 1)
    # the head of exit 0 runs for the first row, and makes the others 0.5 s later
    answer = runner_of(network).run(x, deadline=at(1.5, 3.0, 99.0, math.inf))
    assert [row.exit for row in answer.rows] == [0, 1, 3, 3]
    assert answer.exits == (0, 1, 3, 3)
    assert [row.stopped_by for row in answer.rows] == ["deadline", "deadline", "final", "final"]
    assert [row.elapsed_s for row in answer.rows] == [1.5, 3.0, 5.5, 5.5]
    assert answer.output[:, 0].tolist() == [0.0, 1.0, 3.0, 3.0]
    assert all(row.deadline_met for row in answer.rows)
    assert (answer.stopped_by, answer.deadline_met, answer.elapsed_s) == ("final", True, 5.5)


def test_the_head_that_one_row_needs_counts_against_the_others() -> None:
    network = network_of(2)
    # alone the second row would reach exit 1 at 2.5 s; the head of exit 0 makes it 3.0
    answer = runner_of(network).run(torch.zeros(2, 1), deadline=at(1.5, 2.9))
    assert [row.exit for row in answer.rows] == [0, 0]
    assert all(row.deadline_met for row in answer.rows)
    alone = runner_of(network_of(2)).run(torch.zeros(2, 1), deadline=at(2.5, 2.9))
    assert [row.exit for row in alone.rows] == [1, 1]


def test_a_row_alone_passes_an_exit_that_its_policy_closes() -> None:
    thresholds = (math.inf, 0.0, 0.0, -math.inf)
    policy = ThresholdPolicy(score="max_probability", thresholds=thresholds)
    runner = runner_of(network_of(1), policy=policy)
    answer = runner.run(torch.zeros(1, 1), deadline=at(99.0))
    assert [(row.exit, row.stopped_by) for row in answer.rows] == [(1, "policy")]


def test_a_row_for_which_nothing_fits_is_late_and_says_so() -> None:
    answer = runner_of(network_of(2)).run(torch.zeros(2, 1), deadline=at(0.5, 9.0))
    assert [(row.exit, row.deadline_met) for row in answer.rows] == [(0, False), (3, True)]
    assert not answer.deadline_met
    with pytest.raises(NoAnswerInTime):
        runner_of(network_of(2), when_late="raise").run(torch.zeros(2, 1), deadline=at(0.5, 9.0))


def test_limits_of_rows_stop_them_as_one_limit_stops_a_batch() -> None:
    costs = CostProfile.of(
        stages_s=[1.0] * 4, heads_s=[0.5] * 4, stage_macs=[10, 10, 10, 10], batch_size=3
    )
    limits = {"macs": [10.0, 25.0, 100.0]}
    answer = runner_of(network_of(3), costs).run(torch.zeros(3, 1), limits=limits)
    assert [(row.exit, row.stopped_by) for row in answer.rows] == [
        (0, "limit"),
        (1, "limit"),
        (3, "final"),
    ]
    for row, most in zip(answer.rows, limits["macs"], strict=True):
        alone = runner_of(network_of(3), costs).run(torch.zeros(3, 1), limits={"macs": most})
        assert (alone.exit, alone.stopped_by) == (row.exit, row.stopped_by)


@pytest.mark.parametrize("compaction", ["never", "always"])
def test_rows_of_a_real_network_get_the_outputs_of_their_exits(compaction: Any) -> None:
    """The clock stands still, so deadlines in the past leave at once, others never."""
    model = attach(Blocks())
    x = x_of(5)
    costs = costs_of([1.0] * 4, sizes=[1, 2, 3, 4, 5])
    policy = ThresholdPolicy(score="max_probability", thresholds=(math.inf, 0.6, 0.6, -math.inf))
    # one second each: row k may run k + 1 stages
    deadlines = at(1.0, 9.0, 2.0, 9.0, 1.0)
    model.eval()
    runner = Runner(
        model, costs, policy, any_profile=True, clock=FakeClock(), compaction=compaction
    )
    answer = runner.run(x, deadline=[Deadline(each.instant - 1.0) for each in deadlines])
    with torch.inference_mode():
        outputs = torch.stack(model(x))
        sure = policy.exits_of(outputs)
    # the fake clock does not move: what fits at the start fits for ever, one stage of 1 s
    expected = [0, int(sure[1]), int(sure[2]), int(sure[3]), 0]
    assert list(answer.exits) == expected
    for place, exit in enumerate(expected):
        torch.testing.assert_close(answer.output[place], outputs[exit, place])
    assert answer.rows[0].stopped_by == answer.rows[4].stopped_by == "deadline"


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"deadline": at(1.0)}, RunError, "1 deadlines for a batch of 6"),
        ({"limits": {"macs": [1.0, 2.0]}}, RunError, "2 limits of macs for a batch of 6"),
        ({"deadline": [2.0] * 6}, BudgetError, "deadline"),
    ],
)
def test_what_is_not_one_per_row_is_refused(given: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        runner_of(network_of()).run(torch.zeros(ROWS, 1), **given)
    # one for all is as before
    assert runner_of(network_of()).run(torch.zeros(ROWS, 1), deadline=NEVER).rows == ()


def test_rows_of_an_interruptible_run_keep_what_was_there_by_their_deadline() -> None:
    """Exits post at 1.5, 3.0, 4.5 and 6.0 s."""
    deadlines = [Deadline(each) for each in (1.0, 2.0, 4.6, 99.0)]
    with runner_of(network_of(4)).start(torch.zeros(4, 1), deadline=deadlines) as run:
        answer = run.result()
    # the first row got the first exit, too late; the second what was there at 2.0
    assert answer.exits == (0, 0, 2, 3)
    assert answer.output[:, 0].tolist() == [0.0, 0.0, 2.0, 3.0]
    assert [row.stopped_by for row in answer.rows] == ["deadline", "deadline", "deadline", "final"]
    assert [row.elapsed_s for row in answer.rows] == [1.5, 1.5, 4.5, 6.0]
    assert [row.deadline_met for row in answer.rows] == [False, True, True, True]


def test_an_interruptible_run_keeps_limits_of_rows_and_is_not_resumed() -> None:
    costs = CostProfile.of(stages_s=[1.0] * 4, heads_s=[0.5] * 4, stage_macs=[10] * 4, batch_size=2)
    runner = runner_of(network_of(2), costs)
    with runner.start(torch.zeros(2, 1), limits={"macs": [10.0, 35.0]}) as run:
        answer = run.result()
    assert [(row.exit, row.stopped_by) for row in answer.rows] == [(0, "limit"), (2, "limit")]
    with pytest.raises(RunError, match="resumable=False"):
        runner.start(torch.zeros(2, 1), deadline=[NEVER, NEVER], resumable=True)


def test_runs_that_go_on_later_take_budgets_of_all_rows_alone() -> None:
    costs = CostProfile.of(stages_s=[1.0] * 4, heads_s=[0.5] * 4, stage_macs=[10] * 4, batch_size=2)
    runner = runner_of(network_of(2), costs)
    each: Any = {"deadline": [NEVER, NEVER]}
    limits: Any = {"limits": {"macs": [10.0, 35.0]}}
    with runner.open(torch.zeros(2, 1)) as opened:
        for given, said in ((each, "expected a Deadline"), (limits, "one number for all rows")):
            with pytest.raises(BudgetError, match=said):
                opened.run(**given)
    with runner.start(torch.zeros(2, 1), resumable=True) as run:
        run.interrupt()
        for given, said in ((each, "expected a Deadline"), (limits, "one number for all rows")):
            with pytest.raises(BudgetError, match=said):
                run.refine(**given)


def test_rows_with_budgets_of_their_own_are_not_sent_from_network_to_network() -> None:
    network = Cascade([nn.Linear(3, 2), nn.Linear(3, 2)]).eval()
    policy = SelectionPolicy(
        topology=Topology.chain(2), moves=((1,), (STOP,)), decisions={}, node_s=(1.0, 1.0)
    )
    runner = Runner(network, costs_of([1.0, 1.0], [0.1, 0.1]), policy, any_profile=True)
    for ask in (runner.run, runner.start):
        with pytest.raises(RunError, match="a policy that only stops"):
            ask(torch.zeros(1, 3), deadline=[NEVER])
