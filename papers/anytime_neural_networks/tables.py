"""From numbers to files: CSV, figures and the page that fills the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from impatient.evaluation.plots import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    save_figure,
    styled,
)
from impatient.files import write_text
from papers.anytime_neural_networks.claims import (
    analytic_inflation,
    base,
    ensemble_claims,
    milestone_claims,
)
from papers.anytime_neural_networks.comparison import (
    KIND,
    Comparison,
    Measured,
    Results,
    complete,
    ensemble_rows,
    ensembles,
    key,
    measured,
    milestone_rows,
    win_rates,
)
from papers.anytime_neural_networks.curves import alone
from papers.anytime_neural_networks.recipe import (
    SAMPLERS,
    WEIGHTINGS,
    Net,
    Scale,
    milestone_nets,
    opt_depths,
)
from papers.results import Spread, claim_rows, made_by, markdown, write_csv

COLOURS = {
    "const": VERMILION,
    "linear": ORANGE,
    "half_end": PURPLE,
    "sieve": BLUE,
    "exp_lin": SKY,
    "adaloss": GREEN,
}


def write(
    scale: Scale,
    results: Results,
    times: Mapping[str, Sequence[float]],
    difference: float | None,
    folder: Path,
) -> str:
    """Write all tables and figures of finished trainings, and return a page.

    The page is markdown.

    Args:
        results: of the trainings, by job name; some may be missing.
        times: seconds until each exit of a network, by `nNcC`.
        difference: largest between an EANN's own recording and what was assembled from its members;
            None if not checked.
        folder: for the files.
    """
    parts = [
        *_milestone_part(scale, results, folder),
        *_ensemble_part(scale, results, difference, folder),
    ]
    if not parts:
        return "No seed of any table is complete yet."
    write_csv(folder / "curves.csv", curve_rows(results, times))
    processors = sorted({str(result["processor"]) for result in results.values()})
    page = "\n\n".join(
        [
            *parts,
            _settings(scale, results),
            made_by(", ".join(processors), "papers.anytime_neural_networks"),
        ]
    )
    write_text(folder / "results.md", page + "\n")
    return page


def _milestone_part(scale: Scale, results: Results, folder: Path) -> list[str]:
    table = measured(scale, results)
    if not table["sieve", "none"]:
        return []
    rows = milestone_rows(table)
    rates = win_rates(table)
    claims = list(milestone_claims(table))
    write_csv(folder / "milestones.csv", [_flat(row) for row in rows])
    write_csv(
        folder / "win_rates.csv",
        [
            {
                "milestone": name,
                "rate": rate.rate,
                "low": rate.low,
                "p_value": rate.p_value,
                "wins": rate.wins,
                "ties": rate.ties,
                "pairs": rate.pairs,
            }
            for name, rate in rates.items()
        ],
    )
    write_csv(folder / "milestone_claims.csv", claim_rows(claims))
    save_figure(draw_milestones(scale, results, table), folder / "milestones.png")
    wins = [
        {
            "cost": name,
            "alternating wins": f"{rate.rate:.0%}",
            "of": rate.pairs,
            "at least (95 %)": f"{rate.low:.0%}",
            "p at most": f"{rate.p_value:.2g}",
        }
        for name, rate in rates.items()
    ]
    return [
        "**Error above OPT's, per cent, at shares of the cost** (mean ± standard deviation over "
        "network and seed; final error in per cent)",
        markdown([_readable(row, "+.1f") for row in rows]),
        (
            "**Alternating against static weights** (over weightings, networks and seeds; "
            "Hoeffding's bound)"
        ),
        markdown(wins),
        "**Claims**",
        markdown(claim_rows(claims)),
    ]


def _ensemble_part(
    scale: Scale, results: Results, difference: float | None, folder: Path
) -> list[str]:
    compared = ensembles(scale, results)
    if compared is None:
        return []
    rows = ensemble_rows(compared)
    claims = list(ensemble_claims(compared, base(scale)))
    growth = base(scale)
    write_csv(folder / "eann.csv", [_flat(row) for row in rows])
    write_csv(folder / "eann_curves.csv", _budget_rows(compared))
    write_csv(folder / "eann_claims.csv", claim_rows(claims))
    save_figure(draw_ensembles(compared), folder / "eann.png")
    formulas = "; ".join(
        f"{name} at most {sup:.2f}, mean {mean:.2f}"
        for name, (sup, mean) in analytic_inflation(growth).items()
    )
    checked = (
        ""
        if difference is None
        else (
            " One EANN was run as a network: its errors differ from the assembled ones by "
            f"{difference:.2g} at most."
        )
    )
    return [
        f"**Ensembles of networks n = {', '.join(map(str, scale.members))}, c = {scale.channels}, "
        "against OPT+** (budgets uniform from the plain ensemble's first answer to its last; mean "
        "± standard deviation over seeds)",
        markdown([_readable(row, ".2f") for row in rows]),
        f"Cost inflation by formula, base {growth:.2g}, for members competitive from "
        f"1/{growth:.2g} of their depth on: {formulas}.{checked}",
        "**Claims**",
        markdown(claim_rows(claims)),
    ]


def _readable(row: Mapping[str, object], style: str) -> dict[str, object]:
    """Format a row for reading, with spreads as mean ± deviation."""
    sign = style.startswith("+")
    digits = int(style.strip("+f")[1:])
    return {
        name: value.text(digits, sign=sign and name != "final error")
        if isinstance(value, Spread)
        else value
        for name, value in row.items()
    }


def _flat(row: Mapping[str, object]) -> dict[str, object]:
    """Format a row for a file, with spreads as two columns."""
    flat: dict[str, object] = {}
    for name, value in row.items():
        flat |= (
            {name: value.mean, f"{name} sd": value.deviation}
            if isinstance(value, Spread)
            else {name: value}
        )
    return flat


def _settings(scale: Scale, results: Results) -> str:
    how = scale.training
    hours = sum(result["seconds"] for result in results.values()) / 3600
    images = "all" if how.images is None else f"{how.images:,}"
    return (
        f"{how.data}, {images} training images, {how.epochs} epochs, batch {how.batch_size}, "
        f"learning rate {how.lr} ({how.schedule}), augmentation {how.augment}, {len(results)} "
        f"trainings, {hours:.2f} hours of training in all. Cost: multiply-accumulates. The test "
        "split is used for these tables alone."
    )


def curve_rows(results: Results, times: Mapping[str, Sequence[float]]) -> list[dict[str, object]]:
    """Every training's exits: cost, measured time where there is one, errors."""
    rows = []
    for name, result in results.items():
        known = (
            times.get("-".join(name.split("-")[:2]), ()) if len(result["stage_macs"]) > 1 else ()
        )
        for exit, cost in enumerate(alone(result).costs):
            rows.append(
                {
                    "training": name,
                    "exit": exit,
                    "macs": cost,
                    "ms": 1e3 * known[exit] if known else "",
                    "validation_error": result["validation_error"][exit],
                    "test_error": result["test_error"][exit],
                    "train_loss": result["train_loss"][exit],
                }
            )
    return rows


def _budget_rows(compared: Comparison) -> list[dict[str, object]]:
    curves = {"OPT+": [opt.at(compared.budgets) for opt in compared.opt]}
    curves |= {name: [one.errors for one in own] for name, own in compared.ensembles.items()}
    return [
        {
            "macs": float(budget),
            **{name: float(np.mean([own[place] for own in all_])) for name, all_ in curves.items()},
        }
        for place, budget in enumerate(compared.budgets)
    ]


# --- figures --------------------------------------------------------------------------------------


def draw_milestones(scale: Scale, results: Results, table: Measured) -> Figure:
    """Plot error over cost of every weighting, with OPT as points.

    Weightings are static or alternating. There is a row of panels per network.
    """
    networks = list(dict.fromkeys((pair.n, pair.c) for pair in table["sieve", "none"]))
    with styled():
        figure = Figure(figsize=(7.2, 3.2 * len(networks) + 0.9), dpi=100, layout="constrained")
        figure.suptitle(
            "Error over cost by loss weights", x=0.012, ha="left", size=11.5, weight="bold"
        )
        panels = figure.subplots(len(networks), 2, sharey="row", squeeze=False)
        for row, (n, c) in enumerate(networks):
            seeds = [
                seed for seed in range(scale.seeds) if complete(milestone_nets(n, c), results, seed)
            ]
            for column, sampler in enumerate(SAMPLERS):
                axes = panels[row][column]
                for weights in WEIGHTINGS:
                    _draw_mean(
                        axes,
                        [
                            results[key(Net(n=n, c=c, weights=weights, sampler=sampler), seed)]
                            for seed in seeds
                        ],
                        label=weights,
                        color=COLOURS[weights],
                        linewidth=1.5,
                    )
                for depth in opt_depths(n):
                    _draw_mean(
                        axes,
                        [results[key(Net(n=n, c=c, depth=depth), seed)] for seed in seeds],
                        label="OPT" if depth == opt_depths(n)[0] else "_",
                        color=INK,
                        marker="*",
                        markersize=9,
                        linestyle="none",
                        zorder=5,
                    )
                axes.set_title(f"({n}, {c}), {KIND[sampler]}", size=10.5)
                axes.grid(axis="y")
                axes.set_xlabel("million multiply-accumulates")
            panels[row][0].set_ylabel("test error, %")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return figure


def _draw_mean(axes: Axes, runs: Sequence[Mapping[str, Any]], **look: Any) -> None:
    curves = [alone(run) for run in runs]
    errors = 100.0 * np.mean([curve.errors for curve in curves], axis=0)
    axes.plot(np.asarray(curves[0].costs) / 1e6, errors, **look)


def draw_ensembles(compared: Comparison) -> Figure:
    """Plot the error of the latest answer over the cost spent.

    Curves begin at the first answer, and are of EANNs, the plain ensemble and OPT+.
    """
    curves = {name: [one.curve for one in own] for name, own in compared.ensembles.items()} | {
        "OPT+": list(compared.opt)
    }
    first = min(curve.costs[0] for own in curves.values() for curve in own)
    budgets = np.geomspace(first, compared.budgets[-1], 1000)
    with styled():
        figure = Figure(figsize=(7.2, 4.4), dpi=100, layout="constrained")
        figure.suptitle(
            "Ensembles of exponentially growing depth", x=0.012, ha="left", size=11.5, weight="bold"
        )
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        for name, own in curves.items():
            look = {"color": INK, "linestyle": (0, (4, 2))} if name == "OPT+" else {"color": MUTED}
            if name.startswith("EANN"):
                look = {"color": COLOURS[name.removeprefix("EANN ")]}
            errors = np.mean([curve.at(budgets) for curve in own], axis=0)
            answered = budgets >= max(curve.costs[0] for curve in own)
            axes.plot(
                budgets[answered] / 1e6, 100.0 * errors[answered], label=name, linewidth=1.6, **look
            )
        axes.set_xlabel("million multiply-accumulates spent")
        axes.set_ylabel("test error, %")
        axes.grid(axis="y")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure
