"""Running against the clock on a GPU without waiting for it.

Status: the logic is tested on a simulated device; the tests marked `gpu` and
benchmarks/gpu/running.py wait for a real one. Never run on a GPU, so neither its answers nor its
gain over `Runner` are known.

A GPU is given work and does it in order, later; waiting for each stage before the next is given
would leave it idle in between. So the host gives it a bounded number of stages ahead, and looks at
events:

* what a stage answers is copied to the host behind it, on a stream of its own, while the next stage
  already runs;
* an answer is one whose copy has arrived, never one that is still on its way;
* a policy is asked about copies on the host, so that an early exit stalls nothing; what was given
  ahead of its decision cannot be taken back, and is the price: at most `ahead` stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from impatient.anytime import Network, Run
from impatient.clock import NEVER, Clock, Deadline
from impatient.costs import CostProfile
from impatient.errors import RunError
from impatient.inputs import batch_size_of, first_tensor
from impatient.networks.cascade import Cascade
from impatient.policies.policy import Policy
from impatient.runtime.answer import Answer, StoppedBy, answered
from impatient.runtime.limits import Limit, Unit, limits_of
from impatient.runtime.progress import (
    asked,
    filled,
)
from impatient.runtime.runner import RESERVE_S, Runner


@dataclass(frozen=True, slots=True)
class Fetched:
    """Tensors on their way to the host: `values` hold them once `arrived` says so."""

    values: tuple[Tensor, ...]
    arrived: Callable[[], bool]


class Queue(Protocol):
    """What the runner needs of a device."""

    def begin(self) -> None:
        """Before a run: what it writes over has been copied by then."""
        ...

    def fetch(self, tensors: Sequence[Tensor]) -> Fetched:
        """Begin to copy to the host what the device will have computed; return at once."""
        ...

    def pause(self) -> None:
        """Between two looks at events."""
        ...


class CudaQueue:
    """The current stream of a CUDA device, and one for copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def begin(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._copies)

    def fetch(self, tensors: Sequence[Tensor]) -> Fetched:
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        arrived = torch.cuda.Event()
        with torch.cuda.stream(self._copies):
            values = []
            for tensor in tensors:
                # or its memory would be given away before it was read
                tensor.record_stream(self._copies)
                values.append(
                    torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                        tensor, non_blocking=True
                    )
                )
            arrived.record(self._copies)
        return Fetched(tuple(values), arrived.query)

    def pause(self) -> None:
        """None: an event may be asked millions of times a second."""


class GpuRunner(Runner):
    """A `Runner` whose contract runs give a GPU stages ahead of what is decided.

    `run` differs from `Runner.run` in this: the head of every exit runs; the answer lies on the
    host; and the policy may be one or more stages behind. `open` and `start` are those of `Runner`,
    which wait for every stage.

    Args:
        network: on a CUDA device.
        costs: as for `Runner`.
        policy: as for `Runner`.
        **options: as for `Runner`.
        ahead: how many stages may be given to the device beyond the one whose answer is awaited; 0
            waits for each.
        queue: the device; by default the one of the network's input.
    Raises:
        RunError: if `ahead` is negative, or the network routes its samples itself.
        StaleInput, PolicyError, CostError: as `Runner` does.

    Thread:
        One run at a time.
    """

    def __init__(
        self,
        network: Network,
        costs: CostProfile,
        policy: Policy | None = None,
        *,
        ahead: int = 1,
        queue: Queue | None = None,
        **options: Any,
    ) -> None:
        if ahead < 0:
            raise RunError(f"ahead={ahead}; expected 0 or more stages.")
        if isinstance(network, Cascade) and network.router is not None:
            raise RunError(
                "a routed cascade waits for each of its networks to send the samples on; run it "
                "with Runner."
            )
        super().__init__(network, costs, policy, **options)
        self._ahead = ahead
        self._queue = queue

    def run(
        self, x: Any, *, deadline: Deadline = NEVER, limits: Mapping[Unit, float] | None = None
    ) -> Answer:
        """Answer by a deadline that is known now.

        Args:
            x: on the device; its batch size, or a larger one, must have been profiled.
            deadline: as for `Runner.run`.
            limits: as for `Runner.run`.
        Returns:
            The answer of the deepest exit that has arrived, or of the exits at which the policy
            stopped; on the host.
        Raises:
            NoAnswerInTime: if not even the first exit fits and the runner was made with
                when_late="raise".

        Sync:
            Waits for copies of outputs alone, and never longer than till the deadline once there is
            an answer.
        """
        begin = self.clock.now()
        bounds = limits_of(self.costs, limits)
        self._check_first(self._pace(batch_size_of(x)), begin, deadline)
        self._check_limits(bounds)
        if self._queue is None:
            self._queue = CudaQueue(first_tensor(x).device)
        with torch.inference_mode(), self.network.exits(x) as run:
            self._queue.begin()
            return _RunAhead(self, self._queue, run, x, begin, deadline, bounds).answer()


@dataclass(frozen=True, slots=True)
class _Step:
    """A stage that was given to the device: its exit, its rows' places in the batch, and its answer
    on the way.
    """

    index: int
    places: Tensor
    fetched: Fetched
    given: float


class _RunAhead:
    """One run."""

    def __init__(
        self,
        runner: GpuRunner,
        queue: Queue,
        run: Run,
        x: Any,
        begin: float,
        deadline: Deadline,
        limits: tuple[Limit, ...],
    ) -> None:
        self._runner = runner
        self._queue = queue
        self._run = run
        self._clock: Clock = runner.clock
        self._begin = begin
        self._deadline = deadline
        self._limits = limits
        self._device = first_tensor(x).device
        # in the batch, of the rows that the next stage runs
        self._places = torch.arange(batch_size_of(x))
        # of them that are no fillers
        self._count = len(self._places)
        # of the features at the exit given last
        self._row_bytes = 0.0
        self._policy = runner.drawn(runner.policy, len(self._places))
        wanted = (
            self._policy is not None
            and len(self._places) > 1
            and runner._compaction.when != "never"
        )
        self._shrinks = wanted and runner.network.shrinks(x)
        # given and not arrived
        self._steps: deque[_Step] = deque()
        self._next = 0
        # when the last answer was there
        self._arrived_at = begin
        # the latest answer of every sample
        self._output: Tensor | None = None
        # and where it comes from
        self._exit = torch.zeros(len(self._places), dtype=torch.long)
        # whether the policy has stopped it
        self._done = torch.zeros(len(self._places), dtype=torch.bool)

    def answer(self) -> Answer:
        while True:
            while (refused := self._refuses()) is None:
                self._give()
            if not self._steps:
                assert refused != "busy"
                return self._answered(refused)
            if self._steps[0].fetched.arrived():
                if (stopped_by := self._settle(self._steps.popleft())) is not None:
                    return self._answered(stopped_by)
            elif (
                self._output is not None and self._clock.now() + RESERVE_S >= self._deadline.instant
            ):
                return self._answered("deadline")
            else:
                self._queue.pause()

    def _refuses(self) -> Any:
        """Why no further stage is given now: "busy", or what would stop the run."""
        if self._next == self._runner.network.num_exits or len(self._steps) > self._runner._ahead:
            return "busy"
        if self._next == 0:
            return None
        if not all(
            limit.allows([(index, True) for index in range(self._next)], self._next)
            for limit in self._limits
        ):
            return "limit"
        pace = self._runner._pace(len(self._places))
        return (
            None
            if pace.fits(self._next, self._free(), self._deadline.instant, RESERVE_S)
            else "deadline"
        )

    def _free(self) -> float:
        """When the device will be through with what it was given, by what the profile says."""
        now = self._clock.now()
        free = self._arrived_at
        for step in self._steps:
            free = max(free, step.given) + self._runner._pace(len(step.places)).needs_s(step.index)
        return max(free, now)

    def _give(self) -> None:
        now = self._clock.now()
        self._reduce()
        exit = next(self._run, None)
        if exit is None:
            raise RunError(
                f"the network's run ended before exit {self._next}; give it an input that comes to "
                f"all exits."
            )
        wanted = [exit.output()]
        if self._policy is not None and self._policy.needs_features:
            wanted.append(self._runner.network.pooled(exit))
        self._row_bytes = exit.row_bytes
        self._steps.append(_Step(exit.index, self._places, self._queue.fetch(wanted), now))
        self._next = exit.index + 1

    def _settle(self, step: _Step) -> StoppedBy | None:
        """Take an answer that has arrived; says why to stop, if so."""
        now = self._clock.now()
        if len(step.places) in self._runner._paces:
            pace = self._runner._pace(len(step.places))
            pace.observe(step.index, now - max(self._arrived_at, step.given), answered=True)
        self._arrived_at = now
        output = step.fetched.values[0]
        going = ~self._done[step.places]
        if self._output is None:
            self._output = output.clone()
        self._output[step.places[going]] = output[going]
        self._exit[step.places[going]] = step.index
        if step.index == self._runner.network.num_exits - 1:
            return "final"
        if self._policy is not None and self._policy.looks_at(step.index):
            self._done[step.places] |= self._stops(step)
        return "policy" if bool(self._done.all()) else None

    def _stops(self, step: _Step) -> Tensor:
        policy = self._policy
        assert policy is not None
        if len(step.places) != len(self._done):
            policy = policy.for_rows(step.places)
        outputs, *pooled = step.fetched.values
        return asked(policy, step.index, lambda: outputs, lambda: pooled[0])

    def _reduce(self) -> None:
        """Go on without the samples that have finished, where that pays."""
        if not self._shrinks or self._next == 0:
            return
        left = (~self._done[self._places[: self._count]]).nonzero()[:, 0]
        size = self._runner._compaction.size(
            self._next - 1, len(self._places), len(left), self._row_bytes
        )
        if size < len(self._places):
            rows = filled(left, size)
            self._run.keep(rows.to(self._device))
            self._places = self._places[rows]
            self._count = len(left)

    def _answered(self, stopped_by: StoppedBy) -> Answer:
        assert self._output is not None
        exits = tuple(self._exit.tolist())
        return answered(self._output, exits, self._clock, self._begin, self._deadline, stopped_by)
