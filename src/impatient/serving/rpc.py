"""The server's gRPC side: the Open Inference Protocol v2, on the event loop of the HTTP side.

A call's own deadline counts beside those that a request names, and the nearest one holds. Time is
counted from when the request has been read: gRPC tells nothing earlier.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import numpy as np
from grpc import aio

from impatient.errors import BadRequest, ServingError
from impatient.provenance import own_version
from impatient.serving.app import EXTENSIONS, Side, facts, offered
from impatient.serving.base import Answered, BaseService, Offer
from impatient.serving.messages import SERVICE, message, parameter, read, value_of
from impatient.serving.protocol import (
    budget_s,
    check_output,
    flag_of,
    metadata,
    priority_of,
    read_tensors,
)
from impatient.serving.refusals import MESSAGES, STATUS, StatusError, check_token
from impatient.serving.scheduler import Refuse
from impatient.serving.tensors import Inputs

Context = Any

# what gRPC calls the statuses of HTTP
CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
# where a tensor's numbers lie, if not as raw bytes
CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
FINAL = "triton_final_response"
# Numbers outside raw contents that are read at once: some milliseconds in which nothing else goes
# on.
MOST_CONTENTS = 2**16
# Requests of one stream that are answered at once.
AT_ONCE = 64
# Calls for each request that may wait.
CALLS_PER_PLACE = 4
# methods that need no token, as whoever looks after the server calls them
OPEN = ("ServerLive", "ServerReady")


class Rpc(Side):
    """The service over gRPC.

    Args:
        service: which answers.
        host: address to listen at.
        port: port to listen at; 0 takes a free one, which is then in `port`.
        token: what `authorization: Bearer TOKEN` must hold; empty asks for none.
        begun: what is called with the address once it listens.
    """

    def __init__(
        self,
        service: BaseService,
        *,
        host: str,
        port: int,
        token: str = "",
        begun: Callable[[str], None] | None = None,
    ) -> None:
        self.service = service
        self._begun = begun
        self.port = port
        self._host = f"[{host}]" if ":" in host else host
        self._token = token

    async def start(self) -> None:
        """Listen, on the running event loop.

        Raises:
            ServingError: if the port is taken.
        """
        limits = self.service.limits
        self._server = aio.server(
            options=[
                ("grpc.max_receive_message_length", limits.body_bytes),
                ("grpc.so_reuseport", 0),
            ],
            # More calls at once are refused as RESOURCE_EXHAUSTED.
            maximum_concurrent_rpcs=CALLS_PER_PLACE * limits.waiting,
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))
        try:
            self.port = self._server.add_insecure_port(f"{self._host}:{self.port}")
        except RuntimeError as error:
            raise ServingError(
                f"cannot listen at {self._host} port {self.port}: {error}. Choose another "
                "--grpc-port, or 0 for a free one."
            ) from error
        await self._server.start()
        if self._begun is not None:
            self._begun(f"{self._host}:{self.port}")

    async def stop(self, most_s: float) -> None:
        """Take no more calls, and end those that are open after some seconds."""
        await self._server.stop(most_s)

    def _handlers(self) -> Any:
        # Requests are read in the handlers, which can say what is wrong with them.
        stream = grpc.stream_stream_rpc_method_handler(self._stream, response_serializer=_bytes_of)
        answers = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ServerMetadata": self._metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._infer,
        }
        methods = {name: self._unary(name, answer) for name, answer in answers.items()}
        return grpc.method_handlers_generic_handler(
            SERVICE, {**methods, "ModelStreamInfer": stream}
        )

    def _unary(self, name: str, answer: Callable[[Any, Context], Awaitable[Any]]) -> Any:
        """Make the handler of a method with one request and one reply."""

        async def handler(data: bytes, context: Context) -> Any:
            try:
                if name not in OPEN:
                    self._check_token(context)
                return await answer(read(f"{name}Request", data), context)
            except BadRequest as error:
                await context.abort(_code(error), str(error))

        return grpc.unary_unary_rpc_method_handler(handler, response_serializer=_bytes_of)

    def _check_token(self, context: Context) -> None:
        headers = dict(context.invocation_metadata() or ())
        check_token(self._token, str(headers.get("authorization", "")))

    # --- what needs no inference ------------------------------------------------------------------

    def _offer(self, name: str, version: str) -> Offer:
        if version not in ("", "1"):
            raise StatusError(404, f"no version {version[:100]!r}; expected 1, or none.")
        return offered(self.service, name)

    async def _live(self, _request: Any, _context: Context) -> Any:
        return message("ServerLiveResponse", live=True)

    async def _ready(self, _request: Any, _context: Context) -> Any:
        return message("ServerReadyResponse", ready=self.service.ready)

    async def _metadata(self, _request: Any, _context: Context) -> Any:
        return message(
            "ServerMetadataResponse",
            name="impatient",
            version=own_version(),
            extensions=[name for name in EXTENSIONS if name != "statistics"],
        )

    async def _model_ready(self, request: Any, _context: Context) -> Any:
        self._offer(request.name, request.version)
        return message("ModelReadyResponse", ready=self.service.ready)

    async def _model_metadata(self, request: Any, _context: Context) -> Any:
        one = self._offer(request.name, request.version)
        told = metadata(one.model.name, one.input, one.classes)
        sides = {
            side: [message("TensorMetadata", **tensor) for tensor in told[side]]
            for side in ("inputs", "outputs")
        }
        plain = {name: told[name] for name in ("name", "versions", "platform")}
        return message("ModelMetadataResponse", **plain, **sides)

    # --- inference --------------------------------------------------------------------------------

    async def _infer(self, request: Any, context: Context) -> Any:
        arrival = self.service.clock.now()
        async with contextlib.aclosing(self._events(request, context, arrival, False)) as events:
            async for event, offer in events:
                return _response(request, event, offer)
        raise StatusError(500, "no reply was made.")

    async def _stream(
        self, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncGenerator[Any]:
        """Answer the requests of a stream, each exit by exit, several at once."""
        try:
            self._check_token(context)
        except BadRequest as error:
            await context.abort(_code(error), str(error))
        # Who does not read replies is not asked for more requests.
        outbox: asyncio.Queue[Any] = asyncio.Queue(maxsize=AT_ONCE)
        reading = asyncio.ensure_future(self._read_all(requests, context, outbox))
        try:
            while (reply := await outbox.get()) is not None:
                yield reply
            await reading
        finally:
            reading.cancel()
            # or those that wait for a place in it would wait for ever
            while not outbox.empty():
                outbox.get_nowait()
            await asyncio.wait({reading})

    async def _read_all(
        self, requests: AsyncIterator[bytes], context: Context, outbox: asyncio.Queue[Any]
    ) -> None:
        places = asyncio.Semaphore(AT_ONCE)
        try:
            async with asyncio.TaskGroup() as group:
                async for data in requests:
                    arrival = self.service.clock.now()
                    await places.acquire()
                    answering = self._answer_each_exit(data, context, arrival, outbox)
                    group.create_task(answering).add_done_callback(lambda _: places.release())
        finally:
            # also after an error, or the stream would wait for ever
            await outbox.put(None)

    async def _answer_each_exit(
        self, data: bytes, context: Context, arrival: float, outbox: asyncio.Queue[Any]
    ) -> None:
        """Put a request's answers where the stream finds them.

        An error ends the request alone.
        """
        failed = message("ModelInferResponse")
        failed.parameters[FINAL].bool_param = True
        try:
            request = read("ModelInferRequest", data)
            failed.model_name, failed.id = request.model_name, request.id
            events = self._events(request, context, arrival, True)
            async with contextlib.aclosing(events):
                async for event, offer in events:
                    reply = _response(request, event, offer)
                    reply.parameters[FINAL].bool_param = bool(event.stopped_by)
                    await outbox.put(message("ModelStreamInferResponse", infer_response=reply))
        except BadRequest as error:
            await outbox.put(
                message("ModelStreamInferResponse", error_message=str(error), infer_response=failed)
            )

    async def _events(
        self, request: Any, context: Context, arrival: float, streamed: bool
    ) -> AsyncGenerator[tuple[Answered, Offer]]:
        """Give the answers of a request.

        Raises:
            BadRequest: if it is not what the model takes, or is refused.
        """
        offer = self._offer(request.model_name, request.model_version)
        left_s = context.time_remaining()
        call_s = None
        if left_s is not None:
            call_s = max(left_s + self.service.clock.now() - arrival, 1e-6)
        refused = self.service.refusal_unread(offer.model.name, arrival=arrival, most_s=call_s)
        if refused is not None:
            raise StatusError(STATUS[refused.why], MESSAGES[refused.why])
        parameters = {name: value_of(entry) for name, entry in request.parameters.items()}
        budgets = [budget_s(parameters, {}), call_s]
        given = [seconds for seconds in budgets if seconds is not None]
        for output in request.outputs:
            check_output(output.name)
        answers = self.service.answers(
            offer.model.name,
            _inputs(request, offer),
            arrival=arrival,
            budget_s=min(given, default=None),
            priority=priority_of(parameters),
            best_effort=flag_of(parameters, "best_effort"),
            streamed=streamed,
        )
        async with contextlib.aclosing(answers):
            async for event in answers:
                if isinstance(event, Refuse):
                    raise StatusError(STATUS[event.why], MESSAGES[event.why])
                yield event, offer


def _code(error: BadRequest) -> grpc.StatusCode:
    status = error.status if isinstance(error, StatusError) else 400
    return CODES.get(status, grpc.StatusCode.INVALID_ARGUMENT)


def _bytes_of(reply: Any) -> bytes:
    data: bytes = reply.SerializeToString()
    return data


def _inputs(request: Any, offer: Offer) -> Inputs:
    """Read the inputs of a request.

    Raises:
        BadRequest: if they are not what the model takes.
    """
    raw = request.raw_input_contents
    if len(raw) not in (0, len(request.inputs)):
        raise BadRequest(
            f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs; expected one each, "
            "or none."
        )
    tensors: list[dict[str, Any]] = []
    for place, given in enumerate(request.inputs):
        tensor: dict[str, Any] = {
            "name": given.name,
            "datatype": given.datatype,
            "shape": list(given.shape),
        }
        if raw:
            tensor["parameters"] = {"binary_data_size": len(raw[place])}
        elif given.datatype in CONTENTS:
            values = getattr(given.contents, CONTENTS[given.datatype])
            if len(values) > MOST_CONTENTS:
                raise StatusError(
                    413, f"more than {MOST_CONTENTS} numbers in contents; send raw_input_contents."
                )
            tensor["data"] = list(values)
        tensors.append(tensor)
    return read_tensors(tensors, b"".join(raw), offer.input)


def _response(request: Any, event: Answered, offer: Offer) -> Any:
    output = np.ascontiguousarray(event.output, dtype="<f4")
    reply = message(
        "ModelInferResponse",
        model_name=offer.model.name,
        model_version="1",
        id=request.id,
        outputs=[message("Tensor", name="output", datatype="FP32", shape=output.shape)],
        raw_output_contents=[output.tobytes()],
    )
    for name, value in facts(event, offer).items():
        reply.parameters[name].CopyFrom(parameter(value))
    return reply
