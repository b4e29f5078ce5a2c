"""What a run against the clock returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from impatient.clock import Clock, Deadline
from impatient.runtime.profile import synchronise

StoppedBy = Literal["final", "policy", "deadline", "limit", "interrupt"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What a run returns.

    Attributes:
        output: before softmax, shape [B, num_classes].
        exit: the deepest exit that answered.
        exits: per sample, the exit its output comes from.
        elapsed_s: from the call to the moment this answer was there.
        stopped_by: "final" (the last exit), "policy" (not worth going on), "deadline", "limit" (of MACs, bytes or joules) or
            "interrupt".
        deadline_met: whether the answer was there by the deadline; True when there was none.
    """

    output: Tensor
    exit: int
    exits: tuple[int, ...]
    elapsed_s: float
    stopped_by: StoppedBy
    deadline_met: bool


def answered(
    output: Tensor, exits: tuple[int, ...], clock: Clock, begin: float, deadline: Deadline, stopped_by: StoppedBy
) -> Answer:
    """An answer that is there now."""
    synchronise(output.device)
    now = clock.now()
    return Answer(
        output=output, exit=max(exits), exits=exits, elapsed_s=now - begin, stopped_by=stopped_by,
        deadline_met=now <= deadline.instant,
    )  # fmt: skip
