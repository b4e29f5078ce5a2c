"""Running ahead on a simulated device that computes later than it is told to; on a real one where
there is one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blocks import NETWORK, x_of
from fakes import costs_of
from impatient.anytime import Exit, Network, Run
from impatient.clock import NEVER, Deadline, FakeClock
from impatient.errors import NetworkError, NoAnswerInTime, RunError
from impatient.experimental.gpu import Fetched, GpuRunner
from impatient.experimental.graphs import Recorded, cuda_graphs
from impatient.networks import attach_exits, load_model
from impatient.networks.cascade import Cascade
from impatient.policies import ThresholdPolicy
from impatient.runtime import Runner, profile
from impatient.runtime.runner import RESERVE_S

# between two looks at an event
LOOK_S = 1e-6
STAGES = (1.0, 2.0, 3.0, 4.0)
HEADS = (0.1, 0.2, 0.3, 0.0)


class Device:
    """Does what it is given in order, later; what it copies is NaN until it has arrived."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.free = 0.0
        self.given: list[str] = []

    def give(self, what: str, seconds: float) -> None:
        self.given.append(what)
        self.free = max(self.free, self.clock.now()) + seconds

    def begin(self) -> None:
        self.given.clear()

    def fetch(self, tensors: Sequence[Tensor]) -> Fetched:
        due = self.free
        truth = [tensor.clone() for tensor in tensors]
        values = tuple(torch.full_like(tensor, torch.nan) for tensor in tensors)

        def arrived() -> bool:
            if self.clock.now() < due:
                return False
            for value, known in zip(values, truth, strict=True):
                value.copy_(known)
            return True

        return Fetched(values, arrived)

    def pause(self) -> None:
        # to the next event, or by a moment
        self.clock.advance(max(LOOK_S, 0.01))


class OnDevice(Network):
    """The exits of a real network, whose stages and heads take scripted times on the device and
    none on the host.
    """

    num_exits = 4

    def __init__(self, device: Device, stages_s: Sequence[float] = STAGES) -> None:
        super().__init__()
        self.device = device
        self.stages_s = stages_s

    def exits(self, x: Any, *, keep: bool = False) -> Run:
        return DeviceRun(self, NETWORK.exits(x))

    def shrinks(self, x: Any) -> bool:
        return True


class DeviceRun(Run):
    def __init__(self, network: OnDevice, run: Run) -> None:
        self._network = network
        self._run = run

    def __next__(self) -> Exit:
        exit = next(self._run)
        device = self._network.device
        device.give(f"stage {exit.index}", self._network.stages_s[exit.index])

        def head(_: Any) -> Tensor:
            device.give(f"head {exit.index}", HEADS[exit.index])
            return exit.output()

        return Exit(exit.index, exit.features, head)

    def keep(self, rows: Tensor) -> None:
        self._run.keep(rows)

    def close(self) -> None:
        self._run.close()


def gpu_runner(
    policy: Any = None, stages_s: Sequence[float] = STAGES, **options: Any
) -> tuple[GpuRunner, Device]:
    device = Device(FakeClock())
    runner = GpuRunner(
        OnDevice(device, stages_s),
        costs_of(STAGES, HEADS, sizes=(1, 8)),
        policy,
        queue=device,
        clock=device.clock,
        any_profile=True,
        **options,
    )
    return runner, device


def truth(x: Tensor) -> list[Tensor]:
    with torch.inference_mode(), NETWORK.exits(x) as run:
        return [exit.output().clone() for exit in run]


def stop_at(exit: int) -> ThresholdPolicy:
    """Everybody stops at this exit."""
    return ThresholdPolicy(
        score="margin", thresholds=(*(float("inf"),) * exit, *(-float("inf"),) * (4 - exit))
    )


def test_without_a_deadline_the_last_exit_answers_and_the_device_never_idles() -> None:
    runner, _ = gpu_runner()
    answer = runner.run(x_of(2))
    assert (answer.exit, answer.stopped_by, answer.deadline_met) == (3, "final", True)
    assert torch.equal(answer.output, truth(x_of(2))[3])
    assert answer.elapsed_s == pytest.approx(sum(STAGES) + sum(HEADS), abs=0.02)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_no_more_than_so_many_stages_are_given_ahead(ahead: int) -> None:
    runner, device = gpu_runner(stop_at(1), ahead=ahead)
    answer = runner.run(x_of(3))
    stages = [what for what in device.given if what.startswith("stage")]
    assert (answer.exit, answer.stopped_by) == (1, "policy")
    assert len(stages) == min(4, 2 + ahead)


def test_a_policys_stop_does_not_wait_for_the_stage_given_ahead() -> None:
    runner, _ = gpu_runner(stop_at(1))
    answer = runner.run(x_of(3))
    assert answer.elapsed_s == pytest.approx(sum(STAGES[:2]) + sum(HEADS[:2]), abs=0.02)
    assert torch.equal(answer.output, truth(x_of(3))[1])


@settings(deadline=None, max_examples=50)
@given(st.floats(1.2, 12.0), st.integers(0, 2))
def test_with_exact_costs_every_deadline_is_met_by_the_deepest_exit_that_fits(
    seconds: float, ahead: int
) -> None:
    # the heads of all exits run
    due = [sum(STAGES[: k + 1]) + sum(HEADS[: k + 1]) + RESERVE_S for k in range(4)]
    # looking at this clock takes 0.01
    assume(all(abs(instant - seconds) > 0.02 for instant in due))
    runner, device = gpu_runner(ahead=ahead)
    answer = runner.run(x_of(1), deadline=Deadline(device.clock.now() + seconds))
    assert answer.deadline_met
    assert answer.exit == max(k for k in range(4) if due[k] <= seconds)
    assert torch.equal(answer.output, truth(x_of(1))[answer.exit])


def test_at_the_deadline_the_latest_answer_that_has_arrived_is_given() -> None:
    # the third stage overruns
    runner, device = gpu_runner(stages_s=(1.0, 2.0, 30.0, 4.0))
    answer = runner.run(x_of(2), deadline=Deadline(device.clock.now() + 7.0))
    assert (answer.exit, answer.stopped_by) == (1, "deadline")
    assert answer.deadline_met or answer.elapsed_s == pytest.approx(7.0, abs=0.02)
    assert torch.equal(answer.output, truth(x_of(2))[1])


def test_what_overran_makes_the_next_runs_careful() -> None:
    runner, device = gpu_runner(stages_s=tuple(3.0 * stage for stage in STAGES))
    for _ in range(3):
        runner.run(x_of(1))
    assert runner.drift == pytest.approx(3.0, rel=0.15)
    answer = runner.run(x_of(1), deadline=Deadline(device.clock.now() + 10.5))
    assert (answer.exit, answer.deadline_met) == (1, True)


def test_when_not_even_the_first_exit_fits() -> None:
    runner, device = gpu_runner()
    late = runner.run(x_of(1), deadline=Deadline(device.clock.now() + 0.5))
    assert (late.exit, late.deadline_met) == (0, False)
    strict, device = gpu_runner(when_late="raise")
    with pytest.raises(NoAnswerInTime, match="first exit needs"):
        strict.run(x_of(1), deadline=Deadline(device.clock.now() + 0.5))


bounds = st.tuples(*[st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, float("inf")])] * 3)


@settings(deadline=None, max_examples=60)
@given(
    bounds,
    st.integers(1, 8),
    st.integers(0, 9),
    st.integers(0, 2),
    st.sampled_from(["never", "always", "auto"]),
)
def test_every_sample_gets_what_the_waiting_runner_gives_it(
    thresholds: Any, batch: int, seed: int, ahead: int, compaction: Any
) -> None:
    policy = ThresholdPolicy(score="margin", thresholds=(*thresholds, -float("inf")))
    x = x_of(batch, seed)
    runner, _ = gpu_runner(policy, ahead=ahead, compaction=compaction)
    found = runner.run(x)
    plain = Runner(
        NETWORK, costs_of(STAGES, HEADS, sizes=(1, 8)), policy, any_profile=True, compaction="never"
    ).run(x)
    assert found.exits == plain.exits
    torch.testing.assert_close(found.output, plain.output)


def test_finished_samples_are_taken_out_of_what_is_given_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = x_of(8)
    scores = torch.stack(
        [output.softmax(-1).topk(2).values.diff().abs()[:, 0] for output in truth(x)]
    )
    bound = float(scores[0].median())
    assert 0 < int((scores[0] >= bound).sum()) < 8
    policy = ThresholdPolicy(
        score="margin", thresholds=(bound, float("inf"), float("inf"), -float("inf"))
    )
    NETWORK.backbone.rows.clear()
    runner, _ = gpu_runner(policy, ahead=1, compaction="always")
    runner.run(x)
    left = int((scores[0] < bound).sum())
    # the second stage was given before the decision
    assert NETWORK.backbone.rows == [
        8,
        8,
        left,
        left,
    ]


def test_a_network_in_training_mode_is_refused() -> None:
    runner, device = gpu_runner()
    runner.network.add_module("dropout", nn.Dropout())
    with pytest.raises(RunError, match=r"training mode.*network\.eval\(\)"):
        runner.run(x_of(1))
    assert device.given == []
    runner.network.eval()
    assert runner.run(x_of(1)).exit == 3


def test_limits_hold() -> None:
    runner, _ = gpu_runner()
    costs = runner.costs
    most = costs.parts("macs")
    # these fakes have none: every exit is allowed
    assert sum(map(sum, most)) == 0
    assert runner.run(x_of(1), deadline=NEVER, limits={"macs": 1.0}).exit == 3


def test_impossible_options_are_refused() -> None:
    with pytest.raises(RunError, match="ahead=-1"):
        gpu_runner(ahead=-1)
    cascade = Cascade([torch.nn.Linear(2, 2)])
    cascade.router = object()  # type: ignore[assignment]
    with pytest.raises(RunError, match="Runner"):
        GpuRunner(cascade, costs_of([1.0]), any_profile=True)


# --- recordings -----------------------------------------------------------------------------------


def rerun(part: Any, inputs: Sequence[Tensor]) -> Recorded:
    """What a CUDA graph does, on a CPU: the same memory is read and written at every replay."""
    static = tuple(tensor.clone() for tensor in inputs)
    first = part(*static)
    outputs = (
        (first.clone(),) if isinstance(first, Tensor) else tuple(tensor.clone() for tensor in first)
    )

    def replay() -> None:
        again = part(*static)
        for output, value in zip(
            outputs, (again,) if isinstance(again, Tensor) else again, strict=True
        ):
            output.copy_(value)

    return Recorded(static, outputs, replay)


@pytest.fixture
def graphed(toy: torch.nn.Module) -> Callable[[tuple[int, ...]], tuple[Any, Any]]:
    """A network, and the same in recordings for these numbers of rows."""

    def make(buckets: tuple[int, ...]) -> tuple[Any, Any]:
        network = attach_exits(
            toy, after=["blocks.0", "blocks.2"], example=torch.zeros(1, 8)
        ).eval()
        x = torch.randn(2, 8)
        return network, cuda_graphs(network, example=x, buckets=buckets, record=rerun)

    return make


def test_graphs_per_bucket_compute_what_the_network_does(graphed: Any, toy: Any) -> None:
    network, graphs = graphed((2, 4, 8))
    x = torch.randn(8, 8)
    for rows in (1, 3, 8, 2):
        known = [output.detach() for output in network(x[:rows])]
        with graphs.exits(x[:rows]) as run:
            for exit, output in zip(run, known, strict=True):
                torch.testing.assert_close(exit.output().clone(), output)
        torch.testing.assert_close(graphs.backbone(x[:rows]), known[-1])
    # fewer rows from the second stage on
    with graphs.exits(x) as run:
        next(run)
        run.keep(torch.tensor([5, 0, 7]))
        torch.testing.assert_close(next(run).output().clone(), network(x)[1].detach()[[5, 0, 7]])


def test_graphs_refuse_what_they_have_no_bucket_for(graphed: Any) -> None:
    with pytest.raises(NetworkError, match="increasing"):
        graphed((4, 2))
    _, graphs = graphed((1, 4))
    with (
        graphs.exits(torch.randn(5, 8)) as run,
        pytest.raises(NetworkError, match="largest bucket, 4"),
    ):
        next(run)


# --- on a real device -----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [False, True])
def test_on_a_gpu_answers_are_those_of_the_waiting_runner(graphs: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 32, 32, device="cuda")
    network: Any = attach_exits(
        load_model("impatient:resnet:n=2,c=8").cuda().eval(), example=x[:1], count=4
    ).eval()
    if graphs:
        network = cuda_graphs(network, example=x[:2])
    costs = profile(network, x, batch_sizes=(1, 2, 4, 8), repeats=30)
    scores = ThresholdPolicy(score="max_probability", thresholds=(0.12, 0.12, 0.12, -float("inf")))
    for policy in (None, scores):
        plain = Runner(network, costs, policy).run(x)
        for ahead in (0, 1, 2):
            answer = GpuRunner(network, costs, policy, ahead=ahead).run(x)
            assert answer.exits == plain.exits
            torch.testing.assert_close(answer.output, plain.output.cpu())
    first = GpuRunner(network, costs).run(
        x, deadline=Deadline.after(costs.contract_s(batch_size=8)[0] * 0.5)
    )
    assert first.exit == 0
