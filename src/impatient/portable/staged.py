"""A network cut into parts, run stage by stage."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from numpy.typing import NDArray

from .errors import BundleError

Array = NDArray[Any]
Inputs = Array | Mapping[str, Array]

# A stage takes values and returns values.
Part = Callable[..., Sequence[Any]]
# A head takes features and returns an output, or a tuple of it and its score if a policy needs one.
Head = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """Connections between the parts of a network, by names of values.

    Everything that a stage takes is an input or is given by an earlier stage. Residual branches and
    masks are values like any other.

    Attributes:
        inputs: names of the network's inputs, in order.
        takes: names of the values that each stage takes, in order.
        gives: names of the values that each stage gives, in order.
        features: for each exit, the name of the value that its head takes; for the last exit, the
            name of the output.
        batch_dims: for each value, which of its dimensions is the batch; None where none is.
    """

    inputs: tuple[str, ...]
    takes: tuple[tuple[str, ...], ...]
    gives: tuple[tuple[str, ...], ...]
    features: tuple[str, ...]
    batch_dims: Mapping[str, int | None]

    def batch_size(self, inputs: Sequence[Any]) -> int:
        """Return the number of samples in inputs that are given in order."""
        dims = (self.batch_dims[name] for name in self.inputs)
        return next(
            int(value.shape[dim])
            for value, dim in zip(inputs, dims, strict=True)
            if dim is not None
        )


class CancellablePart:
    """A stage whose call can be ended from another thread."""

    def __call__(self, *values: Any) -> Sequence[Any]:
        raise NotImplementedError

    def cancel(self, thread: int | None = None) -> None:
        """End calls in flight early.

        Args:
            thread: number of the thread whose call is ended (`threading.get_ident()`); None ends
                the calls on all threads.
        """
        raise NotImplementedError


class Exit:
    """One exit of a run: its stage has been computed, its head not.

    Attributes:
        index: number of the exit, from 0 (shallow) to deep.
        features: input of the head; at the last exit the output; None where the features stay
            inside a session.
        whole: whether the time since the previous exit was spent on this exit alone; False if the
            engine was busy with another run at first.
    """

    __slots__ = ("_head", "_output", "_score", "features", "index", "whole")

    def __init__(
        self,
        index: int,
        features: Any,
        head: Head | None,
        output: Any = None,
        score: Any = None,
        *,
        whole: bool = True,
    ) -> None:
        self.index = index
        self.features = features
        self._head = head
        self.whole = whole
        self._output: Any = features if head is None and output is None else output
        self._score = score

    @property
    def row_bytes(self) -> float:
        """Return the size of one sample's features, 0 where there are none."""
        if self.features is None:
            return 0.0
        return float(self.features.nbytes / self.features.shape[0])

    def output(self) -> Any:
        """Return the output of the head, such as [B, num_classes] before softmax.

        It is computed at the first call only.
        """
        if self._output is None:
            assert self._head is not None
            given = self._head(self.features)
            self._output, *score = given if isinstance(given, tuple) else (given,)
            self._score = score[0] if score else None
        return self._output

    def score(self) -> Any:
        """Return how sure the output looks, shape [B], or None where the head does not say."""
        self.output()
        return self._score


class Run(Iterator[Exit]):
    """One run through a network, exit by exit, in a `with` block."""

    def keep(self, rows: Any) -> None:
        """Continue with some of the samples only.

        Args:
            rows: array of the samples' indices in the present batch, in the order to keep.
        """
        raise NotImplementedError

    def cancel(self) -> None:
        """End the stage in flight early, where the engine can.

        `__next__`, which waits for the stage, then raises. If no stage is in flight, nothing
        happens. A cancelled run may be continued: the stage is then computed again or, in one
        session, the whole network.

        Thread:
            May be called from any thread.
        """
        raise NotImplementedError

    def close(self) -> None:
        """End the run without computing the rest."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Staged:
    """A network cut into parts, called with its inputs to begin a run.

    Args:
        wiring: connections between the stages.
        stages: a callable for each stage, which takes `wiring.takes` as positional arguments and
            returns a sequence of `wiring.gives`; a `CancellablePart` can be cancelled. It must not
            write to values that it takes, nor later to values that it has returned, unless the run
            needs them no more.
        heads: for each exit, a callable from features to the output, or to a tuple of it and its
            score; None for the last exit.
    """

    # Runs can continue with some of their samples, and that saves work.
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
        # The last stage that takes each value, or whose exit it feeds.
        uses = ((*takes, seen) for takes, seen in zip(wiring.takes, wiring.features, strict=True))
        last_use = {name: index for index, names in enumerate(uses) for name in names}
        made = ((*wiring.inputs, *wiring.gives[0]), *wiring.gives[1:])
        # For each stage, the values that are of no use after it.
        self.done_after = tuple(
            tuple(
                name
                for before, names in enumerate(made)
                for name in dict.fromkeys(names)
                if max(before, last_use.get(name, -1)) == index
            )
            for index in range(len(stages))
        )

    @property
    def num_exits(self) -> int:
        return len(self.stages)

    def __call__(self, inputs: Sequence[Any]) -> StagedRun:
        return StagedRun(self, inputs)


class StagedRun(Run):
    """A run that computes a stage when the next exit is asked for.

    Values are arrays of one kind: numpy arrays or torch tensors.
    """

    def __init__(self, network: Staged, inputs: Sequence[Any]) -> None:
        wiring = network.wiring
        self._wiring = wiring
        self._stages = network.stages
        self._heads = network.heads
        self._done_after = network.done_after
        self._values = dict(zip(wiring.inputs, inputs, strict=True))
        self._next = 0
        self._lock = threading.Lock()
        # Ends the stage in flight; None where there is none, or its engine cannot.
        self._end: Callable[[], None] | None = None

    def __next__(self) -> Exit:
        index = self._next
        if index >= len(self._stages):
            raise StopIteration
        stage = self._stages[index]
        if isinstance(stage, CancellablePart):
            self._end = functools.partial(stage.cancel, threading.get_ident())
        try:
            given = stage(*(self._values[name] for name in self._wiring.takes[index]))
        finally:
            self._landed()
        self._values.update(zip(self._wiring.gives[index], given, strict=True))
        features = self._values[self._wiring.features[index]]
        self._next += 1
        # Free the memory of values that no later stage uses.
        for name in self._done_after[index]:
            self._values.pop(name, None)
        return Exit(index, features, self._heads[index])

    def keep(self, rows: Any) -> None:
        for name, value in self._values.items():
            dim = self._wiring.batch_dims[name]
            if dim is not None:
                self._values[name] = value[(slice(None),) * dim + (rows,)]

    def cancel(self) -> None:
        with self._lock:
            if self._end is not None:
                self._end()

    def close(self) -> None:
        self._next = len(self._stages)
        self._values.clear()

    def _landed(self) -> None:
        # A late `cancel` must not end another run's call.
        with self._lock:
            self._end = None
