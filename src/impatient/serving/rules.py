"""Rules that say what is computed next: ours, and those that it is compared with.

`GreedyGain` is the default; docs/decisions/0027 says why. The others that begin as others' systems
are written after their papers' descriptions, with an exit in the place of each network.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from impatient.serving.model import ServedModel
from impatient.serving.scheduler import (
    Choice,
    Pending,
    Rule,
    first_batch,
    first_exits_fit,
    first_s,
)

Models = Mapping[str, ServedModel]

# More first answers than this are not planned one by one: it takes long, and seldom fits.
MOST_ALONE = 8


def rows_of(pending: Iterable[Pending]) -> int:
    """Return the number of samples of some requests."""
    return sum(one.request.rows for one in pending)


def without_answer(waiting: Sequence[Pending]) -> list[Pending]:
    """Return the requests that wait for their first answer."""
    return [one for one in waiting if one.exit < 0]


def groups_of(waiting: Sequence[Pending], models: Models) -> list[list[Pending]]:
    """Return the requests that may go on together: of one model, depth and, mostly, batch."""
    groups: dict[tuple[str, int, int], list[Pending]] = {}
    for one in waiting:
        if one.exit >= 0:
            merges = models[one.request.model].merges
            batch = -1 if merges or one.group is None else one.group
            groups.setdefault((one.request.model, one.exit, batch), []).append(one)
    return [cut(groups[kind], models) for kind in sorted(groups)]


def cut(members: list[Pending], models: Models) -> list[Pending]:
    """Return as many of these requests as a batch may hold."""
    most = models[members[0].request.model].max_batch
    kept = members[:1]
    rows = kept[0].request.rows
    for one in members[1:]:
        if rows + one.request.rows <= most:
            kept.append(one)
            rows += one.request.rows
    return kept


class GreedyGain(Rule):
    """Spend the time where it buys most expected quality, and risk nobody's first answer.

    Where there is time for all that is worth it, requests run one at a time in the order of their
    deadlines, and all get it. What is worth it depends on the price of time: each request is to
    reach the exit at which its gain, less the price of its time, is greatest. The lowest price
    counts at which all of this fits.

    Where it fits at no price, or where batches would have all at the last exit before the earliest
    deadline, the best gain per second runs. The first exits of waiting requests, in batches,
    compete with deeper exits of those that have answers. A stage that gains little may lie before
    one that gains much, so the best over all deeper exits counts.

    A deeper stage is begun only if all waiting first exits still fit behind it.

    Args:
        caution: factor on the times of a batch of first exits, which is smaller where its earliest
            would else be in time by a hair, and of a deeper stage that first answers wait for.
        prices: prices of time, the highest first; 1 is what the model gains per second on the way
            from its first exit to its last.
    """

    def __init__(self, caution: float = 1.3, prices: Sequence[float] = (1.3, 0.5)) -> None:
        self._caution = caution
        self._prices = prices

    def choose(self, waiting: Sequence[Pending], models: Models, now: float) -> Choice | None:
        if len(waiting) == 1:
            # what follows comes to the same, in ten times as many steps
            if waiting[0].exit < 0:
                return Choice(pending=waiting, last=0)
            return _ahead(waiting, models, now).choice
        first = without_answer(waiting)
        deeper = [_ahead(members, models, now) for members in groups_of(waiting, models)]
        if len(first) <= MOST_ALONE and _pressed(waiting, models, now):
            alone = [_ahead([one], models, now) for one in first]
            planned = _planned(alone + deeper, self._prices, now)
            if planned and (planned in alone or self._safe(planned, first, models, now)):
                return planned.choice
        deeper = [one for one in deeper if one.choice and self._safe(one, first, models, now)]
        best = max(deeper, key=lambda one: one.best, default=_NOTHING)
        if not first:
            return best.choice
        batch = self._first_batch(first, models, now)
        worth = sum(_weight(one) * one.expected[0] for one in batch)
        if best.best > worth / first_s(batch, models):
            return best.choice
        return Choice(pending=batch, last=0)

    def _first_batch(self, first: Sequence[Pending], models: Models, now: float) -> list[Pending]:
        """Return first exits with time to spare, if all others' still fit behind them."""
        batch = first_batch(first, models, now, self._caution)
        taken = {one.request.id for one in batch}
        left = [one for one in first if one.request.id not in taken]
        if first_exits_fit(left, models, now + first_s(batch, models)):
            return batch
        return first_batch(first, models, now)

    def _safe(self, deeper: _Ahead, first: Sequence[Pending], models: Models, now: float) -> bool:
        return first_exits_fit(first, models, now + self._caution * deeper.seconds)

    def deepens(self, one: Pending) -> bool:
        return one.expected[one.exit + 1] > one.expected[one.exit]


def _pressed(waiting: Sequence[Pending], models: Models, now: float) -> bool:
    """Tell whether some deadline comes before batches would have all at the last exit."""
    rows = collections.Counter[tuple[str, int]]()
    for one in waiting:
        rows[one.request.model, one.exit] += one.request.rows
    end = now
    for (name, exit), count in rows.items():
        end += models[name].work_s(exit + 1, models[name].num_exits - 1, count)
    return end > min(one.request.deadline for one in waiting)


def _weight(one: Pending) -> float:
    return (1 + one.request.priority) * one.request.rows


class _Ahead(NamedTuple):
    """What requests that go on together can gain.

    Attributes:
        choice: their next stage; None if nobody is in time for it, or nothing is gained.
        seconds: time of the next stage.
        exits: the gain up to each exit ahead, and its seconds.
        best: the greatest gain per second of these exits.
        unit: gain per second of the model, on the way from its first exit to its last.
    """

    choice: Choice | None
    seconds: float = 0.0
    exits: Sequence[tuple[float, float]] = ()
    best: float = 0.0
    unit: float = 0.0


_NOTHING = _Ahead(choice=None)


def _ahead(members: Sequence[Pending], models: Models, now: float) -> _Ahead:
    """Look ahead of a group, without those for whom its next stage would be too late."""
    model = models[members[0].request.model]
    here = members[0].exit
    seconds = model.work_s(here + 1, here + 1, rows_of(members))
    going = [one for one in members if now + seconds <= one.request.deadline]
    exits = []
    for target in range(here + 1, model.num_exits):
        needed_s = model.work_s(here + 1, target, rows_of(going))
        gain = sum(
            _weight(one) * (one.expected[target] - one.expected_now)
            for one in going
            if now + needed_s <= one.request.deadline
        )
        exits.append((gain, needed_s))
    best = max(gain / needed_s for gain, needed_s in exits)
    if best <= 0.0:
        return _NOTHING
    return _Ahead(Choice(pending=going, last=here + 1), seconds, exits, best, model.deepening)


def _planned(groups: Sequence[_Ahead], prices: Sequence[float], now: float) -> _Ahead | None:
    """Return who runs first where all that is worth it fits, None where it fits at no price."""
    earliest = None
    for price in prices:
        plan = []
        for group in groups:
            gains = (
                (gain - price * group.unit * spent_s, spent_s) for gain, spent_s in group.exits
            )
            worth, needed_s = max(gains, default=(0.0, 0.0))
            if worth > 0.0 and group.choice:
                plan.append((group.choice.pending[0].request.deadline, needed_s, group))
        plan.sort(key=lambda step: step[0])
        end = now
        for deadline, needed_s, _ in plan:
            end += needed_s
            if end > deadline:
                return earliest
        if plan:
            earliest = plan[0][2]
    return earliest


class FirstThenRoundRobin(Rule):
    """Give first answers by the earliest deadline, then deepen the shallowest batch."""

    def choose(self, waiting: Sequence[Pending], models: Models, now: float) -> Choice | None:
        first = without_answer(waiting)
        if first:
            return Choice(pending=first_batch(first, models, now), last=0)
        groups = groups_of(waiting, models)
        members = min(groups, key=lambda group: (group[0].exit, group[0].group or 0))
        return Choice(pending=members, last=members[0].exit + 1)


class DynamicProgramme(Rule):
    """Plan the depth of each request by a dynamic programme, in the order of deadlines.

    Requests run one at a time. Time is divided into slots, costs are rounded up.

    Source:
        Yao et al., Scheduling real-time deep learning services as imprecise computations, RTCSA
        2020. We differ: the programme runs over time, not over rounded utility, and at every
        decision.
    """

    def __init__(self, slots: int = 200, horizon: int = 32) -> None:
        self._slots = slots
        self._horizon = horizon

    def choose(self, waiting: Sequence[Pending], models: Models, now: float) -> Choice | None:
        planned = list(waiting[: self._horizon])
        slot_s = max(planned[-1].request.deadline - now, 1e-9) / self._slots
        # value[t]: the best quality of the requests so far, if they take t slots.
        value = np.full(self._slots + 1, -np.inf)
        value[0] = 0.0
        steps = []
        for one in planned:
            value, target = self._with(one, value, models, now, slot_s)
            steps.append(target)
        place = int(value.argmax())
        depth = 0
        first: Choice | None = None
        for one, target in zip(reversed(planned), reversed(steps), strict=True):
            depth = int(target[place])
            if depth > one.exit:
                first = Choice(pending=[one], last=one.exit + 1)
                place -= self._needs(one, depth, models, slot_s)
        return first

    def _needs(self, one: Pending, target: int, models: Models, slot_s: float) -> int:
        seconds = models[one.request.model].work_s(one.exit + 1, target, one.request.rows)
        return math.ceil(seconds / slot_s)

    def _with(
        self, one: Pending, value: np.ndarray, models: Models, now: float, slot_s: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add a request to the programme.

        Returns values, and its depth at each of them.
        """
        latest = int((one.request.deadline - now) / slot_s)
        best = value + one.expected_now
        depth = np.full(len(value), one.exit)
        for target in range(one.exit + 1, models[one.request.model].num_exits):
            taken = self._needs(one, target, models, slot_s)
            if taken > latest:
                break
            moved = np.full(len(value), -np.inf)
            moved[taken : latest + 1] = value[: latest + 1 - taken] + one.expected[target]
            better = moved > best
            best = np.where(better, moved, best)
            depth[better] = target
        return best, depth


class _Whole(Rule):
    """Rules for networks without exits: work runs to its answer."""

    at_once = True

    def admits(
        self,
        waiting: Sequence[Pending],  # noqa: ARG002
        models: Models,  # noqa: ARG002
        start: float,  # noqa: ARG002
    ) -> bool:
        return True


def batch_until(waiting: Sequence[Pending], models: Models, now: float, last: int) -> list[Pending]:
    """Return the largest batch that reaches an exit by its earliest deadline, or one request."""
    name = waiting[0].request.model
    model = models[name]
    batch = [waiting[0]]
    for one in waiting[1:]:
        rows = rows_of(batch) + one.request.rows
        late = now + model.work_s(0, last, rows) > waiting[0].request.deadline
        if one.request.model == name and rows <= model.max_batch and not late:
            batch.append(one)
    return batch


class Fixed(_Whole):
    """Always answer with one exit: a small or a large network, in the order of arrival.

    Args:
        exit: the exit; -1 is the last.
    """

    def __init__(self, exit: int = -1) -> None:
        self._exit = exit

    def choose(
        self,
        waiting: Sequence[Pending],
        models: Models,
        now: float,  # noqa: ARG002
    ) -> Choice | None:
        oldest = min(waiting, key=lambda one: one.request.id)
        model = models[oldest.request.model]
        last = range(model.num_exits)[self._exit]
        same = [one for one in waiting if one.request.model == model.name]
        same.sort(key=lambda one: one.request.id)
        return Choice(pending=cut(same, models), last=last)


class ClockworkLike(_Whole):
    """Run the whole network by the earliest deadline, and drop what would be late.

    Source:
        Gujarati et al., Serving DNNs like Clockwork, OSDI 2020.
    """

    def choose(self, waiting: Sequence[Pending], models: Models, now: float) -> Choice | None:
        alive = [one for one in waiting if _last_fits(one, models, now)]
        if not alive:
            return None
        last = models[alive[0].request.model].num_exits - 1
        return Choice(pending=batch_until(alive, models, now, last), last=last)


def _last_fits(one: Pending, models: Models, now: float) -> bool:
    model = models[one.request.model]
    needed_s = model.work_s(0, model.num_exits - 1, one.request.rows)
    return now + needed_s <= one.request.deadline


class SymphonyLike(ClockworkLike):
    """Wait with a batch until one more request in it would make it late.

    Source:
        Chen et al., Symphony, 2023 (arXiv 2308.07470): deferred batch dispatch.
    """

    def __init__(self) -> None:
        self._until = math.inf

    def choose(self, waiting: Sequence[Pending], models: Models, now: float) -> Choice | None:
        self._until = math.inf
        choice = super().choose(waiting, models, now)
        if choice is None:
            return None
        head = choice.pending[0].request
        model = models[head.model]
        rows = rows_of(choice.pending)
        latest = head.deadline - model.work_s(0, choice.last, rows + 1)
        if rows >= model.max_batch or now >= latest:
            return choice
        self._until = latest
        return None

    def ask_again(self, waiting: Sequence[Pending], now: float) -> float:  # noqa: ARG002
        return self._until


class InfaasLike(_Whole):
    """Switch between networks: the deepest exit with which all that wait are in time.

    Source:
        Romero et al., INFaaS, ATC 2021, with exits as the variants of the model.
    """

    def choose(self, waiting: Sequence[Pending], models: Models, now: float) -> Choice | None:
        model = models[waiting[0].request.model]
        for last in reversed(range(model.num_exits)):
            batch = batch_until(waiting, models, now, last)
            rounds = math.ceil(len(waiting) / len(batch))
            each_s = model.work_s(0, last, rows_of(batch))
            mean_deadline = sum(one.request.deadline for one in waiting) / len(waiting)
            in_time = now + each_s <= waiting[0].request.deadline
            if in_time and now + rounds * each_s <= mean_deadline:
                return Choice(pending=batch, last=last)
        return Choice(pending=batch_until(waiting, models, now, 0), last=0)


class EdgeServingLike(_Whole):
    """Choose exit and batch together by their effect on all that wait.

    The instability of a choice is the sum, over requests left behind, of how far their waiting
    will have used up their time, squared. The deepest exit whose instability is within a tenth of
    the least is taken.

    Source:
        EdgeServing, 2026 (arXiv 2605.05527), from its description; its code has no licence and was
        not used.
    """

    def choose(self, waiting: Sequence[Pending], models: Models, now: float) -> Choice | None:
        options = []
        for last in range(models[waiting[0].request.model].num_exits):
            batch = batch_until(waiting, models, now, last)
            taken = {one.request.id for one in batch}
            model = models[batch[0].request.model]
            then = now + model.work_s(0, last, rows_of(batch))
            used = [
                ((then - one.request.arrival) / (one.request.deadline - one.request.arrival)) ** 2
                for one in waiting
                if one.request.id not in taken
            ]
            late = sum(then > one.request.deadline for one in batch)
            options.append((sum(used) + 4.0 * late, last, batch))
        least = min(instability for instability, _, _ in options)
        _, last, batch = max(
            (option for option in options if option[0] <= 1.1 * least + 0.1),
            key=lambda option: option[1],
        )
        return Choice(pending=batch, last=last)
