"""Ten minutes at twice capacity: neither memory nor threads, files or tasks of the server may grow.

    # ten minutes; a busy machine only makes it harder
    python benchmarks/serving_soak.py
    # half a minute, to see that it runs
    python benchmarks/serving_soak.py --smoke

The server is a process of its own: three stages of 10 ms for up to four samples at once, so that it
can do 133 whole answers a second. This process sends 266 requests a second at planned instants,
whether or not earlier ones are answered, through real sockets: most on connections that stay open,
as JSON or in binary; some as streams; some to gRPC; some that go while they wait, send half a
request, JSON of 100 kB or what is no request at all. Each that stays must have one reply. Once a
second the server writes down its resident memory, threads, open files, tasks on its event loop,
requests without a reply, and how late its loop is. The first minute (the first sixth, if it is
shorter) is left out; then the first and the last third stand side by side, and the slope (Theil and
Sen, with its 95 % interval) says what ten minutes add.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grpc import aio
from scipy import stats
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from impatient.anytime import Exit, Network, Run
from impatient.serving import messages
from impatient.serving.app import App
from impatient.serving.base import Limits
from impatient.serving.connections import bound_socket, web_server
from impatient.serving.model import ServedModel
from impatient.serving.rpc import Rpc
from impatient.serving.service import Hosted, Service
from impatient.serving.tensors import InputSpec
from impatient.training.preprocess import Preprocess

STAGE_S = 0.01
BATCH = 4
CAPACITY = BATCH / (3 * STAGE_S)
WIDTH = 64
CLOSING = b"host: a\r\nconnection: close"
TRACKED = ("MiB", "threads", "files", "tasks", "waiting")


# --- the server ---------------------------------------------------------------------------------


class Slow(Network):
    """Three exits, each of which takes its time."""

    num_exits = 3
    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def exits(self, x: Any, *, keep: bool = False) -> Run:  # noqa: ARG002  nothing to keep
        return Run(self._exits(x))

    def _exits(self, x: torch.Tensor) -> Iterator[Exit]:
        for index, stage in enumerate(self.stages):
            time.sleep(STAGE_S)
            x = stage(x).tanh()
            yield Exit(index, x, x[:, :10])


async def serve() -> None:
    """Serve until the input ends, and say the ports, and every second what is held."""
    torch.set_num_threads(1)
    model = ServedModel(
        name="net",
        stages_s={1: (STAGE_S,) * 3, BATCH: (STAGE_S,) * 3},
        quality=(0.5, 0.7, 0.9),
        max_batch=BATCH,
    )
    hosted = Hosted(
        network=Slow().eval(),
        model=model,
        input=InputSpec.one(["FP32"], (WIDTH,), most_rows=BATCH),
        preprocess=Preprocess(mean=(), std=()),
        classes=tuple("0123456789"),
    )
    service = Service([hosted], Limits(default_s=0.1))
    rpc = Rpc(service, host="127.0.0.1", port=0)
    listener = bound_socket("127.0.0.1", 0)
    app = App(service, sides=[rpc])
    server = web_server(app)
    # asyncio gives a handle of what runs; without it the task may be collected
    running = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    print(json.dumps([listener.getsockname()[1], rpc.port]), flush=True)
    ended = asyncio.ensure_future(asyncio.to_thread(sys.stdin.read))
    gc.collect()
    gc.freeze()
    while not ended.done():
        await asyncio.sleep(1.0)
        print(json.dumps(held(service)), flush=True)
    server.should_exit = True
    await running


def held(service: Service) -> dict[str, float]:
    """Say what this process holds."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    threads, files = (len([*Path("/proc/self", kind).iterdir()]) for kind in ("task", "fd"))
    return {
        "MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "threads": threads,
        "files": files,
        "tasks": len(asyncio.all_tasks()),
        "waiting": service.scheduler.waiting,
        "lag ms": service.heartbeat.lag_s * 1e3,
        "worst lag ms": service.heartbeat.worst_s * 1e3,
    }


# --- the callers --------------------------------------------------------------------------------


def body_of(number: int, *, spaces: int = 0) -> bytes:
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, WIDTH]}
    tensor["data"] = [float(number % 7)] * WIDTH
    asked = {"id": str(number), "inputs": [tensor], "parameters": {"deadline_ms": 80}}
    return json.dumps(asked).encode() + b" " * spaces


def request_of(body: bytes, what: str = "infer") -> bytes:
    head = f"POST /v2/models/net/{what} HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Callers:
    """Callers of all kinds.

    Args:
        port: of HTTP.
        call: of gRPC.
        found: counts what became of their requests.
    """

    def __init__(self, port: int, call: Any, found: Counter[str]) -> None:
        self._port = port
        self._call = call
        self._found = found
        self._open: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._dice = random.Random(0)

    async def one(self, number: int) -> None:
        """Send a request of some kind."""
        kinds = {
            self.stays: 80,
            self.streams: 8,
            self.calls: 4,
            self.goes: 4,
            self.sends_half: 2,
            self.sends_much: 1,
            self.sends_nonsense: 1,
        }
        (kind,) = self._dice.choices([*kinds], [*kinds.values()])
        try:
            result = await asyncio.wait_for(kind(number), 20.0)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            result = f"no reply ({type(error).__name__})"
        self._found[f"{kind.__name__.replace('_', ' ')}: {result}"] += 1

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._port)

    async def _kept_open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Take the connection that was used last, or a new one.

        Those that nobody used for half a minute have been closed by the server.
        """
        while self._open:
            reader, writer = self._open.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await self._connection()

    async def stays(self, number: int, body: bytes | None = None) -> str:
        """Ask on a connection that stays open."""
        connection = await self._kept_open()
        reader, writer = connection
        writer.write(request_of(body or body_of(number)))
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        reply = await reader.readexactly(length)
        status = head.split(b" ", 2)[1].decode()
        if status == "200" and json.loads(reply)["id"] != str(number):
            status = "somebody else's answer"
        if b"connection: close" in head:
            writer.close()
        else:
            self._open.append(connection)
        return status

    async def streams(self, number: int) -> str:
        reader, writer = await self._connection()
        body = body_of(number)
        writer.write(request_of(body, "stream").replace(b"host: a", CLOSING))
        reply = await reader.read(-1)
        writer.close()
        return reply.split(b" ", 2)[1].decode() if reply else "no reply"

    async def calls(self, number: int) -> str:
        request = messages.message("ModelInferRequest", model_name="net", id=str(number))
        request.inputs.add(name="input", datatype="FP32", shape=[1, WIDTH])
        request.raw_input_contents.append(np.ones(WIDTH, "<f4").tobytes())
        try:
            reply = await self._call(request.SerializeToString(), timeout=5.0)
        except aio.AioRpcError as error:
            return str(error.code().name)
        right = messages.read("ModelInferResponse", reply).id == str(number)
        return "OK" if right else "somebody else's answer"

    async def goes(self, number: int) -> str:
        _, writer = await self._connection()
        writer.write(request_of(body_of(number)))
        await asyncio.sleep(self._dice.random() * 0.05)
        writer.close()
        return "gone"

    async def sends_half(self, number: int) -> str:
        _, writer = await self._connection()
        whole = request_of(body_of(number))
        writer.write(whole[: self._dice.randrange(1, len(whole))])
        await asyncio.sleep(self._dice.random())
        writer.close()
        return "gone"

    async def sends_much(self, number: int) -> str:
        return await self.stays(number, body_of(number, spaces=100_000))

    async def sends_nonsense(self, number: int) -> str:
        return await self.stays(number, b'{"inputs": [%d, NaN' % number)

    def close(self) -> None:
        for _, writer in self._open:
            writer.close()


async def load(ports: Sequence[int], seconds: float, found: Counter[str]) -> None:
    """Send requests at twice capacity, at random instants."""
    dice = random.Random(1)
    async with aio.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
        call = channel.unary_unary(f"/{messages.SERVICE}/ModelInfer")
        callers = Callers(ports[0], call, found)
        begin = asyncio.get_running_loop().time()
        tasks: set[asyncio.Task[None]] = set()
        due = begin
        for number in itertools.count():
            due += dice.expovariate(2 * CAPACITY)
            if due > begin + seconds:
                break
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            task = asyncio.ensure_future(callers.one(number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        while tasks:
            await asyncio.wait({*tasks})
        callers.close()


def soak(seconds: float) -> tuple[list[dict[str, float]], Counter[str]]:
    """Start a server, load it, and return its samples and what its callers saw."""
    found: Counter[str] = Counter()
    command = [sys.executable, __file__, "--server"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as made,
        contextlib.ExitStack() as stack,
    ):
        assert made.stdout is not None
        assert made.stdin is not None
        stack.callback(made.kill)
        ports = json.loads(made.stdout.readline())
        lines: list[str] = []
        # what the server says is read at once, or it would wait for us
        reader = threading.Thread(target=lines.extend, args=(made.stdout,))
        reader.start()
        asyncio.run(load(ports, seconds, found))
        # Connections that were left close, and requests that wait are answered.
        time.sleep(min(10.0, seconds / 10))
        made.stdin.close()
        made.wait(30)
        reader.join()
    return [json.loads(line) for line in lines], found


def rows_of(samples: list[dict[str, float]], seconds: float) -> list[dict[str, object]]:
    """Make a row for each thing that could grow."""
    loaded = samples[int(min(60.0, seconds / 6)) : int(seconds)]
    third = len(loaded) // 3
    rows: list[dict[str, object]] = []
    for name in TRACKED:
        values = np.array([sample[name] for sample in loaded])
        slope, _, low, high = (
            float(part) * 600 for part in stats.theilslopes(values, np.arange(len(values)))
        )
        first, last = values[:third], values[-third:]
        # Memory moves in steps; other things come and go with the load.
        grows = low > 2.0 if name == "MiB" else low > 0.0 and last.min() > first.max()
        rows.append(
            {
                "of the server": name,
                "first third, median (most)": f"{np.median(first):.1f} ({first.max():.1f})",
                "last third, median (most)": f"{np.median(last):.1f} ({last.max():.1f})",
                "ten minutes add": f"{slope:.2f} ({low:.2f} to {high:.2f})",
                "after the load": f"{samples[-1][name]:.1f}",
                "verdict": "growth" if grows else "no growth",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="half a minute; writes nothing")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--server", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.server:
        asyncio.run(serve())
        return
    seconds = 30.0 if asked.smoke else asked.seconds
    samples, found = soak(seconds)
    rows = rows_of(samples, seconds)
    for row in rows:
        print(", ".join(f"{name}: {value}" for name, value in row.items()))
    told = ", ".join(f"{name} {count}" for name, count in sorted(found.items()))
    lag = np.array([sample["lag ms"] for sample in samples])
    worst = max(sample["worst lag ms"] for sample in samples)
    text = (
        f"{found.total()} requests in {seconds:.0f} s, by caller and what came back: {told}.\n\n"
        f"The event loop was late by {np.median(lag):.1f} ms in the median of the samples, and by "
        f"{worst:.0f} ms at most."
    )
    print(text)
    if not asked.smoke:
        from benchmarks.common import write_results

        title = "A server at twice capacity"
        write_results("serving_soak", title, f"{__doc__}\n{text}", rows)


if __name__ == "__main__":
    main()
