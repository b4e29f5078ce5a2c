"""Limits other than time: multiply-accumulates, bytes and joules of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from impatient.checks import as_number
from impatient.costs import Cost, CostProfile
from impatient.errors import BudgetError

Unit = Literal["macs", "bytes", "energy_j"]

_COSTS: dict[str, Cost] = {"macs": "macs", "bytes": "bytes", "energy_j": "energy"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The most that a run may spend of one unit per sample.

    MACs and bytes are counted, so a run never exceeds their limit. Joules are means of measured
    values, so a run may exceed their limit a little.

    Attributes:
        unit: "macs", "bytes" or "energy_j".
        most: largest amount that a run may spend.
        stages: cost of each stage, shallow to deep.
        heads: cost of each head, shallow to deep.
    """

    unit: str
    most: float
    stages: tuple[float, ...]
    heads: tuple[float, ...]

    def needs(self, spent: Sequence[tuple[int, bool]], exit: int) -> float:
        """Return what a run has spent when an exit has answered.

        Args:
            spent: exits that were passed before, each with whether its head has run.
            exit: number of the exit that answers.
        """
        passed = sum(self.stages[index] + self.heads[index] * head for index, head in spent)
        return passed + self.stages[exit] + self.heads[exit]

    def allows(self, spent: Sequence[tuple[int, bool]], exit: int) -> bool:
        """Tell whether running to an exit stays within the limit.

        An exit beyond the last one costs nothing.
        """
        return exit >= len(self.stages) or self.needs(spent, exit) <= self.most


def by_unit(limits: Mapping[Unit, Any] | None) -> dict[Unit, Any]:
    """Return limits as a dict, empty if there are none.

    Raises:
        BudgetError: if they are no mapping.
    """
    if limits is not None and not isinstance(limits, Mapping):
        raise BudgetError(
            f"limits={limits!r}; expected a mapping from what is limited to how much of it, such "
            'as {"macs": 1e6}.'
        )
    return dict(limits or {})


def limits_of(costs: CostProfile, limits: Mapping[Unit, float] | None) -> tuple[Limit, ...]:
    """Combine the limits of a run with the costs in the profile.

    Raises:
        BudgetError: if a unit is unknown or an amount is not one positive number.
        CostError: if the profile has no measurements of a limited resource.
    """
    made = []
    for unit, most in by_unit(limits).items():
        if unit not in _COSTS:
            raise BudgetError(
                f"unknown limit {unit!r}; expected one of {', '.join(_COSTS)}. Limit time by the "
                "deadline."
            )
        number = as_number(most)
        if not number > 0.0:
            raise BudgetError(
                f"the limit of {unit} is {most!r}; expected one number for all rows, a positive "
                "one. Runner.run and Runner.start take a list with one for each."
            )
        stages, heads = costs.parts(_COSTS[unit])
        made.append(Limit(unit=unit, most=number, stages=stages, heads=heads))
    return tuple(made)
