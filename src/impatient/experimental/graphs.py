"""Record every stage and head as a CUDA graph, and replay it.

Status: tested with a recorder that re-runs the stage on the CPU in the same memory; the tests
marked `gpu` and benchmarks/gpu/running.py wait for a device. Never run on a GPU, so neither its
answers nor its speed there are known.

A replay costs one launch instead of one per kernel, and at batch size 1 launches take most of the
time. A graph has fixed shapes: a batch runs in the next larger bucket, and the results of the other
rows are dropped.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from impatient.engines.comparison import check_agreement
from impatient.engines.network import EngineNetwork, EngineSettings, NetworkFacts
from impatient.engines.partition import partition
from impatient.errors import NetworkError
from impatient.inputs import evaluating
from impatient.networks.multi_exit import MultiExitNetwork
from impatient.portable import Staged

BUCKETS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded call.

    Attributes:
        inputs: memory to write the inputs to.
        outputs: memory to read the outputs from.
        replay: function that computes the outputs from the inputs.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]


Recorder = Callable[[Callable[..., Any], Sequence[Tensor]], Recorded]


def record_cuda(part: Callable[..., Any], inputs: Sequence[Tensor]) -> Recorded:
    """Record one call as a CUDA graph, after a warm-up."""
    static = tuple(tensor.clone() for tensor in inputs)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            part(*static)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = _as_tuple(part(*static))
    return Recorded(static, outputs, graph.replay)


class Graphed:
    """A stage or head that runs in recordings, one per bucket.

    A recording is made when it is first needed. Outputs are views of its memory, valid until the
    same part runs again.

    Args:
        part: stage or head.
        takes: for each input, which of its dimensions is the batch; None where none is.
        gives: the same for each output.
        buckets: numbers of rows to record for, in increasing order.
        record: function that makes a recording.
    """

    def __init__(
        self,
        part: Callable[..., Any],
        takes: Sequence[int | None],
        gives: Sequence[int | None],
        buckets: Sequence[int],
        record: Recorder = record_cuda,
    ) -> None:
        self._part = part
        self._takes = tuple(takes)
        self._gives = tuple(gives)
        self._buckets = tuple(buckets)
        self._record = record
        self._recorded: dict[int, Recorded] = {}

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        rows = next(
            value.shape[dim]
            for value, dim in zip(values, self._takes, strict=True)
            if dim is not None
        )
        place = bisect.bisect_left(self._buckets, rows)
        if place == len(self._buckets):
            raise NetworkError(
                f"{rows} rows are more than the largest bucket, {self._buckets[-1]}; make the "
                "network with larger buckets."
            )
        recorded = self._at(self._buckets[place], values)
        for static, value, dim in zip(recorded.inputs, values, self._takes, strict=True):
            (static if dim is None else static.narrow(dim, 0, rows)).copy_(value)
        recorded.replay()
        return tuple(
            output if dim is None else output.narrow(dim, 0, rows)
            for output, dim in zip(recorded.outputs, self._gives, strict=True)
        )

    def _at(self, bucket: int, values: Sequence[Tensor]) -> Recorded:
        if bucket not in self._recorded:
            filled = [
                _filled(value, dim, bucket) for value, dim in zip(values, self._takes, strict=True)
            ]
            self._recorded[bucket] = self._record(self._part, filled)
        return self._recorded[bucket]


class GraphedNetwork(EngineNetwork):
    """A network whose stages and heads are CUDA graphs."""

    @property
    def mechanism(self) -> str:
        rows = ", ".join(map(str, self.buckets))
        return f"CUDA graphs of each of {self.num_exits} stages, for {rows} rows"


def cuda_graphs(
    network: MultiExitNetwork,
    *,
    example: Any,
    buckets: Sequence[int] = BUCKETS,
    record: Recorder = record_cuda,
) -> GraphedNetwork:
    """Record every stage and head of a network as CUDA graphs.

    Warm the network up with every batch size that you need, because the first call of each bucket
    records. Later changes of the weights have an effect; other shapes are not possible.

    Args:
        network: network on a CUDA device.
        example: a real input on that device, of at most as many rows as the largest bucket.
        buckets: numbers of rows to record for, in increasing order.
        record: function that makes a recording.
    Returns:
        A network for `Runner`, `profile` and `record`, whose outputs agree with the given one's.
    Raises:
        ExportFailed: if the network cannot be cut into stages, or the outputs differ.
        NetworkError: if `buckets` are not increasing positive numbers, or there is no CUDA device.

    Thread:
        One run at a time, because runs share the recordings' memory.
    """
    if not buckets or buckets[0] < 1 or sorted(set(buckets)) != list(buckets):
        raise NetworkError(
            f"buckets={tuple(buckets)}; expected increasing numbers of rows, at least 1, such as "
            f"{BUCKETS}."
        )
    with evaluating(network):
        parts = partition(network, example)
        facts = NetworkFacts.of(network, example)
    if record is record_cuda and not next(iter(parts.examples.values())).is_cuda:
        raise NetworkError(
            "the network is not on a CUDA device, which records the graphs; move it and the "
            "example there."
        )
    wiring = parts.wiring
    dims = wiring.batch_dims

    def graphed(part: nn.Module, takes: Sequence[str], gives: Sequence[int | None]) -> Graphed:
        return Graphed(part, [dims[name] for name in takes], gives, buckets, record)

    stages = [
        graphed(stage, takes, [dims[name] for name in gives])
        for stage, takes, gives in zip(parts.stages, wiring.takes, wiring.gives, strict=True)
    ]
    heads = [
        head and _first(graphed(head, [name], [0]))
        for head, name in zip(parts.heads, wiring.features, strict=True)
    ]
    whole = _first(graphed(parts.whole, wiring.inputs, [0]))
    settings = EngineSettings(engine="cuda-graphs")
    made = GraphedNetwork(facts, Staged(wiring, stages, heads), whole, settings)
    made.buckets = tuple(buckets)
    check_agreement(network, made, example, sizes=[rows for rows in (1, 3) if rows <= buckets[-1]])
    return made


def _first(part: Graphed) -> Callable[[Tensor], Tensor]:
    return lambda *values: part(*values)[0]


def _filled(value: Tensor, dim: int | None, rows: int) -> Tensor:
    """Repeat the first row of a value up to a number of rows."""
    if dim is None or value.shape[dim] == rows:
        return value
    missing = [rows - length if place == dim else -1 for place, length in enumerate(value.shape)]
    return torch.cat([value, value.narrow(dim, 0, 1).expand(missing)], dim)


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)
