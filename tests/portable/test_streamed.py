"""One session of all exits, read while it runs."""

import gc
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from impatient import Deadline
from impatient.engines import ENGINES, EngineNetwork, export, load_engine
from impatient.engines.network import PRECISIONS, engine_and_precision, engine_label
from impatient.errors import ExportFailed, RunError
from impatient.networks import MultiExitNetwork, attach_exits
from impatient.policies import ThresholdPolicy
from impatient.portable import SESSIONS, Cancelled, Streamed, Wiring
from impatient.portable.streamed import StreamedRun, unwritten
from impatient.runtime import Runner, profile

pytestmark = pytest.mark.engine

ROWS = 2
CLASSES = 3
EXITS = 3
WAIT_S = 10.0


class Flight:
    """A session's computing, as far as a test lets it come."""

    def __init__(self, outputs: Sequence[Any]) -> None:
        self.outputs = outputs
        self.is_over = self.is_cancelled = False
        self.error: Exception | None = None

    def post(self, index: int, value: float) -> None:
        self.outputs[index][...] = value

    def ended(self) -> bool:
        if self.is_cancelled:
            raise Cancelled("cancelled")
        if self.error is not None:
            raise self.error
        return self.is_over

    def cancel(self) -> None:
        self.is_cancelled = True


class Session:
    def __init__(self) -> None:
        self.flights: list[Flight] = []
        self.is_busy = False
        self.begun = threading.Event()

    def memory(self, rows: int) -> list[Any]:
        return [unwritten(rows, CLASSES + 1, np.float32) for _ in range(EXITS)]

    def busy(self) -> bool:
        return self.is_busy

    def begin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Flight:
        self.flights.append(Flight(outputs))
        self.begun.set()
        return self.flights[-1]

    def flight(self) -> Flight:
        """The latest, once it has begun."""
        assert self.begun.wait(WAIT_S)
        return self.flights[-1]


class Asking:
    """A thread that asks a run for its next exit."""

    def __init__(self, run: StreamedRun) -> None:
        self.exit: Any = None
        self.error: BaseException | None = None
        self._run = run
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            self.exit = next(self._run)
        except BaseException as error:
            self.error = error

    def join(self) -> Any:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.exit

    @property
    def waits(self) -> bool:
        self._thread.join(0.005)
        return self._thread.is_alive()


WIRING = Wiring(inputs=("x",), takes=(), gives=(), features=("a", "b", "c"), batch_dims={"x": 0})


@pytest.fixture
def session() -> Session:
    return Session()


@pytest.fixture
def run(session: Session) -> StreamedRun:
    run = Streamed(WIRING, session)([np.zeros((ROWS, 5), np.float32)])
    assert isinstance(run, StreamedRun)
    return run


def test_an_exit_comes_when_all_of_its_output_is_there_and_not_before(
    run: StreamedRun, session: Session
) -> None:
    asking = Asking(run)
    flight = session.flight()
    assert asking.waits
    flight.outputs[0][0] = 1.0
    flight.outputs[0][1, :CLASSES] = 1.0
    assert asking.waits
    flight.post(0, 1.0)
    exit = asking.join()
    assert (exit.index, exit.features, exit.output().shape) == (0, None, (ROWS, CLASSES))


def test_what_the_session_has_done_ahead_is_there_at_once(
    run: StreamedRun, session: Session
) -> None:
    asking = Asking(run)
    for index in range(EXITS):
        session.flight().post(index, float(index))
    asking.join()
    exits = list(run)
    assert [exit.output()[0, 0] for exit in exits] == [1.0, 2.0]
    assert exits[-1].features is exits[-1].output()
    assert len(session.flights) == 1


def test_not_a_number_is_an_answer_like_others(run: StreamedRun, session: Session) -> None:
    asking = Asking(run)
    session.flight().post(0, math.nan)
    assert np.isnan(asking.join().output()).all()


def test_a_session_that_ends_without_an_output_is_not_waited_for(
    run: StreamedRun, session: Session
) -> None:
    asking = Asking(run)
    session.flight().is_over = True
    asking.join()
    assert len(list(run)) == EXITS - 1
    assert len(session.flights) == 1


def test_an_exit_says_whether_its_time_was_its_own(run: StreamedRun, session: Session) -> None:
    session.is_busy = True
    asking = Asking(run)
    for index in range(EXITS):
        session.flight().post(index, 1.0)
    assert not asking.join().whole
    assert all(exit.whole for exit in run)


def test_a_run_that_is_cancelled_as_it_waits_raises_and_may_begin_again(
    run: StreamedRun, session: Session
) -> None:
    asking = Asking(run)
    session.flight()
    assert asking.waits
    run.cancel()
    with pytest.raises(Cancelled):
        asking.join()
    session.begun.clear()
    again = Asking(run)
    session.flight()
    assert again.waits
    assert len(session.flights) == 2
    session.flights[1].post(0, 5.0)
    assert again.join().output()[0, 0] == 5.0


def test_cancelling_what_nobody_waits_for_ends_nothing(run: StreamedRun, session: Session) -> None:
    run.cancel()
    asking = Asking(run)
    session.flight().post(0, 1.0)
    asking.join()
    run.cancel()
    assert not session.flights[0].is_cancelled


def test_a_run_that_nobody_holds_ends_its_session(session: Session) -> None:
    run = Streamed(WIRING, session)([np.zeros((ROWS, 5), np.float32)])
    asking = Asking(run)
    session.flight().post(0, 1.0)
    asking.join()
    del run, asking
    gc.collect()
    assert session.flight().is_cancelled


def test_leaving_a_run_ends_its_session(run: StreamedRun, session: Session) -> None:
    with run:
        asking = Asking(run)
        session.flight().post(0, 1.0)
        asking.join()
        assert not session.flights[0].is_cancelled
    assert session.flights[0].is_cancelled
    assert next(run, None) is None


def test_what_goes_wrong_in_the_session_is_raised(run: StreamedRun, session: Session) -> None:
    asking = Asking(run)
    session.flight().error = ValueError("broken")
    with pytest.raises(ValueError, match="broken"):
        asking.join()


def test_samples_that_are_kept_are_those_given(run: StreamedRun, session: Session) -> None:
    asking = Asking(run)
    for index in range(EXITS):
        session.flight().outputs[index][...] = np.array([[1.0], [2.0]])
    asking.join()
    run.keep(np.array([1, 0]))
    np.testing.assert_array_equal(next(run).output()[:, 0], [2.0, 1.0])
    run.keep(np.array([0]))
    np.testing.assert_array_equal(next(run).output()[:, 0], [2.0])


# --- in the engines -------------------------------------------------------------------------------

WIDTH = 256
DEPTH = 24


class Tower(nn.Module):
    """Many layers that take long enough to be watched."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH))
        )
        self.classifier = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(x))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def tower() -> MultiExitNetwork:
    torch.manual_seed(3)
    network = attach_exits(
        Tower(), example=inputs(1), after=[f"blocks.{block}" for block in (1, 7, 15)]
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2.0)
    return network


def inputs(rows: int) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows))


@pytest.fixture(scope="module", params=[*SESSIONS])
def place(
    request: pytest.FixtureRequest,
    tower: MultiExitNetwork,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    torch.set_num_threads(1)
    return export(
        tower,
        tmp_path_factory.mktemp("session") / "tower",
        engine=request.param,
        example=inputs(4),
        lean=True,
    )


@pytest.fixture
def made(place: Path) -> EngineNetwork:
    return load_engine(place)


def truth(network: MultiExitNetwork, x: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return list(network(x))


@pytest.mark.parametrize("rows", [1, 3])
def test_all_exits_answer_as_torch_does(
    made: EngineNetwork, tower: MultiExitNetwork, rows: int
) -> None:
    with made.exits(inputs(rows)) as run:
        given = [exit.output() for exit in run]
    for here, there in zip(given, truth(tower, inputs(rows)), strict=True):
        assert float(there.abs().max()) > 0.1
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.backbone(inputs(rows)), given[-1])


def test_every_exit_comes_long_before_the_last(made: EngineNetwork) -> None:
    x = inputs(2048)
    shares = []
    for _ in range(5):
        begin = time.perf_counter()
        with made.exits(x) as run:
            instants = [time.perf_counter() - begin for _ in run]
        shares.append(np.array(instants) / instants[-1])
    # after 2, 8 and 16 of 24 layers; all at the end, if the engine kept its answers back
    assert (np.min(shares, axis=0)[:-1] < [0.5, 0.65, 0.9]).all()


def test_a_stopped_session_leaves_only_right_answers(
    made: EngineNetwork, tower: MultiExitNetwork
) -> None:
    x = inputs(512)
    wanted = truth(tower, x)
    generator = np.random.default_rng(0)
    stopped = 0
    for _ in range(30):
        run = made.exits(x)
        timer = threading.Timer(generator.uniform(0.0, 0.02), run.cancel)
        timer.start()
        given = []
        try:
            for exit in run:
                given.append(exit.output())
                time.sleep(0.001)
        except Cancelled:
            stopped += 1
        timer.join()
        run.close()
        for here, there in zip(given, wanted, strict=False):
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
    assert stopped > 0


def test_a_run_whose_session_was_stopped_goes_on(
    made: EngineNetwork, tower: MultiExitNetwork
) -> None:
    x = inputs(2048)
    with made.exits(x) as run:
        given = [next(run).output()]
        timer = threading.Timer(0.002, run.cancel)
        timer.start()
        try:
            given += [exit.output() for exit in run]
        except Cancelled:
            timer.join()
            given += [exit.output() for exit in run]
    for here, there in zip(given, truth(tower, x), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


def test_runs_of_several_threads_do_not_mix(made: EngineNetwork, tower: MultiExitNetwork) -> None:
    def answers(rows: int) -> list[list[Tensor]]:
        x = inputs(rows).T.contiguous().T
        found = []
        for number in range(8):
            with made.exits(x) as run:
                # most leave it early
                found.append([exit.output() for exit in itertools.islice(run, 1 + number % 4)])
        return found

    with ThreadPoolExecutor(3) as pool:
        for rows, found in zip((1, 64, 64), pool.map(answers, (1, 64, 64)), strict=True):
            for given in found:
                for here, there in zip(given, truth(tower, inputs(rows)), strict=False):
                    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


def test_a_session_that_nobody_holds_does_no_harm(place: Path, tower: MultiExitNetwork) -> None:
    for _ in range(5):
        run = load_engine(place).exits(inputs(2048))
        first = next(run).output()
        del run
        torch.testing.assert_close(first, truth(tower, inputs(2048))[0], rtol=1e-4, atol=1e-5)


def test_two_runs_in_turn_do_not_mix(made: EngineNetwork, tower: MultiExitNetwork) -> None:
    one = inputs(2)
    other = inputs(2) + 1.0
    with made.exits(one) as first, made.exits(other) as second:
        given = [(here.output(), there.output()) for here, there in zip(first, second, strict=True)]
    for (here, there), wanted, wanted_too in zip(
        given, truth(tower, one), truth(tower, other), strict=True
    ):
        torch.testing.assert_close(here, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(there, wanted_too, rtol=1e-4, atol=1e-5)


def test_a_runner_works_on_it(made: EngineNetwork, tower: MultiExitNetwork) -> None:
    x = inputs(3)
    stop_at_1 = ThresholdPolicy(
        score="max_probability", thresholds=(float("inf"), -1.0, float("inf"), -float("inf"))
    )
    costs = profile(made, x, batch_sizes=[1, 3], repeats=5)
    assert costs.provenance.engine == made.engine
    with Runner(made, costs) as runner, Runner(made, costs, stop_at_1) as stopping:
        answer = runner.run(x, deadline=Deadline.after(WAIT_S))
        assert (answer.exit, answer.stopped_by) == (3, "final")
        torch.testing.assert_close(answer.output, truth(tower, x)[3], rtol=1e-4, atol=1e-5)
        assert stopping.run(x).exits == (1, 1, 1)
        with runner.start(x, resumable=True) as run:
            first = run.interrupt()
            last = run.refine().result()
        assert first.exit <= last.exit == 3
        torch.testing.assert_close(last.output, truth(tower, x)[3], rtol=1e-4, atol=1e-5)


def test_it_runs_without_torch_and_meets_deadlines_there(
    place: Path, tower: MultiExitNetwork, tmp_path: Path
) -> None:
    for name in ("torch", "impatient"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')\n")
    folder = shutil.copytree(place, tmp_path / "copy")
    x = inputs(2)
    np.save(tmp_path / "x.npy", x.numpy())

    def answered(*options: str) -> Any:
        done = subprocess.run(
            [sys.executable, str(folder / "run.py"), str(tmp_path / "x.npy"), *options],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    answered("--profile")
    answer = json.loads(answered("--json", "--deadline-ms", "10000"))
    assert (answer["exit"], answer["stopped_by"], answer["deadline_met"]) == (3, "final", True)
    torch.testing.assert_close(
        torch.tensor(answer["probabilities"]), truth(tower, x)[3].softmax(-1), rtol=1e-3, atol=1e-4
    )
    late = json.loads(answered("--json", "--deadline-ms", "0.000001"))
    assert (late["exit"], late["stopped_by"], late["deadline_met"]) == (0, "deadline", False)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_label_says_engine_and_precision(engine: str, precision: str) -> None:
    assert engine_and_precision(engine_label(engine, precision)) == (engine, precision)


def test_it_has_no_features_and_no_smaller_batches(made: EngineNetwork) -> None:
    assert not made.shrinks(inputs(2))
    with made.exits(inputs(2)) as run, pytest.raises(RunError, match="no features"):
        made.pooled(next(run))


def test_what_the_engine_cannot_compile_is_said_before_anything_is_written(
    tower: MultiExitNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("impatient.portable.sessions.openvino_settings", lambda _: {"NO_SUCH": 1})
    with pytest.raises(ExportFailed, match=r"cannot compile .* for inputs of"):
        export(tower, tmp_path / "tower", engine="openvino-session", example=inputs(2), lean=True)
    assert not list(tmp_path.iterdir())
