"""Measuring costs: what is counted how often, in which order, and what is left untouched. Times come from a fake clock."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import ToyBackbone
from impatient.clock import FakeClock
from impatient.costs import CostProfile
from impatient.errors import CostError, ExitNotReached
from impatient.networks import MultiExitNetwork, attach_exits
from impatient.runtime import profile
from impatient.runtime.profile import resized, time_in_turn

EXAMPLE = torch.zeros(1, 8)
REPEAT_S = 4.25 + 5.25  # the untouched backbone, and the same with two heads


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def network(toy: ToyBackbone) -> MultiExitNetwork:
    return attach_exits(toy, after=["blocks.0", "blocks.2"], example=EXAMPLE)


@pytest.fixture
def timed(network: MultiExitNetwork, clock: FakeClock) -> MultiExitNetwork:
    """A network whose blocks take 1 s, its heads 0.5 s and its classifier 0.25 s of fake time."""

    def takes(module: nn.Module, seconds: float) -> None:
        module.register_forward_pre_hook(lambda *_: clock.advance(seconds))

    for modules, seconds in ((network.backbone.blocks, 1.0), (network.heads, 0.5), ([network.backbone.classifier], 0.25)):
        for module in modules:
            takes(module, seconds)
    return network


def begins(network: MultiExitNetwork) -> list[str]:
    """Collects what each forward pass from now on was, as it begins: "whole", or "staged" once a head runs."""
    seen: list[str] = []
    network.backbone.blocks[0].register_forward_pre_hook(lambda *_: seen.append("whole"))
    network.heads[0].register_forward_pre_hook(lambda *_: seen.__setitem__(-1, "staged"))
    return seen


# --- what is measured -----------------------------------------------------------------------------------------------


def test_stages_heads_and_the_untouched_backbone_are_timed_apart(timed: MultiExitNetwork, clock: FakeClock) -> None:
    costs = profile(timed, EXAMPLE, repeats=3, clock=clock)
    assert [part.p50 for part in costs.at(1).stages] == [1.0, 2.0, 1.25]
    assert [part.p50 for part in costs.at(1).heads] == [0.5, 0.5, 0.0]
    assert costs.exit_free_s() == 4.25
    assert costs.contract_s() == (1.5, 3.5, 4.25)
    assert costs.interruptible_s() == (1.5, 4.0, 5.25)


@pytest.mark.parametrize("repeats", [1, 7, 30])
def test_every_part_is_measured_as_often_as_asked(timed: MultiExitNetwork, clock: FakeClock, repeats: int) -> None:
    batch = profile(timed, EXAMPLE, repeats=repeats, max_seconds=1e9, clock=clock).at(1)
    assert {part.n for part in (*batch.stages, *batch.heads, batch.exit_free)} == {repeats}


@pytest.mark.parametrize("warm_up", [0, 4])
def test_the_warm_up_is_run_and_not_counted(timed: MultiExitNetwork, clock: FakeClock, warm_up: int) -> None:
    seen = begins(timed)
    cold = 2 + 2 * warm_up  # MACs are counted before, staged and whole
    timed.backbone.blocks[0].register_forward_pre_hook(lambda *_: clock.advance(100.0 if len(seen) <= cold else 0.0))
    batch = profile(timed, EXAMPLE, repeats=3, warm_up=warm_up, clock=clock).at(1)
    assert (batch.stages[0].max, batch.exit_free.max) == (1.0, 4.25)
    assert len(seen) == cold + 2 * 3


def test_a_slow_repeat_is_seen_in_the_maximum_and_not_in_the_median(timed: MultiExitNetwork, clock: FakeClock) -> None:
    seen = begins(timed)
    timed.backbone.blocks[0].register_forward_pre_hook(lambda *_: clock.advance(100.0 if len(seen) == 2 + 2 * 5 else 0.0))
    batch = profile(timed, EXAMPLE, repeats=9, warm_up=0, clock=clock).at(1)
    assert max(batch.stages[0].max, batch.exit_free.max) > 100.0
    assert (batch.stages[0].p50, batch.exit_free.p50) == (1.0, 4.25)


def test_the_order_alternates(network: MultiExitNetwork, clock: FakeClock) -> None:
    seen = begins(network)
    profile(network, EXAMPLE, repeats=4, warm_up=1, clock=clock)
    warm, pair = ["whole", "staged"], ["staged", "whole"]
    assert seen[2:] == warm + pair + warm + pair + warm  # after those in which MACs are counted


def test_measuring_stops_when_its_time_is_up(timed: MultiExitNetwork, clock: FakeClock) -> None:
    costs = profile(timed, EXAMPLE, repeats=300, max_seconds=25.5 * REPEAT_S, clock=clock)
    assert costs.at(1).stages[0].n == 26


def test_the_warm_up_does_not_use_up_the_time(timed: MultiExitNetwork, clock: FakeClock) -> None:
    costs = profile(timed, EXAMPLE, repeats=300, warm_up=50, max_seconds=25.5 * REPEAT_S, clock=clock)
    assert costs.at(1).exit_free.n == 26


@pytest.mark.parametrize(("repeats", "measured"), [(300, 20), (10, 10)])
def test_twenty_repeats_are_measured_whatever_they_take(
    timed: MultiExitNetwork, clock: FakeClock, repeats: int, measured: int
) -> None:
    costs = profile(timed, EXAMPLE, repeats=repeats, max_seconds=1e-9, clock=clock)
    assert costs.at(1).stages[0].n == measured


def test_a_device_that_works_in_the_background_is_waited_for(
    timed: MultiExitNetwork, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending: list[float] = []
    begin, advance = clock.now(), clock.advance
    monkeypatch.setattr(clock, "advance", pending.append)
    module = sys.modules[profile.__module__]  # the function hides it
    monkeypatch.setattr(module, "synchronise", lambda device: advance(sum(pending)) or pending.clear())
    costs = profile(timed, EXAMPLE, repeats=3, warm_up=1, clock=clock)
    assert clock.now() > begin
    assert costs.contract_s() == (1.5, 3.5, 4.25)


# --- batch sizes, MACs, files ---------------------------------------------------------------------------------------


def test_each_batch_size_is_measured(network: MultiExitNetwork, clock: FakeClock) -> None:
    shapes = []
    network.backbone.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    costs = profile(network, torch.randn(3, 8), batch_sizes=(2, 5), repeats=2, warm_up=0, clock=clock)
    assert sorted(costs.batches) == [2, 5]
    assert shapes == [*[(1, 8)] * 2, *[(2, 8)] * 4, *[(5, 8)] * 4]  # first for the MACs, which are per sample


def test_inputs_of_any_kind_are_brought_to_a_batch_size() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(resized(x, 4), x[:1].repeat(4, 1))
    mixed = resized({"a": x, "b": (x, [x, "as it is"])}, 3)
    assert mixed["a"].shape == mixed["b"][0].shape == mixed["b"][1][0].shape == (3, 3)
    assert mixed["b"][1][1] == "as it is"


def test_macs_and_parameters_are_counted(network: MultiExitNetwork, clock: FakeClock) -> None:
    costs = profile(network, EXAMPLE, repeats=1, warm_up=0, clock=clock)
    assert costs.stage_macs == (64, 128, 64 + 24)
    assert costs.head_macs == (24, 24, 0)
    assert costs.stage_parameters == (72, 144, 72 + 27)
    assert costs.head_parameters == (27, 27, 0)


def test_a_profile_names_its_exits_and_where_it_was_made(network: MultiExitNetwork, clock: FakeClock) -> None:
    costs = profile(network, EXAMPLE, repeats=1, warm_up=0, clock=clock)
    assert costs.exits == ("blocks.0", "blocks.2", "output")
    made = costs.provenance
    assert (made.device, made.dtype, made.threads, made.engine) == ("cpu", "float32", torch.get_num_threads(), "eager")


def test_a_profile_comes_back_from_its_file(timed: MultiExitNetwork, clock: FakeClock, tmp_path: Any) -> None:
    costs = profile(timed, EXAMPLE, batch_sizes=(1, 2), repeats=3, clock=clock)
    costs.save(tmp_path / "costs.json")
    assert CostProfile.load(tmp_path / "costs.json") == costs


# --- what is refused, and what is left as it was --------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"repeats": 0}, {"repeats": -1}, {"batch_sizes": ()}, {"batch_sizes": (1, 0)}, {"warm_up": -1}]
)
def test_senseless_numbers_are_refused(network: MultiExitNetwork, options: dict[str, Any]) -> None:
    with pytest.raises(CostError, match="at least 1"):
        profile(network, EXAMPLE, **options)


def test_every_module_is_back_in_its_mode(network: MultiExitNetwork, clock: FakeClock) -> None:
    network.train()
    network.backbone.blocks[1].eval()
    modes = [module.training for module in network.modules()]
    seen = []
    network.backbone.classifier.register_forward_hook(lambda module, *_: seen.append(module.training))
    profile(network, EXAMPLE, repeats=2, warm_up=1, clock=clock)
    assert not any(seen)
    assert [module.training for module in network.modules()] == modes


def test_after_an_error_every_module_is_back_in_its_mode(network: MultiExitNetwork) -> None:
    network.train()
    with pytest.raises(RuntimeError):
        profile(network, torch.zeros(1, 9), repeats=1)
    assert all(module.training for module in network.modules())


class Skips(nn.Module):
    """Leaves out its middle for some inputs."""

    def __init__(self, skips: Any) -> None:
        super().__init__()
        self.skips = skips
        self.first, self.middle, self.last = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x if self.skips(x) else self.middle(x))


@pytest.mark.parametrize(
    ("skips", "x", "sizes"),
    [(lambda x: x.isnan().any(), torch.full((1, 8), torch.nan), (1,)), (lambda x: len(x) > 1, EXAMPLE, (1, 2))],
    ids=["always", "only at a larger batch size"],
)
def test_an_example_that_does_not_come_to_all_exits_is_refused(skips: Any, x: Tensor, sizes: Any, clock: FakeClock) -> None:
    network = attach_exits(Skips(skips), after=["first", "middle"], example=EXAMPLE)
    with pytest.raises(ExitNotReached, match=r"came to (1 of 2 early|2 of 3) exits"):
        profile(network, x, batch_sizes=sizes, repeats=1, warm_up=0, clock=clock)


def test_a_progress_bar_changes_nothing(timed: MultiExitNetwork, clock: FakeClock) -> None:
    assert profile(timed, EXAMPLE, repeats=2, progress=True, clock=clock).contract_s() == (1.5, 3.5, 4.25)


# --- the machine's own clock ----------------------------------------------------------------------------------------


def test_real_times_are_positive_and_ordered(network: MultiExitNetwork) -> None:
    costs = profile(network, EXAMPLE, repeats=20, warm_up=2)
    assert 0.0 < costs.contract_s()[-1] < 1.0
    assert costs.exit_free_s() > 0.0
    for part in (*costs.at(1).stages, *costs.at(1).heads[:-1], costs.at(1).exit_free):
        assert 0.0 < part.p50 <= part.p90 <= part.p99 <= part.p999 <= part.max


# --- several networks in turn -----------------------------------------------------------------------------------------


def test_networks_in_turn_meet_a_slow_spell_alike(clock: FakeClock) -> None:
    slow = [1.0]

    class Takes(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds
            self.ran = 0

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            self.ran += 1
            slow[0] += 1.0  # the machine gets slower with every run
            clock.advance(self.seconds * slow[0])
            return x

    models = Takes(1.0), Takes(2.0)
    one, two = time_in_turn(models, torch.zeros(1), repeats=10, warm_up=2, clock=clock)
    assert [model.ran for model in models] == [12, 12]
    assert two / one == pytest.approx(2.0, rel=0.01)
    assert all(model.training for model in models)


def test_no_repeat_in_turn_is_refused() -> None:
    with pytest.raises(CostError, match="at least 1 repeat"):
        time_in_turn([nn.Identity()], torch.zeros(1), repeats=0)
