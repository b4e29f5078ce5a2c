"""Schedules that grow a network of sections, their costs, and the best ones.

A network grows in iterations. This module computes what each iteration executes, what that costs,
and which order costs least; it uses no tensors. Sections, positions and iterations are counted from
0, but from 1 in the names of executions, as in the paper.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from impatient.errors import CostError, ModelSpecError

Counts = tuple[int, ...]


def _within(inner: Counts, outer: Counts) -> bool:
    return len(inner) == len(outer) and all(
        small <= large for small, large in zip(inner, outer, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Schedule:
    """Blocks of each section, iteration by iteration.

    Attributes:
        counts: number of blocks of each section, one row per iteration.
    Raises:
        ModelSpecError: if a section shrinks, an iteration grows nothing, or a section begins
            without a block.
    Example:
        >>> schedule = Schedule(((1, 1), (3, 1), (3, 2)))
        >>> schedule.final, schedule.starts, schedule.names
        ((3, 2), ((0, 0), (0, 1), (1, 1)), ('1-1', '3-1', '3-2'))
    """

    counts: tuple[Counts, ...]

    def __post_init__(self) -> None:
        rows = tuple(tuple(row) for row in self.counts)
        object.__setattr__(self, "counts", rows)
        if not rows or not rows[0]:
            raise ModelSpecError(
                f"a schedule of {rows}; expected one row of block counts per iteration, such as "
                "(1, 1, 1)."
            )
        for number, row in enumerate(rows):
            if len(row) != len(rows[0]) or any(
                type(count) is not int or count < 1 for count in row
            ):
                raise ModelSpecError(
                    f"iteration {number + 1} has block counts {row}; expected {len(rows[0])} whole "
                    "numbers, one per section, each at least 1 from the first iteration on."
                )
        for number, (before, after) in enumerate(itertools.pairwise(rows), start=2):
            if before == after or not _within(before, after):
                raise ModelSpecError(
                    f"iteration {number} goes from {before} to {after} blocks; expected no section "
                    "shrinks and at least one grows."
                )

    @classmethod
    def of(cls, counts: Schedule | Sequence[Sequence[int]] | str) -> Self:
        """Make a schedule from rows of block counts, text, or a schedule.

        Example:
            >>> Schedule.of("1-1/3-1/3-2").counts
            ((1, 1), (3, 1), (3, 2))
        """
        if isinstance(counts, str):
            return cls(_read(counts))
        return cls(
            tuple(tuple(row) for row in (counts.counts if isinstance(counts, Schedule) else counts))
        )

    def __str__(self) -> str:
        return "/".join(self.names)

    @property
    def final(self) -> Counts:
        """Return the blocks of each section in the complete network."""
        return self.counts[-1]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple("-".join(map(str, row)) for row in self.counts)

    @property
    def starts(self) -> tuple[tuple[int, int], ...]:
        """Return the earliest section that grows in each iteration.

        The second number of a pair is the position of the section's first new block. The iteration
        runs the new blocks of that section on its cached tensor, and all blocks of later sections.
        """
        return tuple(map(_start, (None, *self.counts), self.counts))

    @property
    def kept(self) -> tuple[frozenset[int], ...]:
        """Return the sections whose tensors must be cached after each iteration.

        A later iteration continues from these tensors.
        """
        sections = [section for section, _ in self.starts]
        return tuple(_needed(sections[done:]) for done in range(1, len(sections) + 1))


def _read(text: str) -> tuple[Counts, ...]:
    try:
        return tuple(tuple(int(count) for count in row.split("-")) for row in text.split("/"))
    except ValueError:
        raise ModelSpecError(
            f"cannot read the schedule {text!r}; expected block counts of each section, iteration "
            "by iteration, such as 1-1-1/5-1-1/8-1-1/8-8-8."
        ) from None


def in_turn(final: Sequence[int], parts: int = 2) -> Schedule:
    """Make a schedule that fills the sections one after the other.

    It starts with one block of each section and fills each section in `parts` steps, larger steps
    first.

    Example:
        >>> in_turn((3, 3)).counts
        ((1, 1), (2, 1), (3, 1), (3, 2), (3, 3))
    """
    if parts < 1 or not final or any(type(count) is not int or count < 1 for count in final):
        raise ModelSpecError(
            f"in_turn({tuple(final)}, parts={parts}); expected at least one block per section and "
            "one part."
        )
    rows = [(1,) * len(final)]
    for section, count in enumerate(final):
        for part in range(parts):
            # The share of the section is rounded up.
            grown = -(-(count - 1) * (part + 1) // parts) + 1
            if grown > rows[-1][section]:
                rows.append((*rows[-1][:section], grown, *rows[-1][section + 1 :]))
    return Schedule(tuple(rows))


# The paper's schedule, which is in_turn((8, 8, 8)).
PAPER = Schedule(((1, 1, 1), (5, 1, 1), (8, 1, 1), (8, 5, 1), (8, 8, 1), (8, 8, 5), (8, 8, 8)))


# --- executions -----------------------------------------------------------------------------------


def trace(schedule: Schedule) -> tuple[tuple[str, ...], ...]:
    """List the parts that each iteration executes, in order.

    IN runs once, and OUT runs in every iteration. New blocks are added above the old blocks of
    their section, whose input stays the same. So the earliest section that grows continues from its
    cached tensor and runs only its new blocks. The input of every later section has changed, so all
    blocks of later sections run, old and new.

    Returns:
        For each iteration, names such as "IN", "S1.1" (section 1, block 1) and "OUT".
    Source:
        AnytimeNet (Kim et al. 2020), figure 2 and table I. There one section grows at a time; the
        rule for several is ours.
    Example:
        >>> trace(Schedule(((1, 1), (1, 2), (2, 3))))[1:]  # the third iteration grows both
        (('S2.2', 'OUT'), ('S1.2', 'S2.1', 'S2.2', 'S2.3', 'OUT'))
    """
    befores = (None, *schedule.counts)
    return tuple(
        (
            *(() if before else ("IN",)),
            *(f"S{section + 1}.{block + 1}" for section, block in _blocks(before, after)),
            "OUT",
        )
        for before, after in zip(befores, schedule.counts, strict=False)
    )


# --- costs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCosts:
    """Costs of executing each part once, in one unit: seconds, MACs, or 1.

    Attributes:
        stem: cost of IN.
        sections: costs of the blocks of each section.
        out: cost of OUT.
    Raises:
        CostError: if a section has no block, or if costs are not finite, negative or all zero.
    """

    stem: float
    sections: tuple[tuple[float, ...], ...]
    out: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sections", tuple(tuple(section) for section in self.sections))
        if not self.sections or not all(self.sections):
            raise CostError(
                f"block costs {self.sections}; expected at least one section with one block each."
            )
        costs = [self.stem, self.out, *itertools.chain.from_iterable(self.sections)]
        if not all(math.isfinite(cost) and cost >= 0.0 for cost in costs) or not any(costs):
            raise CostError(
                f"costs of parts {costs}; expected finite numbers that are not negative, and one "
                "above 0. Measure again."
            )

    @classmethod
    def equal(cls, counts: Sequence[int], *, stem: float = 1.0, out: float = 1.0) -> Self:
        """Make costs of 1 for every block, so that costs count executions."""
        return cls(stem=stem, sections=tuple((1.0,) * count for count in counts), out=out)

    @property
    def counts(self) -> Counts:
        return tuple(len(section) for section in self.sections)

    @property
    def plain(self) -> float:
        """Return the cost of a plain run through all blocks, the paper's BASELINE."""
        return self.stem + sum(map(sum, self.sections)) + self.out

    def step(self, before: Counts | None, after: Counts) -> float:
        """Return the cost of one iteration.

        Args:
            before: block counts before the iteration; None for the first iteration.
            after: block counts after the iteration.
        """
        first, old = _start(before, after)
        inner = sum(self.sections[first][old : after[first]])
        inner += sum(
            sum(costs[:count])
            for costs, count in zip(self.sections[first + 1 :], after[first + 1 :], strict=True)
        )
        return (self.stem if before is None else 0.0) + inner + self.out


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthCosts:
    """Costs of a schedule, including OUT in every iteration.

    They are in the unit of the block costs.

    Attributes:
        per_iteration: cost of each iteration alone.
        cumulative: cost until each iteration has answered, including the answers of all earlier
            iterations.
        plain: cost of a plain run through the complete network.
    """

    per_iteration: tuple[float, ...]
    cumulative: tuple[float, ...]
    plain: float

    @property
    def overhead(self) -> float:
        """Return the cost of all iterations over that of a plain run.

        1.19 means 19 % more.
        """
        return self.cumulative[-1] / self.plain


def costs(schedule: Schedule, parts: BlockCosts) -> GrowthCosts:
    """Compute the cost of each iteration of a schedule.

    Args:
        schedule: a schedule.
        parts: costs of all blocks in the schedule's last iteration.
    Raises:
        CostError: if there is not one cost for each of these blocks.
    Example:
        >>> counted = costs(PAPER, BlockCosts.equal((8, 8, 8)))
        >>> counted.cumulative, counted.plain
        ((5.0, 12.0, 18.0, 24.0, 29.0, 34.0, 38.0), 26.0)
    """
    if parts.counts != schedule.final:
        raise CostError(
            f"costs of {parts.counts} blocks for a schedule that ends with {schedule.final}; "
            "expected one per block."
        )
    steps = tuple(map(parts.step, (None, *schedule.counts), schedule.counts))
    return GrowthCosts(
        per_iteration=steps, cumulative=tuple(itertools.accumulate(steps)), plain=parts.plain
    )


# --- the best schedule ----------------------------------------------------------------------------


def plan(
    parts: BlockCosts,
    *,
    iterations: int | None = None,
    sizes: Sequence[int] | None = None,
    through: Sequence[Sequence[int]] = (),
) -> Schedule:
    """Find the schedule to the complete network that costs least.

    It has the least overhead. Of several schedules with the same cost, it is the one whose answers
    come earliest. The cost of an iteration depends only on the block counts before and after it. So
    a schedule is a path through the graph of all block counts, and the shortest path is the exact
    optimum.

    Args:
        parts: measured cost of each part (`block_times`).
        iterations: number of iterations, starting with one block of each section. The least
            overhead alone puts most iterations near the end, because blocks that run once cost
            least. Use `sizes` or `through` to say how large the networks in between must be.
        sizes: number of blocks, all sections together, in each iteration; replaces `iterations`.
        through: block counts that must be among the iterations.
    Raises:
        ModelSpecError: if there is no such schedule.
    Example:
        >>> plan(BlockCosts.equal((8, 8, 8)), sizes=[3, 7, 10, 14, 17, 21, 24]) == PAPER
        True
    """
    if (iterations is None) == (sizes is None):
        raise ModelSpecError(
            f"iterations={iterations}, sizes={sizes}; expected exactly one of the two."
        )
    points = [tuple(point) for point in through]
    layers = _layers(parts.counts, iterations, sizes)
    missing = (
        f"no schedule to {parts.counts} blocks has iterations={iterations}, sizes={sizes}, "
        f"through={points}"
    )
    if not layers or any(not _within((1,) * len(parts.counts), point) for point in points):
        raise ModelSpecError(
            f"{missing}; expected at least one iteration, and at least one block per section."
        )
    # A label has the total cost, the sum of the cumulative costs, and the path. In that sum, a cost
    # counts once for its own iteration and once for each later one.
    labels: dict[Counts | None, _Label] = {None: (0.0, 0.0, ())}
    for left, layer in zip(range(len(layers), 0, -1), layers, strict=True):
        labels = _next_labels(labels, layer, left, parts, points)
    if not labels:
        raise ModelSpecError(
            f"{missing}; expected sizes that grow up to all {sum(parts.counts)} blocks, points "
            "that only grow, and an iteration for each."
        )
    return Schedule(labels[parts.counts][2])


def place(parts: BlockCosts, times: Sequence[float]) -> Schedule:
    """Find the schedule whose iterations end nearest to the given times.

    Only schedules that fill one section after the other are considered. They keep later sections at
    one block while earlier ones grow, so that few blocks run again. A schedule that runs more
    blocks again only to be on time would not answer better. The last iteration is the complete
    network, whatever its time.

    Args:
        parts: measured cost of each part (`block_times`).
        times: increasing end times of the iterations, in the unit of the costs.
    Returns:
        The schedule with the least sum of squared distances from the times.
    Raises:
        ModelSpecError: if the times do not increase, or if there are more times than blocks to add
            plus one.
    Example:
        >>> place(BlockCosts.equal((3, 3)), [4.0, 7.0, 20.0]).counts
        ((1, 1), (2, 1), (3, 3))
    """
    line = list(_line(parts.counts))
    increase = all(before < after for before, after in itertools.pairwise(times))
    if not (1 <= len(times) <= len(line) and increase and all(map(math.isfinite, times))):
        raise ModelSpecError(
            f"times {tuple(times)}; expected 1 to {len(line)} of them, increasing and finite."
        )
    # A state is the position on the line, and how often each section was the first to grow. The
    # time so far follows from these.
    states: dict[tuple[int, Counts], _Label] = {(-1, (0,) * len(parts.counts)): (0.0, 0.0, ())}
    for left, time in zip(range(len(times) - 1, -1, -1), times, strict=True):
        reached: dict[tuple[int, Counts], _Label] = {}
        for (position, grown), (distance, begun, path) in states.items():
            before = line[position] if path else None
            # Each later iteration needs a place of its own, and the last one is the line's end.
            nearest = position + 1 if left else len(line) - 1
            for place in range(nearest, len(line) - left):
                after = line[place]
                now = begun + parts.step(before, after)
                label = distance + (now - time) ** 2, now, (*path, after)
                section = _start(before, after)[0] if before else None
                counts = tuple(count + (number == section) for number, count in enumerate(grown))
                reached[place, counts] = min(label, reached.get((place, counts), label))
        states = reached
    return Schedule(min(states.values())[2])


_Label = tuple[float, float, tuple[Counts, ...]]


def _start(before: Counts | None, after: Counts) -> tuple[int, int]:
    """Return the earliest section that grows, and how many blocks it has before."""
    if before is None:
        return 0, 0
    return next(
        (section, old)
        for section, (old, new) in enumerate(zip(before, after, strict=True))
        if new > old
    )


def _blocks(before: Counts | None, after: Counts) -> Iterator[tuple[int, int]]:
    """Yield section and block of everything that an iteration executes, in order."""
    first, old = _start(before, after)
    for section in range(first, len(after)):
        for block in range(old if section == first else 0, after[section]):
            yield section, block


def _needed(starts: Sequence[int]) -> frozenset[int]:
    """Return the sections from whose present tensors later iterations start.

    An iteration that starts in an earlier section replaces the tensors of later sections.
    """
    return frozenset(
        section
        for index, section in enumerate(starts)
        if all(section < other for other in starts[:index])
    )


def _layers(
    final: Counts, iterations: int | None, sizes: Sequence[int] | None
) -> list[list[Counts]]:
    """Return the block counts that each iteration may have."""
    vectors = list(itertools.product(*(range(1, count + 1) for count in final)))
    if sizes is not None:
        wanted = [[counts for counts in vectors if sum(counts) == size] for size in sizes]
        return [*wanted[:-1], [final] if final in wanted[-1] else []] if wanted else []
    assert iterations is not None
    if iterations < 2:
        return [[final]] * iterations
    return [vectors[:1], *([vectors] * (iterations - 2)), [final]]


def _visits(before: Counts | None, after: Counts, points: Sequence[Counts]) -> bool:
    """Tell whether a step passes none of the points.

    Each point still lies ahead, is reached now, or has been reached before.
    """
    return all(
        _within(after, point) or (before is not None and _within(point, before)) for point in points
    )


def _next_labels(
    labels: dict[Counts | None, _Label],
    layer: Sequence[Counts],
    left: int,
    parts: BlockCosts,
    points: Sequence[Counts],
) -> dict[Counts | None, _Label]:
    """Find the best path to each of the next iteration's block counts."""
    wanted = set(layer)
    reached: dict[Counts | None, _Label] = {}
    for before, (total, early, path) in labels.items():
        smallest = before or (1,) * len(parts.counts)
        larger = itertools.product(
            *(range(old, count + 1) for old, count in zip(smallest, parts.counts, strict=True))
        )
        for after in wanted.intersection(larger) - {before}:
            if _visits(before, after, points):
                cost = parts.step(before, after)
                label = total + cost, early + cost * left, (*path, after)
                reached[after] = min(label, reached.get(after, label))
    return reached


def _line(final: Counts) -> Iterator[Counts]:
    """Yield block counts from one block per section to all of them.

    Blocks are added one by one, section after section.
    """
    yield (1,) * len(final)
    for section, count in enumerate(final):
        for grown in range(2, count + 1):
            yield (*final[:section], grown, *(1,) * (len(final) - section - 1))
