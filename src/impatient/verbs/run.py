"""Answer for input files by a deadline."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

import impatient
from impatient.clock import NEVER, SYSTEM_CLOCK, Deadline, positive_seconds
from impatient.errors import RunError
from impatient.table import Cell, Table, in_ms, percent
from impatient.verbs.network_spec import NetworkSpec
from impatient.verbs.options import (
    OFF,
    AnyProfile,
    Directory,
    Engine,
    Flag,
    Milliseconds,
    Positive,
    Text,
    Threads,
    Trust,
    VerbOptions,
    use_threads,
)
from impatient.verbs.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor

    from impatient.runtime import RunReport


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(VerbOptions):
    """Answer for images by a deadline.

    Attributes:
        inputs: Image files, or .npy files of one raw sample each, without a batch dimension:
            pixels of 0 to 255 (uint8) or 0 to 1; they are standardised here. Samples of several
            arrays are .npz files, which hold them by their names. Sound is .wav, from -1 to 1;
            text is .txt, for the tokenizer of the training data.
        deadline_s: Time for each answer in ms; without it, no limit.
        interrupt_s: Interrupt each run after this time in ms, which it does not know beforehand,
            and take the latest answer. Before the first exit, that exit is waited for.
        policy: Name of a fitted policy, to stop when going on is not worth it.
        when_late: What to do when not even the first exit fits.
        pictures: Folder for pictures with the answers drawn over them: masks or boxes.
        stats: Say how the runs went: how many were late, why, where the time went, and what to
            change.
        repeats: How often to answer for each file; its last answer is shown.
    """

    directory: Directory
    inputs: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE..."), OFF]
    deadline_s: Annotated[Milliseconds, arg(name="deadline-ms")] = None
    interrupt_s: Annotated[Milliseconds, arg(name="interrupt-ms")] = None
    policy: Text = None
    when_late: Literal["answer", "raise"] = "answer"
    pictures: Annotated[Path | None, OFF] = None
    engine: Engine = "eager"
    any_profile: AnyProfile = False
    threads: Threads = 0
    stats: Flag = False
    repeats: Positive = 1
    trust: Trust = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FileAnswer:
    """An answer for one file, with its most probable class, or in numbers.

    Attributes:
        file: the file.
        label: the answer in words or numbers.
        probability: how likely it is; None where the task is not of classes.
        answer: what the runner returned.
        back_s: seconds from the interruption until the answer was back; None without one.
    """

    file: Path
    label: str
    probability: float | None
    answer: impatient.Answer
    back_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """Answers for files, and how their runs went.

    Attributes:
        answers: The last answer for each file.
        report: What became of all runs; None if nobody asked.
        exits: Names of the exits.
    """

    answers: list[FileAnswer]
    report: RunReport | None
    exits: tuple[str, ...]


def run(options: RunOptions) -> Answered:
    """Answer for each input file by the deadline."""
    from impatient.verbs.input_files import read_raw
    from impatient.verbs.samples import save_drawn

    use_threads(options.threads)
    if not options.inputs:
        raise RunError("no input files; expected at least one image (or .npy array) to answer for.")
    if options.interrupt_s is not None:
        positive_seconds(options.interrupt_s, "the time until an interruption")
        if options.stats:
            raise RunError(
                "--stats tells of runs by a deadline, which --interrupt-ms are not; expected one "
                "of them."
            )
    run = RunDirectory(options.directory, trust=options.trust).engine(options.engine)
    spec = run.spec()
    # all are read before the first deadline is stamped
    raw = [read_raw(spec, file) for file in options.inputs]
    inputs = [spec.preprocess(one) for one in raw]
    network, _ = run.network()
    runner = impatient.Runner(
        network,
        run.profile(any_machine=options.any_profile),
        run.policy(options.policy) if options.policy else None,
        any_profile=options.any_profile,
        when_late=options.when_late,
    )
    runner.warm_up(inputs[0])
    answers = []
    for file, x in zip(options.inputs, inputs, strict=True):
        for _ in range(options.repeats):
            answer, back_s = _answered(runner, x, options)
        label, probability = _said(spec, answer.output)
        answers.append(
            FileAnswer(
                file=file, label=label, probability=probability, answer=answer, back_s=back_s
            )
        )
    if options.pictures:
        for place, (row, one) in enumerate(zip(answers, raw, strict=True)):
            # numbered, as files of several folders may have one name
            name = f"{place}-{row.file.stem}.png"
            save_drawn(spec.means, row.answer.output, one, options.pictures / name)
    report = runner.report() if options.stats else None
    return Answered(answers=answers, report=report, exits=network.exit_names)


def _answered(
    runner: impatient.Runner, x: Any, options: RunOptions
) -> tuple[impatient.Answer, float | None]:
    """Answer by the deadline, or be interrupted, and then say how long the answer took to come."""
    limit_s = options.deadline_s
    deadline = NEVER if limit_s is None else Deadline.after(limit_s)
    if options.interrupt_s is None:
        return runner.run(x, deadline=deadline), None
    with runner.start(x, deadline=deadline) as started:
        time.sleep(options.interrupt_s)
        begin = SYSTEM_CLOCK.now()
        answer = started.interrupt()
        return answer, SYSTEM_CLOCK.now() - begin


def _said(spec: NetworkSpec, output: Tensor) -> tuple[str, float | None]:
    """Say the output of one sample, [1, ...], and of classes how likely the answer is."""
    said = spec.means.says(output, spec.class_names)
    if not spec.means.is_logits:
        return said, None
    return said, float(output.float().softmax(-1).max())


def shown(_: RunOptions, answered: Answered) -> Iterator[Table | str]:
    """Give a table of the answers, and how the runs went."""
    yield Table(
        title="",
        columns=("file", "answer", "probability", "exit", "ms", "stopped by", "in time"),
        left=2,
        rows=[
            (
                str(row.file),
                row.label,
                "" if row.probability is None else f"{row.probability:.1%}",
                str(row.answer.exit),
                in_ms(row.answer.elapsed_s),
                row.answer.stopped_by,
                "yes" if row.answer.deadline_met else Cell("NO", strong=True),
            )
            for row in answered.answers
        ],
    )
    if answered.report is not None:
        yield _stats(answered.report, answered.exits)
        yield answered.report.advice()


def _stats(report: RunReport, exits: Sequence[str]) -> Table:
    """Make a table of what became of runs."""
    rows = []
    if report.with_deadline:
        rows = [
            ("late", "of the answers with a deadline", percent(report.missed)),
            ("floor", "late had the first exit alone answered", percent(report.floor)),
            ("used", "of the time allowed, in the median answer in time", percent(report.used)),
        ]
    rows += [
        (f"exit {exit}", f"of the answers, after {exits[exit]}", percent(share))
        for exit, share in report.exits.items()
    ]
    rows += [(name, "of the time", percent(share)) for name, share in report.spent.items()]
    columns = ("", "share of what", "share")
    return Table(title=f"{report.runs} runs", columns=columns, rows=rows, left=2)


def plain(answered: Answered) -> Any:
    """Give the answers as plain values, times in milliseconds; with statistics if asked."""
    answers = _plain_answers(answered.answers)
    report = answered.report
    if report is None:
        return answers
    return {"answers": answers, "stats": dataclasses.asdict(report) | {"advice": report.advice()}}


def _plain_answers(answers: Sequence[FileAnswer]) -> list[dict[str, Any]]:
    return [
        {
            "file": str(row.file),
            "answer": row.label,
            "probability": None if row.probability is None else round(row.probability, 6),
            "exit": row.answer.exit,
            "elapsed_ms": round(row.answer.elapsed_s * 1e3, 4),
            "stopped_by": row.answer.stopped_by,
            "deadline_met": row.answer.deadline_met,
            **({} if row.back_s is None else {"back_after_ms": round(row.back_s * 1e3, 4)}),
        }
        for row in answers
    ]
