"""Deadlines on the real clock: how often they are met, which exit is reached, how much of the budget is used.

    python benchmarks/deadlines.py            about 4 minutes a network; leave the machine alone meanwhile
    python benchmarks/deadlines.py --smoke    seconds, to see that it runs

For budgets from 1.2 times the first exit's contract cost to 1.2 times the last one's: contract runs, and interruptible
runs with the same deadline whose caller waits in `result()`. The weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from common import write_results

from impatient import Deadline, Runner, attach_exits, load_model, profile
from impatient.clock import SYSTEM_CLOCK
from impatient.evaluation.metrics import proportion

NETWORKS = (("impatient:resnet:n=3,c=16", 32, 8), ("torchvision:resnet18", 64, 8))


def contract(runner: Runner, x: torch.Tensor, budget: float, runs: int) -> dict[str, object]:
    answers = []
    for _ in range(runs):
        answers.append(runner.run(x, deadline=Deadline.after(budget)))
    met = proportion(sum(answer.deadline_met for answer in answers), runs)
    used = np.array([answer.elapsed_s / budget for answer in answers])
    late = np.array([answer.elapsed_s - budget for answer in answers if not answer.deadline_met])
    return {
        "met %": f"{met.value:.2%} ({met.low:.2%} to {met.high:.2%})", "mean exit": f"{np.mean([a.exit for a in answers]):.2f}",
        "budget used, mean": f"{used.mean():.2f}", "worst lateness ms": f"{late.max() * 1e3:.3f}" if len(late) else "none",
    }  # fmt: skip


def interruptible(runner: Runner, x: torch.Tensor, budget: float, runs: int) -> dict[str, object]:
    returned, exits, unanswered = [], [], 0
    for _ in range(runs):
        deadline = Deadline.after(budget)
        with runner.start(x, deadline=deadline) as run:
            answer = run.result()
        returned.append(SYSTEM_CLOCK.now() - deadline.instant)
        exits.append(answer.exit)
        unanswered += not answer.deadline_met
        runner.run(x)  # let the abandoned stage end, so that it does not steal time from the next run
    after = np.array([value for value in returned if value > 0]) * 1e3
    p50, p99, most = np.quantile(after, [0.5, 0.99, 1.0]) if len(after) else (0.0, 0.0, 0.0)
    return {
        "no answer by then": unanswered, "mean exit interruptible": f"{np.mean(exits):.2f}",
        "return after deadline ms p50 / p99 / max": f"{p50:.3f} / {p99:.3f} / {most:.3f} (n={len(after)})",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs = 20 if arguments.smoke else arguments.runs
    rows = []
    for spec, size, exits in NETWORKS[:1] if arguments.smoke else NETWORKS:
        torch.manual_seed(0)
        x = torch.randn(1, 3, size, size)
        network = attach_exits(load_model(spec), example=x, count=exits).eval()
        costs = profile(network, x, repeats=50 if arguments.smoke else 1000, max_seconds=60)
        runner = Runner(network, costs)
        runner.warm_up(x)
        reached = costs.contract_s()
        for budget in np.linspace(1.2 * reached[0], 1.2 * reached[-1], 2 if arguments.smoke else 8):
            row = {"network": spec, "pixels": size, "threads": arguments.threads, "runs": runs,
                   "budget ms": f"{budget * 1e3:.2f}"}  # fmt: skip
            rows.append({**row, **contract(runner, x, budget, runs), **interruptible(runner, x, budget, runs)})
            print(rows[-1], flush=True)
        if not arguments.smoke:  # after each network, so that a run that is stopped keeps what it has
            write_results("deadlines", "Deadlines on the real clock", __doc__, rows)


if __name__ == "__main__":
    main()
