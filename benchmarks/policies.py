"""Time fitting and judging gates on 10,000 samples x 16 exits.

The aims are 10 seconds for gates of 100 prices of time, and 2 seconds for judging 1,000 of them.

python benchmarks/policies.py            a few minutes
python benchmarks/policies.py --smoke    seconds, to see that it runs
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from common import Calls, Row, repeated, write_results
from sweep import even_costs, random_recording

from impatient.costs import CostProfile
from impatient.evaluation import Recording
from impatient.policies import GatePolicy, Topology, sweep_gates, sweep_selection
from impatient.policies.gates import exit_times_s
from impatient.policies.selection import SelectionPoint


def fit_gates_for(recording: Recording, costs: CostProfile, count: int) -> list[GatePolicy]:
    """Fit gates for `count` prices of time, from almost nothing to very high."""
    prices = (np.geomspace(1e-3, 30.0, count) / costs.contract_s()[-1]).tolist()
    return [point.policy for point in sweep_gates(recording, costs, prices, gate_s=1e-4)]


def judge_gates(
    policies: Sequence[GatePolicy], recording: Recording, costs: CostProfile
) -> list[tuple[float, float]]:
    """Accuracy and mean seconds of each."""
    hits = recording.quality
    samples = torch.arange(len(recording.labels))
    return [
        (float(hits[exits, samples].mean()), float(exit_times_s(policy, costs)[exits].mean()))
        for policy, exits in zip(
            policies, GatePolicy.exits_of_each(policies, recording), strict=True
        )
    ]


def select_for(
    recording: Recording, node_s: Sequence[float], count: int
) -> tuple[SelectionPoint, ...]:
    """Fit selection on a chain for `count` prices of time."""
    prices = np.geomspace(1e-3 / max(node_s), 1.0 / min(node_s), count).tolist()
    return sweep_selection(
        recording, node_s, Topology.chain(len(node_s)), time_prices=prices, gate_s=1e-4
    )


def workload(samples: int, exits: int, classes: int, prices: int, judged: int, seed: int) -> Calls:
    """Return the calls to time, by name and number of prices or policies.

    Making the recording does not count.
    """
    costs = even_costs(exits)
    recording = random_recording(samples, exits, classes, seed)
    fitted = fit_gates_for(
        random_recording(max(200, samples // 10), exits, classes, seed + 1), costs, min(prices, 20)
    )
    policies = [fitted[place % len(fitted)] for place in range(judged)]
    nodes = min(exits, 6)
    few = random_recording(samples, nodes, classes, seed)
    node_s = np.geomspace(1e-3, 1e-2, nodes).tolist()
    return {
        ("sweep_gates", prices): lambda: fit_gates_for(recording, costs, prices),
        ("gates judged", judged): lambda: judge_gates(policies, recording, costs),
        (f"sweep_selection, {nodes} networks", prices): lambda: select_for(few, node_s, prices),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    samples, exits, classes, prices, judged = (
        (300, 4, 10, 5, 20) if smoke else (10_000, 16, 100, 100, 1000)
    )
    seeds, repeats = (1, 2) if smoke else (3, 3)
    taken = repeated(
        lambda seed: workload(samples, exits, classes, prices, judged, seed),
        seeds=seeds,
        repeats=repeats,
    )
    rows: list[Row] = [
        {
            "what": name,
            "prices or policies": number,
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
            "after one that does not count; logistic gates on confidences, everything from the "
            "recording on. Judged are policies fitted for 20 prices on a tenth as many other "
            "samples, over and over, by accuracy and mean time. Selection: six of the exits as "
            "networks of a chain."
        )
        write_results("policies", "Fitting and judging learned policies", text, rows)


if __name__ == "__main__":
    main()
