"""Limits other than time: what a run spends is counted, and it goes no further than it may."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeNetwork, X, costs_of, runner_of
from impatient.clock import FakeClock
from impatient.costs import CostProfile
from impatient.errors import BudgetError, CostError, NoAnswerInTime
from impatient.policies import ThresholdPolicy
from impatient.runtime import Runner
from impatient.runtime.limits import limits_of

STAGES = (100, 200, 300)
HEADS = (10, 20, 0)
REACHED = [
    (110.1, 0, "limit"),
    (319.9, 0, "limit"),
    (320.1, 1, "limit"),
    (599.9, 1, "limit"),
    (600.1, 2, "final"),
]


def costs(stages: Any = STAGES, heads: Any = HEADS) -> CostProfile:
    return dataclasses.replace(
        costs_of([1.0] * len(stages), [0.5] * len(heads)),
        stage_macs=stages,
        head_macs=heads,
        exit_free_macs=sum(stages),
        stage_bytes=tuple(8 * value for value in stages),
        head_bytes=tuple(8 * value for value in heads),
        stage_energy_j=tuple(1e-3 * value for value in stages),
        head_energy_j=tuple(1e-3 * value for value in heads),
    )


def runner(policy: Any = None, **options: Any) -> Runner:
    return runner_of(FakeNetwork(FakeClock(), [1.0] * 3, [0.5] * 3), costs(), policy, **options)


@pytest.mark.parametrize(("unit", "scale"), [("macs", 1), ("bytes", 8), ("energy_j", 1e-3)])
@pytest.mark.parametrize(("most", "exit", "stopped_by"), REACHED)
def test_a_run_goes_as_deep_as_its_limit_allows(
    unit: Any, scale: float, most: float, exit: int, stopped_by: str
) -> None:
    answer = runner().run(X, limits={unit: most * scale})
    assert (answer.exit, answer.stopped_by, answer.deadline_met) == (exit, stopped_by, True)


def test_macs_are_counted_exactly() -> None:
    assert runner().run(X, limits={"macs": 320}).exit == 1
    assert runner().run(X, limits={"macs": 319}).exit == 0


def test_of_several_limits_the_tightest_counts() -> None:
    assert runner().run(X, limits={"macs": 1000, "bytes": 8 * 330, "energy_j": 1.0}).exit == 1


def test_heads_that_a_policy_looks_at_on_the_way_are_spent() -> None:
    policy = ThresholdPolicy(score="max_probability", thresholds=(0.99, 0.99, float("-inf")))
    assert runner(policy).run(X, limits={"macs": 320}).exit == 0
    assert runner(policy).run(X, limits={"macs": 330}).exit == 1


def test_an_interruptible_run_pays_every_head() -> None:
    with runner() as own:
        answers = [own.start(X, limits={"macs": most}).result() for most in (329, 330, 630)]
    assert [(answer.exit, answer.stopped_by) for answer in answers] == [
        (0, "limit"),
        (1, "limit"),
        (2, "final"),
    ]


def test_where_not_even_the_first_exit_is_allowed_it_answers_all_the_same_or_raises() -> None:
    answer = runner().run(X, limits={"macs": 109})
    assert (answer.exit, answer.stopped_by) == (0, "limit")
    strict = runner(when_late="raise")
    for ask in (strict.run, strict.start):
        with pytest.raises(NoAnswerInTime, match="first exit takes 110 macs, the limit is 109"):
            ask(X, limits={"macs": 109})


def test_what_was_spent_before_a_refinement_counts() -> None:
    with runner().open(X) as opened:
        exits = [opened.run(limits={"macs": most}).exit for most in (110, 329, 330, 629, 630)]
    assert exits == [0, 0, 1, 1, 2]
    with runner() as own, own.start(X, resumable=True, limits={"macs": 110}) as run:
        found = [
            run.result(),
            *(run.refine(limits={"macs": most}).result() for most in (329, 330, 630)),
        ]
    assert [answer.exit for answer in found] == [0, 0, 1, 2]
    assert [answer.stopped_by for answer in found] == ["limit", "limit", "limit", "final"]


@given(
    parts=st.lists(st.tuples(st.integers(1, 10**9), st.integers(0, 10**6)), min_size=1, max_size=6),
    most=st.integers(1, 6 * 10**9),
)
def test_a_run_stays_within_its_macs_and_goes_no_less_deep_than_it_may(
    parts: list[tuple[int, int]], most: int
) -> None:
    stages, heads = (tuple(values) for values in zip(*parts, strict=True))
    known = costs(stages, heads)
    network = FakeNetwork(FakeClock(), [1.0] * len(parts), [0.5] * len(parts))
    reached = known.cumulative("macs", "contract")
    deepest = 0
    while deepest + 1 < len(parts) and reached[deepest + 1] <= most:
        deepest += 1
    assert runner_of(network, known).run(X, limits={"macs": most}).exit == deepest


def test_limits_that_make_no_sense_are_errors() -> None:
    with pytest.raises(BudgetError, match="unknown limit 'flops'"):
        runner().run(X, limits={"flops": 1})  # type: ignore[dict-item]
    wrong: tuple[Any, ...] = (
        0,
        -1.0,
        float("nan"),
        "5",
        True,
        None,
        [None] * len(X),
        ["5"] * len(X),
    )
    for most in wrong:
        for ask in (runner().start, runner().run):
            with pytest.raises(BudgetError, match=r"the limit of macs is .*; expected .*positive"):
                ask(X, limits={"macs": most})
    bare = dataclasses.replace(costs(), stage_energy_j=None, head_energy_j=None)
    with pytest.raises(CostError, match="energy"):
        limits_of(bare, {"energy_j": 1.0})


def test_limits_that_are_no_mapping_are_refused() -> None:
    network = FakeNetwork(FakeClock(), [1.0] * 3, [0.5] * 3)
    runner = runner_of(network, costs())
    for begin in (runner.run, runner.start):
        with pytest.raises(BudgetError, match=r'limits=500; expected a mapping.*\{"macs": 1e6\}'):
            begin(X, limits=500)
    with runner.open(X) as run, pytest.raises(BudgetError, match="limits=500"):
        run.run(limits=500)
