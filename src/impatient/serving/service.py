"""Requests on an event loop, stages in another thread, the scheduler between them."""

from __future__ import annotations

import asyncio
import collections
import logging
import math
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from impatient.anytime import Network
from impatient.errors import ServingError
from impatient.serving.base import HANG_S, Answered, BaseService, Limits, Offer
from impatient.serving.rules import GreedyGain
from impatient.serving.scheduler import (
    Action,
    Refuse,
    Reply,
    Request,
    Rule,
    Scheduler,
    Why,
    Work,
)
from impatient.serving.tensors import Inputs
from impatient.serving.worker import Done, Found, InferenceThread, Job
from impatient.training.preprocess import Preprocess

log = logging.getLogger(__name__)

# Time kept before every deadline for writing the reply, since epoll wakes a loop in whole
# milliseconds. How late the loop has woken of late is added, up to a bound.
RESERVE_S = 0.0015
MOST_LATE_S = 0.02
# Most threads in which a network hangs, before the server says that it is not ready.
MOST_HANGING = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosted(Offer):
    """A network that is served.

    Attributes:
        network: the network, in eval mode.
        preprocess: how raw samples become its input.
    """

    network: Network
    preprocess: Preprocess

    @property
    def warm_up(self) -> tuple[Inputs, ...]:
        """Raw inputs with which it is run before the first request: of one sample, and of most."""
        return tuple(self.input.example(rows) for rows in (1, self.model.max_batch))

    def prepared(self, requests: Sequence[Inputs]) -> Any:
        """Make the network's input of the samples of some requests."""
        if self.input.alike(requests):
            return self.preprocess(self.input.batch(requests))
        # In one tensor, bytes beside other numbers would not be scaled.
        return torch.cat([self.preprocess(self.input.batch([one])) for one in requests])


@dataclass(slots=True)
class _Call:
    request: Request
    inputs: Inputs
    streamed: bool
    # What the caller has not taken yet; one that streams gets every exit.
    events: collections.deque[Answered | Refuse] = field(default_factory=collections.deque)
    # the task that waits for the next event
    waiting: asyncio.Task[Any] | None = None
    # what its latest exit gave
    latest: Found | None = None
    group: int | None = None
    replied: bool = False

    def put(self, event: Answered | Refuse) -> None:
        """Give the caller an event."""
        self.events.append(event)
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

    async def next(self, gone: Callable[[], Awaitable[None]]) -> Answered | Refuse | None:
        """Wait for the next event, None if the caller has gone.

        The task waits for the caller to go, and an event cancels that, so that a request takes one
        task.
        """
        if not self.events:
            self.waiting = task = asyncio.current_task()
            try:
                await gone()
                return None
            except asyncio.CancelledError:
                # By an event, by somebody else, or by both.
                if not self.events or task is None or task.uncancel():
                    raise
            finally:
                self.waiting = None
        return self.events.popleft()


class Service(BaseService):
    """Answers requests in this process: the scheduler decides, one thread computes.

    The scheduler is asked under a lock, on the event loop when a request comes or goes, and in the
    inference thread when work is done. So the thread goes on with the next stage without waiting
    for the loop, and a request costs one hand-over each way, not one per stage. The lock is never
    held while a network runs.

    Args:
        hosted: the networks.
        limits: what callers may ask for.
        rule: the scheduling rule.
    Thread:
        All methods belong to one event loop, on which `start` was called.
    """

    def __init__(
        self, hosted: Sequence[Hosted], limits: Limits | None = None, rule: Rule | None = None
    ) -> None:
        super().__init__(hosted, limits)
        self.hosted = {one.model.name: one for one in hosted}
        self.scheduler = Scheduler(
            models={name: one.model for name, one in self.hosted.items()},
            rule=rule or GreedyGain(),
            reserve_s=RESERVE_S,
            max_waiting=self.limits.waiting,
        )
        # Guards the scheduler and the six attributes below it.
        self._lock = threading.Lock()
        self._calls: dict[int, _Call] = {}
        self._members: dict[int, set[int]] = {}
        self._over: list[int] = []
        self._began = 0.0
        self._working: Work | None = None
        # the instant for which the timer is set
        self._due = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._lateness = collections.deque([0.0] * 100, maxlen=100)
        self._hanging: list[InferenceThread] = []

    async def start(self) -> None:
        """Begin the inference thread, on the running event loop, and run every network once."""
        self._loop = asyncio.get_running_loop()
        self._thread = self._new_thread({name: one.warm_up for name, one in self.hosted.items()})
        await asyncio.to_thread(self._thread.warmed.wait)
        self.heartbeat.start()

    def _new_thread(self, warm_up: Mapping[str, tuple[Inputs, ...]]) -> InferenceThread:
        return InferenceThread(
            {name: one.network for name, one in self.hosted.items()},
            {name: one.prepared for name, one in self.hosted.items()},
            self._finished,
            warm_up,
        )

    @property
    def ready(self) -> bool:
        """Whether requests are taken: not draining, and the inference thread comes back."""
        return self._thread.alive and not self._stuck and not self.draining

    @property
    def draining(self) -> bool:
        return self.scheduler.draining

    @property
    def waiting(self) -> int:
        return self.scheduler.waiting

    @property
    def _stuck(self) -> bool:
        work = self._working
        return work is not None and self.clock.now() - self._began > max(
            HANG_S, 20.0 * work.seconds
        )

    def _look_after(self) -> None:
        """Wait no longer for a network that hangs."""
        if self._stuck:
            self._replace_thread()
        bound = self.clock.now() - HANG_S
        for call in list(self._calls.values()):
            if call.request.deadline < bound and not call.replied:
                self._reply(Refuse(request=call.request.id, why="failed"))
                self._tell(self.scheduler.cancelled, call.request.id)

    def _replace_thread(self) -> None:
        """Go on with another thread, if there are not too many that hang."""
        self._hanging = [thread for thread in self._hanging if thread.alive]
        if len(self._hanging) >= MOST_HANGING:
            return
        with self._lock:
            work = self._working
            if work is None or not self._stuck:
                # It has come back just now.
                return
            self._working = None
        log.error("the model %s hangs; another thread goes on", work.model)
        self._thread.abandon()
        self._hanging.append(self._thread)
        self._thread = self._new_thread({})
        self._tell(self.scheduler.failed, work)

    def _why_unread(self, model: str, deadline: float, now: float) -> Why | None:
        if not self.ready and not self.draining:
            return "hanging"
        if self.overloaded:
            return "overloaded"
        return self.scheduler.refusal_unread(model, deadline, now)

    async def _answers(
        self, request: Request, inputs: Inputs, streamed: bool, gone: Callable[[], Awaitable[None]]
    ) -> AsyncGenerator[Answered | Refuse]:
        call = _Call(request, inputs, streamed)
        self._calls[request.id] = call
        try:
            self._tell(self.scheduler.arrived, request)
            while (event := await call.next(gone)) is not None:
                yield event
                if isinstance(event, Refuse) or event.stopped_by:
                    return
        finally:
            # The scheduler refuses a model that there is not.
            if not call.replied and request.model in self.counters:
                self.counters[request.model].cancelled += 1
                self._tell(self.scheduler.cancelled, request.id)
                self._forget(call)
            del self._calls[request.id]

    def drain(self) -> None:
        self.scheduler.drain()

    def end(self) -> None:
        self._tell(self.scheduler.end)

    @property
    def _open(self) -> bool:
        return any(not call.replied for call in self._calls.values())

    def stop(self) -> None:
        """End the inference thread."""
        if self._timer is not None:
            self._timer.cancel()
        self.heartbeat.stop()
        self._thread.stop(1.0)

    def _forget(self, call: _Call) -> None:
        """Let a call go that has its reply, or whose caller has gone."""
        with self._lock:
            if call.group is None:
                return
            members = self._members.get(call.group, set())
            members.discard(call.request.id)
            if not members and self._members.pop(call.group, None) is not None:
                self._over.append(call.group)

    def _finished(self, done: Done) -> Job | None:
        """Take in what a work gave, in the inference thread, and return what it does next."""
        with self._lock:
            if done.work is not self._working:
                # from a thread that was taken to hang
                return None
            now = self.clock.now()
            self._count_work(done, now)
            self._working = None
            passed = self._passed(done, now)
            if done.error:
                actions = self.scheduler.failed(done.work, now)
            else:
                scores = {name: score for name, (_, score) in done.found.items()}
                actions = self.scheduler.finished(done.work, scores, now, done.failed)
            job, replies = self._begun(actions)
            # The timer knows when all who go on are due, from when they came.
            due = math.inf if job is not None else self.scheduler.next_tick(now)
            sooner = due < self._due
        if (passed or replies or sooner) and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, passed, replies, due)
        return job

    def _count_work(self, done: Done, now: float) -> None:
        counters = self.counters[done.work.model]
        counters.works += 1
        for output, _ in done.found.values():
            counters.rows += len(output)
        counters.busy_s += now - self._began

    def _passed(self, done: Done, now: float) -> list[tuple[_Call, Answered]]:
        """Keep what a work gave, and return what callers are told of it on the way."""
        streamed = []
        for name, found in done.found.items():
            if not self.scheduler.holds(name):
                continue
            call = self._calls[name]
            call.latest = found
            if call.streamed:
                output, score = found
                elapsed_s = now - call.request.arrival
                answered = Answered(
                    output=output, exit=done.work.last, elapsed_s=elapsed_s, score=score
                )
                streamed.append((call, answered))
        return streamed

    def _deliver(
        self,
        passed: Sequence[tuple[_Call, Answered]],
        replies: Sequence[Reply | Refuse],
        due: float,
    ) -> None:
        """Hand on what the inference thread found, on the event loop."""
        for call, answered in passed:
            if not call.replied:
                call.put(answered)
        for reply in replies:
            self._reply(reply)
        self._wake_at(due)

    def _tick(self) -> None:
        due, self._due, self._timer = self._due, math.inf, None
        late_s = min(max(0.0, self.clock.now() - due), MOST_LATE_S)
        self._lateness.append(late_s)
        # The largest but one of the latest hundred, as one that stands alone says nothing.
        self.scheduler.reserve_s = RESERVE_S + sorted(self._lateness)[-2]
        self._tell(self.scheduler.tick)

    def _tell(self, event: Callable[..., Sequence[Action]], *about: Any) -> None:
        """Tell the scheduler of an event, and do what it says, on the event loop."""
        with self._lock:
            now = self.clock.now()
            job, replies = self._begun(event(*about, now))
            due = self.scheduler.next_tick(now)
        if job is not None:
            self._thread.do(job)
        for reply in replies:
            self._reply(reply)
        self._wake_at(due)

    def _wake_at(self, due: float) -> None:
        """Set the timer, unless it wakes the loop sooner anyway."""
        if due >= self._due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = self._loop.call_later(max(0.0, due - self.clock.now()), self._tick)

    def _begun(self, actions: Sequence[Action]) -> tuple[Job | None, list[Reply | Refuse]]:
        """Make a job of the work among some actions, and return the replies among them."""
        job = None
        replies = []
        for action in actions:
            if isinstance(action, Work):
                job = self._job(action)
            else:
                replies.append(action)
        return job, replies

    def _job(self, work: Work) -> Job:
        begins: dict[int, Inputs] = {}
        if work.first == 0:
            self._members[work.group] = set(work.requests)
            for name in work.requests:
                call = self._calls[name]
                call.group = work.group
                begins[name] = call.inputs
        over, self._over = self._over, []
        self._working = work
        self._began = self.clock.now()
        return Job(work, begins, over)

    def _reply(self, action: Reply | Refuse) -> None:
        call = self._calls.get(action.request)
        if call is None or call.replied:
            return
        call.replied = True
        now = self.clock.now()
        elapsed_s = now - call.request.arrival
        event: Answered | Refuse
        if isinstance(action, Refuse):
            event = action
        elif call.latest is not None:
            output, score = call.latest
            event = Answered(
                output=output,
                exit=action.exit,
                elapsed_s=elapsed_s,
                score=score,
                stopped_by=action.stopped_by,
                in_time=now <= call.request.deadline,
            )
        else:
            raise ServingError(f"{action} is for a request that no exit has answered.")
        self._count(call.request, event, elapsed_s)
        call.put(event)
        self._forget(call)

    def _gauges(self) -> Mapping[str, float]:
        hanging = sum(thread.alive for thread in self._hanging)
        return {**super()._gauges(), "hanging_threads": hanging}
