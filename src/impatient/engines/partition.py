"""Cut a network with exits into parts by torch.export.

The parts are one graph per stage and one per head, with the wiring between them. The untouched
backbone is exported once, in eval mode and with a dynamic batch size, and the features at the exits
are marked. The graph has no in-place operations left, because torch functionalises it. So cutting
means splitting a list: the nodes up to a mark are a stage, and values computed before a mark and
used after it are passed on.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from impatient.counting import without_fused_attention
from impatient.errors import ExitNotReached, ExportFailed, NetworkError
from impatient.inputs import batch_size_of, evaluating, output_tensor
from impatient.networks.heads import Layers, Pool, takes_mask
from impatient.networks.multi_exit import MultiExitNetwork
from impatient.networks.stages import tapped
from impatient.portable import Wiring

log = logging.getLogger(__name__)

_SIZE = torch.ops.aten.sym_size.int


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A network in parts, in eval mode.

    The parts share the parameters of the backbone and the heads.

    Attributes:
        wiring: connections between the parts.
        stages: a module for each stage, from positional tensors (`wiring.takes`) to a tuple of
            tensors (`wiring.gives`).
        heads: a module for each exit, from features to output; None for the last exit, whose
            features are the output.
        whole: the backbone without exits as one exported module, from `wiring.inputs` to one
            tensor.
        examples: an example tensor (batch size 2) for each value name.
        length_dims: for each value name, the dimensions that are as long as the sequence, where
            that may change: token ids of any length.
        exit_names: names of the network's exits.
        num_classes: number of classes of the network.
    """

    wiring: Wiring
    stages: Sequence[nn.Module]
    heads: Sequence[nn.Module | None]
    whole: nn.Module
    examples: dict[str, Tensor]
    length_dims: Mapping[str, tuple[int, ...]]
    exit_names: tuple[str, ...]
    num_classes: int

    def free_dims(self, name: str) -> FreeDims:
        """Return which dimensions of a value may have any size."""
        return FreeDims(batch=self.wiring.batch_dims[name], lengths=self.length_dims[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeDims:
    """The dimensions of a tensor that may have any size.

    Attributes:
        batch: dimension of the batch; None where there is none.
        lengths: dimensions that are as long as the sequence.
    """

    batch: int | None = None
    lengths: tuple[int, ...] = ()


def partition(network: MultiExitNetwork, x: Any, *, any_length: bool = True) -> Parts:
    """Export the untouched backbone and cut its graph at the exits.

    Args:
        network: network from `attach_exits`; it is not changed, and keeps its train or eval mode.
        x: an example input. The first dimension of tensors that are as long as the batch becomes
            dynamic, and so does the length of token ids, if the model allows it. All other sizes,
            and values that are not tensors, are fixed.
        any_length: whether to try to make the length of token ids dynamic.
    Returns:
        Parts whose outputs equal the network's. Where torch's attention has an eager fast path that
        cannot be exported, they differ by rounding.
    Raises:
        NetworkError: if this kind of network has no graph to cut, or if two exits are at the same
            place in the graph.
        ExitNotReached: if the example does not reach all exits.
        ExportFailed: if torch.export cannot trace the model.
    """
    if not isinstance(network, MultiExitNetwork):
        raise NetworkError(
            f"{type(network).__name__} cannot be cut into parts; expected a MultiExitNetwork, from "
            'attach_exits. Run this one with engine="eager".'
        )
    lengths = length_dims(x)
    fixed: list[tuple[int, ...]] = [()] * len(lengths)
    if not any_length or lengths == fixed:
        return _cut(network, x, fixed)
    try:
        return _cut(network, x, lengths)
    except NetworkError as error:
        log.info("token lengths stay those of the example: %s", error)
        return _cut(network, x, fixed)


def _cut(network: MultiExitNetwork, x: Any, lengths: Sequence[tuple[int, ...]]) -> Parts:
    """Export and cut, with these dimensions of the inputs as long as the sequence."""
    names = input_names(x)
    dims = _batch_dims(x)
    tensors = [tensor.detach() for tensor in _tensors(x).values()]
    # Exactly two samples: torch.export would take the 1 of a batch of one for a constant.
    both = _rows(tensors, dims, torch.arange(2) % batch_size_of(x))
    pools = pools_of(network, x)
    traced = _Traced(network, x, names, pools)
    free = [FreeDims(batch=dim, lengths=length) for dim, length in zip(dims, lengths, strict=True)]
    graph = _export(traced, type(network.backbone).__name__, both, free)
    whole = _whole(graph, names)
    _check_batch_of_one(traced, whole, _rows(both, dims, slice(1)))
    cut = _Cutting(graph, names, network.exit_names)
    wiring = cut.wiring()
    stages = cut.stages()
    with torch.no_grad():
        values = values_of(stages, wiring, both)
    heads: list[nn.Module | None] = []
    for head, pool, name, features in zip(
        network.heads, pools, network.exit_names, wiring.features, strict=False
    ):
        if pool is not None:
            # its stage has done the first layer
            head = Layers(*list(head.children())[1:])
        seen = FreeDims(batch=0, lengths=cut.length_dims()[features])
        exported = _export(_Alone(head), f"the head after {name}", [values[features]], [seen])
        heads.append(_whole(exported, ["features"]))
    return Parts(
        wiring=wiring,
        stages=stages,
        heads=[*heads, None],
        whole=whole,
        examples=values,
        length_dims=cut.length_dims(),
        exit_names=network.exit_names,
        num_classes=network.num_classes,
    )


def pools_of(network: MultiExitNetwork, x: Any) -> list[Pool | None]:
    """Return the pools of heads that stages compute, since only stages have the padding mask.

    Raises:
        NetworkError: if a head needs the mask after its first layer.
    """
    if network.mask_of(x) is None:
        return [None] * len(network.heads)
    pools: list[Pool | None] = []
    for head, layout, name in zip(network.heads, network.layouts, network.exit_names, strict=False):
        masked = layout != "ND" and takes_mask(head)
        first = head[0] if isinstance(head, Layers) else None
        if masked and not isinstance(first, Pool):
            raise NetworkError(
                f"the head after {name} cannot get the padding mask in an engine; expected a head "
                "that pools first, such as 'linear' or 'mlp'. engine=\"eager\" runs every head."
            )
        pools.append(first if masked and isinstance(first, Pool) else None)
    return pools


def input_names(x: Any) -> tuple[str, ...]:
    """Return names for the tensors in an input, in order.

    The name is "x" for a single tensor. A mapping's tensors are named by its keys, a tuple's are
    named "x0", "x1" and so on.
    """
    return tuple(_tensors(x))


def input_tensors(x: Any, names: Sequence[str]) -> list[Tensor]:
    """Return the tensors of an input in the order of these names.

    Raises:
        NetworkError: if the input does not have exactly the tensors with these names.
    """
    given = _tensors(x)
    if set(given) != set(names):
        raise NetworkError(
            f"the input has the tensors {', '.join(given) or '(none)'}; expected "
            f"{', '.join(names)}, as in the example with which the network was exported."
        )
    return [given[name] for name in names]


def values_of(
    stages: Sequence[nn.Module], wiring: Wiring, inputs: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Run all stages, and return all values by name, inputs included."""
    values = dict(zip(wiring.inputs, inputs, strict=True))
    for stage, takes, gives in zip(stages, wiring.takes, wiring.gives, strict=True):
        values |= zip(gives, stage(*(values[name] for name in takes)), strict=True)
    return values


def _tensors(x: Any) -> dict[str, Tensor]:
    return {name: value for name, value in _entries(x).items() if isinstance(value, Tensor)}


def _entries(x: Any) -> dict[str, Any]:
    if isinstance(x, Tensor):
        return {"x": x}
    if isinstance(x, Mapping):
        return {str(name): value for name, value in x.items()}
    if isinstance(x, (tuple, list)):
        return {f"x{index}": value for index, value in enumerate(x)}
    raise NetworkError(
        f"an input of type {type(x).__name__}; expected a tensor, or a mapping, tuple or list of "
        "tensors."
    )


def _batch_dims(x: Any) -> list[int | None]:
    """Return the batch dimension of each tensor, 0 or None."""
    size = batch_size_of(x)
    return [
        0 if value.dim() > 0 and value.shape[0] == size else None for value in _tensors(x).values()
    ]


def length_dims(x: Any) -> list[tuple[int, ...]]:
    """Return the dimensions of each tensor that are as long as the tokens.

    None without tokens.

    Tokens are whole numbers [B, T]. Tensors [B, T, ...] beside them, such as masks, go with them.
    """
    tensors = list(_tensors(x).values())
    whole = [not tensor.is_floating_point() and tensor.dim() == 2 for tensor in tensors]
    found = {tensor.shape[1] for tensor, is_whole in zip(tensors, whole, strict=True) if is_whole}
    # A length of 1 is not told from a size that is repeated.
    length = found.pop() if len(found) == 1 else 1
    size = batch_size_of(x)
    return [
        (1,) if length > 1 and tensor.dim() > 1 and tensor.shape[:2] == (size, length) else ()
        for tensor in tensors
    ]


def _rows(
    tensors: Sequence[Tensor], dims: Sequence[int | None], rows: Tensor | slice
) -> list[Tensor]:
    """Select rows of the tensors that have a batch dimension."""
    return [value if dim is None else value[rows] for value, dim in zip(tensors, dims, strict=True)]


def _check_batch_of_one(model: nn.Module, whole: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Check that the exported model, traced with two samples, is right for one.

    Raises:
        ExportFailed: if its output differs from the model's.
    """
    with evaluating(model), torch.no_grad(), without_fused_attention():
        wanted = model(*tensors)[0]
        given = whole(*tensors)
    if not torch.allclose(
        given, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()), equal_nan=True
    ):
        raise ExportFailed(
            "with one sample, the exported model's output differs from the model's (by up to "
            f"{float((given - wanted).abs().max()):.2g}), so the model treats a batch of one "
            'differently. engine="eager" can run it.'
        )


@torch.library.custom_op("impatient::mark", mutates_args=())
def _mark(features: Tensor, index: int) -> Tensor:  # noqa: ARG001  read off the graph
    """Mark the place of exit `index` in an exported graph.

    Marks are removed before anything runs.
    """
    return features.clone()


@_mark.register_fake
def _(features: Tensor, index: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(features)


_MARK = torch.ops.impatient.mark.default


class _Traced(nn.Module):
    """The backbone with positional tensors, returning its output and the marks.

    The marks are returned so that torch does not remove them.
    """

    def __init__(
        self,
        network: MultiExitNetwork,
        x: Any,
        names: Sequence[str],
        pools: Sequence[Pool | None],
    ) -> None:
        super().__init__()
        self.backbone = network.backbone
        # in a list: its heads are no part of this module
        self._network = [network]
        self._x = x
        self._names = names
        self._pools = pools

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        marks: list[Tensor] = []
        x = self._refilled(tensors)
        network = self._network[0]
        mask = network.mask_of(x)

        def visit(index: int, features: Tensor) -> None:
            pool = self._pools[index]
            marks.append(_mark(features if pool is None else pool(features, mask), index))

        output = output_tensor(
            tapped(self.backbone, x, network._plan().cuts, visit), network.output
        )
        return output, *marks

    def _refilled(self, tensors: Sequence[Tensor]) -> Any:
        if isinstance(self._x, Tensor):
            return tensors[0]
        filled = _entries(self._x) | dict(zip(self._names, tensors, strict=True))
        return filled if isinstance(self._x, Mapping) else tuple(filled.values())


class _Alone(nn.Module):
    """A head in the form of a backbone without exits."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        return (self.head(*tensors),)


@contextlib.contextmanager
def exporting(name: str) -> Iterator[None]:
    """Prepare for torch.export: no gradients, and attention without its fast path.

    Raises:
        ExportFailed: if the block fails.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        without_fused_attention(),
        warnings.catch_warnings(),
    ):
        # torch warns about its own use of deprecated names.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            yield
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ExportFailed(
                f"torch.export cannot trace {name}: {reason} Where control flow depends on the "
                "data, or the batch's size does not stay a variable (write x.shape[0], not "
                "len(x)), there is no graph to cut; "
                'engine="eager" runs every model.'
            ) from error


def any_size(dims: Sequence[FreeDims]) -> tuple[dict[int, Any], ...]:
    """Describe tensors with dimensions of any size to torch.export."""
    batch = torch.export.Dim("batch", min=1, max=65536)
    return tuple(
        ({} if free.batch is None else {free.batch: batch})
        # The model may bound a length, such as by its table of positions.
        | dict.fromkeys(free.lengths, torch.export.Dim.AUTO)
        for free in dims
    )


def _export(
    model: nn.Module, name: str, tensors: Sequence[Tensor], dims: Sequence[FreeDims]
) -> fx.GraphModule:
    """Export a model in eval mode as a functional graph.

    The graph takes batches of any size. Nodes that only check the inputs are removed.
    """
    # A tuple of one entry, because the forward takes *tensors.
    shapes = (any_size(dims),)
    with evaluating(model), exporting(name):
        exported = torch.export.export(
            model, tuple(tensors), dynamic_shapes=shapes, strict=False
        ).run_decompositions({})
    if exported.graph_signature.buffers_to_mutate:
        raise ExportFailed(
            f"{name} writes to its buffers "
            f"({', '.join(exported.graph_signature.buffers_to_mutate.values())}) in eval mode, "
            'which an exported stage cannot do; engine="eager" runs it.'
        )
    graph: fx.GraphModule = exported.module()
    _clean(graph.graph)
    return graph


def _clean(graph: fx.Graph) -> None:
    """Remove nodes that change no value: copies, guards and assertions.

    A functional graph does not need copies.
    """
    for node in reversed(graph.nodes):
        if node.target is torch.ops.aten.clone.default and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _output_of(graph: fx.Graph) -> fx.Node:
    """Return the node of the model's output, the first that its graph returns."""
    given: Any = next(iter(reversed(graph.nodes))).args[0]
    output: fx.Node = given[0]
    return output


def _is_size(node: fx.Node) -> bool:
    """Tell whether a node's value is a number and not a tensor."""
    return isinstance(
        node.meta.get("val"), (torch.SymInt, torch.SymBool, torch.SymFloat, int, float, bool)
    )


class _Cutting:
    """A marked graph, with the stage that each of its nodes belongs to.

    The inputs belong to no stage (-1).
    """

    def __init__(
        self, module: fx.GraphModule, inputs: Sequence[str], exit_names: Sequence[str]
    ) -> None:
        self._module = module
        self._inputs = dict(
            zip(
                (node for node in module.graph.nodes if node.op == "placeholder"),
                inputs,
                strict=True,
            )
        )
        self._stage_of = dict.fromkeys(self._inputs, -1)
        self._features: list[fx.Node] = []
        self._stages: list[list[fx.Node]] = [[]]
        for node in module.graph.nodes:
            if node.target is _MARK:
                self._features.append(node.args[0])
                self._stages.append([])
            elif node.op not in ("placeholder", "get_attr", "output"):
                self._stage_of[node] = len(self._stages) - 1
                self._stages[-1].append(node)
        self._features.append(_output_of(module.graph))
        self._check(exit_names)
        self._batch = next(
            size for node in self._inputs if (size := self._batch_of(node)) is not None
        )
        # Symbols of lengths: those of the inputs that are not the batch.
        self._lengths = {
            size.node.expr
            for node in self._inputs
            for size in node.meta["val"].shape
            if isinstance(size, torch.SymInt) and size.node.expr != self._batch
        }
        self._takes = [self._needed(index) for index in range(len(self._stages))]
        self._gives = [self._asked_for(index) for index in range(len(self._stages))]

    def wiring(self) -> Wiring:
        """Return the connections between the stages."""
        values = [*self._inputs, *itertools.chain.from_iterable(self._gives)]
        return Wiring(
            inputs=tuple(self._inputs.values()),
            takes=tuple(tuple(map(self._name, nodes)) for nodes in self._takes),
            gives=tuple(tuple(map(self._name, nodes)) for nodes in self._gives),
            features=tuple(map(self._name, self._features)),
            batch_dims={self._name(node): self._batch_dim(node) for node in values},
        )

    def length_dims(self) -> dict[str, tuple[int, ...]]:
        """Return the dimensions of each value that are as long as the sequence."""
        values = [*self._inputs, *itertools.chain.from_iterable(self._gives)]
        return {self._name(node): self._lengths_of(node) for node in values}

    def _lengths_of(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(
            dim
            for dim, size in enumerate(node.meta["val"].shape)
            if isinstance(size, torch.SymInt) and size.node.expr in self._lengths
        )

    def stages(self) -> list[fx.GraphModule]:
        """Build one module per stage."""
        return [self._build(index) for index in range(len(self._stages))]

    def _check(self, exit_names: Sequence[str]) -> None:
        if len(self._features) != len(exit_names):
            raise ExitNotReached(
                f"the exported model reaches {len(self._features) - 1} of {len(exit_names) - 1} "
                "early exits; export with an example that reaches all of them, or attach exits "
                "after modules that every input calls."
            )
        for name, nodes in zip(exit_names, self._stages, strict=True):
            if not nodes:
                raise NetworkError(
                    f"nothing is computed between the exit at {name} and the one before it; attach "
                    "only one of them."
                )

    def _name(self, node: fx.Node) -> str:
        return (
            self._inputs[node]
            if node in self._inputs
            else f"stage{self._stage_of[node]}_{node.name}"
        )

    def _batch_of(self, node: fx.Node) -> Any:
        """Return the symbol of a node's first dimension, None if fixed."""
        shape = node.meta["val"].shape
        return shape[0].node.expr if len(shape) and isinstance(shape[0], torch.SymInt) else None

    def _batch_dim(self, node: fx.Node) -> int | None:
        sizes = [
            size.node.expr if isinstance(size, torch.SymInt) else None
            for size in node.meta["val"].shape
        ]
        if self._batch in sizes:
            return sizes.index(self._batch)
        if any(size is not None and size not in self._lengths for size in sizes):
            raise NetworkError(
                f"the value {node.name} of shape {tuple(node.meta['val'].shape)} crosses an exit "
                "with samples and positions mixed in one dimension, so that no sample could be "
                "removed from the batch; attach the exit elsewhere."
            )
        return None

    def _is_batch_size(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return (
            node.target is _SIZE
            and isinstance(value, torch.SymInt)
            and value.node.expr == self._batch
        )

    def _needed(self, index: int) -> list[fx.Node]:
        """Return the values that a stage takes, in order of computation."""
        found: dict[fx.Node, None] = {}
        sized = False

        def need(node: fx.Node) -> None:
            nonlocal sized
            if self._is_batch_size(node):
                sized = True
            elif node.op == "get_attr" or self._stage_of[node] == index:
                return
            elif not _is_size(node):
                found[node] = None
            else:
                # A number is computed again in this stage, from its own sources.
                for source in node.all_input_nodes:
                    need(source)

        for node in self._stages[index]:
            for source in node.all_input_nodes if not self._is_batch_size(node) else ():
                need(source)
        if sized and all(self._batch_dim(node) is None for node in found):
            found[next(node for node in self._inputs if self._batch_dim(node) is not None)] = None
        order = {node: place for place, node in enumerate(self._stage_of)}
        return sorted(found, key=order.__getitem__)

    def _asked_for(self, index: int) -> list[fx.Node]:
        """Return the values of a stage that later stages or exits take."""
        wanted = {*itertools.chain.from_iterable(self._takes[index + 1 :]), *self._features}
        return [node for node in self._stages[index] if node in wanted]

    def _build(self, index: int) -> fx.GraphModule:
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        for node in self._takes[index]:
            made[node] = graph.placeholder(self._name(node))
            made[node].meta = dict(node.meta)

        def copied(node: fx.Node) -> fx.Node:
            if node not in made:
                made[node] = (
                    self._batch_size(graph, index, made)
                    if self._is_batch_size(node)
                    else graph.node_copy(node, copied)
                )
            return made[node]

        for node in self._stages[index]:
            copied(node)
        graph.output(tuple(made[node] for node in self._gives[index]))
        _clean(graph)
        return fx.GraphModule(self._module, graph, f"Stage{index}")

    def _batch_size(self, graph: fx.Graph, index: int, made: Mapping[fx.Node, fx.Node]) -> fx.Node:
        holder = next(node for node in self._takes[index] if self._batch_dim(node) is not None)
        return graph.call_function(_SIZE, (made[holder], self._batch_dim(holder)))


def _whole(module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """Build the same graph without marks, which returns only the output."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    unnamed = iter(names)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            made[node] = graph.placeholder(next(unnamed))
            made[node].meta = dict(node.meta)
        elif node.op != "output" and node.target is not _MARK:
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(made[_output_of(module.graph)])
    return fx.GraphModule(module, graph, "Whole")
