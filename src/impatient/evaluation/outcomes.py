"""What a policy of any kind does to each sample of a recording, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from impatient.budgets import Budget, deepest_for_some, exit_weights
from impatient.costs import Cost, CostProfile, Statistic
from impatient.errors import PolicyError
from impatient.evaluation.recording import Recording
from impatient.policies.gates import GatePolicy
from impatient.policies.mixing import MixedPolicy
from impatient.policies.routing import SelectionPolicy
from impatient.policies.rules import ThresholdPolicy

AnyPolicy = ThresholdPolicy | GatePolicy | MixedPolicy | SelectionPolicy


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What each of N samples did on K exits, or networks.

    Attributes:
        exits: the exit that answered.
        visited: the exits that could have been its answer had time been up earlier: those on its
            way.
        contract_s: seconds (or what was asked for instead) until the answer when only the heads
            that are looked at run.
        interruptible_s: per exit on the way, likewise until its answer when every one on the way is
            posted.
        macs: multiply-accumulates, as for `contract_s`.
    """

    exits: Int[Tensor, "N"]
    visited: Bool[Tensor, "N K"]
    contract_s: Float[Tensor, "N"]
    interruptible_s: Float[Tensor, "N K"]
    macs: Float[Tensor, "N"]

    def spent_s(self) -> Float[Tensor, "N"]:
        """Seconds until the answer of an interruptible run."""
        return self.interruptible_s.gather(1, self.exits[:, None])[:, 0]

    def expected(self, budget: Budget, hits: Float[Tensor, "K N"]) -> Float[Tensor, "N"]:
        """Per sample, the probability of a right answer in time, which is that of the last exit on
        its way that fits.
        """
        right = torch.zeros(len(self.exits), dtype=torch.float64)
        ways, which = self.visited.unique(dim=0, return_inverse=True)
        for number, way in enumerate(ways):
            rows = (which == number).nonzero()[:, 0]
            exits = way.nonzero()[:, 0]
            costs = self.interruptible_s[rows[0], exits].tolist()
            kept = list(deepest_for_some(costs))
            weights = torch.tensor(
                exit_weights(budget, [costs[place] for place in kept]), dtype=torch.float64
            )
            right[rows] = (weights[:, None] * hits[exits[kept]][:, rows].double()).sum(0)
        return right


def exits_under(policy: AnyPolicy, recording: Recording) -> Int[Tensor, "N"]:
    """The exit, or the network, that answers each sample under a policy of any kind."""
    if isinstance(policy, SelectionPolicy):
        return policy.route(recording.outputs, recording.features).answering
    if isinstance(policy, MixedPolicy):
        cheap, dear = (exits_under(part, recording) for part in (policy.cheap, policy.dear))
        return torch.where(policy.drawn(len(recording.labels)), dear, cheap)
    return (
        policy.exits_on(recording)
        if isinstance(policy, GatePolicy)
        else policy.exits_of(recording.outputs)
    )


def outcome(
    policy: AnyPolicy,
    recording: Recording,
    costs: CostProfile,
    *,
    cost: Cost = "time",
    statistic: Statistic = "mean",
    batch_size: int = 1,
) -> Outcome:
    """What a policy does to a recording.

    Args:
        policy: of any kind.
        recording: with pooled features, if the policy looks at them.
        costs: of the same network.
        cost: what is spent, instead of time: multiply-accumulates, bytes or joules. What learned
            gates take to ask is known in seconds only, and counts as nothing in these.
        statistic, batch_size: which measured times are used.
    Raises:
        PolicyError: if the policy looks at what the recording lacks.
    """
    if isinstance(policy, SelectionPolicy):
        return _routed(policy, recording, costs, cost, statistic, batch_size)
    if isinstance(policy, MixedPolicy):
        one, other = (
            outcome(part, recording, costs, cost=cost, statistic=statistic, batch_size=batch_size)
            for part in (policy.dear, policy.cheap)
        )
        return _merged(one, other, policy.drawn(len(recording.labels)))
    heads = policy.open_exits()
    count = costs.num_exits
    options = {"statistic": statistic, "batch_size": batch_size}
    exits = exits_under(policy, recording)
    gates = _float(
        policy.added_s() if isinstance(policy, GatePolicy) and cost == "time" else (0.0,) * count
    )
    looked_at = _float(costs.cumulative(cost, "interruptible", heads=heads, **options)) + gates  # type: ignore[arg-type]
    posted = _float(costs.cumulative(cost, "interruptible", **options)) + gates  # type: ignore[arg-type]
    return Outcome(
        exits=exits,
        visited=torch.arange(count) <= exits[:, None],
        contract_s=looked_at[exits],
        interruptible_s=posted.expand(len(exits), -1),
        macs=_float(costs.cumulative_macs("interruptible", heads))[exits],
    )


def _routed(
    policy: SelectionPolicy,
    recording: Recording,
    costs: CostProfile,
    cost: Cost,
    statistic: Statistic,
    batch_size: int,
) -> Outcome:
    route = policy.route(recording.outputs, recording.features)
    if cost == "time":
        node_s = _float(node_times_s(costs, statistic=statistic, batch_size=batch_size))
        decided_s = policy.gate_s * _float(
            [node in policy.decisions for node in range(costs.num_exits)]
        )
    else:
        stages, heads = costs.parts(cost)
        node_s = _float(stages) + _float(heads)
        decided_s = torch.zeros(costs.num_exits)
    so_far = (route.visited * (node_s + decided_s)).cumsum(1)
    macs = _float(
        [stage + head for stage, head in zip(costs.stage_macs, costs.head_macs, strict=True)]
    )
    return Outcome(
        exits=route.answering,
        visited=route.visited,
        contract_s=so_far[:, -1],
        interruptible_s=so_far,
        macs=route.visited.double() @ macs,
    )


def _merged(one: Outcome, other: Outcome, is_one: Bool[Tensor, "N"]) -> Outcome:
    def pick(first: Tensor, second: Tensor) -> Tensor:
        return torch.where(is_one[:, None] if first.dim() == 2 else is_one, first, second)

    return Outcome(
        exits=pick(one.exits, other.exits),
        visited=pick(one.visited, other.visited),
        contract_s=pick(one.contract_s, other.contract_s),
        macs=pick(one.macs, other.macs),
        interruptible_s=pick(one.interruptible_s, other.interruptible_s),
    )


def node_times_s(
    costs: CostProfile, *, statistic: Statistic = "mean", batch_size: int = 1
) -> tuple[float, ...]:
    """Seconds of each network of a cascade that was profiled without a router: what `fit_selection`
    asks for.

    Raises:
        PolicyError: if one takes no time.
    """
    batch = costs.at(batch_size)
    # a head is the handing over of an output that is there
    parts = zip(batch.stages, batch.heads, strict=True)
    times = tuple(
        stage.of_statistic(statistic) + head.of_statistic(statistic) for stage, head in parts
    )
    if not all(time > 0.0 for time in times):
        raise PolicyError(
            f"networks that take {times} s; measure the cascade again, without a router."
        )
    return times


def _float(values: Sequence[float]) -> Float[Tensor, "K"]:
    return torch.tensor(values, dtype=torch.float64)
