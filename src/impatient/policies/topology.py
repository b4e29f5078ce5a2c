"""Which network may follow which: a graph without cycles, with one source."""

from __future__ import annotations

import functools
import graphlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from impatient.errors import PolicyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The moves that are allowed between networks.

    They form a graph without cycles, in which one node comes first.

    Attributes:
        nodes: names, in the order of the recording; the last is the full network.
        edges: allowed moves, as pairs of places in `nodes`.
    Example:
        >>> names = {"AlexNet": ["GoogLeNet", "ResNet"], "GoogLeNet": ["ResNet"], "ResNet": []}
        >>> Topology.of(names).edges
        ((0, 1), (0, 2), (1, 2))
    """

    nodes: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        count = len(self.nodes)
        if not count or len(set(self.nodes)) < count:
            raise PolicyError(
                f"nodes {self.nodes}; expected at least one, each with a name of its own."
            )
        for edge in self.edges:
            if not all(0 <= node < count for node in edge) or edge[0] == edge[1]:
                raise PolicyError(
                    f"edge {edge} does not lead from one of the {count} nodes to another; count "
                    "them from 0."
                )
        if len(set(self.edges)) < len(self.edges):
            raise PolicyError(f"edges {self.edges}; expected each at most once.")
        try:
            self.order()
        except graphlib.CycleError as error:
            names = " -> ".join(self.nodes[node] for node in reversed(error.args[1]))
            raise PolicyError(
                f"the moves {names} are a cycle, on which a sample could go for ever; leave one "
                "out."
            ) from error
        sources = [node for node in range(count) if not self._before(node)]
        if len(sources) > 1:
            raise PolicyError(
                f"no move leads to any of {', '.join(self.nodes[node] for node in sources)}; "
                "expected one, where every sample begins. Add moves to the others, or leave them "
                "out of topology and recording."
            )

    @classmethod
    def of(cls, moves: Mapping[str, Sequence[str]]) -> Self:
        """Make a topology from the nodes that may follow each node.

        Every node has an entry, in the order of the recording.
        """
        places = {name: place for place, name in enumerate(moves)}
        unknown = {name for after in moves.values() for name in after} - set(places)
        if unknown:
            raise PolicyError(
                f"moves lead to {', '.join(sorted(unknown))} without an entry; give one, [] if it "
                "only stops."
            )
        return cls(
            nodes=tuple(moves),
            edges=tuple((places[a], places[b]) for a, after in moves.items() for b in after),
        )

    @classmethod
    def chain(cls, nodes: int | Sequence[str]) -> Self:
        """0 -> 1 -> 2 ...: stop or go to the next one."""
        names = _names(nodes)
        return cls(nodes=names, edges=tuple(itertools.pairwise(range(len(names)))))

    @classmethod
    def full(cls, nodes: int | Sequence[str]) -> Self:
        """Allow every later node after every earlier one.

        With three nodes it is the paper's tree A -> {stop, G -> R, R}.
        """
        names = _names(nodes)
        return cls(nodes=names, edges=tuple(itertools.combinations(range(len(names)), 2)))

    @classmethod
    def star(cls, nodes: int | Sequence[str]) -> Self:
        """Allow one move, from the first node to any other.

        With two nodes it is the pair A -> R.
        """
        names = _names(nodes)
        return cls(nodes=names, edges=tuple((0, node) for node in range(1, len(names))))

    @property
    def source(self) -> int:
        """Where every sample begins."""
        return self.order()[0]

    def order(self) -> tuple[int, ...]:
        """Sort the nodes, each after all that may come before it."""
        return tuple(
            graphlib.TopologicalSorter(
                {node: self._before(node) for node in range(len(self.nodes))}
            ).static_order()
        )

    def moves(self, node: int) -> tuple[int, ...]:
        """Return the nodes that may follow a node."""
        return tuple(after for before, after in self.edges if before == node)

    def known(self, node: int) -> tuple[int, ...]:
        """Return the nodes that every path to a node has run, itself last.

        Their outputs are there however a sample came.

        Example:
            >>> Topology.chain(3).known(2), Topology.full(3).known(2)
            ((0, 1, 2), (0, 2))
        """
        return _known(self)[node]

    def cheapest_paths(self, node_s: Sequence[float]) -> tuple[tuple[int, ...], ...]:
        """Find the fastest path from the source to each node."""
        paths: dict[int, tuple[int, ...]] = {}
        for node in self.order():
            ways = [paths[before] for before in self._before(node)]
            paths[node] = (
                *min(ways, key=lambda way: sum(node_s[place] for place in way), default=()),
                node,
            )
        return tuple(paths[node] for node in range(len(self.nodes)))

    def _before(self, node: int) -> tuple[int, ...]:
        return tuple(before for before, after in self.edges if after == node)


def _names(nodes: int | Sequence[str]) -> tuple[str, ...]:
    return tuple(map(str, range(nodes))) if isinstance(nodes, int) else tuple(nodes)


# every decision of a running cascade asks
@functools.lru_cache(maxsize=256)
def _known(topology: Topology) -> tuple[tuple[int, ...], ...]:
    order = topology.order()
    sure = dict[int, set[int]]()
    for place in order:
        sure[place] = {
            place,
            *(set.intersection(*(sure[node] for node in topology._before(place))) if sure else ()),
        }
    return tuple(
        tuple(place for place in order if place in sure[node])
        for node in range(len(topology.nodes))
    )
