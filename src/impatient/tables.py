"""Tables for the terminal; milliseconds and per cent, because people read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from impatient.costs import Comparison, CostProfile, Noise
from impatient.engines.export import EngineTimes
from impatient.evaluation.evaluate import Evaluation
from impatient.evaluation.metrics import Estimate
from impatient.evaluation.paired import PairedComparison
from impatient.networks import growth
from impatient.networks.growth import GrowthCosts, Schedule
from impatient.runtime.answer import Answer
from impatient.workflow import DeadlineRow


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right")
    return table


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def costs_table(costs: CostProfile, batch_size: int) -> Table:
    """Measured times of one batch size."""
    batch = costs.at(batch_size)
    table = _table(
        f"times in ms in {costs.provenance.engine or 'eager'}, batch size {batch_size}, n = "
        f"{batch.exit_free.n}, "
        f"{costs.provenance.processor}, threads: {costs.provenance.threads}",
        "exit",
        "after",
        "stage p50",
        "stage p99",
        "head p50",
        "head p99",
        "contract",
        "interruptible",
        left=2,
    )
    contract = costs.contract_s(batch_size=batch_size)
    interruptible = costs.interruptible_s(batch_size=batch_size)
    table.caption = _noise(batch.noise)
    table.caption_justify = "left"
    for index, name in enumerate(costs.exits):
        stage = batch.stages[index]
        head = batch.heads[index]
        times = (stage.p50, stage.p99, head.p50, head.p99, contract[index], interruptible[index])
        table.add_row(str(index), name, *(_ms(time) for time in times))
    whole = batch.exit_free
    table.add_row(
        "", "no exits", _ms(whole.p50), _ms(whole.p99), "", "", _ms(whole.mean), _ms(whole.mean)
    )
    return table


def engine_times_table(rows: Sequence[EngineTimes]) -> Table:
    """An exported network beside torch: whether it answers the same, and how long its stages take."""
    table = _table(
        "in the engine and in torch, in turn; medians in ms",
        "exit",
        "after",
        "largest difference",
        "engine",
        "torch",
        "engine / torch",
        left=2,
    )
    for index, row in enumerate(rows):
        place = str(index) if index < len(rows) - 1 else ""
        times = (_ms(row.engine_s), _ms(row.eager_s), f"{row.engine_s / row.eager_s:.2f}")
        table.add_row(place, row.name, f"{row.agreement:.1e}", *times)
    return table


def engine_accuracy_table(rows: Sequence[PairedComparison]) -> Table:
    """What an engine's answers are worth beside torch's."""
    table = _table(
        "right answers in the engine and in torch, on the same samples, with 95 % intervals",
        "exit",
        "after",
        "engine",
        "torch",
        "difference in points",
        "same answer",
        left=2,
    )
    for row in rows:
        points = [
            100 * value for value in (row.difference.value, row.difference.low, row.difference.high)
        ]
        table.add_row(
            str(row.exit),
            row.name,
            _percent(row.accuracy),
            _percent(row.reference),
            f"{points[0]:+.1f} ({points[1]:+.1f} to {points[2]:+.1f})",
            f"{row.same.value:.1%}",
        )
    return table


def _noise(noise: Noise | None) -> str:
    if noise is None:
        return "noise unknown"
    warning = ", TOO NOISY" if noise.too_noisy else ""
    interval = f"{noise.aa_low:.3f} to {noise.aa_high:.3f}"
    return (
        f"A/A {noise.aa_ratio:.3f} ({interval}), spread "
        f"\N{PLUS-MINUS SIGN}{noise.spread:.0%}{warning}"
    )


def comparison_table(rows: Sequence[Comparison], a: CostProfile, b: CostProfile) -> Table:
    """Two profiles at one batch size, exit by exit, and what their noise lets one say."""
    size = rows[0].batch_size
    table = _table(
        f"contract times of B beside A at batch size {size}; ratios say how many times as fast B "
        f"is\n"
        f"A: {_noise(a.at(size).noise)}\nB: {_noise(b.at(size).noise)}",
        "exit",
        "after",
        "A mean ms",
        "B mean ms",
        "means",
        "medians",
        "p99s",
        "verdict on B",
        left=2,
    )
    for row in rows:
        table.add_row(
            "" if row.exit is None else str(row.exit),
            row.name,
            _ms(row.a_s),
            _ms(row.b_s),
            f"{row.ratio:.3f}",
            f"{row.p50_ratio:.3f}",
            f"{row.p99_ratio:.3f}",
            _judged(row),
        )
    return table


def _judged(row: Comparison) -> str:
    known = {
        "faster": f"{row.ratio:.2f} times faster",
        "slower": f"{1.0 / row.ratio:.2f} times slower",
    }
    verdict = known.get(row.verdict, row.verdict) if row.ratio > 0.0 else row.verdict
    return verdict if row.noise is None else f"{verdict} (noise \N{PLUS-MINUS SIGN}{row.noise:.0%})"


def growth_table(name: str, costs: GrowthCosts, schedule: Schedule) -> Table:
    """What every iteration of a schedule costs."""
    table = _table(
        (
            f"{name}: all iterations take {costs.overhead:.3f} times a plain run ({_ms(costs.plain)} "
            f"ms)"
        ),
        "iteration",
        "blocks",
        "executions",
        "ms",
        "ms so far",
        "of a plain run",
        left=2,
    )
    rows = zip(
        schedule.names, growth.trace(schedule), costs.per_iteration, costs.cumulative, strict=True
    )
    for number, (blocks, executed, alone, so_far) in enumerate(rows, start=1):
        table.add_row(
            str(number),
            blocks,
            str(len(executed)),
            _ms(alone),
            _ms(so_far),
            f"{so_far / costs.plain:.0%}",
        )
    return table


def evaluation_table(evaluation: Evaluation) -> Table:
    """Every exit, policy and network without exits."""
    table = _table(
        (
            f"judged on {evaluation.samples} samples of split {evaluation.split!r}; times are means "
            f"in "
            f"ms"
        ),
        "",
        "accuracy (95 % interval)",
        "contract",
        "interruptible",
        "MMACs",
        "calibration error",
        "answered by each exit %",
    )
    for row in evaluation.rows:
        table.add_row(
            row.name,
            _percent(row.accuracy),
            _ms(row.contract_s),
            _ms(row.interruptible_s),
            f"{row.macs / 1e6:.2f}",
            f"{row.calibration_error:.3f}",
            " ".join(f"{share:.0%}".rstrip("%") for share in row.shares),
        )
    return table


def saving(evaluation: Evaluation, name: str) -> str:
    """What a policy saves against the last network of a cascade, or the last exit, in a sentence."""
    policy = evaluation[name]
    whole = evaluation["no exits, same weights"]
    points = (policy.accuracy.value - whole.accuracy.value) * 100
    return (
        f"{name}: {whole.contract_s / policy.contract_s:.2f} times as fast as the last network "
        f"alone "
        f"({_ms(policy.contract_s)} instead of {_ms(whole.contract_s)} ms a sample), "
        f"{abs(points):.1f} points of accuracy "
        f"{'lost' if points < 0 else 'gained'}"
    )


def real_table(evaluation: Evaluation) -> Table:
    """What policies took when samples were really answered, beside what was predicted of the same
    samples.
    """
    rows = [(row.name, row.real) for row in evaluation.rows if row.real is not None]
    samples = rows[0][1].samples if rows else 0
    table = _table(
        f"{samples} test samples answered one by one on the real clock; means in ms",
        "",
        "measured (95 % interval)",
        "predicted",
        "measured / predicted",
    )
    for name, real in rows:
        interval = f"{_ms(real.mean_s.value)} ({_ms(real.mean_s.low)} to {_ms(real.mean_s.high)})"
        table.add_row(
            name, interval, _ms(real.predicted_s), f"{real.mean_s.value / real.predicted_s:.2f}"
        )
    return table


def budgets_table(evaluation: Evaluation) -> Table:
    """Expected accuracy under distributions of budgets."""
    budgets = list(evaluation.budgets)
    table = _table(
        "expected accuracy when the budget is random; no answer in time is wrong", "", *budgets
    )
    names = list(dict.fromkeys(row.name for row in evaluation.under_budgets))
    values = {(row.name, row.budget): row.accuracy for row in evaluation.under_budgets}
    for name in names:
        cells = [values[name, budget] for budget in budgets]
        table.add_row(
            name, *(f"{cell.value:.1%} ± {(cell.high - cell.low) / 2:.1%}" for cell in cells)
        )
    return table


def deadlines_table(rows: Sequence[DeadlineRow], samples: int) -> Table:
    """What each deadline gave on the real clock."""
    table = _table(
        f"{samples} test images answered one by one under each deadline, on the real clock",
        "deadline ms",
        "answered in time",
        "mean exit",
        "mean time ms",
        "p99 time ms",
        "accuracy",
        left=0,
    )
    for row in rows:
        table.add_row(
            _ms(row.deadline_s),
            f"{row.met:.1%}",
            f"{row.mean_exit:.2f}",
            _ms(row.mean_time_s),
            _ms(row.p99_time_s),
            f"{row.accuracy:.1%}",
        )
    return table


def answers_table(answers: Sequence[tuple[Path, str, float, Answer]]) -> Table:
    """Answers for files."""
    table = _table(
        "", "file", "answer", "probability", "exit", "ms", "stopped by", "in time", left=2
    )
    for file, name, probability, answer in answers:
        table.add_row(
            str(file),
            name,
            f"{probability:.1%}",
            str(answer.exit),
            _ms(answer.elapsed_s),
            answer.stopped_by,
            Text("yes") if answer.deadline_met else Text("NO", style="red"),
        )
    return table
