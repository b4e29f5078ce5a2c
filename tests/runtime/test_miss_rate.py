"""A runner is late as often as it was asked to be, and says why it was."""

import math
import random
from typing import Any

import pytest

from fakes import FakeNetwork, X, costs_of, runner_of
from impatient.clock import Deadline, FakeClock
from impatient.costs import Quantiles
from impatient.errors import RunError
from impatient.runtime import Runner
from impatient.runtime.miss_rate import WINDOW, MissRate

STAGES = 6
BASE_S = 0.001


class Machine:
    """Stages of random times, which a load multiplies and interruptions lengthen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.clock = FakeClock()
        self.network = FakeNetwork(self.clock, [self.stage_s] * STAGES)
        self.load = 1.0
        self.interrupted = 0.0
        measured = Quantiles.of([self.stage_s() for _ in range(500)])
        self.costs = costs_of([measured] * STAGES, [0.0] * STAGES)

    def stage_s(self) -> float:
        hiccup = 0.003 * (self.random.random() < self.interrupted)
        return BASE_S * self.load * self.random.lognormvariate(0.0, 0.1) + hiccup

    def runner(self, **options: object) -> Runner:
        return runner_of(self.network, self.costs, **options)

    def run(self, runner: Runner, times: int) -> tuple[float, float]:
        """Share of late answers, and mean exit, over uniform deadlines."""
        late = depth = 0
        for _ in range(times):
            allowed_s = self.random.uniform(2.5, STAGES + 1) * BASE_S
            answer = runner.run(X, deadline=Deadline.after(allowed_s, self.clock))
            late += not answer.deadline_met
            depth += answer.exit
            self.network.ran.clear()
        return late / times, depth / times


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_answers_are_late_as_often_as_asked(rate: float) -> None:
    machine = Machine(0)
    careful, _ = machine.run(machine.runner(), 1000)
    runner = machine.runner(miss_rate=rate)
    late, _ = machine.run(runner, 4000)
    assert 0.5 * rate <= late <= 1.5 * rate
    assert careful < 0.5 * rate


def test_a_slower_machine_keeps_the_rate_and_is_forgotten() -> None:
    machine = Machine(1)
    runner = machine.runner(miss_rate=0.02)
    _, before = machine.run(runner, 1500)
    machine.load = 1.8
    machine.run(runner, 100)
    late, slow = machine.run(runner, 1500)
    assert late <= 0.03
    machine.load = 1.0
    machine.run(runner, 200)
    _, after = machine.run(runner, 500)
    assert slow < before - 1.0
    assert abs(after - before) < 0.3


def test_interruptions_that_are_over_are_forgotten_within_200_runs() -> None:
    machine = Machine(2)
    runner = machine.runner(miss_rate=0.02)
    _, before = machine.run(runner, 1000)
    machine.interrupted = 0.02
    machine.run(runner, 500)
    machine.interrupted = 0.0
    machine.run(runner, 200)
    _, after = machine.run(runner, 300)
    assert after > before - 0.3


def test_what_no_rule_could_answer_in_time_changes_nothing() -> None:
    rule = MissRate(0.01)
    for ratio in range(WINDOW):
        rule.observe(1.0 + ratio / WINDOW)
    before = rule.scale
    rule.answered(late=True, exit=0)
    assert rule.scale == before
    rule.answered(late=True, exit=1)
    assert rule.scale > before


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, math.nan, "0.01", True])
def test_a_rate_is_a_share(rate: Any) -> None:
    with pytest.raises(RunError, match="miss_rate"):
        Machine(0).runner(miss_rate=rate)


def test_a_report_tells_the_machines_misses_from_the_rules() -> None:
    clock = FakeClock()
    network = FakeNetwork(clock, [1.0, 1.0, 1.0])
    runner = runner_of(network)
    assert runner.report().runs == 0
    for allowed_s in (0.5, 0.5, 2.5, 4.0):
        runner.run(X, deadline=Deadline.after(allowed_s, clock))
    runner.run(X)
    report = runner.report()
    assert (report.runs, report.with_deadline) == (5, 4)
    assert (report.missed, report.floor) == (0.5, 0.5)
    assert report.exits == {0: 0.4, 1: 0.2, 2: 0.4}
    assert report.used == pytest.approx((2 / 2.5 + 3 / 4) / 2)
    assert "first exit alone would have been late in 50.0%" in report.advice()
    # the clock moves in stages alone
    assert report.spent == {
        "waiting": 0.0,
        "stages": 1.0,
        "heads": 0.0,
        "decisions": 0.0,
        "hand-over": 0.0,
    }


def test_a_report_says_if_runs_began_too_late() -> None:
    clock = FakeClock()
    runner = runner_of(FakeNetwork(clock, [1.0, 1.0, 1.0]))
    for _ in range(3):
        deadline = Deadline.after(2.0, clock)
        clock.advance(9.0)
        runner.run(X, deadline=deadline)
    report = runner.report()
    assert report.spent["waiting"] == pytest.approx(0.9)
    assert "before their runs began" in report.advice()


@pytest.mark.parametrize(
    ("overrun_s", "allowed_s", "said"),
    [(5.0, 4.0, "were late, though"), (0.0, 30.0, "took 10% of the time"), (0.0, 3.5, "are kept")],
)
def test_a_report_says_what_to_change(overrun_s: float, allowed_s: float, said: str) -> None:
    clock = FakeClock()
    network = FakeNetwork(clock, [1.0, 1.0, 1.0])
    runner = runner_of(network)
    network.stages_s[2] += overrun_s
    runner.run(X, deadline=Deadline.after(1.5, clock))
    for _ in range(3):
        runner.run(X, deadline=Deadline.after(allowed_s, clock))
    assert said in runner.report().advice()


def test_a_report_does_not_praise_runs_that_all_stopped_early() -> None:
    clock = FakeClock()
    network = FakeNetwork(clock, [1.0, 1.0, 1.0])
    runner = runner_of(network)
    # the profile said that a stage takes 1 s
    network.stages_s[0] = 0.1
    for _ in range(3):
        runner.run(X, deadline=Deadline.after(1.05, clock))
    report = runner.report()
    assert report.exits == {0: 1.0}
    assert "took 10% of the time they had, all from exit 0" in report.advice()


def test_without_deadlines_a_report_asks_for_one() -> None:
    runner = runner_of(FakeNetwork(FakeClock(), [1.0]))
    runner.run(X)
    assert "No run had a deadline" in runner.report().advice()
