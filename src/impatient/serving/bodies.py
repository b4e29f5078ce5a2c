"""Read the bodies of requests, within limits on each of them and on all together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from impatient.errors import BadRequest
from impatient.serving.json_reader import JsonReader
from impatient.serving.protocol import HEADER_LENGTH, INLINE_JSON
from impatient.serving.refusals import MESSAGES, Gone, StatusError
from impatient.serving.service import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class Bodies:
    """Bodies that are being read or answered.

    Args:
        limits: how large one may be, and all.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0
        self.reader = JsonReader()

    @contextlib.asynccontextmanager
    async def body(
        self, headers: Mapping[str, str], receive: Receive
    ) -> AsyncIterator[tuple[bytes, int | None]]:
        """Read a body, and hold it.

        Yields:
            The body, and the length of the JSON at its beginning; None if it is all of it.

        Raises:
            StatusError: if it is too large, or does not come within the longest deadline.
            Gone: if the caller goes meanwhile.
        """
        chunks: list[bytes] = []
        try:
            yield await self._read(headers, receive, chunks)
        finally:
            self._held -= sum(map(len, chunks))

    async def _read(
        self, headers: Mapping[str, str], receive: Receive, chunks: list[bytes]
    ) -> tuple[bytes, int | None]:
        length = _json_length(headers)
        self._check_head(headers)
        size = 0
        try:
            async with asyncio.timeout(self._limits.most_s):
                async for chunk in _chunks(receive):
                    chunks.append(chunk)
                    size += len(chunk)
                    self._held += len(chunk)
                    self._check(size)
                # The pieces are not kept beside the whole.
                chunks[:] = [b"".join(chunks)]
                return await self._small(chunks[0], length)
        except TimeoutError:
            text = "the body did not come within the longest deadline."
            raise StatusError(408, text) from None

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


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


def _json_length(headers: Mapping[str, str]) -> int | None:
    text = headers.get(HEADER_LENGTH)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise BadRequest(f"{HEADER_LENGTH} is {text[:40]!r}; expected a number of bytes.")
    return int(text)
