"""What the scheduler promises, whatever happens."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from impatient.errors import ServingError
from impatient.serving import (
    ClockworkLike,
    DynamicProgramme,
    EdgeServingLike,
    FirstThenRoundRobin,
    Fixed,
    GainTable,
    GreedyGain,
    InfaasLike,
    Refuse,
    Reply,
    Request,
    Scheduler,
    ServedModel,
    SymphonyLike,
    Work,
    fluid_bound,
    simulate,
)

OURS = [GreedyGain, FirstThenRoundRobin, DynamicProgramme]
ALL = [*OURS, Fixed, ClockworkLike, SymphonyLike, InfaasLike, EdgeServingLike]


def model_of(name: str = "net", *, merges: bool = False, max_batch: int = 3) -> ServedModel:
    """Exits after 1, 2 and 4 seconds; two in a batch take one and a half times as long."""
    one = (1.0, 1.0, 2.0)
    return ServedModel(
        name=name,
        stages_s={1: one, 2: tuple(1.5 * seconds for seconds in one)},
        quality=(0.6, 0.7, 0.9),
        max_batch=max_batch,
        merges=merges,
    )


def scheduler_of(rule=None, **options) -> Scheduler:
    return Scheduler(models={"net": model_of()}, rule=rule or GreedyGain(), **options)


def works(actions) -> list[Work]:
    return [action for action in actions if isinstance(action, Work)]


def test_a_lone_request_goes_as_deep_as_its_deadline_allows() -> None:
    scheduler = scheduler_of()
    (first,) = scheduler.arrived(Request(id=0, model="net", deadline=2.5), 0.0)
    assert (first.first, first.last, first.requests) == (0, 0, (0,))
    (second,) = scheduler.finished(first, {}, 1.0)
    assert (second.first, second.last) == (1, 1)
    # the third exit would be ready at 4.0
    assert scheduler.finished(second, {}, 2.0) == [
        Reply(request=0, exit=1, stopped_by="deadline", in_time=True)
    ]
    assert scheduler.waiting == 0


def test_the_latest_answer_is_given_at_the_deadline_though_a_stage_is_running() -> None:
    scheduler = scheduler_of(reserve_s=0.1)
    (first,) = scheduler.arrived(Request(id=0, model="net", deadline=2.2), 0.0)
    (second,) = scheduler.finished(first, {}, 1.0)
    assert scheduler.next_tick(1.0) == pytest.approx(2.1)
    assert scheduler.tick(2.1) == [Reply(request=0, exit=0, stopped_by="deadline", in_time=True)]
    # the stage that overran ends with nobody waiting for it
    assert scheduler.finished(second, {}, 3.0) == []


def test_of_a_short_budget_at_most_half_is_kept_for_the_reply() -> None:
    scheduler = scheduler_of(reserve_s=9.0)
    (first,) = scheduler.arrived(Request(id=0, model="net", deadline=9.0, arrival=1.0), 1.0)
    (second,) = scheduler.finished(first, {}, 2.0)
    assert (second.first, second.last) == (1, 1)
    assert scheduler.next_tick(2.0) == pytest.approx(5.0)


def test_a_first_exit_is_not_risked_for_a_deeper_one() -> None:
    scheduler = scheduler_of()
    (first,) = scheduler.arrived(Request(id=0, model="net", deadline=100.0), 0.0)
    scheduler.arrived(Request(id=1, model="net", deadline=2.0), 0.5)
    (work,) = scheduler.finished(first, {}, 1.0)
    assert (work.first, work.requests) == (0, (1,))


@pytest.mark.parametrize(
    ("of_four_s", "batch"),
    [
        # a quarter less per sample than in a batch of two, as much, and a tenth more
        (3.0, 4),
        (4.0, 4),
        (4.4, 2),
    ],
)
def test_first_exits_run_in_the_batch_that_is_cheapest_per_sample(
    of_four_s: float, batch: int
) -> None:
    model = ServedModel(
        name="net", stages_s={1: (1.5,), 2: (2.0,), 4: (of_four_s,)}, quality=(0.9,), max_batch=4
    )
    scheduler = Scheduler(models={"net": model}, rule=GreedyGain())
    (first,) = works(scheduler.arrived(Request(id=0, model="net", deadline=50.0), 0.0))
    for id in range(1, 6):
        assert not scheduler.arrived(Request(id=id, model="net", deadline=50.0 + id), 0.0)
    (work,) = works(scheduler.finished(first, {}, 1.5))
    assert work.requests == tuple(range(1, 1 + batch))


def test_where_a_batch_would_be_late_for_one_requests_run_alone_and_by_deadline() -> None:
    scheduler = scheduler_of()
    (first,) = scheduler.arrived(Request(id=0, model="net", deadline=4.5), 0.0)
    for id in (1, 2):
        assert not scheduler.arrived(Request(id=id, model="net", deadline=20.0 - id), 0.0)
    ran = []
    now = 0.0
    actions = [first]
    while works(actions):
        (work,) = works(actions)
        ran.append((work.requests, work.last))
        now += work.seconds
        actions = scheduler.finished(work, {}, now)
    # first exits alone gain most per second, but leave no time for the third exit of 0
    # those who are left have time for a batch
    assert ran == [(ids, exit) for ids in ((0,), (2, 1)) for exit in (0, 1, 2)]


def test_where_batches_have_time_for_all_first_exits_run_in_a_batch() -> None:
    scheduler = scheduler_of()
    (first,) = scheduler.arrived(Request(id=0, model="net", deadline=40.0), 0.0)
    for id in (1, 2):
        assert not scheduler.arrived(Request(id=id, model="net", deadline=20.0 - id), 0.0)
    (work,) = works(scheduler.finished(first, {}, 1.0))
    # earliest deadline first
    assert (work.requests, work.last) == ((2, 1), 0)


def test_where_not_all_fits_first_exits_run_in_a_batch() -> None:
    scheduler = scheduler_of()
    (first,) = scheduler.arrived(Request(id=0, model="net", deadline=4.5), 0.0)
    for id in (1, 2):
        # one by one they would be done at 3.0
        assert not scheduler.arrived(Request(id=id, model="net", deadline=2.9), 0.0)
    (work,) = works(scheduler.finished(first, {}, 1.0))
    assert (work.requests, work.last) == ((1, 2), 0)


@pytest.mark.parametrize(
    ("deadline", "batch"),
    [
        # both fit alone
        (3.2, (1,)),
        # the second fits only in a batch
        (2.9, (1, 2)),
    ],
)
def test_a_batch_in_time_by_a_hair_runs_only_where_it_must(
    deadline: float, batch: tuple[int, ...]
) -> None:
    # without prices nothing is planned one by one
    scheduler = scheduler_of(GreedyGain(prices=()))
    (first,) = scheduler.arrived(Request(id=0, model="net", deadline=1.5), 0.0)
    assert not scheduler.arrived(Request(id=1, model="net", deadline=2.6), 0.0)
    assert not scheduler.arrived(Request(id=2, model="net", deadline=deadline), 0.0)
    # a batch of both is done at 2.5
    (work,) = works(scheduler.finished(first, {}, 1.0))
    assert (work.requests, work.last) == (batch, 0)


def test_what_is_not_worth_its_price_gives_way() -> None:
    """From exit 1 the last one gains nothing for 0, so 1 is not held up by it."""
    gains = GainTable(
        bounds=((0.5,), (), ()),
        quality=(((0.6, 0.7, 0.9), (0.6, 0.601, 0.602)), ((0.6, 0.7, 0.9),), ((0.6, 0.7, 0.9),)),
    )
    model = replace(model_of(), gains=gains)
    scheduler = Scheduler(models={"net": model}, rule=GreedyGain())
    (first,) = scheduler.arrived(Request(id=0, model="net", deadline=6.0), 0.0)
    assert not scheduler.arrived(Request(id=1, model="net", deadline=7.0), 0.0)
    (work,) = works(scheduler.finished(first, {0: 0.9}, 1.0))
    assert work.requests == (1,)
    (work,) = works(scheduler.finished(work, {1: 0.1}, 2.0))
    assert (work.requests, work.last) == ((1,), 1)


def test_who_cannot_be_answered_in_time_is_refused_at_once_or_answered_late() -> None:
    scheduler = scheduler_of()
    (first,) = scheduler.arrived(Request(id=0, model="net", deadline=9.0), 0.0)
    (refused,) = scheduler.arrived(Request(id=1, model="net", deadline=1.5), 0.1)
    assert (refused.request, refused.why) == (1, "too late")
    assert refused.retry_after_s == pytest.approx(1.9)
    late = Request(id=2, model="net", deadline=1.5, best_effort=True)
    assert scheduler.arrived(late, 0.1) == []
    actions = scheduler.finished(first, {}, 1.0)
    (work,) = works(actions)
    while work:
        actions = scheduler.finished(work, {}, 5.0)
        found = [action for action in actions if isinstance(action, Reply) and action.request == 2]
        if found:
            assert found[0].in_time is False
            return
        (work,) = works(actions)


def test_failed_work_gives_the_answers_there_are() -> None:
    scheduler = scheduler_of()
    (first,) = scheduler.arrived(Request(id=0, model="net", deadline=9.0), 0.0)
    (second,) = scheduler.finished(first, {}, 1.0)
    assert scheduler.failed(second, 1.5) == [
        Reply(request=0, exit=0, stopped_by="failed", in_time=True)
    ]
    (third,) = scheduler.arrived(Request(id=1, model="net", deadline=9.0), 2.0)
    assert scheduler.failed(third, 2.5) == [Refuse(request=1, why="failed")]


def test_a_score_that_promises_no_gain_stops_a_request() -> None:
    gains = GainTable(
        bounds=((0.5,), (), ()),
        quality=(((0.2, 0.6, 0.8), (0.9, 0.9, 0.9)), ((0.6, 0.7, 0.9),), ((0.6, 0.7, 0.9),)),
    )
    model = ServedModel(
        name="net", stages_s={1: (1.0, 1.0, 2.0)}, quality=(0.6, 0.7, 0.9), gains=gains
    )
    scheduler = Scheduler(models={"net": model}, rule=GreedyGain())
    (work,) = scheduler.arrived(Request(id=0, model="net", deadline=9.0), 0.0)
    assert scheduler.finished(work, {0: 0.99}, 1.0) == [
        Reply(request=0, exit=0, stopped_by="policy", in_time=True)
    ]
    (work,) = scheduler.arrived(Request(id=1, model="net", deadline=9.0), 2.0)
    (deeper,) = scheduler.finished(work, {1: 0.1}, 3.0)
    assert deeper.first == 1


def test_draining_and_full_queues_refuse_and_serve_who_is_there() -> None:
    scheduler = scheduler_of(max_waiting=1)
    (work,) = scheduler.arrived(Request(id=0, model="net", deadline=9.0), 0.0)
    (full,) = scheduler.arrived(Request(id=1, model="net", deadline=9.0), 0.0)
    assert full.why == "queue full"
    scheduler.drain()
    (drained,) = scheduler.arrived(Request(id=2, model="net", deadline=9.0), 0.0)
    assert drained.why == "draining"
    assert works(scheduler.finished(work, {}, 1.0))


def test_bad_requests_are_refused_with_what_was_expected() -> None:
    scheduler = scheduler_of()
    with pytest.raises(ServingError, match="expected a new number and one of the models net"):
        scheduler.arrived(Request(id=0, model="nett", deadline=1.0), 0.0)
    with pytest.raises(ServingError, match="expected a finite instant"):
        Request(id=0, model="net", deadline=math.inf)
    with pytest.raises(ServingError, match="one cost per exit"):
        ServedModel(name="net", stages_s={1: (1.0,)}, quality=(0.5, 0.6))


EVENTS = st.lists(
    st.tuples(
        st.floats(0.0, 2.0),  # seconds since the last event
        st.sampled_from(["arrive", "arrive", "arrive", "cancel", "tick"]),
        st.floats(0.1, 12.0),  # budget
        st.integers(0, 50),  # whom to cancel
        st.booleans(),  # best effort
        st.integers(1, 3),  # rows
        st.floats(0.5, 1.5),  # how long work takes, as planned
        st.sampled_from(["done", "done", "done", "failed"]),
        st.sampled_from(["net", "other"]),
    ),
    max_size=40,
)


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("merges", [False, True])
@given(events=EVENTS)
def test_every_request_has_one_reply_and_no_expired_work_runs(rule, merges, events) -> None:
    models = {name: model_of(name, merges=merges) for name in ("net", "other")}
    scheduler = Scheduler(models=models, rule=rule(), max_waiting=20)
    requests: dict[int, Request] = {}
    replies: dict[int, int] = {}
    cancelled: set[int] = set()
    running: list[tuple[float, str, Work]] = []
    reached: dict[int, int] = {}
    members: dict[int, set[int]] = {}
    now = 0.0
    speed, outcome = 1.0, "done"

    def take(actions) -> None:
        for action in actions:
            if isinstance(action, Work):
                assert not running, "one work at a time"
                running.append((now + action.seconds * speed, outcome, action))
                for name in action.requests:
                    assert replies.get(name, 0) == 0
                    assert name not in cancelled
                    request = requests[name]
                    assert now < request.deadline or request.best_effort, "expired work"
                    assert action.first == reached.get(name, -1) + 1
                if not merges:
                    here = members.setdefault(action.group, set(action.requests))
                    assert set(action.requests) <= here, "a batch only shrinks"
                    members[action.group] = set(action.requests)
                continue
            replies[action.request] = replies.get(action.request, 0) + 1
            if isinstance(action, Reply):
                assert action.exit == reached[action.request]
                assert action.in_time == (now <= requests[action.request].deadline)

    def end() -> None:
        _, how, work = running.pop()
        if how == "failed":
            take(scheduler.failed(work, now))
        else:
            reached.update(dict.fromkeys(work.requests, work.last))
            take(scheduler.finished(work, {}, now))

    def pass_time(until: float) -> None:
        nonlocal now
        for _ in range(1000):
            due = min(scheduler.next_tick(now), running[0][0] if running else math.inf)
            if due > until or math.isinf(due):
                break
            now = max(now, due)
            if running and running[0][0] <= now:
                end()
            else:
                take(scheduler.tick(now))
        else:
            pytest.fail("time stands still")
        if math.isfinite(until):
            now = max(now, until)

    for wait, what, budget, whom, best_effort, rows, pace, how, name in events:
        speed, outcome = pace, how
        pass_time(now + wait)
        if what == "arrive":
            number = len(requests)
            requests[number] = Request(
                id=number,
                model=name,
                deadline=now + budget,
                arrival=now,
                rows=rows,
                best_effort=best_effort,
            )
            take(scheduler.arrived(requests[number], now))
        elif what == "cancel" and requests:
            number = whom % len(requests)
            if not replies.get(number):
                cancelled.add(number)
            take(scheduler.cancelled(number, now))
        else:
            take(scheduler.tick(now))
    speed, outcome = 1.0, "done"
    pass_time(math.inf)
    assert scheduler.waiting == 0
    assert {name: replies.get(name, 0) for name in requests} == {
        name: 0 if name in cancelled else 1 for name in requests
    }


@given(
    gaps=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=30),
    budgets=st.lists(st.floats(0.5, 12.0), min_size=30, max_size=30),
    rule=st.sampled_from([GreedyGain]),
)
def test_who_is_accepted_has_an_answer_in_time_where_work_takes_what_was_planned(
    gaps, budgets, rule
) -> None:
    arrivals = np.cumsum(gaps)
    scheduler = Scheduler(models={"net": model_of()}, rule=rule())
    refused = set()
    answered = {}
    running = []
    now = 0.0

    def take(actions):
        for action in actions:
            if isinstance(action, Work):
                running.append((now + action.seconds, action))
            elif isinstance(action, Refuse):
                refused.add(action.request)
                assert action.why == "too late"
            else:
                answered[action.request] = action.in_time

    place = 0
    while True:
        arrival = arrivals[place] if place < len(arrivals) else math.inf
        due = scheduler.next_tick(now)
        ends = running[0][0] if running else math.inf
        if math.isinf(min(arrival, due, ends)):
            break
        now = max(now, min(arrival, due, ends))
        if ends <= min(arrival, due):
            take(scheduler.finished(running.pop()[1], {}, now))
        elif arrival <= due:
            request = Request(id=place, model="net", deadline=now + budgets[place], arrival=now)
            take(scheduler.arrived(request, now))
            place += 1
        else:
            take(scheduler.tick(now))
    assert all(answered.values())
    assert refused | set(answered) == set(range(len(arrivals)))


def trace(load: float, count: int = 300) -> dict[str, np.ndarray]:
    """Poisson arrivals at a share of what the worker can do, with samples easy and hard."""
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(size=count)
    right = np.stack([difficulty < share for share in (0.6, 0.7, 0.9)]).astype(float)
    scores = np.clip(np.stack([1.0 - difficulty] * 3) + rng.normal(0, 0.1, (3, count)), 0, 1)
    return {
        "arrivals_s": np.cumsum(rng.exponential(4.0 / load, count)),
        "budgets_s": rng.uniform(3.0, 20.0, count),
        "quality_KN": right,
        "scores_KN": scores,
    }


@pytest.mark.parametrize("load", [0.3, 1.0, 2.0])
def test_ours_is_below_the_fluid_bound_and_above_networks_without_exits(load: float) -> None:
    given_ = trace(load)
    gains = GainTable.of(given_["quality_KN"], given_["scores_KN"])
    model = ServedModel(
        name="net",
        stages_s=model_of().stages_s,
        quality=tuple(given_["quality_KN"].mean(1)),
        gains=gains,
    )
    ours = simulate(model, GreedyGain(), **given_)
    bound = fluid_bound(
        np.cumsum([0.75, 0.75, 1.5]),
        given_["quality_KN"].T,
        given_["arrivals_s"],
        given_["budgets_s"],
    )
    assert ours.timely_quality <= bound + 1e-9
    assert ours.share_in_time >= 0.99
    for rival in (Fixed(0), Fixed(-1), ClockworkLike(), SymphonyLike(), InfaasLike()):
        assert ours.timely_quality >= simulate(model, rival, **given_).timely_quality


def test_a_request_that_is_alone_fares_as_if_everything_were_decided_in_full(monkeypatch) -> None:
    dice = np.random.default_rng(0)
    samples = 50
    scores_KN = dice.random((3, samples))
    # a later exit may be worse
    quality_KN = np.clip(scores_KN + dice.normal(0.0, 0.3, scores_KN.shape), 0.0, 1.0)
    model = ServedModel(
        name="net",
        stages_s={1: (1.0, 1.0, 2.0)},
        quality=tuple(quality_KN.mean(1)),
        gains=GainTable.of(quality_KN, scores_KN),
        max_batch=2,
    )

    def simulated():
        return simulate(
            model,
            GreedyGain(),
            arrivals_s=np.cumsum(np.random.default_rng(1).exponential(5.0, 300)),
            budgets_s=np.random.default_rng(2).uniform(0.5, 9.0, 300),
            quality_KN=quality_KN,
            scores_KN=scores_KN,
            true_s=lambda work, _: work.seconds * (0.8 + 0.7 * (work.group % 7) / 7),
            reserve_s=0.1,
        )

    short = simulated()
    monkeypatch.setattr(Scheduler, "_alone", lambda *_: None)
    full = simulated()
    assert set(full.exits) == {-1, 0, 1, 2}
    np.testing.assert_array_equal(short.exits, full.exits)
    np.testing.assert_array_equal(short.in_time, full.in_time)


def test_the_fluid_bound_of_two_requests_is_what_one_works_out_by_hand() -> None:
    # 3 seconds for both: two first exits of 1 s (0.6 each), then half of one step (0.3 for 2 s)
    bound = fluid_bound([1.0, 3.0], np.array([[0.6, 0.9], [0.6, 0.9]]), [0.0, 0.0], [3.0, 3.0])
    assert bound == pytest.approx((0.6 + 0.6 + 0.15) / 2)
    # who is alone takes 4 s to the second exit, which nobody has
    bound = fluid_bound(
        [1.0, 3.0],
        np.array([[0.6, 0.9], [0.6, 0.9]]),
        [0.0, 0.0],
        [3.0, 3.0],
        alone_s=[1.5, 4.0],
    )
    assert bound == pytest.approx(0.6)


def test_only_the_last_head_of_a_work_is_paid() -> None:
    model = ServedModel(
        name="net",
        stages_s={1: (1.0, 2.0), 3: (2.0, 4.0)},
        heads_s={1: (0.1, 0.2), 3: (0.3, 0.6)},
        quality=(0.5, 0.6),
    )
    assert model.work_s(0, 1, 1) == pytest.approx(3.2)
    assert model.work_s(1, 1, 2) == pytest.approx(3.4)
    # beyond the largest size in proportion
    assert model.work_s(0, 0, 6) == pytest.approx(4.6)
    assert model.scaled(2.0).work_s(0, 1, 1) == pytest.approx(6.4)
    with pytest.raises(ServingError, match="one head per exit for the same sizes"):
        ServedModel(
            name="net", stages_s={1: (1.0, 2.0)}, heads_s={2: (0.1, 0.2)}, quality=(0.5, 0.6)
        )


def test_a_table_of_gains_gives_the_means_of_its_bins() -> None:
    quality = np.array([[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]])
    scores = np.array([[0.1, 0.2, 0.8, 0.9]] * 2)
    table = GainTable.of(quality, scores, bins=2)
    assert table.expected(0, 0.15) == (0.0, 0.5)
    assert table.expected(0, 0.85) == (1.0, 1.0)
