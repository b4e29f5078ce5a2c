"""The rule that says when a batch goes on with fewer rows."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import batch_costs, costs_of
from impatient.costs import CostProfile, Quantiles
from impatient.errors import RunError
from impatient.runtime.compaction import Compaction, covering

FREE: dict[str, float] = {"keep_s": 0.0, "copy_bytes_per_s": 1e9}


def profiled(stages_of: Mapping[int, list[Any]], device: str = "cpu") -> CostProfile:
    """A profile with these stage times per batch size."""
    first = next(iter(stages_of.values()))
    costs = costs_of(first)
    batches = {size: batch_costs(stages, [0.0] * len(first)) for size, stages in stages_of.items()}
    return dataclasses.replace(
        costs, batches=batches, provenance=dataclasses.replace(costs.provenance, device=device)
    )


LINEAR = profiled({1: [1.0, 1.0, 2.0], 8: [8.0, 8.0, 16.0]})


def test_the_time_ahead_is_that_of_the_stages_after_an_exit() -> None:
    rule = Compaction(costs=LINEAR)
    assert [rule.ahead_s(exit, 8) for exit in range(3)] == [24.0, 16.0, 0.0]
    assert [rule.ahead_s(exit, 1) for exit in range(3)] == [3.0, 2.0, 0.0]


@given(rows=st.integers(1, 8))
def test_between_profiled_sizes_time_is_on_the_line(rows: int) -> None:
    assert Compaction(costs=LINEAR).ahead_s(0, rows) == pytest.approx(3.0 * rows)


def test_beyond_all_profiled_sizes_time_is_in_proportion_to_the_largest() -> None:
    assert Compaction(costs=LINEAR).ahead_s(0, 16) == 48.0


@pytest.mark.parametrize(
    ("at_8", "at_16", "at_4"),
    [(8.0, 16.0, 4.0), (8.0, 12.0, 6.0), (8.0, 8.0, 8.0), (8.0, 40.0, 4.0), (8.0, 6.0, 8.0)],
    ids=[
        "proportional",
        "with a fixed part",
        "fixed",
        "steeper: no faster than proportional",
        "falling: no more than at 8",
    ],
)
def test_below_the_smallest_profiled_size_the_line_goes_on_within_reason(
    at_8: float, at_16: float, at_4: float
) -> None:
    rule = Compaction(costs=profiled({8: [0.0, at_8], 16: [0.0, at_16]}))
    assert rule.ahead_s(0, 4) == pytest.approx(at_4)


@pytest.mark.parametrize(("device", "expected"), [("cpu", 2.0), ("cuda:0", 8.0)])
def test_a_single_profiled_size_promises_less_time_for_fewer_rows_only_on_a_cpu(
    device: str, expected: float
) -> None:
    assert Compaction(costs=profiled({8: [0.0, 8.0]}, device)).ahead_s(0, 2) == expected


@pytest.mark.parametrize(
    ("left", "row_bytes", "size"),
    [
        # a row ahead of exit 0 costs 3 s: 3 saved, 2.8 paid
        (7, 0.4e9, 7),
        # 3 saved, 3.5 paid
        (7, 0.5e9, 8),
        # 18 saved, 16 paid
        (2, 8e9, 2),
        # 18 saved, 19 paid
        (2, 9.5e9, 8),
    ],
)
def test_a_batch_shrinks_where_the_stages_ahead_save_more_than_copying_costs(
    left: int, row_bytes: float, size: int
) -> None:
    assert Compaction(costs=LINEAR, **FREE).size(0, 8, left, row_bytes) == size


def test_what_keeping_costs_at_all_is_paid_too() -> None:
    assert Compaction(costs=LINEAR, keep_s=2.9).size(0, 8, 7, 0.0) == 7
    assert Compaction(costs=LINEAR, keep_s=3.1).size(0, 8, 7, 0.0) == 8


def test_only_the_stages_ahead_count() -> None:
    rule = Compaction(costs=LINEAR, keep_s=2.5)
    assert rule.size(0, 8, 7, 0.0) == 7
    # one row less saves 2 there
    assert rule.size(1, 8, 7, 0.0) == 8
    # nothing is ahead
    assert rule.size(2, 8, 1, 0.0) == 8


def test_a_device_that_takes_the_same_time_for_fewer_rows_never_shrinks() -> None:
    assert (
        Compaction(costs=profiled({1: [1.0, 1.0], 8: [1.0, 1.0]}), **FREE).size(0, 8, 1, 0.0) == 8
    )


@pytest.mark.parametrize(("disturbed", "size"), [(8, 8), (4, 4)])
def test_a_disturbed_repeat_at_one_size_does_not_decide(disturbed: int, size: int) -> None:
    # four rows save nothing, or half
    time_of = {4: 1.0, 8: 1.0 if disturbed == 8 else 2.0}
    stages: dict[int, list[Any]] = {
        rows: [0.0, Quantiles.of([seconds] * 20)] for rows, seconds in time_of.items()
    }
    stages[disturbed][1] = Quantiles.of([*[time_of[disturbed]] * 19, 100.0])
    assert Compaction(costs=profiled(stages), **FREE).size(0, 8, 4, 0.0) == size


def test_always_and_never_do_not_ask() -> None:
    dear: dict[str, Any] = {"keep_s": 1e9}
    assert Compaction(costs=LINEAR, when="always", **dear).size(0, 8, 7, 0.0) == 7
    assert Compaction(costs=LINEAR, when="never", **FREE).size(0, 8, 1, 0.0) == 8


@pytest.mark.parametrize(("left", "size"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6)])
def test_rows_are_filled_up_to_the_next_bucket(left: int, size: int) -> None:
    assert Compaction(costs=LINEAR, buckets=(4, 2), **FREE).size(0, 6, left, 0.0) == size


def test_a_bucket_is_judged_by_the_rows_it_runs() -> None:
    assert Compaction(costs=LINEAR, buckets=(7, 8), keep_s=4.0).size(0, 8, 1, 0.0) == 8
    assert Compaction(costs=LINEAR, buckets=(6, 8), keep_s=4.0).size(0, 8, 1, 0.0) == 6


@given(sizes=st.sets(st.integers(1, 64), min_size=1), rows=st.integers(1, 80))
def test_a_covering_size_is_the_least_that_is_large_enough(sizes: set[int], rows: int) -> None:
    found = covering(sizes, rows)
    assert (found is None) == (rows > max(sizes))
    if found is not None:
        assert found >= rows
        assert not any(rows <= size < found for size in sizes)


@pytest.mark.parametrize("options", [{"when": "sometimes"}, {"buckets": (0, 4)}])
def test_what_is_not_possible_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="expected"):
        Compaction(costs=LINEAR, **options)
