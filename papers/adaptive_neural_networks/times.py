"""Measured times of networks, stages and decisions.

Policies are also run for real beside the full network. All calls take turns.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from impatient import CostProfile, Recording, Runner, ThresholdPolicy, profile
from impatient.clock import SYSTEM_CLOCK, Clock, times_of
from impatient.errors import NoEffectWarning
from impatient.inputs import synchronise
from impatient.networks.cascade import Cascade
from impatient.policies import (
    SelectionPolicy,
    Topology,
    fit_gates,
    fit_selection,
    gate_time_s,
    node_times_s,
    sweep_selection,
)
from impatient.policies.costsensitive import Learner
from impatient.policies.selection import decision_time_s
from impatient.provenance import machine
from impatient.store import to_plain
from papers.adaptive_neural_networks import exiting, recipe
from papers.adaptive_neural_networks.recipe import (
    Case,
    Exits,
    Scale,
    Timing,
    judged_places,
    parts_of,
    recordings_of,
    taken,
)
from papers.adaptive_neural_networks.selecting import only
from papers.jobs import Job

LEARNERS: tuple[Learner, ...] = ("logistic", "boosting")
# of the division whose judged part is run for real
SEED = 0


def jobs(scale: Scale) -> list[Job]:
    """Measurements, to be run one by one, when nothing else runs."""
    return [
        *(
            Job(name(case), measure_selection, {"case": case, "timing": scale.timing})
            for case in scale.cases
        ),
        *(
            Job(name(made), measure_exits, {"exits": made, "timing": scale.timing})
            for made in scale.exits
        ),
    ]


def name(what: Case | Exits) -> str:
    """Name of a measurement's job."""
    return f"time-{what.name}"


def measure_selection(case: Case, timing: Timing, *, folder: Path) -> dict[str, Any]:
    """Measure all networks of a case, a decision, and cascades run for real.

    Returns:
        "costs", a profile; "node_s"; "gate_s" by learner, and of a "threshold"; and the "runs", one
        for each loss, as `selection_run` has them.
    """
    device = _device()
    data = recipe.data_of(case)
    networks = [recipe.built(case, net, folder.parent) for net in case.nets]
    cascade = Cascade(networks, case.names).to(device).eval()
    costs = profile(cascade, data.example().to(device), repeats=timing.repeats, max_seconds=120.0)
    recordings = recordings_of(case, folder.parent)
    fit, judged = parts_of(recordings, SEED)
    node_s = node_times_s(costs)
    gate_s = {learner: decision_s(fit, node_s, learner) for learner in LEARNERS}
    gate_s["threshold"] = threshold_s(fit)
    images = _images(case, recordings, timing.images, device)
    runs = [
        selection_run(
            cascade,
            images,
            fastest(fit, node_s, loss, gate_s["logistic"]),
            first_of(judged, timing.images),
            timing.repeats,
        )
        | {"loss": loss}
        for loss in timing.losses
    ]
    return {
        "costs": to_plain(costs),
        "node_s": list(node_s),
        "gate_s": gate_s,
        "runs": runs,
        **machine(device),
    }


def selection_run(
    cascade: Cascade,
    images: Sequence[Tensor],
    chosen: tuple[Sequence[int], SelectionPolicy],
    recorded: Recording,
    repeats: int,
) -> dict[str, Any]:
    """Run the networks of a policy for real.

    Args:
        cascade: of all networks.
        images: batches of one.
        chosen: of `fastest`.
        recorded: the same samples, on all networks.
        repeats: of the measurement that the prediction goes by.
    Returns:
        The networks "used", and what `really` says of them.
    """
    kept, policy = chosen
    networks = [cascade.networks[node] for node in kept]
    part = Cascade(networks, [cascade.exit_names[node] for node in kept]).eval()
    costs = profile(part, images[0], repeats=repeats, max_seconds=120.0)
    run = really(
        Runner(part.routed(policy), costs), networks[-1], images, only(recorded, kept), policy
    )
    return {"used": " -> ".join(policy.topology.nodes[node] for node in policy.visits), **run}


def fastest(
    fit: Recording, node_s: Sequence[float], loss: float, gate_s: float
) -> tuple[Sequence[int], SelectionPolicy]:
    """Return the policy that is fastest on the part it was fitted on.

    Candidates use all networks, all but the first few, or pairs.

    Returns:
        The networks it is for, and the policy.
    """
    last = len(node_s) - 1
    found = []
    for kept in [
        *(range(first, last + 1) for first in range(last)),
        *([first, last] for first in range(last - 1)),
    ]:
        own_s = [node_s[node] for node in kept]
        with _quietly():
            policy = fit_selection(
                only(fit, kept),
                own_s,
                Topology.full([fit.exits[node] for node in kept]),
                max_accuracy_loss=loss,
                gate_s=gate_s,
            )
        found.append((policy.target["mean_cost"], kept, policy))
    _, kept, policy = min(found, key=lambda entry: entry[0])
    return kept, policy


def measure_exits(exits: Exits, timing: Timing, *, folder: Path) -> dict[str, Any]:
    """Measure all stages, heads and gates, and run confidence gates for real.

    Returns:
        "costs", a profile; "gate_s" by what gates look at and learner; and the "runs", one for each
        loss: the exits "used", and what `really` says.
    """
    device = _device()
    data = recipe.data_of(exits.case)
    network = recipe.built_exits(exits, folder.parent).to(device)
    costs = profile(network, data.example().to(device), repeats=timing.repeats, max_seconds=120.0)
    recordings = recordings_of(exits, folder.parent)
    fit, judged = parts_of(recordings, SEED)
    kinds = [(inputs, "logistic") for inputs in exiting.INPUTS] + [("confidences", "boosting")]
    gate_s = {
        f"{inputs}, {learner}": gate_seconds(fit, costs, inputs, learner)
        for inputs, learner in kinds
    }
    images = _images(exits.case, recordings, timing.images, device)
    runs = []
    for loss in timing.exit_losses:
        with _quietly():
            policy = fit_gates(
                fit, costs, max_accuracy_loss=loss, gate_s=gate_s["confidences, logistic"]
            )
        looked = [name for exit, name in enumerate(network.exit_names) if policy.looks_at(exit)]
        run = really(
            Runner(network, costs, policy),
            network.backbone,
            images,
            first_of(judged, timing.images),
            policy,
        )
        runs.append({"loss": loss, "used": " -> ".join(looked), **run})
    return {"costs": to_plain(costs), "gate_s": gate_s, "runs": runs, **machine(device)}


def decision_s(fit: Recording, node_s: Sequence[float], learner: Learner) -> float:
    """Measure the seconds of a learned decision.

    It is 0 if no decision is worth learning.
    """
    # of few samples: what a decision takes does not depend on what it has learned
    few = first_of(fit, 1000)
    prices = [share / node_s[-1] for share in (0.03, 0.1, 0.01, 0.003, 0.3)]
    for price in prices:
        (found,) = sweep_selection(
            few, node_s, Topology.full(fit.exits), time_prices=[price], learner=learner
        )
        if found.policy.decisions:
            return decision_time_s(found.policy, few)
    return 0.0


def threshold_s(fit: Recording) -> float:
    """Measure the mean seconds of a threshold, as a runner asks it about one sample."""
    early = [0.9] * (len(fit.exits) - 1)
    policy = ThresholdPolicy(score="max_probability", thresholds=(*early, -math.inf))
    with torch.inference_mode():
        ask = functools.partial(policy.stops_one, 0, fit.logits()[0, :1], None)
        return statistics.fmean(times_of(ask, repeats=200, warm_up=20))


def gate_seconds(fit: Recording, costs: CostProfile, inputs: Any, learner: Any) -> float:
    """Measure the mean seconds of asking a gate that is open at some price.

    It is 0 if no gate is ever open.
    """
    few = first_of(fit, 1000)
    with _quietly():
        for share in (0.3, 1.0, 0.1, 3.0):
            policy = fit_gates(
                few, costs, time_price=share / costs.exit_free_s(), inputs=inputs, learner=learner
            )
            asked = [seconds for seconds in gate_time_s(policy, few) if seconds > 0.0]
            if asked:
                return sum(asked) / len(asked)
    return 0.0


def really(
    runner: Runner,
    full: nn.Module,
    images: Sequence[Tensor],
    recorded: Recording,
    policy: Any,
    clock: Clock = SYSTEM_CLOCK,
) -> dict[str, Any]:
    """Run images one by one with the policy and with the full network, in turn.

    Args:
        runner: of the policy.
        full: the network that answers where there is no policy.
        images: batches of one.
        recorded: the same samples.
        policy: as fitted, for the prediction.
    Returns:
        Per image "policy_s" and "full_s", measured, "predicted_s", and whether the answers of the
        run and of the recording are "right" and "recorded_right" and come the "same" way, and
        whether the full network's is, on the recording ("full_right"); "profiled_full_s", which
        predictions go by.
    """
    task = runner.network.task
    measured: dict[str, list[Any]] = {"policy_s": [], "full_s": [], "right": [], "way": []}

    def by_policy(x: Tensor, label: int) -> None:
        answer = runner.run(x)
        measured["policy_s"].append(answer.elapsed_s)
        right = task.quality(answer.output.cpu(), torch.tensor([label]))
        measured["right"].append(bool(right))
        measured["way"].append(answer.exits[0])

    def by_full(x: Tensor, label: int) -> None:
        del label
        with torch.inference_mode():
            begin = clock.now()
            full(x)
            synchronise(x.device)
            measured["full_s"].append(clock.now() - begin)

    with runner:
        runner.warm_up(images[0])
        for place, (x, label) in enumerate(zip(images, recorded.labels.tolist(), strict=True)):
            # alternate the order: whatever ran last has warmed the caches for the next
            for way in (by_policy, by_full) if place % 2 else (by_full, by_policy):
                way(x, label)
    expected = policy.outcome(recorded, runner.costs)
    hits = recorded.quality[expected.exits, torch.arange(len(images))]
    ways = measured.pop("way")
    return {
        **measured,
        "predicted_s": expected.contract_s.tolist(),
        "recorded_right": hits.bool().tolist(),
        "full_right": recorded.quality[-1].bool().tolist(),
        "same": [one == other for one, other in zip(ways, expected.exits.tolist(), strict=True)],
        "profiled_full_s": runner.costs.exit_free_s(),
        "asked": dict(policy.target),
    }


def first_of(recording: Recording, count: int) -> Recording:
    """Return the first samples of a recording."""
    return taken(recording, torch.arange(min(count, len(recording.labels))))


def _images(case: Case, recordings: Sequence[Recording], count: int, device: str) -> list[Tensor]:
    """Return the first samples that policies are judged on, one input for each."""
    data = recipe.data_of(case)
    places = judged_places(len(recordings[-1].labels), case, SEED)[:count].tolist()
    return [data.preprocess(data.examples("test").take([place])).to(device) for place in places]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Suppress the warning that a policy changes nothing, which the tables show."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        yield


# --- from measurements to the table ---------------------------------------------------------------


def real_row(what: str, result: Mapping[str, Any], draws: int = 2000) -> dict[str, Any]:
    """Compare the real run with its prediction.

    Returns:
        Mean milliseconds, measured and predicted, of the policy and of the full network; their
        ratios; and the interval of the measured speed-up by bootstrap over images.
    """
    policy, full, predicted = (
        torch.tensor(result[what], dtype=torch.float64)
        for what in ("policy_s", "full_s", "predicted_s")
    )
    count = len(policy)
    places = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(0))
    low, high = (
        (full[places].mean(1) / policy[places].mean(1))
        .quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        .tolist()
    )
    profiled = float(result["profiled_full_s"])
    return {
        "what": what,
        "asked to lose": 100.0 * result["loss"],
        "used": result["used"],
        "images": count,
        "measured ms": 1e3 * float(policy.mean()),
        "predicted ms": 1e3 * float(predicted.mean()),
        "measured over predicted": float(policy.mean() / predicted.mean()),
        "full ms": 1e3 * float(full.mean()),
        "full profiled ms": 1e3 * profiled,
        "speed-up": float(full.mean() / policy.mean()),
        "low": low,
        "high": high,
        "speed-up predicted": profiled / float(predicted.mean()),
        "accuracy %": _percent(result["right"]),
        "recorded accuracy %": _percent(result["recorded_right"]),
        "full network %": _percent(result["full_right"]),
        "same way %": _percent(result["same"]),
    }


def _percent(values: Sequence[bool]) -> float:
    return 100.0 * sum(values) / len(values) if values else math.nan


def raw_rows(what: str, result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every image's times."""
    for place, (own, full, predicted) in enumerate(
        zip(result["policy_s"], result["full_s"], result["predicted_s"], strict=True)
    ):
        yield {
            "what": what,
            "asked to lose": 100.0 * result["loss"],
            "image": place,
            "policy_s": own,
            "full_s": full,
            "predicted_s": predicted,
        }
