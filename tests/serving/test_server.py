"""The server on a real socket, asked by clients that are not ours."""

import dataclasses
import http.client
import json
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
import torch
import tritonclient.http as triton

from asking import HEAD, ask, body_of, connected, infer
from fakes import wait_until
from impatient.errors import ServingError
from impatient.serving import protocol
from impatient.serving.app import page
from impatient.serving.scheduler import Reason
from impatient.serving.service import Service
from impatient.serving.tensors import InputSpec
from impatient.training.preprocess import Preprocess
from served import Gated, hosted, serving


@pytest.fixture(scope="module")
def shared():
    torch.manual_seed(0)
    network = Gated()
    with serving(network, Gated()) as (_service, port):
        yield network, port


def expected(network, values, exit):
    with torch.inference_mode():
        return network(torch.tensor(np.asarray(values, dtype="float32").reshape(-1, 4)))[exit]


def test_tritons_own_client_is_answered_with_the_networks_output(shared) -> None:
    network, port = shared
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("net")
        assert client.get_server_metadata()["name"] == "impatient"
        assert client.get_model_metadata("net")["inputs"][0]["shape"] == [-1, 4]
        assert client.get_model_config("net")["max_batch_size"] == 4
        values = np.arange(8, dtype=np.float32).reshape(2, 4)
        for binary in (True, False):
            tensor = triton.InferInput("input", values.shape, "FP32")
            tensor.set_data_from_numpy(values, binary_data=binary)
            wanted = triton.InferRequestedOutput("output", binary_data=binary)
            reply = client.infer("net", [tensor], outputs=[wanted], timeout=2_000_000, priority=1)
            told = reply.get_response()["parameters"]
            assert (told["exit"], told["stopped_by"], told["deadline_met"]) == (2, "final", True)
            torch.testing.assert_close(
                torch.tensor(reply.as_numpy("output")), expected(network, values, 2)
            )
        stats = client.get_inference_statistics("net")["model_stats"][0]
        assert stats["inference_stats"]["success"]["count"] >= 2
    finally:
        client.close()


def test_replies_do_not_wait_for_acknowledgements(shared) -> None:
    _network, port = shared
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        connection.request("POST", "/v2/models/net/infer", body_of([1, 2, 3, 4]))
        connection.getresponse().read()
        times.append(time.perf_counter() - begin)
    connection.close()
    # Nagle's algorithm and delayed acknowledgements make it 40 ms, each time
    assert min(times[2:]) < 0.03


def test_a_stream_has_every_exit_and_then_the_answer(shared) -> None:
    network, port = shared
    status, headers, body = ask(port, "/v2/models/net/stream", body_of([1, 2, 3, 4]))
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    parts = body.decode().strip().split("\n\n")
    assert [part.split("\n")[0] for part in parts] == ["event: exit"] * 3 + ["event: answer"]
    found = [json.loads(part.split("data: ")[1]) for part in parts]
    assert [one["exit"] for one in found] == [0, 1, 2, 2]
    for one in found:
        torch.testing.assert_close(
            torch.tensor(one["output"]), expected(network, [1, 2, 3, 4], one["exit"])
        )
    assert found[-1]["stopped_by"] == "final"


def test_the_latest_answer_comes_at_the_deadline_while_a_stage_runs() -> None:
    network = Gated()
    with serving(network) as (_service, port):
        held = threading.Event()
        network.at[1] = lambda: held.wait(20)
        status, _headers, reply = infer(port, timeout=300_000)
        held.set()
        assert status == 200
        told = reply["parameters"]
        assert (told["exit"], told["stopped_by"]) == (0, "deadline")
        # a machine with other work may wake the server late, which it then says
        assert 250 < told["elapsed_ms"] < 2000
        assert told["deadline_met"] == (told["elapsed_ms"] <= 300)
        # the network is free again
        network.at.clear()
        assert infer(port)[2]["parameters"]["exit"] == 2


def test_a_network_that_raises_gives_the_answers_it_has(caplog) -> None:
    network = Gated()
    with serving(network) as (_service, port):
        network.at[1] = lambda: 1 / 0
        told = infer(port)[2]["parameters"]
        assert (told["exit"], told["stopped_by"]) == (0, "failed")
        network.at = {0: lambda: 1 / 0}
        status, _headers, reply = infer(port)
        assert status == 503
        assert "failed on this request" in reply["error"]
        network.at.clear()
        assert infer(port)[0] == 200


def test_many_callers_at_once_each_get_their_own_answer(shared) -> None:
    network, port = shared
    inputs = np.random.default_rng(0).normal(size=(120, 4)).round(3)

    def one(number: int) -> None:
        model = "net"
        status, _headers, reply = infer(port, inputs[number], model, priority=number % 3)
        assert status == 200
        right = expected(network, inputs[number], reply["parameters"]["exit"])
        torch.testing.assert_close(torch.tensor([reply["outputs"][0]["data"]]), right)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(len(inputs))))
    text = ask(port, "/metrics")[2].decode()
    assert "impatient_waiting 0" in text
    assert 'impatient_answer_seconds_bucket{model="net",le="+Inf"}' in text


def test_a_caller_that_goes_frees_its_place() -> None:
    network = Gated()
    with serving(network) as (service, port):
        held = threading.Event()
        begun = threading.Event()
        network.at[0] = lambda: (begun.set(), held.wait(20))
        body = body_of([1, 2, 3, 4])
        caller = connected(port, HEAD % len(body) + body)
        assert begun.wait(20)
        assert service.scheduler.waiting == 1
        caller.close()
        wait_until(lambda: service.scheduler.waiting == 0)
        held.set()
        network.at.clear()
        assert infer(port)[0] == 200
        assert 'cancelled_total{model="net"} 1' in service.metrics()


def test_full_queues_and_hopeless_deadlines_are_refused_with_a_reason() -> None:
    network = Gated()
    with serving(network, waiting=1) as (_service, port):
        status, _headers, reply = infer(port, timeout=1)
        assert status == 503
        assert "allow more time" in reply["error"]
        held, begun = threading.Event(), threading.Event()
        network.at[0] = lambda: (begun.set(), held.wait(20))
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(infer, port)
            assert begun.wait(20)
            status, headers, _reply = infer(port)
            held.set()
            assert (status, headers["retry-after"]) == (429, "1")
            assert first.result()[0] == 200


def test_a_token_is_asked_for() -> None:
    with serving(Gated(), token="secret") as (_service, port):
        assert infer(port)[0] == 401
        assert ask(port, "/v2/health/live")[0] == 200
        for scheme in ("Bearer", "bearer"):
            right = {"authorization": f"{scheme} secret"}
            assert ask(port, "/v2/models/net/infer", body_of([1, 2, 3, 4]), right)[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "reason"),
    [
        ("/v2/models/nett/infer", b"{}", {}, 404, "there are: net, other"),
        ("/v2/models/..%2F..%2Fetc/infer", b"{}", {}, 404, "expected versions/1"),
        ("/v2/models/net/versions/2/infer", b"{}", {}, 404, "expected versions/1"),
        ("/v2/models/net/infer", b"{", {}, 400, "not JSON"),
        ("/v2/models/net/infer", b"[" * 5000, {}, 400, "not JSON"),
        ("/v2/models/net/infer", b'{"inputs": [NaN]}', {}, 400, "finite"),
        ("/v2/models/net/infer", b'{"inputs": ["input"]}', {}, 400, "an input is a str"),
        ("/v2/models/net/infer", b"{}", {"content-encoding": "gzip"}, 415, "as it is"),
        ("/v2/models/net/infer", b"x" * 5000, {"inference-header-content-length": "6000"}, 400, ""),
        ("/v2/models/net/infer", b"x", {"inference-header-content-length": "-1"}, 400, "bytes"),
        ("/v2/models/net/infer", b"x" * (2**22 + 1), {}, 413, "binary"),
        ("/v2/models/net/infer", b"x" * (2**24 + 1), {}, 413, "limit"),
        ("/v2/nothing", None, {}, 404, "nothing is at"),
        ("/v2/models/net/nothing", None, {}, 404, "nothing is at"),
    ],
)
def test_bad_requests_have_a_reason(shared, path, body, headers, status, reason) -> None:
    found, _headers, reply = ask(shared[1], path, body, headers)
    assert found == status
    assert reason in json.loads(reply)["error"]


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"timeout": -1}, "positive"),
        ({"timeout": "soon"}, "positive"),
        ({"deadline_ms": 0}, "positive"),
        ({"deadline_ms": True}, "positive"),
        ({"priority": 11}, "0 to 10"),
        ({"best_effort": "yes"}, "true or false"),
    ],
)
def test_bad_parameters_have_a_reason(shared, parameters, reason) -> None:
    status, _headers, reply = infer(shared[1], **parameters)
    assert status == 400
    assert reason in reply["error"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_may_begin_with_the_mark_of_its_encoding(shared, encoding: str) -> None:
    _network, port = shared
    marked = body_of([1, 2, 3, 4]).decode().encode(encoding)
    assert ask(port, "/v2/models/net/infer", marked)[0] == 200


@pytest.mark.parametrize("reader", [protocol.orjson, None], ids=["orjson", "json"])
def test_json_is_read_and_written_alike_with_and_without_orjson(shared, monkeypatch, reader):
    _network, port = shared
    monkeypatch.setattr(protocol, "orjson", reader)
    # half a surrogate pair, which is no UTF-8
    text = body_of([1, 2, 3, 4]).replace(b'"id": "a"', b'"id": "\\ud800"')
    status, headers, body = ask(port, "/v2/models/net/infer", text)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body)["id"] == "\ud800"
    for number, said in (("1e999", "NaN or infinite"), ("NaN", "finite"), ("1,]", "not JSON")):
        status, _headers, body = ask(
            port, "/v2/models/net/infer", text.replace(b"4.0", number.encode())
        )
        assert status == 400
        assert said in json.loads(body)["error"]


def test_bytes_and_other_numbers_share_a_batch_and_bytes_are_scaled() -> None:
    spec = InputSpec.one(["FP32", "UINT8"], (4,))
    preprocess = Preprocess(mean=(0.0,), std=(1.0,))
    one = dataclasses.replace(hosted(Gated()), input=spec, preprocess=preprocess)
    numbers = np.ones((1, 4), "float32")
    batch = one.prepared([{"input": numbers}, {"input": np.full((1, 4), 255, "uint8")}])
    assert batch.tolist() == [[1.0] * 4] * 2


def test_the_statistics_count_samples_once_whatever_exits_they_reached() -> None:
    with serving(Gated()) as (_service, port):
        for values in ([1, 2, 3, 4], np.ones((3, 4))):
            assert infer(port, values)[0] == 200
        found = json.loads(ask(port, "/v2/models/net/stats")[2])["model_stats"][0]
        assert found["inference_count"] == 4
        assert found["inference_stats"]["success"]["count"] == 2


def test_a_budget_that_is_next_to_nothing_is_not_the_default() -> None:
    with serving(Gated()) as (_service, port):
        status, _headers, reply = infer(port, deadline_ms=5e-324)
        assert status == 503
        assert "not even the first exit" in reply["error"]


def test_a_network_that_ends_its_thread_in_the_warm_up_does_not_hold_the_server_up() -> None:
    network = Gated()
    network.at[0] = lambda: sys.exit()
    with serving(network) as (_service, port):
        assert infer(port)[0] == 503
        network.at.clear()
        assert infer(port)[0] == 200


def test_the_page_has_words_for_every_reason_to_stop() -> None:
    text = page()[0].decode()
    words = re.search(r"const WHY = \{(.*?)\};", text)[1]
    assert set(re.findall(r"(\w+):", words)) == set(get_args(Reason))


def test_a_body_that_never_ends_is_not_waited_for() -> None:
    with serving(Gated(), default_s=0.1, most_s=0.2) as (_service, port):
        caller = connected(port, HEAD % 99 + b"{")
        assert b"408" in caller.recv(1000)
        caller.close()


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(ServingError, match="different names"):
        Service([hosted(Gated()), hosted(Gated())])
