"""Baselines for selection among networks.

They are rules that need little or no learning, on the same recordings and times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from impatient.costs import BatchCosts, CostProfile, Quantiles
from impatient.errors import PolicyError
from impatient.policies.policy import Recorded
from impatient.policies.routing import Route, check_costs
from impatient.policies.rules import ThresholdPolicy, fit_thresholds
from impatient.policies.topology import Topology
from impatient.provenance import provenance


def single_route(node: int, count: int, node_s: Sequence[float]) -> Route:
    """Route `count` samples to one network, such as the full one, `len(node_s) - 1`."""
    return route_of(
        torch.arange(len(node_s)).eq(node).expand(count, -1), torch.full((count,), node), node_s
    )


def chain_costs(node_s: Sequence[float]) -> CostProfile:
    """Make a cost profile of a cascade of networks from its times.

    The cascade runs networks 0 -> 1 -> 2 ... in order.

    So thresholds are fitted and judged like those of exits. A network is the head of an exit
    without a stage. If no threshold uses its output, it does not run and costs nothing.
    """
    zeros = (0,) * len(node_s)
    count = len(node_s)
    batch = BatchCosts(
        stages=tuple(Quantiles.of([0.0]) for _ in node_s),
        heads=tuple(Quantiles.of([float(time)]) for time in node_s),
        exit_free=Quantiles.of([float(node_s[-1])]),
    )
    return CostProfile(
        exits=tuple(map(str, range(count))),
        batches={1: batch},
        stage_macs=zeros,
        head_macs=zeros,
        stage_parameters=zeros,
        head_parameters=zeros,
        provenance=provenance(engine="cascade"),
    )


def fit_chain_thresholds(
    recording: Recorded,
    node_s: Sequence[float],
    *,
    mean_time_s: float | None = None,
    max_accuracy_loss: float | None = None,
) -> ThresholdPolicy:
    """One threshold per network along the chain: `fit_thresholds` with the times of a cascade."""
    return fit_thresholds(
        recording,
        chain_costs(node_s),
        mean_time_s=mean_time_s,
        max_accuracy_loss=max_accuracy_loss,
        score="max_probability",
    )


def chain_route(
    policy: ThresholdPolicy, outputs: Float[Tensor, "K N C"], node_s: Sequence[float]
) -> Route:
    """Route samples through a cascade 0 -> 1 -> 2 ... by thresholds.

    A network whose threshold is `inf` is left out.
    """
    answering = policy.exits_of(outputs)
    places = torch.arange(len(node_s))
    passed = (places < answering[:, None]) & torch.tensor(policy.open_exits())
    return route_of(passed | (places == answering[:, None]), answering, node_s)


def agreement_route(
    outputs: Float[Tensor, "K N C"], node_s: Sequence[float], *, needed: int = 2
) -> Route:
    """Run networks in order until `needed` of them give the same answer.

    If they never do, the last network answers.

    Source:
        Agreement-Based Cascading (Kolawole et al. 2025), with single networks for their ensembles,
        so without thresholds.
    """
    if needed < 2:
        raise PolicyError(f"needed={needed}; one network always agrees with itself: at least 2.")
    answers = outputs.argmax(-1)
    votes = torch.stack([(answers[: k + 1] == answers[k]).sum(0) for k in range(len(outputs))])
    agreed = votes >= needed
    agreed[-1] = True
    answering = agreed.int().argmax(0)
    return route_of(torch.arange(len(node_s)) <= answering[:, None], answering, node_s)


def oracle_route(
    recording: Recorded,
    node_s: Sequence[float],
    topology: Topology | None = None,
    *,
    pays: Literal["path", "chosen"] = "path",
    when_none_is_right: Literal["cheapest", "last"] = "cheapest",
) -> Route:
    """Route each sample to the least expensive network that is right.

    This needs the labels, so it is a limit and not a policy.

    Args:
        recording: to be answered.
        node_s: seconds of each network.
        topology: for "path"; by default the chain.
        pays: "path": for all networks on the cheapest way to the one that answers; "chosen": for
            that one alone, as if it were known without running any.
        when_none_is_right: what answers then: "cheapest", since all are wrong anyway, or "last".
    """
    topology = topology or Topology.chain(len(node_s))
    check_costs(node_s, topology, 0.0)
    if pays not in ("path", "chosen") or when_none_is_right not in ("cheapest", "last"):
        raise PolicyError(
            f"pays={pays!r}, when_none_is_right={when_none_is_right!r}; expected path or chosen, "
            "cheapest or last."
        )
    paths = (
        topology.cheapest_paths(node_s)
        if pays == "path"
        else tuple((node,) for node in range(len(node_s)))
    )
    visits = torch.zeros(len(node_s), len(node_s), dtype=torch.bool)
    for node, path in enumerate(paths):
        visits[node, list(path)] = True
    cost = visits.double() @ torch.tensor(node_s, dtype=torch.float64)
    right = recording.quality.bool()
    priced = torch.where(right, cost[:, None], math.inf)
    fallback = int(cost.argmin()) if when_none_is_right == "cheapest" else len(node_s) - 1
    answering = torch.where(right.any(0), priced.argmin(0), fallback)
    return route_of(visits[answering], answering, node_s)


def route_of(
    visited: Bool[Tensor, "N K"], answering: Int[Tensor, "N"], node_s: Sequence[float]
) -> Route:
    """Make a route with the seconds of the visited networks."""
    time_s = visited.double() @ torch.tensor(node_s, dtype=torch.float64)
    return Route(visited=visited, answering=answering, time_s=time_s)
