"""Limits other than time: multiply-accumulates, bytes and joules of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from impatient.costs import Cost, CostProfile
from impatient.errors import BudgetError

Unit = Literal["macs", "bytes", "energy_j"]

_COSTS: dict[str, Cost] = {"macs": "macs", "bytes": "bytes", "energy_j": "energy"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The most that a run may spend of something, per sample of its batch.

    MACs and bytes are counted, so a run is never above them; joules are means of what was measured.

    Attributes:
        unit: "macs", "bytes" or "energy_j".
        most: that a run may spend.
        stages, heads: what each costs, shallow to deep.
    """

    unit: str
    most: float
    stages: tuple[float, ...]
    heads: tuple[float, ...]

    def needs(self, spent: Sequence[tuple[int, bool]], exit: int) -> float:
        """What a run has spent when this exit has answered.

        Args:
            spent: the exits that were passed, and whether the head of each has run.
            exit: the next one.
        """
        passed = sum(self.stages[index] + self.heads[index] * head for index, head in spent)
        return passed + self.stages[exit] + self.heads[exit]

    def allows(self, spent: Sequence[tuple[int, bool]], exit: int) -> bool:
        """Whether going on to this exit stays within the limit; beyond the last one there is
        nothing to pay.
        """
        return exit >= len(self.stages) or self.needs(spent, exit) <= self.most


def limits_of(costs: CostProfile, limits: Mapping[Unit, float] | None) -> tuple[Limit, ...]:
    """The limits of a run, with what the profile says about each.

    Raises:
        BudgetError: if a unit is unknown or an amount is no positive number.
        CostError: if the profile says nothing about it.
    """
    made = []
    for unit, most in (limits or {}).items():
        if unit not in _COSTS:
            raise BudgetError(
                f"unknown limit {unit!r}; expected one of {', '.join(_COSTS)}. Time is what the "
                f"deadline is for."
            )
        if not most > 0.0:
            raise BudgetError(f"the limit of {unit} is {most!r}; expected a positive number.")
        stages, heads = costs.parts(_COSTS[unit])
        made.append(Limit(unit=unit, most=most, stages=stages, heads=heads))
    return tuple(made)
