"""Judge thousands of policies or budgets on one recording at once.

The numbers are those of `evaluate`, without its intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from impatient.budgets import Budget, exit_weights_many
from impatient.costs import CostProfile, Statistic
from impatient.errors import RecordingError
from impatient.evaluation.evaluate import check_judged
from impatient.evaluation.recording import Recording
from impatient.policies.policy import check_exits
from impatient.policies.rules import ThresholdPolicy


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyOutcomes:
    """Results of P policies on one recording.

    Entry p is row p of `evaluate`.

    Attributes:
        accuracy: share of right answers.
        interruptible_s: mean seconds per sample when every head on the way runs.
        contract_s: mean seconds when only the heads that are looked at run.
        macs: mean multiply-accumulates per sample, likewise.
        shares: share of the samples answered by each exit.
    """

    accuracy: Float[Tensor, "P"]
    interruptible_s: Float[Tensor, "P"]
    contract_s: Float[Tensor, "P"]
    macs: Float[Tensor, "P"]
    shares: Float[Tensor, "P K"]

    def __len__(self) -> int:
        return len(self.accuracy)


def expected_accuracies(
    recording: Recording | Float[Tensor, "K N"],
    costs_s: Sequence[float],
    budgets: Sequence[Budget],
    *,
    without_answer: float = 0.0,
) -> Float[Tensor, "B"]:
    """Compute the accuracy a caller receives under each of many budgets.

    Args:
        recording: recording of the split to judge on; or `recording.quality`, or any other numbers
            from 0 to 1 per exit and sample.
        costs_s: cumulative cost of each exit, seconds, length K: `costs.interruptible_s()` or
            `costs.contract_s()`. An exit that costs as much as a deeper one is never the answer.
        budgets: B distributions.
        without_answer: accuracy credited to budgets too small for any exit; 0 counts them as
            failures.
    Returns:
        B accuracies, float64; those of the rows "interruptible" and "contract" of `evaluate`.
    Raises:
        RecordingError: if the costs are not as many as the exits.
    Source:
        Impatient DNNs, Table 1's metric.
    Example:
        >>> from impatient.budgets import point, uniform
        >>> hits = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
        >>> expected_accuracies(hits, [2.0, 4.0], [uniform(0.0, 8.0), point(3.0)]).tolist()
        [0.4375, 0.25]
    """
    hits = recording.quality if isinstance(recording, Recording) else recording
    if len(hits) != len(costs_s):
        raise RecordingError(
            f"{len(hits)} exits were recorded, but {len(costs_s)} costs are given; give one cost "
            "per exit."
        )
    weights = torch.from_numpy(exit_weights_many(budgets, costs_s))
    return weights @ hits.double().mean(1) + (1.0 - weights.sum(1)) * without_answer


def judge_policies(
    recording: Recording,
    costs: CostProfile,
    policies: Sequence[ThresholdPolicy],
    *,
    statistic: Statistic = "mean",
    batch_size: int = 1,
) -> PolicyOutcomes:
    """Judge many policies on a recording.

    Scores are computed once for each kind of score, so that a policy costs comparisons alone.

    Args:
        recording: recording of the split to judge on, usually "test".
        costs: cost profile of the same network.
        policies: P of them; their scores may differ.
        statistic: which of the measured times is used.
        batch_size: size of the batches whose times are used.
    Raises:
        SplitReuseError: if a policy was fitted on this very split.
        StaleInput: if a policy was fitted on another network's recording.
        PolicyError, RecordingError: if numbers of exits differ.
    """
    check_exits(RecordingError, recording, costs)
    for index, policy in enumerate(policies):
        check_judged(str(index), policy, recording)
    samples = np.arange(len(recording))
    hits = recording.quality.numpy()
    accuracy = np.zeros(len(policies))
    shares = np.zeros((len(policies), costs.num_exits))
    # until each exit, with the heads that a policy looks at: seconds, multiply-accumulates
    paid = np.zeros((len(policies), 2, costs.num_exits))
    answering = ThresholdPolicy.exits_of_each(policies, recording)
    for row, (policy, answers) in enumerate(zip(policies, answering, strict=True)):
        exits = answers.numpy()
        accuracy[row] = hits[exits, samples].mean(dtype=np.float64)
        shares[row] = np.bincount(exits, minlength=costs.num_exits) / len(samples)
        heads = policy.open_exits()
        contract = costs.cumulative(
            "time", "interruptible", statistic=statistic, batch_size=batch_size, heads=heads
        )
        paid[row] = contract, costs.cumulative("macs", "interruptible", heads=heads)
    every = np.asarray(costs.interruptible_s(statistic=statistic, batch_size=batch_size))
    contract_s, macs = (paid * shares[:, None]).sum(-1).T
    return PolicyOutcomes(
        accuracy=torch.from_numpy(accuracy),
        interruptible_s=torch.from_numpy(shares @ every),
        contract_s=torch.from_numpy(contract_s),
        macs=torch.from_numpy(macs),
        shares=torch.from_numpy(shares),
    )
