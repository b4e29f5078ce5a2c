"""Run an ensemble of growing depth on several workers.

Status: tested on a fake clock and on threads of a CPU; timed on 2 cores (benchmarks/workers.py).
Not proven: more than 2 cores, a GPU, and that it is ever worth more than threads within operators.

The workers are threads, since torch works outside the interpreter's lock: networks that spend their
time in torch's operators gain, tiny ones, which spend it in Python, do not (benchmarks/workers.py).
Processes would have to be handed every input.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal, Protocol, Self

import torch

from impatient.anytime import Exit
from impatient.clock import NEVER, SYSTEM_CLOCK, Clock, Deadline
from impatient.errors import RunError
from impatient.runtime.answer import Answer, answered
from impatient.runtime.interruptible import BackgroundRun, Worker


class Ensemble(Protocol):
    """What the workers need of an ensemble.

    Attributes:
        networks: the networks, shallow to deep.
        validation_errors: how good each of their exits is.
    """

    @property
    def networks(self) -> Iterable[Any]: ...

    @property
    def validation_errors(self) -> Sequence[Sequence[float]]: ...


class ParallelEANN:
    """Run the networks of an ensemble on M workers at a time.

    A worker takes the next deeper network from the queue when it has ended one. Every exit posts
    its answer, and the answer of a run is the best by validation error of all that were posted,
    whichever network it comes from; of equals, the deeper. A head whose exit is no match for what
    has been posted does not run. At the deadline every worker leaves its network at the next
    boundary; whoever asked has the answer by then.

    More workers than free cores, or any number on one GPU, take turns: then each network takes
    longer in proportion, and the first answers come later than with one worker. The formulas of
    `papers.anytime_neural_networks.inflation` hold for workers that do not slow each other down.

    Args:
        ensemble: an `EANN`, in eval mode.
        workers: M; more than there are networks are of no use.
        threads: of torch, per operator. By default what torch uses now, shared out among the
            workers. Torch has one such
            setting for the whole process: it is changed here, and put back by `close`.
        when_late: what to do when there is no answer at the deadline: wait for the first and say so
            ("answer"), or "raise".
        clock: where time comes from.
    Raises:
        RunError: if a number or `when_late` is not possible.

    Thread:
        `run` and `start` may be called from several threads; runs queue behind each other, with
        their deadlines ticking. A worker goes on to the next run when no network of the present one
        is left in the queue.
    Source:
        EANN (Hu et al.), "parallel workers". We differ: the best answer of all posted, not only of
        the last finished and the running network.
    Example:
        >>> from torch import nn
        >>> from impatient.networks import attach_exits
        >>> from impatient.networks.ensemble import EANN
        >>> backbones = [
        ...     nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth))) for depth in (2, 4)
        ... ]
        >>> x = torch.zeros(1, 4)
        >>> networks = [attach_exits(backbone, after=["0"], example=x) for backbone in backbones]
        >>> ensemble = EANN(networks, [[0.5, 0.3], [0.4, 0.2]]).eval()
        >>> with ParallelEANN(ensemble, workers=2) as parallel:
        ...     answer = parallel.run(x, deadline=Deadline.after(10.0))
        >>> answer.exit, answer.stopped_by
        (3, 'final')
    """

    def __init__(
        self,
        ensemble: Ensemble,
        *,
        workers: int = 2,
        threads: int | None = None,
        when_late: Literal["answer", "raise"] = "answer",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if workers < 1 or (threads is not None and threads < 1):
            raise RunError(f"workers={workers}, threads={threads}; expected at least 1 of each.")
        if when_late not in ("answer", "raise"):
            raise RunError(f"when_late={when_late!r}; expected 'answer' or 'raise'.")
        self.ensemble = ensemble
        self.clock = clock
        self._when_late = when_late
        self._plan = _Plan(tuple(ensemble.networks), ensemble.validation_errors)
        self._threads_before = torch.get_num_threads()
        self._workers = [Worker() for _ in range(workers)]
        for worker in self._workers:
            weakref.finalize(self, worker.forget).atexit = False
        self._lock = threading.Lock()
        self._closed = False
        torch.set_num_threads(threads or max(1, self._threads_before // workers))

    def run(self, x: Any, *, deadline: Deadline = NEVER) -> Answer:
        """Give the best answer there is at the deadline, or when all networks have run.

        Args:
            x: as the networks take it; all share it, so none may change it.
            deadline: `Deadline.after(0.008)`; stamp it where the request comes in.
        Returns:
            The answer; its exit is the one that gave it, numbered through the ensemble.
        Raises:
            NoAnswerInTime: if there is none yet and the workers were made with when_late="raise".
            RunError: after `close`.
        """
        with self.start(x, deadline=deadline) as run:
            return run.result()

    def start(self, x: Any, *, deadline: Deadline = NEVER) -> ParallelRun:
        """Start the workers on an input and return at once.

        Use it in a `with` block: leaving it abandons what is still being computed.

        Raises:
            RunError: after `close`.
        """
        run = ParallelRun(self.clock, deadline, self._plan, self._when_late)
        with self._lock:
            if self._closed:
                raise RunError("these workers were closed; make new ones.")
            for worker in self._workers:
                # holds these workers, which so outlive their runs
                worker.do(run, lambda: self._take_part(run, x))
        return run

    def close(self) -> None:
        """End the workers, each at its next boundary, and give torch its threads back; does not
        wait.
        """
        with self._lock:
            closed = self._closed
            self._closed = True
        if not closed:
            for worker in self._workers:
                worker.stop()
            torch.set_num_threads(self._threads_before)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_part(self, run: ParallelRun, x: Any) -> None:
        run._work_through(x)


class _Plan:
    """The networks, and which exit is better than which."""

    def __init__(
        self, networks: Sequence[Any], validation_errors: Sequence[Sequence[float]]
    ) -> None:
        self.networks = networks
        self.first = tuple(accumulate((network.num_exits for network in networks), initial=0))
        errors = [error for member in validation_errors for error in member]
        if not networks or len(errors) != self.first[-1]:
            raise RunError(
                f"{len(errors)} validation errors for {self.first[-1]} exits; expected one for "
                "each."
            )
        # the smaller, the better
        self.rank = [(error, -exit) for exit, error in enumerate(errors)]


class ParallelRun(BackgroundRun):
    """An interruptible run of several networks at a time; made by `ParallelEANN.start`.

    Thread:
        All methods may be called from any thread.
    """

    def __init__(self, clock: Clock, deadline: Deadline, plan: _Plan, when_late: str) -> None:
        super().__init__(clock, deadline, when_late)
        self._plan = plan
        self._waiting = list(enumerate(plan.networks))
        self._in_flight = 0
        self._complete = (
            # no network was left before its end, and no answer came too late to be taken
            True
        )

    def _work_through(self, x: Any) -> None:
        """Run network after network on a worker, until none is left or wanted."""
        while (taken := self._take()) is not None:
            complete = False
            try:
                complete = self._walk_one(*taken, x)
            except BaseException as error:
                with self._changed:
                    # an answer that was there when it was due is not taken back
                    if not self._over():
                        self._error = error
            finally:
                with self._changed:
                    self._in_flight -= 1
                    self._complete &= complete

    def _take(self) -> tuple[int, Any] | None:
        with self._changed:
            if self._waiting and not self._over():
                self._in_flight += 1
                return self._waiting.pop(0)
            # not when all workers have been here: one may be held up by the run before
            if not self._in_flight:
                if self._latest is not None and self._complete and not self._waiting:
                    self._latest = replace(self._latest, stopped_by="final")
                self._finished = True
                self._changed.notify_all()
            return None

    def _walk_one(self, number: int, network: Any, x: Any) -> bool:
        """Run one network and post its answers; False when it was left before its end."""
        with torch.inference_mode(), network.exits(x) as run:
            for exit in run:
                # asked before the head and again before the next stage: each is paid only if
                # somebody wants it
                if self._over() or not self._post(self._plan.first[number] + exit.index, exit):
                    return False
                if exit.index == network.num_exits - 1:
                    return True
                if self._over():
                    return False
        raise RunError(
            f"the run of network {number} ended before its last exit, which must always come."
        )

    def _post(self, number: int, exit: Exit) -> bool:
        """Take an exit's answer if it is the best so far; False when it came too late."""
        rank = self._plan.rank
        best = self._latest
        if best is not None and rank[number] > rank[best.exit]:
            return True
        # a head may return a view of the features, which a later stage may write over
        output = exit.output().clone()
        answer = answered(
            output,
            (number,) * output.shape[0],
            self._clock,
            self._begin,
            self._deadline,
            "interrupt",
        )
        with self._changed:
            if self._latest is not None and not answer.deadline_met:
                return False
            if self._latest is None or rank[number] < rank[self._latest.exit]:
                self._latest = answer
                self._changed.notify_all()
            return True

    def _over(self) -> bool:
        return self._error is not None or super()._over()
