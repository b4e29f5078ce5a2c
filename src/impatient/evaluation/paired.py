"""Compare two recordings of one split, such as those of two engines."""

from __future__ import annotations

from dataclasses import dataclass

from impatient.errors import RecordingError
from impatient.evaluation.metrics import Estimate, mean, proportion
from impatient.evaluation.recording import Recording


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedComparison:
    """One exit in two recordings of the same samples.

    Attributes:
        exit, name: number and name of the exit.
        accuracy, reference: shares of right answers, of the recording in question and of the one
            beside it.
        difference: accuracy minus reference; its interval is that of paired samples, far narrower
            than either's own.
        same: share of the samples that get the same answer from both.
    """

    exit: int
    name: str
    accuracy: Estimate
    reference: Estimate
    difference: Estimate
    same: Estimate


def compare_exits(recording: Recording, reference: Recording) -> tuple[PairedComparison, ...]:
    """Compare the exits of two recordings of one split.

    Args:
        recording: what an engine answered, say.
        reference: what torch answered.
    Raises:
        StaleInput: if they are of different data.
        RecordingError: if they are of different splits or exits.
    """
    recording.provenance.require(
        "the recording", "record both on the same data", data=reference.provenance.data
    )
    if (recording.split, recording.exits) != (reference.split, reference.exits):
        raise RecordingError(
            f"one recording is of split {recording.split!r} and exits "
            f"{', '.join(recording.exits)}, the other of {reference.split!r} and "
            f"{', '.join(reference.exits)}; expected the same of both."
        )
    hits = recording.quality
    wanted = reference.quality
    same = recording.logits().argmax(-1) == reference.logits().argmax(-1)
    count = len(recording)
    return tuple(
        PairedComparison(
            exit=exit,
            name=name,
            accuracy=proportion(float(hits[exit].sum()), count),
            reference=proportion(float(wanted[exit].sum()), count),
            difference=mean(hits[exit] - wanted[exit]),
            same=proportion(float(same[exit].sum()), count),
        )
        for exit, name in enumerate(recording.exits)
    )
