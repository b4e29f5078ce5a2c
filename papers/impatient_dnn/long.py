"""Table 1 with a network that ImageNet taught: `python -m papers.impatient_dnn.long`.

MobileNet v1 0.25 at 128 pixels with six exits on CIFAR-10: an hour and more on one thread. Stop it
at any time; the same command goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from impatient import Recipe
from papers.data import ROOT
from papers.impatient_dnn import tables
from papers.impatient_dnn.__main__ import HERE, RUNS
from papers.impatient_dnn.recipe import IMAGENET, Pair, Scale, Settings, run
from papers.results import fill

LONG = Scale(
    pairs=(
        Pair(
            name="cifar10-mobilenet",
            target="cifar10",
            source=IMAGENET,
            network="papers.impatient_dnn.mobilenet:MobileNet",
            blocks=6,
        ),
    ),
    settings=Settings(
        train=6000,
        validation=1000,
        source_train=None,
        # not used: ImageNet's weights are there
        pretraining=Recipe(),
        # without batch norm: momentum alone learns too slowly or kills units (validation split)
        training=Recipe(
            epochs=5,
            batch_size=64,
            lr=1e-3,
            optimizer="adamw",
            warmup=0.1,
            augment="crop-flip",
            channels_last=True,
        ),
    ),
    seeds=1,
    workers=1,
    threads=1,
    repeats=300,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the tables and fill the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=RUNS / "long")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "long")
    parser.add_argument("--seeds", type=int, default=LONG.seeds)
    options = parser.parse_args(arguments)
    results = run(LONG, options.runs, seeds=options.seeds)
    page = tables.write(LONG.pairs, results, range(options.seeds), options.out, "all")
    if options.out.is_relative_to(ROOT):
        fill(HERE / "README.md", "long", page)


if __name__ == "__main__":
    main()
