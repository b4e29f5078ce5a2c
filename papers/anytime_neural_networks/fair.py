"""Weightings at the best learning rate of each: `python -m papers.anytime_neural_networks.fair`.

With one rate for all, a weighting whose weights add up to more takes longer steps, and a difference
of weightings is also one of step sizes. Here each method's rate is chosen on the validation split
of the first seed, and alternating weights meet static ones of the same mean: times 1 + gamma.
"""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from impatient.files import write_text
from impatient.recipe import Recipe
from impatient.training.weights import parse_weights
from papers.anytime_neural_networks.recipe import SHARES, Net, Training, train
from papers.data import ROOT
from papers.jobs import Job, run_jobs
from papers.results import fill, made_by, markdown, spread, write_csv

HERE = Path(__file__).parent
RUNS = ROOT / "runs" / "papers" / "anytime_neural_networks" / "fair"
OPT = "OPT"
ALTERNATING = "sieve, alternating"
AS_LONG = "sieve, times 1 + gamma"
METHODS = (OPT, "const", "sieve", "exp_lin", ALTERNATING, AS_LONG)


@dataclass(frozen=True, slots=True, kw_only=True)
class FairScale:
    """What is trained: one network, by every method.

    Attributes:
        training: how; its learning rate is replaced.
        blocks: of the network, with an exit after each; from 16 on, EXP-LIN differs from SIEVE.
        rates: learning rates to choose from.
        trial_epochs: of the trainings that choose the rates; None for whole ones.
    """

    training: Training
    n: int
    c: int
    blocks: int
    rates: tuple[float, ...]
    seeds: int
    trial_epochs: int | None = None


DIGITS = Training(
    data="digits",
    images=None,
    validation=None,
    epochs=12,
    batch_size=64,
    lr=0.0,
    schedule="cosine",
    augment="none",
    update_every=1,
)
SCALES = {
    "smoke": FairScale(
        training=dataclasses.replace(DIGITS, images=200, epochs=1),
        n=2,
        c=4,
        blocks=4,
        rates=(0.02, 0.1),
        seeds=2,
    ),
    "cpu": FairScale(
        training=DIGITS,
        n=6,
        c=8,
        blocks=16,
        rates=(0.02, 0.06, 0.18, 0.54),
        seeds=3,
    ),
    # 3,500 steps each
    "cifar10": FairScale(
        training=dataclasses.replace(
            DIGITS,
            data="cifar10",
            images=8_000,
            validation=2_000,
            epochs=7,
            batch_size=16,
            augment="crop-flip",
            precision="bf16-mixed",
        ),
        n=6,
        c=8,
        blocks=16,
        rates=(0.02, 0.06, 0.18),
        seeds=3,
        trial_epochs=2,
    ),
}


def net_of(method: str, scale: FairScale) -> Net:
    """Return the network that a method trains."""
    plain = Net(n=scale.n, c=scale.c, depth=scale.blocks)
    if method == OPT:
        return plain
    if method == ALTERNATING:
        return dataclasses.replace(plain, weights="sieve", sampler="alternating")
    if method == AS_LONG:
        # the alternating sampler adds this share of the sum to the exit that it draws
        factor = 1.0 + Recipe().sampler_gamma
        static = parse_weights("sieve", scale.blocks)
        return dataclasses.replace(plain, weights=",".join(f"{factor * w:.9g}" for w in static))
    return dataclasses.replace(plain, weights=method)


def job(method: str, rate: float, seed: int, scale: FairScale) -> Job:
    """Make one training."""
    training = dataclasses.replace(scale.training, lr=rate)
    name = method.replace(", ", "-").replace(" ", "").replace("+", "plus")
    arguments = {"training": training, "net": net_of(method, scale), "seed": seed, "keep": False}
    return Job(f"{name}-lr{rate:g}-seed{seed}", train, arguments)


def trial(method: str, rate: float, scale: FairScale) -> Job:
    """Make one training of the first seed that helps to choose the method's rate."""
    if scale.trial_epochs is None:
        return job(method, rate, 0, scale)
    training = dataclasses.replace(scale.training, epochs=scale.trial_epochs)
    short = job(method, rate, 0, dataclasses.replace(scale, training=training))
    return dataclasses.replace(short, name=f"{short.name}-trial")


def best_rates(
    scale: FairScale, results: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[float, float]]:
    """Choose each method's rate by the mean validation error of its exits, of the first seed.

    Returns:
        The rate, and the error at it.
    """
    chosen = {}
    for method in METHODS:
        errors = {
            rate: float(np.mean(results[trial(method, rate, scale).name]["validation_error"]))
            for rate in scale.rates
        }
        best = min(errors, key=errors.__getitem__)
        chosen[method] = (best, errors[best])
    return chosen


def milestone_errors(result: Mapping[str, Any]) -> list[float]:
    """Return the test error in per cent at each share of the cost, of the deepest exit within.

    Where there is none, it is not a number.
    """
    errors = [float("nan"), *(100.0 * error for error in result["test_error"])]
    costs = np.cumsum(result["stage_macs"])
    return [
        errors[int(np.searchsorted(costs, share * costs[-1] * (1 + 1e-9), "right"))]
        for share in SHARES
    ]


def run(scale: FairScale, folder: Path, workers: int = 1) -> dict[str, dict[str, Any]]:
    """Train the first seed at every rate, and all seeds at the rate that was chosen."""
    first = [trial(method, rate, scale) for method in METHODS for rate in scale.rates]
    results = run_jobs(first, folder, workers=workers)
    chosen = best_rates(scale, results)
    rest = [
        job(method, chosen[method][0], seed, scale)
        for seed in range(scale.seeds)
        for method in METHODS
    ]
    return {**results, **run_jobs(rest, folder, workers=workers)}


def summarised(scale: FairScale, results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per method and seed: the chosen rate, and the error at every milestone."""
    chosen = best_rates(scale, results)
    rows = []
    for method in METHODS:
        for seed in range(scale.seeds):
            result = results[job(method, chosen[method][0], seed, scale).name]
            errors = dict(zip(SHARES, milestone_errors(result), strict=True))
            rows.append({"method": method, "rate": chosen[method][0], "seed": seed, **errors})
    return rows


def page(scale: FairScale, rows: Sequence[Mapping[str, Any]], processor: str) -> str:
    """Write the table, and the two comparisons that it is for, as markdown."""

    def errors(method: str, share: float) -> list[float]:
        return [row[share] for row in rows if row["method"] == method]

    table = [
        {
            "method": method,
            "learning rate": next(row["rate"] for row in rows if row["method"] == method),
            **{
                f"error at {share:g}, %": ""
                if np.isnan(errors(method, share)).any()
                else spread(errors(method, share)).text()
                for share in SHARES
            },
        }
        for method in METHODS
    ]

    def less(one: str, other: str, shares: Sequence[float]) -> str:
        differences = [
            mine - its
            for share in shares
            for mine, its in zip(errors(one, share), errors(other, share), strict=True)
            # small networks have no exit within the first share
            if not np.isnan(mine - its)
        ]
        won = sum(difference < 0 for difference in differences)
        tied = sum(difference == 0 for difference in differences)
        return (
            f"{spread(differences).text(sign=True)} points of error, better in {won} of "
            f"{len(differences)} pairs, equal in {tied}"
        )

    half = len(SHARES) // 2
    images = f"{scale.training.images:,} images of " if scale.training.images else ""
    steps = f"{scale.training.epochs} epochs of {images}{scale.training.data}"
    seeds = f"{scale.seeds} seeds, mean ± standard deviation" if scale.seeds > 1 else "one seed"
    chosen = f"by trainings of {scale.trial_epochs} epochs " if scale.trial_epochs else ""
    return "\n".join(
        [
            "- Alternating SIEVE minus static SIEVE times 1 + gamma, second half: "
            f"{less(ALTERNATING, AS_LONG, SHARES[half:])}.",
            f"- EXP-LIN minus SIEVE, first half: {less('exp_lin', 'sieve', SHARES[:half])}.",
            *(
                f"- {name} minus OPT, at the end: {less(method, OPT, SHARES[-1:])}."
                for name, method in (("SIEVE", "sieve"), ("EXP-LIN", "exp_lin"), ("CONST", "const"))
            ),
            "",
            markdown(table),
            "",
            f"{scale.blocks} blocks and exits, {scale.c} channels, {steps}; {seeds}; "
            f"rates chosen {chosen}on the validation split of seed 0 "
            f"from {', '.join(f'{rate:g}' for rate in scale.rates)}. "
            f"{made_by(processor, 'papers.anytime_neural_networks.fair')}",
        ]
    )


def options_parser(description: str | None, runs: Path, scales: Sequence[str]) -> ArgumentParser:
    """Return a parser of the options that say what is trained, and where the tables go."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--scale", choices=scales, required=True)
    parser.add_argument("--runs", type=Path, default=runs)
    parser.add_argument("--out", type=Path, help="folder of the tables; by default of the card")
    parser.add_argument("--seeds", type=int, help="by default the scale's")
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the table and fill the card."""
    parser = options_parser(__doc__, RUNS, list(SCALES))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    scale = SCALES[options.scale]
    scale = dataclasses.replace(scale, seeds=options.seeds or scale.seeds)
    results = run(scale, options.runs / options.scale, options.workers)
    rows = summarised(scale, results)
    processor = str(next(iter(results.values()))["processor"])
    text = page(scale, rows, processor)
    out = options.out or HERE / "results" / f"fair-{options.scale}"
    write_csv(out / "fair.csv", rows)
    write_text(out / "fair.md", text + "\n")
    if options.out is None and options.scale != "smoke":
        mark = "fair" if options.scale == "cpu" else f"fair-{options.scale}"
        fill(HERE / "README.md", mark, text)


if __name__ == "__main__":
    main()
