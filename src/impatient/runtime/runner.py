"""Running against the clock: contract runs, interruptible runs, and policies in both.

A **contract** run knows its deadline: it goes on to the next exit only if a high quantile of what that costs still fits, and
skips the heads that will not be the answer. An **interruptible** run posts the answer of every exit; whoever started it gets
the latest one when the deadline comes or when they interrupt, whatever the stage in flight is doing. A **policy** stops
either when going on is not worth it.
"""

from __future__ import annotations

import atexit
import itertools
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from impatient.clock import NEVER, SYSTEM_CLOCK, Clock, Deadline
from impatient.costs import BatchCosts, CostProfile, Statistic
from impatient.errors import CostError, NoAnswerInTime, PolicyError, RunError
from impatient.networks.stages import batch_size_of, first_tensor
from impatient.policies.rules import Policy
from impatient.runtime.profile import check_profile, synchronise

StoppedBy = Literal["final", "policy", "deadline", "interrupt"]

# Time kept back from every deadline for handing the answer over: reading the clock, building the Answer, returning.
RESERVE_S = 100e-6

# How long the interpreter's end waits for the stage in flight. Torch aborts the process when its thread is cut short.
END_S = 10.0


class ExitLike(Protocol):
    """One exit of a run."""

    @property
    def index(self) -> int: ...

    def output(self) -> Tensor: ...


def upcoming(exit: ExitLike) -> int | None:
    """The exit that would come next; None where the network itself, a routed cascade, has sent all samples to their answers."""
    following: int | None = getattr(exit, "upcoming", exit.index + 1)
    return following


def answering(exit: ExitLike, count: int) -> tuple[int, ...]:
    """Per sample, the exit whose output an exit gives: a routed cascade's samples went different ways."""
    exits: tuple[int, ...] = getattr(exit, "exits", (exit.index,) * count)
    return exits


class StagedNetwork(Protocol):
    """What the runner needs of a network."""

    @property
    def num_exits(self) -> int: ...

    def exits(self, x: Any) -> AbstractContextManager[Iterator[Any]]: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What a run returns.

    Attributes:
        output: before softmax, shape [B, num_classes].
        exit: the deepest exit that answered.
        exits: per sample, the exit its output comes from.
        elapsed_s: from the call to the moment this answer was there.
        stopped_by: "final" (the last exit), "policy" (not worth going on), "deadline" or "interrupt".
        deadline_met: whether the answer was there by the deadline; True when there was none.
    """

    output: Tensor
    exit: int
    exits: tuple[int, ...]
    elapsed_s: float
    stopped_by: StoppedBy
    deadline_met: bool


class Runner:
    """Answers by a deadline, as well as the time allows.

    Args:
        network: from `attach_exits`, or anything with the same protocol. Put it in eval mode yourself.
        costs: measured on this machine with `profile`; another machine's profile is refused.
        policy: when going on is not worth it; None goes on as long as time allows.
        statistic: the quantile of a stage's cost that must fit before it is begun. The lower, the deeper and the later.
        when_late: what to do when not even the first exit fits: "answer" late and say so, or "raise".
        any_profile: use a profile of another machine, thread count or version all the same.
        clock: where time comes from.
    Raises:
        StaleInput: if the profile does not belong to this network and machine.
        PolicyError, CostError: if policy, profile and network have different numbers of exits.

    Thread:
        `run` may be called from several threads; runs that were started (`start`) share one worker and queue behind
        each other, with their deadlines ticking.
    """

    def __init__(
        self,
        network: StagedNetwork,
        costs: CostProfile,
        policy: Policy | None = None,
        *,
        statistic: Statistic = "p99",
        when_late: Literal["answer", "raise"] = "answer",
        any_profile: bool = False,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if costs.num_exits != network.num_exits:
            raise CostError(f"the cost profile has {costs.num_exits} exits, the network {network.num_exits}; profile it anew.")
        policy_exits = getattr(policy, "num_exits", network.num_exits)
        if policy_exits != network.num_exits:
            raise PolicyError(f"the policy is for {policy_exits} exits, the network has {network.num_exits}; fit it anew.")
        if when_late not in ("answer", "raise"):
            raise RunError(f"when_late={when_late!r}; needed: 'answer' or 'raise'.")
        if not any_profile:
            check_profile(costs, network, "profile this network here, or pass any_profile=True to use it all the same")
        self.network, self.costs, self.policy = network, costs, policy
        self.clock = clock
        self._when_late = when_late
        gates = getattr(policy, "added_s", lambda: (0.0,) * costs.num_exits)()  # learned gates take time, too
        self._plans = {size: _Plan(batch, statistic, gates) for size, batch in costs.batches.items()}
        self._runs = itertools.count()
        self._drift = 1.0
        self._worker = Worker()
        weakref.finalize(self, self._worker.forget).atexit = False

    @property
    def drift(self) -> float:
        """How much slower than profiled this machine is now: a running mean of measured over profiled stage time.

        Every prediction is multiplied by it, but never by less than 1.
        """
        return self._drift

    def run(self, x: Any, *, deadline: Deadline = NEVER) -> Answer:
        """Answer by a deadline that is known now (a contract run).

        Args:
            x: as the network takes it; its batch size must have been profiled.
            deadline: `Deadline.after(0.008)`; stamp it where the request comes in.
        Returns:
            The answer of the deepest exit that fits, or of the exit at which the policy stopped.
        Raises:
            NoAnswerInTime: if not even the first exit fits and the runner was made with when_late="raise".
            CostError: if the batch size was not profiled.
        """
        begin = self.clock.now()
        plan = self._plan(x)
        if self._when_late == "raise" and not self._fits(plan, 0, begin, deadline):
            error = self._too_late(plan, deadline.instant - begin)
            self._drift += 0.05 * (1.0 - self._drift)  # forgotten in time, or a slow minute would refuse runs for ever
            raise error
        policy = self._policy_of_run(x)
        collected, device = _Collected(policy, self.network), first_tensor(x).device
        with torch.inference_mode(), self.network.exits(x) as run:
            before = begin
            for exit in run:
                synchronise(device)
                arrived = self.clock.now()
                if getattr(exit, "whole", True):  # part of a batch says nothing about the profile of all of it
                    self._observe(plan, exit.index, arrived - before)
                following = upcoming(exit)
                if exit.index == self.network.num_exits - 1:
                    return self._answer(collected, exit, begin, deadline, "final")
                if following is None:
                    return self._answer(collected, exit, begin, deadline, "policy")
                if policy is not None and policy.looks_at(exit.index) and collected.add(exit):
                    return self._answer(collected, exit, begin, deadline, "policy")
                before = self.clock.now()
                if not self._fits(plan, following, before, deadline):
                    return self._answer(collected, exit, begin, deadline, "deadline")
        raise RunError(f"the network's run ended before exit {self.network.num_exits - 1}; its last exit must always come.")

    def start(self, x: Any, *, deadline: Deadline = NEVER) -> Run:
        """Start an interruptible run on the runner's own thread and return at once.

        Use it in a `with` block: leaving it abandons what is still being computed.
        """
        run = Run(self.clock, deadline, self.network.num_exits, self._when_late)
        # the job holds the runner, which so outlives the runs it has begun
        policy = self._policy_of_run(x)
        self._worker.do(run, lambda: run._work(self.network, x, policy))
        return run

    def warm_up(self, x: Any, times: int = 3) -> None:
        """Run a few times in both ways, so that the first answer that counts finds threads and memory ready."""
        drift = self._drift
        for _ in range(times):
            self.run(x)
            with self.start(x) as run:
                run.result()
        self._drift = drift  # a cold start says nothing about the runs to come

    def close(self) -> None:
        """End the worker thread: a run in flight ends at its next exit, a run in the queue never begins.

        Does not wait for it. `start` begins a new thread.
        """
        self._worker.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _policy_of_run(self, x: Any) -> Policy | None:
        """The policy; of one that is drawn at random sample by sample, the draw for this run."""
        draw = getattr(self.policy, "for_run", None)
        return self.policy if draw is None else draw(batch_size_of(x), next(self._runs))

    def _plan(self, x: Any) -> _Plan:
        size = batch_size_of(x)
        if size not in self._plans:
            raise CostError(
                f"batch size {size} was not profiled; profiled: {sorted(self._plans)}. "
                f"Run profile(network, x, batch_sizes=[..., {size}])."
            )
        return self._plans[size]

    def _fits(self, plan: _Plan, exit: int, now: float, deadline: Deadline) -> bool:
        """Whether this exit's answer, from the one before it, fits in the time left; an exit beyond the last one does."""
        if exit >= len(plan.next_s):
            return True
        return now + plan.next_s[exit] * max(1.0, self._drift) + RESERVE_S <= deadline.instant

    def _observe(self, plan: _Plan, exit: int, stage_s: float) -> None:
        expected = plan.mean_s[exit]
        if expected > 0.0:
            # bounded: one descheduled stage must not spoil the next hundred runs
            self._drift += 0.05 * (min(stage_s / expected, 10.0) - self._drift)

    def _answer(self, collected: _Collected, exit: ExitLike, begin: float, deadline: Deadline, stopped_by: StoppedBy) -> Answer:
        return answered(*collected.finish(exit), self.clock, begin, deadline, stopped_by)

    def _too_late(self, plan: _Plan, left_s: float) -> NoAnswerInTime:
        return NoAnswerInTime(
            f"{left_s * 1e3:.3f} ms are left, but the first exit needs {plan.next_s[0] * max(1.0, self._drift) * 1e3:.3f} ms. "
            "Allow more time, attach an earlier exit, or use when_late='answer'."
        )


def answered(
    output: Tensor, exits: tuple[int, ...], clock: Clock, begin: float, deadline: Deadline, stopped_by: StoppedBy
) -> Answer:
    """An answer that is there now."""
    synchronise(output.device)
    now = clock.now()
    return Answer(
        output=output, exit=max(exits), exits=exits, elapsed_s=now - begin, stopped_by=stopped_by,
        deadline_met=now <= deadline.instant,
    )  # fmt: skip


class _Plan:
    """What the runner looks up at a boundary, for one batch size."""

    def __init__(self, costs: BatchCosts, statistic: Statistic, gates_s: Sequence[float]) -> None:
        # a sum of quantiles is at least the quantile of the sum, for such nearly independent parts: the safe side
        alone = [later - before for before, later in itertools.pairwise((0.0, *gates_s))]
        self.next_s = tuple(
            stage.of_statistic(statistic) + head.of_statistic(statistic) + gate
            for stage, head, gate in zip(costs.stages, costs.heads, alone, strict=True)
        )
        self.mean_s = tuple(stage.mean for stage in costs.stages)


class _Collected:
    """Outputs of a batch whose samples may stop at different exits."""

    def __init__(self, policy: Policy | None, network: StagedNetwork) -> None:
        self._policy, self._network = policy, network
        self._output: Tensor | None = None
        self._exits: Tensor | None = None  # -1 where a sample has not stopped

    def add(self, exit: ExitLike) -> bool:
        """Take the output of an exit for the samples that stop there; True when all have stopped."""
        policy: Any = self._policy
        inputs = getattr(policy, "inputs", "confidences")
        if inputs == "confidences":
            stops = policy.stops(exit.index, exit.output())
        else:  # gates on features are asked before the head is paid
            pooled = self._network.pooled(exit)  # type: ignore[attr-defined]  # of networks that such gates were fitted for
            stops = policy.stops_on(exit.index, pooled, exit.output() if inputs == "both" else None)
            if not bool(stops.any()):
                return False
        self._take(exit.index, exit.output(), stops)
        assert self._exits is not None
        return bool((self._exits >= 0).all())

    def finish(self, exit: ExitLike) -> tuple[Tensor, tuple[int, ...]]:
        """The outputs, with this exit's for all samples that have not stopped."""
        if self._exits is None:
            output = exit.output()
            return output, answering(exit, output.shape[0])
        if bool((self._exits < 0).any()):
            return self.snapshot(exit)
        assert self._output is not None
        return self._output, tuple(self._exits.tolist())

    def snapshot(self, exit: ExitLike) -> tuple[Tensor, tuple[int, ...]]:
        """What `finish` would give, without stopping anything."""
        output = exit.output()
        if self._exits is None or self._output is None:
            # copied: a head may return a view of the features, which a later stage may write over
            return output.clone(), answering(exit, output.shape[0])
        going = self._exits < 0
        mixed = torch.where(going[:, None], output, self._output)
        return mixed, tuple(torch.where(going, exit.index, self._exits).tolist())

    def _take(self, index: int, output: Tensor, stops: Tensor) -> None:
        if self._output is None or self._exits is None:
            self._output = output.clone()
            self._exits = torch.full((output.shape[0],), -1, device=output.device)
        now = stops & (self._exits < 0)
        self._output[now] = output[now]
        self._exits[now] = index


class Run:
    """An interruptible run in progress; made by `Runner.start`.

    Thread:
        All methods may be called from any thread.
    """

    def __init__(self, clock: Clock, deadline: Deadline, num_exits: int, when_late: str) -> None:
        self._clock, self._deadline = clock, deadline
        self._num_exits, self._when_late = num_exits, when_late
        self._begin = clock.now()
        self._changed = threading.Condition()
        self._latest: Answer | None = None
        self._answer: Answer | None = None  # once given, always given
        self._finished = False  # the worker is done with this run
        self._awaited = False  # somebody who has interrupted waits for the first exit
        self._abandoned = False  # nobody wants more
        self._error: BaseException | None = None

    def latest(self) -> Answer | None:
        """The best answer so far, without stopping; None before the first exit."""
        with self._changed:
            return self._answer or self._latest

    def result(self) -> Answer:
        """Wait for the last exit, the policy or the deadline, whichever comes first.

        At the deadline the latest answer is returned at once; the stage in flight is abandoned.

        Raises:
            NoAnswerInTime: at the deadline, if there is no answer yet and the runner was made with when_late="raise".
            RunError: if the run was closed before its first exit.
        """
        with self._changed:
            while not (self._answer or self._finished or self._abandoned) and self._clock.now() < self._deadline.instant:
                self._clock.wait(self._changed, self._deadline.instant)
            return self._stop()

    def interrupt(self) -> Answer:
        """Stop now and return the latest answer; a second call returns the same one.

        Before the first exit it waits for that exit, or raises, as the runner was told.

        Raises:
            NoAnswerInTime: if there is no answer yet and the runner was made with when_late="raise".
            RunError: if the run was closed before its first exit.
        """
        with self._changed:
            return self._stop()

    def close(self) -> None:
        """Abandon what is still being computed; harmless afterwards."""
        if self._finished:
            return
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stop(self) -> Answer:
        """Give the latest answer; the lock is held."""
        if self._when_late == "raise" and self._latest is None and self._error is None:
            self.close()
            raise NoAnswerInTime(
                f"no exit had answered after {(self._clock.now() - self._begin) * 1e3:.3f} ms. Allow more time, attach an "
                "earlier exit, or use when_late='answer'."
            )
        while self._latest is None and not self._finished:
            self._awaited = True
            self._changed.wait()
        if self._answer is None:  # another thread may have been given one while this one waited
            self._answer = self._conclude()
            self._abandoned = True
            self._changed.notify_all()
        return self._answer

    def _conclude(self) -> Answer:
        if self._error is not None:
            raise self._error
        if self._latest is None:
            raise RunError("the run was closed before its first exit. Ask for the answer first, then leave the with block.")
        if self._latest.stopped_by in ("final", "policy"):
            return self._latest
        passed = self._clock.now() >= self._deadline.instant
        return replace(self._latest, stopped_by="deadline" if passed else "interrupt")

    def _work(self, network: StagedNetwork, x: Any, policy: Policy | None) -> None:
        """On the worker: run stage by stage and post every answer, until nobody wants more."""
        try:
            if not self._over():
                self._walk(network, x, policy)
        except BaseException as error:
            if not self._over():  # an answer that was there when it was due is not taken back
                self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def _walk(self, network: StagedNetwork, x: Any, policy: Policy | None) -> None:
        collected = _Collected(policy, network)
        with torch.inference_mode(), network.exits(x) as run:
            for exit in run:
                # asked before the head and again before the next stage: each is paid only if somebody wants it
                if self._over() or self._step(exit, collected, policy) == "policy" or self._over():
                    break

    def _over(self) -> bool:
        """Whether nobody wants more: abandoned, or answered when an answer was due."""
        due = self._awaited or self._clock.now() >= self._deadline.instant
        return self._abandoned or (due and self._latest is not None)

    def _step(self, exit: ExitLike, collected: _Collected, policy: Policy | None) -> StoppedBy:
        last = exit.index == self._num_exits - 1
        stopped_by: StoppedBy = "final" if last else "interrupt"
        if policy is not None and policy.looks_at(exit.index) and collected.add(exit) and not last:
            stopped_by = "policy"
        if upcoming(exit) is None and not last:
            stopped_by = "policy"
        answer = answered(*collected.snapshot(exit), self._clock, self._begin, self._deadline, stopped_by)
        with self._changed:
            if self._latest is None or answer.deadline_met:  # a late answer must not displace one that was in time
                self._latest = answer
                self._changed.notify_all()
        return stopped_by


class Worker:
    """One thread, begun when needed, that does what it is given, in order. It holds no runner: runners can be forgotten."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Any] | None = None  # None while there is no thread to take them
        self._threads: list[threading.Thread] = []
        self._runs: weakref.WeakSet[Run] = weakref.WeakSet()

    def do(self, run: Run, job: Any) -> None:
        with self._lock:
            if not self._threads:
                atexit.register(self.end)
            if self._jobs is None:
                jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
                thread = threading.Thread(target=_serve, args=(jobs,), name="impatient-runner", daemon=True)
                thread.start()
                self._jobs = jobs
                # one that was stopped may still be in its last stage
                self._threads = [thread, *(old for old in self._threads if old.is_alive())]
            self._runs.add(run)
            self._jobs.put(job)

    def stop(self) -> None:
        with self._lock:
            jobs, self._jobs = self._jobs, None
            runs = list(self._runs)
            if jobs is not None:
                jobs.put(None)
        for run in runs:
            run.close()

    def end(self) -> None:
        """Stop and wait, when Python ends."""
        self.stop()
        for thread in self._threads:
            thread.join(END_S)

    def forget(self) -> None:
        """Stop, when nobody knows the runner any more, and so no run is in flight. May be called on any thread."""
        self.stop()
        atexit.unregister(self.end)


def _serve(jobs: queue.SimpleQueue[Any]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # or its network and input live until the next one comes
