"""Table 1 of Impatient DNNs from the runs' accuracies and costs.

It is written as CSV and markdown, with figures and conclusions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from impatient import Budget, CostProfile, exit_weights, expected_accuracy
from impatient.errors import StorageError
from impatient.evaluation.evaluate import standard_budgets
from impatient.evaluation.plots import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    VERMILION,
    save_figure,
    styled,
)
from impatient.files import write_text
from impatient.store import from_plain
from papers.impatient_dnn.recipe import ROWS, Pair
from papers.results import Spread, made_by, markdown, spread, write_csv

Results = Mapping[str, Mapping[str, Any]]

# Table 1 of the paper: VGG19 on MIT-67, expected accuracy in per cent (ORIG, FT, joint), and mean
# times in ms (t_B, t_A)
PAPER = {
    "uniform": (46.65, 48.07, 53.93, 1.11, 1.19),
    "large_likely": (62.82, 67.07, 69.66, 1.72, 1.84),
    "small_likely": (25.63, 25.65, 35.11, 0.50, 0.51),
    "normal": (47.53, 47.90, 55.38, 1.07, 1.15),
}
METHODS = ("orig", "ft", "joint", "no_exits")


def expected_percent(
    budget: Budget, costs_s: Sequence[float], accuracies: Sequence[float]
) -> float:
    """Compute the expected accuracy in per cent.

    A budget below the first exit counts as a failure.
    """
    return 100.0 * expected_accuracy(budget, costs_s, accuracies)


def mean_ms(budget: Budget, anytime_s: Sequence[float], costs_s: Sequence[float]) -> float:
    """Compute the mean cost of the given answers in ms.

    Each exit answers as often as it does anytime.

    So both of the paper's columns are means over the same exits, and t_A - t_B is what the heads on
    the way cost. A priori, the heads not run let some budgets pay for a deeper exit; that shows in
    the accuracy, not here.
    """
    weights = exit_weights(budget, anytime_s, normalise=True)
    return 1e3 * sum(weight * cost for weight, cost in zip(weights, costs_s, strict=True))


def per_seed(pairs: Sequence[Pair], results: Results, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Compute the expected accuracy on the test split, per pair, budgets and seed.

    It is in per cent. Rows whose runs have not ended are left out.

    All answer anytime (interruptible costs), except `joint_a_priori`, the same network whose budget
    is known in advance (contract costs), and `no_exits`, the fine-tuned network alone, which
    answers if its one time fits.
    """
    rows = []
    for pair in pairs:
        costs = _costs(pair, results)
        anytime = costs.interruptible_s()
        a_priori = costs.contract_s()
        whole = costs.exit_free_s()
        for row in ROWS:
            budget = standard_budgets(anytime)[row]
            for seed in seeds:
                names = [f"{pair.name}-{run}-{seed}" for run in ("orig", "ft", f"joint-{row}")]
                if any(name not in results for name in names):
                    continue
                orig, ft, joint = (results[name] for name in names)
                rows.append(
                    {
                        "pair": pair.name,
                        "budgets": row,
                        "seed": seed,
                        "orig": expected_percent(budget, anytime, orig["test"]),
                        "ft": expected_percent(budget, anytime, ft["test"]),
                        "joint": expected_percent(budget, anytime, joint["test"]),
                        "joint_a_priori": expected_percent(budget, a_priori, joint["test"]),
                        "no_exits": expected_percent(budget, [whole], ft["alone"]["test"]),
                        "answered": 100.0 * sum(exit_weights(budget, anytime)),
                        "t_b_ms": mean_ms(budget, anytime, a_priori),
                        "t_a_ms": mean_ms(budget, anytime, anytime),
                    }
                )
    return rows


def summarised(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Summarise the rows of `per_seed` over seeds.

    There is a `Spread` per method, one of the gain over the better baseline of the same seed, and
    one of that gain per budget that pays for the first exit.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["pair"], row["budgets"]), []).append(row)
    return [
        {
            "pair": pair,
            "budgets": budgets,
            **{name: spread([run[name] for run in runs]) for name in ("orig", "ft", "joint")},
            "gain": spread([_gain(run) for run in runs]),
            # budgets below the first exit buy no answer by any method, and hide a gain
            "gain_answered": spread([100.0 * _gain(run) / run["answered"] for run in runs]),
            "answered": runs[0]["answered"],
            "wins": sum(_gain(run) > 0 for run in runs),
            **{
                name: spread([run[name] for run in runs]) for name in ("joint_a_priori", "no_exits")
            },
            "t_b_ms": runs[0]["t_b_ms"],
            "t_a_ms": runs[0]["t_a_ms"],
        }
        for (pair, budgets), runs in groups.items()
    ]


def _gain(run: Mapping[str, Any]) -> float:
    """Return joint training's points over the better baseline of the same seed."""
    return float(run["joint"] - max(run["orig"], run["ft"]))


def table1(summary: Sequence[Mapping[str, Any]]) -> str:
    """Table 1 in markdown, with the paper's gain beside ours."""
    return markdown(
        [
            {
                "data and network": row["pair"],
                "budgets": row["budgets"].replace("_", " "),
                "ORIG %": row["orig"].text(),
                "FT %": row["ft"].text(),
                "joint %": row["joint"].text(),
                "gain, points": f"**{row['gain'].text(sign=True)}**",
                "answered %": f"{row['answered']:.0f}",
                "gain per answered budget": row["gain_answered"].text(sign=True),
                "the paper's gain": f"{_paper_gain(row['budgets']):+.1f}",
                "joint, a priori %": row["joint_a_priori"].text(),
                "no exits %": row["no_exits"].text(),
                "t_B ms": f"{row['t_b_ms']:.3f}",
                "t_A ms": f"{row['t_a_ms']:.3f}",
            }
            for row in summary
        ]
    )


def _paper_gain(row: str) -> float:
    orig, ft, joint, *_ = PAPER[row]
    return joint - max(orig, ft)


def verdict(summary: Sequence[Mapping[str, Any]]) -> str:
    """Judge the paper's two claims by the numbers: yes, no, or not testable here.

    Whether the gain is largest where small budgets are likely is not testable with other rows
    missing, nor if it depends on the budgets that buy no answer, whose share the paper leaves open.
    """
    pairs = list(dict.fromkeys(row["pair"] for row in summary))
    won = [row for row in summary if row["gain"].mean > 0]
    seeds = summary[0]["gain"].count
    always = sum(row["wins"] == seeds for row in summary)
    most = {pair: _largest(summary, pair, "gain") for pair in pairs}
    small = _in_small_budgets(most.values(), "gain")
    answered = {pair: _largest(summary, pair, "gain_answered") for pair in pairs}
    small_answered = _in_small_budgets(answered.values(), "gain_answered")
    most_small = "yes" if small == len(pairs) else "no"
    if len(summary) < len(pairs) * len(ROWS) or (most_small == "no" and small != small_answered):
        most_small = "not testable here"
    losers = ", ".join(
        f"{row['pair']} {row['budgets']} ({row['gain'].text(sign=True)})"
        for row in summary
        if row not in won
    )
    gains = "; ".join(
        f"{pair}: {row['budgets']} ({row['gain'].text(sign=True)})" for pair, row in most.items()
    )
    return "\n".join(
        [
            "- Joint training beats the better baseline in every row: "
            f"**{'yes' if len(won) == len(summary) else 'no'}**. By the mean over seeds in "
            f"{len(won)} of {len(summary)} rows, in all of {seeds} seed{'s' * (seeds > 1)} in "
            f"{always}." + (f" Not in: {losers}." if losers else ""),
            f"- Most where small budgets are likely: **{most_small}**. That row has the largest "
            f"gain, and one above 0, in {small} of {len(pairs)} pairs, and per answered budget in "
            f"{small_answered}. Largest gains: {gains}.",
        ]
    )


def _largest(summary: Sequence[Mapping[str, Any]], pair: str, gain: str) -> Mapping[str, Any]:
    """Return the row of a pair with the largest gain of this kind."""
    return max((row for row in summary if row["pair"] == pair), key=lambda row: row[gain].mean)


def _in_small_budgets(rows: Iterable[Mapping[str, Any]], gain: str) -> int:
    """Count the rows where small budgets are likely and joint training gains."""
    return sum(row["budgets"] == "small_likely" and row[gain].mean > 0 for row in rows)


def per_exit(pairs: Sequence[Pair], results: Results, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return the accuracy of each exit of each method, in per cent.

    It is on validation and test split, with the exit's times.
    """
    rows = []
    for pair in pairs:
        costs = _costs(pair, results)
        contract = costs.contract_s()
        anytime = costs.interruptible_s()
        for name in ("orig", "ft", *(f"joint-{row}" for row in ROWS)):
            for seed in seeds:
                result = results.get(f"{pair.name}-{name}-{seed}")
                if result is None:
                    continue
                for index, exit in enumerate(costs.exits):
                    rows.append(
                        {
                            "pair": pair.name,
                            "method": name,
                            "seed": seed,
                            "exit": index,
                            "after": exit,
                            "contract_ms": 1e3 * contract[index],
                            "interruptible_ms": 1e3 * anytime[index],
                            "validation": 100.0 * result["validation"][index],
                            "test": 100.0 * result["test"][index],
                        }
                    )
    return rows


def write(
    pairs: Sequence[Pair],
    results: Results,
    seeds: Sequence[int],
    out: Path,
    table: Literal["table1", "exits", "all"],
    *,
    module: str = "papers.impatient_dnn",
) -> str:
    """Write the chosen tables and figures, and return Table 1 as markdown.

    Args:
        module: what was run with `python -m`.
    Raises:
        StorageError: if no row's trainings have all ended.
    """
    rows = per_seed(pairs, results, seeds) if results else []
    if not rows:
        raise StorageError("no row is finished yet; run the command without --publish to go on.")
    made = made_by(str(_costs(pairs[0], results).provenance.processor), module)
    summary = summarised(rows)
    spreads = ", mean ± standard deviation over them" if len(seeds) > 1 else ""
    runs = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}{spreads}; test split."
    page = f"{verdict(summary)}\n\n{table1(summary)}\n\n{runs} {made}"
    if table in ("table1", "all"):
        write_csv(out / "table1_seeds.csv", rows)
        write_csv(out / "table1.csv", _flat(summary))
        write_text(out / "table1.md", page + "\n")
        save_figure(draw_table1(summary), out / "table1.png")
    if table in ("exits", "all"):
        exits = per_exit(pairs, results, seeds)
        write_csv(out / "exits.csv", exits)
        save_figure(draw_exits(exits), out / "exits.png")
    return page


def _flat(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    flat = []
    for row in summary:
        line: dict[str, Any] = {}
        for name, value in row.items():
            line |= (
                {name: value.mean, f"{name}_sd": value.deviation}
                if isinstance(value, Spread)
                else {name: value}
            )
        flat.append({**line, "seeds": row["gain"].count})
    return flat


LOOKS = {
    "orig": ("ORIG: SVMs, pretrained", MUTED, "s"),
    "ft": ("FT: SVMs, fine-tuned", ORANGE, "D"),
    "joint": ("joint, weighted by the budgets", BLUE, "o"),
    "no_exits": ("no exits, fine-tuned", VERMILION, "*"),
}
JOINT_LOOKS = dict(zip(ROWS, ((BLUE, "o"), (GREEN, "^"), (PURPLE, "v"), (INK, "x")), strict=True))


def draw_table1(summary: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the expected accuracy of every method and budget distribution, per pair."""

    def panel(axes: Axes, pair: str) -> None:
        rows = [row for row in summary if row["pair"] == pair]
        for place, name in enumerate(METHODS):
            label, colour, marker = LOOKS[name]
            where = [index + 0.12 * (place - 1.5) for index in range(len(rows))]
            errors = [
                0.0 if math.isnan(row[name].deviation) else row[name].deviation for row in rows
            ]
            axes.errorbar(
                where,
                [row[name].mean for row in rows],
                errors,
                fmt=marker,
                color=colour,
                capsize=3,
                label=label,
            )
        axes.set_xticks(range(len(rows)), [row["budgets"].replace("_", "\n") for row in rows])
        axes.set_ylabel("expected accuracy, %")

    return _panels(
        "Expected accuracy under four distributions of time budgets",
        [row["pair"] for row in summary],
        panel,
    )


def draw_exits(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the accuracy of every exit over its time when all heads run.

    Values are means over seeds. There is a panel per pair.
    """

    def panel(axes: Axes, pair: str) -> None:
        own = [row for row in rows if row["pair"] == pair]
        for method in dict.fromkeys(row["method"] for row in own):
            label, colour, marker = _look(method)
            mine = [row for row in own if row["method"] == method]
            exits = sorted({row["exit"] for row in mine})
            mean = {
                k: spread([row["test"] for row in mine if row["exit"] == k]).mean for k in exits
            }
            time = {row["exit"]: row["interruptible_ms"] for row in mine}
            axes.plot(
                [time[k] for k in exits],
                [mean[k] for k in exits],
                marker=marker,
                color=colour,
                label=label,
                markersize=5,
            )
        axes.set_xlabel("time until the exit answers, ms")
        axes.set_ylabel("accuracy, %")

    return _panels("Accuracy of each exit", [row["pair"] for row in rows], panel)


def _look(method: str) -> tuple[str, str, str]:
    if method in LOOKS:
        return LOOKS[method]
    row = method.removeprefix("joint-")
    return (f"joint, {row.replace('_', ' ')}", *JOINT_LOOKS[row])


def _panels(title: str, pairs: Sequence[str], draw: Callable[[Axes, str], None]) -> Figure:
    names = list(dict.fromkeys(pairs))
    columns = min(2, len(names))
    lines = math.ceil(len(names) / columns)
    with styled():
        figure = Figure(
            figsize=(3.6 * columns + 1.0, 2.9 * lines + 0.9), dpi=100, layout="constrained"
        )
        figure.suptitle(title, x=0.012, ha="left", size=11.5, weight="bold")
        for place, name in enumerate(names, 1):
            axes = figure.add_subplot(lines, columns, place)
            axes.set_title(name, size=10.5)
            axes.grid(axis="y")
            draw(axes, name)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def _costs(pair: Pair, results: Results) -> CostProfile:
    return from_plain(results[f"{pair.name}-costs"], CostProfile)
