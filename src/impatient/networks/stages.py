"""Pause a model's untouched forward in a hook at every cut, or leave it there.

Nothing of the model is copied, traced or replaced. There are two ways:

* **Straight** (`StagedRun.walk`), if nobody asks for a pause: the hook itself decides whether the
  run is done, and an exception leaves the forward. That is the faster way.
* **Paused** (`next(run)`): the forward runs in a greenlet, which the hook leaves and to which the
  next stage returns. A paused run can be resumed or thrown away, but only on the thread that
  started it. The greenlet is kept for the thread's next run, because making one takes longer than
  all switches of a run.

A pause could leak three things; each is prevented:

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

import contextlib
import contextvars
import functools
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import greenlet
import torch
from greenlet import getcurrent
from torch import Tensor, nn

from impatient.anytime import Exit, Run
from impatient.errors import ExitPassed, NetworkError
from impatient.inputs import OutputName, call_model, first_tensor, output_tensor
from impatient.networks.ambient import Ambient, visited
from impatient.networks.heads import with_mask
from impatient.trees import map_leaves


@dataclass(frozen=True, slots=True)
class Cut:
    """A place after a call of a module in one forward pass.

    Attributes:
        module: name of the module.
        call: number of the call, from 0.
        numbered: whether even a first call is written with its number, as the module has others.
    """

    module: str
    call: int = 0
    numbered: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.module}@{self.call}" if self.call or self.numbered else self.module

    @classmethod
    def parse(cls, text: str) -> tuple[str, int | None]:
        """Split "name@2" into name and call. Without "@" the call is None."""
        name, at, call = text.rpartition("@")
        return (name, int(call)) if at and call.isdigit() else (text, None)

    @classmethod
    def named(cls, text: str) -> Self:
        """Return the cut that this is the text of.

        Without "@" it is after the first call.
        """
        name, call = cls.parse(text)
        return cls(name, call or 0, numbered=call is not None)


# The index of an exit, by the module before it and the number of the module's call. It holds
# modules, not their ids, so that a copied network has a map of its own modules.
CutMap = Mapping[tuple[nn.Module, int], int]
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Stages:
    """How a model is cut, which all its runs share.

    Attributes:
        cuts: places where a run pauses.
        heads: heads of the exits; None for the last one.
    """

    cuts: CutMap
    heads: tuple[Head | None, ...]

    @property
    def last(self) -> int:
        """Return the index of the last exit."""
        return len(self.heads) - 1


# What a plain forward does at a cut; the features to go on with, or None.
Tap = Callable[[int, Tensor], Tensor | None]
# What a straight run does at an exit; whether to leave there.
Visit = Callable[[Exit], bool]


class Position(Ambient):
    """The position of a run and its modes, shared with its exits.

    Exits hold this instead of the run, so that an exit does not keep its run alive.

    Attributes:
        exit: exit whose features are intact; None after the run has failed in a later stage.
        visited: whether an exit is being visited, in the modes of the run.
    """

    __slots__ = ("exit", "visited")

    def __init__(self) -> None:
        super().__init__()
        self.exit: int | None = -1
        self.visited = False


class StagedExit(Exit):
    """One exit of a run whose later stages may write over its features."""

    __slots__ = ("_head", "_kept", "_position", "upcoming")

    upcoming: int | None

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
        self.upcoming = index + 1
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
        output = self._output
        if output is None:
            position = self._position
            if position.exit != self.index and not self._kept:
                raise self._passed()
            head: Any = self._head
            if self.mask is not None:
                head = with_mask(head, self.mask)
            if position.visited and not position.learns:
                output = self._output = head(self.features)
            else:
                output = self._output = position.call(head, self.features)
        return output

    def _passed(self) -> ExitPassed:
        exit = self._position.exit
        now = "failed in a later stage" if exit is None else f"is at exit {exit}"
        return ExitPassed(
            f"exit {self.index} was passed (the run {now}), and its features may have been "
            "overwritten. Call output() before the next exit, or start with "
            "network.exits(x, keep=True)."
        )


def _exit_after(module: nn.Module, cuts: CutMap, calls: dict[nn.Module, int]) -> int | None:
    """Count a call of a module and return the exit after it."""
    call = calls.get(module, 0)
    calls[module] = call + 1
    return cuts.get((module, call))


class _Forward(greenlet.greenlet):
    """The greenlet in which models' forwards run, one after the other.

    It knows the cuts of the present one, but not the run that owns it.

    Attributes:
        busy: whether a forward is under way.
        closing: whether that forward is to end at its next cut.
    """

    ambient: Ambient
    cuts: CutMap
    calls: dict[nn.Module, int]
    busy: bool
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
        return None if rows is None else _with_features(output, features, _kept(features, rows))


def _forwards() -> None:
    """Run forward after forward, and give each end to whoever started it."""
    # What a greenlet is begun with, it holds until it dies; so it is begun with nothing.
    call, *given = greenlet.getcurrent().parent.switch()
    while True:
        ended = _Ended()
        try:
            ended.result = call(*given)
        except BaseException as error:
            ended.error = error
        del call, given
        current = greenlet.getcurrent()
        assert isinstance(current, _Forward)
        if isinstance(ended.error, greenlet.GreenletExit) and not current.closing:
            # Nobody holds this greenlet any more, so nobody could resume it.
            raise ended.error
        current.busy = False
        switch = current.parent.switch
        # It holds this frame, which must not hold it.
        del current
        call, *given = switch(ended)


class _Ended:
    """How a forward ended: with a result, or with an error."""

    __slots__ = ("error", "result")

    def __init__(self) -> None:
        self.result: Any = None
        self.error: BaseException | None = None

    def take(self) -> Any:
        """Return the result or raise the error, and forget it."""
        result, error = self.result, self.error
        # The idle greenlet holds this object until its next forward.
        self.result = self.error = None
        try:
            if error is not None:
                raise error
            return result
        finally:
            # An error's traceback holds this frame.
            del error


class _Thread(threading.local):
    """What a thread keeps between forwards and during them.

    Attributes:
        stack: forwards that do not pause, the innermost last.
        idle: a greenlet for the next paused run.
    """

    def __init__(self) -> None:
        self.stack: list[_Taps | StagedRun] = []
        self.idle: _Forward | None = None


_thread = _Thread()


class _Leave(BaseException):
    """Ends a forward at a cut.

    No error, so `except Exception` in a model does not catch it.
    """


def _at_cut(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001  the signature of a forward hook
    """Do at a module what the present forward does at its cuts.

    This is the only forward hook of a network. It has no state, so that networks can be copied and
    shared by threads.
    """
    current = getcurrent()
    if isinstance(current, _Forward):
        return current.reached(module, output)
    stack = _thread.stack
    return stack[-1].reached(module, output) if stack else None


def _with_features(output: Any, features: Tensor, onward: Tensor) -> Any:
    """Return a module's output with its features replaced."""

    def changed(value: Tensor) -> Tensor:
        return onward if value is features else value

    return map_leaves(changed, output)


def _kept(features: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of features, in the same memory format."""
    if features.is_contiguous():
        # A third of the time of features[rows]; it would give up channels_last.
        return features.index_select(0, rows.to(features.device))
    return features[rows]


def install(modules: Sequence[nn.Module]) -> None:
    """Put the hook on the modules that do not have it yet."""
    for module in modules:
        if _at_cut not in module._forward_hooks.values():
            module.register_forward_hook(_at_cut)


def tapped(model: nn.Module, x: Any, cuts: CutMap, visit: Tap) -> Any:
    """Run a model to its end, and call `visit(exit, features)` at each cut.

    At that time the features are still intact. The call is in the caller's modes, so that a head
    trains even after a part of the model that runs without gradients. If it returns a tensor, the
    deeper layers get that instead of the features.
    """
    return _through(model, x, _Taps(cuts, visit))


class _Taps:
    """What a plain forward does at its cuts."""

    __slots__ = ("_ambient", "_calls", "_cuts", "_tap")

    def __init__(self, cuts: CutMap, tap: Tap) -> None:
        self._ambient = Ambient.now()
        self._cuts = cuts
        self._calls: dict[nn.Module, int] = {}
        self._tap = tap

    def reached(self, module: nn.Module, output: Any) -> Any:
        """Call the tap after a module if there is a cut, and go on with what it returns."""
        index = _exit_after(module, self._cuts, self._calls)
        if index is None:
            return None
        features = first_tensor(output)
        onward = visited(self._ambient, functools.partial(self._tap, index), features)
        if onward is None or onward is features:
            return None
        return _with_features(output, features, onward)


def _through(model: nn.Module, x: Any, forward: _Taps | StagedRun) -> Any:
    """Run a model in the present modes, and do at its cuts what a forward does there."""
    current = getcurrent()
    stack = _thread.stack
    stack.append(forward)
    try:
        if not isinstance(current, _Forward):
            return model(x) if isinstance(x, Tensor) else call_model(model, x)
        # A forward inside another network's staged run must visit its own cuts, not pause that run.
        apart = greenlet.greenlet(call_model)
        apart.gr_context = current.gr_context
        return apart.switch(model, x)
    finally:
        stack.pop()


class StagedRun(Run):
    """A run of a model that pauses at every cut, or visits each (`walk`).

    It is an iterator of exits, which computes a stage when it is asked for the next exit. To throw
    the rest away, call `close()`, leave the `with` block or delete the run. An exit that this input
    never comes to, because of control flow that depends on the data, is left out.

    Args:
        model: model to run.
        x: input of the model.
        stages: how the model is cut.
        output: which part of what the model returns is its answer.
        shrinks: function that tells whether the model can go on with some samples of an input; the
            method `keep` asks it.
        keep: copy the features of each exit, so that its output may be asked for later.
        mask: padding mask of the input, for the heads, shape [B, T]; None without.

    Thread:
        Must be advanced and closed on the thread that first advanced it.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Any,
        stages: Stages,
        output: OutputName,
        shrinks: Callable[[Any], bool],
        keep: bool = False,
        mask: Tensor | None = None,
    ) -> None:
        # None before the first stage and after the last; first, because `__del__` asks for it.
        self._runner: _Forward | None = None
        self._position = Position()
        self._model: nn.Module | None = model
        self._x = x
        self._stages = stages
        self._output = output
        self._keep = keep
        self._mask = mask
        self._shrinks: Callable[[Any], bool] | None = shrinks
        # Rows of the present exit to go on with; None for all.
        self._rows: Tensor | None = None
        # Number of rows of later exits; None if it was not changed.
        self._size: int | None = None
        # What a straight forward that is under way does at exits.
        self._visit: Visit | None = None
        # How often it has called each module before a cut.
        self._calls: dict[nn.Module, int] = {}
        # Whether it leaves, or has left.
        self._left = False
        # What a visit raised.
        self._error: BaseException | None = None
        self._owner: threading.Thread | None = None
        self._finished = False

    def __next__(self) -> StagedExit:
        if self._finished:
            raise StopIteration
        self._check_thread()
        try:
            index, value = self._resume()
            exit = self._exit_at(index, value)
        except BaseException:
            self._finished = True
            # The stage may have overwritten the features before it failed.
            self._position.exit = None
            raise
        self._finished = index == self._stages.last
        return exit

    def _exit_at(self, index: int, value: Tensor) -> StagedExit:
        """Make the exit that the run has reached."""
        position = self._position
        if self._size is not None:
            self._check_rows(index, value, self._size)
        if self._keep and index != self._stages.last:
            value = position.call(torch.clone, value)
        position.exit = index
        return StagedExit(index, value, self._stages.heads[index], position, self._keep, self._mask)

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
        if (self._runner is None and self._visit is None) or self._shrinks is None:
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

    @staticmethod
    def _check_rows(index: int, value: Tensor, size: int) -> None:
        # Without this, a value of the old batch could be broadcast over one kept row unnoticed.
        if not value.dim() or value.shape[0] != size:
            raise NetworkError(
                f"after keep() of {size} samples, exit {index} has shape "
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
            runner = self._runner = _start(self._position, self._stages.cuts)
            given = (self._position.enclose, call_model, self._model, self._x)
        else:
            self._rows = None
            runner.parent = greenlet.getcurrent()
        result = self._position.within(runner.switch, *given)
        if not isinstance(result, _Ended):
            reached: tuple[int, Tensor] = result
            return reached
        # A finished run keeps nothing alive.
        self._runner = self._model = self._x = self._shrinks = None
        _keep(runner)
        return self._stages.last, output_tensor(result.take(), self._output)

    def close(self) -> None:
        """Throw away the rest of the run, if there is any."""
        self._check_thread()
        self._finished = True
        runner = self._runner
        self._runner = self._model = self._x = self._shrinks = None
        if runner is None:
            return
        runner.closing = True
        runner.parent = greenlet.getcurrent()
        ended = self._position.within(runner.throw, greenlet.GreenletExit)
        _keep(runner)
        with contextlib.suppress(greenlet.GreenletExit):
            ended.take()

    def walk(self, visit: Visit) -> None:
        """Run without pausing, and leave at the first exit where `visit` returns True.

        A model sees that as an exception that is no `Exception`, as it sees `close()`.
        """
        if self._runner is not None or self._finished:
            super().walk(visit)
            return
        position = self._position
        model: Any = self._model
        here = position.here()
        self._visit = visit
        try:
            if here:
                output = _through(model, self._x, self)
            else:
                output = position.enclose(_through, model, self._x, self)
        except _Leave:
            if not self._left:
                raise
        except BaseException:
            position.exit = None
            raise
        finally:
            if here and not position.here():
                position.restore()
            self._finished = True
            self._model = self._x = self._shrinks = self._visit = None
        if self._error is not None:
            raise self._take()
        if not self._left:
            visit(self._exit_at(self._stages.last, output_tensor(output, self._output)))

    def reached(self, module: nn.Module, output: Any) -> Any:
        """Visit an exit after a module if there is one, and leave there if the visit says so.

        It makes few calls: after a stage the caches are cold, and each takes microseconds.

        Returns:
            The output that replaces the module's output; None leaves it as it is.
        """
        position = self._position
        if position.visited:
            # What a visit calls is no part of this forward.
            return None
        calls = self._calls
        call = calls[module] = calls.get(module, -1) + 1
        index = self._stages.cuts.get((module, call))
        if index is None:
            return None
        features = output if isinstance(output, Tensor) else first_tensor(output)
        if not self._left:
            visit: Any = self._visit
            position.visited = True
            try:
                if position.here():
                    self._left = visit(self._exit_at(index, features))
                else:
                    self._left = position.enclose(self._called, visit, index, features)
            except BaseException as error:
                # Not through the model, whose own code may catch it.
                self._error = error
                self._left = True
            position.visited = False
        # Again and again, in case the model's own code catches it.
        if self._left:
            raise _Leave
        rows = self._rows
        if rows is None:
            return None
        self._rows = None
        return _with_features(output, features, _kept(features, rows))

    def _called(self, visit: Visit, index: int, features: Tensor) -> bool:
        return visit(self._exit_at(index, features))

    def _take(self) -> BaseException:
        """Return what a visit raised, and forget it: its traceback would hold it in a cycle."""
        assert self._error is not None
        error = self._error
        self._error = None
        return error

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the interpreter's end the modules that close() needs are gone, and memory is freed.
        if self._runner is None or ending():
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
    """Return this thread's idle greenlet, or a new one, ready for a forward."""
    runner = _thread.idle
    _thread.idle = None
    if runner is None:
        runner = _Forward(_forwards)
        runner.switch()
    runner.parent = greenlet.getcurrent()
    runner.ambient = ambient
    runner.cuts = cuts
    runner.calls = {}
    runner.busy = True
    runner.closing = False
    # A greenlet begins with an empty context, but the model needs the caller's context variables.
    runner.gr_context = contextvars.copy_context()
    return runner


def _keep(runner: _Forward) -> None:
    """Keep a greenlet whose forward has ended for this thread's next run."""
    runner.cuts = {}
    runner.calls = {}
    runner.gr_context = None
    if _thread.idle is None:
        # The greenlet that used it last may be somebody's, and is not kept alive.
        root = greenlet.getcurrent()
        while root.parent is not None:
            root = root.parent
        runner.parent = root
        _thread.idle = runner
