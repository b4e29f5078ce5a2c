"""What a policy does to each recorded sample, and what that costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from impatient.budgets import Budget, SampleBudgets, exit_weights
from impatient.costs import CostProfile, Statistic
from impatient.errors import PolicyError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What each of N samples did on K exits, or networks.

    Attributes:
        exits: the exit that answered.
        visited: the exits that could have been its answer had time been up earlier: those on its
            way.
        contract_s: seconds (or what was asked for instead) until the answer when only the heads
            that are looked at run.
        interruptible_s: per exit on the way, likewise until its answer when every one on the way is
            posted.
        macs: multiply-accumulates, as for `contract_s`.
    """

    exits: Int[Tensor, "N"]
    visited: Bool[Tensor, "N K"]
    contract_s: Float[Tensor, "N"]
    interruptible_s: Float[Tensor, "N K"]
    macs: Float[Tensor, "N"]

    def spent_s(self) -> Float[Tensor, "N"]:
        """Seconds until the answer of an interruptible run."""
        return self.interruptible_s.gather(1, self.exits[:, None])[:, 0]

    def expected(
        self, budget: Budget | SampleBudgets, hits: Float[Tensor, "K N"]
    ) -> Float[Tensor, "N"]:
        """Compute each sample's probability of a right answer in time.

        It is that of the last exit on the sample's way that fits the budget.
        """
        right = torch.zeros(len(self.exits), dtype=torch.float64)
        ways, which = self.visited.unique(dim=0, return_inverse=True)
        for number, way in enumerate(ways):
            rows = (which == number).nonzero()[:, 0]
            exits = way.nonzero()[:, 0]
            costs = self.interruptible_s[rows[0], exits].tolist()
            own = budget.take(rows.tolist()) if isinstance(budget, SampleBudgets) else budget
            right[rows] = expected_hits(own, costs, hits[exits][:, rows])
        return right

    def where(self, is_other: Bool[Tensor, "N"], other: Outcome) -> Outcome:
        """For each sample this outcome, or the other where `is_other` says so."""

        def pick(mine: Tensor, others: Tensor) -> Tensor:
            return torch.where(is_other[:, None] if mine.dim() == 2 else is_other, others, mine)

        names = [field.name for field in dataclasses.fields(self)]
        return Outcome(**{name: pick(getattr(self, name), getattr(other, name)) for name in names})


def expected_hits(
    budget: Budget | SampleBudgets, costs_s: Sequence[float], hits: Float[Tensor, "K N"]
) -> Float[Tensor, "N"]:
    """Compute each sample's probability of a right answer in time.

    It is that of the deepest exit that fits the budget.
    """
    if isinstance(budget, SampleBudgets):
        return (torch.from_numpy(budget.weights(costs_s)).T * hits.double()).sum(0)
    weights = as_doubles(exit_weights(budget, costs_s))
    return (weights[:, None] * hits.double()).sum(0)


def node_times_s(
    costs: CostProfile, *, statistic: Statistic = "mean", batch_size: int = 1
) -> tuple[float, ...]:
    """Seconds of each network of a cascade that was profiled without a router.

    This is what `fit_selection` asks for.

    Raises:
        PolicyError: if one takes no time.
    """
    # a head is the handing over of an output that is there
    parts = zip(*costs.parts("time", statistic=statistic, batch_size=batch_size), strict=True)
    times = tuple(stage + head for stage, head in parts)
    if not all(time > 0.0 for time in times):
        raise PolicyError(
            f"networks that take {times} s; measure the cascade again, without a router."
        )
    return times


def as_doubles(values: Sequence[float]) -> Float[Tensor, "K"]:
    """Numbers as a tensor in double precision."""
    return torch.tensor(values, dtype=torch.float64)
