"""Figures 3 and 4 as numbers, and the claims about them.

They have accuracy and confidence of each iteration over seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from papers.anytimenet.recipe import KINDS, NORMS, Case, key
from papers.results import Claim, Spread, judged, spread

Results = Mapping[str, Mapping[str, Any]]

NORMS_IN_WORDS = {
    "shared": "shared statistics, as in the paper",
    "own": "own statistics per iteration",
}
WHAT = {
    "accuracy": "accuracy %",
    "p_true": "confidence %",
    "p_max": "largest probability %",
    "surest_accuracy": "surest so far: accuracy %",
    "surest_p_true": "surest so far: confidence %",
    "correlation": "correlation over classes",
    "sample_correlation": "over samples",
}


def complete(case: Case, seeds: Sequence[int], results: Results) -> list[int]:
    """Seeds of which both trainings are done."""
    return [seed for seed in seeds if all(key(case, kind, seed) in results for kind in KINDS)]


def per_iteration(
    case: Case, norms: str, what: str, seeds: Sequence[int], results: Results
) -> np.ndarray:
    """Return one of the values of `recipe.judged` by seed and iteration.

    It is a value of AnytimeNet. Shares are in per cent.
    """
    return _scale(what) * np.asarray(
        [results[key(case, "anytime", seed)][norms][what] for seed in seeds], dtype=float
    )


def baseline(case: Case, what: str, seeds: Sequence[int], results: Results) -> np.ndarray:
    """Likewise of BASELINE, by seed."""
    return _scale(what) * np.asarray(
        [results[key(case, "baseline", seed)]["shared"][what][-1] for seed in seeds], dtype=float
    )


def _scale(what: str) -> float:
    return 1.0 if "correlation" in what else 100.0


def table(
    case: Case, norms: str, names: Sequence[str], seeds: Sequence[int], results: Results
) -> list[dict[str, Any]]:
    """Make a row for each iteration, and one for BASELINE.

    A row has values over seeds, and whether they are higher than in the row before.
    A rise is the mean, over seeds, of the differences from the iteration before.
    """
    values = {what: per_iteration(case, norms, what, seeds, results) for what in WHAT}
    rows = []
    for index, name in enumerate(names):
        row: dict[str, Any] = {"iteration": index + 1, "blocks": name}
        for what in WHAT:
            row[WHAT[what]] = _spread(values[what][:, index])
            if what in ("accuracy", "p_true"):
                label = WHAT[what].removesuffix(" %")
                change = (
                    _spread(values[what][:, index] - values[what][:, index - 1]) if index else None
                )
                row |= {f"{label} rise": change or "", f"{label} rises": _rises(change)}
        rows.append(row)
    plain = {
        label: _spread(baseline(case, what, seeds, results))
        for what, label in WHAT.items()
        if "surest" not in what
    }
    return [
        *rows,
        {**dict.fromkeys(rows[0], ""), "iteration": "BASELINE", "blocks": names[-1], **plain},
    ]


def _spread(values: np.ndarray) -> Spread:
    return spread(values.tolist())


def _rises(change: Spread | None) -> str:
    return "" if change is None else "yes" if change.mean > 0.0 else "no"


def claims(
    cases: Sequence[Case], seeds: Mapping[str, Sequence[int]], results: Results
) -> Iterator[Claim]:
    """Judge the claims about learning, for the cases that have seeds."""
    there = [case for case in cases if seeds[case.name]]
    for norms in NORMS:
        for case in there:
            for what, label in (("accuracy", "accuracy"), ("p_true", "confidence")):
                values = per_iteration(case, norms, what, seeds[case.name], results).mean(0)
                yield _monotone(
                    (
                        f"{label} rises with every iteration on average ({case.name}, {norms} "
                        "statistics)"
                    ),
                    values,
                )
    for norms in NORMS:
        for case in there:
            final = per_iteration(case, norms, "accuracy", seeds[case.name], results)[:, -1]
            yield judged(
                (
                    f"the last iteration is more accurate than BASELINE ({case.name}, {norms} "
                    "statistics)"
                ),
                "far above" if case.name == "scarce" else "at least as accurate",
                "points",
                (final - baseline(case, "accuracy", seeds[case.name], results)).tolist(),
            )
    for norms in NORMS:
        ends = {
            case.name: per_iteration(case, norms, "accuracy", seeds[case.name], results)[
                :, -1
            ].mean()
            for case in there
        }
        if {"gtsrb", "cifar10", "scarce"} <= set(ends):
            order = sorted(ends, key=lambda name: -ends[name])
            # signs of few images stand in for cars, and signs are easier than CIFAR-10's objects
            yield Claim(
                f"GTSRB is answered best, then CIFAR-10, then the scarce case ({norms} statistics)",
                "yes",
                ", ".join(f"{name} {ends[name]:.1f} %" for name in order),
                "not testable here",
            )
        for case in there:
            values = per_iteration(case, norms, "correlation", seeds[case.name], results).mean(0)
            yield Claim(
                (
                    "classes of more confidence are answered better, in every iteration "
                    f"({case.name}, {norms} statistics)"
                ),
                "yes",
                f"correlation {values.min():.2f} to {values.max():.2f}",
                "yes" if values.min() > 0.0 else "no",
            )


def _monotone(claim: str, values: np.ndarray) -> Claim:
    rises = np.diff(values)
    worst = int(rises.argmin())
    ours = (
        f"in {int((rises > 0).sum())} of {len(rises)} iterations; {values[0]:.1f} to "
        f"{values[-1]:.1f} %"
    )
    if rises[worst] <= 0:
        ours += f"; most wrong in iteration {worst + 2} ({rises[worst]:+.2f} points)"
    return Claim(claim, "yes", ours, "yes" if (rises > 0).all() else "no")


def raw_rows(
    case: Case, names: Sequence[str], seeds: Sequence[int], results: Results
) -> Iterator[dict[str, Any]]:
    """Every training's values, one row per iteration and kind of statistics."""
    for seed in seeds:
        for kind in KINDS:
            result = results[key(case, kind, seed)]
            for norms in (name for name in NORMS if name in result):
                for index, name in enumerate(names if kind == "anytime" else names[-1:]):
                    judged = result[norms]
                    yield {
                        "case": case.name,
                        "network": kind,
                        "statistics": norms,
                        "seed": seed,
                        "iteration": index + 1,
                        "blocks": name,
                        "train_loss": result["train_loss"][index],
                        **{
                            what: judged[what][index]
                            for what in (
                                "accuracy",
                                "p_true",
                                "p_max",
                                "surest_accuracy",
                                "surest_p_true",
                                "surest_p_max",
                                "correlation",
                                "sample_correlation",
                            )
                        },
                    }


def class_rows(
    case: Case, names: Sequence[str], seeds: Sequence[int], results: Results
) -> Iterator[dict[str, Any]]:
    """Confidence and accuracy of every class in every iteration of every AnytimeNet."""
    for seed in seeds:
        for norms in NORMS:
            judged = results[key(case, "anytime", seed)][norms]
            for index, name in enumerate(names):
                for place, label in enumerate(judged["classes"]):
                    yield {
                        "case": case.name,
                        "statistics": norms,
                        "seed": seed,
                        "iteration": index + 1,
                        "blocks": name,
                        "class": label,
                        "count": judged["counts"][place],
                        "p_true": judged["class_p_true"][index][place],
                        "accuracy": judged["class_accuracy"][index][place],
                    }
