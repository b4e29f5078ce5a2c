"""Say how often a run of a network will be late, by a fit of the tail of its times."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from impatient.errors import CostError
from impatient.table import Cell, Table, in_ms, percent
from impatient.verbs.options import (
    Directory,
    Engine,
    Flag,
    Milliseconds,
    Positive,
    Quiet,
    Threads,
    Trust,
    VerbOptions,
    use_threads,
)
from impatient.verbs.run_directory import RunDirectory

if TYPE_CHECKING:
    import numpy as np

    from impatient.evaluation.metrics import Estimate

# Probabilities whose times are shown.
RARE = (1e-4, 1e-5)


@dataclass(frozen=True, slots=True, kw_only=True)
class TailOptions(VerbOptions):
    """Say how often a run to each exit will be late.

    Attributes:
        deadline_s: Deadline in ms of which to say how often each exit would miss it.
        runs: Runs to each exit; to fit a tail it takes 1,000 or more.
        pause_s: Sleep in ms before each run, as in a loop that waits for its sensor.
        real_time: Make the real-time settings that the system permits.
    """

    directory: Directory
    deadline_s: Annotated[Milliseconds, arg(name="deadline-ms")] = None
    runs: Positive = 5000
    pause_s: Annotated[Milliseconds, arg(name="pause-ms")] = None
    real_time: Flag = False
    engine: Engine = "eager"
    threads: Threads = 0
    quiet: Quiet = False
    trust: Trust = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitTail:
    """What the times of runs to one exit allow to say.

    Attributes:
        exit: the exit.
        p50_s, p999_s, max_s: quantiles that were measured.
        shape: shape of the tail; None where the fit was refused.
        bounds_s: by probability, the time that a run exceeds with it (pWCET).
        late: probability of missing the deadline; None without a deadline.
        counted: share of the measured runs that would have missed it; None without a deadline.
        refused: why no tail was fitted; empty where one was.
    """

    exit: int
    p50_s: float
    p999_s: float
    max_s: float
    shape: float | None = None
    bounds_s: dict[str, Estimate] = field(default_factory=dict)
    late: Estimate | None = None
    counted: Estimate | None = None
    refused: str = ""


def tail(options: TailOptions) -> list[ExitTail]:
    """Measure runs to each exit, in turn, and fit the tails of their times."""
    from impatient.runtime.real_time import NAMES, RealTime
    from impatient.runtime.tail import times_to_exits

    use_threads(options.threads)
    run = RunDirectory(options.directory, trust=options.trust).engine(options.engine)
    network, _ = run.network()
    with RealTime(NAMES if options.real_time else ()) as settings, settings.quiet:
        times_s = times_to_exits(
            network,
            run.spec().example(),
            runs=options.runs,
            pause_s=options.pause_s or 0.0,
            progress=not options.quiet,
        )
    return [_of_exit(exit, row, options.deadline_s) for exit, row in enumerate(times_s)]


def _of_exit(exit: int, times_s: np.ndarray, deadline_s: float | None) -> ExitTail:
    import numpy as np

    from impatient.evaluation.metrics import proportion
    from impatient.runtime.tail import fit_tail

    counted = None
    if deadline_s is not None:
        counted = proportion(int((times_s > deadline_s).sum()), len(times_s))
    p50_s, p999_s, max_s = map(float, np.quantile(times_s, [0.5, 0.999, 1.0], method="higher"))
    measured = ExitTail(exit=exit, p50_s=p50_s, p999_s=p999_s, max_s=max_s, counted=counted)
    try:
        found = fit_tail(times_s)
    except CostError as reason:
        return dataclasses.replace(measured, refused=str(reason))
    seen = [each for each in RARE if each >= found.rarest]
    return dataclasses.replace(
        measured,
        shape=found.shape,
        bounds_s={f"{each:g}": found.bound_s(each) for each in seen},
        late=None if deadline_s is None else found.late(deadline_s),
    )


def shown(options: TailOptions, found: Sequence[ExitTail]) -> Iterator[Table | str]:
    """Give a row per exit, and why some have no bound."""
    limited = options.deadline_s is not None
    yield Table(
        title="times of runs to each exit in ms; bounds hold with 95 % confidence, if the "
        "assumptions do",
        columns=(
            "exit",
            "p50",
            "p99.9",
            "longest",
            "shape",
            *(f"1 in {1 / each:,.0f} beyond, at most" for each in RARE),
            *(
                [f"beyond {in_ms(options.deadline_s or 0.0)} ms, counted", "at most, by the tail"]
                if limited
                else []
            ),
        ),
        rows=[
            (
                str(row.exit),
                in_ms(row.p50_s),
                in_ms(row.p999_s),
                in_ms(row.max_s),
                "refused" if row.shape is None else f"{row.shape:.2f}",
                *(
                    in_ms(row.bounds_s[f"{each:g}"].high) if f"{each:g}" in row.bounds_s else ""
                    for each in RARE
                ),
                *([_share(row.counted)] if row.counted else []),
                *(([f"{row.late.high:.2g}" if row.late else ""]) if limited else []),
            )
            for row in found
        ],
    )
    for row in found:
        if row.refused:
            yield f"exit {row.exit}: {row.refused}"


def _share(counted: Estimate) -> Cell:
    low, high = (percent(share, 2) for share in (counted.low, counted.high))
    return Cell(percent(counted.value, 2), detail=f"{low} to {high}")
