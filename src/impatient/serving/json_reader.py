"""Read large JSON in a process of its own.

Reading JSON holds Python's lock from its beginning to its end, in whatever thread it is done, and
nothing else of a server goes on meanwhile: 40 ms for the numbers of one photograph.
"""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys
import threading
from typing import IO

from impatient.errors import BadRequest
from impatient.serving.protocol import binary_request

# Before a body, its length. Before a reply, whether it is a refusal, and lengths of JSON and all.
ASKED = struct.Struct("<Q")
TOLD = struct.Struct("<?QQ")


class JsonReader:
    """A process that turns requests of JSON into requests with binary tensors, one by one.

    It is begun when it is first needed, and again after it has died.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin the process, so that the first request need not wait for that."""
        command = [sys.executable, "-m", "impatient.serving.json_reader"]
        # In a session of its own, Ctrl-C does not reach it. It ends with its input.
        self._process = subprocess.Popen(  # noqa: S603  our own command
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    async def binary(self, body: bytes) -> tuple[bytes, int]:
        """Turn a request of JSON into one with binary tensors.

        Returns:
            The new body, and the length of the JSON at its beginning.

        Raises:
            BadRequest: if it cannot be read.
            OSError: if the process has died of it.
        """
        return await asyncio.to_thread(self._asked, body)

    def _asked(self, body: bytes) -> tuple[bytes, int]:
        with self._lock:
            if self._process is None:
                self.start()
            process = self._process
            assert process is not None
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(ASKED.pack(len(body)) + body)
                process.stdin.flush()
                refused, length, size = TOLD.unpack(_exactly(process.stdout, TOLD.size))
                reply = _exactly(process.stdout, size)
            except OSError:
                self.stop()
                raise
        if refused:
            raise BadRequest(reply.decode())
        return reply, length


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise OSError("the process that reads JSON has ended.")
    return data


def answer_all(asked: IO[bytes], told: IO[bytes]) -> None:
    """Read requests until there are no more, and tell what they hold."""
    while head := asked.read(ASKED.size):
        body = _exactly(asked, *ASKED.unpack(head))
        try:
            reply, length = binary_request(body)
            refused = False
        except BadRequest as error:
            reply, length, refused = str(error).encode(), 0, True
        told.write(TOLD.pack(refused, length, len(reply)) + reply)
        told.flush()


if __name__ == "__main__":
    answer_all(sys.stdin.buffer, sys.stdout.buffer)
