"""Ask a server over HTTP as any client would, or byte by byte."""

import http.client
import json
import socket
from typing import Any

import numpy as np

HEAD = b"POST /v2/models/net/infer HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n"


def ask(
    port: int,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    method: str | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """Send one request, and return status, headers, body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read()
    finally:
        connection.close()


def body_of(values: Any, **parameters: Any) -> bytes:
    array = np.asarray(values, dtype=float).reshape(-1, 4)
    tensor = {"name": "input", "datatype": "FP32", "shape": list(array.shape)}
    tensor["data"] = array.ravel().tolist()
    return json.dumps({"id": "a", "inputs": [tensor], "parameters": parameters}).encode()


def infer(port: int, values: Any = (1, 2, 3, 4), model: str = "net", **parameters: Any) -> Any:
    """Ask for one answer, and return status, headers, the reply."""
    status, headers, body = ask(port, f"/v2/models/{model}/infer", body_of(values, **parameters))
    return status, headers, json.loads(body)


def connected(port: int, sent: bytes = b"") -> socket.socket:
    """Open a connection, and send something."""
    caller = socket.create_connection(("127.0.0.1", port), timeout=20)
    caller.sendall(sent)
    return caller


def all_from(caller: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    parts = []
    while part := caller.recv(2**16):
        parts.append(part)
    caller.close()
    return b"".join(parts)


def reply_from(caller: socket.socket) -> tuple[int, dict[bytes, bytes], bytes]:
    """Read one reply with a length, and return status, headers in small letters, body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _some(caller)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}
    while len(body) < int(headers[b"content-length"]):
        body += _some(caller)
    return int(first.split(b" ")[1]), headers, body


def _some(caller: socket.socket) -> bytes:
    data = caller.recv(2**16)
    if not data:
        raise ConnectionResetError("the server has closed the connection.")
    return data
