"""Networks and runners in other processes, threads and event loops, and numbers of other kinds."""

import asyncio
import copy
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import impatient
from forks import in_children
from impatient import Deadline, Runner
from impatient.costs import CostProfile
from impatient.errors import NetworkError, RunError
from impatient.networks import MultiExitNetwork, attach_exits
from impatient.policies.rules import ThresholdPolicy
from impatient.tasks.named import READY, named

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")

X = torch.linspace(-1, 1, 16).reshape(2, 8)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(x))


@pytest.fixture(scope="module")
def network() -> MultiExitNetwork:
    torch.manual_seed(0)
    return attach_exits(Backbone(), after=["block"], example=X).eval()


@pytest.fixture(scope="module")
def costs(network: MultiExitNetwork) -> CostProfile:
    return impatient.profile(network, X, batch_sizes=(1, 2), repeats=5, warm_up=1)


# --- other processes ------------------------------------------------------------------------------


def answer_elsewhere(
    network: MultiExitNetwork,
    costs: CostProfile,
    x: Tensor,
    answers: "multiprocessing.Queue[bytes]",
) -> None:
    torch.set_num_threads(1)
    with Runner(network, costs, any_profile=True) as runner:
        outputs = [runner.run(x).output, runner.start(x).result().output]
    answers.put(pickle.dumps([output.numpy() for output in outputs]))


def test_a_network_goes_to_a_spawned_process(network: MultiExitNetwork, costs: CostProfile) -> None:
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    process = spawn.Process(target=answer_elsewhere, args=(network, costs, X, answers))
    process.start()
    given = pickle.loads(answers.get(timeout=240))
    process.join()
    with torch.no_grad():
        wanted = network(X)[-1].numpy()
    assert process.exitcode == 0
    assert len(given) == 2
    for output in given:
        np.testing.assert_allclose(output, wanted, rtol=1e-5)


def test_workers_forked_from_a_process_that_has_answered_answer_too(
    network: MultiExitNetwork, costs: CostProfile
) -> None:
    """As servers that load everything before they fork their workers."""
    with Runner(network, costs) as runner:
        wanted = runner.start(X).result().output

        def serve() -> bool:
            answers = [
                runner.start(X, deadline=Deadline.after(30.0)).result(),
                runner.run(X),
                runner.start(X).interrupt(),
            ]
            return all(torch.equal(answer.output, wanted) for answer in answers[:2])

        assert in_children(3, serve) == [0, 0, 0]
        assert torch.equal(runner.start(X).result().output, wanted)


@pytest.mark.parametrize("name", READY)
def test_ready_made_tasks_are_pickled_by_their_names(name: str) -> None:
    task = named(name)
    assert pickle.loads(pickle.dumps(task)) is task
    assert copy.deepcopy(task) is task


def test_options_of_a_task_go_along() -> None:
    task = named("classification:top=5")
    assert pickle.loads(pickle.dumps(task)) is task


def test_a_runner_stays_in_its_process(network: MultiExitNetwork, costs: CostProfile) -> None:
    runner = Runner(network, costs)
    for send in (pickle.dumps, copy.deepcopy):
        with pytest.raises(RunError, match="Send the network and its cost profile"):
            send(runner)


def test_pictures_that_were_read_before_a_fork_are_read_after_it(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for shade, label in enumerate(("dark", "light")):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8), (100 * shade + number,) * 3).save(folder / f"{number}.png")
    data = impatient.load_data(f"imagefolder:{tmp_path}:size=8", validation=0.25)
    wanted = data.examples("test").take(range(8))
    assert in_children(2, lambda: torch.equal(data.examples("test").take(range(8)), wanted)) == [
        0,
        0,
    ]
    sent = pickle.loads(pickle.dumps(data.examples("test")))
    assert torch.equal(sent.take(range(8)), wanted)


# --- event loops and threads ----------------------------------------------------------------------


def test_many_callers_of_an_event_loop_get_their_own_answers(
    network: MultiExitNetwork, costs: CostProfile
) -> None:
    inputs = [X * factor for factor in range(1, 9)]

    async def one(runner: Runner, number: int) -> Tensor:
        if number % 2:
            return (await asyncio.to_thread(runner.run, inputs[number])).output
        run = runner.start(inputs[number])
        return (await asyncio.to_thread(run.result)).output

    async def all_of_them(runner: Runner) -> list[Tensor]:
        return await asyncio.gather(*(one(runner, number) for number in range(8)))

    with Runner(network, costs) as runner, torch.inference_mode():
        given = asyncio.run(all_of_them(runner))
        for x, output in zip(inputs, given, strict=True):
            assert torch.equal(output, network(x)[-1])


def test_a_caller_that_is_cancelled_leaves_the_runner_as_it_was(
    network: MultiExitNetwork, costs: CostProfile
) -> None:
    async def cancelled(runner: Runner) -> None:
        tasks = [asyncio.create_task(asyncio.to_thread(runner.run, X)) for _ in range(8)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    with Runner(network, costs) as runner:
        wanted = runner.run(X).output
        asyncio.run(cancelled(runner))
        assert torch.equal(runner.run(X).output, wanted)


def test_threads_share_a_runner(network: MultiExitNetwork, costs: CostProfile) -> None:
    right: list[bool] = []

    def ask(runner: Runner, number: int) -> None:
        x = X + number
        with torch.inference_mode():
            wanted = network(x)[-1]
        for _ in range(20):
            right.append(torch.equal(runner.run(x).output, wanted))
            right.append(torch.equal(runner.start(x).result().output, wanted))

    with Runner(network, costs) as runner:
        threads = [threading.Thread(target=ask, args=(runner, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert right == [True] * 160


# --- numbers --------------------------------------------------------------------------------------


def test_a_network_in_bfloat16_runs_and_recordings_hold_its_answers() -> None:
    torch.manual_seed(0)
    network = attach_exits(Backbone(), after=["block"], example=X).eval().bfloat16()
    x = X.bfloat16()
    costs = impatient.profile(network, x, batch_sizes=(1, 2), repeats=5, warm_up=1)
    policy = ThresholdPolicy(score="max_probability", thresholds=(0.99, -np.inf))
    with Runner(network, costs, policy) as runner, torch.inference_mode():
        answer = runner.run(x)
        assert answer.exits == (1, 1)
        assert torch.equal(answer.output, network(x)[-1])
        assert answer.output.dtype == torch.bfloat16


def test_answers_of_nan_never_look_sure(network: MultiExitNetwork, costs: CostProfile) -> None:
    policy = ThresholdPolicy(score="max_probability", thresholds=(0.1, -np.inf))
    x = X.clone()
    x[0] = float("nan")
    with Runner(network, costs, policy) as runner:
        assert runner.run(x[1:]).exits == (0,)
        assert runner.run(x).exits == (1, 0)
        # alone, where another way decides
        assert runner.run(x[:1]).exits == (1,)


def test_numpy_arrays_are_no_inputs_of_torch(network: MultiExitNetwork, costs: CostProfile) -> None:
    with Runner(network, costs) as runner, pytest.raises(NetworkError, match="expected a tensor"):
        runner.run(X.numpy())


@pytest.mark.parametrize(
    "ask", [lambda runner, x: runner.run(x), lambda runner, x: runner.start(x).result()]
)
def test_an_error_of_the_model_is_raised_and_the_next_run_is_right(
    network: MultiExitNetwork, costs: CostProfile, ask: Callable[[Runner, Tensor], object]
) -> None:
    with Runner(network, costs) as runner:
        wanted = runner.run(X).output
        for _ in range(3):
            with pytest.raises(RuntimeError, match="dtype"):
                ask(runner, X.double())
        assert torch.equal(runner.run(X).output, wanted)
        assert torch.equal(runner.start(X).result().output, wanted)
