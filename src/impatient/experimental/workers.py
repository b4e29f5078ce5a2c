"""Run an ensemble of growing depth on several workers.

Status: tested on a fake clock and on threads of a CPU; timed on 2 cores (benchmarks/workers.py).
Not proven: more than 2 cores, a GPU, and that it is ever worth more than threads within operators.

The workers are threads, because torch computes outside the interpreter's lock. Networks that spend
their time in torch's operators gain. Tiny networks, which spend it in Python, do not
(benchmarks/workers.py). Every input would have to be sent to processes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal, Protocol, Self

import torch

from impatient import checks
from impatient.anytime import Exit
from impatient.clock import NEVER, SYSTEM_CLOCK, Clock, Deadline
from impatient.errors import RunError
from impatient.runtime.answer import Answer, answered
from impatient.runtime.interruptible import BackgroundRun, Worker


class Ensemble(Protocol):
    """An ensemble as the workers use it.

    Attributes:
        networks: networks of the ensemble, shallow to deep.
        validation_errors: validation error of each exit of each network.
    """

    @property
    def networks(self) -> Iterable[Any]: ...

    @property
    def validation_errors(self) -> Sequence[Sequence[float]]: ...


class ParallelEANN:
    """Run the networks of an ensemble on M workers at a time.

    A worker takes the next deeper network from the queue when it has finished one. Every exit posts
    its answer. The answer of a run is the best posted one by validation error, whichever network it
    comes from; among equals, the deepest. A head does not run if a better answer has been posted.
    At the deadline every worker leaves its network at the next boundary; the caller has the answer
    by then.

    More workers than free cores, or any number on one GPU, take turns. Then each network takes
    longer in proportion, and the first answers come later than with one worker. The formulas of
    `papers.anytime_neural_networks.inflation` hold for workers that do not slow each other down.

    Args:
        ensemble: an `EANN`, in eval mode.
        workers: number of workers, M; more workers than networks are of no use.
        threads: torch's threads per operator; the default divides torch's present number among the
            workers. Torch has one such setting for the whole process, which is changed here and
            restored by `close`.
        when_late: what to do without an answer at the deadline: "answer" waits for the first answer
            and marks it late; "raise" raises an error.
        clock: clock to read and wait on.
    Raises:
        RunError: if `workers`, `threads` or `when_late` is not possible.

    Thread:
        `run` and `start` may be called from several threads. Runs are computed one after the other;
        time in that queue counts against their deadlines. A worker continues with the next run when
        no network of the present one is left in the queue.
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
        before = torch.get_num_threads()
        threads = max(1, before // max(1, workers)) if threads is None else threads
        checks.at_least(RunError, 1, workers=workers, threads=threads)
        checks.one_of(RunError, ("answer", "raise"), when_late=when_late)
        self.ensemble = ensemble
        self.clock = clock
        self._when_late = when_late
        self._plan = _Plan(tuple(ensemble.networks), ensemble.validation_errors)
        self._threads_before = before
        self._workers = [Worker() for _ in range(workers)]
        for worker in self._workers:
            weakref.finalize(self, worker.forget).atexit = False
        self._lock = threading.Lock()
        self._closed = False
        torch.set_num_threads(threads)

    def run(self, x: Any, *, deadline: Deadline = NEVER) -> Answer:
        """Return the best answer at the deadline, or when all networks have run.

        Args:
            x: input of the networks, which share it, so none may change it.
            deadline: deadline, such as `Deadline.after(0.008)`; make it where the request comes in.
        Returns:
            The answer. Its exit is numbered through the whole ensemble.
        Raises:
            NoAnswerInTime: if there is no answer yet and the workers were made with
                when_late="raise".
            RunError: after `close`.
        """
        with self.start(x, deadline=deadline) as run:
            return run.result()

    def start(self, x: Any, *, deadline: Deadline = NEVER) -> ParallelRun:
        """Start the workers on an input and return at once.

        Use it in a `with` block: leaving the block abandons what is still being computed.

        Raises:
            RunError: after `close`.
        """
        run = ParallelRun(self.clock, deadline, self._plan, self._when_late)
        with self._lock:
            if self._closed:
                raise RunError("these workers were closed; make new ones.")
            for worker in self._workers:
                # The function keeps `self` alive, so that the workers outlive their runs.
                worker.do(run, lambda: self._take_part(run, x))
        return run

    def close(self) -> None:
        """End the workers, each at its next boundary, without waiting.

        Torch gets its previous number of threads back.
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
    """The networks, and a rank of their exits."""

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
        # A smaller rank is better.
        self.rank = [(error, -exit) for exit, error in enumerate(errors)]


class ParallelRun(BackgroundRun):
    """An interruptible run of several networks at a time, made by `ParallelEANN.start`.

    Thread:
        All methods may be called from any thread.
    """

    def __init__(self, clock: Clock, deadline: Deadline, plan: _Plan, when_late: str) -> None:
        super().__init__(clock, deadline, when_late)
        self._plan = plan
        self._waiting = list(enumerate(plan.networks))
        self._in_flight = 0
        # Whether all networks ran to their ends, and all answers came in time.
        self._complete = True

    def _work_through(self, x: Any) -> None:
        """Run network after network on a worker, until none is left or wanted."""
        while (taken := self._take()) is not None:
            complete = False
            try:
                complete = self._run_one(*taken, x)
            except BaseException as error:
                with self._changed:
                    # An answer that was ready when it was due is not withdrawn.
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
            # Do not wait for all workers, because one may be delayed by the previous run.
            if not self._in_flight:
                if self._latest is not None and self._complete and not self._waiting:
                    self._latest = replace(self._latest, stopped_by="final")
                self._finished = True
                self._changed.notify_all()
            return None

    def _run_one(self, number: int, network: Any, x: Any) -> bool:
        """Run one network, and tell whether it ran to its end."""
        with torch.inference_mode(), network.exits(x) as run:
            for exit in run:
                # Checked before the head and before the next stage, so that each is computed only
                # if it is wanted.
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
        """Post an exit's answer if it is the best, unless it is late.

        Returns:
            Whether it came in time.
        """
        rank = self._plan.rank
        best = self._latest
        if best is not None and rank[number] > rank[best.exit]:
            return True
        # A copy: a head may return a view of the features, which a later stage may overwrite.
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
