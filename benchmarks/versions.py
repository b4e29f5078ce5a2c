"""Time the same calls with the code of two checkouts, in turn, as paired ratios.

    # about 8 minutes; leave the machine alone
    python benchmarks/versions.py OLD_CHECKOUT
    # seconds, to see that it runs
    python benchmarks/versions.py OLD_CHECKOUT --smoke
    # only recording, fitting and judging, about 4 minutes; other rows of the page stay
    python benchmarks/versions.py OLD_CHECKOUT --only judging

Three processes, one with the old code and two with the new, work in turn; their order goes through
all permutations from round to round. All three are started again after each quarter of the rounds,
since equal code is faster in one process than in another, by chance, for as long as both live.
Networks have random weights from one seed, batch 1 unless the row says otherwise, one thread. Both
checkouts must know the calls of version 0.1.0.

"new / old" is the median over the rounds of the ratio of their times, with its 95 % interval by
order statistics. "new / new" is the same with this checkout against itself: what the machine alone
makes of equal code. Rows that stay keep the commits that they were measured with; the machine below
is that of the latest.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROUNDS, SMOKE_ROUNDS = 72, 4
# how often the processes are started
STARTS = 4
# seconds of one measurement in one process
SLICE_S = 0.1


def running() -> dict[str, Callable[[], Any]]:
    """Make networks, and the calls that run them."""
    import torch

    import impatient

    torch.set_num_threads(1)
    made: dict[str, Callable[[], Any]] = {}

    def add(name: str, backbone: Any, after: Any, x: Any) -> None:
        network = impatient.attach_exits(backbone.eval(), after=after, example=x).eval()
        costs = impatient.profile(network, x, batch_sizes=[len(x)], repeats=30)
        never = (2.0,) * (network.num_exits - 1)
        policy = impatient.ThresholdPolicy(
            score="max_probability", thresholds=(*never, -float("inf"))
        )
        plain = impatient.Runner(network, costs)
        asked = impatient.Runner(network, costs, policy)
        soon = impatient.Deadline.after

        def exits() -> None:
            with torch.inference_mode(), network.exits(x) as run:
                for exit in run:
                    exit.output()

        made[f"{name}: all exits with their heads"] = exits
        made[f"{name}: contract run to the end"] = lambda: plain.run(x, deadline=soon(10.0))
        made[f"{name}: policy asked at every exit"] = lambda: asked.run(x)

        def interruptible() -> None:
            with plain.start(x) as run:
                run.result()

        made[f"{name}: interruptible run"] = interruptible

    torch.manual_seed(0)
    resnet = impatient.load_model("impatient:resnet:n=9,c=16", num_classes=10, in_channels=3)
    add("ResNet-56, 32 px", resnet, "every:6", torch.randn(1, 3, 32, 32))
    torch.manual_seed(0)
    small = impatient.load_model("impatient:resnet:n=2,c=8", num_classes=10, in_channels=1)
    add("ResNet-14, 8 px, batch 32", small, "every:1", torch.randn(32, 1, 8, 8))
    torch.manual_seed(0)
    mobile = impatient.load_model("torchvision:mobilenet_v3_small", num_classes=10)
    names = ["features.3", "features.6", "features.9"]
    add("MobileNetV3 small, 224 px", mobile, names, torch.randn(1, 3, 224, 224))
    return made


class Digits:
    """Random images and classes, as `record` takes a data set of somebody's own."""

    fingerprint = "random"

    def __init__(self, count: int) -> None:
        import torch

        self.images = torch.randn(count, 1, 8, 8)
        self.classes = torch.randint(10, (count,))

    # all splits are alike
    def size(self, split: str) -> int:  # noqa: ARG002
        return len(self.classes)

    def batches(self, split: str, batch_size: int) -> Iterator[tuple[Any, Any]]:  # noqa: ARG002
        yield from zip(self.images.split(batch_size), self.classes.split(batch_size), strict=True)


def judging() -> dict[str, Callable[[], Any]]:
    """Make the calls that record, fit and evaluate a classification."""
    import torch

    import impatient
    from impatient.policies import fit_gates

    torch.manual_seed(0)
    small = impatient.load_model("impatient:resnet:n=2,c=8", num_classes=10, in_channels=1)
    few = Digits(1000)
    network = impatient.attach_exits(small, after="every:1", example=few.images[:2]).eval()
    costs = impatient.profile(network, few.images[:1], batch_sizes=[1], repeats=30)
    many = Digits(10_000)
    fitted, judged = (
        impatient.record(network, many, split=split, features=True)
        for split in ("validation", "test")
    )
    policy = impatient.fit_thresholds(fitted, costs, max_accuracy_loss=0.01)
    return {
        "record 1,000 digits": lambda: impatient.record(network, few, split="test"),
        "the same with features": lambda: impatient.record(
            network, few, split="test", features=True
        ),
        "fit thresholds, 10,000 samples": lambda: impatient.fit_thresholds(
            fitted, costs, max_accuracy_loss=0.01
        ),
        "fit gates, 10,000 samples": lambda: fit_gates(fitted, costs, time_price=10.0),
        "evaluate, 10,000 samples": lambda: impatient.evaluate(judged, costs, policy),
    }


PARTS = {"running": running, "judging": judging}


def work(parts: list[str]) -> None:
    """Answer each line "NAME" with the seconds of one call, until standard input ends."""
    made = {name: call for part in parts for name, call in PARTS[part]().items()}
    for call in made.values():
        call()
    print("\t".join(made), flush=True)
    for line in sys.stdin:
        call = made[line.rstrip("\n")]
        begin = time.perf_counter()
        count = 0
        while time.perf_counter() - begin < SLICE_S:
            call()
            count += 1
        print((time.perf_counter() - begin) / count, flush=True)


class Worker:
    """A process with the code of one checkout, which can time the calls of some parts."""

    def __init__(self, checkout: Path, parts: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", *parts],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.names = self.process.stdout.readline().rstrip("\n").split("\t")

    def seconds(self, name: str) -> float:
        """Time one call by its name."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--work"]:
        work(arguments[1:])
        return
    # not at the top: it imports names that the old code may lack
    from common import RESULTS, Row, commit, with_interval, write_results

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", type=Path, help="a checkout with the old code")
    parser.add_argument("--smoke", action="store_true", help="seconds; writes nothing")
    parser.add_argument("--only", choices=PARTS, help="time these calls alone")
    asked = parser.parse_args(arguments)
    parts = [asked.only] if asked.only else list(PARTS)
    old_checkout = asked.old.resolve()
    rounds = SMOKE_ROUNDS if asked.smoke else ROUNDS
    ratios: dict[str, dict[str, list[float]]] = {}
    for start in range(STARTS):
        print(f"start {start + 1} of {STARTS}", flush=True)
        old, new, again = (Worker(path, parts) for path in (old_checkout, ROOT, ROOT))
        for name in new.names:
            found = ratios.setdefault(name, {"new / old": [], "new / new": []})
            orders = itertools.cycle(itertools.permutations((old, new, again)))
            for order in itertools.islice(orders, rounds // STARTS):
                taken = {worker: worker.seconds(name) for worker in order}
                found["new / old"].append(taken[new] / taken[old])
                found["new / new"].append(taken[new] / taken[again])
        for worker in (old, new, again):
            worker.process.kill()
    rows: list[Row] = []
    commits = {"old": commit(old_checkout), "new": commit()}
    for name, columns in ratios.items():
        intervals = {column: with_interval(values, 3) for column, values in columns.items()}
        rows.append({"call": name, "rounds": rounds, **intervals, **commits})
        print(rows[-1], flush=True)
    if not asked.smoke:
        with (RESULTS / "versions.csv").open(encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if row["call"] not in ratios]
        rows = [*kept, *rows]
        text = (__doc__ or "").partition("Three processes")
        title = "The same calls with the code of two commits"
        write_results("versions", title, f"{text[1]}{text[2]}", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
