"""Confidence by AnytimeNet, the probability of the true class.

It is measured over all samples and for each class.

It needs the true labels, so it measures how good a network is. A run can only look at the largest
class probability, the score `impatient.tasks.scores.max_probability`. Both are here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from impatient.evaluation.metrics import Z95, Estimate, mean_share, true_label_probabilities
from impatient.evaluation.recording import Recording
from impatient.provenance import Provenance
from impatient.tasks.scores import max_probability


def correlation(first: Float[Tensor, "N"], second: Float[Tensor, "N"]) -> Estimate | None:
    """Pearson's correlation of pairs, with Fisher's 95 % interval for independent pairs.

    Returns:
        None where there is none: fewer than three pairs, or one side that does not vary. Of three
        pairs, the interval is everything.
    Example:
        >>> first, second = torch.tensor([0.1, 0.4, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.7, 0.8])
        >>> found = correlation(first, second)
        >>> round(found.value, 3), round(found.low, 3), round(found.high, 3)
        (0.891, -0.488, 0.998)
    """
    if len(first) < 3:
        return None
    sides = [side.double() for side in (first, second)]
    a, b = (side - side.mean() for side in sides)
    # means of equal values differ in their last digit
    if any(
        float(centred.norm()) <= 1e-12 * float(side.norm())
        for centred, side in zip((a, b), sides, strict=True)
    ):
        return None
    r = ((a @ b) / (a.norm() * b.norm())).clamp(-1.0, 1.0)
    if len(first) == 3:
        return Estimate(float(r), -1.0, 1.0)
    half = Z95 / math.sqrt(len(first) - 3)
    return Estimate(float(r), float((r.atanh() - half).tanh()), float((r.atanh() + half).tanh()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClassConfidence:
    """Confidence of the exits in the true class, and its correlation with accuracy.

    Attributes:
        exits: names of the exits, shallow to deep.
        split: name of the split that it was measured on.
        counts: number of samples of each class.
        confidence: mean probability of the true class, per exit and true class; NaN for a class
            without samples.
        accuracy: share of right answers, per exit and true class.
        overall: mean probability of the true class over all samples, per exit.
        max_probability: mean of the largest probability, per exit, which a run can look at.
        correlations: correlation of confidence with accuracy over the classes that have samples,
            per exit. Each class counts once. It is None where it is undefined. Its interval assumes
            that the classes are drawn independently.
        sample_correlations: per exit, of the probability of the true class with being right, over
            single samples. As high a correlation over classes comes from luck alone, where classes
            do not differ: both are means over the same samples.
        provenance: of the recording.
    """

    exits: tuple[str, ...]
    split: str
    counts: Int[Tensor, "C"]
    confidence: Float[Tensor, "K C"]
    accuracy: Float[Tensor, "K C"]
    overall: tuple[Estimate, ...]
    max_probability: tuple[Estimate, ...]
    correlations: tuple[Estimate | None, ...]
    sample_correlations: tuple[Estimate | None, ...]
    provenance: Provenance

    @property
    def classes(self) -> tuple[int, ...]:
        """Those with samples."""
        return tuple(self.counts.nonzero()[:, 0].tolist())

    @property
    def absent(self) -> tuple[int, ...]:
        """Classes without samples, which are left out of everything."""
        return tuple((self.counts == 0).nonzero()[:, 0].tolist())


def class_confidence(recording: Recording) -> ClassConfidence:
    """Compute confidence and accuracy of every exit, and their correlation.

    They are over all samples and for each class.

    Args:
        recording: of the split to judge on, usually "test".
    Source:
        AnytimeNet (Kim et al. 2020), equation 5 and figure 4. We differ: beside the correlation
        over classes stands that over single samples, which is where it begins.
    """
    labels = recording.labels.long()
    hits_KN = recording.quality
    true_KN = true_label_probabilities(recording.outputs, labels)
    counts_C = torch.bincount(labels, minlength=recording.outputs.shape[2])
    confidence, accuracy = (_class_means(values, labels, counts_C) for values in (true_KN, hits_KN))
    there_C = counts_C > 0
    return ClassConfidence(
        exits=recording.exits,
        split=recording.split,
        counts=counts_C,
        confidence=confidence,
        accuracy=accuracy,
        overall=tuple(map(mean_share, true_KN)),
        max_probability=tuple(map(mean_share, max_probability(recording.outputs))),
        correlations=tuple(
            correlation(x[there_C], y[there_C]) for x, y in zip(confidence, accuracy, strict=True)
        ),
        sample_correlations=tuple(correlation(x, y) for x, y in zip(true_KN, hits_KN, strict=True)),
        provenance=recording.provenance,
    )


def _class_means(
    values_KN: Float[Tensor, "K N"], labels_N: Int[Tensor, "N"], counts_C: Int[Tensor, "C"]
) -> Float[Tensor, "K C"]:
    sums = torch.zeros(len(values_KN), len(counts_C), dtype=torch.float64)
    # 0 / 0 is NaN
    return sums.index_add_(1, labels_N, values_KN.double()) / counts_C
