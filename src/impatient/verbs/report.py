"""Write the page about a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

import impatient
from impatient.errors import ModelSpecError, StorageError
from impatient.files import is_file, write_text
from impatient.verbs.evaluate import beside_eager, judged_as
from impatient.verbs.imported import opened
from impatient.verbs.notes import log
from impatient.verbs.options import (
    AnyProfile,
    Directory,
    RunPath,
    Threads,
    Trust,
    VerbOptions,
    use_threads,
)
from impatient.verbs.processes import alone
from impatient.verbs.run_directory import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions(VerbOptions):
    """Write one self-contained HTML page about the run.

    Attributes:
        beside: Run directories on the same data, to show beside this one.
    """

    directory: Directory
    beside: Annotated[UseAppendAction[tuple[RunPath, ...]], arg(metavar="DIR")] = ()
    any_profile: AnyProfile = False
    threads: Threads = 0
    trust: Trust = ()


@alone()
def report(options: ReportOptions) -> Path:
    """Write one self-contained HTML page about the run."""
    from impatient.verbs.samples import examples_of, numbers_of
    from impatient.verbs.zoo import name_of

    use_threads(options.threads)
    run = opened(options.directory, trust=options.trust)
    if not is_file(run.evaluation_file):
        if run.has_network:
            # is it a run at all?
            run.spec()
        raise StorageError(
            f"{run.path} has not been evaluated; run `impatient evaluate {run.path}`."
        )
    evaluation = impatient.Evaluation.load(run.evaluation_file)
    policies = run.policies()
    evaluation.provenance.require(
        "the evaluation",
        f"run `impatient evaluate {run.path}` again",
        weights=run.weights_fingerprint(),
    )
    # others are the standard ones, or cannot be drawn over time
    chosen = (
        (name, budget)
        for name, budget in evaluation.budgets.items()
        if ":" in name and budget.cost == "time"
    )
    costs = run.profile(any_machine=options.any_profile)
    recording = judged_as(run.recording("test"), evaluation.task)
    page = impatient.evaluation.Report(
        title=name_of(run.path),
        evaluation=evaluation,
        recording=recording,
        costs=costs,
        policies=policies,
        chosen_budget=next(chosen, None),
        examples=examples_of(run, recording, policies),
        numbers=numbers_of(run, recording),
        engines={
            name: (
                beside_eager(run.path, name, judged.task),
                judged,
            )
            for name, judged in _in_engines(run).items()
        },
        compared=_compared(run, options.beside),
        network=_network(run, costs),
        facts=run.facts(),
        targets=run.targets(),
    )
    write_text(run.report_file, impatient.evaluation.report_html(page))
    log.info("report: %s", run.report_file)
    return run.report_file


def _in_engines(run: RunDirectory) -> dict[str, impatient.Evaluation]:
    """Read the evaluations of the same network in other engines."""
    return {
        name: impatient.Evaluation.load(run.engine(name).evaluation_file)
        for name in run.engine_names()
    }


def _compared(run: RunDirectory, others: Sequence[Path]) -> dict[str, impatient.Evaluation]:
    """Read the evaluations of other runs on the same data."""
    from impatient.verbs.zoo import name_of

    found = {}
    for path in others:
        other = opened(path)
        if not is_file(other.evaluation_file):
            raise StorageError(f"{path} has not been evaluated; run `impatient evaluate {path}`.")
        evaluation = impatient.Evaluation.load(other.evaluation_file)
        evaluation.provenance.require(
            f"the evaluation of {path}",
            "compare runs on the same data",
            data=run.data_fingerprint(),
        )
        found[name_of(path)] = evaluation
    return found


def _network(
    run: RunDirectory, costs: impatient.CostProfile
) -> tuple[impatient.evaluation.Part, ...]:
    """Look at the network, to draw it, unless it is of a source that is not trusted."""
    if not run.has_network:
        return ()
    try:
        network = run.spec().build(run.trust)
    except ModelSpecError as error:
        log.warning("note: the network is not drawn. %s", error)
        return ()
    return impatient.evaluation.parts_of(network.stage_facts(run.spec().example()), costs)
