"""What travels in the page about a network: a recording and its policies, in a few bytes.

Scores become one byte each, by where they stand among the thresholds that the page offers. So what
the page computes for these thresholds is exact: a score passes a threshold as it does in full
precision.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from impatient.costs import CostProfile, Statistic
from impatient.errors import InfeasibleTarget, NoEffectWarning
from impatient.evaluation.recording import Recording
from impatient.policies.policy import Policy
from impatient.policies.risk import ControlledPolicy, control_risk, scaled_family, threshold_family
from impatient.policies.rules import ThresholdPolicy, scores_of

# a byte has so many thresholds below which a score may stand
MOST_THRESHOLDS = 255
# what a closed exit has for a threshold: no score reaches it
CLOSED = 256
# of a larger recording so many bytes travel, which are samples drawn at random
MOST_BYTES = 75_000
# at most so many policies can be turned; others are points
MOST_FAMILIES = 5
# losses against the full network that a page can ask a guarantee for, and how sure it is
LEVELS = (0.005, 0.01, 0.02, 0.05)
DELTA = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Thresholds from bold to careful, of which a dial chooses one.

    Attributes:
        name: name of the policy it is made of, or of what it does.
        steps: its members, from bold to careful.
        words: what each member is called.
        start: index of the member that is shown first.
        fitted: whether the first one shown is a fitted policy.
        certified: for each level in `LEVELS` the index of the boldest member that is shown to keep
            it; its number of members where none does, and None where there are too few samples.
    """

    name: str
    steps: tuple[ThresholdPolicy, ...]
    words: tuple[str, ...]
    start: int
    fitted: bool
    certified: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Payload:
    """A page's data, and which samples of the recording are in it.

    Attributes:
        content: what becomes JSON.
        families: what the dials turn.
        first: name of what the page shows first.
        shown: the policy that stands for it; None if the last exit answers always.
        fitted: whether it is one of the fitted policies.
        rows: indices of the recorded samples that travel.
    """

    content: dict[str, Any]
    families: tuple[Family, ...]
    first: str
    shown: Policy | None
    fitted: bool
    rows: np.ndarray = field(repr=False)


def make_payload(
    recording: Recording,
    costs: CostProfile,
    policies: Mapping[str, Policy],
    keep: Sequence[int] = (),
) -> Payload:
    """Quantise a recording for the thresholds that a page offers.

    Args:
        recording: the recording that the page is about, K exits and N samples.
        costs: cost profile of the same network.
        policies: fitted policies by name.
        keep: samples that travel even where only a part of the recording does.
    Returns:
        The data: qualities, scores of the early exits, families of thresholds, the exits at which
        other policies stop, and times in milliseconds.
    """
    families = tuple(_families(recording, policies))
    turned = {family.name for family in families if family.fitted}
    points = {name: policy for name, policy in policies.items() if name not in turned}
    scores = sorted({family.steps[0].score for family in families})
    exits = len(recording.exits)
    quality = recording.quality.double().numpy()
    bytes_each = (exits - 1) * len(scores) + len(points) + exits / (8 if _are_bits(quality) else 1)
    rows = _chosen_rows(quality.shape[1], int(MOST_BYTES / bytes_each), keep)
    edges = {score: _edges(families, score, exits) for score in scores}
    content = {
        "exits": list(recording.exits),
        "samples": len(rows),
        "recorded": quality.shape[1],
        **_quality(quality[:, rows]),
        "scores": {
            score: packed(
                np.stack(
                    [
                        np.searchsorted(edge, values, side="right")
                        for edge, values in zip(
                            edges[score], _scores(recording, score, rows), strict=True
                        )
                    ]
                )
                if exits > 1
                else np.zeros((0, len(rows)))
            )
            for score in scores
        },
        "families": [_family(family, edges[family.steps[0].score]) for family in families],
        "points": [_point(name, policy, recording, costs, rows) for name, policy in points.items()],
        "times": times(costs),
        "levels": list(LEVELS),
        "delta": DELTA,
    }
    first, shown = _shown_first(families, policies)
    return Payload(
        content=content | {"first": first},
        families=families,
        first=first,
        shown=shown,
        fitted=bool(policies),
        rows=rows,
    )


def _shown_first(
    families: Sequence[Family], policies: Mapping[str, Policy]
) -> tuple[str, Policy | None]:
    """Choose what a page shows before anybody turns a dial: the first policy, if there is one."""
    for name, policy in policies.items():
        return name, policy
    for family in families:
        return family.name, family.steps[family.start]
    return "the last exit", None


def times(costs: CostProfile) -> dict[str, Any]:
    """Return the times of stages and heads at batch size 1, or the smallest, in milliseconds."""
    size = min(costs.batches)

    def parts(statistic: Statistic) -> dict[str, list[float]]:
        stages, heads = costs.parts("time", statistic=statistic, batch_size=size)
        return {"stages": [time * 1e3 for time in stages], "heads": [time * 1e3 for time in heads]}

    wanted: tuple[Statistic, ...] = ("mean", "p50", "p99")
    return {
        **{statistic: parts(statistic) for statistic in wanted},
        "free": costs.exit_free_s(batch_size=size) * 1e3,
        "batch": size,
    }


def until_exits_s(policy: Policy, costs: CostProfile) -> tuple[float, ...]:
    """Return the mean seconds until each exit answers under a policy."""
    until = costs.cumulative(
        "time", "interruptible", batch_size=min(costs.batches), heads=policy.open_exits()
    )
    return tuple(time + asking for time, asking in zip(until, policy.added_s(), strict=True))


def packed(numbers: np.ndarray) -> str:
    """Write whole numbers from 0 to 255 as text, a byte each."""
    return base64.b64encode(numbers.astype(np.uint8).tobytes()).decode("ascii")


# --- families -------------------------------------------------------------------------------------


def _families(recording: Recording, policies: Mapping[str, Policy]) -> Iterable[Family]:
    """Make a family of every policy of thresholds, and one of a common threshold."""
    exits = len(recording.exits)
    if exits < 2:
        return
    plain = {name: _thresholds(policy) for name, policy in policies.items()}
    turned = {name: policy for name, policy in plain.items() if policy is not None}
    turned = dict(list(turned.items())[: MOST_FAMILIES - 1])
    # a common one, and for each policy its members
    count = (MOST_THRESHOLDS - 1) // (len(turned) + 1)
    for name, policy in turned.items():
        yield _scaled(name, policy, recording, min(count, 65))
    score = next(iter(turned.values())).score if turned else _telling_score(recording)
    yield _common(recording, score, min(count, 101))


def _telling_score(recording: Recording) -> str:
    """Choose the first score that tells samples apart, or the first."""
    for name in recording.scores:
        known = _finite(recording, name)
        if known.min() < known.max():
            return name
    return next(iter(recording.scores))


def _common(recording: Recording, score: str, count: int) -> Family:
    """Make a family of one threshold for all exits."""
    known = _finite(recording, score)
    bounded = _is_share(known)
    if bounded:
        # half of them close to 1, where scores crowd; not from these scores, which must have no
        # part in the order if something is to be shown on them
        near = (1.0 - np.geomspace(0.1, 1e-6, count // 2)).tolist()
        grid = {*np.linspace(0.0, 0.9, count // 2).tolist(), *near}
    else:
        grid = set(np.quantile(known, np.linspace(0.0, 1.0, count)).tolist())
    members = threshold_family(recording, grid=sorted(grid), score=score)[::-1]
    return Family(
        name="one threshold for all exits",
        steps=members,
        words=tuple(_bound(member.thresholds[0], bounded=bounded) for member in members),
        start=_boldest(members, recording),
        fitted=False,
        certified=_certified(members, recording) if bounded else (),
    )


def _finite(recording: Recording, score: str) -> np.ndarray:
    """Collect the scores of the early exits that are numbers.

    0 if none is.
    """
    known = np.concatenate(_scores(recording, score)).astype(float)
    known = known[np.isfinite(known)]
    return known if len(known) else np.zeros(1)


def _is_share(scores: np.ndarray) -> bool:
    """Whether scores are from 0 to 1, 1 being certain, as those of classes are."""
    return bool(((scores >= 0.0) & (scores <= 1.0)).all())


def _thresholds(policy: Policy) -> ThresholdPolicy | None:
    """Return the thresholds by which a policy stops, if that is all it does."""
    inner = policy.policy if isinstance(policy, ControlledPolicy) else policy
    return inner if isinstance(inner, ThresholdPolicy) else None


def _scaled(name: str, policy: ThresholdPolicy, recording: Recording, count: int) -> Family:
    """Make a family of a fitted policy, bolder and more careful."""
    known = _finite(recording, policy.score)
    bounded = _is_share(known)
    if bounded:
        careful = np.geomspace(1 / 64, 1, count * 3 // 4).tolist()
        factors = sorted({0.0, *careful, *np.geomspace(1, 4, count - len(careful)).tolist()})
        members = scaled_family(policy, factors)[::-1]
        start = len(factors) - 1 - factors.index(1.0)
        words = tuple(map(_factor, reversed(factors)))
    else:
        half = count // 2
        shifts = (np.arange(-half, half + 1) / half * 2.0 * known.std()).tolist()
        members = tuple(_shifted(policy, shift) for shift in shifts)
        start = half
        words = tuple(map(_shift, shifts))
    return Family(
        name=name,
        steps=(*members[:start], policy, *members[start + 1 :]),
        words=words,
        start=start,
        fitted=True,
        certified=_certified(members, recording) if bounded else (),
    )


def _shifted(policy: ThresholdPolicy, shift: float) -> ThresholdPolicy:
    """Raise or lower all thresholds.

    Closed exits stay closed.
    """
    moved = tuple(bound + shift for bound in policy.thresholds[:-1])
    return dataclasses.replace(policy, thresholds=(*moved, policy.thresholds[-1]), target={})


def _shift(shift: float) -> str:
    if shift == 0.0:
        return "as fitted"
    return f"{'more careful' if shift > 0.0 else 'bolder'} by {abs(shift):.3g}"


def _bound(bound: float, *, bounded: bool) -> str:
    if not bounded:
        return f"at least {bound:.3g}"
    # as many digits as tell it from 1
    digits = 2 if bound < 0.9 else min(6, 2 - math.floor(math.log10(1.0 - bound)))
    return f"at least {bound:.{digits}f}"


def _factor(factor: float) -> str:
    if factor == 1.0:
        return "as fitted"
    if factor == 0.0:
        return "only if certain"
    if factor > 1.0:
        return f"{factor:.2g} times as bold"
    return f"{1 / factor:.2g} times as careful"


def _boldest(members: Sequence[ThresholdPolicy], recording: Recording) -> int:
    """Find the boldest member that loses at most one point against the last exit."""
    quality = recording.quality.double()
    least = float(quality[-1].mean()) - 0.01
    samples = torch.arange(quality.shape[1])
    for place, exits in enumerate(ThresholdPolicy.exits_of_each(members, recording)):
        if float(quality[exits, samples].mean()) >= least:
            return place
    return len(members) - 1


def _certified(members: Sequence[ThresholdPolicy], recording: Recording) -> tuple[int | None, ...]:
    """For each level find the boldest member that is shown to keep it on this recording."""
    # judged where they were not fitted, they may be controlled there, too
    candidates = [
        dataclasses.replace(member, split=None, provenance=None) for member in reversed(members)
    ]
    found: list[int | None] = []
    for level in LEVELS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NoEffectWarning)
                kept = control_risk(candidates, recording, epsilon=level, delta=DELTA)
        except InfeasibleTarget:
            found.append(None)
            continue
        chosen = kept.certificate.chosen
        found.append(len(members) if chosen is None else len(members) - 1 - chosen)
    return tuple(found)


# --- quantising -----------------------------------------------------------------------------------


def _are_bits(quality: Float[np.ndarray, "K N"]) -> bool:
    return bool(np.isin(quality, (0.0, 1.0)).all())


def _quality(quality: Float[np.ndarray, "K N"]) -> dict[str, Any]:
    """Write qualities as bits if all are 0 or 1, else as bytes."""
    if _are_bits(quality):
        return {"quality": packed(np.packbits(quality.astype(np.uint8))), "bits": True}
    return {"quality": packed(np.rint(quality * 255)), "bits": False}


def _chosen_rows(count: int, most: int, keep: Sequence[int]) -> np.ndarray:
    if count <= most:
        return np.arange(count)
    drawn = np.random.default_rng(0).permutation(count)
    others = drawn[~np.isin(drawn, keep)][: most - len(keep)]
    return np.sort(np.concatenate([np.asarray(keep, dtype=others.dtype), others]))


def _scores(
    recording: Recording, score: str, rows: np.ndarray | slice = slice(None)
) -> list[np.ndarray]:
    """Return the scores of the early exits, in single precision as policies compare them."""
    return [table.numpy()[rows] for table in scores_of(recording, score)[:-1]]


def _edges(families: Sequence[Family], score: str, exits: int) -> list[Float[np.ndarray, "E"]]:
    """Collect the finite thresholds at each early exit, in order."""
    members = [step for family in families for step in family.steps if step.score == score]
    bounds = [[member.thresholds[exit] for member in members] for exit in range(exits - 1)]
    return [
        np.unique(np.asarray([bound for bound in here if math.isfinite(bound)], dtype=np.float32))
        for here in bounds
    ]


def _family(family: Family, edges: Sequence[np.ndarray]) -> dict[str, Any]:
    def code(exit: int, bound: float) -> int:
        if bound == math.inf:
            return CLOSED
        # a score reaches it if so many thresholds, itself among them, are not above the score
        below = np.searchsorted(edges[exit], np.float32(bound), side="right")
        return 0 if bound == -math.inf else int(below)

    return {
        "name": family.name,
        "score": family.steps[0].score,
        "start": family.start,
        "fitted": family.fitted,
        "words": list(family.words),
        "codes": [
            [code(exit, bound) for exit, bound in enumerate(step.thresholds[:-1])]
            for step in family.steps
        ],
        "certified": list(family.certified),
    }


def _point(
    name: str, policy: Policy, recording: Recording, costs: CostProfile, rows: np.ndarray
) -> dict[str, Any]:
    """Describe a policy whose rule does not travel by the exits at which it stops."""
    size = min(costs.batches)
    outcome = policy.outcome(recording, costs, batch_size=size)
    exits = outcome.exits.numpy()
    quality = recording.quality.double().numpy()
    return {
        "name": name,
        "routes": policy.routes,
        "stops": packed(exits[rows]),
        "until": [time * 1e3 for time in until_exits_s(policy, costs)],
        "open": list(map(bool, policy.open_exits())),
        "quality": float(quality[exits, np.arange(len(exits))].mean()),
        "time": float(outcome.contract_s.mean()) * 1e3,
    }
