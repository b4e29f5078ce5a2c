"""The gradient, inference and autocast modes of a thread, kept apart for a run and its caller."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import (
    Tensor,
    get_autocast_dtype,
    is_autocast_cache_enabled,
    is_grad_enabled,
    is_inference_mode_enabled,
)
from torch._C import _is_any_autocast_enabled
from torch.utils.checkpoint import CheckpointFunction

from impatient.errors import NetworkError

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

    Attributes:
        learns: whether there are gradients.
    """

    __slots__ = ("_cache", "_devices", "_modes", "learns")

    def __init__(self) -> None:
        learns = self.learns = is_grad_enabled()
        casts = _is_any_autocast_enabled()
        # Whether there are gradients, inference mode and autocast.
        self._modes = (learns, is_inference_mode_enabled(), casts)
        self._cache = is_autocast_cache_enabled()
        if casts or len(_AUTOCAST_DEVICES) > 1:
            self._devices = _Autocast.now().devices
        else:
            self._devices = [(False, get_autocast_dtype("cpu"))]

    @property
    def _autocast(self) -> _Autocast:
        return _Autocast(self._cache, self._devices)

    @classmethod
    def now(cls) -> Self:
        return cls()

    def here(self) -> bool:
        """Tell whether this thread is in these modes.

        The other settings of autocast make no difference while it is off.
        """
        modes = (is_grad_enabled(), is_inference_mode_enabled(), _is_any_autocast_enabled())
        return modes == self._modes and (not modes[2] or self._autocast == _Autocast.now())

    def call(self, head: Callable[[Tensor], T], features: Tensor) -> T:
        """Call a head in these modes."""
        if self.here():
            return head(_trainable(features) if self.learns else features)
        return self.enclose(lambda: head(_trainable(features)))

    def within(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call any function in these modes."""
        return function(*arguments) if self.here() else self.enclose(function, *arguments)

    def restore(self) -> None:
        """Return to these modes, except from an inference mode that was left on."""
        torch.set_grad_enabled(self.learns)
        self._autocast.restore()

    def enclose(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call any function in these modes, and restore also what it changes itself."""
        outside = _Autocast.now()
        if self.learns and not is_grad_enabled() and _in_reentrant_checkpoint():
            raise NetworkError(
                "a cut lies inside torch.utils.checkpoint with use_reentrant=True, which runs the "
                "block without gradients, so that an early exit would not train it; expected "
                "use_reentrant=False."
            )
        # The guard remembers the thread's whole autograd state and restores exactly that, in
        # whatever order guards are left.
        with torch.inference_mode(self._modes[1]):
            torch.set_grad_enabled(self.learns)
            self._autocast.restore()
            try:
                return function(*arguments)
            finally:
                # Before the guard, which also switches autocast back, but not its type and cache.
                outside.restore()


def visited(ambient: Ambient, visit: Callable[[Tensor], T], features: Tensor) -> T:
    """Call a head in these modes, and keep what it saves for its gradients.

    A checkpoint around the cut would count it, and would not find it when it runs the block again.
    """
    if not _may_be_saved_otherwise():
        return ambient.call(visit, features)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        return ambient.call(visit, features)


def _may_be_saved_otherwise() -> bool:
    """Tell whether hooks, such as those of a checkpoint, keep what is saved for gradients."""
    autograd: Any = torch._C._autograd
    if hasattr(autograd, "_top_saved_tensors_default_hooks"):
        return autograd._top_saved_tensors_default_hooks(True) is not None
    # torch 2.6 does not say whether there are hooks, only whether there may be any.
    return bool(autograd._saved_tensors_hooks_is_enabled())


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
