"""Measure batches that shrink against the network without exits.

32 samples leave at different exits. Both are measured in turn.

    # exports, once, a minute; the machine may be busy
    python benchmarks/batching.py --prepare
    # about 12 minutes; a run that was stopped goes on where it was
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

The ideal takes time to be proportional to the batch, which it need not be. "Attainable" is the time
of the same stages at the numbers of rows that they had in the run, one after the other, without
exits, heads, scores, copying or any code of ours: an nn.Sequential each, cut by hand, or a plain
session of ONNX Runtime each. Rows are left out for nothing, as the first so many of an array. It is
of the same round. "Missing: the network's" is the part of the ideal saving that these stages do not
reach, "ours" what the run misses beyond them, heads and scores included; with the share reached
they sum to one, up to medians. "Met of the attainable" asks for the same share of the attainable
saving.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    Row,
    engine_folder,
    in_engine,
    in_turn_by_both_clocks,
    median_interval,
    run_cases,
    twin,
    with_interval,
)
from torch import Tensor, nn

from impatient import Runner, attach_exits, load_model, profile
from impatient.networks import MultiExitNetwork
from impatient.networks.resnet import PreActResNet
from impatient.policies import ThresholdPolicy
from impatient.policies.rules import thresholds_for_shares
from impatient.portable import Bundle
from impatient.portable.parts import onnxruntime_session
from impatient.runtime.compaction import Compaction, When
from impatient.tasks.scores import SCORES

# Computes a batch, with so many rows at each stage.
Computes = Callable[[Tensor, Sequence[int]], Any]

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
    split = split_of(network, engine, pool[:2], threads, name)
    batches = pool.split(BATCH)
    with torch.inference_mode():
        outputs = [
            torch.cat(parts) for parts in zip(*(network(batch) for batch in batches), strict=True)
        ]
        row_bytes = [exit.row_bytes for exit in made.exits(batches[0])]
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
        rules = {when: Compaction(costs=costs, when=when) for when in whens}
        runners = {when: Runner(made, costs, policy, compaction=rules[when]) for when in whens}
        ran = {when: Batches(runners[when], batches, depth) for when in whens}
        attainable = {
            f"attainable {when}": Split(
                split,
                batches,
                [
                    rows_of_stages(runners[when].run(batch).exits, rules[when], row_bytes)
                    for batch in batches
                ],
            )
            for when in whens[1:]
        }
        whole = ExitFreeNetwork(made.backbone, batches)
        again = ExitFreeNetwork(made.backbone, batches)
        calls = {"whole": whole, "whole again": again, **ran, **attainable}
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


def rows_of_stages(
    exits: Sequence[int], rule: Compaction, row_bytes: Sequence[float]
) -> tuple[int, ...]:
    """Say how many rows each stage of a run computes, by the exits that its samples left at."""
    rows = [len(exits)]
    before = len(exits)
    for exit in range(max(exits)):
        left = sum(deeper > exit for deeper in exits)
        # the rule is asked only where samples leave
        here = rows[-1] if left == before else rule.size(exit, rows[-1], left, row_bytes[exit])
        rows.append(here)
        before = left
    return tuple(rows)


def split_of(
    network: MultiExitNetwork, engine: str, example: Tensor, threads: int, name: str
) -> Computes:
    """Return the bare stages, which compute a batch with so many rows each."""
    if engine == "eager":
        return in_modules(cut_by_hand(network))
    key = f"batching-{name}"
    folder = engine_folder(network, engine, example=example, threads=threads, key=key)
    return in_sessions(folder, threads)


def cut_by_hand(network: MultiExitNetwork) -> list[nn.Sequential]:
    """Cut one of the two networks at its exits, as one would who knows it."""
    backbone: Any = twin(network.backbone)
    if isinstance(backbone, PreActResNet):
        first = [("", backbone.stem)]
        blocks = [(f"blocks.{number}", block) for number, block in enumerate(backbone.blocks)]
        end = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), backbone.classifier]
    else:
        first = [("", part) for part in (backbone.conv1, backbone.bn1, backbone.relu)]
        first += [("", backbone.maxpool)]
        blocks = [(f"layer{number}", getattr(backbone, f"layer{number}")) for number in range(1, 5)]
        end = [backbone.avgpool, nn.Flatten(), backbone.fc]
    cuts = {cut.module for cut in network.cuts}
    parts: list[list[nn.Module]] = [[]]
    for called, module in first + blocks:
        parts[-1].append(module)
        if called in cuts:
            parts.append([])
    parts[-1] += end
    return [nn.Sequential(*part).eval() for part in parts]


def in_modules(parts: Sequence[nn.Module]) -> Computes:
    def compute(x: Tensor, rows: Sequence[int]) -> Tensor:
        for part, size in zip(parts, rows, strict=False):
            x = part(x[:size])
        return x

    return compute


def in_sessions(folder: Path, threads: int) -> Computes:
    bundle = Bundle(folder, threads)
    parts: Any = bundle.parts
    wiring = parts.wiring
    if any(wiring.batch_dims.values()):
        raise SystemExit(f"{folder}: expected the batch as the first dimension of all values.")
    sessions = [onnxruntime_session(stage.path, threads) for stage in parts.stages]
    names = [[entry.name for entry in session.get_inputs()] for session in sessions]

    def compute(x: Tensor, rows: Sequence[int]) -> Any:
        values = {wiring.inputs[0]: x.numpy()}
        given = []
        for index, size in enumerate(rows):
            taken = [values[name][:size] for name in wiring.takes[index]]
            given = sessions[index].run(None, dict(zip(names[index], taken, strict=True)))
            values.update(zip(wiring.gives[index], given, strict=True))
        return given

    return compute


class Split:
    """Bare stages on one batch after the other, with the rows that a runner's stages had."""

    def __init__(
        self, compute: Computes, batches: Sequence[Tensor], rows: Sequence[Sequence[int]]
    ) -> None:
        self._compute = compute
        self._batches = batches
        self._rows = rows
        self._number = 0

    def __call__(self) -> None:
        place = self._number % len(self._batches)
        self._compute(self._batches[place], self._rows[place])
        self._number += 1


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
    _, _, most = median_interval(times["auto"] / times["never"])
    found: Row = {
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
        "met": "" if when == "never" else verdict(reached, wanted),
        "auto / never": with_interval(times["auto"] / times["never"], 3) if when == "auto" else "",
        "never loses": ("yes" if most <= 1.0 else "cannot tell") if when == "auto" else "",
    }
    return found if when == "never" else found | beside(times, when, depths, wanted)


def beside(times: Mapping[str, np.ndarray], when: str, depths: np.ndarray, wanted: float) -> Row:
    """Hold a run against the bare stages at the rows that it had."""
    ratios = times[when] / times["whole"]
    attained = times[f"attainable {when}"] / times["whole"]
    of_attainable = (1 - ratios) / (1 - attained)
    return {
        "attainable / whole": with_interval(attained, 3),
        "share of the attainable saving": with_interval(of_attainable, 3),
        "met of the attainable": verdict(of_attainable, wanted),
        "missing: the network's": with_interval(1 - (1 - attained) / (1 - depths), 3),
        "missing: ours": with_interval((ratios - attained) / (1 - depths), 3),
    }


def verdict(shares: np.ndarray, wanted: float) -> str:
    _, low, high = median_interval(shares)
    return "yes" if low >= wanted else "no" if high < wanted else "cannot tell"


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
