"""Contract runs: how deep a deadline lets a run go, what it pays on the way, and how often it is
late.
"""

import dataclasses
import math
import random
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fakes import FakeNetwork, X, batch_costs, costs_of, quantiles, runner_of
from impatient.anytime import Exit, Run
from impatient.clock import NEVER, Deadline, FakeClock
from impatient.costs import CostProfile, Quantiles
from impatient.errors import CostError, NoAnswerInTime, PolicyError, RunError, StaleInput
from impatient.networks import MultiExitNetwork, attach_exits
from impatient.policies import ThresholdPolicy
from impatient.runtime import Answer, Runner, answer, profile
from impatient.runtime import run_state as course
from impatient.runtime.runner import RESERVE_S
from impatient.tasks import named
from toys import ToyBackbone

# exit k answers at k + 1.5
STAGES = [1.0, 1.0, 1.0, 1.0]
HEADS = [0.5, 0.5, 0.5, 0.5]


def run(runner: Runner, seconds: float = math.inf, x: Tensor = X) -> Answer:
    return runner.run(x, deadline=Deadline(runner.clock.now() + seconds))


def enough_for(exit: int) -> float:
    return exit + 1.5 + RESERVE_S


def heads(network: FakeNetwork) -> list[str]:
    return [part for part in network.ran if part.startswith("head")]


# --- one sample, with and without pauses ----------------------------------------------------------


class Routed(FakeNetwork):
    """Stops by itself after some exit, and some of its stages run more than the batch."""

    stops_after: int | None = None
    shared: tuple[int, ...] = ()

    def exits(self, x: Any, *, keep: bool = False) -> Run:
        return Run(self._marked())

    def _marked(self) -> Generator[Exit]:
        for exit in self.stage_by_stage():
            yield Marked(exit, self)


class Marked(Exit):
    """An exit of such a network."""

    def __init__(self, exit: Exit, network: Routed) -> None:
        super().__init__(exit.index, torch.zeros(1, 2), lambda _: exit.output())
        self.whole = exit.index not in network.shared
        self._ends = exit.index == network.stops_after

    @property
    def upcoming(self) -> int | None:
        return None if self._ends else self.index + 1


class Looking(ThresholdPolicy):
    """Looks at features, too."""

    @property
    def needs_features(self) -> bool:
        return True

    def stops_one(self, exit: int, output: Tensor | None, pooled: Tensor | None) -> bool:
        assert pooled is not None
        return ThresholdPolicy.stops_one(self, exit, output, pooled)


POLICIES = [
    None,
    ThresholdPolicy(score="max_probability", thresholds=(0.9, math.inf, 0.6, -math.inf)),
    ThresholdPolicy(
        score="agreement", thresholds=(math.inf, -2.0, -1.0, -math.inf), task="regression"
    ),
    Looking(score="max_probability", thresholds=(2.0, 0.6, 2.0, -math.inf)),
]


@given(
    seed=st.integers(0, 1000),
    policy=st.sampled_from(POLICIES),
    stops_after=st.sampled_from([None, 1]),
    shared=st.sampled_from([(), (0, 2)]),
    options=st.sampled_from([{}, {"miss_rate": 0.1}, {"when_late": "raise"}]),
)
@settings(max_examples=60)
def test_one_sample_is_answered_as_by_a_run_that_can_pause(
    seed: int, policy: Any, stops_after: int | None, shared: tuple[int, ...], options: Any
) -> None:
    def told(once: bool) -> list[Any]:
        draw = random.Random(seed)
        clock = FakeClock(draw.random())
        network = Routed(
            clock,
            [lambda: draw.choice([0.7, 1.0, 1.0, 3.0])] * 4,
            HEADS,
            torch.tensor([[[0.0, 0.0]], [[0.0, 1.0]], [[0.0, 2.0]], [[0.0, 4.0]]]),
        )
        network.stops_after, network.shared = stops_after, shared
        network.task = named("classification" if policy is None else policy.task)
        runner = runner_of(network, costs_of(STAGES, HEADS), policy, **options)
        found: list[Any] = []
        for _ in range(12):
            deadline = (
                Deadline.after(draw.uniform(1.0, 9.0), clock) if draw.random() < 0.8 else NEVER
            )
            clock.advance(0.25)
            try:
                if once:
                    given = runner.run(X, deadline=deadline)
                else:
                    with runner.open(X) as opened:
                        given = opened.run(deadline=deadline)
            except NoAnswerInTime as late:
                found.append(str(late))
                continue
            fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
            found.append({**fields, "output": given.output.tolist()})
            found.append(runner.drift)
        return [*found, network.ran, runner.report()]

    assert told(once=True) == told(once=False)


# --- how deep -------------------------------------------------------------------------------------


@pytest.mark.parametrize("exit", range(4))
def test_a_budget_that_just_fits_an_exit_gives_it(network: FakeNetwork, exit: int) -> None:
    answer = run(runner_of(network), enough_for(exit))
    assert (answer.exit, answer.deadline_met, answer.elapsed_s) == (exit, True, exit + 1.5)
    assert answer.stopped_by == ("final" if exit == 3 else "deadline")


@pytest.mark.parametrize("exit", range(1, 4))
def test_one_tick_short_does_not_go_on(network: FakeNetwork, exit: int) -> None:
    answer = run(runner_of(network), math.nextafter(enough_for(exit), 0))
    assert (answer.exit, answer.deadline_met, answer.stopped_by) == (exit - 1, True, "deadline")


def test_the_answer_is_the_output_of_its_exit(network: FakeNetwork) -> None:
    answer = run(runner_of(network), enough_for(2))
    assert torch.equal(answer.output, network.outputs[2])
    assert answer.exits == (2,)


def test_heads_that_are_not_the_answer_never_run(network: FakeNetwork) -> None:
    run(runner_of(network), enough_for(2))
    assert network.ran == ["stage 0", "stage 1", "stage 2", "head 2"]


@pytest.mark.parametrize("deadline", [NEVER, Deadline(math.inf)])
def test_an_endless_deadline_goes_to_the_last_exit(
    network: FakeNetwork, deadline: Deadline
) -> None:
    answer = runner_of(network).run(X, deadline=deadline)
    assert (answer.exit, answer.stopped_by, answer.deadline_met) == (3, "final", True)


def test_without_a_deadline_the_last_exit_answers(network: FakeNetwork) -> None:
    assert runner_of(network).run(X).exit == 3


# --- too late -------------------------------------------------------------------------------------


def test_a_budget_before_the_first_exit_is_answered_late_and_says_so(network: FakeNetwork) -> None:
    answer = run(runner_of(network), 1.0)
    assert (answer.exit, answer.deadline_met, answer.stopped_by) == (0, False, "deadline")


def test_a_deadline_that_passed_upstream_still_gets_the_first_exit(
    network: FakeNetwork, clock: FakeClock
) -> None:
    deadline = Deadline.after(9.0, clock)
    clock.advance(10.0)
    answer = runner_of(network).run(X, deadline=deadline)
    assert (answer.exit, answer.deadline_met, answer.elapsed_s) == (0, False, 1.5)


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 1.0, math.nextafter(enough_for(0), 0)])
def test_when_told_to_a_late_run_raises_before_anything_ran(
    network: FakeNetwork, seconds: float
) -> None:
    with pytest.raises(NoAnswerInTime, match=r"first exit needs 1500\.000 ms"):
        run(runner_of(network, when_late="raise"), seconds)
    assert network.ran == []


def test_a_first_exit_that_just_fits_does_not_raise(network: FakeNetwork) -> None:
    assert run(runner_of(network, when_late="raise"), enough_for(0)).exit == 0


def test_time_in_a_queue_counts(network: FakeNetwork, clock: FakeClock) -> None:
    deadline = Deadline.after(enough_for(3), clock)
    clock.advance(1.0)
    assert runner_of(network).run(X, deadline=deadline).exit == 2


def test_an_overrun_in_the_last_stage_is_said(network: FakeNetwork) -> None:
    runner = runner_of(network)
    network.stages_s[3] = 2.0
    answer = run(runner, enough_for(3))
    assert (answer.exit, answer.stopped_by, answer.deadline_met) == (3, "final", False)


def test_an_overrun_in_the_head_is_said(network: FakeNetwork) -> None:
    runner = runner_of(network)
    network.heads_s[1] = 0.6
    assert not run(runner, enough_for(1)).deadline_met


def test_an_answer_at_the_very_deadline_is_in_time(network: FakeNetwork) -> None:
    runner = runner_of(network)
    network.heads_s[1] = 0.5 + RESERVE_S
    answer = run(runner, enough_for(1))
    assert (answer.exit, answer.deadline_met) == (1, True)


# --- the plan follows the time really spent -------------------------------------------------------


def test_a_slow_stage_shortens_the_run(network: FakeNetwork) -> None:
    runner = runner_of(network)
    network.stages_s[0] = 2.0
    answer = run(runner, enough_for(3))
    assert (answer.exit, answer.deadline_met) == (2, True)


def test_a_fast_stage_lengthens_the_run(network: FakeNetwork) -> None:
    runner = runner_of(network)
    assert run(runner, enough_for(2) + 0.25).exit == 2
    network.stages_s[0] = 0.25
    assert run(runner, enough_for(2) + 0.25).exit == 3


def test_the_statistic_says_how_careful_a_run_is(clock: FakeClock) -> None:
    spread = Quantiles(mean=1.0, p50=1.0, p90=2.0, p99=3.0, p999=4.0, max=5.0, n=1000)
    costs = costs_of([spread] * 4)
    reached = {
        statistic: run(
            runner_of(FakeNetwork(clock, STAGES), costs, statistic=statistic), 4.0 + RESERVE_S
        ).exit
        for statistic in ("p50", "p90", "p99", "p999")
    }
    assert reached == {"p50": 3, "p90": 2, "p99": 1, "p999": 0}


def test_each_batch_size_has_its_own_plan(clock: FakeClock) -> None:
    costs = dataclasses.replace(
        costs_of(STAGES),
        batches={1: batch_costs([0.1] * 4, [0.0] * 4), 2: batch_costs(STAGES, [0.0] * 4)},
    )
    network = FakeNetwork(clock, [0.1] * 4, outputs=torch.zeros(4, 2, 3))
    assert run(runner_of(network, costs), 1.15, torch.zeros(2, 1)).exit == 1
    assert run(runner_of(network, costs), 1.15, torch.zeros(1, 1)).exit == 3


def test_a_batch_size_that_was_not_profiled_is_an_error(network: FakeNetwork) -> None:
    with pytest.raises(
        CostError, match=r"batch size 2 is larger than all that were profiled: \[1\]"
    ):
        runner_of(network).run(torch.zeros(2, 1))
    assert network.ran == []


# --- drift ----------------------------------------------------------------------------------------


def test_drift_is_one_on_the_profiled_machine(network: FakeNetwork) -> None:
    runner = runner_of(network)
    run(runner)
    assert runner.drift == 1.0


def test_drift_comes_to_how_much_slower_the_machine_is(network: FakeNetwork) -> None:
    runner = runner_of(network, costs_of([stage / 3 for stage in STAGES], HEADS))
    run(runner)
    assert runner.drift == pytest.approx(3.0)


def test_a_machine_that_has_become_slow_goes_less_deep(network: FakeNetwork) -> None:
    runner = runner_of(network)
    network.stages_s = [2.0] * 4
    run(runner)
    network.stages_s = STAGES
    # after two stages 2.5 are left, and the next exit might take 3
    assert run(runner, enough_for(3)).exit == 1


def test_a_machine_that_has_become_fast_is_not_trusted_to_stay_so(network: FakeNetwork) -> None:
    runner = runner_of(network)
    network.stages_s = [0.1] * 4
    for _ in range(30):
        run(runner)
    network.stages_s = STAGES
    assert runner.drift == 1.0
    assert run(runner, enough_for(2) - 1e-6).exit == 1
    assert run(runner, enough_for(2) + 1e-6).exit == 2


def test_a_profile_of_a_bad_moment_does_not_keep_a_runner_shallow(network: FakeNetwork) -> None:
    slow = costs_of([50 * stage for stage in STAGES], [50 * head for head in HEADS])
    runner = runner_of(network, slow)
    exits = [run(runner, 3 * enough_for(3)).exit for _ in range(400)]
    assert set(exits[:150]) == {0}
    assert set(exits[250:]) == {3}
    # the ratios are rounded up, by a fifth at most
    assert 1 / 50 <= runner.drift <= 1 / 50 / 0.8


def test_one_descheduled_stage_moves_nothing(network: FakeNetwork) -> None:
    runner = runner_of(network)
    network.stages_s[3] = 1000.0
    run(runner)
    assert runner.drift == 1.0


def test_a_load_that_is_over_is_forgotten_when_two_hundred_stages_have_passed(
    network: FakeNetwork,
) -> None:
    runner = runner_of(network)
    network.stages_s = [3.0] * 4
    for _ in range(50):
        run(runner)
    network.stages_s = STAGES
    seen = []
    for _ in range(50):
        run(runner)
        seen.append(runner.drift)
    assert seen[-2:] == [3.0, 1.0]


def test_what_is_observed_is_what_was_predicted(network: FakeNetwork) -> None:
    """A stage that was passed is compared with its own profile, the one that answered together with
    its head.
    """
    runner = runner_of(network)
    told = []
    runner._drift.observe = told.append  # type: ignore[method-assign]
    network.stages_s = [2.0, 3.0, 4.0, 5.0]
    network.heads_s = [1.0] * 4
    assert run(runner, 3.6).exit == 1
    assert told == [2.0, (3.0 + 1.0) / (1.0 + 0.5)]


def test_a_head_that_has_become_slow_is_noticed(network: FakeNetwork) -> None:
    runner = runner_of(network)
    network.heads_s = [5.0] * 4
    for _ in range(2):
        run(runner, enough_for(1))
    assert runner.drift == 6.0 / 1.5


def test_a_runner_that_refuses_late_runs_recovers_from_drift(network: FakeNetwork) -> None:
    runner = runner_of(network, when_late="raise")
    network.stages_s = [9.0] * 4
    for _ in range(30):
        run(runner)
    network.stages_s = STAGES

    def admitted() -> bool:
        try:
            return run(runner, 3.0).exit >= 0
        except NoAnswerInTime:
            return False

    assert not admitted()
    assert any(admitted() for _ in range(100))


def test_warming_up_leaves_drift_alone(network: FakeNetwork) -> None:
    runner = runner_of(network)
    # a cold machine
    network.stages_s = [50.0] * 4
    runner.warm_up(X)
    assert runner.drift == 1.0
    runner.close()


def test_warming_up_runs_every_profiled_batch_size_in_both_ways(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    exits = network.exits
    monkeypatch.setattr(network, "exits", lambda x: (sizes.append(x.shape[0]), exits(x))[1])
    with runner_of(network, costs_of(STAGES, HEADS, sizes=[1, 3])) as runner:
        runner.warm_up(torch.zeros(2, 1), times=2)
    assert sizes == [1] * 4 + [3] * 4
    assert len(heads(network)) == 2 * 2 * (1 + 4)


# --- policies -------------------------------------------------------------------------------------


def policy_of(*thresholds: float) -> ThresholdPolicy:
    return ThresholdPolicy(score="max_probability", thresholds=(*thresholds, -math.inf))


def sure(*sureness: float) -> Tensor:
    """Outputs [K, 1, 2] whose largest probability is as given."""
    return torch.tensor([[[math.log(p / (1 - p)), 0.0]] for p in sureness])


def test_a_policy_stops_a_run(clock: FakeClock) -> None:
    network = FakeNetwork(clock, STAGES, HEADS, sure(0.6, 0.8, 0.9, 0.99))
    answer = run(runner_of(network, policy=policy_of(0.7, 0.7, 0.7)))
    assert (answer.exit, answer.stopped_by, answer.elapsed_s) == (1, "policy", 3.0)
    assert network.ran == ["stage 0", "head 0", "stage 1", "head 1"]


def test_heads_of_closed_exits_never_run(clock: FakeClock) -> None:
    network = FakeNetwork(clock, STAGES, HEADS, sure(0.9, 0.9, 0.9, 0.9))
    assert run(runner_of(network, policy=policy_of(math.inf, math.inf, 0.7))).exit == 2
    assert heads(network) == ["head 2"]


def test_a_policy_that_comes_to_the_last_exit_ends_as_final(clock: FakeClock) -> None:
    network = FakeNetwork(clock, STAGES, HEADS, sure(0.6, 0.6, 0.6, 0.6))
    answer = run(runner_of(network, policy=policy_of(0.7, 0.7, 0.7)))
    assert (answer.exit, answer.stopped_by) == (3, "final")


@pytest.mark.parametrize("seed", range(10))
def test_each_sample_of_a_batch_gets_the_output_of_its_own_exit(
    clock: FakeClock, seed: int
) -> None:
    outputs = 3 * torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(seed))
    policy = policy_of(0.8, math.inf if seed % 2 else 0.7, 0.7)
    answer = run(
        runner_of(FakeNetwork(clock, STAGES, HEADS, outputs), policy=policy), x=torch.zeros(6, 1)
    )
    exits = policy.exits_of(outputs)
    assert answer.exits == tuple(exits.tolist())
    assert answer.exit == exits.max()
    assert torch.equal(answer.output, outputs[exits, torch.arange(6)])


def test_a_batch_goes_on_until_its_last_sample_stops(clock: FakeClock) -> None:
    outputs = torch.cat([sure(0.9, 0.9, 0.9), sure(0.6, 0.9, 0.9)], dim=1)
    network = FakeNetwork(clock, STAGES[:3], HEADS[:3], outputs)
    answer = run(runner_of(network, policy=policy_of(0.7, 0.7)), x=torch.zeros(2, 1))
    assert (answer.exits, answer.stopped_by) == ((0, 1), "policy")


def test_a_deadline_stops_the_samples_that_the_policy_has_not(clock: FakeClock) -> None:
    outputs = torch.cat([sure(0.9, 0.91, 0.92), sure(0.6, 0.61, 0.9)], dim=1)
    network = FakeNetwork(clock, STAGES[:3], [0.0] * 3, outputs)
    answer = run(runner_of(network, policy=policy_of(0.7, 0.7)), 2.0 + RESERVE_S, torch.zeros(2, 1))
    assert (answer.exits, answer.exit, answer.stopped_by, answer.deadline_met) == (
        (0, 1),
        1,
        "deadline",
        True,
    )
    assert torch.equal(answer.output, torch.stack([outputs[0, 0], outputs[1, 1]]))


def test_a_deadline_at_a_closed_exit_runs_its_head(clock: FakeClock) -> None:
    network = FakeNetwork(clock, STAGES, HEADS, sure(0.6, 0.6, 0.6, 0.6))
    answer = run(runner_of(network, policy=policy_of(math.inf, math.inf, 0.7)), enough_for(1))
    assert (answer.exit, answer.stopped_by, heads(network)) == (1, "deadline", ["head 1"])


def test_time_that_the_policy_takes_to_look_is_counted(clock: FakeClock) -> None:
    network = FakeNetwork(clock, STAGES, HEADS, sure(0.6, 0.6, 0.6, 0.6))
    # two heads on the way cost one exit
    answer = run(runner_of(network, policy=policy_of(0.7, 0.7, 0.7)), enough_for(3))
    assert (answer.exit, answer.deadline_met, answer.elapsed_s) == (2, True, 4.5)


# --- what belongs together ------------------------------------------------------------------------


def test_costs_of_another_number_of_exits_are_an_error(network: FakeNetwork) -> None:
    with pytest.raises(CostError, match="has 3 exits, the network 4"):
        runner_of(network, costs_of(STAGES[:3]))


def test_a_policy_for_another_number_of_exits_is_an_error(network: FakeNetwork) -> None:
    with pytest.raises(PolicyError, match="for 2 exits, the network has 4"):
        runner_of(network, policy=policy_of(0.5))


def test_an_unknown_way_to_be_late_is_an_error(network: FakeNetwork) -> None:
    with pytest.raises(RunError, match="when_late='sorry'; expected one of answer, raise"):
        runner_of(network, when_late="sorry")


@pytest.fixture
def real(toy: ToyBackbone) -> MultiExitNetwork:
    return attach_exits(toy.eval(), after=["blocks.0", "blocks.2"], example=torch.zeros(1, 8))


@pytest.fixture
def measured(real: MultiExitNetwork) -> CostProfile:
    return profile(real, torch.randn(1, 8), repeats=3, warm_up=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("network", "0123456789abcdef"),
        ("processor", "an abacus"),
        ("threads", 4096),
        ("versions", {"python": "3.11", "torch": "0.1"}),
        ("device", "cuda:0"),
    ],
)
def test_a_profile_from_elsewhere_is_refused(
    real: MultiExitNetwork, measured: CostProfile, field: str, value: Any
) -> None:
    stale = dataclasses.replace(
        measured, provenance=dataclasses.replace(measured.provenance, **{field: value})
    )
    with pytest.raises(StaleInput, match="any_profile=True"):
        Runner(real, stale)
    assert Runner(real, stale, any_profile=True).run(torch.randn(1, 8)).exit == 2


def test_a_profile_of_other_cuts_is_refused(real: MultiExitNetwork, measured: CostProfile) -> None:
    moved = attach_exits(
        real.backbone, after=["blocks.1", "blocks.2"], example=torch.zeros(1, 8)
    ).eval()
    with pytest.raises(StaleInput, match=r"blocks\.1"):
        Runner(moved, measured)


def test_a_profile_made_here_is_taken_also_from_a_file(
    real: MultiExitNetwork, measured: CostProfile, tmp_path: Any
) -> None:
    measured.save(tmp_path / "costs.json")
    assert Runner(real, CostProfile.load(tmp_path / "costs.json")).run(torch.randn(1, 8)).exit == 2


def test_on_a_real_clock_a_contract_run_is_the_network_itself(
    real: MultiExitNetwork, measured: CostProfile
) -> None:
    x = torch.randn(1, 8)
    answer = Runner(real, measured).run(x, deadline=Deadline.after(60.0))
    assert (answer.exit, answer.stopped_by, answer.deadline_met) == (2, "final", True)
    assert 0.0 < answer.elapsed_s < 60.0
    torch.testing.assert_close(answer.output, real.backbone(x), rtol=0, atol=0)


def test_on_a_real_clock_a_passed_deadline_gets_the_first_exit(
    real: MultiExitNetwork, measured: CostProfile
) -> None:
    x = torch.randn(1, 8)
    answer = Runner(real, measured).run(x, deadline=Deadline(0.0))
    assert (answer.exit, answer.deadline_met) == (0, False)
    torch.testing.assert_close(answer.output, real(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("budget", [1.0, enough_for(1), math.inf])
def test_every_stage_and_head_runs_without_gradients(network: FakeNetwork, budget: float) -> None:
    modes = []
    for part in (f"{what} {index}" for what in ("stage", "head") for index in range(4)):
        network.at[part] = lambda: modes.append(torch.is_inference_mode_enabled())
    run(runner_of(network), budget)
    assert len(modes) == len(network.ran)
    assert all(modes)


def test_work_that_a_device_still_does_in_the_background_is_waited_for(
    network: FakeNetwork, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending = []
    monkeypatch.setattr(
        network, "take", lambda part, seconds: (network.ran.append(part), pending.append(seconds))
    )

    def synchronise(device: torch.device) -> None:
        while pending:
            clock.advance(pending.pop())

    for module in (course, answer):
        monkeypatch.setattr(module, "synchronise", synchronise)
    network.outputs = network.outputs.to("meta")
    deadline = Deadline.after(enough_for(1), clock)
    found = runner_of(network).run(X.to("meta"), deadline=deadline)
    assert (found.exit, found.elapsed_s, found.deadline_met) == (1, 2.5, True)


# --- guarantees -----------------------------------------------------------------------------------

seconds = st.floats(1e-4, 10.0)
share = st.floats(0.0, 1.0)
parts = st.lists(st.tuples(seconds, seconds, share, share), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(parts=parts, extra=st.floats(0.0, 60.0))
def test_parts_within_their_profile_never_miss_and_go_as_deep_as_the_rule_allows(
    parts: Any, extra: float
) -> None:
    stages, heads, stage_shares, head_shares = zip(*parts, strict=True)
    took = [stage * share for stage, share in zip(stages, stage_shares, strict=True)]
    network = FakeNetwork(
        FakeClock(), took, [head * share for head, share in zip(heads, head_shares, strict=True)]
    )
    deadline = stages[0] + heads[0] + RESERVE_S + extra
    answer = run(runner_of(network, costs_of(stages, heads)), deadline)
    now = took[0]
    deepest = 0
    while (
        deepest + 1 < len(parts)
        and now + (stages[deepest + 1] + heads[deepest + 1]) + RESERVE_S <= deadline
    ):
        deepest += 1
        now += took[deepest]
    assert (answer.exit, answer.deadline_met) == (deepest, True)
    assert network.ran == [*(f"stage {index}" for index in range(deepest + 1)), f"head {deepest}"]


@settings(max_examples=100, deadline=None)
@given(parts=parts, extra=st.floats(0.0, 60.0), mean=st.floats(0.01, 1.0))
def test_parts_within_their_profile_never_miss_whatever_the_drift(
    parts: Any, extra: float, mean: float
) -> None:
    stages, heads, stage_shares, head_shares = zip(*parts, strict=True)
    costs = costs_of(
        [dataclasses.replace(quantiles(stage), mean=mean * stage) for stage in stages], heads
    )
    network = FakeNetwork(FakeClock(), [0.0] * len(parts))
    runner = runner_of(network, costs)
    for _ in range(5):
        network.stages_s = [
            stage * share for stage, share in zip(stages, stage_shares, strict=True)
        ]
        network.heads_s = [head * share for head, share in zip(heads, head_shares, strict=True)]
        assert run(runner, stages[0] + heads[0] + RESERVE_S + extra).deadline_met


def lognormal(draw: random.Random) -> float:
    # about 1 ms, p99 about 3 ms
    return draw.lognormvariate(-7.0, 0.5)


@pytest.mark.parametrize(("statistic", "late"), [("p90", 0.10), ("p99", 0.01)])
def test_a_stage_begun_at_the_last_moment_is_late_as_often_as_its_quantile_says(
    statistic: str, late: float
) -> None:
    """The hardest case: what is left is the quantile itself. Late runs are binomial, so within 3
    standard deviations.
    """
    draw = random.Random(0)
    clock = FakeClock()
    begun = 4000
    profiled = Quantiles.of([lognormal(draw) for _ in range(50_000)])
    network = FakeNetwork(clock, [0.001, lambda: lognormal(draw)])
    most = 0.001 + getattr(profiled, statistic)
    costs = costs_of([0.001, profiled])
    missed = 0
    for _ in range(begun):
        # no drift from the runs before
        fresh = runner_of(network, costs, statistic=statistic)
        answer = run(fresh, most + 1.001 * RESERVE_S)
        assert answer.exit == 1
        # the reserve is not for the stage
        missed += answer.elapsed_s > most
    assert abs(missed / begun - late) < 3 * math.sqrt(late * (1 - late) / begun)


def test_random_stages_and_random_deadlines_are_late_no_more_often_than_the_p99_says() -> None:
    """At most one stage of a run can be late, and each by 1 %: misses are at most binomial(4000,
    0.01) plus 3 deviations.
    """
    draw = random.Random(1)
    runs = 4000
    profiled = [Quantiles.of([lognormal(draw) for _ in range(20_000)]) for _ in range(8)]
    network = FakeNetwork(FakeClock(), [lambda: lognormal(draw)] * 4, [lambda: lognormal(draw)] * 4)
    runner = runner_of(network, costs_of(profiled[:4], profiled[4:]))
    first = profiled[0].p99 + profiled[4].p99 + RESERVE_S
    answers = [run(runner, first + draw.uniform(0.0, 0.02)) for _ in range(runs)]
    assert len({answer.exit for answer in answers}) == 4
    assert np.mean([not answer.deadline_met for answer in answers]) <= 0.01 + 3 * math.sqrt(
        0.01 * 0.99 / runs
    )


def test_under_a_load_that_nobody_profiled_misses_come_back_to_the_p99() -> None:
    """Everything takes three times as long and varies twice as much: late while that is new, then
    as often as wanted.
    """
    draw = random.Random(2)
    runs = 3000
    slow = False

    def stage() -> float:
        return draw.lognormvariate(-7.0 + math.log(3.0), 1.0) if slow else lognormal(draw)

    profiled = [Quantiles.of([lognormal(draw) for _ in range(20_000)]) for _ in range(4)]
    network = FakeNetwork(FakeClock(), [stage] * 4)
    runner = runner_of(network, costs_of(profiled))

    def missed(count: int) -> list[bool]:
        budget = 4 * (profiled[0].p99 * runner.drift + RESERVE_S)
        return [not run(runner, budget * draw.uniform(0.3, 1.0)).deadline_met for _ in range(count)]

    missed(100)
    slow = True
    new = missed(10)
    missed(50)
    settled = missed(runs)
    assert np.mean(new) > 0.1
    assert np.mean(settled) <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / runs)
    slow = False
    missed(50)
    assert runner.drift < 1.5
