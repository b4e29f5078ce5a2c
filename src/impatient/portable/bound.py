"""Run stages in memory that is bound to them once.

A part that is called with arrays checks and wraps each of them, and allocates what it gives. Here,
a stage writes to where the next one reads, and nothing is wrapped or allocated but the input.
"""

from __future__ import annotations

import collections
import functools
import itertools
import threading
from collections.abc import Sequence
from typing import Any

from .parts import BoundPart, EnginePart
from .staged import Array, Exit, Staged, StagedRun, Wiring

# Bytes of all values of a run. Above it, a stage takes so long that binding gains nothing, and
# memory that is kept costs more.
LARGEST = 1 << 24
# Most shapes of inputs for which memory is kept, and how often for each of them.
MOST_SHAPES = 16
MOST_IDLE = 4


class BoundStaged(Staged):
    """A network cut into parts of an engine, with memory bound to them.

    Each run has a lane for itself: memory for all values, and parts bound to it. Lanes are used
    again when neither the run nor any of its exits exists any more.

    Args:
        wiring: connections between the stages.
        stages: a part of an engine for each stage.
        heads: for each exit, a part from features to output; None for the last exit.

    Thread:
        Several threads may run it at once.
    """

    stages: Sequence[EnginePart]
    heads: Sequence[EnginePart | None]

    def __init__(
        self, wiring: Wiring, stages: Sequence[EnginePart], heads: Sequence[EnginePart | None]
    ) -> None:
        super().__init__(wiring, stages, heads)
        # For each stage, which of the values that it takes are inputs of the network.
        self.fresh = tuple(
            tuple(name for name in takes if name in wiring.inputs) for takes in wiring.takes
        )
        self._lock = threading.Lock()
        self._idle: dict[Any, collections.deque[Lane]] = {}
        # Shapes of inputs whose runs have memory of their own.
        self.too_large: set[Any] = set()

    def __call__(self, inputs: Sequence[Array]) -> StagedRun:
        shapes = tuple([(value.shape, value.dtype) for value in inputs])
        if shapes in self.too_large:
            return StagedRun(self, inputs)
        idle = self._idle.get(shapes)
        if idle is None:
            idle = self._idle_for(shapes)
        try:
            lane = idle.pop()
        except IndexError:
            lane = Lane(self, shapes)
        return BoundRun(self, inputs, Loan(lane, idle))

    def give_up(self, shapes: Any) -> None:
        """Give runs of inputs of some shapes memory of their own from now on."""
        with self._lock:
            if shapes not in self.too_large and len(self.too_large) >= MOST_SHAPES:
                self.too_large.pop()
            self.too_large.add(shapes)
            self._idle.pop(shapes, None)

    def _idle_for(self, shapes: Any) -> collections.deque[Lane]:
        with self._lock:
            while len(self._idle) >= MOST_SHAPES:
                del self._idle[next(iter(self._idle))]
            return self._idle.setdefault(shapes, collections.deque(maxlen=MOST_IDLE))


class Lane:
    """Memory for one run at a time, and parts bound to it, each at its first call.

    Attributes:
        values: memory of each value that a stage gives, by name.
        stages: stages that are bound already.
        heads: heads that are bound already.
        nbytes: bytes of all values.
    """

    def __init__(self, network: BoundStaged, shapes: Any) -> None:
        self._network = network
        self._shapes = shapes
        self.values: dict[str, Array] = {}
        self.stages: list[BoundPart | None] = [None] * network.num_exits
        self.heads: list[BoundPart | None] = [None] * network.num_exits
        self.nbytes = 0

    def bind(self, index: int, inputs: Sequence[Array]) -> None:
        """Compute a stage for the first time, in new memory."""
        network = self._network
        takes = network.wiring.takes[index]
        fresh = [place for place, name in enumerate(takes) if name in network.fresh[index]]
        bound = network.stages[index].bind(inputs, fresh)
        self.values.update(zip(network.wiring.gives[index], bound.outputs, strict=True))
        self.nbytes += sum(array.nbytes for array in bound.outputs)
        if self.nbytes > LARGEST:
            network.give_up(self._shapes)
        self.stages[index] = bound

    def features(self, index: int) -> Array:
        """Return the memory of what the head of an exit takes."""
        return self.values[self._network.wiring.features[index]]

    def answer(self, index: int) -> tuple[Array, ...]:
        """Compute a head, and copy its output, and its score if there is one."""
        part = self._network.heads[index]
        if part is None:
            return (self.features(index).copy(),)
        head = self.heads[index]
        if head is None:
            head = self.heads[index] = part.bind([self.features(index)], ())
        else:
            head()
        return tuple([output.copy() for output in head.outputs])


class Loan:
    """A lane that becomes idle when the run and all of its exits are garbage-collected."""

    __slots__ = ("_idle", "lane")

    def __init__(self, lane: Lane, idle: collections.deque[Lane]) -> None:
        self.lane = lane
        self._idle = idle

    def __del__(self) -> None:
        if self.lane.nbytes <= LARGEST:
            self._idle.append(self.lane)


class BoundRun(StagedRun):
    """A run in the memory of a lane, until some of its samples leave."""

    def __init__(self, network: BoundStaged, inputs: Sequence[Array], loan: Loan) -> None:
        super().__init__(network, inputs)
        self._network = network
        # None when the run is closed.
        self._loan: Loan | None = loan
        self._bound = True

    def __next__(self) -> Exit:
        index = self._next
        loan = self._loan
        if loan is None or not self._bound or index >= len(self._stages):
            return super().__next__()
        stage = loan.lane.stages[index]
        if stage is None:
            self._bind(index, loan.lane)
        else:
            self._end = stage.cancel
            try:
                stage(*[self._values[name] for name in self._network.fresh[index]])
            finally:
                self._landed()
                stage.renew()
        self._next = index + 1
        return BoundExit(index, loan)

    def keep(self, rows: Any) -> None:
        if self._bound and self._loan is not None:
            # The rest of the run has other sizes, and memory of its own.
            values = {**self._loan.lane.values, **self._values}
            gives = itertools.chain(self._wiring.inputs, *self._wiring.gives[: self._next])
            done = {name for names in self._done_after[: self._next] for name in names}
            self._values = {name: values[name] for name in gives if name not in done}
            self._bound = False
        super().keep(rows)

    def close(self) -> None:
        super().close()
        self._loan = None

    def _bind(self, index: int, lane: Lane) -> None:
        values = {**lane.values, **self._values}
        self._end = functools.partial(self._network.stages[index].cancel, threading.get_ident())
        try:
            lane.bind(index, [values[name] for name in self._wiring.takes[index]])
        finally:
            self._landed()


class BoundExit(Exit):
    """An exit whose features stay in the memory of a lane."""

    __slots__ = ("_loan",)

    def __init__(self, index: int, loan: Loan) -> None:
        self.index = index
        self.whole = True
        self._loan = loan
        self._output = None
        self._score = None

    @property
    def features(self) -> Array:
        """Copy the features, as later runs use their memory."""
        return self._loan.lane.features(self.index).copy()

    @property
    def row_bytes(self) -> float:
        features = self._loan.lane.features(self.index)
        return float(features.nbytes / features.shape[0])

    def output(self) -> Array:
        if self._output is None:
            self._output, *score = self._loan.lane.answer(self.index)
            self._score = score[0] if score else None
        output: Array = self._output
        return output
