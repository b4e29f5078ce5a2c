"""Every step once, on the digits that come with scikit-learn."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

import impatient
from impatient.clock import Deadline
from impatient.progress import tracked
from impatient.recipe import Recipe
from impatient.table import Table, in_ms
from impatient.verbs.evaluate import EvaluateOptions, evaluate
from impatient.verbs.fit import FitOptions, fit
from impatient.verbs.options import Count, Flag, Positive, Quiet, VerbOptions, spare_a_core
from impatient.verbs.processes import alone
from impatient.verbs.profile import ProfileOptions, profile
from impatient.verbs.record import RecordOptions, record
from impatient.verbs.report import ReportOptions, report
from impatient.verbs.run_directory import RunDirectory
from impatient.verbs.serve import ServeOptions, check_installed, serve
from impatient.verbs.train import TrainOptions, train

if TYPE_CHECKING:
    from impatient.training.data import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions(VerbOptions):
    """Take every step once, on digits of scikit-learn.

    Attributes:
        directory: The run directory to make.
        epochs: Passes over the training split.
        serve: Serve the network afterwards, to this machine alone, and open the page.
        port: Port to serve at; 0 takes a free one.
        no_browser: Say where the page is, but do not open it.
    """

    directory: Annotated[Positional[Path], arg(metavar="[DIR]")] = Path("impatient-demo")
    epochs: Positive = 20
    serve: Flag = False
    port: Count = 8000
    no_browser: Annotated[Flag, arg(name="no-browser")] = False
    quiet: Quiet = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineRow:
    """What one deadline gave over a whole split.

    Attributes:
        deadline_s: time for each answer.
        samples: number of answers.
        met: share of them that came by the deadline.
        mean_exit: mean number of the exits that gave them.
        mean_time_s, p99_time_s: mean and p99 of the times that they took.
        accuracy: share of them that are right.
    """

    deadline_s: float
    samples: int
    met: float
    mean_exit: float
    mean_time_s: float
    p99_time_s: float
    accuracy: float

    @classmethod
    def of(
        cls, deadline_s: float, answers: Sequence[impatient.Answer], labels: Sequence[int]
    ) -> DeadlineRow:
        """Sum up the answers under one deadline."""
        import numpy as np

        times = [answer.elapsed_s for answer in answers]
        chosen = [int(answer.output.argmax()) for answer in answers]
        return cls(
            deadline_s=deadline_s,
            samples=len(answers),
            met=float(np.mean([answer.deadline_met for answer in answers])),
            mean_exit=float(np.mean([answer.exit for answer in answers])),
            mean_time_s=float(np.mean(times)),
            p99_time_s=float(np.quantile(times, 0.99)),
            accuracy=float(np.mean(np.equal(chosen, labels))),
        )


@alone(make=True)
def demo(options: DemoOptions) -> list[DeadlineRow]:
    """Take every step, then answer for the test split under each deadline."""
    from impatient.portable.timing import RESERVE_S

    if options.serve:
        # not only when all else is done
        check_installed()
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
    # What follows is timed; training may take all cores.
    spare_a_core()
    profile(ProfileOptions(directory=directory, quiet=quiet))
    record(RecordOptions(directory=directory, quiet=quiet))
    fit(FitOptions(directory=directory, max_accuracy_loss=0.01, quiet=quiet))
    evaluate(EvaluateOptions(directory=directory, quiet=quiet))
    report(ReportOptions(directory=directory))
    run = RunDirectory(directory)
    network, _ = run.network()
    costs = run.profile()
    # for each exit a deadline just long enough for it
    deadlines = [round(1.1 * cost + RESERVE_S, 5) for cost in costs.contract_s(statistic="p99")]
    runners = [impatient.Runner(network, costs) for _ in deadlines]
    return under_deadlines(runners, run.data(), "test", deadlines, progress=not quiet)


def under_deadlines(
    runners: Sequence[impatient.Runner],
    data: impatient.Data,
    split: Split,
    deadlines_s: Sequence[float],
    *,
    progress: bool = False,
) -> list[DeadlineRow]:
    """Answer for a split's samples one by one, under every deadline in turn.

    So all deadlines meet the machine's changes alike. Their order is reversed from sample to
    sample, so that none always comes after another.

    Args:
        runners: a runner for each deadline, which knows the machine from its own answers.
        data: where the samples come from.
        split: the split.
        deadlines_s: the deadlines.
        progress: whether to show progress, between samples.
    """
    samples = list(data.batches(split, 1))
    labels = [int(label) for _, label in samples]
    pairs = list(zip(runners, deadlines_s, strict=True))
    answers: list[list[impatient.Answer]] = [[] for _ in pairs]
    for runner in runners:
        runner.warm_up(samples[0][0], times=20)
    counted = tracked(
        samples, "answering", total=len(samples), unit="samples", wanted=progress, between=True
    )
    for number, (x, _) in enumerate(counted):
        order = range(len(pairs)) if number % 2 else reversed(range(len(pairs)))
        for place in order:
            runner, deadline_s = pairs[place]
            answers[place].append(runner.run(x, deadline=Deadline.after(deadline_s, runner.clock)))
    return [
        DeadlineRow.of(deadline_s, given, labels)
        for deadline_s, given in zip(deadlines_s, answers, strict=True)
    ]


def shown(options: DemoOptions, rows: Sequence[DeadlineRow]) -> Iterator[Table | str]:
    """Give a row per deadline, and where the report is."""
    yield Table(
        title=f"{rows[0].samples} test images answered one by one under all deadlines in turn, on "
        "the real clock",
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
    yield from _three_lines(options, rows)


def _three_lines(options: DemoOptions, rows: Sequence[DeadlineRow]) -> Iterator[str]:
    """Say what was promised, what was measured, and what to open."""
    from impatient.evaluation.advice import points_to_guarantee

    run = RunDirectory(options.directory)
    evaluation = impatient.Evaluation.load(run.evaluation_file)
    policy = evaluation.of("policy")[0]
    target = run.targets()[policy.name]
    wanted = target.wanted * 100
    lost = (evaluation.of("exit")[-1].accuracy.value - policy.accuracy.value) * 100
    free = evaluation["no exits, same weights"].contract_s
    met = sum(row.met for row in rows) / len(rows)
    missed = (
        f" (missed; for a bound on new samples: impatient fit {options.directory} "
        f"--max-loss {points_to_guarantee(target):g} --delta 0.05)"
    )
    yield f"promised: answers by the deadline, and a policy that loses at most {wanted:g} point"
    yield (
        f"measured: {met:.1%} of the answers by their deadline; {lost:.1f} points lost"
        f"{missed if lost > wanted else ''}, in {in_ms(policy.contract_s)} ms on average instead "
        f"of {in_ms(free)} ms"
    )
    yield f"to open:  {(options.directory / 'report.html').resolve()}"


def then(options: DemoOptions) -> None:
    """Serve the network, if that was asked for, until Ctrl-C."""
    if options.serve:
        serve(
            ServeOptions(directories=(options.directory,), port=options.port),
            begun=lambda address: None if options.no_browser else open_page(address),
        )


def open_page(address: str) -> None:
    """Open a page, where there is a screen.

    Without one, Python would open it in a browser for the terminal.
    """
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    if sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in screens):
        # Some browsers come back only when they are closed.
        threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
