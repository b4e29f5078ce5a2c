"""Curves of error over cost from the results of trainings.

They are of anytime networks, ensembles of them, and the networks they are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from papers.anytime_neural_networks.milestones import opt_plus, relative_increase

Result = Mapping[str, Any]
Places = Sequence[float] | np.ndarray


@dataclass(frozen=True, slots=True)
class Curve:
    """Answers in the order in which they come.

    Attributes:
        costs: MACs spent when each answer is there.
        errors: share of the test samples that it gets wrong.
    """

    costs: tuple[float, ...]
    errors: tuple[float, ...]

    def at(self, costs: Places) -> np.ndarray:
        """Return the error of the latest answer at given costs.

        Before the first answer it is 1, because no answer counts as a wrong one.
        """
        known = np.concatenate([[1.0], self.errors])
        return np.asarray(known[np.searchsorted(self.costs, costs, side="right")])


def alone(result: Result, heads: Literal["own", "all"] = "own") -> Curve:
    """Return the curve of one network's exits.

    The cost of an exit includes only its own head (the milestone table's axis), or all heads on the
    way.
    """
    own = result["head_macs"]
    paid = own if heads == "own" else accumulate(own)
    costs = tuple(
        float(stage + head)
        for stage, head in zip(accumulate(result["stage_macs"]), paid, strict=True)
    )
    return Curve(costs, tuple(result["test_error"]))


def ensemble(members: Sequence[Result]) -> Curve:
    """Return the curve of networks that run one after the other.

    It is an EANN or, if the networks have one exit each, the plain ensemble.

    At every exit the better, by validation error, of the best final output so far and this exit's
    own is the answer; where it is the former, the exit's head does not run. What
    `impatient.networks.EANN` does, from its members' results alone.
    """
    costs: list[float] = []
    errors: list[float] = []
    spent = 0.0
    least = np.inf
    final = 1.0
    for member in members:
        parts = (
            member[name] for name in ("stage_macs", "head_macs", "validation_error", "test_error")
        )
        for stage, head, validation, test in zip(*parts, strict=True):
            own = validation <= least
            spent += stage + (head if own else 0)
            costs.append(spent)
            errors.append(test if own else final)
        if member["validation_error"][-1] <= least:
            least = member["validation_error"][-1]
            final = member["test_error"][-1]
    return Curve(tuple(costs), tuple(errors))


def reference(opt: Sequence[Result]) -> Curve:
    """Return OPT+ of separately trained networks without early exits.

    It has their costs in order, and the least error until each.
    """
    points = [(costs.costs[-1:], costs.errors[-1:]) for costs in map(alone, opt)]
    costs = tuple(sorted({cost for (cost,), _ in points}))
    return Curve(costs, opt_plus(points, costs))


def excess(curve: Curve, opt: Curve, budgets: Places) -> float:
    """Per cent by which the error exceeds OPT+'s, on average over the budgets."""
    return float(np.mean(relative_increase(curve.at(budgets).tolist(), opt.at(budgets).tolist())))


def inflation(curve: Curve, opt: Curve, budgets: Places) -> np.ndarray:
    """Compute the cost inflation at each budget.

    It is the cost spent, divided by the cost that OPT+ must spend before it makes fewer errors.

    Where no network of OPT+ makes fewer errors, the divisor is the cost of its most expensive one.
    The true inflation may then be smaller.
    """
    # The first network with fewer errors than the answer. The errors of OPT+ never rise.
    better = np.searchsorted(-np.asarray(opt.errors), -curve.at(budgets), side="right")
    overtaken = np.asarray(opt.costs)[np.minimum(better, len(opt.costs) - 1)]
    return np.asarray(np.asarray(budgets) / overtaken)
