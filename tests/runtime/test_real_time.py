"""Real-time settings are in force where the system permits, say why not elsewhere, and are undone.

Where this system refuses one, its report is tested in place of its effect.
"""

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fakes import FakeNetwork, Hold, X, elsewhere, hold, runner_of, wait_until
from impatient.clock import Deadline, FakeClock
from impatient.errors import RunError
from impatient.runtime import RealTime, real_time
from impatient.runtime.real_time import NAMES, Name

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the other systems' only answer is tested on Linux, too"
)


def slack_ns() -> int:
    return int(real_time._libc().prctl(real_time._PR_GET_TIMERSLACK, 0, 0, 0, 0))


def kinds(ask: Callable[[int], object]) -> set[object]:
    """What threads have: those of engines that earlier tests used come and go at any time."""
    return set(real_time._of_threads(ask).values())


# what shows each setting from outside
STATES: dict[Name, Callable[[], object]] = {
    "priority": lambda: kinds(
        lambda each: (os.sched_getscheduler(each), os.getpriority(os.PRIO_PROCESS, each))
    ),
    "affinity": lambda: kinds(lambda each: tuple(sorted(os.sched_getaffinity(each)))),
    "memory": lambda: real_time._locked_kb() > 0,
    "gc": lambda: gc.get_freeze_count() > 0,
    "timer": slack_ns,
    "idle": lambda: [
        path
        for path in Path("/proc/self/fd").iterdir()
        if path.exists() and str(path.readlink()) == real_time._DMA_LATENCY
    ],
    "governor": lambda: None,
}


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    # the test run itself has frozen what it imported
    gc.unfreeze()
    before = {name: state() for name, state in STATES.items()}
    yield
    assert {name: state() for name, state in STATES.items()} == before
    assert not real_time._IN_FORCE
    assert gc.isenabled()
    gc.freeze()


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_is_in_force_if_it_says_so_and_undone_at_the_end(name: Name) -> None:
    before = STATES[name]()
    with RealTime([name]) as settings:
        (found,) = settings.settings
        assert (found.name, bool(found.note)) == (name, True)
        changes = found.done and name != "governor" and "already" not in found.note
        assert (STATES[name]() != before) == changes
    assert STATES[name]() == before


def test_threads_that_come_and_go_meanwhile_are_served_alike() -> None:
    done = threading.Event()
    waiting = [threading.Thread(target=done.wait) for _ in range(2)]
    waiting[0].start()
    usual = os.sched_getscheduler(0)
    with RealTime(["priority"]) as settings:
        waiting[1].start()
        found = kinds(os.sched_getscheduler)
        if settings.settings[0].note.startswith("SCHED_FIFO"):
            assert found == {os.SCHED_FIFO}
    assert kinds(os.sched_getscheduler) == {usual}
    done.set()
    for thread in waiting:
        thread.join()


def test_the_last_user_undoes() -> None:
    with RealTime(["gc"]):
        with RealTime(["gc"]) as inner:
            inner.close()
            inner.close()
        assert gc.get_freeze_count()
    assert not gc.get_freeze_count()


def test_a_runner_that_was_dropped_is_undone_by_the_collector_while_another_is_made() -> None:
    class Holder:
        """Whatever refers to itself is ended by the collector alone."""

        def __init__(self) -> None:
            self.me = self
            self.runner = runner_of(FakeNetwork(FakeClock(), [1.0]), real_time=["timer"])

    gc.collect()
    gc.disable()
    try:
        Holder()
        assert "timer" in real_time._IN_FORCE
        with RealTime(["gc"]):
            assert "timer" not in real_time._IN_FORCE
    finally:
        gc.enable()


def refuse(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_without_permission_niceness_stands_in_and_else_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_scheduler = os.sched_setscheduler

    def only_ordinary(thread: int, policy: int, param: os.sched_param) -> None:
        if policy == os.SCHED_FIFO:
            refuse()
        set_scheduler(thread, policy, param)

    nice: list[int] = []
    monkeypatch.setattr(os, "sched_setscheduler", only_ordinary)
    monkeypatch.setattr(os, "setpriority", lambda which, who, value: nice.append(value))
    with RealTime(["priority"]) as settings:
        assert settings.settings[0].note.startswith("niceness -10 (no permission for SCHED_FIFO")
        assert set(nice) == {-10}
    assert nice[-1] == os.getpriority(os.PRIO_PROCESS, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "setpriority", lambda which, who, value: value < 0 and refuse())
        with RealTime(["priority"]) as settings:
            (found,) = settings.settings
            assert not found.done
            assert "no permission" in found.note
            assert "CAP_SYS_NICE" in found.note


def test_a_lock_and_a_file_that_are_refused_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def mlockall(self, _: int) -> int:
            return -1

        def prctl(self, *_: int) -> int:
            return -1

    monkeypatch.setattr(real_time, "_libc", Libc)
    monkeypatch.setattr(real_time, "_DMA_LATENCY", "/nowhere/at/all")
    with RealTime(["memory", "timer", "idle"]) as settings:
        assert [each.done for each in settings.settings] == [False] * 3
        assert "CAP_IPC_LOCK" in settings.settings[0].note
        assert "not on this system: /nowhere/at/all" in settings.settings[2].note


def test_another_system_is_told_so_and_has_its_garbage_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with RealTime() as settings:
        for found in settings.settings:
            assert found.done == (found.name == "gc")
            assert found.done or "only on Linux" in found.note


@pytest.mark.parametrize(
    ("found", "done"), [(["performance"] * 2, True), (["performance", "powersave"], False), ([], 0)]
)
def test_the_governor_is_read(
    found: list[str], done: bool, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    for core, governor in enumerate(found):
        folder = tmp_path / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(f"{governor}\n")
    monkeypatch.setattr(real_time, "_CPU", tmp_path)
    with RealTime(["governor"]) as settings:
        (setting,) = settings.settings
        assert setting.done == done
        assert done or "powersave" in setting.note or "no clock rates" in setting.note


def test_cores_are_left_where_there_are_more_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[object] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: pinned.append(cores))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with RealTime(["affinity"]) as settings:
        assert settings.settings[0].note == "cores 2, 5 of 4"
        assert pinned[-1] == [2, 5]
    assert pinned[-1] == {0, 1, 2, 5}


@pytest.mark.parametrize("names", [["speed"], "priority"])
def test_a_name_that_is_no_setting_is_refused(names) -> None:
    with pytest.raises(RunError, match="expected one of priority, affinity"):
        runner_of(FakeNetwork(FakeClock(), [1.0]), real_time=names)


def test_a_runner_collects_no_garbage_while_it_runs() -> None:
    clock = FakeClock()
    network = FakeNetwork(clock, [1.0, 1.0])
    seen: list[bool] = []
    network.at["stage 1"] = lambda: seen.append(gc.isenabled())
    with runner_of(network, real_time=["gc"]) as runner:
        assert runner.real_time.settings[0].done
        for _ in range(2):
            runner.run(X)
            assert gc.isenabled()
        with runner.open(X) as opened:
            opened.run()
        with runner.start(X) as run:
            run.result()
        assert seen == [False] * 4
        wait_until(gc.isenabled)
    assert not gc.get_freeze_count()
    runner.run(X)
    assert runner_of(network).real_time.settings == ()


def test_garbage_of_someone_who_collects_none_stays_uncollected() -> None:
    gc.disable()
    try:
        with runner_of(FakeNetwork(FakeClock(), [1.0]), real_time=["gc"]) as runner:
            runner.run(X)
            assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_spinning_caller_is_back_at_its_deadline_and_at_the_last_exit() -> None:
    clock = FakeClock()
    network = FakeNetwork(clock, [1.0, 1.0])
    stuck: Hold = hold(network, "stage 1")
    runner = runner_of(network)
    with runner.start(X, deadline=Deadline.after(3.0, clock)) as run:
        stuck.wait_reached()
        found = elsewhere(lambda: run.result(spin=True))
        # awake, but before the deadline: the caller does not return
        clock.advance(2.0 - 100e-6)
        assert not found.done()
        clock.advance(100e-6)
        answer = found.result(timeout=20)
        assert (answer.exit, answer.stopped_by) == (0, "deadline")
        stuck.release()
    with runner.start(X, deadline=Deadline.after(10.0, clock)) as run:
        assert run.result(spin=True).stopped_by == "final"
    runner.close()
