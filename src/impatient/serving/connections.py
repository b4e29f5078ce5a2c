"""Connections of the HTTP side: how many there are, how long they say nothing, and overload.

uvicorn bounds none of these. What is refused here is refused before its request is read, which
costs a small part of reading it, so that a server that is asked too much still answers whom it can.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import socket
from collections.abc import Callable
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from impatient.errors import ServingError
from impatient.serving.app import App
from impatient.serving.base import BaseService
from impatient.serving.refusals import MESSAGES

# Time for the head of a request and the first of its body. A caller that sends less holds a
# connection no longer.
HEAD_S = 10.0
# Longest head. h11 has this limit itself, httptools has none.
HEAD_BYTES = 2**16
# Time between requests on one connection.
KEEP_ALIVE_S = 30
# Time that what was refused may go on sending, so that it sees the reply.
LINGER_S = 1.0
# Connections that the loop takes at once, between other things.
BACKLOG = 128
# Files that are kept for other things than connections.
OTHER_FILES = 100
# files that a process may open where the system sets no limit
MOST_FILES = 2**20


def _unread(*headers: str) -> bytes:
    body = json.dumps({"error": MESSAGES["overloaded"]}).encode()
    lines = (
        "HTTP/1.1 503 Service Unavailable",
        "content-type: application/json",
        "retry-after: 1",
        f"content-length: {len(body)}",
        *headers,
    )
    return "\r\n".join([*lines, "", ""]).encode() + body


# Whole refusals of what is not read: on a connection that stays open, and on one that closes.
UNREAD = _unread()
UNREAD_LAST = _unread("connection: close")
LENGTH = re.compile(rb"\r\ncontent-length: *(\d{1,12})(?=\r\n)", re.IGNORECASE)


def is_whole(data: bytes) -> bool:
    """Tell whether some bytes are one whole request with a length, and nothing else."""
    head, end, body = data.partition(b"\r\n\r\n")
    lengths = LENGTH.findall(head + b"\r\n")
    plain = len(lengths) == 1 and b"transfer-encoding" not in head.lower()
    return bool(end) and plain and int(lengths[0]) == len(body)


class Guard(asyncio.Protocol):
    """A connection: uvicorn's, with limits around it.

    Args:
        inner: uvicorn's protocol.
        connections: all connections that are not refused.
        most: how many there may be.
        overloaded: tells whether no request can be taken.
        head_s: most seconds until the head of a request and the first of its body are there.
    """

    def __init__(
        self,
        inner: Any,
        *,
        connections: set[Guard],
        most: int,
        overloaded: Callable[[], bool],
        head_s: float,
    ) -> None:
        self._inner = inner
        self._connections = connections
        self._most = most
        self._overloaded = overloaded
        self._head_s = head_s
        self._refused = False
        # bytes of a head that has not ended
        self._head = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not say that they are asyncio's.
        self._transport = transport = cast("asyncio.Transport", transport)
        if len(self._connections) >= self._most:
            self._refused = True
            transport.write(UNREAD_LAST)
            transport.close()
            return
        self._connections.add(self)
        self._inner.connection_made(transport)
        self._close_after(self._head_s)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        # Health, metrics and the page are read all the same.
        if data.startswith(b"POST ") and self._between_requests() and self._overloaded():
            self._refuse(data)
            return
        self._inner.data_received(data)
        if self._is_answering():
            self._head = 0
            self._cancel()
            return
        if self._between_requests():
            self._head += len(data)
        if self._head > HEAD_BYTES:
            self._transport.close()
        elif self._timer is None:
            self._close_after(self._head_s)

    def _refuse(self, data: bytes) -> None:
        if is_whole(data):
            self._transport.write(UNREAD)
            self._close_after(self._head_s)
            return
        self._refused = True
        self._transport.write(UNREAD_LAST)
        self._transport.write_eof()
        self._close_after(LINGER_S)

    def _is_answering(self) -> bool:
        cycle = self._inner.cycle
        begun = cycle is not None and (cycle.body or not cycle.more_body)
        return bool(begun) and not cycle.response_complete

    def _between_requests(self) -> bool:
        cycle = self._inner.cycle
        if cycle is None:
            return True
        return bool(cycle.response_complete and not cycle.more_body)

    def _close_after(self, seconds: float) -> None:
        self._cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._transport.close)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        if self in self._connections:
            self._connections.discard(self)
            self._inner.connection_lost(exc)

    def eof_received(self) -> bool | None:
        return None if self._refused else self._inner.eof_received()

    def pause_writing(self) -> None:
        if not self._refused:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if not self._refused:
            self._inner.resume_writing()


def most_files() -> int:
    """Raise the number of files that this process may open as far as it can, and return it."""
    try:
        import resource
    except ImportError:
        # Windows has no such limit.
        return MOST_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    known = MOST_FILES if soft == resource.RLIM_INFINITY else soft
    most = MOST_FILES if hard == resource.RLIM_INFINITY else hard
    if most <= known:
        return known
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (ValueError, OSError):
        # macOS says that there is no limit, and has one.
        return known
    return most


class WebServer(uvicorn.Server):
    """uvicorn's server, which gives open requests their replies before it ends.

    Args:
        config: its configuration.
        service: what answers.
        drain_s: most seconds that open requests are waited for; then they get the answers they
            have.
    """

    def __init__(self, config: uvicorn.Config, service: BaseService, drain_s: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_s = drain_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.drain()
        ending = asyncio.get_running_loop().call_later(self._drain_s, self._service.end)
        await super().shutdown(sockets)
        ending.cancel()


def web_server(
    app: App, *, most_connections: int = 1024, drain_s: float = 5.0, head_s: float = HEAD_S
) -> WebServer:
    """Make the HTTP server of an application.

    Args:
        app: the application.
        most_connections: most connections at once, or fewer if this process may not open as many
            files; more are refused.
        drain_s: most seconds that open requests are waited for at the end.
        head_s: most seconds until the head of a request and the first of its body are there.
    """
    connections: set[Guard] = set()
    most = max(1, min(most_connections, most_files() - OTHER_FILES))

    def guarded(**given: Any) -> Guard:
        return Guard(
            AutoHTTPProtocol(**given),
            connections=connections,
            most=most,
            overloaded=lambda: app.service.overloaded,
            head_s=head_s,
        )

    config = uvicorn.Config(
        app,
        # uvicorn only calls it.
        http=guarded,  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        # No line for each request that is no HTTP.
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        # Callers that do not read their replies do not keep the server from ending.
        timeout_graceful_shutdown=math.ceil(drain_s + 1.0),
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    return WebServer(config, app.service, drain_s)


def bound_socket(host: str, port: int) -> socket.socket:
    """Take the port that a server is to listen at, so that one in use is said at once.

    Callers are refused until the server listens.

    Raises:
        ServingError: if it cannot be opened.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with contextlib.ExitStack() as failing:
            # asyncio turns Nagle's algorithm off only for sockets that name their protocol. With
            # it, every reply in two parts waits 40 ms for the caller's acknowledgement.
            listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            failing.callback(listener.close)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                # A caller that does not read its reply holds a connection no longer.
                unread_ms = KEEP_ALIVE_S * 1000
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unread_ms)
            listener.bind((host, port))
            failing.pop_all()
            return listener
    except OSError as error:
        raise ServingError(
            f"cannot listen at {host} port {port}: {error}. Choose another --port, or 0 for a free "
            "one."
        ) from error
