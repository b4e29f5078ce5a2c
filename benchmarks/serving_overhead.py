"""What the server costs beyond the network's own time, beside bare Starlette and LitServe.

    # some minutes, on an idle machine
    python benchmarks/serving_overhead.py
    # seconds, to see that it runs
    python benchmarks/serving_overhead.py --smoke

Every server is a process of its own with one torch thread, on the first core; one caller on the
last core asks one after the other, each on a connection that stays open, in random order, so that
all see the same machine. All get the same JSON and give the same JSON. Ours answers from the last
of three exits; the others run the same layers without exits: Starlette in the handler itself
(which holds up everybody else meanwhile) and in its pool of threads (as a handler that is no
coroutine does), LitServe in a worker process. Two more say what is out of reach: Starlette that
hands the input to one thread which owns the network, the least that any server costs whose event
loop is free meanwhile, and the same with our three exits, all heads computed and nothing decided.
The network alone is run by the caller in the same rounds. Ours reads JSON with orjson, which its
extra `serve` brings; Starlette and LitServe are as they come. Asked for: a p50 of at most 1.15
times bare Starlette's, and a p99 of at most 1 ms above. Starlette and LitServe are measured where
they are installed; they are no dependencies of ours.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import http.client
import importlib.util
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import impatient
from benchmarks.common import in_turn, write_results
from impatient import Exit, Network

try:
    from litserve import LitAPI
except ImportError:
    LitAPI = object

WIDTHS = {"network of about 0.3 ms": 512, "network of about 3 ms": 1536}
INPUT = 64
CLASSES = 10
NAMES = {
    "impatient": "impatient",
    "starlette": "Starlette, in the handler",
    "starlette-threads": "Starlette, in its threads",
    "starlette-hop": "Starlette, in one thread",
    "starlette-exits": "Starlette, in one thread, three exits",
    "litserve": "LitServe",
}


def backbone(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(INPUT, width), nn.ReLU()]
    for _ in range(5):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES)).eval()


def with_exits(width: int) -> Network:
    example = torch.randn(1, INPUT)
    return impatient.attach_exits(backbone(width), after=["3", "7"], example=example).eval()


def serve_impatient(width: int, port: int) -> None:
    from impatient.serving.app import App
    from impatient.serving.base import Limits
    from impatient.serving.connections import bound_socket, web_server
    from impatient.serving.model import ServedModel
    from impatient.serving.service import Hosted, Service
    from impatient.serving.tensors import InputSpec
    from impatient.training.preprocess import Preprocess

    network = with_exits(width)
    example = torch.randn(1, INPUT)
    # plans need only the size of it
    stage_s = float(np.median(in_turn({"": lambda: network(example)}, rounds=20)[""])) / 3
    costs = {1: (stage_s,) * 3, 8: (8 * stage_s,) * 3}
    one = Hosted(
        network=network,
        model=ServedModel(name="net", stages_s=costs, quality=(0.5, 0.7, 0.9)),
        input=InputSpec.one(["FP32"], (INPUT,)),
        preprocess=Preprocess(mean=(), std=()),
        classes=tuple(map(str, range(CLASSES))),
    )
    listener = bound_socket("127.0.0.1", port)
    web_server(App(Service([one], Limits(default_s=5.0)))).run(sockets=[listener])


def input_of(request: Any) -> torch.Tensor:
    """Read a request as anybody would write it."""
    (tensor,) = request["inputs"]
    return torch.tensor(tensor["data"], dtype=torch.float32).view(tensor["shape"])


def reply_of(output: torch.Tensor) -> dict[str, Any]:
    told = {"name": "output", "datatype": "FP32", "shape": list(output.shape)}
    return {"model_name": "net", "outputs": [{**told, "data": output.flatten().tolist()}]}


def answer(network: nn.Module, body: bytes) -> dict[str, Any]:
    with torch.inference_mode():
        return reply_of(network(input_of(json.loads(body))))


def last_exit(network: Network, x: torch.Tensor) -> torch.Tensor:
    """Run a network with exits as our server does, and decide nothing."""
    outputs: list[torch.Tensor] = []

    def visit(one: Exit) -> bool:
        outputs.append(one.output())
        return False

    network.exits(x).walk(visit)
    return outputs[-1]


class OneThread:
    """A thread that owns a network, and runs it for an event loop."""

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._run = run
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        with torch.inference_mode():
            while True:
                x, found = self._jobs.get()
                output = self._run(x)
                found.get_loop().call_soon_threadsafe(found.set_result, output)

    async def __call__(self, x: torch.Tensor) -> torch.Tensor:
        found = asyncio.get_running_loop().create_future()
        self._jobs.put((x, found))
        return await found


def serve_starlette(width: int, port: int, way: str) -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    network = backbone(width)

    async def in_handler(body: bytes) -> dict[str, Any]:
        return answer(network, body)

    async def in_threads(body: bytes) -> dict[str, Any]:
        return await run_in_threadpool(answer, network, body)

    async def in_one(body: bytes) -> dict[str, Any]:
        return reply_of(await thread(input_of(json.loads(body))))

    if way == "exits":
        thread = OneThread(functools.partial(last_exit, with_exits(width)))
    elif way == "hop":
        thread = OneThread(network)
    answered = {"handler": in_handler, "threads": in_threads}.get(way, in_one)

    async def infer(request: Request) -> JSONResponse:
        return JSONResponse(await answered(await request.body()))

    app = Starlette(routes=[Route("/v2/models/net/infer", infer, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


class Api(LitAPI):
    """The network in LitServe, whose worker has to find by name what it is given."""

    def setup(self, device: str) -> None:  # noqa: ARG002  LitServe's name
        torch.set_num_threads(1)
        self.network = backbone(self.width)

    # LitServe reads types, and would look for a query, or check the reply.
    def decode_request(self, request) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return input_of(request)

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.network(x)

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        return reply_of(output)


def serve_litserve(width: int, port: int) -> None:
    import litserve

    api = Api(api_path="/v2/models/net/infer")
    api.width = width
    litserve.LitServer(api, accelerator="cpu").run(
        host="127.0.0.1",
        port=port,
        generate_client_file=False,
        log_level="error",
        access_log=False,
    )


SERVERS: dict[str, Callable[[int, int], None]] = {
    "impatient": serve_impatient,
    "starlette": functools.partial(serve_starlette, way="handler"),
    "starlette-threads": functools.partial(serve_starlette, way="threads"),
    "starlette-hop": functools.partial(serve_starlette, way="hop"),
    "starlette-exits": functools.partial(serve_starlette, way="exits"),
    "litserve": serve_litserve,
}


def installed() -> list[str]:
    needed = {"impatient": "uvicorn"}
    return [
        name
        for name in SERVERS
        if importlib.util.find_spec(needed.get(name, name.partition("-")[0]))
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server in a process of its own, and a connection to it."""

    def __init__(self, name: str, width: int) -> None:
        self.port = free_port()
        self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        command = [sys.executable, __file__, "--serve", name, str(width), str(self.port)]
        # LitServe's workers are processes of their own, which have to end with it.
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def connect(self, body: bytes) -> Any:
        """Wait until it answers, on a new connection where it has closed the old one."""
        give_up = time.monotonic() + 300
        while True:
            try:
                return self.ask(body)
            except OSError:
                self._connection.close()
                if time.monotonic() > give_up or self.process.poll() is not None:
                    raise
                time.sleep(0.2)

    def ask(self, body: bytes) -> Any:
        """Ask once, and read the whole reply."""
        headers = {"content-type": "application/json"}
        self._connection.request("POST", "/v2/models/net/infer", body, headers)
        reply = self._connection.getresponse()
        text = reply.read()
        assert reply.status == 200, text
        return text

    def stop(self) -> None:
        self._connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def measured(width: int, rounds: int) -> dict[str, np.ndarray]:
    """Ask all servers in turn, and return seconds by name, "alone" for the network alone."""
    x = torch.randn(1, INPUT)
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, INPUT], "data": x[0].tolist()}
    body = json.dumps({"inputs": [tensor]}).encode()
    network = backbone(width)
    names = installed()
    servers = {name: Server(name, width) for name in names}
    try:
        for server in servers.values():
            server.connect(body)
        pin(-1)
        # again, since the first may have waited for the last for longer than they keep connections
        texts = [server.connect(body) for server in servers.values()]
        outputs = [json.loads(text)["outputs"][0]["data"] for text in texts]
        np.testing.assert_allclose(outputs, outputs[:1] * len(outputs), rtol=1e-3, atol=1e-5)

        def alone() -> None:
            with torch.inference_mode():
                network(x)

        calls: dict[str, Callable[[], Any]] = {"alone": alone}
        calls |= {name: lambda s=server: s.ask(body) for name, server in servers.items()}
        return in_turn(calls, rounds=rounds, warm_up=min(50, rounds))
    finally:
        for server in servers.values():
            server.stop()


def rows_of(title: str, times: dict[str, np.ndarray]) -> list[dict[str, object]]:
    """Make a row for each server."""
    rows: list[dict[str, object]] = []
    alone_ms = float(np.median(times["alone"])) * 1e3
    for name, seconds in times.items():
        row: dict[str, object] = {"case": title, "server": NAMES.get(name, "the network alone")}
        p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1e3
        row |= {"p50, ms": f"{p50:.3f}", "p99, ms": f"{p99:.3f}"}
        if name != "alone":
            row["p50 beyond the network, ms"] = f"{p50 - alone_ms:.3f}"
        for base in ("starlette", "starlette-threads"):
            if name not in ("alone", base) and base in times:
                ratio, low, high = compared(ratio_of_p50, seconds, times[base])
                above, least, most = compared(ms_above_p99, seconds, times[base])
                row[f"p50 / {NAMES[base]}"] = f"{ratio:.3f} ({low:.3f} to {high:.3f})"
                row[f"p99 - {NAMES[base]}, ms"] = f"{above:.3f} ({least:.3f} to {most:.3f})"
        row["n"] = len(seconds)
        rows.append(row)
    return rows


def ratio_of_p50(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.quantile(a, 0.5) / np.quantile(b, 0.5))


def ms_above_p99(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.quantile(a, 0.99) - np.quantile(b, 0.99)) * 1e3


def compared(
    how: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, b: np.ndarray
) -> tuple[float, float, float]:
    """Compare seconds of paired rounds, with the 95 % interval by the bootstrap."""
    dice = np.random.default_rng(0)
    places = (dice.integers(len(a), size=len(a)) for _ in range(300))
    low, high = np.quantile([how(a[place], b[place]) for place in places], [0.025, 0.975])
    return how(a, b), float(low), float(high)


def pin(core: int) -> None:
    """Stay on one core, where there are several."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[core]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few rounds; writes nothing")
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.serve:
        name, width, port = asked.serve
        pin(0)
        SERVERS[name](int(width), int(port))
        return
    rows = []
    for title, width in WIDTHS.items():
        # The servers must not inherit it.
        before = os.sched_getaffinity(0)
        times = measured(width, 30 if asked.smoke else asked.rounds)
        os.sched_setaffinity(0, before)
        rows += rows_of(title, times)
    for row in rows:
        print(", ".join(f"{name}: {value}" for name, value in row.items()))
    missing = [NAMES[name] for name in SERVERS if name not in installed()]
    if missing:
        print(f"not installed, and so not measured: {', '.join(missing)}")
    if not asked.smoke:
        write_results("serving_overhead", "The server's own time", str(__doc__), rows)


if __name__ == "__main__":
    main()
