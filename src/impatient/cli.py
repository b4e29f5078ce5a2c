"""The command line: one verb per step, all working on one run directory."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import tyro
from rich.console import Console

from impatient.characters import visible
from impatient.errors import ImpatientError, StorageError
from impatient.provenance import own_version
from impatient.terminal import rich_table
from impatient.verbs import (
    bench_serve,
    compare,
    demo,
    describe,
    ensemble,
    evaluate,
    export,
    fit,
    import_outputs,
    plan,
    profile,
    recalibrate,
    record,
    report,
    run,
    select,
    serve,
    show,
    tail,
    train,
    tune,
)
from impatient.verbs.notes import log
from impatient.verbs.options import VerbOptions, spare_a_core
from impatient.verbs.processes import is_first

if TYPE_CHECKING:
    from impatient.table import Table

DESCRIPTION = "Make any PyTorch network answer by a deadline, and better as time allows."
CONFIG = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.DisallowNone,
    tyro.conf.HelptextFromCommentsOff,
)
# what Ctrl-C leaves of a verb that writes one file, or none
AS_BEFORE = "all files are as they were before. Run the same command again."
# the shell's own code for a command that Ctrl-C ended
STOPPED = 130
# a pipe or a file has no width that tables must fit in; a model "mynet:factory:n=2" is no emoji
out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140, emoji=False)
err = Console(stderr=True, emoji=False)


class Verb(NamedTuple):
    """A step: its options, its work, and what is said of it.

    Attributes:
        options: Its options.
        work: What it does.
        kept: What Ctrl-C leaves.
        shown: What is printed of the result.
        plain: What becomes JSON of the result.
        then: What is done once the result is printed.
        spares_a_core: Whether it leaves a core to the rest of the machine; training does not.
    """

    options: type[VerbOptions]
    work: Callable[[Any], Any]
    kept: str
    shown: Callable[[Any, Any], Iterable[Table | str]] = lambda _options, _result: ()
    plain: Callable[[Any], Any] = lambda result: result
    then: Callable[[Any], None] = lambda _options: None
    spares_a_core: bool = True


# in the order in which one works, then what is beside the way
VERBS = {
    "train": Verb(
        train.TrainOptions,
        train.train,
        "the checkpoint is kept, with every batch until it. Run the same command again to go on "
        "from there.",
        spares_a_core=False,
    ),
    "profile": Verb(
        profile.ProfileOptions,
        profile.profile,
        "profiles that were finished, and those from before, are kept; half a measurement is not.",
        profile.shown,
    ),
    "record": Verb(
        record.RecordOptions,
        record.record,
        "splits that were finished, and recordings from before, are kept. Run the same command "
        "again for the others.",
    ),
    "fit": Verb(fit.FitOptions, fit.fit, AS_BEFORE, fit.shown),
    "evaluate": Verb(evaluate.EvaluateOptions, evaluate.evaluate, AS_BEFORE, evaluate.shown),
    "report": Verb(report.ReportOptions, report.report, AS_BEFORE),
    "run": Verb(
        run.RunOptions,
        run.run,
        "pictures of answers that were written are kept. Run the same command again.",
        run.shown,
        run.plain,
    ),
    "show": Verb(show.ShowOptions, show.show, AS_BEFORE, show.shown),
    "describe": Verb(describe.DescribeOptions, describe.describe, AS_BEFORE, describe.shown),
    "export": Verb(
        export.ExportOptions,
        export.export,
        "an exported network is kept if it was written whole, without its times; before that, what "
        "was there. Run the same command again, with --force if --out is written.",
        export.shown,
    ),
    "compare": Verb(compare.CompareOptions, compare.compare, AS_BEFORE, compare.shown),
    "tail": Verb(tail.TailOptions, tail.tail, AS_BEFORE, tail.shown),
    "tune": Verb(tune.TuneOptions, tune.tune, AS_BEFORE, tune.shown),
    "recalibrate": Verb(
        recalibrate.RecalibrateOptions,
        recalibrate.recalibrate,
        "the weights from before are kept, but of a network that was finished. Run the same "
        "command again.",
        recalibrate.shown,
        spares_a_core=False,
    ),
    "ensemble": Verb(ensemble.EnsembleOptions, ensemble.ensemble, AS_BEFORE),
    "select": Verb(
        select.SelectOptions,
        select.select,
        "steps that were finished are kept: the cascade, its profile, recordings of splits, the "
        "policy. Run the same command again, without --force, to go on.",
        select.shown,
    ),
    "serve": Verb(serve.ServeOptions, serve.serve, AS_BEFORE),
    "bench-serve": Verb(
        bench_serve.BenchServeOptions,
        bench_serve.bench_serve,
        AS_BEFORE,
        bench_serve.shown,
        spares_a_core=False,
    ),
    "plan": Verb(plan.PlanOptions, plan.plan, AS_BEFORE, plan.shown),
    "import": Verb(
        import_outputs.ImportOptions,
        import_outputs.import_outputs,
        AS_BEFORE,
        import_outputs.shown,
    ),
    "demo": Verb(
        demo.DemoOptions,
        demo.demo,
        "steps that were finished are kept, and of the training the checkpoint. Run the same "
        "command again to go on.",
        demo.shown,
        then=demo.then,
        spares_a_core=False,
    ),
}


class Notes(logging.Handler):
    """Print notes as they are: paths are not folded, brackets are no markup."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        print_text(self.console, record.getMessage())


def main() -> None:
    """Run a verb, and end errors and Ctrl-C with one message."""
    code = 0
    verb = VERBS["train"]
    try:
        if sys.argv[1:] == ["--version"]:
            print_text(out, f"impatient {own_version()}")
            return
        # other processes of the same training stay silent
        first = is_first()
        log.setLevel(logging.INFO)
        # of what is done while options are read, such as unpacking a network of the zoo
        log.handlers = [Notes(err) if first else logging.NullHandler()]
        options = parse(sys.argv[1:] or ["--help"])
        verb = next(verb for verb in VERBS.values() if type(options) is verb.options)
        if first and not options.json:
            log.handlers = [Notes(out)]
        if verb.spares_a_core:
            spare_a_core()
        result = verb.work(options)
        if first:
            answer(verb, options, result)
            verb.then(options)
    except (ImpatientError, OSError) as error:
        code = 1
        # an OSError is of a place that is no file of ours, such as a terminal that has gone
        kind = type(error) if isinstance(error, ImpatientError) else StorageError
        print_text(err, f"error ({kind.__name__}): {error}")
    except KeyboardInterrupt:
        code = STOPPED
        print_text(err, f"\nstopped; {verb.kept}")
    sys.exit(code)


def answer(verb: Verb, options: VerbOptions, result: Any) -> None:
    """Print what a verb gave, for people or for scripts."""
    if options.json:
        from impatient.verbs.as_json import to_json

        print_text(out, to_json(verb.plain(result)))
        return
    for part in verb.shown(options, result):
        print_part(part)


def parse(arguments: Sequence[str]) -> Any:
    """Read a command line as its verb's options, or exit with a message."""
    return tyro.extras.subcommand_cli_from_dict(
        {name: verb.options for name, verb in VERBS.items()},
        prog="impatient",
        description=DESCRIPTION,
        args=arguments,
        config=CONFIG,
    )


def print_part(part: Table | str) -> None:
    """Print a table or a text."""
    if isinstance(part, str):
        print_text(out, part)
    else:
        out.print(rich_table(part, out.width))


def print_text(console: Console, text: str) -> None:
    """Print a text as it is, but for characters that would control the terminal."""
    console.print(visible(text), soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
