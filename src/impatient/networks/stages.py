"""Pause a model's untouched forward in a hook at every cut.

The forward runs in a greenlet. Nothing of the model is copied, traced or replaced. A paused run can
be resumed or thrown away; it must stay on the thread that started it. A pause could leak three
things; each is prevented:

* grad, inference and autocast state that the model's forward has entered is kept out of the caller,
  and the caller's out of the model, at every switch (`Ambient`);
* an abandoned run unwinds (`StagedRun.close`), so that its activations are freed;
* an operation after a cut may overwrite the features in place, so they are used before the run goes
  on, or copied (`keep=True`).

A paused run can also go on with some samples of its batch only (`StagedRun.keep`): the module at
the cut then gives these.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple, Self, TypeVar

import greenlet
import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled, nn
from torch._C import _is_any_autocast_enabled
from torch.utils._pytree import tree_map

from impatient.anytime import Exit, Run
from impatient.errors import ExitPassed, NetworkError
from impatient.inputs import call_model, first_tensor, output_tensor


@dataclass(frozen=True, slots=True)
class Cut:
    """A place after a module's n-th call in one forward pass; 0 is the first call."""

    module: str
    call: int = 0

    def __str__(self) -> str:
        return f"{self.module}@{self.call}" if self.call else self.module

    @classmethod
    def parse(cls, text: str) -> tuple[str, int | None]:
        """Split "name" or "name@2" into the name and the call, None when it is not given."""
        name, at, call = text.rpartition("@")
        return (name, int(call)) if at and call.isdigit() else (text, None)


# (id of the module, call) -> exit index
CutMap = Mapping[tuple[int, int], int]
Head = Callable[[Tensor], Tensor]
T = TypeVar("T")


_AUTOCAST_DEVICES = ("cpu", "cuda") if torch.backends.cuda.is_built() else ("cpu",)


class _Autocast(NamedTuple):
    """Autocast settings of this thread: whether casts are cached, and by device whether they are on
    and to what.
    """

    cache: bool
    devices: list[tuple[bool, torch.dtype]]

    @classmethod
    def now(cls) -> Self:
        devices = [
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in _AUTOCAST_DEVICES
        ]
        return cls(torch.is_autocast_cache_enabled(), devices)

    def restore(self) -> None:
        if self == _Autocast.now():
            return
        # only leaving torch.autocast does that, and nobody leaves it here
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(self.cache)
        for device, (enabled, dtype) in zip(_AUTOCAST_DEVICES, self.devices, strict=True):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


class Ambient:
    """The modes a run was asked for in; it begins, pauses and its heads run in them, whatever model
    or caller enters.

    Model and caller meet in these modes at every switch, and each puts its own back behind it.
    Mostly both are in them already. Then asking so is all there is to do, and the price of a cut:
    after a stage the caches are cold, and the first line of Python to run takes ten times as long
    as in a loop.
    """

    __slots__ = ("_autocast", "_casts", "_grad", "_inference")

    def __init__(self) -> None:
        self._grad = is_grad_enabled()
        self._inference = is_inference_mode_enabled()
        self._autocast = _Autocast.now()
        self._casts = _is_any_autocast_enabled()

    @classmethod
    def now(cls) -> Self:
        return cls()

    def here(self) -> bool:
        """Whether this thread is in these modes; where no autocast is on, its other settings make
        no difference.
        """
        if (
            is_grad_enabled() is not self._grad
            or is_inference_mode_enabled() is not self._inference
        ):
            return False
        return self._autocast == _Autocast.now() if self._casts else not _is_any_autocast_enabled()

    def call(self, head: Callable[[Tensor], T], features: Tensor) -> T:
        """Call a head in these modes."""
        return self.within(lambda: head(_trainable(features)))

    def within(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call any function in these modes."""
        return function(*arguments) if self.here() else self.enclose(function, *arguments)

    def enclose(self, function: Callable[..., T], *arguments: Any) -> T:
        """The same, putting back also what the function itself leaves changed."""
        outside = _Autocast.now()
        # the guard remembers the thread's whole autograd state and puts exactly that back, in
        # whatever order guards are left
        with torch.inference_mode(self._inference):
            torch.set_grad_enabled(self._grad)
            self._autocast.restore()
            try:
                return function(*arguments)
            finally:
                # first: the guard, too, switches autocast back, but leaves its dtype and its cache
                outside.restore()


def _trainable(features: Tensor) -> Tensor:
    """A copy, where the model has made these features in an inference mode of its own and a head is
    to learn from them.
    """
    return features.clone() if features.is_inference() and torch.is_grad_enabled() else features


@dataclass(slots=True)
class Position:
    """Where a run stands, for its exits: an exit that somebody holds must not keep the run alive.

    Attributes:
        ambient: the modes of the run.
        exit: the exit whose features are intact; None once the run has failed in a later stage.
    """

    ambient: Ambient
    exit: int | None = -1


class StagedExit(Exit):
    """One exit of a run whose later stages may write over its features."""

    __slots__ = ("_head", "_kept", "_position")

    def __init__(
        self, index: int, features: Tensor, head: Head | None, position: Position, kept: bool
    ) -> None:
        self.index = index
        self.features = features
        self._head = head
        self._position = position
        self._kept = kept
        self._output: Tensor | None = features if head is None else None

    def output(self) -> Tensor:
        """Compute the head, once; ask before the run goes on.

        Returns:
            Output of this exit, shape [B, num_classes]; before softmax.
        Raises:
            ExitPassed: if the run has moved on, since the features may have been overwritten in
                place. Use `network.exits(x, keep=True)` to ask later.
        """
        if self._output is None:
            if self._position.exit != self.index and not self._kept:
                now = (
                    "failed in a later stage"
                    if self._position.exit is None
                    else f"is at exit {self._position.exit}"
                )
                raise ExitPassed(
                    f"exit {self.index} was passed (the run {now}), and its features may have been "
                    "overwritten. Call output() before the next exit, or start with "
                    "network.exits(x, keep=True)."
                )
            assert self._head is not None
            self._output = self._position.ambient.call(self._head, self.features)
        return self._output


def _exit_after(module: nn.Module, cuts: CutMap, calls: dict[int, int]) -> int | None:
    """The exit that lies after this call of a module, if any; counts the call."""
    key = id(module)
    call = calls.get(key, 0)
    calls[key] = call + 1
    return cuts.get((key, call))


class _Forward(greenlet.greenlet):
    """The greenlet in which a model's forward runs; knows its cuts, and nothing of the run that
    owns it.
    """

    ambient: Ambient
    cuts: CutMap
    calls: dict[int, int]
    closing: bool

    def reached(self, module: nn.Module, output: Any) -> Any:
        """Pause after a module that is cut; what its caller gets instead of its output, None for
        that output itself.
        """
        index = _exit_after(module, self.cuts, self.calls)
        if index is None:
            return None
        rows = None
        if not self.closing:
            features = first_tensor(output)
            rows = self.ambient.within(self.parent.switch, (index, features))
        # thrown in above, and again if the model's own code swallowed it
        if self.closing:
            raise greenlet.GreenletExit
        return None if rows is None else _with_features(output, features, features[rows])


class _Taps(threading.local):
    """What a plain forward does at the cuts, on this thread; empty when no such forward is under
    way.
    """

    def __init__(self) -> None:
        self.stack: list[tuple[CutMap, dict[int, int], Callable[[int, Tensor], Tensor | None]]] = []


_taps = _Taps()


def _at_cut(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001  the signature of a forward hook
    """The one forward hook this library installs; stateless, so that networks can be copied and
    shared by threads.
    """
    current = greenlet.getcurrent()
    if isinstance(current, _Forward):
        return current.reached(module, output)
    if _taps.stack:
        cuts, calls, visit = _taps.stack[-1]
        index = _exit_after(module, cuts, calls)
        if index is not None:
            features = first_tensor(output)
            onward = visit(index, features)
            if onward is not None and onward is not features:
                return _with_features(output, features, onward)
    # torch's word for: the output stays as it is
    return None


def _with_features(output: Any, features: Tensor, onward: Tensor) -> Any:
    """A module's output with another tensor in place of its features."""

    def changed(value: Any) -> Any:
        return onward if value is features else value

    if is_dataclass(output) and not isinstance(output, Mapping | type):
        return dataclasses.replace(
            output,
            **{
                field.name: changed(getattr(output, field.name))
                for field in dataclasses.fields(output)
            },
        )
    return tree_map(changed, output)


def install(modules: Sequence[nn.Module]) -> None:
    """Put the hook on the modules that are cut, where it is not there yet."""
    for module in modules:
        if _at_cut not in module._forward_hooks.values():
            module.register_forward_hook(_at_cut)


def tapped(
    model: nn.Module, x: Any, cuts: CutMap, visit: Callable[[int, Tensor], Tensor | None]
) -> Any:
    """Run a model to its end, calling `visit(exit index, features)` at each cut while the features
    are still intact.

    It is called in the caller's modes: a head trains even after a part of the model that runs
    without gradients. A tensor that it returns takes the place of the features in what is deeper.
    """
    ambient = Ambient.now()
    current = greenlet.getcurrent()
    _taps.stack.append(
        (cuts, {}, lambda index, features: ambient.call(functools.partial(visit, index), features))
    )
    try:
        if not isinstance(current, _Forward):
            return call_model(model, x)
        # a forward started inside another network's staged run must reach its own taps, not that
        # run
        apart = greenlet.greenlet(call_model)
        apart.gr_context = current.gr_context
        return apart.switch(model, x)
    finally:
        _taps.stack.pop()


class StagedRun(Run):
    """One staged run: an iterator of exits that computes a stage when asked for the next one.

    Stop asking and call `close()`, or leave the `with` block, to throw the rest away; a run that is
    dropped closes itself. An exit that this input never comes to (control flow that depends on the
    data) is left out.

    Args:
        model: what runs.
        x: the model's input.
        cuts: where it pauses.
        heads: what answers there.
        keep: copy the features of each exit, so that its output may be asked for later.
        shrinks: whether this model can go on with some samples of an input; asked by the method
            `keep`.

    Thread:
        Must be advanced and closed on the thread that first advanced it.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Any,
        cuts: CutMap,
        heads: Sequence[Head | None],
        *,
        keep: bool = False,
        shrinks: Callable[[Any], bool] = lambda _: True,
    ) -> None:
        self._position = Position(Ambient.now())
        self._model: nn.Module | None = model
        self._x = x
        self._cuts = cuts
        self._heads = heads
        self._keep = keep
        self._last = len(heads) - 1
        self._shrinks: Callable[[Any], bool] | None = shrinks
        # of the present exit, to go on with; None: all
        self._rows: Tensor | None = None
        self._size: int | None = (
            # how many rows later exits must have; None: nobody has said so
            None
        )
        # None before the first stage and after the last
        self._runner: _Forward | None = None
        self._owner: threading.Thread | None = None
        self._finished = False

    def __next__(self) -> StagedExit:
        if self._finished:
            raise StopIteration
        self._check_thread()
        try:
            index, value = self._resume()
            self._check_rows(index, value)
            kept = (
                self._position.ambient.call(torch.clone, value)
                if self._keep and index != self._last
                else value
            )
        except BaseException:
            self._finished = True
            # what failed may have overwritten the features first
            self._position.exit = None
            raise
        self._position.exit = index
        self._finished = index == self._last
        return StagedExit(index, kept, self._heads[index], self._position, self._keep)

    def keep(self, rows: Sequence[int] | Tensor) -> None:
        """Go on with these samples only: later exits have len(rows) rows, in this order.

        Works where the features are all that crosses the cut of what belongs to single samples.
        They are copied when the next exit is asked for. The exit at hand keeps all its rows.

        Args:
            rows: places in the present batch.
        Raises:
            NetworkError: if other values that carry the batch cross a cut of this network, or the
                run is not at an exit.
        """
        if self._runner is None or self._shrinks is None:
            raise NetworkError(
                "a run can be reduced to some of its samples only between two exits. Call keep() "
                "after an exit."
            )
        if not self._shrinks(self._x):
            raise NetworkError(
                "this network cannot go on with some samples of a batch: more than the features "
                "crosses its cuts, or its "
                "samples depend on each other. Go on with the whole batch, or use an engine whose "
                "stages carry every value: "
                'to_engine(network, "onnxruntime", example=x).'
            )
        rows = torch.as_tensor(rows, dtype=torch.long)
        self._rows = rows if self._rows is None else self._rows[rows.to(self._rows.device)]
        self._size = len(rows)

    def _check_rows(self, index: int, value: Tensor) -> None:
        """A value with the old batch that is broadcast over one kept row would go unnoticed."""
        if self._size is not None and (not value.dim() or value.shape[0] != self._size):
            raise NetworkError(
                f"after keep() of {self._size} samples, exit {index} has shape "
                f"{tuple(value.shape)}: more than the features "
                "crosses a cut of this network. Go on with the whole batch (compaction='never')."
            )

    def _check_thread(self) -> None:
        """Refuse before anything is touched: greenlet itself crashes where the other thread has
        ended.
        """
        if self._runner is not None and self._owner is not threading.current_thread():
            raise greenlet.error(
                "a staged run can only be advanced and closed on the thread that first advanced it."
            )

    def _resume(self) -> tuple[int, Tensor]:
        """Run the model to its next cut or its end."""
        runner = self._runner
        given: tuple[Any, ...] = (self._rows,)
        if runner is None:
            self._owner = threading.current_thread()
            runner = self._runner = _start(self._position.ambient, self._cuts)
            given = (call_model, self._model, self._x)
        else:
            self._rows = None
            runner.parent = greenlet.getcurrent()
        try:
            result = self._position.ambient.within(runner.switch, *given)
        finally:
            if runner.dead:
                self._runner = self._model = self._x = self._shrinks = (
                    # nothing is kept alive by a finished run
                    None
                )
        return (self._last, output_tensor(result)) if runner.dead else result

    def close(self) -> None:
        """Throw away what has not been computed; harmless when there is nothing to throw away."""
        self._check_thread()
        self._finished = True
        runner = self._runner
        self._runner = None
        if runner is None:
            return
        runner.closing = True
        runner.parent = greenlet.getcurrent()
        self._position.ambient.within(runner.throw, greenlet.GreenletExit)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # the interpreter takes the memory back, and what close() needs is already gone
        if ending():
            return
        try:
            self.close()
        except greenlet.error:
            # dropped on another thread, which cannot unwind it
            import warnings

            warnings.warn(
                (
                    "a staged run was dropped on another thread than its own and keeps its memory; "
                    "close() it there."
                ),
                ResourceWarning,
                stacklevel=2,
            )


def _start(ambient: Ambient, cuts: CutMap) -> _Forward:
    runner = _Forward(ambient.enclose)
    runner.ambient = ambient
    runner.cuts = cuts
    runner.calls = {}
    runner.closing = False
    # greenlets begin with an empty context; the model must see the caller's context variables
    runner.gr_context = contextvars.copy_context()
    return runner
