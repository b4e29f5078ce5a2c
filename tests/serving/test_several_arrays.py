"""Samples of several arrays: by name over HTTP and gRPC, padded and joined with their masks."""

import json
import runpy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as rpc
import tritonclient.http as http

from fakes import wait_until
from impatient.errors import BadRequest, ServingError
from impatient.serving.protocol import read_request
from impatient.serving.tensors import InputSpec, TensorSpec
from served import TEXTS, Words, hosted_texts, serving_both
from texts import save_tokenizer

ROOT = Path(__file__).parents[2]

IDS = np.array([[1, 2, 2], [5, 7, 3]])
MASK = np.array([[1, 1, 1], [1, 1, 0]])


@pytest.fixture(scope="module")
def shared():
    network = Words()
    with serving_both(network) as (service, port, rpc_port):
        yield service, network, port, rpc_port


def counts(ids: np.ndarray, mask: np.ndarray, exit: int = 2) -> np.ndarray:
    found = np.zeros((len(ids), 9))
    for row, (tokens, real) in enumerate(zip(ids, mask, strict=True)):
        np.add.at(found[row], tokens[real == 1], exit + 1)
    return found


def tensors(module, ids: np.ndarray, mask: np.ndarray) -> list:
    made = []
    # in another order than the model's
    for name, array in (("attention_mask", mask), ("input_ids", ids)):
        tensor = module.InferInput(name, array.shape, "INT64")
        tensor.set_data_from_numpy(array.astype(np.int64))
        made.append(tensor)
    return made


def test_tritons_clients_send_arrays_by_name(shared) -> None:
    _service, _network, port, rpc_port = shared
    told = {
        "inputs": [
            {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]},
            {"name": "attention_mask", "datatype": "INT64", "shape": [-1, -1]},
        ]
    }
    with rpc.InferenceServerClient(f"127.0.0.1:{rpc_port}") as client:
        found = client.get_model_metadata("net", as_json=True)["inputs"]
        assert [one["name"] for one in found] == [one["name"] for one in told["inputs"]]
        assert [one["shape"] for one in found] == [["-1", "-1"]] * 2
        reply = client.infer("net", tensors(rpc, IDS, MASK))
        np.testing.assert_array_equal(reply.as_numpy("output"), counts(IDS, MASK))
    client = http.InferenceServerClient(f"127.0.0.1:{port}")
    try:
        assert client.get_model_metadata("net")["inputs"] == told["inputs"]
        given = tensors(http, IDS, MASK)
        reply = client.infer("net", given)
        np.testing.assert_array_equal(reply.as_numpy("output"), counts(IDS, MASK))
        # one as JSON, the other binary
        given[0].set_data_from_numpy(MASK.astype(np.int64), binary_data=False)
        reply = client.infer("net", given)
        np.testing.assert_array_equal(reply.as_numpy("output"), counts(IDS, MASK))
    finally:
        client.close()


def test_the_example_asks_for_texts_of_different_lengths(shared, tmp_path) -> None:
    import transformers

    _service, _network, port, _rpc_port = shared
    ask = runpy.run_path(str(ROOT / "examples/serving/ask_text.py"))["ask"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))
    texts = ["good", "bad word0 bad", "word3"]
    rows, facts = ask(f"127.0.0.1:{port}", "net", tokenizer, texts, 5000.0)
    tokens = tokenizer(texts, padding=True, return_tensors="np")
    wanted = counts(tokens["input_ids"], tokens["attention_mask"])
    np.testing.assert_array_equal(rows, wanted)
    assert facts["exit"] == 2


def test_requests_of_different_lengths_share_a_batch_and_keep_their_answers() -> None:
    network = Words()
    held, begun = threading.Event(), threading.Event()
    with serving_both(network, default_s=60.0, most_s=60.0) as (service, _port, rpc_port):
        network.hold = lambda: (begun.set(), held.wait(20))
        texts = [np.array([[number, *[8] * length]]) for number, length in enumerate((0, 1, 5, 3))]

        def ask(ids: np.ndarray) -> np.ndarray:
            with rpc.InferenceServerClient(f"127.0.0.1:{rpc_port}") as client:
                return client.infer("net", tensors(rpc, ids, np.ones_like(ids))).as_numpy("output")

        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(ask, texts[0])
            assert begun.wait(20)
            others = [pool.submit(ask, ids) for ids in texts[1:]]
            wait_until(lambda: service.scheduler.waiting >= 4)
            held.set()
            answers = [one.result() for one in (first, *others)]
    for ids, answer in zip(texts, answers, strict=True):
        np.testing.assert_array_equal(answer, counts(ids, np.ones_like(ids)))
    # the last batch was of three texts, filled up to the longest
    assert sorted(network.seen) == [[1, 8, 3, 3, 3, 3], [2, 8, 8, 8, 8, 8], [3, 8, 8, 8, 3, 3]]


def test_shorter_texts_are_filled_up_on_the_side_of_the_tokenizer() -> None:
    batch = hosted_texts(Words(), side="left").prepared(
        [
            {"input_ids": np.array([[1, 2]]), "attention_mask": np.array([[1, 1]])},
            {"input_ids": np.array([[4]]), "attention_mask": np.array([[1]])},
        ]
    )
    assert torch.equal(batch["input_ids"], torch.tensor([[1, 2], [3, 4]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1], [0, 1]]))


def body(ids: object, mask: object, **changes: object) -> bytes:
    named = {"input_ids": ids, "attention_mask": mask}
    inputs = [
        {"name": name, "datatype": "INT64", "shape": list(np.shape(data)), "data": data, **changes}
        for name, data in named.items()
    ]
    return json.dumps({"inputs": inputs}).encode()


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (
            b'{"inputs": [{"name": "input_ids"}]}',
            "one tensor of each name: input_ids, attention_mask",
        ),
        (body([[1, 9]], [[1, 1]]), "input_ids' holds numbers from 1 to 9; expected from 0 to 8"),
        (body([[1, -1]], [[1, 1]]), "holds numbers from -1 to 1"),
        (body([[1] * 7], [[1] * 7]), r"expected \[N, T\] with N from 1 to 4 and T from 1 to 6"),
        (body([[1, 2]], [[1]]), "the same N, and the same T"),
        (body([[1], [2]], [[1]]), "the same N, and the same T"),
        (body([[1]], [[1]], parameters={"binary_data_size": 8}), "0 bytes of binary data"),
        (body([1], [1]), "has shape"),
    ],
)
def test_what_does_not_fit_is_said(wrong, complaint) -> None:
    with pytest.raises(BadRequest, match=complaint):
        read_request(wrong, None, TEXTS)


def test_bytes_that_belong_to_nothing_are_refused() -> None:
    head = body([[1]], [[1]])
    with pytest.raises(BadRequest, match="4 bytes of binary data belong to no input"):
        read_request(head + b"abcd", len(head), TEXTS)


def test_what_a_model_takes_is_checked() -> None:
    one = TensorSpec(name="a", datatypes=("FP32",), shape=(2,))
    with pytest.raises(ServingError, match="a sample of 2 arrays"):
        InputSpec(tensors=(one, one))
    with pytest.raises(ServingError, match="length"):
        InputSpec(tensors=TEXTS.tensors, named=True)
