"""Measure how late an event loop is."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable

from impatient.clock import SYSTEM_CLOCK

BEAT_S = 0.02
# A loop that was late once has stalled; one that was late so often in a row has too much to do.
IN_A_ROW = 3
# Beats of about a minute.
KEPT = 3000


class Heartbeat:
    """A callback that is due again and again on an event loop, and how late it comes.

    Args:
        each: what is done at each beat.
    Thread:
        All methods belong to the event loop on which `start` was called.
    """

    def __init__(self, each: Callable[[], None]) -> None:
        self._each = each
        self._late = collections.deque([0.0] * IN_A_ROW, maxlen=KEPT)
        self._clock = SYSTEM_CLOCK
        self._timer: asyncio.TimerHandle | None = None
        self._due = self._clock.now() + BEAT_S

    def start(self) -> None:
        """Begin, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._await_next()

    def stop(self) -> None:
        """End it."""
        if self._timer is not None:
            self._timer.cancel()

    def _beat(self) -> None:
        self._late.append(self.lag_s)
        self._await_next()
        self._each()

    def _await_next(self) -> None:
        self._due = self._clock.now() + BEAT_S
        self._timer = self._loop.call_later(BEAT_S, self._beat)

    @property
    def lag_s(self) -> float:
        """Seconds by which the loop is late at this moment."""
        return max(0.0, self._clock.now() - self._due)

    @property
    def worst_s(self) -> float:
        """Most seconds by which it was late, about the last minute."""
        return max(*self._late, self.lag_s)

    def behind(self, bound_s: float) -> bool:
        """Tell whether it is late by more than a bound, and was at the last beats, too."""
        late = self._late
        return self.lag_s > bound_s and all(late[-1 - back] > bound_s for back in range(IN_A_ROW))
