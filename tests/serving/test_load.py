"""The load generator: its instants, and its times where the server stalls."""

import asyncio
import contextlib
import socket
import threading

import numpy as np
import pytest

from impatient.errors import DataError, ServingError
from impatient.serving.load import arrivals, send_load
from impatient.verbs.bench_serve import _traced
from served import Gated, serving


@pytest.mark.parametrize("kind", ["poisson", "gamma", "mmpp", "ramp"])
def test_instants_increase_at_the_rate_and_repeat_with_the_seed(kind) -> None:
    instants = arrivals(kind, rate=50.0, count=20_000, seed=1)
    assert (np.diff(instants) >= 0).all()
    assert 20_000 / instants[-1] == pytest.approx(50.0, rel=0.1)
    assert (instants == arrivals(kind, rate=50.0, count=20_000, seed=1)).all()
    gaps = np.diff(instants)
    spread = gaps.std() / gaps.mean()
    assert {"poisson": 0.9, "gamma": 2.5, "mmpp": 1.3, "ramp": 0.9}[kind] < spread


def test_a_stall_of_the_server_is_seen_by_all_requests_planned_in_it() -> None:
    network = Gated()
    with serving(network) as (_service, port):
        held = threading.Event()
        network.at[0] = lambda: held.wait(20)
        threading.Timer(0.6, held.set).start()
        result = asyncio.run(
            send_load(
                f"http://127.0.0.1:{port}",
                "net",
                [{"input": np.ones(4, dtype="float32")}],
                [0],
                arrivals_s=np.arange(10) * 0.02,
                budgets_s=np.full(10, 4.0),
            )
        )
    assert (result.status == 200).all()
    # the last was planned 0.18 s after the first, and the stall ended at 0.6 s or a little before
    assert (result.elapsed_s > 0.3).all()
    assert result.elapsed_s[0] > result.elapsed_s[-1] > 0.0
    assert result.summary()["in_time"] == 1.0


@pytest.mark.parametrize("binary", [True, False])
def test_samples_are_sent_as_bytes_or_as_json(binary: bool) -> None:
    samples = [{"input": np.full(4, value, dtype="float32")} for value in (0.0, 1.0)]
    with serving(Gated()) as (_service, port):
        result = asyncio.run(
            send_load(
                f"http://127.0.0.1:{port}",
                "net",
                samples,
                [0, 0],
                arrivals_s=np.arange(4) * 0.01,
                budgets_s=np.full(4, 4.0),
                binary=binary,
            )
        )
    assert (result.status == 200).all()
    assert (result.exits >= 0).all()


def test_bad_loads_say_what_was_expected() -> None:
    with pytest.raises(ServingError, match="rate"):
        arrivals("poisson", rate=0.0, count=1)
    with pytest.raises(ServingError, match=r"expected one such as http://127\.0\.0\.1:8000"):
        asyncio.run(send_load("localhost", "net", [], [0], arrivals_s=[], budgets_s=[]))


@contextlib.contextmanager
def answering(*replies: bytes):
    """A server that gives each connection one of these replies, and closes it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for reply in replies:
            caller, _ = listener.accept()
            with caller:
                caller.recv(2**16)
                caller.sendall(reply)

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread.join(20)
    listener.close()


def load(address: str, arrivals_s: list[float]):
    return asyncio.run(
        send_load(
            address,
            "net",
            [{"input": np.ones(4, dtype="float32")}],
            [0],
            arrivals_s=np.array(arrivals_s),
            budgets_s=np.full(len(arrivals_s), 4.0),
        )
    )


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    ],
)
def test_a_server_of_another_kind_is_said(reply: bytes) -> None:
    with answering(reply) as address, pytest.raises(ServingError, match="no server of ours"):
        load(address, [0.0])


def test_a_connection_that_the_server_closed_is_not_used_again() -> None:
    refusal = b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n"
    with answering(refusal, refusal) as address:
        result = load(address, [0.0, 0.5])
    assert result.status.tolist() == [503, 503]


@pytest.mark.parametrize(
    "instants",
    [np.array(1.0), np.array([0.0, np.inf]), np.array([np.nan, 1.0]), np.ones(3), np.eye(2)],
)
def test_a_trace_without_instants_is_refused(tmp_path, instants) -> None:
    np.save(tmp_path / "trace.npy", instants)
    with pytest.raises(DataError, match="cannot be read as instants"):
        _traced(tmp_path / "trace.npy", 10, 5.0)


def test_a_trace_of_several_arrays_or_without_a_rate_is_refused(tmp_path) -> None:
    np.savez(tmp_path / "trace.npz", np.arange(3.0))
    with pytest.raises(DataError, match="no list of numbers"):
        _traced(tmp_path / "trace.npz", 10, 5.0)
    np.save(tmp_path / "trace.npy", np.arange(3.0))
    with pytest.raises(ServingError, match="rate=0"):
        _traced(tmp_path / "trace.npy", 10, 0.0)
