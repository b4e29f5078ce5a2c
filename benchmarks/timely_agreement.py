"""The simulation of timely.py beside the real server: the same requests through both, in turn.

    python benchmarks/timely_agreement.py  # 10 to 30 minutes, on an idle machine with two cores

It may be stopped: the same command on the same commit goes on with the times measured before.

A server per rule, each in a process of its own on the first core, is sent the requests over HTTP
from the second core, at planned instants. The simulation has the same instants, budgets and
samples, the stage times that were measured at the beginning, and how many times as long they take
in a server, which is measured with lone requests. The server's answers count as their callers see
them, from the planned instant to the last byte.

The network computes each stage eight times, as a network would that is eight times as slow. The
simulation knows of one worker alone: of a network of a few milliseconds on one core, HTTP takes so
much of that core that the server is full long before the worker is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import KEPT, Row, commit, write_results
from timely import (
    NETWORK,
    OURS,
    RULES,
    SIZES,
    Case,
    Times,
    case_of,
    cheapest_s,
    measured,
    recorded,
    simulated,
    the_model,
)

import impatient
from impatient import Exit, Network, Run
from impatient.files import read_json, write_json
from impatient.networks.zoo import zoo_folder
from impatient.serving import ServedModel
from impatient.serving.load import LoadResult, send_load
from impatient.serving.service import RESERVE_S
from impatient.verbs.network_spec import NetworkSpec
from papers.data import data_spec

CHOSEN = (OURS, "fixed large", "switching (INFaaS-like)", "EDF with drop (Clockwork-like)")
LOADS = (0.5, 1.0, 1.5)
LONE_REQUESTS = 100
TIMES_AS_SLOW = 8
CORES = sorted(os.sched_getaffinity(0))


class Slower(Network):
    """A network that computes all of another one several times, stage by stage."""

    def __init__(self, network: Network, times: int) -> None:
        super().__init__()
        self.network = network
        self.times = times

    num_exits = property(lambda self: self.network.num_exits)  # type: ignore[assignment]
    num_classes = property(lambda self: self.network.num_classes)  # type: ignore[assignment]

    def exits(self, x: Any, *, keep: bool = False) -> Run:
        """Run it."""
        return Run(self._exits([self.network.exits(x, keep=keep) for _ in range(self.times)]))

    def _exits(self, runs: Sequence[Run]) -> Iterator[Exit]:
        for alike in zip(*runs, strict=True):
            outputs = [exit.output() for exit in alike]
            yield Exit(alike[0].index, outputs[0], outputs[0])


def serve(rule: str, file: Path, port: int = 0) -> None:
    """Serve the network by a rule, at a port that is printed; 0 is any that is free."""
    from impatient.serving.app import App
    from impatient.serving.base import Limits
    from impatient.serving.connections import bound_socket, web_server
    from impatient.serving.service import Hosted, Service
    from impatient.serving.tensors import InputSpec

    spec = NetworkSpec.load(zoo_folder(NETWORK) / "network.json")
    hosted = Hosted(
        network=Slower(impatient.load_zoo(NETWORK), TIMES_AS_SLOW).eval(),
        model=the_model(read_json(file)),
        input=InputSpec.one(["UINT8"], spec.example_shape, max(SIZES)),
        preprocess=spec.preprocess,
        classes=spec.class_names,
    )
    service = Service([hosted], Limits(most_s=60.0, waiting=4096), RULES[rule]())
    listener = bound_socket("127.0.0.1", port)
    listener.listen()
    print(listener.getsockname()[1], flush=True)
    app = App(service)
    web_server(app, most_connections=10_000, drain_s=1.0).run(sockets=[listener])


@contextlib.contextmanager
def server(rule: str, file: Path) -> Iterator[str]:
    """Start a server in a process of its own, and give its address."""
    command = [sys.executable, __file__, "--serve", rule, "--times", str(file)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stdout is not None
        os.sched_setaffinity(process.pid, {CORES[0]})
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()
            process.stdout.read()


def sent(address: str, case: Case, data: impatient.Data) -> LoadResult:
    """Send a case's requests."""
    examples = data.examples("test")
    samples = [{"input": one.numpy()} for one in examples.take(case.order)]
    return asyncio.run(
        send_load(
            address,
            "net",
            samples,
            examples.labels[case.order].tolist(),
            arrivals_s=case.arrivals_s,
            budgets_s=case.budgets_s,
        )
    )


def slowdown_of(address: str, model: ServedModel, data: impatient.Data, count: int) -> float:
    """Measure with lone requests how many times as long a server takes for the whole network."""
    whole_s = model.work_s(0, model.num_exits - 1, 1)
    case = replace(
        case_of(model, "poisson", 1.0, count=count, samples=data.size("test")),
        arrivals_s=np.arange(count) * 1.5 * whole_s,
        budgets_s=np.full(count, 20.0),
    )
    before = busy_s(address)
    sent(address, case, data)
    return (busy_s(address) - before) / (count * whole_s)


def busy_s(address: str) -> float:
    """Ask a server for how long it has worked."""
    with urllib.request.urlopen(f"{address}/v2/models/net/stats") as reply:
        return json.load(reply)["model_stats"][0]["inference_stats"]["compute_infer"]["ns"] * 1e-9


def slower(times: Times) -> Times:
    """Multiply all times alike."""
    return {
        what: {size: [one * TIMES_AS_SLOW for one in row] for size, row in table.items()}
        for what, table in times.items()
    }


def both(
    name: str,
    case: Case,
    real: LoadResult,
    model: ServedModel,
    test: tuple[np.ndarray, np.ndarray],
    slowdown: float,
) -> Row:
    """Give a row with what became of a case in both."""
    made = simulated(model, name, case, test, slowdown=slowdown, reserve_s=RESERVE_S)
    told = real.summary()
    return {
        "rule": name,
        "load": case.load,
        "seed": case.seed,
        "timely accuracy, server": round(told["timely_accuracy"], 4),
        "simulated": round(made.timely_quality, 4),
        "difference": round(told["timely_accuracy"] - made.timely_quality, 4),
        "in time, server": round(told["in_time"], 4),
        "in time, simulated": round(made.share_in_time, 4),
        "mean exit, server": mean_of(real.exits[real.in_time]),
        "mean exit, simulated": mean_of(made.exits[made.in_time]),
        "generator late p99, ms": round(told["lag_p99_s"] * 1e3, 2),
    }


def mean_of(exits: np.ndarray) -> float | str:
    return round(float(exits.mean()), 2) if len(exits) else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve")
    parser.add_argument("--times", type=Path)
    parser.add_argument("--data", default="")
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="one case; writes nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.serve:
        serve(args.serve, args.times)
        return
    loads, chosen = (LOADS, CHOSEN)
    if args.smoke:
        args.requests, args.seeds, loads, chosen = 100, 1, (0.5,), (OURS, "fixed large")
    data = impatient.load_data(args.data or data_spec("cifar10"))
    test = recorded("test")
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        folder = KEPT / "cases" / "timely_agreement" / commit()
        if args.smoke:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file = folder / "times.json"
        if not file.is_file():
            os.sched_setaffinity(0, {CORES[0]})
            write_json(file, slower(measured(20 if args.smoke else 250)))
        os.sched_setaffinity(0, {CORES[-1]})
        model = the_model(read_json(file))
        addresses = {name: stack.enter_context(server(name, file)) for name in chosen}
        lone = folder / "lone.json"
        if not lone.is_file():
            count = 10 if args.smoke else LONE_REQUESTS
            slowdown = slowdown_of(addresses["fixed large"], model, data, count)
            write_json(lone, {"slowdown": slowdown})
        slowdown = read_json(lone)["slowdown"]
        print(
            f"load 1 is {1 / cheapest_s(model)[-1]:.0f} requests a second; the server takes "
            f"{slowdown:.3f} times as long as was measured"
        )
        for seed in range(args.seeds):
            for load in loads:
                case = case_of(
                    model, "poisson", load, seed=seed, count=args.requests, samples=len(test[0][0])
                )
                for number, (name, address) in enumerate(addresses.items()):
                    path = folder / f"{args.requests}-{seed}-{load}-{number}.json"
                    if not path.is_file():
                        real = sent(address, case, data)
                        write_json(path, both(name, case, real, model, test, slowdown))
                    rows.append(read_json(path))
                    print(rows[-1], flush=True)
    differences = np.array([float(str(row["difference"])) for row in rows])
    told = (
        f"Server minus simulated, timely accuracy: {differences.mean():+.4f} on average, "
        f"{np.abs(differences).max():.4f} at most, over {len(rows)} runs of {args.requests} "
        f"requests. The server takes {slowdown:.3f} times as long for the whole network as was "
        "measured outside of it."
    )
    print(told)
    if not args.smoke:
        write_results(
            "timely_agreement", "A simulation beside the server", f"{__doc__}\n\n{told}", rows
        )


if __name__ == "__main__":
    main()
