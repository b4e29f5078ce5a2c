"""The answer of a run in torch."""

from __future__ import annotations

from torch import Tensor

from impatient.clock import Clock, Deadline
from impatient.inputs import synchronise
from impatient.portable.answers import Answer as AnyAnswer
from impatient.portable.answers import StoppedBy as StoppedBy
from impatient.portable.answers import TimeSpent as TimeSpent


class Answer(AnyAnswer[Tensor]):
    """The answer of a run, whose output is a tensor."""

    __slots__ = ()


def answered(
    output: Tensor,
    exits: tuple[int, ...],
    clock: Clock,
    begin: float,
    deadline: Deadline,
    stopped_by: StoppedBy,
    spent: TimeSpent | None = None,
) -> Answer:
    """Make an answer that is ready now.

    Sync:
        Waits for the device of the output.
    """
    # Asking a tensor for its device takes as long as a decision.
    if not output.is_cpu:
        synchronise(output.device)
    now = clock.now()
    return Answer(
        output=output,
        exit=exits[0] if len(exits) == 1 else max(exits),
        exits=exits,
        elapsed_s=now - begin,
        stopped_by=stopped_by,
        deadline_met=now <= deadline.instant,
        spent=spent,
    )
