"""A deadline or a limit for each row of a batch: rows leave when theirs is spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from impatient.clock import Clock, Deadline, check_deadline
from impatient.errors import RunError
from impatient.policies.policy import Policy
from impatient.portable.answers import RowAnswer
from impatient.portable.timing import RESERVE_S, TimePredictor
from impatient.runtime.limits import Limit, Unit, by_unit, limits_of

if TYPE_CHECKING:
    from impatient.costs import CostProfile
    from impatient.runtime.answer import Answer, StoppedBy
    from impatient.runtime.run_state import RunState

# one for all rows, or one each
Deadlines = Deadline | Sequence[Deadline]
Limits = Mapping[Unit, float | Sequence[float]]


class RowBudgets(Policy):
    """The rule of one run that stops each row when its own deadline or limit is spent.

    A policy of the runner is asked as well. Rows are known by their place in the whole batch, also
    after others have left it.

    Args:
        policy: policy of the run; None stops none.
        state: the run, whose exits are counted.
        deadlines: one per row.
        limits: per row, its limits.
        clock: clock to read.
        predictor: returns the predictor for the present number of rows; None where rows go on until
            their deadline has passed.
    """

    def __init__(
        self,
        policy: Policy | None,
        state: RunState,
        deadlines: Sequence[Deadline],
        limits: Sequence[tuple[Limit, ...]],
        clock: Clock,
        predictor: Callable[[], TimePredictor] | None,
    ) -> None:
        self._policy = policy
        self._state = state
        self._deadlines = [deadline.instant for deadline in deadlines]
        self._limits = limits
        self._clock = clock
        self._predictor = predictor
        # Rows of the present batch, by their places in the whole.
        self._rows = list(range(len(deadlines)))
        # Why each row has stopped, and when its answer was ready; None while it goes on.
        self._reasons: list[StoppedBy | None] = [None] * len(deadlines)
        self._ready: list[float | None] = [None] * len(deadlines)
        # Outputs and exits of rows whose deadline passed while a deeper exit was computed.
        self._held: dict[int, tuple[Tensor, int]] = {}
        # Whether the policy is asked at the present exit.
        self._asks = False

    @property
    def num_exits(self) -> int:
        return len(self._state.exit_names)

    @property
    def needs_outputs(self) -> bool:
        return self._asks and self._policy is not None and self._policy.needs_outputs

    @property
    def needs_features(self) -> bool:
        return self._asks and self._policy is not None and self._policy.needs_features

    def looks_at(self, exit: int) -> bool:
        """Look at every exit.

        What of it is needed depends on the policy.
        """
        self._asks = self._policy is not None and self._policy.looks_at(exit)
        return True

    def stops(
        self, exit: int, outputs: Tensor | None = None, pooled: Tensor | None = None
    ) -> Tensor:
        """Say which rows of the present batch are done at this exit."""
        by_policy = [False] * len(self._rows)
        if self._asks and self._policy is not None:
            by_policy = self._policy.stops(exit, outputs, pooled).tolist()
        spent = self._state.spent
        now = self._clock.now()
        reasons = self._reasons_at(exit, now, spent, by_policy)
        if outputs is None and any(reasons) and not all(reasons):
            # the head runs for those who leave, and costs the others time, too
            paid = [*spent[:-1], (exit, True)]
            head_s = self._predictor().head_s(exit) if self._predictor is not None else 0.0
            reasons = self._reasons_at(exit, now + head_s, paid, by_policy)
        for place, reason in zip(self._rows, reasons, strict=True):
            self._reasons[place] = self._reasons[place] or reason
        stopped = [reason is not None for reason in reasons]
        device = outputs.device if outputs is not None else self._state.device
        return torch.tensor(stopped, device=device)

    def _reasons_at(
        self,
        exit: int,
        now: float,
        spent: Sequence[tuple[int, bool]],
        by_policy: Sequence[bool],
    ) -> list[StoppedBy | None]:
        """Say of each present row why it stops here, if it does."""
        predictor = None if self._predictor is None else self._predictor()

        def reason(place: int, done: bool) -> StoppedBy | None:
            if done:
                return "policy"
            if not all(limit.allows(spent, exit + 1) for limit in self._limits[place]):
                return "limit"
            instant = self._deadlines[place]
            fits = predictor.fits(exit + 1, now, instant, RESERVE_S) if predictor else now < instant
            return None if fits else "deadline"

        return [reason(place, done) for place, done in zip(self._rows, by_policy, strict=True)]

    def for_rows(self, rows: Tensor) -> RowBudgets:
        """Go on with some rows of the present batch.

        What is known of the others is kept.
        """
        places = rows.tolist()
        self._rows = [self._rows[row] for row in places]
        if self._policy is not None:
            self._policy = self._policy.for_rows(rows)
        return self

    def mark(self, now: float) -> None:
        """Note that the answers of rows that have stopped are ready."""
        for place, reason in enumerate(self._reasons):
            if reason is not None and self._ready[place] is None:
                self._ready[place] = now

    def post(self, answer: Answer, before: Answer | None, begin: float) -> Answer:
        """Complete the answer of an exit of an interruptible run.

        A row whose deadline has passed keeps the answer that was there by then.

        Args:
            answer: the answer of the exit.
            before: the answer that was posted before, if any.
            begin: instant from which times count.
        """
        now = begin + answer.elapsed_s
        for place, ready in enumerate(self._ready):
            if ready is None and now > self._deadlines[place] and before is not None:
                self._held[place] = (before.output[place], before.exits[place])
                self._reasons[place] = "deadline"
                self._ready[place] = begin + before.elapsed_s
        self.mark(now)
        output = answer.output.clone() if self._held else answer.output
        exits = list(answer.exits)
        for place, (row, exit) in self._held.items():
            output[place] = row
            exits[place] = exit
        # mypy takes the output of a generic class for any
        whole: Any = answer
        posted: Answer = dataclasses.replace(
            whole,
            output=output,
            exits=tuple(exits),
            exit=max(exits),
            rows=self.answers(exits, begin, now, answer.stopped_by),
        )
        return posted

    def answers(
        self, exits: Sequence[int], begin: float, now: float, stopped_by: StoppedBy
    ) -> tuple[RowAnswer, ...]:
        """Say of every row where it stopped, why, and when its answer was ready.

        Args:
            exits: exit of each row's answer.
            begin: instant at which the run was asked for.
            now: instant at which the answers of rows that never stopped are ready.
            stopped_by: why those stop.
        """
        found = []
        for exit, reason, ready, deadline in zip(
            exits, self._reasons, self._ready, self._deadlines, strict=True
        ):
            instant = now if ready is None else ready
            found.append(
                RowAnswer(exit, reason or stopped_by, instant - begin, instant <= deadline)
            )
        return tuple(found)


def concluded(answer: Answer, stopped_by: StoppedBy) -> Answer:
    """Say why a run was stopped that no exit has stopped, of its rows as well."""
    rows = tuple(
        row._replace(stopped_by=stopped_by) if row.stopped_by == "interrupt" else row
        for row in answer.rows
    )
    return dataclasses.replace(answer, stopped_by=stopped_by, rows=rows)


def one_for_all(
    deadline: Deadlines, limits: Limits | None
) -> tuple[Deadline, Mapping[Unit, float] | None]:
    """Return a deadline and limits that are the same for all rows.

    Raises:
        RunError: if there is one for each row.
    """
    each = [unit for unit, most in (limits or {}).items() if _is_listed(most)]
    if not isinstance(deadline, Deadline) or each:
        raise RunError(
            "rows have deadlines or limits of their own, which this kind of run cannot keep; "
            "expected one for all rows. Use Runner.run or Runner.start."
        )
    return deadline, largest(limits)


def row_deadlines(deadline: Deadlines, samples: int) -> list[Deadline] | None:
    """Return the deadline of each row, or None where one is for all.

    Raises:
        RunError: if there is not one per row.
    """
    if not isinstance(deadline, list | tuple):
        check_deadline(deadline)
        return None
    found = list(deadline)
    _check_count("deadlines", len(found), samples)
    for entry in found:
        check_deadline(entry)
    return found


def row_limits(
    costs: CostProfile, limits: Limits | None, samples: int
) -> list[tuple[Limit, ...]] | None:
    """Return the limits of each row, or None where they are for all.

    Raises:
        RunError: if there is not one per row.
    """
    given = by_unit(limits)
    rows = {unit: most for unit, most in given.items() if _is_listed(most)}
    if not rows:
        return None
    for unit, listed in rows.items():
        _check_count(f"limits of {unit}", len(listed), samples)

    return [
        limits_of(costs, given | {unit: listed[row] for unit, listed in rows.items()})
        for row in range(samples)
    ]


def largest(limits: Limits | None) -> Mapping[Unit, float] | None:
    """Return the largest limit of any row, by unit."""
    if limits is None:
        return None
    given = by_unit(limits)
    return {
        unit: max(most, default=0.0) if _is_listed(most) else most for unit, most in given.items()
    }


def _is_listed(most: Any) -> bool:
    """Tell whether a limit is a list with one for each row.

    What else is wrong with it, others say.
    """
    return isinstance(most, Sized) and not isinstance(most, str)


def _check_count(what: str, count: int, samples: int) -> None:
    if count != samples:
        raise RunError(f"{count} {what} for a batch of {samples}; expected one for each row.")
