"""Timely accuracy of our server beside LitServe and Ray Serve with the network without exits.

    # needs litserve and ray[serve] beside what we install; a quarter of an hour, on an idle machine
    python benchmarks/timely_servers.py
    # minutes, to see that it runs
    python benchmarks/timely_servers.py --smoke

The requests are those of timely_agreement.py, Poisson, with budgets of 1.5 to 10 times the whole
network ("roomy"): each server, with all its processes on the first core, is sent the same images at
the same planned instants from the last core, over HTTP and as JSON. Late, refused and missing
answers are wrong. A server runs alone, for all loads of a seed, then the next one.

LitServe and Ray Serve run the same layers without early heads and decisions, in batches of up to 8
that wait for 5 ms at most, or one by one; they know of no deadlines. Load 1 is what the whole
network can do at the batch size that is cheapest per sample, without a server around it; each stage
is computed eight times, as a network would that is eight times as slow (see timely_agreement.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import KEPT, Row, commit, write_results
from serving_overhead import free_port
from timely import NETWORK, OURS, Case, case_of, measured, recorded, the_model
from timely_agreement import CORES, TIMES_AS_SLOW, mean_of, serve, slower

import impatient
from impatient.files import read_json, write_json
from impatient.networks.zoo import zoo_folder
from impatient.serving.load import LoadResult, send_load
from impatient.verbs.network_spec import NetworkSpec
from papers.data import data_spec

try:
    from litserve import LitAPI
except ImportError:
    LitAPI = object

LOADS = (0.5, 1.0, 1.5)
MAX_BATCH = 8
WAIT_S = 0.005
PATH = "/v2/models/net/infer"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Ray expects its processes to start within seconds, which on one core they do not
    "RAY_gcs_server_port_wait_time_s": "120",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class WithoutExits:
    """The network to its last exit, without early heads, as often as ours computes it."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.network = impatient.load_zoo(NETWORK).eval()
        self.preprocess = NetworkSpec.load(zoo_folder(NETWORK) / "network.json").preprocess

    def __call__(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.inference_mode():
            x = self.preprocess(torch.cat(images))
            for _ in range(TIMES_AS_SLOW):
                # heads that are not asked for are not computed
                with self.network.exits(x) as run:
                    *_, last = run
                output = last.output()
        return list(output)


def image_of(request: dict[str, Any]) -> torch.Tensor:
    (tensor,) = request["inputs"]
    return torch.tensor(tensor["data"], dtype=torch.uint8).view(tensor["shape"])


def reply_of(logits: torch.Tensor) -> dict[str, Any]:
    output = {"name": "output", "datatype": "FP32", "shape": [1, len(logits)]}
    outputs = [{**output, "data": logits.tolist()}]
    return {"model_name": "net", "parameters": {"exit": 0}, "outputs": outputs}


class Api(LitAPI):
    """The network in LitServe, whose worker has to find by name what it is given."""

    def setup(self, device: str) -> None:  # noqa: ARG002  LitServe's name
        self.run = WithoutExits()

    # LitServe reads types, and would look for a query, or check the reply.
    def decode_request(self, request) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return image_of(request)

    def batch(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return inputs

    def predict(self, inputs):  # type: ignore[no-untyped-def]
        return self.run(inputs) if isinstance(inputs, list) else self.run([inputs])[0]

    def unbatch(self, output: list[torch.Tensor]) -> list[torch.Tensor]:
        return output

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        return reply_of(output)


def serve_litserve(port: int, *, batches: bool) -> None:
    import litserve

    batching = {"max_batch_size": MAX_BATCH, "batch_timeout": WAIT_S} if batches else {}
    server = litserve.LitServer(Api(api_path=PATH, **batching), accelerator="cpu", timeout=60)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error")


def serve_ray(port: int, *, batches: bool) -> None:
    import ray
    from ray import serve as ray_serve
    from starlette.requests import Request

    class Deployment:
        def __init__(self) -> None:
            self.run = WithoutExits()

        async def __call__(self, request: Request) -> dict[str, Any]:
            return reply_of(await self.infer(image_of(await request.json())))

        @ray_serve.batch(max_batch_size=MAX_BATCH if batches else 1, batch_wait_timeout_s=WAIT_S)
        async def infer(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
            return self.run(images)

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    deployed = ray_serve.deployment(max_ongoing_requests=4096)(Deployment)
    ray_serve.run(deployed.bind(), route_prefix=PATH)
    signal.pause()


def serve_ours(port: int, file: Path) -> None:
    serve(OURS, file, port)


SERVERS: dict[str, tuple[str, Callable[..., None], dict[str, bool]]] = {
    "impatient": ("uvicorn", serve_ours, {}),
    "LitServe, batches": ("litserve", serve_litserve, {"batches": True}),
    "LitServe, one by one": ("litserve", serve_litserve, {"batches": False}),
    "Ray Serve, batches": ("ray", serve_ray, {"batches": True}),
    "Ray Serve, one by one": ("ray", serve_ray, {"batches": False}),
}


@contextlib.contextmanager
def server(name: str, file: Path, body: bytes) -> Iterator[str]:
    """Start a server and wait until it answers; give its address, and end all its processes."""
    port = free_port()
    command = [sys.executable, __file__, "--serve", name, "--port", str(port), "--times", str(file)]
    process = subprocess.Popen(
        ["taskset", "-c", str(CORES[0]), *command],
        stdout=subprocess.DEVNULL,
        env={**os.environ, **ENVIRONMENT},
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        give_up = time.monotonic() + 240
        while not answers(address, body):
            if time.monotonic() > give_up or process.poll() is not None:
                raise RuntimeError(f"{name} did not come up")
            time.sleep(0.5)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def asked(data: impatient.Data) -> bytes:
    """Return a request, to see whether a server is there."""
    (image,) = data.examples("test").take(np.arange(1))
    tensor = {"name": "input", "datatype": "UINT8", "shape": [1, *image.shape]}
    return json.dumps({"inputs": [{**tensor, "data": image.flatten().tolist()}]}).encode()


def answers(address: str, body: bytes) -> bool:
    try:
        request = urllib.request.Request(
            f"{address}{PATH}", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def sent(address: str, case: Case, data: impatient.Data) -> LoadResult:
    """Send a case's requests as JSON."""
    examples = data.examples("test")
    return asyncio.run(
        send_load(
            address,
            "net",
            [{"input": one.numpy()} for one in examples.take(case.order)],
            examples.labels[case.order].tolist(),
            arrivals_s=case.arrivals_s,
            budgets_s=case.budgets_s,
            binary=False,
        )
    )


def row_of(name: str, case: Case, found: LoadResult) -> Row:
    told = found.summary()
    return {
        "server": name,
        "load": case.load,
        "seed": case.seed,
        "timely accuracy": round(told["timely_accuracy"], 4),
        "in time": round(told["in_time"], 4),
        "answered": round(float((found.status == 200).mean()), 4),
        "p50, ms": round(told["p50_s"] * 1e3, 1),
        "p99, ms": round(told["p99_s"] * 1e3, 1),
        "mean exit": mean_of(found.exits[found.in_time]) if name == "impatient" else "",
        "generator late p99, ms": round(told["lag_p99_s"] * 1e3, 2),
    }


def summary(rows: list[Row]) -> str:
    """Say how far ours is above the best of the others, by load."""
    lines = []
    for load in dict.fromkeys(row["load"] for row in rows):
        means = {
            name: np.mean(
                [
                    float(str(row["timely accuracy"]))
                    for row in rows
                    if (row["server"], row["load"]) == (name, load)
                ]
            )
            for name in dict.fromkeys(row["server"] for row in rows)
        }
        ours = means.pop("impatient")
        best = max(means, key=lambda name: means[name])
        lines.append(
            f"load {load}: {ours:.3f}, the best of the others {best} with {means[best]:.3f}"
        )
    return f"Timely accuracy, mean of seeds: {'; '.join(lines)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve")
    parser.add_argument("--port", type=int)
    parser.add_argument("--times", type=Path)
    parser.add_argument("--data", default="")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="one load; writes nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.serve:
        _, run, options = SERVERS[args.serve]
        if args.serve == "impatient":
            run(args.port, args.times)
        else:
            run(args.port, **options)
        return
    loads = LOADS
    if args.smoke:
        args.requests, args.seeds, loads = 30, 1, (0.5,)
    data = impatient.load_data(args.data or data_spec("cifar10"))
    test = recorded("test")
    names = [name for name, (needs, *_) in SERVERS.items() if importlib.util.find_spec(needs)]
    print(f"servers: {', '.join(names)}")
    with contextlib.ExitStack() as stack:
        folder = KEPT / "cases" / "timely_servers" / commit()
        if args.smoke:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file = folder / "times.json"
        if not file.is_file():
            os.sched_setaffinity(0, {CORES[0]})
            write_json(file, slower(measured(20 if args.smoke else 250)))
        os.sched_setaffinity(0, {CORES[-1]})
        model = the_model(read_json(file))
        size = {"count": args.requests, "samples": len(test[0][0])}
        rows: list[Row] = []
        for seed in range(args.seeds):
            cases = [case_of(model, "poisson", load, seed=seed, **size) for load in loads]
            for number, name in enumerate(names):
                kept = folder / f"{args.requests}-{seed}-{number}.json"
                if not kept.is_file():
                    with server(name, file, asked(data)) as address:
                        found = [row_of(name, one, sent(address, one, data)) for one in cases]
                        write_json(kept, {"rows": found})
                rows += read_json(kept)["rows"]
                print(*rows[-len(cases) :], sep="\n", flush=True)
    told = summary(rows)
    print(told)
    if not args.smoke:
        title = "Timely accuracy of real servers"
        write_results("timely_servers", title, f"{__doc__}\n\n{told}", rows)


if __name__ == "__main__":
    main()
