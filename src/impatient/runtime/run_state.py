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
from impatient.inputs import batch_size_of, first_tensor, synchronise
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
        policy: policy that stops samples early; None stops none.
        compaction: rule for removing samples that have stopped from the batch.
        clock: clock to read what heads and decisions take.
    Attributes:
        samples: number of samples in the batch.
        exit: exit that the run has reached; None before the first.
        spent: exits that the run has reached, each with whether its head has run.
        stages_s, heads_s, decisions_s: seconds that the parts took since `reset_times`.

    Thread:
        Use it on one thread, in inference mode. Only `cancel` may be called from any thread.
    """

    def __init__(
        self,
        network: Network,
        x: Any,
        policy: Policy | None,
        compaction: Compaction,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._network = network
        self._policy = policy
        self._compaction = compaction
        self._now = clock.now
        self._last = network.num_exits - 1
        self._x: Any = x
        device = first_tensor(x).device
        # None where nothing is computed in the background.
        self._device = None if device.type == "cpu" else device
        self.samples = batch_size_of(x)
        # The network's run. None before the first stage and after closing.
        self._run: Run | None = None
        self._cancelling = threading.Lock()
        self._progress: BatchProgress | None = None
        self._closed = False
        # Whether the policy stops at this exit. None: it was not asked yet.
        self._stopped: bool | None = None
        # Whether the policy needs outputs and features. None: it was not asked yet.
        self._needs: tuple[bool, bool] | None = None
        # The exit that would come next. None: the network itself has stopped.
        self._following: int | None = 0
        self.exit: Exit | None = None
        self.spent: list[tuple[int, bool]] = []
        self.stages_s = self.heads_s = self.decisions_s = 0.0
        # Seconds of the first stage and its head, the head as profiled.
        self.first_s = 0.0
        # Instant at which the latest stage ended.
        self.reached_at = 0.0

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
        """Run the next stage.

        Raises:
            RunError: if the network's run ends before its last exit, or if this run was closed.
        """
        self.check_open()
        if self._progress is None:
            self._begin()
        else:
            self._progress.go_on()
        began = self._now()
        exit = None if self._run is None else next(self._run, None)
        if exit is None:
            raise self._ended_early()
        self._reached(exit, began)
        return exit

    def walk(self, visit: Callable[[Exit], bool]) -> None:
        """Run all stages without pausing, from the first until `visit` returns True at an exit.

        Raises:
            RunError: if the network's run ends before its last exit.
        """
        run, progress = self._begin()
        # One sample is never taken out of its batch.
        alone = self.samples == 1
        began = self._now()
        done = False

        def reached(exit: Exit) -> bool:
            nonlocal began, done
            self._reached(exit, began)
            done = visit(exit)
            if not done:
                if not alone:
                    progress.go_on()
                began = self._now()
            return done

        run.walk(reached)
        if not done:
            raise self._ended_early()

    def _reached(self, exit: Exit, began: float) -> None:
        """Note that a stage has run, which was begun at an instant."""
        if self._device is not None:
            synchronise(self._device)
        self.reached_at = self._now()
        self.stages_s += self.reached_at - began
        self.exit = exit
        self._stopped = None
        self._following = exit.upcoming
        self.spent.append((exit.index, False))

    def _ended_early(self) -> RunError:
        return RunError(
            f"the network's run ended before exit {self._last}; its last exit must always come."
        )

    def stops(self) -> Literal["final", "policy"] | None:
        """Return why to stop at this exit whatever time is left, or None.

        The policy is asked only once at each exit.
        """
        assert self.exit is not None
        assert self._progress is not None
        index = self.exit.index
        if index == self._last:
            return "final"
        if self._following is None:
            return "policy"
        if self._stopped is None:
            self._stopped = self._asked(self._policy, self._progress)
        return "policy" if self._stopped else None

    def _asked(self, policy: Policy | None, progress: BatchProgress) -> bool:
        """Ask the policy whether all samples have stopped at this exit."""
        exit = self.exit
        if policy is None or exit is None or not policy.looks_at(exit.index):
            return False
        if self._needs is None:
            self._needs = policy.needs_outputs, policy.needs_features
        needs_outputs, needs_features = self._needs
        began = self._now()
        output = None
        if needs_outputs:
            self.spent[-1] = (exit.index, True)
            output = exit.output()
        asked = self._now()
        self.heads_s += asked - began
        # With one sample there is nothing to merge or remove, and every call here adds to the time
        # of each answer.
        if self.samples == 1:
            pooled = self._network.pooled(exit) if needs_features else None
            stopped = policy.stops_one(exit.index, output, pooled)
        else:
            stopped = progress.add(exit)
        self.decisions_s += self._now() - asked
        return stopped

    def answer(self) -> tuple[Tensor, tuple[int, ...]]:
        """Return the output of each sample, and the exit that it comes from.

        Samples that have not stopped get the output of this exit.
        """
        assert self.exit is not None
        assert self._progress is not None
        self.spent[-1] = (self.exit.index, True)
        began = self._now()
        self.exit.output()
        self.heads_s += self._now() - began
        if self.exit.index == self._last:
            return self._progress.finish(self.exit)
        # A copy, because a later stage may overwrite the output.
        return self._progress.snapshot(self.exit)

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
        if routes and self._progress is not None:
            raise PolicyError(
                "networks have been chosen by another policy in this run; begin a new run."
            )
        self._policy = policy
        self._needs = None
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
        self._x = None
        self._progress = None
        if run is not None:
            run.close()

    def _begin(self) -> tuple[Run, BatchProgress]:
        policy = self._policy
        run = (
            self._network.routed_exits(self._x, policy)
            if policy is not None and policy.routes
            else begin(self._network, self._x)
        )
        self._run = run
        progress = BatchProgress(policy, self._network, self._x, run, self._compaction)
        self._progress = progress
        return run, progress
