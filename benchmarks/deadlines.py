"""Measure how often deadlines are met, and what they buy.

The clock is real, and the machine is idle, idle with all real-time settings that it permits, or has
a busy process on every core.

    # trains heads, exports; about 3 minutes; the machine may be busy
    python benchmarks/deadlines.py --prepare
    # about 25 minutes in 9 cases; a run that was stopped goes on where it was
    python benchmarks/deadlines.py
    # seconds, to see that it runs
    python benchmarks/deadlines.py --smoke

The pretrained CIFAR-10 ResNet-20 of the shared data with eight exits (without the shared data: a
small ResNet on digits), 32 pixels, batch 1, one thread. It is profiled idle; under load the profile
is stale, as a user's would be. Four budgets from 2.2 times the first exit's contract cost to 1.2
times the last's, in turn; 10,000 contract runs for each quantile, the two quantiles in turn; then
interruptible runs with the same budgets whose caller waits in `result()`. "Accuracy bought" is the
mean of the test accuracy of the exits that answered. Callers of interruptible runs sleep until
their deadline or spin for its last 150 microseconds (`spin`). "Bare thread" is the machine's part:
a thread with a plain loop over the exits, and a caller who sleeps until the deadline, without any
code of the runner. All three are asked in turn, and every third time for their first answer at once
("first answer"): it is handed to another thread, which has slept, so it takes longer than in a
loop.

Asked for: back at most 0.5 ms after the deadline in 99 % of the runs, and no run without an answer
once the first exit's own p99.9 fits ("without, where the first fits"). One in a thousand first
answers comes later than that by its definition, so 0.1 % is expected even there. Without an answer
the caller waits for the first exit, which is no delay of the return: "back, with an answer" is of
the runs that had one at the deadline. Under load the system itself may take the processor away for
longer than any budget.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from alternatives import Trained, trained
from common import Row, in_engine, run_cases

from impatient import Deadline, Network, Runner, profile
from impatient.clock import SYSTEM_CLOCK
from impatient.costs import Statistic
from impatient.evaluation.metrics import proportion
from impatient.runtime import Answer
from impatient.runtime.real_time import NAMES, RealTime

EXITS = ["layer1.0", "layer1.1", "layer1.2", "layer2.0", "layer2.1", "layer2.2", "layer3.0"]
RUNS = 10_000
INTERRUPTIBLE = 4_000
# Every so many rounds the first answer is asked for at once, too.
FIRST_EVERY = 3
QUANTILES: tuple[Statistic, ...] = ("p99", "p999")
BUSY = "import numpy as np\na = np.random.default_rng(0).random((300, 300))\nwhile True: a @ a"


def measure(engine: str, load: str, *, smoke: bool) -> list[Row]:
    torch.set_num_threads(1)
    given = trained(20, EXITS, small=smoke)
    made = in_engine(given.network, engine, example=given.images[:2], threads=1, key="deadlines")
    x = given.images[:1]
    with RealTime(NAMES if load == "real-time" else ()) as settings:
        costs = profile(made, x, repeats=50 if smoke else 3000, max_seconds=30)
        runners = {quantile: Runner(made, costs, statistic=quantile) for quantile in QUANTILES}
        reached = costs.contract_s()
        budgets = np.linspace(2.2 * reached[0], 1.2 * reached[-1], 4)
        with busy() if load == "loaded" else contextlib.nullcontext():
            for runner in runners.values():
                runner.warm_up(x, times=50)
            answers = contract(runners, x, budgets, 80 if smoke else RUNS)
            ways = {
                "interruptible": Waits(runners["p99"], x, spin=False),
                "interruptible, spin": Waits(runners["p99"], x, spin=True),
                "bare thread": BareThread(made, x),
            }
            waited, first_s = in_turn_waiting(
                ways,
                budgets,
                20 if smoke else INTERRUPTIBLE,
                settle=functools.partial(runners["p99"].run, x),
            )
    made_so = ", ".join(each.name for each in settings.settings if each.done)
    known: Row = {"data": given.data, "engine": engine, "load": load, "settings": made_so}
    groups = {f"{budget * 1e3:.2f}": [number] for number, budget in enumerate(budgets)} | {
        "all": [*range(len(budgets))]
    }
    rows = [
        known
        | row(
            "contract",
            quantile,
            label,
            [answers[quantile, number] for number in numbers],
            budgets[numbers],
            given,
        )
        for quantile in QUANTILES
        for label, numbers in groups.items()
    ]
    return rows + [
        known
        | waiting(
            way, label, budgets[numbers], [waited[way][n] for n in numbers], first_s[way], given
        )
        for way in ways
        for label, numbers in groups.items()
    ]


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Run a process that multiplies matrices on every core."""
    alone = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    others = [
        subprocess.Popen([sys.executable, "-c", BUSY], env=alone)
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def contract(
    runners: dict[Statistic, Runner], x: torch.Tensor, budgets: np.ndarray, runs: int
) -> dict[tuple[Statistic, int], list[Answer]]:
    """Collect `runs` answers for each quantile and budget, in turn."""
    answers: dict[tuple[Statistic, int], list[Answer]] = {
        (quantile, number): [] for number in range(len(budgets)) for quantile in runners
    }
    for _ in range(runs // len(budgets)):
        for quantile, number in answers:
            answers[quantile, number].append(
                runners[quantile].run(x, deadline=Deadline.after(budgets[number]))
            )
    return answers


class Waited(NamedTuple):
    """What a caller had who waited until a deadline.

    Attributes:
        exit: exit of the answer; the first where there was none in time.
        in_time: whether it was ready by the deadline.
        late_s: seconds after the deadline until the caller had it; negative if it came early.
    """

    exit: int
    in_time: bool
    late_s: float


class Waits:
    """A caller of interruptible runs."""

    def __init__(self, runner: Runner, x: torch.Tensor, *, spin: bool) -> None:
        self._runner = runner
        self._x = x
        self._spin = spin

    def __call__(self, deadline: Deadline) -> Waited:
        with self._runner.start(self._x, deadline=deadline) as run:
            answer = run.result(spin=self._spin)
        late_s = SYSTEM_CLOCK.now() - deadline.instant
        return Waited(answer.exit, answer.deadline_met, late_s)

    def first_s(self) -> float:
        with self._runner.start(self._x) as run:
            return run.interrupt().elapsed_s


class BareThread:
    """A thread that computes exits, and a caller who sleeps: what the machine itself takes."""

    def __init__(self, network: Network, x: torch.Tensor) -> None:
        self._network = network
        self._x = x
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def __call__(self, deadline: Deadline) -> Waited:
        job = self._waited_for(deadline)
        in_time = job.posted_at <= deadline.instant
        return Waited(job.exit, in_time, SYSTEM_CLOCK.now() - deadline.instant)

    def first_s(self) -> float:
        begin = SYSTEM_CLOCK.now()
        return self._waited_for(Deadline(begin)).posted_at - begin

    def _waited_for(self, deadline: Deadline) -> Job:
        job = Job(deadline.instant)
        self._jobs.put(job)
        with job.changed:
            while not job.over and (left := deadline.instant - SYSTEM_CLOCK.now()) > 0.0:
                job.changed.wait(left)
            while job.exit < 0:
                job.changed.wait()
        return job

    @torch.inference_mode()
    def _serve(self) -> None:
        while True:
            job = self._jobs.get()
            with self._network.exits(self._x) as run:
                for exit in run:
                    exit.output()
                    if job.posted(exit.index, last=exit.index == self._network.num_exits - 1):
                        break


class Job:
    """A run of the bare thread.

    Attributes:
        exit: its latest exit in time, or else the first; -1 before that.
        posted_at: instant at which that was there.
        over: whether there is nothing more to wait for.
    """

    def __init__(self, until: float) -> None:
        self.changed = threading.Condition()
        self.exit = -1
        self.posted_at = 0.0
        self.over = False
        self._until = until

    def posted(self, exit: int, *, last: bool) -> bool:
        """Post an exit unless it is late, and tell whether to stop."""
        with self.changed:
            now = SYSTEM_CLOCK.now()
            late = now >= self._until
            if self.exit < 0 or not late:
                self.exit, self.posted_at = exit, now
            self.over = late or last
            if self.over:
                self.changed.notify_all()
            return self.over


def in_turn_waiting(
    ways: Mapping[str, Waits | BareThread],
    budgets: np.ndarray,
    runs: int,
    *,
    settle: Callable[[], object],
) -> tuple[dict[str, list[list[Waited]]], dict[str, list[float]]]:
    """Ask all ways in turn, budget after budget.

    Args:
        settle: run after each, so that an abandoned stage ends and steals no time from the next.
    Returns:
        What callers had, by way and budget, and the seconds to first answers, by way.
    """
    found: dict[str, list[list[Waited]]] = {way: [[] for _ in budgets] for way in ways}
    first_s: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(runs):
        place = number % len(budgets)
        for way, ask in ways.items():
            found[way][place].append(ask(Deadline.after(budgets[place])))
            settle()
            if number % FIRST_EVERY == 0:
                first_s[way].append(ask.first_s())
                settle()
    return found, first_s


def row(
    mode: str,
    quantile: str,
    budget: str,
    answers: Sequence[Sequence[Answer]],
    budgets: np.ndarray,
    given: Trained,
) -> Row:
    every = [answer for some in answers for answer in some]
    missed = proportion(sum(not answer.deadline_met for answer in every), len(every))
    spans = [
        (answer, limit) for some, limit in zip(answers, budgets, strict=True) for answer in some
    ]
    used = [answer.elapsed_s / limit for answer, limit in spans]
    late = [answer.elapsed_s - limit for answer, limit in spans if not answer.deadline_met]
    return {
        "mode": mode,
        "quantile": quantile,
        "budget ms": budget,
        "n": len(every),
        "missed": f"{missed.value:.2%} ({missed.low:.2%} to {missed.high:.2%})",
        "lateness of the late ms p50 / max": f"{np.median(late) * 1e3:.3f} / {max(late) * 1e3:.3f}"
        if late
        else "none late",
        "budget used": f"{np.mean(used):.2f}",
        "mean exit": f"{np.mean([answer.exit for answer in every]):.2f}",
        "accuracy bought": bought([answer.exit for answer in every], given),
    }


def waiting(
    way: str,
    budget: str,
    budgets: np.ndarray,
    found: Sequence[Sequence[Waited]],
    first_s: Sequence[float],
    given: Trained,
) -> Row:
    """Measure how late callers get back, and whether there was an answer."""
    every = [waited for some in found for waited in some]
    firsts_s = np.quantile(first_s, [0.5, 0.99, 0.999])
    first = " / ".join(f"{first * 1e3:.2f}" for first in firsts_s)
    fitting = [
        waited
        for limit, some in zip(budgets, found, strict=True)
        if limit >= firsts_s[2]
        for waited in some
    ]
    return {
        "mode": way,
        "quantile": "",
        "budget ms": budget,
        "n": len(every),
        "first answer ms p50 / p99 / p99.9": first,
        "without an answer": without(every),
        "without, where the first fits": without(fitting) if fitting else "fits nowhere",
        "back after the deadline ms p50 / p99 / max": back([each.late_s for each in every]),
        "back, with an answer": back([each.late_s for each in every if each.in_time]),
        "mean exit": f"{np.mean([each.exit for each in every]):.2f}",
        "accuracy bought": bought([each.exit for each in every], given),
    }


def back(late_s: Sequence[float]) -> str:
    """Say how late callers were, of those who came back after the deadline."""
    late = [seconds * 1e3 for seconds in late_s if seconds > 0]
    p50, p99, most = np.quantile(late, [0.5, 0.99, 1.0]) if late else (0.0, 0.0, 0.0)
    return f"{p50:.3f} / {p99:.3f} / {most:.3f} (n={len(late)})"


def without(waited: Sequence[Waited]) -> str:
    none = proportion(sum(not each.in_time for each in waited), len(waited))
    return f"{none.value:.2%} ({none.low:.2%} to {none.high:.2%}, n={len(waited)})"


def bought(exits: Sequence[int], given: Trained) -> str:
    return f"{np.mean([given.accuracy[exit] for exit in exits]):.2%}"


CASES = {
    f"{engine}-{load}": (engine, load)
    for load in ("idle", "real-time", "loaded")
    for engine in ("eager", "onnxruntime", "openvino")
}


def prepare() -> None:
    given = trained(20, EXITS)
    for engine in ("onnxruntime", "openvino"):
        in_engine(given.network, engine, example=given.images[:2], threads=1, key="deadlines")


if __name__ == "__main__":
    smoke = ["eager-real-time", "onnxruntime-loaded"]
    run_cases(
        "deadlines",
        "Deadlines on the real clock",
        __doc__,
        CASES,
        measure,
        smoke=smoke,
        prepare=prepare,
    )
