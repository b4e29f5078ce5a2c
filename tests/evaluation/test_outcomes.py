"""What policies of every kind do to a recording, against a sample by sample account; and the same
on real networks.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from impatient.budgets import point
from impatient.errors import PolicyError
from impatient.evaluation import Recording, evaluate, record
from impatient.networks import attach_exits
from impatient.networks.cascade import Cascade
from impatient.policies import ThresholdPolicy
from impatient.policies.gate_fitting import fit_gates, sweep_gates
from impatient.policies.gates import GatePolicy
from impatient.policies.mixing import MixedPolicy, mix
from impatient.policies.outcome import Outcome, node_times_s
from impatient.policies.routing import SelectionPolicy
from impatient.policies.selection import fit_selection
from impatient.policies.topology import Topology
from impatient.runtime import Runner, profile
from impatient.training.data import load_data
from recordings import costs_of, drawn

COSTS = costs_of(
    [1.0, 2.0, 3.0, 4.0], [0.5, 0.25, 0.5, 0.0], stage_macs=[10, 20, 30, 40], head_macs=[1, 2, 3, 0]
)
# networks of a cascade
NODES = costs_of([1.0, 2.0, 3.0, 4.0], [0.0] * 4, stage_macs=[10, 20, 30, 40])
GATES = (0.05, 0.1, 0.2)


def fresh() -> Recording:
    recording = drawn(400, seed=1, split="test")
    return replace(recording, features=tuple(recording.outputs))


def fitted() -> Recording:
    recording = drawn(2000, seed=0)
    return replace(recording, features=tuple(recording.outputs))


def policies() -> dict[str, Any]:
    gates = {
        inputs: fit_gates(fitted(), COSTS, time_price=0.05, inputs=inputs, gate_s=GATES)  # type: ignore[arg-type]
        for inputs in ("confidences", "features", "both")
    }
    return {
        "thresholds": ThresholdPolicy(score="margin", thresholds=(0.6, math.inf, 0.5, -math.inf)),
        **gates,
        "mixture": mix(
            sweep_gates(fitted(), COSTS, [0.0, 0.05, 0.1, 0.2, 1.0], gate_s=GATES), mean_time_s=5.0
        ),
    }


POLICIES = policies()


def by_hand(
    policy: Any, recording: Recording, sample: int
) -> tuple[int, float, float, list[float]]:
    """Exit, seconds and MACs of one sample, and seconds of each exit on the way where all are
    posted.
    """
    if isinstance(policy, MixedPolicy):
        policy = policy.slow if policy.drawn(len(recording.labels))[sample] else policy.fast
    seconds = posted = macs = 0.0
    way = []
    batch = COSTS.at(1)
    for exit in range(4):
        stage = batch.stages[exit].mean
        head = batch.heads[exit].mean
        gated = isinstance(policy, GatePolicy) and exit < 3 and policy.gates[exit] is not None
        if gated and policy.gates[exit].constant is None:
            seconds = seconds + policy.gate_s[exit]
            posted = posted + policy.gate_s[exit]
        seconds = seconds + stage
        posted = posted + stage + head
        macs = macs + COSTS.stage_macs[exit]
        way.append(posted)
        output = recording.outputs[exit, sample][None]
        pooled = recording.features[exit][sample][None]
        if isinstance(policy, GatePolicy):
            leaves = exit == 3 or (gated and bool(policy.stops(exit, output, pooled)))
        else:
            leaves = policy.looks_at(exit) and bool(policy.stops(exit, output))
        pays = exit == 3 or (policy.looks_at(exit) and getattr(policy, "inputs", "") != "features")
        if leaves or pays:
            seconds = seconds + head
            macs = macs + COSTS.head_macs[exit]
        if leaves:
            return exit, seconds, macs, way
    raise AssertionError("the last exit stops everybody")


@pytest.mark.parametrize("name", POLICIES)
def test_exits_seconds_and_operations_are_those_of_each_sample_alone(name: str) -> None:
    recording = fresh()
    policy = POLICIES[name]
    found = policy.outcome(recording, COSTS)
    assert found.exits.unique().numel() > 1
    for sample in range(0, 400, 5):
        exit, seconds, macs, way = by_hand(policy, recording, sample)
        assert int(found.exits[sample]) == exit
        assert float(found.contract_s[sample]) == pytest.approx(seconds)
        assert float(found.macs[sample]) == pytest.approx(macs)
        assert found.visited[sample].tolist() == [k <= exit for k in range(4)]
        assert found.interruptible_s[sample, : exit + 1].tolist() == pytest.approx(way)
        assert float(found.spent_s()[sample]) == pytest.approx(way[-1])


def held(found: Outcome, hits: torch.Tensor, sample: int, time_s: float) -> float:
    """Whether one sample has the right answer when its time is up."""
    there = [
        k
        for k in range(4)
        if found.visited[sample, k] and found.interruptible_s[sample, k] <= time_s
    ]
    return float(hits[there[-1], sample]) if there else 0.0


def selection() -> SelectionPolicy:
    return fit_selection(
        fitted(), node_times_s(NODES), Topology.full(4), time_price=0.12, gate_s=0.1
    )


@pytest.mark.parametrize("time_s", [0.9, 1.2, 3.3, 6.0, 11.0, 30.0])
@pytest.mark.parametrize("name", [*POLICIES, "selection"])
def test_under_a_budget_the_answer_is_the_last_on_the_way_that_fits(
    name: str, time_s: float
) -> None:
    recording = fresh()
    policy, costs = (selection(), NODES) if name == "selection" else (POLICIES[name], COSTS)
    found = policy.outcome(recording, costs)
    hits = recording.quality
    expected = [held(found, hits, sample, time_s) for sample in range(400)]
    assert found.expected(point(time_s), hits).tolist() == expected


def test_a_selection_pays_the_networks_on_its_way_and_its_decisions() -> None:
    recording = fresh()
    policy = selection()
    route = policy.route(recording.outputs)
    found = policy.outcome(recording, NODES)
    # samples go different ways
    assert len(route.visited.unique(dim=0)) > 2
    assert torch.equal(found.exits, route.answering)
    assert torch.equal(found.visited, route.visited)
    assert found.contract_s.tolist() == pytest.approx(route.time_s.tolist())
    assert (
        found.macs.tolist()
        == (
            route.visited.double() @ torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64)
        ).tolist()
    )


def test_evaluations_hold_policies_of_every_kind() -> None:
    recording = fresh()
    rows = {row.name: row for row in evaluate(recording, COSTS, POLICIES).rows}
    for name, policy in POLICIES.items():
        found = policy.outcome(recording, COSTS)
        assert rows[name].contract_s == pytest.approx(float(found.contract_s.mean()))
        assert rows[name].accuracy.value == pytest.approx(
            float(recording.quality[found.exits, torch.arange(400)].mean())
        )
    chosen = evaluate(recording, NODES, selection())
    assert chosen["policy"].contract_s == pytest.approx(
        float(selection().outcome(recording, NODES).contract_s.mean())
    )


def test_networks_that_take_no_time_cannot_be_selected_among() -> None:
    with pytest.raises(PolicyError, match="without a router"):
        node_times_s(costs_of([1.0, 0.0], [0.0, 0.0]))


# --- on real networks -----------------------------------------------------------------------------


class Counted(nn.Module):
    """A linear head that counts the samples it answers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 10)
        self.answered = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.answered += len(x)
        return self.layer(x)


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Flatten(),
        *(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(3)),
        nn.Linear(64, 10),
    )
    data = load_data("digits")
    exits = attach_exits(
        backbone,
        after=["1", "2"],
        example=data.example(),
        heads=lambda shape, _: Counted(shape.channels),
    )
    return exits.eval()


@pytest.mark.parametrize("inputs", ["confidences", "features", "both"])
def test_the_runner_does_what_was_recorded(network: Any, inputs: Any) -> None:
    data = load_data("digits")
    costs = profile(network, data.example(), batch_sizes=[1, 8], repeats=20)
    validation = record(network, data, split="validation", features=True)
    policy = fit_gates(validation, costs, time_price=0.0, reference="none", inputs=inputs)
    recording = record(network, data, split="test", features=True)
    exits = policy.exits_on(recording)
    assert exits.unique().numel() > 1
    runner = Runner(network, costs, policy)
    told = []
    for head in network.heads:
        head.answered = 0
    for x, _ in data.batches("test", 1):
        told += runner.run(x).exits
        if len(told) == 40:
            break
    assert told == exits[:40].tolist()
    left = [sum(exit == k for exit in told) for k in range(2)]
    came = [40, 40 - left[0]]
    paid = left if inputs == "features" else came
    assert [head.answered for head in network.heads] == [
        count if policy.looks_at(k) else 0 for k, count in enumerate(paid)
    ]
    x, _ = next(data.batches("test", 8))
    answer = runner.run(x)
    assert answer.exits == tuple(exits[:8].tolist())
    assert torch.allclose(answer.output, recording.outputs[exits[:8], torch.arange(8)], atol=1e-5)
    with runner.start(x) as run:
        assert run.result().exits == answer.exits


def test_a_mixture_draws_anew_in_every_run_and_decides_alike_at_all_exits(network: Any) -> None:
    data = load_data("digits")
    costs = profile(network, data.example(), repeats=20)
    first, last = (
        ThresholdPolicy(score="margin", thresholds=bounds)
        for bounds in ((-1.0, 0.0, -math.inf), (math.inf,) * 2 + (-math.inf,))
    )
    runner = Runner(network, costs, MixedPolicy(fast=first, slow=last, share=0.5))
    told = [runner.run(data.example()).exit for _ in range(60)]
    assert set(told) == {0, 2}
    assert 15 < told.count(2) < 45


def test_a_cascade_answers_as_its_policy_says_in_batches_and_alone() -> None:
    torch.manual_seed(1)
    data = load_data("digits")
    networks = [
        nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        for width in (4, 16, 64)
    ]
    cascade = Cascade(networks, ["small", "middle", "large"]).eval()
    costs = profile(cascade, data.example(), batch_sizes=[1, 64], repeats=20)
    # the networks know nothing, so that only a price of nothing sends samples on
    times = (
        1.0,
        2.0,
        4.0,
    )
    policy = fit_selection(
        record(cascade, data, split="validation"), times, Topology.full(3), time_price=1e-4
    )
    recording = record(cascade, data, split="test")
    route = policy.route(recording.outputs)
    assert len(route.visited.unique(dim=0)) > 1
    runner = Runner(cascade.routed(policy), costs)
    x, _ = next(data.batches("test", 64))
    together = runner.run(x)
    assert together.exits == tuple(route.answering[:64].tolist())
    assert torch.allclose(
        together.output, recording.outputs[route.answering[:64], torch.arange(64)], atol=1e-5
    )
    assert [runner.run(x[k : k + 1]).exit for k in range(16)] == route.answering[:16].tolist()
