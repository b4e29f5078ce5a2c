"""Mix two policies at random, for any mean time between theirs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from impatient import checks
from impatient.costs import CostProfile
from impatient.errors import InfeasibleTarget, PolicyError
from impatient.policies.outcome import Outcome
from impatient.policies.policy import STOP, CombinedPolicy, Description, Policy, Recorded, hits_of
from impatient.policies.targets import Reached
from impatient.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DrawnPolicy(CombinedPolicy):
    """Two policies, and which samples of one batch follow which.

    Attributes:
        fast: followed by the samples that were not drawn.
        slow: followed by the samples that were.
        is_slow: per sample of the batch, whether it was drawn.
    """

    fast: Policy
    slow: Policy
    is_slow: Bool[Tensor, "B"]

    @property
    def parts(self) -> tuple[Policy, ...]:
        """Both policies."""
        return (self.fast, self.slow)

    @property
    def asked(self) -> tuple[Policy, ...]:
        """The policies that some sample follows."""
        return tuple(policy for policy, _ in self._followed())

    def stops(
        self,
        exit: int,
        outputs: Float[Tensor, "B *C"] | None = None,
        pooled: Float[Tensor, "B *D"] | None = None,
    ) -> Bool[Tensor, "B"]:
        """Which samples are done at this exit."""
        stops = torch.zeros_like(self.is_slow)
        for policy, mine in self._followed():
            if policy.looks_at(exit):
                stops |= mine & policy.stops(exit, outputs, pooled).to(mine.device)
        given = outputs if outputs is not None else pooled
        return stops if given is None else stops.to(given.device)

    def for_rows(self, rows: Int[Tensor, "R"]) -> Self:
        """Return the rule for these samples of the batch."""
        return dataclasses.replace(
            self,
            fast=self.fast.for_rows(rows),
            slow=self.slow.for_rows(rows),
            is_slow=self.is_slow[rows.to(self.is_slow.device)],
        )

    def sees(self, node: int) -> tuple[int, ...]:
        """Return the networks whose outputs are needed to decide at this one."""
        seen = {known for policy, _ in self._followed() for known in policy.sees(node) or (node,)}
        return tuple(sorted(seen))

    def next_node(
        self,
        node: int,
        outputs: Mapping[int, Float[Tensor, "B C"]],
        pooled: Float[Tensor, "B D"] | None = None,
    ) -> Int[Tensor, "B"]:
        """Where samples that have run a network of a cascade go from there."""
        some = next(iter(outputs.values()))
        going = torch.full((len(some),), STOP, dtype=torch.long, device=some.device)
        for policy, mine in self._followed():
            rows = mine.nonzero()[:, 0].to(some.device)
            seen = {known: output[rows] for known, output in outputs.items()}
            features = None if pooled is None else pooled[rows]
            going[rows] = policy.for_rows(rows).next_node(node, seen, features).to(some.device)
        return going

    def exits_of(
        self, outputs: Float[Tensor, "K N C"], features: Sequence[Tensor] = ()
    ) -> Int[Tensor, "N"]:
        """Return the exit that answers each recorded sample."""
        fast, slow = (policy.exits_of(outputs, features) for policy in (self.fast, self.slow))
        return torch.where(self.is_slow, slow, fast)

    def exits_on(self, recording: Recorded) -> Int[Tensor, "N"]:
        """Return the exit that answers each sample of a recording."""
        fast, slow = (policy.exits_on(recording) for policy in (self.fast, self.slow))
        return torch.where(self.is_slow, slow, fast)

    def outcome(self, recording: Recorded, costs: CostProfile, **which: Any) -> Outcome:
        """Apply it to a recording, as `Policy.outcome` says."""
        fast, slow = (
            policy.outcome(recording, costs, **which) for policy in (self.fast, self.slow)
        )
        return fast.where(self.is_slow, slow)

    def described(self, exits: Sequence[str]) -> Description:
        """Describe the policy in words."""
        return _described(float(self.is_slow.double().mean()), exits)

    def _followed(self) -> list[tuple[Policy, Tensor]]:
        pairs = [(self.fast, ~self.is_slow), (self.slow, self.is_slow)]
        return [(policy, mine) for policy, mine in pairs if bool(mine.any())]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixedPolicy(CombinedPolicy):
    """One of two policies for each sample, drawn before its run.

    The policies may be of any kinds; the coin is seeded.

    The sample keeps its policy through all exits. Give a mixture of mixtures seeds of their own, or
    their coins fall alike.

    Attributes:
        fast: the policy of the samples that the coin does not choose.
        slow: the policy of the samples that it chooses.
        share: probability of `slow`.
        seed: seed of the coin.
    """

    fast: Policy
    slow: Policy
    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        checks.share(PolicyError, share=self.share)
        if self.fast.num_exits != self.slow.num_exits:
            raise PolicyError(
                f"policies for {self.fast.num_exits} and {self.slow.num_exits} exits cannot be "
                "mixed."
            )

    @property
    def parts(self) -> tuple[Policy, ...]:
        """Both policies."""
        return (self.fast, self.slow)

    def drawn(self, samples: int, run: int = 0) -> Bool[Tensor, "N"]:
        """Which samples of a run follow `slow`.

        The same for the same seed, run and number of samples.
        """
        coin = torch.Generator().manual_seed(self.seed * 1_000_003 + run)
        return torch.rand(samples, generator=coin) < self.share

    def for_task(self, task: Task) -> MixedPolicy:
        """Return the policy with the functions of this task."""
        return dataclasses.replace(
            self, fast=self.fast.for_task(task), slow=self.slow.for_task(task)
        )

    def for_run(self, samples: int, run: int = 0) -> DrawnPolicy:
        """Draw the samples of one run, so that all exits agree on them."""
        return DrawnPolicy(
            fast=self.fast.for_run(samples, run),
            slow=self.slow.for_run(samples, run),
            is_slow=self.drawn(samples, run),
        )

    def stops(
        self,
        exit: int,
        outputs: Float[Tensor, "B *C"] | None = None,
        pooled: Float[Tensor, "B *D"] | None = None,
    ) -> Bool[Tensor, "B"]:
        """Which samples of run 0 are done at this exit."""
        given = outputs if outputs is not None else pooled
        if given is None:
            raise PolicyError("give stops the outputs of the exit, its pooled features, or both.")
        return self.for_run(len(given)).stops(exit, outputs, pooled)

    def exits_of(
        self, outputs: Float[Tensor, "K N C"], features: Sequence[Tensor] = ()
    ) -> Int[Tensor, "N"]:
        """Return the exit that answers each recorded sample, in run 0."""
        return self.for_run(outputs.shape[1]).exits_of(outputs, features)

    def exits_on(self, recording: Recorded) -> Int[Tensor, "N"]:
        """Return the exit that answers each sample of a recording, in run 0."""
        return self.for_run(len(recording)).exits_on(recording)

    def outcome(self, recording: Recorded, costs: CostProfile, **which: Any) -> Outcome:
        """Apply it to a recording in run 0, as `Policy.outcome` says."""
        return self.for_run(len(recording)).outcome(recording, costs, **which)

    def described(self, exits: Sequence[str]) -> Description:
        """Describe the policy in words."""
        return _described(self.share, exits)


def _described(share: float, exits: Sequence[str]) -> Description:
    rules = [f"{share:.0%} follow the slower policy", *[""] * (len(exits) - 1)]
    return Description(looks_at="a draw, and either policy", rules=tuple(rules))


# --- curves ---------------------------------------------------------------------------------------


class Point(Reached, Protocol):
    """One point of a curve: a policy, and its results when fitted."""

    @property
    def policy(self) -> Policy: ...


SomePoint = TypeVar("SomePoint", bound=Point)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyPoint:
    """A policy of any kind, and what it does on a recording."""

    policy: Policy
    mean_time_s: float
    accuracy: float

    @classmethod
    def of(cls, policy: Policy, recording: Recorded, costs: CostProfile) -> Self:
        """Judge a policy on a recording, so that `mix` can take it.

        Example:
            points = [PolicyPoint.of(policy, recording, costs) for policy in thresholds]
        """
        done = policy.outcome(recording, costs)
        return cls(
            policy=policy,
            mean_time_s=float(done.contract_s.mean()),
            accuracy=float(hits_of(recording, done.exits).double().mean()),
        )


def hull_of(times_s: Sequence[float], accuracies: Sequence[float]) -> tuple[int, ...]:
    """Find the points on the upper hull of accuracy over time.

    They go from the fastest to the first of the most accurate.

    Mixing two of them at random reaches every point between, and no mixture of all the points is
    better.

    Example:
        >>> hull_of([1.0, 2.0, 3.0, 4.0], [0.5, 0.6, 0.9, 0.9])
        (0, 2)
    """
    order = sorted(range(len(times_s)), key=lambda point: (times_s[point], -accuracies[point]))
    hull: list[int] = []
    for point in order:
        if hull and accuracies[point] <= accuracies[hull[-1]]:
            continue
        while len(hull) > 1 and _below_line(hull[-2], hull[-1], point, times_s, accuracies):
            hull.pop()
        hull.append(point)
    return tuple(hull)


def _below_line(
    first: int, middle: int, last: int, times_s: Sequence[float], accuracies: Sequence[float]
) -> bool:
    rise = accuracies[last] - accuracies[first]
    run = times_s[last] - times_s[first]
    return (accuracies[middle] - accuracies[first]) * run <= rise * (
        times_s[middle] - times_s[first]
    )


def lower_hull(points: Sequence[SomePoint]) -> tuple[SomePoint, ...]:
    """Keep the points of a sweep that are worth having.

    They are the lower hull of error over mean time, the fastest first.
    """
    kept = hull_of([point.mean_time_s for point in points], [point.accuracy for point in points])
    return tuple(points[index] for index in kept)


def neighbours(
    times_s: Sequence[float], accuracies: Sequence[float], mean_time_s: float
) -> tuple[int, int, float]:
    """Find the two neighbours on the hull around a mean time.

    The third number is the share of the slower one with which the time is met in expectation.

    More time than the most accurate one needs is not used.

    Raises:
        InfeasibleTarget: if even the fastest takes longer.
    """
    hull = hull_of(times_s, accuracies)
    if not hull or not mean_time_s >= times_s[hull[0]]:
        least = f"{times_s[hull[0]]:g} s" if hull else "unknown: there is no policy"
        raise InfeasibleTarget(
            f"mean_time_s={mean_time_s:g} cannot be reached: the fastest takes {least}. Ask for "
            "more."
        )
    for fast, slow in itertools.pairwise(hull):
        if mean_time_s < times_s[slow]:
            return fast, slow, (mean_time_s - times_s[fast]) / (times_s[slow] - times_s[fast])
    return hull[-1], hull[-1], 1.0


def mix(points: Sequence[Point], *, mean_time_s: float, seed: int = 0) -> MixedPolicy:
    """Mix two policies of a curve to meet a mean time.

    The mixture's expected mean time is exactly what is allowed.

    No mixture of the curve's policies is more accurate on the split they were fitted on.

    Args:
        points: points of `sweep_gates` or `sweep_selection`, or a `PolicyPoint` of any policy.
        mean_time_s: allowed. If it is more than the most accurate policy takes, that policy is
            given alone.
        seed: seed of the mixture's coin.
    Raises:
        InfeasibleTarget: if even the fastest takes longer.
    """
    times = [point.mean_time_s for point in points]
    accuracies = [point.accuracy for point in points]
    fast, slow, share = neighbours(times, accuracies, mean_time_s)
    return MixedPolicy(fast=points[fast].policy, slow=points[slow].policy, share=share, seed=seed)
