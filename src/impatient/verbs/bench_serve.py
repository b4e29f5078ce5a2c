"""Load a server with requests at planned instants, and say what became of them.

Late, refused and missing answers count as wrong. Requests are sent whether or not earlier ones have
been answered, and their times count from the planned instants.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from impatient import checks
from impatient.errors import DataError, ServingError
from impatient.table import Table, in_ms
from impatient.verbs.notes import log
from impatient.verbs.options import OFF, Count, Directory, Positive, Text, Times, VerbOptions
from impatient.verbs.run_directory import RunDirectory
from impatient.verbs.serve import TOKEN

if TYPE_CHECKING:
    from torch import Tensor

    from impatient.serving.tensors import Inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchServeOptions(VerbOptions):
    """Load a running server, and count timely answers.

    Attributes:
        address: Address of the server.
        model: Name of the model; by default that of the directory.
        arrivals: Pattern of arrivals: poisson; gamma (uneven gaps); mmpp (switching between slow
            and fast); ramp (from nothing to twice the rate).
        trace: A .npy file of instants of arrival in seconds, instead of a pattern; it is stretched
            to the rate.
        rate: Mean requests per second.
        requests: Number of requests.
        budgets_s: Shortest and longest time for an answer in ms; between them all ratios are
            equally likely.
        seed: Seed of instants and times.
    """

    directory: Directory
    address: str = "http://127.0.0.1:8000"
    model: Text = None
    arrivals: Literal["poisson", "gamma", "mmpp", "ramp"] = "poisson"
    trace: Annotated[Path | None, OFF] = None
    rate: float = 50.0
    requests: Positive = 1000
    budgets_s: Annotated[Times, arg(name="budgets-ms")] = (0.01, 0.1)
    seed: Count = 0


def bench_serve(options: BenchServeOptions) -> dict[str, Any]:
    """Send the requests, and summarise what became of them."""
    import numpy as np

    from impatient.serving.load import arrivals, send_load

    if len(options.budgets_s) != 2 or options.budgets_s[0] > options.budgets_s[1]:
        raise ServingError(
            f"--budgets-ms has {len(options.budgets_s)} values; expected the shortest and the "
            "longest time, such as 10,100."
        )
    samples, labels = _samples(RunDirectory(options.directory), options.requests)
    if options.trace is None:
        instants = arrivals(
            options.arrivals, rate=options.rate, count=options.requests, seed=options.seed
        )
    else:
        instants = _traced(options.trace, options.requests, options.rate)
    # no bar: drawing it would delay the requests
    log.info("sending %d requests, which takes %.0f s", len(instants), instants[-1])
    rng = np.random.default_rng(options.seed)
    low, high = np.log(options.budgets_s)
    result = asyncio.run(
        send_load(
            options.address,
            options.model or options.directory.resolve().name,
            samples,
            labels,
            arrivals_s=instants,
            budgets_s=np.exp(rng.uniform(low, high, len(instants))),
            token=os.environ.get(TOKEN, ""),
        )
    )
    return {"rate": len(instants) / max(float(instants[-1]), 1e-9), **result.summary()}


def _samples(run: RunDirectory, most: int) -> tuple[list[Inputs], list[int]]:
    """Take raw samples of the test split as the server wants them, and their classes."""
    from impatient.trees import named_leaves

    data = run.data()
    examples = data.examples("test")
    count = min(most, data.size("test"))
    samples: list[Inputs] = []
    for place in range(count):
        raw = named_leaves(examples.take([place]))
        # An array of its own has no name but the server's.
        samples.append({name or "input": _sent(part[0]) for name, part in raw})
    return samples, [int(label) for label in examples.labels[:count]]


def _sent(part: Tensor) -> Any:
    return (part.float() if part.is_floating_point() else part).numpy()


def _traced(file: Path, requests: int, rate: float) -> Any:
    import numpy as np

    checks.positive(ServingError, rate=rate)
    try:
        instants = np.load(file, allow_pickle=False)
        if not isinstance(instants, np.ndarray) or instants.ndim != 1:
            raise ValueError("they are no list of numbers")
        instants = instants.astype(float)[:requests]
        if not np.isfinite(instants).all():
            raise ValueError("some are NaN or infinite")
        if len(instants) < 2 or not (np.diff(instants) >= 0).all() or instants[0] == instants[-1]:
            raise ValueError("they do not increase")
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise DataError(
            f"{file} cannot be read as instants: {error}. Expected a .npy file of at "
            "least two increasing numbers, in seconds."
        ) from error
    span_s = float(instants[-1] - instants[0])
    return (instants - instants[0]) * (len(instants) / rate / span_s)


def shown(_options: BenchServeOptions, result: dict[str, Any]) -> Iterator[Table | str]:
    """Give a table of one row, and the shares of statuses and exits."""
    yield Table(
        title="what became of the requests, as their callers saw it",
        columns=(
            "requests",
            "per second",
            "in time",
            "timely accuracy",
            "p50 ms",
            "p99 ms",
            "own lag p99 ms",
        ),
        left=0,
        rows=[
            (
                str(result["requests"]),
                f"{result['rate']:.1f}",
                f"{result['in_time']:.1%}",
                f"{result['timely_accuracy']:.1%}",
                in_ms(result["p50_s"]),
                in_ms(result["p99_s"]),
                in_ms(result["lag_p99_s"]),
            )
        ],
    )
    for what in ("status", "exits"):
        shares = (f"{name}: {count}" for name, count in result[what].items())
        yield f"{what}: {', '.join(shares)}"
