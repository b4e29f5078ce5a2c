"""Count multiply-accumulates, bytes and parameters of stages and heads."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from impatient.inputs import batch_size_of, call_model, evaluating
from impatient.trees import leaves


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# torch's counter knows the attention kernels of GPUs, but not that of CPUs.
_ALSO_COUNTED: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFacts:
    """Counts of one stage and its head.

    Attributes:
        exit: name of the exit after the stage.
        features: shape of what the head sees.
        head: what the head is, in words.
        stage_macs: multiply-accumulates of the stage per sample.
        head_macs: multiply-accumulates of the head per sample.
        stage_parameters: parameters of the modules that the stage is the first to use.
        head_parameters: parameters of the modules that the head is the first to use.
    """

    exit: str
    features: tuple[int, ...]
    head: str
    stage_macs: int
    head_macs: int
    stage_parameters: int
    head_parameters: int


class MacCounter(FlopCounterMode):
    """Add up multiply-accumulates while it is entered.

    Matrix products, convolutions and attention count (torch.utils.flop_counter, halved).
    Element-wise work counts 0. Enter `counting` as well.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_ALSO_COUNTED)
        self._taken = 0

    def take(self) -> int:
        """Return what was added since the last call."""
        total = int(self.get_total_flops()) // 2
        taken = total - self._taken
        self._taken = total
        return taken


def count_macs(model: nn.Module, x: Any) -> int:
    """Count the multiply-accumulates per sample of a plain run."""
    counter = MacCounter()
    with counting(model), counter:
        call_model(model, x)
    return counter.take() // batch_size_of(x)


def count_traffic(model: nn.Module, x: Any) -> int:
    """Count the bytes that a plain run reads and writes in eval mode.

    Every operator that torch calls reads each of its tensors once (activations, parameters,
    buffers) and writes each of its results once, as if there were no caches. An in-place operator
    does both. Views, results in the memory of an argument, and allocation move nothing. Picking
    rows (embedding, index_select, gather, indexing) reads the index and the picked rows. What an
    operator moves internally is not counted. An engine that fuses operators moves less.
    """
    counter = TrafficCounter()
    with counting(model), counter:
        call_model(model, x)
    return counter.take()


_PICKING = {
    torch.ops.aten.embedding.default,
    torch.ops.aten.index_select.default,
    torch.ops.aten.gather.default,
    torch.ops.aten.index.Tensor,
}


class TrafficCounter(TorchDispatchMode):
    """Add up the bytes that operators read and write while it is entered.

    They are counted as in `count_traffic`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._bytes = 0

    def take(self) -> int:
        """Return the bytes that were added since the last call."""
        taken = self._bytes
        self._bytes = 0
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._bytes += _traffic(func, _tensors((args, kwargs)), _tensors(result))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(tree) if leaf.numel()]


def _traffic(func: Any, given: list[Tensor], results: list[Tensor]) -> int:
    written = sum(map(_size, results))
    moved = sum(map(_size, given)) + written
    if func._schema.is_mutable:
        return moved
    memory = {tensor.untyped_storage().data_ptr() for tensor in given}
    if "empty" in func.__name__ or (
        results and all(result.untyped_storage().data_ptr() in memory for result in results)
    ):
        return 0
    if func in _PICKING:
        return written + sum(_size(tensor) for tensor in given[1:]) + written
    return moved


def _size(tensor: Tensor) -> int:
    """Return the bytes of the elements in memory, each broadcast one once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride) * tensor.element_size()


@contextlib.contextmanager
def counting(model: nn.Module) -> Iterator[None]:
    """Put a model into the state in which its operators are counted: eval mode, no gradients."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model), torch.no_grad(), without_fused_attention():
        try:
            # torch's counter fails on a parameter that was expanded without gradients
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)


@contextlib.contextmanager
def without_fused_attention() -> Iterator[None]:
    """Switch off the fused attention operator, which is not counted."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class ParameterUse:
    """Count parameters by the stage or head that first calls their module.

    Attributes:
        counts: number of parameters by part. Parts are numbered stage 0, head 0, stage 1, ...
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._part = 0
        self._seen: set[int] = set()
        self.counts: Counter[int] = Counter()

    def next_part(self) -> None:
        self._part += 1

    def __enter__(self) -> Self:
        self._hooks = [
            module.register_forward_pre_hook(self._called) for module in self._model.modules()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def assign_unused(self, heads: Sequence[nn.Module]) -> None:
        """Count modules never called in their head, or else in stage 0."""
        for index, head in enumerate(heads):
            self._count(head, 2 * index + 1)
        self._count(self._model, 0)

    def _called(self, module: nn.Module, _args: Any) -> None:
        self._count(module, self._part, recurse=False)

    def _count(self, module: nn.Module, part: int, *, recurse: bool = True) -> None:
        for parameter in module.parameters(recurse):
            if id(parameter) not in self._seen:
                self._seen.add(id(parameter))
                self.counts[part] += parameter.numel()


def module_name(module: nn.Module) -> str:
    """Name a module by its class, or a sequence by its layers' classes."""
    if isinstance(module, nn.Sequential):
        return " + ".join(type(layer).__name__ for layer in module)
    return type(module).__name__


def facts_table(facts: Sequence[StageFacts], exit_free: str, mechanism: str) -> str:
    """Lay out facts as a table, with totals and the mechanism.

    Args:
        facts: facts of all exits.
        exit_free: name of the network without exits.
        mechanism: how the network is divided into stages, in words.
    """
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
        ),
        *(
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
            for index, fact in enumerate(facts)
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row, "><<<>>>>", widths, strict=True)
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    stages = sum(f.stage_macs for f in facts)
    heads = sum(f.head_macs for f in facts)
    lines += [
        f"stages, to the end of {exit_free}: {stages:,} MACs per sample, "
        f"{sum(f.stage_parameters for f in facts):,} parameters; all heads {heads:,} MACs "
        f"({heads / max(stages, 1):.1%}).",
        f"mechanism: {mechanism}.",
    ]
    return "\n".join(line.rstrip() for line in lines)
