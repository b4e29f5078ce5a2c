"""Whatever is sent to the server, it answers rightly, or refuses with a reason.

    # 40,000 inputs, some minutes; any machine will do
    python benchmarks/serving_fuzz.py
    # seconds, to see that it runs
    python benchmarks/serving_fuzz.py --smoke

Hypothesis makes the inputs, several at once: right requests as JSON and in binary; requests whose
parts are of other types, shapes, sizes and depths; damaged bytes; lies about lengths; odd headers,
parameters, names and methods; NaN, infinity and numbers that overflow in the network; bodies in
pieces, half bodies and callers that go. They come to the HTTP application in the process, to gRPC
through a socket of its own, as raw bytes, and to uvicorn's socket as raw bytes. Each must have one
reply: an answer that equals the network's output for this very input, computed apart, or a status
4xx, 503 or 504 with a reason; over gRPC, the codes that go with these. A 500, INTERNAL, UNKNOWN, an
exception, somebody else's answer, two replies or none is a fault.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from grpc import aio
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from impatient.anytime import Exit, Network, Run
from impatient.serving import messages
from impatient.serving.app import App
from impatient.serving.base import Limits
from impatient.serving.connections import bound_socket, web_server
from impatient.serving.model import ServedModel
from impatient.serving.protocol import HEADER_LENGTH
from impatient.serving.rpc import Rpc
from impatient.serving.service import Hosted, Service
from impatient.serving.tensors import InputSpec
from impatient.training.preprocess import Preprocess

SPEC = InputSpec.one(["FP32"], (2, 3), most_rows=4)
LIMITS = Limits(default_s=5.0, most_s=10.0, waiting=64, body_bytes=400_000, json_bytes=200_000)
INFER = "/v2/models/net/infer"
FAULTS = ("500", "raised", "wrong answer", "no reply", "no reason", "INTERNAL", "UNKNOWN")
RIGHT_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
}


class Tiny(Network):
    """Three exits, whose outputs tell inputs apart."""

    num_exits = 3
    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(nn.Linear(6 if index == 0 else 4, 4) for index in range(3))

    def exits(self, x: Any, *, keep: bool = False) -> Run:  # noqa: ARG002  nothing to keep
        return Run(self._exits(x))

    def _exits(self, x: torch.Tensor) -> Iterator[Exit]:
        x = x.flatten(1)
        for index, stage in enumerate(self.stages):
            x = stage(x)
            yield Exit(index, x, x)


def tiny_service(network: Network) -> Service:
    costs = {1: (1e-4,) * 3, 4: (2e-4,) * 3}
    model = ServedModel(name="net", stages_s=costs, quality=(0.5, 0.7, 0.9), max_batch=4)
    preprocess = Preprocess(mean=(), std=())
    one = Hosted(
        network=network.eval(),
        model=model,
        input=SPEC,
        preprocess=preprocess,
        classes=tuple("abcd"),
    )
    return Service([one], LIMITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as it is sent over HTTP.

    Attributes:
        kind: how it was made.
        body: its body, in pieces.
        goes: whether the caller goes after the last piece, instead of saying that it was the last.
    """

    kind: str
    body: tuple[bytes, ...]
    method: str = "POST"
    path: str = INFER
    headers: tuple[tuple[bytes, bytes], ...] = ()
    goes: bool = False


@dataclass(slots=True)
class Tally:
    """What became of all inputs.

    Attributes:
        results: how many, by way and kind, and then by result.
        faults: descriptions of the first faults.
    """

    results: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def add(self, way: str, kind: str, result: str, what: object) -> None:
        self.results.setdefault((way, kind), Counter())[result] += 1
        if result in FAULTS and len(self.faults) < 20:
            self.faults.append(f"{way}, {kind}: {result}: {what!r}"[:1500])

    @property
    def inputs(self) -> int:
        return sum(counter.total() for counter in self.results.values())


# --- inputs -------------------------------------------------------------------------------------

NUMBERS = st.floats(-100, 100, width=32) | st.sampled_from([3e38, -3e38, 1e-45, -0.0])
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -(2**63), 1e308, "\ud800", "NaN", "../../etc/passwd"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=6,
)
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("input") | ANYTHING,
        "datatype": st.sampled_from(["FP32", "FP64", "INT8", "BYTES", "fp32"]) | ANYTHING,
        "shape": st.just([1, 2, 3]) | st.lists(st.integers(-2, 2**40), max_size=4) | ANYTHING,
        "data": st.just([1, 2, 3, 4, 5, 6]) | st.just([[[1, 2, 3], [4, 5, 6]]]) | ANYTHING,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers()}) | ANYTHING,
    },
)
PARAMETERS = st.dictionaries(
    st.sampled_from(
        ["timeout", "deadline_ms", "priority", "best_effort", "binary_data_output", "sequence_id"]
    ),
    ANYTHING | st.integers(0, 10) | st.booleans() | st.floats(0.001, 10_000),
    max_size=3,
)
ODD = st.fixed_dictionaries(
    {"inputs": st.lists(TENSOR, max_size=2) | ANYTHING},
    optional={"id": ANYTHING, "outputs": ANYTHING, "parameters": PARAMETERS | ANYTHING},
)
ODD_HEADERS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                b"x-request-timeout-seconds",
                b"X-Envoy-Expected-RQ-Timeout-Ms",
                b"content-encoding",
                b"content-type",
                b"content-length",
                HEADER_LENGTH.encode(),
                b"authorization",
                b"expect",
                b"\xff",
            ]
        ),
        st.binary(max_size=6)
        | st.sampled_from([b"1e309", b"nan", b"-1", b"0", b" 7 ", b"\xb2", b"1_0", b"9" * 30]),
    ),
    max_size=3,
).map(tuple)
PATHS = st.sampled_from(
    [
        "/v2/models/net/infer",
        "/v2/models/net/versions/1/stream",
        "/v2/models/net/versions/../infer",
        "/v2/models/../../etc/passwd/infer",
        "/v2/models/%2e%2e/infer",
        "/v2/models//infer",
        "/v2/models/\x00/infer",
        "//v2//models/net/infer//",
        "/v2/models/net/config",
        "/metrics",
        "",
    ]
) | st.text(max_size=30).map(lambda text: f"/v2/models/{text}/infer")


@st.composite
def right(draw: st.DrawFn) -> tuple[bytes, tuple[tuple[bytes, bytes], ...]]:
    """Draw a right request, as body and headers."""
    rows = draw(st.integers(1, 4))
    values = draw(st.lists(NUMBERS, min_size=6 * rows, max_size=6 * rows))
    array = np.array(values, "<f4").reshape(rows, 2, 3)
    tensor: dict[str, Any] = {"name": "input", "datatype": "FP32", "shape": [rows, 2, 3]}
    binary = draw(st.booleans())
    tail = array.tobytes() if binary else b""
    if binary:
        tensor["parameters"] = {"binary_data_size": len(tail)}
    else:
        tensor["data"] = (array if draw(st.booleans()) else array.ravel()).tolist()
    head = {"id": draw(st.text(max_size=5)), "inputs": [tensor]}
    if draw(st.booleans()):
        head["parameters"] = {"binary_data_output": True, "deadline_ms": draw(st.floats(1, 9000))}
    # sometimes so long that another process reads it
    spaces = b" " * draw(st.sampled_from([0, 0, 0, 0, 0, 0, 0, 70_000])) if not binary else b""
    text = json.dumps(head).encode() + spaces
    return text + tail, (((HEADER_LENGTH.encode(), b"%d" % len(text)),) if binary else ())


def pieces(body: bytes, cuts: Sequence[int]) -> tuple[bytes, ...]:
    places = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    return tuple(body[a:b] for a, b in itertools.pairwise(places))


def damaged(
    draw: st.DrawFn,
    body: bytes,
    *,
    until: int = 10_000,
    hows: Sequence[str] = ("flip", "cut", "add", "double"),
) -> bytes:
    """Damage a body in one way, at some places up to a bound."""
    places = draw(st.lists(st.integers(0, until), min_size=1, max_size=4))
    values = draw(st.binary(min_size=len(places), max_size=len(places)))
    how = draw(st.sampled_from(hows))
    data = bytearray(body)
    for place, value in zip(places, values, strict=True):
        here = place % len(data) if data else 0
        if how == "flip" and data:
            data[here] ^= value or 1
        elif how == "cut":
            del data[here : here + value]
        elif how == "add":
            data[here:here] = bytes([value])
        elif how == "double":
            data[here:here] = data[: 1 + value]
    return bytes(data)


CUTS = st.lists(st.integers(0, 10_000), max_size=3)
LENGTHS = st.integers(-(2**40), 2**40) | st.integers(0, 400)
DEEP = st.tuples(st.sampled_from([b"[", b'{"inputs":', b'{"a":[']), st.integers(1, 60_000))
HUGE = st.tuples(st.integers(0, 255), st.integers(60_000, 500_000))


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    """Draw a request of any kind."""
    kind = draw(
        st.sampled_from(
            ["right", "odd parts", "damaged", "lies", "bytes", "deep or huge", "path", "headers"]
        )
    )
    body, headers = draw(right())
    given_: dict[str, Any] = {}
    if kind == "odd parts":
        text = json.dumps(draw(ODD)).encode()
        tail = draw(st.binary(max_size=30))
        whole = not tail or draw(st.booleans())
        body = text if whole else text + tail
        headers = () if whole else ((HEADER_LENGTH.encode(), b"%d" % len(text)),)
    elif kind == "damaged":
        body = damaged(draw, body)
    elif kind == "lies":
        name = draw(st.sampled_from([HEADER_LENGTH.encode(), b"content-length"]))
        kept = tuple(pair for pair in headers if pair[0] != name)
        headers = (*kept, (name, b"%d" % draw(LENGTHS)))
    elif kind == "bytes":
        body = draw(
            st.binary(max_size=80) | st.text(max_size=40).map(lambda text: text.encode("utf-16"))
        )
    elif kind == "deep or huge":
        opening, times = draw(DEEP)
        value, size = draw(HUGE)
        body = opening * times if draw(st.booleans()) else bytes([value]) * size
    elif kind == "path":
        given_ = {
            "path": draw(PATHS),
            "method": draw(st.sampled_from(["POST", "GET", "HEAD", "PUT", "DELETE", "", "\n"])),
        }
    elif kind == "headers":
        headers = (*headers, *draw(ODD_HEADERS))
    goes = draw(st.integers(0, 9)) == 0
    return Asked(kind=kind, body=pieces(body, draw(CUTS)), headers=headers, goes=goes, **given_)


# --- the oracle ---------------------------------------------------------------------------------


def input_of(body: bytes, headers: dict[str, str]) -> np.ndarray:
    """Read a request that was answered, apart from the server's own code."""
    length = headers.get(HEADER_LENGTH)
    text = body if length is None else body[: int(length)]
    tensor = json.loads(text)["inputs"][0]
    if "binary_data_size" in tensor.get("parameters", {}):
        return np.frombuffer(body[len(text) :], "<f4").reshape(tensor["shape"])
    with np.errstate(over="ignore"):
        return np.array(tensor["data"], dtype="float32").reshape(tensor["shape"])


def is_right(network: Network, x: np.ndarray, exit: int, output: np.ndarray) -> bool:
    with torch.inference_mode():
        wanted = network(torch.from_numpy(x.copy()))[exit].numpy()
    return bool(output.shape == wanted.shape and np.allclose(output, wanted, rtol=1e-3, atol=1e-4))


def judged(network: Network, one: Asked, sent: Sequence[dict[str, Any]]) -> str:
    """Say what became of a request over HTTP."""
    if not sent:
        return "gone" if one.goes else "no reply"
    starts = [message for message in sent if message["type"] == "http.response.start"]
    ends = [
        message
        for message in sent
        if message["type"] == "http.response.body" and not message.get("more_body", False)
    ]
    if len(starts) != 1 or (len(ends) != 1 and not one.goes):
        return "no reply"
    status = starts[0]["status"]
    reply = b"".join(message.get("body", b"") for message in sent[1:])
    if status != 200:
        told = json.loads(reply)
        said = "error" in told and len(told["error"]) > 10
        return str(status) if said or "ready" in told else "no reason"
    replied = dict(starts[0]["headers"])
    if one.method != "POST" or b"infer" not in one.path.encode(errors="replace"):
        return "200"
    headers = {name.decode("latin-1").lower(): v.decode("latin-1") for name, v in one.headers}
    x = input_of(b"".join(one.body), headers)
    length = replied.get(HEADER_LENGTH.encode())
    told = json.loads(reply if length is None else reply[: int(length)])
    (tensor,) = told["outputs"]
    numbers = (
        np.array(tensor["data"], "float32")
        if length is None
        else np.frombuffer(reply[int(length) :], "<f4")
    )
    assert replied.get(b"content-type")
    good = is_right(network, x, told["parameters"]["exit"], numbers.reshape(tensor["shape"]))
    return "200" if good else "wrong answer"


# --- ways ---------------------------------------------------------------------------------------


async def through_asgi(app: App, one: Asked) -> list[dict[str, Any]]:
    """Send a request to the application itself, and return what it sends."""
    sent: list[dict[str, Any]] = []
    last = len(one.body) - 1
    waiting = [
        {"type": "http.request", "body": part, "more_body": one.goes or number < last}
        for number, part in enumerate(one.body)
    ]
    waiting += [{"type": "http.disconnect"}] if one.goes else []
    over = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if waiting:
            await asyncio.sleep(0)
            return waiting.pop(0)
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    scope = {"type": "http", "method": one.method, "path": one.path, "headers": one.headers}
    await asyncio.wait_for(app(scope, receive, send), 30.0)
    over.set()
    return sent


async def ask_app(app: App, network: Network, tally: Tally, some: Sequence[Asked]) -> None:
    async def ask(one: Asked) -> None:
        begin = time.perf_counter()
        try:
            result = judged(network, one, await through_asgi(app, one))
        except Exception as error:
            result = "raised"
            tally.faults.append(f"{type(error).__name__}: {error}")
        tally.longest_s = max(tally.longest_s, time.perf_counter() - begin)
        tally.add("HTTP application", one.kind, result, one)

    await asyncio.gather(*map(ask, some))


@st.composite
def rpc_asked(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draw a message to ModelInfer, as bytes, with the kind of input that it is."""
    kind = draw(st.sampled_from(["right", "odd parts", "damaged", "bytes"]))
    rows = draw(st.integers(1, 4))
    values = np.array(draw(st.lists(NUMBERS, min_size=6 * rows, max_size=6 * rows)), "<f4")
    request = messages.message("ModelInferRequest", model_name="net", id=draw(st.text(max_size=5)))
    tensor = request.inputs.add(name="input", datatype="FP32", shape=[rows, 2, 3])
    if draw(st.booleans()):
        request.raw_input_contents.append(values.tobytes())
    else:
        tensor.contents.fp32_contents.extend(values)
    if kind == "odd parts":
        _odd(draw, request, tensor)
    data = request.SerializeToString()
    if kind == "damaged":
        data = damaged(draw, data)
    elif kind == "bytes":
        data = draw(st.binary(max_size=60))
    return kind, data


def _odd(draw: st.DrawFn, request: Any, tensor: Any) -> None:
    """Change one part of a message."""
    what = draw(st.sampled_from(["shape", "type", "contents", "raw", "inputs", "names", "words"]))
    if what == "shape":
        tensor.shape[:] = draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5))
    elif what == "type":
        tensor.datatype = draw(
            st.sampled_from(["FP64", "INT8", "BYTES", "", "FP16"]) | st.text(max_size=6)
        )
    elif what == "contents":
        tensor.contents.int_contents.extend(draw(st.lists(st.integers(-9, 9), max_size=9)))
        tensor.contents.fp32_contents.extend(draw(st.lists(st.floats(width=32), max_size=9)))
    elif what == "raw":
        request.raw_input_contents.extend(draw(st.lists(st.binary(max_size=30), max_size=3)))
    elif what == "inputs":
        request.inputs.add(name=draw(st.text(max_size=6)))
    elif what == "names":
        request.model_name = draw(st.sampled_from(["../net", "", "net/"]) | st.text(max_size=9))
        request.model_version = draw(st.sampled_from(["1", "2", ""]) | st.text(max_size=4))
    else:
        name = draw(st.sampled_from(["timeout", "deadline_ms", "priority", "best_effort", "x"]))
        entry = request.parameters[name]
        field_, value = draw(
            st.tuples(st.just("int64_param"), st.integers(-(2**63), 2**63 - 1))
            | st.tuples(st.just("double_param"), st.floats())
            | st.tuples(st.just("string_param"), st.text(max_size=6))
            | st.tuples(st.just("bool_param"), st.booleans())
            | st.tuples(st.just("uint64_param"), st.integers(0, 2**64 - 1))
        )
        setattr(entry, field_, value)


async def ask_rpc(
    channel: Any, network: Network, tally: Tally, some: Sequence[tuple[str, bytes]]
) -> None:
    call = channel.unary_unary(f"/{messages.SERVICE}/ModelInfer")

    async def ask(kind: str, data: bytes) -> None:
        try:
            reply = messages.read("ModelInferResponse", await call(data, timeout=30.0))
        except aio.AioRpcError as error:
            result = error.code().name
            if error.code() in RIGHT_CODES and len(error.details() or "") < 10:
                result = "no reason"
            tally.add("gRPC", kind, result, (data, error.details()))
            return
        asked_ = messages.read("ModelInferRequest", data)
        (tensor,) = asked_.inputs
        raw = b"".join(asked_.raw_input_contents)
        values = np.frombuffer(raw, "<f4") if raw else np.array(tensor.contents.fp32_contents, "f4")
        exit = reply.parameters["exit"].int64_param
        output = np.frombuffer(reply.raw_output_contents[0], "<f4").reshape(reply.outputs[0].shape)
        good = reply.id == asked_.id and is_right(
            network, values.reshape(tuple(tensor.shape)), exit, output
        )
        tally.add("gRPC", kind, "OK" if good else "wrong answer", data)

    await asyncio.gather(*(ask(*one) for one in some))


@st.composite
def wire(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draw bytes as they come out of a socket, with the kind of input that they are."""
    kind = draw(st.sampled_from(["right", "damaged", "half", "bytes"]))
    body, headers = draw(right())
    lines = [b"POST " + INFER.encode() + b" HTTP/1.1", b"host: a", b"connection: close"]
    lines += [name + b": " + value for name, value in headers]
    lines.append(b"content-length: %d" % len(body))
    data = b"\r\n".join(lines) + b"\r\n\r\n" + body
    if kind == "damaged":
        data = damaged(draw, data, until=300, hows=("flip", "cut", "add"))
    elif kind == "half":
        data = data[: draw(st.integers(0, len(data) - 1))]
    elif kind == "bytes":
        data = draw(st.binary(max_size=200))
    return kind, data


async def ask_socket(port: int, tally: Tally, some: Sequence[tuple[str, bytes]]) -> None:
    async def ask(kind: str, data: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        reply = b""
        with contextlib.suppress(OSError):
            writer.write(data)
            if kind != "right":
                # Some of it may look like a request with more to come.
                asyncio.get_running_loop().call_later(0.1, _end, writer)
            reply = await asyncio.wait_for(reader.read(-1), 30.0)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        # A caller that has ended before its request was whole may be left without a reply.
        result = reply.split(b" ", 2)[1].decode() if reply.startswith(b"HTTP/1.1 ") else "closed"
        if kind == "right" and result == "closed":
            result = "no reply"
        tally.add("socket", kind, result, data)

    await asyncio.gather(*(ask(*one) for one in some))


def _end(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.write_eof()


def drive(
    ask: Callable[[Sequence[Any]], Awaitable[None]],
    inputs: st.SearchStrategy[Any],
    *,
    loop: asyncio.AbstractEventLoop,
    tally: Tally,
    count: int,
    number: int,
) -> None:
    """Ask with inputs of a strategy, up to eight at once, until there were so many."""
    end = tally.inputs + count
    if count < 1:
        return

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(inputs, min_size=1, max_size=8))
    def check(some: list[Any]) -> None:
        if tally.inputs < end:
            loop.run_until_complete(ask(some))

    # Hypothesis may have had enough before.
    while tally.inputs < end:
        check()
        number += 1
        check = seed(number)(check)


def fuzz(*, http: int, rpc: int, socket: int, number: int) -> Tally:
    """Send so many inputs each way."""
    tally = Tally()
    network = Tiny()
    service = tiny_service(network)
    app = App(service)
    side = Rpc(service, host="127.0.0.1", port=0)
    listener = bound_socket("127.0.0.1", 0)
    server = web_server(App(service, sides=[side]), drain_s=1.0)
    logging.getLogger("impatient.serving").setLevel(logging.CRITICAL)
    loop = asyncio.new_event_loop()
    options = {"loop": loop, "tally": tally, "number": number}
    try:
        serving = loop.create_task(server.serve(sockets=[listener]))
        while not server.started:
            loop.run_until_complete(asyncio.sleep(0.01))
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        drive(lambda some: ask_app(app, network, tally, some), asked(), count=http, **options)
        channel = loop.run_until_complete(_channel(side.port))
        drive(
            lambda some: ask_rpc(channel, network, tally, some), rpc_asked(), count=rpc, **options
        )
        loop.run_until_complete(channel.close())
        port = listener.getsockname()[1]
        drive(lambda some: ask_socket(port, tally, some), wire(), count=socket, **options)
        left = service.scheduler.waiting
        if left or service._calls:
            tally.faults.append(f"{left} requests are left over")
        server.should_exit = True
        loop.run_until_complete(serving)
    finally:
        app.bodies.reader.stop()
        listener.close()
        loop.close()
    return tally


async def _channel(port: int) -> Any:
    return aio.insecure_channel(f"127.0.0.1:{port}")


def rows_of(tally: Tally) -> list[dict[str, object]]:
    """Make a row for each way and kind."""
    rows = []
    for (way, kind), found in sorted(tally.results.items()):
        faults = sum(found[name] for name in FAULTS)
        others = {name: count for name, count in found.items() if name not in ("200", "OK")}
        shown = ", ".join(f"{name}: {count}" for name, count in sorted(others.items()))
        rows.append(
            {
                "through": way,
                "inputs are": kind,
                "inputs": found.total(),
                "answered rightly": found["200"] + found["OK"],
                "refused": shown,
                "faults": faults,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few inputs; writes nothing")
    parser.add_argument("--inputs", type=int, default=40_000, help="through all ways together")
    parser.add_argument("--seed", type=int, default=0)
    given_ = parser.parse_args()
    torch.set_num_threads(1)
    count = 400 if given_.smoke else given_.inputs
    tally = fuzz(http=count * 6 // 8, rpc=count // 8, socket=count // 8, number=given_.seed)
    rows = rows_of(tally)
    for row in rows:
        print(", ".join(f"{name}: {value}" for name, value in row.items()))
    for fault in dict.fromkeys(tally.faults):
        print("FAULT", fault)
    print(f"{tally.inputs} inputs, {len(tally.faults)} faults, longest {tally.longest_s:.1f} s")
    if not given_.smoke:
        from benchmarks.common import write_results

        write_results("serving_fuzz", "The server, fuzzed", str(__doc__), rows)


if __name__ == "__main__":
    main()
