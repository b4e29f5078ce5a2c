"""Measure what exporting gains: engines against eager on the same model.

The complete network and each exit are measured in turn, as paired ratios.

    # exports and compiles, once, about 10 minutes; the machine may be busy
    python benchmarks/engines.py --prepare
    # about 6 minutes; a run that was stopped goes on where it was
    python benchmarks/engines.py
    # under a minute, to see that it runs
    python benchmarks/engines.py --smoke

Batch 1, four exits with linear heads, random weights, eager in the same process and the same round.
"Whole" is the model without exits. "To exit k" is an anytime run in which every exit answers, up to
the answer of that exit, over eager's run to the same one. "fp32" computes what eager does, up to
rounding; "int8-dynamic" does not, and its accuracy is not looked at here.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch
from common import KEPT, Row, in_engine, in_turn, run_cases, with_interval
from overhead import model_and_input, staged
from torch import Tensor

from impatient import attach_exits, load_model
from impatient.networks import MultiExitNetwork

ENGINES = (
    ("eager", "fp32"),
    ("compile", "fp32"),
    ("onnxruntime", "fp32"),
    ("openvino", "fp32"),
    ("onnxruntime", "int8-dynamic"),
)
NETWORKS = {"cifar_resnet": 32, "resnet50": 224, "vit_b_16": 224}
# of measuring, per case
SECONDS = 45.0
SMOKE = ("eager", "onnxruntime", "openvino")


def four_exits(name: str) -> tuple[MultiExitNetwork, Tensor]:
    """Build a network with exits at three places, and a batch of two."""
    if name != "cifar_resnet":
        model, x = model_and_input(name, NETWORKS[name])
        return staged(name, model, x, many=False), x
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    return attach_exits(
        load_model("impatient:resnet:n=9,c=16"), example=x[:1], after="every:7"
    ).eval(), x


def measure(name: str, threads: int, *, smoke: bool) -> list[Row]:
    torch.set_num_threads(threads)
    network, example = four_exits(name)
    x = example[:1]
    key = f"{name}-{network.num_exits}"
    made = {
        (engine, precision): in_engine(
            network, engine, example=example, threads=threads, key=key, precision=precision
        )
        for engine, precision in ENGINES
        if not smoke or (engine in SMOKE and precision == "fp32")
    }
    reached: dict[Any, list[list[float]]] = {kind: [] for kind in made}
    calls: dict[Any, Any] = {
        (*kind, "whole"): lambda one=one: one.backbone(x) for kind, one in made.items()
    }
    calls |= {
        (*kind, "anytime"): lambda kind=kind, one=one: reached[kind].append(anytime(one, x))
        for kind, one in made.items()
    }
    calls["eager again"] = calls["eager", "fp32", "whole"]
    # numpy permutes plain strings
    names = {str(index): call for index, call in enumerate(calls.values())}
    with torch.inference_mode():
        raw = in_turn(names, rounds=3 if smoke else 1000, most_s=SECONDS)
    times = dict(zip(calls, raw.values(), strict=True))
    n = len(times["eager again"])
    marks = {kind: np.array(rounds[-n:]) for kind, rounds in reached.items()}
    base = times["eager", "fp32", "whole"]
    base_marks = marks["eager", "fp32"]
    rows = []
    for kind in made:
        whole = times[(*kind, "whole")]
        rows.append(
            {
                "network": name,
                "pixels": NETWORKS[name],
                "threads": threads,
                "engine": kind[0],
                "precision": kind[1],
                "n": n,
                "whole ms": f"{np.median(whole) * 1e3:.2f}",
                "whole / eager whole": with_interval(whole / base, 3),
                "eager / eager": with_interval(times["eager again"] / base, 3),
            }
            | {
                f"to exit {exit}, ms": f"{np.median(marks[kind][:, exit]) * 1e3:.2f}"
                for exit in range(network.num_exits)
            }
            | {
                f"to exit {exit} / eager": with_interval(
                    marks[kind][:, exit] / base_marks[:, exit], 3
                )
                for exit in range(network.num_exits)
            }
        )
    return rows


def anytime(network: Any, x: Tensor) -> list[float]:
    """Seconds until each exit has answered."""
    begin = time.perf_counter()
    reached = []
    with network.exits(x) as run:
        for exit in run:
            exit.output()
            reached.append(time.perf_counter() - begin)
    return reached


def prepare() -> None:
    for name in NETWORKS:
        network, example = four_exits(name)
        for engine, precision in ENGINES:
            made = in_engine(
                network,
                engine,
                example=example,
                threads=1,
                key=f"{name}-{network.num_exits}",
                precision=precision,
            )
            # torch keeps what it has compiled
            if engine == "compile":
                with torch.inference_mode():
                    made.backbone(example[:1])
                    anytime(made, example[:1])


CASES = {f"{name}-{threads}": (name, threads) for name in NETWORKS for threads in (1, 2)}

if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(KEPT / "inductor"))
    run_cases(
        "engines",
        "Engines against eager",
        __doc__,
        CASES,
        measure,
        smoke=["cifar_resnet-1"],
        prepare=prepare,
    )
