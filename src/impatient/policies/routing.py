"""Policies that say which of several networks a sample runs next.

A recording of several networks has one "exit" per node: the outputs of network k alone, on the same
samples, in the order of the topology's nodes; the last node is the full network, which accuracy
lost is counted against. At every node a sample stops, and is answered by that node's network, or
moves along an edge, and pays the next network in full.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from impatient import checks
from impatient.costs import Cost, CostProfile, Statistic
from impatient.errors import PolicyError
from impatient.policies.costsensitive import Decision
from impatient.policies.outcome import Outcome, as_doubles, node_times_s
from impatient.policies.policy import STOP, Description, Policy, Recorded, features_of, hits_of
from impatient.policies.topology import Topology
from impatient.provenance import Provenance
from impatient.tasks import rows
from impatient.tasks.scores import confidence_features

Inputs = Literal["path", "node"]


def selection_features(
    outputs: Sequence[Float[Tensor, "B C"]], pooled: Float[Tensor, "B D"] | None = None
) -> Float[Tensor, "B F"]:
    """Collect what a decision sees of the networks that have run.

    Of each network how sure it is (`confidence_features`); of each two networks whether they agree,
    and the probability that the later one gives to the earlier one's answer.

    Args:
        outputs: outputs before softmax of the known networks, that of the node itself last.
        pooled: pooled features of the node's own network, put beside these.
    """
    # all networks in one go: a batch of one pays per operator
    stacked = torch.stack([output.float() for output in outputs])
    count, batch, classes = stacked.shape
    sure = confidence_features(stacked.reshape(count * batch, classes)).reshape(count, batch, -1)
    parts = [sure.transpose(0, 1).flatten(1)]
    if count > 1:
        # pairs, in the order of itertools.combinations
        before, after = torch.triu_indices(count, count, offset=1).unbind()
        answers = stacked.argmax(-1)
        agrees = (answers[after] == answers[before]).float()
        given = stacked.softmax(-1)[after].gather(-1, answers[before].unsqueeze(-1)).squeeze(-1)
        parts.append(torch.stack([agrees, given], dim=1).flatten(0, 1).T)
    if pooled is not None:
        parts.append(pooled.flatten(1).float())
    return torch.cat(parts, dim=-1)


def selection_features_of_one(outputs: Sequence[rows.Row]) -> list[float]:
    """Compute `selection_features` of one sample in plain numbers, without pooled features."""
    parts = [number for row in outputs for number in rows.confidence_features(row)]
    if len(outputs) > 1:
        logs = [rows.log_probabilities(row) for row in outputs]
        answers = [row.index(max(row)) for row in outputs]
        for before, after in itertools.combinations(range(len(outputs)), 2):
            parts.append(float(answers[after] == answers[before]))
            parts.append(math.exp(logs[after][answers[before]]))
    return parts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Route:
    """What each of N recorded samples did on K networks.

    Attributes:
        visited: which networks it ran.
        answering: the network that answered it.
        time_s: seconds of the networks and decisions on its way.
    """

    visited: Bool[Tensor, "N K"]
    answering: Int[Tensor, "N"]
    time_s: Float[Tensor, "N"]

    @property
    def mean_time_s(self) -> float:
        return float(self.time_s.double().mean())

    def hits(self, recording: Recorded) -> Float[Tensor, "N"]:
        """1 where the answer is right, else 0."""
        return hits_of(recording, self.answering)

    def accuracy(self, recording: Recorded) -> float:
        """Share of right answers."""
        return float(self.hits(recording).double().mean())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SelectionPolicy(Policy):
    """A learned decision per node: stop, or which network comes next.

    Attributes:
        topology: the allowed moves, as they were given.
        moves: per node the moves that are left, `STOP` (-1) or the next node; one alone needs no
            decision, and a node that no sample reaches has none.
        decisions: at each node with several moves, which of `moves` is taken.
        node_s: seconds of each network.
        gate_s: seconds of one decision, paid at nodes with several moves.
        inputs: "path": decisions see all that is known on every path to their node; "node": their
            own network alone.
        pooled: whether they see its pooled features too.
        time_price: loss units per second it was fitted for; None where nothing was learned.
        split: the split on which it was fitted; None if it was set by hand.
        target: what was asked for, and what was reached on that split.
        provenance: weights and data it belongs to.
    """

    topology: Topology
    moves: tuple[tuple[int, ...], ...]
    decisions: Mapping[int, Decision]
    node_s: tuple[float, ...]
    gate_s: float = 0.0
    inputs: Inputs = "path"
    pooled: bool = False
    time_price: float | None = None
    split: str | None = None
    target: Mapping[str, float] = dataclasses.field(default_factory=dict)
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        check_costs(self.node_s, self.topology, self.gate_s)
        checks.one_of(PolicyError, Inputs, inputs=self.inputs)
        if len(self.moves) != len(self.topology.nodes) or not self.moves[self.topology.source]:
            raise PolicyError(
                f"moves {self.moves}; expected a row per node, and some moves at node "
                f"{self.topology.source}."
            )
        for node, moves in enumerate(self.moves):
            allowed = {STOP, *(after for after in self.topology.moves(node) if self.moves[after])}
            if not set(moves) <= allowed or len(set(moves)) < len(moves):
                raise PolicyError(
                    f"moves {moves} of node {node}; expected some of {sorted(allowed)}, each once."
                )
        several = {node for node, moves in enumerate(self.moves) if len(moves) > 1}
        if set(self.decisions) != several:
            raise PolicyError(
                f"decisions at nodes {sorted(self.decisions)}; several moves are left at "
                f"{sorted(several)}."
            )

    @property
    def num_exits(self) -> int:
        """As many as there are networks: each is an exit of their cascade."""
        return len(self.moves)

    @property
    def routes(self) -> bool:
        """Whether it chooses the network that comes next: always."""
        return True

    @property
    def needs_features(self) -> bool:
        """Whether decisions see pooled features."""
        return self.pooled

    def looks_at(self, exit: int) -> bool:  # noqa: ARG002  the same at every exit
        """Never: the cascade asks for the next network instead."""
        return False

    def stops(
        self,
        exit: int,
        outputs: Float[Tensor, "B C"] | None = None,
        pooled: Float[Tensor, "B *D"] | None = None,
    ) -> Bool[Tensor, "B"]:
        """Which samples are done at this network, if its decision sees no other."""
        if outputs is None:
            raise PolicyError("a selection looks at outputs; give those of the network.")
        return self.next_node(exit, {exit: outputs}, pooled) == STOP

    @property
    def visits(self) -> tuple[int, ...]:
        """The nodes that samples may come to.

        The other networks need not be loaded.
        """
        return tuple(node for node, moves in enumerate(self.moves) if moves)

    def sees(self, node: int) -> tuple[int, ...]:
        """Return the nodes whose outputs a decision needs, itself last.

        Empty where there is nothing to decide.
        """
        if node not in self.decisions:
            return ()
        return self.topology.known(node) if self.inputs == "path" else (node,)

    def next_node(
        self,
        node: int,
        outputs: Mapping[int, Float[Tensor, "B C"]],
        pooled: Float[Tensor, "B D"] | None = None,
    ) -> Int[Tensor, "B"]:
        """Where samples that have run a node go from there.

        Args:
            node: the network at which all of them are.
            outputs: outputs of the nodes they have run, at least of those it `sees`, before
                softmax.
            pooled: features of this node's network, if the policy was fitted with them.
        Returns:
            The next node of each sample; `STOP` (-1) where this node's output is the answer.
        Raises:
            PolicyError: if no sample reaches this node, or something the decision needs is missing.
        """
        moves = self.moves[node]
        if not moves:
            raise PolicyError(
                f"no sample comes to node {self.topology.nodes[node]}, which was pruned; fit the "
                "policy again."
            )
        if len(moves) == 1:
            some = next(iter(outputs.values()))
            return torch.full((some.shape[0],), moves[0], dtype=torch.long, device=some.device)
        seen = self.sees(node)
        missing = set(seen) - set(outputs)
        if missing or (self.pooled and pooled is None):
            what = f"outputs of nodes {sorted(missing)}" if missing else "its pooled features"
            raise PolicyError(
                f"the decision at node {self.topology.nodes[node]} needs {what}; keep what samples "
                "have run."
            )
        chosen_row = self._choice_of_one(node, [outputs[known] for known in seen], pooled)
        if chosen_row is not None:
            return torch.tensor([moves[chosen_row]])
        features = selection_features(
            [outputs[known] for known in seen], pooled if self.pooled else None
        )
        chosen = self.decisions[node].choose(features)
        return torch.tensor(moves, device=chosen.device)[chosen]

    def _choice_of_one(
        self, node: int, outputs: Sequence[Tensor], pooled: Tensor | None
    ) -> int | None:
        """Choose the move of the only sample in plain numbers.

        None where tensors must.
        """
        linear = self.decisions[node].linear
        known = [] if linear is None else [rows.row_of(output) for output in outputs]
        plain = [row for row in known if row is not None]
        if linear is None or len(plain) < len(outputs):
            return None
        features = selection_features_of_one(plain)
        if self.pooled and pooled is not None:
            features += pooled.flatten(1).float().tolist()[0]
        return linear.choose(features) if len(features) == len(linear.slopes[0]) else None

    def route(
        self, outputs: Float[Tensor, "K N C"], features: Sequence[Float[Tensor, "N _"]] = ()
    ) -> Route:
        """Follow recorded samples through the networks.

        Args:
            outputs: outputs of all networks, before softmax.
            features: pooled features of each network, if the policy was fitted with them.
        Raises:
            PolicyError: if numbers of networks differ, or features are missing.
        """
        count = len(self.topology.nodes)
        if outputs.shape[0] != count or (self.pooled and len(features) != count):
            raise PolicyError(
                f"the policy is for {count} "
                f"networks{' and their pooled features' if self.pooled else ''}, the recording has "
                f"{outputs.shape[0]} and {len(features)}."
            )

        def going(node: int, here: Int[Tensor, "R"]) -> Int[Tensor, "R"]:
            seen = {known: outputs[known, here] for known in self.sees(node) or (node,)}
            return self.next_node(node, seen, features[node][here] if self.pooled else None)

        visited, answering = follow(self.topology, outputs.shape[1], going)
        paid = [
            time + self.gate_s * (node in self.decisions) for node, time in enumerate(self.node_s)
        ]
        time_s = visited.double() @ as_doubles(paid)
        return Route(visited=visited, answering=answering, time_s=time_s)

    def exits_of(
        self, outputs: Float[Tensor, "K N C"], features: Sequence[Tensor] = ()
    ) -> Int[Tensor, "N"]:
        """Return the network that answers each recorded sample."""
        return self.route(outputs, features).answering

    def outcome(
        self,
        recording: Recorded,
        costs: CostProfile,
        *,
        cost: Cost = "time",
        statistic: Statistic = "mean",
        batch_size: int = 1,
    ) -> Outcome:
        """Apply it to a recording, as `Policy.outcome` says."""
        route = self.route(recording.logits(), features_of(recording) if self.pooled else ())
        decided_s = torch.zeros(costs.num_exits)
        if cost == "time":
            node_s = as_doubles(node_times_s(costs, statistic=statistic, batch_size=batch_size))
            nodes = range(costs.num_exits)
            decided_s = self.gate_s * as_doubles([node in self.decisions for node in nodes])
        else:
            stages, heads = costs.parts(cost)
            node_s = as_doubles(stages) + as_doubles(heads)
        so_far = (route.visited * (node_s + decided_s)).cumsum(1)
        macs = as_doubles(costs.stage_macs) + as_doubles(costs.head_macs)
        return Outcome(
            exits=route.answering,
            visited=route.visited,
            contract_s=so_far[:, -1],
            interruptible_s=so_far,
            macs=route.visited.double() @ macs,
        )

    def full_network(self) -> Policy:
        """Send all samples the fastest way to the last network."""
        way = self.topology.cheapest_paths(self.node_s)[-1]
        after = dict(zip(way, (*way[1:], STOP), strict=True))
        moves = tuple((after[node],) if node in after else () for node in range(self.num_exits))
        return dataclasses.replace(
            self, moves=moves, decisions={}, time_price=None, target={}, split=None
        )

    def described(self, exits: Sequence[str]) -> Description:
        """Describe the policy in words."""
        moves = [
            ["stop" if move < 0 else f"to {exits[move]}" for move in row] for row in self.moves
        ]
        return Description(
            looks_at="what has run" if self.inputs == "path" else "the network that has just run",
            rules=tuple(" or ".join(row) if row else "nobody comes" for row in moves),
        )


def follow(
    topology: Topology,
    samples: int,
    going: Callable[[int, Int[Tensor, "R"]], Int[Tensor, "R"]],
) -> tuple[Bool[Tensor, "N K"], Int[Tensor, "N"]]:
    """Lead samples from the source to the networks that answer them.

    Args:
        topology: the allowed moves.
        samples: how many there are.
        going: the moves of the samples, given by their places, that come to a node.
    Returns:
        Which networks each sample ran, and which one answered it.
    """
    visited = torch.zeros(samples, len(topology.nodes), dtype=torch.bool)
    visited[:, topology.source] = True
    answering = torch.full((samples,), STOP)
    for node in topology.order():
        here = visited[:, node].nonzero()[:, 0]
        if len(here):
            moves = going(node, here)
            answering[here[moves == STOP]] = node
            visited[here[moves != STOP], moves[moves != STOP]] = True
    return visited, answering


def check_costs(node_s: Sequence[float], topology: Topology, gate_s: float) -> None:
    """Raise PolicyError unless all times are possible.

    There is one for every network, and one for a decision.
    """
    if len(node_s) != len(topology.nodes) or not all(
        math.isfinite(time) and time > 0 for time in node_s
    ):
        raise PolicyError(
            f"node_s={tuple(node_s)}; expected positive finite seconds of each of "
            f"{len(topology.nodes)} networks."
        )
    checks.not_negative(PolicyError, gate_s=gate_s)
