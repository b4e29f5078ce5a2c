"""The command `python -m papers.anytime_neural_networks`.

It runs every training that is missing, and writes tables and figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import tyro

from papers.anytime_neural_networks import recipe, tables
from papers.anytime_neural_networks.curves import alone, ensemble
from papers.anytime_neural_networks.recipe import ENSEMBLES
from papers.command import Out, Publish, Runs, ScaleName, Seeds, Workers, carry_out, start
from papers.data import ROOT
from papers.jobs import finished, run_jobs

HERE = Path(__file__).parent


class Table(StrEnum):
    """What is trained and written."""

    milestones = "milestones"
    eann = "eann"
    all = "all"


def main(
    scale: Annotated[
        ScaleName,
        tyro.conf.arg(
            help="smoke: seconds, on digits; cpu: 45 minutes on two cores; gpu: CIFAR-10."
        ),
    ],
    table: Annotated[
        Table, tyro.conf.arg(help="Which table's trainings to run; what is finished is written.")
    ] = Table.all,
    out: Out = None,
    runs: Runs = ROOT / "runs" / "papers" / "anytime_neural_networks",
    workers: Workers = 2,
    seeds: Seeds = None,
    publish: Publish = False,
) -> None:
    """Reproduce the milestone table and the EANN figure.

    Stop with Ctrl-C at any time. The same command continues.
    """
    settings = recipe.SCALES[scale.value]
    settings = dataclasses.replace(settings, seeds=seeds or settings.seeds)
    folder = runs / scale.value
    carry_out(
        lambda: run_jobs(recipe.jobs(settings, table.value), folder, workers=workers),
        lambda into: summarise(settings, folder, into),
        card=HERE / "README.md",
        scale=scale,
        out=out,
        publish=publish,
    )


def summarise(scale: recipe.Scale, folder: Path, out: Path) -> str:
    """Write the tables of what is finished, and the page, which is returned."""
    results = finished(recipe.jobs(scale), folder)
    return tables.write(
        scale, results, measured_times(scale, results, folder), checked(scale, results, folder), out
    )


def measured_times(
    scale: recipe.Scale, results: Mapping[str, Any], folder: Path
) -> dict[str, Sequence[float]]:
    """Measure the seconds until each exit, for networks with a finished training.

    They are measured alone, in this process.
    """
    jobs = [
        job
        for job in recipe.time_jobs(scale)
        if any(key.startswith(f"{job.name}-") for key in results)
    ]
    return {
        name: result["contract_s"]
        for name, result in run_jobs(jobs, folder / "times", workers=1).items()
    }


def checked(scale: recipe.Scale, results: Mapping[str, Any], folder: Path) -> float | None:
    """Compare an EANN's recording with the curve assembled from its members.

    The result is the largest difference, in errors or as a share of costs.

    None if its members are not all trained yet.
    """
    nets = recipe.member_nets(scale, ENSEMBLES[0])
    if not all(f"{net.name}-seed0" in results for net in nets):
        return None
    members = [results[f"{net.name}-seed0"] for net in nets]
    job = recipe.check_job(scale, [member["validation_error"] for member in members], folder)
    real = run_jobs([job], folder, workers=1)[job.name]
    assembled = ensemble(members)
    itself = alone(real, heads="all")
    pairs = [*zip(itself.errors, assembled.errors, strict=True)]
    pairs += [
        (cost / other, 1.0) for cost, other in zip(itself.costs, assembled.costs, strict=True)
    ]
    return max(abs(one - other) for one, other in pairs)


if __name__ == "__main__":
    start(main)
