"""Every accepted request has exactly one reply, whatever happens meanwhile."""

import asyncio
import contextlib
import functools
import io
import json
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from torch import nn

from asking import HEAD, all_from, ask, body_of, connected, infer, reply_from
from fakes import wait_until
from impatient import Network, attach_exits
from impatient.errors import ServingError
from impatient.serving.base import Limits
from impatient.serving.rules import Fixed, GreedyGain
from impatient.serving.scheduler import Refuse, Rule
from impatient.serving.service import Service
from served import Gated, hosted, serving, serving_both

POISON = 666.0
STREAM = HEAD.replace(b"/infer", b"/stream")


class Picky(Gated):
    """Fails at one exit on whole batches that hold a poisoned sample."""

    def __init__(self, exit: int = 0) -> None:
        super().__init__()
        self.exit = exit

    def _exits(self, x):
        for exit in super()._exits(x):
            if exit.index == self.exit and (x == POISON).any():
                raise IndexError("a sample that this network cannot take")
            yield exit


def in_service(network, asked, rule=None, **limits):
    """Run `asked(service)` on a loop of its own."""

    async def whole():
        service = Service([hosted(network)], Limits(**{"default_s": 5.0, **limits}), rule)
        await service.start()
        try:
            return await asked(service)
        finally:
            service.stop()

    return asyncio.run(whole())


async def events_of(service, values, **options):
    array = np.asarray(values, dtype="float32").reshape(-1, 4)
    arrival = service.clock.now()
    return [
        one async for one in service.answers("net", {"input": array}, arrival=arrival, **options)
    ]


def test_replies_are_counted_through_failures_poison_and_callers_that_go() -> None:
    dice = random.Random(0)
    network = Picky(1)

    def stage() -> None:
        if dice.random() < 0.1:
            raise RuntimeError("a stage that fails now and then")

    network.at = {0: stage, 1: stage, 2: stage}

    async def asked(service: Service) -> None:
        async def one(number: int) -> str:
            await asyncio.sleep(dice.random())
            values = [POISON if number % 9 == 0 else number] * 4
            streamed = number % 3 == 0
            budget_s = dice.choice([0.001, 0.05, 5.0])
            asking = events_of(service, values, budget_s=budget_s, streamed=streamed)
            if number % 7:
                events = await asking
                finals = [
                    event for event in events if isinstance(event, Refuse) or event.stopped_by
                ]
                assert len(finals) == 1
                assert finals[0] is events[-1]
                return "refused" if isinstance(finals[0], Refuse) else "answered"
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asking, dice.random() * 0.01)
                return "in time"
            return "gone"

        found = Counter(await asyncio.gather(*map(one, range(300))))
        counted = service.counters["net"]
        told = counted.answers.total() + counted.refusals.total() + counted.cancelled
        assert told == 300
        assert counted.cancelled <= found["gone"]
        # a slow machine refuses more
        assert found["answered"] > 20
        assert service.scheduler.waiting == 0
        assert not service._calls

    in_service(network, asked)


@pytest.mark.parametrize("exit", [0, 1])
def test_one_sample_that_breaks_the_network_breaks_nobody_elses_answer(exit: int) -> None:
    network = Picky(exit)
    values = np.arange(16, dtype="float32").reshape(4, 4)
    values[2] = POISON

    async def asked(service: Service) -> None:
        # the first holds the network, so that the others become one batch
        held = threading.Event()
        network.at[0] = lambda: held.wait(20)
        first = asyncio.ensure_future(events_of(service, [0, 0, 0, 0]))
        await asyncio.sleep(0.05)
        rest = [asyncio.ensure_future(events_of(service, row)) for row in values]
        await asyncio.sleep(0.05)
        held.set()
        network.at.clear()
        *others, _ = [*await asyncio.gather(*rest), await first]
        with torch.inference_mode():
            right = super(Picky, network)._exits(torch.from_numpy(values))
            wanted = [output.output().numpy() for output in right]
        for number, (event,) in enumerate(others):
            if number == 2:
                assert isinstance(event, Refuse) if exit == 0 else event.stopped_by == "failed"
            else:
                assert event.exit == 2
                np.testing.assert_allclose(event.output[0], wanted[2][number], rtol=1e-4)

    in_service(network, asked)


def test_numbers_that_overflow_fail_alone() -> None:
    async def asked(service: Service) -> None:
        many = [[3e38, 3e38, -3e38, 3e38] if row == 1 else [row] * 4 for row in range(4)]
        found = await asyncio.gather(*(events_of(service, row) for row in many))
        assert isinstance(found[1][0], Refuse)
        assert [found[row][0].exit for row in (0, 2, 3)] == [2, 2, 2]

    network = Gated()
    with torch.no_grad():
        network.stages[0].weight.fill_(1e3)
    in_service(network, asked)


def test_stages_follow_each_other_while_the_event_loop_is_held() -> None:
    network = Gated()

    async def asked(service: Service) -> None:
        last = threading.Event()
        network.at[2] = last.set
        asking = asyncio.ensure_future(events_of(service, [1, 2, 3, 4], streamed=True))
        while not service.scheduler.waiting:
            await asyncio.sleep(0)
        # held until the last stage begins, for which nobody asks the loop
        assert last.wait(20)
        assert [event.exit for event in await asking] == [0, 1, 2, 2]

    in_service(network, asked)


class Gate(nn.Module):
    """A layer at which a test may hold a stage, or let it fail."""

    def __init__(self) -> None:
        super().__init__()
        self.at: Callable[[torch.Tensor], object] = lambda _: None

    def forward(self, x):
        self.at(x)
        return x


def gated_layers() -> tuple[Network, list[Gate]]:
    """Three exits attached to layers, with a gate in each stage, and one in each early head."""
    torch.manual_seed(0)
    gates = [Gate() for _ in range(5)]
    layers = [layer for gate in gates[:3] for layer in (nn.Linear(4, 4), gate, nn.Tanh())]
    heads = [
        lambda _, width, gate=gate: nn.Sequential(nn.Linear(4, width), gate) for gate in gates[3:]
    ]
    backbone = nn.Sequential(*layers).eval()
    network = attach_exits(backbone, after=["2", "5"], heads=heads, example=torch.zeros(1, 4))
    return network.eval(), gates


def test_a_model_that_there_is_not_is_said_and_leaves_nothing_behind() -> None:
    async def asked(service):
        inputs = {"input": np.ones((1, 4), dtype="float32")}
        with pytest.raises(ServingError, match="one of the models net"):
            await anext(service.answers("nett", inputs, arrival=service.clock.now()))
        return service._calls

    assert in_service(Gated(), asked) == {}


def test_a_caller_that_goes_costs_no_further_stage() -> None:
    network, gates = gated_layers()
    ran = []

    async def asked(service: Service) -> None:
        held, begun = threading.Event(), threading.Event()
        for index, gate in enumerate(gates[:3]):
            gate.at = functools.partial(lambda index, _: ran.append(index), index)
        gates[1].at = lambda _: (ran.append(1), begun.set(), held.wait(20))
        first = asyncio.ensure_future(events_of(service, [1, 2, 3, 4]))
        await asyncio.to_thread(begun.wait, 20)
        first.cancel()
        await asyncio.wait({first})
        held.set()
        for _ in range(2):
            assert (await events_of(service, [4, 3, 2, 1]))[0].exit == 2
        assert ran == [0, 1, 0, 1, 2, 0, 1, 2]

    in_service(network, asked)


@pytest.mark.parametrize("rule", [GreedyGain(), Fixed()], ids=["ours", "fixed"])
def test_networks_that_go_on_while_others_come_answer_each_with_its_own(rule: Rule) -> None:
    dice = random.Random(0)
    network, gates = gated_layers()
    values = torch.randn(200, 4)
    with torch.inference_mode():
        wanted = [output.numpy() for output in network(values)]

    async def asked(service: Service) -> None:
        def hold(x: torch.Tensor) -> None:
            time.sleep(dice.choice([0.0, 0.001]))
            if dice.random() < 0.03:
                raise RuntimeError("a stage that fails now and then")

        for gate in gates[1:]:
            gate.at = hold

        async def one(number: int) -> int:
            await asyncio.sleep(dice.random() * 0.3)
            budget_s = dice.choice([0.004, 0.02, 5.0])
            asking = events_of(service, values[number], budget_s=budget_s, streamed=number % 2)
            try:
                events = await asyncio.wait_for(asking, 0.005 if number % 7 == 0 else None)
            except TimeoutError:
                return -1
            answers = [event for event in events if not isinstance(event, Refuse)]
            for event in answers:
                np.testing.assert_allclose(
                    event.output[0], wanted[event.exit][number], rtol=1e-4, atol=1e-6
                )
            return answers[-1].exit if answers else -1

        found = Counter(await asyncio.gather(*map(one, range(len(values)))))
        # a slow machine answers from the first exits
        assert found[0] + found[1] + found[2] > 20
        assert not service._calls
        wait_until(lambda: service.scheduler.idle)

    in_service(network, asked, rule)


def test_a_request_that_comes_meanwhile_waits_for_one_stage() -> None:
    network = Gated()
    ran = []

    async def asked(service: Service) -> None:
        held, begun = threading.Event(), threading.Event()
        network.at = {index: functools.partial(ran.append, index) for index in range(3)}
        network.at[1] = lambda: (ran.append(1), begun.set(), held.wait(20))
        first = asyncio.ensure_future(events_of(service, [1, 2, 3, 4]))
        await asyncio.to_thread(begun.wait, 20)
        second = asyncio.ensure_future(events_of(service, [4, 3, 2, 1]))
        while service.scheduler.waiting < 2:
            await asyncio.sleep(0)
        held.set()
        assert [(await one)[-1].exit for one in (first, second)] == [2, 2]
        # its first exit gains more per second than the last of the other
        assert ran[:3] == [0, 1, 0]

    in_service(network, asked)


def test_a_stage_that_hangs_is_left_and_the_server_goes_on(monkeypatch, caplog) -> None:
    monkeypatch.setattr("impatient.serving.service.HANG_S", 0.3)
    network = Gated()
    with serving(network) as (service, port):
        held, begun = threading.Event(), threading.Event()
        network.at[1] = lambda: (begun.set(), held.wait(60))
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(infer, port, timeout=9_000_000)
            assert begun.wait(20)
            network.at.clear()
            # it has its first exit, and waits for the second no longer than a network may take
            status, _headers, reply = first.result()
        told = reply["parameters"]
        assert (status, told["exit"], told["stopped_by"]) == (200, 0, "failed")
        assert infer(port, timeout=9_000_000)[2]["parameters"]["exit"] == 2
        assert ask(port, "/v2/health/ready")[0] == 200
        assert b"impatient_hanging_threads 1" in ask(port, "/metrics")[2]
        held.set()
        wait_until(lambda: b"impatient_hanging_threads 0" in ask(port, "/metrics")[2])
        assert infer(port, timeout=9_000_000)[2]["parameters"]["exit"] == 2
        assert service.counters["net"].answers.total() == 3


def test_a_network_that_always_hangs_is_not_ready_and_refuses_at_once(monkeypatch) -> None:
    monkeypatch.setattr("impatient.serving.service.HANG_S", 0.1)
    network = Gated()
    with serving(network) as (_service, port):
        held = threading.Event()
        network.at[0] = lambda: held.wait(60)
        for _ in range(4):
            assert infer(port, timeout=1_500_000)[0] == 503
        assert ask(port, "/v2/health/ready")[0] == 503
        status, _headers, reply = infer(port, timeout=9_000_000)
        assert status == 503
        assert "does not come back" in reply["error"]
        held.set()
        network.at.clear()
        wait_until(lambda: infer(port, timeout=9_000_000)[0] == 200)


def test_not_even_an_exit_of_the_interpreter_ends_the_inference_thread() -> None:
    network = Gated()
    with serving(network) as (_service, port):

        def leave() -> None:
            raise SystemExit(3)

        network.at[1] = leave
        assert infer(port)[2]["parameters"]["stopped_by"] == "failed"
        network.at.clear()
        assert infer(port)[2]["parameters"]["stopped_by"] == "final"


def test_callers_that_send_half_or_go_leave_nothing_behind() -> None:
    network = Gated()
    body = body_of([1, 2, 3, 4])
    with serving(network) as (service, port):
        for _ in range(20):
            connected(port, HEAD % len(body) + body[: len(body) // 2]).close()
            connected(port, (HEAD % len(body))[:40]).close()
        held, begun = threading.Event(), threading.Event()
        network.at[0] = lambda: (begun.set(), held.wait(20))
        for ask_for in (HEAD, STREAM):
            connected(port, ask_for % len(body) + body).close()
        callers = [connected(port, HEAD % len(body) + body) for _ in range(5)]
        assert begun.wait(20)
        callers.pop().close()
        wait_until(lambda: service.counters["net"].cancelled == 3)
        held.set()
        network.at.clear()
        for caller in callers:
            assert reply_from(caller)[0] == 200
            caller.settimeout(0.05)
            with pytest.raises(TimeoutError):
                caller.recv(1)
            caller.close()
        wait_until(lambda: not service._calls)
        counted = service.counters["net"]
        assert (counted.answers.total(), counted.refusals.total()) == (4, 0)


def test_a_step_of_the_clock_changes_nothing(monkeypatch) -> None:
    network = Gated()
    with serving(network) as (_service, port):
        real = time.time
        for step_s in (-86_400.0, 86_400.0):
            network.at[1] = lambda step_s=step_s: monkeypatch.setattr(
                time, "time", lambda: real() + step_s
            )
            told = infer(port, deadline_ms=4000)[2]["parameters"]
            assert (told["exit"], told["deadline_met"]) == (2, True)
            assert 0 < told["elapsed_ms"] < 4000


def test_a_log_on_a_full_disk_changes_nothing(capfd) -> None:
    log = logging.getLogger("impatient.serving")
    # unbuffered, so that nothing is left to be written when it is closed
    with Path("/dev/full").open("wb", buffering=0) as full:
        handler = logging.StreamHandler(io.TextIOWrapper(full, write_through=True))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            with serving(Gated()) as (_service, port):
                assert [infer(port)[0] for _ in range(3)] == [200] * 3
        finally:
            log.removeHandler(handler)
            log.setLevel(logging.NOTSET)
    assert "No space left on device" in capfd.readouterr().err


def test_open_requests_and_streams_get_what_they_have_when_the_server_ends() -> None:
    network = Gated()
    body = body_of([1, 2, 3, 4], timeout=9_000_000)
    held, begun = threading.Event(), threading.Event()
    with serving_both(network, most_s=60.0) as (service, port, rpc_port):
        network.at[1] = lambda: (begun.set(), held.wait(30))
        streaming = connected(port, STREAM % len(body) + body)
        assert begun.wait(20)
        waiting = connected(port, HEAD % len(body) + body)
        wait_until(lambda: service.scheduler.waiting == 2)
        # a stream of gRPC on which nothing is asked
        client = triton.InferenceServerClient(f"127.0.0.1:{rpc_port}")
        client.start_stream(lambda result, error: None)
        begin = time.monotonic()
    assert time.monotonic() - begin < 15
    held.set()
    client.stop_stream()
    client.close()
    parts = all_from(streaming).split(b"event: ")
    assert [part[:6] for part in parts[1:]] == [b"exit\nd", b"answer"]
    assert b'"stopped_by": "draining"' in parts[2]
    # no exit had answered this one
    said = all_from(waiting)
    assert said.startswith(b"HTTP/1.1 503")
    assert json.loads(said.split(b"\r\n\r\n")[1])["error"].startswith("the server is stopping")
    counted = service.counters["net"]
    assert (counted.answers.total(), counted.refusals.total(), counted.cancelled) == (1, 1, 0)
