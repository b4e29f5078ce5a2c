"""Measure what training all exits jointly costs.

Epochs take turns, in one process, with those of the network without exits.

python benchmarks/training.py            about 6 minutes
python benchmarks/training.py --smoke    seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch
from common import median_interval, write_results

from impatient import Data, Recipe, attach_exits, fit
from impatient.networks import MultiExitNetwork, PreActResNet
from impatient.training import Preprocess
from impatient.training.examples import ArrayExamples

# with the output, 5 exits of 15 blocks
EVERY_THIRD = [f"blocks.{block}" for block in (2, 5, 8, 11)]
OPTIONS = {
    "static weights": {},
    "alternating weights": {"sampler": "alternating"},
    "gradient equilibrium": {"equilibrium": True},
    "half detached": {"detach": 0.5},
    "distillation": {"distillation": 0.5},
}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(2)
    repeats, batches = (1, 1) if smoke else (9, 4)
    data = noise(128 * batches)
    recipe = Recipe(epochs=1, batch_size=128, lr=0.01, channels_last=True)
    backbone = PreActResNet(n=5, c=16)
    networks = {
        "plain": MultiExitNetwork(backbone, [], [], [], 10),
        "exits": attach_exits(
            backbone, after=EVERY_THIRD, heads="relu_linear", example=torch.zeros(1, 3, 32, 32)
        ),
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


if __name__ == "__main__":
    main()
