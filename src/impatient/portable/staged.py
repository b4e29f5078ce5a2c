"""A network cut into parts, run stage by stage."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from numpy.typing import NDArray

from .errors import BundleError

Array = NDArray[Any]
Inputs = Array | Mapping[str, Array]

# a stage: values in, values out; may have a method cancel(thread) that ends the call in flight on
# the thread of that number
Part = Callable[..., Sequence[Any]]
# features in, output out
Head = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """How the parts of a network hang together, by names of values.

    Attributes:
        inputs: the network's inputs, in order.
        takes, gives: per stage, the values it takes and gives, in order. Whatever a later stage
            needs is given by an earlier
            one or is an input: residual branches and masks are values like any other.
        features: per exit, the value its head takes; of the last exit, the output itself.
        batch_dims: per value, its dimension that is the batch; None where it has none.
    """

    inputs: tuple[str, ...]
    takes: tuple[tuple[str, ...], ...]
    gives: tuple[tuple[str, ...], ...]
    features: tuple[str, ...]
    batch_dims: Mapping[str, int | None]

    def batch_size(self, inputs: Sequence[Any]) -> int:
        """Number of samples in inputs that are given in order."""
        dims = (self.batch_dims[name] for name in self.inputs)
        return next(
            int(value.shape[dim])
            for value, dim in zip(inputs, dims, strict=True)
            if dim is not None
        )


class PartExit:
    """One exit of a run: the stage up to it has just been computed, its head has not.

    Attributes:
        index: 0-based, shallow to deep.
        features: what its head takes; of the last exit, the output itself; None where they stay
            inside a session.
        whole: whether the time it took was its own; not if the engine was busy with something else
            at first.
    """

    __slots__ = ("_head", "_output", "features", "index", "whole")

    def __init__(
        self,
        index: int,
        features: Any,
        head: Head | None,
        output: Any = None,
        *,
        whole: bool = True,
    ) -> None:
        self.index = index
        self.features = features
        self._head = head
        self.whole = whole
        self._output: Any = features if head is None and output is None else output

    def output(self) -> Any:
        """Compute the head, once. Shape [B, num_classes], before softmax."""
        if self._output is None:
            assert self._head is not None
            self._output = self._head(self.features)
        return self._output


class Run(Iterator[PartExit]):
    """One run through a network in parts, exit by exit, to be used in a `with` block."""

    def keep(self, rows: Any) -> None:
        """Go on with these samples only, in this order: an array of their places in the present
        batch.
        """
        raise NotImplementedError

    def cancel(self) -> None:
        """From any thread: end what `__next__` waits for early, where the engine can; it then
        raises.

        Where nothing is waited for nothing happens. A run that was cancelled may go on: its stage
        is computed anew, or, in one session, all of it.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Throw away what has not been computed."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Staged:
    """A network cut into parts: called with the inputs in order, it begins a run.

    Args:
        wiring: how the values go through the stages.
        stages: per stage, a callable: `wiring.takes` as positions, a sequence of `wiring.gives`
            back; it may have a method cancel(thread). It must not write to what it takes, nor later
            to what it gave, but for what the run is done with.
        heads: per exit, a callable, features to output; None at the last.
    """

    # runs can go on with part of their batch, and that saves work
    shrinks = True

    def __init__(
        self, wiring: Wiring, stages: Sequence[Part], heads: Sequence[Head | None]
    ) -> None:
        if not len(stages) == len(heads) == len(wiring.features):
            raise BundleError(
                f"{len(stages)} stages, {len(heads)} heads and a wiring of {len(wiring.features)} "
                "exits; expected one of each per exit."
            )
        self.wiring = wiring
        self.stages = stages
        self.heads = heads

    @property
    def num_exits(self) -> int:
        return len(self.stages)

    def __call__(self, inputs: Sequence[Any]) -> StagedRun:
        return StagedRun(self.wiring, self.stages, self.heads, inputs)


class StagedRun(Run):
    """One run: computes a stage when asked for the next exit. Values are arrays of any one kind
    (numpy, torch).
    """

    def __init__(
        self,
        wiring: Wiring,
        stages: Sequence[Part],
        heads: Sequence[Head | None],
        inputs: Sequence[Any],
    ) -> None:
        self._wiring = wiring
        self._stages = stages
        self._heads = heads
        self._values = dict(zip(wiring.inputs, inputs, strict=True))
        self._next = 0
        self._lock = threading.Lock()
        # the thread on which a stage is in flight
        self._thread: int | None = None
        uses = ((*takes, seen) for takes, seen in zip(wiring.takes, wiring.features, strict=True))
        self._last_use = {name: index for index, names in enumerate(uses) for name in names}

    def __next__(self) -> PartExit:
        index = self._next
        if index >= len(self._stages):
            raise StopIteration
        self._thread = threading.get_ident()
        try:
            given = self._stages[index](*(self._values[name] for name in self._wiring.takes[index]))
        finally:
            # a cancel that comes late must not end another run's call on this thread
            with self._lock:
                self._thread = None
        self._values.update(zip(self._wiring.gives[index], given, strict=True))
        features = self._values[self._wiring.features[index]]
        self._next += 1
        for name in [name for name in self._values if self._last_use.get(name, -1) < self._next]:
            # memory that nobody needs any more
            del self._values[name]
        return PartExit(index, features, self._heads[index])

    def keep(self, rows: Any) -> None:
        for name, value in self._values.items():
            dim = self._wiring.batch_dims[name]
            if dim is not None:
                self._values[name] = value[(slice(None),) * dim + (rows,)]

    def cancel(self) -> None:
        with self._lock:
            if self._thread is not None:
                getattr(self._stages[self._next], "cancel", lambda _: None)(self._thread)

    def close(self) -> None:
        self._next = len(self._stages)
        self._values.clear()
