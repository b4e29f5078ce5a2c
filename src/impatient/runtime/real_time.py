"""Ask the system to run this process on time, and say what it allowed.

Every setting is made where the system permits it, reported as made or why not, and undone at the
end. Settings are of the whole process: several users share them, and the last one undoes them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeVar, get_args

import torch

from impatient import checks
from impatient.errors import RunError

T = TypeVar("T")
Name = Literal["priority", "affinity", "memory", "gc", "timer", "idle", "governor"]
NAMES: tuple[Name, ...] = get_args(Name)

# The lowest real-time priority: above all ordinary work, below whoever asks for more.
FIFO_PRIORITY = 1
# Where only a niceness is permitted.
NICENESS = -10
# Nanoseconds by which the kernel may delay a timer; 0 would mean the default of 50,000.
SLACK_NS = 1

# Numbers of the Linux kernel's interface, from sys/prctl.h and sys/mman.h.
_PR_SET_TIMERSLACK = 29
_PR_GET_TIMERSLACK = 30
_MCL_CURRENT = 1
_MCL_FUTURE = 2
_MCL_ONFAULT = 4

_CPU = Path("/sys/devices/system/cpu")
_DMA_LATENCY = "/dev/cpu_dma_latency"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What became of one setting.

    Attributes:
        name: name of the setting.
        done: whether it is in force.
        note: what is in force, or why it is not.
    """

    name: Name
    done: bool
    note: str


class _Refused(Exception):
    """Raised where a setting cannot be made, with the reason."""


# What a setting registers its undoing in.
_Undo = contextlib.ExitStack


class RealTime:
    """Settings that make a process run on time, in force until `close`.

    * priority: SCHED_FIFO where permitted, else a niceness of -10;
    * affinity: as many cores as torch has threads, and one for the caller, the last ones;
    * memory: pages stay in memory once they were touched (mlockall);
    * gc: objects made so far are never looked at again, and no collection begins during a run;
    * timer: timers wake this thread, and those that it starts, without slack;
    * idle: cores do not sleep deeply (`/dev/cpu_dma_latency`);
    * governor: read only; says whether the clock rate follows the load.

    Args:
        names: settings to make; by default all.
    Attributes:
        settings: what became of each.
    Raises:
        RunError: if there is no setting of a name.
    Thread:
        Open and close it on the thread that runs. Priority and affinity are given to all threads
        of the process; child processes inherit them.
    """

    def __init__(self, names: Sequence[Name] = NAMES) -> None:
        for name in names:
            checks.one_of(RunError, Name, real_time=name)
        self._names = tuple(dict.fromkeys(names))
        if "gc" in self._names:
            # Before the lock is taken: what is collected may be another of these, which takes it.
            gc.collect()
        self.settings = tuple(_join(name) for name in self._names)
        self._closed = False

    @property
    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """Return a context, to enter any number of times, in which no garbage is collected."""
        return _NO_GC if "gc" in self._names else contextlib.nullcontext()

    def close(self) -> None:
        """Undo all settings. Closing twice is allowed."""
        if not self._closed:
            self._closed = True
            for name in reversed(self._names):
                _leave(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- settings shared by all users of the process --------------------------------------------------


@dataclass(slots=True)
class _InForce:
    setting: Setting
    undo: contextlib.ExitStack
    users: int = 1


_LOCK = threading.Lock()
_IN_FORCE: dict[Name, _InForce] = {}


def _join(name: Name) -> Setting:
    """Make a setting, unless it is in force."""
    with _NO_GC, _LOCK:
        if name in _IN_FORCE:
            _IN_FORCE[name].users += 1
        else:
            _IN_FORCE[name] = _made(name)
        return _IN_FORCE[name].setting


def _leave(name: Name) -> None:
    with _NO_GC, _LOCK:
        _IN_FORCE[name].users -= 1
        if not _IN_FORCE[name].users:
            _IN_FORCE.pop(name).undo.close()


def _made(name: Name) -> _InForce:
    undo = contextlib.ExitStack()
    try:
        if name != "gc" and sys.platform != "linux":
            raise _Refused(f"not on this system: {sys.platform}; only on Linux")
        setting = Setting(name=name, done=True, note=_MAKERS[name](undo))
    except _Refused as reason:
        setting = Setting(name=name, done=False, note=str(reason))
    return _InForce(setting, undo)


# --- one function per setting ---------------------------------------------------------------------


def _priority(undo: _Undo) -> str:
    """Ask for SCHED_FIFO, else for a niceness."""
    before = _of_threads(lambda thread: (os.sched_getscheduler(thread), os.sched_getparam(thread)))
    usual = before[threading.get_native_id()]
    fifo = os.SCHED_FIFO, os.sched_param(FIFO_PRIORITY)
    if usual[0] in (os.SCHED_FIFO, os.SCHED_RR):
        return f"was real-time already, priority {usual[1].sched_priority}"
    undo.callback(
        _of_threads, lambda thread: os.sched_setscheduler(thread, *before.get(thread, usual))
    )
    try:
        _of_threads(lambda thread: os.sched_setscheduler(thread, *fifo))
    except PermissionError:
        return _nice(undo)
    return f"SCHED_FIFO, priority {FIFO_PRIORITY}, {len(before)} threads"


def _nice(undo: _Undo) -> str:
    before = _of_threads(lambda thread: os.getpriority(os.PRIO_PROCESS, thread))
    usual = before[threading.get_native_id()]
    undo.callback(
        _of_threads,
        lambda thread: os.setpriority(os.PRIO_PROCESS, thread, before.get(thread, usual)),
    )
    try:
        _of_threads(lambda thread: os.setpriority(os.PRIO_PROCESS, thread, NICENESS))
    except PermissionError:
        raise _Refused(
            "no permission: neither SCHED_FIFO nor a lower niceness; needs CAP_SYS_NICE, or "
            "rtprio in /etc/security/limits.conf"
        ) from None
    return f"niceness {NICENESS} (no permission for SCHED_FIFO, which needs CAP_SYS_NICE)"


def _affinity(undo: _Undo) -> str:
    """Keep all threads on the last cores, away from the first, which serves most interrupts."""
    before = _of_threads(os.sched_getaffinity)
    usual = before[threading.get_native_id()]
    wanted = torch.get_num_threads() + 1
    if len(usual) <= wanted:
        raise _Refused(
            f"nothing to choose: {wanted - 1} torch threads and the caller need all "
            f"{len(usual)} cores"
        )
    cores = sorted(usual)[-wanted:]
    undo.callback(
        _of_threads, lambda thread: os.sched_setaffinity(thread, before.get(thread, usual))
    )
    _of_threads(lambda thread: os.sched_setaffinity(thread, cores))
    return f"cores {', '.join(map(str, cores))} of {len(usual)}"


def _memory(undo: _Undo) -> str:
    """Lock pages as they are touched: locking all of torch's files would read them whole."""
    if _locked_kb():
        return f"was locked already: {_locked_kb()} kB"
    libc = _libc()
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        raise _Refused(
            f"no permission: mlockall: {os.strerror(ctypes.get_errno())}; needs CAP_IPC_LOCK, or "
            "memlock in /etc/security/limits.conf"
        )
    undo.callback(libc.munlockall)
    return "pages are locked when they are touched"


def _locked_kb() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmLck:")[2].split(maxsplit=1)[0])


def _gc(undo: _Undo) -> str:
    """Keep what exists now out of all later collections."""
    if gc.get_freeze_count():
        return "was frozen already; off during runs"
    gc.freeze()
    undo.callback(gc.unfreeze)
    return f"{gc.get_freeze_count()} objects frozen; off during runs"


def _timer(undo: _Undo) -> str:
    libc = _libc()
    before = libc.prctl(_PR_GET_TIMERSLACK, 0, 0, 0, 0)
    if before < 0 or libc.prctl(_PR_SET_TIMERSLACK, SLACK_NS, 0, 0, 0):
        raise _Refused(f"prctl: {os.strerror(ctypes.get_errno())}")
    undo.callback(_restore_slack, threading.get_native_id(), before)
    return f"{SLACK_NS} ns after {before} ns"


def _restore_slack(thread: int, before: int) -> None:
    if thread == threading.get_native_id():
        _libc().prctl(_PR_SET_TIMERSLACK, before, 0, 0, 0)
    else:
        # The thread may have ended, or belong to a process without that permission.
        with contextlib.suppress(OSError):
            Path(f"/proc/{thread}/timerslack_ns").write_text(str(before), encoding="ascii")


def _idle(undo: _Undo) -> str:
    """Hold the kernel's promise of a wake-up within 0 microseconds, while the file is open."""
    try:
        file = os.open(_DMA_LATENCY, os.O_WRONLY)
        undo.callback(os.close, file)
        os.write(file, struct.pack("i", 0))
    except PermissionError:
        raise _Refused(f"no permission to write {_DMA_LATENCY}; needs root") from None
    except OSError as error:
        raise _Refused(f"not on this system: {_DMA_LATENCY}: {error.strerror}") from None
    return f"cores stay awake ({_DMA_LATENCY})"


def _governor(_: _Undo) -> str:
    found = sorted(
        {
            path.read_text(encoding="ascii").strip()
            for path in _CPU.glob("cpu[0-9]*/cpufreq/scaling_governor")
        }
    )
    if not found:
        raise _Refused("not on this system: it shows no clock rates, as most virtual machines")
    if found != ["performance"]:
        raise _Refused(
            f"governor {', '.join(found)}: the clock rate follows the load; set it with "
            "`cpupower frequency-set -g performance` as root"
        )
    return "performance"


_MAKERS: dict[Name, Callable[[_Undo], str]] = {
    "priority": _priority,
    "affinity": _affinity,
    "memory": _memory,
    "gc": _gc,
    "timer": _timer,
    "idle": _idle,
    "governor": _governor,
}


def _of_threads(call: Callable[[int], T]) -> dict[int, T]:
    """Call a function with the number of each thread of this process."""
    found = {}
    for path in Path("/proc/self/task").iterdir():
        # The thread may have ended meanwhile.
        with contextlib.suppress(ProcessLookupError):
            found[int(path.name)] = call(int(path.name))
    return found


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class _NoGc(contextlib.AbstractContextManager[None]):
    """A context in which no garbage is collected; threads may be in it at the same time."""

    def __init__(self) -> None:
        # Garbage that is collected while it is held may enter this context, too.
        self._lock = threading.RLock()
        self._inside = 0
        self._was_on = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._was_on = gc.isenabled()
                gc.disable()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._was_on:
                gc.enable()


_NO_GC = _NoGc()
