"""Loops with a period: no drift, the newest item, overruns counted."""

import itertools
import threading
from collections.abc import Iterator

import pytest

from fakes import elsewhere, wait_until
from impatient.clock import FakeClock
from impatient.errors import BudgetError, RunError
from impatient.runtime import every, latest


class JumpingClock(FakeClock):
    """A clock on which waiting takes no time of the test, and always a little too long."""

    def wait(self, changed: threading.Condition, until: float) -> None:
        self._now = until + 0.001


def ticks(overruns: str, bodies: list[float], period_s: float = 1.0) -> tuple[list[float], int]:
    """When each item came, if the loop's body takes these times, and how many were overrun."""
    clock = JumpingClock(100.0)
    loop = every(period_s, itertools.count(), overruns=overruns, clock=clock)
    came = []
    for item, body_s in zip(loop, bodies, strict=False):
        came.append(round(clock.now() - 100.0, 2))
        assert item == len(came) - 1
        clock.advance(body_s)
    return came, loop.overruns


def test_ticks_do_not_drift() -> None:
    came, overruns = ticks("skip", [0.3] * 1000, period_s=0.5)
    assert came == [round(number * 0.5, 2) for number in range(1000)]
    assert overruns == 0


def test_missed_ticks_are_left_out_and_counted() -> None:
    assert ticks("skip", [0.5, 2.5, 0.5, 0.5]) == ([0.0, 1.0, 4.0, 5.0], 2)


def test_missed_ticks_are_caught_up_with() -> None:
    assert ticks("catch_up", [0.5, 2.5, 0.1, 0.1, 0.1]) == ([0.0, 1.0, 3.5, 3.6, 4.0], 3)


def test_an_overrun_may_raise_and_says_by_how_much() -> None:
    with pytest.raises(RunError, match=r"took 2500\.\d+ ms of its 1000\.000 ms"):
        ticks("raise", [2.5, 0.5])


def test_the_deadline_is_the_next_tick() -> None:
    clock = JumpingClock()
    loop = every(0.5, itertools.count(), clock=clock)
    for number in range(3):
        next(loop)
        assert loop.deadline.instant == pytest.approx((number + 1) * 0.5)


def test_a_source_that_is_late_is_waited_for_and_is_no_overrun() -> None:
    clock = JumpingClock()

    def slow() -> Iterator[int]:
        for number in range(3):
            clock.advance(1.7)
            yield number

    loop = every(1.0, slow(), clock=clock)
    assert list(loop) == [0, 1, 2]
    assert (loop.overruns, loop.ticks) == (0, 3)


@pytest.mark.parametrize("period_s", [0.0, -1.0, float("nan")])
def test_a_period_is_positive(period_s: float) -> None:
    with pytest.raises(BudgetError, match="the period of a loop"):
        every(period_s, [])


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(RunError, match="overruns='drop'"):
        every(1.0, [], overruns="drop")


def test_the_newest_item_wins() -> None:
    given = threading.Semaphore(0)
    taken = threading.Event()

    def camera() -> Iterator[int]:
        yield 0
        assert taken.wait(20)
        yield from (1, 2, 3)
        given.release()
        assert taken.wait(20)

    newest = latest(camera())
    assert next(newest) == 0
    taken.set()
    assert given.acquire(timeout=20)
    wait_until(lambda: not newest._waiting or newest._waiting == [3])
    assert next(newest) == 3
    assert newest.dropped == 2
    assert list(newest) == []


def test_an_error_of_the_source_comes_after_its_last_item() -> None:
    def camera() -> Iterator[int]:
        yield 7
        raise OSError("unplugged")

    newest = latest(camera())
    wait_until(lambda: newest._ended)
    assert next(newest) == 7
    with pytest.raises(OSError, match="unplugged"):
        next(newest)


def test_closing_ends_a_loop_that_waits() -> None:
    release = threading.Event()

    def camera() -> Iterator[int]:
        release.wait(20)
        yield 1

    newest = latest(camera())
    waiting = elsewhere(lambda: list(newest))
    newest.close()
    assert waiting.result(timeout=20) == []
    release.set()
