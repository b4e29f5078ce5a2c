"""Judge the paper's claims as yes, no or not told apart.

Judgements use intervals over pairs of network and seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from papers.anytime_neural_networks import inflation as analytic
from papers.anytime_neural_networks.comparison import KIND, Comparison, Measured, win_rates
from papers.anytime_neural_networks.milestones import WinRate
from papers.anytime_neural_networks.recipe import SAMPLERS, Sampler, Scale
from papers.results import Claim, interval, judged


def base(scale: Scale) -> float:
    """Growth of the members' depth, as a geometric mean."""
    return float((scale.members[-1] / scale.members[0]) ** (1.0 / max(1, len(scale.members) - 1)))


def milestone_claims(table: Measured) -> Iterator[Claim]:
    """Judge the claims about single networks, for static and alternating weights."""
    for sampler in SAMPLERS:
        kind = KIND[sampler]

        def at(weights: str, *places: int, sampler: Sampler = sampler) -> np.ndarray:
            increases = np.array([entry.increases for entry in table[weights, sampler].values()])
            return np.asarray(increases[:, list(places)].mean(1))

        for weights, paper in (("const", "+18.90 %"), ("linear", "+12.65 %")):
            yield judged(
                f"{weights} loses at the end ({kind})",
                paper,
                "points of per cent above OPT at the end:",
                at(weights, 3).tolist(),
            )
        ends = (at("const", 3) + at("linear", 3)) / 2
        for weights, paper in (
            ("sieve", "near OPT"),
            ("exp_lin", "near OPT"),
            ("adaloss", "+2.73 %"),
        ):
            own = at(weights, 3)
            low, high = interval(own.tolist())
            more = f"; itself {own.mean():+.1f} above OPT" + (
                f" ({low:+.1f} to {high:+.1f})" if math.isfinite(low) else ""
            )
            claim = judged(
                f"{weights} does not lose as const and linear do at the end ({kind})",
                paper,
                "below their mean by",
                (ends - own).tolist(),
            )
            yield Claim(claim.claim, claim.paper, claim.ours + more, claim.verdict)
        yield judged(
            f"exp_lin is better than sieve in the first half ({kind})",
            "yes",
            "mean of 1/4 and 1/2, lower by",
            (at("sieve", 0, 1) - at("exp_lin", 0, 1)).tolist(),
        )
        yield judged(
            f"sieve is better than half_end ({kind})",
            "yes",
            "mean of the milestones, lower by",
            (at("half_end", 0, 1, 2, 3) - at("sieve", 0, 1, 2, 3)).tolist(),
        )
    won = win_rates(table)["0.75 and 1"]
    lost = WinRate(wins=won.pairs - won.wins - won.ties, ties=won.ties, pairs=won.pairs)
    verdict = "yes" if won.p_value < 0.05 else "no" if lost.p_value < 0.05 else "not told apart"
    ours = (
        f"wins {won.rate:.0%} of {won.pairs} (at least {won.low:.0%} by Hoeffding, p <= "
        f"{won.p_value:.2g})"
    )
    yield Claim(
        "alternating improves the second half (3/4 and 1)", "almost every milestone", ours, verdict
    )


def ensemble_claims(figure: Comparison, growth: float) -> Iterator[Claim]:
    """Judge the claims about ensembles."""
    above = {name: np.array([one.excess for one in own]) for name, own in figure.ensembles.items()}
    proposed = (above["EANN sieve"] + above["EANN exp_lin"]) / 2
    yield judged(
        "EANN of sieve and exp_lin is nearer to OPT+ than of const and linear",
        "yes",
        "per cent above OPT+, lower by",
        ((above["EANN const"] + above["EANN linear"]) / 2 - proposed).tolist(),
    )
    yield judged(
        "EANN of sieve is better than the plain ensemble",
        "improves more often",
        "per cent above OPT+, lower by",
        (above["plain ensemble"] - above["EANN sieve"]).tolist(),
    )
    bound = analytic_inflation(growth)["EANN"][0]
    yield judged(
        "EANN of sieve and exp_lin is near OPT+ at every budget",
        f"inflation of cost at most {bound:.2f}",
        "largest inflation, below the bound by",
        [
            bound - (a.inflation.max() + b.inflation.max()) / 2
            for a, b in zip(
                figure.ensembles["EANN sieve"], figure.ensembles["EANN exp_lin"], strict=True
            )
        ],
    )


def analytic_inflation(growth: float) -> dict[str, tuple[float, float]]:
    """Compute the largest and mean cost inflation by the paper's proposition.

    There is a counterpart for plain networks.
    """
    return {
        "EANN": (analytic.ann_sup(growth), analytic.ann_mean(growth)),
        "plain ensemble": (analytic.plain_sup(growth), analytic.plain_mean(growth)),
    }
