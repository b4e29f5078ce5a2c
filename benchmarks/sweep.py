"""Time judging a thousand policies and a thousand budgets.

The recording has 10,000 samples x 16 exits x 100 classes. The aim is under a second for each.

python benchmarks/sweep.py            about half a minute
python benchmarks/sweep.py --smoke    seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
import torch
from common import Calls, Row, repeated, write_results

from impatient import ThresholdPolicy, budgets, evaluate
from impatient.budgets import Budget, exit_weights_many
from impatient.costs import BatchCosts, CostProfile, Quantiles
from impatient.evaluation import Recording
from impatient.evaluation.vectorised import expected_accuracies, judge_policies
from impatient.provenance import provenance
from impatient.tasks.scores import SCORES


def random_recording(samples: int, exits: int, classes: int, seed: int) -> Recording:
    """Noise in which deeper exits raise the true class by more."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=random)
    outputs = torch.randn(exits, samples, classes, generator=random)
    outputs[:, torch.arange(samples), labels] += torch.linspace(1.0, 4.0, exits)[:, None]
    names = tuple(f"exit{k}" for k in range(exits))
    return Recording.of(outputs, labels, split="test", exits=names, provenance=provenance())


def even_costs(exits: int) -> CostProfile:
    """Make costs of 1 ms per stage and 0.1 ms per head."""
    stage = Quantiles.of([1e-3])
    head = Quantiles.of([1e-4])
    counts = (1,) * exits
    batch = BatchCosts(stages=(stage,) * exits, heads=(head,) * exits, exit_free=stage)
    return CostProfile(
        exits=tuple(f"exit{k}" for k in range(exits)),
        batches={1: batch},
        stage_macs=counts,
        head_macs=counts,
        stage_parameters=counts,
        head_parameters=counts,
        provenance=provenance(),
    )


def random_policies(recording: Recording, count: int, seed: int) -> list[ThresholdPolicy]:
    """Make thresholds at random quantiles of each exit's scores.

    The three scores take turns, and one exit in five is closed.
    """
    random = np.random.default_rng(seed)
    scores = {
        name: np.sort(score(recording.outputs).numpy(), axis=1) for name, score in SCORES.items()
    }
    exits, samples = scores["margin"].shape
    made = []
    for name in (list(SCORES)[index % 3] for index in range(count)):
        bounds = scores[name][np.arange(exits), random.integers(samples // 2, samples, size=exits)]
        bounds = np.where(random.random(exits) < 0.2, math.inf, bounds)
        made.append(ThresholdPolicy(score=name, thresholds=(*bounds[:-1].tolist(), -math.inf)))
    return made


def random_budgets(count: int, longest_s: float, seed: int) -> list[Budget]:
    """Make budgets of all shapes in turn, over random ranges, or from logs of a hundred."""
    random = np.random.default_rng(seed)
    shapes: list[Callable[[float, float], Budget]] = [
        budgets.uniform,
        budgets.small_likely,
        budgets.large_likely,
        budgets.normal,
        budgets.log_uniform,
        lambda low, high: budgets.point((low + high) / 2),
        lambda low, high: budgets.empirical(random.uniform(low, high, size=100).tolist()),
    ]
    ends = np.sort(random.uniform(1e-4, longest_s, size=(count, 2)), axis=1).tolist()
    return [shapes[index % len(shapes)](low, high) for index, (low, high) in enumerate(ends)]


def workload(samples: int, exits: int, classes: int, count: int, seed: int) -> Calls:
    """Return the calls to time, by name and number of policies or budgets."""
    costs = even_costs(exits)
    recording = random_recording(samples, exits, classes, seed)
    policies = random_policies(recording, count, seed)
    reached_s = costs.interruptible_s()
    drawn = random_budgets(count, 1.25 * reached_s[-1], seed)
    return {
        ("judge_policies", count): lambda: judge_policies(recording, costs, policies),
        ("expected_accuracies", count): lambda: expected_accuracies(recording, reached_s, drawn),
        ("exit_weights_many", count): lambda: exit_weights_many(drawn, reached_s),
        ("evaluate, no budgets", 1): lambda: evaluate(recording, costs, policies[0], budgets={}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    samples, exits, classes, count = (500, 4, 10, 20) if smoke else (10_000, 16, 100, 1000)
    seeds, repeats = (1, 2) if smoke else (3, 7)
    taken = repeated(
        lambda seed: workload(samples, exits, classes, count, seed), seeds=seeds, repeats=repeats
    )
    rows: list[Row] = [
        {
            "function": name,
            "policies or budgets": number,
            "samples": samples,
            "exits": exits,
            "classes": classes,
            "threads": 1,
        }
        | spread
        for (name, number), spread in taken.items()
    ]
    print(*rows, sep="\n")
    if not smoke:
        text = (
            f"{__doc__.splitlines()[0]} Random recordings of {seeds} seeds, {repeats} repeats each "
            "after one that does not count; all from the recording on, scores and hits included. "
            "The three scores in turn, one exit in five closed; seven shapes of budgets. "
            "`evaluate` with one policy, which gives intervals and calibration too, to compare "
            "with."
        )
        write_results("sweep", "Many policies and budgets at once", text, rows)


if __name__ == "__main__":
    main()
