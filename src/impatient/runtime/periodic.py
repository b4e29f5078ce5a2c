"""Loops with a period, for robots and cameras: the newest frame wins, and overruns are counted."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, Literal, TypeVar

from impatient import checks
from impatient.clock import SYSTEM_CLOCK, Clock, Deadline, positive_seconds
from impatient.errors import RunError

Item = TypeVar("Item")
Overruns = Literal["skip", "catch_up", "raise"]


def latest(source: Iterable[Item]) -> Latest[Item]:
    """Read a source on a thread of its own, and keep only its newest item.

    So a loop that is slower than its camera works on the newest picture and never falls behind.

    Args:
        source: frames as they come; its iterator may block.
    Returns:
        An iterator of items that were not given before, each the newest of its time. It ends after
        the source's last item, and raises what the source raises.
    """
    return Latest(source)


def every(
    period_s: float,
    source: Iterable[Item],
    *,
    overruns: Overruns = "skip",
    clock: Clock = SYSTEM_CLOCK,
) -> Periodic[Item]:
    """Give an item of a source at every tick of a period, without drift.

    Args:
        period_s: seconds from tick to tick, such as 1/30.
        source: where items come from, such as `latest(camera)`. Where it has none at a tick, the
            loop waits for it.
        overruns: what follows if the loop's body takes longer than a period: "skip" leaves the
            missed ticks out and goes on at the next; "catch_up" gives them without waiting; "raise"
            raises RunError.
        clock: clock to read and wait on.
    Example:
        >>> for number in every(0.001, [1, 2, 3]):
        ...     print(number)
        1
        2
        3
    """
    return Periodic(period_s, source, overruns=overruns, clock=clock)


class Latest(Iterator[Item]):
    """The newest item of a source that a thread reads, made by `latest`.

    Attributes:
        dropped: items that a newer one has replaced before they were asked for.
    """

    def __init__(self, source: Iterable[Item]) -> None:
        self.dropped = 0
        self._changed = threading.Condition()
        # At most one: the newest item that was not given yet.
        self._waiting: list[Item] = []
        self._ended = False
        self._error: BaseException | None = None
        threading.Thread(
            target=self._read, args=(iter(source),), name="impatient-latest", daemon=True
        ).start()

    def __next__(self) -> Item:
        with self._changed:
            while not self._waiting and not self._ended:
                self._changed.wait()
            if self._waiting:
                return self._waiting.pop()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """End the loop, and read no further item."""
        with self._changed:
            self._waiting.clear()
            self._ended = True
            self._changed.notify_all()

    def _read(self, items: Iterator[Item]) -> None:
        error: BaseException | None = None
        try:
            for item in items:
                with self._changed:
                    if self._ended:
                        return
                    self.dropped += len(self._waiting)
                    self._waiting[:] = [item]
                    self._changed.notify_all()
        except BaseException as raised:
            error = raised
        with self._changed:
            self._error = error
            self._ended = True
            self._changed.notify_all()


class Periodic(Iterator[Item], Generic[Item]):
    """Items of a source at the ticks of a period, made by `every`.

    Attributes:
        ticks: items that were given.
        overruns: ticks that had passed before the loop's body was done.
    """

    def __init__(
        self, period_s: float, source: Iterable[Item], *, overruns: Overruns, clock: Clock
    ) -> None:
        checks.one_of(RunError, Overruns, overruns=overruns)
        self._period_s = positive_seconds(period_s, "the period of a loop")
        self._items = iter(source)
        self._policy = overruns
        self._clock = clock
        # Nobody notifies it: only the clock ends a wait.
        self._tick = threading.Condition()
        # Instant of tick 0. None before it.
        self._begin: float | None = None
        # Number of the tick that comes next.
        self._number = 0
        self.ticks = 0
        self.overruns = 0

    @property
    def deadline(self) -> Deadline:
        """Return the next tick, by which the present item's answer should be ready."""
        return Deadline(self._instant(self._number))

    def __next__(self) -> Item:
        if self._begin is None:
            self._begin = self._clock.now()
        elif self._clock.now() > self._instant(self._number):
            self._overrun(self._clock.now())
        self._wait(self._instant(self._number))
        item = next(self._items)
        self._number += 1
        if self._policy != "catch_up":
            # A source that was waited for is no overrun of the loop.
            self._number = max(self._number, 1 + self._passed(self._clock.now()))
        self.ticks += 1
        return item

    def _instant(self, number: int) -> float:
        # From the beginning, not from tick to tick, so that errors do not add up.
        return (self._clock.now() if self._begin is None else self._begin) + number * self._period_s

    def _passed(self, now: float) -> int:
        """Return the number of the latest tick that is not after an instant."""
        assert self._begin is not None
        # A tick itself must not be missed by a rounding error.
        return math.floor((now - self._begin) / self._period_s + 1e-9)

    def _overrun(self, now: float) -> None:
        missed = self._passed(now) - self._number + 1
        self.overruns += missed
        if self._policy == "raise":
            raise RunError(
                f"the loop took {(now - self._instant(self._number - 1)) * 1e3:.3f} ms of its "
                f"{self._period_s * 1e3:.3f} ms. Give its runs loop.deadline, allow a longer "
                "period, or use overruns='skip'."
            )
        if self._policy == "skip":
            self._number += missed

    def _wait(self, until: float) -> None:
        with self._tick:
            while self._clock.now() < until:
                self._clock.wait(self._tick, until)
