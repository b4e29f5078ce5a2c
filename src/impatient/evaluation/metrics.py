"""Numbers with their uncertainty: accuracy, calibration, means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high}


def proportion(hits: float, count: int) -> Estimate:
    """A share of successes with its Wilson interval.

    Example:
        >>> estimate = proportion(90, 100)
        >>> round(estimate.low, 3), round(estimate.high, 3)
        (0.826, 0.945)
    """
    share = hits / count
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2)) / (1 + Z95**2 / count)
    return Estimate(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def mean(values: Float[Tensor, "N"]) -> Estimate:
    """Mean of independent values with its normal interval."""
    centre = float(values.double().mean())
    half = Z95 * float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Estimate(centre, centre - half, centre + half)


def expected_calibration_error(confidence: Float[Tensor, "N"], correct: Bool[Tensor, "N"], bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over equally wide bins of confidence, weighted by their size.

    Source:
        Guo et al. 2017, with their 15 bins.
    """
    places = (confidence.double() * bins).ceil().clamp(1, bins).long() - 1
    count = torch.bincount(places, minlength=bins).double()
    accuracy = torch.bincount(places, weights=correct.double(), minlength=bins)
    sureness = torch.bincount(places, weights=confidence.double(), minlength=bins)
    return float((accuracy - sureness).abs().sum() / count.sum())
