"""Schedules, their executions and costs, and the planner against brute force."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_schedules import schedules
from impatient.errors import CostError, ModelSpecError
from impatient.networks.growth import (
    PAPER,
    BlockCosts,
    Counts,
    Schedule,
    costs,
    in_turn,
    place,
    plan,
    trace,
)

REVERSE = Schedule(((1, 1, 1), (1, 1, 5), (1, 1, 8), (1, 5, 8), (1, 8, 8), (5, 8, 8), (8, 8, 8)))
# counts executions between IN and OUT
INNER = BlockCosts.equal((8, 8, 8), stem=0.0, out=0.0)


@st.composite
def block_costs(
    draw: st.DrawFn, finals: tuple[Counts, ...] = ((3, 3), (2, 2, 2), (1, 4), (4,))
) -> BlockCosts:
    cost = st.integers(0, 20).map(lambda tenths: 0.1 + tenths / 10)
    sections = tuple(
        tuple(draw(cost) for _ in range(count)) for count in draw(st.sampled_from(finals))
    )
    return BlockCosts(stem=draw(cost), sections=sections, out=draw(cost))


def all_schedules(final: Counts, iterations: int) -> Iterator[Schedule]:
    """Every one there is, by trying all rows."""
    vectors = list(itertools.product(*(range(1, count + 1) for count in final)))
    # in lexicographic order, as all that grow are
    for rows in itertools.combinations(vectors, iterations):
        if rows[-1] == final and all(
            all(a <= b for a, b in zip(before, after, strict=True))
            for before, after in itertools.pairwise(rows)
        ):
            yield Schedule(rows)


def total(schedule: Schedule, parts: BlockCosts) -> float:
    return costs(schedule, parts).cumulative[-1]


# --- schedules ------------------------------------------------------------------------------------


def test_the_papers_schedule_fills_the_sections_in_turn() -> None:
    assert in_turn((8, 8, 8)) == PAPER
    assert PAPER.names == ("1-1-1", "5-1-1", "8-1-1", "8-5-1", "8-8-1", "8-8-5", "8-8-8")
    assert PAPER.starts == ((0, 0), (0, 1), (0, 5), (1, 1), (1, 5), (2, 1), (2, 5))


@pytest.mark.parametrize(
    ("final", "parts", "names"),
    [
        ((3, 1, 2), 2, "1-1-1 2-1-1 3-1-1 3-1-2"),
        ((5, 3), 1, "1-1 5-1 5-3"),
        ((4,), 9, "1 2 3 4"),
        ((1, 1), 2, "1-1"),
    ],
)
def test_sections_are_filled_in_turn(final: Counts, parts: int, names: str) -> None:
    assert " ".join(in_turn(final, parts).names) == names


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((), "a schedule of"),
        (((),), "a schedule of"),
        (((1, 0), (1, 1)), r"iteration 1 has block counts \(1, 0\).*at least 1"),
        (((1, 1), (2,)), "iteration 2 has block counts"),
        (((1, 1), (2.0, 1)), "iteration 2 has block counts"),
        (((1, True),), "iteration 1 has block counts"),
        (((2, 1), (1, 2)), r"iteration 2 goes from \(2, 1\) to \(1, 2\).*no section shrinks"),
        (((1, 1), (2, 1), (2, 1)), "iteration 3 goes from"),
    ],
)
def test_malformed_schedules_are_refused(counts: tuple[Counts, ...], message: str) -> None:
    with pytest.raises(ModelSpecError, match=message):
        Schedule(counts)


def test_lists_make_a_schedule_too() -> None:
    assert Schedule.of([[1, 1], [2, 1]]) == Schedule(((1, 1), (2, 1)))
    assert Schedule.of(PAPER) == PAPER


# --- executions -----------------------------------------------------------------------------------


def test_table_1_of_the_paper() -> None:
    parts: Counter[str] = Counter()
    so_far = []
    for names in trace(PAPER):
        parts.update(name.split(".")[0] for name in names)
        so_far.append((*(parts[part] for part in ("IN", "S1", "S2", "S3", "OUT")), parts.total()))
    assert tuple(so_far) == (
        (1, 1, 1, 1, 1, 5),
        (1, 5, 2, 2, 2, 12),
        (1, 8, 3, 3, 3, 18),
        (1, 8, 7, 4, 4, 24),
        (1, 8, 10, 5, 5, 29),
        (1, 8, 10, 9, 6, 34),
        (1, 8, 10, 12, 7, 38),
    )


def test_executions_of_the_papers_iterations_in_order() -> None:
    assert [" ".join(names) for names in trace(PAPER)] == [
        "IN S1.1 S2.1 S3.1 OUT",
        "S1.2 S1.3 S1.4 S1.5 S2.1 S3.1 OUT",
        "S1.6 S1.7 S1.8 S2.1 S3.1 OUT",
        "S2.2 S2.3 S2.4 S2.5 S3.1 OUT",
        "S2.6 S2.7 S2.8 S3.1 OUT",
        "S3.2 S3.3 S3.4 S3.5 OUT",
        "S3.6 S3.7 S3.8 OUT",
    ]


def test_where_several_sections_grow_the_earliest_goes_on_and_all_later_ones_run_whole() -> None:
    names = trace(Schedule(((1, 2, 1), (1, 3, 2), (2, 3, 4))))
    assert " ".join(names[1]) == "S2.3 S3.1 S3.2 OUT"
    assert " ".join(names[2]) == "S1.2 S2.1 S2.2 S2.3 S3.1 S3.2 S3.3 S3.4 OUT"


def test_only_what_a_later_iteration_goes_on_from_is_kept() -> None:
    assert [sorted(kept) for kept in PAPER.kept] == [[0], [0], [1], [1], [2], [2], []]
    # the third section grows first, from its tensor, while the first one's waits
    assert [sorted(kept) for kept in Schedule(((1, 1, 1), (1, 1, 2), (2, 1, 2))).kept] == [
        [0, 2],
        [0],
        [],
    ]


@given(schedules())
def test_every_iteration_can_be_computed_from_what_is_kept_and_gives_what_a_plain_run_gives(
    schedule: Schedule,
) -> None:
    # a tensor stands for the blocks it has been through
    kept: dict[int, tuple[str, ...]] = {}
    for row, names, keep in zip(schedule.counts, trace(schedule), schedule.kept, strict=True):
        inner = [name for name in names if name not in ("IN", "OUT")]
        section, block = (int(part) - 1 for part in inner[0][1:].split("."))
        value = kept[section] if block else kept.get(section - 1, ())
        for name in inner:
            value = (*value, name)
            kept[int(name[1:].split(".")[0]) - 1] = value
        assert value == tuple(
            f"S{s + 1}.{b + 1}" for s, count in enumerate(row) for b in range(count)
        )
        kept = {section: tensor for section, tensor in kept.items() if section in keep}


# --- costs ----------------------------------------------------------------------------------------


def test_the_papers_counts_as_costs() -> None:
    counted = costs(PAPER, BlockCosts.equal((8, 8, 8)))
    assert counted.cumulative == (5, 12, 18, 24, 29, 34, 38)
    assert counted.per_iteration == (5, 7, 6, 6, 5, 5, 4)
    assert counted.plain == 26
    assert counted.overhead == pytest.approx(38 / 26)


def test_the_papers_order_executes_30_inner_blocks_and_the_reverse_72() -> None:
    assert total(PAPER, INNER) == 30
    assert total(REVERSE, INNER) == 72


def test_costs_in_operations_where_a_transition_is_three_quarters_of_a_block() -> None:
    later = (0.75, *[1.0] * 7)
    counted = costs(PAPER, BlockCosts(stem=0.0, sections=((1.0,) * 8, later, later), out=0.0))
    shares = [round(100 * cost / counted.plain, 1) for cost in counted.cumulative]
    # reference/papers.md 2.4
    assert shares == [10.6, 34.0, 53.2, 73.4, 89.4, 106.4, 119.1]


@given(schedules(sections=2), st.data())
def test_costs_are_the_sum_of_what_is_executed(schedule: Schedule, data: st.DataObject) -> None:
    parts = data.draw(block_costs(finals=(schedule.final,)))
    by_name = {"IN": parts.stem, "OUT": parts.out}
    by_name |= {
        f"S{s}.{b}": cost
        for s, row in enumerate(parts.sections, 1)
        for b, cost in enumerate(row, 1)
    }
    counted = costs(schedule, parts)
    for cost, names in zip(counted.per_iteration, trace(schedule), strict=True):
        assert cost == pytest.approx(sum(by_name[name] for name in names))
    assert counted.cumulative[-1] == pytest.approx(sum(counted.per_iteration))
    assert counted.plain == pytest.approx(sum(by_name.values()))
    assert counted.overhead >= 1 - 1e-12


def test_costs_of_other_blocks_are_refused() -> None:
    with pytest.raises(
        CostError, match=r"costs of \(8, 8\) blocks for a schedule that ends with \(8, 8, 8\)"
    ):
        costs(PAPER, BlockCosts.equal((8, 8)))


@pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
def test_impossible_costs_are_refused(cost: float) -> None:
    with pytest.raises(CostError, match="expected finite numbers that are not negative"):
        BlockCosts(stem=1.0, sections=((1.0, cost),), out=1.0)


@pytest.mark.parametrize("sections", [(), ((),), ((1.0,), ())])
def test_costs_of_no_blocks_are_refused(sections: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(CostError, match="at least one section"):
        BlockCosts(stem=1.0, sections=sections, out=1.0)


# --- the planner ----------------------------------------------------------------------------------


def test_for_the_papers_sizes_the_planner_finds_the_papers_order() -> None:
    assert plan(INNER, sizes=[3, 7, 10, 14, 17, 21, 24]) == PAPER
    later = (0.75, *[1.0] * 7)
    operations = BlockCosts(stem=0.1, sections=((1.0,) * 8, later, later), out=0.01)
    assert plan(operations, sizes=[3, 7, 10, 14, 17, 21, 24]) == PAPER


def test_sections_in_turn_are_not_always_the_best_order() -> None:
    best = plan(INNER, sizes=[3, 4, 24])
    # one block of each later section less is run again
    assert best.names == (
        "1-1-1",
        "1-1-2",
        "8-8-8",
    )
    assert total(best, INNER) == total(Schedule(((1, 1, 1), (2, 1, 1), (8, 8, 8))), INNER) - 1


@settings(deadline=None)
@given(block_costs(), st.integers(1, 4))
def test_no_schedule_with_as_many_iterations_is_cheaper(parts: BlockCosts, iterations: int) -> None:
    ones = (1,) * len(parts.counts)
    least = [
        total(s, parts)
        for s in all_schedules(parts.counts, iterations)
        if iterations == 1 or s.counts[0] == ones
    ]
    if not least:
        with pytest.raises(ModelSpecError, match="no schedule"):
            plan(parts, iterations=iterations)
        return
    found = plan(parts, iterations=iterations)
    assert len(found.counts) == iterations
    assert total(found, parts) == pytest.approx(min(least))


@settings(deadline=None)
@given(block_costs(), st.integers(1, 4), st.randoms())
def test_no_schedule_with_the_same_sizes_is_cheaper(
    parts: BlockCosts, iterations: int, random
) -> None:
    every = list(all_schedules(parts.counts, iterations))
    if not every:
        return
    sizes = [sum(row) for row in random.choice(every).counts]
    same = [schedule for schedule in every if [sum(row) for row in schedule.counts] == sizes]
    found = plan(parts, sizes=sizes)
    assert [sum(row) for row in found.counts] == sizes
    assert total(found, parts) == pytest.approx(min(total(schedule, parts) for schedule in same))


@settings(deadline=None)
@given(block_costs(finals=((3, 3), (2, 2, 2))), st.randoms())
def test_no_schedule_through_the_same_points_is_cheaper(parts: BlockCosts, random) -> None:
    ones = (1,) * len(parts.counts)
    every = [schedule for schedule in all_schedules(parts.counts, 4) if schedule.counts[0] == ones]
    points = random.sample(random.choice(every).counts, 2)
    through = [schedule for schedule in every if set(points) <= set(schedule.counts)]
    found = plan(parts, iterations=4, through=points)
    assert set(points) <= set(found.counts)
    assert total(found, parts) == pytest.approx(min(total(schedule, parts) for schedule in through))


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_of_equally_cheap_schedules_an_early_one_is_planned(given_costs: list[int]) -> None:
    # whole numbers, so that equal is equal
    stem, out, *inner = map(float, given_costs)
    parts = BlockCosts(stem=stem, sections=(tuple(inner[:3]), tuple(inner[3:])), out=out + 1.0)
    every = [schedule for schedule in all_schedules((3, 3), 4) if schedule.counts[0] == (1, 1)]
    cheap = [
        schedule
        for schedule in every
        if total(schedule, parts) == min(total(s, parts) for s in every)
    ]
    found = plan(parts, iterations=4)
    assert found in cheap
    assert sum(costs(found, parts).cumulative) == min(
        sum(costs(schedule, parts).cumulative) for schedule in cheap
    )


def test_of_two_equally_cheap_schedules_the_one_whose_answers_come_first() -> None:
    one_section = BlockCosts(stem=0.0, sections=((1.0, 2.0, 3.0, 4.0),), out=1.0)
    # 1-3-4 costs as much and answers later
    assert plan(one_section, iterations=3).names == (
        "1",
        "2",
        "4",
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "one of the two"),
        ({"iterations": 3, "sizes": [2, 3, 4]}, "one of the two"),
        ({"iterations": 0}, "at least one iteration"),
        ({"iterations": 5}, r"no schedule to \(2, 3\) blocks has iterations=5"),
        ({"sizes": []}, "at least one iteration"),
        ({"sizes": [2, 4]}, "up to all 5 blocks"),
        ({"sizes": [1, 5]}, "no schedule"),
        ({"sizes": [3, 3, 5]}, "no schedule"),
        ({"iterations": 3, "through": [(1, 0)]}, "at least one block per section"),
        ({"iterations": 3, "through": [(1, 2, 1)]}, "at least one block per section"),
        ({"iterations": 4, "through": [(2, 1), (1, 2)]}, "points that only grow"),
        ({"iterations": 3, "through": [(1, 2), (2, 2)]}, "no schedule"),
        ({"iterations": 3, "through": [(1, 4)]}, "no schedule"),
    ],
)
def test_what_cannot_be_planned_is_refused(asked: dict[str, object], message: str) -> None:
    with pytest.raises(ModelSpecError, match=message):
        plan(BlockCosts.equal((2, 3)), **asked)  # type: ignore[arg-type]


# --- iterations at wanted times -------------------------------------------------------------------


def test_iterations_placed_at_the_papers_times_are_the_papers() -> None:
    parts = BlockCosts(
        stem=0.3, sections=((2.0,) * 8, (1.1, *[1.5] * 7), (0.6, *[0.8] * 7)), out=0.2
    )
    assert place(parts, costs(PAPER, parts).cumulative) == PAPER


def in_turn_schedules(final: Counts, iterations: int) -> Iterator[Schedule]:
    for schedule in all_schedules(final, iterations):
        if all(
            all(count == 1 for count in row[section + 1 :])
            for row in schedule.counts
            for section, count in enumerate(row)
            if count < final[section]
        ):
            yield schedule


@settings(deadline=None)
@given(block_costs(), st.lists(st.floats(0.0, 40.0), min_size=1, max_size=4, unique=True))
def test_no_schedule_in_turn_comes_nearer_to_the_times(
    parts: BlockCosts, unsorted: list[float]
) -> None:
    times = sorted(unsorted)

    def distance(schedule: Schedule) -> float:
        return sum(
            (cost - time) ** 2
            for cost, time in zip(costs(schedule, parts).cumulative, times, strict=True)
        )

    every = list(in_turn_schedules(parts.counts, len(times)))
    found = place(parts, times)
    assert found.counts in [schedule.counts for schedule in every]
    assert distance(found) == pytest.approx(min(map(distance, every)))


@pytest.mark.parametrize(
    "times", [[], [1.0, 1.0], [2.0, 1.0], [1.0, math.nan], [1.0, math.inf], [1.0, 2.0, 3.0, 4.0]]
)
def test_times_that_no_schedule_can_follow_are_refused(times: list[float]) -> None:
    with pytest.raises(ModelSpecError, match="1 to 3 of them, increasing and finite"):
        place(BlockCosts.equal((2, 2)), times)
