"""The command `python -m papers.adaptive_neural_networks`.

It runs every training, measurement and fit that is missing, and writes tables and figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import tyro

from impatient.verbs.options import PositiveOrNone
from papers.adaptive_neural_networks import exiting, recipe, selecting, tables, times
from papers.adaptive_neural_networks.recipe import Case, Exits, Scale
from papers.command import Out, Publish, Runs, ScaleName, Workers, carry_out, start
from papers.data import ROOT
from papers.jobs import Job, finished, run_jobs

HERE = Path(__file__).parent
# the names of exits that are trained for longer, and of those that name several classes, beside
# the names of cases
BETTER = "exits"
SEVERAL = "top5"


class Table(StrEnum):
    """What is run."""

    networks = "networks"
    time = "time"
    policies = "policies"
    all = "all"


def main(
    scale: Annotated[
        ScaleName,
        tyro.conf.arg(
            help="smoke: seconds, on digits; cpu: an hour on two cores; gpu: trained for longer."
        ),
    ],
    table: Annotated[
        Table,
        tyro.conf.arg(
            help="What to run: networks, trainings and recordings; time, the measurements and the "
            "real runs, when nothing else "
            "runs; policies, all fits, which need both. Whatever is finished is written."
        ),
    ] = Table.all,
    out: Out = None,
    runs: Runs = ROOT / "runs" / "papers" / "adaptive_neural_networks",
    workers: Workers = 2,
    seeds: Annotated[
        PositiveOrNone,
        tyro.conf.arg(help="How many divisions of a test split; by default the scale's."),
    ] = None,
    case: Annotated[
        str | None,
        tyro.conf.arg(
            help="Selection on one data set alone; or `exits`, early exits trained for longer and "
            "jointly; or `top5`, early exits whose answers name five classes; each with tables of "
            "its own. By default everything but these two."
        ),
    ] = None,
    publish: Publish = False,
) -> None:
    """Reproduce selection among networks, early exits and guarantees.

    Stop with Ctrl-C at any time. The same command continues.
    """
    settings = _of_case(recipe.SCALES[scale.value], case)
    judging = dataclasses.replace(settings.judging, splits=seeds or settings.judging.splits)
    settings = dataclasses.replace(settings, judging=judging)
    folder = runs / scale.value
    carry_out(
        lambda: _run(settings, folder, table, workers),
        lambda into: tables.write(settings, everything(settings, folder), into),
        card=HERE / "README.md",
        scale=scale,
        out=out,
        publish=publish,
        part=case or "",
    )


def _of_case(scale: Scale, name: str | None) -> Scale:
    """Leave selection on one data set, or some of the exits, if named."""
    if name is None:
        return scale
    apart = {BETTER: scale.better, SEVERAL: scale.several}
    if name in apart:
        return dataclasses.replace(scale, cases=(), exits=apart[name])
    cases = tuple(case for case in scale.cases if case.name == name)
    if not cases:
        known = ", ".join([*(case.name for case in scale.cases), *apart])
        raise SystemExit(f"Error: no case {name!r} at this scale; there are {known}.")
    return dataclasses.replace(scale, cases=cases, exits=())


def _run(scale: Scale, folder: Path, table: Table, workers: int) -> None:
    if table in (Table.networks, Table.all):
        for stage in recipe.stages(scale):
            run_jobs(stage, folder, workers=workers)
    if table in (Table.time, Table.all):
        # one by one: nothing else may run
        run_jobs(times.jobs(scale), folder, workers=1)
    if table in (Table.policies, Table.all):
        run_jobs(policy_jobs(scale, finished(times.jobs(scale), folder)), folder, workers=workers)


def policy_jobs(scale: Scale, measured: Mapping[str, Any]) -> list[Job]:
    """Fits on every division, for what has been measured."""
    made = []
    for what in (what for what in scale.parts if times.name(what) in measured):
        result = measured[times.name(what)]
        judge: Callable[..., dict[str, Any]]
        if isinstance(what, Case):
            judge = selecting.judge_split
            known = {"case": what, "node_s": result["node_s"]}
        else:
            judge = exiting.judge_split
            known = {"exits": what, "costs": result["costs"]}
        known |= {"gate_s": result["gate_s"], "judging": scale.judging}
        made += [
            Job(split_name(what, seed), judge, known | {"seed": seed})
            for seed in splits(what, scale)
        ]
    return made


def splits(what: Case | Exits, scale: Scale) -> range:
    """Return the seeds of the divisions, one if policies are fitted on a validation split."""
    case = what if isinstance(what, Case) else what.case
    return range(scale.judging.splits if case.fitted_on == "test" else 1)


def split_name(what: Case | Exits, seed: int) -> str:
    """Name of a fit's job."""
    return f"policies-{what.name}-split{seed}"


def everything(scale: Scale, folder: Path) -> tables.Found:
    """Collect the results of finished jobs."""
    measured = finished(times.jobs(scale), folder)
    fitted = finished(policy_jobs(scale, measured), folder)
    return tables.Found(
        networks=finished([job for stage in recipe.stages(scale) for job in stage], folder),
        times={
            what.name: measured[times.name(what)]
            for what in scale.parts
            if times.name(what) in measured
        },
        splits={
            what.name: [
                fitted[split_name(what, seed)]
                for seed in splits(what, scale)
                if split_name(what, seed) in fitted
            ]
            for what in scale.parts
        },
    )


if __name__ == "__main__":
    start(main)
