"""A network in one session whose exits are read while it runs, and which is ended when nobody wants more.

Nothing is cut, so nothing is lost at cuts: with many exits this is faster than a session per stage. In return every head runs,
and a batch stays as large as it was.

The outputs lie in memory of ours, filled with NaN when a run begins. The session's file makes each with an operator of its own
that only copies, so that a number in it is final: an exit has answered when there are no NaNs left. (A network whose answer has
NaNs in it has answered when the session ends.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .staged import Array, PartExit, Run, Wiring

# How long to sleep between two looks at an output: a share of what has been waited, within bounds. What is late by a twentieth
# of a stage is not worth more of the processor, which the session needs.
LOOK_SHARE, SHORTEST_LOOK_S, LONGEST_LOOK_S = 0.05, 50e-6, 1e-3


class Flight(Protocol):
    """A session that is computing."""

    def ended(self) -> bool:
        """Whether it computes no more.

        Raises:
            Cancelled: if `cancel` came before it was done. Everything else that went wrong is raised as it is.
        """

    def cancel(self) -> None:
        """From any thread: end it early, at its next operator; does not wait."""


class Session(Protocol):
    """All exits of a network in an engine."""

    def memory(self, rows: int) -> list[Array]:
        """New memory for the outputs of so many samples, full of NaN: per exit, shape [B, num_classes + 1]."""

    def begin(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> Flight:
        """Compute on threads of its own, into this memory. Flights of one session follow each other."""


class Streamed:
    """A network in one session: called with the inputs in order, it begins a run."""

    shrinks = False

    def __init__(self, wiring: Wiring, session: Session) -> None:
        self.wiring, self.session = wiring, session

    @property
    def num_exits(self) -> int:
        return len(self.wiring.features)

    def __call__(self, inputs: Sequence[Array]) -> StreamedRun:
        return StreamedRun(self.session, inputs, self.wiring.batch_size(inputs))


class StreamedRun(Run):
    """One run: the session begins when the first exit is asked for, and goes on whether or not the next one is.

    Exits have no features, only outputs, and these are there when the exit is.
    """

    def __init__(self, session: Session, inputs: Sequence[Array], rows: int) -> None:
        self._session, self._inputs = session, inputs
        self._outputs = session.memory(rows)
        self._flight: Flight | None = None
        self._next = 0
        self._rows: Array | None = None  # that are kept; None: all
        self._lock = threading.Lock()
        self._awaited: Flight | None = None  # what `__next__` waits for, and `cancel` would end

    def __next__(self) -> PartExit:
        index = self._next
        if index >= len(self._outputs):
            raise StopIteration
        if np.isnan(self._outputs[index]).any():
            self._await(index)
        self._next += 1
        output = self._outputs[index][:, :-1]
        output = output if self._rows is None else output[self._rows]
        return PartExit(index, output if self._next == len(self._outputs) else None, None, output)

    def keep(self, rows: Any) -> None:
        self._rows = rows if self._rows is None else self._rows[rows]

    def cancel(self) -> None:
        with self._lock:
            if self._awaited is not None:
                self._awaited.cancel()

    def close(self) -> None:
        if self._flight is not None:
            self._flight.cancel()
        self._next, self._flight = len(self._outputs), None

    def _await(self, index: int) -> None:
        """Wait until an output is there, or as much of it as will ever be."""
        if self._flight is None:
            self._flight = self._session.begin(self._inputs, self._outputs)
        begin, self._awaited = time.perf_counter(), self._flight
        try:
            while np.isnan(self._outputs[index]).any() and not self._flight.ended():
                waited_s = time.perf_counter() - begin
                time.sleep(min(max(LOOK_SHARE * waited_s, SHORTEST_LOOK_S), LONGEST_LOOK_S))
        except BaseException:
            self._flight = None  # if it is asked again, it begins again
            raise
        finally:
            with self._lock:  # a cancel that comes late must not end what nobody waits for
                self._awaited = None
