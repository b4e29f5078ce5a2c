"""One run, exit by exit: what contract and interruptible runs share."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from impatient.anytime import Exit, Network, Run
from impatient.errors import PolicyError, RunError
from impatient.inputs import batch_size_of, first_tensor, synchronise
from impatient.policies.policy import Policy
from impatient.runtime.compaction import Compaction
from impatient.runtime.limits import Limit
from impatient.runtime.progress import BatchProgress


class RunState:
    """A run that waits at each exit until it is told to go on.

    Args:
        network, x: what runs on what.
        policy: when going on is not worth it; None: never.
        compaction: whether samples that have stopped are taken out of the batch.
    Attributes:
        samples: in its batch.
        exit: where it stands; None before the first.
        spent: the exits it came to, and whether the head of each has run.

    Thread:
        To be advanced, asked and closed on one thread, in inference mode; `cancel` may be called
        from any.
    """

    def __init__(
        self, network: Network, x: Any, policy: Policy | None, compaction: Compaction
    ) -> None:
        self._network = network
        self._policy = policy
        self._compaction = compaction
        self._x: Any = x
        self._device = first_tensor(x).device
        self.samples = batch_size_of(x)
        # the network's run; None before the first stage and when closed
        self._run: Run | None = None
        self._cancelling = threading.Lock()
        self._collected: BatchProgress | None = None
        self._closed = False
        # by the policy at this exit; None: not asked
        self._stopped: bool | None = None
        self._following: int | None = (
            # the exit that would come next; None: the network itself has stopped
            0
        )
        self.exit: Exit | None = None
        self.spent: list[tuple[int, bool]] = []

    @property
    def size(self) -> int:
        """Number of rows that the next stage runs."""
        return self.samples if self._collected is None else self._collected.size

    @property
    def following(self) -> int:
        """The exit that would come next."""
        # where it is, `stops` has said so
        assert self._following is not None
        return self._following

    def check_open(self) -> None:
        """Raise RunError if it was closed."""
        if self._closed:
            raise RunError("this run was closed. Begin a new one.")

    def advance(self) -> Exit:
        """Run the next stage.

        Raises:
            RunError: if the network's run ends before its last exit, or this one was closed.
        """
        self.check_open()
        if self._collected is None:
            self._begin()
        else:
            self._collected.go_on()
        exit = None if self._run is None else next(self._run, None)
        if exit is None:
            raise RunError(
                f"the network's run ended before exit {self._network.num_exits - 1}; its last exit "
                f"must always come."
            )
        synchronise(self._device)
        self.exit = exit
        self._stopped = None
        self._following = exit.upcoming
        self.spent.append((exit.index, False))
        return exit

    def stops(self) -> Literal["final", "policy"] | None:
        """Why to stop at this exit, whatever time there is: nothing comes after it, or the policy
        says so; asked once.
        """
        assert self.exit is not None
        assert self._collected is not None
        if self.exit.index == self._network.num_exits - 1:
            return "final"
        if self._following is None:
            return "policy"
        if self._stopped is None:
            if self._policy is not None and self._policy.looks_at(self.exit.index):
                self.spent[-1] = (self.exit.index, True)
            self._stopped = self._collected.add(self.exit)
        return "policy" if self._stopped else None

    def answer(self) -> tuple[Tensor, tuple[int, ...]]:
        """The outputs here, with this exit's for all samples that have not stopped, and the exit of
        each.
        """
        assert self.exit is not None
        assert self._collected is not None
        self.spent[-1] = (self.exit.index, True)
        if self.exit.index == self._network.num_exits - 1:
            return self._collected.finish(self.exit)
        # a copy: a later stage may write over it
        return self._collected.snapshot(self.exit)

    def allowed(self, limits: Iterable[Limit]) -> bool:
        """Whether the next exit stays within all limits."""
        return all(limit.allows(self.spent, self.following) for limit in limits)

    def override(self, policy: Policy | None) -> None:
        """From here on, this policy; samples that have stopped but are still in the batch go on.

        Raises:
            PolicyError: if a cascade has begun to run under another router, or would need one.
        """
        routes = [each for each in (self._policy, policy) if each is not None and each.routes]
        if routes and self._collected is not None:
            raise PolicyError(
                "networks have been chosen by another policy in this run; begin a new run."
            )
        self._policy = policy
        self._stopped = None
        if self._collected is not None:
            self._collected.override(policy)

    def cancel(self) -> None:
        """End the stage in flight early, where the network can; `advance` then raises."""
        with self._cancelling:
            if self._run is not None:
                self._run.cancel()

    def close(self) -> None:
        """Throw away what has not been computed; harmless when there is nothing to throw away."""
        # a cancelled stage must be of this run: the next one runs the same stages
        with self._cancelling:
            run = self._run
            self._run = None
            self._closed = True
        self._x = None
        self._collected = None
        if run is not None:
            run.close()

    def _begin(self) -> None:
        policy = self._policy
        self._run = (
            self._network.routed_exits(self._x, policy)
            if policy is not None and policy.routes
            else self._network.exits(self._x)
        )
        self._collected = BatchProgress(
            self._policy, self._network, self._x, self._run, self._compaction
        )
