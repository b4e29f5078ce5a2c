"""The demo's last table: all deadlines in turn, sample by sample, and depth where there is time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fakes import FakeNetwork, costs_of, runner_of
from impatient.clock import FakeClock
from impatient.verbs.demo import under_deadlines
from plain_data import Plain

STAGES_S = [1e-3] * 4
# enough for the first, for the first two, and for all, with what runners keep for themselves
DEADLINES_S = [1.2e-3, 2.2e-3, 9e-3]


def data(count: int) -> Any:
    """Samples of which every other one is right: the fake network always says class 0."""
    return Plain({"test": torch.zeros(count, 1)}, {"test": torch.arange(count) % 2})


def network(clock: FakeClock, stage_s: Callable[[], float] | float) -> FakeNetwork:
    return FakeNetwork(clock, [stage_s] * 4)


@dataclass
class Machine:
    """Stages of a millisecond, of which one in `every` is interrupted for 3 ms."""

    every: int
    count: int = 0

    def stage_s(self) -> float:
        self.count += 1
        return 1e-3 + (3e-3 if self.count % self.every == 0 else 0.0)


def test_every_deadline_is_used_as_deep_as_it_allows() -> None:
    clock = FakeClock()
    made = network(clock, 1e-3)
    runners = [runner_of(made, costs_of(STAGES_S)) for _ in DEADLINES_S]
    rows = under_deadlines(runners, data(10), "test", DEADLINES_S)
    assert [row.mean_exit for row in rows] == [0.0, 1.0, 3.0]
    assert [row.met for row in rows] == [1.0] * 3
    assert [row.accuracy for row in rows] == [0.5] * 3
    assert [row.mean_time_s for row in rows] == pytest.approx([1e-3, 2e-3, 4e-3])
    assert {row.samples for row in rows} == {10}


def test_deadlines_take_turns_so_that_none_has_a_bad_minute_to_itself() -> None:
    clock = FakeClock()
    slow = Machine(every=1)
    started = []

    def stage_s() -> float:
        # The machine is four times as slow from some instant on.
        started.append(clock.now())
        return slow.stage_s() if len(started) > 400 else 1e-3

    made = network(clock, stage_s)
    runners = [runner_of(made, costs_of(STAGES_S)) for _ in range(2)]
    first, second = under_deadlines(runners, data(60), "test", [50e-3, 50e-3])
    # one after the other, the first would have had the fast machine alone
    assert first.mean_time_s == pytest.approx(second.mean_time_s, rel=0.1)
    assert first.mean_time_s > 5e-3


def test_rare_interruptions_do_not_keep_it_shallow_where_there_is_time() -> None:
    clock = FakeClock()
    made = network(clock, Machine(every=50).stage_s)
    runners = [runner_of(made, costs_of(STAGES_S)) for _ in DEADLINES_S]
    rows = under_deadlines(runners, data(300), "test", DEADLINES_S)
    assert rows[-1].mean_exit > 2.8
    assert rows[-1].met > 0.98
