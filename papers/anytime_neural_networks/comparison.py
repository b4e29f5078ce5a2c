"""From results to numbers: the milestone table, the win rates, ensembles against OPT+."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from papers.anytime_neural_networks.curves import (
    Curve,
    Result,
    alone,
    ensemble,
    excess,
    inflation,
    reference,
)
from papers.anytime_neural_networks.milestones import WinRate, error_at, milestones, win_rate
from papers.anytime_neural_networks.recipe import (
    ENSEMBLES,
    SAMPLERS,
    SHARES,
    WEIGHTINGS,
    Net,
    Sampler,
    Scale,
    ensemble_nets,
    member_nets,
    milestone_nets,
    opt_depths,
)
from papers.results import spread

Results = Mapping[str, Result]

# places at which ensembles are compared
BUDGETS = 400
KIND = {"none": "static", "alternating": "alternating"}


class Pair(NamedTuple):
    """One network and one seed: what all methods are compared on."""

    n: int
    c: int
    seed: int


@dataclass(frozen=True, slots=True)
class Milestones:
    """Results of one method on one pair at each milestone.

    They are the error, and by how many per cent it exceeds that of OPT of the same pair.
    """

    errors: tuple[float, ...]
    increases: tuple[float, ...]


# by weighting and sampler
Measured = dict[tuple[str, Sampler], dict[Pair, Milestones]]


def complete(nets: Sequence[Net], results: Results, seed: int) -> bool:
    """Whether every one of these trainings is done."""
    return all(key(net, seed) in results for net in nets)


def key(net: Net, seed: int) -> str:
    """Name of a training's job."""
    return f"{net.name}-seed{seed}"


def measured(scale: Scale, results: Results) -> Measured:
    """Every method at the milestones, on the pairs whose trainings are all done."""
    table: Measured = {(weights, sampler): {} for weights in WEIGHTINGS for sampler in SAMPLERS}
    for n, c in scale.networks:
        nets = milestone_nets(n, c)
        for seed in (seed for seed in range(scale.seeds) if complete(nets, results, seed)):
            opt = _opt(n, c, seed, results)
            for net in nets:
                if net.weights is not None:
                    curve = alone(results[key(net, seed)])
                    table[net.weights, net.sampler][Pair(n, c, seed)] = Milestones(
                        error_at(
                            curve.costs, curve.errors, [share * curve.costs[-1] for share in SHARES]
                        ),
                        milestones(curve.costs, curve.errors, opt.costs, opt.errors, at=SHARES),
                    )
    return table


def _opt(n: int, c: int, seed: int, results: Results) -> Curve:
    """OPT: its networks, each with one output, shallow to deep."""
    parts = [alone(results[key(Net(n=n, c=c, depth=depth), seed)]) for depth in opt_depths(n)]
    return Curve(tuple(part.costs[-1] for part in parts), tuple(part.errors[-1] for part in parts))


def milestone_rows(table: Measured) -> list[dict[str, object]]:
    """Compute the milestone table.

    It has the relative increase of error over OPT in per cent, as mean and deviation over pairs.
    """
    rows = []
    for (weights, sampler), pairs in table.items():
        row: dict[str, object] = {"weights": weights, "kind": KIND[sampler], "pairs": len(pairs)}
        for place, share in enumerate(SHARES):
            row[f"at {share:g}"] = spread([entry.increases[place] for entry in pairs.values()])
        row["final error"] = spread([100.0 * entry.errors[-1] for entry in pairs.values()])
        rows.append(row)
    return rows


def win_rates(table: Measured) -> dict[str, WinRate]:
    """Compare alternating with static weights, over weightings and pairs.

    There is a result for each milestone, and one for the last two together.
    """

    def errors(sampler: Sampler, place: int) -> list[float]:
        return [
            entry.errors[place]
            for weights in WEIGHTINGS
            for entry in table[weights, sampler].values()
        ]

    names = [f"{share:g}" for share in SHARES]
    rates = {
        name: win_rate(errors("alternating", k), errors("none", k)) for k, name in enumerate(names)
    }
    late = win_rate(
        *([*errors(sampler, 2), *errors(sampler, 3)] for sampler in ("alternating", "none"))
    )
    return {**rates, "0.75 and 1": late}


@dataclass(frozen=True, slots=True)
class Ensemble:
    """The answers of one ensemble with one seed, compared with OPT+."""

    curve: Curve
    errors: np.ndarray
    excess: float
    inflation: np.ndarray


@dataclass(frozen=True, slots=True)
class Comparison:
    """The numbers of the EANN figure.

    For every seed they have OPT+ and the ensembles by name, over the same budgets.
    """

    budgets: np.ndarray
    opt: tuple[Curve, ...]
    ensembles: Mapping[str, tuple[Ensemble, ...]]


def ensembles(scale: Scale, results: Results) -> Comparison | None:
    """Compare EANNs of each weighting and the plain ensemble with OPT+.

    Seeds count if all of their trainings are done.

    Budgets are uniform from where the plain ensemble first answers to where its last network ends.
    """
    nets = ensemble_nets(scale)
    seeds = [seed for seed in range(scale.seeds) if complete(nets, results, seed)]
    if not seeds:
        return None
    kinds: dict[str, str | None] = {
        **{f"EANN {name}": name for name in ENSEMBLES},
        "plain ensemble": None,
    }
    curves = {
        name: [
            ensemble([results[key(net, seed)] for net in member_nets(scale, weights)])
            for seed in seeds
        ]
        for name, weights in kinds.items()
    }
    plain = curves["plain ensemble"][0].costs
    budgets = np.linspace(plain[0], plain[-1], BUDGETS)
    opts = [
        reference([results[key(net, seed)] for net in opt_plus_nets(scale, results, seed)])
        for seed in seeds
    ]
    rated = {
        name: tuple(
            Ensemble(
                curve,
                curve.at(budgets),
                excess(curve, opt, budgets),
                inflation(curve, opt, budgets),
            )
            for curve, opt in zip(own, opts, strict=True)
        )
        for name, own in curves.items()
    }
    return Comparison(budgets, tuple(opts), rated)


def opt_plus_nets(scale: Scale, results: Results, seed: int) -> list[Net]:
    """Return all networks without early exits that were trained with a seed, for OPT+."""
    nets = [Net(n=n, c=c, depth=depth) for n, c in scale.networks for depth in opt_depths(n)]
    return [net for net in (*nets, *member_nets(scale, None)) if key(net, seed) in results]


def ensemble_rows(figure: Comparison) -> list[dict[str, object]]:
    """Summarise the ensembles over seeds.

    A row has the mean excess over OPT+ in per cent, mean and largest cost inflation, and the final
    error.
    """
    return [
        {
            "ensemble": name,
            "seeds": len(own),
            "above OPT+, %": spread([one.excess for one in own]),
            "mean inflation": spread([float(one.inflation.mean()) for one in own]),
            "largest inflation": spread([float(one.inflation.max()) for one in own]),
            "final error": spread([100.0 * one.curve.errors[-1] for one in own]),
        }
        for name, own in figure.ensembles.items()
    ]
