"""The gRPC side, asked by Triton's own clients, plain and asyncio."""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from tritonclient.grpc import aio, service_pb2
from tritonclient.utils import InferenceServerException

from impatient.serving import messages
from impatient.serving.rpc import AT_ONCE, Rpc
from served import Gated, serving_both

VALUES = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(scope="module")
def shared():
    torch.manual_seed(0)
    network = Gated()
    with serving_both(network) as (service, _, port):
        yield service, network, f"127.0.0.1:{port}"


def tensor_of(values: np.ndarray, datatype: str = "FP32") -> triton.InferInput:
    tensor = triton.InferInput("input", values.shape, datatype)
    tensor.set_data_from_numpy(values)
    return tensor


def outputs_of(network: Gated) -> list[np.ndarray]:
    with torch.inference_mode():
        return [output.numpy() for output in network(torch.from_numpy(VALUES))]


def test_tritons_client_is_answered_with_the_networks_output(shared) -> None:
    _, network, address = shared
    with triton.InferenceServerClient(address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("net")
        server = client.get_server_metadata()
        assert server.name == "impatient"
        # that is over HTTP alone
        assert "statistics" not in server.extensions
        told = client.get_model_metadata("net")
        assert [list(entry.shape) for entry in (*told.inputs, *told.outputs)] == [[-1, 4]] * 2
        reply = client.infer(
            "net", [tensor_of(VALUES)], request_id="a", timeout=2_000_000, priority=1
        )
    np.testing.assert_allclose(reply.as_numpy("output"), outputs_of(network)[-1], rtol=1e-5)
    facts = reply.get_response().parameters
    assert reply.get_response().id == "a"
    assert (facts["exit"].int64_param, facts["n_exits"].int64_param) == (2, 3)
    assert facts["deadline_met"].bool_param
    assert facts["stopped_by"].string_param == "final"


def test_a_stream_gives_every_exit_and_says_which_is_the_last(shared) -> None:
    _, network, address = shared
    replies: queue.Queue = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: replies.put((result, error)))
        client.async_stream_infer("net", [tensor_of(VALUES)], request_id="good", timeout=4_000_000)
        answers = [replies.get(timeout=10)[0] for _ in range(4)]
        # what is wrong with one request does not end the stream
        client.async_stream_infer("none", [tensor_of(VALUES)])
        _, error = replies.get(timeout=10)
        assert "no model" in str(error)
        client.async_stream_infer("net", [tensor_of(VALUES)], timeout=4_000_000)
        assert replies.get(timeout=10)[0] is not None
        client.stop_stream()
    ends = [answer.get_response().parameters["triton_final_response"] for answer in answers]
    assert [end.bool_param for end in ends] == [False, False, False, True]
    for answer, right in zip(answers, [*outputs_of(network), outputs_of(network)[-1]], strict=True):
        np.testing.assert_allclose(answer.as_numpy("output"), right, rtol=1e-5)


def test_a_stream_ends_when_our_own_code_fails(shared, monkeypatch) -> None:
    _, _, address = shared

    def failing(*_) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("impatient.serving.rpc._response", failing)
    replies: queue.Queue = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: replies.put((result, error)))
        client.async_stream_infer("net", [tensor_of(VALUES)])
        result, error = replies.get(timeout=10)
    assert result is None
    assert error is not None


def test_a_caller_that_reads_nothing_and_leaves_is_forgotten(shared) -> None:
    service, _, _ = shared
    context = SimpleNamespace(invocation_metadata=tuple)

    async def requests() -> AsyncIterator[bytes]:
        for _ in range(3 * AT_ONCE):
            yield b"no message"

    async def leave() -> set[asyncio.Task]:
        stream = Rpc(service, host="127.0.0.1", port=0)._stream(requests(), context)
        reply = await anext(stream)
        assert reply.error_message
        for _ in range(10 * AT_ONCE):
            await asyncio.sleep(0)
        await asyncio.wait_for(stream.aclose(), 10)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert not asyncio.run(leave())


def test_many_asyncio_callers_get_their_own_answers(shared) -> None:
    _, network, address = shared

    async def all_of_them() -> list[np.ndarray]:
        async with aio.InferenceServerClient(address) as client:
            asked = [
                client.infer("net", [tensor_of(VALUES + number)], client_timeout=30.0)
                for number in range(40)
            ]
            return [reply.as_numpy("output") for reply in await asyncio.gather(*asked)]

    answers = asyncio.run(all_of_them())
    with torch.inference_mode():
        right = [network(torch.from_numpy(VALUES + number))[-1].numpy() for number in range(40)]
    np.testing.assert_allclose(np.stack(answers), np.stack(right), rtol=1e-4, atol=1e-5)


def test_a_calls_own_deadline_counts_and_the_answer_so_far_is_given(monkeypatch) -> None:
    # seconds for the reply to travel in, so that other work on the machine does not matter
    monkeypatch.setattr("impatient.serving.service.RESERVE_S", 6.0)
    network = Gated()
    with serving_both(network) as (_, _, port):
        hold = threading.Event()
        network.at[1] = lambda: hold.wait(20)
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
            reply = client.infer("net", [tensor_of(VALUES)], client_timeout=7.0)
        hold.set()
    facts = reply.get_response().parameters
    assert facts["exit"].int64_param == 0
    assert facts["deadline_met"].bool_param


@pytest.mark.parametrize(
    ("model", "values", "datatype", "parameters", "code"),
    [
        ("none", VALUES, "FP32", {}, grpc.StatusCode.NOT_FOUND),
        ("net", VALUES[:, :3], "FP32", {}, grpc.StatusCode.INVALID_ARGUMENT),
        ("net", VALUES.astype("int64"), "INT64", {}, grpc.StatusCode.INVALID_ARGUMENT),
        ("net", VALUES * np.nan, "FP32", {}, grpc.StatusCode.INVALID_ARGUMENT),
        ("net", VALUES, "FP32", {"deadline_ms": -1}, grpc.StatusCode.INVALID_ARGUMENT),
        ("net", VALUES, "FP32", {"best_effort": "yes"}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_what_is_wrong_is_said_with_its_code(
    shared, model, values, datatype, parameters, code
) -> None:
    _, _, address = shared
    with (
        triton.InferenceServerClient(address) as client,
        pytest.raises(InferenceServerException) as found,
    ):
        client.infer(model, [tensor_of(values, datatype)], parameters=parameters)
    assert found.value.status() == str(code)
    assert len(found.value.message()) > 20


def test_an_output_that_is_not_there_is_said(shared) -> None:
    _, _, address = shared
    outputs = [triton.InferRequestedOutput("logits")]
    with (
        triton.InferenceServerClient(address) as client,
        pytest.raises(InferenceServerException, match="no output 'logits'; expected 'output'"),
    ):
        client.infer("net", [tensor_of(VALUES)], outputs=outputs)


def test_time_in_which_a_stream_is_full_counts(monkeypatch) -> None:
    monkeypatch.setattr("impatient.serving.rpc.AT_ONCE", 1)
    network = Gated()
    replies: queue.Queue = queue.Queue()
    with serving_both(network) as (_, _, port):
        network.at[0] = lambda: time.sleep(0.3)
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
            client.start_stream(lambda result, error: replies.put((result, error)))
            for _ in range(3):
                client.async_stream_infer("net", [tensor_of(VALUES)], timeout=9_000_000)
            found = [replies.get(timeout=20)[0].get_response() for _ in range(12)]
            client.stop_stream()
    ends = [one for one in found if one.parameters["triton_final_response"].bool_param]
    first, second, _ = (one.parameters["elapsed_ms"].double_param for one in ends)
    # it was read as soon as the first had its place
    assert second > first + 200


def test_a_token_is_asked_for_but_not_for_health() -> None:
    with (
        serving_both(Gated(), token="secret") as (_, _, port),
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="Bearer"):
            client.infer("net", [tensor_of(VALUES)])
        with pytest.raises(InferenceServerException, match="Bearer"):
            client.get_model_metadata("net")
        given = {"authorization": "Bearer secret"}
        assert client.infer("net", [tensor_of(VALUES)], headers=given) is not None


def test_bytes_on_the_wire_are_those_of_tritons_messages() -> None:
    theirs = service_pb2.ModelInferRequest(model_name="net", model_version="1", id="a")
    theirs.parameters["timeout"].int64_param = 5
    tensor = theirs.inputs.add(name="input", datatype="FP32", shape=[1, 2])
    tensor.contents.fp32_contents.extend([1.5, -2.0])
    theirs.outputs.add(name="output")
    theirs.raw_input_contents.append(b"abc")
    data = theirs.SerializeToString(deterministic=True)
    ours = messages.read("ModelInferRequest", data)
    assert ours.SerializeToString(deterministic=True) == data
    assert messages.value_of(ours.parameters["timeout"]) == 5
    assert list(ours.inputs[0].contents.fp32_contents) == [1.5, -2.0]
