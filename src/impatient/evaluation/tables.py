"""Tables of an evaluation and of costs, as data.

Times are in milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from impatient.budgets import STANDARD, Budget
from impatient.costs import Cost, CostProfile, Noise, Quantiles
from impatient.evaluation.evaluate import Evaluation
from impatient.evaluation.metrics import Estimate
from impatient.evaluation.paired import PairedComparison
from impatient.table import (
    Cell,
    Column,
    Row,
    Table,
    grouped,
    milliseconds,
    percent,
    three_digits,
)

# so many runs have five beyond their p99.9, as many as `runtime.tuning` asks for
RUNS_OF_P999 = 5_000


def interval(estimate: Estimate) -> str:
    """Write the interval of a share."""
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return "unknown"
    return f"{estimate.low * 100:.1f} to {percent(estimate.high)}"


def amount(value: float, cost: Cost) -> str:
    """Write an amount of any cost, with its unit."""
    if cost == "time":
        return milliseconds(value)
    if cost == "energy":
        return f"{value * 1e3:.3g}\N{NO-BREAK SPACE}mJ"
    return f"{count(value)} MACs" if cost == "macs" else f"{count(value)}B"


def count(number: float) -> str:
    """Write a large number with three digits and its prefix."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:#.3g}".rstrip(".") + f"\N{NO-BREAK SPACE}{letter}"
    return f"{number:.0f}"


def noise_note(noise: Noise | None) -> str:
    """Say how noisy the machine was while a profile was made."""
    if noise is None:
        return "noise unknown"
    warning = ", TOO NOISY" if noise.too_noisy else ""
    around = f"{noise.aa_low:.3f} to {noise.aa_high:.3f}"
    return (
        f"A/A {noise.aa_ratio:.3f} ({around}), spread "
        f"\N{PLUS-MINUS SIGN}{noise.spread:.0%}{warning}"
    )


def evaluation_table(evaluation: Evaluation, exits: Sequence[str] = ()) -> Table:
    """List every way to answer.

    Args:
        exits: Names of the exits, to stand beside their numbers.
    """
    free = next((row.contract_s for row in evaluation.of("exit_free")), 0.0)
    names = [Cell(row.name) for row in evaluation.rows]
    # metrics of the whole split, where the task has some
    metrics = tuple(evaluation.rows[0].metrics)
    # Times that came from elsewhere often come without them.
    counted = any(row.macs for row in evaluation.rows)
    names[: len(exits)] = [Cell(f"exit {k}", exit) for k, exit in enumerate(exits)]
    return Table(
        title=f"Every way to answer, judged on {grouped(evaluation.samples)} samples of the "
        f"{evaluation.split} split. Contract: only heads that are looked at run; “against no "
        "exits” compares this time with that of the network without exits.",
        columns=(
            "",
            evaluation.quality_name,
            "95 % interval",
            *metrics,
            Column("probability of the truth", only="page"),
            Column("interruptible, ms", optional=True),
            "contract, ms",
            "against no exits",
            *((Column("MACs", optional=True),) if counted else ()),
            Column("calibration error", optional=True),
            Column("answered by each exit, %", folds=True),
        ),
        rows=[
            (
                name,
                percent(row.accuracy.value),
                interval(row.accuracy),
                *(_metric(row.metrics, name) for name in metrics),
                percent(row.p_true.value) if row.p_true else "",
                three_digits(row.interruptible_s),
                three_digits(row.contract_s),
                _signed(row.contract_s / free - 1.0 if free else 0.0),
                *((count(row.macs),) if counted else ()),
                "" if row.calibration_error is None else f"{row.calibration_error:.3f}",
                " ".join(f"{share * 100:.0f}" for share in row.shares),
            )
            for name, row in zip(names, evaluation.rows, strict=True)
        ],
        kinds=[row.kind for row in evaluation.rows],
    )


def _metric(metrics: Mapping[str, float], name: str) -> str:
    # networks from elsewhere may come without
    return f"{metrics[name]:.4g}" if name in metrics else ""


def engine_table(name: str, rows: Sequence[PairedComparison], evaluation: Evaluation) -> Table:
    """Compare an engine's answers with torch's, exit by exit."""
    return Table(
        title=f"{name}, on the same {evaluation.samples} samples as torch.",
        columns=(
            "",
            "accuracy",
            "95 % interval",
            "in torch",
            Column("95 % interval", optional=True),
            "difference, points",
            "95 % interval",
            Column("same answer", optional=True),
            "contract, ms",
        ),
        rows=[
            (
                Cell(f"exit {row.exit}", row.name),
                percent(row.accuracy.value),
                interval(row.accuracy),
                percent(row.reference.value),
                interval(row.reference),
                _points(row.difference.value),
                f"{_points(row.difference.low)} to {_points(row.difference.high)}",
                percent(row.same.value),
                three_digits(judged.contract_s),
            )
            for row, judged in zip(rows, evaluation.of("exit"), strict=True)
        ],
    )


def real_times_table(evaluation: Evaluation) -> Table:
    """Compare measured with predicted times, where samples were really answered."""
    return Table(
        title="Test samples really answered, one by one, on the clock of this machine.",
        columns=(
            "",
            "measured, ms",
            "95 % interval",
            "predicted, ms",
            "measured over predicted",
            "samples",
        ),
        rows=[
            (
                row.name,
                three_digits(row.real.mean_s.value),
                f"{three_digits(row.real.mean_s.low)} to {three_digits(row.real.mean_s.high)}",
                three_digits(row.real.predicted_s),
                f"{row.real.mean_s.value / row.real.predicted_s:.2f}",
                str(row.real.samples),
            )
            for row in evaluation.rows
            if row.real is not None
        ],
    )


def budgets_table(evaluation: Evaluation, chosen: str | None = None) -> Table:
    """List expected accuracies under distributions of budgets.

    Args:
        chosen: Name of the distribution that comes first.
    """
    budgets = sorted(evaluation.budgets, key=lambda name: name != chosen)
    names = list(dict.fromkeys(row.name for row in evaluation.under_budgets))
    titles = [
        Cell(
            name.replace("_likely", " budgets likely") if name in STANDARD else name,
            budget_words(evaluation.budgets[name]),
        )
        for name in budgets
    ]
    found = {(row.budget, row.name): row.accuracy for row in evaluation.under_budgets}
    best = dict.fromkeys(budgets, 0.0)
    for row in evaluation.under_budgets:
        if row.name != _ORACLE:
            best[row.budget] = max(best[row.budget], row.accuracy.value)

    def cell(budget: str, name: str) -> str | Cell:
        accuracy = found.get((budget, name))
        if accuracy is None:
            return ""
        strong = name != _ORACLE and accuracy.value >= best[budget]
        return Cell(percent(accuracy.value), interval(accuracy), strong)

    return Table(
        title="Expected accuracy when the budget is random; no answer in time is wrong.",
        columns=("", *titles),
        rows=[[name, *(cell(budget, name) for budget in budgets)] for name in names],
        kinds=["oracle" if name == _ORACLE else "" for name in names],
    )


# knows each budget and the accuracy of every exit
_ORACLE = "static oracle"


def budget_words(budget: Budget) -> str:
    """Describe a distribution of budgets in a few words."""
    if budget.shape == "point":
        return f"always {amount(budget.high, budget.cost)}"
    samples = f", n = {len(budget.samples_s)}" if budget.samples_s else ""
    low = three_digits(budget.low) if budget.cost == "time" else amount(budget.low, budget.cost)
    return (
        f"{budget.shape.replace('_', ' ')}, {low if budget.low else 0} to "
        f"{amount(budget.high, budget.cost)}{samples}"
    )


def costs_table(costs: CostProfile, batch_size: int) -> Table:
    """List the measured times of stages and heads at one batch size."""
    batch = costs.at(batch_size)
    contract = costs.contract_s(batch_size=batch_size)
    interruptible = costs.interruptible_s(batch_size=batch_size)
    rows: list[Row] = []

    def counts(macs: float, parameters: int) -> tuple[str, ...]:
        return () if costs.is_given else (count(macs), grouped(parameters))

    for exit, name in enumerate(costs.exits):
        so_far = (three_digits(contract[exit]), three_digits(interruptible[exit]))
        macs = costs.head_macs[exit]
        parameters = costs.head_parameters[exit]
        headless = not (batch.heads[exit].max or macs or parameters)
        rows.append(
            (
                Cell(f"stage {exit}", f"to {name}"),
                *_times(batch.stages[exit]),
                *counts(costs.stage_macs[exit], costs.stage_parameters[exit]),
                *(so_far if headless else ("", "")),
            )
        )
        if not headless:
            rows.append(
                (
                    f"head {exit}",
                    *_times(batch.heads[exit]),
                    *counts(macs, parameters),
                    *so_far,
                )
            )
    mean = three_digits(batch.exit_free.mean)
    total = counts(costs.exit_free("macs"), sum(costs.stage_parameters))
    rows.append(("without exits", *_times(batch.exit_free), *total, mean, mean))
    source = costs.provenance
    measured = (
        f"Measured times in ms in {source.engine or 'eager'} at batch size {batch_size}, "
        f"{source.processor}, threads: {source.threads}; {noise_note(batch.noise)}."
    )
    counted = (Column("MACs", optional=True), Column("parameters", only="page"))
    given = f"Times in ms at batch size {batch_size}, as they were given; not measured here."
    return Table(
        title=given if costs.is_given else measured,
        columns=(
            "",
            "mean",
            "p50",
            Column("p90", only="page"),
            "p99",
            Column("p99.9", only="page"),
            Column("max", only="page"),
            Column("n", optional=True),
            *(() if costs.is_given else counted),
            "contract, ms",
            "interruptible, ms",
        ),
        rows=rows,
        # a stage's name has a detail
        kinds=["" if isinstance(row[0], Cell) else "head" for row in rows[:-1]] + [""],
    )


def _times(part: Quantiles) -> Iterable[str]:
    times = (part.mean, part.p50, part.p90, part.p99)
    # of fewer runs it is one of the longest few
    rare = three_digits(part.p999) if part.n >= RUNS_OF_P999 else ""
    return (*map(three_digits, times), rare, three_digits(part.max), f"{part.n}")


def _points(share: float) -> str:
    return f"{share * 100:+.1f}".replace("-", "\N{MINUS SIGN}")


def _signed(change: float) -> str:
    return (
        f"{change * 100:+.0f} %".replace("-", "\N{MINUS SIGN}") if abs(change) >= 0.005 else "0 %"
    )
