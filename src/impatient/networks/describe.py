"""What a network with exits is made of: per stage and head the shapes, multiply-accumulates and parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from impatient.errors import ExitNotReached
from impatient.networks.multi_exit import MultiExitNetwork
from impatient.networks.placement import evaluating
from impatient.networks.stages import batch_size_of, call_model, output_tensor, tapped


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# torch's counter knows the attention kernels of GPUs, but not that of CPUs
_ALSO_COUNTED: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFacts:
    """One stage and its head. MACs are per sample; a parameter belongs to the stage that first uses its module."""

    exit: str
    features: tuple[int, ...]
    head: str
    stage_macs: int
    head_macs: int
    stage_parameters: int
    head_parameters: int


@runtime_checkable
class DescribedNetwork(Protocol):
    """What a network has to offer to be profiled: its exits, what is known of its parts, and what would run without exits.

    `MultiExitNetwork`, `RunningEnsemble`, `EANN` and `GrowingNetwork` are such networks; one of your own is an `nn.Module` with
    these.

    Attributes:
        backbone: what runs where nobody wants exits; its time stands beside the staged one in every profile.
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
    """Shapes, MACs and parameters of each stage and head, found by running the network once on `x` in eval mode.

    MACs count matrix products, convolutions and attention (torch.utils.flop_counter, halved); element-wise work is 0.
    """
    batch = batch_size_of(x)
    first_use = _ParameterUse(network.backbone)
    shapes: list[tuple[int, ...]] = []
    totals: list[tuple[int, int]] = []  # FLOPs so far before and after each head
    counter = FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED)

    def visit(index: int, features: Tensor) -> None:
        before = counter.get_total_flops()
        network.heads[index](features)
        totals.append((before, counter.get_total_flops()))
        shapes.append(tuple(features.shape))
        first_use.next_stage()

    with evaluating(network), torch.no_grad(), _countable_attention(), counter, first_use:
        output = output_tensor(tapped(network.backbone, x, network._cut_map(), visit))
        end = counter.get_total_flops()
    if len(shapes) < len(network.heads):
        raise ExitNotReached(f"the example came to {len(shapes)} of {len(network.heads)} early exits; needed: all.")
    totals.append((end, end))
    shapes.append(tuple(output.shape))
    heads: list[nn.Module | None] = [*network.heads, None]
    facts, passed = [], 0
    for index, (name, head) in enumerate(zip(network.exit_names, heads, strict=True)):
        before, after = totals[index]
        facts.append(
            StageFacts(
                exit=name, features=shapes[index], head=_head_name(head),
                stage_macs=(before - passed) // (2 * batch), head_macs=(after - before) // (2 * batch),
                stage_parameters=first_use.counts.get(index, 0),
                head_parameters=sum(p.numel() for p in head.parameters()) if head else 0,
            )
        )  # fmt: skip
        passed = after
    return facts


def count_macs(model: nn.Module, x: Any) -> int:
    """Multiply-accumulates per sample of a plain run, counted as in `stage_facts`."""
    counter = FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED)
    with evaluating(model), torch.no_grad(), _countable_attention(), counter:
        call_model(model, x)
    return int(counter.get_total_flops()) // (2 * batch_size_of(x))


@contextlib.contextmanager
def _countable_attention() -> Iterator[None]:
    """Keep out the fused attention operator, which is not counted."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class _ParameterUse:
    """Counts parameters by the stage in which their module is first called; those of modules never called go to stage 0."""

    def __init__(self, backbone: nn.Module) -> None:
        self._backbone = backbone
        self._stage = 0
        self._seen: set[int] = set()
        self.counts: dict[int, int] = {}

    def next_stage(self) -> None:
        self._stage += 1

    def __enter__(self) -> None:
        self._hooks = [module.register_forward_pre_hook(self._called) for module in self._backbone.modules()]

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
    rows = [("exit", "after", "features", "head", "stage MACs", "head MACs", "stage params", "head params")]
    for index, fact in enumerate(facts):
        rows.append(
            (
                str(index), fact.exit, "x".join(str(size) for size in fact.features[1:]), fact.head,
                f"{fact.stage_macs:,}", f"{fact.head_macs:,}", f"{fact.stage_parameters:,}", f"{fact.head_parameters:,}",
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(_aligned(cell, width, column) for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    lines.insert(1, "-" * len(lines[0]))
    stages, heads = sum(f.stage_macs for f in facts), sum(f.head_macs for f in facts)
    lines += [
        f"stages, to the end of {type(network.backbone).__name__}: {stages:,} MACs per sample, "
        f"{sum(f.stage_parameters for f in facts):,} parameters; all heads {heads:,} MACs ({heads / max(stages, 1):.1%}).",
        f"mechanism: {network.mechanism}.",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if 1 <= column <= 3 else cell.rjust(width)
