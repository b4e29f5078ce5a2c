"""A network in one session whose exits are read while it runs, and which is ended when nobody wants
more.

Nothing is cut, so nothing is lost at cuts: with many exits this is faster than a session per stage.
In return every head runs, and a batch stays as large as it was.

The outputs lie in memory of ours, filled with a NaN that no computation makes when a run begins.
The session's file makes each with an operator of its own that only copies, so that a number in it
is final: an exit has answered when none of these NaNs is left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .staged import Array, PartExit, Run, Wiring

# Every look at an output takes time from the session, which has all the processor where its threads
# do: the first comes shortly before the exit does by experience, the others at a share of what has
# been waited, within bounds.
FIRST_LOOK = 0.95
LOOK_SHARE = 0.1
SHORTEST_LOOK_S = 100e-6
LONGEST_LOOK_S = 1e-3
# per run
FORGETTING = 1.05

# the NaN, per bytes of a number
UNWRITTEN = {2: 0x7E5A, 4: 0x7FDA5A5A, 8: 0x7FFA5A5A5A5A5A5A}


def unwritten(rows: int, columns: int, dtype: Any) -> Array:
    """Memory in which nothing has been written: halves, floats or doubles, shape [rows, columns]."""
    size = np.dtype(dtype).itemsize
    return np.full((rows, columns), UNWRITTEN[size], f"u{size}").view(dtype)


def _bits(output: Array) -> Array:
    return output.view(f"u{output.dtype.itemsize}")


def _has_come(bits: Array) -> bool:
    """Whether all of an output has been written."""
    unwritten = UNWRITTEN[bits.dtype.itemsize]
    # a look is most often this one
    if bits[-1, -1] == unwritten:
        return False
    return not (bits == unwritten).any()


class Flight(Protocol):
    """A session that is computing."""

    def ended(self) -> bool:
        """Whether it computes no more.

        Raises:
            Cancelled: if `cancel` came before it was done. Everything else that went wrong is
                raised as it is.
        """

    def cancel(self) -> None:
        """From any thread: end it early, at its next operator; does not wait."""


class Session(Protocol):
    """All exits of a network in an engine."""

    def memory(self, rows: int) -> list[Array]:
        """New, unwritten memory for the outputs of so many samples: per exit, shape [B, num_classes
        + 1].
        """

    def busy(self) -> bool:
        """Whether a flight has not ended."""

    def begin(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> Flight:
        """Compute on threads of its own, into this memory; at once, or when the flight before has
        ended.
        """


class Streamed:
    """A network in one session: called with the inputs in order, it begins a run."""

    shrinks = False

    def __init__(self, wiring: Wiring, session: Session) -> None:
        self.wiring = wiring
        self.session = session
        self._steps = Steps()

    @property
    def num_exits(self) -> int:
        return len(self.wiring.features)

    def __call__(self, inputs: Sequence[Array]) -> StreamedRun:
        return StreamedRun(self.session, inputs, self.wiring.batch_size(inputs), self._steps)


class Steps:
    """How soon each exit came after the one before it: the least time, slowly forgotten."""

    def __init__(self) -> None:
        # by rows and exit
        self._least_s: dict[tuple[int, int], float] = {}

    def expected_s(self, rows: int, exit: int) -> float:
        return self._least_s.get((rows, exit), 0.0)

    def observe(self, rows: int, exit: int, seconds: float) -> None:
        self._least_s[rows, exit] = min(
            seconds, FORGETTING * self._least_s.get((rows, exit), seconds)
        )


class StreamedRun(Run):
    """One run: the session begins when the first exit is asked for, and goes on whether or not the
    next one is.

    Exits have no features, only outputs, and these are there when the exit is.
    """

    def __init__(self, session: Session, inputs: Sequence[Array], rows: int, steps: Steps) -> None:
        self._flight: Flight | None = None
        self._session = session
        self._inputs = inputs
        self._count = rows
        self._steps = steps
        self._outputs = session.memory(rows)
        self._bits = [_bits(output) for output in self._outputs]
        self._next = 0
        # that are kept; None: all
        self._rows: Array | None = None
        # when the exit before came; None: nobody looked
        self._before: float | None = None
        self._lock = threading.Lock()
        # what `__next__` waits for, and `cancel` would end
        self._awaited: Flight | None = None
        self._cancelled = threading.Event()

    def __next__(self) -> PartExit:
        index = self._next
        if index >= len(self._outputs):
            raise StopIteration
        whole = True
        if _has_come(self._bits[index]):
            self._before = None
        else:
            whole = self._await(index)
        self._next += 1
        output = self._outputs[index][:, :-1]
        output = output if self._rows is None else output[self._rows]
        return PartExit(
            index, output if self._next == len(self._outputs) else None, None, output, whole=whole
        )

    def keep(self, rows: Any) -> None:
        self._rows = rows if self._rows is None else self._rows[rows]

    def cancel(self) -> None:
        with self._lock:
            if self._awaited is not None:
                self._awaited.cancel()
                self._cancelled.set()

    def close(self) -> None:
        if self._flight is not None:
            self._flight.cancel()
        self._next = len(self._outputs)
        self._flight = None

    def __del__(self) -> None:
        # left without being closed: it must not keep the session busy
        if self._flight is not None:
            self._flight.cancel()

    def _await(self, index: int) -> bool:
        """Wait until an output is there; say whether the session had nothing else to do first."""
        idle = True
        if self._flight is None:
            idle = not self._session.busy()
            self._flight = self._session.begin(self._inputs, self._outputs)
            self._before = time.perf_counter()
            self._cancelled.clear()
        self._awaited = self._flight
        try:
            self._look_until(index, self._flight)
        except BaseException:
            # it may be an interrupt from the keyboard
            self._flight.cancel()
            # if it is asked again, it begins again
            self._flight = None
            raise
        finally:
            # a cancel that comes late must not end what nobody waits for
            with self._lock:
                self._awaited = None
        return idle

    def _look_until(self, index: int, flight: Flight) -> None:
        """Look at an output, now and then, until it is there."""
        begin = time.perf_counter()
        expected_s = (
            0.0
            if self._before is None
            else self._steps.expected_s(self._count, index) + self._before - begin
        )
        sleep_s = FIRST_LOOK * expected_s
        while not _has_come(self._bits[index]) and not flight.ended():
            if self._cancelled.wait(max(sleep_s, SHORTEST_LOOK_S)):
                # it ends at its next operator
                time.sleep(SHORTEST_LOOK_S)
            sleep_s = min(LOOK_SHARE * (time.perf_counter() - begin), LONGEST_LOOK_S)
        now = time.perf_counter()
        if self._before is not None:
            self._steps.observe(self._count, index, now - self._before)
        self._before = now
