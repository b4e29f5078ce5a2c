"""Networks of an ensemble side by side: who runs when, which answer counts, and that everything
ends.
"""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fakes import FakeNetwork, X, elsewhere, hold, wait_until
from impatient.clock import NEVER, Deadline, FakeClock
from impatient.errors import NoAnswerInTime, RunError
from impatient.experimental.workers import ParallelEANN
from impatient.networks import attach_exits
from impatient.networks.ensemble import EANN
from toys import ToyBackbone

ERRORS = [[0.5, 0.3], [0.4, 0.2], [0.25, 0.1]]


@pytest.fixture
def networks(clock: FakeClock) -> list[FakeNetwork]:
    """Three of two exits; exit k of them all gives k everywhere."""
    outputs = torch.arange(6.0).reshape(3, 2, 1, 1).expand(3, 2, 1, 3)
    return [FakeNetwork(clock, [1.0, 1.0], [0.5, 0.0], outputs=own.clone()) for own in outputs]


Make = Callable[..., ParallelEANN]


@pytest.fixture
def make(clock: FakeClock, networks: list[FakeNetwork]) -> Iterator[Make]:
    made: list[weakref.ref[ParallelEANN]] = []

    def parallel(
        workers: int, errors: Sequence[Sequence[float]] = ERRORS, **options: Any
    ) -> ParallelEANN:
        ensemble = SimpleNamespace(networks=networks[: len(errors)], validation_errors=errors)
        one = ParallelEANN(ensemble, workers=workers, clock=clock, **options)
        made.append(weakref.ref(one))
        return one

    yield parallel
    for one in made:
        if (still := one()) is not None:
            still.close()
        del still
    wait_until(lambda: not threads())


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "impatient-runner"]


def all_ran(networks: Sequence[FakeNetwork]) -> list[list[str]]:
    return [network.ran for network in networks]


# --- who runs when --------------------------------------------------------------------------------


def test_one_worker_runs_them_one_after_the_other(make, networks):
    answer = make(1).run(X)
    assert (answer.exit, answer.exits, answer.stopped_by, answer.deadline_met) == (
        5,
        (5,),
        "final",
        True,
    )
    assert answer.output.eq(5.0).all()
    # six stages and one head: those of exits 2 and 4 are no match for exits 1 and 3
    assert answer.elapsed_s == 6.5
    assert all_ran(networks) == [
        ["stage 0", "head 0", "stage 1", "head 1"],
        *[["stage 0", "stage 1", "head 1"]] * 2,
    ]


def test_an_idle_worker_takes_the_next_deeper_network(make, networks):
    first, second, third = (hold(network, "stage 0") for network in networks)
    with make(2).start(X) as run:
        first.wait_reached()
        # both at once
        second.wait_reached()
        assert networks[2].ran == []
        second.release()
        networks[1].wait_closed()
        # while the first still stands
        third.wait_reached()
        assert networks[0].ran == ["stage 0"]
        for held in (first, third):
            held.release()
        assert run.result().exit == 5


def test_more_workers_than_networks_do_no_harm(make):
    assert make(8).run(X).exit == 5


# --- which answer counts --------------------------------------------------------------------------


def test_a_deeper_answer_displaces_a_worse_one_and_a_worse_one_does_not_come_back(make, networks):
    shallow = hold(networks[0], "stage 1")
    with make(2).start(X) as run:
        shallow.wait_reached()
        networks[2].wait_closed()
        latest = run.latest()
        assert latest is not None
        assert (latest.exit, latest.stopped_by) == (5, "interrupt")
        shallow.release()
        answer = run.result()
    assert (answer.exit, answer.stopped_by) == (5, "final")
    # it was no match any more
    assert "head 1" not in networks[0].ran


@pytest.mark.parametrize("deep_first", [True, False])
def test_of_equally_good_answers_the_deeper_counts(make, networks, deep_first):
    errors = [[0.2, 0.2], [0.2, 0.2]]
    held = hold(networks[0 if deep_first else 1], "stage 0")
    with make(2, errors).start(X) as run:
        networks[1 if deep_first else 0].wait_closed()
        held.release()
        assert run.result().exit == 3


def test_the_best_need_not_be_a_last_exit(make):
    answer = make(2, [[0.5, 0.3], [0.1, 0.2]]).run(X)
    assert (answer.exit, answer.stopped_by) == (2, "final")


# --- deadlines and interrupts ---------------------------------------------------------------------


def test_at_the_deadline_the_best_posted_answer_is_there_and_everybody_leaves(
    make, networks, clock
):
    first = hold(networks[0], "stage 1")
    second = hold(networks[1], "stage 1")
    with make(2).start(X, deadline=Deadline(10.0)) as run:
        first.wait_reached()
        second.wait_reached()
        waiting = elsewhere(run.result)
        clock.advance(20.0)
        answer = waiting.result()
        assert (answer.exit, answer.stopped_by, answer.deadline_met) == (2, "deadline", True)
        assert not first.released
        assert not second.released
        for held in (first, second):
            held.release()
        networks[0].wait_closed()
        networks[1].wait_closed()
        assert run.result() is answer
    # no head more
    assert [ran[-1] for ran in all_ran(networks[:2])] == ["stage 1", "stage 1"]
    assert networks[2].ran == []


def test_an_answer_after_the_deadline_displaces_none_in_time(make, networks, clock):
    networks[1].at["head 1"] = lambda: clock.advance(100.0)
    answer = make(1).run(X, deadline=Deadline(50.0))
    assert (answer.exit, answer.stopped_by, answer.deadline_met) == (1, "deadline", True)
    assert networks[2].ran == []


def test_a_last_network_that_is_late_makes_no_final_answer(make, networks, clock):
    networks[2].at["head 1"] = lambda: clock.advance(100.0)
    answer = make(1).run(X, deadline=Deadline(50.0))
    assert (answer.exit, answer.stopped_by, answer.deadline_met) == (3, "deadline", True)


def test_without_an_answer_at_the_deadline_the_first_is_given_late(make, networks, clock):
    networks[0].at["stage 0"] = lambda: clock.advance(100.0)
    answer = make(1).run(X, deadline=Deadline(50.0))
    assert (answer.exit, answer.stopped_by, answer.deadline_met) == (0, "deadline", False)
    assert networks[0].ran == ["stage 0", "head 0"]


def test_without_an_answer_at_the_deadline_it_raises_if_asked_to(make, networks, clock):
    held = hold(networks[0], "stage 0")
    with make(1, when_late="raise").start(X, deadline=Deadline(1.0)) as run:
        held.wait_reached()
        clock.advance(2.0)
        with pytest.raises(NoAnswerInTime):
            run.result()
        held.release()
        networks[0].wait_closed()
    assert networks[0].ran == ["stage 0"]


def test_an_interrupt_gives_the_best_so_far(make, networks):
    held = [hold(network, "stage 1") for network in networks[:2]]
    with make(2).start(X) as run:
        for one in held:
            one.wait_reached()
        answer = run.interrupt()
        assert (answer.exit, answer.stopped_by) == (2, "interrupt")
        for one in held:
            one.release()
        networks[0].wait_closed()
        networks[1].wait_closed()
    assert networks[2].ran == []


def test_a_run_does_not_wait_for_a_worker_held_up_by_the_one_before(make, networks):
    parallel = make(2)
    held = hold(networks[1], "stage 0")
    with parallel.start(X) as run:
        held.wait_reached()
        networks[0].wait_closed()
        networks[2].wait_closed()
        del networks[1].at["stage 0"]
        assert run.interrupt().exit == 5
        # by the other worker alone
        assert parallel.run(X).stopped_by == "final"
        assert not held.released
        held.release()


# --- failures and ends ----------------------------------------------------------------------------


def fail() -> None:
    raise ValueError("out of order")


def test_a_failing_network_is_the_callers_error_and_the_others_leave(make, networks):
    held = hold(networks[1], "stage 0")

    def fail_beside_it() -> None:
        held.wait_reached()
        fail()

    networks[0].at["stage 1"] = fail_beside_it
    with make(2).start(X) as run:
        wait_until(lambda: run._error is not None)
        held.release()
        with pytest.raises(ValueError, match="out of order"):
            run.result()
    assert networks[1].ran == ["stage 0"]
    assert networks[2].ran == []


def test_a_failure_after_the_answer_was_due_is_nobodys(make, networks, clock):
    def late_failure() -> None:
        clock.advance(100.0)
        fail()

    networks[1].at["stage 0"] = late_failure
    assert make(1).run(X, deadline=Deadline(50.0)).exit == 1


def test_workers_survive_a_failure(make, networks):
    parallel = make(1)
    networks[0].at["stage 0"] = fail
    with pytest.raises(ValueError, match="out of order"):
        parallel.run(X)
    del networks[0].at["stage 0"]
    assert parallel.run(X).exit == 5


def test_a_network_whose_last_exit_never_comes_is_an_error(make, networks, monkeypatch):
    monkeypatch.setattr(networks[1], "stage_by_stage", lambda: (exit for exit in ()))
    with pytest.raises(RunError, match="network 1 ended before its last exit"):
        make(1).run(X)


def test_closing_ends_the_threads_and_the_runs(make, networks):
    held = [hold(network, "stage 0") for network in networks[:2]]
    parallel = make(2)
    run = parallel.start(X)
    for each in held:
        each.wait_reached()
    assert len(threads()) == 2
    parallel.close()
    parallel.close()
    for each in held:
        each.release()
    with pytest.raises(RunError, match="closed before its first exit"):
        run.result()
    wait_until(lambda: not threads())
    with pytest.raises(RunError, match="were closed"):
        parallel.run(X)


def test_workers_that_are_forgotten_end(make):
    parallel = make(3)
    parallel.run(X)
    assert len(threads()) == 3
    del parallel
    gc.collect()
    wait_until(lambda: not threads())


def test_a_run_outlives_the_name_of_its_workers(make, networks):
    held = hold(networks[0], "stage 0")
    with make(1).start(X) as run:
        held.wait_reached()
        gc.collect()
        held.release()
        assert run.result().exit == 5


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "threads", "each"), [(2, None, 2), (3, None, 1), (8, None, 1), (2, 3, 3)]
)
def test_torchs_threads_are_shared_out_and_given_back(make, networks, workers, threads, each):
    seen: list[int] = []
    networks[0].at["stage 0"] = lambda: seen.append(torch.get_num_threads())
    torch.set_num_threads(4)
    with make(workers, threads=threads) as parallel:
        parallel.run(X)
    assert seen == [each]
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0},
        {"workers": 2, "threads": 0},
        {"workers": 1, "when_late": "never"},
        {"workers": 1, "errors": [[0.5], [0.2, 0.1]]},
    ],
)
def test_impossible_settings_are_refused(make, wrong):
    before = torch.get_num_threads()
    with pytest.raises(RunError, match="expected"):
        make(**wrong)
    assert torch.get_num_threads() == before


# --- for real -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_real_networks_on_the_real_clock(workers, toy_input):
    members = [
        attach_exits(ToyBackbone(), after=["blocks.0", "blocks.2"], example=toy_input)
        for _ in range(4)
    ]
    errors = [[0.6, 0.5, 0.4], [0.5, 0.35, 0.3], [0.5, 0.2, 0.25], [0.6, 0.5, 0.22]]
    ensemble = EANN(members, errors).eval()
    own = [output for member in members for output in member(toy_input)]
    with ParallelEANN(ensemble, workers=workers) as parallel:
        for deadline in (NEVER, Deadline.after(60.0)):
            for _ in range(5):
                answer = parallel.run(toy_input, deadline=deadline)
                assert (answer.exit, answer.exits, answer.stopped_by) == (7, (7,) * 5, "final")
                assert answer.deadline_met
                assert answer.output.equal(own[7])
        hurried = parallel.run(toy_input, deadline=Deadline.after(1e-9))
        assert hurried.output.equal(own[hurried.exit])
        assert not hurried.deadline_met
    wait_until(lambda: not threads())
