"""Linear SVMs on the features of a network without exits.

They show what exits are worth without training the network for them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor

from impatient.errors import RecordingError, SplitReuseError
from impatient.evaluation.recording import Recording
from impatient.provenance import fingerprint_bytes, fingerprint_tensors

log = logging.getLogger(__name__)

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# five to sixty are usual
MAX_ITERATIONS = 1000


def linear_probes(
    train: Recording,
    validation: Recording | None,
    *judge: Recording,
    C: Sequence[float] = STRENGTHS,
) -> tuple[Recording, ...]:
    """Fit ORIG and FT of Impatient DNNs, one linear SVM per exit.

    Each SVM separates one class from the rest by the exit's pooled features.

    Which of the two it is, the network decides: as it was pretrained (ORIG), or fine-tuned without
    exits (FT). Record it with `features=True`; its own heads are not looked at. The last exit's
    features are the backbone's *outputs*: for an SVM on what comes before the classifier, cut after
    the last block too, and leave the last exit out of the table.

    Args:
        train: the SVMs, and the mean and deviation by which features are standardised, come from
            this recording alone.
        validation: chooses C, exit by exit, by accuracy; the smallest wins a tie. Without it, the
            middle of C is taken.
        judge: recordings to answer; give `validation` here too, for fitting policies on.
        C: strengths of the data against the regularisation, as in scikit-learn.
    Returns:
        For each of `judge` a recording with the same labels, exits, features and split, whose
        outputs are the decision
        functions: those of a class that `train` lacks lie 1 below the sample's least. Its
        fingerprint of the weights covers the network's and the SVMs', so that policies of one are
        refused for the other. Softmax of decision functions ranks samples, but is no probability.
        The same recordings give the same numbers.
    Raises:
        RecordingError: if a recording has no features, or they do not fit, or no C lets the SVMs
            converge.
        StaleInput: if a recording is of another network's weights.
        SplitReuseError: if `validation` or one of `judge` is the split of `train`.
    Source:
        Amthor, Rodner, Denzler 2016 (Impatient DNNs), Table 1: SVMs on DeCAF features. We differ:
        features are standardised and C is searched; the paper does not say.
    """
    grid = sorted(float(strength) for strength in C)
    if not grid or not all(0.0 < strength < math.inf for strength in grid):
        raise RecordingError(f"C={tuple(C)}; expected at least one positive finite strength.")
    _check(train, train)
    for other in judge if validation is None else (validation, *judge):
        _check(train, other)
        if (other.split, other.provenance.data) == (train.split, train.provenance.data):
            raise SplitReuseError(
                f"split {train.split!r} trains the SVMs and can neither choose C nor judge them: "
                "the result would be too good. Give recordings of other splits."
            )
    tried = grid if validation is not None else grid[len(grid) // 2 : len(grid) // 2 + 1]
    probes = [_best(train, validation, exit, tried) for exit in range(len(train.exits))]
    fitted = {
        f"{k}/{name}": value
        for k, probe in enumerate(probes)
        for name, value in dataclasses.asdict(probe).items()
    }
    weights = fingerprint_bytes(
        f"{train.provenance.weights} {fingerprint_tensors(fitted)}".encode()
    )
    return tuple(
        dataclasses.replace(
            recording.with_outputs(
                torch.stack(
                    [_decide(probe, recording, exit).float() for exit, probe in enumerate(probes)]
                )
            ),
            provenance=dataclasses.replace(recording.provenance, weights=weights),
        )
        for recording in judge
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Probe:
    """The SVMs of one exit, one for each of the P classes with training examples.

    The deviation is 1 where a feature is constant.
    """

    mean: Float[Tensor, "D"]
    deviation: Float[Tensor, "D"]
    slopes: Float[Tensor, "P D"]
    offsets: Float[Tensor, "P"]
    classes: Int[Tensor, "P"]


def _check(train: Recording, other: Recording) -> None:
    name = f"the recording of split {other.split!r}"
    if len(other.features) != len(other.exits):
        raise RecordingError(
            f"{name} holds the features of {len(other.features)} of {len(other.exits)} exits; "
            "linear probes need them all. Record it with record(..., features=True)."
        )
    other.provenance.require(
        name, "record both with the same network", weights=train.provenance.weights
    )
    widths, wanted = (
        [tuple(entry.shape[1:]) for entry in recording.features] for recording in (other, train)
    )
    if (other.exits, widths, other.outputs.shape[2]) != (
        train.exits,
        wanted,
        train.outputs.shape[2],
    ):
        raise RecordingError(
            f"{name} has exits {other.exits} with features {widths} and {other.outputs.shape[2]} "
            f"classes, but the SVMs are for {train.exits}, {wanted} and {train.outputs.shape[2]}; "
            "record both with the same network and features."
        )
    if not all(bool(torch.isfinite(entry).all()) for entry in other.features):
        raise RecordingError(
            f"{name} has NaN or infinite features; check the weights it was recorded with."
        )


def _best(
    train: Recording, validation: Recording | None, exit: int, grid: Sequence[float]
) -> _Probe:
    """Fit an exit's SVMs with the regularisation that is best on `validation`.

    Strengths for which the solver does not converge are left out.
    """
    features = train.features[exit].flatten(1).double().numpy()
    labels = train.labels.numpy()
    scaler = StandardScaler().fit(features)
    mean = torch.from_numpy(scaler.mean_)
    deviation = torch.from_numpy(scaler.scale_)
    standard = scaler.transform(features)
    classes = train.labels.unique()
    found: list[tuple[float, float, _Probe]] = []
    for strength in grid:
        machines = _machines(standard, labels, strength)
        if machines is None:
            log.warning(
                "exit %s: the SVMs with C = %g did not converge and are left out",
                train.exits[exit],
                strength,
            )
            continue
        probe = _Probe(
            mean=mean, deviation=deviation, slopes=machines[0], offsets=machines[1], classes=classes
        )
        right = 0.0 if validation is None else _accuracy(probe, validation, exit)
        found.append((right, -strength, probe))
    if not found:
        raise RecordingError(
            f"no SVM of exit {train.exits[exit]} converged with C={tuple(grid)}; give smaller C."
        )
    right, strength, probe = max(found, key=lambda entry: entry[:2])
    if validation is not None:
        log.info(
            "exit %s: C = %g of %s, accuracy %.4f on validation",
            train.exits[exit],
            -strength,
            grid,
            right,
        )
    return probe


def _machines(
    features: np.ndarray, labels: np.ndarray, strength: float
) -> tuple[Tensor, Tensor] | None:
    """Fit slopes [P, D] and offsets [P] of one class against the rest.

    The result is None if the solver does not converge.
    """
    present = len(np.unique(labels))
    # nothing to tell apart
    if present == 1:
        return torch.zeros(1, features.shape[1], dtype=torch.float64), torch.ones(
            1, dtype=torch.float64
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            # dual only where there are fewer samples than features: there the primal solver can run
            # for minutes
            machine = LinearSVC(
                C=strength, dual="auto", max_iter=MAX_ITERATIONS, random_state=0
            ).fit(features, labels)
        except ConvergenceWarning:
            return None
    slopes = torch.from_numpy(machine.coef_)
    offsets = torch.from_numpy(machine.intercept_)
    return (
        (slopes, offsets)
        if present > 2
        else (torch.cat([-slopes, slopes]), torch.cat([-offsets, offsets]))
    )


def _decide(probe: _Probe, recording: Recording, exit: int) -> Float[Tensor, "N C"]:
    """Compute the decision functions of all classes.

    Classes without training examples get 1 less than the lowest of the others.
    """
    standard = (recording.features[exit].flatten(1).double() - probe.mean) / probe.deviation
    known = standard @ probe.slopes.T + probe.offsets
    decided = (known.amin(1, keepdim=True) - 1.0).repeat(1, recording.outputs.shape[2])
    decided[:, probe.classes] = known
    return decided


def _accuracy(probe: _Probe, recording: Recording, exit: int) -> float:
    return float((_decide(probe, recording, exit).argmax(1) == recording.labels).double().mean())
