"""Measure what several workers gain on an ensemble of growing depth.

Complete runs on two workers take turns with complete runs on one.

python benchmarks/workers.py            about a minute
python benchmarks/workers.py --smoke    seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import time

import torch
from common import median_interval, write_results
from torch import nn

from impatient import attach_exits
from impatient.experimental.workers import ParallelEANN
from impatient.networks import EANN

# pairs of equal networks: what two workers could halve
DEPTHS = (8, 8, 16, 16)
ERRORS = [[0.5, 0.4], [0.4, 0.3], [0.35, 0.25], [0.3, 0.2]]
# channels, pixels, batch
CASES = {"tiny": (4, 8, 1), "small": (16, 32, 1), "large": (32, 32, 8)}


def plain(depth: int, channels: int) -> nn.Module:
    blocks = [
        nn.Sequential(
            nn.Conv2d(channels if place else 3, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        for place in range(depth)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def measure(name: str, repeats: int) -> dict[str, object]:
    channels, pixels, batch = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(batch, 3, pixels, pixels)
    networks = [
        attach_exits(plain(depth, channels), after=[str(depth // 2)], example=x[:1])
        for depth in DEPTHS
    ]
    ensemble = EANN(networks, ERRORS).eval()

    def seconds(parallel: ParallelEANN) -> float:
        begin = time.perf_counter()
        parallel.run(x)
        return time.perf_counter() - begin

    ratios = []
    same = []
    with (
        ParallelEANN(ensemble, workers=1, threads=1) as one,
        ParallelEANN(ensemble, workers=2, threads=1) as two,
    ):
        for repeat in range(-5, repeats):
            first = seconds(one)
            both = seconds(two)
            again = seconds(one)
            if repeat >= 0:
                ratios.append(both / first)
                same.append(again / first)
    middle, low, high = median_interval(ratios)
    return {
        "networks": name,
        "channels": channels,
        "pixels": pixels,
        "batch": batch,
        "n": repeats,
        "two workers / one": f"{middle:.2f}",
        "95 % interval": f"{low:.2f} to {high:.2f}",
        "one / one": f"{median_interval(same)[0]:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    rows = []
    for name in list(CASES)[:1] if smoke else CASES:
        rows.append(measure(name, 3 if smoke else 100))
        print(rows[-1], flush=True)
    if not smoke:
        text = (
            f"EANN of plain networks of {', '.join(map(str, DEPTHS))} layers, one torch thread per "
            "worker, two cores; 0.5 would be a perfect gain."
        )
        write_results("workers", "Two workers for networks of growing depth", text, rows)


if __name__ == "__main__":
    main()
