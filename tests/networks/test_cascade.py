"""Cascades: who runs what, in which order, and what is answered."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fakes import costs_of
from impatient.clock import Deadline, FakeClock
from impatient.errors import ClassCountMismatch, ExitNotReached, NetworkError
from impatient.evaluation import record
from impatient.networks.cascade import Cascade, Router
from impatient.runtime import Runner, profile
from impatient.runtime.runner import RESERVE_S
from impatient.training.data import load_data

STOP = -1


class Table(Router):
    """A router with a table of the next network of each sample."""

    def __init__(self, moves: Mapping[int, Sequence[int]]) -> None:
        self.moves = moves

    def sees(self, node: int) -> tuple[int, ...]:
        return (node,)

    def next_node(
        self, node: int, outputs: Mapping[int, Tensor], pooled: Tensor | None = None
    ) -> Tensor:
        return torch.tensor([self.moves[node][int(sample)] for sample in outputs[node][:, 1]])


class RecordingNetwork:
    """A network that records its samples and takes time.

    Its output has its own number and those of the samples.
    """

    def __init__(self, number: int, clock: FakeClock | None = None, seconds: float = 0.0) -> None:
        self.number, self.clock, self.seconds, self.came = number, clock, seconds, []  # type: ignore[var-annotated]

    def __call__(self, x: Tensor) -> Tensor:
        self.came.append(x[:, 0].int().tolist())
        if self.clock:
            self.clock.advance(self.seconds)
        return torch.stack([torch.full((len(x),), float(self.number)), x[:, 0]], 1)


def samples(count: int) -> Tensor:
    return torch.arange(float(count))[:, None]


def alone(moves: Mapping[int, Sequence[int]], sample: int) -> list[int]:
    """The networks that one sample runs."""
    path = [0]
    while moves[path[-1]][sample] != STOP:
        path.append(moves[path[-1]][sample])
    return path


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, dict[int, list[int]]]:
    nodes = draw(st.integers(1, 5))
    count = draw(st.integers(1, 6))
    return count, {
        node: draw(
            st.lists(
                st.sampled_from([STOP, *range(node + 1, nodes)]), min_size=count, max_size=count
            )
        )
        for node in range(nodes)
    }


@settings(max_examples=60, deadline=None)
@given(table=tables())
def test_every_sample_runs_its_own_way_and_nothing_else(
    table: tuple[int, dict[int, list[int]]],
) -> None:
    count, moves = table
    networks = [RecordingNetwork(number) for number in moves]
    with Cascade(networks, router=Table(moves)).exits(samples(count)) as run:
        exits = list(run)
    paths = [alone(moves, sample) for sample in range(count)]
    assert [[*itertools.chain(*network.came)] for network in networks] == [
        [sample for sample in range(count) if number in paths[sample]]
        # in their old order
        for number in moves
    ]
    # in one batch, whatever way they came
    assert all(len(network.came) <= 1 for network in networks)
    for exit in exits:
        reached = [max(node for node in path if node <= exit.index) for path in paths]
        assert exit.exits == tuple(reached)
        assert exit.output().tolist() == [
            [float(node), float(sample)] for sample, node in enumerate(reached)
        ]
    going = [exit.index for exit in exits]
    assert [exit.upcoming for exit in exits] == [*going[1:], None]
    assert [exit.whole for exit in exits] == [all(node in path for path in paths) for node in going]


def test_without_a_router_all_run_everything() -> None:
    networks = [RecordingNetwork(0), RecordingNetwork(1)]
    cascade = Cascade(networks, ["small", "large"])
    with cascade.exits(samples(3)) as run:
        assert [(exit.index, exit.exits, exit.upcoming) for exit in run] == [
            (0, (0, 0, 0), 1),
            (1, (1, 1, 1), None),
        ]
    assert [output[:, 0].tolist() for output in cascade(samples(3))] == [[0.0] * 3, [1.0] * 3]
    assert cascade.exit_names == ("small", "large")


def test_nothing_runs_before_it_is_asked_for_or_after_the_end() -> None:
    networks = [RecordingNetwork(0), RecordingNetwork(1)]
    run = Cascade(networks).exits(samples(1))
    assert networks[0].came == []
    next(run)
    assert networks[1].came == []
    run.close()
    assert list(run) == []
    assert networks[1].came == []


def test_answers_that_were_given_stay_as_they_were() -> None:
    with Cascade(
        [RecordingNetwork(0), RecordingNetwork(1)], router=Table({0: [1, STOP], 1: [STOP, STOP]})
    ).exits(samples(2)) as run:
        first = next(run).output()
        kept = first.clone()
        next(run)
    assert torch.equal(first, kept)


def test_inputs_may_be_mappings_and_tuples() -> None:
    def network(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return torch.cat([a, b], 1) * scale

    router = Table({0: [1, STOP], 1: [STOP, STOP]})
    x = {"a": torch.zeros(2, 1), "b": samples(2), "scale": torch.tensor(1.0)}
    for given_x in (x, tuple(x.values())):
        with Cascade([network, network], router=router).exits(given_x) as run:
            assert [exit.exits for exit in run] == [(0, 0), (1, 0)]


def test_a_router_that_goes_back_is_refused() -> None:
    for target in (0, 1, 3):
        with (
            pytest.raises(
                NetworkError,
                match=f"from network 1 to {target}; expected a larger number, at most 2",
            ),
            Cascade(
                [RecordingNetwork(0), RecordingNetwork(1), RecordingNetwork(2)],
                router=Table({0: [1], 1: [target]}),
            ).exits(samples(1)) as run,
        ):
            list(run)


def test_networks_of_other_classes_are_refused() -> None:
    with (
        pytest.raises(ClassCountMismatch, match=r"network 1 gives \(3,\), those before it \(2,\)"),
        Cascade([nn.Linear(1, 2), nn.Linear(1, 3)]).exits(samples(1)) as run,
    ):
        list(run)


def test_senseless_cascades_are_refused() -> None:
    with pytest.raises(NetworkError, match="no networks"):
        Cascade([])
    with pytest.raises(NetworkError, match="one for each, all different"):
        Cascade([RecordingNetwork(0), RecordingNetwork(1)], ["a", "a"])


# --- as an anytime network ------------------------------------------------------------------------


def runner(
    networks: Sequence[RecordingNetwork],
    moves: Mapping[int, Sequence[int]],
    clock: FakeClock,
    batch: int,
) -> Runner:
    costs = costs_of([network.seconds for network in networks], sizes=[batch])
    names = [f"exit {number}" for number in range(len(networks))]
    return Runner(
        Cascade(networks, names, router=Table(moves)), costs, any_profile=True, clock=clock
    )


def test_a_contract_run_pays_only_the_networks_on_the_way_and_plans_for_the_next_one() -> None:
    clock = FakeClock()
    networks = [
        RecordingNetwork(number, clock, seconds) for number, seconds in enumerate((1.0, 2.0, 8.0))
    ]
    moves = {0: [2, 1], 1: [STOP, STOP], 2: [STOP, STOP]}
    run = runner(networks, moves, clock, 1)
    # 1 + 8, without network 1
    whole = run.run(samples(1), deadline=Deadline(clock.now() + 9.0 + RESERVE_S))
    assert (whole.exit, whole.stopped_by, whole.elapsed_s, whole.deadline_met) == (
        2,
        "final",
        9.0,
        True,
    )
    # network 1 would fit, but is not on the way
    short = run.run(samples(1), deadline=Deadline(clock.now() + 8.0))
    assert (short.exit, short.stopped_by, short.elapsed_s) == (0, "deadline", 1.0)
    other = run.run(samples(2)[1:], deadline=Deadline(clock.now() + 9.0))
    assert (other.exit, other.exits, other.stopped_by, other.elapsed_s) == (1, (1,), "policy", 3.0)


def test_each_sample_of_a_batch_is_answered_by_the_end_of_its_way() -> None:
    clock = FakeClock()
    networks = [RecordingNetwork(number, clock, 1.0) for number in range(3)]
    run = runner(networks, {0: [STOP, 1, 2, 1], 1: [STOP] * 4, 2: [STOP] * 4}, clock, 4)
    answer = run.run(samples(4))
    assert answer.exits == (0, 1, 2, 1)
    assert answer.output[:, 0].tolist() == [0.0, 1.0, 2.0, 1.0]
    assert networks[2].came == [[2]]


def test_interruptible_runs_post_every_answer_and_end_with_the_way() -> None:
    clock = FakeClock()
    networks = [RecordingNetwork(number, clock, 1.0) for number in range(3)]
    with (
        runner(networks, {0: [1], 1: [STOP], 2: [STOP]}, clock, 1) as own,
        own.start(samples(1)) as run,
    ):
        answer = run.result()
    assert (answer.exit, answer.stopped_by, networks[2].came) == (1, "policy", [])


def test_part_of_a_batch_says_nothing_about_drift() -> None:
    clock = FakeClock()
    networks = [RecordingNetwork(0, clock, 1.0), RecordingNetwork(1, clock, 1.0)]
    run = runner(networks, {0: [STOP, 1], 1: [STOP, STOP]}, clock, 2)
    networks[1].seconds = 10.0
    run.run(samples(2))
    assert run.drift == 1.0


class Small(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, hidden)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x.flatten(1)).relu())


def test_it_is_profiled_recorded_and_described_like_any_other() -> None:
    data = load_data("digits")
    cascade = Cascade([Small(4), Small(16)], ["small", "large"]).eval()
    costs = profile(cascade, data.example(), repeats=20)
    assert costs.stage_macs == (64 * 4 + 40, 64 * 16 + 160)
    # who wants no cascade runs the last network
    assert costs.exit_free_macs == costs.stage_macs[1]
    recording = record(cascade, data, split="test", features=True)
    assert [tuple(features.shape[1:]) for features in recording.features] == [(4,), (16,)]
    x, _ = next(data.batches("test", 8))
    with torch.inference_mode():
        assert torch.allclose(recording.outputs[1, :8], cascade.networks[1](x))
    assert "large" in cascade.describe(data.example())
    routed = cascade.routed(Table({0: [STOP] * 9}))
    assert not routed.training
    with pytest.raises(ExitNotReached, match="1 of 2 exits"):
        profile(cascade.routed(Always(STOP)), data.example(), repeats=20)
    answer = Runner(cascade.routed(Always(1)), costs).run(
        data.example(), deadline=Deadline.after(math.inf)
    )
    assert (answer.exit, answer.stopped_by) == (1, "final")
    assert routed.networks[0] is cascade.networks[0]


class Always(Router):
    def __init__(self, move: int) -> None:
        self.move = move

    def sees(self, node: int) -> tuple[int, ...]:
        return ()

    def next_node(
        self, node: int, outputs: Mapping[int, Tensor], pooled: Tensor | None = None
    ) -> Tensor:
        return torch.full((len(outputs[node]),), self.move if node == 0 else STOP)


def test_networks_without_a_linear_layer_have_no_features() -> None:
    data = load_data("digits")
    networks: list[Any] = [nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())]
    with pytest.raises(NetworkError, match="no linear layer"):
        record(Cascade(networks), data, split="test", features=True)
