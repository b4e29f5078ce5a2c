"""Combine networks, or the exits of one, into an ensemble."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

import impatient
from impatient.errors import RunError, StorageError
from impatient.files import is_file, written_whole
from impatient.verbs.evaluate import check_same_data
from impatient.verbs.network_spec import NetworkSpec, save_weights
from impatient.verbs.notes import log
from impatient.verbs.options import OFF, Force, NewDirectory, RunPath, Trust, VerbOptions
from impatient.verbs.processes import alone
from impatient.verbs.replacing import discard_old, replaced
from impatient.verbs.run_directory import RunDirectory

Rule = Literal["arithmetic", "geometric", "poe", "caching"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleOptions(VerbOptions):
    """Combine networks, or the exits of one, into an ensemble.

    Attributes:
        members: Trained run directories, shallow to deep. Several run one after the other: an
            ensemble of growing depth (EANN).
        rule: With one member: how its exits answer together.
    """

    directory: NewDirectory
    members: Annotated[Positional[tuple[RunPath, ...]], arg(metavar="MEMBER..."), OFF]
    rule: Rule = "geometric"
    force: Force = False
    trust: Trust = ()


@alone(make=True)
def ensemble(options: EnsembleOptions) -> Path:
    """Make a run directory of trained ones.

    What is fitted, the errors to choose by and the temperatures, comes from the members' validation
    recordings.

    Raises:
        StorageError: if the directory is taken, or a member has no validation recording.
        StaleInput: if the members were trained on different data.
    """
    if not options.members:
        raise RunError("no members; expected at least one trained run directory.")
    run = RunDirectory(options.directory)
    parts = [RunDirectory(member, trust=options.trust) for member in options.members]
    if is_file(run.spec_file) and not options.force:
        raise StorageError(
            f"{run.path} is a run directory already; use another one, or --force to throw it away."
        )
    networks = [part.network()[0] for part in parts]
    recordings = [part.recording("validation") for part in parts]
    network, spec = (
        _eann(parts, networks, recordings)
        if len(parts) > 1
        else _running_ensemble(parts[0], networks[0], recordings[0], options.rule)
    )
    with replaced(run.path) as place:
        new = RunDirectory(place)
        save_weights(network, new.weights_file)
        single = parts[-1].exit_free
        if single.is_trained:
            with written_whole(new.exit_free.weights_file) as copy:
                shutil.copyfile(single.weights_file, copy)
        spec.save(new.spec_file)
    discard_old(run.path)
    log.info(network.describe(spec.example()))
    log.info("made: %s", run.path)
    return run.path


def _eann(
    parts: Sequence[RunDirectory],
    networks: Sequence[Any],
    recordings: Sequence[impatient.Recording],
) -> tuple[impatient.networks.EANN, NetworkSpec]:
    for part in parts[1:]:
        check_same_data(parts[0], part)
    specs = [part.spec() for part in parts]
    errors = [(1.0 - recording.quality.mean(1)).tolist() for recording in recordings]
    network = impatient.networks.EANN(networks, errors)
    spec = dataclasses.replace(
        specs[-1],
        model="ensemble of growing depth",
        after=network.exit_names[:-1],
        members=tuple(specs),
        validation_errors=tuple(map(tuple, errors)),
        provenance=specs[-1].provenance_of(network),
    )
    return network.eval(), spec


def _running_ensemble(
    part: RunDirectory, network: Any, recording: impatient.Recording, rule: Rule
) -> tuple[impatient.networks.RunningEnsemble, NetworkSpec]:
    """Fit temperatures for exits that answer together."""
    from impatient.evaluation import ensembled

    spec = part.spec()
    if spec.members or spec.ensembling:
        raise RunError(
            f"{part.path} is an ensemble already; expected a directory that `impatient train` made."
        )
    before = impatient.policies.fit_temperatures(recording)
    after = None
    # caching promises that the confidence never falls; a temperature per exit would break that
    if rule != "caching":
        combined = ensembled(recording, rule, temperatures=before)
        after = impatient.policies.fit_temperatures(combined)
    together = impatient.networks.RunningEnsemble(network, rule, before, recalibration=after)
    spec = dataclasses.replace(spec, ensembling=rule, provenance=spec.provenance_of(together))
    return together.eval(), spec
