"""Early exits of one network on one division of the samples.

Learned gates are compared with baselines.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from impatient import CostProfile, Recording, ThresholdPolicy, fit_thresholds
from impatient.errors import NoEffectWarning
from impatient.policies import scaled_family, sweep_gates, threshold_family
from impatient.policies.costsensitive import Learner
from impatient.policies.gates import GatePolicy, Inputs, exit_times_s
from impatient.store import from_plain
from papers.adaptive_neural_networks.curves import (
    Point,
    drawn_curve,
    guarantees,
    point_of,
    read_off,
)
from papers.adaptive_neural_networks.exit_baselines import always, soft_oracle
from papers.adaptive_neural_networks.recipe import Exits, Judging, parts_of, recordings_of

# the paper's, and none at all
LOSSES = (0.0, 0.01, 0.02, 0.05)
# for which thresholds are fitted
ASKED = (
    0.0,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.07,
    0.1,
    0.15,
)
INPUTS: tuple[Inputs, ...] = ("confidences", "features", "both")


def judge_split(
    exits: Exits,
    costs: Mapping[str, Any],
    gate_s: Mapping[str, float],
    judging: Judging,
    seed: int,
    *,
    folder: Path,
) -> dict[str, Any]:
    """Fit every method on one part and judge it on the other.

    Args:
        costs: a cost profile as JSON.
        gate_s: measured seconds of asking a gate, by "INPUTS, LEARNER".
        seed: of the division.
    Returns:
        Rows of `read_off` and `drawn_curve` per method, every exit's accuracy, the oracles, and
        rows of `guarantees`.
    """
    torch.manual_seed(seed)
    profile = from_plain(costs, CostProfile)
    fit, judged = parts_of(recordings_of(exits, folder.parent), seed)
    found = baselines(fit, judged, profile)
    full = full_network(fit, judged, profile)
    gated: dict[str, list[tuple[GatePolicy, Point]]] = {}
    for inputs in INPUTS:
        gated[f"gates on {inputs}"] = gates(
            fit, judged, profile, inputs, "logistic", gate_s, judging.prices
        )
    gated["gates on confidences, boosting"] = gates(
        fit, judged, profile, "confidences", "boosting", gate_s, judging.boosted
    )
    found |= {method: [point for _, point in points] for method, points in gated.items()}
    rows = [
        row for method, points in found.items() for row in read_off(method, points, full, LOSSES)
    ]
    return {
        "rows": rows,
        "curves": [row for method, points in found.items() for row in drawn_curve(method, points)],
        "exits": [
            {"exit": name, "s": time, "accuracy": accuracy}
            for name, time, accuracy in zip(
                profile.exits, profile.contract_s(), judged.quality.mean(1).tolist(), strict=True
            )
        ],
        "full": {"s": full.mean_s, "accuracy": full.accuracy},
        "oracles": oracles(judged, profile),
        "guarantees": guaranteed(
            fit, judged, profile, gated["gates on confidences"], full, judging, seed
        ),
        "samples": {"fitted on": len(fit.labels), "judged on": len(judged.labels)},
    }


def full_network(fit: Recording, judged: Recording, costs: CostProfile) -> Point:
    """Measure the network without exits."""
    on_fit, on_judged = (
        (
            torch.full((len(part),), costs.exit_free_s(), dtype=torch.float64),
            part.quality[-1],
        )
        for part in (fit, judged)
    )
    return point_of(on_fit, on_judged)


def baselines(fit: Recording, judged: Recording, costs: CostProfile) -> dict[str, list[Point]]:
    """Fit the policies that the gates are compared with.

    These are single exits for all samples, of which "uniform" is the mixture; one threshold for all
    exits; and one threshold for each exit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        fitted = [fit_thresholds(fit, costs, max_accuracy_loss=loss) for loss in ASKED]
    policies: dict[str, Sequence[ThresholdPolicy]] = {
        "uniform": [always(exit, costs.num_exits) for exit in range(costs.num_exits)],
        "myopic": threshold_family(fit),
        "threshold per exit": fitted,
    }
    return {
        method: [
            point_of(_seen(policy, fit, costs), _seen(policy, judged, costs)) for policy in those
        ]
        for method, those in policies.items()
    }


def _seen(
    policy: ThresholdPolicy, part: Recording, costs: CostProfile
) -> tuple[torch.Tensor, torch.Tensor]:
    found = policy.outcome(part, costs)
    exits = found.exits
    seconds = found.contract_s
    return seconds, part.quality[exits, torch.arange(len(exits))]


def gates(
    fit: Recording,
    judged: Recording,
    costs: CostProfile,
    inputs: Inputs,
    learner: Learner,
    gate_s: Mapping[str, float],
    prices: int,
) -> list[tuple[GatePolicy, Point]]:
    """Gates for rising prices of time, with what they reach on both parts."""
    swept = sweep_gates(
        fit,
        costs,
        time_prices(costs, prices),
        inputs=inputs,
        learner=learner,
        gate_s=gate_s[f"{inputs}, {learner}"],
    )
    policies = [entry.policy for entry in swept]
    samples = torch.arange(len(judged.labels))
    hits = judged.quality.double()
    points = []
    for entry, exits in zip(swept, GatePolicy.exits_of_each(policies, judged), strict=True):
        seconds = exit_times_s(entry.policy, costs)[exits]
        points.append(
            (entry.policy, Point(entry.mean_time_s, entry.accuracy, seconds, hits[exits, samples]))
        )
    return points


def time_prices(costs: CostProfile, count: int) -> list[float]:
    """Return prices at which a run is worth 0.01 to 10 errors."""
    return [float(worth) / costs.exit_free_s() for worth in np.geomspace(1e-2, 10.0, count)]


def oracles(judged: Recording, costs: CostProfile) -> dict[str, Any]:
    """Evaluate the soft oracle by both ways of counting time."""
    found: dict[str, Any] = {}
    hits = judged.quality
    samples = torch.arange(len(judged.labels))
    for pays in ("path", "chosen"):
        exits, seconds = soft_oracle(judged, costs, pays=pays)
        found[pays] = {"s": float(seconds.mean()), "accuracy": float(hits[exits, samples].mean())}
    return found


def guaranteed(
    fit: Recording,
    judged: Recording,
    costs: CostProfile,
    gated: Sequence[tuple[GatePolicy, Point]],
    full: Point,
    judging: Judging,
    seed: int,
) -> list[dict[str, Any]]:
    """Thresholds made safer and bolder, and gates by rising price, under control of risk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        family = scaled_family(fit_thresholds(fit, costs, max_accuracy_loss=judging.epsilon))
    scaled = [(policy, float(policy.outcome(judged, costs).contract_s.mean())) for policy in family]
    priced = [(policy, point.mean_s) for policy, point in gated]
    return [
        *guarantees("thresholds, scaled", scaled, full.mean_s, judged, judging, seed),
        *guarantees("gates by price", priced, full.mean_s, judged, judging, seed),
    ]
