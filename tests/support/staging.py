"""Networks cut into stages, and what the tests of the mechanism look at."""

import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impatient.networks import MultiExitNetwork, attach_exits
from impatient.networks.stages import _Forward, _thread

WIDTH = 8
CLASSES = 3


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def x_of(batch: int = 4) -> Tensor:
    return torch.randn(batch, WIDTH)


def attach(
    model: nn.Module, *after: str, heads: Any = "linear", example: Any = None
) -> MultiExitNetwork:
    return attach_exits(
        model, after=list(after), heads=heads, example=x_of(1) if example is None else example
    )


def staged(network: MultiExitNetwork, x: Any) -> list[Tensor]:
    return [exit.output() for exit in network.exits(x)]


def assert_same(left: Any, right: Any) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        # two constants would be equal for nothing
        assert a.std() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def toy_network(toy: nn.Module, **options: Any) -> MultiExitNetwork:
    return attach(toy, "blocks.0", "blocks.2", **options)


MODES: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "half_autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
    "uncached_autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False),
}
some_mode = pytest.mark.parametrize("mode", [name for name in MODES if name != "nothing"])
every_mode = pytest.mark.parametrize("mode", MODES)


def modes() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
    )


class Modal(nn.Module):
    """Runs two of its blocks in a mode of its own, and writes down in which modes each part found
    itself.
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.before = linear()
        self.inside = linear()
        self.also_inside = linear()
        self.after = linear()
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self._note(self.before(x))
        with MODES[self.mode]():
            x = self._note(self.inside(x))
            x = self._note(self.also_inside(x))
        x = self._note(self.after(x.clone().float()))
        return self.classifier(x)

    def _note(self, x: Tensor) -> Tensor:
        self.seen.append(modes())
        return x


@functools.cache
def modal(mode: str) -> MultiExitNetwork:
    return attach(Modal(mode), "before", "inside", "also_inside", "after")


def plainly_seen(network: MultiExitNetwork, x: Tensor) -> tuple[list[Any], Tensor]:
    network.backbone.seen.clear()
    output = network.backbone(x)
    return list(network.backbone.seen), output


class Activation:
    """Something large in a model's forward whose life can be watched."""


class Unwinding(nn.Module):
    """Notes that it was unwound, and whether what it holds in forward is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.a = linear()
        self.b = linear()
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.held: list[weakref.ref[Any]] = []
        self.unwound = 0

    def forward(self, x: Tensor) -> Tensor:
        activation = Activation()
        inner = x * 2
        self.held += [weakref.ref(activation), weakref.ref(inner)]
        try:
            x = self.a(inner)
            x = self.b(x)
        finally:
            self.unwound += 1
        return self.classifier(x)


def unwinding() -> MultiExitNetwork:
    network = attach(Unwinding(), "a", "b")
    network.backbone.unwound = 0
    network.backbone.held.clear()
    return network


def paused_runs() -> int:
    # A greenlet that is kept between runs may be frozen, and then the collector does not list it.
    _thread.idle = None
    gc.collect()
    return sum(
        issubclass(type(entry), _Forward) and not entry.dead and entry.busy
        for entry in gc.get_objects()
    )


def by_break(network: MultiExitNetwork, x: Tensor) -> None:
    for _ in network.exits(x):
        break


def in_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the exception it raises, on a thread of its own that must end."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive(), "it hangs"
    return results.pop()


class Counting(nn.Module):
    """A head that counts its calls and notes the modes it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)
        self.seen: list[Any] = []

    def forward(self, features: Tensor) -> Tensor:
        self.seen.append(modes())
        return self.layer(features)


class Containing(nn.Module):
    """A model that uses a network with exits in its own forward, in a way of its own."""

    def __init__(
        self, inner: MultiExitNetwork, use: Callable[[MultiExitNetwork, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.before = linear()
        self.inner = inner
        self.after = nn.Linear(CLASSES, WIDTH)
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        x = self.after(self.use(self.inner, x))
        return self.classifier(x)
