"""Stages in memory that is bound to them once: answers stay, runs do not disturb each other."""

import functools
import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from impatient.portable import ENGINES, Bundle, BundleError, Cancelled, Wiring
from impatient.portable import bound as bound_module
from impatient.portable.bound import BoundRun, BoundStaged
from onnx_parts import X, description, node, truth, wide, write_onnx, write_parts, write_wide

pytestmark = pytest.mark.engine

RUNS = 5


@pytest.fixture(scope="module", params=ENGINES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bound")
    write_parts(place)
    (place / "bundle.json").write_text(json.dumps(description(request.param)))
    return place


@pytest.fixture
def bundle(directory: Path) -> Bundle:
    """An exported directory whose memory is bound at the shape of X already."""
    made = Bundle(directory)
    made.warm_up(X, 1)
    return made


def other(seed: int) -> Any:
    return np.random.default_rng(seed).normal(size=X.shape).astype(np.float32)


def assert_close(given: Any, wanted: Any) -> None:
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(given, wanted, atol=1e-5)


def assert_right(outputs: list[Any], x: Any) -> None:
    for output, wanted in zip(outputs, truth(x), strict=True):
        assert_close(output, wanted)


def idle(bundle: Bundle) -> int:
    """Count the lanes that no run has."""
    assert isinstance(bundle.parts, BoundStaged)
    return sum(map(len, bundle.parts._idle.values()))


def test_every_run_answers_its_own_input(bundle: Bundle) -> None:
    for seed in range(RUNS):
        x = other(seed)
        assert_right([exit.output() for exit in bundle.exits(x)], x)
        # another batch size in between
        assert_right([exit.output() for exit in bundle.exits(x[:1])], x[:1])


def test_memory_is_used_again(bundle: Bundle) -> None:
    for seed in range(RUNS):
        outputs = [exit.output() for exit in bundle.exits(other(seed))]
        assert len(outputs) == 3
        assert idle(bundle) == 1


def test_what_the_caller_keeps_is_not_overwritten(bundle: Bundle) -> None:
    first = list(bundle.exits(X))
    # the run is over, and its exits answer all the same
    late = other(1)
    for exit in bundle.exits(late):
        exit.output()
    outputs = [exit.output() for exit in first]
    features = [exit.features for exit in first]
    assert_right(outputs, X)
    hidden = features[0].copy()
    assert first[0].row_bytes == hidden.nbytes / len(X)
    first.clear()
    gc.collect()
    for _ in range(RUNS):
        for exit in bundle.exits(late):
            exit.output()
    assert_right(outputs, X)
    np.testing.assert_array_equal(features[0], hidden)
    # the caller's own
    outputs[0][...] = 0.0
    assert_right([exit.output() for exit in bundle.exits(X)], X)


def test_two_runs_in_turn_do_not_share_memory(bundle: Bundle) -> None:
    x, y = other(1), other(2)
    one, two = bundle.exits(x), bundle.exits(y)
    found: tuple[list[Any], list[Any]] = ([], [])
    for here, there in zip(one, two, strict=True):
        found[1].append(there.output())
        found[0].append(here.output())
    assert_right(found[0], x)
    assert_right(found[1], y)


def test_threads_do_not_share_memory(bundle: Bundle) -> None:
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for round in range(40):
                x = other(100 * seed + round)
                assert_right([exit.output() for exit in bundle.exits(x)], x)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("after", [1, 2])
def test_rows_that_are_kept_go_on_by_themselves(bundle: Bundle, after: int) -> None:
    rows = np.array([3, 1])
    run = bundle.exits(X)
    exits = [next(run) for _ in range(after)]
    run.keep(rows)
    for _ in range(2):
        for exit in bundle.exits(other(1)):
            exit.output()
    rest = [exit.output() for exit in run]
    for output, wanted in zip(rest, truth(X)[after:], strict=True):
        assert_close(output, wanted[rows])
    for exit, wanted in zip(exits, truth(X), strict=False):
        assert_close(exit.output(), wanted)


def test_a_run_that_was_left_or_closed_gives_its_memory_back(bundle: Bundle) -> None:
    for exit in bundle.exits(X):
        exit.output()
        break
    del exit
    with bundle.exits(X) as run:
        next(run)
    assert next(run, None) is None
    # the run itself is still there
    assert idle(bundle) == 1
    assert_right([exit.output() for exit in bundle.exits(X)], X)


def test_large_values_have_memory_of_their_run(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bound_module, "LARGEST", 1)
    bundle = Bundle(directory)
    kinds = []
    for seed in range(3):
        x = other(seed)
        run = bundle.exits(x)
        kinds.append(isinstance(run, BoundRun))
        assert_right([exit.output() for exit in run], x)
    assert kinds == [True, False, False]
    del run
    assert idle(bundle) == 0


def test_shapes_that_are_kept_are_few(bundle: Bundle) -> None:
    parts = bundle.parts
    assert isinstance(parts, BoundStaged)
    for count in range(1, bound_module.MOST_SHAPES + 5):
        x = np.repeat(X, 6, axis=0)[:count]
        assert_right([exit.output() for exit in bundle.exits(x)], x)
    assert len(parts._idle) == bound_module.MOST_SHAPES


def test_shapes_that_are_given_up_are_few(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound_module, "LARGEST", 0)
    parts = bundle.parts
    assert isinstance(parts, BoundStaged)
    for count in range(1, bound_module.MOST_SHAPES + 5):
        x = np.repeat(X, 6, axis=0)[:count]
        assert_right([exit.output() for exit in bundle.exits(x)], x)
    assert len(parts.too_large) == bound_module.MOST_SHAPES


def test_inputs_in_odd_memory_are_taken(bundle: Bundle) -> None:
    locked = X.copy()
    locked.flags.writeable = False
    for x in (np.asfortranarray(X), np.repeat(X, 2, axis=0)[::2], locked, X.astype(">f4")):
        assert_right([exit.output() for exit in bundle.exits(x)], X)


def test_an_input_that_a_later_stage_takes_is_the_runs_own(directory: Path, tmp_path: Path) -> None:
    engine = json.loads((directory / "bundle.json").read_text())["engine"]
    write_onnx(tmp_path / "0.onnx", [node("Tanh", "x", "h")], {"x": ["b", 6]}, {"h": ["b", 6]})
    write_onnx(
        tmp_path / "1.onnx",
        [node("Add", "h x", "y")],
        {"h": ["b", 6], "x": ["b", 6]},
        {"y": ["b", 6]},
    )
    wiring = Wiring(
        inputs=("x",),
        takes=(("x",), ("h", "x")),
        gives=(("h",), ("y",)),
        features=("h", "y"),
        batch_dims={"x": 0, "h": 0, "y": 0},
    )
    stages = [ENGINES[engine](tmp_path / f"{index}.onnx") for index in range(2)]
    network = BoundStaged(wiring, stages, [None, None])
    for seed in range(3):
        x = other(seed)
        for exit, wanted in zip(network([x]), (np.tanh(x), np.tanh(x) + x), strict=True):
            assert_close(exit.output(), wanted)


def test_an_input_of_another_dtype_is_refused_each_time(directory: Path) -> None:
    bundle = Bundle(directory)
    for _ in range(2):
        with pytest.raises(BundleError, match="float64"):
            list(bundle.exits(X.astype(np.float64)))
        bundle.warm_up(X, 1)


@pytest.fixture(scope="module")
def long_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.onnx"
    write_wide(path, 100)
    return path


ONE_STAGE = Wiring(
    inputs=("x",),
    takes=(("x",),),
    gives=(("y",),),
    features=("y",),
    batch_dims={"x": 0, "y": 0},
)


def ended(call: Callable[[], object], cancel: Callable[[], None]) -> BaseException | None:
    """Cancel a call until that has an effect, and return its error."""
    found: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except Cancelled as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        cancel()
        thread.join(0.001)
    return found[0] if found else None


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bound_stage_is_cancelled_and_the_run_goes_on(engine: str, long_stage: Path) -> None:
    part = ENGINES[engine](long_stage)
    network = BoundStaged(ONE_STAGE, [part], [None])
    x = wide(64, 1)
    wanted = part.one(x)
    # not bound yet, then bound
    for _ in range(2):
        run = network([x])
        assert isinstance(ended(functools.partial(next, run), run.cancel), Cancelled)
        np.testing.assert_allclose(next(run).output(), wanted, atol=1e-5)
        # nothing is in flight, so nothing happens, to this run and to the next one
        run.cancel()
        assert next(run, None) is None
        late = run
        del run
        run = network([x])
        late.cancel()
        np.testing.assert_allclose(next(run).output(), wanted, atol=1e-5)
        del run, late


class Late(dict[str, Any]):
    """Values whose reading cancels the run, when the stage that takes them is about to begin."""

    def __init__(self, run: Any) -> None:
        super().__init__(run._values)
        self.run = run

    def __getitem__(self, name: str) -> Any:
        self.run.cancel()
        return super().__getitem__(name)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stage_is_cancelled_that_is_about_to_begin(engine: str, long_stage: Path) -> None:
    part = ENGINES[engine](long_stage)
    network = BoundStaged(ONE_STAGE, [part], [None])
    x = wide(64, 1)
    wanted = part.one(x)
    # binds it
    np.testing.assert_allclose(next(network([x])).output(), wanted, atol=1e-5)
    run = network([x])
    values = run._values
    run._values = Late(run)
    with pytest.raises(Cancelled):
        next(run)
    run._values = values
    np.testing.assert_allclose(next(run).output(), wanted, atol=1e-5)
