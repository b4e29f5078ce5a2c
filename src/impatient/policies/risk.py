"""Policies with a guarantee of how little they lose against the full network.

    fit, calibration = split_recording(validation)
    candidates = scaled_family(fit_thresholds(fit, costs, max_accuracy_loss=0.01))
    controlled = control_risk(candidates, calibration, epsilon=0.01, delta=0.05)
    print(controlled.certificate.statement)

Candidates go from conservative to aggressive, in an order that the calibration split had no part
in. They are tested in this order until the first fails, so that any number of them shares one
probability of error. Before the first stands the full network, which loses nothing. The guarantee
is for new inputs drawn like those of the calibration split, and for no others.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from impatient import checks
from impatient.costs import CostProfile
from impatient.errors import InfeasibleTarget, NoEffectWarning, PolicyError
from impatient.policies.bounds import (
    betting_p_values,
    binomial_p_values,
    conformal_risk_control,
    expected_bound,
    learn_then_test,
    waudby_smith_ramdas_bound,
)
from impatient.policies.outcome import Outcome
from impatient.policies.policy import (
    CombinedPolicy,
    Description,
    Policy,
    Recorded,
    check_policy,
)
from impatient.policies.rules import ThresholdPolicy, scores_of
from impatient.policies.splits import splits_overlap
from impatient.provenance import Provenance
from impatient.store import Stored
from impatient.tasks import Task, is_classification, known
from impatient.tasks.classification import top_of

Loss = Literal["accuracy_gap", "positive_gap", "disagreement"]
Method = Literal["learn_then_test", "upper_confidence", "conformal_risk_control"]


# --- losses ---------------------------------------------------------------------------------------


def exit_losses(recording: Recorded, loss: Loss) -> Float[Tensor, "K N"]:
    """Compute what each exit loses against the full network.

    The full network is the last exit.

    Args:
        recording: qualities; "disagreement" looks at the classes that are answered.
        loss: "accuracy_gap", the full network's quality minus the exit's, in [-1, 1]; for classes
            1[full right] - 1[exit right]; "positive_gap", its positive part, never below it; or
            "disagreement", 1[other classes than the full network's], never below either.
    """
    if loss == "disagreement":
        outputs = recording.logits()
        top = min(top_of(recording.task), outputs.shape[-1])
        answers = outputs.topk(top, dim=-1).indices.sort(-1).values
        return (answers != answers[-1]).any(-1).double()
    quality = recording.quality.double()
    gap = quality[-1] - quality
    return gap.clamp(min=0.0) if loss == "positive_gap" else gap


def policy_losses(
    candidates: Sequence[Policy], recording: Recorded, loss: Loss
) -> Float[Tensor, "J N"]:
    """Compute what each candidate loses on each sample.

    See `exit_losses`.
    """
    losses_KN = exit_losses(recording, loss)
    return losses_KN[_answering(candidates, recording), torch.arange(losses_KN.shape[1])]


def _answering(candidates: Sequence[Policy], recording: Recorded) -> Int[Tensor, "J N"]:
    """Return the exit, or network, that answers under each candidate."""
    kinds = {type(policy) for policy in candidates}
    # the base class asks each policy by itself
    kind = kinds.pop() if len(kinds) == 1 else Policy
    return torch.stack([*kind.exits_of_each(candidates, recording)])


# --- control --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate(Stored, made_by="`impatient fit --delta`"):
    """What a calibration split showed about the policy that was chosen on it.

    Attributes:
        epsilon: the mean loss that is not exceeded: the guarantee.
        delta: probability that it is exceeded, over calibration splits; None where it holds on
            average over them.
        method, loss: the method by which it was shown, and the loss that it limits.
        samples: size of the calibration split.
        split: its name.
        candidates: number of candidates that were given.
        chosen: the index of the one chosen, the most aggressive that passed; None for the full
            network, when none did.
        risk: mean loss of the chosen one on the calibration split.
        bound: what a bound says of the chosen one by itself, at most epsilon. Not a guarantee: of
            many candidates, one was chosen for it.
        quality_name: what the task calls its quality; empty where answers are right or wrong.
        provenance: provenance of the recording.
    """

    epsilon: float
    delta: float | None
    method: Method
    loss: Loss
    samples: int
    split: str
    candidates: int
    chosen: int | None
    risk: float
    bound: float
    quality_name: str = ""
    provenance: Provenance

    @property
    def statement(self) -> str:
        """The guarantee in words."""
        if self.chosen is None:
            return (
                f"None of {self.candidates} candidates could be shown on {self.samples} samples of "
                f"{self.split!r} to keep epsilon={self.epsilon:g}: this is the full network, which "
                "loses nothing and saves no time."
            )
        sure = (
            "On average over calibration splits"
            if self.delta is None
            else f"With probability {100 * (1 - self.delta):g} %"
        )
        said = (_GRADED if self.quality_name else _SAID)[self.loss]
        unit = "points" if self.quality_name else "%"
        found = f"on which it was {100 * self.risk:.3g} {unit}"
        return (
            f"{sure}, {said.format(100 * self.epsilon, self.quality_name)} ({self.method}; "
            f"{self.samples} samples of {self.split!r}, {found})."
        )


_SAID: Mapping[Loss, str] = {
    "accuracy_gap": "accuracy is at most {:g} points below the full network's",
    "positive_gap": (
        "at most {:g} % of inputs are answered wrongly that the full network answers rightly"
    ),
    "disagreement": "at most {:g} % of inputs are answered otherwise than by the full network",
}
# of qualities between 0 and 1, such as the IoU of an image
_GRADED: Mapping[Loss, str] = {
    "accuracy_gap": "the mean {1} is at most {0:g} points below the full network's",
    "positive_gap": (
        "at most {0:g} points of {1} are lost on average against the full network, where inputs on "
        "which more is reached count as no loss"
    ),
    "disagreement": _SAID["disagreement"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlledPolicy(CombinedPolicy):
    """A policy, and the guarantee that it keeps.

    It is run, judged and saved like any other.

    Attributes:
        policy: the candidate chosen. Where candidates have a `split`, it is now the one that holds
            all they were fitted and controlled on, so that it is not judged there. If none passed,
            a policy that lets the full network answer.
        certificate: the guarantee that it keeps.
    """

    policy: Policy
    certificate: Certificate

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The one policy."""
        return (self.policy,)

    def stops(
        self,
        exit: int,
        outputs: Float[Tensor, "B *C"] | None = None,
        pooled: Float[Tensor, "B *D"] | None = None,
    ) -> Bool[Tensor, "B"]:
        """Which samples are done at this exit."""
        return self.policy.stops(exit, outputs, pooled)

    def added_s(self) -> tuple[float, ...]:
        """Per exit, seconds that asking the policy takes until that exit answers."""
        return self.policy.added_s()

    def for_task(self, task: Task) -> ControlledPolicy:
        """Return the policy with the functions of this task."""
        return dataclasses.replace(self, policy=self.policy.for_task(task))

    def for_run(self, samples: int, run: int = 0) -> Policy:
        """Return the policy's own rule of one run."""
        return self.policy.for_run(samples, run)

    def exits_of(
        self, outputs: Float[Tensor, "K N C"], features: Sequence[Tensor] = ()
    ) -> Int[Tensor, "N"]:
        """Return the exit that answers each recorded sample."""
        return self.policy.exits_of(outputs, features)

    def exits_on(self, recording: Recorded) -> Int[Tensor, "N"]:
        """Return the exit that answers each sample of a recording."""
        return self.policy.exits_on(recording)

    def outcome(self, recording: Recorded, costs: CostProfile, **which: Any) -> Outcome:
        """Apply it to a recording, as `Policy.outcome` says."""
        return self.policy.outcome(recording, costs, **which)

    def described(self, exits: Sequence[str]) -> Description:
        """Describe the policy in words."""
        return self.policy.described(exits)

    def shown_score(self) -> str:
        """Return the name of the score by which answers are shown."""
        return self.policy.shown_score()

    def portable_rule(self) -> dict[str, Any]:
        """Return what an exported network needs to stop without torch."""
        return self.policy.portable_rule()


def control_risk(
    candidates: Sequence[Policy],
    recording: Recorded,
    *,
    epsilon: float,
    delta: float = 0.05,
    method: Method = "learn_then_test",
    loss: Loss = "positive_gap",
) -> ControlledPolicy:
    """Choose the most aggressive candidate that loses at most epsilon.

    The loss is measured against the full network.

    Args:
        candidates: policies from conservative to aggressive: `threshold_family`, `scaled_family`,
            or gates or selections fitted to rising prices of time.
        recording: recording of the calibration split, on which neither the network nor a candidate
            was fitted; see `split_recording`.
        epsilon: most mean loss, 0.01 for one point or one per cent.
        delta: probability that it is exceeded all the same; "conformal_risk_control" ignores it.
        method: "learn_then_test", exact binomial tails for losses of 0 and 1 and betting for
            "accuracy_gap"; "upper_confidence", betting for all; or "conformal_risk_control", which
            holds on average over splits only.
        loss: what is kept: "accuracy_gap", "positive_gap" or "disagreement", each below the next;
            see `exit_losses`.
    Returns:
        The policy and its certificate. Where no candidate passes, the full network, with a
        NoEffectWarning.
    Raises:
        InfeasibleTarget: if the split is too small for any candidate to pass, with the size needed.
        PolicyError: if a candidate was fitted on this split, or the candidates go from aggressive
            to conservative.
        StaleInput: if a candidate belongs to other weights.
    Source:
        Risk control for early exits: Jazbec et al. 2024 (Fast yet Safe); Schuster et al. 2022
            (CALM).
    """
    _check_request(epsilon, delta, method, loss)
    if not candidates:
        raise PolicyError(
            "no candidates; expected at least one, such as those of threshold_family."
        )
    for index, policy in enumerate(candidates):
        check_policy(policy)
        _check_fitted_elsewhere(index, policy, recording)
    samples = len(recording)
    # graded qualities need bets; the exact tail is for losses of 0 and 1
    bets = loss == "accuracy_gap" or (
        loss == "positive_gap" and not is_classification(recording.task)
    )
    certify = functools.partial(_certified, epsilon=epsilon, delta=delta, method=method, bets=bets)
    if not certify(torch.zeros(1, samples, dtype=torch.float64)).all():
        needed = _needed(certify)
        raise InfeasibleTarget(
            f"{samples} samples of {recording.split!r} are too few: even a policy that never loses "
            f"could not be shown to keep epsilon={epsilon:g} with delta={delta:g} by {method}. "
            f"Expected at least {needed} samples, or a larger epsilon."
        )
    _check_order(candidates, recording)
    # bets need an order that says nothing
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    losses_JN = policy_losses(candidates, recording, loss)[:, order]
    chosen = int(certify(losses_JN).sum()) - 1
    certificate = Certificate(
        epsilon=epsilon,
        delta=None if method == "conformal_risk_control" else delta,
        method=method,
        loss=loss,
        samples=samples,
        split=recording.split,
        candidates=len(candidates),
        chosen=None if chosen < 0 else chosen,
        risk=0.0 if chosen < 0 else float(losses_JN[chosen].mean()),
        bound=0.0 if chosen < 0 else _bound(losses_JN[: chosen + 1], epsilon, delta, method, bets),
        quality_name=_graded_name(recording.task),
        provenance=recording.provenance,
    )
    if chosen < 0:
        warnings.warn(
            f"{certificate.statement} Give more conservative candidates, or more samples.",
            NoEffectWarning,
            stacklevel=2,
        )
        full = candidates[0].full_network() or _full_network(recording)
        return ControlledPolicy(policy=full, certificate=certificate)
    return ControlledPolicy(policy=_marked(candidates[chosen], recording), certificate=certificate)


def samples_needed(
    *,
    epsilon: float,
    delta: float = 0.05,
    method: Method = "learn_then_test",
    loss: Loss = "positive_gap",
) -> int:
    """Compute the size of the smallest calibration split of any use.

    On it a candidate that never loses passes; one that loses needs more.

    Arguments are as for `control_risk`.

    Example:
        >>> bounded = samples_needed(epsilon=0.01, method="conformal_risk_control")
        >>> samples_needed(epsilon=0.01, delta=0.05), bounded
        (299, 99)
    """
    _check_request(epsilon, delta, method, loss)
    bets = loss == "accuracy_gap"
    return _needed(
        functools.partial(_certified, epsilon=epsilon, delta=delta, method=method, bets=bets)
    )


def _needed(certify: Callable[[Tensor], Tensor]) -> int:
    """Find the least number of samples on which a policy that never loses passes."""

    def enough(samples: int) -> bool:
        return bool(certify(torch.zeros(1, samples, dtype=torch.float64)).all())

    high = 1
    while not enough(high):
        high *= 2
    # half of it is not enough
    return bisect.bisect_left(range(high), True, lo=high // 2 + 1, key=enough)


def _certified(
    losses_JN: Float[Tensor, "J N"], *, epsilon: float, delta: float, method: Method, bets: bool
) -> Bool[Tensor, "J"]:
    if method == "conformal_risk_control":
        return conformal_risk_control(losses_JN, epsilon=epsilon)
    signed = functools.partial(betting_p_values, delta=delta)
    tails = signed if bets or method == "upper_confidence" else binomial_p_values
    return learn_then_test(losses_JN, epsilon=epsilon, delta=delta, p_values=tails)


def _graded_name(task: str) -> str:
    """Return what a task calls its quality, or nothing where answers are right or wrong."""
    if task.partition(":")[0] in ("classification", "binary"):
        return ""
    meaning = known(task)
    return meaning.quality_name if meaning else "quality"


def _bound(
    losses_JN: Float[Tensor, "J N"], epsilon: float, delta: float, method: Method, bets: bool
) -> float:
    """Bound the loss of the last of these candidates, which have passed the method's test."""
    if method == "conformal_risk_control":
        return float(expected_bound(losses_JN)[-1])
    if bets or method == "upper_confidence":
        # other stakes than those of the test, which bets against epsilon alone
        return min(epsilon, float(waudby_smith_ramdas_bound(losses_JN[-1], delta)))
    lost = int(losses_JN[-1].sum())
    samples = losses_JN.shape[1]
    # Clopper and Pearson
    from scipy.special import betaincinv

    return 1.0 if lost == samples else float(betaincinv(lost + 1, samples - lost, 1 - delta))


def _check_request(epsilon: float, delta: float, method: str, loss: str) -> None:
    checks.true_share(PolicyError, epsilon=epsilon, delta=delta)
    checks.one_of(PolicyError, Method, method=method)
    checks.one_of(PolicyError, Loss, loss=loss)


def _check_fitted_elsewhere(index: int, policy: Policy, recording: Recorded) -> None:
    made = policy.provenance
    split = policy.split
    if made is not None:
        made.require(f"candidate {index}", "fit it again", weights=recording.provenance.weights)
    if split is None or not splits_overlap(split, recording.split):
        return
    if made is None or made.data == recording.provenance.data:
        raise PolicyError(
            f"candidate {index} was fitted on {split!r}, which shares samples with the calibration "
            f"split {recording.split!r}: nothing could be guaranteed. Fit on one part of "
            "split_recording(recording), and control on the other."
        )


def _check_order(candidates: Sequence[Policy], recording: Recorded) -> None:
    first, last = _answering([candidates[0], candidates[-1]], recording).double().mean(1).tolist()
    # networks need not be in an order of their own
    if first < last and not candidates[0].routes:
        raise PolicyError(
            f"the first candidate stops at exit {first:.2f} on average, the last at {last:.2f}: "
            "they go from aggressive to conservative. Give them from conservative to aggressive, "
            "such as candidates[::-1]."
        )


def _full_network(recording: Recorded) -> ThresholdPolicy:
    closed = (math.inf,) * (len(recording.quality) - 1)
    return ThresholdPolicy(
        score=next(iter(recording.scores)),
        thresholds=(*closed, -math.inf),
        provenance=recording.provenance,
        task=recording.task,
    )


def _marked(policy: Policy, recording: Recorded) -> Policy:
    """Mark the policy with the split of all its data.

    That split holds all it was fitted and controlled on.
    """
    pairs = zip((policy.split or "").split("/"), recording.split.split("/"), strict=False)
    whole = "/".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return policy.marked(split=whole or recording.split, provenance=recording.provenance)


# --- candidates -----------------------------------------------------------------------------------


def threshold_family(
    base: int | Recorded,
    *,
    score: str | None = None,
    grid: Sequence[float] | None = None,
) -> tuple[ThresholdPolicy, ...]:
    """Make policies of one threshold each, from conservative to aggressive.

    That is from high to low thresholds; each is the same at all exits.

    Args:
        base: the number of exits; or a recording, not the calibration split, whose scores give the
            grid.
        score: name of the score; by default the task's first, or "max_probability".
        grid: thresholds, in any order; by default 1, 0.99 ... 0, or the percentiles of the
            recording's scores before the last
            exit, which are finer where scores crowd: near 1, in most networks.
    Returns:
        Policies without repeated thresholds; fitted on the recording's split if the grid came from
        it.
    Example:
        >>> [policy.thresholds for policy in threshold_family(2, grid=[0.5, 0.9])]
        [(0.9, -inf), (0.5, -inf)]
    """
    exits = base if isinstance(base, int) else len(base.quality)
    task = "classification" if isinstance(base, int) else base.task
    if score is None:
        score = "max_probability" if isinstance(base, int) else next(iter(base.scores))
    split = None
    made = None
    if grid is None:
        grid = np.linspace(1.0, 0.0, 101).tolist()
        if not isinstance(base, int):
            scores = scores_of(base, score)[:-1]
            grid = np.quantile(scores.double().numpy(), grid).tolist()
            split = base.split
            made = base.provenance
    values = sorted({float(value) for value in grid}, reverse=True)
    return tuple(
        ThresholdPolicy(
            score=score,
            thresholds=(*(value,) * (exits - 1), -math.inf),
            split=split,
            provenance=made,
            task=task,
        )
        for value in values
    )


def scaled_family(
    policy: ThresholdPolicy, grid: Sequence[float] | None = None
) -> tuple[ThresholdPolicy, ...]:
    """Make a fitted policy more conservative and more aggressive.

    The distance of its thresholds to certainty is multiplied by many factors.

    Args:
        policy: fitted on another split than the one to control on. Closed exits stay closed.
        grid: factors, at least 0, in any order; 1 is the policy itself, 0 lets out only samples of
            score 1. By default 0 and 64 from 1/64 to 4, 1 among them.
    Returns:
        Policies from conservative to aggressive, which is from small to large factors.
    Raises:
        PolicyError: if a factor is negative or not finite.
    Example:
        >>> base = ThresholdPolicy(score="margin", thresholds=(0.75, 0.5, -math.inf))
        >>> [family.thresholds for family in scaled_family(base, [1.0, 0.5])]
        [(0.875, 0.75, -inf), (0.75, 0.5, -inf)]
    """
    # 1/64 to 1 in 49 steps, 1 to 4 in 16, so that 1 is among them exactly
    default = (0.0, *np.geomspace(1 / 64, 1, 49).tolist(), *np.geomspace(1, 4, 16).tolist())
    factors = sorted({float(value) for value in (default if grid is None else grid)})
    if not all(0 <= factor < math.inf for factor in factors):
        raise PolicyError(
            f"factors from {factors[0]} to {factors[-1]}; expected finite ones, at least 0."
        )

    def scaled(bound: float, factor: float) -> float:
        if factor == 1 or bound == math.inf:
            return bound
        return 1 - (1 - bound) * factor if factor > 0 else 1.0

    return tuple(
        dataclasses.replace(
            policy,
            thresholds=(*(scaled(bound, factor) for bound in policy.thresholds[:-1]), -math.inf),
            target={},
        )
        for factor in factors
    )
