"""Measure batches that shrink against the network without exits.

32 samples leave at different exits. Both are measured in turn.

    # exports, once, a minute; the machine may be busy
    python benchmarks/batching.py --prepare
    # about 10 minutes; a run that was stopped goes on where it was
    python benchmarks/batching.py
    # seconds, to see that it runs
    python benchmarks/batching.py --smoke

Asked for: at least 95 % of the ideal saving in eager and 90 % in engines, and that "auto" never
takes longer than "never" ("auto / never", of the same round). Ideal is the time of the network
without exits times the mean depth: the mean over the samples of the share of the stages' time up to
the exit each left at. Heads, scores and copying are no part of the ideal; they are in what is
measured. With one thread, "processor" is the same share by the thread's processor time, which other
work on the machine disturbs least. Random weights; thresholds let given shares of a pool of inputs
leave at each of four exits, so a single batch has more or less of them, and each run is held
against the exits its own samples left at. A ratio and its ideal are of the same round; "whole /
whole" is the network without exits twice in every round (A/A).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from common import (
    Row,
    in_engine,
    in_turn_by_both_clocks,
    median_interval,
    run_cases,
    with_interval,
)
from torch import Tensor

from impatient import Runner, attach_exits, load_model, profile
from impatient.networks import MultiExitNetwork
from impatient.policies import ThresholdPolicy
from impatient.policies.rules import thresholds_for_shares
from impatient.runtime.compaction import When
from impatient.tasks.scores import SCORES

BATCH = 32
SHARES = {
    "even": (0.25, 0.25, 0.25, 0.25),
    "mostly early": (0.5, 0.25, 0.15, 0.1),
    "mostly late": (0.1, 0.15, 0.25, 0.5),
}
# spec, pixels, exits after
NETWORKS = {
    "cifar_resnet": ("impatient:resnet:n=9,c=16", 32, "every:7"),
    "resnet18": ("torchvision:resnet18", 64, ["layer1", "layer2", "layer3"]),
}
# of measuring, per case
SECONDS = 60.0
# batches
POOL = 8


def network_and_pool(name: str) -> tuple[MultiExitNetwork, Tensor]:
    spec, pixels, after = NETWORKS[name]
    torch.manual_seed(0)
    pool = torch.randn(POOL * BATCH, 3, pixels, pixels)
    return attach_exits(load_model(spec), example=pool[:1], after=after).eval(), pool


def policy_for(outputs_kn: Sequence[Tensor], shares: Sequence[float]) -> ThresholdPolicy:
    """Lets these shares of the pool leave at each exit."""
    scores = torch.stack([SCORES["max_probability"](outputs) for outputs in outputs_kn])
    return ThresholdPolicy(
        score="max_probability", thresholds=thresholds_for_shares(scores, shares)
    )


def measure(name: str, engine: str, threads: int, *, smoke: bool) -> list[Row]:
    # torch computes the scores, and its threads would spin behind each for milliseconds on the
    # engine's cores
    torch.set_num_threads(threads if engine == "eager" else 1)
    network, pool = network_and_pool(name)
    pool = pool[: 2 * BATCH] if smoke else pool
    made = in_engine(network, engine, example=pool[:2], threads=threads, key=f"batching-{name}")
    batches = pool.split(BATCH)
    with torch.inference_mode():
        outputs = [
            torch.cat(parts) for parts in zip(*(network(batch) for batch in batches), strict=True)
        ]
    costs = profile(
        made,
        pool[:1],
        batch_sizes=(1, 8, BATCH),
        repeats=3 if smoke else 50,
        warm_up=3,
        max_seconds=8,
    )
    # medians: a mean has whatever interrupted one repeat
    stages = np.cumsum([stage.p50 for stage in costs.batches[BATCH].stages])
    depth = stages / stages[-1]
    rows = []
    for spread, shares in list(SHARES.items())[: 1 if smoke else None]:
        policy = policy_for(outputs, shares)
        whens: tuple[When, ...] = ("never", "always", "auto")
        ran = {
            when: Batches(Runner(made, costs, policy, compaction=when), batches, depth)
            for when in whens
        }
        whole = ExitFreeNetwork(made.backbone, batches)
        calls = {"whole": whole, "whole again": ExitFreeNetwork(made.backbone, batches), **ran}
        with torch.inference_mode():
            times, processor = in_turn_by_both_clocks(
                calls, rounds=3 if smoke else 500, most_s=SECONDS / len(SHARES)
            )
        # the thread's time is all of the work only where there is one
        spent = processor if threads == 1 else None
        rows += [row(times, spent, when, np.array(ran[when].depths), engine) for when in whens]
        for found in rows[-len(whens) :]:
            found |= {
                "network": name,
                "pixels": NETWORKS[name][1],
                "engine": engine,
                "threads": threads,
                "leaving": spread,
            }
    return rows


class ExitFreeNetwork:
    """The network without exits, on one batch after the other."""

    def __init__(self, backbone: Any, batches: Sequence[Tensor]) -> None:
        self._backbone = backbone
        self._batches = batches
        self._number = 0

    def __call__(self) -> None:
        self._backbone(self._batches[self._number % len(self._batches)])
        self._number += 1


class Batches:
    """A runner for successive batches, which records the mean exit of each."""

    def __init__(self, runner: Runner, batches: Sequence[Tensor], depth_k: np.ndarray) -> None:
        self._runner = runner
        self._batches = batches
        self._depth_k = depth_k
        self.depths: list[float] = []

    def __call__(self) -> None:
        answer = self._runner.run(self._batches[len(self.depths) % len(self._batches)])
        self.depths.append(float(self._depth_k[list(answer.exits)].mean()))


def row(
    times: Mapping[str, np.ndarray],
    processor: Mapping[str, np.ndarray] | None,
    when: str,
    depths: np.ndarray,
    engine: str,
) -> Row:
    # without the warm-up
    base = times["whole"]
    depths = depths[-len(times["whole"]) :]
    ratios = times[when] / base
    reached = (1 - ratios) / (1 - depths)
    saved = ""
    if processor is not None:
        spent = processor[when] / processor["whole"]
        saved = with_interval((1 - spent) / (1 - depths), 3)
    wanted = 0.95 if engine == "eager" else 0.90
    _, low, high = median_interval(reached)
    met = "yes" if low >= wanted else "no" if high < wanted else "cannot tell"
    _, _, most = median_interval(times["auto"] / times["never"])
    return {
        "network": "",
        "pixels": 0,
        "engine": "",
        "threads": 0,
        "leaving": "",
        "compaction": when,
        "n": len(base),
        "whole ms": f"{np.median(base) * 1e3:.1f}",
        "mean depth": f"{depths.mean():.3f}",
        "time / whole": with_interval(ratios, 3),
        "whole / whole": with_interval(times["whole again"] / base, 3),
        "share of the ideal saving": with_interval(reached, 3),
        "processor": saved,
        "asked for": wanted,
        "met": met if when != "never" else "",
        "auto / never": with_interval(times["auto"] / times["never"], 3) if when == "auto" else "",
        "never loses": ("yes" if most <= 1.0 else "cannot tell") if when == "auto" else "",
    }


CASES = {
    f"{name}-{engine}-{threads}": (name, engine, threads)
    for name in NETWORKS
    for engine in ("eager", "onnxruntime")
    for threads in (1, 2)
}


def prepare() -> None:
    for name in NETWORKS:
        network, pool = network_and_pool(name)
        in_engine(network, "onnxruntime", example=pool[:2], threads=1, key=f"batching-{name}")


if __name__ == "__main__":
    smoke = ["cifar_resnet-eager-1", "cifar_resnet-onnxruntime-1"]
    run_cases(
        "batching", "Batches that shrink", __doc__, CASES, measure, smoke=smoke, prepare=prepare
    )
