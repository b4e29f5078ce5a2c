"""With late answers as bad as wrong ones, most answers are right and in time: known truth."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from fakes import FakeNetwork, X, costs_of, runner_of
from impatient.clock import Deadline, FakeClock
from impatient.costs import Quantiles
from impatient.errors import RunError
from impatient.runtime.miss_rate import LatestRatios
from impatient.runtime.right_in_time import RightInTime

ACCURACY = (0.3, 0.5, 0.65, 0.75, 0.82, 0.88)
STAGES = len(ACCURACY)
BASE_S = 0.001


class Machine:
    """Stages of random times, which a load multiplies, and how much in time they were worth."""

    def __init__(self, seed: int, spread: float) -> None:
        self.random = random.Random(seed)
        self.clock = FakeClock()
        self.spread = spread
        self.load = 1.0
        self.network = FakeNetwork(self.clock, [self.stage_s] * STAGES, [0.0] * STAGES)
        measured = Quantiles.of([self.stage_s() for _ in range(500)])
        self.costs = costs_of([measured] * STAGES, [0.0] * STAGES)

    def stage_s(self) -> float:
        return BASE_S * self.load * self.random.lognormvariate(0.0, self.spread)

    def gained(self, times: int, **rule: object) -> float:
        """Mean accuracy of answers in time, over uniform deadlines."""
        runner = runner_of(self.network, self.costs, **rule)
        gained = 0.0
        for _ in range(times):
            allowed_s = self.random.uniform(0.5, STAGES + 1) * BASE_S
            answer = runner.run(X, deadline=Deadline.after(allowed_s, self.clock))
            gained += ACCURACY[answer.exit] * answer.deadline_met
            self.network.ran.clear()
        return gained / times


def best(machine: Machine, times: int) -> float:
    """What the best rule that knows the distribution gains: dynamic programming on a fine grid."""
    points = 2000
    left_s = np.linspace(0.0, 3.0 * STAGES * BASE_S, points)
    draws_s = np.array([machine.stage_s() for _ in range(2000)])
    grid_s = np.quantile(draws_s, (np.arange(200) + 0.5) / 200)
    value = np.full(points, ACCURACY[-1])
    for accuracy in ACCURACY[-2::-1]:
        after_s = left_s[:, None] - grid_s
        value = np.maximum(accuracy, np.interp(after_s, left_s, value, left=0.0).mean(1))
    # the first stage runs whatever is decided
    allowed_s = np.linspace(0.5, STAGES + 1, times) * BASE_S
    return float(np.interp(allowed_s[:, None] - grid_s, left_s, value, left=0.0).mean())


def known_beforehand(machine: Machine, times: int) -> tuple[float, float]:
    """What the best fixed exit gains, and the deepest exit in time that a clairvoyant takes."""
    stages_s = np.array([[machine.stage_s() for _ in range(STAGES)] for _ in range(times)])
    allowed_s = np.linspace(0.5, STAGES + 1, times)[:, None] * BASE_S
    gains = np.where(stages_s.cumsum(1) <= allowed_s, ACCURACY, 0.0)
    return float(gains.mean(0).max()), float(gains.max(1).mean())


@pytest.mark.parametrize("spread", [0.1, 0.4])
def test_it_gains_what_the_best_rule_gains_and_more_than_the_others(spread: float) -> None:
    wrong = {"miss_rate": "wrong", "accuracy": ACCURACY}
    found = Machine(0, spread).gained(4000, **wrong)
    truth = best(Machine(1, spread), 1000)
    # 4,000 answers give the mean within 0.01
    assert truth - 0.015 < found < truth + 0.01
    fixed, clairvoyant = known_beforehand(Machine(3, spread), 4000)
    assert fixed + 0.1 < found < clairvoyant + 0.01
    for rule in ({"statistic": "p99"}, {"statistic": "p50"}, {"miss_rate": 0.01}):
        assert found > Machine(0, spread).gained(4000, **rule) - 0.003


def test_it_follows_a_machine_that_becomes_slower() -> None:
    machine = Machine(2, 0.2)
    machine.load = 2.0
    wrong = {"miss_rate": "wrong", "accuracy": ACCURACY}
    # the profile says half
    assert machine.gained(3000, **wrong) > best(machine, 1000) - 0.02


def rule(accuracy: Any) -> RightInTime:
    return RightInTime([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], accuracy, LatestRatios())


def test_deeper_exits_that_are_no_better_are_not_run() -> None:
    found = rule([0.8, 0.7, 0.75])
    assert not any(found.fits(1, 0.0, left_s, 0.0) for left_s in (0.5, 9.0))
    # but from the second the third is better, where it fits
    assert found.fits(2, 0.0, 1.5, 0.0)
    assert not found.fits(2, 0.0, 0.9, 0.0)
    # nothing is decided before the first exit and after the last
    assert found.fits(3, 0.0, 0.0, 0.0)


def test_a_worse_exit_is_passed_on_the_way_to_a_better_one() -> None:
    found = rule(torch.tensor([0.5, 0.4, 0.9]))
    assert found.fits(1, 0.0, 2.5, 0.0)
    assert not found.fits(1, 0.0, 1.5, 0.0)
    assert not found.fits(1, 1.0, 0.5, 0.0)


@pytest.mark.parametrize("accuracy", [[0.5, 0.6], [0.5, 0.6, 1.1], [0.5, 0.6, float("nan")]])
def test_accuracies_are_a_share_per_exit(accuracy: list[float]) -> None:
    with pytest.raises(RunError, match=r"for 3 exits; expected a share.*quality\.mean"):
        rule(accuracy)


@pytest.mark.parametrize(
    "options", [{"miss_rate": "wrong"}, {"accuracy": ACCURACY}, {"miss_rate": 0.1, "accuracy": ()}]
)
def test_accuracies_go_with_wrong_alone(options: dict[str, object]) -> None:
    with pytest.raises(RunError, match="expected the accuracy of each exit"):
        runner_of(FakeNetwork(FakeClock(), [1.0]), **options)
