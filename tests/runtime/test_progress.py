"""Batches whose samples stop at different exits: what comes out is what every sample alone would
get.
"""

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blocks import CLASSES, MOST, NETWORK, WIDTH, Blocks, attach, made, x_of
from fakes import batch_costs, costs_of, runner_of
from impatient import portable
from impatient.anytime import Exit, Network, Run
from impatient.clock import Deadline, FakeClock
from impatient.costs import CostProfile
from impatient.engines.network import EngineRun
from impatient.networks import MultiExitNetwork
from impatient.policies import ThresholdPolicy
from impatient.policies.mixing import MixedPolicy
from impatient.policies.policy import Policy
from impatient.portable import StagedRun, Wiring
from impatient.runtime import Runner
from impatient.runtime.compaction import Compaction
from impatient.runtime.progress import BatchProgress
from impatient.runtime.runner import RESERVE_S

COSTS = costs_of([1.0] * 4, sizes=(MOST,))
ALWAYS = Compaction(costs=COSTS, when="always")
NEVER = Compaction(costs=COSTS, when="never")


class Skipping(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.classifier(x)


@pytest.fixture
def network() -> MultiExitNetwork:
    return attach(Blocks())


def policy_of(*thresholds: float) -> ThresholdPolicy:
    return ThresholdPolicy(score="max_probability", thresholds=(*thresholds, -torch.inf))


def driven(
    network: Any, x: Tensor, policy: Any, compaction: Compaction
) -> tuple[Tensor, tuple[int, ...]]:
    """A run to its end."""
    with torch.inference_mode(), network.exits(x) as run:
        collected = BatchProgress(policy, network, x, run, compaction)
        for exit in run:
            if collected.add(exit):
                break
            collected.go_on()
        return collected.finish(exit)


def snapshots(
    network: Any, x: Tensor, policy: Any, compaction: Compaction
) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """What is there after each exit of a run, and what it finishes with."""
    with torch.inference_mode(), network.exits(x) as run:
        collected = BatchProgress(policy, network, x, run, compaction)
        for exit in run:
            done = collected.add(exit)
            yield collected.snapshot(exit)
            if done:
                break
            collected.go_on()
        yield collected.finish(exit)


def alone(
    network: MultiExitNetwork, x: Tensor, policies: Sequence[Any]
) -> tuple[Tensor, tuple[int, ...]]:
    """Truth: every sample by itself through all exits, then the first at which its policy stops."""
    outputs = []
    exits = []
    for number, policy in enumerate(policies):
        with torch.inference_mode():
            of_exits = network(x[number : number + 1])
        exits.append(int(policy.exits_of(torch.stack(of_exits))))
        outputs.append(of_exits[exits[-1]])
    return torch.cat(outputs), tuple(exits)


def assert_same(
    found: tuple[Tensor, tuple[int, ...]], wanted: tuple[Tensor, tuple[int, ...]]
) -> None:
    assert found[1] == wanted[1]
    assert wanted[0].abs().min() > 0
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-9, atol=1e-9)


thresholds = st.tuples(*[st.floats(0.3, 1.0)] * 3)
batches = st.integers(1, MOST)
seeds = st.integers(0, 1000)


# --- the answers ----------------------------------------------------------------------------------


def test_the_batches_drawn_here_do_stop_at_different_exits() -> None:
    exits = [
        alone(NETWORK, x_of(MOST, seed), [policy_of(0.9, 0.9, 0.9)] * MOST)[1] for seed in range(5)
    ]
    assert all(len(set(found)) > 2 for found in exits)


@settings(deadline=None)
@given(
    thresholds=thresholds,
    batch=batches,
    seed=seeds,
    buckets=st.sets(st.integers(1, MOST), max_size=3),
)
def test_a_shrinking_batch_gives_every_sample_what_it_gets_alone(
    thresholds: Any, batch: int, seed: int, buckets: Any
) -> None:
    x = x_of(batch, seed)
    policy = policy_of(*thresholds)
    compaction = dataclasses.replace(ALWAYS, buckets=tuple(buckets))
    assert_same(driven(NETWORK, x, policy, compaction), alone(NETWORK, x, [policy] * batch))


@settings(deadline=None)
@given(
    thresholds=thresholds,
    batch=batches,
    seed=seeds,
    when=st.sampled_from(["always", "never", "auto"]),
)
def test_runners_answer_so_in_both_ways(thresholds: Any, batch: int, seed: int, when: Any) -> None:
    x = x_of(batch, seed)
    policy = policy_of(*thresholds)
    wanted = alone(NETWORK, x, [policy] * batch)
    with Runner(NETWORK, COSTS, policy, compaction=when, any_profile=True) as runner:
        answer = runner.run(x)
        assert_same((answer.output, answer.exits), wanted)
        with runner.start(x) as run:
            answer = run.result()
        assert_same((answer.output, answer.exits), wanted)


@settings(deadline=None)
@given(thresholds=thresholds, batch=st.integers(2, MOST), seed=seeds)
def test_a_sample_alone_gets_the_answer_that_it_gets_in_a_batch(
    thresholds: Any, batch: int, seed: int
) -> None:
    x = x_of(batch, seed)
    last = NETWORK.num_exits - 1
    with Runner(NETWORK, COSTS, policy_of(*thresholds), any_profile=True) as runner:
        together = runner.run(x)
        for number, exit in enumerate(together.exits):
            row = slice(number, number + 1)
            with runner.start(x[row]) as run, runner.open(x[row]) as opened:
                for answer in (runner.run(x[row]), run.result(), opened.run()):
                    assert_same((answer.output, answer.exits), (together.output[row], (exit,)))
                    assert (answer.exit, answer.stopped_by) == (
                        exit,
                        "final" if exit == last else "policy",
                    )
                # what has stopped stays so
                assert_same((opened.run().output, (exit,)), (together.output[row], (exit,)))
                # and goes on when it is told to
                further = opened.run(policy=None)
            assert_same((further.output, further.exits), (NETWORK(x[row])[last].detach(), (last,)))


@settings(deadline=None)
@given(thresholds=thresholds, batch=batches, seed=seeds)
def test_after_every_exit_a_snapshot_has_all_samples_in_order(
    thresholds: Any, batch: int, seed: int
) -> None:
    x = x_of(batch, seed)
    policy = policy_of(*thresholds)
    outputs = torch.stack(NETWORK(x)).detach()
    stops = policy.exits_of(outputs)
    *taken, finished = snapshots(NETWORK, x, policy, ALWAYS)
    for exit, (output, exits) in enumerate(taken):
        expected = stops.clamp(max=exit)
        assert exits == tuple(expected.tolist())
        torch.testing.assert_close(output, outputs[expected, torch.arange(batch)])
    assert_same(finished, alone(NETWORK, x, [policy] * batch))


def test_a_snapshot_is_not_changed_by_what_comes_later() -> None:
    taken = []
    copies = []
    for output, _ in snapshots(NETWORK, x_of(MOST), policy_of(0.9, 0.9, 0.9), ALWAYS):
        taken.append(output)
        copies.append(output.clone())
    assert len(taken) > 3
    assert all(torch.equal(left, right) for left, right in zip(taken, copies, strict=True))


# --- the rows that run ----------------------------------------------------------------------------


def rows_run(
    network: MultiExitNetwork, x: Tensor, policy: Any, compaction: Compaction
) -> list[int]:
    network.shrinks(x)
    network.backbone.rows.clear()
    driven(network, x, policy, compaction)
    return network.backbone.rows


def still_going(exits: Sequence[int]) -> list[int]:
    """Truth: rows of each stage that runs."""
    return [sum(exit >= stage for exit in exits) for stage in range(max(exits) + 1)]


@settings(deadline=None)
@given(thresholds=thresholds, batch=batches, seed=seeds)
def test_each_stage_runs_on_the_samples_still_going_and_no_others(
    thresholds: Any, batch: int, seed: int
) -> None:
    x = x_of(batch, seed)
    policy = policy_of(*thresholds)
    _, exits = alone(NETWORK, x, [policy] * batch)
    assert rows_run(NETWORK, x, policy, ALWAYS) == still_going(exits)
    assert rows_run(NETWORK, x, policy, NEVER) == [batch] * (max(exits) + 1)


def test_with_buckets_each_stage_runs_on_one_of_them() -> None:
    x = x_of(MOST, 1)
    policy = policy_of(0.9, 0.9, 0.9)
    _, exits = alone(NETWORK, x, [policy] * MOST)
    assert still_going(exits) != (
        rows := rows_run(NETWORK, x, policy, dataclasses.replace(ALWAYS, buckets=(2, 5, 8)))
    )
    assert rows == [
        min(bucket for bucket in (2, 5, 8) if bucket >= count) for count in still_going(exits)
    ]


def test_where_the_rule_says_no_all_rows_run() -> None:
    x = x_of(MOST, 1)
    policy = policy_of(0.9, 0.9, 0.9)
    cheap = Compaction(costs=costs_of([1e-9] * 4, sizes=(MOST,)))
    worth = Compaction(costs=COSTS)
    assert set(rows_run(NETWORK, x, policy, cheap)) == {MOST}
    assert set(rows_run(NETWORK, x, policy, worth)) > {MOST}


def test_a_network_that_does_not_shrink_goes_on_with_all() -> None:
    torch.manual_seed(0)
    network = attach(Skipping())
    x = x_of(MOST, 1)
    policy = policy_of(0.9, 0.9, 0.9)
    wanted = alone(network, x, [policy] * MOST)
    assert len(set(wanted[1])) > 1
    assert_same(driven(network, x, policy, ALWAYS), wanted)
    assert set(rows_run(network, x, policy, ALWAYS)) == {MOST}


LOOKING = policy_of(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("batch", "policy", "compaction"),
    [(1, LOOKING, ALWAYS), (4, None, ALWAYS), (4, LOOKING, NEVER), (4, LOOKING, None)],
    ids=["one sample", "no policy", "never", "no rule"],
)
def test_nothing_is_tried_out_where_no_part_of_a_batch_can_leave(
    network: Any, batch: int, policy: Any, compaction: Any
) -> None:
    network.backbone.rows.clear()
    driven(network, x_of(batch), policy, compaction)
    assert set(network.backbone.rows) == {batch}


# --- policies -------------------------------------------------------------------------------------


@dataclass
class OnFeatures(Policy):
    """Stops where the mean of the pooled features is large; writes down how many samples it was
    asked about.
    """

    least: float
    num_exits: int = 4
    inputs: str = "features"
    asked: list[int] = dataclasses.field(default_factory=list)

    def looks_at(self, exit: int) -> bool:
        return True

    @property
    def needs_outputs(self) -> bool:
        return self.inputs == "both"

    @property
    def needs_features(self) -> bool:
        return True

    def stops(
        self, exit: int, outputs: Tensor | None = None, pooled: Tensor | None = None
    ) -> Tensor:
        assert pooled is not None
        assert (outputs is not None) == (self.inputs == "both")
        assert outputs is None or len(outputs) == len(pooled)
        self.asked.append(len(pooled))
        if exit == self.num_exits - 1:
            return torch.ones(len(pooled), dtype=torch.bool)
        return pooled.mean(1) >= self.least


@settings(deadline=None)
@given(
    least=st.floats(-0.5, 0.5),
    batch=batches,
    seed=seeds,
    inputs=st.sampled_from(["features", "both"]),
    buckets=st.sampled_from([(), (3, 6)]),
)
def test_gates_on_features_are_asked_about_the_samples_still_going(
    least: float, batch: int, seed: int, inputs: str, buckets: Any
) -> None:
    x = x_of(batch, seed)
    policy = OnFeatures(least, inputs=inputs)
    found = driven(NETWORK, x, policy, dataclasses.replace(ALWAYS, buckets=buckets))
    of_each = [
        driven(NETWORK, x[number : number + 1], OnFeatures(least, inputs=inputs), NEVER)
        for number in range(batch)
    ]
    assert_same(
        found,
        (torch.cat([output for output, _ in of_each]), tuple(exits[0] for _, exits in of_each)),
    )
    if not buckets:
        assert policy.asked == still_going(found[1])


def test_a_head_runs_only_where_a_gate_on_features_stops_somebody(
    network: MultiExitNetwork,
) -> None:
    ran = []
    for number, head in enumerate(network.heads):
        head.register_forward_hook(lambda *_, number=number: ran.append(number))
    driven(network, x_of(1), OnFeatures(1e9), ALWAYS)
    assert ran == []


@settings(deadline=None)
@given(cheap=thresholds, dear=thresholds, share=st.floats(0.0, 1.0), batch=batches, seed=seeds)
def test_the_draws_of_a_mixture_follow_their_samples(
    cheap: Any, dear: Any, share: float, batch: int, seed: int
) -> None:
    mixed = MixedPolicy(fast=policy_of(*cheap), slow=policy_of(*dear), share=share, seed=seed)
    x = x_of(batch, seed)
    is_dear = mixed.drawn(batch, run=3)
    wanted = alone(NETWORK, x, [mixed.slow if drawn else mixed.fast for drawn in is_dear])
    assert_same(driven(NETWORK, x, mixed.for_run(batch, 3), ALWAYS), wanted)


def test_an_exit_that_nobody_left_looks_at_is_not_paid() -> None:
    closed = policy_of(2.0, torch.inf, torch.inf)
    mixed = MixedPolicy(fast=policy_of(-1.0, -1.0, -1.0), slow=closed, share=0.5)
    network = made()
    x = x_of(MOST)
    ran = []
    for number, head in enumerate(network.heads):
        head.register_forward_hook(lambda *_, number=number: ran.append(number))
    network.shrinks(x)
    ran.clear()
    _, exits = driven(network, x, mixed.for_run(MOST), ALWAYS)
    # all of the cheap ones leave first, and the dear ones look at nothing more
    assert set(exits) == {
        0,
        3,
    }
    assert ran == [0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("buckets", [(), (3, 6)])
@pytest.mark.parametrize("at", range(3))
def test_another_policy_holds_for_all_that_are_still_in_the_batch(
    at: int, buckets: Any, seed: int
) -> None:
    x = x_of(MOST, seed)
    policy = policy_of(0.9, 0.97, 0.8)
    other = policy_of(2.0, 0.97, 0.9)
    outputs = torch.stack(NETWORK(x)).detach()
    stopped = policy.exits_of(outputs)
    with torch.inference_mode(), NETWORK.exits(x) as run:
        collected = BatchProgress(
            policy, NETWORK, x, run, dataclasses.replace(ALWAYS, buckets=buckets)
        )
        for exit in run:
            done = collected.add(exit)
            if exit.index == at:
                collected.override(other)
                now = collected.snapshot(exit)[1]
                size = collected.size
                done = collected.add(exit)
            if done:
                break
            collected.go_on()
        output, exits = collected.finish(exit)
    later = torch.stack([other.stops(k, outputs[k]) for k in range(at, 4)]).int().argmax(0) + at
    assert len(set(exits)) > 1
    expected = torch.where(stopped < at, stopped, later)
    # with buckets, some that have stopped before are still in the batch, and go on, too
    if not buckets:
        assert now == tuple(stopped.clamp(max=at).tolist())
        assert size == int((stopped >= at).sum())
        assert exits == tuple(expected.tolist())
    torch.testing.assert_close(output, outputs[list(exits), torch.arange(MOST)])


# --- engines --------------------------------------------------------------------------------------


class Staged(Network):
    """Stages as an engine has them: three values cross the cut, one has its batch second, one has
    none.
    """

    num_exits = 3

    def __init__(self, arrays: str) -> None:
        super().__init__()
        draw = np.random.default_rng(0)
        self.arrays = arrays
        self.weights = [draw.normal(size=(WIDTH, WIDTH)) for _ in range(2)] + [
            draw.normal(size=(WIDTH, CLASSES))
        ]
        self.rows: list[int] = []
        names = ("h0", "turned", "scale")
        self.wiring = Wiring(
            inputs=("x",),
            takes=(("x",), names, ("h1", "turned")),
            gives=(names, ("h1",), ("y",)),
            features=("h0", "h1", "y"),
            batch_dims={"x": 0, "h0": 0, "turned": 1, "scale": None, "h1": 0, "y": 0},
        )

    def first(self, x: Any) -> Any:
        self.rows.append(len(x))
        return np.tanh(x @ self.weights[0]), x.T, np.full(5, 0.5)

    def second(self, h: Any, turned: Any, scale: Any) -> Any:
        self.rows.append(len(h))
        return (np.tanh(h @ self.weights[1]) + turned.T * scale[0],)

    def third(self, h: Any, turned: Any) -> Any:
        self.rows.append(len(h))
        return ((h + turned.T) @ self.weights[2] * 3.0,)

    def _of_torch(self, part: Any) -> Any:
        """The same part on tensors."""
        if self.arrays == "numpy":
            return part
        return lambda *values: [
            torch.from_numpy(given) for given in part(*(value.numpy() for value in values))
        ]

    def exits(self, x: Any, *, keep: bool = False) -> Run:
        stages = [self._of_torch(part) for part in (self.first, self.second, self.third)]

        def head(h: Any) -> Any:
            return h[:, :CLASSES] * 3.0

        staged = portable.Staged(self.wiring, stages, [head, head, None])
        run = StagedRun(staged, [x.numpy() if self.arrays == "numpy" else x])
        return EngineRun(run, self.arrays)

    def shrinks(self, x: Any) -> bool:
        return True


@pytest.mark.parametrize("arrays", ["numpy", "torch"])
@settings(deadline=None)
@given(
    thresholds=st.tuples(*[st.floats(0.3, 1.0)] * 2),
    batch=batches,
    seed=seeds,
    buckets=st.sampled_from([(), (3, 6)]),
)
def test_every_value_of_an_engines_run_shrinks(
    arrays: Any, thresholds: Any, batch: int, seed: int, buckets: Any
) -> None:
    network = Staged(arrays)
    x = x_of(batch, seed)
    policy = policy_of(*thresholds)
    of_each = [driven(network, x[number : number + 1], policy, NEVER) for number in range(batch)]
    wanted = torch.cat([output for output, _ in of_each]), tuple(exits[0] for _, exits in of_each)
    network.rows.clear()
    assert_same(driven(network, x, policy, dataclasses.replace(ALWAYS, buckets=buckets)), wanted)
    if not buckets:
        assert network.rows == still_going(wanted[1])


# --- the plan -------------------------------------------------------------------------------------


class Timed(Network):
    """Stages that take a second per row on a fake clock; sample k stops at exit `stops[k]`."""

    num_exits = 4

    def __init__(self, clock: FakeClock, stops: Sequence[int]) -> None:
        super().__init__()
        self.clock = clock
        self.stops = stops
        self.ran: list[int] = []

    def exits(self, x: Any, *, keep: bool = False) -> Run:
        return TimedRun(self)

    def shrinks(self, x: Any) -> bool:
        return True


class TimedRun(Run):
    def __init__(self, network: Timed) -> None:
        super().__init__(self._stages(network))
        self.rows = torch.arange(len(network.stops))

    def keep(self, rows: Tensor) -> None:
        self.rows = self.rows[rows]

    def _stages(self, network: Timed) -> Generator[Exit]:
        for index in range(network.num_exits):
            network.ran.append(len(self.rows))
            network.clock.advance(float(len(self.rows)))
            sure = torch.tensor(
                [[9.0 if network.stops[row] <= index else 0.0, 0.0] for row in self.rows]
            )
            yield Exit(index, None, sure)


def by_size(sizes: Sequence[int]) -> CostProfile:
    batches = {size: batch_costs([float(size)] * 4, [0.0] * 4) for size in sizes}
    return dataclasses.replace(costs_of([1.0] * 4), batches=batches)


STOPS = [0, 0, 0, 3]
POLICY = policy_of(0.9, 0.9, 0.9)


@pytest.mark.parametrize(
    ("sizes", "compaction", "budget", "exit"),
    [
        # after 4 s one row needs 1 s more
        ((1, 4), "auto", 4.0 + 1.0, 1),
        ((1, 4), "auto", 4.0 + 0.9, 0),
        # all four rows need 4
        ((1, 4), "never", 4.0 + 3.9, 0),
        ((1, 4), "never", 4.0 + 4.0, 1),
        # planned with the next larger size
        ((2, 4), "auto", 4.0 + 1.9, 0),
        ((2, 4), "auto", 4.0 + 2.0, 1),
        ((4,), "auto", 4.0 + 3.9, 0),
        ((4,), "auto", 4.0 + 4.0, 1),
        ((1, 4), "auto", 4.0 + 3.0, 3),
    ],
)
def test_a_contract_run_plans_with_the_rows_that_go_on(
    sizes: Any, compaction: Any, budget: float, exit: int
) -> None:
    clock = FakeClock()
    runner = runner_of(Timed(clock, STOPS), by_size(sizes), POLICY, compaction=compaction)
    answer = runner.run(torch.zeros(4, 1), deadline=Deadline(clock.now() + budget + RESERVE_S))
    assert (answer.exits, answer.deadline_met) == ((0, 0, 0, exit), True)


@pytest.mark.parametrize("sizes", [(1, 4), (2, 4), (4,)])
def test_a_reduced_batch_is_not_held_against_the_profile_of_another_size(sizes: Any) -> None:
    network = Timed(FakeClock(), STOPS)
    runner = runner_of(network, by_size(sizes), POLICY)
    for _ in range(5):
        runner.run(torch.zeros(4, 1))
    assert network.ran == [4, 1, 1, 1] * 5
    assert runner.drift == 1.0


def test_drift_is_seen_in_a_reduced_batch_whose_size_was_profiled() -> None:
    network = Timed(FakeClock(), [0] * 7 + [3])
    costs = by_size([1, 8])
    slow = dataclasses.replace(
        costs, batches={8: costs.batches[8], 1: batch_costs([0.25] * 4, [0.0] * 4)}
    )
    runner = runner_of(network, slow, POLICY)
    runner.run(torch.zeros(8, 1))
    assert runner.drift > 1.1


@pytest.mark.parametrize("batch", [2, 3])
def test_a_size_that_was_not_profiled_is_planned_with_the_next_larger_one(batch: int) -> None:
    clock = FakeClock()
    runner = runner_of(Timed(clock, [3] * batch), by_size([1, 4]))
    answer = runner.run(torch.zeros(batch, 1), deadline=Deadline(batch + 4.0 + RESERVE_S))
    # 4 s are planned for a stage that takes fewer
    assert answer.exit == 1
    answer = runner.run(
        torch.zeros(batch, 1), deadline=Deadline(clock.now() + batch + 3.9 + RESERVE_S)
    )
    assert answer.exit == 0
    assert runner.drift == 1.0
