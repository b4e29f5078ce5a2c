"""Every step once, on the digits that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

import impatient
from impatient.clock import Deadline
from impatient.recipe import Recipe
from impatient.table import Table, in_ms
from impatient.verbs.evaluate import EvaluateOptions, evaluate
from impatient.verbs.fit import FitOptions, fit
from impatient.verbs.options import Positive, Quiet, VerbOptions
from impatient.verbs.processes import alone
from impatient.verbs.profile import ProfileOptions, profile
from impatient.verbs.record import RecordOptions, record
from impatient.verbs.report import ReportOptions, report
from impatient.verbs.run_directory import RunDirectory
from impatient.verbs.train import TrainOptions, train

if TYPE_CHECKING:
    from impatient.training.data import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions(VerbOptions):
    """Take every step once, on digits of scikit-learn.

    Attributes:
        directory: The run directory to make.
        epochs: Passes over the training split.
    """

    directory: Annotated[Positional[Path], arg(metavar="[DIR]")] = Path("impatient-demo")
    epochs: Positive = 20
    quiet: Quiet = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineRow:
    """What one deadline gave over a whole split."""

    deadline_s: float
    samples: int
    met: float
    mean_exit: float
    mean_time_s: float
    p99_time_s: float
    accuracy: float


@alone(make=True)
def demo(options: DemoOptions) -> list[DeadlineRow]:
    """Take every step, then answer for the test split under each deadline."""
    from impatient.runtime.runner import RESERVE_S

    directory = options.directory
    quiet = options.quiet
    train(
        TrainOptions(
            directory=directory,
            model="impatient:resnet:n=3,c=16",
            exits=6,
            heads="relu_linear",
            recipe=Recipe(epochs=options.epochs, batch_size=64, augment="crop"),
            quiet=quiet,
        )
    )
    profile(ProfileOptions(directory=directory, quiet=quiet))
    record(RecordOptions(directory=directory, quiet=quiet))
    fit(FitOptions(directory=directory, max_accuracy_loss=0.01))
    evaluate(EvaluateOptions(directory=directory))
    report(ReportOptions(directory=directory))
    run = RunDirectory(directory)
    network, _ = run.network()
    costs = run.profile()
    # for each exit a deadline just long enough for it
    deadlines = [round(1.1 * cost + RESERVE_S, 5) for cost in costs.contract_s(statistic="p99")]
    return under_deadlines(impatient.Runner(network, costs), run.data(), "test", deadlines)


def under_deadlines(
    runner: impatient.Runner, data: impatient.Data, split: Split, deadlines_s: Sequence[float]
) -> list[DeadlineRow]:
    """Answer for a split's samples one by one under each deadline."""
    import numpy as np

    samples = [(x, int(y)) for x, y in data.batches(split, 1)]
    runner.warm_up(samples[0][0], times=20)
    rows = []
    for deadline_s in deadlines_s:
        answers = [
            (runner.run(x, deadline=Deadline.after(deadline_s)), label) for x, label in samples
        ]
        times = [answer.elapsed_s for answer, _ in answers]
        hits = [int(answer.output.argmax()) == label for answer, label in answers]
        rows.append(
            DeadlineRow(
                deadline_s=deadline_s,
                samples=len(samples),
                met=float(np.mean([answer.deadline_met for answer, _ in answers])),
                mean_exit=float(np.mean([answer.exit for answer, _ in answers])),
                mean_time_s=float(np.mean(times)),
                p99_time_s=float(np.quantile(times, 0.99)),
                accuracy=float(np.mean(hits)),
            )
        )
    return rows


def shown(options: DemoOptions, rows: Sequence[DeadlineRow]) -> Iterator[Table | str]:
    """Give a row per deadline, and where the report is."""
    yield Table(
        title=f"{rows[0].samples} test images answered one by one under each deadline, on the real "
        "clock",
        columns=(
            "deadline ms",
            "answered in time",
            "mean exit",
            "mean time ms",
            "p99 time ms",
            "accuracy",
        ),
        left=0,
        rows=[
            (
                in_ms(row.deadline_s),
                f"{row.met:.1%}",
                f"{row.mean_exit:.2f}",
                in_ms(row.mean_time_s),
                in_ms(row.p99_time_s),
                f"{row.accuracy:.1%}",
            )
            for row in rows
        ],
    )
    evaluation = impatient.Evaluation.load(RunDirectory(options.directory).evaluation_file)
    policy = evaluation.of("policy")[0]
    last = evaluation.of("exit")[-1]
    lost = (last.accuracy.value - policy.accuracy.value) * 100
    free = evaluation["no exits, same weights"].contract_s
    met = sum(row.met for row in rows) / len(rows)
    yield "promised: answers by the deadline, and a policy that loses about 1 point of accuracy"
    yield (
        f"measured: {met:.1%} of the answers by their deadline; {lost:.1f} points lost, "
        f"in {in_ms(policy.contract_s)} ms on average instead of {in_ms(free)} ms"
    )
    yield f"to open:  {(options.directory / 'report.html').resolve()}"
