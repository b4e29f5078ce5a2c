"""Say the result of an evaluation in a sentence, before anybody turns a dial of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from impatient.costs import CostProfile
from impatient.evaluation.evaluate import Evaluation
from impatient.evaluation.payload import Payload, until_exits_s
from impatient.evaluation.recording import Recording
from impatient.policies.policy import hits_of
from impatient.portable.timing import RESERVE_S
from impatient.table import milliseconds, percent


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """The numbers of the first sentences.

    Attributes:
        deadline_ms: a deadline that every exit meets, whatever the policy.
        policy: name of the policy, or of the family of thresholds.
        fitted: whether it is a policy that was fitted.
        routes: whether it chooses among networks, so that no deadline is applied to it.
        quality: mean quality.
        quality_name: what the quality is called.
        interval: its 95 % interval, or None.
        time_ms: mean time.
        whole: mean quality if all samples left at the last exit.
        whole_ms: time until the last exit under this policy; None if it chooses among networks.
        free: mean quality of the best network without exits; None if none was judged.
        free_ms: time of the network without exits.
        needed_ms: for each exit the shortest deadline that it surely meets under this policy.
    """

    deadline_ms: float
    policy: str
    fitted: bool
    routes: bool
    quality: float
    quality_name: str
    interval: tuple[float, float] | None
    time_ms: float
    whole: float
    whole_ms: float | None
    free: float | None
    free_ms: float
    needed_ms: tuple[float, ...]

    @property
    def quality_words(self) -> str:
        """Write the quality for people."""
        return percent(self.quality)

    @property
    def deadline_words(self) -> str:
        """Write the deadline for people."""
        return milliseconds(self.deadline_ms / 1e3)

    @property
    def time_words(self) -> str:
        """Write the mean time for people."""
        return milliseconds(self.time_ms / 1e3)

    @property
    def free_words(self) -> str:
        """Write how good the network without exits is, and when it answers, if it was judged."""
        if self.free is None:
            return ""
        return f"{percent(self.free)}, always after {milliseconds(self.free_ms / 1e3)}"

    @property
    def interval_words(self) -> str:
        """Write the interval for people, if there is one."""
        return (
            f"{percent(self.interval[0])} to {percent(self.interval[1])}" if self.interval else ""
        )

    @property
    def change(self) -> str:
        """Compare the mean time with that of the network without exits."""
        change = self.time_ms / self.free_ms - 1.0 if self.free_ms else 0.0
        if abs(change) < 0.005:
            return "as long as"
        return f"{percent(abs(change), 0)} {'less' if change < 0 else 'more'} time than"

    @property
    def price(self) -> str:
        """Say what leaving early costs against the last exit."""
        lost = self.whole - self.quality
        exit = len(self.needed_ms) - 1
        after = "" if self.whole_ms is None else f" after {milliseconds(self.whole_ms / 1e3)}"
        reference = f"(all samples at exit {exit}: {percent(self.whole)}{after})"
        if abs(lost) < 0.0005:
            return f"leaving early costs no {self.quality_name} {reference}"
        verb = "costs" if lost > 0 else "gains"
        points = f"{abs(lost) * 100:.1f}"
        # a reader who subtracts the rounded numbers may get another one
        seen = abs(round(self.whole * 100, 1) - round(self.quality * 100, 1))
        exactly = "" if f"{seen:.1f}" == points else ", before rounding"
        return f"leaving early {verb} {points} points of {self.quality_name}{exactly} {reference}"


def opening_of(
    evaluation: Evaluation, recording: Recording, costs: CostProfile, payload: Payload
) -> Opening:
    """Collect the numbers of what a page shows first."""
    size = min(costs.batches)
    shown = payload.shown
    routes = shown is not None and shown.routes
    all_open = (True,) * costs.num_exits
    free = evaluation.of("exit_free")
    until_s = (
        costs.interruptible_s(batch_size=size) if shown is None else until_exits_s(shown, costs)
    )
    quality, interval, time_s = _numbers(evaluation, recording, costs, payload)
    return Opening(
        deadline_ms=_rounded_up(max(_needed_ms(costs, all_open))),
        policy=payload.first,
        fitted=payload.fitted,
        routes=routes,
        quality=quality,
        quality_name=evaluation.quality_name,
        interval=interval,
        time_ms=time_s * 1e3,
        whole=evaluation.of("exit")[-1].accuracy.value,
        whole_ms=None if routes else until_s[-1] * 1e3,
        free=max((row.accuracy.value for row in free), default=None),
        free_ms=costs.exit_free_s(batch_size=size) * 1e3,
        needed_ms=_needed_ms(costs, all_open if shown is None or routes else shown.open_exits()),
    )


def _numbers(
    evaluation: Evaluation, recording: Recording, costs: CostProfile, payload: Payload
) -> tuple[float, tuple[float, float] | None, float]:
    """Return the quality, its interval, and the mean time in seconds of what is shown first."""
    if payload.shown is None or payload.fitted:
        rows = evaluation.of("policy") if payload.fitted else evaluation.of("exit")
        row = next((row for row in rows if row.name == payload.first), rows[-1])
        return row.accuracy.value, (row.accuracy.low, row.accuracy.high), row.contract_s
    outcome = payload.shown.outcome(recording, costs, batch_size=min(costs.batches))
    reached = hits_of(recording, outcome.exits).double()
    return float(reached.mean()), None, float(outcome.contract_s.mean())


def _needed_ms(costs: CostProfile, open_exits: Sequence[bool]) -> tuple[float, ...]:
    """Find the shortest deadline that each exit surely meets, in milliseconds.

    A runner goes on if the mean of what is past and p99 of what is next fit.
    """
    size = min(costs.batches)
    stages, heads = costs.parts("time", batch_size=size)
    slow_stages, slow_heads = costs.parts("time", statistic="p99", batch_size=size)
    spent_s = longest_s = 0.0
    needed = []
    for exit, is_open in enumerate(open_exits):
        # a run comes past all exits before
        longest_s = max(longest_s, RESERVE_S + spent_s + slow_stages[exit] + slow_heads[exit])
        needed.append(longest_s * 1e3)
        spent_s += stages[exit] + (heads[exit] if is_open else 0.0)
    return tuple(needed)


def by_when(evaluation: Evaluation, opening: Opening) -> list[tuple[str, str, str]]:
    """Say for each exit by which deadline it surely answers, and how good it is."""
    return [
        (row.name, milliseconds(_rounded_up(needed) / 1e3), percent(row.accuracy.value))
        for row, needed in zip(evaluation.of("exit"), opening.needed_ms, strict=True)
    ]


def _rounded_up(number: float) -> float:
    """Round up to three digits."""
    digit = 10.0 ** (math.floor(math.log10(number)) - 2)
    return float(f"{math.ceil(number / digit - 1e-9) * digit:.6g}")
