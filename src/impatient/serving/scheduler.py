"""Schedule the stages of many requests: a state machine without clock, thread or socket.

Events go in (`arrived`, `finished`, `failed`, `cancelled`, `tick`), each with the present instant.
Actions come out: run this `Work`, send this `Reply`, `Refuse` that request. The server and the
simulator are thin drivers of it. Whatever happens, each accepted request gets exactly one reply or
refusal, unless its caller has cancelled it. A reply that is due is given from the latest exit, even
while a stage of the request is running.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from impatient import checks
from impatient.errors import ServingError
from impatient.serving.model import ServedModel

Reason = Literal["final", "policy", "deadline", "failed", "draining"]
Why = Literal[
    "too late",
    "queue full",
    "draining",
    "expired",
    "failed",
    "hanging",
    "overloaded",
    "unreachable",
]

# Of sizes of batch whose times per sample differ by less, the largest is taken: it is less work.
EQUAL = 1.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request, as the scheduler sees it.

    Attributes:
        id: number of the request; no two have the same.
        model: name of the model it asks for.
        deadline: instant by which it must be answered.
        arrival: instant at which its first byte came.
        rows: samples in it.
        priority: whole number from 0; its gains count 1 + priority times.
        best_effort: whether an answer that is late is better than none.
    """

    id: int
    model: str
    deadline: float
    arrival: float = 0.0
    rows: int = 1
    priority: int = 0
    best_effort: bool = False

    def __post_init__(self) -> None:
        checks.at_least(ServingError, 1, rows=self.rows)
        checks.at_least(ServingError, 0, priority=self.priority)
        if not math.isfinite(self.deadline):
            raise ServingError(
                f"request {self.id} has the deadline {self.deadline}; expected a finite instant. "
                "Every request has one: give it a default."
            )

    def due(self, reserve_s: float) -> float:
        """Return when its answer must be there, so that there is time to send it.

        Args:
            reserve_s: time kept for that; of a short budget at most half.
        """
        return self.deadline - min(reserve_s, (self.deadline - self.arrival) / 2)


@dataclass(slots=True, kw_only=True)
class Pending:
    """A request that has not been replied to.

    Attributes:
        request: the request.
        expected: expected quality of all K exits, by what is known now.
        exit: its latest exit that has answered; -1 before the first.
        score: how sure that exit looked.
        group: number of the batch with which it began; None before its first stage.
        running: whether a stage of it is being computed.
    """

    request: Request
    expected: tuple[float, ...]
    exit: int = -1
    score: float = math.nan
    group: int | None = None
    running: bool = False

    def reached(self, exit: int, score: float, model: ServedModel) -> None:
        """Take in that an exit has answered, and how sure it looked."""
        self.exit = exit
        self.score = score
        if model.gains is not None and not math.isnan(score):
            self.expected = model.gains.expected(exit, score)

    @property
    def expected_now(self) -> float:
        """Return the expected quality of the latest answer, 0 before the first."""
        return self.expected[self.exit] if self.exit >= 0 else 0.0

    @property
    def gain_ahead(self) -> float:
        """Return the most that a deeper exit is expected to gain."""
        return max(self.expected[self.exit + 1 :], default=0.0) - self.expected_now


# What every request needs is a named tuple, which is made in half the time of a frozen dataclass.
class Choice(NamedTuple):
    """What a rule wants to be computed next: some requests at one depth, up to an exit."""

    pending: Sequence[Pending]
    last: int


class Work(NamedTuple):
    """An action: compute the stages `first` to `last` for these requests.

    Attributes:
        group: number of the batch that the requests belong to; a new one if `first` is 0.
        model: name of the model.
        requests: their numbers, in order.
        first: the first exit to compute.
        last: the last exit to compute; only its head need run.
        seconds: the time that was planned.
    """

    group: int
    model: str
    requests: tuple[int, ...]
    first: int
    last: int
    seconds: float


class Reply(NamedTuple):
    """An action: answer a request with what its exit gave.

    Attributes:
        request: number of the request.
        exit: the exit that answers.
        stopped_by: why it stopped there.
        in_time: whether its deadline has not passed.
    """

    request: int
    exit: int
    stopped_by: Reason
    in_time: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """An action: tell a caller that there is no answer.

    Attributes:
        request: number of the request.
        why: the reason.
        retry_after_s: seconds after which it may be worth trying again.
    """

    request: int
    why: Why
    retry_after_s: float = 0.0


Action = Work | Reply | Refuse


class Rule(abc.ABC):
    """Decides what is computed next. A rule of your own defines `choose`.

    Attributes:
        at_once: whether requests are answered when their work is done, instead of going on.
    """

    at_once: bool = False

    @abc.abstractmethod
    def choose(
        self, waiting: Sequence[Pending], models: Mapping[str, ServedModel], now: float
    ) -> Choice | None:
        """Choose the next work, or None to wait.

        Args:
            waiting: requests that wait, the earliest deadline first; at least one.
            models: the models by name.
            now: the present instant.
        """

    def admits(
        self,
        waiting: Sequence[Pending],
        models: Mapping[str, ServedModel],
        start: float,
    ) -> bool:
        """Tell whether every one of these requests can still have its first answer in time.

        Args:
            waiting: requests without an answer, the newest among them, earliest deadline first.
            models: the models by name.
            start: the instant at which the worker is free.
        """
        return first_exits_fit(waiting, models, start)

    def deepens(self, one: Pending) -> bool:  # noqa: ARG002  rules that know
        """Tell whether a request that is alone, and has time for its next stage, begins that.

        Where this is false, `choose` is asked.
        """
        return False

    def ask_again(self, waiting: Sequence[Pending], now: float) -> float:  # noqa: ARG002  rules that wait
        """Return the instant at which to be asked again though nothing has happened."""
        return math.inf


def first_exits_fit(
    waiting: Sequence[Pending], models: Mapping[str, ServedModel], start: float
) -> bool:
    """Tell whether all first exits fit before their deadlines, from an instant on.

    Args:
        waiting: requests without an answer, earliest deadline first.
        models: the models by name.
        start: the instant at which the first of them may begin.
    """
    if len(waiting) == 1:
        (one,) = waiting
        return one.request.best_effort or start + first_s(waiting, models) <= one.request.deadline
    waiting = [one for one in waiting if not one.request.best_effort]
    return all(
        done <= batch[0].request.deadline for batch, done in first_exits(waiting, models, start)
    )


def first_exits(
    waiting: Sequence[Pending], models: Mapping[str, ServedModel], start: float
) -> Iterator[tuple[list[Pending], float]]:
    """Foretell the batches of first exits, and when each is done.

    Nothing else is taken to run.

    Args:
        waiting: requests without an answer, earliest deadline first.
        models: the models by name.
        start: the instant at which the first of them may begin.
    """
    left = list(waiting)
    while left:
        batch = first_batch(left, models, start)
        start += first_s(batch, models)
        yield batch, start
        taken = {one.request.id for one in batch}
        left = [one for one in left if one.request.id not in taken]


def first_batch(
    waiting: Sequence[Pending],
    models: Mapping[str, ServedModel],
    now: float,
    caution: float = 1.0,
) -> list[Pending]:
    """Return the requests whose first exit runs next, in time for the earliest.

    Of the sizes of batch, that with the least time per sample is taken: one that is larger holds up
    everybody for longer, and in a burst fewer get their first exit.

    Args:
        waiting: requests without an answer, earliest deadline first; at least one.
        models: the models by name.
        now: the instant at which the batch begins.
        caution: factor on the time that a batch of several has to fit in.
    """
    name = waiting[0].request.model
    model = models[name]
    batch = [waiting[0]]
    rows = waiting[0].request.rows
    best = 1
    least_s = model.work_s(0, 0, rows) / rows
    for one in waiting[1:]:
        if one.request.model != name:
            continue
        rows += one.request.rows
        seconds = model.work_s(0, 0, rows)
        late = now + caution * seconds > waiting[0].request.deadline
        if late or rows > model.max_batch:
            break
        batch.append(one)
        if seconds / rows <= EQUAL * least_s:
            best = len(batch)
            least_s = min(least_s, seconds / rows)
    return batch[:best]


def first_s(batch: Sequence[Pending], models: Mapping[str, ServedModel]) -> float:
    """Return the seconds of the first exit of a batch of one model."""
    rows = sum(one.request.rows for one in batch)
    return models[batch[0].request.model].work_s(0, 0, rows)


@dataclass(slots=True)
class Scheduler:
    """Requests in, stages to run and replies out.

    Args:
        models: the models by name.
        rule: decides what is computed next.
        reserve_s: time kept before every deadline for sending the reply.
        max_waiting: most requests that have no reply yet; more are refused.
        worthwhile: smallest expected gain in quality for which a request goes on.
    """

    models: Mapping[str, ServedModel]
    rule: Rule
    reserve_s: float = 0.0
    max_waiting: int = 1024
    worthwhile: float = 0.0005
    draining: bool = False
    _pending: dict[int, Pending] = field(default_factory=dict)
    _work: Work | None = None
    _free_at: float = -math.inf
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def arrived(self, request: Request, now: float) -> list[Action]:
        """Take in a request, or refuse it if not even its first exit can be reached.

        Raises:
            ServingError: if there is no such model, or the number is in use.
        """
        if request.model not in self.models or request.id in self._pending:
            raise ServingError(
                f"request {request.id} for {request.model!r}; expected a new number and one of "
                f"the models {', '.join(self.models)}."
            )
        new = Pending(request=request, expected=self.models[request.model].quality)
        refused = self._refusal(new, now)
        if refused is not None:
            return [refused, *self._settle(now)]
        self._pending[request.id] = new
        return self._settle(now)

    def finished(
        self,
        work: Work,
        scores: Mapping[int, float],
        now: float,
        failed: Collection[int] = (),
    ) -> list[Action]:
        """Take in that work is done.

        Args:
            work: the work.
            scores: how sure the last exit looks, by request; NaN or absent where that is unknown.
            now: the present instant.
            failed: requests for which it has failed, who get the answers they have.
        """
        follows = None if failed or len(self._pending) > 1 else self._alone(work, scores, now)
        if follows is not None:
            return [follows]
        actions: list[Action] = []
        for one in self._end(work):
            if one.request.id in failed:
                actions.append(self._give_up(one, now))
                continue
            one.reached(work.last, scores.get(one.request.id, math.nan), self.models[work.model])
            if self.rule.at_once:
                actions.append(self._reply(one, "final", now))
        return actions + self._settle(now)

    def _alone(self, work: Work, scores: Mapping[int, float], now: float) -> Work | Reply | None:
        """Go on with a request that is alone, or reply if it is at its end, in few steps.

        It is what all else here comes to in this case, which is the usual one of a server that is
        not busy. None if there is more to decide.
        """
        one = self._pending.get(work.requests[0])
        if one is None or self._work is not work or self.rule.at_once:
            return None
        model = self.models[work.model]
        due = one.request.due(self.reserve_s)
        one.reached(work.last, scores.get(one.request.id, math.nan), model)
        stage = work.last + 1
        if stage == model.num_exits:
            self._work = None
            return self._reply(one, "final" if now < due else "deadline", now)
        seconds = model.work_s(stage, stage, one.request.rows)
        worth = one.gain_ahead >= self.worthwhile and self.rule.deepens(one)
        if not worth or now + seconds > due:
            return None
        self._free_at = now + seconds
        self._work = Work(work.group, work.model, work.requests, stage, stage, seconds)
        return self._work

    def failed(self, work: Work, now: float) -> list[Action]:
        """Take in that work has failed: its requests get the answers they have."""
        actions = [self._give_up(one, now) for one in self._end(work)]
        return actions + self._settle(now)

    def _give_up(
        self, one: Pending, now: float, why: Literal["failed", "draining"] = "failed"
    ) -> Action:
        return self._reply(one, why, now) if one.exit >= 0 else self._refuse(one, why)

    def cancelled(self, request: int, now: float) -> list[Action]:
        """Forget a request whose caller has gone.

        Its place is free at the next stage.
        """
        self._pending.pop(request, None)
        return self._settle(now)

    def tick(self, now: float) -> list[Action]:
        """Let time pass."""
        return self._settle(now)

    def drain(self) -> None:
        """Refuse all requests from now on.

        Those that are here are served.
        """
        self.draining = True

    def end(self, now: float) -> list[Action]:
        """Give all requests the answers they have, and take no more."""
        self.draining = True
        return [self._give_up(one, now, "draining") for one in list(self._pending.values())]

    def holds(self, request: int) -> bool:
        """Tell whether a request is here and has no reply yet."""
        return request in self._pending

    def refusal_unread(self, model: str, deadline: float, now: float) -> Why | None:
        """Return why a request need not even be read, None if it has to be.

        Args:
            model: name of the model that it asks for.
            deadline: the latest instant that its deadline can be.
            now: the present instant.
        """
        if self.draining:
            return "draining"
        if len(self._pending) >= self.max_waiting:
            return "queue full"
        start = now if self.idle else max(now, self._free_at)
        reached = start + self.models[model].work_s(0, 0, 1)
        return "too late" if reached > deadline else None

    @property
    def waiting(self) -> int:
        """Return the number of requests that have no reply yet."""
        return len(self._pending)

    @property
    def idle(self) -> bool:
        """Whether no work is being done."""
        return self._work is None

    def next_tick(self, now: float) -> float:
        """Return the next instant at which `tick` is due, infinity if there is none."""
        due = math.inf
        if not self._pending:
            return due
        for one in self._pending.values():
            instant = one.request.due(self.reserve_s)
            # It may have an answer by an instant to come.
            if instant < due and (instant > now or self._due_at_deadline(one)):
                due = instant
        waits = self._waiting() if self._work is None else ()
        return min(due, self.rule.ask_again(waits, now)) if waits else due

    def _due_at_deadline(self, one: Pending) -> bool:
        # Work without an answer that is running, or wanted late, is replied to when it is done.
        return one.exit >= 0 or not (one.running or one.request.best_effort)

    def _waiting(self) -> list[Pending]:
        waiting = [one for one in self._pending.values() if not one.running]
        waiting.sort(key=lambda one: (one.request.deadline, one.request.id))
        return waiting

    def _refusal(self, new: Pending, now: float) -> Refuse | None:
        if self.draining:
            return Refuse(request=new.request.id, why="draining", retry_after_s=1.0)
        start = now if self.idle else max(now, self._free_at)
        if len(self._pending) >= self.max_waiting:
            return Refuse(request=new.request.id, why="queue full", retry_after_s=0.1)
        if new.request.best_effort:
            return None
        without = [new]
        if self._pending:
            without += [one for one in self._waiting() if one.exit < 0]
            without.sort(key=lambda one: (one.request.deadline, one.request.id))
        if now >= new.request.deadline or not self.rule.admits(without, self.models, start):
            busy_s = start - now + first_s([new], self.models)
            return Refuse(request=new.request.id, why="too late", retry_after_s=busy_s)
        return None

    def _end(self, work: Work) -> list[Pending]:
        if self._work is not work:
            raise ServingError(f"{work} is not the work in progress, which is {self._work}.")
        self._work = None
        here = [self._pending[name] for name in work.requests if name in self._pending]
        for one in here:
            one.running = False
        return here

    def _reply(self, one: Pending, why: Reason, now: float) -> Reply:
        del self._pending[one.request.id]
        return Reply(
            request=one.request.id,
            exit=one.exit,
            stopped_by=why,
            in_time=now <= one.request.deadline,
        )

    def _refuse(self, one: Pending, why: Why) -> Refuse:
        del self._pending[one.request.id]
        return Refuse(request=one.request.id, why=why)

    def _settle(self, now: float) -> list[Action]:
        """Give the replies that are due, then begin work if none is in progress."""
        actions: list[Action] = []
        for one in list(self._pending.values()):
            over = self._over(one, now)
            if over is not None and one.exit >= 0:
                actions.append(self._reply(one, over, now))
            elif over is not None:
                actions.append(self._refuse(one, "expired"))
        waiting = self._waiting() if self._work is None else ()
        if not waiting:
            return actions
        choice = self.rule.choose(waiting, self.models, now) or self._late(waiting, now)
        return actions if choice is None else actions + self._begin(choice, now)

    def _late(self, waiting: Sequence[Pending], now: float) -> Choice | None:
        """Choose what a rule may leave out as it is late, though its caller wants it."""
        late = [one for one in waiting if one.exit < 0 and one.request.best_effort]
        if not late or not math.isinf(self.rule.ask_again(waiting, now)):
            return None
        return Choice(pending=first_batch(late, self.models, now), last=0)

    def _over(self, one: Pending, now: float) -> Reason | None:
        """Return why a request goes no further, or None if it does."""
        if one.request.due(self.reserve_s) <= now and self._due_at_deadline(one):
            return "deadline"
        if one.exit < 0 or one.running:
            return None
        model = self.models[one.request.model]
        if one.exit == model.num_exits - 1:
            return "final"
        if one.gain_ahead < self.worthwhile:
            return "policy"
        step_s = model.work_s(one.exit + 1, one.exit + 1, one.request.rows)
        # What cannot be done by then, even alone and at once, is not waited for.
        return "deadline" if now + step_s > one.request.due(self.reserve_s) else None

    def _begin(self, choice: Choice, now: float) -> list[Action]:
        head = choice.pending[0]
        model = self.models[head.request.model]
        first = head.exit + 1
        fresh = first == 0 or model.merges
        group = next(self._numbers) if fresh or head.group is None else head.group
        actions: list[Action] = []
        rows = sum(one.request.rows for one in choice.pending)
        seconds = model.work_s(first, choice.last, rows)
        if not fresh and len(choice.pending) < len(self._pending):
            taken = {one.request.id for one in choice.pending}
            # A batch that has begun can only shrink, so who is left out has all it can get.
            for one in self._waiting():
                if one.group == group and one.request.id not in taken:
                    late = now + seconds > one.request.deadline
                    actions.append(self._reply(one, "deadline" if late else "policy", now))
        for one in choice.pending:
            one.group = group
            one.running = True
        self._work = Work(
            group=group,
            model=model.name,
            requests=tuple(one.request.id for one in choice.pending),
            first=first,
            last=choice.last,
            seconds=seconds,
        )
        self._free_at = now + self._work.seconds
        return [*actions, self._work]
