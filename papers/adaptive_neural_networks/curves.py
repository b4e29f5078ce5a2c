"""Curves of accuracy over mean time, and figures read from them.

Policies are fitted on one part of the samples and judged on another.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from impatient import Recording
from impatient.errors import NoEffectWarning
from impatient.policies import control_risk
from impatient.policies.mixing import hull_of
from impatient.policies.risk import Loss, policy_losses
from papers.adaptive_neural_networks.recipe import Judging, taken

# what guarantees are about
LOSSES: tuple[Loss, ...] = ("positive_gap", "accuracy_gap")


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """A policy with its time and accuracy.

    Mean seconds and accuracy are those on the part it was fitted on. Seconds and hits are those of
    each sample it is judged on.
    """

    fit_s: float
    fit_accuracy: float
    seconds: Tensor
    hits: Tensor

    @property
    def mean_s(self) -> float:
        return float(self.seconds.mean())

    @property
    def accuracy(self) -> float:
        return float(self.hits.mean())


def point_of(fit: tuple[Tensor, Tensor], judged: tuple[Tensor, Tensor]) -> Point:
    """From seconds and hits of each sample on both parts."""
    fit_s, fit_hits = (values.double().mean().item() for values in fit)
    return Point(fit_s, fit_hits, judged[0].double(), judged[1].double())


def on_hull(points: Sequence[Point]) -> list[Point]:
    """Return the policies worth mixing on the part they were fitted on, fastest first."""
    kept = hull_of([point.fit_s for point in points], [point.fit_accuracy for point in points])
    return [points[place] for place in kept]


def least_time(curve: Sequence[Point], accuracy: float, *, mixed: bool = True) -> float:
    """Return the least mean seconds at which a curve reaches an accuracy.

    Both count on the part that is judged. The time is infinite if the curve never reaches it.

    Args:
        curve: of `on_hull`; neighbours are mixed.
        mixed: whether they may be.
    """
    reached = [point.mean_s for point in curve if point.accuracy >= accuracy - 1e-12]
    for before, after in itertools.pairwise(curve) if mixed else ():
        low = before.accuracy
        high = after.accuracy
        if (low - accuracy) * (high - accuracy) < 0:
            share = (accuracy - low) / (high - low)
            reached.append(before.mean_s + share * (after.mean_s - before.mean_s))
    return min(reached, default=math.inf)


def asked_for(curve: Sequence[Point], accuracy: float) -> tuple[Tensor, Tensor]:
    """Evaluate, on another part, the mixture that was fitted to reach an accuracy.

    Returns:
        Expected seconds and hits of each sample that is judged on.
    """
    for before, after in itertools.pairwise(curve):
        if before.fit_accuracy <= accuracy < after.fit_accuracy:
            share = (accuracy - before.fit_accuracy) / (after.fit_accuracy - before.fit_accuracy)
            return torch.lerp(before.seconds, after.seconds, share), torch.lerp(
                before.hits, after.hits, share
            )
    only = curve[0] if accuracy < curve[0].fit_accuracy else curve[-1]
    return only.seconds, only.hits


def interval_half(values: Tensor) -> float:
    """Half of the 95 % interval of a mean, over samples."""
    return 1.96 * float(values.std()) / math.sqrt(len(values))


def read_off(
    method: str,
    points: Sequence[Point],
    full: Point,
    losses: Sequence[float],
    *,
    mixed: bool = True,
) -> list[dict[str, Any]]:
    """Make a row for each loss of accuracy against the full network.

    A row has the least time, and the result of asking for this accuracy on the part fitted on.

    Args:
        points: of one method; the full network alone is always allowed, too.
        full: that network.
        losses: of accuracy, 0.01 for one point.
        mixed: whether neighbours on the hull may be mixed at random.
    """
    curve = on_hull([*points, full])
    rows = []
    for loss in losses:
        seconds, hits = (
            asked_for(curve, full.fit_accuracy - loss)
            if mixed
            else _fastest(curve, full.fit_accuracy - loss)
        )
        lost = full.hits - hits
        rows.append(
            {
                "method": method,
                "loss": loss,
                "s": min(full.mean_s, least_time(curve, full.accuracy - loss, mixed=mixed)),
                "full_s": full.mean_s,
                "asked_s": float(seconds.mean()),
                "asked_s_half": interval_half(seconds),
                "asked_lost": float(lost.mean()),
                "asked_lost_half": interval_half(lost),
            }
        )
    return rows


def _fastest(curve: Sequence[Point], accuracy: float) -> tuple[Tensor, Tensor]:
    best = min(
        (point for point in curve if point.fit_accuracy >= accuracy - 1e-12),
        key=lambda point: point.fit_s,
    )
    return best.seconds, best.hits


def drawn_curve(method: str, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the curve on the part it is judged on, for the figure."""
    return [
        {"method": method, "s": point.mean_s, "accuracy": point.accuracy}
        for point in on_hull(points)
    ]


def least_knowing(right: Tensor, node_s: Sequence[float], accuracy: float) -> float:
    """Return the least mean seconds that reach an accuracy if all labels are known.

    This is a limit and not a policy.

    Everyone is answered as cheaply as can be; of those who could be answered rightly for more, as
    many as are needed are, the cheapest first.

    Args:
        right: [K, N], which networks or exits are right.
        node_s: seconds of being answered by each.
        accuracy: needed.
    Returns:
        Infinite if even all that can be right are too few.
    Example:
        >>> right = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]])
        >>> least_knowing(right, [1.0, 2.0, 5.0], 0.5)
        1.25
    """
    cost = torch.tensor(node_s, dtype=torch.float64)
    count = right.shape[1]
    cheapest = int(cost.argmin())
    extra = (
        torch.where(right.bool(), cost[:, None] - cost[cheapest], math.inf).amin(0).sort().values
    )
    needed = math.ceil(accuracy * count - 1e-9)
    if needed > int(torch.isfinite(extra).sum()):
        return math.inf
    return float(cost[cheapest] + extra[:needed].sum() / count)


def guarantees(
    family: str,
    policies: Sequence[tuple[Any, float]],
    full_s: float,
    population: Recording,
    how: Judging,
    seed: int,
) -> list[dict[str, Any]]:
    """Measure how often a guarantee is broken, for each kind of loss.

    The truth is known, because calibration samples are drawn with replacement from a population.

    Args:
        family: name of the kind of policies.
        policies: policies from conservative to aggressive, not fitted on the population, each with
            its mean seconds there.
        full_s: seconds of the full network.
        population: recording whose mean is the truth.
        how: sizes of the draws, and the guarantee that is asked for.
        seed: seed of the draws.
    """
    candidates = [policy for policy, _ in policies]
    rows = []
    for loss in LOSSES:
        truth = policy_losses(candidates, population, loss).mean(1).tolist()
        random = torch.Generator().manual_seed(seed)
        chosen: list[int | None] = []
        for _ in range(how.draws):
            places = torch.randint(len(population.labels), (how.calibration,), generator=random)
            with warnings.catch_warnings():
                # If no policy passes, the full network answers, which is counted below.
                warnings.simplefilter("ignore", NoEffectWarning)
                controlled = control_risk(
                    candidates,
                    taken(population, places),
                    epsilon=how.epsilon,
                    delta=how.delta,
                    loss=loss,
                )
            chosen.append(controlled.certificate.chosen)
        risks = [0.0 if place is None else truth[place] for place in chosen]
        times = [full_s if place is None else policies[place][1] for place in chosen]
        rows.append(
            {
                "policies": family,
                "loss": loss,
                "epsilon": how.epsilon,
                "delta": how.delta,
                "calibration": how.calibration,
                "draws": how.draws,
                "violations": sum(risk > how.epsilon for risk in risks),
                "none": chosen.count(None),
                "risk": sum(risks) / len(risks),
                "s": sum(times) / len(times),
                "full_s": full_s,
            }
        )
    return rows


def share_of_saving(full_s: float, own_s: float, oracle_s: float) -> float:
    """How much of the time that the oracle saves is saved."""
    return (full_s - own_s) / (full_s - oracle_s) if full_s > oracle_s else math.nan


Row = Mapping[str, Any]
