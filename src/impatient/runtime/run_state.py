"""One run, exit by exit: what contract and interruptible runs share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from impatient.anytime import Exit, Network, Run, begin
from impatient.clock import SYSTEM_CLOCK, Clock
from impatient.errors import PolicyError, RunError
from impatient.inputs import first_tensor, synchronise
from impatient.policies.policy import Policy
from impatient.runtime.answer import TimeSpent
from impatient.runtime.compaction import Compaction
from impatient.runtime.limits import Limit
from impatient.runtime.progress import BatchProgress


class RunState:
    """A run that waits at each exit until it is advanced.

    Args:
        network: network to run.
        x: input of the network.
        samples: number of samples in it.
        policy: policy that stops samples early; None stops none.
        compaction: rule for removing samples that have stopped from the batch.
        clock: clock to read what heads and decisions take.
    Attributes:
        exit: exit that the run has reached; None before the first.
        spent: exits that the run has reached, each with whether its head has run.
        stages_s, heads_s, decisions_s: seconds that the parts took since `reset_times`.

    Thread:
        Use it on one thread, in inference mode. Only `cancel` may be called from any thread.
    """

    # Until something else is known; few stores, because every run makes a state.
    exit: Exit | None = None
    stages_s = heads_s = decisions_s = 0.0
    # Seconds of the first stage and its head, the head as profiled.
    first_s = 0.0
    # Instants at which the latest stage began and ended.
    began = 0.0
    reached_at = 0.0
    # Batches of several samples have one, once they have begun.
    _progress: BatchProgress | None = None
    # The network's run. None before the first stage and after closing.
    _run: Run | None = None
    _closed = False
    # Whether the run ends where it answers first.
    _over = False
    # Whether the policy stops at this exit. None: it was not asked yet.
    _stopped: bool | None = None
    # The exit that would come next. None: the network itself has stopped.
    _following: int | None = 0

    def __init__(
        self,
        network: Network,
        x: Any,
        samples: int,
        policy: Policy | None,
        compaction: Compaction,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        tensor = first_tensor(x)
        self._network = network
        self._policy = policy
        self._compaction = compaction
        self._now = clock.now
        self._last = network.num_exits - 1
        self._x: Any = x
        # None where nothing is computed in the background.
        self._device = None if tensor.is_cpu else tensor.device
        self.samples = samples
        self.spent: list[tuple[int, bool]] = []
        self._cancelling = threading.Lock()

    @property
    def size(self) -> int:
        """Return the number of rows that the next stage runs."""
        return self.samples if self._progress is None else self._progress.size

    @property
    def device(self) -> torch.device | None:
        """Return the device of the input.

        None stands for the CPU.
        """
        return self._device

    @property
    def exit_names(self) -> tuple[str, ...]:
        """Return the names of the network's exits."""
        return self._network.exit_names

    @property
    def policy(self) -> Policy | None:
        """Return the policy of the run."""
        return self._policy

    @property
    def following(self) -> int:
        """Return the exit that would come next."""
        # None only where `stops` has returned a reason.
        assert self._following is not None
        return self._following

    def check_open(self) -> None:
        """Raise RunError if the run was closed."""
        if self._closed:
            raise RunError("this run was closed. Begin a new one.")

    def advance(self) -> Exit:
        """Run the next stage; call `reach` then, and `go_on` before the next one.

        Raises:
            RunError: if the network's run ends before its last exit, or if this run was closed.
        """
        self.check_open()
        if self.exit is None:
            self._begin()
        exit = None if self._run is None else next(self._run, None)
        if exit is None:
            raise self.ended_early()
        return exit

    def walk(self, visit: Callable[[Exit], bool]) -> None:
        """Run all stages without pausing, from the first to where `visit` returns True.

        It calls `reach` at each exit, and `go_on` where it returns False.
        """
        self._over = True
        self._begin().walk(visit)

    def reach(self, exit: Exit) -> None:
        """Note that a stage has run."""
        if self._device is not None:
            synchronise(self._device)
        now = self._now()
        self.reached_at = now
        self.stages_s += now - self.began
        self.exit = exit
        self._stopped = None
        self.spent.append((exit.index, False))

    def go_on(self) -> None:
        """Go on to the next stage, which begins now."""
        if self._progress is not None:
            self._progress.go_on()
        self.began = self._now()

    def ended_early(self) -> RunError:
        """Return the error of a network whose run ends before its last exit."""
        return RunError(
            f"the network's run ended before exit {self._last}; its last exit must always come."
        )

    def stops(self) -> Literal["final", "policy"] | None:
        """Return why to stop at this exit whatever time is left, or None.

        The policy is asked only once at each exit.
        """
        exit: Any = self.exit
        index = exit.index
        if index == self._last:
            return "final"
        self._following = exit.upcoming
        if self._following is None:
            return "policy"
        if self._stopped is None:
            policy = self._policy
            self._stopped = (
                policy is not None and policy.looks_at(index) and self._asked(policy, exit)
            )
        return "policy" if self._stopped else None

    def _asked(self, policy: Policy, exit: Exit) -> bool:
        """Ask the policy whether all samples have stopped at this exit."""
        now = self._now
        output = None
        asked = began = now()
        if policy.needs_outputs:
            output = exit.output()
            asked = now()
            self.heads_s += asked - began
            self.spent[-1] = (exit.index, True)
        if self._progress is None:
            # With one sample there is nothing to merge or remove, and every call here adds to the
            # time of each answer.
            pooled = self._network.pooled(exit) if policy.needs_features else None
            stopped = policy.stops_one(exit.index, output, pooled)
        else:
            stopped = self._progress.add(exit)
        self.decisions_s += now() - asked
        return stopped

    def answer(self) -> tuple[Tensor, tuple[int, ...]]:
        """Return the output of each sample, and the exit that it comes from.

        Samples that have not stopped get the output of this exit.
        """
        exit = self.exit
        assert exit is not None
        began = self._now()
        output = exit.output()
        self.heads_s += self._now() - began
        self.spent[-1] = (exit.index, True)
        # A later stage may overwrite the output.
        over = self._over or exit.index == self._last
        if self._progress is None:
            return output if over else output.clone(), exit.exits
        return self._progress.finish(exit) if over else self._progress.snapshot(exit)

    def reset_times(self) -> None:
        """Count what the parts take from here on."""
        self.stages_s = self.heads_s = self.decisions_s = 0.0

    def times(self, waiting_s: float) -> TimeSpent:
        """Return where the time went since `reset_times`."""
        return TimeSpent(waiting_s, self.stages_s, self.heads_s, self.decisions_s, self.first_s)

    def allowed(self, limits: Iterable[Limit]) -> bool:
        """Tell whether the next exit stays within all limits."""
        return all(limit.allows(self.spent, self.following) for limit in limits)

    def override(self, policy: Policy | None) -> None:
        """Use another policy from here on.

        Samples that have stopped but are still in the batch go on.

        Raises:
            PolicyError: if one of the policies chooses networks and the run has begun.
        """
        routes = [each for each in (self._policy, policy) if each is not None and each.routes]
        if routes and self.exit is not None:
            raise PolicyError(
                "networks have been chosen by another policy in this run; begin a new run."
            )
        self._policy = policy
        self._stopped = None
        if self._progress is not None:
            self._progress.override(policy)

    def cancel(self) -> None:
        """End the stage in flight early, where the network can.

        `advance` then raises an error.
        """
        with self._cancelling:
            if self._run is not None:
                self._run.cancel()

    def close(self) -> None:
        """Discard what has not been computed. Closing twice is allowed."""
        # A late `cancel` must not end a stage of the next run, which uses the same stages.
        with self._cancelling:
            run = self._run
            self._run = None
            self._closed = True
        # The policy may be of single rows, and hold this.
        self._x = self._progress = self._policy = None
        if run is not None:
            run.close()

    def _begin(self) -> Run:
        policy = self._policy
        run = (
            self._network.routed_exits(self._x, policy)
            if policy is not None and policy.routes
            else begin(self._network, self._x)
        )
        self._run = run
        if self.samples > 1:
            self._progress = BatchProgress(policy, self._network, self._x, run, self._compaction)
        self.began = self._now()
        return run
