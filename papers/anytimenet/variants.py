"""OUTs of their own, and other weights of the losses: `python -m papers.anytimenet.variants RUNS`.

The paper says that an OUT for each iteration brings nothing, and weighs iteration j of n by
f(n, j) = 1/(n - j + 1)^2. Both are compared here with what they are chosen over, seed by seed. All
weights have the paper's sum, since another one would change the step size as well.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from impatient.files import write_text
from impatient.training.weights import inverse_square
from papers.anytimenet.learning import NORMS_IN_WORDS
from papers.anytimenet.long import in_faster_precision, long_scale, smoke
from papers.anytimenet.recipe import NORMS, SCALES, THIN, Scale, train
from papers.jobs import Job, run_jobs
from papers.results import Claim, claim_rows, fill, judged, made_by, markdown, spread, write_csv

HERE = Path(__file__).parent
PAPER = "the paper's"
OWN_OUTS = "own OUTs"
# a quarter of CIFAR-10's, as judging all of them takes as long as the training
TEST_IMAGES = 2500
# the exponent of n - j + 1 in the weights
EXPONENTS = {PAPER: 2, OWN_OUTS: 2, "1/(n - j + 1)": 1, "uniform": 0}


def weights_text(exponent: int, count: int) -> str:
    """Write the weights 1/(n - j + 1)^exponent of `count` iterations, with the paper's sum.

    Example:
        >>> weights_text(0, 2)
        '0.625,0.625'
    """
    if exponent == 2:
        return "inverse_square"
    plain = [1.0 / (count - index) ** exponent for index in range(count)]
    factor = sum(inverse_square(count)) / sum(plain)
    return ",".join(f"{factor * weight:.9g}" for weight in plain)


def variant_scale(images: int, epochs: int, seeds: int) -> Scale:
    """Return the scale of `papers.anytimenet.long` with less of CIFAR-10.

    Batches are half as large, for there are few, and so is the learning rate.
    """
    case = dataclasses.replace(
        SCALES["gpu"].cases[0], images=images, validation=500, test=TEST_IMAGES
    )
    scale = long_scale(case, THIN, epochs=epochs, seeds=seeds, width=THIN.width)
    return dataclasses.replace(
        scale,
        cases=(dataclasses.replace(scale.cases[0], batch_size=64),),
        training=dataclasses.replace(scale.training, lr=0.2, calibration=2048),
    )


def job(variant: str, seed: int, scale: Scale) -> Job:
    """Make one training of AnytimeNet."""
    count = len(scale.net.counts)
    weights = weights_text(EXPONENTS[variant], count)
    net = dataclasses.replace(scale.net, outs="own") if variant == OWN_OUTS else scale.net
    arguments = {
        "case": scale.cases[0],
        "training": dataclasses.replace(scale.training, weights=weights),
        "net": net,
        "kind": "anytime",
        "seed": seed,
    }
    return Job(f"variant{list(EXPONENTS).index(variant)}-seed{seed}", train, arguments)


def accuracies(
    scale: Scale, results: Mapping[str, Mapping[str, Any]], variant: str, norms: str
) -> np.ndarray:
    """Return per cent of the test images by seed and iteration."""
    runs = [results[job(variant, seed, scale).name] for seed in range(scale.seeds)]
    return 100 * np.asarray([run[norms]["accuracy"] for run in runs])


def claims(scale: Scale, results: Mapping[str, Mapping[str, Any]]) -> Iterator[Claim]:
    """Judge the paper's choice against each other one, by the seeds' differences."""
    for norms in NORMS[::-1]:
        paper = accuracies(scale, results, PAPER, norms)
        for variant in list(EXPONENTS)[1:]:
            gains = paper - accuracies(scale, results, variant, norms)
            is_out = variant == OWN_OUTS
            better = "one OUT for all" if is_out else "1/(n - j + 1)²"
            expected = "own ones bring nothing" if is_out else "yes"
            for where, seeds in (("last iteration", gains[:, -1]), ("mean", gains.mean(1))):
                yield judged(
                    f"{better} is better than {variant} ({where}, {norms} statistics)",
                    expected,
                    "points",
                    seeds.tolist(),
                )


def raw_rows(
    scale: Scale, results: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, int | float | str]]:
    """Yield the accuracy of every iteration of every training."""
    for variant in EXPONENTS:
        for norms in NORMS:
            for seed, run in enumerate(accuracies(scale, results, variant, norms).tolist()):
                for name, accuracy in zip(scale.net.schedule.names, run, strict=True):
                    yield {
                        "variant": variant,
                        "statistics": norms,
                        "seed": seed,
                        "iteration": name,
                        "accuracy": accuracy,
                    }


def page(scale: Scale, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Write claims and tables as markdown."""
    (case,) = scale.cases
    first = results[job(PAPER, 0, scale).name]
    seconds = sum(run["seconds"] for run in results.values())
    tables = "\n\n".join(
        f"Accuracy in per cent, {NORMS_IN_WORDS[norms]}:\n\n{_table(scale, results, norms)}"
        for norms in NORMS[::-1]
    )
    return f"""{markdown(claim_rows(claims(scale, results)))}

{tables}

{case.name}, {first["images"]:,} training images, {case.epochs} epoch{"s" * (case.epochs > 1)}, \
batch {case.batch_size}, one cycle up to a learning rate of {scale.training.lr}, \
{scale.training.precision}, {scale.net.width} channels, weights of the same sum; {scale.seeds} \
seeds, mean ± standard deviation; {sum(first["own"]["counts"]):,} test images. {seconds / 60:.0f} \
minutes of training on one thread, while other programs ran. \
{made_by(str(first["processor"]), "papers.anytimenet.variants")}"""


def _table(scale: Scale, results: Mapping[str, Mapping[str, Any]], norms: str) -> str:
    found = {variant: accuracies(scale, results, variant, norms) for variant in EXPONENTS}
    rows: list[dict[str, str]] = [
        {
            "iteration": name,
            **{variant: spread(found[variant][:, place].tolist()).text() for variant in EXPONENTS},
        }
        for place, name in enumerate(scale.net.schedule.names)
    ]
    means = {variant: spread(found[variant].mean(1).tolist()).text() for variant in EXPONENTS}
    return markdown([*rows, {"iteration": "mean", **means}])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, seed by seed, then write the tables.

    With the default folder the card is filled.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of checkpoints and results")
    parser.add_argument("--smoke", action="store_true", help="on digits, to see that it runs")
    parser.add_argument("--images", type=int, default=16_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder of the tables; by default of the card")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size = (options.images, options.epochs, options.seeds)
    made = smoke() if options.smoke else variant_scale(*size)
    scale = in_faster_precision(made, options.runs)
    wanted = [job(variant, seed, scale) for seed in range(scale.seeds) for variant in EXPONENTS]
    results = run_jobs(wanted, options.runs, workers=1)
    text = page(scale, results)
    out = options.out or (options.runs if options.smoke else HERE / "results" / "variants")
    write_csv(out / "variants.csv", list(raw_rows(scale, results)))
    write_text(out / "variants.md", text + "\n")
    if options.out is None and not options.smoke:
        fill(HERE / "README.md", "variants", text)


if __name__ == "__main__":
    main()
