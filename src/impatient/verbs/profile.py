"""Measure what every stage and head of a run's network costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

import impatient
from impatient.errors import StaleInput, StorageError
from impatient.files import is_file
from impatient.table import Table
from impatient.verbs.notes import log
from impatient.verbs.options import (
    Counts,
    Directory,
    Force,
    Names,
    Positive,
    Quiet,
    ThreadCounts,
    Trust,
    VerbOptions,
)
from impatient.verbs.processes import alone
from impatient.verbs.run_directory import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions(VerbOptions):
    """Measure what every stage and head costs on this machine.

    Attributes:
        batch_sizes: Batch sizes to measure.
        repeats: Measurements of each stage and head.
        engines: Engines to measure: eager, compile, or one that `impatient export` has made in
            DIR/engines. Each has its own profile.json.
        threads: Thread counts to measure; 0 takes one fewer than the cores. The first is that of
            profile.json, another that of profile-t2.json.
    """

    directory: Directory
    batch_sizes: Counts = (1,)
    repeats: Positive = 300
    engines: Annotated[Names, arg(name="engine", aliases=["--engines"])] = ("eager",)
    threads: ThreadCounts = (0,)
    force: Force = False
    quiet: Quiet = False
    trust: Trust = ()


@alone()
def profile(options: ProfileOptions) -> dict[Path, impatient.CostProfile]:
    """Profile a run in several engines and with several thread counts.

    Each profile has a file; one of this network, engine and machine that is there already is kept.
    The first thread count's is the engine's profile.json, which the other steps read.

    Returns:
        The profiles by file.
    """
    import torch

    before = torch.get_num_threads()
    made = {}
    try:
        for engine, (place, count) in itertools.product(
            options.engines, enumerate(options.threads)
        ):
            torch.set_num_threads(count or before)
            name = f"profile-t{count or before}.json" if place else "profile.json"
            file, costs = _profiled(options, engine, name)
            made[file] = costs
    finally:
        torch.set_num_threads(before)
    return made


def _profiled(
    options: ProfileOptions, engine: str, name: str
) -> tuple[Path, impatient.CostProfile]:
    run = RunDirectory(options.directory, trust=options.trust).engine(engine)
    network, _ = run.network()
    file = run.profile_file.with_name(name)
    if is_file(file) and not options.force:
        try:
            known = impatient.CostProfile.load(file)
            reason = _not_fresh(known, network, options.batch_sizes, options.repeats)
        except StorageError as damage:
            reason = str(damage)
        if not reason:
            log.info("up to date: %s (--force to measure again)", file)
            return file, known
        log.info("measuring again: %s", reason)
    costs = impatient.profile(
        network,
        run.spec().example(),
        batch_sizes=options.batch_sizes,
        repeats=options.repeats,
        progress=not options.quiet,
    )
    costs.save(file)
    log.info("profiled: %s", file)
    return file, costs


def _not_fresh(
    costs: impatient.CostProfile, network: Any, batch_sizes: Sequence[int], repeats: int
) -> str:
    """Say why a profile must be made again, or nothing."""
    from impatient.runtime.profile import check_profile

    try:
        check_profile(costs, network, "measure again")
    except StaleInput as reason:
        return str(reason)
    fresh = all(
        size in costs.batches and costs.at(size).exit_free.n >= repeats for size in batch_sizes
    )
    return "" if fresh else "other batch sizes or more repeats are asked for."


def shown(options: ProfileOptions, made: dict[Path, impatient.CostProfile]) -> Iterator[Table]:
    """Give the measured times of every batch size."""
    from impatient.evaluation.tables import costs_table

    for costs in made.values():
        for size in options.batch_sizes:
            yield costs_table(costs, size)
