"""What a network with exits is made of: per stage and head the shapes, multiply-accumulates and
parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from impatient.errors import ExitNotReached
from impatient.networks.multi_exit import MultiExitNetwork
from impatient.networks.placement import evaluating
from impatient.networks.stages import batch_size_of, call_model, output_tensor, tapped


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# torch's counter knows the attention kernels of GPUs, but not that of CPUs
_ALSO_COUNTED: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFacts:
    """One stage and its head. MACs are per sample; a parameter belongs to the stage that first uses
    its module.
    """

    exit: str
    features: tuple[int, ...]
    head: str
    stage_macs: int
    head_macs: int
    stage_parameters: int
    head_parameters: int


@runtime_checkable
class DescribedNetwork(Protocol):
    """What a network has to offer to be profiled: its exits, what is known of its parts, and what
    would run without exits.

    `MultiExitNetwork`, `RunningEnsemble`, `EANN` and `GrowingNetwork` are such networks; one of
    your own is an `nn.Module` with these.

    Attributes:
        backbone: what runs where nobody wants exits; its time stands beside the staged one in every
            profile.
        mechanism: how it is staged, in words.
    """

    @property
    def backbone(self) -> nn.Module: ...

    @property
    def mechanism(self) -> str: ...

    @property
    def num_exits(self) -> int: ...

    @property
    def exit_names(self) -> tuple[str, ...]: ...

    def exits(self, x: Any) -> AbstractContextManager[Iterator[Any]]: ...

    def stage_facts(self, x: Any) -> list[StageFacts]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> Any: ...

    def state_dict(self) -> dict[str, Tensor]: ...


def stage_facts(network: MultiExitNetwork, x: Any) -> list[StageFacts]:
    """Shapes, MACs and parameters of each stage and head, found by running the network once on `x`
    in eval mode.

    MACs count matrix products, convolutions and attention (torch.utils.flop_counter, halved);
    element-wise work is 0.
    """
    batch = batch_size_of(x)
    first_use = _ParameterUse(network.backbone)
    shapes: list[tuple[int, ...]] = []
    # FLOPs so far before and after each head
    totals: list[tuple[int, int]] = []
    counter = FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED)

    def visit(index: int, features: Tensor) -> None:
        before = counter.get_total_flops()
        network.heads[index](features)
        totals.append((before, counter.get_total_flops()))
        shapes.append(tuple(features.shape))
        first_use.next_stage()

    with evaluating(network), torch.no_grad(), without_fused_attention(), counter, first_use:
        output = output_tensor(tapped(network.backbone, x, network._cut_map(), visit))
        end = counter.get_total_flops()
    if len(shapes) < len(network.heads):
        raise ExitNotReached(
            f"the example came to {len(shapes)} of {len(network.heads)} early exits; expected all."
        )
    totals.append((end, end))
    shapes.append(tuple(output.shape))
    heads: list[nn.Module | None] = [*network.heads, None]
    facts = []
    passed = 0
    for index, (name, head) in enumerate(zip(network.exit_names, heads, strict=True)):
        before, after = totals[index]
        facts.append(
            StageFacts(
                exit=name,
                features=shapes[index],
                head=_head_name(head),
                stage_macs=(before - passed) // (2 * batch),
                head_macs=(after - before) // (2 * batch),
                stage_parameters=first_use.counts.get(index, 0),
                head_parameters=sum(p.numel() for p in head.parameters()) if head else 0,
            )
        )
        passed = after
    return facts


def count_macs(model: nn.Module, x: Any) -> int:
    """Multiply-accumulates per sample of a plain run, counted as in `stage_facts`."""
    counter = FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED)
    with evaluating(model), torch.no_grad(), without_fused_attention(), counter:
        call_model(model, x)
    return int(counter.get_total_flops()) // (2 * batch_size_of(x))


def stage_traffic(network: DescribedNetwork, x: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes that each stage and each head read and write, found by running the network once on `x`
    in eval mode.

    Counted as in `count_traffic`. Weights are read once per run, so that of a batch of n samples a
    sample's share is smaller.

    Returns:
        Bytes of each stage and of each head, for the whole of `x`; use one sample.
    Raises:
        ExitNotReached: if the example does not come to every exit.
    """
    counter = TrafficCounter()
    stages = []
    heads = []
    with (
        evaluating(network),
        torch.no_grad(),
        without_fused_attention(),
        counter,
        network.exits(x) as run,
    ):
        for exit in run:
            stages.append(counter.take())
            exit.output()
            heads.append(counter.take())
    if len(stages) != network.num_exits:
        raise ExitNotReached(
            f"the example came to {len(stages)} of {network.num_exits} exits; expected all."
        )
    return tuple(stages), tuple(heads)


def count_traffic(model: nn.Module, x: Any) -> int:
    """Bytes that the operators of a plain run on `x` read and write in eval mode.

    Every operator that torch calls reads each of its tensors once (activations, parameters,
    buffers) and writes each of its results once, as if there were no caches; an in-place operator
    does both. Views, and results that lie in the memory of an argument, move nothing, nor does
    allocating. Picking rows (embedding, index_select, gather, indexing) reads the index and what is
    picked. What an operator moves inside, or saves by being fused with its neighbours, is not seen:
    an engine that fuses moves less.
    """
    counter = TrafficCounter()
    with evaluating(model), torch.no_grad(), without_fused_attention(), counter:
        call_model(model, x)
    return counter.take()


_PICKING = {
    torch.ops.aten.embedding.default,
    torch.ops.aten.index_select.default,
    torch.ops.aten.gather.default,
    torch.ops.aten.index.Tensor,
}


class TrafficCounter(TorchDispatchMode):
    """While it is entered, adds up what operators read and write; see `count_traffic`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._bytes = 0

    def take(self) -> int:
        """The bytes since the last call."""
        taken = self._bytes
        self._bytes = 0
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._bytes += _traffic(func, _tensors((args, kwargs)), _tensors(result))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.numel()]


def _traffic(func: Any, given: list[Tensor], results: list[Tensor]) -> int:
    written = sum(map(_size, results))
    if func._schema.is_mutable:
        return sum(map(_size, given)) + written
    memory = {tensor.untyped_storage().data_ptr() for tensor in given}
    if "empty" in func.__name__ or (
        results and all(result.untyped_storage().data_ptr() in memory for result in results)
    ):
        return 0
    if func in _PICKING:
        return written + sum(_size(tensor) for tensor in given[1:]) + written
    return sum(map(_size, given)) + written


def _size(tensor: Tensor) -> int:
    """Bytes of the elements that are really there; a broadcast one is there once."""
    there = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        there *= size if stride else 1
    return there * tensor.element_size()


@contextlib.contextmanager
def without_fused_attention() -> Iterator[None]:
    """Keep out the fused attention operator, which is not counted."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class _ParameterUse:
    """Counts parameters by the stage in which their module is first called; those of modules never
    called go to stage 0.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._backbone = backbone
        self._stage = 0
        self._seen: set[int] = set()
        self.counts: dict[int, int] = {}

    def next_stage(self) -> None:
        self._stage += 1

    def __enter__(self) -> None:
        self._hooks = [
            module.register_forward_pre_hook(self._called) for module in self._backbone.modules()
        ]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._stage = 0
        self._count(self._backbone.parameters())

    def _called(self, module: nn.Module, _args: Any) -> None:
        self._count(module.parameters(recurse=False))

    def _count(self, parameters: Any) -> None:
        for parameter in parameters:
            if id(parameter) not in self._seen:
                self._seen.add(id(parameter))
                self.counts[self._stage] = self.counts.get(self._stage, 0) + parameter.numel()


def _head_name(head: nn.Module | None) -> str:
    if head is None:
        return "(the backbone's own)"
    if isinstance(head, nn.Sequential):
        return " + ".join(type(layer).__name__ for layer in head)
    return type(head).__name__


def describe(network: DescribedNetwork, x: Any) -> str:
    """The facts as a table, with totals and the mechanism."""
    facts = network.stage_facts(x)
    rows = [
        (
            "exit",
            "after",
            "features",
            "head",
            "stage MACs",
            "head MACs",
            "stage params",
            "head params",
        )
    ]
    for index, fact in enumerate(facts):
        rows.append(
            (
                str(index),
                fact.exit,
                "x".join(str(size) for size in fact.features[1:]),
                fact.head,
                f"{fact.stage_macs:,}",
                f"{fact.head_macs:,}",
                f"{fact.stage_parameters:,}",
                f"{fact.head_parameters:,}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            _aligned(cell, width, column)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    stages = sum(f.stage_macs for f in facts)
    heads = sum(f.head_macs for f in facts)
    lines += [
        f"stages, to the end of {type(network.backbone).__name__}: {stages:,} MACs per sample, "
        f"{sum(f.stage_parameters for f in facts):,} parameters; all heads {heads:,} MACs "
        f"({heads / max(stages, 1):.1%}).",
        f"mechanism: {network.mechanism}.",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if 1 <= column <= 3 else cell.rjust(width)
