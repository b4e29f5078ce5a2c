"""The server's HTTP side: a plain ASGI application of the Open Inference Protocol v2.

No framework lies between: deadlines count from a request's first byte, before its body is read, and
a caller that goes away must be noticed.
"""

from __future__ import annotations

import abc
import base64
import contextlib
import functools
import hashlib
import json
import logging
import re
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
    Sequence,
)
from importlib.resources import files
from typing import Any, NamedTuple

from impatient.errors import BadRequest, ServingError
from impatient.provenance import own_version
from impatient.serving.base import RECENT_S, Answered, BaseService, Offer
from impatient.serving.bodies import Bodies, Message, Receive
from impatient.serving.protocol import (
    InferRequest,
    budget_s,
    flag_of,
    metadata,
    priority_of,
    read_request,
    write_reply,
)
from impatient.serving.refusals import MESSAGES, STATUS, Gone, StatusError, check_token
from impatient.serving.scheduler import Refuse

log = logging.getLogger(__name__)

Send = Callable[[Message], Awaitable[None]]
Reply = tuple[int, bytes, dict[str, str]]

# Time for streams that are open when all requests have been answered.
STREAMS_S = 1.0
EXTENSIONS = ["binary_tensor_data", "parameters", "schedule_policy", "statistics"]


@functools.cache
def page() -> tuple[bytes, dict[str, str]]:
    """Read the page, and allow it its own script and style and nothing else."""
    text = (files("impatient.serving") / "page.html").read_bytes()
    allowed = {}
    for tag in ("script", "style"):
        (inside,) = re.findall(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside).digest()).decode()
        allowed[tag] = f"{tag}-src 'sha256-{digest}'"
    policy = f"default-src 'self'; {allowed['script']}; {allowed['style']}; frame-ancestors 'none'"
    return text, {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }


def offered(service: BaseService, name: str) -> Offer:
    """Return a model by name.

    Raises:
        StatusError: if there is none of this name.
    """
    if name not in service.offers:
        known = ", ".join(service.offers)
        raise StatusError(404, f"no model {name[:100]!r}; there are: {known}.")
    return service.offers[name]


class Caller(NamedTuple):
    """Who sent a request, and how it is heard and answered.

    Attributes:
        headers: the headers, in small letters.
        receive: gives the next message of the caller.
        send: sends it one.
        arrival: instant of the first byte.
    """

    headers: Mapping[str, str]
    receive: Receive
    send: Send
    arrival: float


class Side(abc.ABC):
    """Another way to the same service, on the same event loop."""

    @abc.abstractmethod
    async def start(self) -> None:
        """Take requests."""

    @abc.abstractmethod
    async def stop(self, most_s: float) -> None:
        """Take no more, and end those that are open after some seconds."""


class App:
    """The ASGI application.

    Args:
        service: what answers.
        sides: other ways to the service, which start and stop with this one.
        token: if given, requests must carry it as `authorization: Bearer TOKEN`; the health
            addresses and the page need none.
        drain_s: most seconds that open requests are waited for at the end.
    """

    def __init__(
        self,
        service: BaseService,
        *,
        sides: Sequence[Side] = (),
        token: str = "",
        drain_s: float = 5.0,
    ) -> None:
        self.service = service
        self._sides = sides
        self._token = token
        self._drain_s = drain_s
        self.bodies = Bodies(service.limits)

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            arrival = self.service.clock.now()
            headers = {
                name.decode("latin-1").lower(): value.decode("latin-1")
                for name, value in scope["headers"]
            }
            caller = Caller(headers=headers, receive=receive, send=send, arrival=arrival)
            with contextlib.suppress(Gone):
                await self._http(scope, caller)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.service.start()
            for side in self._sides:
                await side.start()
        except ServingError as error:
            self.service.stop()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.service.drain()
        if not await self.service.drained(self._drain_s):
            self.service.end()
        for side in self._sides:
            await side.stop(STREAMS_S)
        self.service.stop()
        self.bodies.reader.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Mapping[str, Any], caller: Caller) -> None:
        path = scope["path"].strip("/").split("/")
        try:
            self._check_token(path, caller.headers)
            match (scope["method"], path):
                case ("POST", ["v2", "models", name, *version, ("infer" | "stream") as what]):
                    self._check_version(version)
                    await self._infer(name, what, caller)
                    return
                case _:
                    reply = self._answer(scope["method"], path)
        except StatusError as error:
            reply = _error(error.status, str(error))
        except BadRequest as error:
            reply = _error(400, str(error))
        await _send(caller.send, reply)

    def _check_token(self, path: list[str], headers: Mapping[str, str]) -> None:
        if not self._token or path == [""] or path[:2] == ["v2", "health"]:
            return
        check_token(self._token, headers.get("authorization", ""))

    @staticmethod
    def _check_version(version: list[str]) -> None:
        if version not in ([], ["versions", "1"]):
            raise StatusError(404, f"no {'/'.join(version)[:100]}; expected versions/1.")

    # --- what needs no inference ------------------------------------------------------------------

    def _answer(self, method: str, path: list[str]) -> Reply:
        if method not in ("GET", "HEAD"):
            raise StatusError(404, f"nothing to {method[:20]} at /{'/'.join(path)[:200]}.")
        ready = self.service.ready
        match path:
            case [""]:
                return (200, *page())
            case ["metrics"]:
                text = self.service.metrics().encode()
                return 200, text, {"content-type": "text/plain; version=0.0.4"}
            case ["v2"]:
                version = own_version()
                return _json(
                    200, {"name": "impatient", "version": version, "extensions": EXTENSIONS}
                )
            case ["v2", "health", "live"]:
                return _json(200, {"live": True})
            case ["v2", "health", "ready"]:
                return _json(200 if ready else 503, self._health(ready))
            case ["v2", "recent"]:
                return _json(200, self._recent())
            case ["v2", "models"]:
                return _json(200, {"models": list(self.service.offers)})
            case ["v2", "models", name, *rest]:
                return self._of_model(offered(self.service, name), rest, ready)
        raise StatusError(404, f"nothing is at /{'/'.join(path)[:200]}.")

    def _of_model(self, one: Offer, rest: list[str], ready: bool) -> Reply:
        if rest[:2] == ["versions", "1"]:
            rest = rest[2:]
        name = one.model.name
        match rest:
            case []:
                return _json(200, metadata(name, one.input, one.classes))
            case ["ready"]:
                return _json(200 if ready else 503, {"name": name, "ready": ready})
            case ["config"]:
                return _json(
                    200,
                    {
                        "name": name,
                        "platform": "impatient",
                        "max_batch_size": one.model.max_batch,
                        "parameters": {
                            "exits": one.model.num_exits,
                            "quality": one.model.quality,
                            "stages_ms": _in_ms(one.model.stages_s),
                            "heads_ms": _in_ms(one.model.heads_s),
                            "default_timeout_ms": self.service.limits.default_s * 1e3,
                            "most_timeout_ms": self.service.limits.most_s * 1e3,
                        },
                    },
                )
            case ["stats"]:
                return _json(200, {"model_stats": [self._stats(name)]})
        raise StatusError(404, f"nothing is at /v2/models/{name}/{'/'.join(rest)[:200]}.")

    def _health(self, ready: bool) -> dict[str, Any]:
        beat = self.service.heartbeat
        return {
            "ready": ready,
            "loop_lag_ms": round(beat.lag_s * 1e3, 3),
            "worst_loop_lag_ms": round(beat.worst_s * 1e3, 3),
        }

    def _stats(self, name: str) -> dict[str, Any]:
        counters = self.service.counters[name]
        answers = sum(counters.answers.values())
        return {
            "name": name,
            "version": "1",
            "inference_count": counters.answered_rows,
            "execution_count": counters.works,
            "inference_stats": {
                "success": {"count": answers, "ns": int(counters.elapsed_s * 1e9)},
                "fail": {"count": sum(counters.refusals.values()), "ns": 0},
                "cancel": {"count": counters.cancelled, "ns": 0},
                "compute_infer": {"count": counters.works, "ns": int(counters.busy_s * 1e9)},
            },
        }

    def _recent(self) -> dict[str, Any]:
        now = self.service.clock.now()
        return {
            "waiting": self.service.waiting,
            "requests": [
                {
                    "ago_s": round(now - when, 3),
                    "budget_ms": round(budget * 1e3, 3),
                    "elapsed_ms": round(elapsed * 1e3, 3),
                    "exit": exit,
                    "in_time": in_time,
                    "model": model,
                }
                for when, budget, elapsed, exit, in_time, model in self.service.recent
                if now - when <= RECENT_S
            ],
        }

    # --- inference --------------------------------------------------------------------------------

    async def _infer(self, name: str, what: str, caller: Caller) -> None:
        offer = offered(self.service, name)
        # A deadline in a header is that of whoever carries the request: nobody waits after it.
        most_s = budget_s({}, caller.headers)
        refused = self.service.refusal_unread(name, arrival=caller.arrival, most_s=most_s)
        if refused is not None:
            await _send(caller.send, _refusal(refused))
            return
        with self.bodies.holding() as holding:
            body, length = await self.bodies.read(caller.headers, caller.receive, holding)
            request = read_request(body, length, offer.input)
            await self._reply(offer, request, caller, streamed=what == "stream")

    async def _reply(
        self, offer: Offer, request: InferRequest, caller: Caller, *, streamed: bool
    ) -> None:
        answers = self.service.answers(
            offer.model.name,
            request.inputs,
            arrival=caller.arrival,
            budget_s=budget_s(request.parameters, caller.headers),
            priority=priority_of(request.parameters),
            best_effort=flag_of(request.parameters, "best_effort"),
            streamed=streamed,
            # When the caller goes, the request is cancelled.
            gone=functools.partial(_gone, caller.receive),
        )
        try:
            if streamed:
                await self._stream(offer, request, answers, caller.send)
                return
            async for event in answers:
                await _send(caller.send, _final(offer, request, event))
                if log.isEnabledFor(logging.INFO):
                    told = {"model": offer.model.name, "id": request.id, **facts(event, offer)}
                    log.info("%s", json.dumps(told))
        finally:
            await answers.aclose()

    async def _stream(
        self,
        offer: Offer,
        request: InferRequest,
        events: AsyncIterator[Answered | Refuse],
        send: Send,
    ) -> None:
        begun = False
        async for event in events:
            if not begun and isinstance(event, Refuse):
                await _send(send, _refusal(event))
                return
            if not begun:
                begun = True
                head = {"content-type": "text/event-stream", "cache-control": "no-store"}
                await _start(send, 200, head)
            output = event.output.tolist() if isinstance(event, Answered) else None
            data = json.dumps({"id": request.id, **facts(event, offer), "output": output})
            kind = "exit" if isinstance(event, Answered) and not event.stopped_by else "answer"
            text = f"event: {kind}\ndata: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": text, "more_body": True})
        if not begun:
            raise Gone
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    """Wait until the caller goes."""
    while (await receive())["type"] != "http.disconnect":
        pass


def facts(event: Answered | Refuse, offer: Offer) -> dict[str, Any]:
    """Say what a reply tells beside the output."""
    if isinstance(event, Refuse):
        return {"refused": event.why, "error": MESSAGES[event.why]}
    return {
        "exit": event.exit,
        "n_exits": offer.model.num_exits,
        "elapsed_ms": round(event.elapsed_s * 1e3, 4),
        "score": round(event.score, 6),
        **(
            {"stopped_by": event.stopped_by, "deadline_met": event.in_time}
            if event.stopped_by
            else {}
        ),
    }


def _final(offer: Offer, request: InferRequest, event: Answered | Refuse) -> Reply:
    if isinstance(event, Refuse):
        return _refusal(event)
    body, headers = write_reply(
        offer.model.name,
        request.id,
        event.output,
        facts(event, offer),
        binary=request.binary,
    )
    return 200, body, headers


def _refusal(event: Refuse) -> Reply:
    status, body, headers = _error(STATUS[event.why], MESSAGES[event.why])
    if event.retry_after_s > 0.0:
        # The header knows whole seconds only.
        headers["retry-after"] = str(max(1, round(event.retry_after_s)))
    return status, body, headers


def _error(status: int, text: str) -> Reply:
    return _json(status, {"error": text})


def _in_ms(table: Mapping[int, Sequence[float]]) -> dict[str, list[float]]:
    return {str(size): [round(seconds * 1e3, 4) for seconds in row] for size, row in table.items()}


def _json(status: int, value: Any) -> Reply:
    return status, json.dumps(value).encode(), {"content-type": "application/json"}


async def _start(send: Send, status: int, headers: Mapping[str, str]) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )


async def _send(send: Send, reply: Reply) -> None:
    status, body, headers = reply
    await _start(send, status, {**headers, "content-length": str(len(body))})
    await send({"type": "http.response.body", "body": body})
