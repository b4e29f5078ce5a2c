"""Many replicas behind one front: which is asked, and what if one is lost.

Nothing here knows what carries requests; `ray_serve` is one that does. A deadline is an instant
on the clock of one machine, so it travels as the time that is left.
"""

from __future__ import annotations

import abc
import asyncio
import collections
import contextlib
import dataclasses
import functools
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from impatient.clock import SYSTEM_CLOCK
from impatient.errors import ServingError
from impatient.serving.base import HANG_S, Answered, BaseService, Limits, Offer
from impatient.serving.model import ServedModel
from impatient.serving.refusals import Gone
from impatient.serving.scheduler import Pending, Refuse, Request, Why, first_exits
from impatient.serving.tensors import Inputs

log = logging.getLogger(__name__)

# Refusals of one replica that say nothing of another.
ELSEWHERE: frozenset[Why] = frozenset(
    ("too late", "queue full", "draining", "hanging", "overloaded")
)
# Replicas that are asked before a refusal is passed on.
MOST_TRIES = 3
# The pause after a replica was lost, in which Ray hears of it.
AGAIN_S = 0.01
# What is kept for the way before anything has been measured, and how long measurements count.
FIRST_WAY_S = 0.003
WAY_S = 5.0


class ReplicaLost(ServingError):
    """A replica went away before it had given its reply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request on its way to a replica.

    Pickling turns its instants into seconds from now, and unpickling turns them into instants on
    the other machine's clock. So the time in between does not count; `reserve_s` is kept for it.

    Attributes:
        request: the request, with instants on this machine's clock.
        inputs: raw samples, checked.
        streamed: whether every exit's answer is wanted.
        reserve_s: time kept for the way there and back.
        tried: names of replicas that need not be asked again.
    """

    request: Request
    inputs: Inputs
    streamed: bool
    reserve_s: float = 0.0
    tried: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        now = SYSTEM_CLOCK.now()
        travelling = dataclasses.replace(
            self.request,
            arrival=self.request.arrival - now,
            deadline=self.request.deadline - now - self.reserve_s,
        )
        return _arrived, (travelling, self.inputs, self.streamed)


def _arrived(request: Request, inputs: Inputs, streamed: bool) -> Ask:
    now = SYSTEM_CLOCK.now()
    request = dataclasses.replace(
        request, arrival=now + request.arrival, deadline=now + request.deadline
    )
    return Ask(request=request, inputs=inputs, streamed=streamed)


async def answer(service: BaseService, ask: Ask) -> AsyncGenerator[Answered | Refuse]:
    """Give the answers of a request that has come to a replica.

    Args:
        service: the service of the replica.
        ask: the request, unpickled here.
    """
    request = ask.request
    if not service.ready:
        why: Why = "draining" if service.draining else "hanging"
        yield Refuse(request=request.id, why=why, retry_after_s=1.0)
        return
    answers = service.answers(
        request.model,
        ask.inputs,
        arrival=request.arrival,
        # What has no time left is refused by the scheduler.
        budget_s=max(request.deadline - request.arrival, 1e-9),
        priority=request.priority,
        best_effort=request.best_effort,
        streamed=ask.streamed,
    )
    async with contextlib.aclosing(answers) as events:
        async for event in events:
            yield event


@dataclass(slots=True)
class Backlog:
    """What each replica has been sent and has not answered.

    A machine that is slower has costs of its own, so its slack is smaller.

    Attributes:
        models: per replica, its models by name, with the costs on its machine.
    """

    models: dict[str, Mapping[str, ServedModel]] = field(default_factory=dict)
    # by replica, what it has been sent, by the name under which it will end
    _sent: dict[str, dict[str, Pending]] = field(default_factory=dict)
    _where: dict[str, str] = field(default_factory=dict)

    def sent(self, replica: str, name: str, request: Request) -> None:
        """Take in that a request has been sent.

        Sent again, it has left the replica before.
        """
        self.ended(name)
        there = self._sent.setdefault(replica, {})
        # One that was cancelled before it was on its way never ends.
        for old in [old for old, one in there.items() if one.request.deadline < request.arrival]:
            self.ended(old)
        there[name] = Pending(request=request, expected=())
        self._where[name] = replica

    def ended(self, name: str) -> None:
        """Take in that a request is no longer there."""
        replica = self._where.pop(name, None)
        if replica is not None:
            self._sent[replica].pop(name)

    def keep(self, replicas: Sequence[str]) -> None:
        """Forget replicas that are not among these."""
        for gone in (self._sent.keys() | self.models.keys()) - set(replicas):
            for name in list(self._sent.pop(gone, {})):
                self._where.pop(name)
            self.models.pop(gone, None)

    def slack_s(self, replica: str, request: Request, now: float) -> tuple[bool, float]:
        """Foretell whether all are in time, and a request's own slack.

        All that the replica has not answered is taken to need its first exit. The slack is what
        is left between its own first exit and its deadline.

        Args:
            replica: name of a replica whose costs are known.
            request: the request.
            now: the present instant.
        """
        models = self.models[replica]
        new = Pending(request=request, expected=())
        here = [one for one in self._sent.get(replica, {}).values() if one.request.deadline > now]
        waiting = sorted((*here, new), key=lambda one: (one.request.deadline, one.request.id))
        fit = True
        slack = 0.0
        for batch, done in first_exits(waiting, models, now):
            fit = fit and done <= batch[0].request.deadline
            if any(one is new for one in batch):
                slack = request.deadline - done
        return fit, slack

    def ranked(
        self, replicas: Sequence[str], request: Request, now: float, tried: Sequence[str] = ()
    ) -> list[str]:
        """Order replicas, the best first.

        Best is where nobody becomes late, then where the request's own slack is the greatest,
        then where least waits. Those that have been tried come last, and before them those whose
        costs are not known yet.
        """

        def worth(replica: str) -> tuple[bool, bool, bool, float, int, float]:
            # Equal ones are taken at random.
            chance = random.random()  # noqa: S311  no secret
            if request.model not in self.models.get(replica, {}):
                return replica not in tried, False, False, 0.0, 0, chance
            fit, slack = self.slack_s(replica, request, now)
            return replica not in tried, True, fit, slack, -len(self._sent.get(replica, {})), chance

        return sorted(replicas, key=worth, reverse=True)


@dataclass(slots=True)
class Way:
    """How long requests and replies travel, as seen of late."""

    _seen: collections.deque[tuple[float, float]] = field(
        default_factory=lambda: collections.deque(maxlen=100)
    )

    def took(self, seconds: float, now: float) -> None:
        """Take in what a request took beyond what its replica says."""
        self._seen.append((now, max(0.0, seconds)))

    def usual_s(self, now: float) -> float:
        """Return what nine in ten of the latest took."""
        # What was seen in a burst is forgotten soon: who keeps too much back asks for nothing, and
        # so sees nothing new.
        latest = sorted(took for seen, took in self._seen if now - seen <= WAY_S)
        return latest[int(0.9 * len(latest))] if latest else FIRST_WAY_S

    def reserve_s(self, left_s: float, now: float) -> float:
        """Return the time to keep for the way, at most half of what is left."""
        return min(self.usual_s(now), max(left_s, 0.0) / 2)


class Fleet(abc.ABC):
    """Replicas that answer, and what carries requests to them."""

    @abc.abstractmethod
    async def offers(self) -> Sequence[Offer]:
        """Return what the replicas serve."""

    @abc.abstractmethod
    def ask(self, ask: Ask) -> AsyncGenerator[tuple[str, Answered | Refuse]]:
        """Give the name of the replica that is asked, with each of its answers.

        Whoever stops iterating cancels the request.

        Raises:
            ReplicaLost: if the replica goes away meanwhile.
        """

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Return the number of replicas that can be asked, as far as is known."""

    @abc.abstractmethod
    def look_after(self) -> None:
        """Do what is due now and then, on the event loop, without waiting."""

    @abc.abstractmethod
    def stop(self) -> None:
        """End the replicas."""


class FleetService(BaseService):
    """Answers requests by asking replicas on other machines.

    A request whose replica is lost, or refuses for a reason of its own, is asked of another one,
    as long as there is time. Each request has one reply, whatever happens to replicas.

    Args:
        fleet: the replicas.
        offers: what they serve.
        limits: what callers may ask for.
    Thread:
        All methods belong to one event loop, on which `start` was called.
    """

    def __init__(self, fleet: Fleet, offers: Sequence[Offer], limits: Limits | None = None) -> None:
        super().__init__(offers, limits)
        self.fleet = fleet
        self.way = Way()
        # how often a request was asked of another replica
        self.asked_again = 0
        self._draining = False
        self._ended = False
        self._waiting = 0
        # of all that is waited for
        self._bounds: set[asyncio.Timeout] = set()

    async def start(self) -> None:
        self.heartbeat.start()

    def stop(self) -> None:
        self.heartbeat.stop()
        self.fleet.stop()

    @property
    def ready(self) -> bool:
        return self.fleet.size > 0 and not self._draining

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def waiting(self) -> int:
        return self._waiting

    @property
    def _open(self) -> bool:
        return self._waiting > 0

    def drain(self) -> None:
        self._draining = True

    def end(self) -> None:
        self._draining = self._ended = True
        for bound in self._bounds:
            self._wait_no_longer(bound)

    def _look_after(self) -> None:
        self.fleet.look_after()

    def _gauges(self) -> Mapping[str, float]:
        return {
            **super()._gauges(),
            "asked_again": self.asked_again,
            "replicas": self.fleet.size,
            "way_seconds": self.way.usual_s(self.clock.now()),
        }

    def _why_unread(
        self,
        model: str,  # noqa: ARG002  a front has no queue for each
        deadline: float,
        now: float,
    ) -> Why | None:
        if self.overloaded:
            return "overloaded"
        return self._why_not(deadline, now)

    def _why_not(self, deadline: float, now: float) -> Why | None:
        if self._draining:
            return "draining"
        if self._waiting >= self.limits.waiting:
            return "queue full"
        return "too late" if now >= deadline else None

    async def _answers(
        self, request: Request, inputs: Inputs, streamed: bool, gone: Callable[[], Awaitable[None]]
    ) -> AsyncGenerator[Answered | Refuse]:
        why = self._why_not(request.deadline, self.clock.now())
        if why is not None:
            refused = Refuse(request=request.id, why=why, retry_after_s=1.0)
            self._count(request, refused, self.clock.now() - request.arrival)
            yield refused
            return
        ask = Ask(request=request, inputs=inputs, streamed=streamed)
        replied = False
        self._waiting += 1
        watch = asyncio.ensure_future(gone())
        try:
            async with contextlib.aclosing(self._asked(ask, watch)) as events:
                async for event in events:
                    replied = isinstance(event, Refuse) or bool(event.stopped_by)
                    if replied:
                        self._count(request, event, self.clock.now() - request.arrival)
                    yield event
                    if replied:
                        return
        except Gone:
            pass
        finally:
            watch.cancel()
            self._waiting -= 1
            self.counters[request.model].cancelled += not replied

    async def _asked(
        self, ask: Ask, gone: asyncio.Future[None]
    ) -> AsyncGenerator[Answered | Refuse]:
        """Ask one replica after the other, until one has given the reply."""
        request = ask.request
        latest: Answered | None = None
        tried: list[str] = []
        while True:
            now = self.clock.now()
            reserve_s = self.way.reserve_s(request.deadline - now, now)
            ask = dataclasses.replace(ask, reserve_s=reserve_s, tried=tuple(tried))
            async with contextlib.aclosing(self._from_one(ask, gone)) as events:
                async for replica, event in events:
                    if isinstance(event, Refuse):
                        refused = event
                        tried.append(replica)
                        break
                    # Another replica begins anew: what it gives first has been given.
                    if latest is None or event.exit > latest.exit:
                        latest = event
                        yield latest
                    elif event.stopped_by:
                        yield event._replace(
                            output=latest.output, exit=latest.exit, score=latest.score
                        )
                    if event.stopped_by:
                        return
            if not self._again(request, refused.why, len(tried)):
                break
            self.asked_again += 1
            log.info("request %d goes to another replica: %s", request.id, refused.why)
            if refused.why == "unreachable":
                await asyncio.sleep(AGAIN_S)
        if latest is None:
            yield refused
            return
        now = self.clock.now()
        yield latest._replace(
            elapsed_s=now - request.arrival,
            stopped_by="draining" if self._ended else "failed",
            in_time=now <= request.deadline,
        )

    def _again(self, request: Request, why: Why, tries: int) -> bool:
        """Tell whether another replica is asked."""
        if self._ended or self.clock.now() >= request.deadline:
            return False
        others = tries < min(self.fleet.size, MOST_TRIES)
        return why == "unreachable" or (why in ELSEWHERE and others)

    async def _from_one(
        self, ask: Ask, gone: asyncio.Future[None]
    ) -> AsyncGenerator[tuple[str, Answered | Refuse]]:
        """Give what one replica answers, timed by this machine's clock.

        Raises:
            Gone: if the caller goes meanwhile.
        """
        request = ask.request
        async with contextlib.aclosing(self.fleet.ask(ask)) as events:
            while True:
                try:
                    replica, event = await self._next(events, request.deadline, gone)
                except (StopAsyncIteration, ReplicaLost) as error:
                    log.warning("a replica is lost: %s", error)
                    yield "", Refuse(request=request.id, why="unreachable", retry_after_s=1.0)
                    return
                except TimeoutError:
                    if gone.done():
                        raise Gone from None
                    yield (
                        "",
                        Refuse(request=request.id, why="draining" if self._ended else "failed"),
                    )
                    return
                if isinstance(event, Answered):
                    now = self.clock.now()
                    elapsed_s = now - request.arrival
                    self.way.took(elapsed_s - event.elapsed_s, now)
                    in_time = now <= request.deadline
                    event = event._replace(elapsed_s=elapsed_s, in_time=in_time)
                yield replica, event

    async def _next(
        self,
        events: AsyncGenerator[tuple[str, Answered | Refuse]],
        deadline: float,
        gone: asyncio.Future[None],
    ) -> tuple[str, Answered | Refuse]:
        """Wait for the next event, but not for ever.

        A machine may have gone without a word.
        """
        left_s = 0.0 if self._ended else max(deadline - self.clock.now(), 0.0) + HANG_S
        async with asyncio.timeout(left_s) as bound:
            self._bounds.add(bound)
            leave = functools.partial(self._wait_no_longer, bound)
            gone.add_done_callback(leave)
            try:
                return await anext(events)
            finally:
                self._bounds.discard(bound)
                gone.remove_done_callback(leave)

    def _wait_no_longer(self, bound: asyncio.Timeout, _gone: object = None) -> None:
        if bound in self._bounds:
            bound.reschedule(asyncio.get_running_loop().time())
