"""A million calls with a deadline, interrupts and errors: nothing may grow.

    # about 6 minutes; a run that was stopped goes on where it was
    python benchmarks/soak.py
    # seconds, to see that it runs
    python benchmarks/soak.py --smoke

A tiny network with three exits. Contract calls with deadlines from too short for the first exit to
long enough for the last, and every tenth call an interruptible one, abandoned at its deadline or
interrupted. Another tenth fails: inputs of a wrong width and, in eager, a network that raises in
its second stage, in contract and interruptible calls. Resident memory, threads and open files are
read every 1 % of the calls. The verdict is on the slope of the last 90 % (Theil and Sen, with its
95 % interval: memory moves in steps, and one step must not decide), as growth over a million calls;
growth of at most 1 MiB passes.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import Row, in_engine, run_cases
from scipy import stats
from torch import nn

from impatient import Deadline, Runner, attach_exits, profile

CASES = {
    "eager": ("eager", 1_000_000),
    "onnxruntime": ("onnxruntime", 200_000),
    "openvino": ("openvino", 200_000),
}


class Refusing(nn.Module):
    """Raise where a number is large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.detach().max()) > 1e6:
            raise ValueError("too large")
        return x


def measure(engine: str, calls: int, *, smoke: bool) -> list[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    calls = 2000 if smoke else calls
    example = torch.randn(2, 8)
    # what asks for a number cannot be exported
    middle = Refusing() if engine == "eager" else nn.Identity()
    backbone = nn.Sequential(
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Sequential(middle, nn.Linear(8, 8)),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    network = attach_exits(backbone, example=example, after=["1", "3"]).eval()
    made = in_engine(network, engine, example=example, threads=1, key="soak")
    x = example[:1]
    wrong = [torch.randn(1, 9), *([x * 1e12] if engine == "eager" else [])]
    costs = profile(made, x, repeats=200)
    budgets = [1e-6, *(3 * reached for reached in costs.contract_s()), 1.0]
    with Runner(made, costs) as runner:
        runner.warm_up(x)
        samples, exits, failed = run_calls(runner, x, wrong, calls, budgets)
    done, memory, threads, files = samples.T
    low, middle, high = (value / 2**20 for value in growth(done, memory))
    grows = high > 1.0 or growth(done, threads)[0] > 0 or growth(done, files)[0] > 0
    return [
        {
            "engine": engine,
            "calls": calls,
            "answers by exit": " ".join(str(count) for count in exits),
            "failed as they should": failed,
            "MiB at 10 %": f"{memory[len(memory) // 10] / 2**20:.1f}",
            "MiB at the end": f"{memory[-1] / 2**20:.1f}",
            "MiB per million calls": f"{middle:.2f} ({low:.2f} to {high:.2f})",
            "threads": f"{threads.min():.0f} to {threads.max():.0f}, {threads[-1]:.0f} at the end",
            "open files": f"{files.min():.0f} to {files.max():.0f}, {files[-1]:.0f} at the end",
            "verdict": "growth" if grows else "no growth",
        }
    ]


def run_calls(
    runner: Runner,
    x: torch.Tensor,
    wrong: Sequence[torch.Tensor],
    calls: int,
    budgets_s: Sequence[float],
) -> tuple[np.ndarray, list[int], int]:
    """Sample calls done, bytes, threads and open files.

    Also count the answers per exit and the calls that failed. Calls whose input is wrong must fail.
    """
    samples = []
    exits = [0] * runner.network.num_exits
    failed = 0
    gc.collect()
    # what is there now need not be looked through again at every sample
    gc.freeze()
    budgets = itertools.cycle(budgets_s)
    inputs = itertools.cycle(wrong)
    for number in range(calls):
        if number % max(200, calls // 100) == 0:
            samples.append((number, *held()))
        budget = next(budgets)
        if number % 10 == 5:
            fail(runner, next(inputs), interruptible=number // 20 % 2 == 1)
            failed += 1
            continue
        if number % 10:
            answer = runner.run(x, deadline=Deadline.after(budget))
        else:
            with runner.start(x, deadline=Deadline.after(min(budget, 1e-3))) as run:
                answer = run.interrupt() if number % 20 else run.result()
        exits[answer.exit] += 1
    return np.array([*samples, (calls, *held())], dtype=float), exits, failed


def fail(runner: Runner, wrong: torch.Tensor, *, interruptible: bool) -> None:
    """Give a wrong input with time enough for the last exit."""
    try:
        if interruptible:
            with runner.start(wrong, deadline=Deadline.after(1.0)) as run:
                run.result()
        else:
            runner.run(wrong, deadline=Deadline.after(1.0))
    except (RuntimeError, ValueError):
        return
    raise AssertionError("a wrong input was answered")


def held() -> tuple[int, int, int]:
    """Resident bytes, threads and open files of this process."""
    # what only waits to be collected does not count
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    threads, files = (len([*Path("/proc/self", kind).iterdir()]) for kind in ("task", "fd"))
    return pages * os.sysconf("SC_PAGE_SIZE"), threads, files


def growth(calls: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """Growth over a million calls, without the first tenth: lower end, slope, upper end."""
    later = slice(len(values) // 10, None)
    slope, _, low, high = stats.theilslopes(values[later], calls[later])
    return float(low * 1e6), float(slope * 1e6), float(high * 1e6)


if __name__ == "__main__":
    run_cases("soak", "A million calls with a deadline", __doc__, CASES, measure, smoke=[*CASES])
