"""Runs on a separate thread, whose latest answer is there at any time.

The worker posts the answer of every exit. The caller takes the latest one.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from impatient.clock import NEVER, Clock, Deadline, check_deadline
from impatient.errors import NoAnswerInTime, RunError
from impatient.policies.policy import Policy
from impatient.runtime.answer import Answer, StoppedBy, answered
from impatient.runtime.limits import Limit, Unit, limits_of
from impatient.runtime.rows import RowBudgets, concluded
from impatient.runtime.run_state import RunState

if TYPE_CHECKING:
    from impatient.runtime.runner import Runner

# Longest wait for the stage in flight when Python exits. Torch aborts the process if the thread is
# ended in the middle of a stage.
END_S = 10.0

# How long before the deadline a spinning caller wakes up: what a timer and the lock take together.
SPIN_S = 150e-6


class BackgroundRun:
    """A run on another thread, as its caller reads and stops it.

    Thread:
        All methods may be called from any thread.
    """

    def __init__(self, clock: Clock, deadline: Deadline, when_late: str) -> None:
        self._clock = clock
        self._deadline = deadline
        self._when_late = when_late
        self._begin = clock.now()
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._latest: Answer | None = None
        # The answer that was returned. It never changes afterwards.
        self._answer: Answer | None = None
        # The worker does nothing for this run.
        self._finished = False
        # A caller has interrupted and waits for the first exit.
        self._awaited = False
        # No caller wants more.
        self._abandoned = False
        self._error: BaseException | None = None
        # Queue of the worker's thread.
        self._jobs: queue.SimpleQueue[Any] | None = None

    def latest(self) -> Answer | None:
        """Return the best answer so far without stopping, None before the first exit."""
        with self._changed:
            return self._answer or self._latest

    def result(self, *, spin: bool = False) -> Answer:
        """Wait until the run stops or its deadline comes.

        It stops at the last exit, by the policy or at a limit. At the deadline, the latest answer
        is returned at once and the stage in flight is abandoned.

        Args:
            spin: stay awake for the last 150 microseconds before the deadline, so that the caller
                is back sooner after it. It costs that time of a core, so spare one.
        Raises:
            NoAnswerInTime: at the deadline, if there is no answer yet and the runner was made with
                when_late="raise".
            RunError: if the run was closed before its first exit.
        """
        self._check_process()
        until = self._deadline.instant - (SPIN_S if spin else 0.0)
        with self._changed:
            while self._in_progress() and self._clock.now() < until:
                self._clock.wait(self._changed, until)
            if not spin:
                return self._stop()
        while self._in_progress() and self._clock.now() < self._deadline.instant:
            # The worker needs the interpreter, and perhaps this core.
            time.sleep(0.0)
        with self._changed:
            return self._stop()

    def _in_progress(self) -> bool:
        return not (self._answer or self._finished or self._abandoned)

    def interrupt(self) -> Answer:
        """Stop and return the latest answer at once.

        A second call returns the same answer. Before the first exit, this call waits for that exit,
        or raises, as `when_late` of the runner says.

        Raises:
            NoAnswerInTime: if there is no answer yet and the runner was made with
                when_late="raise".
            RunError: if the run was closed before its first exit.
        """
        self._check_process()
        with self._changed:
            return self._stop()

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise RunError(
                "this run was started in another process, whose thread computes it; expected a "
                "run of this process. Start a new one after the fork."
            )

    def close(self) -> None:
        """Abandon what is still being computed. Closing twice is allowed."""
        if self._process != os.getpid():
            # Nothing is computed here, and the lock may have been held when the process forked.
            return
        with self._changed:
            self._abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _abandon(self) -> None:
        """Abandon the run. The caller must hold `self._changed`."""
        self._abandoned = True
        self._changed.notify_all()

    def _stop(self) -> Answer:
        """Return the latest answer. The caller must hold `self._changed`."""
        if self._when_late == "raise" and self._latest is None and self._error is None:
            self._abandon()
            raise NoAnswerInTime(
                f"no exit had answered after {(self._clock.now() - self._begin) * 1e3:.3f} ms. "
                "Allow more time, attach an earlier exit, or use when_late='answer'."
            )
        while self._latest is None and not self._finished:
            self._awaited = True
            self._changed.wait()
        # Another thread may have got an answer while this one waited.
        if self._answer is None:
            self._answer = self._conclude()
            self._abandon()
        return self._answer

    def _conclude(self) -> Answer:
        if self._error is not None:
            raise self._error
        if self._latest is None:
            raise RunError(
                "the run was closed before its first exit. Ask for the answer first, then leave "
                "the with block."
            )
        if self._latest.stopped_by in ("final", "policy", "limit"):
            return self._latest
        passed = self._clock.now() >= self._deadline.instant
        return concluded(self._latest, "deadline" if passed else "interrupt")

    def _over(self) -> bool:
        """Tell whether the run was abandoned or has answered in time."""
        due = self._awaited or self._clock.now() >= self._deadline.instant
        return self._abandoned or (due and self._latest is not None)


class InterruptibleRun(BackgroundRun):
    """An interruptible run in progress, made by `Runner.start`.

    Thread:
        All methods may be called from any thread.
    """

    def __init__(
        self,
        runner: Runner,
        state: RunState,
        deadline: Deadline,
        limits: tuple[Limit, ...],
        *,
        resumable: bool,
        rows: RowBudgets | None = None,
    ) -> None:
        super().__init__(runner.clock, deadline, runner.when_late)
        # Kept, so that the runner outlives the runs it has begun.
        self._runner = runner
        self._state = state
        self._limits = limits
        self._resumable = resumable
        # Budgets of single rows; None where all have the same.
        self._rows = rows
        # Whether the answer of the present exit was posted.
        self._posted = True
        # Why the run stops at the present exit, whatever callers want.
        self._stopped_by: StoppedBy | None = None
        # Seconds from the start, or the latest `refine`, until the worker began.
        self._waited_s = 0.0
        # Instant from which waiting counts; None once the worker has begun.
        self._waiting: float | None = self._begin
        # How often the run was refined.
        self._stretch = 0
        # Policy from `refine`, until the worker takes it.
        self._policy: Policy | Literal["same"] | None = "same"
        # Closed for good: it cannot be refined.
        self._closed = False
        # An error of the run, even if no caller wanted more by then.
        self._broken: BaseException | None = None

    def refine(
        self,
        *,
        deadline: Deadline = NEVER,
        policy: Policy | Literal["same"] | None = "same",
        limits: Mapping[Unit, float] | None = None,
    ) -> Self:
        """Continue from where the run was stopped, without computing anything twice.

        Then ask for the answer as at first. Until a deeper exit has answered, `interrupt` and
        `latest` return the previous answer.

        Args:
            deadline: deadline of the new answer, whose `elapsed_s` counts from this call.
            policy: another policy, or None, to use from here on. With "same", a run that the policy
                has stopped stays stopped. Samples that were removed from the batch keep their
                outputs.
            limits: limits as for `Runner.start`, on all that was spent since the run began.
        Raises:
            RunError: if the run was not started with resumable=True, has not been stopped, or was
                closed.
        """
        self._check_process()
        check_deadline(deadline)
        with self._changed:
            self._check_refinable()
            self._limits = limits_of(self._runner.costs, limits)
            self._policy = (
                policy
                if isinstance(policy, str)
                else self._runner.drawn(policy, self._state.samples)
            )
            self._begin = self._clock.now()
            self._deadline = deadline
            self._answer = None
            self._abandoned = False
            self._awaited = False
            self._stretch += 1
            self._waiting = self._begin
            if not self._is_final():
                self._go_on()
            if self._latest is not None:
                in_time = self._begin <= deadline.instant
                self._latest = replace(self._latest, elapsed_s=0.0, deadline_met=in_time)
        return self

    def close(self) -> None:
        """Abandon what is still being computed, so that `refine` is not possible either."""
        if self._process != os.getpid():
            return
        with self._changed:
            if self._finished and self._resumable and not self._closed and self._jobs is not None:
                self._jobs.put(self._state.close)
            self._closed = True
            self._abandon()

    def _check_refinable(self) -> None:
        if not self._resumable:
            raise RunError(
                "this run cannot go on once it was stopped. Start it with resumable=True."
            )
        if self._closed:
            raise RunError("this run was closed, or its runner was. Refine it before that.")
        if self._broken is not None:
            raise self._broken
        if not self._abandoned:
            raise RunError(
                "this run has not been stopped. Call result() or interrupt(), then refine it."
            )

    def _go_on(self) -> None:
        """Let the worker continue as wanted now. The caller must hold `self._changed`."""
        if self._latest is not None:
            self._latest = replace(self._latest, stopped_by="interrupt")
            # Whether to stop at this exit may have changed.
            self._posted = False
        if self._finished:
            assert self._jobs is not None
            self._finished = False
            self._jobs.put(self._work)

    def _abandon(self) -> None:
        super()._abandon()
        if not self._finished and (self._closed or not self._resumable):
            self._state.cancel()

    def _work(self) -> None:
        """Run stages and heads on the worker while more is wanted."""
        try:
            with self._runner._quiet, torch.inference_mode():
                while (step := self._next()) is not None:
                    step()
                if self._closed or not self._resumable or self._is_final():
                    self._state.close()
        except BaseException as error:
            self._fail(error)

    def _next(self) -> Callable[[], None] | None:
        """Return what to do now, or None if there is nothing until `refine`."""
        with self._changed:
            if not self._over():
                if not isinstance(self._policy, str):
                    self._state.override(self._policy)
                    self._policy = "same"
                if not self._posted:
                    return self._post
                if self._stopped_by is None:
                    return self._advance
            self._finished = True
            self._changed.notify_all()
            return None

    def _advance(self) -> None:
        if self._waiting is not None:
            self._waited_s = self._clock.now() - self._waiting
            self._waiting = None
            self._state.reset_times()
        self._state.go_on()
        self._state.reach(self._state.advance())
        self._posted = False
        self._stopped_by = None

    def _post(self) -> None:
        """Post the answer of the present exit."""
        stretch = self._stretch
        begin = self._begin
        deadline = self._deadline
        stopped_by: StoppedBy | None = self._state.stops(self._clock.now())
        output, exits = self._state.answer()
        if stopped_by is None and not self._state.allowed(self._limits):
            stopped_by = "limit"
        answer = answered(
            output,
            exits,
            self._clock,
            begin,
            deadline,
            stopped_by or "interrupt",
            self._state.times(self._waited_s),
        )
        with self._changed:
            if stretch != self._stretch:
                # The run was refined meanwhile, so post again for the new deadline.
                return
            self._posted = True
            self._stopped_by = stopped_by
            if self._rows is not None:
                answer = self._rows.post(answer, self._latest, begin)
            # A late answer must not replace one that was in time.
            if self._latest is None or answer.deadline_met:
                self._latest = answer
                # Waking others would take the interpreter's lock from the next stage.
                if self._awaited:
                    self._changed.notify_all()

    def _is_final(self) -> bool:
        return self._latest is not None and self._latest.stopped_by == "final"

    def _fail(self, error: BaseException) -> None:
        try:
            self._state.close()
        finally:
            with self._changed:
                # An error keeps its frames and so the run alive, so it is stored only where
                # `refine` may raise it.
                if self._resumable:
                    self._broken = error
                # An answer that was ready when it was due is not withdrawn.
                if not self._over():
                    self._error = error
                self._finished = True
                self._changed.notify_all()


class Worker:
    """One thread, started when needed, that does jobs in order.

    It holds no reference to a runner, so that runners can be garbage-collected.
    """

    def __init__(self) -> None:
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Forget all threads and runs: a forked process has neither."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        # None while there is no thread to take jobs.
        self._jobs: queue.SimpleQueue[Any] | None = None
        self._threads: list[threading.Thread] = []
        self._runs: weakref.WeakSet[BackgroundRun] = weakref.WeakSet()
        # Runs that may be paused on the thread, and must be closed there.
        self._waiting: weakref.WeakSet[RunState] = weakref.WeakSet()

    def do(
        self, run: BackgroundRun, job: Callable[[], None], state: RunState | None = None
    ) -> None:
        """Do a job of a run.

        Args:
            run: run that the job belongs to.
            job: function to call on the thread.
            state: state that the job may leave unfinished; it is closed on the same thread.
        """
        if self._process != os.getpid():
            self._begin_anew()
        with self._lock:
            if not self._threads:
                atexit.register(self.end)
            if self._jobs is None:
                jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
                thread = threading.Thread(
                    target=_serve, args=(jobs,), name="impatient-runner", daemon=True
                )
                thread.start()
                self._jobs = jobs
                # A thread that was stopped may still be in its last stage.
                self._threads = [thread, *(old for old in self._threads if old.is_alive())]
            # Put first, so that the thread wakes up while the rest is done here.
            self._jobs.put(job)
            self._runs.add(run)
            run._jobs = self._jobs
            if state is not None:
                self._waiting.add(state)
                weakref.finalize(run, self._jobs.put, state.close).atexit = False

    def stop(self) -> None:
        if self._process != os.getpid():
            self._begin_anew()
        with self._lock:
            jobs = self._jobs
            self._jobs = None
            runs = list(self._runs)
            waiting = list(self._waiting)
            self._waiting.clear()
        for run in runs:
            run.close()
        if jobs is not None:
            # This includes runs that no caller holds any more.
            for state in waiting:
                jobs.put(state.close)
            jobs.put(None)

    def end(self) -> None:
        """Stop and wait, when Python exits."""
        self.stop()
        for thread in self._threads:
            thread.join(END_S)

    def forget(self) -> None:
        """Stop when the runner has been garbage-collected.

        No run is in flight then.

        Thread:
            May be called from any thread.
        """
        self.stop()
        atexit.unregister(self.end)


def _serve(jobs: queue.SimpleQueue[Any]) -> None:
    while (job := jobs.get()) is not None:
        job()
        # Otherwise its network and input would live until the next job comes.
        del job
