"""Run against the clock on a GPU without waiting for every stage.

Status: the logic is tested on a simulated device; the tests marked `gpu` and
benchmarks/gpu/running.py wait for a real one. Never run on a GPU, so neither its answers nor its
gain over `Runner` are known.

A GPU receives work and does it later, in order. Waiting for each stage before the next is submitted
would leave it idle in between. So the host submits a bounded number of stages ahead, and looks at
events:

* The answer of a stage is copied to the host after it, on a separate stream, while the next stage
  already runs.
* Only an answer whose copy has arrived counts.
* A policy looks at copies on the host, so that an early exit stalls nothing. Stages that were
  submitted ahead of its decision cannot be recalled; these at most `ahead` stages are the price.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from impatient.anytime import Network, Run
from impatient.clock import NEVER, Deadline
from impatient.costs import CostProfile
from impatient.errors import RunError
from impatient.inputs import batch_size_of, input_tensor
from impatient.networks.cascade import Cascade
from impatient.policies.policy import Policy
from impatient.portable.timing import RESERVE_S
from impatient.runtime.answer import Answer, StoppedBy, answered
from impatient.runtime.limits import Limit, limits_of
from impatient.runtime.progress import asked, filled
from impatient.runtime.rows import Deadlines, Limits, one_for_all
from impatient.runtime.runner import Runner


@dataclass(frozen=True, slots=True)
class Fetched:
    """Tensors on their way to the host.

    Attributes:
        values: tensors on the host, valid when `arrived` returns True.
        arrived: function that tells whether the copies are complete.
    """

    values: tuple[Tensor, ...]
    arrived: Callable[[], bool]


class Queue(Protocol):
    """A device as the runner uses it."""

    def begin(self) -> None:
        """Begin a run after the copies of the previous one are complete."""

    def fetch(self, tensors: Sequence[Tensor]) -> Fetched:
        """Start to copy tensors to the host as soon as they are computed."""

    def pause(self) -> None:
        """Pause between two looks at events."""


class CudaQueue:
    """The current stream of a CUDA device, and a second one for copies."""

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
                # Otherwise its memory could be reused before it was copied.
                tensor.record_stream(self._copies)
                values.append(
                    torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                        tensor, non_blocking=True
                    )
                )
            arrived.record(self._copies)
        return Fetched(tuple(values), arrived.query)

    def pause(self) -> None:
        """Do not pause: an event can be read millions of times a second."""


class GpuRunner(Runner):
    """A `Runner` whose contract runs submit stages to a GPU ahead of decisions.

    `run` differs from `Runner.run` in three ways: the head of every exit runs, the answer is on the
    host, and the policy may lag by one or more stages. `open` and `start` are those of `Runner`,
    which wait for every stage.

    Args:
        network: network on a CUDA device.
        costs: profile as for `Runner`.
        policy: policy as for `Runner`.
        **options: other options of `Runner`.
        ahead: number of stages that may be submitted beyond the one whose answer is awaited; 0
            waits for each.
        queue: device to use; the default is that of the input.
    Raises:
        RunError: if `ahead` is negative, or the network routes its samples itself.
        StaleInput: if the profile does not belong to this network and machine.
        PolicyError: if the policy cannot run this network.
        CostError: if the profile has another number of exits than the network.

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
                "a routed cascade waits for each of its networks before it routes the samples; run "
                "it with Runner."
            )
        super().__init__(network, costs, policy, **options)
        self._ahead = ahead
        self._queue = queue

    def run(self, x: Any, *, deadline: Deadlines = NEVER, limits: Limits | None = None) -> Answer:
        """Answer by a deadline that is known now.

        Args:
            x: input on the device; its batch size or a larger one must have been profiled.
            deadline: deadline as for `Runner.run`, one for all rows.
            limits: limits as for `Runner.run`, the same for all rows.
        Returns:
            The answer of the deepest exit that has arrived, or of the exits at which the policy
            stopped, on the host.
        Raises:
            NoAnswerInTime: if not even the first exit fits and the runner was made with
                when_late="raise".

        Sync:
            Waits only for copies of outputs, and not beyond the deadline once there is an answer.
        """
        last, bounds = one_for_all(deadline, limits)
        ahead = _RunAhead(self, x, last, limits_of(self.costs, bounds))
        self._check_first(self._predictor(batch_size_of(x)), ahead.begin, last)
        self._check_limits(ahead.limits)
        queue = self._queue or CudaQueue(input_tensor(x).device)
        self._queue = queue
        with torch.inference_mode(), self.network.exits(x) as run:
            queue.begin()
            return ahead.answer(run, queue)


@dataclass(frozen=True, slots=True)
class _Step:
    """A stage that was submitted to the device.

    Attributes:
        index: number of its exit.
        places: places of its rows in the batch.
        fetched: its answer, on the way to the host.
        given: instant at which it was submitted.
    """

    index: int
    places: Tensor
    fetched: Fetched
    given: float


class _RunAhead:
    """One run, begun when it is made."""

    def __init__(
        self, runner: GpuRunner, x: Any, deadline: Deadline, limits: tuple[Limit, ...]
    ) -> None:
        self.begin = runner.clock.now()
        self.limits = limits
        self._runner = runner
        self._deadline = deadline
        self._device = input_tensor(x).device
        # Places in the batch of the rows that the next stage runs.
        self._places = torch.arange(batch_size_of(x))
        # Number of these rows without the copies that fill the batch up.
        self._count = len(self._places)
        # Size of one sample's features at the exit submitted last.
        self._row_bytes = 0.0
        self._policy = runner.begun(len(self._places))
        wanted = (
            self._policy is not None
            and len(self._places) > 1
            and runner._compaction.when != "never"
        )
        self._shrinks = wanted and runner.network.shrinks(x)
        # Stages that were submitted and have not arrived.
        self._steps: deque[_Step] = deque()
        self._next = 0
        # Instant at which the last answer arrived.
        self._arrived_at = self.begin
        # The latest answer of every sample, and the exit that it comes from.
        self._output: Tensor | None = None
        self._exit = torch.zeros(len(self._places), dtype=torch.long)
        # Whether the policy has stopped a sample.
        self._done = torch.zeros(len(self._places), dtype=torch.bool)

    def answer(self, run: Run, queue: Queue) -> Answer:
        """Run on a device until there is an answer to return."""
        clock = self._runner.clock
        while True:
            while (refused := self._refuses()) is None:
                self._submit(run, queue)
            if not self._steps:
                assert refused != "busy"
                return self._answered(refused)
            if self._steps[0].fetched.arrived():
                if (stopped_by := self._settle(self._steps.popleft())) is not None:
                    return self._answered(stopped_by)
            elif self._output is not None and clock.now() + RESERVE_S >= self._deadline.instant:
                return self._answered("deadline")
            else:
                queue.pause()

    def _refuses(self) -> Any:
        """Return "busy" or a reason to stop, if no stage is submitted now."""
        if self._next == self._runner.network.num_exits or len(self._steps) > self._runner._ahead:
            return "busy"
        if self._next == 0:
            return None
        if not all(
            limit.allows([(index, True) for index in range(self._next)], self._next)
            for limit in self.limits
        ):
            return "limit"
        predictor = self._runner._predictor(len(self._places))
        fits = predictor.fits(self._next, self._free(), self._deadline.instant, RESERVE_S)
        return None if fits else "deadline"

    def _free(self) -> float:
        """Predict the instant at which the device completes its work, by the profile."""
        now = self._runner.clock.now()
        free = self._arrived_at
        for step in self._steps:
            needed_s = self._runner._predictor(len(step.places)).needs_s(step.index)
            free = max(free, step.given) + needed_s
        return max(free, now)

    def _submit(self, run: Run, queue: Queue) -> None:
        now = self._runner.clock.now()
        self._reduce(run)
        exit = next(run, None)
        if exit is None:
            raise RunError(
                f"the network's run ended before exit {self._next}; use an input that reaches all "
                "exits."
            )
        wanted = [exit.output()]
        if self._policy is not None and self._policy.needs_features:
            wanted.append(self._runner.network.pooled(exit))
        self._row_bytes = exit.row_bytes
        self._steps.append(_Step(exit.index, self._places, queue.fetch(wanted), now))
        self._next = exit.index + 1

    def _settle(self, step: _Step) -> StoppedBy | None:
        """Store an answer that has arrived, and return why to stop, or None."""
        now = self._runner.clock.now()
        predictor = self._runner._predictors.get(len(step.places))
        if predictor is not None:
            predictor.observe(step.index, now - max(self._arrived_at, step.given), answered=True)
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

    def _reduce(self, run: Run) -> None:
        """Remove samples that have finished from the batch, where that saves time."""
        if not self._shrinks or self._next == 0:
            return
        left = (~self._done[self._places[: self._count]]).nonzero()[:, 0]
        size = self._runner._compaction.size(
            self._next - 1, len(self._places), len(left), self._row_bytes
        )
        if size < len(self._places):
            rows = filled(left, size)
            run.keep(rows.to(self._device))
            self._places = self._places[rows]
            self._count = len(left)

    def _answered(self, stopped_by: StoppedBy) -> Answer:
        assert self._output is not None
        exits = tuple(self._exit.tolist())
        return answered(
            self._output, exits, self._runner.clock, self.begin, self._deadline, stopped_by
        )
