"""The steps of the command line as functions on a run directory; each does nothing if its result is
up to date.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from impatient.budgets import Budget, exit_weights, parse_budget
from impatient.clock import NEVER, Deadline
from impatient.costs import Cost, CostProfile, Mode
from impatient.engines.export import (
    EngineTimes,
    add_costs,
    engine_label,
    engine_times,
    export,
    load_engine,
    read_bundle,
)
from impatient.errors import (
    DataError,
    ImpatientError,
    PolicyError,
    RunError,
    StaleInput,
    StorageError,
)
from impatient.evaluation.evaluate import (
    Evaluation,
    RealTime,
    StaticBaseline,
    evaluate,
    standard_budgets,
)
from impatient.evaluation.metrics import mean
from impatient.evaluation.outcomes import AnyPolicy, exits_under, outcome
from impatient.evaluation.paired import PairedComparison, beside
from impatient.evaluation.recording import Recording, record
from impatient.evaluation.report import Example, report_html, score_of, select_examples
from impatient.files import read_json, write_json, write_text
from impatient.networks.cascade import Cascade
from impatient.networks.describe import count_macs
from impatient.networks.ensemble import EANN
from impatient.networks.multi_exit import MultiExitNetwork, attach_exits
from impatient.policies.gate_fitting import fit_gates, sweep_gates
from impatient.policies.gates import GatePolicy, gate_time_s
from impatient.policies.risk import Certificate, control_risk, scaled_family
from impatient.policies.routing import SelectionPolicy
from impatient.policies.rules import ThresholdPolicy, fit_thresholds
from impatient.policies.scores import SCORES
from impatient.policies.splits import split_recording
from impatient.run_directory import (
    DEFAULT_EXITS,
    EAGER,
    OWN_HEADS,
    NetworkSpec,
    RunDirectory,
    fresh_model,
    new_spec,
    save_weights,
)
from impatient.runtime.answer import Answer
from impatient.runtime.profile import check_profile, profile, time_in_turn
from impatient.runtime.runner import RESERVE_S, Runner
from impatient.training.data import Data, load_data
from impatient.training.loop import ExitWeights, Recipe, default_weights, fit
from impatient.training.weights import parse_weights

Say = Callable[[Any], None]

# training samples by which ranges for 8 bits are found
CALIBRATION_BATCH = 16
CALIBRATION_BATCHES = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to train, on what, and how: everything `train` needs besides the directory."""

    model: str
    data: str
    # 4, unless the model has its own
    exits: int | None = None
    # or one rule: "every:2"
    after: tuple[str, ...] = ()
    # "linear", unless the model has its own
    heads: str | None = None
    # "uniform", unless the network has a default of its own
    weights: str | None = None
    mode: Mode = "interruptible"
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    exit_free: bool = True
    validation: float = 0.1
    ensembling: str = ""
    fabric: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def rule(self) -> str | None:
        """The rule in `after`, if it is one: "every:2"."""
        return self.after[0] if len(self.after) == 1 and ":" in self.after[0] else None


def train(
    directory: str | Path, plan: Plan, *, restart: bool = False, progress: bool = True, say: Say
) -> None:
    """Train a network with exits into a run directory, and beside it the same backbone without
    exits.
    """
    run = RunDirectory(directory)
    if restart and run.spec_file.is_file():
        shutil.rmtree(run.path)
    data = load_data(plan.data, seed=plan.recipe.seed, validation=plan.validation)
    spec = _spec(run, plan, data)
    network = spec.build()
    # _spec has refused to train one
    assert not isinstance(network, EANN | Cascade)
    say(network.describe(spec.example()))
    weights = _exit_weights(run, plan, network, say)
    # starts the other processes, if any; they come through all of this too
    fabric = _fabric(plan.fabric)
    fit(
        network,
        data,
        weights=weights,
        recipe=plan.recipe,
        fabric=fabric,
        progress=progress,
        checkpoint=run.path / "checkpoint.safetensors",
        metrics_csv=run.path / "metrics.csv",
    )
    if fabric.is_global_zero:
        save_weights(network, run.weights_file)
    if plan.exit_free:
        say("the same backbone without exits, to compare with:")
        alone = spec.build_exit_free()
        fit(
            alone,
            data,
            recipe=dataclasses.replace(plan.recipe, regime="joint"),
            fabric=fabric,
            progress=progress,
            checkpoint=run.exit_free / "checkpoint.safetensors",
            metrics_csv=run.exit_free / "metrics.csv",
        )
        if fabric.is_global_zero:
            save_weights(alone, run.exit_free_weights_file)
    say(f"trained: {run.weights_file}")


def _spec(run: RunDirectory, plan: Plan, data: Data) -> NetworkSpec:
    """The network's description: that of the run if it was begun, and then the plan must agree;
    else a new one.
    """
    if not run.spec_file.is_file():
        spec = new_spec(
            plan.model,
            data,
            after=plan.rule or list(plan.after) or None,
            count=plan.exits,
            heads=plan.heads,
            seed=plan.recipe.seed,
            validation=plan.validation,
            ensembling=plan.ensembling,
        )
        write_json(run.spec_file, spec.to_json())
        return spec
    spec = run.spec()
    if spec.members:
        raise RunError(
            f"{run.path} is made of trained members; train those, and make it anew with `impatient "
            f"ensemble` or `select`."
        )
    # of a model with exits of its own nothing need be said
    heads, exits = (
        (OWN_HEADS, len(spec.after) + 1) if spec.heads == OWN_HEADS else ("linear", DEFAULT_EXITS)
    )
    begun: dict[str, Any] = {
        "model": spec.model,
        "data": spec.data,
        "heads": spec.heads,
        "seed": spec.seed,
        "validation": spec.validation,
        "ensembling": spec.ensembling,
    }
    wanted: dict[str, Any] = {
        "model": plan.model,
        "data": plan.data,
        "heads": plan.heads or heads,
        "seed": plan.recipe.seed,
        "validation": plan.validation,
        "ensembling": plan.ensembling,
    }
    if plan.rule:
        begun["after"] = _placed(spec, plan.rule)
        wanted["after"] = spec.after
    elif plan.after:
        begun["after"] = spec.after
        wanted["after"] = plan.after
    else:
        begun["exits"] = len(spec.after) + 1
        wanted["exits"] = exits if plan.exits is None else plan.exits
    for name, value in wanted.items():
        if begun[name] != value:
            raise StaleInput(
                f"{run.path} was begun with --{name} {_spoken(begun[name])}, not {_spoken(value)}. "
                f"Say the old value, use "
                "another directory, or --restart to throw the old run away."
            )
    run.check_data(data)
    return spec


def _placed(spec: NetworkSpec, rule: str) -> tuple[str, ...]:
    """Where a rule puts the exits."""
    backbone = fresh_model(spec.model, spec.num_classes, spec.preprocess, spec.seed)
    return tuple(
        str(cut) for cut in attach_exits(backbone, example=spec.example(), after=rule).cuts
    )


def _spoken(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _fabric(options: Mapping[str, Any]) -> Any:
    from lightning_fabric import Fabric

    fabric = Fabric(**{"accelerator": "auto", "devices": 1, **options})
    fabric.launch()
    return fabric


def _exit_weights(run: RunDirectory, plan: Plan, network: Any, say: Say) -> ExitWeights:
    """Weights by name, or from a budget distribution and this machine's costs; those of the run if
    it was begun.
    """
    wanted = plan.weights or default_weights(network)
    file = run.path / "training.json"
    if file.is_file():
        begun = read_json(file)
        if (begun["weights"], begun["mode"]) == (wanted, plan.mode):
            return tuple(begun["numbers"]) if begun["numbers"] else wanted
        raise StaleInput(
            f"{run.path} was begun with --weights {begun['weights']} --mode {begun['mode']}. Say "
            f"so again, use another "
            "directory, or --restart to throw the old run away."
        )
    if wanted == "adaloss":
        say("exit weights: they follow the losses (AdaLoss)")
        write_json(file, {"weights": wanted, "mode": plan.mode, "numbers": None})
        return wanted
    if ":" in wanted and "=" not in wanted:
        budget = parse_budget(wanted)
        costs = _profile_for_weights(run, network, budget.cost, say)
        numbers = exit_weights(budget, costs.cumulative(budget.cost, plan.mode), normalise=True)
    else:
        numbers = parse_weights(wanted, network.num_exits)
    say(f"exit weights: {', '.join(f'{number:.3f}' for number in numbers)}")
    if unwanted := [
        name for name, number in zip(network.exit_names, numbers, strict=True) if number == 0.0
    ]:
        say(f"exits of weight 0, which are not trained: {', '.join(unwanted)}")
    write_json(file, {"weights": wanted, "mode": plan.mode, "numbers": numbers})
    return numbers


def _profile_for_weights(run: RunDirectory, network: Any, cost: Cost, say: Say) -> CostProfile:
    known = CostProfile.load(run.profile_file) if run.profile_file.is_file() else None
    # joules need a meter, which only a caller from Python can bring
    if known is not None and (known.holds(cost) or cost == "energy"):
        return known
    say("measuring what each exit costs, for the weights:")
    costs = profile(network, run.spec().example(), repeats=100, progress=True)
    costs.save(run.profile_file)
    return costs


def profile_run(
    directory: str | Path,
    *,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 300,
    engine: str = EAGER,
    file: str = "profile.json",
    force: bool = False,
    progress: bool = True,
    say: Say,
) -> CostProfile:
    """Measure stages and heads on this machine, unless a profile of this network, engine and
    machine is there.

    Args:
        engine: "eager", "compile", or one that the run was exported to.
        file: name of the profile; only "profile.json" is read by the other steps.
    """
    run = RunDirectory(directory).engine(engine)
    network, _ = run.network()
    path = run.profile_file.with_name(file)
    if path.is_file() and not force:
        known = CostProfile.load(path)
        reason = _not_fresh(known, network, batch_sizes, repeats)
        if not reason:
            say(f"up to date: {path} (--force to measure again)")
            return known
        say(f"measuring again: {reason}")
    costs = profile(
        network,
        run.spec().example(),
        batch_sizes=batch_sizes,
        repeats=repeats,
        progress=progress,
    )
    costs.save(path)
    say(f"profiled: {path}")
    return costs


def _not_fresh(costs: CostProfile, network: Any, batch_sizes: Sequence[int], repeats: int) -> str:
    """Why a profile must be made again; empty if it need not."""
    try:
        check_profile(costs, network, "measure again")
    except StaleInput as reason:
        return str(reason)
    if not all(
        size in costs.batches and costs.at(size).exit_free.n >= repeats for size in batch_sizes
    ):
        return "other batch sizes or more repeats are asked for."
    return ""


def profile_runs(
    directory: str | Path,
    *,
    engines: Sequence[str] = (EAGER,),
    threads: Sequence[int] = (0,),
    say: Say,
    **options: Any,
) -> dict[Path, CostProfile]:
    """Profile a run in several engines and with several thread counts, one file for each.

    The first thread count's is the engine's profile.json, which the other steps read; others are
    called profile-t4.json.

    Args:
        threads: of torch, and of the engine; 0 leaves torch's own choice.
        options: for `profile_run`.
    Returns:
        The profiles by file.
    """
    before = torch.get_num_threads()
    made = {}
    try:
        for engine, (place, count) in itertools.product(engines, enumerate(threads)):
            torch.set_num_threads(count or before)
            file = f"profile-t{count or before}.json" if place else "profile.json"
            costs = profile_run(directory, engine=engine, file=file, say=say, **options)
            made[RunDirectory(directory).engine(engine).profile_file.with_name(file)] = costs
    finally:
        torch.set_num_threads(before)
    return made


def load_profile(path: str | Path) -> CostProfile:
    """A profile from its file, or from a directory that has a profile.json."""
    given = Path(path)
    file = given / "profile.json" if given.is_dir() else given
    if not file.is_file():
        raise StorageError(
            f"no profile at {file}; make one with `impatient profile "
            f"{given if given.is_dir() else 'DIR'}`."
        )
    return CostProfile.load(file)


def record_run(
    directory: str | Path,
    *,
    splits: Sequence[str] = ("validation", "test"),
    features: bool = False,
    engine: str = EAGER,
    force: bool = False,
    progress: bool = True,
    say: Say,
) -> None:
    """Record the outputs of all exits on the splits; with torch, also of the network without exits
    if there is one.
    """
    run = RunDirectory(directory).engine(engine)
    data = run.data()
    network, weights = run.network()
    jobs = [(network, weights, split, run.recording_file(split)) for split in splits]
    if run.exit_free_weights_file.is_file() and engine == EAGER:
        alone, alone_weights = run.exit_free_network()
        jobs += [
            (alone, alone_weights, split, run.exit_free_recording_file(split)) for split in splits
        ]
    for job, job_weights, split, file in jobs:
        if file.is_file() and not force and _is_fresh(file, job_weights, data, features):
            say(f"up to date: {file} (--force to record again)")
            continue
        record(job, data, split=split, features=features, progress=progress).save(file)
        say(f"recorded: {file}")


def _is_fresh(file: Path, weights: str, data: Data, features: bool) -> bool:
    try:
        recording = Recording.load(file)
    except ImpatientError:
        # damaged: made again
        return False
    source = recording.provenance
    return (
        source.weights == weights
        and source.data == data.fingerprint
        and bool(recording.features) >= features
    )


@contextlib.contextmanager
def noted(say: Say) -> Iterator[None]:
    """Say warnings as notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        say(f"note: {warning.message}")


def fit_run(
    directory: str | Path,
    *,
    targets: Mapping[str, float | None],
    name: str,
    score: str = "max_probability",
    cost: Cost | None = None,
    learner: str | None = None,
    inputs: str = "confidences",
    delta: float | None = None,
    any_profile: bool = False,
    say: Say,
) -> AnyPolicy:
    """Fit a policy on the validation recording and keep it under a name: thresholds, or with a
    learner gates.

    With delta, half of the recording is kept back to find the boldest policy that loses at most the
    target, with probability 1 - delta; the certificate is kept, too.
    """
    run = RunDirectory(directory)
    if score not in SCORES:
        raise PolicyError(f"unknown score {score!r}; expected one of {', '.join(SCORES)}.")
    if cost not in (None, "time") and (learner is not None or delta is not None):
        raise PolicyError(
            f"--cost {cost} goes with plain thresholds; leave --learner and --delta away."
        )
    recording = run.recording("validation")
    costs = run.profile(any_machine=any_profile)
    wanted = {target: value for target, value in targets.items() if value is not None}
    policy: AnyPolicy
    certificate = None
    with noted(say):
        if delta is not None:
            policy, certificate = _certified(
                recording, costs, wanted, score, learner, inputs, delta
            )
        elif learner is not None:
            policy = _gates(recording, costs, wanted, learner, inputs)
        else:
            policy = fit_thresholds(recording, costs, score=score, cost=cost, **wanted)  # type: ignore[arg-type]
    file = run.save_policy(name, policy, certificate)
    say(f"fitted on {len(recording.labels)} validation samples: {file}")
    if certificate is not None:
        say(certificate.statement)
    return policy


def _gates(
    recording: Recording, costs: CostProfile, wanted: Mapping[str, float], learner: str, inputs: str
) -> GatePolicy:
    """Gates, with what asking them takes."""
    if not wanted.keys() <= {"mean_time_s", "max_accuracy_loss"}:
        raise PolicyError(
            "gates are fitted to time; give --mean-ms or --max-loss, or leave --learner away."
        )
    options: dict[str, Any] = {"learner": learner, "inputs": inputs, **wanted}
    return fit_gates(
        recording, costs, gate_s=_asking_s(recording, costs, learner, inputs), **options
    )


def _asking_s(recording: Recording, costs: CostProfile, learner: str, inputs: str) -> float:
    """Seconds that asking a gate takes, whatever it has learned: measured on gates fitted without."""
    options: dict[str, Any] = {"learner": learner, "inputs": inputs}
    # at one of them gates are open whose asking can be timed
    prices = np.geomspace(0.01, 10.0, 7) / costs.contract_s()[-1]
    measured = [
        gate_time_s(point.policy, recording)
        for point in sweep_gates(recording, costs, prices.tolist(), **options)
    ]
    asked = [seconds for gates in measured for seconds in gates if seconds > 0.0]
    return float(np.median(asked)) if asked else 0.0


def _certified(
    recording: Recording,
    costs: CostProfile,
    wanted: Mapping[str, float],
    score: str,
    learner: str | None,
    inputs: str,
    delta: float,
) -> tuple[Any, Certificate]:
    """The boldest of a family fitted on one half, by what the other half shows."""
    if set(wanted) != {"max_accuracy_loss"}:
        raise PolicyError(
            "a guarantee is one about accuracy; give --delta with --max-loss, and no other target."
        )
    part, calibration = split_recording(recording)
    candidates: Sequence[Any]
    if learner is None:
        candidates = scaled_family(fit_thresholds(part, costs, score=score, **wanted))  # type: ignore[arg-type]
    else:
        asking_s = _asking_s(part, costs, learner, inputs)
        points = sweep_gates(part, costs, learner=learner, inputs=inputs, gate_s=asking_s)  # type: ignore[arg-type]
        # at rising prices of time: from safe to bold
        candidates = [point.policy for point in points]
    controlled = control_risk(
        candidates, calibration, epsilon=wanted["max_accuracy_loss"], delta=delta
    )
    return controlled.policy, controlled.certificate


def evaluate_run(
    directory: str | Path,
    *,
    budget: str | None = None,
    against: Sequence[str | Path] = (),
    real: int = 0,
    engine: str = EAGER,
    any_profile: bool = False,
    say: Say,
) -> Evaluation:
    """Judge every exit and every fitted policy on the test recording, beside the networks without
    exits of other runs.

    With `real`, so many test samples are also answered one by one under every policy, and what that
    takes is kept.
    """
    run = RunDirectory(directory).engine(engine)
    if real < 0:
        raise RunError(f"--real {real}; expected how many test samples to answer, or 0.")
    if against and engine != EAGER:
        raise RunError(
            f"--against times other runs in torch, not in {engine}; leave out one of --against and "
            f"--engine."
        )
    costs = run.profile(any_machine=any_profile)
    recording = run.recording("test")
    policies = run.policies()
    if real and not policies:
        raise PolicyError(
            f"{run.path} has no policy to answer under; run `impatient fit {run.path}`."
        )
    budgets = standard_budgets(costs.interruptible_s()) | _chosen_budget(run, budget)
    evaluation = evaluate(
        recording,
        costs,
        policies,
        same_weights=not run.spec().ensembling,
        # recorded in full precision, and the profile's time is another's
        exit_free=None if "int8" in engine else run.exit_free_recording("test"),
        static=_static(run, costs, [RunDirectory(other) for other in against]),
        budgets=budgets,
    )
    if real:
        evaluation = _with_real_times(evaluation, run, costs, policies, real)
    evaluation.save(run.evaluation_file)
    say(f"evaluated on {evaluation.samples} test samples: {run.evaluation_file}")
    return evaluation


def beside_eager(directory: str | Path, engine: str) -> tuple[PairedComparison, ...]:
    """What an engine answered on the test split, exit by exit, beside what torch answered."""
    run = RunDirectory(directory)
    return beside(run.engine(engine).recording("test"), run.recording("test"))


def export_run(
    directory: str | Path,
    *,
    engine: str,
    precision: str = "fp32",
    policy: str | None = None,
    place: Path | None = None,
    lean: bool = False,
    repeats: int = 300,
    force: bool = False,
    progress: bool = True,
    say: Say,
) -> tuple[EngineTimes, ...]:
    """Export the trained network to an engine, measure it there, and compare it with torch, exit by
    exit.

    Nothing is fitted. Inputs for the check of agreement, and for the ranges of 8 bits, are the
    first of the training split.
    """
    run = RunDirectory(directory)
    seen = run.engine(engine_label(engine, precision))
    (network, _) = run.network()
    rule = run.policy(policy) if policy else None
    if rule is not None and not isinstance(rule, ThresholdPolicy):
        raise PolicyError(
            f"policy {policy!r} is learned; an exported network takes thresholds: fit one without "
            f"--learner."
        )
    samples = [
        x
        for x, _ in itertools.islice(
            run.data().batches("train", CALIBRATION_BATCH), CALIBRATION_BATCHES
        )
    ]
    target = export(
        network,  # type: ignore[arg-type]
        place or seen.here,
        engine=engine,
        precision=precision,
        example=samples[0][:4],
        threads=torch.get_num_threads(),
        calibration=samples,
        policy=rule,
        lean=lean,
        force=force,
    )
    say(f"exported: {target}")
    if engine != "aoti":
        say(
            f"to run it without torch: cd {target} && python run.py INPUT.npy --deadline-ms 5 "
            f"(python run.py --help)"
        )
    made = load_engine(target)
    costs = profile(made, samples[0], repeats=repeats, progress=progress)
    add_costs(target, costs)
    if place is None:
        costs.save(seen.profile_file)
    # others cannot be exported
    assert isinstance(network, MultiExitNetwork)
    return engine_times(
        network, made, read_bundle(target)["agreement"], samples[0][:1], repeats=repeats
    )


def _with_real_times(
    evaluation: Evaluation,
    run: RunDirectory,
    costs: CostProfile,
    policies: Mapping[str, AnyPolicy],
    count: int,
) -> Evaluation:
    """Answer the first test samples under every policy, in turn, so that all meet the machine's
    changes alike.
    """
    data = run.data()
    network = run.network()[0]
    recording = run.recording("test")
    runners = {
        name: runner_of(network, costs, policy, any_profile=True)
        for name, policy in policies.items()
    }
    samples = [x for x, _ in itertools.islice(data.batches("test", 1), count)]
    times: dict[str, list[float]] = {name: [] for name in runners}
    # the first ones again: threads and memory
    for number, x in enumerate([*samples[:20], *samples]):
        for name in runners if number % 2 else reversed(runners):
            taken = runners[name].run(x).elapsed_s
            if number >= min(20, len(samples)):
                times[name].append(taken)
    found = {
        name: RealTime(
            samples=len(samples),
            mean_s=mean(torch.tensor(taken, dtype=torch.float64)),
            predicted_s=float(
                outcome(policies[name], recording, costs).contract_s[: len(samples)].mean()
            ),
        )
        for name, taken in times.items()
    }
    rows = tuple(dataclasses.replace(row, real=found.get(row.name)) for row in evaluation.rows)
    return dataclasses.replace(evaluation, rows=rows)


def runner_of(network: Any, costs: CostProfile, policy: AnyPolicy | None, **options: Any) -> Runner:
    """A runner for a network and a policy of any kind: a selection routes its cascade, all others
    are asked at exits.
    """
    if isinstance(policy, SelectionPolicy):
        return Runner(network.routed(policy), costs, **options)
    return Runner(network, costs, policy, **options)  # type: ignore[arg-type]  # mixtures are drawn for each run


def _static(
    run: RunDirectory, costs: CostProfile, others: Sequence[RunDirectory]
) -> dict[str, StaticBaseline]:
    """Other runs' networks without exits, with their times in the terms of this run's profile."""
    if not others:
        return {}
    x = run.spec().example()
    networks = [run.network()[0]]
    recordings = []
    for other in others:
        run.check_data(other.data())
        alone = other.exit_free_recording("test")
        recordings.append(other.recording("test") if alone is None else alone)
        networks.append(other.network()[0] if alone is None else other.exit_free_network()[0])
    here, *times = time_in_turn([network.backbone for network in networks], x)
    # in proportion, since the machine may be faster or slower now than when the profile was made
    scale = costs.exit_free_s() / here
    return {
        f"static {other.path.resolve().name}": StaticBaseline(
            recording=recording, time_s=time_s * scale, macs=count_macs(network.backbone, x)
        )
        for other, recording, network, time_s in zip(
            others, recordings, networks[1:], times, strict=True
        )
    }


def _chosen_budget(run: RunDirectory, text: str | None) -> dict[str, Budget]:
    """The budget asked for, or the one the network was trained for, by name; empty if there is
    none.
    """
    if text is not None:
        return {text: parse_budget(text)}
    training = run.path / "training.json"
    trained = read_json(training)["weights"] if training.is_file() else ""
    return {trained: parse_budget(trained)} if ":" in trained else {}


def report_run(directory: str | Path, *, any_profile: bool = False, say: Say) -> Path:
    """Write one self-contained HTML page about the run."""
    run = RunDirectory(directory)
    if not run.evaluation_file.is_file():
        raise StorageError(
            f"{run.path} has not been evaluated; run `impatient evaluate {run.path}`."
        )
    evaluation = Evaluation.load(run.evaluation_file)
    spec = run.spec()
    policies = run.policies()
    evaluation.provenance.require(
        "the evaluation",
        f"run `impatient evaluate {run.path}` again",
        weights=run.weights_fingerprint(),
    )
    chosen = [
        (name, budget)
        for name, budget in evaluation.budgets.items()
        if ":" in name and budget.cost == "time"
    ]
    early, late = _examples(run, spec, policies)
    page = report_html(
        title=run.path.resolve().name,
        evaluation=evaluation,
        costs=run.profile(any_machine=any_profile),
        policies=policies,
        chosen_budget=chosen[0] if chosen else None,
        early=early,
        late=late,
        engines={
            name: (beside_eager(run.path, name), Evaluation.load(run.engine(name).evaluation_file))
            for name in run.engine_names()
        },
        facts={
            "model": spec.model,
            **(
                {"members": ", ".join(member.model for member in spec.members)}
                if spec.members
                else {}
            ),
            "exits after": ", ".join(spec.after),
            "heads": spec.heads,
            **({"exits answer together": spec.ensembling} if spec.ensembling else {}),
            "data": spec.data,
            "classes": str(spec.num_classes),
            "seed": str(spec.seed),
        },
    )
    write_text(run.report_file, page)
    say(f"report: {run.report_file}")
    return run.report_file


def _examples(
    run: RunDirectory, spec: NetworkSpec, policies: Mapping[str, AnyPolicy]
) -> tuple[list[Example], list[Example]]:
    """Test inputs that left early and late under the first policy."""
    if not policies:
        return [], []
    policy = next(iter(policies.values()))
    recording = run.recording("test")
    data = run.data()
    exits = exits_under(policy, recording)
    score = SCORES[score_of(policy)]

    def example(index: int) -> Example:
        exit = int(exits[index])
        output = recording.outputs[exit, index]
        return Example(
            picture=_png(data.examples("test").take([index])[0]) if spec.preprocess.size else None,
            label=spec.class_names[int(recording.labels[index])],
            predicted=spec.class_names[int(output.argmax())],
            exit=exit,
            score=float(score(output)),
        )

    early, late = select_examples(recording, policy)
    return [example(index) for index in early], [example(index) for index in late]


def _png(raw: Tensor) -> bytes | None:
    """A raw input [C, H, W] as PNG; None if it is no picture of bytes."""
    import io

    from PIL import Image

    if raw.dtype != torch.uint8 or raw.dim() != 3 or raw.shape[0] not in (1, 3):
        return None
    pixels = raw[0].numpy() if raw.shape[0] == 1 else raw.permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def answer_files(
    directory: str | Path,
    files: Sequence[Path],
    *,
    deadline_s: float | None,
    policy: str | None,
    engine: str = EAGER,
    any_profile: bool = False,
    when_late: str = "answer",
) -> list[tuple[Path, str, float, Answer]]:
    """Answer for each input file by the deadline: the file, the class, its probability, the answer."""
    run = RunDirectory(directory).engine(engine)
    spec = run.spec()
    # all are read before the first deadline is stamped
    inputs = [_read_input(spec, file) for file in files]
    network, _ = run.network()
    costs = run.profile(any_machine=any_profile)
    rule = run.policy(policy) if policy else None
    runner = runner_of(network, costs, rule, any_profile=any_profile, when_late=when_late)
    if not inputs:
        raise RunError("no input files; expected at least one image (or .npy array) to answer for.")
    runner.warm_up(inputs[0])
    answers = []
    for file, x in zip(files, inputs, strict=True):
        answer = runner.run(x, deadline=NEVER if deadline_s is None else Deadline.after(deadline_s))
        probabilities = answer.output.float().softmax(-1)[0]
        best = int(probabilities.argmax())
        answers.append((file, spec.class_names[best], float(probabilities[best]), answer))
    return answers


def _read_input(spec: NetworkSpec, file: Path) -> Tensor:
    if not file.is_file():
        raise DataError(
            f"{file} is a folder; name its files." if file.is_dir() else f"no such file: {file}."
        )
    raw = _read_array(file) if file.suffix == ".npy" else spec.preprocess.image(file)
    if tuple(raw.shape[1:]) != spec.example_shape:
        raise DataError(
            f"{file} has shape {tuple(raw.shape[1:])}; expected one raw sample of shape "
            f"{spec.example_shape}, without a batch "
            "dimension."
        )
    if not torch.isfinite(raw).all():
        raise DataError(f"{file} holds NaN or infinite values; expected finite numbers.")
    return spec.preprocess(raw)


def _read_array(file: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(file, allow_pickle=False))[None]
    except (ValueError, OSError, EOFError, TypeError) as error:
        raise DataError(f"{file} cannot be read as a plain array: {error}") from error


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineRow:
    """What one deadline gave over a whole split."""

    deadline_s: float
    met: float
    mean_exit: float
    mean_time_s: float
    p99_time_s: float
    accuracy: float


def deadline_table(
    runner: Runner, data: Data, split: Any, deadlines_s: Sequence[float]
) -> list[DeadlineRow]:
    """Answer for every sample of a split under each deadline, on the real clock, one sample at a
    time.
    """
    samples = [(x, int(y)) for x, y in data.batches(split, 1)]
    runner.warm_up(samples[0][0], times=20)
    rows = []
    for deadline_s in deadlines_s:
        answers = [
            (runner.run(x, deadline=Deadline.after(deadline_s)), label) for x, label in samples
        ]
        times = [answer.elapsed_s for answer, _ in answers]
        rows.append(
            DeadlineRow(
                deadline_s=deadline_s,
                met=float(np.mean([answer.deadline_met for answer, _ in answers])),
                mean_exit=float(np.mean([answer.exit for answer, _ in answers])),
                mean_time_s=float(np.mean(times)),
                p99_time_s=float(np.quantile(times, 0.99)),
                accuracy=float(
                    np.mean([int(answer.output.argmax()) == label for answer, label in answers])
                ),
            )
        )
    return rows


def demo(
    directory: str | Path, *, epochs: int = 20, progress: bool = True, say: Say
) -> tuple[list[DeadlineRow], int]:
    """Every step on the digits, and then the whole test split under one deadline after the other."""
    plan = Plan(
        model="impatient:resnet:n=3,c=16",
        data="digits",
        exits=6,
        heads="relu_linear",
        recipe=Recipe(epochs=epochs, batch_size=64, augment="crop"),
    )
    train(directory, plan, progress=progress, say=say)
    costs = profile_run(directory, progress=progress, say=say)
    record_run(directory, progress=progress, say=say)
    fit_run(directory, targets={"max_accuracy_loss": 0.01}, name="loss-1", say=say)
    evaluate_run(directory, say=say)
    report_run(directory, say=say)
    run = RunDirectory(directory)
    network, _ = run.network()
    data = run.data()
    # for each exit a deadline just long enough for it
    deadlines = [round(1.1 * cost + RESERVE_S, 5) for cost in costs.contract_s(statistic="p99")]
    return deadline_table(Runner(network, costs), data, "test", deadlines), data.size("test")


def to_json(answers: Sequence[tuple[Path, str, float, Answer]]) -> str:
    """Answers as JSON, times in milliseconds."""
    return json.dumps(
        [
            {
                "file": str(file),
                "answer": name,
                "probability": round(probability, 6),
                "exit": answer.exit,
                "elapsed_ms": round(answer.elapsed_s * 1e3, 4),
                "stopped_by": answer.stopped_by,
                "deadline_met": answer.deadline_met,
            }
            for file, name, probability, answer in answers
        ],
        indent=1,
    )
