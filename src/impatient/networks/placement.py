"""Where exits may go and where they go by themselves: by structure and measured cost, never by a
library's module names.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from impatient.errors import AmbiguousCut, CutOrderError, ExitNotFound, HeadError, NetworkError
from impatient.networks.heads import guess_layout
from impatient.networks.stages import Cut, batch_size_of, call_model, first_tensor, output_tensor

_CONTAINERS = (nn.Sequential, nn.ModuleList)
# of the whole time; less would send exits into the insides of blocks wherever the machine is busy
_FAR = 0.2
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
    """What one forward pass on the example called, in order: names with call numbers, when each
    ended, what it gave.
    """

    ended_s: Mapping[tuple[str, int], float]
    features: Mapping[tuple[str, int], Tensor]
    total_s: float

    def calls(self, name: str) -> int:
        return sum(1 for module, _ in self.ended_s if module == name)


def trace(model: nn.Module, x: Any, names: Sequence[str], *, features: bool = True) -> Trace:
    """Run the model once in eval mode without gradients and note the named modules' calls, end
    times and outputs.

    Args:
        features: keep a copy of each output; leave it out when the times matter.
    """
    ended: dict[tuple[str, int], float] = {}
    outputs: dict[tuple[str, int], Tensor] = {}
    calls: Counter[str] = Counter()
    modules = dict(model.named_modules())

    def note(name: str, output: Any) -> None:
        key = (name, calls[name])
        calls[name] += 1
        ended[key] = time.perf_counter()
        if features:
            # no tensor in it: it can be listed, but not cut
            with contextlib.suppress(NetworkError):
                outputs[key] = first_tensor(output).detach().clone()

    hooks = [
        modules[name].register_forward_hook(lambda _m, _a, output, name=name: note(name, output))
        for name in names
    ]
    try:
        with evaluating(model), torch.no_grad():
            begin = time.perf_counter()
            call_model(model, x)
            total = time.perf_counter() - begin
    finally:
        for hook in hooks:
            hook.remove()
    return Trace({key: at - begin for key, at in ended.items()}, outputs, total)


class HasModes(Protocol):
    """A module, as far as its train and eval modes are concerned."""

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> Any: ...


class evaluating:  # noqa: N801  reads as a phrase: with evaluating(model)
    """Put a model in eval mode and, on leaving, every module back in the mode it was in."""

    def __init__(self, model: HasModes) -> None:
        self._modes = {module: module.training for module in model.modules()}
        self._model = model

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self._modes.items():
            module.training = mode


def resolve(model: nn.Module, x: Any, after: Sequence[str]) -> list[Cut]:
    """Turn names given by a user into cuts, in the order in which the model runs.

    Raises:
        ExitNotFound: if a name is no module of the model, or the example never calls it.
        AmbiguousCut: if a module is called several times and the name does not say which call.
        CutOrderError: if the names are not in running order, or one is named twice.
    """
    modules = dict(model.named_modules())
    wanted = [Cut.parse(name) for name in after]
    for name, _ in wanted:
        if name not in modules or name == "":
            raise ExitNotFound(
                f"no module {name!r} in {type(model).__name__}; candidates: "
                f"{', '.join(_similar(name, model)) or 'none'}."
            )
    traced = trace(model, x, sorted({name for name, _ in wanted}))
    cuts = [_one_cut(name, call, traced) for name, call in wanted]
    order = list(traced.ended_s)
    running = sorted(cuts, key=lambda cut: order.index((cut.module, cut.call)))
    if cuts != running or len(set(cuts)) < len(cuts):
        right = list(dict.fromkeys(str(cut) for cut in running))
        raise CutOrderError(
            f"exits go from shallow to deep, each once; given: {list(after)}; in running order: "
            f"{right}."
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
    return Cut(name, call or 0)


def _similar(name: str, model: nn.Module) -> list[str]:
    """Names a user may have meant: close in spelling, or else the blocks an exit would go to by
    itself.
    """
    import difflib

    names = [entry for entry, _ in model.named_modules() if entry]
    blocks = [entry for level in _levels(model) for entry in level]
    top = [entry for entry in names if "." not in entry]
    return list(dict.fromkeys([*difflib.get_close_matches(name, names, n=4), *top, *blocks]))[:12]


def choose(model: nn.Module, x: Any, count: int, repeats: int = 5) -> list[Cut]:
    """Place count - 1 cuts at even shares of measured time among the blocks of the model's repeated
    structure.

    Among the outermost blocks, if there are enough and no share is missed by more than a fifth of
    the time; otherwise among the blocks inside them, if those come at least twice as near. Blocks
    on whose features the output does not hang, on a side path or after the last use of what they
    give, are left out.

    Raises:
        ExitNotFound: if the model has fewer places than that.
    """
    if count < 1:
        raise ExitNotFound(
            f"count={count}; expected at least 1 exit (the last exit is the backbone's own output)."
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
        cuts, missed = _evenly(model, x, usable, _shares(model, x, usable, repeats), count)
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
    """Place exits a fixed number of blocks apart, counted back from the last block, which the
    backbone's own output follows.

    Of L blocks (calls of the outermost repeated blocks whose features a head can read) those of
    index (L - 1) mod period, + period, ... are cut; not L - 1, the last. With the output that makes
    1 + (L - 1) // period exits, placed without timing.

    Args:
        x: an example input.
        period: blocks from one exit to the next, 1 to L - 1.
    Raises:
        ExitNotFound: if the period is below 1, or leaves no early exit.
    Source:
        Anytime Neural Networks (Hu et al.), the prediction period s ("stack-s").
    Example:
        >>> toy = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(6)), nn.Linear(8, 3))
        >>> [str(cut) for cut in every(toy, torch.zeros(1, 8), period=2)]
        ['1', '3']
    """
    levels = (_readable(model, x, trace(model, x, names)) for names in _levels(model))
    blocks = next((level for level in levels if len(level) > 1), [])
    if not 1 <= period < len(blocks):
        raise ExitNotFound(
            f"a period of {period} blocks; {type(model).__name__} has {len(blocks)} that could be "
            f"found by structure ({', '.join(map(str, blocks)) or 'none'}); expected 1 to "
            f"{len(blocks) - 1}, or modules named with after=[...]."
            if len(blocks) > 1
            else (
                f"{type(model).__name__} has no repeated blocks to count a period in; name modules "
                "with after=[...]."
            )
        )
    return blocks[(len(blocks) - 1) % period : -1 : period]


def _readable(model: nn.Module, x: Any, traced: Trace) -> list[Cut]:
    """Calls whose features a head can read, in running order."""
    modules = dict(model.named_modules())
    batch = batch_size_of(x)
    return [
        Cut(name, call)
        for (name, call), features in traced.features.items()
        if not _obstacle(features, modules[name], batch)
    ]


def _obstacle(features: Tensor, module: nn.Module, batch: int) -> str:
    """Why no head can read these features; empty where one can."""
    try:
        guess_layout(features, module)
    except HeadError as error:
        return str(error)
    if features.shape[0] != batch:
        return (
            f"its features, of shape {tuple(features.shape)}, do not begin with the batch size "
            f"{batch}."
        )
    return ""


def _passed_over(model: nn.Module, x: Any) -> str:
    """The first block that no head can read and why, as a sentence to follow others; empty where
    there is none.
    """
    modules = dict(model.named_modules())
    for level in _levels(model):
        for (name, call), features in trace(model, x, level).features.items():
            obstacle = _obstacle(features, modules[name], batch_size_of(x))
            if obstacle:
                return f" Passed over, for one: {Cut(name, call)}: {obstacle}"
    return ""


def _usable(model: nn.Module, x: Any, names: Sequence[str]) -> list[Cut]:
    """Calls of blocks whose features a head can read and that are not the last thing the model
    does, in running order.
    """
    traced = trace(model, x, names)
    runs = [traced, *(trace(model, x, names, features=False) for _ in range(2))]

    # the median: one run may have been held up
    def share(cut: Cut) -> float:
        return statistics.median(run.ended_s[cut.module, cut.call] / run.total_s for run in runs)

    return [cut for cut in _readable(model, x, traced) if share(cut) < 0.995]


def _shares(model: nn.Module, x: Any, cuts: Sequence[Cut], repeats: int) -> list[float]:
    """Share of the whole time that has passed at each cut; the least of several runs, the first
    left out.
    """
    names = sorted({cut.module for cut in cuts})
    runs = [trace(model, x, names, features=False) for _ in range(repeats + 1)][1:]
    total = min(run.total_s for run in runs)
    return [min(run.ended_s[cut.module, cut.call] for run in runs) / total for cut in cuts]


def _evenly(
    model: nn.Module, x: Any, cuts: Sequence[Cut], shares: Sequence[float], count: int
) -> tuple[list[Cut], float]:
    """Cuts nearest to even shares without those that do not matter, and how far the farthest is;
    none, infinity if too few.
    """
    left = list(zip(cuts, shares, strict=True))
    while len(left) >= count - 1:
        picked = [left[index] for index in _even([share for _, share in left], count)]
        idle = _idle(model, x, [cut for cut, _ in picked], cuts)
        if not idle:
            missed = max(
                abs(share - target / count) for target, (_, share) in enumerate(picked, start=1)
            )
            return [cut for cut, _ in picked], missed
        left = [(cut, share) for cut, share in left if cut not in idle]
    return [], float("inf")


def _idle(model: nn.Module, x: Any, picked: Sequence[Cut], cuts: Sequence[Cut]) -> list[Cut]:
    """Those picked on whose features the output does not hang; none where it hangs on no cut at all
    (a head of zeros).
    """
    with evaluating(model), torch.no_grad():
        untouched = output_tensor(call_model(model, x))
        idle = [cut for cut in picked if not _matters(model, x, [cut], untouched)]
        return idle if idle and _matters(model, x, cuts, untouched) else []


def _matters(model: nn.Module, x: Any, cuts: Sequence[Cut], untouched: Tensor) -> bool:
    """Whether the output changes when the features at these cuts do; true where they cannot be
    replaced.
    """
    calls: Counter[str] = Counter()
    replaced: list[Tensor] = []

    def disturb(name: str, output: Any) -> Any:
        cut = Cut(name, calls[name])
        calls[name] += 1
        if cut not in cuts:
            # torch's word for: the output stays as it is
            return None
        features = first_tensor(output)
        waves = (
            torch.arange(features.numel(), device=features.device)
            .cos()
            .view(features.shape)
            .to(features.dtype)
        )
        other = features + features.abs().mean() * waves
        replaced.extend(leaf for leaf in tree_leaves(output) if leaf is features)
        return tree_map(lambda leaf: other if leaf is features else leaf, output)

    names = {cut.module for cut in cuts}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, output, name=name: disturb(name, output)
        )
        for name in names
    ]
    try:
        output = output_tensor(call_model(model, x))
    finally:
        for hook in hooks:
            hook.remove()
    return not replaced or not torch.equal(output, untouched)


def _even(shares: Sequence[float], count: int) -> tuple[int, ...]:
    """Indices of the shares that lie nearest to 1/count, 2/count, ..., in order and without
    repeats.
    """
    targets = [index / count for index in range(1, count)]
    # dynamic programme over (targets, shares): least sum of squared distances of an increasing
    # assignment
    best: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())] * (len(shares) + 1)]
    for row, target in enumerate(targets, start=1):
        line: list[tuple[float, tuple[int, ...]]] = [(float("inf"), ())]
        for column, share in enumerate(shares, start=1):
            before, chosen = best[row - 1][column - 1]
            taken = (before + (share - target) ** 2, (*chosen, column - 1))
            line.append(min(line[-1], taken, key=lambda entry: entry[0]))
        best.append(line)
    return best[-1][-1][1]


def _levels(model: nn.Module) -> Iterator[list[str]]:
    """Lists of block names, coarse to fine: outermost repeated blocks first, then the blocks inside
    them, ...
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
    """Outermost blocks: composite members of plain containers, and composite siblings of one class."""
    children = list(module.named_children())
    composite = [
        (name, child) for name, child in children if next(child.children(), None) is not None
    ]
    repeated = any(
        n > 1
        for n in Counter(
            type(child) for _, child in composite if type(child) not in _CONTAINERS
        ).values()
    )
    for name, child in composite:
        if type(child) in _CONTAINERS and _has_blocks(child):
            yield from _blocks(f"{prefix}{name}.", child)
        elif type(module) in _CONTAINERS or repeated:
            yield f"{prefix}{name}", child
        else:
            yield from _blocks(f"{prefix}{name}.", child)


def _has_blocks(container: nn.Module) -> bool:
    return any(next(child.children(), None) is not None for child in container.children())
