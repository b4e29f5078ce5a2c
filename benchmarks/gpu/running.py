"""Measure running on a GPU, where calls return before the work is done.

It measures what staging costs, what an early exit saves, and whether deadlines are met.

    # on a CUDA device, about 8 minutes; what is finished is kept
    python benchmarks/gpu/running.py
    # seconds, on any machine, to see that it runs
    python benchmarks/gpu/running.py --smoke

For resnet50 and vit_b_16 (224 pixels, random weights), batch sizes 1 and 32, eager and as CUDA
graphs:

* staged over the exit-free network in the same engine, all exits without heads, waiting for each
  stage, and not;
* a policy that stops half of the samples in the middle, on `Runner`, which waits for each stage,
  and on `GpuRunner` with 0, 1
  and 2 stages ahead: time over that of the exit-free network;
* deadlines half way through the network: share met, and the mean exit.

All ratios are of runs in turn; medians, with intervals by order statistics.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import in_turn, with_interval, write_results

from impatient import Deadline, Runner, attach_exits, load_model, profile
from impatient.experimental.gpu import Fetched, GpuRunner
from impatient.experimental.graphs import cuda_graphs
from impatient.files import read_json, write_json
from impatient.policies import ThresholdPolicy
from impatient.policies.rules import thresholds_for_shares
from impatient.tasks.scores import SCORES

KEPT = Path("runs/gpu/running")


class HostQueue:
    """For the smoke run: a device that is never behind."""

    def begin(self) -> None:
        """Nothing is under way."""

    def fetch(self, tensors: Any) -> Fetched:
        return Fetched(tuple(tensor.clone() for tensor in tensors), lambda: True)

    def pause(self) -> None:
        """Never asked for."""


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def waited_for(call: Callable[[], object]) -> Callable[[], None]:
    """Make a call wait until the device has done all its work."""

    def run() -> None:
        call()
        _wait()

    return run


def ratios_of(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, str]:
    """Compute each call's median time ratio to the network without exits.

    Both are of the same round. The result has an interval.
    """
    times = in_turn(
        {name: waited_for(call) for name, call in calls.items()}, rounds=repeats, warm_up=5
    )
    return {name: with_interval(taken / times["exit-free"], 3) for name, taken in times.items()}


def run_stages(network: Any, x: torch.Tensor, *, waiting: bool) -> None:
    with torch.inference_mode(), network.exits(x) as run:
        for _ in run:
            if waiting:
                _wait()


def half_stops(network: Any, x: torch.Tensor) -> ThresholdPolicy:
    """Half of the samples leave at the middle exit, the others at the last one."""
    middle = network.num_exits // 2 - 1
    last = network.num_exits - 1
    with torch.inference_mode(), network.exits(x) as run:
        scores = torch.stack([SCORES["max_probability"](exit.output()).cpu() for exit in run])
    shares = [0.5 if exit in (middle, last) else 0.0 for exit in range(network.num_exits)]
    return ThresholdPolicy(
        score="max_probability", thresholds=thresholds_for_shares(scores, shares)
    )


def measure(
    spec: str, pixels: int, batch: int, engine: str, device: str, repeats: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(batch, 3, pixels, pixels, device=device)
    model = (
        load_model(spec, **({"num_classes": 10} if spec.startswith("impatient") else {}))
        .to(device)
        .eval()
    )
    network: Any = attach_exits(model, example=x[:1], count=4).eval()
    if engine == "cuda-graphs":
        network = cuda_graphs(network, example=x[:2])
    costs = profile(
        network,
        x,
        batch_sizes=tuple(sorted({1, max(1, batch // 2), batch})),
        repeats=50,
        max_seconds=10,
    )
    policy = half_stops(network, x)
    queue = None if device == "cuda" else HostQueue()
    runners: dict[str, Any] = {"policy, waiting": Runner(network, costs, policy)}
    runners |= {
        f"policy, {ahead} ahead": GpuRunner(network, costs, policy, ahead=ahead, queue=queue)
        for ahead in (0, 1, 2)
    }
    calls: dict[str, Callable[[], object]] = {
        "exit-free": lambda: network.backbone(x),
        "exit-free again": lambda: network.backbone(x),
        "staged": lambda: run_stages(network, x, waiting=False),
        "staged, waiting": lambda: run_stages(network, x, waiting=True),
    }
    calls |= {name: (lambda runner=runner: runner.run(x)) for name, runner in runners.items()}
    with torch.inference_mode():
        ratios = ratios_of(calls, repeats)
    timed = GpuRunner(network, costs, ahead=1, queue=queue)
    budget = costs.interruptible_s(statistic="p99", batch_size=batch)[network.num_exits // 2]
    answers = [timed.run(x, deadline=Deadline.after(budget)) for _ in range(10 * repeats)]
    return {
        "model": spec,
        "batch": batch,
        "engine": engine,
        "n": repeats,
        **ratios,
        "deadlines met": f"{sum(answer.deadline_met for answer in answers)} of {len(answers)}",
        "mean exit by then": f"{sum(answer.exit for answer in answers) / len(answers):.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    if not smoke and not torch.cuda.is_available():
        sys.exit("this needs a CUDA device; --smoke shows on any machine that it runs.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = (
        [("impatient:resnet:n=1,c=8", 32)]
        if smoke
        else [("torchvision:resnet50", 224), ("torchvision:vit_b_16", 224)]
    )
    engines = ["eager", "cuda-graphs"] if device == "cuda" else ["eager"]
    rows = []
    for spec, pixels in models:
        for batch in (1, 4) if smoke else (1, 32):
            for engine in engines:
                file = KEPT / f"{spec.replace(':', '-')}-{batch}-{engine}.json"
                if smoke or not file.is_file():
                    row = measure(spec, pixels, batch, engine, device, 3 if smoke else 100)
                    if not smoke:
                        write_json(file, row)
                rows.append(row if smoke else read_json(file))
                print(rows[-1], flush=True)
    if not smoke:
        write_results("gpu_running", "Running ahead on a GPU", __doc__, rows)


if __name__ == "__main__":
    main()
