"""What learned policies of Adaptive Neural Networks are held against."""

import math

import pytest
import torch

from impatient.errors import PolicyError
from impatient.policies import ThresholdPolicy
from impatient.policies.topology import Topology
from papers.adaptive_neural_networks.exit_baselines import soft_oracle
from papers.adaptive_neural_networks.selection_baselines import (
    agreement_route,
    chain_costs,
    chain_route,
    fit_chain_thresholds,
    oracle_route,
    single_route,
)
from recordings import costs_of, drawn, recording_of, sure

COSTS = costs_of([1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.0])
FEW = drawn(500, seed=11)
FEW_S = [1.0, 2.0, 4.0, 8.0]


# --- exits ----------------------------------------------------------------------------------------


def test_the_oracles_choices_are_explicit():
    right = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]]
    recording = recording_of(*sure(right, [[0.9] * 4] * 4))
    exits, times = soft_oracle(recording, COSTS)
    assert exits.tolist() == [0, 1, 2, 0]
    assert times.tolist() == pytest.approx([1.1, 2.1, 3.1, 1.1])
    exits, times = soft_oracle(recording, COSTS, when_none_is_right="last", pays="path")
    assert exits.tolist() == [0, 1, 2, 3]
    assert times.tolist() == pytest.approx([1.1, 2.2, 3.3, 4.3])


# --- networks -------------------------------------------------------------------------------------


def test_single_networks():
    route = single_route(2, 500, FEW_S)
    assert route.time_s.tolist() == [4.0] * 500
    assert route.accuracy(FEW) == pytest.approx(FEW.quality[2].mean().item())


def test_thresholds_per_network_leave_closed_networks_out():
    policy = fit_chain_thresholds(FEW, FEW_S, mean_time_s=4.0)
    route = chain_route(policy, FEW.outputs, FEW_S)
    assert route.mean_time_s == pytest.approx(policy.target["mean_cost"])
    assert route.accuracy(FEW) == pytest.approx(policy.target["accuracy"])
    closed = ThresholdPolicy(score="margin", thresholds=(math.inf, 0.5, -math.inf, -math.inf))
    route = chain_route(closed, FEW.outputs, FEW_S)
    assert not route.visited[:, 0].any()
    assert set(route.time_s.tolist()) == {2.0, 6.0}
    assert chain_costs(FEW_S).cumulative("time", "interruptible", heads=closed.open_exits()) == (
        1.0,
        2.0,
        6.0,
        14.0,
    )


def test_agreement_stops_at_the_second_that_says_the_same():
    answers = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [2, 1, 0, 2], [2, 2, 2, 0]])
    route = agreement_route(torch.nn.functional.one_hot(answers, 3).float(), [1.0, 1.0, 2.0, 4.0])
    assert route.answering.tolist() == [1, 2, 2, 3]
    assert route.time_s.tolist() == [2.0, 4.0, 4.0, 8.0]
    three = agreement_route(
        torch.nn.functional.one_hot(answers, 3).float(), [1.0, 1.0, 2.0, 4.0], needed=3
    )
    assert three.answering.tolist() == [3, 3, 3, 3]
    with pytest.raises(PolicyError, match="at least 2"):
        agreement_route(FEW.outputs, FEW_S, needed=1)


def test_the_oracle_says_what_it_pays_and_who_answers_when_none_is_right():
    outputs, labels = sure([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], [[0.7] * 4] * 3)
    recording = recording_of(outputs, labels)
    node_s = [1.0, 2.0, 4.0]
    assert oracle_route(recording, node_s).time_s.tolist() == [1.0, 3.0, 7.0, 1.0]
    assert oracle_route(recording, node_s, Topology.full(3)).time_s.tolist() == [1.0, 3.0, 5.0, 1.0]
    chosen = oracle_route(recording, node_s, pays="chosen", when_none_is_right="last")
    assert chosen.time_s.tolist() == [1.0, 2.0, 4.0, 4.0]
    assert chosen.answering.tolist() == [0, 1, 2, 2]
    with pytest.raises(PolicyError, match="credit"):
        oracle_route(recording, node_s, pays="credit")
