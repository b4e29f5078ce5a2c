"""Read the bodies of requests, within limits on each of them and on all together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Self

from impatient.errors import BadRequest
from impatient.serving.base import Limits
from impatient.serving.json_reader import JsonReader
from impatient.serving.protocol import HEADER_LENGTH, INLINE_JSON
from impatient.serving.refusals import MESSAGES, Gone, StatusError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class Holding:
    """The bytes of a body that are held while it is read and answered."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bodies.let_go(self.size)


class Bodies:
    """Bodies that are being read or answered.

    Args:
        limits: how large one may be, and all.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # bytes of a whole body that may be JSON to the end
        self._at_once = min(INLINE_JSON, limits.json_bytes)
        self._held = 0
        self.reader = JsonReader()

    def holding(self) -> Holding:
        """Begin to hold a body, as a context in which it is read and answered."""
        return Holding(self)

    async def read(
        self, headers: Mapping[str, str], receive: Receive, holding: Holding
    ) -> tuple[bytes, int | None]:
        """Read a body that is held.

        Returns:
            The body, and the length of the JSON at its beginning; None if it is all of it.

        Raises:
            StatusError: if it is too large, or does not come within the longest deadline.
            Gone: if the caller goes meanwhile.
        """
        length = _json_length(headers)
        self._check_head(headers)
        # The connection bounds how long the first part may take.
        body, more = await self._part(receive, holding)
        if not more and len(body) <= self._at_once:
            return body, length
        try:
            async with asyncio.timeout(self._limits.most_s):
                chunks = [body]
                while more:
                    chunk, more = await self._part(receive, holding)
                    chunks.append(chunk)
                return await self._small(b"".join(chunks), length)
        except TimeoutError:
            text = "the body did not come within the longest deadline."
            raise StatusError(408, text) from None

    async def _part(self, receive: Receive, holding: Holding) -> tuple[bytes, bool]:
        """Receive a part of a body, and tell whether there is more."""
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        part = message.get("body", b"")
        self._hold(holding, len(part))
        return part, message.get("more_body", False)

    def _hold(self, holding: Holding, size: int) -> None:
        holding.size += size
        self._held += size
        self._check(holding.size)

    def let_go(self, size: int) -> None:
        """Hold so many bytes no longer."""
        self._held -= size

    def _check_head(self, headers: Mapping[str, str]) -> None:
        if headers.get("content-encoding", "identity") != "identity":
            raise StatusError(415, "compressed bodies are not read; send it as it is.")
        announced = headers.get("content-length", "0")
        if announced.isascii() and announced.isdigit():
            self._check(int(announced[:20]))

    def _check(self, size: int) -> None:
        most = self._limits.body_bytes
        if size > most:
            raise StatusError(413, f"the body has more than {most} bytes, the server's limit.")
        if self._held > self._limits.held_bytes:
            raise StatusError(503, MESSAGES["overloaded"])

    async def _small(self, body: bytes, length: int | None) -> tuple[bytes, int | None]:
        """Return a body whose JSON is small enough to be read at once."""
        size = len(body) if length is None else min(length, len(body))
        if size > self._limits.json_bytes or (size > INLINE_JSON and length is not None):
            most = self._limits.json_bytes if length is None else INLINE_JSON
            raise StatusError(
                413,
                f"more than {most} bytes of JSON; send tensors in binary (binary_data_size), or "
                "fewer samples.",
            )
        if size <= INLINE_JSON:
            return body, length
        try:
            return await self.reader.binary(body)
        except OSError as error:
            raise StatusError(503, "the JSON could not be read; send tensors in binary.") from error


def _json_length(headers: Mapping[str, str]) -> int | None:
    text = headers.get(HEADER_LENGTH)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise BadRequest(f"{HEADER_LENGTH} is {text[:40]!r}; expected a number of bytes.")
    return int(text)
