"""Measure what training all exits jointly costs, and what precision and layout gain.

Epochs take turns, in one process, with those of the network without exits; training steps with
those in single precision and PyTorch's own layout.

python benchmarks/training.py --what joint         about 6 minutes
python benchmarks/training.py --what throughput    about 8 minutes, most of it torch.compile's
python benchmarks/training.py --smoke              seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch
from common import median_interval, write_results

from impatient import Data, Recipe, attach_exits, fit
from impatient.networks import MultiExitNetwork, PreActResNet
from impatient.networks.anytimenet import AnytimeNet
from impatient.training import Preprocess
from impatient.training.examples import ArrayExamples
from papers.throughput import PRECISIONS, Mode, step_rates

# with the output, 5 exits of 15 blocks
EVERY_THIRD = [f"blocks.{block}" for block in (2, 5, 8, 11)]
OPTIONS = {
    "static weights": {},
    "alternating weights": {"sampler": "alternating"},
    "gradient equilibrium": {"equilibrium": True},
    "half detached": {"detach": 0.5},
    "distillation": {"distillation": 0.5},
}


def with_exits(backbone: PreActResNet) -> MultiExitNetwork:
    """Attach an exit after each of four blocks."""
    return attach_exits(
        backbone, after=EVERY_THIRD, heads="relu_linear", example=torch.zeros(1, 3, 32, 32)
    )


def noise(samples: int) -> Data:
    """Random images: time does not depend on what they show."""
    images = torch.randint(256, (samples, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (samples,))
    one = ArrayExamples(images[:1], labels[:1])
    return Data(
        name="noise",
        splits={"train": ArrayExamples(images, labels), "validation": one, "test": one},
        class_names=tuple(map(str, range(10))),
        fingerprint="noise",
        preprocess=Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, size=(32, 32), channels=3),
    )


def seconds(network: MultiExitNetwork, data: Data, recipe: Recipe) -> float:
    begin = time.perf_counter()
    fit(network, data, weights="sieve", recipe=recipe, progress=False)
    return time.perf_counter() - begin


def joint(smoke: bool) -> None:
    """Compare epochs with exits with those without, in each way of training them."""
    torch.set_num_threads(2)
    repeats, batches = (1, 1) if smoke else (9, 4)
    data = noise(128 * batches)
    recipe = Recipe(epochs=1, batch_size=128, lr=0.01, channels_last=True)
    backbone = PreActResNet(n=5, c=16)
    networks = {
        "plain": MultiExitNetwork(backbone, [], [], [], 10),
        "exits": with_exits(backbone),
    }
    times: dict[str, list[float]] = {name: [] for name in ("plain", "plain again", *OPTIONS)}
    for repeat in range(-1, repeats):
        order = list(times) if repeat % 2 else list(times)[::-1]
        for name in order:
            network = networks["plain" if name.startswith("plain") else "exits"]
            taken = seconds(network, data, dataclasses.replace(recipe, **OPTIONS.get(name, {})))
            if repeat >= 0:
                times[name].append(taken)
    rows = []
    for name in list(times)[1:]:
        ratio, low, high = median_interval(
            [mine / plain for mine, plain in zip(times[name], times["plain"], strict=True)]
        )
        rows.append(
            {
                "trained": name,
                "exits": 1 if name.startswith("plain") else 5,
                "n": repeats,
                "over training without exits": f"{ratio:.3f}",
                "95 % interval": f"{low:.3f} to {high:.3f}",
            }
        )
        print(rows[-1], flush=True)
    if not smoke:
        text = (
            "PreActResNet n=5, c=16 at 32x32 pixels, 5 exits, batch 128, channels-last, 4 steps an "
            "epoch, whole `fit` calls in turn, two threads; asked for: at most 1.25."
        )
        write_results("training", "Cost of joint training", text, rows)


def throughput(smoke: bool) -> None:
    """Measure images a second of a training step, by precision, layout and torch.compile."""
    torch.set_num_threads(1)
    repeats = 1 if smoke else 5
    data = noise(4 if smoke else 64)
    images, labels = next(data.batches("train", data.size("train")))
    networks = {"AnytimeNet 8-8-8, 8 channels": AnytimeNet(width=8, norms="shared")}
    if not smoke:
        networks |= {
            "AnytimeNet 8-8-8, 16 channels": AnytimeNet(width=16, norms="shared"),
            "PreActResNet n=5, c=16, 5 exits": with_exits(PreActResNet(n=5, c=16)),
            "PreActResNet n=9, c=32, 5 exits": with_exits(PreActResNet(n=9, c=32)),
        }
    before = Mode(precision="32-true", channels_last=False)
    modes = [
        Mode(precision=precision, channels_last=last)
        for precision in PRECISIONS
        for last in (False, True)
    ]
    compiled = Mode(precision="bf16-mixed", channels_last=True, compiled=True)
    rows = []
    for name, network in networks.items():
        # the networks for which it was asked
        tried = modes if isinstance(network, AnytimeNet) else [*modes, compiled]
        rates = step_rates(network, images, labels, modes=tried, repeats=repeats)
        for mode in tried:
            rate, low, high = median_interval(rates[mode])
            gain, least, most = median_interval(
                [mine / old for mine, old in zip(rates[mode], rates[before], strict=True)]
            )
            rows.append(
                {
                    "network": name,
                    "precision": mode.precision,
                    "layout": "channels last" if mode.channels_last else "contiguous",
                    "torch.compile": "yes" if mode.compiled else "",
                    "n": repeats,
                    "images/s": f"{rate:.0f} ({low:.0f} to {high:.0f})",
                    "over single precision, contiguous": f"{gain:.2f} ({least:.2f} to {most:.2f})",
                }
            )
            print(rows[-1], flush=True)
    if not smoke:
        text = (
            "Training steps of 64 images of 32x32 pixels, forward, backward and SGD, all ways in "
            "turn, one thread; the median with its 95 % interval by order statistics (of 5 "
            "repeats: all of them). torch.compile was given the network with its exits as it is; "
            "its own time at first is not counted. It warns that its limit of 8 recompilations is "
            "reached, as it compiles block by block."
        )
        write_results("throughput", "Images a second in training", text, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--what", choices=("joint", "throughput", "all"), default="all")
    options = parser.parse_args()
    if options.what in ("joint", "all"):
        joint(options.smoke)
    if options.what in ("throughput", "all"):
        throughput(options.smoke)


if __name__ == "__main__":
    main()
