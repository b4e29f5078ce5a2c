"""Runs on a thread of their own, whose latest answer is there at any time."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, Self

import torch

from impatient.clock import NEVER, Clock, Deadline, check_deadline
from impatient.errors import NoAnswerInTime, RunError
from impatient.policies.policy import Policy
from impatient.runtime.answer import Answer, StoppedBy, answered
from impatient.runtime.limits import Limit, Unit, limits_of
from impatient.runtime.run_state import RunState

# How long the interpreter's end waits for the stage in flight. Torch aborts the process when its
# thread is cut short.
END_S = 10.0


class BackgroundRun:
    """What somebody holds who has started a run on another thread: how to look at its answers, and
    how to stop it.

    Thread:
        All methods may be called from any thread.
    """

    def __init__(self, clock: Clock, deadline: Deadline, when_late: str) -> None:
        self._clock = clock
        self._deadline = deadline
        self._when_late = when_late
        self._begin = clock.now()
        self._changed = threading.Condition()
        self._latest: Answer | None = None
        # once given, always given
        self._answer: Answer | None = None
        # the worker does nothing for this run
        self._finished = False
        # somebody who has interrupted waits for the first exit
        self._awaited = False
        # nobody wants more
        self._abandoned = False
        self._error: BaseException | None = None
        # of the worker's thread
        self._jobs: queue.SimpleQueue[Any] | None = None

    def latest(self) -> Answer | None:
        """The best answer so far, without stopping; None before the first exit."""
        with self._changed:
            return self._answer or self._latest

    def result(self) -> Answer:
        """Wait for the last exit, the policy, a limit or the deadline, whichever comes first.

        At the deadline the latest answer is returned at once; the stage in flight is abandoned.

        Raises:
            NoAnswerInTime: at the deadline, if there is no answer yet and the runner was made with
                when_late="raise".
            RunError: if the run was closed before its first exit.
        """
        with self._changed:
            while (
                not (self._answer or self._finished or self._abandoned)
                and self._clock.now() < self._deadline.instant
            ):
                self._clock.wait(self._changed, self._deadline.instant)
            return self._stop()

    def interrupt(self) -> Answer:
        """Stop now and return the latest answer; a second call returns the same one.

        Before the first exit it waits for that exit, or raises, as the runner was told.

        Raises:
            NoAnswerInTime: if there is no answer yet and the runner was made with
                when_late="raise".
            RunError: if the run was closed before its first exit.
        """
        with self._changed:
            return self._stop()

    def close(self) -> None:
        """Abandon what is still being computed; harmless afterwards."""
        with self._changed:
            self._abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _abandon(self) -> None:
        """Nobody wants more; the lock is held."""
        self._abandoned = True
        self._changed.notify_all()

    def _stop(self) -> Answer:
        """Give the latest answer; the lock is held."""
        if self._when_late == "raise" and self._latest is None and self._error is None:
            self._abandon()
            raise NoAnswerInTime(
                f"no exit had answered after {(self._clock.now() - self._begin) * 1e3:.3f} ms. "
                f"Allow more time, attach an "
                "earlier exit, or use when_late='answer'."
            )
        while self._latest is None and not self._finished:
            self._awaited = True
            self._changed.wait()
        # another thread may have been given one while this one waited
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
        return replace(self._latest, stopped_by="deadline" if passed else "interrupt")

    def _over(self) -> bool:
        """Whether nobody wants more: abandoned, or answered when an answer was due."""
        due = self._awaited or self._clock.now() >= self._deadline.instant
        return self._abandoned or (due and self._latest is not None)


class InterruptibleRun(BackgroundRun):
    """An interruptible run in progress; made by `Runner.start`.

    Thread:
        All methods may be called from any thread.
    """

    def __init__(
        self,
        course: RunState,
        clock: Clock,
        deadline: Deadline,
        when_late: str,
        limits: tuple[Limit, ...] = (),
        *,
        resumable: bool = False,
        owner: Any = None,
    ) -> None:
        super().__init__(clock, deadline, when_late)
        self._course = course
        self._limits = limits
        self._resumable = resumable
        # the runner, which so outlives the runs it has begun
        self._owner = owner
        # the answer of the exit where the run stands
        self._posted = True
        self._stopped_by: StoppedBy | None = (
            # why the worker stopped there, whatever is wanted
            None
        )
        # how often it was refined
        self._stretch = 0
        self._policy: Policy | Literal["same"] | None = (
            # that which `refine` brought, until the worker takes it
            "same"
        )
        # for good
        self._closed = False
        # an error, also where nobody wanted more
        self._broken: BaseException | None = None

    def refine(
        self,
        *,
        deadline: Deadline = NEVER,
        policy: Policy | Literal["same"] | None = "same",
        limits: Mapping[Unit, float] | None = None,
    ) -> Self:
        """Go on from where the run was stopped, without computing anything twice; then ask for the
        answer as at first.

        Until a deeper exit has answered, `interrupt` and `latest` give the answer there was.

        Args:
            deadline: of the answer to come; its `elapsed_s` counts from this call.
            policy: another one from here on, or None. With the one there was, a run that it has
                stopped stays stopped. Samples that were taken out of the batch keep their outputs.
            limits: as for `Runner.start`, of all that was spent since the run began.
        Raises:
            RunError: if the run was not started with resumable=True, has not been stopped, or was
                closed.
        """
        check_deadline(deadline)
        with self._changed:
            self._check_refinable()
            self._limits = limits_of(self._owner.costs, limits)
            self._policy = (
                policy
                if isinstance(policy, str)
                else self._owner.drawn(policy, self._course.samples)
            )
            self._begin = self._clock.now()
            self._deadline = deadline
            self._answer = None
            self._abandoned = False
            self._awaited = False
            self._stretch += 1
            if not self._is_final():
                self._go_on()
            if self._latest is not None:
                in_time = self._begin <= deadline.instant
                self._latest = replace(self._latest, elapsed_s=0.0, deadline_met=in_time)
        return self

    def close(self) -> None:
        """Abandon what is still being computed, and what `refine` could; harmless afterwards."""
        with self._changed:
            if self._finished and self._resumable and not self._closed and self._jobs is not None:
                self._jobs.put(self._course.close)
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
        """Have the worker go on under what is wanted now; the lock is held."""
        if self._latest is not None:
            self._latest = replace(self._latest, stopped_by="interrupt")
            self._posted = (
                # it may be that this is no longer where to stop, or that it is now
                False
            )
        if self._finished:
            assert self._jobs is not None
            self._finished = False
            self._jobs.put(self._work)

    def _abandon(self) -> None:
        super()._abandon()
        if not self._finished and (self._closed or not self._resumable):
            self._course.cancel()

    def _work(self) -> None:
        """On the worker: a stage, its head, the next stage ..., each only if somebody wants it."""
        try:
            with torch.inference_mode():
                while (step := self._next()) is not None:
                    step()
                if self._closed or not self._resumable or self._is_final():
                    self._course.close()
        except BaseException as error:
            self._fail(error)

    def _next(self) -> Callable[[], None] | None:
        """What to do now; None: nothing, until `refine`."""
        with self._changed:
            if not self._over():
                if not isinstance(self._policy, str):
                    self._course.override(self._policy)
                    self._policy = "same"
                if not self._posted:
                    return self._post
                if self._stopped_by is None:
                    return self._advance
            self._finished = True
            self._changed.notify_all()
            return None

    def _advance(self) -> None:
        self._course.advance()
        self._posted = False
        self._stopped_by = None

    def _post(self) -> None:
        """Show the answer of the exit where the run stands."""
        stretch = self._stretch
        begin = self._begin
        deadline = self._deadline
        stopped_by: StoppedBy | None = self._course.stops()
        output, exits = self._course.answer()
        if stopped_by is None and not self._course.allowed(self._limits):
            stopped_by = "limit"
        answer = answered(output, exits, self._clock, begin, deadline, stopped_by or "interrupt")
        with self._changed:
            if stretch != self._stretch:
                # refined meanwhile: again, as is wanted now
                return
            self._posted = True
            self._stopped_by = stopped_by
            # a late answer must not displace one that was in time
            if self._latest is None or answer.deadline_met:
                self._latest = answer
                # nobody else is to be woken: it would take the interpreter from the next stage
                if self._awaited:
                    self._changed.notify_all()

    def _is_final(self) -> bool:
        return self._latest is not None and self._latest.stopped_by == "final"

    def _fail(self, error: BaseException) -> None:
        try:
            self._course.close()
        finally:
            with self._changed:
                # an error keeps its frames, and so the run: only where somebody may ask for it
                if self._resumable:
                    self._broken = error
                # an answer that was there when it was due is not taken back
                if not self._over():
                    self._error = error
                self._finished = True
                self._changed.notify_all()


class Worker:
    """One thread, begun when needed, that does what it is given, in order. It holds no runner:
    runners can be forgotten.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Any] | None = (
            # None while there is no thread to take them
            None
        )
        self._threads: list[threading.Thread] = []
        self._runs: weakref.WeakSet[BackgroundRun] = weakref.WeakSet()
        # that may be paused on the thread, and must be closed there
        self._waiting: weakref.WeakSet[RunState] = weakref.WeakSet()

    def do(
        self, run: BackgroundRun, job: Callable[[], None], course: RunState | None = None
    ) -> None:
        """Do a job of a run; a course that it may leave unfinished is closed on the same thread in
        the end.
        """
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
                # one that was stopped may still be in its last stage
                self._threads = [thread, *(old for old in self._threads if old.is_alive())]
            # first: what is left to note is noted while the thread wakes up
            self._jobs.put(job)
            self._runs.add(run)
            run._jobs = self._jobs
            if course is not None:
                self._waiting.add(course)
                weakref.finalize(run, self._jobs.put, course.close).atexit = False

    def stop(self) -> None:
        with self._lock:
            jobs = self._jobs
            self._jobs = None
            runs = list(self._runs)
            waiting = list(self._waiting)
            self._waiting.clear()
        for run in runs:
            run.close()
        if jobs is not None:
            # also of runs that nobody holds any more
            for course in waiting:
                jobs.put(course.close)
            jobs.put(None)

    def end(self) -> None:
        """Stop and wait, when Python ends."""
        self.stop()
        for thread in self._threads:
            thread.join(END_S)

    def forget(self) -> None:
        """Stop, when nobody knows the runner any more, and so no run is in flight. May be called on
        any thread.
        """
        self.stop()
        atexit.unregister(self.end)


def _serve(jobs: queue.SimpleQueue[Any]) -> None:
    while (job := jobs.get()) is not None:
        job()
        # or its network and input live until the next one comes
        del job
