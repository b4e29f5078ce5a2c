"""Decisions about one sample in plain numbers are those that tensors make."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from impatient.policies import GatePolicy, ThresholdPolicy
from impatient.policies.costsensitive import Linear, fit_decision
from impatient.policies.routing import selection_features, selection_features_of_one
from impatient.tasks import classification, rows, scores

logits = st.lists(st.floats(-30.0, 30.0, width=32), min_size=2, max_size=rows.MOST_CLASSES)


@given(logits)
def test_scores_are_those_of_tensors(row: list[float]) -> None:
    output = torch.tensor([row])
    for name, plain in rows.SCORES.items():
        assert abs(plain(row) - float(scores.SCORES[name](output))) < rows.CLOSE / 10
    seen = scores.confidence_features(output)[0].tolist()
    assert rows.confidence_features(row) == pytest.approx(seen, rel=1e-5, abs=1e-5)


@given(st.lists(logits.filter(lambda row: len(row) > 3), min_size=3, max_size=3))
def test_what_a_selection_sees_is_what_it_sees_in_tensors(some: list[list[float]]) -> None:
    classes = min(map(len, some))
    outputs = [row[:classes] for row in some]
    expected = selection_features([torch.tensor([row]) for row in outputs])[0].tolist()
    assert selection_features_of_one(outputs) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@settings(max_examples=200)
@given(logits, st.sampled_from(sorted(rows.SCORES)), st.integers(-2, 2))
def test_a_threshold_at_the_very_score_decides_as_with_tensors(
    row: list[float], score: str, ulps: int
) -> None:
    output = torch.tensor([row])
    bound = scores.SCORES[score](output)
    for _ in range(abs(ulps)):
        bound = torch.nextafter(bound, torch.tensor([math.copysign(9.0, ulps)]))
    policy = ThresholdPolicy(score=score, thresholds=(float(bound), -math.inf))
    assert policy.stops_one(0, output, None) is bool(policy.stops(0, output))


@pytest.mark.parametrize(
    "output",
    [
        torch.tensor([[math.nan, 1.0]]),
        torch.tensor([[math.inf, 1.0]]),
        torch.tensor([[-math.inf, 1.0, 2.0]]),
        torch.zeros(1, rows.MOST_CLASSES + 1),
        torch.tensor([[2.0]]),
        torch.tensor([[4.0, 0.0]], dtype=torch.bfloat16),
    ],
)
def test_unusual_outputs_decide_as_with_tensors(output: Tensor) -> None:
    for score in rows.SCORES:
        policy = ThresholdPolicy(score=score, thresholds=(0.6, -math.inf))
        assert policy.stops_one(0, output, None) is bool(policy.stops(0, output))


def test_scores_of_a_task_of_ones_own_are_not_replaced() -> None:
    task = classification()
    own: Any = dict(task.scores) | {"margin": lambda output: torch.zeros(len(output))}
    changed = dataclasses.replace(task, scores=own)
    policy = ThresholdPolicy(score="margin", thresholds=(0.5, -math.inf)).for_task(changed)
    assert not policy.stops_one(0, torch.tensor([[9.0, 0.0]]), None)


@pytest.mark.parametrize("method", ["filter_tree", "regression"])
@pytest.mark.parametrize(("actions", "width"), [(2, 6), (4, 6), (2, 80)])
def test_linear_decisions_choose_as_with_tensors(method: Any, actions: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, width, generator=generator) * 3 + 5
    costs = torch.rand(400, actions, generator=generator) + features[:, :actions].relu()
    decision = fit_decision(features, costs, method=method)
    linear = decision.linear
    assert isinstance(linear, Linear)
    expected = decision.choose(features).tolist()
    found = [linear.choose(row) for row in features.tolist()]
    assert len(set(expected)) > 1
    close = found.count(None)
    assert close < 4
    differ = sum(
        here is not None and here != there for here, there in zip(found, expected, strict=True)
    )
    assert differ == 0


def test_a_score_that_is_too_close_is_left_to_tensors() -> None:
    features = torch.linspace(-1, 1, 101)[:, None]
    linear = fit_decision(features, torch.cat([features, -features], 1)).linear
    assert linear is not None
    middle = -linear.offsets[0] / linear.slopes[0][0]
    assert linear.choose([middle]) is None
    assert {linear.choose([middle - 0.1]), linear.choose([middle + 0.1])} == {0, 1}


@pytest.mark.parametrize("inputs", ["confidences", "features", "both"])
def test_gates_decide_as_with_tensors(inputs: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(300, 5, generator=generator) * 3
    pooled = torch.randn(300, 8, generator=generator)
    parts = {"confidences": [scores.confidence_features(outputs)], "features": [pooled]}
    parts["both"] = [pooled, *parts["confidences"]]
    seen = torch.cat(parts[inputs], 1)
    gain = seen[:, -1] - seen[:, -1].median()
    gate = fit_decision(seen, torch.stack([gain, -gain], 1))
    policy = GatePolicy(gates=(gate,), inputs=inputs)
    looks = outputs if policy.needs_outputs else None
    expected = policy.stops(0, looks, pooled if policy.needs_features else None)
    assert 50 < int(expected.sum()) < 250
    for index in range(300):
        one = None if looks is None else looks[index : index + 1]
        mean = pooled[index : index + 1] if policy.needs_features else None
        assert policy.stops_one(0, one, mean) is bool(expected[index])
