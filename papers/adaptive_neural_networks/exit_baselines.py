"""Baselines for learned exits: fixed exits, and limits that need the labels."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from impatient.costs import CostProfile
from impatient.errors import PolicyError
from impatient.policies.policy import Recorded
from impatient.policies.rules import ThresholdPolicy


def always(exit: int, num_exits: int) -> ThresholdPolicy:
    """Stop every sample at one exit, so that no other head runs.

    Example:
        >>> always(1, 3).thresholds
        (inf, -inf, -inf)
    """
    if not 0 <= exit < num_exits:
        raise PolicyError(f"exit {exit} of {num_exits}; expected 0 to {num_exits - 1}.")
    thresholds = [math.inf] * num_exits
    thresholds[exit] = thresholds[-1] = -math.inf
    return ThresholdPolicy(score="max_probability", thresholds=tuple(thresholds))


def soft_oracle(
    recording: Recorded,
    costs: CostProfile,
    *,
    when_none_is_right: Literal["cheapest", "last"] = "cheapest",
    pays: Literal["chosen", "path"] = "chosen",
) -> tuple[Int[Tensor, "N"], Float[Tensor, "N"]]:
    """Find the fastest exit that is right for each sample, which needs the labels.

    Args:
        recording: of the split to judge on.
        costs: of the same network.
        when_none_is_right: which exit answers then: the cheapest, or the last, as the full network
            would.
        pays: what an answer costs: the "chosen" exit alone, as if known beforehand, or the "path"
            with all heads on the way.
    Returns:
        The exit of each sample, and its seconds.
    Source:
        "soft oracle" in Bolukbasi et al. 2017, who leave both choices open.
    """
    mode: Literal["contract", "interruptible"] = "contract" if pays == "chosen" else "interruptible"
    times = torch.tensor(costs.cumulative("time", mode), dtype=torch.float64)
    right_KN = recording.quality.bool()
    # the first of equals
    exits_N = torch.where(right_KN, times[:, None], math.inf).argmin(0)
    instead = int(times.argmin()) if when_none_is_right == "cheapest" else len(times) - 1
    exits_N = torch.where(right_KN.any(0), exits_N, instead)
    return exits_N, times[exits_N]
