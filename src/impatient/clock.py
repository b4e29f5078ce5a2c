"""Clocks that can be replaced, deadlines on them, and measurements in turn.

All times are seconds, as float.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from impatient.checks import as_number
from impatient.errors import BudgetError

T = TypeVar("T")


class Clock(Protocol):
    """The clock that the runtime reads and waits on."""

    def now(self) -> float:
        """Return the present instant, in seconds since an arbitrary zero."""
        ...

    def wait(self, changed: threading.Condition, until: float) -> None:
        """Wait on a held condition for a notification, at most until an instant."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    # The function itself, because a method around it would take longer than it does.
    now = staticmethod(time.perf_counter)

    def wait(self, changed: threading.Condition, until: float) -> None:
        # threading refuses timeouts above TIMEOUT_MAX. Without a deadline, only the notification
        # ends the wait.
        timeout = until - time.perf_counter()
        changed.wait(timeout if timeout < threading.TIMEOUT_MAX else None)


class FakeClock:
    """A clock that moves only by `advance`, so that tests never sleep.

    Example:
        >>> clock = FakeClock()
        >>> clock.advance(0.25)
        >>> clock.now()
        0.25
    """

    def __init__(self, now: float = 0.0) -> None:
        self._now = now
        self._lock = threading.Lock()
        # One entry per wait, with the instant that it waits for.
        self._sleepers: list[tuple[float, threading.Condition]] = []

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Advance the time, and end the waits whose instant has come."""
        with self._lock:
            self._now += seconds
            due = {changed for until, changed in self._sleepers if until <= self._now}
        for changed in due:
            with changed:
                changed.notify_all()

    def wait(self, changed: threading.Condition, until: float) -> None:
        with self._lock:
            if self._now >= until:
                return
            self._sleepers.append((until, changed))
        try:
            changed.wait()
        finally:
            with self._lock:
                self._sleepers.remove((until, changed))


SYSTEM_CLOCK = SystemClock()


@dataclass(frozen=True, slots=True, order=True)
class Deadline:
    """An instant on a monotonic clock by which an answer must be ready.

    Make one with `Deadline.after(seconds)` where the request comes in, and pass it on. So time
    spent waiting in a queue counts, too. Of several, `min` is the one that comes first.

    Attributes:
        instant: the instant, in seconds.
        made: instant at which `after` made it, from which waiting counts; None if it is not known.

    Example:
        >>> deadline = Deadline.after(0.008)
        >>> 0.0 < deadline.remaining() <= 0.008
        True
    """

    instant: float
    made: float | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        instant = self.instant
        if math.isnan(instant if type(instant) is float else as_number(instant)):
            raise BudgetError(
                f"deadline is {instant!r}; expected an instant on the clock, in seconds. Use "
                "Deadline.after(0.008)."
            )

    @classmethod
    def after(cls, seconds: float, clock: Clock = SYSTEM_CLOCK) -> Deadline:
        """Make a deadline `seconds` from now.

        Raises:
            BudgetError: if `seconds` is not a positive number; infinity is allowed and means no
                deadline.
        """
        now = clock.now()
        if type(seconds) is not float or not seconds > 0.0:
            seconds = positive_seconds(seconds, "the time until a deadline")
        return cls(now + seconds, now)

    def remaining(self, clock: Clock = SYSTEM_CLOCK) -> float:
        """Return the seconds left, negative after the deadline."""
        return self.instant - clock.now()


NEVER = Deadline(math.inf)


def positive_seconds(value: float, what: str) -> float:
    """Check that a number of seconds is positive, and return it as float.

    Args:
        value: number of seconds.
        what: name of the value for the error message.
    Raises:
        BudgetError: if the value is not a positive number.
    """
    return _positive(value, what, "a positive number of seconds, such as 0.008 for 8 ms")


def positive_ms(value: float, what: str) -> float:
    """Check a number of milliseconds as `positive_seconds` does."""
    return _positive(value, what, "a positive number of milliseconds, such as 8")


def check_deadline(deadline: object) -> None:
    """Raise a BudgetError if a value is not a `Deadline`."""
    if not isinstance(deadline, Deadline):
        raise BudgetError(
            f"deadline={deadline!r}; expected a Deadline, such as Deadline.after(0.008) for 8 ms "
            "from now."
        )


def _positive(value: float, what: str, expected: str) -> float:
    number = as_number(value)
    if not number > 0.0:
        raise BudgetError(f"{what} is {value!r}; expected {expected}.")
    return number


def interleaved(
    measurements: Sequence[Callable[[], T]], *, repeats: int, warm_up: int = 0
) -> Iterator[tuple[T, ...]]:
    """Make several measurements in turn, so that all meet the same disturbances.

    Every other round goes the other way round: whatever ran last has warmed the caches for the
    next. So the first and second result of one, the third and fourth, ... are back to back.

    Args:
        measurements: each returns what it has measured.
        repeats: rounds that count.
        warm_up: rounds before them that do not.
    Returns:
        For each round that counts the result of each measurement.
    """
    places = range(len(measurements))
    for repeat in range(-warm_up, repeats):
        found = {
            place: measurements[place]() for place in (places if repeat % 2 else reversed(places))
        }
        if repeat >= 0:
            yield tuple(found[place] for place in places)


def times_of(
    work: Callable[[], object], *, repeats: int, warm_up: int, clock: Clock = SYSTEM_CLOCK
) -> list[float]:
    """Measure how long a piece of work takes, again and again, seconds."""

    def timed() -> float:
        begin = clock.now()
        work()
        return clock.now() - begin

    return [seconds for (seconds,) in interleaved([timed], repeats=repeats, warm_up=warm_up)]
