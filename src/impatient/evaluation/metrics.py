"""Numbers with their uncertainty: accuracy, calibration, means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from impatient.tasks.classification import check_labels

# two-sided 95 % of the normal distribution
Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def proportion(hits: float, count: int) -> Estimate:
    """Estimate a share of successes, with its Wilson interval.

    Example:
        >>> estimate = proportion(90, 100)
        >>> round(estimate.low, 3), round(estimate.high, 3)
        (0.826, 0.945)
    """
    share = hits / count
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = (
        Z95
        * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
        / (1 + Z95**2 / count)
    )
    return Estimate(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def mean(values: Float[Tensor, "N"]) -> Estimate:
    """Estimate the mean of independent values, with its normal interval."""
    centre = float(values.double().mean())
    half = (
        Z95 * float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    )
    return Estimate(centre, centre - half, centre + half)


def mean_quality(values: Float[Tensor, "N"]) -> Estimate:
    """Estimate the mean of qualities: a share of successes where all are 0 or 1."""
    if bool(((values == 0) | (values == 1)).all()):
        return proportion(float(values.sum()), len(values))
    return mean_share(values)


def mean_share(values: Float[Tensor, "N"]) -> Estimate:
    """Estimate the mean of values between 0 and 1.

    Its interval, too, stays between them.
    """
    found = mean(values)
    return Estimate(found.value, max(0.0, found.low), min(1.0, found.high))


def class_probabilities(
    outputs: Float[Tensor, "K N C"], classes: Int[Tensor, "N"]
) -> Float[Tensor, "K N"]:
    """Probability that each exit gives to one class of each sample."""
    check_labels(classes, outputs.shape[2])
    places = classes.expand(outputs.shape[:2])[..., None]
    # only the class in question is divided by the sum: a softmax over all would write everything
    # once more
    return (outputs.gather(2, places)[..., 0] - outputs.logsumexp(-1)).exp()


def true_label_probabilities(
    outputs: Float[Tensor, "K N C"], labels: Int[Tensor, "N"]
) -> Float[Tensor, "K N"]:
    """Probability that each exit gives to the true class of each sample.

    Its mean over the samples is the overall confidence of an exit.

    Args:
        outputs: outputs of all exits, before softmax.
        labels: true classes.
    Returns:
        Probabilities in [0, 1].
    Raises:
        RecordingError: if a label has no output.
    Source:
        AnytimeNet (Kim et al. 2020), equation 5.
    Example:
        >>> outputs = torch.tensor([[[0.7, 0.3], [0.7, 0.3]], [[0.9, 0.1], [0.4, 0.6]]]).log()
        >>> true_label_probabilities(outputs, torch.tensor([0, 1])).round(decimals=3)
        tensor([[0.7000, 0.3000],
                [0.9000, 0.6000]])
    """
    return class_probabilities(outputs, labels.long())


def expected_calibration_error(
    confidence: Float[Tensor, "N"], correct: Bool[Tensor, "N"], bins: int = 15
) -> float:
    """Compute the mean distance between confidence and accuracy.

    It is over equally wide bins of confidence, weighted by their size.

    Source:
        Guo et al. 2017, with their 15 bins.
    """
    places = (confidence.double() * bins).ceil().clamp(1, bins).long() - 1
    count = torch.bincount(places, minlength=bins).double()
    right = torch.bincount(places, weights=correct.double(), minlength=bins)
    expected = torch.bincount(places, weights=confidence.double(), minlength=bins)
    return float((right - expected).abs().sum() / count.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Monotonicity:
    """How often, and how far, the probability of a class falls.

    A fall is from an exit to a deeper one.

    Attributes:
        tolerances: falls that are still no violation.
        violations: per tolerance, the share of samples with a larger fall.
        mean_fall: mean of the largest falls of the samples.
        fall_p95, fall_max: 95th percentile and maximum of the largest falls, in probability.
    """

    tolerances: tuple[float, ...]
    violations: tuple[Estimate, ...]
    mean_fall: Estimate
    fall_p95: float
    fall_max: float


def largest_falls(
    outputs: Float[Tensor, "K N C"], labels: Int[Tensor, "N"] | None = None
) -> Float[Tensor, "N"]:
    """Compute how far each sample's probability of its class falls.

    It is the largest fall between two exits, the shallower one first.

    Args:
        outputs: outputs of all exits, before softmax.
        labels: the class of each sample; by default the one that the last exit answers.
    Returns:
        Largest p_i - p_j over exits i <= j, in [0, 1]; 0 where it never falls.
    Example:
        >>> probabilities = torch.tensor([[[0.5, 0.5]], [[0.8, 0.2]], [[0.6, 0.4]], [[0.7, 0.3]]])
        >>> largest_falls(probabilities.log()).round(decimals=3)
        tensor([0.2000])
    """
    classes_N = outputs[-1].argmax(-1) if labels is None else labels.long()
    probabilities_KN = class_probabilities(outputs, classes_N)
    return (probabilities_KN.cummax(0).values - probabilities_KN).amax(0)


def conditional_monotonicity(
    outputs: Float[Tensor, "K N C"],
    labels: Int[Tensor, "N"] | None = None,
    *,
    tolerances: Sequence[float] = (0.01, 0.1, 0.2, 0.33, 0.5),
) -> Monotonicity:
    """Measure whether going on makes every sample's answer better.

    Accuracies tell it only on average.

    Args:
        outputs: outputs of all exits, before softmax.
        labels: the true classes; by default what the last exit answers.
        tolerances: a sample is counted if the probability of its class falls by more than this
            between any two exits.
    Source:
        Jazbec et al. 2023, conditional monotonicity, with their tolerances. Look at the accuracies,
        too: exits that all give the same never lower a probability either.
    """
    falls_N = largest_falls(outputs, labels).double()
    limits_T = torch.tensor(list(tolerances), dtype=torch.float64, device=falls_N.device)
    counts = (falls_N > limits_T[:, None]).sum(1).tolist()
    return Monotonicity(
        tolerances=tuple(tolerances),
        violations=tuple(proportion(count, len(falls_N)) for count in counts),
        mean_fall=mean(falls_N),
        fall_p95=float(falls_N.quantile(0.95)),
        fall_max=float(falls_N.max()),
    )
