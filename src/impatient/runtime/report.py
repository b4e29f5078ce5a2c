"""Say how the runs of a runner went: who was late, why, and what to change."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from impatient.runtime.answer import Answer, TimeSpent


class RunFacts(NamedTuple):
    """What is remembered of a run.

    Attributes:
        allowed_s: seconds that it had; infinity without a deadline.
        elapsed_s: seconds until its answer.
        exit: the exit that answered.
        late: whether it missed its deadline.
        spent: where its time went.
    """

    allowed_s: float
    elapsed_s: float
    exit: int
    late: bool
    spent: TimeSpent


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What became of a number of runs.

    Attributes:
        runs: number of runs.
        with_deadline: number of those that had a deadline.
        missed: share of those that answered late; 0 if there are none.
        floor: share of those in which the first exit alone would have been late: what the machine
            costs, whatever the rule.
        used: median share of the time allowed that answers in time took.
        exits: share of all runs that each exit answered, by the exit.
        spent: shares of the time of all runs, from the making of their deadlines, that went into
            "waiting", "stages", "heads", "decisions" and, with what is left, "hand-over".
    """

    runs: int
    with_deadline: int
    missed: float
    floor: float
    used: float
    exits: dict[int, float]
    spent: dict[str, float]

    @classmethod
    def of(cls, runs: Sequence[RunFacts]) -> RunReport:
        """Summarise runs."""
        limited = [run for run in runs if run.allowed_s < math.inf]
        count = max(1, len(limited))
        used = [run.elapsed_s / run.allowed_s for run in limited if not run.late]
        deepest = collections.Counter(run.exit for run in runs)
        return cls(
            runs=len(runs),
            with_deadline=len(limited),
            missed=sum(run.late for run in limited) / count,
            floor=sum(run.spent.first_s > run.allowed_s for run in limited) / count,
            used=statistics.median(used) if used else 0.0,
            exits={exit: deepest[exit] / len(runs) for exit in sorted(deepest)},
            spent=_shares(runs),
        )

    def advice(self) -> str:
        """Say in a sentence what to change."""
        if not self.with_deadline:
            return "No run had a deadline; give one to learn whether it is kept."
        if self.spent["waiting"] > 0.5 and self.missed > 0.01:
            return (
                f"{self.missed:.1%} of the answers were late, and {self.spent['waiting']:.0%} of "
                "the time went by before their runs began: run fewer at once, or make the "
                "deadline where the run begins."
            )
        if self.floor > 0.01 and self.floor > 0.5 * self.missed:
            return (
                f"The first exit alone would have been late in {self.floor:.1%} of the runs: allow "
                "more time, attach an earlier exit, or take other work off the machine."
            )
        if self.missed > 0.01:
            return (
                f"{self.missed:.1%} of the answers were late, though the first exit would have "
                "been in time: profile again, or ask for a lower miss_rate or a higher statistic."
            )
        if self.used < 0.7 and max(self.exits) > min(self.exits):
            return (
                f"Answers took {self.used:.0%} of the time they had: a higher miss_rate, or more "
                "exits, would use more of it."
            )
        if self.used < 0.7:
            return (
                f"Answers took {self.used:.0%} of the time they had, all from exit "
                f"{min(self.exits)}: if that is not the last one, a higher miss_rate, a lower "
                "statistic or a profile of a quieter machine would use more of it."
            )
        return "Deadlines are kept and their time is used."


def _shares(runs: Sequence[RunFacts]) -> dict[str, float]:
    """Add up where the time of runs went."""
    parts = {
        "waiting": sum(run.spent.waiting_s for run in runs),
        "stages": sum(run.spent.stages_s for run in runs),
        "heads": sum(run.spent.heads_s for run in runs),
        "decisions": sum(run.spent.decisions_s for run in runs),
    }
    total_s = parts["waiting"] + sum(run.elapsed_s for run in runs)
    parts["hand-over"] = total_s - sum(parts.values())
    return {name: part / total_s if total_s > 0.0 else 0.0 for name, part in parts.items()}


class RunLog:
    """Facts of the latest runs of a runner.

    Args:
        most: how many are remembered.
    """

    def __init__(self, most: int = 10_000) -> None:
        # The entries of `RunFacts`, which are made when somebody asks.
        self._latest: collections.deque[tuple[Any, ...]] = collections.deque(maxlen=most)

    def add(self, answer: Answer, allowed_s: float) -> None:
        """Remember a run, by its answer and the seconds that it had."""
        self._latest.append(
            (
                allowed_s,
                answer.elapsed_s,
                answer.exit,
                not answer.deadline_met,
                answer.spent or TimeSpent(),
            )
        )

    def report(self) -> RunReport:
        """Summarise what is remembered."""
        return RunReport.of([RunFacts(*facts) for facts in list(self._latest)])
