"""Measure what stages in ONNX Runtime take beside one session of the same network.

    # about a minute; run it alone on the machine
    python benchmarks/engine_stages.py

A ResNet for CIFAR in stages, without heads: as a run of the product, by its parts called one after
the other, and by bare sessions, in turn with one session of the whole network and with that again
(A/A). Batch 1, one thread, the thread's processor time, as shares of the whole.
"""

from __future__ import annotations

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
from impatient.portable import Bundle

ROUNDS = 300
# Blocks of the ResNet with n = 9 after which there is an exit.
CUTS = {4: (6, 13, 20), 16: (*range(1, 25, 2), 2, 4, 6)}


def exported(stages: int, x: torch.Tensor, folder: Path) -> Path:
    backbone = impatient.load_model("impatient:resnet:n=9,c=16", num_classes=10, in_channels=3)
    after = [f"blocks.{block}" for block in sorted(CUTS[stages])[: stages - 1]]
    network = impatient.attach_exits(backbone, example=x, after=after).eval()
    return impatient.export(network, folder / str(stages), engine="onnxruntime", example=x)


def ways(place: Path, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Say how the same stages are computed."""
    made = impatient.load_engine(place)
    bundle = Bundle(place)
    array = x.numpy()
    parts: Any = bundle.parts
    bundle.whole(array)
    whole: Any = bundle._whole

    def walk(call: Callable[[Any, tuple[Any, ...]], Any]) -> None:
        values = {parts.wiring.inputs[0]: array}
        for stage, takes, gives in zip(
            parts.stages, parts.wiring.takes, parts.wiring.gives, strict=True
        ):
            given = call(stage, tuple(values[name] for name in takes))
            values.update(zip(gives, given, strict=True))

    def bare(stage: Any, inputs: tuple[Any, ...]) -> Any:
        return stage._session.run(None, dict(zip(stage._names, inputs, strict=True)))

    name = whole._names[0]
    return {
        "one session": lambda: whole._session.run(None, {name: array}),
        "the same again (A/A)": lambda: whole._session.run(None, {name: array}),
        "bare sessions": lambda: walk(bare),
        "parts": lambda: walk(lambda stage, inputs: stage(*inputs)),
        "exported directory": lambda: [None for _ in bundle.exits(array)],
        "engine network": lambda: [None for _ in made.exits(x)],
    }


def timed(work: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        begin = time.thread_time()
        work()
        return time.thread_time() - begin

    return run


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for stages in CUTS:
            named = ways(exported(stages, x, Path(folder)), x)
            works = [timed(work) for work in named.values()]
            times = np.array(list(interleaved(works, repeats=ROUNDS, warm_up=20)))
            for name, column in zip(named, times.T, strict=True):
                rows.append(
                    {
                        "stages": stages,
                        "what": name,
                        "n": ROUNDS,
                        "median us": round(float(np.median(column)) * 1e6, 1),
                        "of one session": with_interval((column / times[:, 0]).tolist()),
                    }
                )
                print(rows[-1])
    text = "Processor time of one thread, medians with 95 % intervals; one session is 1."
    write_results("engine_stages", "Stages in ONNX Runtime beside one session", text, rows)


if __name__ == "__main__":
    main()
