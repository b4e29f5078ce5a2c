"""Fit policies that choose among networks, from a graph's ends to its source."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from impatient import checks
from impatient.clock import SYSTEM_CLOCK, Clock, times_of
from impatient.errors import NoEffectWarning, PolicyError
from impatient.policies.costsensitive import Decision, Learner, Method, fit_decision
from impatient.policies.outcome import as_doubles
from impatient.policies.policy import STOP, Recorded, errors_of, features_of
from impatient.policies.routing import (
    Inputs,
    Route,
    SelectionPolicy,
    check_costs,
    follow,
    selection_features,
)
from impatient.policies.targets import PRICE, Target
from impatient.policies.topology import Topology
from impatient.progress import counted

Reference = Literal["none", "full"]


class SelectionSettings(TypedDict, total=False):
    """How decisions are learned.

    All may be left out.

    Attributes:
        reference: "none" (default): each wrong answer costs 1; "full": only one that the full
            network has right.
        losses: [K, N] of your own in place of 0 and 1.
        learner: "logistic" (default), "svm", "mlp" or "boosting".
        method: "filter_tree" (default) or "regression", where they differ: at nodes with more than
            two moves.
        gate_s: seconds of one decision (default 0); one that does not earn them is left out.
        sweeps: how often (default 0) all is fitted once more on the samples that arrive at each
            node; the best is kept.
        inputs: "path" (default) or "node": what a decision sees.
        pooled: whether it sees pooled features (default: no).
        seed: seed of the learner.
    """

    reference: Reference
    losses: Float[Tensor, "K N"] | None
    learner: Learner
    method: Method
    gate_s: float
    sweeps: int
    inputs: Inputs
    pooled: bool
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SelectionPoint:
    """A fitted policy, and its results on the split it was fitted on."""

    policy: SelectionPolicy
    mean_time_s: float
    accuracy: float


def fit_selection(
    recording: Recorded,
    node_s: Sequence[float],
    topology: Topology,
    *,
    time_price: float | None = None,
    mean_time_s: float | None = None,
    max_accuracy_loss: float | None = None,
    progress: bool = False,
    **settings: Unpack[SelectionSettings],
) -> SelectionPolicy:
    """Learn at every node whether to stop or which network to run next.

    From the ends of the graph to its source each node's decision is fitted with those after it
    fixed: a cost-sensitive problem whose costs are the loss of stopping, or the price of the time
    and the loss that lie ahead. All samples train all decisions. Moves that none of them takes are
    pruned, and nodes that no sample reaches.

    Args:
        recording: recording of the networks, on data that none of them was trained on: networks are
            too sure of their training data.
        node_s: measured seconds of each network alone.
        topology: the allowed moves.
        time_price: loss units per second; cost = loss + time_price x time. Or
        mean_time_s: the most accurate policy found whose mean time is at most this
            (`mix` meets it exactly); or
        max_accuracy_loss: the fastest found that loses at most this much accuracy against the last
            network (0.01: one point).
        progress: whether to show a progress bar.
        **settings: see `SelectionSettings`.
    Returns:
        A policy; its `target` says what was asked for and what was reached here.
    Raises:
        PolicyError: unless exactly one target is given, or if recording, times and topology do not
            fit.
        InfeasibleTarget: if the source alone takes longer than `mean_time_s`.
    Source:
        Bolukbasi et al. 2017, algorithm 1. We differ: the price multiplies time, so that both ends
        are finite; stopping at a network later on is charged with the loss and the time of the
        *routed* answer; a decision sees all that is known.
    """
    problem = _Problem(recording, node_s, topology, **settings)
    target = Target.of(
        recording,
        time_price=time_price,
        mean_time_s=mean_time_s,
        max_accuracy_loss=max_accuracy_loss,
    )
    is_priced = target.name == PRICE
    prices: Sequence[float] = [target.wanted] if is_priced else problem.prices(16)
    halvings = 0 if is_priced else 8
    fits = len(prices) + halvings
    with counted(
        problem.solve, "fitting decisions", total=fits, unit="fits", wanted=progress
    ) as solve:
        found = target.search(solve, prices, halvings)
    if is_priced:
        [(_, best)] = found
    else:
        best = target.best([point for _, point in found] + problem.one_way())
        if not best.policy.decisions:
            warnings.warn(
                f"with {target.name}={target.wanted:g} nothing is decided: all samples take one "
                "way. Allow a larger loss, or other networks.",
                NoEffectWarning,
                stacklevel=2,
            )
    reached = {target.name: target.wanted, **best.policy.target}
    return dataclasses.replace(best.policy, target=reached)


def sweep_selection(
    recording: Recorded,
    node_s: Sequence[float],
    topology: Topology,
    *,
    time_prices: Sequence[float] | None = None,
    **settings: Unpack[SelectionSettings],
) -> tuple[SelectionPoint, ...]:
    """Fit a policy for each of many prices of time.

    They make the whole curve of accuracy over mean time.

    Args:
        recording: the recording that `fit_selection` takes.
        node_s: the times that `fit_selection` takes.
        topology: the moves that `fit_selection` takes.
        **settings: see `SelectionSettings`.
        time_prices: loss units per second; by default 0 and 30 from one at which time is next to
            nothing to one at which the source always answers.
    Returns:
        One point per price, in their order; `hull_of` and `mix` take it from there.
    """
    problem = _Problem(recording, node_s, topology, **settings)
    prices = problem.prices(30) if time_prices is None else time_prices
    return tuple(problem.solve(price) for price in prices)


def decision_time_s(
    policy: SelectionPolicy,
    recording: Recorded,
    *,
    repeats: int = 200,
    warm_up: int = 20,
    clock: Clock = SYSTEM_CLOCK,
) -> float:
    """Measure what one decision takes on this machine.

    It is the mean over the nodes that decide, at batch size 1; 0 if none does.

    Fit once, measure, and fit again with this as `gate_s`.

    Args:
        recording: whose first sample is decided on.
        repeats, warm_up: how often each decision is made, and how often before that without
            counting.
        clock: where time comes from.
    """
    first = recording.logits()[:, :1]
    pooled = features_of(recording) if policy.pooled else ()

    @torch.inference_mode()
    def decide(node: int, seen: dict[int, Tensor]) -> None:
        policy.next_node(node, seen, pooled[node][:1] if policy.pooled else None).tolist()

    times: list[float] = []
    for node in policy.decisions:
        seen = {known: first[known] for known in policy.sees(node)}
        decision = functools.partial(decide, node, seen)
        times += times_of(decision, repeats=repeats, warm_up=warm_up, clock=clock)
    return float(np.mean(times)) if times else 0.0


@dataclass(frozen=True, slots=True)
class _Fitted:
    """A node's decision on the samples of the recording, from all of `offered`."""

    offered: tuple[int, ...]
    decision: Decision | None
    # moves
    chosen: Int[Tensor, "N"]
    # of the decision and all that follows
    cost: Float[Tensor, "N"]


@dataclass(eq=False)
class _Problem:
    """One recording, its features and losses, for any price."""

    recording: Recorded
    times_s: Sequence[float]
    topology: Topology
    reference: Reference = "none"
    losses: Float[Tensor, "K N"] | None = None
    learner: Learner = "logistic"
    method: Method = "filter_tree"
    gate_s: float = 0.0
    sweeps: int = 0
    inputs: Inputs = "path"
    pooled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        recording = self.recording
        topology = self.topology
        self.count, self.samples = recording.quality.shape
        if self.count != len(topology.nodes):
            raise PolicyError(
                f"the recording is of {self.count} networks, the topology of {len(topology.nodes)}."
            )
        check_costs(self.times_s, topology, self.gate_s)
        checks.at_least(PolicyError, 0, sweeps=self.sweeps)
        self.node_s = tuple(map(float, self.times_s))
        self.order = topology.order()
        self.errors = errors_of(recording)
        given = self.errors if self.losses is None else self.losses.double()
        self.lost = reference_losses(given, self.reference)
        if self.lost.shape != self.errors.shape:
            raise PolicyError(
                f"losses of shape {tuple(self.lost.shape)}; expected {tuple(self.errors.shape)}."
            )
        logits = recording.logits()
        own = features_of(recording) if self.pooled else (None,) * self.count
        self.features = {}
        for node in self.order:
            if topology.moves(node):
                known = topology.known(node) if self.inputs == "path" else (node,)
                seen = [logits[k] for k in known]
                self.features[node] = selection_features(seen, own[node])

    def prices(self, count: int) -> tuple[float, ...]:
        # beyond the last even the largest loss spared for sure is not worth the fastest network
        worth = float(self.lost.max() - self.lost.min()) or 1.0
        low = 1e-4 * worth / max(self.node_s)
        high = 1.1 * worth / min(self.node_s)
        return (0.0, *np.geomspace(low, high, count).tolist())

    def solve(self, price: float) -> SelectionPoint:
        """Fit the policy for a price.

        Of several sweeps it is the one of least cost.
        """
        checks.not_negative(PolicyError, time_price=price)
        arrives = torch.ones(self.count, self.samples, dtype=torch.float64)
        found = []
        for _ in range(1 + self.sweeps):
            fitted, route = self._pruned(price, arrives)
            cost = self._mean(self.lost, route) + price * route.mean_time_s
            found.append((cost, fitted, route))
            # a node that no sample reaches yet keeps all samples, so that it can be found worth a
            # visit
            visited = route.visited.T.contiguous()
            arrives = torch.where(visited.any(1, keepdim=True), visited.double(), 1.0)
        _, fitted, route = min(found, key=lambda entry: entry[0])
        return self._point(fitted, route, price)

    def one_way(self) -> list[SelectionPoint]:
        """Policies without decisions: the fastest way to each network."""
        free = torch.zeros(self.samples, dtype=torch.float64)
        ways = [
            {
                node: self._always(after, free)
                for node, after in zip(path, (*path[1:], STOP), strict=True)
            }
            for path in self.topology.cheapest_paths(self.node_s)
        ]
        return [self._point(way, self._route(way), None) for way in ways]

    def _pruned(
        self, price: float, arrives: Float[Tensor, "K N"]
    ) -> tuple[dict[int, _Fitted], Route]:
        """Fit, leave out unused moves, and fit again until all are used."""
        offered = {node: (STOP, *self.topology.moves(node)) for node in self.order}
        fitted: dict[int, _Fitted] = {}
        while True:
            touched: set[int] = set()
            for node in reversed([node for node in self.order if node in offered]):
                if (
                    node in fitted
                    and fitted[node].offered == offered[node]
                    and touched.isdisjoint(offered[node])
                ):
                    continue
                fitted[node] = self._fit(node, offered[node], price, fitted, arrives[node])
                touched.add(node)
            route = self._route(fitted)
            taken = {
                node: tuple(
                    move
                    for move in moves
                    if (fitted[node].chosen[route.visited[:, node]] == move).any()
                )
                for node, moves in offered.items()
                if route.visited[:, node].any()
            }
            if taken == offered:
                return {node: fitted[node] for node in offered}, route
            offered = taken

    def _fit(
        self,
        node: int,
        offered: tuple[int, ...],
        price: float,
        ahead: Mapping[int, _Fitted],
        weights: Float[Tensor, "N"],
    ) -> _Fitted:
        going = [price * self.node_s[move] + ahead[move].cost for move in offered if move != STOP]
        costs = torch.stack([self.lost[node]] * (STOP in offered) + going, dim=1)
        blind = (costs * weights[:, None]).mean(0)
        # of equals the first: stop
        best = int(blind.argmin())
        if len(offered) > 1:
            decision = fit_decision(
                self.features[node],
                costs,
                learner=self.learner,
                method=self.method,
                weights=weights,
                seed=self.seed,
            )
            chosen = decision.choose(self.features[node])
            cost = costs.gather(1, chosen[:, None])[:, 0] + price * self.gate_s
            if float((cost * weights).mean()) < float(blind[best]):
                return _Fitted(offered, decision, torch.tensor(offered)[chosen], cost)
        return self._always(offered[best], costs[:, best])

    def _always(self, move: int, cost: Float[Tensor, "N"]) -> _Fitted:
        return _Fitted((move,), None, torch.full((self.samples,), move), cost)

    def _route(self, fitted: Mapping[int, _Fitted]) -> Route:
        visited, answering = follow(
            self.topology, self.samples, lambda node, here: fitted[node].chosen[here]
        )
        paid = [
            time + self.gate_s * (k in fitted and fitted[k].decision is not None)
            for k, time in enumerate(self.node_s)
        ]
        time_s = as_doubles(paid) @ visited.T.contiguous().double()
        return Route(visited=visited, answering=answering, time_s=time_s)

    def _mean(self, values: Float[Tensor, "K N"], route: Route) -> float:
        return float(values[route.answering, torch.arange(self.samples)].mean())

    def _point(
        self, fitted: Mapping[int, _Fitted], route: Route, price: float | None
    ) -> SelectionPoint:
        accuracy = 1.0 - self._mean(self.errors, route)
        mean_s = route.mean_time_s
        policy = SelectionPolicy(
            topology=self.topology,
            moves=tuple(
                fitted[node].offered if node in fitted else () for node in range(self.count)
            ),
            decisions={
                node: entry.decision for node, entry in fitted.items() if entry.decision is not None
            },
            node_s=self.node_s,
            gate_s=float(self.gate_s),
            inputs=self.inputs,
            pooled=self.pooled,
            time_price=price,
            split=self.recording.split,
            provenance=self.recording.provenance,
            target={"mean_cost": mean_s, "accuracy": accuracy, "samples": float(self.samples)},
        )
        return SelectionPoint(policy=policy, mean_time_s=mean_s, accuracy=accuracy)


def reference_losses(losses: Float[Tensor, "K N"], reference: Reference) -> Float[Tensor, "K N"]:
    """Compute what stopping at each node loses.

    It is all of it, or only what the last network does not lose as well.

    Example:
        >>> reference_losses(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]), "full").tolist()
        [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    checks.one_of(PolicyError, Reference, reference=reference)
    return losses if reference == "none" else (losses - losses[-1]).clamp(min=0.0)
