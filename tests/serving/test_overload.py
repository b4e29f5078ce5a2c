"""More connections, bytes and requests than a server can take."""

import asyncio
import json
import os
import resource
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from asking import HEAD, all_from, ask, body_of, connected, infer, reply_from
from fakes import wait_until
from impatient.clock import FakeClock
from impatient.errors import BadRequest
from impatient.serving.connections import (
    HEAD_BYTES,
    MOST_FILES,
    UNREAD_LAST,
    Guard,
    bound_socket,
    is_whole,
    most_files,
)
from impatient.serving.heartbeat import BEAT_S, IN_A_ROW, Heartbeat
from impatient.serving.json_reader import JsonReader
from impatient.serving.protocol import INLINE_JSON, binary_request, read_request
from served import SPEC, Gated, serving

HEALTH = b"GET /v2/health/ready HTTP/1.1\r\nhost: a\r\n\r\n"


def test_connections_beyond_the_limit_are_refused_until_others_close() -> None:
    with serving(Gated(), most_connections=3) as (_service, port):
        held = [connected(port, HEALTH) for _ in range(3)]
        for caller in held:
            assert reply_from(caller)[0] == 200
        assert b" 503 " in all_from(connected(port))
        held.pop().close()

        def answered() -> bool:
            with connected(port, HEALTH) as caller:
                return reply_from(caller)[0] == 200

        wait_until(answered)
        for caller in held:
            caller.close()


class PlainTransport:
    """As uvloop's: with asyncio's methods, but none of its classes."""

    def __init__(self) -> None:
        self.told = []

    def write(self, data: bytes) -> None:
        self.told.append(data)

    def close(self) -> None:
        self.told.append("closed")


def test_transports_of_other_loops_are_taken_as_they_are() -> None:
    transport = PlainTransport()
    guard = Guard(None, connections=set(), most=0, overloaded=bool, head_s=1.0)
    guard.connection_made(transport)
    guard.data_received(HEALTH)
    guard.connection_lost(None)
    assert transport.told == [UNREAD_LAST, "closed"]


def test_who_sends_no_whole_head_is_not_waited_for() -> None:
    with serving(Gated(), head_s=0.2) as (_service, port):
        assert all_from(connected(port)) == b""
        assert all_from(connected(port, b"POST /v2/models/net/infer HT")) == b""
        # a head, and no body
        assert all_from(connected(port, HEAD % 9)) == b""
        # half a head after a whole request
        caller = connected(port, HEALTH)
        assert reply_from(caller)[0] == 200
        caller.sendall(b"POST ")
        assert all_from(caller) == b""
        # the body that nobody reads any more
        caller = connected(port, HEAD % 2**30)
        assert reply_from(caller)[0] == 413
        caller.sendall(b"{")
        assert all_from(caller) == b""


def test_a_head_without_an_end_is_not_kept_whatever_reads_it() -> None:
    taken = []
    # as httptools, which takes any length
    reader = SimpleNamespace(
        cycle=None, connection_made=lambda _: None, data_received=lambda data: taken.append(data)
    )

    async def send() -> list[object]:
        transport = PlainTransport()
        guard = Guard(reader, connections=set(), most=1, overloaded=bool, head_s=9.0)
        guard.connection_made(transport)
        for _ in range(1 + HEAD_BYTES // 4096):
            assert not transport.told
            guard.data_received(b"x" * 4096)
        return transport.told

    assert asyncio.run(send()) == ["closed"]
    assert len(b"".join(taken)) == HEAD_BYTES + 4096


def test_a_loop_that_is_late_once_has_stalled_and_one_that_stays_late_is_behind() -> None:
    async def beats() -> None:
        beat = Heartbeat(lambda: None)
        clock = beat._clock = FakeClock()
        beat.start()
        beat.stop()
        late = []
        for _ in range(IN_A_ROW):
            clock.advance(BEAT_S + 0.1)
            late.append(beat.behind(0.05))
            beat._beat()
            beat.stop()
        clock.advance(BEAT_S + 0.01)
        late.append(beat.behind(0.05))
        clock.advance(0.1)
        late.append(beat.behind(0.05))
        assert late == [False, False, False, False, True]
        assert beat.worst_s == pytest.approx(0.11)
        clock.advance(-0.11)
        beat._beat()
        beat.stop()
        clock.advance(BEAT_S + 0.1)
        assert not beat.behind(0.05)

    asyncio.run(beats())


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        (HEAD % 2 + b"{}", True),
        (HEAD.upper().replace(b"%D", b"%d") % 2 + b"{}", True),
        (HEAD % 2 + b"{", False),
        (HEAD % 2 + b"{}P", False),
        ((HEAD % 2)[:-2], False),
        (HEAD.replace(b"host: a", b"content-length: 2") % 2 + b"{}", False),
        (HEAD.replace(b"host: a", b"transfer-encoding: chunked") % 2 + b"{}", False),
        (HEAD.replace(b"content-length: %d", b"a: b") + b"{}", False),
    ],
)
def test_one_whole_request_is_told_from_everything_else(data, whole) -> None:
    assert is_whole(data) == whole


def test_a_loop_that_is_behind_refuses_unread_and_still_tells_its_health(monkeypatch) -> None:
    behind = threading.Event()
    # when a loop is behind is tested on its own: here it is so at every moment
    monkeypatch.setattr(Heartbeat, "behind", lambda _, bound_s: behind.is_set() and bound_s > 0.0)
    with serving(Gated()) as (service, port):
        service._loop.call_soon_threadsafe(time.sleep, 0.06)
        behind.set()
        body = body_of([1, 2, 3, 4], timeout=9_000_000)
        with connected(port, HEAD % len(body)) as caller:
            status, headers, reply = reply_from(caller)
        assert status == 503
        assert headers[b"retry-after"] == b"1"
        assert b"more requests" in reply
        # a whole request is refused on a connection that stays open
        with connected(port) as caller:
            for _ in range(2):
                caller.sendall(HEAD % len(body) + body)
                status, headers, _ = reply_from(caller)
                assert status == 503
                assert b"connection" not in headers
        status, _headers, told = ask(port, "/v2/health/ready")
        assert status == 200
        assert json.loads(told)["worst_loop_lag_ms"] > 25
        behind.clear()
        assert infer(port, timeout=9_000_000)[0] == 200
        text = ask(port, "/metrics")[2].decode()
        assert "impatient_worst_loop_lag_seconds 0." in text


def test_what_cannot_be_served_is_refused_before_its_body() -> None:
    network = Gated()
    with serving(network, waiting=1) as (service, port):
        held, begun = threading.Event(), threading.Event()
        network.at[0] = lambda: (begun.set(), held.wait(20))
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(infer, port)
            assert begun.wait(20)
            with connected(port, HEAD % 100) as caller:
                assert reply_from(caller)[0] == 429
            held.set()
            assert first.result()[0] == 200
        late = HEAD.replace(b"host: a", b"host: a\r\nx-request-timeout-seconds: 0.00001") % 100
        with connected(port, late) as caller:
            assert b"not even the first exit" in reply_from(caller)[2]
        service.scheduler.drain()
        with connected(port, HEAD % 100) as caller:
            assert b"the server is stopping" in reply_from(caller)[2]
        assert service.counters["net"].refusals == {"queue full": 1, "too late": 1, "draining": 1}


def test_bodies_are_held_up_to_a_limit_on_all_of_them() -> None:
    with serving(Gated(), held_bytes=3000) as (service, port):
        half = [connected(port, HEAD % 2000 + b" " * 1400) for _ in range(2)]
        wait_until(lambda: b" 503 " in first_part(port, HEAD % 2000 + b" " * 1400))
        for caller in half:
            caller.close()
        wait_until(lambda: infer(port)[0] == 200)
        assert service.scheduler.waiting == 0


def first_part(port: int, sent: bytes) -> bytes:
    with connected(port, sent) as caller:
        caller.settimeout(0.2)
        try:
            return caller.recv(1000)
        except TimeoutError:
            return b""


def test_large_json_is_read_elsewhere_and_answered_the_same() -> None:
    body = body_of([1, 2, 3, 4], timeout=9_000_000)
    large = body[:-1] + b" " * INLINE_JSON + b"}"
    with serving(Gated()) as (_service, port):
        path = "/v2/models/net/infer"
        small, big = (json.loads(ask(port, path, one)[2]) for one in (body, large))
        assert big["outputs"] == small["outputs"]
        assert big["id"] == small["id"] == "a"
        status, _headers, told = ask(port, path, b"[" * 2 * INLINE_JSON)
        assert status == 400
        assert "not JSON" in json.loads(told)["error"]
        headers = {"inference-header-content-length": str(len(large))}
        assert ask(port, path, large + b"1234", headers)[0] == 413


def test_a_killed_reader_of_json_is_begun_again() -> None:
    async def asked() -> None:
        reader = JsonReader()
        body = body_of([1, 2, 3, 4])
        try:
            assert await reader.binary(body) == binary_request(body)
            os.kill(reader._process.pid, signal.SIGKILL)
            with pytest.raises(OSError, match=r"has ended|Broken pipe"):
                await reader.binary(body)
            assert await reader.binary(body) == binary_request(body)
            with pytest.raises(BadRequest, match="not JSON"):
                await reader.binary(b"[")
        finally:
            reader.stop()

    asyncio.run(asked())


@pytest.mark.parametrize(
    "shape", [[10**4000] * 2, [9] * 100_000, "\ud800"], ids=["huge", "long", "surrogate"]
)
def test_shapes_that_cannot_be_do_not_end_the_reader(shape) -> None:
    tensor = {"name": "input", "datatype": "FP32", "shape": shape, "data": [1.0]}
    body = json.dumps({"inputs": [tensor]}).encode().ljust(INLINE_JSON + 1)

    async def asked() -> None:
        reader = JsonReader()
        try:
            with pytest.raises(BadRequest, match="positive whole numbers"):
                await reader.binary(body)
        finally:
            reader.stop()

    asyncio.run(asked())


def test_json_in_binary_is_the_same_request() -> None:
    body = body_of(np.arange(8) / 3, deadline_ms=5)
    new, length = binary_request(body)
    one, other = read_request(body, None, SPEC), read_request(new, length, SPEC)
    assert (one.inputs["input"] == other.inputs["input"]).all()
    assert (one.id, one.parameters, one.binary) == (other.id, other.parameters, other.binary)
    assert length < len(new)


def flood(port: int, seconds: float) -> tuple[int, list[int], int]:
    """Send requests in turn, and return those sent, statuses, connections that broke."""
    body = body_of([1, 2, 3, 4])
    sent, statuses, broken = 0, [], 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        caller = connected(port)
        try:
            while time.monotonic() < end:
                caller.sendall(HEAD % len(body) + body)
                sent += 1
                status, headers, _ = reply_from(caller)
                statuses.append(status)
                if b"connection" in headers:
                    break
        except OSError:
            broken += 1
        caller.close()
    return sent, statuses, broken


def test_under_a_flood_each_request_has_one_reply_and_health_is_told() -> None:
    with serving(Gated(), default_s=0.05, waiting=16) as (service, port):
        with ThreadPoolExecutor(24) as pool:
            floods = [pool.submit(flood, port, 2.0) for _ in range(24)]
            told = [ask(port, "/v2/health/ready")[0] for _ in range(5)]
            found = [one.result() for one in floods]
        assert told == [200] * 5
        statuses = [status for _, some, _ in found for status in some]
        assert set(statuses) <= {200, 429, 503, 504}
        assert len(statuses) + sum(broken for *_, broken in found) == sum(one[0] for one in found)
        assert sum(broken for *_, broken in found) <= len(found)
        wait_until(lambda: not service._calls)
        assert service.scheduler.waiting == 0
        wait_until(lambda: infer(port, timeout=9_000_000)[0] == 200)


def test_replies_that_nobody_reads_are_given_up_by_the_system() -> None:
    with bound_socket("127.0.0.1", 0) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


@pytest.mark.parametrize(
    ("soft", "hard", "refuses", "most"),
    [
        (256, 4096, False, 4096),
        (4096, 4096, False, 4096),
        (256, -1, False, MOST_FILES),
        # as on macOS
        (256, -1, True, 256),
        (-1, -1, False, MOST_FILES),
    ],
)
def test_as_many_files_as_the_system_allows(monkeypatch, soft, hard, refuses, most) -> None:
    def change(_: int, limits: tuple[int, int]) -> None:
        if refuses:
            raise ValueError("current limit exceeds maximum limit")
        assert limits == (most, hard)

    monkeypatch.setattr(resource, "RLIM_INFINITY", -1)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", change)
    assert most_files() == most
