"""Pause a model's untouched forward in a hook at every cut.

The forward runs in a greenlet. Nothing of the model is copied, traced or replaced. A paused run can
be resumed or thrown away, but only on the thread that started it. A pause could leak three things;
each is prevented:

* Grad, inference and autocast state of the model's forward would reach the caller, and the caller's
  state the model. It is exchanged at every switch (`Ambient`).
* An abandoned run would keep its activations. It unwinds, so that they are freed
  (`StagedRun.close`).
* An operation after a cut may overwrite the features in place. So they are used before the run goes
  on, or copied (`keep=True`).

A paused run can also go on with some samples of its batch only (`StagedRun.keep`). The module at
the cut then returns only these.
"""

from __future__ import annotations

import contextvars
import functools
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple, Self, TypeVar

import greenlet
import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled, nn
from torch._C import _is_any_autocast_enabled
from torch.utils.checkpoint import CheckpointFunction

from impatient.anytime import Exit, Run
from impatient.errors import ExitPassed, NetworkError
from impatient.inputs import OutputName, call_model, first_tensor, output_tensor
from impatient.networks.heads import with_mask
from impatient.trees import map_leaves


@dataclass(frozen=True, slots=True)
class Cut:
    """A place after a call of a module in one forward pass.

    Attributes:
        module: name of the module.
        call: number of the call, from 0.
    """

    module: str
    call: int = 0

    def __str__(self) -> str:
        return f"{self.module}@{self.call}" if self.call else self.module

    @classmethod
    def parse(cls, text: str) -> tuple[str, int | None]:
        """Split "name@2" into name and call. Without "@" the call is None."""
        name, at, call = text.rpartition("@")
        return (name, int(call)) if at and call.isdigit() else (text, None)

    @classmethod
    def named(cls, text: str) -> Self:
        """Return the cut that this is the text of; without "@" it is after the first call."""
        name, call = cls.parse(text)
        return cls(name, call or 0)


# The index of an exit, by the id of the module before it and the number of the module's call.
CutMap = Mapping[tuple[int, int], int]
Head = Callable[[Tensor], Tensor]
T = TypeVar("T")


_REENTRANT = CheckpointFunction.forward.__code__
_AUTOCAST_DEVICES = ("cpu", "cuda") if torch.backends.cuda.is_built() else ("cpu",)


class _Autocast(NamedTuple):
    """Autocast settings of a thread.

    Attributes:
        cache: whether casts are cached.
        devices: for each device, whether autocast is on, and its type.
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
        # torch does that only on leaving `torch.autocast`, which is not left here.
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(self.cache)
        for device, (enabled, dtype) in zip(_AUTOCAST_DEVICES, self.devices, strict=True):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


class Ambient:
    """The gradient, inference and autocast modes in which a run was created.

    The run begins and pauses in these modes, and its heads run in them, whatever modes the model or
    the caller enters. At every switch between model and caller both are in these modes, and each
    restores its own afterwards. Usually both are in them already, and a cut costs only that check.
    It has few lines, because after a stage the caches are cold, and Python runs about ten times as
    slowly as in a loop.
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
        """Tell whether this thread is in these modes.

        The other settings of autocast make no difference while it is off.
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
        """Call any function in these modes, and restore also what it changes itself."""
        outside = _Autocast.now()
        if self._grad and not is_grad_enabled() and _in_reentrant_checkpoint():
            raise NetworkError(
                "a cut lies inside torch.utils.checkpoint with use_reentrant=True, which runs the "
                "block without gradients, so that an early exit would not train it; expected "
                "use_reentrant=False."
            )
        # The guard remembers the thread's whole autograd state and restores exactly that, in
        # whatever order guards are left.
        with torch.inference_mode(self._inference):
            torch.set_grad_enabled(self._grad)
            self._autocast.restore()
            try:
                return function(*arguments)
            finally:
                # Before the guard, which also switches autocast back, but not its type and cache.
                outside.restore()


def _visited(ambient: Ambient, visit: Callable[[Tensor], T], features: Tensor) -> T:
    """Call a head in these modes, and keep what it saves for its gradients.

    A checkpoint around the cut would count it, and would not find it when it runs the block again.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return ambient.call(visit, features)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        return ambient.call(visit, features)


def _in_reentrant_checkpoint() -> bool:
    """Tell whether a reentrant checkpoint is under way on this thread."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _REENTRANT:
            return True
        frame = frame.f_back
    return False


def _trainable(features: Tensor) -> Tensor:
    """Copy features of inference mode if a head is to learn from them."""
    return features.clone() if features.is_inference() and torch.is_grad_enabled() else features


@dataclass(slots=True)
class Position:
    """The position of a run, shared with its exits.

    Exits hold this instead of the run, so that an exit does not keep its run alive.

    Attributes:
        ambient: modes of the run.
        exit: exit whose features are intact; None after the run has failed in a later stage.
    """

    ambient: Ambient
    exit: int | None = -1


class StagedExit(Exit):
    """One exit of a run whose later stages may write over its features."""

    __slots__ = ("_head", "_kept", "_position")

    def __init__(
        self,
        index: int,
        features: Tensor,
        head: Head | None,
        position: Position,
        kept: bool,
        mask: Tensor | None = None,
    ) -> None:
        self.index = index
        self.features = features
        self.mask = mask
        self._head = head
        self._position = position
        self._kept = kept
        self._output: Tensor | None = features if head is None else None

    def output(self) -> Tensor:
        """Compute the head, once, before the run goes on.

        Returns:
            Output of this exit, shape [B, num_classes]; before softmax.
        Raises:
            ExitPassed: if the run has moved on, because the features may have been overwritten in
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
            head = with_mask(self._head, self.mask)
            self._output = self._position.ambient.call(head, self.features)
        return self._output


def _exit_after(module: nn.Module, cuts: CutMap, calls: dict[int, int]) -> int | None:
    """Count a call of a module and return the exit after it."""
    key = id(module)
    call = calls.get(key, 0)
    calls[key] = call + 1
    return cuts.get((key, call))


class _Forward(greenlet.greenlet):
    """The greenlet in which a model's forward runs.

    It knows the cuts, but not the run that owns it.
    """

    ambient: Ambient
    cuts: CutMap
    calls: dict[int, int]
    closing: bool

    def reached(self, module: nn.Module, output: Any) -> Any:
        """Pause after a module if there is a cut.

        Returns:
            The output that replaces the module's output; None leaves it as it is.
        """
        index = _exit_after(module, self.cuts, self.calls)
        if index is None:
            return None
        rows = None
        if not self.closing:
            features = first_tensor(output)
            rows = self.ambient.within(self.parent.switch, (index, features))
        # It was thrown in above; again, in case the model's own code has caught it.
        if self.closing:
            raise greenlet.GreenletExit
        return None if rows is None else _with_features(output, features, features[rows])


class _Taps(threading.local):
    """Visits of this thread's plain forwards at their cuts, the innermost forward last."""

    def __init__(self) -> None:
        self.stack: list[tuple[CutMap, dict[int, int], Callable[[int, Tensor], Tensor | None]]] = []


_taps = _Taps()


def _at_cut(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001  the signature of a forward hook
    """Do at a module what the present forward does at its cuts.

    This is the only forward hook of a network. It has no state, so that networks can be copied and
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
    # For torch, None means that the output stays as it is.
    return None


def _with_features(output: Any, features: Tensor, onward: Tensor) -> Any:
    """Return a module's output with its features replaced."""

    def changed(value: Tensor) -> Tensor:
        return onward if value is features else value

    return map_leaves(changed, output)


def install(modules: Sequence[nn.Module]) -> None:
    """Put the hook on the modules that do not have it yet."""
    for module in modules:
        if _at_cut not in module._forward_hooks.values():
            module.register_forward_hook(_at_cut)


def tapped(
    model: nn.Module, x: Any, cuts: CutMap, visit: Callable[[int, Tensor], Tensor | None]
) -> Any:
    """Run a model to its end, and call `visit(exit, features)` at each cut.

    At that time the features are still intact. The call is in the caller's modes, so that a head
    trains even after a part of the model that runs without gradients. If it returns a tensor, the
    deeper layers get that instead of the features.
    """
    ambient = Ambient.now()
    current = greenlet.getcurrent()
    _taps.stack.append(
        (
            cuts,
            {},
            lambda index, features: _visited(ambient, functools.partial(visit, index), features),
        )
    )
    try:
        if not isinstance(current, _Forward):
            return call_model(model, x)
        # A forward inside another network's staged run must visit its own cuts, not pause that run.
        apart = greenlet.greenlet(call_model)
        apart.gr_context = current.gr_context
        return apart.switch(model, x)
    finally:
        _taps.stack.pop()


class StagedRun(Run):
    """A run of a model that pauses at every cut.

    It is an iterator of exits, which computes a stage when it is asked for the next exit. To throw
    the rest away, call `close()`, leave the `with` block or delete the run. An exit that this input
    never comes to, because of control flow that depends on the data, is left out.

    Args:
        model: model to run.
        x: input of the model.
        cuts: places where the run pauses.
        heads: heads of the exits; None for the last one.
        keep: copy the features of each exit, so that its output may be asked for later.
        mask: padding mask of the input, for the heads, shape [B, T]; None without.
        output: which part of what the model returns is its answer.
        shrinks: function that tells whether the model can go on with some samples of an input; the
            method `keep` asks it.

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
        mask: Tensor | None = None,
        output: OutputName = None,
        shrinks: Callable[[Any], bool] = lambda _: True,
    ) -> None:
        self._position = Position(Ambient.now())
        self._model: nn.Module | None = model
        self._x = x
        self._cuts = cuts
        self._heads = heads
        self._keep = keep
        self._mask = mask
        self._output = output
        self._last = len(heads) - 1
        self._shrinks: Callable[[Any], bool] | None = shrinks
        # Rows of the present exit to go on with; None for all.
        self._rows: Tensor | None = None
        # Number of rows of later exits; None if it was not changed.
        self._size: int | None = None
        # None before the first stage and after the last.
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
            # The stage may have overwritten the features before it failed.
            self._position.exit = None
            raise
        self._position.exit = index
        self._finished = index == self._last
        return StagedExit(index, kept, self._heads[index], self._position, self._keep, self._mask)

    def keep(self, rows: Sequence[int] | Tensor) -> None:
        """Go on with these samples only, in this order.

        This works if no values of single samples cross the cut other than the features. Those of
        later exits have len(rows) rows. They are copied when the next exit is asked for, and the
        present exit keeps all its rows.

        Args:
            rows: places in the present batch.
        Raises:
            NetworkError: if other values of single samples cross a cut of this network, or the run
                is not at an exit.
        """
        if self._runner is None or self._shrinks is None:
            raise NetworkError(
                "a run can be reduced to some of its samples only between two exits; expected a "
                "call of keep() after an exit."
            )
        if not self._shrinks(self._x):
            raise NetworkError(
                "this network cannot go on with some samples of a batch: more than the features "
                "crosses its cuts, or its samples depend on each other. Go on with the whole "
                "batch, or use an engine whose stages carry every value: "
                'to_engine(network, "onnxruntime", example=x).'
            )
        rows = torch.as_tensor(rows, dtype=torch.long)
        self._rows = rows if self._rows is None else self._rows[rows.to(self._rows.device)]
        self._size = len(rows)
        if self._mask is not None:
            self._mask = self._mask[rows.to(self._mask.device)]

    def _check_rows(self, index: int, value: Tensor) -> None:
        # Without this, a value of the old batch could be broadcast over one kept row unnoticed.
        if self._size is not None and (not value.dim() or value.shape[0] != self._size):
            raise NetworkError(
                f"after keep() of {self._size} samples, exit {index} has shape "
                f"{tuple(value.shape)}: more than the features crosses a cut of this network. Go "
                "on with the whole batch (compaction='never')."
            )

    def _check_thread(self) -> None:
        # Before anything is changed, because greenlet crashes if the other thread has ended.
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
                # A finished run keeps nothing alive.
                self._runner = self._model = self._x = self._shrinks = None
        return (self._last, output_tensor(result, self._output)) if runner.dead else result

    def close(self) -> None:
        """Throw away the rest of the run, if there is any."""
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
        # At the interpreter's end the modules that close() needs are gone, and memory is freed.
        if ending():
            return
        try:
            self.close()
        except greenlet.error:
            # It was dropped on another thread, which cannot unwind it.
            import warnings

            warnings.warn(
                "a staged run was dropped on another thread than its own and keeps its memory; "
                "close() it there.",
                ResourceWarning,
                stacklevel=2,
            )


def _start(ambient: Ambient, cuts: CutMap) -> _Forward:
    runner = _Forward(ambient.enclose)
    runner.ambient = ambient
    runner.cuts = cuts
    runner.calls = {}
    runner.closing = False
    # A greenlet begins with an empty context, but the model needs the caller's context variables.
    runner.gr_context = contextvars.copy_context()
    return runner
