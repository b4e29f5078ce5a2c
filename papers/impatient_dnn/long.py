"""Table 1 with a network that ImageNet taught: `python -m papers.impatient_dnn.long`.

MobileNet v1 0.25 at 128 pixels with six exits on CIFAR-10 or GTSRB: an hour and more on one thread.
Stop it at any time; the same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from impatient import Recipe
from papers.impatient_dnn import tables
from papers.impatient_dnn.__main__ import HERE, RUNS
from papers.impatient_dnn.recipe import IMAGENET, Pair, Scale, Settings, results_so_far, run
from papers.results import fill


def _on(target: str) -> Pair:
    return Pair(
        name=f"{target}-mobilenet",
        target=target,
        source=IMAGENET,
        network="papers.impatient_dnn.mobilenet:MobileNet",
        blocks=6,
    )


LONG = Scale(
    pairs=(_on("cifar10"),),
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
    # at the backbone's rate linear heads stay far behind the SVMs (validation split)
    head_lr=1e-2,
)


def _of_signs(scale: Scale) -> Scale:
    """Replace CIFAR-10 by GTSRB, whose signs are not mirrored: another class, or none."""
    training = dataclasses.replace(scale.settings.training, augment="crop")
    settings = dataclasses.replace(scale.settings, training=training)
    return dataclasses.replace(scale, pairs=(_on("gtsrb"),), settings=settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the tables and fill the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=("cifar10", "gtsrb"), default="cifar10")
    parser.add_argument("--runs", type=Path, help="folder of checkpoints and results")
    parser.add_argument("--out", type=Path, help="folder of the tables; by default of the card")
    parser.add_argument("--seeds", type=int, default=LONG.seeds)
    parser.add_argument(
        "--one-rate", action="store_true", help="heads learn at the backbone's rate, to compare"
    )
    parser.add_argument(
        "--heads-first",
        action="store_true",
        help="early heads begin as logistic regressions; all learn at the backbone's rate",
    )
    parser.add_argument(
        "--publish", action="store_true", help="write what is finished, and run nothing"
    )
    options = parser.parse_args(arguments)
    scale, name = LONG, "long"
    if options.one_rate or options.heads_first:
        scale = dataclasses.replace(LONG, head_lr=None, heads_first=options.heads_first)
        name = "long-heads-first" if options.heads_first else "long-one-rate"
    if options.case == "gtsrb":
        scale, name = _of_signs(scale), f"{name}-gtsrb"
        if options.out is None and not options.heads_first:
            parser.error("the card has no place for this table; give its folder with --out")
    scale = dataclasses.replace(scale, seeds=options.seeds)
    runs = options.runs or RUNS / name
    if not options.publish:
        run(scale, runs)
    page = tables.write(
        scale.pairs,
        results_so_far(scale, runs),
        range(scale.seeds),
        options.out or HERE / "results" / name,
        "all",
        module="papers.impatient_dnn.long",
    )
    if options.out is None:
        fill(HERE / "README.md", name, page)


if __name__ == "__main__":
    main()
