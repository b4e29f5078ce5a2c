"""Prediction periods and learned sampling: `python -m papers.anytime_neural_networks.appendix`.

The paper's appendix trains with an exit after every s-th block only, and draws the exit that weighs
more by EXP3, RWM or AVGL instead of by the weights themselves. Network, data and training are those
of `fair`, at one learning rate that is good there for every method. SIEVE adds up to the same for
any number of exits, and each sampler to the same on average, so that all steps are alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from impatient.files import write_text
from papers.anytime_neural_networks.fair import (
    SCALES,
    FairScale,
    milestone_errors,
    options_parser,
)
from papers.anytime_neural_networks.recipe import SHARES, Net, train
from papers.data import ROOT
from papers.jobs import Job, run_jobs
from papers.results import Claim, claim_rows, fill, judged, made_by, markdown, spread, write_csv

HERE = Path(__file__).parent
RUNS = ROOT / "runs" / "papers" / "anytime_neural_networks" / "appendix"
RATE = 0.18
OPT = "OPT"
SIEVE = "sieve, period 1"
PERIODS = {f"sieve, period {period}": period for period in (1, 2, 4, 8)}
ALTERNATING = "sieve, alternating"
LEARNERS = ("sieve, exp3", "sieve, rwm", "sieve, avgl")
METHODS = (OPT, *PERIODS, ALTERNATING, *LEARNERS)
Errors = Mapping[str, np.ndarray]


def net_of(method: str, scale: FairScale) -> Net:
    """Return the network that a method trains."""
    plain = Net(n=scale.n, c=scale.c, depth=scale.blocks)
    if method == OPT:
        return plain
    if method in PERIODS:
        return dataclasses.replace(plain, weights="sieve", period=PERIODS[method])
    sampler = method.removeprefix("sieve, ")
    return dataclasses.replace(plain, weights="sieve", sampler=sampler)  # type: ignore[arg-type]


def job(method: str, seed: int, scale: FairScale) -> Job:
    """Make one training."""
    training = dataclasses.replace(scale.training, lr=RATE)
    name = method.replace(", ", "-").replace(" ", "")
    arguments = {"training": training, "net": net_of(method, scale), "seed": seed, "keep": False}
    return Job(f"{name}-seed{seed}", train, arguments)


def errors_of(scale: FairScale, results: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return each method's error in per cent by seed and milestone, NaN where it has no exit."""
    return {
        method: np.asarray(
            [
                milestone_errors(results[job(method, seed, scale).name])
                for seed in range(scale.seeds)
            ]
        )
        for method in METHODS
    }


def claims(errors: Errors) -> Iterator[Claim]:
    """Judge periods against an exit after every block, and learned sampling against AANN."""
    for method, period in PERIODS.items():
        if period > 1:
            for where, gains in _differences(errors[SIEVE], errors[method]):
                yield judged(
                    f"SIEVE with period {period} is better than with 1 ({where})",
                    "as good at the end, better before",
                    "points of error, lower by",
                    gains,
                )
    for method in LEARNERS:
        name = method.removeprefix("sieve, ").upper()
        for where, gains in _differences(errors[method], errors[ALTERNATING]):
            yield judged(
                f"AANN is better than {name} ({where})",
                "yes" if name == "EXP3" else "not worse",
                "points of error, lower by",
                gains,
            )


def _differences(one: np.ndarray, other: np.ndarray) -> Iterator[tuple[str, list[float]]]:
    """Yield by how much the other has fewer errors, by seed: at the end, and on average before."""
    gains = one - other
    there = [place for place in range(len(SHARES) - 1) if not np.isnan(gains[:, place]).any()]
    yield "at the end", gains[:, -1].tolist()
    if there:
        shares = ", ".join(f"{SHARES[place]:g}" for place in there)
        yield f"mean at {shares}", gains[:, there].mean(1).tolist()


def rows_of(errors: Errors) -> list[dict[str, Any]]:
    """Return a row per method and seed, with the error at every milestone."""
    return [
        {"method": method, "seed": seed, **dict(zip(SHARES, found.tolist(), strict=True))}
        for method, seeds in errors.items()
        for seed, found in enumerate(seeds)
    ]


def page(scale: FairScale, errors: Errors, processor: str) -> str:
    """Write claims and table as markdown."""
    table = [
        {
            "method": method,
            **{
                f"error at {share:g}, %": ""
                if np.isnan(found[:, place]).any()
                else spread(found[:, place].tolist()).text()
                for place, share in enumerate(SHARES)
            },
        }
        for method, found in errors.items()
    ]
    return f"""{markdown(claim_rows(claims(errors)))}

{markdown(table)}

{scale.blocks} blocks, {scale.c} channels, {scale.training.epochs} epochs of \
{scale.training.data}, learning rate {RATE:g}; {scale.seeds} seeds, mean ± standard \
deviation. {made_by(processor, "papers.anytime_neural_networks.appendix")}"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, seed by seed, then write the tables and fill the card."""
    options = options_parser(__doc__, RUNS, ["smoke", "cpu"]).parse_args(arguments)
    torch.set_num_threads(1)
    scale = SCALES[options.scale]
    scale = dataclasses.replace(scale, seeds=options.seeds or scale.seeds)
    wanted = [job(method, seed, scale) for seed in range(scale.seeds) for method in METHODS]
    results = run_jobs(wanted, options.runs / options.scale, workers=options.workers)
    errors = errors_of(scale, results)
    text = page(scale, errors, str(results[wanted[0].name]["processor"]))
    out = options.out or HERE / "results" / f"appendix-{options.scale}"
    write_csv(out / "appendix.csv", rows_of(errors))
    write_text(out / "appendix.md", text + "\n")
    if options.out is None and options.scale != "smoke":
        fill(HERE / "README.md", "appendix", text)


if __name__ == "__main__":
    main()
