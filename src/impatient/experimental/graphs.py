"""Record every stage and head as a CUDA graph, and replay it.

Status: tested with a recorder that re-runs the stage on the CPU in the same memory; the tests
marked `gpu` and benchmarks/gpu/running.py wait for a device. Never run on a GPU, so neither its
answers nor its speed there are known.

A replay costs one launch where the stage itself would cost one per kernel, which at batch size 1 is
most of the time. A graph has fixed shapes: a batch runs in the next larger bucket, and what the
other rows compute is dropped.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from impatient.engines.export import check_agreement
from impatient.engines.network import EngineNetwork, NetworkFacts
from impatient.engines.partition import partition
from impatient.errors import NetworkError
from impatient.inputs import evaluating
from impatient.networks.multi_exit import MultiExitNetwork
from impatient.portable import Staged

BUCKETS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded call: write to `inputs`, `replay`, read `outputs`."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]


Recorder = Callable[[Callable[..., Any], Sequence[Tensor]], Recorded]


def record_cuda(part: Callable[..., Any], inputs: Sequence[Tensor]) -> Recorded:
    """Record one call as a CUDA graph, after a few that warm up libraries and allocator."""
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
    """A stage or head that runs in recordings, one per bucket, made when it is first needed.

    What it gives is a view of a recording's own memory, valid until the same part runs again.

    Args:
        part: the stage or head.
        batch_dims: of each value it takes, the dimension that is the batch; None where it has none.
        buckets: numbers of rows to record for, rising.
        gives_dims: likewise of each value it gives.
        record: makes a recording.
    """

    def __init__(
        self,
        part: Callable[..., Any],
        batch_dims: Sequence[int | None],
        gives_dims: Sequence[int | None],
        buckets: Sequence[int],
        record: Recorder = record_cuda,
    ) -> None:
        self._part = part
        self._takes = tuple(batch_dims)
        self._gives = tuple(gives_dims)
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
                f"network with larger buckets."
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


def cuda_graphs(
    network: MultiExitNetwork,
    *,
    example: Any,
    buckets: Sequence[int] = BUCKETS,
    record: Recorder = record_cuda,
) -> EngineNetwork:
    """Record every stage and head of a network as CUDA graphs.

    Warm it up with every batch size that counts: the first call of each bucket records. Changed
    weights show, other shapes do not.

    Args:
        network: on a CUDA device.
        example: a real input there, of no more rows than the largest bucket.
        buckets: numbers of rows to record for, rising.
        record: makes a recording.
    Returns:
        A network for `Runner`, `profile` and `record`, whose outputs were found to agree with the
        given one's.
    Raises:
        ExportFailed: if the network cannot be cut into stages, or the outputs differ.
        NetworkError: if `buckets` are no rising positive numbers, or there is no CUDA device.

    Thread:
        One run at a time: runs share the recordings' memory.
    """
    if (
        not buckets
        or buckets[0] < 1
        or any(after <= before for before, after in itertools.pairwise(buckets))
    ):
        raise NetworkError(
            f"buckets={tuple(buckets)}; expected numbers of rows, at least 1 and rising, such as "
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
    dims: Mapping[str, int | None] = parts.wiring.batch_dims

    def graphed(part: nn.Module, takes: Sequence[str], gives: Sequence[int | None]) -> Graphed:
        return Graphed(part, [dims[name] for name in takes], gives, buckets, record)

    wiring = parts.wiring
    stages = [
        graphed(stage, takes, [dims[name] for name in gives])
        for stage, takes, gives in zip(parts.stages, wiring.takes, wiring.gives, strict=True)
    ]
    heads = [
        None if head is None else _first(graphed(head, [name], [0]))
        for head, name in zip(parts.heads, wiring.features, strict=True)
    ]
    whole = _first(graphed(parts.whole, wiring.inputs, [0]))
    made = EngineNetwork(
        facts,
        Staged(wiring, stages, heads),
        whole,
        engine="cuda-graphs",
        buckets=buckets,
        mechanism=(
            f"CUDA graphs of each of {len(stages)} stages, for {', '.join(map(str, buckets))} rows"
        ),
    )
    check_agreement(network, made, example, sizes=[rows for rows in (1, 3) if rows <= buckets[-1]])
    return made


def _first(part: Graphed) -> Callable[[Tensor], Tensor]:
    return lambda *values: part(*values)[0]


def _filled(value: Tensor, dim: int | None, rows: int) -> Tensor:
    """A value with this many rows: its own, and its first one repeated."""
    if dim is None:
        return value
    missing = rows - value.shape[dim]
    return (
        torch.cat([value, value.narrow(dim, 0, 1).expand(_with(value.shape, dim, missing))], dim)
        if missing
        else value
    )


def _with(shape: Sequence[int], dim: int, size: int) -> list[int]:
    return [size if place == dim else length for place, length in enumerate(shape)]


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)
