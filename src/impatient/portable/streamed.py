"""A network in one session, whose exits are read while it runs.

The session is ended when no further exit is wanted. The network is not cut, so cuts cost no time:
with many exits this is faster than a session per stage. In return, every head runs and the batch
cannot shrink.

The outputs are written to memory that we allocate. At the start of a run it is filled with a
special NaN that no computation produces. The exported file writes each output with a separate
operator that only copies, so that every number in it is final. An exit has answered when none of
these NaNs is left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .staged import Array, Exit, Run, Wiring

# Every look at an output takes processor time from the session. So the first look comes shortly
# before the exit is expected, by experience. Later looks follow at a share of the time waited so
# far, within bounds.
FIRST_LOOK = 0.95
LOOK_SHARE = 0.1
SHORTEST_LOOK_S = 100e-6
LONGEST_LOOK_S = 1e-3
# Factor by which a stored least time may grow in each run.
FORGETTING = 1.05

# Bits of the special NaN, by the bytes of a number.
UNWRITTEN = {2: 0x7E5A, 4: 0x7FDA5A5A, 8: 0x7FFA5A5A5A5A5A5A}


def unwritten(rows: int, columns: int, dtype: Any) -> Array:
    """Allocate floating-point memory, filled with the NaN for "unwritten"."""
    size = np.dtype(dtype).itemsize
    return np.full((rows, columns), UNWRITTEN[size], f"u{size}").view(dtype)


def _has_come(bits: Array) -> bool:
    """Tell whether an output has been written completely."""
    unwritten = UNWRITTEN[bits.dtype.itemsize]
    # This quick check decides most looks.
    if bits[-1, -1] == unwritten:
        return False
    return not (bits == unwritten).any()


class Flight(Protocol):
    """A session's computation in progress."""

    def ended(self) -> bool:
        """Tell whether the computation has ended.

        Raises:
            Cancelled: if `cancel` was called before the computation was done.
            BundleError: if the engine cannot compute these inputs.
        """

    def cancel(self) -> None:
        """End the computation at its next operator, without waiting.

        Thread:
            May be called from any thread.
        """


class Session(Protocol):
    """All exits of a network in an engine."""

    def memory(self, rows: int) -> list[Array]:
        """Allocate unwritten memory for the outputs of a batch.

        Args:
            rows: number of samples.
        Returns:
            An array for each exit, one row per sample: the numbers of the output, its score if the
            session has scores, and a last one.
        """

    def busy(self) -> bool:
        """Tell whether a flight has not ended."""

    def begin(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> Flight:
        """Start computing into this memory, on the session's threads.

        If another flight is in progress, this one begins when that has ended.
        """


class Streamed:
    """A network in one session, called with its inputs to begin a run.

    Args:
        wiring: names of inputs and exits.
        session: the session.
        shape: shape of one sample's output; by default a row of numbers.
        scored: whether every output is followed by its score.
    """

    shrinks = False

    def __init__(
        self,
        wiring: Wiring,
        session: Session,
        shape: Sequence[int] | None = None,
        *,
        scored: bool = False,
    ) -> None:
        self.wiring = wiring
        self.session = session
        self.shape = shape
        self.scored = scored
        # The least seconds between each exit and the one before it, by number of rows and exit.
        self.least_s: dict[tuple[int, int], float] = {}

    @property
    def num_exits(self) -> int:
        return len(self.wiring.features)

    def __call__(self, inputs: Sequence[Array]) -> StreamedRun:
        return StreamedRun(self, inputs)


class StreamedRun(Run):
    """A run in one session, started when the first exit is asked for.

    The session then continues whether or not the next exit is asked for. Exits have no features,
    only outputs, which are ready when the exit is returned.
    """

    def __init__(self, network: Streamed, inputs: Sequence[Array]) -> None:
        self._flight: Flight | None = None
        self._session = network.session
        self._inputs = inputs
        self._count = network.wiring.batch_size(inputs)
        self._least_s = network.least_s
        self._scored = network.scored
        self._outputs = self._session.memory(self._count)
        width = self._outputs[0].shape[1] - 1 - self._scored
        self._shape = (width,) if network.shape is None else tuple(network.shape)
        self._bits = [output.view(f"u{output.dtype.itemsize}") for output in self._outputs]
        self._next = 0
        # Rows that are kept. None: all.
        self._rows: Array | None = None
        # Instant at which the previous exit came. None: it was there before anyone looked.
        self._before: float | None = None
        self._lock = threading.Lock()
        # The flight that `__next__` waits for and `cancel` ends.
        self._awaited: Flight | None = None
        self._cancelled = threading.Event()

    def __next__(self) -> Exit:
        index = self._next
        if index >= len(self._outputs):
            raise StopIteration
        whole = True
        if _has_come(self._bits[index]):
            self._before = None
        else:
            whole = self._await(index)
        self._next += 1
        numbers = self._outputs[index]
        numbers = numbers if self._rows is None else numbers[self._rows]
        width = numbers.shape[1] - 1 - self._scored
        output = numbers[:, :width].reshape(len(numbers), *self._shape)
        features = output if self._next == len(self._outputs) else None
        score = numbers[:, width] if self._scored else None
        return Exit(index, features, None, output, score, whole=whole)

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
        # A run that was never closed must not keep the session busy.
        if self._flight is not None:
            self._flight.cancel()

    def _await(self, index: int) -> bool:
        """Wait for an output, and tell whether the session was idle before."""
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
            # BaseException: it may be a KeyboardInterrupt.
            self._flight.cancel()
            # The next request for an exit starts the session again.
            self._flight = None
            raise
        finally:
            # A late `cancel` must not end a flight that nothing waits for.
            with self._lock:
                self._awaited = None
        return idle

    def _look_until(self, index: int, flight: Flight) -> None:
        """Look at an output repeatedly until it is complete."""
        begin = time.perf_counter()
        step = (self._count, index)
        sleep_s = 0.0
        if self._before is not None:
            sleep_s = FIRST_LOOK * (self._least_s.get(step, 0.0) + self._before - begin)
        while not _has_come(self._bits[index]) and not flight.ended():
            if self._cancelled.wait(max(sleep_s, SHORTEST_LOOK_S)):
                # The flight ends at its next operator.
                time.sleep(SHORTEST_LOOK_S)
            sleep_s = min(LOOK_SHARE * (time.perf_counter() - begin), LONGEST_LOOK_S)
        now = time.perf_counter()
        if self._before is not None:
            taken_s = now - self._before
            # The stored time grows a little in every run, so that an old minimum is forgotten.
            self._least_s[step] = min(taken_s, FORGETTING * self._least_s.get(step, taken_s))
        self._before = now
