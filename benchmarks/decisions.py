"""Measure what deciding about one sample takes: thresholds, linear gates, selections.

    # a minute; other work on the machine lengthens what is "cold"
    python benchmarks/decisions.py

Each decision is asked as a runner asks it, about outputs of 10 classes and 64 pooled features, in
turn with the same decision by tensors, and with itself again (A/A). One thread. "cold" means after
a convolution that has emptied the caches, as in a run; "hot" means in a loop.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from common import Row, with_interval, write_results
from torch import Tensor

from impatient.policies import GatePolicy, ThresholdPolicy
from impatient.policies.costsensitive import fit_decision
from impatient.policies.policy import Policy
from impatient.policies.routing import SelectionPolicy, selection_features
from impatient.policies.topology import Topology
from impatient.tasks.scores import confidence_features

ROUNDS = 400
CLASSES = 10
WIDTH = 64


def thresholds(score: str) -> Policy:
    return ThresholdPolicy(score=score, thresholds=(0.7, -math.inf))


def gate(inputs: str, outputs: Tensor, pooled: Tensor) -> Policy:
    parts = {"confidences": [confidence_features(outputs)], "features": [pooled]}
    parts["both"] = [pooled, confidence_features(outputs)]
    seen = torch.cat(parts[inputs], 1)
    gain = seen[:, -1] - seen[:, -1].median()
    decision = fit_decision(seen, torch.stack([gain, -gain], 1))
    return GatePolicy(gates=(decision,), inputs=inputs)


def selection(outputs: Tensor) -> SelectionPolicy:
    seen = selection_features([outputs])
    gain = seen[:, 0] - seen[:, 0].median()
    decision = fit_decision(seen, torch.stack([-gain, gain, gain.abs() - 0.1], 1))
    return SelectionPolicy(
        topology=Topology(nodes=("a", "b", "c"), edges=((0, 1), (0, 2), (1, 2))),
        moves=((-1, 1, 2), (-1,), (-1,)),
        decisions={0: decision},
        node_s=(1.0, 2.0, 3.0),
        inputs="node",
    )


def asked(policy: Policy, output: Tensor, pooled: Tensor, *, plain: bool) -> bool:
    seen = output if policy.needs_outputs else None
    features = pooled if policy.needs_features else None
    if plain:
        return policy.stops_one(0, seen, features)
    return bool(policy.stops(0, seen, features))


def moved(policy: SelectionPolicy, output: Tensor, *, plain: bool) -> int:
    if plain:
        return int(policy.next_node(0, {0: output}))
    chosen = policy.decisions[0].choose(selection_features([output]))
    return int(torch.tensor(policy.moves[0])[chosen])


def measured(calls: list[Callable[[], object]], *, cold: bool) -> list[np.ndarray]:
    """Microseconds of each call, in turn."""
    order = np.random.default_rng(0)
    layer = torch.nn.Conv2d(64, 64, 3, padding=1)
    image = torch.zeros(1, 64, 32, 32)
    times: list[list[float]] = [[] for _ in calls]
    with torch.inference_mode():
        for number in range(-20, ROUNDS):
            for place in order.permutation(len(calls)):
                if cold:
                    layer(image)
                before = time.perf_counter()
                calls[place]()
                if number >= 0:
                    times[place].append((time.perf_counter() - before) * 1e6)
    return [np.array(values) for values in times]


def rows() -> list[Row]:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(300, CLASSES, generator=generator) * 3
    pooled = torch.randn(300, WIDTH, generator=generator)
    one = outputs[:1], pooled[:1]
    kinds: dict[str, Callable[..., object]] = {
        f"threshold on {score}": functools.partial(asked, thresholds(score), *one)
        for score in ("max_probability", "margin", "entropy")
    }
    for inputs in ("confidences", "features", "both"):
        kinds[f"gate on {inputs}"] = functools.partial(asked, gate(inputs, outputs, pooled), *one)
    kinds["selection among 3"] = functools.partial(moved, selection(outputs), one[0])
    found = []
    for name, ask in kinds.items():
        plain = functools.partial(ask, plain=True)
        for cold in (False, True):
            here, tensors, again = measured(
                [plain, functools.partial(ask, plain=False), plain], cold=cold
            )
            found.append(
                {
                    "decision": name,
                    "caches": "cold" if cold else "hot",
                    "n": ROUNDS,
                    "us": with_interval(list(here), 1),
                    "us by tensors": with_interval(list(tensors), 1),
                    "A/A": with_interval(list(again / here), 3),
                }
            )
    return found


if __name__ == "__main__":
    write_results("decisions", "What deciding takes", __doc__, rows())
