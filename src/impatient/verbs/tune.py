"""Say what this system permits for running on time, and measure what it gains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from impatient.table import Cell, Table
from impatient.verbs.options import (
    Directory,
    Engine,
    Names,
    Positive,
    Quiet,
    Threads,
    Trust,
    VerbOptions,
    use_threads,
)
from impatient.verbs.run_directory import RunDirectory

if TYPE_CHECKING:
    from impatient.runtime.tuning import Ratio, Tuned


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions(VerbOptions):
    """Measure what each real-time setting gains on this machine.

    Attributes:
        settings: Settings to measure, of priority, affinity, memory, gc, timer, idle and governor;
            by default all.
        runs: Runs with each setting, and as many without.
        seconds: Longest time for each setting.
    """

    directory: Directory
    settings: Names = ()
    runs: Positive = 2000
    seconds: Positive = 60
    engine: Engine = "eager"
    threads: Threads = 0
    quiet: Quiet = False
    trust: Trust = ()


def tune(options: TuneOptions) -> list[Tuned]:
    """Run a network with and without each setting, in turn.

    Returns:
        A comparison of nothing with nothing, and one for each setting.
    """
    from impatient.runtime.real_time import NAMES
    from impatient.runtime.tuning import tune as measured

    use_threads(options.threads)
    run = RunDirectory(options.directory, trust=options.trust).engine(options.engine)
    network, _ = run.network()
    names: Sequence[str] = options.settings or NAMES
    return measured(
        network,
        run.spec().example(),
        # They are checked there.
        names,  # type: ignore[arg-type]
        runs=options.runs,
        max_seconds=options.seconds,
        progress=not options.quiet,
    )


def shown(_: TuneOptions, found: Sequence[Tuned]) -> Iterator[Table | str]:
    """Give what became of each setting, what it gained, and what is worth setting."""
    from impatient.runtime.tuning import QUANTILES

    yield Table(
        title="what this system permits",
        columns=("setting", "in force", "what, or why not"),
        left=3,
        rows=[
            (
                each.setting.name,
                "yes" if each.setting.done else Cell("NO", strong=True),
                each.setting.note,
            )
            for each in found
            if each.setting
        ],
    )
    yield Table(
        title="time with the setting over time without it (95 % interval); empty where the runs "
        "are too few",
        columns=("setting", "what", "runs", *QUANTILES),
        left=2,
        rows=[
            (
                each.setting.name if each.setting else "nothing (A/A)",
                what,
                str(each.runs),
                *(_said(ratios[name]) if name in ratios else "" for name in QUANTILES),
            )
            for each in found
            for what, ratios in each.ratios.items()
        ],
    )
    yield _advice(found)


def _said(ratio: Ratio) -> Cell:
    return Cell(
        f"{ratio.value:.3f}",
        detail=f"{ratio.low:.3f} to {ratio.high:.3f}",
        strong=ratio.verdict != "cannot tell apart",
    )


def _advice(found: Sequence[Tuned]) -> str:
    """Say what is worth setting, if the control allows to say anything."""
    control = [each for each in found if each.setting is None]
    off = [
        f"{name} of {what}"
        for each in control
        for what, ratios in each.ratios.items()
        for name, ratio in ratios.items()
        if ratio.verdict != "cannot tell apart"
    ]
    measured = any("p99" in ratios for each in control for ratios in each.ratios.values())
    if not measured:
        return (
            f"{control[0].runs if control else 0} runs are too few for a p99, and say nothing of "
            "what is worth setting: take more --runs, or --seconds if these ended it."
        )
    worth = [each.setting.name for each in found if each.setting and each.is_worth_setting]
    names = f"[{', '.join(map(repr, worth))}]" if worth else "nothing"
    advice = f"Worth setting here, by the p99: {names}"
    advice += f", as Runner(..., real_time={names})." if worth else "."
    if off:
        advice += (
            f" But the control differs from itself in the {', '.join(off)}: such differences are "
            "the machine's noise. Measure again when it is idle, or with more --runs."
        )
    return advice
