"""Several replicas behind one front: which is asked, what is carried, and what if one is lost.

The replicas are real services in this process; benchmarks/ray_cluster.py has them in Ray's.
"""

import asyncio
import contextlib
import pickle
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from impatient.clock import FakeClock
from impatient.serving import Refuse, Request, ServedModel, fleet
from impatient.serving.base import Answered, Limits, Offer
from impatient.serving.fleet import Ask, Backlog, Fleet, FleetService, ReplicaLost, Way
from impatient.serving.service import Service
from served import Gated, hosted

INPUTS = {"input": np.float32([[1, 2, 3, 4]])}


class InProcess(Fleet):
    """Services of this process, to which requests travel pickled."""

    def __init__(self, services: dict[str, Service]) -> None:
        self.services = dict(services)
        self.backlog = Backlog({name: one.scheduler.models for name, one in self.services.items()})
        self.lost: dict[str, asyncio.Event] = {name: asyncio.Event() for name in services}
        self.asked: Counter[str] = Counter()
        self._numbers = iter(range(10**6))

    async def offers(self):
        one = next(iter(self.services.values())).hosted["net"]
        return [Offer(model=one.model, input=one.input, classes=one.classes)]

    @property
    def size(self) -> int:
        return len(self.services)

    def look_after(self) -> None:
        pass

    def stop(self) -> None:
        for one in self.services.values():
            one.stop()

    def lose(self, name: str) -> Service:
        """Let a replica go, and with it all that it has been asked."""
        self.lost[name].set()
        self.backlog.keep([one for one in self.services if one != name])
        return self.services.pop(name)

    async def ask(self, ask):
        if not self.services:
            raise ReplicaLost("there is none.")
        now = fleet.SYSTEM_CLOCK.now()
        name = self.backlog.ranked(list(self.services), ask.request, now, ask.tried)[0]
        self.asked[name] += 1
        number = str(next(self._numbers))
        self.backlog.sent(name, number, ask.request)
        lost = asyncio.ensure_future(self.lost[name].wait())
        try:
            answers = fleet.answer(self.services[name], pickle.loads(pickle.dumps(ask)))
            async with contextlib.aclosing(answers) as events:
                while True:
                    waits = asyncio.ensure_future(anext(events))
                    try:
                        await asyncio.wait({waits, lost}, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        if lost.done() or not waits.done():
                            waits.cancel()
                            await asyncio.wait({waits})
                    if lost.done():
                        raise ReplicaLost(name)
                    try:
                        yield name, waits.result()
                    except StopAsyncIteration:
                        return
        finally:
            lost.cancel()
            self.backlog.ended(number)


def in_front_of(networks, asked, *, limits=None, **of_replicas):
    """Run `asked(front)` on a loop of its own, with a replica for each network."""

    async def whole():
        of_each = Limits(**{"default_s": 20.0, "most_s": 20.0, **of_replicas})
        services = {str(n): Service([hosted(one)], of_each) for n, one in enumerate(networks)}
        for one in services.values():
            await one.start()
        replicas = InProcess(services)
        given = {"default_s": 20.0, "most_s": 20.0, **(limits or {})}
        front = FleetService(replicas, await replicas.offers(), Limits(**given))
        await front.start()
        try:
            return await asked(front)
        finally:
            front.stop()

    return asyncio.run(whole())


def hold(exit: int, *networks: Gated) -> tuple[threading.Event, threading.Event]:
    """Hold networks still before an exit: events that let them go on, and that one has begun.

    Replicas must have started, since they run their networks once before.
    """
    held, begun = threading.Event(), threading.Event()
    for network in networks:
        network.at[exit] = lambda: (begun.set(), held.wait(20))
    return held, begun


async def events_of(front, **options):
    answers = front.answers("net", INPUTS, arrival=front.clock.now(), **options)
    async with contextlib.aclosing(answers) as events:
        return [event async for event in events]


async def asked_and_held(front, exit: int, *networks: Gated, **options):
    """Ask, and hold networks still before an exit.

    Returns the asking, and an event that lets them go on.
    """
    held, begun = hold(exit, *networks)
    asking = asyncio.ensure_future(events_of(front, **options))
    await asyncio.to_thread(begun.wait, 20)
    return asking, held


def model_of(first_s: float) -> ServedModel:
    return ServedModel(
        name="net", stages_s={1: (first_s, 1.0), 2: (1.5 * first_s, 1.5)}, quality=(0.6, 0.9)
    )


def request(id: int = 0, deadline: float = 10.0) -> Request:
    return Request(id=id, model="net", deadline=deadline, arrival=0.5)


def backlog_of(**first_s: float) -> Backlog:
    return Backlog({name: {"net": model_of(seconds)} for name, seconds in first_s.items()})


def test_what_is_left_of_the_time_travels_between_clocks_that_differ(monkeypatch) -> None:
    monkeypatch.setattr(fleet, "SYSTEM_CLOCK", FakeClock(1000.0))
    ask = Ask(
        request=Request(id=7, model="net", arrival=999.9, deadline=1000.5, priority=2, rows=1),
        inputs=INPUTS,
        streamed=True,
        reserve_s=0.1,
        tried=("a",),
    )
    sent = pickle.dumps(ask)
    monkeypatch.setattr(fleet, "SYSTEM_CLOCK", FakeClock(5.0))
    there = pickle.loads(sent)
    # 0.5 s are left, of which 0.1 s are kept for the way
    assert there.request.deadline == pytest.approx(5.4)
    assert there.request.arrival == pytest.approx(4.9)
    assert (there.request.id, there.request.priority, there.streamed) == (7, 2, True)
    np.testing.assert_array_equal(there.inputs["input"], INPUTS["input"])


def test_a_request_goes_where_its_slack_is_greatest() -> None:
    backlog = backlog_of(fast=1.0, slow=2.0)
    assert backlog.slack_s("fast", request(), 0.0) == (True, 9.0)
    assert backlog.ranked(["slow", "fast"], request(), 0.0) == ["fast", "slow"]
    # a batch of two takes 1.5 s, of three 2.25 s: longer than one on the slow machine
    for id in (1, 2):
        backlog.sent("fast", f"r{id}", request(id, deadline=9.0))
    assert backlog.slack_s("fast", request(), 0.0) == (True, 7.75)
    assert backlog.ranked(["slow", "fast"], request(), 0.0) == ["slow", "fast"]
    backlog.ended("r1")
    backlog.ended("r1")
    assert backlog.ranked(["slow", "fast"], request(), 0.0) == ["fast", "slow"]
    # what is past its deadline is not waited for, and forgotten when others come
    late = Request(id=3, model="net", arrival=9.5, deadline=19.5)
    assert backlog.slack_s("fast", late, 9.5) == (True, 9.0)
    backlog.sent("fast", "r3", late)
    assert list(backlog._sent["fast"]) == ["r3"]


def test_nobody_is_made_late_where_another_machine_is_free() -> None:
    backlog = backlog_of(busy=1.0, slow=3.0)
    # its deadline is nearer than that of the one that is there, which would be late behind it
    backlog.sent("busy", "r1", request(1, deadline=1.4))
    assert backlog.slack_s("busy", request(deadline=5.0), 0.0) == (True, 3.0)
    assert backlog.ranked(["busy", "slow"], request(deadline=5.0), 0.0)[0] == "busy"
    assert backlog.slack_s("busy", request(deadline=1.2), 0.0) == (False, pytest.approx(0.2))
    assert backlog.ranked(["busy", "slow"], request(deadline=4.0), 0.0)[0] == "busy"
    backlog.sent("busy", "r2", request(2, deadline=1.45))
    backlog.models["slow"] = {"net": model_of(1.1)}
    assert backlog.ranked(["busy", "slow"], request(deadline=1.3), 0.0)[0] == "slow"


def test_replicas_that_were_tried_come_last_and_unknown_ones_before_them() -> None:
    backlog = backlog_of(fast=1.0, slow=2.0)
    assert backlog.ranked(["new", "fast", "slow"], request(), 0.0, ["fast"]) == [
        "slow",
        "new",
        "fast",
    ]
    backlog.sent("fast", "r1", request(1))
    backlog.sent("slow", "r1", request(1))
    assert backlog.slack_s("fast", request(), 0.0) == (True, 9.0)
    backlog.keep(["fast"])
    backlog.ended("r1")
    assert list(backlog.models) == ["fast"]


def test_equal_replicas_share_the_requests() -> None:
    backlog = backlog_of(a=1.0, b=1.0, c=1.0)
    for id in range(30):
        best = backlog.ranked(["a", "b", "c"], request(id, deadline=100.0 + id), 0.0)[0]
        backlog.sent(best, str(id), request(id, deadline=100.0 + id))
    assert {name: len(there) for name, there in backlog._sent.items()} == dict.fromkeys("abc", 10)


def test_time_for_the_way_follows_what_was_seen_and_leaves_half() -> None:
    way = Way()
    assert way.usual_s(0.0) == fleet.FIRST_WAY_S
    for seconds in range(1, 11):
        way.took(seconds / 100, 0.0)
    assert way.usual_s(1.0) == 0.1
    assert way.reserve_s(0.08, 1.0) == 0.04
    assert way.reserve_s(-1.0, 1.0) == 0.0
    # a burst is forgotten
    assert way.usual_s(20.0) == fleet.FIRST_WAY_S


def test_the_front_answers_as_the_network_does() -> None:
    network = Gated()

    async def asked(front):
        return await events_of(front, streamed=True), await events_of(front), front.metrics()

    streamed, (alone,), metrics = in_front_of([network], asked)
    assert [event.exit for event in streamed] == [0, 1, 2, 2]
    assert [event.stopped_by for event in streamed] == ["", "", "", "final"]
    for exit, event in zip(network.exits(torch.tensor(INPUTS["input"])), streamed, strict=False):
        np.testing.assert_allclose(event.output, exit.output().detach(), rtol=1e-6)
    assert (alone.exit, alone.stopped_by, alone.in_time) == (2, "final", True)
    np.testing.assert_array_equal(alone.output, streamed[-1].output)
    assert 'stopped_by="final",in_time="true"} 2' in metrics
    assert "impatient_replicas 1" in metrics


def test_a_replica_that_is_lost_under_load_loses_no_request() -> None:
    networks = [Gated() for _ in range(3)]

    async def asked(front):
        held, begun = hold(1, networks[0])
        load = [asyncio.ensure_future(events_of(front)) for _ in range(60)]
        await asyncio.to_thread(begun.wait, 20)
        gone = front.fleet.lose("0")
        replies = [await one for one in load]
        held.set()
        gone.stop()
        return replies, front

    replies, front = in_front_of(networks, asked)
    assert [[event.exit for event in one] for one in replies] == [[2]] * 60
    assert front.asked_again > 0
    assert front.counters["net"].answers.total() == 60
    assert (front.waiting, front.counters["net"].cancelled) == (0, 0)
    assert front.fleet.asked["0"] == front.asked_again


def test_a_stream_whose_replica_is_lost_goes_on_where_it_was() -> None:
    networks = [Gated(), Gated()]

    async def asked(front):
        streaming, held = await asked_and_held(front, 2, *networks, streamed=True)
        (name,) = front.fleet.asked
        gone = front.fleet.lose(name)
        held.set()
        events = await streaming
        gone.stop()
        return events

    events = in_front_of(networks, asked)
    assert [event.exit for event in events] == [0, 1, 2, 2]
    assert events[-1].stopped_by == "final"


def test_a_replica_that_refuses_leaves_the_request_to_another_once() -> None:
    networks = [Gated(), Gated()]

    async def asked(front):
        first, held = await asked_and_held(front, 0, *networks)
        (busy,) = front.fleet.asked
        # it is taken to be the best all the same: others' requests are not seen here
        front.fleet.backlog = Backlog({busy: {"net": model_of(1e-4)}})
        second = asyncio.ensure_future(events_of(front))
        while front.waiting < 2 or front.fleet.asked.total() < 3:
            await asyncio.sleep(0.001)
        # now both are full
        third = await events_of(front)
        asked_in_all = front.fleet.asked.total()
        held.set()
        return await first, await second, third, asked_in_all

    first, second, third, asked_in_all = in_front_of(networks, asked, waiting=1)
    assert [first[0].exit, second[0].exit] == [2, 2]
    assert [event.why for event in third] == ["queue full"]
    assert asked_in_all == 1 + 2 + 2


def test_without_a_replica_the_reply_comes_when_the_time_is_over() -> None:
    async def asked(front):
        gone = front.fleet.lose("0")
        begin = front.clock.now()
        events = await events_of(front, budget_s=0.05)
        gone.stop()
        return events, front.clock.now() - begin, front.ready

    (event,), elapsed_s, ready = in_front_of([Gated()], asked)
    assert event.why == "unreachable"
    assert elapsed_s >= 0.05
    assert not ready


def test_a_machine_that_has_gone_silent_is_not_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(fleet, "HANG_S", 0.05)
    network = Gated()

    async def asked(front):
        # whatever its service says does not come through
        monkeypatch.setattr(Service, "_reply", lambda self, action: None)
        return await events_of(front, budget_s=0.05)

    (event,) = in_front_of([network], asked)
    assert event == Refuse(request=event.request, why="failed")


def test_at_the_end_open_requests_get_what_they_have() -> None:
    network = Gated()

    async def asked(front):
        held, begun = hold(1, network)
        streaming = asyncio.ensure_future(events_of(front, streamed=True))
        alone = asyncio.ensure_future(events_of(front))
        await asyncio.to_thread(begun.wait, 20)
        while not any(name for name in front.fleet.asked if front.waiting == 2):
            await asyncio.sleep(0.001)
        front.drain()
        refused = await events_of(front)
        assert not await front.drained(0.01)
        front.end()
        found = await streaming, await alone, refused
        held.set()
        return found, front.waiting

    (streamed, alone, refused), waiting = in_front_of([network], asked)
    assert [event.stopped_by for event in streamed] == ["", "draining"]
    assert [event.why for event in (*alone, *refused)] == ["draining", "draining"]
    assert waiting == 0


def test_a_caller_that_goes_frees_its_place_on_the_replica() -> None:
    network = Gated()

    async def asked(front):
        caller, held = await asked_and_held(front, 1, network)
        caller.cancel()
        await asyncio.wait({caller})
        held.set()
        (service,) = front.fleet.services.values()
        return service.waiting, front.waiting, front.counters["net"].cancelled

    assert in_front_of([network], asked) == (0, 0, 1)


def test_a_full_front_refuses() -> None:
    network = Gated()

    async def asked(front):
        first, held = await asked_and_held(front, 0, network)
        second = await events_of(front)
        unread = front.refusal_unread("net", arrival=front.clock.now(), most_s=None)
        held.set()
        return await first, second, unread

    first, second, unread = in_front_of([network], asked, limits={"waiting": 1})
    assert isinstance(first[0], Answered)
    assert [second[0].why, unread.why] == ["queue full", "queue full"]
