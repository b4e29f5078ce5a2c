"""Replay recorded stage times against the rules that decide whether the next exit still fits.

    # trains heads; then records a machine, for a minute: alone, with busy processes of its own
    # (loaded), with whatever else runs (shared), or so with real-time settings (realtime)
    python benchmarks/replay.py --record xeon-idle
    python benchmarks/replay.py --record xeon-loaded
    # five minutes, for 10,000 judged runs instead of 2,000
    python benchmarks/replay.py --record xeon-idle --runs 20000
    # two minutes, on any machine, busy or not: all times come from benchmarks/recordings
    python benchmarks/replay.py

The recorded network is the pretrained CIFAR-10 ResNet-20 of the shared data with eight exits
(benchmarks/deadlines.py). A recording holds the seconds of every stage and head in 4,000 runs or
more, and which exits were right; its name says on which machine and beside what. The first half of
a machine's "idle" is the profile (without it, of "realtime", or of its first recording); every rule
is judged on the second half of each recording of that machine, and on two disturbed copies of that
of the profile's: *slowed* 1.8 times in its middle half, and *interrupted* for 3 ms in 2 % of the
stages of its first half. Four budgets from 0.55 to 1.5 times the median of the whole network, in
turn. The runner is the real one, on a clock that the recording moves, so its own time is not
counted.

"missed" is the share of late answers, "floor" that of the first exit alone, "right in time" counts
a late answer as wrong, with its 95 % interval. "depth after" is the mean exit in the 200 runs that
follow 200 runs after the disturbance has ended. *clairvoyant* knows all times beforehand and takes
the deepest exit that fits: no rule can be in time with more depth. *fixed* runs, for each budget,
to the exit that was most often right and in time in the profile's half. The accuracies that
`miss_rate="wrong"` takes are those of the profile's half, too.

The constants of `miss_rate` and of "wrong" were fixed before they were replayed on any recording.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alternatives import trained
from common import ROOT, Row, write_results
from deadlines import EXITS, busy
from torch import Tensor

from impatient.anytime import Exit, Network, Run
from impatient.clock import Deadline, FakeClock
from impatient.costs import BatchCosts, CostProfile, Quantiles
from impatient.evaluation.metrics import proportion
from impatient.provenance import provenance
from impatient.runtime import Runner
from impatient.runtime.real_time import NAMES, RealTime

RECORDINGS = ROOT / "benchmarks" / "recordings"
RUNS = 4_000
BUDGETS = (0.55, 0.85, 1.15, 1.5)
RULES: dict[str, dict[str, Any]] = {
    "p99": {"statistic": "p99"},
    "p90": {"statistic": "p90"},
    "p50": {"statistic": "p50"},
    "miss_rate=0.01": {"miss_rate": 0.01},
    "miss_rate=0.05": {"miss_rate": 0.05},
    # With the accuracies of the profile's half.
    "miss_rate=wrong": {"miss_rate": "wrong"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Runs of one network: seconds of stages and heads, and whether exits were right, [N, K]."""

    stages_s: np.ndarray
    heads_s: np.ndarray
    right: np.ndarray

    def part(self, begin: int, end: int) -> Times:
        rows = slice(begin, end)
        return Times(
            stages_s=self.stages_s[rows], heads_s=self.heads_s[rows], right=self.right[rows]
        )

    def reached_s(self) -> np.ndarray:
        """Seconds until each exit has answered, if only its own head runs."""
        return self.stages_s.cumsum(1) + self.heads_s

    def profile(self) -> CostProfile:
        count = self.stages_s.shape[1]
        whole = Quantiles.of(self.stages_s.sum(1).tolist())
        batch = BatchCosts(
            stages=tuple(Quantiles.of(column.tolist()) for column in self.stages_s.T),
            heads=tuple(Quantiles.of(column.tolist()) for column in self.heads_s.T),
            exit_free=whole,
        )
        zeros = (0,) * count
        return CostProfile(
            exits=tuple(f"exit {index}" for index in range(count)),
            batches={1: batch},
            stage_macs=zeros,
            head_macs=zeros,
            stage_parameters=zeros,
            head_parameters=zeros,
            provenance=provenance(),
        )


class Replayed(Network):
    """A network whose stages take recorded times, run after run."""

    def __init__(self, times: Times, clock: FakeClock) -> None:
        super().__init__()
        self._times = times
        self._clock = clock
        self._next = 0

    @property
    def num_exits(self) -> int:
        return int(self._times.stages_s.shape[1])

    def exits(self, x: Any, *, keep: bool = False) -> Run:  # noqa: ARG002  nothing is computed
        self._next += 1
        return Run(self._exits(self._next - 1))

    def _exits(self, row: int) -> Iterator[Exit]:
        for index in range(self.num_exits):
            self._clock.advance(float(self._times.stages_s[row, index]))

            def head(_: Any, index: int = index) -> Tensor:
                self._clock.advance(float(self._times.heads_s[row, index]))
                return torch.zeros(1, 2)

            yield Exit(index, torch.zeros(1, 2), head)


def record(name: str, runs: int) -> None:
    """Record stages and heads of real runs into benchmarks/recordings/NAME.npz."""
    torch.set_num_threads(1)
    given = trained(20, EXITS)
    network = given.network
    found: list[list[list[float]]] = []
    load = name.partition("-")[2]
    with (
        busy() if load == "loaded" else contextlib.nullcontext(),
        RealTime(NAMES if load == "realtime" else ()) as settings,
        settings.quiet,
        torch.inference_mode(),
    ):
        for number in range(-50, runs):
            place = number % len(given.images)
            row = []
            begin = time.perf_counter()
            for exit in network.exits(given.images[place : place + 1]):
                stage = time.perf_counter()
                output = exit.output()
                head = time.perf_counter()
                right = float(output.argmax(1).item() == given.labels[place])
                row.append([stage - begin, head - stage, right])
                begin = time.perf_counter()
            if number >= 0:
                found.append(row)
    # to a tenth of a microsecond, so that the file is small
    table = np.array(found).round(7).astype(np.float32)
    RECORDINGS.mkdir(exist_ok=True)
    np.savez_compressed(
        RECORDINGS / f"{name}.npz",
        stages_s=table[..., 0],
        heads_s=table[..., 1],
        right=table[..., 2].astype(bool),
        machine=str(provenance()),
    )


def load(path: Path) -> Times:
    with np.load(path) as held:
        return Times(stages_s=held["stages_s"], heads_s=held["heads_s"], right=held["right"])


def disturbed(idle: Times) -> dict[str, Times]:
    """Copies of a recording that are slowed or interrupted."""
    count, exits = idle.stages_s.shape
    factor = np.ones((count, 1))
    factor[count // 4 : count * 3 // 4] = 1.8
    hit = np.random.default_rng(0).random((count, exits)) < 0.02
    hit[count // 2 :] = False
    return {
        "slowed": Times(
            stages_s=idle.stages_s * factor, heads_s=idle.heads_s * factor, right=idle.right
        ),
        "interrupted": Times(
            stages_s=idle.stages_s + 0.003 * hit, heads_s=idle.heads_s, right=idle.right
        ),
    }


def replayed(
    times: Times, rule: dict[str, Any], known: Times, costs: CostProfile, budgets_s: np.ndarray
) -> Any:
    """Exits that answered, and which answers were late, [N] each."""
    clock = FakeClock()
    if rule.get("miss_rate") == "wrong":
        rule = rule | {"accuracy": known.right.mean(0).tolist()}
    runner = Runner(Replayed(times, clock), costs, any_profile=True, clock=clock, **rule)
    answers = [
        runner.run(torch.zeros(1, 1), deadline=Deadline.after(float(budget), clock))
        for budget in budgets_s
    ]
    return (
        np.array([answer.exit for answer in answers]),
        np.array([not answer.deadline_met for answer in answers]),
    )


def fixed(times: Times, known: Times, budgets_s: np.ndarray) -> Any:
    """Run to the exit that was best for each budget when the profile was made."""
    exits = np.zeros(len(budgets_s), dtype=int)
    for budget in np.unique(budgets_s):
        gained = (known.right & (known.reached_s() <= budget)).mean(0)
        exits[budgets_s == budget] = gained.argmax()
    return exits, times.reached_s()[np.arange(len(exits)), exits] > budgets_s


def clairvoyant(times: Times, budgets_s: np.ndarray) -> Any:
    fits = times.reached_s() <= budgets_s[:, None]
    deepest = np.where(fits, np.arange(fits.shape[1]), 0).max(1)
    return deepest, ~fits[np.arange(len(fits)), deepest]


def rows() -> list[Row]:
    paths = sorted(RECORDINGS.glob("*-*.npz"))
    if not paths:
        raise SystemExit("no recordings; make one of an idle machine with --record NAME-idle.")
    machines = dict.fromkeys(path.stem.partition("-")[0] for path in paths)
    return [
        {"machine": machine} | row
        for machine in machines
        for row in rows_of([path for path in paths if path.stem.startswith(f"{machine}-")])
    ]


def rows_of(paths: list[Path]) -> list[Row]:
    """Judge all rules on the recordings of one machine."""
    held = {path.stem.partition("-")[2]: load(path) for path in paths}
    base = next((name for name in ("idle", "realtime") if name in held), next(iter(held)))
    half = len(held[base].stages_s) // 2
    known = held[base].part(0, half)
    costs = known.profile()
    median_s = float(np.median(known.reached_s()[:, -1]))
    regimes = {name: times.part(half, 2 * half) for name, times in held.items()}
    regimes |= disturbed(regimes[base])
    found = []
    for regime, times in regimes.items():
        budgets_s = np.resize(np.array(BUDGETS) * median_s, len(times.stages_s))
        end = {"slowed": half * 3 // 4, "interrupted": half // 2}.get(regime, half // 2)
        ways = {
            name: replayed(times, rule, known, costs, budgets_s) for name, rule in RULES.items()
        }
        ways["fixed"] = fixed(times, known, budgets_s)
        ways["clairvoyant"] = clairvoyant(times, budgets_s)
        found += [
            {"regime": regime, "rule": name} | judged(times, exits, late, budgets_s, end)
            for name, (exits, late) in ways.items()
        ]
    return found


def judged(
    times: Times, exits: np.ndarray, late: np.ndarray, budgets_s: np.ndarray, end: int
) -> Row:
    right = times.right[np.arange(len(exits)), exits]
    in_time = proportion(int((right & ~late).sum()), len(right))
    missed = proportion(int(late.sum()), len(late))
    floor = float((times.reached_s()[:, 0] > budgets_s).mean())
    return {
        "n": len(exits),
        "missed": f"{missed.value:.2%} ({missed.low:.2%} to {missed.high:.2%})",
        "floor": f"{floor:.2%}",
        "mean exit": f"{exits.mean():.2f}",
        "accuracy": f"{right.mean():.1%}",
        "right in time": f"{in_time.value:.1%} ({in_time.low:.1%} to {in_time.high:.1%})",
        "depth after": f"{exits[end + 200 : end + 400].mean():.2f}",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Replay recorded stage times.")
    parser.add_argument(
        "--record",
        metavar="NAME",
        help="MACHINE-idle, -loaded (with busy processes), -shared or -realtime",
    )
    parser.add_argument("--runs", type=int, default=RUNS, help="to record")
    asked = parser.parse_args()
    if asked.record:
        record(asked.record, asked.runs)
    else:
        write_results("replay", "Deadlines on recorded times", __doc__, rows())
