"""Networks whose stages take scripted times on a fake clock, and places where a test holds them
still.
"""

import functools
import gc
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from impatient.anytime import Exit, Network, Run
from impatient.clock import FakeClock
from impatient.costs import BatchCosts, CostProfile, Quantiles
from impatient.provenance import provenance
from impatient.runtime import Runner

# longer than any thread here can take; only a test that fails waits so long
PATIENCE_S = 20.0

# the input that fakes ignore, one sample
X = torch.zeros(1, 1)

# what a whole run of four exits computes
WHOLE = [f"{what} {index}" for index in range(4) for what in ("stage", "head")]


class FakeRun(Run):
    """A run that tells its network when it is closed."""

    def __init__(self, network: "FakeNetwork") -> None:
        super().__init__(network.stage_by_stage())
        self._network = network
        self._open = True

    def close(self) -> None:
        super().close()
        if self._open:
            self._open = False
            self._network.closed.release()


class FakeNetwork(Network):
    """Stages and heads that advance a fake clock and write down what ran, one run at a time.

    `at["stage 1"]` is called when that stage begins: to hold it still, to fail, to change the
    world.
    """

    def __init__(
        self,
        clock: FakeClock,
        stages_s: Sequence[Any],
        heads_s: Sequence[Any] | None = None,
        outputs: Tensor | None = None,
    ) -> None:
        super().__init__()
        count = len(stages_s)
        self.clock = clock
        self.stages_s = list(stages_s)
        self.heads_s = list(heads_s) if heads_s is not None else [0.0] * count
        self.outputs = (
            outputs
            if outputs is not None
            else torch.arange(float(count))[:, None, None].repeat(1, 1, 3)
        )
        self.at: dict[str, Callable[[], object]] = {}
        self.ran: list[str] = []
        self.closed = threading.Semaphore(0)

    @property
    def num_exits(self) -> int:
        return len(self.stages_s)

    def exits(self, x: Any, *, keep: bool = False) -> Run:
        return FakeRun(self)

    def take(self, part: str, seconds: Any) -> None:
        self.ran.append(part)
        self.at.get(part, lambda: None)()
        self.clock.advance(seconds() if callable(seconds) else seconds)

    def wait_closed(self) -> None:
        """Until one more run has ended and nothing of it can run any more."""
        assert self.closed.acquire(timeout=PATIENCE_S)

    def stage_by_stage(self) -> Generator[Exit]:
        for index in range(self.num_exits):
            self.take(f"stage {index}", self.stages_s[index])
            yield Exit(index, None, functools.partial(self._head, index))

    def _head(self, index: int, _: object) -> Tensor:
        self.take(f"head {index}", self.heads_s[index])
        return self.outputs[index]


class Hold:
    """Where a stage stands still until the test lets it go."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._released = threading.Event()

    def __call__(self) -> None:
        self._reached.set()
        assert self._released.wait(PATIENCE_S)

    def wait_reached(self) -> None:
        assert self._reached.wait(PATIENCE_S)

    def release(self) -> None:
        self._released.set()

    @property
    def released(self) -> bool:
        return self._released.is_set()


def hold(network: FakeNetwork, part: str) -> Hold:
    network.at[part] = held = Hold()
    return held


def elsewhere(call: Callable[[], Any]) -> "Future[Any]":
    """What the call gives on a thread of its own."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(call)
    finally:
        pool.shutdown(wait=False)


def wait_until(condition: Callable[[], bool]) -> None:
    """For what no event tells: what another thread of this library is doing."""
    give_up = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < give_up
        pause.wait(1e-4)


def workers() -> list[threading.Thread]:
    """The threads that runners compute on."""
    return [thread for thread in threading.enumerate() if thread.name == "impatient-runner"]


def all_forgotten() -> bool:
    """Whether no runner is left that has a thread."""
    if workers():
        # an error's traceback holds its runner in a cycle
        gc.collect()
    return not workers()


def quantiles(value: Any) -> Quantiles:
    return value if isinstance(value, Quantiles) else Quantiles.of([value])


def batch_costs(stages_s: Sequence[Any], heads_s: Sequence[Any]) -> BatchCosts:
    return BatchCosts(
        stages=tuple(map(quantiles, stages_s)),
        heads=tuple(map(quantiles, heads_s)),
        exit_free=quantiles(0.0),
    )


def costs_of(
    stages_s: Sequence[Any], heads_s: Sequence[Any] | None = None, *, sizes: Sequence[int] = (1,)
) -> CostProfile:
    """A profile with these numbers, each a `Quantiles` or a constant."""
    count = len(stages_s)
    batch = batch_costs(stages_s, heads_s if heads_s is not None else [0.0] * count)
    names = tuple(f"exit {index}" for index in range(count))
    zeros = (0,) * count
    return CostProfile(
        exits=names,
        batches=dict.fromkeys(sizes, batch),
        stage_macs=zeros,
        head_macs=zeros,
        stage_parameters=zeros,
        head_parameters=zeros,
        provenance=provenance(),
    )


def runner_of(
    network: FakeNetwork, costs: CostProfile | None = None, policy: Any = None, **options: Any
) -> Runner:
    """A runner on the network's clock; without costs it knows exactly what everything takes."""
    known = (
        costs_of(network.stages_s, network.heads_s, sizes=[network.outputs.shape[1]])
        if costs is None
        else costs
    )
    return Runner(network, known, policy, any_profile=True, clock=network.clock, **options)
