"""Learn which of several networks each sample needs."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

import impatient
from impatient.errors import ModelSpecError, NoEffectWarning, RunError, StaleInput
from impatient.files import is_file, plain_name
from impatient.table import Table, in_ms
from impatient.verbs.evaluate import EvaluateOptions, evaluate
from impatient.verbs.fit import Learner, fitted_to, target_name, targets_of
from impatient.verbs.network_spec import (
    NetworkSpec,
    load_fresh,
    load_weights,
    save_weights,
    spec_of,
)
from impatient.verbs.notes import log, warnings_as_notes
from impatient.verbs.options import (
    OFF,
    Force,
    Milliseconds,
    NewDirectory,
    Number,
    Points,
    Positive,
    Quiet,
    Share,
    Text,
    Threads,
    Trust,
    VerbOptions,
    use_threads,
)
from impatient.verbs.processes import alone
from impatient.verbs.profile import ProfileOptions, profile
from impatient.verbs.record import RecordOptions, record
from impatient.verbs.replacing import discard_old, replaced
from impatient.verbs.run_directory import RunDirectory

Method = Literal["filter_tree", "regression"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectOptions(VerbOptions):
    """Learn which of several networks each sample needs.

    Attributes:
        members: Networks from the fastest to the slowest: run directories, model specs with
            pretrained weights, or SPEC@FILE.safetensors. None of them is trained here.
        data: Data as for train; the networks should not have been trained on its validation split.
        max_accuracy_loss: Points of accuracy that may be lost against the last network; 1 unless
            another target is given.
        mean_time_s: Mean time per sample in ms.
        time_price: Price of a second, in wrong answers.
        topology: Allowed moves: full (to any later network), chain (to the next) or star (from the
            first to any).
        learner: Learner that decides between two moves.
        method: Method by which it decides between more than two moves.
        name: Name of the policy; by default the target.
        validation: Share of the training examples held out, to learn on.
        seed: Seed of the splits.
        repeats: Measurements of each network.
    """

    directory: NewDirectory
    members: Annotated[Positional[tuple[str, ...]], arg(metavar="MEMBER..."), OFF]
    data: str = "digits"
    max_accuracy_loss: Annotated[Points, arg(name="max-loss")] = None
    mean_time_s: Annotated[Milliseconds, arg(name="mean-ms")] = None
    time_price: Annotated[Number, arg(name="price")] = None
    topology: Literal["full", "chain", "star"] = "full"
    learner: Learner = "logistic"
    method: Method = "filter_tree"
    name: Text = None
    validation: Share = 0.1
    seed: int = 0
    repeats: Positive = 300
    threads: Threads = 0
    force: Force = False
    quiet: Quiet = False
    trust: Trust = ()

    @property
    def policy_name(self) -> str:
        """The name the policy is kept under."""
        return self.name or target_name(self)

    @property
    def cascade_name(self) -> str:
        """What the run directory says it holds."""
        return "cascade of " + " -> ".join(self.members)


@alone(make=True)
def select(options: SelectOptions) -> impatient.Evaluation:
    """Make a cascade, learn which network a sample needs, and judge it.

    Raises:
        RunError: if there are not two networks to choose among.
        StaleInput: if the directory holds another cascade.
        ModelSpecError, StorageError: if a member cannot be built or its weights do not fit.
    """
    from impatient.policies.selection import decision_time_s

    if len(options.members) < 2:
        raise RunError(
            f"{len(options.members)} network to choose among; expected two or more, from the "
            "fastest to the slowest."
        )
    use_threads(options.threads)
    # The members' specs stand on the command line, so they are the user's own.
    models = (_model_and_weights(member)[0] for member in options.members)
    trust = (*options.trust, *(model for model in models if ":" in model))
    run = RunDirectory(options.directory, trust=trust)
    name = plain_name(options.policy_name, "policy")
    if options.force or not is_file(run.spec_file):
        _begin_cascade(run, options)
    spec = run.spec()
    wanted = (True, options.cascade_name, options.data, options.seed, options.validation)
    if (spec.cascade, spec.model, spec.data, spec.seed, spec.validation) != wanted:
        raise StaleInput(
            f"{run.path} holds {spec.model} on {spec.data}, not {options.cascade_name} on "
            f"{options.data}; use another directory, or --force to throw it away."
        )
    quiet = options.quiet
    profile(ProfileOptions(directory=run.path, repeats=options.repeats, quiet=quiet, trust=trust))
    costs = run.profile()
    record(RecordOptions(directory=run.path, quiet=quiet, trust=trust))
    recording = run.recording("validation")
    topology = getattr(impatient.policies.Topology, options.topology)(spec.after)
    problem = (recording, impatient.policies.node_times_s(costs), topology)
    how = {
        "learner": options.learner,
        "method": options.method,
        "progress": not quiet,
        **targets_of(options),
    }
    with warnings.catch_warnings():
        # the second fit says so, if it is so
        warnings.simplefilter("ignore", NoEffectWarning)
        first = impatient.policies.fit_selection(*problem, **how)
    with warnings_as_notes():
        policy = impatient.policies.fit_selection(
            *problem, gate_s=decision_time_s(first, recording), **how
        )
    file = run.save_policy(name, policy, target=fitted_to(options, recording))
    log.info("fitted on %d validation samples: %s", len(recording), file)
    return evaluate(EvaluateOptions(directory=run.path, quiet=quiet, trust=trust))


def shown(options: SelectOptions, evaluation: impatient.Evaluation) -> Iterator[Table | str]:
    """Give the judged rows, and what the policy saves."""
    from impatient.evaluation.tables import evaluation_table

    yield evaluation_table(evaluation)
    name = options.policy_name
    policy = evaluation[name]
    last = evaluation["no exits, same weights"]
    points = (policy.accuracy.value - last.accuracy.value) * 100
    yield (
        f"{name}: {last.contract_s / policy.contract_s:.2f} times as fast as the last network "
        f"alone ({in_ms(policy.contract_s)} instead of {in_ms(last.contract_s)} ms a sample), "
        f"{abs(points):.1f} points of accuracy {'lost' if points < 0 else 'gained'}"
    )


def _begin_cascade(run: RunDirectory, options: SelectOptions) -> None:
    transform = _common_transform(options)
    data = impatient.load_data(
        options.data, seed=options.seed, validation=options.validation, transform=transform
    )
    members = [_member(member, data, options) for member in options.members]
    specs = tuple(dataclasses.replace(spec, transform=transform) for spec, _ in members)
    networks = [network for _, network in members]
    models = [_model_and_weights(member)[0] for member in options.members]
    names = [model.rstrip("/").rpartition("/")[2] for model in models]
    if len(set(names)) < len(names):
        names = [f"{index} {model}" for index, model in enumerate(models)]
    cascade = impatient.networks.Cascade(networks, names)
    spec = dataclasses.replace(
        specs[-1],
        model=options.cascade_name,
        after=cascade.exit_names,
        members=specs,
        cascade=True,
        ensembling="",
        provenance=specs[-1].provenance_of(cascade),
    )
    with replaced(run.path) as place:
        new = RunDirectory(place)
        save_weights(cascade, new.weights_file)
        spec.save(new.spec_file)
    discard_old(run.path)


def _common_transform(options: SelectOptions) -> impatient.networks.Transform | None:
    """Return what all members expect to be done to pictures, since they get the same inputs.

    Raises:
        ModelSpecError: if they expect different things.
    """
    found = {}
    for member in options.members:
        part = RunDirectory(member)
        model, weights = _model_and_weights(member)
        if is_file(part.spec_file):
            found[member] = part.spec().transform
        else:
            found[member] = None if weights else impatient.networks.transform_of(model)
    first, *others = found.values()
    if any(other != first for other in others):
        listed = "; ".join(f"{member}: {one or 'nothing'}" for member, one in found.items())
        raise ModelSpecError(
            f"the members expect different things to be done to pictures ({listed}); expected the "
            "same, for all of them get the same inputs. Train them as runs on one data spec."
        )
    return first


def _member(member: str, data: impatient.Data, options: SelectOptions) -> tuple[NetworkSpec, Any]:
    """Load one network of a cascade, without exits, and describe it."""
    part = RunDirectory(member, trust=options.trust)
    if is_file(part.spec_file):
        spec = part.spec()
        if spec.cascade or spec.data_fingerprint != data.fingerprint:
            raise StaleInput(
                f"{part.path} is a cascade itself, or was trained on other data than {data.name}."
            )
        trained = part.exit_free if part.exit_free.is_trained else part
        return spec, trained.network()[0].backbone
    model, weights = _model_and_weights(member)
    network = load_fresh(model, data.num_classes, data.preprocess, options.seed).model
    if weights:
        load_weights(network, Path(weights), Path(weights).parent)
    spec = spec_of(network, data, model=model, seed=options.seed, validation=options.validation)
    return spec, network.eval()


def _model_and_weights(member: str) -> tuple[str, str]:
    """Split a member into its model and its file of weights, if any."""
    if not member.endswith(".safetensors"):
        return member, ""
    model, _, weights = member.rpartition("@")
    return model, weights
