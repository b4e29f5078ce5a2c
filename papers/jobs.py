"""Run many independent jobs, a few at a time.

Each has a process and a folder. Results are kept, and failures are named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from impatient.errors import ImpatientError, StorageError
from impatient.files import read_json, write_json, write_text
from impatient.provenance import fingerprint_bytes

# how long a stopped job may take to write its checkpoint
STOP_S = 30.0


class JobsFailed(ImpatientError):
    """One or more jobs failed, and the results of the others are kept."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run.

    Attributes:
        name: also its folder's name.
        call: a function at a module's top level (it is pickled by name); it gets `arguments` and
            `folder`, a `Path` of its own for checkpoints and recordings, and returns what JSON can
            hold.
        arguments: by keyword: JSON values, paths, dataclasses of those, or sequences and mappings
            of them.
    """

    name: str
    call: Callable[..., dict[str, Any]]
    arguments: Mapping[str, Any]

    def fingerprint(self) -> str:
        """Compute a hash that changes with the function and the arguments."""
        what = [f"{self.call.__module__}.{self.call.__qualname__}", dict(self.arguments)]
        return fingerprint_bytes(json.dumps(what, sort_keys=True, default=_plain).encode())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(
        f"a job's argument is a {type(value).__name__}; expected JSON values, paths or dataclasses "
        "of them."
    )


def run_jobs(
    jobs: Sequence[Job], folder: Path, *, workers: int, threads: int = 1
) -> dict[str, dict[str, Any]]:
    """Run the jobs that have no result yet, and return all results by name.

    They run in the given order.

    A job's result lies in FOLDER/NAME/result.json with the fingerprint of its arguments; with other
    arguments it is run again. Jobs that need another's result belong to a later call.

    Args:
        jobs: with different names.
        folder: of all of them.
        workers: processes at a time, a fresh one per job; 1 runs in this process.
        threads: torch's threads in each.
    Raises:
        JobsFailed: if some failed, after the rest were run, with each one's name and error.
        KeyboardInterrupt: at Ctrl-C, passed on once to every running job: `fit` then writes its
            checkpoint and stops. The same call goes on from there.
    """
    names = [job.name for job in jobs]
    if len(set(names)) < len(names):
        raise ValueError(
            f"jobs of the same name: {sorted({name for name in names if names.count(name) > 1})}."
        )
    wanted = [job for job in jobs if _result(job, folder) is None]
    with _Progress(len(jobs), len(jobs) - len(wanted)) as progress:
        run = _run_here if workers == 1 else _run_apart
        failed = run(wanted, folder, workers, threads, progress) if wanted else {}
    if failed:
        raise JobsFailed(_report(failed, len(jobs), folder))
    return {job.name: read_json(_path(job, folder))["result"] for job in jobs}


def finished(jobs: Sequence[Job], folder: Path) -> dict[str, Any]:
    """Results of those jobs that have one of these very arguments, by name."""
    found = {job.name: _result(job, folder) for job in jobs}
    return {name: result for name, result in found.items() if result is not None}


def _path(job: Job, folder: Path) -> Path:
    return folder / job.name / "result.json"


def _result(job: Job, folder: Path) -> dict[str, Any] | None:
    """Return a stored result if it has these arguments and can be read."""
    try:
        stored = read_json(_path(job, folder))
    except StorageError:
        return None
    return stored["result"] if stored.get("fingerprint") == job.fingerprint() else None


def _execute(job: Job, folder: Path) -> str | None:
    """Run one job and keep its result, or return its error in one line."""
    own = folder / job.name
    try:
        own.mkdir(parents=True, exist_ok=True)
        _forget_other_arguments(job, own)
        (own / "error.txt").unlink(missing_ok=True)
        start = time.perf_counter()
        result = job.call(**job.arguments, folder=own)
        stored = {
            "fingerprint": job.fingerprint(),
            "seconds": time.perf_counter() - start,
            "result": result,
        }
        write_json(_path(job, folder), stored)
    except Exception as error:
        with contextlib.suppress(StorageError):
            write_text(own / "error.txt", traceback.format_exc())
        return f"{type(error).__name__}: {error}"
    return None


def _forget_other_arguments(job: Job, own: Path) -> None:
    """Remove the job's files if they were made with other arguments.

    A checkpoint of these would be refused.
    """
    marker = own / "fingerprint.txt"
    if not marker.is_file() or marker.read_text(encoding="utf-8") != job.fingerprint():
        for path in own.iterdir():
            if path.is_file():
                path.unlink()
        write_text(marker, job.fingerprint())


def _run_here(
    jobs: Sequence[Job], folder: Path, workers: int, threads: int, progress: _Progress
) -> dict[str, str]:
    del workers
    failed = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for job in jobs:
            progress.started(job.name)
            error = _execute(job, folder)
            failed.update({job.name: error} if error else {})
            progress.ended(job.name, error)
    finally:
        torch.set_num_threads(before)
    return failed


def _run_apart(
    jobs: Sequence[Job], folder: Path, workers: int, threads: int, progress: _Progress
) -> dict[str, str]:
    waiting = list(jobs)
    failed = {}
    with _running() as running:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                process = multiprocessing.get_context("spawn").Process(
                    target=_child, args=(job, folder, threads), name=job.name
                )
                process.start()
                running[process.sentinel] = (job, process)
                progress.started(job.name)
            for sentinel in wait(list(running)):
                job, process = running.pop(sentinel)  # type: ignore[arg-type]
                process.join()
                error = _error_of(job, process, folder)
                failed.update({job.name: error} if error else {})
                progress.ended(job.name, error)
    return failed


def _child(job: Job, folder: Path, threads: int) -> None:
    """Run in a separate process, which ends with its parent.

    Ctrl-C reaches it once, through the parent.
    """
    if hasattr(os, "setpgrp"):
        # out of reach of the terminal's Ctrl-C: a second one would cut off the writing of a
        # checkpoint
        os.setpgrp()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        error = _execute(job, folder)
    except KeyboardInterrupt:
        # without a traceback: this is a clean stop
        os._exit(130)
    raise SystemExit(1 if error else 0)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _error_of(job: Job, process: SpawnProcess, folder: Path) -> str | None:
    if process.exitcode == 0:
        return None
    path = folder / job.name / "error.txt"
    if process.exitcode == 1 and path.is_file():
        return path.read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
    return (
        f"its process ended with code {process.exitcode} (negative: killed by that signal; out of "
        "memory?)"
    )


@contextlib.contextmanager
def _running() -> Iterator[dict[int, tuple[Job, SpawnProcess]]]:
    """Yield running processes by sentinel, and stop them at the end of the block.

    If the block ends early, processes that still run are asked to stop, and then stopped.
    """
    running: dict[int, tuple[Job, SpawnProcess]] = {}
    try:
        yield running
    except BaseException:
        with _deaf():
            _stop([process for _, process in running.values()])
        raise


def _stop(processes: Sequence[SpawnProcess]) -> None:
    for process in processes:
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
    end = time.monotonic() + STOP_S
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Ignore further Ctrl-C, since `timeout -s INT` and some people send two."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _report(failed: Mapping[str, str], count: int, folder: Path) -> str:
    lines = "\n".join(
        f"  {name}: {error} (traceback: {folder / name / 'error.txt'})"
        for name, error in failed.items()
    )
    return (
        f"{len(failed)} of {count} jobs failed; the others' results are kept, and the same command "
        "runs these again:\n"
        f"{lines}"
    )


class _Progress:
    """Progress of jobs as a bar with the names of running jobs.

    Without a terminal, it is a line per finished job.
    """

    def __init__(self, total: int, done: int) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._total = total
        self._done = done
        self._begun = dict[str, float]()

    def __enter__(self) -> _Progress:
        self._bar.__enter__()
        self._task = self._bar.add_task("jobs", total=self._total, completed=self._done)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__(None, None, None)

    def started(self, name: str) -> None:
        self._begun[name] = time.perf_counter()
        self._show()

    def ended(self, name: str, error: str | None) -> None:
        self._done += 1
        seconds = time.perf_counter() - self._begun.pop(name)
        how = f"FAILED: {error}" if error else "done"
        self._console.print(
            f"[{self._done}/{self._total}] {name}: {how}, {seconds:.1f} s",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        self._show()

    def _show(self) -> None:
        self._bar.update(
            self._task, completed=self._done, description=escape(", ".join(self._begun) or "jobs")
        )
