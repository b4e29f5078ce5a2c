"""Selection among networks on one division of the samples.

Learned policies on all topologies are compared with baselines.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from impatient import Recording, ThresholdPolicy
from impatient.errors import NoEffectWarning
from impatient.policies import Route, Topology, sweep_selection, threshold_family
from impatient.policies.costsensitive import Learner
from impatient.policies.selection import SelectionPoint
from papers.adaptive_neural_networks.curves import (
    Point,
    drawn_curve,
    guarantees,
    least_knowing,
    point_of,
    read_off,
)
from papers.adaptive_neural_networks.recipe import Case, Judging, parts_of, recordings_of
from papers.adaptive_neural_networks.selection_baselines import (
    agreement_route,
    chain_route,
    fit_chain_thresholds,
    oracle_route,
    single_route,
)

# points of accuracy lost at which curves are read off
LOSSES = (0.0, 0.005, 0.01, 0.02)
# for which thresholds are fitted
ASKED = (
    0.0,
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.1,
)
TOPOLOGIES: dict[str, Callable[[Sequence[str]], Topology]] = {
    "chain": Topology.chain,
    "full": Topology.full,
    "star": Topology.star,
}


def judge_split(
    case: Case,
    node_s: Sequence[float],
    gate_s: Mapping[str, float],
    judging: Judging,
    seed: int,
    *,
    folder: Path,
) -> dict[str, Any]:
    """Fit every method on one part and judge it on the other.

    Args:
        node_s: measured seconds of each network.
        gate_s: measured seconds of one decision, by learner, and of a "threshold".
        seed: of the division.
    Returns:
        Rows of `read_off` and `drawn_curve` per method, of which "any, logistic" has all
        topologies' policies together; single networks, oracles, and rows of `guarantees`.
    """
    torch.manual_seed(seed)
    fit, judged = parts_of(recordings_of(case, folder.parent), seed)
    found = baselines(fit, judged, node_s, gate_s["threshold"])
    full = found["uniform"][-1]
    swept: dict[str, list[tuple[SelectionPoint, Point]]] = {}
    for topology in TOPOLOGIES:
        swept[f"{topology}, logistic"] = learned(
            fit, judged, node_s, TOPOLOGIES[topology], "logistic", gate_s, judging.prices
        )
    for topology in judging.boosted_topologies:
        swept[f"{topology}, boosting"] = learned(
            fit, judged, node_s, TOPOLOGIES[topology], "boosting", gate_s, judging.boosted
        )
    found |= {method: [point for _, point in points] for method, points in swept.items()}
    count = len(node_s)
    prices = judging.prices
    found["pairs, logistic"] = learned_on(
        pairs(count), fit, judged, node_s, Topology.chain, gate_s, prices
    )
    if subsets := later_first(count):
        found["later first, logistic"] = learned_on(
            subsets, fit, judged, node_s, Topology.full, gate_s, prices
        )
    found["any, logistic"] = [
        point for method, points in found.items() if method.endswith("logistic") for point in points
    ]
    rows = read_off("single networks", found["uniform"], full, LOSSES, mixed=False)
    for method, points in found.items():
        rows += read_off(method, points, full, LOSSES)
    bold = [
        (entry.policy, point.mean_s)
        for entry, point in swept["full, logistic"]
        if entry.policy.decisions
    ]
    kept = (
        guarantees("selection by price", bold, full.mean_s, judged, judging, seed) if bold else []
    )
    return {
        "rows": rows,
        "curves": [row for method, points in found.items() for row in drawn_curve(method, points)],
        "singles": [
            {"network": name, "s": point.mean_s, "accuracy": point.accuracy}
            for name, point in zip(case.names, found["uniform"], strict=True)
        ],
        "oracles": oracles(judged, node_s, full),
        "guarantees": kept,
        "samples": {"fitted on": len(fit.labels), "judged on": len(judged.labels)},
    }


def baselines(
    fit: Recording, judged: Recording, node_s: Sequence[float], threshold_s: float
) -> dict[str, list[Point]]:
    """Evaluate simple policies, of which "uniform" mixes single networks.

    Args:
        threshold_s: seconds of a threshold, paid after every network but the last.
    """
    count = len(node_s)
    asked_s = [*(seconds + threshold_s for seconds in node_s[:-1]), node_s[-1]]

    def both(route: Callable[[Recording], Route]) -> Point:
        return _point(fit, route(fit), judged, route(judged))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        fitted = [fit_chain_thresholds(fit, asked_s, max_accuracy_loss=loss) for loss in ASKED]

    def chain(policy: ThresholdPolicy) -> Point:
        return both(lambda recording: chain_route(policy, recording.outputs, asked_s))

    def single(node: int) -> Point:
        return both(lambda recording: single_route(node, len(recording.labels), node_s))

    def agreement(votes: int) -> Point:
        return both(lambda recording: agreement_route(recording.outputs, node_s, needed=votes))

    return {
        "uniform": [single(node) for node in range(count)],
        "myopic": [chain(policy) for policy in threshold_family(fit)],
        "threshold per network": [chain(policy) for policy in fitted],
        "agreement": [agreement(votes) for votes in range(2, min(count, 3) + 1)],
    }


def learned(
    fit: Recording,
    judged: Recording,
    node_s: Sequence[float],
    topology: Callable[[Sequence[str]], Topology],
    learner: Learner,
    gate_s: Mapping[str, float],
    prices: int,
) -> list[tuple[SelectionPoint, Point]]:
    """Policies for rising prices of time, with what they reach on both parts."""
    points = sweep_selection(
        fit,
        node_s,
        topology(fit.exits),
        time_prices=time_prices(node_s, prices),
        learner=learner,
        gate_s=gate_s[learner],
    )
    return [(entry, _judged_point(entry, judged)) for entry in points]


def time_prices(node_s: Sequence[float], count: int) -> list[float]:
    """Return prices of time from a low one to a high one.

    At the lowest price, running the full network is worth a thousandth of an error. At the highest
    price, the first network always answers.
    """
    return [float(price) for price in np.geomspace(1e-3 / max(node_s), 1.0 / min(node_s), count)]


def learned_on(
    subsets: Iterable[Sequence[int]],
    fit: Recording,
    judged: Recording,
    node_s: Sequence[float],
    topology: Callable[[Sequence[str]], Topology],
    gate_s: Mapping[str, float],
    prices: int,
) -> list[Point]:
    """Return what logistic policies on each of some subsets of the networks reach."""
    found: list[Point] = []
    for kept in subsets:
        one = only(fit, kept)
        other = only(judged, kept)
        own_s = [node_s[node] for node in kept]
        points = learned(one, other, own_s, topology, "logistic", gate_s, prices)
        found += [point for _, point in points]
    return found


def pairs(count: int) -> list[tuple[int, int]]:
    """Return each cheaper network beside the full one, and nothing else."""
    return [(first, count - 1) for first in range(count - 1)]


def later_first(count: int) -> list[range]:
    """Return the last networks, fewer each time, down to three.

    The first network of a topology is always paid for, so it matters which one that is.
    """
    return [range(first, count) for first in range(1, count - 2)]


def only(recording: Recording, nodes: Sequence[int]) -> Recording:
    """Select some of the networks of a recording."""
    return recording.with_outputs(
        recording.logits()[list(nodes)],
        exits=tuple(recording.exits[node] for node in nodes),
        features=tuple(recording.features[node] for node in nodes if recording.features),
    )


def _point(fit: Recording, on_fit: Route, judged: Recording, route: Route) -> Point:
    return point_of((on_fit.time_s, on_fit.hits(fit)), (route.time_s, route.hits(judged)))


def _judged_point(entry: SelectionPoint, judged: Recording) -> Point:
    route = entry.policy.route(judged.outputs, judged.features)
    return Point(
        entry.mean_time_s, entry.accuracy, route.time_s.double(), route.hits(judged).double()
    )


def oracles(judged: Recording, node_s: Sequence[float], full: Point) -> dict[str, Any]:
    """Compute limits that need the labels.

    These are the soft oracle by both ways of counting time, and the least time for each accuracy
    lost.
    """
    topology = Topology.full(judged.exits)
    result: dict[str, Any] = {}
    right: Tensor = judged.quality
    paths = topology.cheapest_paths(node_s)
    for pays in ("path", "chosen"):
        route = oracle_route(judged, node_s, topology, pays=pays)
        cost = (
            [sum(node_s[node] for node in path) for path in paths]
            if pays == "path"
            else list(node_s)
        )
        result[pays] = {
            "s": route.mean_time_s,
            "accuracy": route.accuracy(judged),
            "least_s": [least_knowing(right, cost, full.accuracy - loss) for loss in LOSSES],
        }
    return result
