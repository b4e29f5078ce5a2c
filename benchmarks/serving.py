"""Timely accuracy of scheduling rules under load, simulated on a run's recordings.

    python benchmarks/serving.py RUN_DIRECTORY [--requests 2000] [--trace azure_llm_code_t]

The directory needs recordings of validation and test, and a profile of several batch sizes
(`impatient profile DIR --batch-sizes 1,2,4,8 --threads 1`). Rules see validation only. Work takes
the profile's median times a random factor (gamma, 10 %). Load 1 is what
the whole network can do at the batch size that is cheapest per sample.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.common import facts, write_results
from impatient.serving import (
    ClockworkLike,
    DynamicProgramme,
    EdgeServingLike,
    FirstThenRoundRobin,
    Fixed,
    GainTable,
    GreedyGain,
    InfaasLike,
    Rule,
    ServedModel,
    SymphonyLike,
    Work,
    fluid_bound,
    simulate,
)
from impatient.verbs.run_directory import RunDirectory

RULES: dict[str, Callable[[], Rule]] = {
    "greedy gain (ours)": GreedyGain,
    "first exits, then round robin": FirstThenRoundRobin,
    "dynamic programme (Yao et al.)": DynamicProgramme,
    "fixed small": lambda: Fixed(0),
    "fixed large": lambda: Fixed(-1),
    "switching (INFaaS-like)": InfaasLike,
    "EDF with drop (Clockwork-like)": ClockworkLike,
    "deferred (Symphony-like)": SymphonyLike,
    "stability score (EdgeServing-like)": EdgeServingLike,
}
LOADS = (0.3, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0)


def arrivals(trace: str, path: Path, count: int, rate: float, rng: np.random.Generator):
    """Instants of arrival at a mean rate, Poisson or scaled from a real trace."""
    if trace == "poisson":
        return np.cumsum(rng.exponential(1.0 / rate, count))
    instants = np.load(path)[trace][:count].astype(float)
    return (instants - instants[0]) * (len(instants) / rate / (instants[-1] - instants[0]))


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    run = RunDirectory(args.directory)
    costs = run.profile(any_machine=True)
    seen, test = run.recording("validation"), run.recording("test")
    hits = seen.quality.double().numpy()
    quality, scores = (
        part.double().numpy() for part in (test.quality, test.scores["max_probability"])
    )
    gains = GainTable.of(hits, seen.scores["max_probability"].double().numpy())
    planned = ServedModel.of("net", costs, hits.mean(1), gains=gains, max_batch=args.max_batch)
    last = planned.num_exits - 1
    sizes = range(1, args.max_batch + 1)
    cheapest = [min(planned.work_s(0, k, rows) / rows for rows in sizes) for k in range(last + 1)]
    for load in args.loads:
        for seed in range(args.seeds):
            rng = np.random.default_rng(seed)
            times = arrivals(args.trace, args.traces, args.requests, load / cheapest[-1], rng)
            low, high = (factor * planned.work_s(0, last, 1) for factor in (1.5, 10.0))
            budgets = np.exp(rng.uniform(np.log(low), np.log(high), len(times)))
            order = rng.permutation(quality.shape[1])[np.arange(len(times)) % quality.shape[1]]

            def true_s(work: Work, rows: int, rng: np.random.Generator = rng) -> float:
                return planned.work_s(work.first, work.last, rows) * rng.gamma(100.0, 0.01)

            part = slice(0, args.bound_requests)
            # Averages: what no rule that does not know the samples can beat.
            bound = fluid_bound(
                cheapest,
                np.tile(quality.mean(1), (len(times[part]), 1)),
                times[part],
                budgets[part],
            )
            for name, rule in RULES.items():
                found = simulate(
                    planned,
                    rule(),
                    arrivals_s=times,
                    budgets_s=budgets,
                    quality_KN=quality[:, order],
                    scores_KN=scores[:, order],
                    true_s=true_s,
                )
                yield {
                    "trace": args.trace,
                    "load": load,
                    "seed": seed,
                    "rule": name,
                    "timely_accuracy": round(found.timely_quality, 4),
                    "in_time": round(found.share_in_time, 4),
                    "mean_exit": round(float(found.exits[found.exits >= 0].mean()), 3)
                    if (found.exits >= 0).any()
                    else "",
                    "busy": round(found.busy_s / found.span_s, 3),
                    "fluid_bound": round(bound, 4),
                    "requests": len(times),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--bound-requests", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    parser.add_argument("--trace", default="poisson")
    parser.add_argument("--traces", type=Path, default=Path("shared/data/traces.npz"))
    parser.add_argument("--write", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    rows = list(rows_of(args))
    for load in args.loads:
        print(f"load {load:g}, fluid bound {_mean(rows, load, None, 'fluid_bound'):.3f}")
        for name in RULES:
            shown = [_mean(rows, load, name, key) for key in ("timely_accuracy", "in_time")]
            print(f"  {name:36} timely {shown[0]:.3f}  in time {shown[1]:.3f}")
    if args.write:
        write_results(f"serving-{args.trace}", "Scheduling rules under load", facts(), rows)


def _mean(rows: list[dict[str, object]], load: float, name: str | None, key: str) -> float:
    found = [row[key] for row in rows if row["load"] == load and name in (None, row["rule"])]
    return float(np.mean(found))


if __name__ == "__main__":
    main()
