"""Divide a split into parts, and tell which splits share samples."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from impatient.errors import RecordingError
from impatient.policies.policy import Recorded

SomeRecording = TypeVar("SomeRecording", bound=Recorded)


def split_recording(
    recording: SomeRecording, share: float = 0.5, *, seed: int = 0
) -> tuple[SomeRecording, SomeRecording]:
    """Split a recording into two parts at random.

    One is to fit on, the other to control or judge on.

    Args:
        recording: the recording to divide, such as that of "validation".
        share: share of the samples that goes into the first part.
        seed: seed of the division.
    Returns:
        Parts named like "validation/fit(0.5,0)" and "validation/calibration(0.5,0)": share and seed
        are in the name, so that parts of different divisions, which share samples, are not mistaken
        for disjoint ones.
    Raises:
        RecordingError: if a part would be empty.
    """
    samples = len(recording)
    first = round(share * samples) if math.isfinite(share) else 0
    if not 0 < first < samples:
        raise RecordingError(
            f"share={share} of {samples} samples leaves an empty part; expected a share between 0 "
            "and 1."
        )
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))

    def part(name: str, places: Int[Tensor, "M"]) -> SomeRecording:
        return recording.take(places, f"{recording.split}/{name}({share:g},{seed})")

    return part("fit", order[:first].sort().values), part(
        "calibration", order[first:].sort().values
    )


def splits_overlap(first: str, second: str) -> bool:
    """Whether two splits of one data set may share samples, by their names.

    Example:
        >>> fitted = "validation/fit(0.5,0)"
        >>> other = "validation/calibration(0.5,0)"
        >>> splits_overlap(fitted, other), splits_overlap("validation", "test")
        (False, False)
        >>> splits_overlap("validation", "validation/fit(0.5,0)")  # a whole and its part
        True
        >>> # of two divisions
        >>> splits_overlap(fitted, "validation/calibration(0.5,1)")
        True
    """
    for depth, (one, other) in enumerate(zip(first.split("/"), second.split("/"), strict=False)):
        # whole splits, or parts of one division, are disjoint
        if one != other:
            return depth > 0 and one.partition("(")[2] != other.partition("(")[2]
    return True
