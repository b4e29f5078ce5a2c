"""Trainings that take hours, one after the other: `python -m papers.anytimenet.long RUNS`.

AnytimeNet and BASELINE on all of CIFAR-10, seed by seed, on one thread, in single precision: on
processors without bfloat16 instructions (AVX-512 BF16 or AMX) bfloat16 is far slower, not faster.
Stop them at any time; the same command goes on. Each result is in RUNS/NAME/result.json as soon as
it is there.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from papers.anytimenet.recipe import SCALES, THIN, Case, Net, Scale, Training, jobs
from papers.jobs import run_jobs

LONG = Scale(
    cases=(
        Case(
            name="cifar10",
            data="cifar10",
            images=None,
            validation=None,
            epochs=10,
            batch_size=128,
            augment="crop-flip",
        ),
    ),
    net=THIN,
    # the learning rate rises for a quarter and falls along a cosine: one cycle
    training=Training(
        lr=0.4,
        schedule="cosine",
        warmup=0.25,
        calibration=4096,
        weight_decay=5e-4,
    ),
    timing=SCALES["cpu"].timing,
    seeds=3,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of checkpoints and results")
    parser.add_argument("--smoke", action="store_true", help="on digits, to see that it runs")
    options = parser.parse_args(arguments)
    run_jobs(jobs(smoke() if options.smoke else LONG), options.runs, workers=1, threads=1)


def smoke() -> Scale:
    """Return the same trainings of a tiny network on digits, one seed."""
    small = SCALES["smoke"]
    net: Net = small.net
    case = dataclasses.replace(small.cases[0], batch_size=64)
    training = dataclasses.replace(LONG.training, lr=0.1, calibration=200)
    return dataclasses.replace(LONG, cases=(case,), net=net, training=training, seeds=1)


if __name__ == "__main__":
    main()
