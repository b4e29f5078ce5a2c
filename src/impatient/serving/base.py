"""What the HTTP and gRPC sides ask: models, limits, counts, and answers by a deadline.

`Service` computes the answers in this process, `FleetService` has other machines compute them.
"""

from __future__ import annotations

import abc
import asyncio
import bisect
import collections
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from impatient import checks
from impatient.clock import SYSTEM_CLOCK
from impatient.errors import ServingError
from impatient.serving.heartbeat import Heartbeat
from impatient.serving.metrics import BUCKETS_S, Counters, text_of
from impatient.serving.model import ServedModel
from impatient.serving.scheduler import Refuse, Request, Why
from impatient.serving.tensors import Inputs, InputSpec, rows_of

# A network that has not come back so long after a deadline is taken to hang.
HANG_S = 2.0
RECENT_S = 60.0
# A loop that is later than a share of the usual time for an answer, and than this, is overloaded.
LATE_SHARE = 0.5
LEAST_LATE_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A model as its callers see it.

    Attributes:
        model: what the scheduler knows of it.
        input: what it takes.
        classes: names of the classes.
    """

    model: ServedModel
    input: InputSpec
    classes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What callers may ask for.

    Attributes:
        default_s: time for an answer where a request says nothing.
        most_s: the longest time that a request may have; more is cut down to it.
        waiting: most requests without a reply.
        body_bytes: longest body.
        json_bytes: longest JSON in a body.
        held_bytes: most bytes of all bodies that are being read or answered.
    """

    default_s: float = 0.1
    most_s: float = 10.0
    waiting: int = 256
    body_bytes: int = 16 * 2**20
    json_bytes: int = 4 * 2**20
    held_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        checks.positive(ServingError, default_s=self.default_s, most_s=self.most_s)
        checks.at_least(
            ServingError,
            1,
            waiting=self.waiting,
            body_bytes=self.body_bytes,
            json_bytes=self.json_bytes,
            held_bytes=self.held_bytes,
        )


class Answered(NamedTuple):
    """An answer: of an exit on the way, or the one that stands.

    Attributes:
        output: before softmax, [rows, C].
        exit: the exit that gave it.
        elapsed_s: seconds since the request's first byte.
        score: how sure its least sure sample looks.
        stopped_by: why it stands; empty on the way.
        in_time: whether its deadline has not passed.
    """

    output: np.ndarray
    exit: int
    elapsed_s: float
    score: float
    stopped_by: str = ""
    in_time: bool = True


async def never() -> None:
    """Wait for ever."""
    await asyncio.get_running_loop().create_future()


class BaseService(abc.ABC):
    """Answers requests for several models, each by its deadline.

    Args:
        offers: the models.
        limits: what callers may ask for.
    Thread:
        All methods belong to one event loop, on which `start` was called.
    """

    def __init__(self, offers: Sequence[Offer], limits: Limits | None = None) -> None:
        self.offers = {one.model.name: one for one in offers}
        if not offers or len(self.offers) != len(offers):
            raise ServingError(
                f"models {[one.model.name for one in offers]}; expected at least one, and "
                "different names."
            )
        self.limits = limits or Limits()
        self._late_s = max(LEAST_LATE_S, LATE_SHARE * self.limits.default_s)
        self.counters = {name: Counters() for name in self.offers}
        # Latest requests: instant, budget, elapsed, exit (-1: none), in time, model.
        self.recent: collections.deque[tuple[float, float, float, int, bool, str]] = (
            collections.deque(maxlen=4000)
        )
        self.clock = SYSTEM_CLOCK
        self.heartbeat = Heartbeat(self._look_after)
        self._numbers = itertools.count()

    @abc.abstractmethod
    async def start(self) -> None:
        """Begin, on the running event loop."""

    @abc.abstractmethod
    def stop(self) -> None:
        """End what `start` began."""

    @property
    @abc.abstractmethod
    def ready(self) -> bool:
        """Whether requests are taken, and can be answered."""

    @property
    @abc.abstractmethod
    def draining(self) -> bool:
        """Whether no more requests are taken."""

    @property
    @abc.abstractmethod
    def waiting(self) -> int:
        """Return the number of requests that have no reply yet."""

    @property
    @abc.abstractmethod
    def _open(self) -> bool:
        """Whether a caller waits for its reply."""

    @abc.abstractmethod
    def drain(self) -> None:
        """Take no more requests."""

    @abc.abstractmethod
    def end(self) -> None:
        """Give all requests the answers they have."""

    def answers(
        self,
        model: str,
        inputs: Inputs,
        *,
        arrival: float,
        budget_s: float | None = None,
        priority: int = 0,
        best_effort: bool = False,
        streamed: bool = False,
        gone: Callable[[], Awaitable[None]] = never,
    ) -> AsyncGenerator[Answered | Refuse]:
        """Give the answer of a request, and before it those of the exits on the way if streamed.

        Whoever stops iterating cancels the request, and so does a caller that has gone.

        Args:
            model: name of the model.
            inputs: raw samples, checked.
            arrival: instant of the first byte.
            budget_s: seconds from there to the deadline; None for the default.
            priority: its gains count 1 + priority times.
            best_effort: answer late if need be.
            streamed: give every exit's answer.
            gone: waits until the caller has gone; then no more answers come. It may be cancelled
                and called again.
        """
        wanted_s = self.limits.default_s if budget_s is None else budget_s
        budget_s = min(wanted_s, self.limits.most_s)
        request = Request(
            id=next(self._numbers),
            model=model,
            deadline=arrival + budget_s,
            arrival=arrival,
            rows=rows_of(inputs),
            priority=priority,
            best_effort=best_effort,
        )
        return self._answers(request, inputs, streamed, gone)

    @abc.abstractmethod
    def _answers(
        self, request: Request, inputs: Inputs, streamed: bool, gone: Callable[[], Awaitable[None]]
    ) -> AsyncGenerator[Answered | Refuse]:
        """Give what `answers` gives for a request."""

    @abc.abstractmethod
    def _why_unread(self, model: str, deadline: float, now: float) -> Why | None:
        """Return why a request need not even be read, None if it has to be."""

    @abc.abstractmethod
    def _look_after(self) -> None:
        """Do what is due at each beat of the event loop."""

    def _gauges(self) -> Mapping[str, float]:
        """Return what is measured at this moment."""
        return {
            "waiting": self.waiting,
            "loop_lag_seconds": self.heartbeat.lag_s,
            "worst_loop_lag_seconds": self.heartbeat.worst_s,
        }

    @property
    def overloaded(self) -> bool:
        """Whether the event loop is so late that no more requests should be read."""
        return self.heartbeat.behind(self._late_s)

    def refusal_unread(self, model: str, *, arrival: float, most_s: float | None) -> Refuse | None:
        """Refuse a request before it is read, if nothing in it could help.

        Args:
            model: name of the model.
            arrival: instant of the first byte.
            most_s: the longest time for its answer; None for the server's limit.
        """
        budget_s = self.limits.most_s if most_s is None else min(most_s, self.limits.most_s)
        now = self.clock.now()
        why = self._why_unread(model, arrival + budget_s, now)
        if why is None:
            return None
        self.counters[model].refusals[why] += 1
        self.recent.append((now, budget_s, now - arrival, -1, False, model))
        return Refuse(request=next(self._numbers), why=why, retry_after_s=1.0)

    async def drained(self, most_s: float) -> bool:
        """Wait until all requests have their replies.

        Tells whether they do in time.
        """
        end = self.clock.now() + most_s
        while self._open and self.clock.now() < end:
            await asyncio.sleep(0.01)
        return not self._open

    def _count(self, request: Request, event: Answered | Refuse, elapsed_s: float) -> None:
        """Count a reply."""
        counters = self.counters[request.model]
        exit = -1
        in_time = False
        if isinstance(event, Refuse):
            counters.refusals[event.why] += 1
        else:
            exit = event.exit
            in_time = event.in_time
            counters.answers[exit, event.stopped_by, in_time] += 1
            counters.answered_rows += request.rows
            counters.elapsed_s += elapsed_s
            counters.buckets[bisect.bisect_left(BUCKETS_S, elapsed_s)] += 1
        budget_s = request.deadline - request.arrival
        self.recent.append((self.clock.now(), budget_s, elapsed_s, exit, in_time, request.model))

    def metrics(self) -> str:
        """Write all counts in the text format of Prometheus."""
        return text_of(self._gauges(), self.counters)
