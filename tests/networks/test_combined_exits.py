"""Ensembles over the exits of a network: the same protocol, the combined outputs."""

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impatient.clock import FakeClock
from impatient.costs import CostProfile
from impatient.ensembling import RULES, Rule, combine
from impatient.errors import ExitPassed, PolicyError, StaleInput
from impatient.evaluation import record
from impatient.evaluation.derived import ensembled
from impatient.networks import MultiExitNetwork, attach_exits
from impatient.networks.combined_exits import RunningEnsemble
from impatient.networks.gradients import GradientFlow
from impatient.policies import ThresholdPolicy
from impatient.provenance import fingerprint_structure, fingerprint_tensors
from impatient.runtime import Runner, profile
from recordings import Samples
from staging import paused_runs

NAMES = sorted(RULES)
TEMPERATURES = (0.5, 2.0, 1.5)


def network_of(toy: nn.Module) -> MultiExitNetwork:
    network = attach_exits(toy, after=["blocks.0", "blocks.2"], example=torch.zeros(1, 8))
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


@pytest.fixture
def inner(toy: nn.Module) -> MultiExitNetwork:
    return network_of(toy)


# --- the same outputs by every way ----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_exits_forward_recording_and_rule_agree(inner, name):
    data = Samples(3 * torch.randn(40, 8), torch.randint(3, (40,)))
    ensemble = RunningEnsemble(inner, name, TEMPERATURES, recalibration=TEMPERATURES[::-1])
    given = {"temperatures": TEMPERATURES, "recalibration": TEMPERATURES[::-1]}
    expected = combine(inner(data.inputs), name, **given)
    assert expected[1:].std() > 0
    assert not torch.allclose(expected, torch.stack(inner(data.inputs)))

    assert torch.stack(ensemble(data.inputs)).equal(expected)
    with ensemble.exits(data.inputs) as run:
        assert torch.stack([exit.output() for exit in run]).equal(expected)
    recorded = record(ensemble, data, batch_size=40)
    assert recorded.outputs.equal(expected)
    assert recorded.outputs.equal(
        ensembled(record(inner, data, batch_size=40), name, **given).outputs
    )


def test_a_plain_ensemble_changes_no_temperature(inner, toy_input):
    assert torch.stack(RunningEnsemble(inner, "geometric")(toy_input)).equal(
        combine(inner(toy_input), "geometric")
    )


def test_what_the_inner_network_is_shows_through(inner, toy_input):
    ensemble = RunningEnsemble(inner, "poe")
    for name in ("num_exits", "exit_names", "num_classes", "backbone", "heads", "cuts", "layouts"):
        assert getattr(ensemble, name) is getattr(inner, name) or getattr(
            ensemble, name
        ) == getattr(inner, name)
    for mine, exit in zip(
        ensemble.exits(toy_input, keep=True), inner.exits(toy_input, keep=True), strict=True
    ):
        assert mine.index == exit.index
        assert mine.features.equal(exit.features)
        assert ensemble.pooled(mine).equal(inner.pooled(exit))


# --- staged runs ----------------------------------------------------------------------------------


@torch.no_grad()
def test_with_caching_a_run_never_grows_less_sure_and_holds_the_surest_exits_own_output(inner):
    # run by run, as a caller sees it
    for _ in range(50):
        x = 3 * torch.randn(1, 8)
        own = [exit.output() for exit in inner.exits(x, keep=True)]
        before = 0.0
        surest = None
        for exit in RunningEnsemble(inner, "caching").exits(x):
            here = float(own[exit.index].softmax(-1).amax())
            if here > before:
                before = here
                surest = own[exit.index]
            assert exit.output().equal(surest)


@pytest.mark.parametrize("last", range(3))
def test_the_answer_that_a_runner_gives_at_an_exit_is_the_surest_so_far(inner, toy_input, last):
    ensemble = RunningEnsemble(inner, "caching").eval()
    at_once = ThresholdPolicy(
        score="margin", thresholds=(math.inf,) * last + (0.0,) * (2 - last) + (-math.inf,)
    )
    costs = profile(ensemble, toy_input, batch_sizes=[5], repeats=1, warm_up=0)
    runner = Runner(ensemble, costs, policy=at_once, any_profile=True)
    with runner.start(toy_input) as run:
        answers = [runner.run(toy_input), run.result()]
    outputs = torch.stack(inner(toy_input)[: last + 1])
    for answer in answers:
        assert answer.exit == last
        assert answer.output.softmax(-1).amax(-1).equal(outputs.softmax(-1).amax((0, 2)))


class Counted(nn.Module):
    """A head that counts its calls, and fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.calls = 0
        self.failing = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.failing:
            raise OSError("head")
        return self.linear(x)


def counted(toy: nn.Module) -> RunningEnsemble:
    heads = [lambda shape, classes: Counted()] * 2
    network = attach_exits(
        toy, after=["blocks.0", "blocks.2"], heads=heads, example=torch.zeros(1, 8)
    )
    for head in network.heads:
        head.calls = 0
    return RunningEnsemble(network, "boosted")


def test_a_head_runs_once_when_its_exit_is_reached_and_not_before(toy, toy_input):
    ensemble = counted(toy)
    first, second = ensemble.heads
    walk = ensemble.exits(toy_input)
    assert (first.calls, second.calls) == (0, 0)
    exit = next(walk)
    assert (first.calls, second.calls) == (1, 0)
    assert exit.output() is exit.output()
    next(walk)
    assert (first.calls, second.calls) == (1, 1)
    walk.close()


def test_outputs_that_nobody_asked_for_still_count(inner, toy_input):
    *_, last = RunningEnsemble(inner, "poe").exits(toy_input)
    assert last.output().equal(combine(inner(toy_input), "poe")[-1])


def test_an_output_may_be_asked_for_when_the_run_has_moved_on(inner, toy_input):
    exits = list(inner.exits(toy_input))
    with pytest.raises(ExitPassed):
        exits[0].output()
    exits = list(RunningEnsemble(inner, "poe").exits(toy_input))
    assert exits[0].output().equal(combine(inner(toy_input), "poe")[0])


def test_a_head_that_fails_ends_the_run(toy, toy_input):
    ensemble = counted(toy)
    ensemble.heads[1].failing = True
    before = paused_runs()
    walk = ensemble.exits(toy_input)
    next(walk)
    with pytest.raises(OSError, match="head"):
        next(walk)
    with pytest.raises(StopIteration):
        next(walk)
    assert paused_runs() == before


def by_break(ensemble: RunningEnsemble, x: Tensor, seen: list[Any]) -> None:
    for exit in ensemble.exits(x):
        seen.append(weakref.ref(exit.output()))
        break


def by_del(ensemble: RunningEnsemble, x: Tensor, seen: list[Any]) -> None:
    walk = ensemble.exits(x)
    seen.append(weakref.ref(next(walk).output()))
    del walk


def by_with(ensemble: RunningEnsemble, x: Tensor, seen: list[Any]) -> None:
    with ensemble.exits(x) as run:
        seen.append(weakref.ref(next(run).output()))


def by_close(ensemble: RunningEnsemble, x: Tensor, seen: list[Any]) -> None:
    walk = ensemble.exits(x)
    seen.append(weakref.ref(next(walk).output()))
    walk.close()
    walk.close()
    with pytest.raises(StopIteration):
        next(walk)


@pytest.mark.parametrize("abandon", [by_break, by_del, by_with, by_close])
def test_an_abandoned_run_leaves_nothing(inner, toy_input, abandon: Callable[..., None]):
    ensemble = RunningEnsemble(inner, "geometric")
    seen = []
    before = paused_runs()
    abandon(ensemble, toy_input, seen)
    assert paused_runs() == before
    assert [entry() for entry in seen] == [None]
    assert torch.stack([exit.output() for exit in ensemble.exits(toy_input)]).equal(
        torch.stack(ensemble(toy_input))
    )


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(inner, name):
    x = torch.randn(60, 8)
    labels = x[:, :3].argmax(1)
    ensemble = RunningEnsemble(inner, name)
    optimizer = torch.optim.SGD(ensemble.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(60):
        loss = torch.stack(
            [nn.functional.cross_entropy(output, labels) for output in ensemble(x)]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_the_last_boosted_exit_teaches_no_earlier_head(inner, toy_input):
    RunningEnsemble(inner, "boosted")(toy_input)[-1].square().sum().backward()
    assert all(parameter.grad is None for parameter in inner.heads.parameters())
    RunningEnsemble(inner, Rule(name="boosted", detach=False))(toy_input)[
        -1
    ].square().sum().backward()
    assert all(parameter.grad is not None for parameter in inner.heads.parameters())


def test_options_reach_the_inner_forward(inner, toy_input):
    def gradients(**options: Any) -> Tensor:
        inner.zero_grad()
        torch.stack(
            RunningEnsemble(inner, "arithmetic")(toy_input, **options)
        ).square().sum().backward()
        return inner.backbone.blocks[0][0].weight.grad.clone()

    assert not torch.allclose(gradients(gradients=GradientFlow(equilibrium=True)), gradients())


# --- the state it keeps ---------------------------------------------------------------------------


def test_weights_are_the_inner_networks_own(inner):
    ensemble = RunningEnsemble(inner, "poe")
    state = ensemble.state_dict()
    for name, tensor in inner.state_dict().items():
        assert state[f"network.{name}"].data_ptr() == tensor.data_ptr()
    assert {name for name in state if not name.startswith("network.")} == {
        "temperatures",
        "recalibration",
        "_extra_state",
    }


def test_a_saved_ensemble_comes_back_with_its_temperatures(inner, toy, toy_input):
    ensemble = RunningEnsemble(inner, "poe", TEMPERATURES, recalibration=TEMPERATURES)
    fresh = RunningEnsemble(network_of(copy.deepcopy(toy)), "poe")
    assert not torch.equal(fresh(toy_input)[0], ensemble(toy_input)[0])
    fresh.load_state_dict(ensemble.state_dict())
    assert torch.stack(fresh(toy_input)).equal(torch.stack(ensemble(toy_input)))
    assert fresh.temperatures.tolist() == list(TEMPERATURES)


def test_weights_of_another_rule_are_refused_and_fingerprinted_apart(inner):
    plain = RunningEnsemble(inner, "poe")
    other = RunningEnsemble(inner, Rule(name="geometric"))
    with pytest.raises(StaleInput, match=r"poe.*geometric"):
        other.load_state_dict(plain.state_dict())
    hotter = RunningEnsemble(inner, "poe", TEMPERATURES)
    states = [
        network.state_dict()
        for network in (inner, plain, other, hotter, RunningEnsemble(inner, "caching"))
    ]
    assert len({fingerprint_tensors(state) for state in states}) == len(states)
    assert fingerprint_structure(states[1]) == fingerprint_structure(states[3])
    assert fingerprint_structure(states[1]) != fingerprint_structure(states[0])


def test_copies_are_apart(inner, toy_input):
    ensemble = RunningEnsemble(inner, "poe", TEMPERATURES)
    before = torch.stack(ensemble(toy_input))
    twin = copy.deepcopy(ensemble)
    assert torch.stack(twin(toy_input)).equal(before)
    assert torch.stack([exit.output() for exit in twin.exits(toy_input)]).equal(before)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert torch.stack(ensemble(toy_input)).equal(before)


def test_modes_and_types_reach_the_inner_network(inner, toy_input):
    ensemble = RunningEnsemble(inner, "poe").eval()
    assert not inner.backbone.training
    outputs = ensemble.double()(toy_input.double())
    assert all(output.dtype == torch.float64 for output in outputs)


@pytest.mark.parametrize("temperatures", [(1.0, 2.0), (1.0, 2.0, -1.0)])
def test_wrong_temperatures_are_refused(inner, temperatures):
    with pytest.raises(PolicyError, match="3 exits"):
        RunningEnsemble(inner, "poe", temperatures)


# --- costs and runs against the clock -------------------------------------------------------------


def test_heads_are_counted_to_their_stages(inner, toy_input):
    plain = inner.stage_facts(toy_input)
    moved = RunningEnsemble(inner, "poe").stage_facts(toy_input)
    assert [fact.stage_macs for fact in moved] == [
        fact.stage_macs + fact.head_macs for fact in plain
    ]
    assert [fact.stage_parameters for fact in moved] == [
        fact.stage_parameters + fact.head_parameters for fact in plain
    ]
    assert {(fact.head_macs, fact.head_parameters) for fact in moved} == {(0, 0)}
    assert sum(fact.stage_parameters for fact in moved) == sum(
        parameter.numel() for parameter in inner.parameters()
    )
    text = RunningEnsemble(inner, "poe").describe(toy_input)
    assert "outputs combined: poe" in text


@pytest.fixture
def costs(inner, toy_input) -> CostProfile:
    return profile(RunningEnsemble(inner, "poe"), toy_input, batch_sizes=[5], repeats=20, warm_up=2)


def test_its_profile_has_the_heads_in_the_stages(inner, toy_input, costs):
    heads = costs.batches[5].heads
    stages = costs.batches[5].stages
    assert max(head.p50 for head in heads) < min(stage.p50 for stage in stages) / 4
    assert costs.cumulative("macs", "contract") == costs.cumulative("macs", "interruptible")


def test_a_runner_gives_the_combined_answer(inner, toy_input, costs):
    ensemble = RunningEnsemble(inner, "poe").eval()
    runner = Runner(ensemble, costs, any_profile=True)
    assert runner.run(toy_input).output.equal(ensemble(toy_input)[-1])
    with runner.start(toy_input) as run:
        assert run.result().output.equal(ensemble(toy_input)[-1])


def test_a_profile_of_the_exits_alone_is_refused(inner, toy_input):
    alone = profile(inner, toy_input, batch_sizes=[5], repeats=1, warm_up=0)
    with pytest.raises(StaleInput, match="network structure"):
        Runner(RunningEnsemble(inner, "poe"), alone, clock=FakeClock())
