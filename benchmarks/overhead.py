"""Measure what staging costs in each engine.

All exits without heads are compared with the complete network, in turn, as paired ratios.

    # exports, once, about 8 minutes; the machine may be busy
    python benchmarks/overhead.py --prepare
    # about 7 minutes; a run that was stopped goes on where it was
    python benchmarks/overhead.py
    # seconds, to see that it runs
    python benchmarks/overhead.py --smoke

Asked for: eager at most 1.02, and at most 25 us a cut; ONNX Runtime and OpenVINO at most 1.05 with
4 stages and 1.10 with 16 (vit_b_16: 12), in whichever arrangement is best there: a session per
stage ("onnxruntime", "openvino"), or one session with all exits that is read while it runs
("onnxruntime-session", "openvino-session"); there the heads run, too. "Whole" is in eager the model
itself without any hook, elsewhere one session of all of it. Batch 1, random weights. "whole /
whole" is the same call twice in every round (A/A): what the machine's noise alone gives. Where
eager's time goes: "empty hooks" on the cut modules that do nothing; "bare switches" of a greenlet
at each cut with nothing around them; the rest is the library's own code, with caches that the
layers before have emptied. The 200 small layers never empty them. "us per cut" shares the price of
beginning a run among its cuts; "us per further cut" is what 16 stages cost more than 4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import greenlet
import numpy as np
import torch
from common import Row, in_engine, in_turn, median_interval, run_cases, twin, with_interval
from torch import Tensor, nn

from impatient import attach_exits, load_model
from impatient.networks import MultiExitNetwork

BLOCKS = {
    "resnet50": [
        f"layer{stage}.{block}"
        for stage, blocks in enumerate((3, 4, 6, 3), 1)
        for block in range(blocks)
    ],
    "vit_b_16": [f"encoder.layers.encoder_layer_{layer}" for layer in range(12)],
}
FEW = {
    "resnet50": ["layer1", "layer2", "layer3"],
    "vit_b_16": [BLOCKS["vit_b_16"][layer] for layer in (2, 5, 8)],
}
SPECS = {"resnet50": "torchvision:resnet50", "vit_b_16": "torchvision:vit_b_16", "linear": ""}
WRITTEN = ("onnxruntime", "openvino", "onnxruntime-session", "openvino-session")
# of measuring, per case
SECONDS = 30.0


def model_and_input(name: str, pixels: int) -> tuple[nn.Module, Tensor]:
    """Build a model with random weights, and a batch of two."""
    torch.manual_seed(0)
    if name == "linear":
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(200))).eval(), torch.randn(2, 8)
    model = load_model(SPECS[name])
    if name == "vit_b_16":
        # it begins at zero, and any comparison would pass
        nn.init.normal_(model.heads.head.weight, std=0.02)
    return model.eval(), torch.randn(2, 3, pixels, pixels)


def cuts_of(name: str, many: bool) -> list[str]:
    if name == "linear":
        return [str(layer) for layer in range(199)]
    return BLOCKS[name][:-1] if many else FEW[name]


def staged(name: str, model: nn.Module, x: Tensor, *, many: bool) -> MultiExitNetwork:
    """Cut a model after every block but the last, or into four.

    It shares the model's tensors, so that all variants use the same memory.
    """
    torch.manual_seed(1)
    return attach_exits(twin(model), example=x[:1], after=cuts_of(name, many)).eval()


def run_stages(network: Any, x: Tensor) -> Tensor:
    """Run all exits without heads, and return the last features, the output."""
    with network.exits(x) as run:
        for exit in run:
            # and no other is held
            last = exit
    return last.features


def measure(name: str, pixels: int, engine: str, threads: int, *, smoke: bool) -> list[Row]:
    torch.set_num_threads(threads)
    calls = {}
    number = {}
    model, example = model_and_input(name, pixels)
    x = example[:1]
    for many in (True,) if name == "linear" else (False, True):
        network = staged(name, model, x, many=many)
        made = in_engine(
            network, engine, example=example, threads=threads, key=f"{name}-{network.num_exits}"
        )
        calls[f"{network.num_exits} stages"] = functools.partial(run_stages, made, x)
        number[f"{network.num_exits} stages"] = network.num_exits
    whole = model if engine == "eager" else made.backbone
    calls["whole"] = calls["whole again"] = lambda: whole(x)
    if engine == "eager":
        calls |= pieces(whole, x, cuts_of(name, many=True))
    with torch.inference_mode():
        difference = float((run_stages(made, x) - whole(x)).abs().max())
        times = in_turn(calls, rounds=3 if smoke else 2000, most_s=SECONDS)
    most = network.num_exits
    few = next(iter(number))
    return [
        row(times, what, number.get(what, most), engine)
        | {
            "network": name,
            "pixels": pixels,
            "engine": engine,
            "threads": threads,
            "largest difference": f"{difference:.1e}",
        }
        | (
            {"us per further cut": further(times, few, what, number)}
            if number.get(what, 0) > number[few]
            else {}
        )
        for what in calls
        if not what.startswith("whole")
    ]


def pieces(model: nn.Module, x: Tensor, cuts: list[str]) -> dict[str, Callable[[], object]]:
    """Measure each part of the mechanism alone."""
    hooked = twin(model)
    switched = twin(model)
    for cut in cuts:
        hooked.get_submodule(cut).register_forward_hook(lambda *_: None)
        switched.get_submodule(cut).register_forward_hook(_pause)

    def bare_switches() -> None:
        runner = greenlet.greenlet(switched)
        runner.switch(x)
        while not runner.dead:
            runner.switch()

    return {"empty hooks": lambda: hooked(x), "bare switches": bare_switches}


def _pause(*_: object) -> None:
    current = greenlet.getcurrent()
    assert current.parent is not None
    current.parent.switch()


def row(times: dict[str, np.ndarray], what: str, stages: int, engine: str) -> Row:
    base = times["whole"]
    ratios = times[what] / base
    us_per_cut = (times[what] - base) / (stages - 1) * 1e6
    found = {
        "network": "",
        "pixels": 0,
        "engine": engine,
        "threads": 0,
        "what": what,
        "cuts": stages - 1,
        "n": len(base),
        "ms": f"{np.median(base) * 1e3:.2f}",
        "over whole": with_interval(ratios),
        "whole / whole": with_interval(times["whole again"] / base),
        "us per cut": with_interval(us_per_cut, 1),
    }
    if "stages" not in what:
        return found
    limit = 1.02 if engine == "eager" else 1.05 if stages <= 4 else 1.10
    judged = {"asked for": limit, "met": verdict(ratios, limit)} if stages < 100 else {}
    return found | judged | ({"25 us met": verdict(us_per_cut, 25.0)} if engine == "eager" else {})


def further(times: dict[str, np.ndarray], few: str, many: str, number: dict[str, int]) -> str:
    """Compute the cost of a further cut, in microseconds.

    A run has a fixed cost, too, which does not count here.
    """
    return with_interval((times[many] - times[few]) / (number[many] - number[few]) * 1e6, 1)


def verdict(values: np.ndarray, limit: float) -> str:
    """Whether the interval of the median lies below a limit, above it, or around it."""
    _, low, high = median_interval(values)
    return "yes" if high <= limit else "no" if low > limit else "cannot tell"


CASES = {"linear": ("linear", 0, "eager", 1), "resnet50-64": ("resnet50", 64, "eager", 1)} | {
    f"{name}-{engine}-{threads}": (name, 224, engine, threads)
    for engine in ("eager", *WRITTEN)
    for name in ("resnet50", "vit_b_16")
    for threads in (1, 2)
}


def prepare() -> None:
    for name in ("resnet50", "vit_b_16"):
        model, example = model_and_input(name, 224)
        for many in (False, True):
            network = staged(name, model, example, many=many)
            for engine in WRITTEN:
                in_engine(
                    network, engine, example=example, threads=1, key=f"{name}-{network.num_exits}"
                )


if __name__ == "__main__":
    run_cases(
        "overhead",
        "Overhead of staging",
        __doc__,
        CASES,
        measure,
        smoke=["linear", "resnet50-64"],
        prepare=prepare,
    )
