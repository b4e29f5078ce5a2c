"""Measure how often deadlines are met, and what they buy.

The clock is real, and the machine is idle, idle with all real-time settings that it permits, or has
a busy process on every core.

    # trains heads, exports; about 3 minutes; the machine may be busy
    python benchmarks/deadlines.py --prepare
    # about 20 minutes in 9 cases; a run that was stopped goes on where it was
    python benchmarks/deadlines.py
    # seconds, to see that it runs
    python benchmarks/deadlines.py --smoke

The pretrained CIFAR-10 ResNet-20 of the shared data with eight exits (without the shared data: a
small ResNet on digits), 32 pixels, batch 1, one thread. It is profiled idle; under load the profile
is stale, as a user's would be. Four budgets from 2.2 times the first exit's contract cost to 1.2
times the last's, in turn; 10,000 contract runs for each quantile, the two quantiles in turn; then
interruptible runs with the same budgets whose caller waits in `result()`. "Accuracy bought" is the
mean of the test accuracy of the exits that answered. Callers of interruptible runs sleep until
their deadline or spin for its last 150 microseconds (`spin`), in turn. Asked for: back at most 0.5
ms after the deadline in 99 % of the runs, and no run without an answer once the first exit's own
p99.9 fits ("without, where the first fits"). When it comes is measured first ("first answer"): it
is handed to another thread, which has slept, so it takes longer than in a loop. Under load the
system itself may take the processor away for longer than any budget.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from alternatives import Trained, trained
from common import Row, in_engine, run_cases

from impatient import Deadline, Runner, profile
from impatient.clock import SYSTEM_CLOCK
from impatient.costs import Statistic
from impatient.evaluation.metrics import proportion
from impatient.runtime import Answer
from impatient.runtime.real_time import NAMES, RealTime

EXITS = ["layer1.0", "layer1.1", "layer1.2", "layer2.0", "layer2.1", "layer2.2", "layer3.0"]
RUNS = 10_000
INTERRUPTIBLE = 4_000
FIRST = 1_000
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
            first_s = first_answers(runners["p99"], x, 20 if smoke else FIRST)
            waited = interruptible(runners["p99"], x, budgets, 20 if smoke else INTERRUPTIBLE)
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
        | waiting(spin, label, budgets[numbers], [waited[spin][n] for n in numbers], first_s, given)
        for spin in (False, True)
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


def first_answers(runner: Runner, x: torch.Tensor, runs: int) -> list[float]:
    """Seconds from the start of an interruptible run to its first answer."""
    found = []
    for _ in range(runs):
        with runner.start(x) as run:
            found.append(run.interrupt().elapsed_s)
        # let the abandoned stage end, so that it does not steal time from the next run
        runner.run(x)
    return found


def interruptible(
    runner: Runner, x: torch.Tensor, budgets: np.ndarray, runs: int
) -> dict[bool, list[list[tuple[Answer, float]]]]:
    """Collect answers per budget, and how late the caller had them, spinning or not, in turn.

    The delay after the deadline is negative where the last exit came earlier.
    """
    found: dict[bool, list[list[tuple[Answer, float]]]] = {
        spin: [[] for _ in budgets] for spin in (False, True)
    }
    for number in range(2 * runs):
        spin = number % 2 == 1
        place = number // 2 % len(budgets)
        deadline = Deadline.after(budgets[place])
        with runner.start(x, deadline=deadline) as run:
            answer = run.result(spin=spin)
        found[spin][place].append((answer, SYSTEM_CLOCK.now() - deadline.instant))
        # let the abandoned stage end, so that it does not steal time from the next run
        runner.run(x)
    return found


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
        "accuracy bought": bought(every, given),
    }


def waiting(
    spin: bool,
    budget: str,
    budgets: np.ndarray,
    found: Sequence[Sequence[tuple[Answer, float]]],
    first_s: Sequence[float],
    given: Trained,
) -> Row:
    """Measure how late callers of interruptible runs get back.

    Also tell whether there was an answer.
    """
    answers = [answer for some in found for answer, _ in some]
    late = [after * 1e3 for some in found for _, after in some if after > 0]
    p50, p99, most = np.quantile(late, [0.5, 0.99, 1.0]) if late else (0.0, 0.0, 0.0)
    firsts_s = np.quantile(first_s, [0.5, 0.99, 0.999])
    first = " / ".join(f"{first * 1e3:.2f}" for first in firsts_s)
    fitting = [
        answer
        for limit, some in zip(budgets, found, strict=True)
        if limit >= firsts_s[2]
        for answer, _ in some
    ]
    return {
        "mode": "interruptible, spin" if spin else "interruptible",
        "quantile": "",
        "budget ms": budget,
        "n": len(answers),
        "first answer ms p50 / p99 / p99.9": first,
        "without an answer": without(answers),
        "without, where the first fits": without(fitting) if fitting else "fits nowhere",
        "back after the deadline ms p50 / p99 / max": (
            f"{p50:.3f} / {p99:.3f} / {most:.3f} (n={len(late)})"
        ),
        "mean exit": f"{np.mean([answer.exit for answer in answers]):.2f}",
        "accuracy bought": bought(answers, given),
    }


def without(answers: Sequence[Answer]) -> str:
    none = proportion(sum(not answer.deadline_met for answer in answers), len(answers))
    return f"{none.value:.2%} ({none.low:.2%} to {none.high:.2%}, n={len(answers)})"


def bought(answers: Sequence[Answer], given: Trained) -> str:
    return f"{np.mean([given.accuracy[answer.exit] for answer in answers]):.2%}"


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
