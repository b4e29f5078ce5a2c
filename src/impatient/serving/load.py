"""Send requests to a server at planned instants, whether or not earlier ones have been answered.

Times count from the planned instant, not from when a request was really sent, so a server that
stalls cannot hide it (no coordinated omission). How late the generator itself sent is reported
beside them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args
from urllib.parse import quote, urlsplit

import numpy as np

from impatient import checks
from impatient.clock import SYSTEM_CLOCK
from impatient.errors import ServingError
from impatient.serving.tensors import DATATYPES, Inputs

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Arrivals = Literal["poisson", "gamma", "mmpp", "ramp"]
NAMES = {dtype: name for name, dtype in DATATYPES.items()}
# Nobody waits longer than this for a reply that is late.
GRACE_S = 5.0


def arrivals(kind: Arrivals, *, rate: float, count: int, seed: int = 0) -> np.ndarray:
    """Draw instants of arrival, seconds from the first.

    Args:
        kind: "poisson"; "gamma", with gaps three times as uneven (cv 3); "mmpp", which switches
            between a third and three times the rate; "ramp", from 0 to twice the rate.
        rate: mean requests per second.
        count: number of requests.
        seed: of the draws.
    Raises:
        ServingError: if there is no such kind, or the rate or the count is not positive.
    Example:
        >>> instants = arrivals("poisson", rate=100.0, count=10_000)
        >>> bool(95.0 < 10_000 / instants[-1] < 105.0)
        True
    """
    checks.one_of(ServingError, get_args(Arrivals), arrivals=kind)
    checks.positive(ServingError, rate=rate)
    checks.at_least(ServingError, 1, count=count)
    rng = np.random.default_rng(seed)
    if kind == "ramp":
        # The rate grows with time t as 2 rate t / T, so the n-th request comes at T sqrt(n / N).
        return count / rate * np.sqrt(np.sort(rng.uniform(size=count)))
    if kind == "gamma":
        gaps = rng.gamma(1 / 9, 9 / rate, count)
    elif kind == "mmpp":
        gaps = _switching(rate, count, rng)
    else:
        gaps = rng.exponential(1 / rate, count)
    return np.cumsum(gaps)


def _switching(rate: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw gaps of a process whose rate switches after about fifty requests."""
    fast = rng.uniform(size=count // 50 + 1) < 0.5
    rates = np.where(np.repeat(fast, 50)[:count], 3.0, 1 / 3)
    gaps = rng.exponential(1.0, count) / rates
    return np.asarray(gaps * (count / rate / gaps.sum()))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What became of the requests, each in the order in which they were planned.

    Attributes:
        budgets_s: seconds that each was given.
        elapsed_s: seconds from its planned instant to its reply; infinite without one.
        lag_s: seconds from its planned instant to when it was sent.
        status: HTTP status; 0 without a reply.
        exits: the exit that answered; -1 without an answer.
        right: whether the answer was right; False without one.
    """

    budgets_s: np.ndarray
    elapsed_s: np.ndarray
    lag_s: np.ndarray
    status: np.ndarray
    exits: np.ndarray
    right: np.ndarray

    @property
    def in_time(self) -> np.ndarray:
        """Whether each was answered within its budget, as its caller saw it."""
        return np.asarray((self.exits >= 0) & (self.elapsed_s <= self.budgets_s))

    def summary(self) -> dict[str, Any]:
        """Return the numbers that a report shows, as plain values."""
        answered = self.elapsed_s[self.exits >= 0]
        p50, p99 = np.quantile(answered, [0.5, 0.99]) if len(answered) else (math.nan, math.nan)
        statuses, counts = np.unique(self.status, return_counts=True)
        exits, shares = np.unique(self.exits, return_counts=True)
        return {
            "requests": len(self.status),
            "in_time": float(self.in_time.mean()),
            "timely_accuracy": float((self.in_time & self.right).mean()),
            "p50_s": float(p50),
            "p99_s": float(p99),
            "lag_p50_s": float(np.quantile(self.lag_s, 0.5)),
            "lag_p99_s": float(np.quantile(self.lag_s, 0.99)),
            "status": {str(one): int(count) for one, count in zip(statuses, counts, strict=True)},
            "exits": {str(one): int(count) for one, count in zip(exits, shares, strict=True)},
        }


async def send_load(
    address: str,
    model: str,
    samples: Sequence[Inputs],
    labels: Sequence[int],
    *,
    arrivals_s: np.ndarray,
    budgets_s: np.ndarray,
    token: str = "",
    binary: bool = True,
) -> LoadResult:
    """Send one request per planned instant, each of one sample.

    Args:
        address: of the server, such as "http://127.0.0.1:8000".
        model: name of the model.
        samples: raw samples, each its arrays by name; request r has sample r modulo their number.
        labels: true class of each sample.
        arrivals_s: planned instants, seconds from now.
        budgets_s: seconds that each request is given, from its planned instant.
        token: the server's token, if it has one.
        binary: whether samples are sent as bytes, or as JSON, which servers of others read.
    Raises:
        ServingError: if the address cannot be read, or nothing listens there.
    """
    host, port = _host_and_port(address)
    connections: list[Connection] = []
    try:
        connections.append(await asyncio.open_connection(host, port))
    except OSError as error:
        raise ServingError(
            f"nothing answers at {address}: {error}. Start a server with `impatient serve DIR`."
        ) from error
    count = len(arrivals_s)
    result = LoadResult(
        budgets_s=np.asarray(budgets_s, dtype=float),
        elapsed_s=np.full(count, math.inf),
        lag_s=np.zeros(count),
        status=np.zeros(count, dtype=int),
        exits=np.full(count, -1),
        right=np.zeros(count, dtype=bool),
    )
    path = f"/v2/models/{quote(model, safe='')}/infer"
    authorization = f"authorization: Bearer {token}\r\n" if token else ""
    clock = SYSTEM_CLOCK
    begin = clock.now() + 0.05

    async def one(number: int) -> None:
        planned = begin + float(arrivals_s[number])
        sample = number % len(samples)
        # What the generator is late counts against the budget, too.
        result.lag_s[number] = clock.now() - planned
        left_s = max(1e-3, float(budgets_s[number]) - float(result.lag_s[number]))
        head, tail = _body(samples[sample], left_s, binary=binary)
        lengths = f"inference-header-content-length: {len(head)}\r\n" if binary else ""
        request = (
            f"POST {path} HTTP/1.1\r\nhost: {host}\r\n{authorization}"
            f"content-type: {'application/octet-stream' if binary else 'application/json'}\r\n"
            f"{lengths}content-length: {len(head) + len(tail)}\r\n\r\n"
        ).encode()
        connection = None
        try:
            async with asyncio.timeout(left_s + GRACE_S):
                connection = _open_one(connections)
                if connection is None:
                    connection = await asyncio.open_connection(host, port)
                reader, writer = connection
                writer.write(request + head + tail)
                status, reply = await _read(reader)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            # Status 0 and no exit say that there was no reply.
            if connection is not None:
                connection[1].close()
            return
        except (ValueError, IndexError) as error:
            if connection is not None:
                connection[1].close()
            raise _strange(address) from error
        result.elapsed_s[number] = clock.now() - planned
        result.status[number] = status
        connections.append(connection)
        if status == 200:
            try:
                found = json.loads(reply)
                result.exits[number] = found["parameters"]["exit"]
                output = found["outputs"][0]["data"]
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise _strange(address) from error
            result.right[number] = int(np.argmax(output)) == labels[sample]

    tasks = []
    try:
        for number in range(count):
            wait_s = begin + float(arrivals_s[number]) - clock.now()
            if wait_s > 0.0:
                await asyncio.sleep(wait_s)
            tasks.append(asyncio.ensure_future(one(number)))
        await asyncio.gather(*tasks)
    finally:
        for _reader, writer in connections:
            writer.close()
            # The server may have closed it, and not kindly.
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    return result


def _open_one(connections: list[Connection]) -> Connection | None:
    """Take the connection that was used last, of those that the server has not closed."""
    while connections:
        reader, writer = connections.pop()
        if not reader.at_eof():
            return reader, writer
        writer.close()
    return None


def _strange(address: str) -> ServingError:
    return ServingError(
        f"what answers at {address} is no server of ours; give the address that `impatient serve` "
        "says at its start, that of HTTP."
    )


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError("no http:// address")
        return parts.hostname, parts.port or 80
    except ValueError as error:
        raise ServingError(
            f"the address {address!r} cannot be read ({error}); expected one such as "
            "http://127.0.0.1:8000."
        ) from error


def _body(sample: Inputs, budget_s: float, *, binary: bool) -> tuple[bytes, bytes]:
    tensors = []
    tail = b""
    for name, array in sample.items():
        tensor = {"name": name, "datatype": NAMES[array.dtype], "shape": [1, *array.shape]}
        if binary:
            part = array.tobytes()
            tensors.append({**tensor, "parameters": {"binary_data_size": len(part)}})
            tail += part
        else:
            tensors.append({**tensor, "data": array.ravel().tolist()})
    parameters = {"deadline_ms": budget_s * 1e3}
    return json.dumps({"inputs": tensors, "parameters": parameters}).encode(), tail


async def _read(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read a reply with a length."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status = int(head.split(" ", 2)[1])
    length = next(
        (
            int(line.partition(":")[2])
            for line in head.split("\r\n")
            if line.startswith("content-length:")
        ),
        0,
    )
    return status, await reader.readexactly(length)
