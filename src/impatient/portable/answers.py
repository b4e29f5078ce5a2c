"""Answers of runs, collected per sample of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np

from .staged import Array, Exit, Run
from .thresholds import Scores, Thresholds

StoppedBy = Literal["final", "policy", "deadline", "limit", "interrupt"]
Output = TypeVar("Output")


class TimeSpent(NamedTuple):
    """Where the time of an answer went, in seconds.

    Attributes:
        waiting_s: from the making of the deadline, or the start of the run, until it began.
        stages_s: in stages.
        heads_s: in heads.
        decisions_s: in asking the policy.
        first_s: from the beginning until the first exit could have answered, its head as profiled.
    """

    waiting_s: float = 0.0
    stages_s: float = 0.0
    heads_s: float = 0.0
    decisions_s: float = 0.0
    first_s: float = 0.0


class RowAnswer(NamedTuple):
    """The answer of one row of a batch whose rows have budgets of their own.

    Attributes:
        exit: exit that its output comes from.
        stopped_by: reason for stopping, as in `Answer`.
        elapsed_s: seconds from the call until its output was ready; the batch may go on.
        deadline_met: whether it was ready by its own deadline.
    """

    exit: int
    stopped_by: StoppedBy
    elapsed_s: float
    deadline_met: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer(Generic[Output]):
    """The answer of a run.

    Attributes:
        output: output of the network, the samples first, such as [B, num_classes] before softmax.
        exit: deepest exit that answered.
        exits: for each sample, the exit that its output comes from.
        elapsed_s: seconds from the call until this answer was ready.
        stopped_by: reason for stopping: "final" (the last exit), "policy" (continuing is not worth
            its cost), "deadline", "limit" (of MACs, bytes or joules; only in the library) or
            "interrupt".
        deadline_met: whether the answer was ready by the deadline; True if there was none.
        rows: answers of the rows, where each had a deadline or limit of its own; otherwise empty.
        spent: where the time went; None for answers of an exported directory.
    """

    output: Output
    exit: int
    exits: tuple[int, ...]
    elapsed_s: float
    stopped_by: StoppedBy
    deadline_met: bool
    spent: TimeSpent | None = None
    rows: tuple[RowAnswer, ...] = ()


class BatchProgress:
    """The latest outputs of a batch whose samples stop at different exits."""

    def __init__(
        self,
        count: int,
        num_exits: int,
        clock: Callable[[], float],
        begin: float,
        deadline: float,
        scores: Scores,
    ) -> None:
        self.count = count
        self._scores = scores
        self.deadline = deadline
        self._last = num_exits - 1
        self._clock = clock
        self._begin = begin
        self._going = np.arange(count)
        self._exits = np.full(count, -1)
        self._output: Array | None = None
        self._taken = -1

    @property
    def all_going(self) -> bool:
        """Tell whether no sample has left the batch."""
        return len(self._going) == self.count

    def left_s(self) -> float:
        """Return the seconds left to the deadline."""
        return self.deadline - self._clock()

    def take(self, exit: Exit) -> None:
        """Store the output of an exit for the samples still in the batch."""
        if self._taken == exit.index:
            return
        output = exit.output()
        if self._output is None:
            self._output = np.empty((self.count, *output.shape[1:]), output.dtype)
        self._output[self._going] = output
        self._exits[self._going] = exit.index
        self._taken = exit.index

    def stopped_by(self, exit: Exit, rule: Thresholds | None, run: Run) -> StoppedBy | None:
        """Remove samples that stop here, and return why if none is left."""
        if exit.index == self._last:
            return "final"
        if rule is None or not rule.looks_at(exit.index):
            return None
        self.take(exit)
        rows = np.flatnonzero(~rule.stops(exit.index, self._scores.of(exit)))
        if len(rows) == 0:
            return "policy"
        if len(rows) < len(self._going):
            run.keep(rows)
            self._scores.keep(rows)
            self._going = self._going[rows]
        return None

    def answer(self, stopped_by: StoppedBy) -> Answer[Array]:
        """Return the answer as it is now."""
        assert self._output is not None
        now = self._clock()
        exits = tuple(self._exits.tolist())
        return Answer(
            output=self._output.copy(),
            exit=max(exits),
            exits=exits,
            elapsed_s=now - self._begin,
            stopped_by=stopped_by,
            deadline_met=now <= self.deadline,
        )
