"""Drive the scheduler through a trace of arrivals, without a server, in virtual time."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from impatient.errors import ServingError
from impatient.serving.model import ServedModel
from impatient.serving.scheduler import Action, Reply, Request, Rule, Scheduler, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What became of the requests of a trace.

    Attributes:
        exits: the exit that answered each request, -1 where none did.
        in_time: whether each was answered by its deadline.
        quality: quality of each request's answer; 0 where it was late or missing.
        busy_s: seconds in which the worker worked.
        span_s: seconds from the first arrival to the last action.
    """

    exits: np.ndarray
    in_time: np.ndarray
    quality: np.ndarray
    busy_s: float
    span_s: float

    @property
    def timely_quality(self) -> float:
        """Return the mean quality, in which a late or missing answer counts as 0."""
        return float(self.quality.mean())

    @property
    def share_in_time(self) -> float:
        """Return the share of the requests that were answered in time."""
        return float(self.in_time.mean())


def simulate(
    model: ServedModel,
    rule: Rule,
    *,
    arrivals_s: Sequence[float] | np.ndarray,
    budgets_s: Sequence[float] | np.ndarray,
    quality_KN: np.ndarray,
    scores_KN: np.ndarray,
    true_s: Callable[[Work, int], float] | None = None,
    reserve_s: float = 0.0,
) -> Simulation:
    """Serve a trace of requests for one model, each of one sample.

    Args:
        model: the model, with the costs by which the scheduler plans.
        rule: the rule that is tried.
        arrivals_s: instants of arrival, increasing, shape [R].
        budgets_s: seconds from arrival to deadline, shape [R].
        quality_KN: quality of each exit on each sample; request r has sample r modulo N.
        scores_KN: how sure each exit looks.
        true_s: seconds that a work of so many rows really takes; by default as planned.
        reserve_s: time kept before every deadline for sending the reply.
    Raises:
        ServingError: if the shapes do not fit, or a request has not had exactly one reply.
    """
    count = len(arrivals_s)
    if len(budgets_s) != count or quality_KN.shape != scores_KN.shape:
        raise ServingError(
            f"{count} arrivals with {len(budgets_s)} budgets, qualities {quality_KN.shape} with "
            f"scores {scores_KN.shape}; expected one budget per arrival and equal shapes."
        )
    scheduler = Scheduler(models={model.name: model}, rule=rule, reserve_s=reserve_s)
    samples = quality_KN.shape[1]
    exits = np.full(count, -1)
    in_time = np.zeros(count, dtype=bool)
    replies = np.zeros(count, dtype=int)
    # Instants at which something is known to happen: work that ends, by its instant.
    done: list[tuple[float, int, Work]] = []
    busy_s = 0.0
    now = float(arrivals_s[0]) if count else 0.0

    def take(actions: Sequence[Action]) -> None:
        nonlocal busy_s
        for action in actions:
            if isinstance(action, Work):
                rows = len(action.requests)
                took_s = action.seconds if true_s is None else true_s(action, rows)
                busy_s += took_s
                heapq.heappush(done, (now + took_s, action.group, action))
                continue
            replies[action.request] += 1
            if isinstance(action, Reply):
                exits[action.request] = action.exit
                in_time[action.request] = action.in_time

    place = 0
    while True:
        arrival = float(arrivals_s[place]) if place < count else math.inf
        ends = done[0][0] if done else math.inf
        due = scheduler.next_tick(now)
        after = min(arrival, ends, due)
        if math.isinf(after):
            break
        now = max(now, after)
        if ends <= min(arrival, due):
            work = heapq.heappop(done)[2]
            scores = {name: float(scores_KN[work.last, name % samples]) for name in work.requests}
            take(scheduler.finished(work, scores, now))
        elif arrival <= due:
            request = Request(
                id=place, model=model.name, arrival=now, deadline=now + float(budgets_s[place])
            )
            place += 1
            take(scheduler.arrived(request, now))
        else:
            take(scheduler.tick(now))
    if (replies != 1).any():
        raise ServingError(f"requests had {np.unique(replies)} replies; expected exactly one each.")
    answered = np.where(in_time, quality_KN[exits, np.arange(count) % samples], 0.0)
    return Simulation(
        exits=exits,
        in_time=in_time,
        quality=answered,
        busy_s=busy_s,
        span_s=now - float(arrivals_s[0]) if count else 0.0,
    )


def fluid_bound(
    costs_s: Sequence[float],
    quality_RK: np.ndarray,
    arrivals_s: Sequence[float] | np.ndarray,
    budgets_s: Sequence[float] | np.ndarray,
    *,
    alone_s: Sequence[float] | None = None,
) -> float:
    """Bound the mean timely quality that any schedule of one worker can reach.

    Stages and requests are taken for divisible, so time flows to the best increments of quality per
    second, on each request's concave hull. What is spent between two instants is at most the time
    between them. It is a linear programme over all windows from an arrival to a deadline.

    Args:
        costs_s: least seconds of one sample until each exit, increasing, shape [K]; of the batch
            size that is cheapest per sample.
        quality_RK: quality of each exit for each request, in [0, 1], shape [R, K].
        arrivals_s: instants of arrival, increasing.
        budgets_s: seconds from arrival to deadline.
        alone_s: least seconds from the arrival of a sample to its answer from each exit, shape [K];
            by default `costs_s`. A batch that is cheap per sample takes longer than one sample.
    Returns:
        The mean quality over all requests, in [0, 1].
    Raises:
        ServingError: if the linear programme was not solved.
    """
    from scipy.optimize import linprog
    from scipy.sparse import coo_array, vstack

    begin = np.asarray(arrivals_s, dtype=float)
    end = begin + np.asarray(budgets_s, dtype=float)
    least = np.asarray(costs_s if alone_s is None else alone_s, dtype=float)
    reached_RK = least <= (end - begin)[:, None]
    request, gain, seconds = _increments(np.asarray(costs_s, dtype=float), quality_RK, reached_RK)
    edges = np.unique(np.concatenate([begin, end]))
    owner, window = np.nonzero((begin[:, None] <= edges[:-1]) & (end[:, None] >= edges[1:]))
    count = len(begin)
    spent = len(owner)
    increments = len(request)
    # Variables: shares of increments, then seconds of each request in each window.
    used = np.concatenate([request, owner])
    columns = np.concatenate([np.arange(increments), increments + np.arange(spent)])
    values = np.concatenate([seconds, -np.ones(spent)])
    work = coo_array((values, (used, columns)), shape=(count, increments + spent))
    room = coo_array(
        (np.ones(spent), (window, increments + np.arange(spent))),
        shape=(len(edges) - 1, increments + spent),
    )
    found = linprog(
        -np.concatenate([gain, np.zeros(spent)]),
        A_ub=vstack([work, room]).tocsr(),
        b_ub=np.concatenate([np.zeros(count), np.diff(edges)]),
        bounds=[(0, 1)] * increments + [(0, None)] * spent,
    )
    if not found.success:
        raise ServingError(f"the linear programme was not solved: {found.message}")
    return float(-found.fun / count)


def _increments(
    costs_s: np.ndarray, quality_RK: np.ndarray, reached_RK: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return request, gain and seconds of every step of the requests' concave hulls."""
    requests: list[int] = []
    gains: list[float] = []
    seconds: list[float] = []
    for number, quality in enumerate(quality_RK):
        time = 0.0
        value = 0.0
        place = -1
        while True:
            ahead = [
                ((quality[k] - value) / (costs_s[k] - time), k)
                for k in range(place + 1, len(costs_s))
                if reached_RK[number, k]
            ]
            ratio, best = max(ahead, default=(0.0, -1))
            if ratio <= 0.0:
                break
            requests.append(number)
            gains.append(float(quality[best] - value))
            seconds.append(float(costs_s[best] - time))
            time, value, place = float(costs_s[best]), float(quality[best]), best
    return np.array(requests, dtype=int), np.array(gains), np.array(seconds)
