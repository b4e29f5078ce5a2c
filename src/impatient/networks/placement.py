"""Find places for exits by structure and measured cost.

The names of a library's modules are never used, because libraries rename them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from impatient.checks import as_number
from impatient.errors import AmbiguousCut, CutOrderError, ExitNotFound, HeadError, NetworkError
from impatient.inputs import (
    OutputName,
    batch_size_of,
    call_model,
    evaluating,
    first_tensor,
    output_tensor,
    resized,
)
from impatient.networks.heads import guess_layout
from impatient.networks.stages import Cut
from impatient.trees import leaves, map_leaves

log = logging.getLogger(__name__)

_CONTAINERS = (nn.Sequential, nn.ModuleList)
# Share of the total time by which an exit may miss its place. With less, exits would be placed
# inside blocks whenever the machine is busy.
_FAR = 0.2
# Engines whose networks are written to files.
WRITTEN = ("onnxruntime", "openvino", "onnxruntime-session", "openvino-session", "aoti")
ENGINES = ("eager", "compile", *WRITTEN)
# Engines that write every tensor that crosses a cut, and fuse nothing across it.
CUT_ENGINES = ("compile", "onnxruntime", "openvino", "aoti")
# The place that hands on most bytes is as bad as missing the even place by this share of a stage.
_PRICE = 0.25
_SILENT = (
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.ELU,
    nn.Tanh,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.MaxPool1d,
)


@dataclass(frozen=True, slots=True)
class Trace:
    """Module calls of one forward pass on an example, in order.

    Attributes:
        ended_s: time from the start to the end of each call, in seconds, by module name and number
            of the call.
        features: output of each call, by module name and number of the call.
        total_s: time of the forward pass, in seconds.
    """

    ended_s: Mapping[tuple[str, int], float]
    features: Mapping[tuple[str, int], Tensor]
    total_s: float

    def calls(self, name: str) -> int:
        return sum(1 for module, _ in self.ended_s if module == name)

    def cut(self, name: str, call: int) -> Cut:
        return Cut(name, call, numbered=self.calls(name) > 1)


def trace(model: nn.Module, x: Any, names: Sequence[str], *, features: bool = True) -> Trace:
    """Run a model once, and record the calls of the named modules.

    The model runs in eval mode and without gradients.

    Args:
        model: a model.
        x: an example input.
        names: names of the modules whose calls are recorded.
        features: whether to keep a copy of each output; False for exact times.
    """
    ended: dict[tuple[str, int], float] = {}
    outputs: dict[tuple[str, int], Tensor] = {}

    def record(name: str, call: int, output: Any) -> None:
        ended[name, call] = time.perf_counter()
        if features:
            # NetworkError: the output has no tensor, so no exit can be attached here.
            with contextlib.suppress(NetworkError):
                outputs[name, call] = first_tensor(output).detach().clone()

    with evaluating(model), torch.no_grad(), _at_calls(model, names, record):
        begin = time.perf_counter()
        call_model(model, x)
        total = time.perf_counter() - begin
    return Trace({key: at - begin for key, at in ended.items()}, outputs, total)


@contextlib.contextmanager
def _at_calls(
    model: nn.Module, names: Iterable[str], visit: Callable[[str, int, Any], Any]
) -> Iterator[None]:
    """Call `visit(name, call, output)` after every call of the named modules.

    What it returns replaces the output, unless it is None.
    """
    calls: Counter[str] = Counter()

    def visited(name: str, output: Any) -> Any:
        calls[name] += 1
        return visit(name, calls[name] - 1, output)

    with contextlib.ExitStack() as hooks:
        for name in names:
            hook = model.get_submodule(name).register_forward_hook(
                lambda _m, _a, output, name=name: visited(name, output)
            )
            hooks.callback(hook.remove)
        yield


def resolve(model: nn.Module, x: Any, after: Sequence[str | Cut]) -> list[Cut]:
    """Turn module names from a user into cuts, in running order.

    A cut stands for itself; a name does not say which call is meant.

    Raises:
        ExitNotFound: if the model has no module of a name, or the example never calls it.
        AmbiguousCut: if a module is called several times and the name does not say which call.
        CutOrderError: if the names are not in running order, or one is named twice.
    """
    modules = dict(model.named_modules())
    wrong = [each for each in after if not isinstance(each, str | Cut)]
    if wrong:
        raise ExitNotFound(
            f"after={list(after)!r} holds {wrong[0]!r}; expected names of modules, such as "
            f"{', '.join(map(repr, _similar('', model)[:4]))}."
        )
    wanted = [
        (each.module, each.call) if isinstance(each, Cut) else Cut.parse(each) for each in after
    ]
    aliases = dict(model.named_modules(remove_duplicate=False))
    first_names = {id(module): name for name, module in modules.items()}
    wanted = [
        (first_names[id(aliases[name])] if name in aliases else name, call) for name, call in wanted
    ]
    for name, _ in wanted:
        if name not in modules or name == "":
            raise ExitNotFound(
                f"no module {name!r} in {type(model).__name__}; candidates: "
                f"{', '.join(_similar(name, model)) or 'none'}."
            )
    traced = trace(model, x, sorted({name for name, _ in wanted}))
    # the text of a given cut stays, as other files may have it
    cuts = [
        replace(cut, numbered=each.numbered) if isinstance(each, Cut) else cut
        for each, cut in zip(
            after, (_one_cut(name, call, traced) for name, call in wanted), strict=True
        )
    ]
    order = list(traced.ended_s)
    running = sorted(cuts, key=lambda cut: order.index((cut.module, cut.call)))
    if cuts != running or len(set(cuts)) < len(cuts):
        right = list(dict.fromkeys(str(cut) for cut in running))
        raise CutOrderError(
            f"exits after {list(map(str, after))}; expected each once, from shallow to deep. In "
            f"running order: {right}."
        )
    return cuts


def _one_cut(name: str, call: int | None, traced: Trace) -> Cut:
    calls = traced.calls(name)
    if calls == 0:
        raise ExitNotFound(
            f"module {name!r} exists, but the example never calls it; choose one that every input "
            "calls."
        )
    if call is None and calls > 1:
        choices = ", ".join(f"{name}@{index}" for index in range(calls))
        raise AmbiguousCut(
            f"module {name!r} is called {calls} times in one pass; say after which call: {choices}."
        )
    if call is not None and call >= calls:
        raise ExitNotFound(
            f"module {name!r} is called {calls} times on the example; there is no {name}@{call}."
        )
    return traced.cut(name, call or 0)


def _similar(name: str, model: nn.Module) -> list[str]:
    """Return names that a user may have meant.

    These are names of similar spelling, then outer modules, then blocks at which exits can be
    placed automatically.
    """
    import difflib

    names = [entry for entry, _ in model.named_modules() if entry]
    blocks = [entry for level in _levels(model) for entry in level]
    top = [entry for entry in names if "." not in entry]
    return list(dict.fromkeys([*difflib.get_close_matches(name, names, n=4), *top, *blocks]))[:12]


def choose(
    model: nn.Module,
    x: Any,
    count: int,
    repeats: int = 5,
    *,
    output: OutputName = None,
    engine: str = "eager",
) -> list[Cut]:
    """Place count - 1 cuts at even shares of measured time.

    The cuts are among the outermost blocks of the model's repeated structure, if there are enough
    and no share is missed by more than a fifth of the time. Otherwise they are among the blocks
    inside these, if that is at least twice as near to the even shares. Blocks whose features do not
    affect the output are left out: those on a side path or after the last use of their features.
    For an engine that is cut into stages, of places about as near the one is taken at which fewer
    bytes cross.

    Raises:
        ExitNotFound: if the model has fewer places than that.
    """
    if not as_number(count) >= 1:
        raise ExitNotFound(
            f"count={count!r}; expected at least 1 exit (the last exit is the backbone's output)."
        )
    if count == 1:
        return []
    chosen: list[Cut] = []
    most: list[Cut] = []
    miss = float("inf")
    for level in _levels(model):
        usable = _usable(model, x, level)
        most = max(most, usable, key=len)
        if len(usable) < count - 1:
            continue
        shares = _shares(model, x, usable, repeats)
        prices = _prices(model, x, usable, count) if engine in CUT_ENGINES else [0.0] * len(usable)
        places = list(zip(usable, shares, prices, strict=True))
        cuts, missed = _evenly(model, x, places, count, output)
        if missed < miss / 2:
            chosen = cuts
            miss = missed
        if miss <= _FAR:
            break
    if not chosen:
        raise ExitNotFound(
            f"{type(model).__name__} has {len(most)} places for early exits that could be found by "
            f"structure ({', '.join(map(str, most)) or 'none'}); asked for {count - 1}. Lower "
            f"count, or name modules with after=[...].{_passed_over(model, x)}"
        )
    return chosen


def every(model: nn.Module, x: Any, period: int) -> list[Cut]:
    """Place exits a fixed number of blocks apart.

    They are counted back from the last block. Let L be the number of blocks: calls of the outermost
    repeated blocks whose features a head can read. The first cut is after the block of index
    (L - 1) mod period, and more follow every `period` blocks. There is none after the last block,
    L - 1, because the backbone's output follows it. With that output this makes
    1 + (L - 1) // period exits. Nothing is measured.

    Args:
        model: a model.
        x: an example input.
        period: number of blocks from one exit to the next, from 1 to L - 1.
    Raises:
        ExitNotFound: if the period is below 1, or leaves no early exit.
    Source:
        Anytime Neural Networks (Hu et al.), the prediction period s ("stack-s").
    Example:
        >>> blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(6)]
        >>> toy = nn.Sequential(*blocks, nn.Linear(8, 3))
        >>> [str(cut) for cut in every(toy, torch.zeros(1, 8), period=2)]
        ['1', '3']
    """
    levels = (_readable(model, x, trace(model, x, names)) for names in _levels(model))
    blocks = next((level for level in levels if len(level) > 1), [])
    if not blocks:
        raise ExitNotFound(
            f"{type(model).__name__} has no repeated blocks to count a period in; name modules "
            "with after=[...]."
        )
    if not 1 <= period < len(blocks):
        raise ExitNotFound(
            f"a period of {period} blocks; {type(model).__name__} has {len(blocks)} that could be "
            f"found by structure ({', '.join(map(str, blocks))}); expected 1 to "
            f"{len(blocks) - 1}, or modules named with after=[...]."
        )
    return blocks[(len(blocks) - 1) % period : -1 : period]


def every_call(model: nn.Module, x: Any, name: str) -> list[Cut]:
    """Place an exit after every call of one module but the last.

    Args:
        model: a model with a loop.
        x: an example input, on which calls are counted.
        name: name of the module that the loop calls.
    Raises:
        ExitNotFound: if there is no such module, or it is called only once.
    """
    resolve(model, x, [f"{name}@0"])
    calls = trace(model, x, [name], features=False).calls(name)
    if calls == 1:
        raise ExitNotFound(
            f"module {name!r} is called once on the example; expected several calls, each but the "
            f"last an exit. For one exit say after=[{name!r}]."
        )
    return resolve(model, x, [f"{name}@{call}" for call in range(calls - 1)])


def _readable(model: nn.Module, x: Any, traced: Trace) -> list[Cut]:
    """Return the calls whose features a head can read, in running order."""
    modules = dict(model.named_modules())
    batch = batch_size_of(x)
    shapes = shapes_with_one_more(model, x, sorted({name for name, _ in traced.features}))
    return [
        traced.cut(name, call)
        for (name, call), features in traced.features.items()
        if not obstacle(features, modules[name], batch, shapes.get((name, call)))
    ]


def shapes_with_one_more(
    model: nn.Module, x: Any, names: Sequence[str]
) -> Mapping[tuple[str, int], tuple[int, ...]]:
    """Find the shapes of the modules' outputs for one sample more than an example has.

    They tell which dimension is the batch where others are as long. There are none if the model
    takes no other number of samples.
    """
    try:
        more = trace(model, resized(x, batch_size_of(x) + 1), names)
    except Exception as error:
        # Whatever a model raises that fits one batch size.
        log.info("batch dimensions are judged by the example alone: %s", error)
        return {}
    return {
        key: tuple(features.shape)
        for key, features in more.features.items()
        if not features.is_nested
    }


def obstacle(
    features: Tensor, module: nn.Module, batch: int, with_one_more: tuple[int, ...] | None
) -> str:
    """Return why no head can read these features, or an empty string.

    Args:
        features: output of the module on an example.
        module: module that gave them.
        batch: number of samples of the example.
        with_one_more: shape of the same features for one sample more; None if unknown.
    """
    try:
        guess_layout(features, module)
    except HeadError as error:
        return str(error)
    shape = tuple(features.shape)
    more = with_one_more or (batch + 1, *shape[1:])
    if shape[0] == batch and more[0] == batch + 1:
        return ""
    for dim, sizes in enumerate(zip(shape, more, strict=False)):
        if sizes == (batch, batch + 1):
            return (
                f"its features, of shape {shape}, have the samples in dimension {dim}; expected "
                "them in the first. Build the layer with batch_first=True, or transpose its input "
                "before it."
            )
    return (
        f"its features, of shape {shape}, do not begin with the batch size {batch}; expected one "
        "row per sample."
    )


def _passed_over(model: nn.Module, x: Any) -> str:
    """Say which block is the first that no head can read, and why.

    The sentence follows other sentences. It is empty if there is no such block.
    """
    modules = dict(model.named_modules())
    for level in _levels(model):
        shapes = shapes_with_one_more(model, x, level)
        for (name, call), features in trace(model, x, level).features.items():
            reason = obstacle(features, modules[name], batch_size_of(x), shapes.get((name, call)))
            if reason:
                return f" Passed over, for one: {Cut(name, call)}: {reason}"
    return ""


def _usable(model: nn.Module, x: Any, names: Sequence[str]) -> list[Cut]:
    """Return the calls of blocks after which an exit may be placed.

    They are in running order. A head can read their features, and the model still computes
    something after them.
    """
    traced = trace(model, x, names)
    runs = [traced, *(trace(model, x, names, features=False) for _ in range(2))]

    # The median, because a single run may have been interrupted.
    def share(cut: Cut) -> float:
        return statistics.median(run.ended_s[cut.module, cut.call] / run.total_s for run in runs)

    return [cut for cut in _readable(model, x, traced) if share(cut) < 0.995]


def _shares(model: nn.Module, x: Any, cuts: Sequence[Cut], repeats: int) -> list[float]:
    """Measure the share of the total time that has passed at each cut.

    Each stretch between cuts takes the least of several runs, of which the first does not count:
    an interruption then spoils one stretch of one run, not all that follows.
    """
    names = sorted({cut.module for cut in cuts})
    runs = [trace(model, x, names, features=False) for _ in range(repeats + 1)][1:]
    ends = [[*(run.ended_s[cut.module, cut.call] for cut in cuts), run.total_s] for run in runs]
    stretches = [[end - begin for begin, end in itertools.pairwise([0.0, *row])] for row in ends]
    passed = list(itertools.accumulate(map(min, zip(*stretches, strict=True))))
    return [each / passed[-1] for each in passed[:-1]]


def _prices(model: nn.Module, x: Any, cuts: Sequence[Cut], count: int) -> list[float]:
    """Return what each cut costs an engine, as a squared distance from the even place.

    ONNX Runtime changes the layout of what crosses, and back, so cuts cost in proportion to bytes.
    """
    traced = trace(model, x, sorted({cut.module for cut in cuts}))
    sizes = [traced.features[cut.module, cut.call].nbytes for cut in cuts]
    return [(_PRICE / count) ** 2 * size / max(sizes) for size in sizes]


def _evenly(
    model: nn.Module,
    x: Any,
    places: Sequence[tuple[Cut, float, float]],
    count: int,
    output: OutputName,
) -> tuple[list[Cut], float]:
    """Return the cuts nearest to even shares, and the largest distance from these.

    Cuts that do not affect the output are left out. If too few are left, there are no cuts and the
    distance is infinite.

    Args:
        model: a model.
        x: an example input.
        places: cut, share of the time and price of each place.
        count: number of stages.
        output: which part of the model's output is its answer.
    """
    cuts = [cut for cut, _, _ in places]
    left = list(places)
    while len(left) >= count - 1:
        _, shares, prices = zip(*left, strict=True)
        picked = [left[index] for index in _even(shares, count, prices)]
        idle = _idle(model, x, [cut for cut, _, _ in picked], cuts, output)
        if not idle:
            missed = max(
                abs(share - target / count) for target, (_, share, _) in enumerate(picked, start=1)
            )
            return [cut for cut, _, _ in picked], missed
        left = [place for place in left if place[0] not in idle]
    return [], float("inf")


def _idle(
    model: nn.Module, x: Any, picked: Sequence[Cut], cuts: Sequence[Cut], name: OutputName
) -> list[Cut]:
    """Return the picked cuts whose features do not affect the output.

    If no cut at all affects the output (a last layer of zeros), none is returned.
    """
    with evaluating(model), torch.no_grad():
        untouched = output_tensor(call_model(model, x), name)
        idle = [cut for cut in picked if not _matters(model, x, [cut], untouched, name)]
        return idle if idle and _matters(model, x, cuts, untouched, name) else []


def _matters(
    model: nn.Module, x: Any, cuts: Sequence[Cut], untouched: Tensor, output_name: OutputName
) -> bool:
    """Tell whether changing the features at these cuts changes the output.

    It is true where features cannot be replaced.
    """
    replaced: list[Tensor] = []

    def disturb(name: str, call: int, output: Any) -> Any:
        if Cut(name, call) not in cuts:
            return None
        features = first_tensor(output)
        waves = torch.arange(features.numel(), device=features.device).cos().view_as(features)
        other = features + features.abs().mean() * waves.to(features.dtype)
        replaced.extend(leaf for leaf in leaves(output) if leaf is features)
        return map_leaves(lambda leaf: other if leaf is features else leaf, output)

    with _at_calls(model, {cut.module for cut in cuts}, disturb):
        output = output_tensor(call_model(model, x), output_name)
    return not replaced or not torch.equal(output, untouched)


def _even(
    shares: Sequence[float], count: int, prices: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Return increasing indices of the shares nearest to 1/count, 2/count, ...

    Args:
        shares: share of the time at each place, increasing.
        count: number of stages.
        prices: what each place costs, as a squared distance; by default nothing.
    """
    targets = [index / count for index in range(1, count)]
    prices = [0.0] * len(shares) if prices is None else prices
    # Dynamic programming over (targets, shares), for the increasing assignment with the least sum
    # of squared distances and prices.
    best: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())] * (len(shares) + 1)]
    for row, target in enumerate(targets, start=1):
        line: list[tuple[float, tuple[int, ...]]] = [(float("inf"), ())]
        for column, (share, price) in enumerate(zip(shares, prices, strict=True), start=1):
            before, chosen = best[row - 1][column - 1]
            taken = (before + (share - target) ** 2 + price, (*chosen, column - 1))
            line.append(min(line[-1], taken, key=lambda entry: entry[0]))
        best.append(line)
    return best[-1][-1][1]


def _levels(model: nn.Module) -> Iterator[list[str]]:
    """Yield lists of block names, from coarse to fine.

    The outermost repeated blocks come first, then the blocks inside them, and so on.
    """
    blocks = list(_blocks("", model))
    while blocks:
        yield [name for name, _ in blocks]
        inner = [list(_blocks(f"{name}.", block)) or [(name, block)] for name, block in blocks]
        finer = list(itertools.chain.from_iterable(inner))
        if finer == blocks:
            break
        blocks = finer
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _SILENT)
        and type(model.get_submodule(name.rpartition(".")[0])) is nn.Sequential
    ]
    if layers:
        yield layers


def _blocks(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost blocks of a module.

    Blocks are composite members of plain containers, and composite siblings of one class.
    """
    composite = _composite_children(module)
    kinds = [type(child) for _, child in composite if type(child) not in _CONTAINERS]
    repeated = len(set(kinds)) < len(kinds)
    for name, child in composite:
        if type(child) in _CONTAINERS and _composite_children(child):
            yield from _blocks(f"{prefix}{name}.", child)
        elif type(module) in _CONTAINERS or repeated:
            yield f"{prefix}{name}", child
        else:
            yield from _blocks(f"{prefix}{name}.", child)


def _composite_children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the children that have children themselves."""
    return [(name, child) for name, child in module.named_children() if list(child.children())]
