"""Time: a clock that can be replaced, and deadlines as instants on it. Seconds, as float,
everywhere.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import Protocol

from impatient.errors import BudgetError


class Clock(Protocol):
    """What the runtime needs to know about time."""

    def now(self) -> float:
        """Seconds on a monotonic scale with an arbitrary zero."""
        ...

    def wait(self, changed: threading.Condition, until: float) -> None:
        """Sleep on a held condition until it is notified or the instant `until` has come."""
        ...


class SystemClock:
    """The machine's own monotonic clock."""

    def now(self) -> float:
        return time.perf_counter()

    def wait(self, changed: threading.Condition, until: float) -> None:
        # threading refuses timeouts above TIMEOUT_MAX; an endless deadline waits for the
        # notification alone
        timeout = until - time.perf_counter()
        changed.wait(timeout if timeout < threading.TIMEOUT_MAX else None)


class FakeClock:
    """A clock that stands still until told otherwise, so that tests never sleep.

    Example:
        >>> clock = FakeClock()
        >>> clock.advance(0.25)
        >>> clock.now()
        0.25
    """

    def __init__(self, now: float = 0.0) -> None:
        self._now = now
        self._lock = threading.Lock()
        # one entry per wait, with the instant it waits for
        self._sleepers: list[tuple[float, threading.Condition]] = []

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move time on and wake whoever waits for an instant that has come."""
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


@dataclass(frozen=True, slots=True)
class Deadline:
    """An instant on a monotonic clock, stamped once: time spent waiting in a queue counts against
    it.

    Make one with `Deadline.after(seconds)` where the request comes in and hand it on.

    Example:
        >>> deadline = Deadline.after(0.008)
        >>> 0.0 < deadline.remaining() <= 0.008
        True
    """

    instant: float

    def __post_init__(self) -> None:
        if math.isnan(self.instant):
            raise BudgetError(
                "deadline is NaN; expected an instant on the clock, in seconds. Use "
                "Deadline.after(0.008)."
            )

    @classmethod
    def after(cls, seconds: float, clock: Clock = SYSTEM_CLOCK) -> Deadline:
        """The instant that lies `seconds` from now.

        Raises:
            BudgetError: unless `seconds` is a positive number (infinity is allowed and means no
                limit).
        """
        return cls(clock.now() + positive_seconds(seconds, "the time until a deadline"))

    def remaining(self, clock: Clock = SYSTEM_CLOCK) -> float:
        """Seconds left; negative once the deadline has passed."""
        return self.instant - clock.now()


NEVER = Deadline(math.inf)


def positive_seconds(value: float, what: str) -> float:
    """Return `value` as float if it is a positive time, else raise a BudgetError that names it."""
    return _positive(value, what, "a positive number of seconds, such as 0.008 for 8 ms")


def positive_ms(value: float, what: str) -> float:
    """As `positive_seconds`, of a number of milliseconds."""
    return _positive(value, what, "a positive number of milliseconds, such as 8")


def check_deadline(deadline: object) -> None:
    """Raise a BudgetError for what is no deadline, such as a number of seconds."""
    if not isinstance(deadline, Deadline):
        raise BudgetError(
            f"deadline={deadline!r}; expected a Deadline, such as Deadline.after(0.008) for 8 ms "
            "from now."
        )


def _positive(value: float, what: str, needed: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not number > 0.0:
        raise BudgetError(f"{what} is {value!r}; expected {needed}.")
    return number
