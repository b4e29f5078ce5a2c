"""One run, exit by exit: what contract and interruptible runs share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from impatient.anytime import Exit, Network, Run, begin
from impatient.clock import Clock
from impatient.errors import PolicyError, RunError
from impatient.inputs import input_tensor, synchronise
from impatient.policies.policy import Policy
from impatient.runtime.answer import TimeSpent
from impatient.runtime.compaction import Compaction
from impatient.runtime.limits import Limit
from impatient.runtime.progress import BatchProgress


class Looks(NamedTuple):
    """What a policy looks at where it is asked."""

    outputs: bool
    features: bool


def looks_of(policy: Policy, exit: int) -> Looks | None:
    """Return what a policy looks at, None where it is not asked."""
    if not policy.looks_at(exit):
        return None
    return Looks(policy.needs_outputs, policy.needs_features)


class Plan:
    """What the runs of a runner share.

    Args:
        network: network to run.
        policy: policy that runs have unless they get another one.
        compaction: rule for removing samples that have stopped from a batch.
        clock: clock to read what stages, heads and decisions take.
    """

    __slots__ = ("compaction", "last", "looks", "network", "now", "policy")

    def __init__(
        self, network: Network, policy: Policy | None, compaction: Compaction, clock: Clock
    ) -> None:
        self.network = network
        self.policy = policy
        self.compaction = compaction
        self.now = clock.now
        self.last = network.num_exits - 1
        self.looks: tuple[Looks | None, ...] = (None,) * self.last
        if policy is not None:
            self.looks = tuple(looks_of(policy, exit) for exit in range(self.last))


class RunState:
    """A run that waits at each exit until it is advanced.

    Args:
        plan: what it shares with other runs.
        x: input of the network.
        samples: number of samples in it.
        policy: policy that stops samples early; None stops none.
    Attributes:
        exit: exit that the run has reached; None before the first.
        following: exit that would come next, once `stops` has returned None.
        spent: exits that the run has reached, each with whether its head has run.
        device: device of the input; None for the CPU.
        stages_s, heads_s, decisions_s: seconds that the parts took since `reset_times`.

    Thread:
        Use it on one thread, in inference mode. Only `cancel` may be called from any thread.
    """

    def __init__(
        self,
        plan: Plan,
        x: Any,
        samples: int,
        policy: Policy | None,
    ) -> None:
        tensor = input_tensor(x)
        # None where nothing is computed in the background.
        self.device = None if tensor.is_cpu else tensor.device
        self._plan = plan
        self._now = plan.now
        self._last = plan.last
        self._policy = policy
        self._x: Any = x
        self.samples = samples
        self.spent: list[tuple[int, bool]] = []
        self.exit: Exit | None = None
        self.stages_s = self.heads_s = self.decisions_s = 0.0
        self.following = 0
        # Seconds of the first stage and its head, the head as profiled.
        self.first_s = 0.0
        # Instant at which the latest stage began.
        self.began = 0.0
        # Batches of several samples have one, once they have begun.
        self._progress: BatchProgress | None = None
        # The network's run. None before the first stage and after closing.
        self._run: Run | None = None
        self._closed = False
        # Whether the run ends where it answers first.
        self._over = False
        # Whether the policy stops at this exit. None: it was not asked yet.
        self._stopped: bool | None = None
        self._cancelling = threading.Lock()

    @property
    def size(self) -> int:
        """Return the number of rows that the next stage runs."""
        return self.samples if self._progress is None else self._progress.size

    @property
    def exit_names(self) -> tuple[str, ...]:
        """Return the names of the network's exits."""
        return self._plan.network.exit_names

    @property
    def policy(self) -> Policy | None:
        """Return the policy of the run."""
        return self._policy

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

    def reach(self, exit: Exit) -> float:
        """Note that a stage has run, and return the instant."""
        if self.device is not None:
            synchronise(self.device)
        now = self._now()
        self.stages_s += now - self.began
        self.exit = exit
        self._stopped = None
        self.spent.append((exit.index, False))
        return now

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

    def stops(self, now: float) -> Literal["final", "policy"] | None:
        """Return why to stop at this exit whatever time is left, or None.

        The policy is asked only once at each exit.

        Args:
            now: present instant.
        """
        exit: Any = self.exit
        index = exit.index
        if index == self._last:
            return "final"
        upcoming = exit.upcoming
        if upcoming is None:
            # The network itself has stopped.
            return "policy"
        self.following = upcoming
        if self._stopped is None:
            policy = self._policy
            plan = self._plan
            if policy is plan.policy:
                looks = plan.looks[index]
            else:
                looks = None if policy is None else looks_of(policy, index)
            self._stopped = looks is not None and self._asked(exit, looks, now)
        return "policy" if self._stopped else None

    def _asked(self, exit: Exit, looks: Looks, began: float) -> bool:
        """Ask the policy whether all samples have stopped at this exit."""
        policy: Any = self._policy
        now = self._now
        output = None
        if looks.outputs:
            output = exit.output()
            decided = now()
            self.heads_s += decided - began
            self.spent[-1] = (exit.index, True)
            began = decided
        if self._progress is None:
            # With one sample there is nothing to merge or remove, and every call here adds to the
            # time of each answer.
            pooled = self._plan.network.pooled(exit) if looks.features else None
            stopped: bool = policy.stops_one(exit.index, output, pooled)
        else:
            stopped = self._progress.add(exit)
        self.decisions_s += now() - began
        return stopped

    def answer(self) -> tuple[Tensor, tuple[int, ...]]:
        """Return the output of each sample, and the exit that it comes from.

        Samples that have not stopped get the output of this exit.
        """
        exit = self.exit
        assert exit is not None
        index, ran = self.spent[-1]
        began = self._now()
        output = exit.output()
        if not ran:
            self.heads_s += self._now() - began
            self.spent[-1] = (index, True)
        # A later stage may overwrite the output.
        over = self._over or index == self._last
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
        network = self._plan.network
        run = (
            network.routed_exits(self._x, policy)
            if policy is not None and policy.routes
            else begin(network, self._x)
        )
        self._run = run
        if self.samples > 1:
            compaction = self._plan.compaction
            self._progress = BatchProgress(policy, network, self._x, run, compaction)
        self.began = self._now()
        return run
