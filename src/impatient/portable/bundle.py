"""A network in an exported directory, run against the clock."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .answers import Answer, BatchProgress, StoppedBy
from .bound import BoundStaged
from .checksums import check_file
from .description import (
    COSTS,
    MEASURED,
    SCHEMA,
    check_input,
    check_lengths,
    native,
    policy_of,
    read,
    read_description,
    wiring_of,
    write,
)
from .errors import BundleError, Cancelled
from .forms import misfit
from .parts import ENGINES, EnginePart
from .preparing import Preparation
from .sessions import SESSIONS
from .staged import Array, Exit, Inputs, Run, Staged
from .streamed import Streamed
from .thresholds import Scores, Thresholds
from .timing import QUANTILES, RESERVE_S, SlowdownEstimator, TimePredictor

COSTS_FILE = "costs.json"
PROFILE = "python run.py INPUT.npy --profile"


class Bundle:
    """A network in an exported directory, ready to run.

    Args:
        directory: directory written by `impatient export`.
        threads: number of threads that one stage may use; the default is the number it was exported
            with.
        clock: function that returns the present time in seconds.
    Attributes:
        costs: measured seconds of stages and heads by batch size (as text), from costs.json if the
            file exists.
        class_names: name of each class; empty where the outputs are no classes, or have no names.
        preparation: what is done to raw inputs, such as pictures; None if that is not known.
        policy: policy that stops early; None if none was exported.
        parts: the network's parts, called to begin a run; `Staged`, or `Streamed` where all exits
            are in one session.
    Raises:
        BundleError: if the directory is incomplete or damaged, or its engine is not installed.

    Thread:
        May be used from several threads at once. Runs begun by `start` are computed one after the
        other.
    """

    def __init__(
        self,
        directory: str | Path,
        threads: int | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.directory = Path(directory)
        self._clock = clock
        self.description = description = read_description(self.directory)
        self.engine: str = description["engine"]
        self.exit_names = tuple(description["exits"])
        self.num_classes = int(description["num_classes"])
        self.class_names = tuple(map(str, description.get("class_names", ())))
        prepares = description.get("preprocess")
        self.preparation = prepares and Preparation.of(prepares)
        self.threads = int(description["threads"]) if threads is None else threads
        self.wiring = wiring_of(description["wiring"])
        self.parts = self._load()
        self.policy = policy_of(description["policy"])
        compare = (description["policy"] or {}).get("compare")
        self._compare = self._part(compare) if compare else None
        if self._compare and (len(self._compare.takes), len(self._compare.gives)) != (2, 1):
            raise _unfit(self._compare.path, "the comparison of two outputs")
        self._whole: EnginePart | None = None
        self._slowdowns = {
            statistic: SlowdownEstimator(quantile) for statistic, quantile in QUANTILES.items()
        }
        self._predictors: dict[tuple[int, str], TimePredictor] = {}
        self._worker = ThreadPoolExecutor(1, "impatient")
        self._process = os.getpid()
        self.costs, self._measured_on = self._read_costs()

    def __reduce__(self) -> Any:
        raise BundleError(
            "a bundle cannot be pickled or copied: its sessions and its thread belong to this "
            "process. Send its directory, and open it there."
        )

    @property
    def num_exits(self) -> int:
        return len(self.exit_names)

    @property
    def has_classes(self) -> bool:
        """Tell whether outputs are logits of classes, of which each sample has one."""
        return bool(self.description.get("has_classes", True))

    def read(self, path: str | Path) -> Array:
        """Read a picture as input of the network, a batch of one.

        Raises:
            BundleError: if the network takes no pictures, or the file is none.
        """
        if self.preparation is None:
            raise BundleError(
                f"cannot read {path}: how to prepare such a file is not in bundle.json; expected a "
                ".npy or .npz file of what the network takes, a batch dimension included. For "
                "pictures export it with preprocess=; for texts save what their tokenizer makes."
            )
        return self.preparation(self.preparation.picture(Path(path)))

    def exits(self, x: Inputs) -> Run:
        """Run stage by stage, with `for exit in bundle.exits(x)`.

        Leaving the loop early computes nothing deeper.

        Args:
            x: an array, or a mapping of the inputs' names to arrays, of any batch size.
        Raises:
            BundleError: if an array has the wrong dtype or shape.
        """
        return self.parts(self._inputs(x))

    def whole(self, x: Inputs) -> Array:
        """Compute the output of the network without exits, to compare with.

        The network is loaded at the first call.
        """
        if self._whole is None:
            if self.description["whole"] is None:
                raise BundleError(
                    f"{self.directory} was exported without the whole network; export again with "
                    "it."
                )
            self._whole = self._part(self.description["whole"])
            if len(self._whole.takes) != len(self.wiring.inputs) or len(self._whole.gives) != 1:
                raise _unfit(self._whole.path, "the network without exits")
        return self._whole.one(*self._inputs(x))

    def run(
        self,
        x: Inputs,
        *,
        deadline_s: float | None = None,
        statistic: str = "p99",
        policy: bool = True,
        any_profile: bool = False,
    ) -> Answer[Array]:
        """Answer by a deadline that is known at the start.

        The answer comes from the deepest exit that fits, or from the exit where the policy stops.

        Args:
            x: an array, or a mapping of the inputs' names to arrays.
            deadline_s: seconds from now to the deadline; None runs until the policy stops.
            statistic: quantile of the cost of the next stage and head that must fit before they are
                begun.
            policy: whether to stop early where the exported policy says so.
            any_profile: accept costs that were measured on another machine or with another number
                of threads.
        Returns:
            The answer. If not even the first exit fits, it is that of the first exit, and late.
        Raises:
            BundleError: if the input does not fit the network, or if there is a deadline and no
                costs were measured here.
        """
        begin = self._clock()
        run, progress = self._begin(x, begin, deadline_s)
        predictor = (
            None if deadline_s is None else self._predictor(progress.count, statistic, any_profile)
        )
        rule = self.policy if policy else None
        with run:
            before = begin
            for exit in run:
                # The time of a partial batch says nothing about the cost of the full batch.
                if predictor and progress.all_going and exit.whole:
                    predictor.observe(exit.index, self._clock() - before)
                stopped_by = progress.stopped_by(exit, rule, run)
                before = self._clock()
                if (
                    not stopped_by
                    and predictor
                    and not predictor.fits(exit.index + 1, before, progress.deadline, RESERVE_S)
                ):
                    stopped_by = "deadline"
                if stopped_by:
                    progress.take(exit)
                    return progress.answer(stopped_by)
        raise AssertionError("the last exit always comes")

    def start(
        self, x: Inputs, deadline_s: float | None = None, *, policy: bool = True
    ) -> InterruptibleRun:
        """Start an interruptible run on the bundle's thread and return at once.

        Every exit on the way posts its answer. No measured costs are needed.

        Args:
            x: an array, or a mapping of the inputs' names to arrays.
            deadline_s: seconds from now to the deadline; None runs until the policy stops.
            policy: whether to stop early where the exported policy says so.
        """
        if self._process != os.getpid():
            # A forked process does not have the thread.
            self._process = os.getpid()
            self._worker = ThreadPoolExecutor(1, "impatient")
        run, progress = self._begin(x, self._clock(), deadline_s)
        begun = InterruptibleRun(run, progress, self.policy if policy else None)
        self._worker.submit(begun.work)
        return begun

    def warm_up(self, x: Inputs, times: int = 3) -> None:
        """Run to the end a few times to prepare threads and memory."""
        for _ in range(times):
            for exit in self.exits(x):
                exit.output()

    def profile(self, x: Inputs, repeats: int = 300, warm_up: int = 20) -> dict[str, Any]:
        """Measure every stage and head here, at the batch size of `x`.

        Returns:
            For the batch size (as text), the costs of "stages" and "heads": mean, quantiles and
            largest of the measured seconds for each of them.
        """
        if repeats < 1:
            raise BundleError(
                f"repeats={repeats!r}; expected at least 1, and at least 300 for a reliable p99."
            )
        self.warm_up(x, warm_up)
        times_s = np.zeros((2, self.num_exits, repeats))
        for repeat in range(repeats):
            before = self._clock()
            for exit in self.exits(x):
                arrived = self._clock()
                exit.output()
                answered = self._clock()
                times_s[:, exit.index, repeat] = arrived - before, answered - arrived
                before = self._clock()
        # The last exit has no head.
        times_s[1, -1] = 0.0
        stages, heads = ([_quantiles(row) for row in rows] for rows in times_s)
        return {str(self.wiring.batch_size(self._inputs(x))): {"stages": stages, "heads": heads}}

    def save_costs(self, costs: Mapping[str, Any]) -> None:
        """Write costs from `profile` to costs.json, and use them from now on.

        The file is written atomically. Costs of other batch sizes that were measured on the same
        machine, with the same engine and number of threads, are kept.
        """
        here = self._here()
        kept = self.costs if self._measured_on == here else {}
        value: dict[str, Any] = {
            "kind": "impatient_bundle_costs",
            "schema": SCHEMA,
            "costs": {**kept, **costs},
            "provenance": here,
        }
        write(self.directory / COSTS_FILE, value)
        self.costs = value["costs"]
        self._measured_on = here
        self._predictors.clear()

    def _begin(
        self, x: Inputs, begin: float, deadline_s: float | None
    ) -> tuple[Run, BatchProgress]:
        if deadline_s is not None and not deadline_s > 0.0:
            raise BundleError(
                f"deadline_s={deadline_s!r}; expected a positive number of seconds, such as 0.008."
            )
        inputs = self._inputs(x)
        deadline = math.inf if deadline_s is None else begin + deadline_s
        progress = BatchProgress(
            self.wiring.batch_size(inputs),
            self.num_exits,
            self._clock,
            begin,
            deadline,
            Scores(self._compare),
        )
        return self.parts(inputs), progress

    def _load(self) -> Staged | Streamed:
        if self.engine in SESSIONS:
            name = self.description["session"]
            check_file(self.directory, name, self.description.get("files", {}))
            session = SESSIONS[self.engine](self.directory / name, threads=self.threads)
            scored = self.description["policy"] is not None
            shape = self._output_shape()
            self._check_session(session.memory(1), shape, scored=scored)
            return Streamed(self.wiring, session, shape, scored=scored)
        stages = [self._part(name) for name in self.description["stages"]]
        *early, last = self.description["heads"]
        heads = [self._part(name) for name in early]
        self._check_parts(stages, heads)
        return BoundStaged(self.wiring, stages, [*heads, last])

    def _check_parts(self, stages: Sequence[EnginePart], heads: Sequence[EnginePart]) -> None:
        """Compare what parts take and give with the wiring."""
        dims = self.wiring.batch_dims
        for stage, *rows in zip(stages, self.wiring.takes, self.wiring.gives, strict=True):
            for ranks, names in zip((stage.takes, stage.gives), rows, strict=True):
                fit = len(ranks) == len(names) and all(
                    rank is None or (dims[name] or 0) < rank
                    for rank, name in zip(ranks, names, strict=True)
                    if dims[name] is not None
                )
                if not fit:
                    raise _unfit(stage.path, f"values {list(names)} of the wiring")
        for head in heads:
            if len(head.takes) != 1 or len(head.gives) not in (1, 2):
                raise _unfit(head.path, "a head, from features to output and score")

    def _check_session(
        self, outputs: Sequence[Array], shape: Sequence[int] | None, *, scored: bool
    ) -> None:
        """Compare the outputs of a session with exits, the shape of outputs, and scores."""
        widths = {output.shape[1] - 1 - scored for output in outputs}
        wanted = widths if shape is None else {math.prod(shape)}
        if len(outputs) != self.num_exits or widths != wanted:
            raise _unfit(self.directory / self.description["session"], "the exits and outputs")

    def _output_shape(self) -> list[int] | None:
        """Return the shape of one sample's output.

        None where it is a row of numbers.
        """
        outputs = self.description.get("outputs")
        shape = outputs[0]["shape"][1:] if outputs else None
        return None if shape is None or None in shape else shape

    def _part(self, name: str) -> EnginePart:
        check_file(self.directory, name, self.description.get("files", {}))
        return ENGINES[self.engine.removesuffix("-session")](
            self.directory / name, threads=self.threads
        )

    def _inputs(self, x: Inputs) -> list[Array]:
        specs = {spec["name"]: spec for spec in self.description["inputs"]}
        given = x if isinstance(x, Mapping) else {self.wiring.inputs[0]: x}
        if set(given) != set(specs):
            raise BundleError(
                f"inputs {sorted(given)}; expected a mapping of {sorted(specs)} to arrays."
            )
        for name, spec in specs.items():
            check_input(name, given[name], spec)
        dims = [(name, self.wiring.batch_dims[name]) for name in self.wiring.inputs]
        sizes = {given[name].shape[dim] for name, dim in dims if dim is not None}
        if len(sizes) > 1 or 0 in sizes:
            raise BundleError(
                f"inputs of {sorted(sizes)} samples; expected the same number in each, at least 1."
            )
        check_lengths(given, specs)
        return [native(given[name]) for name in self.wiring.inputs]

    def _here(self) -> dict[str, Any]:
        return {"processor": processor_name(), "threads": self.threads, "engine": self.engine}

    def _read_costs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the costs, and the machine and settings they were measured with."""
        path = self.directory / COSTS_FILE
        if path.exists():
            remedy = f"delete it and run `{PROFILE}`"
            value = read(path, "impatient_bundle_costs", remedy)
            problem = misfit(value, MEASURED)
            if problem is not None:
                raise BundleError(f"{path}: {problem}; {remedy}.")
            return value["costs"], value["provenance"]
        made = self.description.get("provenance") or {}
        exported = {
            "processor": made.get("processor"),
            "threads": self.description["threads"],
            "engine": self.engine,
        }
        return self.description.get("costs") or {}, exported

    def _predictor(self, batch: int, statistic: str, any_profile: bool) -> TimePredictor:
        if statistic not in QUANTILES:
            raise BundleError(f"statistic={statistic!r}; expected one of {', '.join(QUANTILES)}.")
        costs = self.costs.get(str(batch))
        here = self._here()
        if costs is None:
            measured = ", ".join(self.costs) or "none"
            raise BundleError(
                f"no costs for batch size {batch} (measured: {measured}). To meet a deadline, run "
                f"`{PROFILE}`."
            )
        if self._measured_on != here and not any_profile:
            raise BundleError(
                f"the costs were measured on {self._measured_on}, but here it is {here}. Run "
                f"`{PROFILE}`, or pass any_profile=True."
            )
        if (batch, statistic) not in self._predictors:
            problem = misfit(costs, COSTS)
            counts = set() if problem else {len(costs["stages"]), len(costs["heads"])}
            if problem or counts != {self.num_exits}:
                problem = problem or f"expected {self.num_exits} stages and heads"
                raise BundleError(
                    f"the costs of batch size {batch} are damaged ({problem}). Run `{PROFILE}`."
                )
            times_s = [
                (stage[statistic], stage[statistic] + head[statistic])
                for stage, head in zip(costs["stages"], costs["heads"], strict=True)
            ]
            stages_s, next_s = zip(*times_s, strict=True)
            self._predictors[batch, statistic] = TimePredictor(
                next_s, QUANTILES[statistic], stages_s, self._slowdowns[statistic]
            )
        return self._predictors[batch, statistic]


class InterruptibleRun:
    """An interruptible run in progress, made by `Bundle.start`.

    Thread:
        All methods may be called from any thread.
    """

    def __init__(self, run: Run, progress: BatchProgress, rule: Thresholds | None) -> None:
        self._run = run
        self._progress = progress
        self._rule = rule
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._latest: Answer[Array] | None = None
        # The answer that was returned. It never changes afterwards.
        self._answer: Answer[Array] | None = None
        self._finished = False
        self._error: BaseException | None = None

    def latest(self) -> Answer[Array] | None:
        """Return the best answer so far without stopping, None before the first."""
        with self._changed:
            return self._answer or self._latest

    def result(self) -> Answer[Array]:
        """Wait for the last exit, the policy or the deadline, then stop.

        Whichever comes first counts. The answer is the one that `interrupt` would return.
        """
        self._check_process()
        left_s = self._progress.left_s()
        with self._changed:
            self._changed.wait_for(
                lambda: self._answer or self._finished,
                left_s if left_s < threading.TIMEOUT_MAX else None,
            )
            return self._stop("deadline")

    def interrupt(self) -> Answer[Array]:
        """Stop and return the latest answer at once.

        The stage in flight is ended early. Before the first exit, this call waits for it. A second
        call returns the same answer. An error of the run is raised here.
        """
        self._check_process()
        with self._changed:
            return self._stop("interrupt")

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise BundleError(
                "this run was started in another process, whose thread computes it; expected a "
                "run of this process. Start a new one after the fork."
            )

    def _stop(self, reason: StoppedBy) -> Answer[Array]:
        self._changed.wait_for(lambda: self._latest or self._finished)
        if self._error is not None:
            raise self._error
        if self._answer is None:
            assert self._latest is not None
            done = self._latest.stopped_by in ("final", "policy")
            self._answer = self._latest if done else replace(self._latest, stopped_by=reason)
            self._run.cancel()
            self._changed.notify_all()
        return self._answer

    def work(self) -> None:
        """Compute the run, on the bundle's thread."""
        try:
            # Cancelled comes from `_stop`, which already has an answer.
            with self._run, contextlib.suppress(Cancelled):
                for exit in self._run:
                    if self._done_at(exit):
                        break
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def _done_at(self, exit: Exit) -> bool:
        # The run was stopped, so the head of this exit need not run.
        if self._answer is not None:
            return True
        self._progress.take(exit)
        stopped_by = self._progress.stopped_by(exit, self._rule, self._run)
        with self._changed:
            self._latest = self._progress.answer(stopped_by or "deadline")
            self._changed.notify_all()
        return stopped_by is not None or self._answer is not None or self._progress.left_s() <= 0.0


def _unfit(path: Path, what: str) -> BundleError:
    return BundleError(
        f"{path} does not fit bundle.json, which describes it as {what}; expected files of one "
        "export. Export the network again."
    )


def _quantiles(times_s: Array) -> dict[str, float]:
    """Compute mean and quantiles, rounded up to the next measured time.

    So the p99 of few repeats is the largest one.
    """
    p50, p90, p99, p999 = np.quantile(times_s, [0.5, 0.9, 0.99, 0.999], method="higher").tolist()
    return {
        "mean": float(times_s.mean()),
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "p999": p999,
        "max": float(times_s.max()),
        "n": len(times_s),
    }


def processor_name() -> str:
    """Return the processor's name, which tells whether costs were measured on it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
