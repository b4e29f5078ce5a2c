"""Measure what stages in an engine take beside one session of the same network.

    # some minutes; run it alone on the machine
    python benchmarks/engine_stages.py
    # under a minute, to see that it runs
    python benchmarks/engine_stages.py --smoke

A ResNet for CIFAR (n = 9, c = 16), batch 1, in 4 and 16 stages, without heads: as a run of an
engine network and of an exported directory, as bound parts called one after the other (what remains
there is the engine's own), and as parts called with arrays, all in turn with one session of the
whole network, and with that again (A/A). With one thread, times are the process's processor time,
with two they are seconds; each is the least of three calls in a row, as a share of the session's in
the same round.

Where the time of ONNX Runtime goes is in the last column: the nodes that it runs in the stages more
than in the whole, after its own optimisation.
"""

from __future__ import annotations

import argparse
import collections
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Row, with_interval, write_results

import impatient
from impatient.clock import interleaved
from impatient.engines.blocked import nodes_run
from impatient.portable import Bundle, Staged

ROUNDS = 300
CALLS = 3
# Blocks of the ResNet with n = 9 after which there is an exit.
CUTS = {4: (6, 13, 20), 16: (*range(1, 25, 2), 2, 4, 6)}
ENGINES = ("onnxruntime", "openvino")


def exported(stages: int, engine: str, x: torch.Tensor, folder: Path) -> Path:
    backbone = impatient.load_model("impatient:resnet:n=9,c=16", num_classes=10, in_channels=3)
    after = [f"blocks.{block}" for block in sorted(CUTS[stages])[: stages - 1]]
    network = impatient.attach_exits(backbone, example=x, after=after).eval()
    return impatient.export(network, folder / f"{engine}-{stages}", engine=engine, example=x)


def ways(place: Path, x: torch.Tensor, threads: int) -> dict[str, Callable[[], object]]:
    """Say how the same stages are computed."""
    made = impatient.load_engine(place, threads=threads)
    bundle = Bundle(place, threads)
    array = x.numpy()
    parts: Any = bundle.parts
    bundle.whole(array)
    whole: Any = bundle._whole
    called = Staged(parts.wiring, parts.stages, parts.heads)
    # The lane of a run is bound when the run has been to its end.
    run = parts([array])
    collections.deque(run, maxlen=0)
    lane = run._loan.lane

    def bound() -> None:
        for stage, fresh in zip(lane.stages, parts.fresh, strict=True):
            stage(*(array for _ in fresh))

    def session() -> object:
        if bundle.engine == "onnxruntime":
            return whole._session.run(None, {whole._names[0]: array})
        return whole(array)

    return {
        "one session": session,
        "the same again (A/A)": session,
        "bound parts": bound,
        "exported directory": lambda: [None for _ in bundle.exits(array)],
        "engine network": lambda: [None for _ in made.exits(x)],
        "parts with arrays": lambda: [None for _ in called([array])],
    }


def timed(work: Callable[[], object], clock: Callable[[], float]) -> Callable[[], float]:
    def least() -> float:
        taken = []
        for _ in range(CALLS):
            begin = clock()
            work()
            taken.append(clock() - begin)
        return min(taken)

    return least


def measure(place: Path, x: torch.Tensor, threads: int, rounds: int) -> list[Row]:
    clock = time.process_time if threads == 1 else time.perf_counter
    named = ways(place, x, threads)
    works = [timed(work, clock) for work in named.values()]
    times = np.array(list(interleaved(works, repeats=rounds, warm_up=10)))
    return [
        {
            "way": name,
            "n": rounds,
            "median us": round(float(np.median(column)) * 1e6, 1),
            "of one session": with_interval((column / times[:, 0]).tolist()),
        }
        for name, column in zip(named, times.T, strict=True)
    ]


def nodes(place: Path) -> str:
    """Say which nodes ONNX Runtime runs in the stages more than in the whole."""
    whole = nodes_run(place / "whole.onnx")
    stages: collections.Counter[str] = collections.Counter()
    for file in place.glob("stage*.onnx"):
        stages += nodes_run(file)
    more = sorted((stages - whole).items(), key=lambda entry: -entry[1])
    return ", ".join(f"{count} {kind}" for kind, count in more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="four stages, five rounds")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for engine in ENGINES[: 1 if smoke else None]:
            for stages in list(CUTS)[: 1 if smoke else None]:
                place = exported(stages, engine, x, Path(folder))
                for threads in (1, 2):
                    case: Row = {"engine": engine, "stages": stages, "threads": threads}
                    for found in measure(place, x, threads, 5 if smoke else ROUNDS):
                        rows.append({**case, **found})
                        print(rows[-1])
                if engine == "onnxruntime":
                    print(f"{stages} stages run {nodes(place)} more than the whole")
    if not smoke:
        text = (
            "Medians of paired ratios with 95 % intervals; one session of the whole network is 1."
        )
        write_results("engine_stages", "Stages in an engine beside one session", text, rows)


if __name__ == "__main__":
    main()
