"""Verbs that make networks of networks, as functions on run directories: ensembles, cascades,
orders of growing.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from impatient.ensembling import Rule
from impatient.errors import (
    ModelSpecError,
    NoEffectWarning,
    PolicyError,
    RunError,
    StaleInput,
    StorageError,
)
from impatient.evaluation.derived import ensembled
from impatient.evaluation.evaluate import Evaluation
from impatient.evaluation.outcomes import node_times_s
from impatient.evaluation.recording import Recording
from impatient.files import write_json
from impatient.networks import growth
from impatient.networks.anytimenet import GrowingNetwork, block_times
from impatient.networks.cascade import Cascade
from impatient.networks.combined_exits import RunningEnsemble
from impatient.networks.ensemble import EANN
from impatient.networks.growth import GrowthCosts, Schedule
from impatient.policies.calibration import fit_temperatures
from impatient.policies.selection import decision_time_s, fit_selection
from impatient.policies.topology import Topology
from impatient.provenance import fingerprint_structure, provenance
from impatient.run_directory import (
    NetworkSpec,
    RunDirectory,
    fresh_model,
    load_weights,
    save_weights,
)
from impatient.training.data import Data, load_data
from impatient.workflow import Say, evaluate_run, noted, profile_run, record_run


def ensemble_run(
    directory: str | Path,
    members: Sequence[str | Path],
    *,
    rule: str = "geometric",
    force: bool = False,
    say: Say,
) -> None:
    """Make a run directory of trained ones: of several an ensemble of growing depth, of one a
    running ensemble of its exits.

    What is fitted, the errors to choose by and the temperatures, comes from the members' validation
    recordings.

    Raises:
        StorageError: if the directory is taken, or a member has no validation recording.
        StaleInput: if the members were trained on different data.
    """
    run = RunDirectory(directory)
    parts = [RunDirectory(member) for member in members]
    if run.spec_file.is_file() and not force:
        raise StorageError(
            f"{run.path} is a run directory already; use another one, or --force to throw it away."
        )
    networks = [part.network()[0] for part in parts]
    recordings = [part.recording("validation") for part in parts]
    network, spec = (
        _eann(parts, networks, recordings)
        if len(parts) > 1
        else _running_ensemble(parts[0], networks[0], recordings[0], rule)
    )
    shutil.rmtree(run.path, ignore_errors=True)
    save_weights(network, run.weights_file)
    alone = parts[-1].exit_free_weights_file
    if alone.is_file():
        run.exit_free.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(alone, run.exit_free_weights_file)
    # last: a directory without it is none
    write_json(run.spec_file, spec.to_json())
    say(network.describe(spec.example()))
    say(f"made: {run.path}")


def _eann(
    parts: Sequence[RunDirectory], networks: Sequence[Any], recordings: Sequence[Recording]
) -> tuple[EANN, NetworkSpec]:
    specs = [part.spec() for part in parts]
    for part, spec in zip(parts, specs, strict=True):
        if spec.data_fingerprint != specs[0].data_fingerprint:
            raise StaleInput(
                f"{part.path} was trained on other data ({spec.data}) than {parts[0].path} "
                f"({specs[0].data})."
            )
    errors = [(1.0 - recording.hits().mean(1)).tolist() for recording in recordings]
    network = EANN(networks, errors)
    spec = dataclasses.replace(
        specs[-1],
        model="ensemble of growing depth",
        after=network.exit_names[:-1],
        members=tuple(specs),
        validation_errors=tuple(map(tuple, errors)),
        provenance=dataclasses.replace(
            specs[-1].provenance, network=fingerprint_structure(network.state_dict())
        ),
    )
    return network.eval(), spec


def _running_ensemble(
    part: RunDirectory, network: Any, recording: Recording, rule: str
) -> tuple[RunningEnsemble, NetworkSpec]:
    """Exits that answer together, with temperatures fitted before and, but for caching, after."""
    spec = part.spec()
    if spec.members or spec.ensembling:
        raise RunError(
            f"{part.path} is an ensemble already; give a directory that `impatient train` made."
        )
    named = Rule(name=rule)  # type: ignore[arg-type]
    before = fit_temperatures(recording)
    # caching promises that the answer's confidence never falls; a temperature of each exit's own
    # would break that
    after = (
        None
        if rule == "caching"
        else fit_temperatures(ensembled(recording, named, temperatures=before))
    )
    together = RunningEnsemble(network, named, before, recalibration=after)
    spec = dataclasses.replace(
        spec,
        ensembling=rule,
        provenance=dataclasses.replace(
            spec.provenance, network=fingerprint_structure(together.state_dict())
        ),
    )
    return together.eval(), spec


def select_run(
    directory: str | Path,
    members: Sequence[str],
    *,
    data: str = "digits",
    validation: float = 0.1,
    seed: int = 0,
    targets: Mapping[str, float | None],
    name: str,
    topology: str = "full",
    learner: str = "logistic",
    method: str = "filter_tree",
    repeats: int = 300,
    force: bool = False,
    progress: bool = True,
    say: Say,
) -> Evaluation:
    """Make a cascade of networks that are there already, learn which of them a sample needs, and
    say what that saves.

    Args:
        members: from cheap to dear: run directories, model specs with pretrained weights, or
            SPEC@FILE.safetensors.
        targets: one of max_accuracy_loss against the last network, mean_time_s and time_price.
        topology: "chain", "full" or "star".

    Raises:
        StaleInput: if the directory holds another cascade.
        ModelSpecError, StorageError: if a member cannot be built or its weights do not fit.
    """
    graphs = {"chain": Topology.chain, "full": Topology.full, "star": Topology.star}
    if topology not in graphs:
        raise PolicyError(f"unknown topology {topology!r}; expected one of {', '.join(graphs)}.")
    run = RunDirectory(directory)
    if force or not run.spec_file.is_file():
        _begin_cascade(run, members, data, validation, seed)
    spec = run.spec()
    if (
        not spec.cascade
        or spec.model != _told(members)
        or (spec.data, spec.seed, spec.validation) != (data, seed, validation)
    ):
        raise StaleInput(
            f"{run.path} holds {spec.model} on {spec.data}, not {_told(members)} on {data}; use "
            f"another directory, or --force "
            "to throw it away."
        )
    costs = profile_run(run.path, repeats=repeats, progress=progress, say=say)
    record_run(run.path, progress=progress, say=say)
    recording = run.recording("validation")
    times = node_times_s(costs)
    wanted = {target: value for target, value in targets.items() if value is not None}
    options: dict[str, Any] = {"learner": learner, "method": method, **wanted}
    graph = graphs[topology](spec.after)
    with warnings.catch_warnings():
        # the second fit says so, if it is so
        warnings.simplefilter("ignore", NoEffectWarning)
        first = fit_selection(recording, times, graph, **options)
    with noted(say):
        policy = fit_selection(
            recording, times, graph, gate_s=decision_time_s(first, recording), **options
        )
    say(f"fitted on {len(recording.labels)} validation samples: {run.save_policy(name, policy)}")
    return evaluate_run(run.path, say=say)


def _begin_cascade(
    run: RunDirectory, members: Sequence[str], data: str, validation: float, seed: int
) -> None:
    loaded = load_data(data, seed=seed, validation=validation)
    specs = []
    networks = []
    names = []
    for member in members:
        spec, network = _member(member, loaded, seed, validation)
        specs.append(spec)
        networks.append(network)
        names.append(member.rpartition("@")[0] or member)
    short = [name.rstrip("/").rpartition("/")[2] for name in names]
    cascade = Cascade(
        networks,
        short if len(set(short)) == len(short) else [f"{k} {name}" for k, name in enumerate(short)],
    )
    if run.spec_file.is_file():
        # not before all members are there
        shutil.rmtree(run.path)
    save_weights(cascade, run.weights_file)
    spec = dataclasses.replace(
        specs[-1],
        model=_told(members),
        after=cascade.exit_names,
        members=tuple(specs),
        cascade=True,
        ensembling="",
        provenance=dataclasses.replace(
            specs[-1].provenance, network=fingerprint_structure(cascade.state_dict())
        ),
    )
    # last: a directory without it is none
    write_json(run.spec_file, spec.to_json())


def _told(members: Sequence[str]) -> str:
    return "cascade of " + " -> ".join(members)


def _member(member: str, data: Data, seed: int, validation: float) -> tuple[NetworkSpec, Any]:
    """One network of a cascade, without exits, and how to build it again."""
    part = RunDirectory(member)
    if part.spec_file.is_file():
        spec = part.spec()
        if spec.cascade or spec.data_fingerprint != data.fingerprint:
            raise StaleInput(
                f"{part.path} is a cascade itself, or was trained on other data than {data.name}."
            )
        trained = part.exit_free_network if part.exit_free_weights_file.is_file() else part.network
        return spec, trained()[0].backbone
    model, _, weights = (
        member.rpartition("@") if member.endswith(".safetensors") else (member, "", "")
    )
    network = fresh_model(model, data.num_classes, data.preprocess, seed)
    if weights:
        load_weights(network, Path(weights), Path(weights).parent)
    state = network.state_dict()
    example = data.example()
    spec = NetworkSpec(
        model=model,
        after=(),
        heads="linear",
        num_classes=data.num_classes,
        example_shape=tuple(example.shape[1:]),
        example_dtype=str(example.dtype).removeprefix("torch."),
        class_names=data.class_names,
        preprocess=data.preprocess,
        data=data.name,
        data_fingerprint=data.fingerprint,
        seed=seed,
        validation=validation,
        provenance=provenance(
            network=fingerprint_structure(state), data=data.fingerprint, seed=seed
        ),
    )
    return spec, network.eval()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GrowthPlan:
    """A schedule for a network that grows, and what it and the one the model came with cost here,
    in seconds.
    """

    schedule: Schedule
    costs: GrowthCosts
    own_schedule: Schedule
    own_costs: GrowthCosts


def plan_growth(
    model: str,
    data: str,
    *,
    iterations: int | None = None,
    sizes: Sequence[int] | None = None,
    times_s: Sequence[float] | None = None,
    batch_size: int = 1,
    repeats: int = 200,
    seed: int = 0,
) -> GrowthPlan:
    """Measure every block of a network that grows, and find the order of least overhead; see
    `growth.plan` and `place`.

    With neither iterations, sizes nor times, the model's own schedule is only costed.

    Raises:
        ModelSpecError: if the model does not grow, or more than one wish is given, or none can be
            met.
    """
    if sum(wish is not None for wish in (iterations, sizes, times_s)) > 1:
        raise ModelSpecError("expected one of iterations, sizes and times, or none of them.")
    loaded = load_data(data, seed=seed)
    network = fresh_model(model, loaded.num_classes, loaded.preprocess, seed)
    if not isinstance(network, GrowingNetwork):
        raise ModelSpecError(
            f"{model} is a {type(network).__name__}, which does not grow; expected "
            f"impatient:anytimenet, or a "
            "factory of your own that returns a GrowingNetwork."
        )
    parts = block_times(network.backbone, loaded.example(batch_size), repeats=repeats)
    schedule = network.schedule
    if times_s is not None:
        schedule = growth.place(parts, times_s)
    elif iterations is not None or sizes is not None:
        schedule = growth.plan(parts, iterations=iterations, sizes=sizes)
    return GrowthPlan(
        schedule=schedule,
        costs=growth.costs(schedule, parts),
        own_schedule=network.schedule,
        own_costs=growth.costs(network.schedule, parts),
    )
