"""Judge every exit and policy of a run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import UseAppendAction, arg

import impatient
from impatient.errors import PolicyError, RunError, StaleInput
from impatient.files import is_file
from impatient.progress import tracked
from impatient.table import Table
from impatient.verbs.imported import opened
from impatient.verbs.notes import log
from impatient.verbs.options import (
    AnyProfile,
    Count,
    Directory,
    Engine,
    Quiet,
    RunPath,
    Text,
    Threads,
    Top,
    Trust,
    VerbOptions,
    use_threads,
)
from impatient.verbs.processes import alone
from impatient.verbs.run_directory import EAGER, RunDirectory
from impatient.verbs.train import TrainingChoice

if TYPE_CHECKING:
    from impatient.evaluation.paired import PairedComparison


# What the budgets of single samples are called, which a column of the data holds.
OWN = "of each sample"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions(VerbOptions):
    """Judge every exit and policy on the test split.

    Attributes:
        budget: A distribution over budgets in ms, such as uniform:0:10, or in mmacs, mb or mj:
            uniform:0:40mmacs.
        against: Run directory of a smaller network, whose network without exits is judged, too,
            and timed in turn with this one.
        real: Test samples to answer one by one under every policy, to show what that takes beside
            what was predicted.
    """

    directory: Directory
    budget: Text = None
    against: Annotated[UseAppendAction[tuple[RunPath, ...]], arg(metavar="DIR")] = ()
    real: Count = 0
    top: Top = None
    engine: Engine = "eager"
    any_profile: AnyProfile = False
    threads: Threads = 0
    quiet: Quiet = False
    trust: Trust = ()


@alone()
def evaluate(options: EvaluateOptions) -> impatient.Evaluation:
    """Judge every exit and fitted policy, beside networks without exits."""
    from impatient.evaluation.evaluate import standard_budgets

    use_threads(options.threads)
    engine = options.engine
    run = opened(options.directory, trust=options.trust).engine(engine)
    if options.against and engine != EAGER:
        raise RunError(
            f"--against times other runs in torch, not in {engine}; leave out one of --against and "
            "--engine."
        )
    costs = run.profile(any_machine=options.any_profile)
    recording = run.recording("test", top=options.top)
    policies = run.policies()
    if options.real and not policies:
        raise PolicyError(
            f"{run.path} has no policy to answer under; run `impatient fit {run.path}`."
        )
    exit_free = run.exit_free
    # recorded in full precision, and the profile's time is another's
    judged = exit_free.is_trained and "int8" not in engine
    evaluation = impatient.evaluate(
        recording,
        costs,
        policies,
        same_weights=not (run.has_network and run.spec().ensembling),
        exit_free=judged_as(exit_free.recording("test"), recording.task) if judged else None,
        static=_static(
            run,
            costs,
            [RunDirectory(other, trust=options.trust) for other in options.against],
            recording.task,
            progress=not options.quiet,
        ),
        budgets={
            **standard_budgets(costs.interruptible_s()),
            **_chosen_budget(run, options.budget),
            **_own_budgets(run),
        },
    )
    if options.real:
        evaluation = _with_real_times(evaluation, run, costs, policies, options)
    evaluation.save(run.evaluation_file)
    log.info("evaluated on %d test samples: %s", evaluation.samples, run.evaluation_file)
    return evaluation


def shown(options: EvaluateOptions, evaluation: impatient.Evaluation) -> Iterator[Table | str]:
    """Give rows, answers of the engine beside torch's, real times, budgets, and missed targets."""
    from impatient.evaluation import tables
    from impatient.evaluation.advice import missed_targets

    yield tables.evaluation_table(evaluation)
    if options.engine != EAGER:
        paired = beside_eager(options.directory, options.engine, evaluation.task)
        yield tables.engine_table(options.engine, paired, evaluation)
    if options.real:
        yield tables.real_times_table(evaluation)
    yield tables.budgets_table(evaluation)
    for sentence in missed_targets(evaluation, RunDirectory(options.directory).targets()):
        yield sentence.replace("DIR", str(options.directory))


def beside_eager(directory: str | Path, engine: str, task: str) -> tuple[PairedComparison, ...]:
    """Compare what an engine answered on the test split with what torch answered.

    Both are judged by the same task.
    """
    from impatient.evaluation.paired import compare_exits

    run = RunDirectory(directory)
    sides = (run.engine(engine).recording("test"), run.recording("test"))
    return compare_exits(*(judged_as(recording, task) for recording in sides))


def judged_as(recording: impatient.Recording, task: str) -> impatient.Recording:
    """Return a recording as it is, or judged by another task of the same outputs."""
    return recording if recording.task == task else recording.as_task(task)


def _with_real_times(
    evaluation: impatient.Evaluation,
    run: RunDirectory,
    costs: impatient.CostProfile,
    policies: Mapping[str, impatient.Policy],
    options: EvaluateOptions,
) -> impatient.Evaluation:
    """Answer the first test samples under every policy.

    The policies take turns, so that all meet the machine's changes alike.
    """
    import torch

    from impatient.evaluation.evaluate import RealTime
    from impatient.evaluation.metrics import mean

    data = run.data()
    network = run.network()[0]
    recording = run.recording("test")
    runners = {
        name: impatient.Runner(network, costs, policy, any_profile=True)
        for name, policy in policies.items()
    }
    samples = [x for x, _ in itertools.islice(data.batches("test", 1), options.real)]
    times: dict[str, list[float]] = {name: [] for name in runners}
    # the first ones again: threads and memory
    every = [*samples[:20], *samples]
    counted = tracked(
        every,
        "answering",
        total=len(every),
        unit="samples",
        wanted=not options.quiet,
        between=True,
    )
    for number, x in enumerate(counted):
        for name in runners if number % 2 else reversed(runners):
            taken = runners[name].run(x).elapsed_s
            if number >= min(20, len(samples)):
                times[name].append(taken)
    found = {
        name: RealTime(
            samples=len(samples),
            mean_s=mean(torch.tensor(taken, dtype=torch.float64)),
            predicted_s=float(
                policies[name].outcome(recording, costs).contract_s[: len(samples)].mean()
            ),
        )
        for name, taken in times.items()
    }
    rows = tuple(dataclasses.replace(row, real=found.get(row.name)) for row in evaluation.rows)
    return dataclasses.replace(evaluation, rows=rows)


def check_same_data(run: RunDirectory, other: RunDirectory) -> None:
    """Check that two runs are judged on the same samples, prepared in the same way.

    Raises:
        StaleInput: if not; it says what differs.
    """
    here, there = run.spec(), other.spec()
    if here.data_fingerprint == there.data_fingerprint:
        return
    sides = {
        "--data": (here.data, there.data),
        "--seed": (here.seed, there.seed),
        "--validation": (here.validation, there.validation),
        "what is done to inputs": (str(here.preprocess), str(there.preprocess)),
    }
    differing = [f"{what}: {one!r} and {two!r}" for what, (one, two) in sides.items() if one != two]
    raise StaleInput(
        f"{run.path} and {other.path} are not of the same data: "
        f"{'; '.join(differing) or 'the samples themselves changed between the two trainings'}. "
        "Networks are compared on the same samples, prepared in the same way; train one of them "
        "again, with what the other one says."
    )


def _static(
    run: RunDirectory,
    costs: impatient.CostProfile,
    others: Sequence[RunDirectory],
    task: str,
    *,
    progress: bool,
) -> dict[str, impatient.evaluation.StaticBaseline]:
    """Measure other runs' networks without exits, in the terms of this run's profile."""
    from impatient.counting import count_macs
    from impatient.verbs.zoo import name_of

    if not others:
        return {}
    for other in others:
        check_same_data(run, other)
        run.check_data(other.data())
    judged = [other.exit_free if other.exit_free.is_trained else other for other in others]
    recordings = [judged_as(part.recording("test"), task) for part in judged]
    x = run.spec().example()
    networks = [part.network()[0].exit_free for part in (run, *judged)]
    here, *times = impatient.runtime.time_in_turn(networks, x, progress=progress)
    # in proportion, since the machine may be faster or slower now than when the profile was made
    scale = costs.exit_free_s() / here
    return {
        f"static {name_of(other.path)}": impatient.evaluation.StaticBaseline(
            recording=recording, time_s=time_s * scale, macs=count_macs(network, x)
        )
        for other, recording, network, time_s in zip(
            others, recordings, networks[1:], times, strict=True
        )
    }


def _own_budgets(run: RunDirectory) -> dict[str, impatient.budgets.SampleBudgets]:
    """Give the budgets of single samples, if the data have some."""
    # else the data need not be read
    if not run.has_network or "budget=" not in run.spec().data:
        return {}
    found = run.data().budgets("test")
    return {} if found is None else {OWN: impatient.budgets.per_sample(found.tolist())}


def _chosen_budget(run: RunDirectory, text: str | None) -> dict[str, impatient.Budget]:
    """Give the budget asked for, else the one the network was trained for."""
    if text is None:
        file = run.path / "training.json"
        trained = TrainingChoice.load(file).weights if is_file(file) else ""
        # "=" is in the options of a rule: sieve:total=all
        text = trained if ":" in trained and "=" not in trained else ""
    return {text: impatient.budgets.parse_budget(text)} if text else {}
