"""Make the recording of exits that answer together from one of them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from impatient.ensembling import Rule, RuleName, as_temperatures, combine
from impatient.errors import PolicyError
from impatient.evaluation.recording import Recording
from impatient.provenance import fingerprint_bytes


def ensembled(
    recording: Recording,
    rule: RuleName | Rule,
    *,
    temperatures: Sequence[float] | None = None,
    recalibration: Sequence[float] | None = None,
) -> Recording:
    """Combine the exits of a recording by a rule.

    Outputs are those of a recording made with `RunningEnsemble`, without running anything.

    Judge it with the cost profile of the `RunningEnsemble`, in which no head can be skipped. Its
    fingerprints of network and weights are made from the old ones and the rule: a policy that was
    fitted on other outputs is refused. They are not those of a recording made with
    `RunningEnsemble`, which knows every weight; fit and judge on recordings made the same way.

    Args:
        recording: recording of the network alone.
        rule: rule by name, or with settings of its own.
        temperatures: one per exit, applied before combining (`fit_temperatures`).
        recalibration: one per exit, applied after combining.
    Raises:
        PolicyError: if the rule is unknown, or there are not K positive temperatures.
    """
    outputs = combine(
        recording.logits(), rule, temperatures=temperatures, recalibration=recalibration
    )
    made = f"{Rule.of(rule)} {_listed(temperatures)} {_listed(recalibration)}"
    return _derived(recording, outputs, made)


def calibrated(recording: Recording, temperatures: Sequence[float]) -> Recording:
    """Divide the outputs of each exit by a temperature.

    See `fit_temperatures`.

    Raises:
        PolicyError: if there are not K positive temperatures.
    """
    checked = as_temperatures(temperatures, len(recording.exits))
    if checked is None:
        raise PolicyError("no temperatures; expected one per exit, from fit_temperatures.")
    return _derived(
        recording,
        recording.logits() / checked[:, None, None],
        f"calibrated {_listed(temperatures)}",
    )


def _listed(temperatures: Sequence[float] | None) -> str:
    return "1" if temperatures is None else " ".join(f"{value!r}" for value in temperatures)


def _derived(recording: Recording, outputs: Float[Tensor, "K N C"], made: str) -> Recording:
    old = recording.provenance
    renamed = replace(old, network=_renamed(old.network, made), weights=_renamed(old.weights, made))
    return replace(recording.with_outputs(outputs), provenance=renamed)


def _renamed(fingerprint: str | None, made: str) -> str | None:
    return fingerprint and fingerprint_bytes(f"{fingerprint} {made}".encode())
