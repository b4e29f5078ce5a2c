"""The runtime without torch: engine parts, exported directories, runs against the clock, the
command line.
"""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from benchmarks.damage import damage_entry
from impatient.clock import FakeClock
from impatient.costs import Quantiles
from impatient.engines.export import copy_standalone
from impatient.policies.rules import ThresholdPolicy
from impatient.portable import (
    ENGINES,
    Answer,
    Bundle,
    BundleError,
    Cancelled,
    EnginePart,
    OpenVinoPart,
    Staged,
    Thresholds,
    TimePredictor,
    Wiring,
)
from impatient.portable.bundle import _quantiles, processor_name
from impatient.portable.checksums import files_below
from impatient.portable.command import _load, main
from impatient.portable.description import write
from impatient.portable.staged import CancellablePart, Exit
from impatient.portable.thresholds import Scores, probabilities
from impatient.provenance import machine
from onnx_parts import (
    CLASSES,
    WIDE,
    X,
    description,
    truth,
    wide,
    write_parts,
    write_wide,
)

pytestmark = pytest.mark.engine

BOTH = pytest.mark.parametrize("engine", ENGINES)
INF = math.inf


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("parts")
    write_parts(directory)
    return directory


Export = Callable[..., Path]


@pytest.fixture
def export(parts: Path, tmp_path: Path) -> Export:
    def write(engine: str = "onnxruntime", **changes: Any) -> Path:
        shutil.copytree(parts, tmp_path, dirs_exist_ok=True)
        if not (tmp_path / "run.py").exists():
            copy_standalone(tmp_path)
        (tmp_path / "bundle.json").write_text(json.dumps(description(engine) | changes))
        return tmp_path

    return write


def costs(stages_s: Sequence[float], heads_s: Sequence[float], batch: int = 4) -> dict[str, Any]:
    def rows(times_s: Sequence[float]) -> list[dict[str, float]]:
        return [
            {**dict.fromkeys(("mean", "p50", "p90", "p99", "p999", "max"), time_s), "n": 100}
            for time_s in times_s
        ]

    return {str(batch): {"stages": rows(stages_s), "heads": rows(heads_s)}}


class Slow:
    """A part that advances a fake clock by what it takes, and says that it ran."""

    def __init__(
        self, part: Callable[..., Any], clock: FakeClock, seconds: float, ran: list[str], name: str
    ) -> None:
        self.part = part
        self.clock = clock
        self.seconds = seconds
        self.ran = ran
        self.name = name

    def __call__(self, *inputs: Any) -> Any:
        self.clock.advance(self.seconds)
        self.ran.append(self.name)
        return self.part(*inputs)


class Timed:
    """A bundle on a fake clock: stages take 10 ms each, heads 2 ms, as measured."""

    def __init__(self, directory: Path) -> None:
        self.clock = FakeClock()
        self.ran = []
        self.bundle = Bundle(directory, clock=self.clock.now)
        parts = self.bundle.parts
        stages = [
            Slow(part, self.clock, 0.010, self.ran, f"stage {index}")
            for index, part in enumerate(parts.stages)
        ]
        heads = [
            head and Slow(head, self.clock, 0.002, self.ran, f"head {index}")
            for index, head in enumerate(parts.heads)
        ]
        self.bundle.parts = Staged(parts.wiring, stages, heads)
        self.bundle.save_costs(costs([0.010] * 3, [0.002, 0.002, 0.0]))
        self.slow(1.0)

    def slow(self, times: float) -> None:
        for stage in self.bundle.parts.stages:
            stage.seconds = 0.010 * times

    def run(self, **options: Any) -> Answer:
        self.ran.clear()
        return self.bundle.run(X, **options)


def with_callables(directory: Path) -> Bundle:
    """A bundle whose stages and heads a test may replace by any function of arrays."""
    bundle = Bundle(directory)
    bundle.parts = Staged(bundle.wiring, bundle.parts.stages, bundle.parts.heads)
    return bundle


def assert_close(given: Any, wanted: Any) -> None:
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(given, wanted, atol=1e-5)


def test_the_exits_tell_inputs_and_depths_apart():
    for shallow, deep in ((0, 1), (1, 2)):
        assert np.abs(truth(X)[shallow] - truth(X)[deep]).max() > 0.1
    assert np.abs(truth(X)[0][0] - truth(X)[0][1]).max() > 0.1


@BOTH
@pytest.mark.parametrize("count", [1, 4])
def test_every_exit_and_the_whole_are_what_numpy_computes(export: Export, engine: str, count: int):
    bundle = Bundle(export(engine))
    x = X[:count]
    outputs = [exit.output() for exit in bundle.exits(x)]
    for output, wanted in zip(outputs, truth(x), strict=True):
        assert_close(output, wanted)
    assert_close(bundle.whole(x), truth(x)[-1])


@BOTH
def test_samples_that_are_kept_go_on_in_their_order(export: Export, engine: str):
    bundle = Bundle(export(engine))
    rows = np.array([3, 1])
    run = bundle.exits({"x": X})
    exit = next(run)
    run.keep(rows)
    assert_close(exit.output(), truth(X)[0])
    assert_close(next(run).output(), truth(X)[1][rows])
    run.keep([1])
    assert_close(next(run).output(), truth(X)[2][[1]])
    assert next(run, None) is None


@BOTH
def test_arrays_in_odd_memory_are_taken(export: Export, engine: str):
    bundle = Bundle(export(engine))
    locked = X.copy()
    locked.flags.writeable = False
    for x in (np.asfortranarray(X), np.repeat(X, 2, axis=0)[::2], locked, X.astype(">f4")):
        assert_close(bundle.whole(x), truth(X)[-1])
    np.testing.assert_array_equal(locked, X)


@BOTH
def test_outputs_stay_as_they_are_whatever_is_called_later(engine: str, tmp_path: Path):
    write_wide(tmp_path / "wide.onnx")
    part = ENGINES[engine](tmp_path / "wide.onnx")
    inputs = [wide(64, seed) for seed in range(10)]
    # the arrays themselves are dropped
    views = [part.one(x)[1:] for x in inputs]
    for view, x in zip(views, inputs, strict=True):
        np.testing.assert_allclose(view, np.tanh(x @ WIDE)[1:], atol=1e-4)


def test_openvino_lends_its_memory_and_takes_it_back(tmp_path: Path):
    write_wide(tmp_path / "wide.onnx")
    part = OpenVinoPart(tmp_path / "wide.onnx")
    kept = [part.one(wide(64)) for _ in range(8)]
    assert [array.flags.owndata for array in kept] == [False] * OpenVinoPart.LENT + [True] * 4
    first = kept.pop(0)
    kept.clear()
    again = part.one(wide(64, 1))
    assert not again.flags.owndata
    np.testing.assert_allclose(first, np.tanh(wide(64) @ WIDE), atol=1e-4)
    assert part._made == OpenVinoPart.LENT + 1
    # small
    assert part.one(wide(1)).flags.owndata


@BOTH
def test_one_part_on_several_threads_at_once(engine: str, tmp_path: Path):
    write_wide(tmp_path / "wide.onnx", 4)
    part = ENGINES[engine](tmp_path / "wide.onnx")
    found = {}

    def work(seed: int) -> None:
        for _ in range(10):
            found[seed] = part.one(wide(40, seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = ENGINES[engine](tmp_path / "wide.onnx")
    for seed in range(4):
        np.testing.assert_allclose(found[seed], alone.one(wide(40, seed)), atol=1e-5)


@pytest.fixture(scope="module")
def long_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.onnx"
    # some 27 GFLOP a call at 256 rows
    write_wide(path, 200)
    return path


class Calling(threading.Thread):
    """Calls a part and notes what came of it, and after how long."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__()
        self.call = call
        self.error = None
        self.output = None
        self.start()

    def run(self) -> None:
        begin = time.perf_counter()
        try:
            self.output = self.call()
        except Cancelled as error:
            self.error = error
        self.seconds = time.perf_counter() - begin

    def ended_by(self, cancel: Callable[[], None]) -> "Calling":
        """Cancel until it has an effect: the call may not have begun yet."""
        while self.is_alive():
            cancel()
            self.join(0.002)
        return self


@BOTH
def test_a_call_is_ended_early_and_the_part_goes_on_working(engine: str, long_path: Path):
    part = ENGINES[engine](long_path)
    x = wide(256)
    whole = Calling(lambda: part.one(x))
    whole.join()
    cancelled = Calling(lambda: part.one(x)).ended_by(part.cancel)
    assert isinstance(cancelled.error, Cancelled)
    assert cancelled.seconds < 0.5 * whole.seconds
    np.testing.assert_array_equal(part.one(x), whole.output)
    # nothing in flight, nothing happens
    part.cancel()
    assert part.one(x[:1]).shape == (1, 512)


@BOTH
def test_only_the_named_thread_is_cancelled(engine: str, long_path: Path):
    part = ENGINES[engine](long_path)
    other = Calling(lambda: part.one(wide(64, 1)))
    ended = Calling(lambda: part.one(wide(64, 2)))
    ended.ended_by(lambda: part.cancel(ended.ident))
    other.join()
    assert isinstance(ended.error, Cancelled)
    assert other.error is None
    np.testing.assert_allclose(other.output, part.one(wide(64, 1)), atol=1e-5)


@BOTH
def test_a_run_whose_stage_was_cancelled_can_go_on(engine: str, long_path: Path):
    part = ENGINES[engine](long_path)
    x = wide(128)
    wiring = Wiring(
        inputs=("x",),
        takes=(("x",),),
        gives=(("y",),),
        features=("y",),
        batch_dims={"x": 0, "y": 0},
    )
    run = Staged(wiring, [part], [None])([x])
    assert isinstance(Calling(lambda: next(run)).ended_by(run.cancel).error, Cancelled)
    np.testing.assert_array_equal(next(run).output(), part.one(x))
    run.cancel()
    assert next(run, None) is None


@BOTH
def test_threads_without_work_leave_the_processor_alone(engine: str, tmp_path: Path):
    write_wide(tmp_path / "wide.onnx")
    part = ENGINES[engine](tmp_path / "wide.onnx", threads=2)
    burnt_s = 0.0
    for _ in range(10):
        part(wide(256))
        begin = time.process_time()
        time.sleep(0.01)
        burnt_s += time.process_time() - begin
    # spinning threads burn half of these 0.1 s or more
    assert burnt_s < 0.03


@BOTH
def test_an_int8_part_runs_the_same_way(engine: str, parts: Path, tmp_path: Path):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        parts / "whole.onnx",
        tmp_path / "int8.onnx",
        weight_type=QuantType.QInt8,
        # products of 8 bits overflow on processors without VNNI
        reduce_range=True,
    )
    kinds = {entry.op_type for entry in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert "MatMulInteger" in kinds
    output = ENGINES[engine](tmp_path / "int8.onnx").one(X)
    difference = np.abs(output - truth(X)[-1]).max()
    assert 0.0 < difference < 0.1 * np.abs(output).max()


# --- running against the clock


def test_without_a_deadline_a_run_goes_to_the_end_and_no_head_on_the_way_runs(export: Export):
    timed = Timed(export())
    answer = timed.run()
    assert_close(answer.output, truth(X)[-1])
    assert (answer.exit, answer.exits, answer.stopped_by, answer.deadline_met) == (
        2,
        (2,) * 4,
        "final",
        True,
    )
    assert timed.ran == ["stage 0", "stage 1", "stage 2"]
    assert answer.elapsed_s == pytest.approx(0.030)


@pytest.mark.parametrize(
    ("deadline_s", "exit", "met"),
    [
        (0.0001, 0, False),
        (0.0115, 0, False),
        (0.0225, 1, True),
        (0.0300, 1, True),
        (0.0302, 2, True),
        (1.0, 2, True),
    ],
)
def test_the_deepest_exit_that_fits_answers(
    export: Export, deadline_s: float, exit: int, met: bool
):
    timed = Timed(export())
    answer = timed.run(deadline_s=deadline_s)
    assert (answer.exit, answer.deadline_met) == (exit, met)
    assert answer.stopped_by == ("final" if exit == 2 else "deadline")
    assert_close(answer.output, truth(X)[exit])
    heads = [] if exit == 2 else [f"head {exit}"]
    assert timed.ran == [f"stage {index}" for index in range(exit + 1)] + heads


def test_a_machine_that_becomes_slow_is_noticed(export: Export):
    timed = Timed(export())
    timed.slow(2.0)
    answers = [timed.run(deadline_s=0.035) for _ in range(10)]
    # the profile is believed until it is wrong
    assert (answers[0].exit, answers[0].deadline_met) == (
        1,
        False,
    )
    assert {(answer.exit, answer.deadline_met) for answer in answers[2:]} == {(0, True)}


def test_a_deadline_needs_costs_that_were_measured_here(export: Export):
    bundle = Bundle(export())
    with pytest.raises(
        BundleError, match=r"no costs for batch size 4 \(measured: none\).*--profile"
    ):
        bundle.run(X, deadline_s=0.01)
    table = costs([0.1] * 3, [0.0] * 3)
    for provenance in ({"processor": "another"}, {}):
        bundle = Bundle(export(costs=table, provenance=provenance))
        with pytest.raises(
            BundleError, match=r"measured on .* but here .*run.py INPUT.npy --profile"
        ):
            bundle.run(X, deadline_s=0.01)
        assert bundle.run(X, deadline_s=0.01, any_profile=True).exit == 0
        assert bundle.run(X).exit == 2
    here = export(costs=table, provenance={"processor": processor_name()})
    assert Bundle(here).run(X, deadline_s=0.01).exit == 0
    with pytest.raises(BundleError, match="'threads': 2"):
        Bundle(here, threads=2).run(X, deadline_s=0.01)
    with pytest.raises(BundleError, match="statistic='p95'; expected one of"):
        Bundle(here).run(X, deadline_s=0.01, statistic="p95")
    with pytest.raises(BundleError, match=r"deadline_s=0\.0; expected"):
        Bundle(here).run(X, deadline_s=0.0)


def policy_between(exit: int) -> dict[str, Any]:
    """Thresholds of which two of the four samples reach that of an exit, and none any other."""
    thresholds = [INF, INF, -INF]
    thresholds[exit] = float(np.sort(sureness(truth(X)[exit]))[1:3].mean())
    return rule_of(thresholds)


def sureness(outputs: Any) -> Any:
    """The score that the heads compute: the largest probability."""
    return probabilities(outputs).max(-1)


def rule_of(thresholds: Sequence[float], **changes: Any) -> dict[str, Any]:
    rule = {"score": "max_probability", "thresholds": thresholds}
    return rule | {"compares": False, "compare": None} | changes


@BOTH
@pytest.mark.parametrize("exit", [0, 1])
def test_sure_samples_leave_the_batch_and_the_rest_goes_on(export: Export, engine: str, exit: int):
    bundle = with_callables(export(engine, policy=policy_between(exit)))
    sizes = []
    stage = bundle.parts.stages[exit + 1]
    bundle.parts.stages[exit + 1] = lambda *inputs: (
        sizes.append(inputs[0].shape[0]) or stage(*inputs)
    )
    answer = bundle.run(X)
    stops = sureness(truth(X)[exit]) >= bundle.policy.thresholds[exit]
    wanted = np.where(stops[:, None], truth(X)[exit], truth(X)[2])
    assert_close(answer.output, wanted)
    assert answer.exits == tuple(np.where(stops, exit, 2).tolist())
    assert (answer.exit, answer.stopped_by, sizes) == (2, "final", [2])
    assert bundle.run(X, policy=False).exits == (2, 2, 2, 2)


def test_when_all_are_sure_the_policy_stops_the_run(export: Export):
    timed = Timed(export(policy=rule_of([INF, 0.0, -INF])))
    answer = timed.run(deadline_s=1.0)
    assert (answer.exits, answer.stopped_by) == ((1,) * 4, "policy")
    assert timed.ran == ["stage 0", "stage 1", "head 1"]
    assert_close(answer.output, truth(X)[1])


def test_a_deadline_after_some_have_left_answers_for_the_others(export: Export):
    timed = Timed(export(policy=policy_between(0)))
    answer = timed.run(deadline_s=0.030)
    stopped = np.array(answer.exits) == 0
    assert (stopped.sum(), answer.exit, answer.stopped_by) == (2, 1, "deadline")
    assert_close(answer.output, np.where(stopped[:, None], truth(X)[0], truth(X)[1]))
    timed = Timed(export(policy=policy_between(0)))
    # at the exit where they leave
    answer = timed.run(deadline_s=0.020)
    assert answer.exits == (0,) * 4
    assert_close(answer.output, truth(X)[0])


class Held(CancellablePart):
    """A stage that stays in flight until it is let go or cancelled."""

    def __init__(self, part: EnginePart) -> None:
        self.part = part
        self.go = threading.Event()
        self.entered = threading.Event()
        self.cancelled = False

    def __call__(self, *inputs: Any) -> Any:
        self.entered.set()
        assert self.go.wait(20.0)
        if self.cancelled:
            self.cancelled = False
            raise Cancelled
        return self.part(*inputs)

    def cancel(self, thread: int | None = None) -> None:
        self.cancelled = True
        self.go.set()


def test_an_interrupted_run_gives_its_latest_answer_and_cancels_the_stage(export: Export):
    bundle = with_callables(export())
    held = bundle.parts.stages[1] = Held(bundle.parts.stages[1])
    run = bundle.start(X)
    assert held.entered.wait(20.0)
    latest = run.latest()
    assert latest is not None
    assert latest.exit == 0
    answer = run.interrupt()
    assert (answer.exit, answer.stopped_by) == (0, "interrupt")
    assert_close(answer.output, truth(X)[0])
    assert run.interrupt() is run.result() is run.latest() is answer
    # the same worker goes on; the stage is let go now
    after = bundle.start(X).result()
    assert (after.exit, after.stopped_by, after.deadline_met) == (2, "final", True)
    assert_close(after.output, truth(X)[2])


def test_a_stage_that_cannot_be_cancelled_ends_without_its_head(export: Export):
    bundle = with_callables(export())
    heads = []
    held = Held(bundle.parts.stages[1])
    head = bundle.parts.heads[1]
    bundle.parts.stages[1] = lambda *inputs: held(*inputs)
    bundle.parts.heads[1] = lambda features: heads.append(1) or head(features)
    run = bundle.start(X)
    assert held.entered.wait(20.0)
    assert run.interrupt().exit == 0
    held.go.set()
    # queued behind it
    assert bundle.start(X).result().exit == 2
    assert heads == [1]


def test_at_its_deadline_a_started_run_returns_the_latest_answer(export: Export):
    bundle = with_callables(export())
    held = bundle.parts.stages[1] = Held(bundle.parts.stages[1])
    answer = bundle.start(X, deadline_s=0.5).result()
    assert (answer.exit, answer.stopped_by) == (0, "deadline")
    # on a busy machine the deadline may pass before the stage begins
    assert held.go.is_set() or not held.entered.is_set()


def test_a_started_run_keeps_to_the_policy_and_raises_what_went_wrong(export: Export):
    bundle = with_callables(export(policy=rule_of([INF, 0.0, -INF])))
    assert bundle.start(X).result().stopped_by == "policy"
    assert bundle.start(X, policy=False).result().stopped_by == "final"

    def failing(*inputs: Any) -> Any:
        raise MemoryError("no more")

    bundle.parts.stages[0] = failing
    for ask in (bundle.start(X).result, bundle.start(X).interrupt):
        with pytest.raises(MemoryError, match="no more"):
            ask()


# --- measured costs


def test_profiling_measures_each_stage_and_head_by_itself(export: Export):
    timed = Timed(export())
    timed.bundle.parts.stages[1].seconds = 0.050
    table = timed.bundle.profile(X, repeats=5, warm_up=1)
    assert list(table) == ["4"]
    assert [row["p99"] for row in table["4"]["stages"]] == pytest.approx([0.010, 0.050, 0.010])
    assert [row["mean"] for row in table["4"]["heads"]] == pytest.approx([0.002, 0.002, 0.0])
    assert timed.ran.count("head 0") == 6


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=50))
def test_quantiles_are_those_of_the_library(times_s: list[float]):
    mine = _quantiles(np.array(times_s))
    theirs = Quantiles.of(times_s)
    assert mine == {name: getattr(theirs, name) for name in mine}


def test_saved_costs_win_and_keep_other_batch_sizes(
    export: Export, monkeypatch: pytest.MonkeyPatch
):
    directory = export(
        costs=costs([9.0] * 3, [0.0] * 3, batch=1), provenance={"processor": "another"}
    )
    bundle = Bundle(directory)
    bundle.save_costs(costs([0.001] * 3, [0.0] * 3, batch=4))
    bundle.save_costs(costs([0.002] * 3, [0.0] * 3, batch=2))
    again = Bundle(directory)
    # those of another machine are gone
    assert list(again.costs) == list(bundle.costs) == ["4", "2"]
    assert again.run(X, deadline_s=20.0).exit == 2
    before = (directory / "costs.json").read_bytes()

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(BundleError, match=r"cannot write .*costs.json.*No space left"):
        bundle.save_costs(costs([5.0] * 3, [0.0] * 3))
    assert (directory / "costs.json").read_bytes() == before
    assert not list(directory.glob(".costs.json*"))


def test_the_processor_has_the_same_name_as_in_the_library():
    assert processor_name() == machine("cpu")["processor"]


# --- damage


def without(name: str) -> dict[str, Any]:
    value = description("onnxruntime")
    del value[name]
    return value


def rewired(**changes: Any) -> dict[str, Any]:
    value = description("onnxruntime")
    value["wiring"] |= changes
    return value


DAMAGES = {
    "no bundle": ("", r"cannot read .*bundle.json.*impatient export"),
    "another kind": (
        {"kind": "recording", "schema": 1},
        r"holds \('recording', 1\); expected \('impatient_bundle', 1\)",
    ),
    "another schema": (description("onnxruntime") | {"schema": 2}, "'impatient_bundle', 2"),
    "a list": ([1], "holds list"),
    "an unknown engine": (
        description("tensorrt"),
        "engine is 'tensorrt'; expected one of onnxruntime, openvino",
    ),
    "no wiring": (without("wiring"), "wiring is missing"),
    "a head too few": (
        description("onnxruntime") | {"heads": ["head0.onnx", None]},
        "2 heads for 3 exits",
    ),
    "no such file": (description("onnxruntime") | {"whole": "all.onnx"}, "no file all.onnx"),
    "a policy of 0.1.0, whose heads give no scores": (
        description("onnxruntime") | {"policy": {"score": "margin", "thresholds": [0, 0, 0]}},
        "policy.compares is missing.*Export the network again",
    ),
    "a threshold too few": (description("onnxruntime") | {"policy": rule_of([0])}, "1 thresholds"),
    "a value from nowhere": (
        rewired(takes=[["x"], ["v"], ["u", "skip"]]),
        "no stage gives the value 'v'",
    ),
    "no batch dimension": (rewired(batch_dims={"x": 0, "h": 0, "u": 0, "y": 0}), "'skip'"),
    "no batch": (
        rewired(batch_dims={"x": None, "h": 0, "skip": 1, "u": 0, "y": 0}),
        "no input has a batch",
    ),
    "other inputs": (
        description("onnxruntime") | {"inputs": []},
        "inputs are not those of the wiring",
    ),
}


@pytest.mark.parametrize(("content", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_bundle_says_what_is_wrong(export: Export, content: Any, message: str):
    directory = export()
    (directory / "bundle.json").write_text(json.dumps(content) if content else "")
    with pytest.raises(BundleError, match=message):
        Bundle(directory)


def everything(directory: Path) -> dict[str, Any]:
    """A description with all that may be in one, and the checksums of the files."""
    resizing = {"how": "fit", "before": [0, 0], "interpolation": "bilinear", "rounds_down": False}
    return description("onnxruntime") | {
        "class_names": list("abcde"),
        "has_classes": True,
        "outputs": [{"name": "output", "dtype": "float32", "shape": [None, CLASSES]}],
        "preprocess": {
            "mean": [0.5],
            "std": [0.5],
            "size": [8, 8],
            "channels": 1,
            "channels_at": 1,
            "resizing": resizing,
        },
        "costs": costs([0.01] * 3, [0.002, 0.002, 0.0]),
        "policy": rule_of([0.5, 0.6, -INF]),
        "files": files_below(directory),
    }


def used(directory: Path) -> None:
    """Do everything that a directory can do."""
    bundle = Bundle(directory)
    bundle.run(X)
    bundle.whole(X)
    for exit in bundle.exits(X):
        exit.output()
    if bundle.preparation:
        bundle.preparation(np.zeros((2, 1, 8, 8), np.uint8))
    bundle.start(X, deadline_s=1e-6).result()
    bundle.run(X, deadline_s=1.0, any_profile=True)


def test_wrong_entries_under_a_right_checksum_are_refused_or_harmless(export: Export):
    directory = export()
    right = everything(directory) | {"files": files_below(directory)}
    del right["files"]["bundle.json"]
    file = directory / "bundle.json"
    write(file, right)
    used(directory)
    dice = random.Random(0)
    refused = 0
    for _ in range(150):
        write(file, damage_entry(right, dice))
        try:
            used(directory)
        except BundleError:
            refused += 1
    # types, ranges and counts; the rest are other names, costs and facts that fit
    assert refused > 75


@pytest.mark.parametrize(
    ("changes", "message"),
    {
        "a name for a number": ({"num_classes": "five"}, "num_classes is 'five'; expected a whole"),
        "a flag for a number": ({"threads": True}, "threads is True; expected a whole number"),
        "too many threads": ({"threads": 10**9}, "expected a whole number from 1 to 1024"),
        "a file elsewhere": (
            {"whole": "../whole.onnx"},
            "whole is '../whole.onnx'; expected the n",
        ),
        "no exits": ({"exits": []}, "3 stages for 0 exits"),
        "names of some classes": ({"class_names": ["a"]}, "1 class names for 5 classes"),
        "an exit without a head": ({"heads": ["head0.onnx", None, None]}, "expected a file for ea"),
        "a deviation of 0": ({"preprocess": {"mean": [0.0], "std": [0.0]}}, "std.0. is 0.0"),
        "a batch beyond the input": (rewired(batch_dims={"x": 2}), "'x' has 2 dimensions, too few"),
        "stages in another order": (
            {"stages": ["stage2.onnx", "stage1.onnx", "stage0.onnx"]},
            "stage2.onnx does not fit bundle.json.*values .'x'.*Export the network again",
        ),
        "a stage as a head": ({"heads": ["stage0.onnx", "head1.onnx", None]}, None),
    }.values(),
)
def test_what_does_not_fit_the_files_or_itself_is_named(
    export: Export, changes: dict[str, Any], message: str | None
):
    directory = export(**changes)
    with pytest.raises(BundleError, match=message):
        used(directory)


def test_an_input_that_a_file_cannot_take_is_named(export: Export):
    directory = export(inputs=[{"name": "x", "dtype": "float32", "shape": [None, None]}])
    with pytest.raises(BundleError, match=r"cannot run .*stage0.onnx with float32 \[4, 5\]"):
        Bundle(directory).run(X[:, :5])


def test_a_missing_directory_says_so(tmp_path: Path):
    with pytest.raises(BundleError, match=r"cannot read .*nowhere"):
        Bundle(tmp_path / "nowhere")


@BOTH
def test_a_damaged_part_says_so(export: Export, engine: str):
    directory = export(engine)
    (directory / "stage1.onnx").write_bytes(b"not a network")
    with pytest.raises(BundleError, match=rf"{engine} cannot load .*stage1.onnx"):
        Bundle(directory)


def test_an_engine_that_is_not_installed_says_so(export: Export, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BundleError, match="not installed: pip install onnxruntime"):
        Bundle(export())


def test_threads_must_be_positive(export: Export):
    with pytest.raises(BundleError, match="threads=0; expected"):
        Bundle(export(), threads=0)


def test_damaged_costs_say_so(export: Export):
    bundle = Bundle(export())
    bundle.save_costs({"4": {"stages": [], "heads": []}})
    with pytest.raises(BundleError, match="costs of batch size 4 are damaged"):
        bundle.run(X, deadline_s=1.0)
    (bundle.directory / "costs.json").write_text("{")
    with pytest.raises(BundleError, match=r"costs.json.*delete it"):
        Bundle(bundle.directory)


def test_an_export_without_the_whole_network_says_so(export: Export):
    with pytest.raises(BundleError, match="without the whole network"):
        Bundle(export(whole=None)).whole(X)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            X.astype(np.float64),
            r"'x' is float64, shape \[4, 6\]; expected .*float32, shape \['any', 6\]",
        ),
        (X[0], r"shape \[6\]; expected"),
        (X[:, :5], r"shape \[4, 5\]; expected"),
        (X[:0], "at least 1"),
        ([[1.0]], "'x' is a list; expected a numpy array"),
        ({"y": X}, r"inputs \['y'\]; expected a mapping of \['x'\]"),
    ],
)
def test_an_input_of_the_wrong_kind_is_refused(export: Export, x: Any, message: str):
    bundle = Bundle(export())
    for call in (bundle.run, bundle.exits, bundle.whole, bundle.start):
        with pytest.raises(BundleError, match=message):
            call(x)


# --- the same rules as the library


THRESHOLDS = st.floats(-0.1, 1.1) | st.sampled_from([INF, -INF, 0.7, 1.0])
COLUMNS = arrays.arrays(np.float32, st.integers(1, 5), elements=st.floats(-40, 40, width=32))


@given(st.lists(COLUMNS, min_size=3, max_size=3), st.lists(THRESHOLDS, min_size=2, max_size=2))
def test_thresholds_are_those_of_the_library(columns: list[Any], early: list[float]):
    count = min(map(len, columns))
    # torch's squares of numbers below 1e-20 are 0
    scores = [column[:count].round(4) for column in columns]
    for name in ("constant", "agreement"):
        thresholds = (*early, -INF)
        mine = Thresholds(score=name, thresholds=thresholds, compares=name == "agreement")
        theirs = ThresholdPolicy(score=name, thresholds=thresholds, task="regression:scale=1.0")
        run = theirs.for_run(count)
        given_scores = Scores(Agreement() if mine.compares else None)
        for exit in range(3):
            assert mine.looks_at(exit) == theirs.looks_at(exit)
            if mine.looks_at(exit):
                out = scores[exit][:, None]
                zeros = np.zeros(count, np.float32)
                seen = given_scores.of(Exit(exit, None, None, out, zeros))
                wanted = run.stops(exit, torch.from_numpy(out)).numpy()
                np.testing.assert_array_equal(mine.stops(exit, seen), wanted)


class Agreement:
    """A part that compares numbers, as regression does."""

    def one(self, output: Any, before: Any) -> Any:
        return -np.abs(output - before)[:, 0]


def test_a_threshold_is_compared_in_single_precision():
    score = np.array([0.7], np.float32)
    exact = Thresholds(score="max_probability", thresholds=(float(score[0]) + 1e-9, -INF))
    assert exact.stops(0, score).all()


def test_a_policy_that_is_set_later_needs_scores():
    with pytest.raises(BundleError, match="exported without a policy"):
        Scores().of(Exit(0, None, None, X))


@given(st.lists(st.floats(0.0, 200.0), max_size=60), st.sampled_from([0.5, 0.9, 0.99, 0.999]))
@settings(max_examples=50)
def test_the_pace_allows_what_was_profiled_while_that_is_new(ratios: list[float], quantile: float):
    pace = TimePredictor([0.012, 0.012], quantile, [0.010, 0.010])
    for ratio in ratios:
        pace.observe(0, 0.010 * ratio)
    # the windows are longer than 60 stages, but at the medians
    assert pace.scale >= (0.01 if quantile < 0.95 else 1.0)
    needs_s = 0.012 * pace.scale
    assert pace.fits(1, 5.0, 5.0 + needs_s + 0.0011, 0.001)
    assert not pace.fits(1, 5.0, 5.0 + needs_s + 0.0009, 0.001)
    # beyond the last exit there is nothing to fit
    assert pace.fits(2, 5.0, 0.0, 1.0)


# --- the command line, without torch

NEEDED = (
    "numpy",
    "numpy.libs",
    "onnxruntime",
    "flatbuffers",
    "packaging",
    "google",
    "openvino",
    "openvino_telemetry",
)
WITHOUT_TORCH = """
import os, runpy, sys
sys.path.append(sys.argv[1])
for name in ("torch", "impatient"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(name + " is here")
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as `python run.py` does
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def torchless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Site packages with numpy and the engines, and nothing else."""
    site = tmp_path_factory.mktemp("site")
    installed = Path(np.__file__).parent.parent
    for name in NEEDED:
        if (installed / name).exists():
            (site / name).symlink_to(installed / name)
    return site


@pytest.fixture
def command(
    torchless: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            WITHOUT_TORCH,
            str(torchless),
            str(directory / "run.py"),
            *arguments,
        ]
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        return subprocess.run(
            program, capture_output=True, text=True, timeout=120, cwd=elsewhere, check=False
        )

    return run


@BOTH
def test_an_exported_directory_runs_without_torch(export: Export, command: Any, engine: str):
    directory = export(engine, policy=policy_between(0))
    np.save(directory / "x.npy", X)
    done = command(directory, str(directory / "x.npy"), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    value = json.loads(done.stdout)
    stopped = np.array(value["exits"]) == 0
    outputs = np.where(stopped[:, None], truth(X)[0], truth(X)[2])
    assert_close(np.array(value["probabilities"]), probabilities(outputs))
    assert value["class"] == outputs.argmax(1).tolist()
    assert (sorted(value["exits"]), value["stopped_by"], value["deadline_met"]) == (
        [0, 0, 2, 2],
        "final",
        True,
    )


def test_the_command_line_profiles_and_meets_a_deadline(export: Export, command: Any):
    directory = export(policy=policy_between(0))
    np.savez(directory / "x.npz", x=X[:1])
    file = str(directory / "x.npz")
    refused = command(directory, file, "--deadline-ms", "5000")
    assert refused.returncode == 1
    assert "error: no costs for batch size 1" in refused.stderr
    done = command(
        directory, file, "--deadline-ms", "5000", "--profile", "--no-policy", "--threads", "1"
    )
    assert (done.returncode, done.stderr) == (0, "")
    best = int(truth(X)[2][0].argmax())
    assert done.stdout.startswith(f"class {best} from exit 2; {best}: 0.")
    assert done.stdout.rstrip().endswith("stopped by final")
    assert list(json.loads((directory / "costs.json").read_text())["costs"]) == ["1"]


def test_what_the_command_line_cannot_do_it_says(export: Export, tmp_path: Path):
    for name in ("nothing.npy", "bundle.json"):
        with pytest.raises(BundleError, match=f"cannot read .*{name}.*numpy.save"):
            _load(str(export() / name))
    np.savez(tmp_path / "half.npz", x=X)
    (tmp_path / "half.npz").write_bytes((tmp_path / "half.npz").read_bytes()[:200])
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    (tmp_path / "picture.npy").write_bytes(b"\x89PNG\r\n")
    for name in ("half.npz", "objects.npz", "picture.npy"):
        with pytest.raises(BundleError, match=f"cannot read .*{name}.*numpy.save") as refused:
            _load(str(tmp_path / name))
        assert "pickle" not in str(refused.value)
    with pytest.raises(BundleError, match=r"cannot read one.txt.* for texts save what"):
        Bundle(export()).read("one.txt")
    with pytest.raises(SystemExit), contextlib.redirect_stdout(None):
        main(Path(), ["--help"])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_forked_process_starts_runs_of_its_own_and_refuses_its_parents(export: Export):
    bundle = Bundle(export())
    parents = bundle.start(X)
    wanted = parents.result().output
    child = os.fork()
    if child == 0:
        # an alarm ends what hangs
        signal.alarm(20)
        code = 2
        try:
            right = np.array_equal(bundle.start(X).result().output, wanted)
            with pytest.raises(BundleError, match="another process"):
                parents.result()
            code = 0 if right else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(bundle.start(X).result().output, wanted)
