"""Fit a policy to a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import arg

import impatient
from impatient.errors import InfeasibleTarget, PolicyError
from impatient.files import plain_name
from impatient.verbs.imported import opened
from impatient.verbs.notes import log, warnings_as_notes
from impatient.verbs.options import (
    OFF,
    AnyProfile,
    Directory,
    Millijoules,
    Millions,
    Milliseconds,
    Number,
    Points,
    Quiet,
    Text,
    Threads,
    Top,
    VerbOptions,
    one_of,
    use_threads,
)
from impatient.verbs.processes import alone

GateInputs = Literal["confidences", "features", "both"]
Cost = Literal["time", "macs", "bytes", "energy"]
Learner = Literal["logistic", "svm", "mlp", "boosting"]

# what targets are called in the names of policies, and their units
UNITS = {
    "max_accuracy_loss": ("loss", 100.0),
    "mean_time_s": ("ms", 1e3),
    "mean_macs": ("mmacs", 1e-6),
    "mean_bytes": ("mb", 1e-6),
    "mean_energy_j": ("mj", 1e3),
    "time_price": ("price", 1.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions(VerbOptions):
    """Fit a policy to a target on the validation split.

    Attributes:
        max_accuracy_loss: Points of accuracy that may be lost against the last exit; 1 unless
            another target is given.
        mean_time_s: Mean time per sample in ms.
        mean_macs: Mean millions of multiply-accumulates per sample.
        mean_bytes: Mean megabytes that operators read and write per sample.
        mean_energy_j: Mean millijoules per sample; needs a profile with joules.
        cost: Cost that --max-loss is to save; by default time.
        score: How sure an answer looks: max_probability, margin or entropy for classes; agreement
            with the exit before, or another score of the task. By default the task's first.
        learner: Learner of gates, one per exit, instead of thresholds.
        inputs: Inputs of gates: confidences; features, before the head is paid (they must be
            recorded, with --features); or both.
        delta: Guarantee --max-loss with probability 1 - DELTA, say 0.05: half of the validation
            split is kept back to show it.
        name: Name of the policy; by default the target.
    """

    directory: Directory
    max_accuracy_loss: Annotated[Points, arg(name="max-loss")] = None
    mean_time_s: Annotated[Milliseconds, arg(name="mean-ms")] = None
    mean_macs: Annotated[Millions, arg(name="mean-mmacs")] = None
    mean_bytes: Annotated[Millions, arg(name="mean-mb")] = None
    mean_energy_j: Annotated[Millijoules, arg(name="mean-mj")] = None
    cost: Annotated[Cost | None, one_of(Cost), OFF] = None
    score: Text = None
    learner: Annotated[Learner | None, one_of(Learner), OFF] = None
    inputs: GateInputs = "confidences"
    delta: Number = None
    top: Top = None
    name: Text = None
    any_profile: AnyProfile = False
    threads: Threads = 0
    quiet: Quiet = False

    @property
    def policy_name(self) -> str:
        """The name the policy is kept under."""
        how = f"-{self.cost}" if self.cost else ""
        learned = f"-{self.learner}-{self.inputs}" if self.learner else ""
        sure = "" if self.delta is None else "-sure"
        top = f"-top-{self.top}" if self.top else ""
        return self.name or target_name(self) + how + learned + sure + top


def targets_of(options: Any) -> dict[str, Any]:
    """Collect the targets that are given, by default a loss of 1 point."""
    names = [entry.name for entry in dataclasses.fields(options) if entry.name in UNITS]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return given or {"max_accuracy_loss": 0.01}


def target_name(options: Any) -> str:
    """Name a policy after its first target, in the command line's units."""
    target, value = next(iter(targets_of(options).items()))
    kind, scale = UNITS[target]
    return f"{kind}-{value * scale:g}"


def fitted_to(options: Any, recording: impatient.Recording) -> impatient.policies.FittedTo:
    """Say what a policy is fitted to, to be kept beside it."""
    name, wanted = next(iter(targets_of(options).items()))
    return impatient.policies.FittedTo(name=name, wanted=wanted, samples=len(recording))


@alone()
def fit(options: FitOptions) -> impatient.Policy:
    """Fit thresholds, or with a learner gates, and keep them under a name.

    With delta, half of the recording is kept back to find the fastest policy that loses at most
    the target, with probability 1 - delta. The certificate is kept, too.
    """
    use_threads(options.threads)
    run = opened(options.directory)
    if options.cost not in (None, "time") and (options.learner or options.delta is not None):
        raise PolicyError(
            f"--cost {options.cost} goes with plain thresholds; leave --learner and --delta away."
        )
    if options.inputs != "confidences" and options.learner is None:
        raise PolicyError(
            f"--inputs {options.inputs} is of learned gates; name their --learner, such as "
            "logistic, or leave --inputs away."
        )
    # A name that cannot be a file's is refused before anything is computed.
    name = plain_name(options.policy_name, "policy")
    recording = run.recording("validation", top=options.top)
    costs = run.profile(any_machine=options.any_profile)
    policy: impatient.Policy
    certificate = None
    with warnings_as_notes():
        if options.delta is not None:
            policy, certificate = _certified(recording, costs, options, options.delta)
        elif options.learner:
            policy = _gates(recording, costs, options)
        else:
            policy = impatient.fit_thresholds(
                recording, costs, score=options.score, cost=options.cost, **targets_of(options)
            )
    file = run.save_policy(name, policy, certificate, fitted_to(options, recording))
    log.info("fitted on %d validation samples: %s", len(recording), file)
    if certificate is not None:
        log.info(certificate.statement)
    return policy


def shown(_: FitOptions, policy: impatient.Policy) -> Iterator[str]:
    """Give the policy in one line, if its kind has one."""
    if summary := policy.summary():
        yield summary


def _gates(
    recording: impatient.Recording, costs: impatient.CostProfile, options: FitOptions
) -> impatient.policies.GatePolicy:
    """Fit gates, with the time that asking them takes."""
    targets = targets_of(options)
    if not targets.keys() <= {"mean_time_s", "max_accuracy_loss"}:
        raise PolicyError(
            "gates are fitted to time; give --mean-ms or --max-loss, or leave --learner away."
        )
    gates = _gate_options(recording, costs, options)
    return impatient.policies.fit_gates(
        recording, costs, progress=not options.quiet, **gates, **targets
    )


def _gate_options(
    recording: impatient.Recording, costs: impatient.CostProfile, options: FitOptions
) -> dict[str, Any]:
    """Say how gates are learned, and how long asking one takes."""
    import numpy as np

    learned: dict[str, Any] = {"learner": options.learner, "inputs": options.inputs}
    # at one of them gates are open whose asking can be timed
    prices = np.geomspace(0.01, 10.0, 7) / costs.contract_s()[-1]
    points = impatient.policies.sweep_gates(
        recording, costs, prices.tolist(), progress=not options.quiet, **learned
    )
    measured = [impatient.policies.gate_time_s(point.policy, recording) for point in points]
    asked = [seconds for gates in measured for seconds in gates if seconds > 0.0]
    return {**learned, "gate_s": float(np.median(asked)) if asked else 0.0}


def _certified(
    recording: impatient.Recording, costs: impatient.CostProfile, options: FitOptions, delta: float
) -> tuple[Any, impatient.policies.Certificate]:
    """Fit policies on one half, and choose among them on the other."""
    targets = targets_of(options)
    if set(targets) != {"max_accuracy_loss"}:
        raise PolicyError(
            "a guarantee is one about accuracy; give --delta with --max-loss, and no other target."
        )
    loss = targets["max_accuracy_loss"]
    part, calibration = impatient.policies.split_recording(recording)
    candidates: Sequence[Any]
    if options.learner is None:
        fitted = impatient.fit_thresholds(part, costs, score=options.score, max_accuracy_loss=loss)
        candidates = impatient.policies.scaled_family(fitted)
    else:
        gates = _gate_options(part, costs, options)
        # at rising prices of time: from conservative to aggressive
        points = impatient.policies.sweep_gates(part, costs, progress=not options.quiet, **gates)
        candidates = [point.policy for point in points]
    try:
        controlled = impatient.policies.control_risk(
            candidates, calibration, epsilon=loss, delta=delta
        )
    except InfeasibleTarget as error:
        raise InfeasibleTarget(
            f"{error} They come from half of the validation split, which so needs twice as many; "
            f"it has {len(recording)}."
        ) from error
    return controlled.policy, controlled.certificate
