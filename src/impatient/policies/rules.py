"""Thresholds on how sure an output is, and fitting them to a target.

One raw threshold per exit. A common threshold, or one on calibrated probabilities, costs more for
the same accuracy, since calibration hardly re-ranks the samples of one exit but exits differ in
what a score is worth.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from impatient import checks
from impatient.costs import Cost, CostProfile, Statistic
from impatient.errors import NoEffectWarning, PolicyError
from impatient.policies.policy import (
    Description,
    Policy,
    Recorded,
    check_exits,
    errors_of,
)
from impatient.policies.targets import Target
from impatient.policies.task_policy import TaskPolicy
from impatient.tasks import is_classification, rows
from impatient.tasks.rows import CLOSE, row_of
from impatient.tasks.scores import SCORES
from impatient.tasks.task import AGREEMENT
from impatient.trees import size, take


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdPolicy(TaskPolicy):
    """Stop at the first exit whose score reaches its threshold.

    Attributes:
        score: name of a score of the task; for classes "max_probability", "margin" or "entropy".
        thresholds: one per exit; `inf` closes an exit, so that its head never runs; the last is
            `-inf`.
        cost: what the target's `mean_cost` is in: seconds, multiply-accumulates, bytes or joules.
    """

    score: str
    thresholds: tuple[float, ...]
    cost: Cost = "time"
    # For one sample: the score in plain numbers and in tensors, and the thresholds as tensors of
    # single precision compare with them. None where the score is not ready-made.
    for_one: Any = dataclasses.field(
        default=None, init=False, repr=False, compare=False, metadata={"stored": False}
    )

    def __post_init__(self) -> None:
        if is_classification(self.task):
            checks.one_of(PolicyError, SCORES, score=self.score)
        if not self.thresholds or any(math.isnan(value) for value in self.thresholds):
            raise PolicyError(f"thresholds {self.thresholds} must be numbers, one per exit.")
        if self.thresholds[-1] != -math.inf:
            raise PolicyError(
                f"the last threshold is {self.thresholds[-1]}; expected -inf, since the last exit "
                "always stops."
            )
        if is_classification(self.task) and self.means.scores is SCORES and self.score in SCORES:
            bounds = torch.tensor(self.thresholds, dtype=torch.float32).tolist()
            for_one = rows.SCORES[self.score], SCORES[self.score], bounds
            object.__setattr__(self, "for_one", for_one)

    @property
    def num_exits(self) -> int:
        return len(self.thresholds)

    def looks_at(self, exit: int) -> bool:
        """Whether the exit is open, or the next one compares with it.

        The output of the last exit is always computed.
        """
        return self.thresholds[exit] < math.inf or is_asked(self.score, self.thresholds, exit)

    def for_run(self, samples: int, run: int = 0) -> Policy:  # noqa: ARG002  nothing is drawn
        """Return the rule of one run, which remembers outputs if it compares them."""
        return AgreementRun(self, None) if self.score == AGREEMENT else self

    def stops(
        self,
        exit: int,
        outputs: Float[Tensor, "B *C"] | None = None,
        pooled: Float[Tensor, "B *D"] | None = None,  # noqa: ARG002  scores are of outputs alone
    ) -> Bool[Tensor, "B"]:
        """Which samples are done at this exit."""
        if outputs is None:
            raise PolicyError("thresholds look at outputs; give the outputs of the exit.")
        if exit == self.num_exits - 1:
            return torch.ones(outputs.shape[0], dtype=torch.bool, device=outputs.device)
        if self.score == AGREEMENT:
            raise PolicyError(
                "agreement compares an output with the one before; ask policy.for_run(samples), "
                "which remembers it, once per run."
            )
        return self.means.score(self.score)(outputs) >= self.thresholds[exit]

    def stops_one(self, exit: int, output: Tensor | None, pooled: Tensor | None) -> bool:
        """Tell by plain numbers, if possible, whether the only sample is done."""
        if self.for_one is None or output is None:
            return bool(self.stops(exit, output, pooled))
        plain, score, bounds = self.for_one
        row = row_of(output)
        if row is not None:
            above = plain(row) - self.thresholds[exit]
            # A score that is no number is not above, below or close.
            if above > CLOSE or above < -CLOSE:
                return bool(above > 0.0)
        return bool(score(output).item() >= bounds[exit])

    @classmethod
    def exits_of_each(
        cls, policies: Sequence[Self], recording: Recorded
    ) -> Iterator[Int[Tensor, "N"]]:
        """Give the exits under each of several policies.

        They are read from the recording's tables.
        """
        for policy in policies:
            policy._check_count(len(recording.quality))
            scores = scores_of(recording, policy.score)
            exits = torch.full((len(recording),), policy.num_exits - 1)
            for exit in reversed(range(policy.num_exits - 1)):
                if policy.looks_at(exit):
                    exits[scores[exit] >= policy.thresholds[exit]] = exit
            yield exits

    def described(self, exits: Sequence[str]) -> Description:  # noqa: ARG002  one threshold each
        """Describe the policy in words."""
        words = {math.inf: "closed", -math.inf: "always"}
        rules = tuple(words.get(bound, f"{bound:.4f}") for bound in self.thresholds)
        return Description(looks_at=self.score.replace("_", " "), rules=rules)

    def summary(self) -> str:
        """List the thresholds of the early exits."""
        bounds = self.thresholds[:-1]
        words = ("closed" if bound == math.inf else f"{bound:.3f}" for bound in bounds)
        return f"thresholds: {', '.join(words)}" if bounds else ""

    def shown_score(self) -> str:
        """Return its own score."""
        return self.score

    def portable_rule(self) -> dict[str, Any]:
        """Return score and thresholds, which need no torch."""
        return {"score": self.score, "thresholds": list(self.thresholds)}


def is_asked(score: str, thresholds: Sequence[float], exit: int) -> bool:
    """Tell whether an exit's head runs for a score: it is open, or compared with by the next."""
    if thresholds[exit] < math.inf:
        return True
    # the last exit always answers and is compared with nothing
    return score == AGREEMENT and exit < len(thresholds) - 2 and thresholds[exit + 1] < math.inf


class AgreementRun(Policy):
    """Thresholds on agreement in one run: it remembers the outputs of the exit before.

    Args:
        policy: the thresholds.
        before: outputs of the exit before; None at the first.
    """

    __slots__ = ("_before", "_policy")

    def __init__(self, policy: ThresholdPolicy, before: Any) -> None:
        self._policy = policy
        self._before = before

    @property
    def num_exits(self) -> int:
        return self._policy.num_exits

    def looks_at(self, exit: int) -> bool:
        """Whether the exit is open, or the next one compares with it."""
        return self._policy.looks_at(exit)

    def for_rows(self, rows: Int[Tensor, "R"]) -> Policy:
        """Return the rule for these samples of the batch."""
        return AgreementRun(
            self._policy, None if self._before is None else take(self._before, rows)
        )

    def stops(
        self,
        exit: int,
        outputs: Any = None,
        pooled: Float[Tensor, "B *D"] | None = None,  # noqa: ARG002  it compares outputs alone
    ) -> Bool[Tensor, "B"]:
        """Which samples are done at this exit."""
        before = self._before
        self._before = outputs
        if exit == self.num_exits - 1:
            return torch.ones(size(outputs), dtype=torch.bool)
        bound = self._policy.thresholds[exit]
        if before is None:
            return torch.full((size(outputs),), bound == -math.inf)
        task = self._policy.means
        if task.distance is None:
            raise PolicyError(f"task {task.name!r} has no distance, which agreement needs.")
        return -task.distance(outputs, before).float() >= bound


def scores_of(recording: Recorded, score: str = "") -> Float[Tensor, "K N"]:
    """Return a table of scores.

    By default the task's first.

    Raises:
        PolicyError: if the recording has none of this name.
    """
    if not score:
        return next(iter(recording.scores.values()))
    if score not in recording.scores:
        raise PolicyError(
            f"score={score!r}; the recording of task {recording.task!r} has "
            f"{', '.join(recording.scores)}. Name one of these."
        )
    return recording.scores[score]


def thresholds_for_shares(
    scores_KN: Float[Tensor, "K N"], share_K: Sequence[float]
) -> tuple[float, ...]:
    """Choose thresholds that let a share of all samples leave at each exit.

    The threshold is `inf` where an exit gets none.

    Source:
        MSDNet (Huang et al. 2018), budgeted batch classification.
    Example:
        >>> scores_KN = torch.tensor([[0.9, 0.2, 0.7, 0.4], [0.5, 0.5, 0.5, 0.5]])
        >>> thresholds_for_shares(scores_KN, [0.5, 0.5])
        (0.699999988079071, -inf)
    """
    # samples that have not left yet
    here_N = torch.ones(scores_KN.shape[1], dtype=torch.bool)
    bounds = []
    # the last exit takes what is left
    for scores_N, share in zip(scores_KN[:-1], share_K, strict=False):
        wanted = min(round(share * len(scores_N)), int(here_N.sum()))
        bounds.append(scores_N[here_N].topk(wanted).values[-1].item() if wanted else math.inf)
        here_N &= scores_N < bounds[-1]
    return (*bounds, -math.inf)


# which early heads run -> cumulative cost of each exit
CostOf = Callable[[Sequence[float]], tuple[float, ...]]


def fit_thresholds(
    recording: Recorded,
    costs: CostProfile,
    *,
    mean_time_s: float | None = None,
    mean_macs: float | None = None,
    mean_bytes: float | None = None,
    mean_energy_j: float | None = None,
    max_accuracy_loss: float | None = None,
    cost: Cost | None = None,
    score: str | None = None,
    statistic: Statistic = "mean",
    batch_size: int = 1,
) -> ThresholdPolicy:
    """Fit one threshold per exit to a target on a recording.

    For a range of prices of time (or another cost), thresholds are chosen from the deepest exit to
    the shallowest so that errors plus price times cost are least; MSDNet's geometric exit shares
    are tried beside them. Of all these policies the best that keeps the target on this recording is
    returned.

    Args:
        recording: recording of a split that will not be used to judge the policy; usually
            "validation".
        costs: cost profile of the same network.
        mean_time_s: most accurate policy whose mean time is at most this; or
        mean_macs: most accurate policy with at most so many multiply-accumulates; or
        mean_bytes: most accurate policy that reads and writes at most so many bytes; or
        mean_energy_j: most accurate policy that takes at most so many joules; or
        max_accuracy_loss: cheapest policy that loses at most this much accuracy against the last
            exit (0.01: one point).
        cost: what the cheapest policy is to save: "time" unless said otherwise, "macs", "bytes" or
            "energy".
        score: name of the score that thresholds are on; by default the task's first.
        statistic: which measured number of each stage and head is added up.
        batch_size: batch size at which the costs were measured.
    Returns:
        A policy; its `target` says what was asked for and what was reached here.
    Raises:
        PolicyError: unless exactly one target is given.
        CostError: if the profile does not hold the cost that is asked for.
        InfeasibleTarget: if no policy reaches it, with the reachable range.
    Source:
        The backward recursion is that of Bolukbasi et al. 2017 with thresholds for gates. We
        differ: prices are searched.
    """
    check_exits(PolicyError, recording, costs)
    target = Target.of(
        recording,
        mean_time_s=mean_time_s,
        mean_macs=mean_macs,
        mean_bytes=mean_bytes,
        mean_energy_j=mean_energy_j,
        max_accuracy_loss=max_accuracy_loss,
    )
    score = score or next(iter(recording.scores))
    saved = _TARGETS.get(target.name, cost or "time")
    if cost not in (None, saved):
        raise PolicyError(
            f"{target.name} limits {saved}, but cost={cost!r} was given, which goes with "
            "max_accuracy_loss alone."
        )
    costs.require(saved)

    def cost_of(thresholds: Sequence[float]) -> tuple[float, ...]:
        heads = [is_asked(score, thresholds, exit) for exit in range(len(thresholds))]
        return costs.cumulative(
            saved, "interruptible", statistic=statistic, batch_size=batch_size, heads=heads
        )

    best = target.best(_Search(recording, score, cost_of).candidates(target))
    if not any(best.exits < costs.num_exits - 1):
        warnings.warn(
            f"with {target.name}={target.wanted:g} no sample leaves early: the policy is the last "
            "exit. Allow a larger loss or less time.",
            NoEffectWarning,
            stacklevel=2,
        )
    return ThresholdPolicy(
        score=score,
        thresholds=best.thresholds,
        split=recording.split,
        target={
            target.name: target.wanted,
            "mean_cost": best.mean_time_s,
            "accuracy": best.accuracy,
            "samples": float(len(recording)),
        },
        cost=saved,
        provenance=recording.provenance,
        task=recording.task,
    )


_TARGETS: dict[str, Cost] = {
    "mean_time_s": "time",
    "mean_macs": "macs",
    "mean_bytes": "bytes",
    "mean_energy_j": "energy",
}


@dataclass(frozen=True, slots=True)
class _Candidate:
    thresholds: tuple[float, ...]
    exits: np.ndarray
    # or multiply-accumulates, bytes or joules
    mean_time_s: float
    accuracy: float


class _Search:
    """The thresholds of all prices, on one recording."""

    def __init__(self, recording: Recorded, score: str, cost_of: CostOf) -> None:
        self.scores = scores_of(recording, score).double().numpy()
        self.errors = errors_of(recording).numpy()
        self.cost_of = cost_of
        self.order = np.argsort(-self.scores[:-1], axis=1, kind="stable")
        self.count, self.samples = self.scores.shape

    def candidates(self, target: Target) -> list[_Candidate]:
        """Judge policies over a range of prices, and of shares."""
        whole = self.cost_of([-math.inf] * self.count)[-1]
        prices = [0.0, *np.geomspace(1e-3 / whole, 1e3 / whole, 40)]
        found = [candidate for _, candidate in target.search(self._solve, prices, 20)]
        found += [self._judge(self._by_shares(index / 20)) for index in range(1, 40)]
        for exit in range(self.count):
            bounds = (*(math.inf,) * exit, *(-math.inf,) * (self.count - exit))
            found.append(self._judge(bounds))
        return found

    def _solve(self, price: float, sweeps: int = 3) -> _Candidate:
        """Find thresholds that make errors plus price x cost least.

        They are found backwards, then again for the samples that arrive.
        """
        arrives = np.ones((self.count, self.samples))
        # all exits open at first, so that all are paid
        thresholds = np.full(self.count, -math.inf)
        for _ in range(sweeps):
            risk = self.errors + price * np.asarray(self.cost_of(thresholds.tolist()))[:, None]
            ahead = risk[-1]
            for exit in range(self.count - 2, -1, -1):
                thresholds[exit] = self._threshold(exit, (ahead - risk[exit]) * arrives[exit])
                ahead = np.where(self.scores[exit] >= thresholds[exit], risk[exit], ahead)
            stops = self.scores >= thresholds[:, None]
            arrives[1:] = ~np.logical_or.accumulate(stops, axis=0)[:-1]
        return self._judge(tuple(thresholds.tolist()))

    def _threshold(self, exit: int, gain: np.ndarray) -> float:
        """Find the threshold above which the summed gain of stopping is largest.

        It is inf if stopping never gains.
        """
        order = self.order[exit]
        scores = self.scores[exit][order]
        total = np.cumsum(gain[order])
        # equal scores leave together
        ends = np.append(scores[1:] < scores[:-1], True)
        total = np.where(ends, total, -math.inf)
        best = int(total.argmax())
        if total[best] <= 0.0:
            return math.inf
        below = scores[best + 1] if best + 1 < len(scores) else -math.inf
        # half way to the next score: the least surprising choice for new samples; in float32, as
        # scores are compared in it
        middle = float(np.float32((scores[best] + below) / 2)) if math.isfinite(below) else below
        return middle if middle > below else float(scores[best])

    def _by_shares(self, ratio: float) -> tuple[float, ...]:
        shares = np.power(ratio, np.arange(self.count))
        return thresholds_for_shares(
            torch.from_numpy(self.scores), (shares / shares.sum()).tolist()
        )

    def _judge(self, thresholds: tuple[float, ...]) -> _Candidate:
        stops = self.scores >= np.asarray(thresholds)[:, None]
        stops[-1] = True
        exits = stops.argmax(axis=0)
        used = np.bincount(exits, minlength=self.count) > 0
        # an exit at which no sample leaves is closed, so that its head is not paid
        early = zip(thresholds[:-1], used, strict=False)
        final = (*(bound if is_used else math.inf for bound, is_used in early), -math.inf)
        cost = np.asarray(self.cost_of(final))
        samples = np.arange(self.samples)
        return _Candidate(
            final, exits, float(cost[exits].mean()), 1.0 - float(self.errors[exits, samples].mean())
        )
