"""Clocks that can be replaced, and deadlines as instants on them."""

import math
import threading
from collections.abc import Callable

import numpy as np
import pytest

from impatient.clock import (
    NEVER,
    Deadline,
    FakeClock,
    SystemClock,
    check_deadline,
    interleaved,
    positive_seconds,
    times_of,
)
from impatient.errors import BudgetError

# seconds until a test that hangs gives up; never waited for when all is well
SAFETY = 10.0


class Watched(threading.Condition):
    """A condition that counts its notifications and, while somebody waits on it, lets a script run
    instead.
    """

    def __init__(self, script: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.notifications = 0
        self.script = script

    def notify_all(self) -> None:
        self.notifications += 1
        super().notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        if self.script is None:
            return super().wait(timeout)
        self.script()
        return True


class Sleeper:
    """A thread asleep on a clock until an instant; `woken` is set when it wakes."""

    def __init__(
        self,
        clock: FakeClock | SystemClock,
        until: float,
        changed: threading.Condition | None = None,
    ) -> None:
        self.changed = changed or threading.Condition()
        self.woken = threading.Event()
        holds = threading.Event()
        self.thread = threading.Thread(target=self._sleep, args=(clock, until, holds), daemon=True)
        self.thread.start()
        assert holds.wait(SAFETY)
        # the thread held it and gives it back only by falling asleep
        with self.changed:
            pass

    def _sleep(self, clock: FakeClock | SystemClock, until: float, holds: threading.Event) -> None:
        with self.changed:
            holds.set()
            clock.wait(self.changed, until)
        self.woken.set()


# --- deadlines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seconds", [0.0, -0.0, -1.0, -math.inf, math.nan, "soon", "5", b"5", True, None, [1.0]]
)
def test_a_budget_that_is_no_positive_time_is_refused(seconds):
    with pytest.raises(BudgetError, match=r"expected a positive number of seconds, such as 0\.008"):
        Deadline.after(seconds, FakeClock())


def test_a_number_is_no_deadline():
    check_deadline(Deadline.after(1.0))
    with pytest.raises(
        BudgetError, match=r"deadline=0\.008; expected a Deadline, such as Deadline\.after"
    ):
        check_deadline(0.008)


def test_the_error_names_what_was_given():
    with pytest.raises(BudgetError, match="the grace period is 'soon'"):
        positive_seconds("soon", "the grace period")


def test_a_bad_budget_is_a_value_error_for_callers_who_do_not_know_this_library():
    with pytest.raises(ValueError, match=r"the time until a deadline is -1\.0; expected"):
        Deadline.after(-1.0)


def test_a_deadline_is_stamped_once_and_time_counts_against_it():
    clock = FakeClock(now=100.0)
    deadline = Deadline.after(0.5, clock)
    assert deadline == Deadline(100.5)
    clock.advance(0.375)
    assert deadline.remaining(clock) == 0.125
    clock.advance(0.25)
    assert deadline.remaining(clock) == -0.125


@pytest.mark.parametrize("seconds", [np.float64(0.5), np.float32(0.5), np.int64(2), 1])
def test_numbers_of_other_kinds_become_plain_ones(seconds):
    deadline = Deadline.after(seconds, FakeClock())
    assert type(deadline.instant) is float
    assert deadline.instant == float(seconds)


def test_an_infinite_budget_means_no_limit():
    clock = FakeClock(now=7.0)
    assert Deadline.after(math.inf, clock) == NEVER
    assert NEVER.remaining(clock) == math.inf


@pytest.mark.parametrize("instant", [math.nan, "5", None, True])
def test_an_instant_that_is_not_a_number_is_refused(instant):
    with pytest.raises(BudgetError, match=f"deadline is {instant!r}; expected an instant"):
        Deadline(instant)


def test_of_several_deadlines_the_first_can_be_taken():
    clock = FakeClock()
    soon = Deadline.after(1.0, clock)
    clock.advance(5.0)
    # when they were made does not count
    late = Deadline.after(2.0, clock)
    assert min(late, NEVER, soon) is soon
    assert soon < late < NEVER


def test_a_deadline_on_the_system_clock_lies_ahead():
    assert 0.0 < Deadline.after(1000.0).remaining() <= 1000.0


# --- the fake clock -------------------------------------------------------------------------------


def test_a_fake_clock_moves_only_when_told():
    clock = FakeClock(now=2.0)
    assert clock.now() == clock.now() == 2.0
    clock.advance(0.25)
    assert clock.now() == 2.25


def test_waiting_for_an_instant_that_has_come_returns_at_once():
    clock = FakeClock(now=1.0)
    changed = Watched(script=lambda: pytest.fail("slept"))
    with changed:
        clock.wait(changed, until=1.0)
        clock.wait(changed, until=0.5)


def test_a_sleeper_is_woken_when_its_instant_has_come_and_not_before():
    clock = FakeClock()
    notified = []

    def script() -> None:
        for _ in range(4):
            clock.advance(0.25)
            notified.append(changed.notifications)

    changed = Watched(script)
    with changed:
        clock.wait(changed, until=0.75)
    assert notified[:3] == [0, 0, 1]


def test_a_sleeper_that_was_woken_is_not_woken_again():
    clock = FakeClock()
    changed = Watched(script=lambda: clock.advance(1.0))
    with changed:
        clock.wait(changed, until=0.5)
    clock.advance(1.0)
    assert changed.notifications == 1


def test_a_sleeper_leaves_nothing_behind_when_its_wait_is_cut_short_by_an_error():
    def interrupted() -> None:
        raise KeyboardInterrupt

    clock = FakeClock()
    changed = Watched(interrupted)
    with changed, pytest.raises(KeyboardInterrupt):
        clock.wait(changed, until=1.0)
    clock.advance(2.0)
    assert changed.notifications == 0


def test_advancing_wakes_a_thread_whose_instant_has_come():
    clock = FakeClock()
    early = Sleeper(clock, 1.0)
    late = Sleeper(clock, 2.0)
    clock.advance(1.0)
    assert early.woken.wait(SAFETY)
    assert not late.woken.is_set()
    clock.advance(1.0)
    assert late.woken.wait(SAFETY)


def test_a_notification_wakes_a_sleeper_without_any_time_passing():
    clock = FakeClock()
    sleeper = Sleeper(clock, math.inf)
    with sleeper.changed:
        sleeper.changed.notify_all()
    assert sleeper.woken.wait(SAFETY)
    assert clock.now() == 0.0


def test_of_two_sleepers_on_one_condition_the_second_is_still_woken_by_time():
    clock = FakeClock()
    changed = threading.Condition()
    sleepers = [Sleeper(clock, 1.0, changed), Sleeper(clock, 1.0, changed)]
    with changed:
        changed.notify()
    assert any_woken(sleepers)
    clock.advance(1.0)
    assert all(sleeper.woken.wait(SAFETY) for sleeper in sleepers)


def any_woken(sleepers: list[Sleeper]) -> bool:
    """The first sleeper on a condition is the first to be notified; join it."""
    sleepers[0].thread.join(SAFETY)
    return sleepers[0].woken.is_set()


# --- the system clock -----------------------------------------------------------------------------


def test_the_system_clock_never_goes_back():
    clock = SystemClock()
    readings = [clock.now() for _ in range(1000)]
    assert readings == sorted(readings)
    assert readings[-1] > readings[0]


def test_the_system_clock_does_not_wait_for_the_past():
    clock = SystemClock()
    changed = threading.Condition()
    with changed:
        clock.wait(changed, until=clock.now() - 1.0)


def test_the_system_clock_returns_when_the_instant_comes():
    clock = SystemClock()
    changed = threading.Condition()
    until = clock.now() + 0.002
    with changed:
        # a condition may wake early by its nature
        while clock.now() < until:
            clock.wait(changed, until)
    assert clock.now() >= until


@pytest.mark.parametrize("until", [math.inf, 1e300])
def test_a_notification_ends_a_wait_on_the_system_clock_however_far_the_deadline(until):
    sleeper = Sleeper(SystemClock(), until)
    assert not sleeper.woken.is_set()
    with sleeper.changed:
        sleeper.changed.notify_all()
    assert sleeper.woken.wait(SAFETY)


def test_measurements_run_in_turn_every_other_round_the_other_way_round():
    ran = []

    def measure(name):
        ran.append(name)
        return f"{name}{len(ran)}"

    found = list(interleaved([lambda: measure("a"), lambda: measure("b")], repeats=2, warm_up=1))
    assert "".join(ran) == "abbaab"
    assert found == [("a4", "b3"), ("a5", "b6")]


def test_times_of_a_piece_of_work_are_those_after_the_warm_up():
    clock = FakeClock()
    taken = iter([9.0, 9.0, 1.0, 2.0, 3.0])
    found = times_of(lambda: clock.advance(next(taken)), repeats=3, warm_up=2, clock=clock)
    assert found == [1.0, 2.0, 3.0]
