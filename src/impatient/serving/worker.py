"""Run the scheduler's work in one thread, which owns the networks and their runs."""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch

from impatient.anytime import Exit, Network, Run
from impatient.errors import ServingError
from impatient.serving.scheduler import Work
from impatient.serving.tensors import Inputs, all_finite, rows_of
from impatient.trees import take

log = logging.getLogger(__name__)


# what an exit gives a request: outputs, shape [rows, C], and how sure the least sure one looks
Found = tuple[np.ndarray, float]


class Job(NamedTuple):
    """Work with what it needs.

    Attributes:
        work: the scheduler's work.
        inputs: raw samples of each request that begins with it.
        over: batches of which no request is left.
    """

    work: Work
    inputs: Mapping[int, Inputs]
    over: Sequence[int] = ()


class Done(NamedTuple):
    """What a work gave.

    Attributes:
        work: the scheduler's work.
        found: what it gave each request.
        failed: requests for which the network failed, though not for the others.
        error: what went wrong; empty if nothing did.
    """

    work: Work
    found: Mapping[int, Found]
    failed: frozenset[int] = frozenset()
    error: str = ""


class _Batch:
    """A batch in flight: a run, and which requests have which of its rows."""

    def __init__(self, network: Network, x: Any, rows: Mapping[int, int]) -> None:
        self.network = network
        self.score = network.task.score(network.task.default_score)
        self.x = x
        self.rows = rows
        self.run: Run = network.exits(x)
        self.places = _places(rows)
        # whether it is run without pauses, and closed by that
        self.walks = False

    def to(self, exit: int, requests: tuple[int, ...]) -> dict[int, Found]:
        """Compute what an exit gives some requests."""
        self.keep(requests)
        for one in self.run:
            if one.index == exit:
                return self.found(one, requests)
        raise ServingError(f"this input never came to exit {exit}.")

    def found(self, exit: Exit, requests: tuple[int, ...]) -> dict[int, Found]:
        """Compute the head of an exit, for the whole batch, and divide what it gives."""
        output = exit.output().float()
        sure = self.score(output).tolist()
        # The network may write over what it gave.
        whole = output.numpy().copy()
        places = self.places
        return {
            request: (whole[places[request]], min(sure[places[request]])) for request in requests
        }

    def keep(self, requests: tuple[int, ...]) -> None:
        """Go on with these requests, with fewer rows if the network can."""
        if len(requests) == len(self.places) or not self.network.shrinks(self.x):
            return
        rows = range(sum(self.rows[request] for request in self.places))
        kept = [row for request in requests for row in rows[self.places[request]]]
        self.run.keep(torch.tensor(kept))
        self.places = _places({request: self.rows[request] for request in requests})

    def close(self) -> None:
        if not self.walks:
            self.run.close()

    def apart(self) -> _Apart:
        """Begin each request anew, alone."""
        alone = {}
        for request, place in _places(self.rows).items():
            part = take(self.x, range(place.start, place.stop))
            alone[request] = _Batch(self.network, part, {request: self.rows[request]})
        return _Apart(alone)


class _Apart:
    """Requests of which one made their batch fail, each in a batch of its own."""

    def __init__(self, batches: Mapping[int, _Batch]) -> None:
        self._batches = batches

    def to(self, exit: int, requests: tuple[int, ...]) -> dict[int, Found]:
        """Compute what an exit gives those requests for which it can be computed."""
        found: dict[int, Found] = {}
        for request in requests:
            try:
                found |= self._batches[request].to(exit, (request,))
            except Exception:
                log.exception("the network failed on one request of several")
        return found

    def close(self) -> None:
        for batch in self._batches.values():
            batch.close()


def _places(rows: Mapping[int, int]) -> dict[int, slice]:
    """Return the rows of each request in a batch."""
    places = {}
    end = 0
    for request, count in rows.items():
        places[request] = slice(end, end + count)
        end += count
    return places


class InferenceThread:
    """One thread that runs stages, one work after the other, with one torch thread.

    Args:
        networks: the networks by name, in eval mode.
        prepared: how raw samples of some requests become the input of each.
        next_job: called in that thread with what each work gave; it returns the job that the thread
            does next, or None to wait for one.
        warm_up: raw inputs that each network is run on before the first work.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        prepared: Mapping[str, Callable[[Sequence[Inputs]], Any]],
        next_job: Callable[[Done], Job | None],
        warm_up: Mapping[str, tuple[Inputs, ...]],
    ) -> None:
        self._networks = networks
        self._warm_up = warm_up
        self.warmed = threading.Event()
        self._prepared = prepared
        self._next_job = next_job
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._batches: dict[int, _Batch | _Apart] = {}
        self._thread = threading.Thread(target=self._loop, name="inference", daemon=True)
        self._thread.start()

    def do(self, job: Job) -> None:
        """Queue a job. May be called from any thread."""
        self._jobs.put(job)

    def stop(self, timeout_s: float) -> bool:
        """End the thread when its work is done.

        Tells whether it has ended in time.
        """
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Let the thread end when it comes back."""
        self._jobs.put(None)

    @property
    def alive(self) -> bool:
        """Whether the thread lives."""
        return self._thread.is_alive()

    def _loop(self) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            self._warm()
            self.warmed.set()
            while (job := self._jobs.get()) is not None:
                while job is not None:
                    job = self._after(job)
            for group in list(self._batches):
                self._close(group)

    def _after(self, job: Job) -> Job | None:
        """Do a job, and return the one that follows on it at once, if there is any."""
        for group in job.over:
            self._close(group)
        if job.work.first == 0 and not self._batches:
            return self._walked(job)
        return self._told(self._done(job, functools.partial(self._stepped, job)))

    def _stepped(self, job: Job) -> dict[int, Found]:
        """Compute what a job asks for, and pause there."""
        work = job.work
        batch = self._begun(job) if work.first == 0 else self._batches[work.group]
        return batch.to(work.last, work.requests)

    def _walked(self, job: Job) -> Job | None:
        """Do a job that begins a batch while no other is open, and the batch's later jobs.

        So its network need not be able to pause between its stages, which is faster. Jobs of other
        batches that come meanwhile are done at its exits.
        """
        group = job.work.group
        following: Job | None = job

        def visit(exit: Exit) -> bool:
            nonlocal following
            assert following is not None
            now = following
            if exit.index < now.work.last:
                return False
            found = functools.partial(batch.found, exit, now.work.requests)
            following = self._told(self._done(now, found))
            if exit.index == batch.network.num_exits - 1:
                return False
            following = self._next_of(batch, group, following)
            if not self._waits(following, batch, group):
                return True
            batch.keep(following.work.requests)
            return False

        try:
            batch = self._begun(job)
            batch.walks = True
            try:
                batch.run.walk(visit)
            finally:
                batch.walks = False
            if not self._waits(following, batch, group):
                return following
            raise ServingError(f"this input never came to exit {following.work.last}.")
        except BaseException as error:
            if following is None or following.work.group != group:
                log.exception("a network failed where it was left")
                return following
            failed = functools.partial(_raise, error)
            return self._told(self._done(following, failed))

    def _waits(self, job: Job | None, batch: _Batch, group: int) -> TypeGuard[Job]:
        """Tell whether a job is one that this batch has to do."""
        return job is not None and job.work.group == group and self._batches.get(group) is batch

    def _next_of(self, batch: _Batch, group: int, job: Job | None) -> Job | None:
        """Do jobs of other batches, until there is one of this batch or this batch is over.

        Returns:
            The job that is next; None at the end.
        """
        while True:
            if self._batches.get(group) is not batch:
                # It has failed.
                return job
            if job is None and (job := self._jobs.get()) is None:
                # It is there for those who wait further out, too.
                self._jobs.put(None)
                return None
            if group in job.over or job.work.group == group:
                return job
            job = self._after(job)

    def _told(self, done: Done) -> Job | None:
        """Tell what a work gave, and return the job that follows at once, if there is any."""
        try:
            job = self._next_job(done)
            if job is not None and hasattr(os, "sched_yield"):
                # On a core that it shares with this thread, the event loop would else not read
                # what has come, or send what is due, until the kernel ends this thread's turn.
                os.sched_yield()
            return job
        except Exception:
            # such as from a rule of somebody's own
            log.exception("nothing follows on work of the model %s", done.work.model)
            return None

    def _warm(self) -> None:
        for name, inputs in self._warm_up.items():
            for raw in inputs * 3:
                try:
                    self._run_whole(name, raw)
                except BaseException:
                    # or the server would wait for this thread for ever
                    log.exception("the model %s failed while it was warmed up", name)

    def _run_whole(self, name: str, raw: Inputs) -> None:
        """Run as requests do: the first time, a network also tries out whether it shrinks."""
        x = self._prepared[name]([raw])
        batch = _Batch(self._networks[name], x, {0: rows_of(raw)})
        self._networks[name].shrinks(x)
        with batch.run:
            for exit in batch.run:
                batch.found(exit, (0,))

    def _close(self, group: int) -> None:
        batch = self._batches.pop(group, None)
        if batch is not None:
            batch.close()

    def _done(self, job: Job, find: Callable[[], dict[int, Found]]) -> Done:
        work = job.work
        try:
            try:
                found = find()
            except Exception as error:
                found = self._one_by_one(work, error)
            return _checked(work, found)
        except BaseException as error:
            # A network may raise anything; its requests get the answers that they have, and the
            # thread goes on.
            log.exception("work of the model %s failed", work.model)
            self._close(work.group)
            text = f"{type(error).__name__}: {error}"
            return Done(work, {}, error=text)

    def _one_by_one(self, work: Work, error: Exception) -> dict[int, Found]:
        """Run a batch that has failed request by request, since one of them may be why."""
        batch = self._batches.get(work.group)
        if not isinstance(batch, _Batch) or len(work.requests) == 1:
            raise error
        log.exception("a batch of the model %s failed; each request runs alone", work.model)
        batch.close()
        self._batches[work.group] = apart = batch.apart()
        return apart.to(work.last, work.requests)

    def _begun(self, job: Job) -> _Batch:
        work = job.work
        x = self._prepared[work.model](list(job.inputs.values()))
        rows = {request: rows_of(inputs) for request, inputs in job.inputs.items()}
        batch = self._batches[work.group] = _Batch(self._networks[work.model], x, rows)
        return batch


def _checked(work: Work, found: Mapping[int, Found]) -> Done:
    """Take what is finite of what was found.

    Raises:
        ServingError: if nothing is.
    """
    finite = {request: one for request, one in found.items() if all_finite(one[0])}
    if len(finite) == len(work.requests):
        return Done(work, finite)
    if not finite:
        raise ServingError(f"exit {work.last} gave no finite outputs.")
    return Done(work, finite, failed=frozenset(work.requests) - finite.keys())


def _raise(error: BaseException) -> dict[int, Found]:
    raise error
