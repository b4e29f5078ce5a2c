"""Run the scheduler's work in one thread, which owns the networks and their runs."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from impatient.anytime import Network, Run
from impatient.errors import ServingError
from impatient.serving.scheduler import Work
from impatient.serving.tensors import Inputs

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Work with what it needs.

    Attributes:
        work: the scheduler's work.
        inputs: raw samples of each request that begins with it.
        rows: samples of each of its requests.
        over: batches of which no request is left.
    """

    work: Work
    inputs: Mapping[int, Inputs]
    rows: Mapping[int, int]
    over: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a work gave.

    Attributes:
        work: the scheduler's work.
        outputs: output of each request, before softmax, shape [rows, C].
        scores: how sure the least sure sample of each request looks.
        error: what went wrong; empty if nothing did.
    """

    work: Work
    outputs: Mapping[int, np.ndarray]
    scores: Mapping[int, float]
    error: str = ""


class _Batch:
    """A batch in flight: a run, and which requests have which of its rows."""

    def __init__(self, network: Network, x: Any, rows: Mapping[int, int]) -> None:
        self.run: Run = network.exits(x)
        self.shrinks = network.shrinks(x)
        self.places: dict[int, list[int]] = {}
        start = 0
        for request, count in rows.items():
            self.places[request] = list(range(start, start + count))
            start += count

    def keep(self, requests: tuple[int, ...]) -> None:
        """Go on with these requests, with fewer rows if the network can."""
        if len(requests) == len(self.places) or not self.shrinks:
            return
        kept = [place for request in requests for place in self.places[request]]
        self.run.keep(torch.tensor(kept))
        numbers = iter(range(len(kept)))
        self.places = {
            request: [next(numbers) for _ in self.places[request]] for request in requests
        }


class InferenceThread:
    """One thread that runs stages, one work after the other, with one torch thread.

    Args:
        networks: the networks by name, in eval mode.
        prepared: how raw samples of some requests become the input of each.
        report: called in that thread with what each work gave.
        warm_up: raw inputs that each network is run on before the first work.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        prepared: Mapping[str, Callable[[Sequence[Inputs]], Any]],
        report: Callable[[Done], None],
        warm_up: Mapping[str, tuple[Inputs, ...]],
    ) -> None:
        self._networks = networks
        self._warm_up = warm_up
        self.warmed = threading.Event()
        self._prepared = prepared
        self._report = report
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._batches: dict[int, _Batch] = {}
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

    @property
    def alive(self) -> bool:
        """Whether the thread lives."""
        return self._thread.is_alive()

    def _loop(self) -> None:
        torch.set_num_threads(1)
        self._warm()
        self.warmed.set()
        while (job := self._jobs.get()) is not None:
            for group in job.over:
                self._close(group)
            self._report(self._done(job))
        for group in list(self._batches):
            self._close(group)

    def _warm(self) -> None:
        for name, inputs in self._warm_up.items():
            for raw in inputs * 3:
                try:
                    with torch.inference_mode():
                        self._run_whole(name, raw)
                except Exception:
                    log.exception("the model %s failed while it was warmed up", name)

    def _run_whole(self, name: str, raw: Inputs) -> None:
        """Run as requests do: the first time, a network also tries out whether it shrinks."""
        x = self._prepared[name]([raw])
        rows = len(next(iter(raw.values())))
        with _Batch(self._networks[name], x, {0: rows}).run as run:
            for exit in run:
                self._sure(name, exit.output())

    def _sure(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """Compute how sure each sample's output looks, by the default score of the task."""
        task = self._networks[name].task
        return task.score(task.default_score)(output)

    def _close(self, group: int) -> None:
        batch = self._batches.pop(group, None)
        if batch is not None:
            batch.run.close()

    def _done(self, job: Job) -> Done:
        try:
            with torch.inference_mode():
                return self._computed(job)
        except Exception as error:
            # A network may raise anything; its requests get the answers that they have.
            log.exception("work of the model %s failed", job.work.model)
            self._close(job.work.group)
            text = f"{type(error).__name__}: {error}"
            return Done(work=job.work, outputs={}, scores={}, error=text)

    def _computed(self, job: Job) -> Done:
        work = job.work
        if work.first == 0:
            self._begin(job)
        batch = self._batches[work.group]
        batch.keep(work.requests)
        for exit in batch.run:
            if exit.index == work.last:
                output = exit.output()
                break
        else:
            raise ServingError(f"this input never came to exit {work.last}.")
        if not torch.isfinite(output).all():
            raise ServingError(f"exit {work.last} gave NaN or infinite outputs.")
        sure = self._sure(work.model, output)
        return Done(
            work=work,
            outputs={
                request: output[batch.places[request]].float().numpy() for request in work.requests
            },
            scores={request: float(sure[batch.places[request]].min()) for request in work.requests},
        )

    def _begin(self, job: Job) -> None:
        work = job.work
        x = self._prepared[work.model]([job.inputs[request] for request in work.requests])
        rows = {request: job.rows[request] for request in work.requests}
        self._batches[work.group] = _Batch(self._networks[work.model], x, rows)
