"""What learned policies are held against: rules that see no input, one threshold for all exits, and
what labels would allow.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from impatient.costs import CostProfile, Statistic
from impatient.errors import InfeasibleTarget, PolicyError
from impatient.policies.mixing import MixedPolicy, neighbours
from impatient.policies.rules import Recorded, ThresholdPolicy
from impatient.policies.scores import SCORES, ScoreName


def always(exit: int, num_exits: int, recording: Recorded | None = None) -> ThresholdPolicy:
    """Every sample stops at one exit; no other head runs.

    Example:
        >>> always(1, 3).thresholds
        (inf, -inf, -inf)
    """
    if not 0 <= exit < num_exits:
        raise PolicyError(f"exit {exit} of {num_exits}; expected 0 to {num_exits - 1}.")
    thresholds = [math.inf] * num_exits
    thresholds[exit] = thresholds[-1] = -math.inf
    return ThresholdPolicy(
        score="max_probability",
        thresholds=tuple(thresholds),
        split=recording.split if recording else None,
        provenance=recording.provenance if recording else None,
    )


def uniform(
    recording: Recorded,
    costs: CostProfile,
    *,
    mean_time_s: float,
    seed: int = 0,
    statistic: Statistic = "mean",
    batch_size: int = 1,
) -> MixedPolicy:
    """The best random choice of exits that does not look at the input: two exits, mixed to meet the
    mean time.

    Args:
        recording: whose accuracies tell which exits are worth mixing.
        costs: of the same network; only the head that answers is paid.
        mean_time_s: allowed; more than the most accurate exit takes is not used.
        seed: of the coin.
        statistic, batch_size: which measured times are used.
    Raises:
        InfeasibleTarget: if the fastest exit takes longer.
    Source:
        "uniform" in Bolukbasi et al. 2017.
    """
    times = costs.contract_s(statistic=statistic, batch_size=batch_size)
    accuracies = (recording.outputs.argmax(-1) == recording.labels).double().mean(1).tolist()
    *exits, share = neighbours(times, accuracies, mean_time_s)
    fast, slow = (always(exit, len(times), recording) for exit in exits)
    return MixedPolicy(cheap=fast, dear=slow, share=share, seed=seed)


def myopic(
    recording: Recorded,
    costs: CostProfile,
    *,
    time_price: float | None = None,
    mean_time_s: float | None = None,
    max_accuracy_loss: float | None = None,
    score: ScoreName = "max_probability",
    statistic: Statistic = "mean",
    batch_size: int = 1,
) -> ThresholdPolicy:
    """One learned threshold of confidence for all exits, whose heads all run.

    Args:
        recording: of a split that will not be used to judge the policy.
        costs: of the same network.
        time_price: threshold with the least errors plus price times mean seconds; or
        mean_time_s: most accurate threshold whose mean time is at most this; or
        max_accuracy_loss: fastest threshold that loses at most this much accuracy against the last
            exit.
        score: how sure an output is.
        statistic, batch_size: which measured times are used.
    Raises:
        PolicyError: unless exactly one target is given.
        InfeasibleTarget: if no threshold reaches it.
    Source:
        "myopic" in Bolukbasi et al. 2017. We differ: 1,000 quantiles of the scores are tried, and
        never to stop early.
    """
    targets = {
        "time_price": time_price,
        "mean_time_s": mean_time_s,
        "max_accuracy_loss": max_accuracy_loss,
    }
    given = {name: float(value) for name, value in targets.items() if value is not None}
    if len(given) != 1 or not all(value >= 0.0 for value in given.values()):
        raise PolicyError(
            f"give exactly one target of {', '.join(targets)}, not negative; given: "
            f"{given or 'none'}."
        )
    (name, wanted), *_ = given.items()
    scores = SCORES[score](recording.outputs).numpy()
    right = (recording.outputs.argmax(-1) == recording.labels).numpy()
    times = np.array(costs.interruptible_s(statistic=statistic, batch_size=batch_size))
    levels = np.linspace(0.0, 1.0, 1000)
    bounds = (
        np.unique(np.quantile(scores[:-1], levels, method="lower")).tolist()
        if len(scores) > 1
        else []
    )
    tried = []
    for bound in [*bounds, math.inf]:
        stops = scores >= bound
        stops[-1] = True
        exits = stops.argmax(0)
        accuracy = float(right[exits, np.arange(len(exits))].mean())
        mean_s = float(times[exits].mean())
        # never early: no head need run
        if bound == math.inf:
            mean_s = costs.contract_s(statistic=statistic, batch_size=batch_size)[-1]
        tried.append((accuracy, mean_s, bound))
    if name == "time_price":
        best = min(
            tried,
            key=lambda entry: (
                entry[1] if math.isinf(wanted) else wanted * entry[1] - entry[0],
                entry[1],
            ),
        )
    elif name == "mean_time_s":
        feasible = [entry for entry in tried if entry[1] <= wanted]
        if not feasible:
            least = min(entry[1] for entry in tried)
            raise InfeasibleTarget(
                f"mean_time_s={wanted:g} cannot be reached: the first exit takes {least:g} s. Ask "
                "for more."
            )
        best = max(feasible, key=lambda entry: (entry[0], -entry[1]))
    else:
        floor = float(right[-1].mean()) - wanted - 1e-12
        best = min(
            (entry for entry in tried if entry[0] >= floor), key=lambda entry: (entry[1], -entry[0])
        )
    accuracy, mean_s, bound = best
    reached = {"mean_cost": mean_s, "accuracy": accuracy, "samples": float(right.shape[1])}
    return ThresholdPolicy(
        score=score,
        thresholds=(*(bound,) * (len(scores) - 1), -math.inf),
        split=recording.split,
        target={name: wanted, **reached},
        provenance=recording.provenance,
    )


def soft_oracle(
    recording: Recorded,
    costs: CostProfile,
    *,
    when_none_is_right: Literal["cheapest", "last"] = "cheapest",
    pays: Literal["chosen", "path"] = "chosen",
    statistic: Statistic = "mean",
    batch_size: int = 1,
) -> tuple[Int[Tensor, "N"], Float[Tensor, "N"]]:
    """The fastest exit that is right, for each sample: what knowing the labels would allow.

    Args:
        recording: of the split to judge on.
        costs: of the same network.
        when_none_is_right: which exit answers then: the cheapest, or the last, as the full network
            would.
        pays: what an answer costs: the "chosen" exit alone, as if known beforehand, or the "path"
            with all heads on the way.
        statistic, batch_size: which measured times are used.
    Returns:
        The exit of each sample, and its seconds.
    Source:
        "soft oracle" in Bolukbasi et al. 2017, who leave both choices open.
    """
    mode: Literal["contract", "interruptible"] = "contract" if pays == "chosen" else "interruptible"
    times = torch.tensor(
        costs.cumulative_s(mode, statistic=statistic, batch_size=batch_size), dtype=torch.float64
    )
    right_KN = recording.outputs.argmax(-1) == recording.labels
    # the first of equals
    exits_N = torch.where(right_KN, times[:, None], math.inf).argmin(0)
    instead = int(times.argmin()) if when_none_is_right == "cheapest" else len(times) - 1
    exits_N = torch.where(right_KN.any(0), exits_N, instead)
    return exits_N, times[exits_N]
