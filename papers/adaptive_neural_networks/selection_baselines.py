"""What selection among networks is compared with, on the same recordings and times: rules that
nobody had to learn, or few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from impatient.costs import BatchCosts, CostProfile, Quantiles
from impatient.errors import InfeasibleTarget, PolicyError
from impatient.policies.mixing import neighbours
from impatient.policies.routing import Answered, Route, check_costs
from impatient.policies.rules import Recorded, ThresholdPolicy, fit_thresholds
from impatient.policies.scores import SCORES, ScoreName
from impatient.policies.topology import Topology
from impatient.provenance import provenance


def single_route(node: int, count: int, node_s: Sequence[float]) -> Route:
    """One network alone, for `count` samples; the full one is `len(node_s) - 1`."""
    return route_of(
        torch.arange(len(node_s)).eq(node).expand(count, -1), torch.full((count,), node), node_s
    )


def uniform_shares(
    recording: Answered, node_s: Sequence[float], mean_time_s: float
) -> tuple[float, ...]:
    """The best mixture of single networks that does not look at the input: the share of the samples
    that each one answers.

    Args:
        recording: to choose on; the shares times `hits` of another recording judge them.
        node_s: seconds of each network.
        mean_time_s: expected mean seconds per sample.
    Raises:
        InfeasibleTarget: if even the fastest network takes longer.
    """
    accuracies = (recording.outputs.argmax(-1) == recording.labels).double().mean(1).tolist()
    fast, slow, share = neighbours(node_s, accuracies, mean_time_s)
    return tuple(
        (node == fast) * (1.0 - share) + (node == slow) * share for node in range(len(node_s))
    )


def chain_costs(node_s: Sequence[float]) -> CostProfile:
    """Times of a cascade 0 -> 1 -> 2 ... as a cost profile, so that thresholds are fitted and
    judged like those of exits.

    A network is the head of an exit without a stage: one that no threshold looks at is left out,
        and costs nothing.
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
    score: ScoreName = "max_probability",
) -> ThresholdPolicy:
    """One threshold per network along the chain: `fit_thresholds` with the times of a cascade."""
    return fit_thresholds(
        recording,
        chain_costs(node_s),
        mean_time_s=mean_time_s,
        max_accuracy_loss=max_accuracy_loss,
        score=score,
    )


def fit_myopic(
    recording: Recorded,
    node_s: Sequence[float],
    *,
    mean_time_s: float | None = None,
    max_accuracy_loss: float | None = None,
    score: ScoreName = "max_probability",
) -> ThresholdPolicy:
    """ONE threshold for all networks along the chain, the best of all there are.

    Args:
        recording, node_s: as for `fit_selection`.
        mean_time_s: the most accurate policy whose mean time is at most this; or
        max_accuracy_loss: the fastest that loses at most this much accuracy against the last
            network.
        score: how sure an output is.
    Returns:
        A policy for `chain_route`. Where no threshold reaches the accuracy, the last network alone.
    """
    if (mean_time_s is None) == (max_accuracy_loss is None):
        raise PolicyError("give exactly one target of mean_time_s, max_accuracy_loss.")
    thresholds, times, errors = _myopic_curve(recording, node_s, SCORES[score](recording.outputs))
    if mean_time_s is not None:
        name = "mean_time_s"
        wanted = float(mean_time_s)
        allowed = times <= mean_time_s
        order = np.lexsort((times, errors))
    else:
        name = "max_accuracy_loss"
        wanted = float(max_accuracy_loss or 0.0)
        allowed = errors <= errors[0] + wanted + 1e-12
        order = np.lexsort((errors, times))
    feasible = order[allowed[order]]
    if not len(feasible):
        raise InfeasibleTarget(
            f"mean_time_s={wanted:g} cannot be reached: one threshold takes {times.min():g} or "
            "more."
        )
    best = int(feasible[0])
    reached = {
        "mean_cost": float(times[best]),
        "accuracy": 1.0 - float(errors[best]),
        "samples": float(len(recording.labels)),
    }
    return ThresholdPolicy(
        score=score,
        thresholds=(*(float(thresholds[best]),) * (len(node_s) - 1), -math.inf),
        split=recording.split,
        target={name: wanted, **reached},
        provenance=recording.provenance,
    )


def _myopic_curve(
    recording: Recorded, node_s: Sequence[float], scores_KN: Float[Tensor, "K N"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every threshold that differs from the others on this recording, inf first, with its mean time
    and error.
    """
    errors = (recording.outputs.argmax(-1) != recording.labels).double().numpy()
    times = np.broadcast_to(np.cumsum(node_s)[:, None], errors.shape)
    # a sample has left by network k if its surest score so far is above the threshold
    surest = scores_KN[:-1].cummax(0).values.numpy().ravel()
    order = np.argsort(-surest, kind="stable")
    # equal scores leave together
    ends = np.append(surest[order][1:] < surest[order][:-1], True)
    count = errors.shape[1]

    def curve(values: np.ndarray, alone: float) -> np.ndarray:
        gained = np.cumsum((values[:-1] - values[1:]).ravel()[order])[ends]
        return np.append(alone, (values[-1].sum() + gained) / count)

    # at inf no other network is looked at, so that none but the last runs
    return (
        np.append(math.inf, surest[order][ends]),
        curve(times, node_s[-1]),
        curve(errors, float(errors[-1].mean())),
    )


def chain_route(
    policy: ThresholdPolicy, outputs: Float[Tensor, "K N C"], node_s: Sequence[float]
) -> Route:
    """What thresholds make of a cascade 0 -> 1 -> 2 ...; a network whose threshold is `inf` is left
    out.
    """
    answering = policy.exits_of(outputs)
    places = torch.arange(len(node_s))
    passed = (places < answering[:, None]) & torch.tensor(policy.open_exits())
    return route_of(passed | (places == answering[:, None]), answering, node_s)


def agreement_route(
    outputs: Float[Tensor, "K N C"], node_s: Sequence[float], *, needed: int = 2
) -> Route:
    """Run networks in order until `needed` of them give the same answer; if none do, the last
    one's.

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
    recording: Answered,
    node_s: Sequence[float],
    topology: Topology | None = None,
    *,
    pays: Literal["path", "chosen"] = "path",
    when_none_is_right: Literal["cheapest", "last"] = "cheapest",
) -> Route:
    """The cheapest network that is right, known from the labels: a limit, no policy.

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
    right = recording.outputs.argmax(-1) == recording.labels
    priced = torch.where(right, cost[:, None], math.inf)
    fallback = int(cost.argmin()) if when_none_is_right == "cheapest" else len(node_s) - 1
    answering = torch.where(right.any(0), priced.argmin(0), fallback)
    return route_of(visits[answering], answering, node_s)


def route_of(
    visited: Bool[Tensor, "N K"], answering: Int[Tensor, "N"], node_s: Sequence[float]
) -> Route:
    """A route, with the seconds of the networks visited."""
    time_s = visited.double() @ torch.tensor(node_s, dtype=torch.float64)
    return Route(visited=visited, answering=answering, time_s=time_s)
