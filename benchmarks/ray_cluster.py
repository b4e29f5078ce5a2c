"""Serve on a real Ray cluster, kill a replica under load, renew the weights: is a request lost?

    # needs: pip install 'impatient[ray]'
    python benchmarks/ray_cluster.py

The cluster has three nodes, all on this machine: one for Ray's own processes and two for replicas
(`ray.cluster_utils.Cluster`). `impatient serve --ray` runs as a process of its own on a run
directory that is trained first, and is asked over HTTP. What does not hold raises. Times are those
of a machine on which all nodes, the front and the callers share the processors, so they say what a
hop costs at most here, and nothing of real networks between machines. At last, two replicas of
which one says that it is slower show whom the router prefers.

A busy machine may miss the 30 s in which Ray expects a node to start; begin again then.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Row, write_results
from impatient.clock import SYSTEM_CLOCK
from impatient.serving.base import Answered
from impatient.serving.fleet import Ask, Fleet
from impatient.serving.scheduler import Request
from impatient.serving.service import Hosted
from impatient.verbs.serve import ServeOptions, hosted

PATIENCE_S = 240.0
START = {"RAY_gcs_server_port_wait_time_s": "120", "RAY_USAGE_STATS_ENABLED": "0"}
SMALL = {"object_store_memory": 100 * 2**20}
SMALL_RUN = ["--model", "impatient:resnet:n=1,c=8", "--exits", "3", "--epochs", "2", "--quiet"]
TENSOR = {"name": "input", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [0.5] * 64}


@dataclass(slots=True)
class Load:
    """What callers were told who ask again and again."""

    statuses: Counter[int] = field(default_factory=Counter)
    late: int = 0
    elapsed_s: list[float] = field(default_factory=list)

    def row(self, what: str) -> Row:
        """Say it as a row of the table."""
        quantiles = statistics.quantiles(self.elapsed_s, n=100)
        return {
            "what": what,
            "requests": self.statuses.total(),
            "answered": self.statuses[200],
            "late": self.late,
            "p50_ms": round(quantiles[49] * 1e3, 2),
            "p99_ms": round(quantiles[98] * 1e3, 2),
        }


@dataclass(frozen=True, slots=True)
class Server:
    """A server process, and the processes of the nodes that its replicas are on."""

    process: subprocess.Popen[str]
    port: int
    raylets: Sequence[int] = ()

    def replicas(self) -> list[int]:
        """Return the process numbers of the replicas on this cluster's nodes."""
        found = []
        for raylet in self.raylets:
            command = ["ps", "-o", "pid=,args=", "--ppid", str(raylet)]
            told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            lines = [line.split(maxsplit=1) for line in told.splitlines()]
            found += [int(pid) for pid, args in lines if args.startswith("ray::ServeReplica")]
        return found

    def get(self, path: str) -> str:
        """Return the body of a page."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        text = connection.getresponse().read().decode()
        connection.close()
        return text

    def gauge(self, name: str) -> float:
        """Return a gauge of the server."""
        found = re.search(rf"^impatient_{name} (\S+)$", self.get("/metrics"), re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def infer(
        self, connection: http.client.HTTPConnection | None = None, **parameters: object
    ) -> tuple[int, Any]:
        """Ask for one answer, and return its status and content."""
        given = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        body = json.dumps({"inputs": [TENSOR], "parameters": parameters})
        given.request("POST", "/v2/models/digits/infer", body)
        reply = given.getresponse()
        status, content = reply.status, json.loads(reply.read())
        if connection is None:
            given.close()
        return status, content

    @contextlib.contextmanager
    def under_load(self, callers: int, budget_ms: float) -> Iterator[Load]:
        """Ask again and again from several threads, and count what comes."""
        load = Load()
        over = threading.Event()

        def call() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
            while not over.is_set():
                begin = time.perf_counter()
                status, content = self.infer(connection, deadline_ms=budget_ms)
                load.elapsed_s.append(time.perf_counter() - begin)
                load.statuses[status] += 1
                load.late += status == 200 and not content["parameters"]["deadline_met"]
            connection.close()

        with ThreadPoolExecutor(callers) as pool:
            calls = [pool.submit(call) for _ in range(callers)]
            try:
                yield load
            finally:
                over.set()
            for one in calls:
                one.result()


def until(condition: Callable[[], bool]) -> float:
    """Wait until something holds, and return the seconds it took."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > PATIENCE_S:
            raise TimeoutError(f"{condition} does not hold after {PATIENCE_S} s")
        time.sleep(0.1)
    return time.monotonic() - begin


def trained(directory: Path, seed: int) -> Path:
    """Train a small network on the digits, and record it."""
    for verb in (
        ["train", str(directory), *SMALL_RUN, "--seed", str(seed)],
        ["record", str(directory), "--quiet"],
    ):
        subprocess.run([sys.executable, "-m", "impatient", *verb], check=True)
    return directory


@contextlib.contextmanager
def serving(
    link: Path, options: Sequence[str], extra: Mapping[str, str], raylets: Sequence[int] = ()
) -> Iterator[Server]:
    """Run `impatient serve` on a free port."""
    command = [sys.executable, "-m", "impatient", "serve", str(link), "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **extra}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            found = re.search(r"serving digits at http://127\.0\.0\.1:(\d+)", line)
            if found:
                break
        else:
            raise RuntimeError("".join(said))
        reader = threading.Thread(target=process.stdout.read)
        reader.start()
        try:
            yield Server(process, int(found[1]), raylets)
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            reader.join()


def one_by_one(server: Server, requests: int) -> Load:
    """Ask one after the other."""
    load = Load()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    for _ in range(requests):
        begin = time.perf_counter()
        status, content = server.infer(connection, deadline_ms=1000)
        load.elapsed_s.append(time.perf_counter() - begin)
        load.statuses[status] += 1
        load.late += status == 200 and not content["parameters"]["deadline_met"]
    connection.close()
    return load


def outputs(server: Server) -> set[tuple[float, ...]]:
    """Return what replicas answer now."""
    replies = [server.infer(deadline_ms=30_000)[1] for _ in range(12)]
    return {tuple(reply["outputs"][0]["data"]) for reply in replies}


def checked(server: Server, link: Path, other: Path) -> tuple[list[Row], list[str]]:
    """Do everything, and return the rows and sentences of the page."""
    rows = [one_by_one(server, 200).row("one after the other, over Ray")]
    status, reply = server.infer(deadline_ms=0.01)
    assert status == 503, reply
    said = ["A deadline of 0.01 ms is refused with 503."]

    with server.under_load(8, 60_000) as load:
        up_s = until(lambda: len(server.replicas()) == 2 and server.gauge("replicas") == 2)
    rows.append(load.row("8 callers, one replica, then two"))
    said.append(f"Under this load Ray started a second replica, which answered after {up_s:.0f} s.")

    with server.under_load(8, 60_000) as load:
        time.sleep(1.0)
        again = server.gauge("asked_again")
        killed = server.replicas()[0]
        os.kill(killed, signal.SIGKILL)
        noticed_s = until(lambda: server.gauge("asked_again") > again)
        back_s = until(lambda: len(server.replicas()) == 2 and killed not in server.replicas())
        moved = server.gauge("asked_again") - again
    rows.append(load.row("8 callers, a replica killed (SIGKILL)"))
    said.append(
        f"{moved:.0f} requests of the killed replica were asked of the other one, the first within "
        f"{noticed_s:.1f} s; another replica ran after {back_s:.0f} s."
    )

    before = outputs(server)
    with server.under_load(4, 60_000) as load:
        link.unlink()
        link.symlink_to(other)
        server.process.send_signal(signal.SIGHUP)
        renewed_s = until(lambda: before.isdisjoint(outputs(server)))
    rows.append(load.row("4 callers, new weights (SIGHUP)"))
    said.append(f"All replicas answered with the new weights after {renewed_s:.0f} s.")

    link.unlink()
    server.process.send_signal(signal.SIGHUP)
    time.sleep(2.0)
    after = outputs(server)
    assert after, "nobody answers"
    assert before.isdisjoint(after)
    said.append("A directory that is gone changed nothing.")
    for row in rows:
        assert row["answered"] == row["requests"], row
    return rows, said


def told_slower(source: str, *, node: str, note: Path) -> Hosted:
    """Load a run, and on one node say that it takes four times as long as it does."""
    import ray
    from ray import serve

    one = hosted(Path(source), ServeOptions(directories=(Path(source),)))
    if ray.get_runtime_context().get_node_id() != node:
        return one
    note.write_text(serve.get_replica_context().replica_id.unique_id)
    return dataclasses.replace(one, model=one.model.scaled(4.0))


async def asked(fleet: Fleet, requests: int, at_once: int) -> Counter[str]:
    """Ask for answers, some at once, and count who answered."""
    found: Counter[str] = Counter()
    places = asyncio.Semaphore(at_once)
    inputs = {"input": np.full((1, 1, 8, 8), 0.5, np.float32)}

    async def one(number: int) -> None:
        async with places:
            now = SYSTEM_CLOCK.now()
            request = Request(id=number, model="digits", arrival=now, deadline=now + 5.0)
            ask = Ask(request=request, inputs=inputs, streamed=False)
            async for replica, event in fleet.ask(ask):
                assert isinstance(event, Answered), event
                found[replica] += 1

    await asyncio.gather(*(one(number) for number in range(requests)))
    return found


def shares(address: str, run: Path, note: Path) -> str:
    """Say how requests are shared between a replica and one that says it is slower."""
    import ray

    from impatient.serving.ray_serve import STATS_S, Plan, RayFleet

    ray.init(address=address, log_to_driver=False)
    node = min(one["NodeID"] for one in ray.nodes() if one["Resources"].get("CPU"))
    load = functools.partial(told_slower, node=node, note=note)
    fleet = RayFleet(load=load, sources=[str(run)], plan=Plan(replicas=2), name="shares")
    fleet.deploy()
    # until the router has heard of the costs
    time.sleep(5 * STATS_S)
    found = {at_once: asyncio.run(asked(fleet, 200, at_once)) for at_once in (1, 16)}
    fleet.stop()
    ray.shutdown()
    slow = note.read_text()
    assert found[1][slow] == 0, found
    assert 0 < found[16][slow] < 100, found
    return (
        "Of two replicas, one says that its stages take four times as long as they do. Of 200 "
        f"requests one after the other it was sent {found[1][slow]}, of 200 with 16 at once "
        f"{found[16][slow]}."
    )


def main() -> None:
    """Run everything, and write the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    os.environ.update(START)
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory() as folder:
        runs = [trained(Path(folder) / name / "digits", seed) for seed, name in enumerate("ab")]
        link = Path(folder) / "current"
        link.symlink_to(runs[0])
        with serving(link, [], {}) as alone:
            rows = [one_by_one(alone, 200).row("one after the other, one process")]
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, **SMALL},
        )
        nodes = [cluster.add_node(num_cpus=1, **SMALL) for _ in range(2)]
        raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
        options = ["--ray", "--replicas", "1", "--most-replicas", "2", "--most-ms", "60000"]
        begin = time.monotonic()
        with serving(link, options, {"RAY_ADDRESS": cluster.address}, raylets) as server:
            start_s = time.monotonic() - begin
            found, said = checked(server, link, runs[1])
        until(lambda: not server.replicas())
        said.append(shares(cluster.address, runs[0], Path(folder) / "slow"))
        said.insert(-1, "At SIGTERM the front ended, and its replicas with it.")
        cluster.shutdown()
    text = [
        f"The first replica answered {start_s:.0f} s after the start of the server. Every request "
        "of every row had an answer; a late one is an answer after its deadline.",
        *said,
        f"Ray {version('ray')}. Load average at the end: {os.getloadavg()[0]:.1f}.",
    ]
    write_results("ray_cluster", "Serving on a Ray cluster", "\n\n".join(text), [*rows, *found])


if __name__ == "__main__":
    main()
