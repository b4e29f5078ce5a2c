"""Measuring costs: what is counted how often, in which order, and what is left untouched. Times
come from a fake clock.
"""

import dataclasses
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impatient.anytime import Network, Run, stage_traffic
from impatient.clock import FakeClock
from impatient.costs import CostProfile
from impatient.counting import count_traffic
from impatient.errors import CostError, ExitNotReached, StaleInput
from impatient.inputs import resized
from impatient.networks import AnytimeNet, Cascade, MultiExitNetwork, attach_exits
from impatient.runtime import profile
from impatient.runtime.profile import check_profile, time_in_turn
from toys import ToyBackbone

EXAMPLE = torch.zeros(1, 8)
# the untouched backbone, and the same with two heads
REPEAT_S = 4.25 + 5.25
# runs before any is timed: staged and whole, for MACs and for bytes
COUNTING = 4


@pytest.fixture
def network(toy: ToyBackbone) -> MultiExitNetwork:
    return attach_exits(toy, after=["blocks.0", "blocks.2"], example=EXAMPLE)


@pytest.fixture
def timed(network: MultiExitNetwork, clock: FakeClock) -> MultiExitNetwork:
    """A network whose blocks take 1 s, its heads 0.5 s and its classifier 0.25 s of fake time."""

    def takes(module: nn.Module, seconds: float) -> None:
        module.register_forward_pre_hook(lambda *_: clock.advance(seconds))

    for modules, seconds in (
        (network.backbone.blocks, 1.0),
        (network.heads, 0.5),
        ([network.backbone.classifier], 0.25),
    ):
        for module in modules:
            takes(module, seconds)
    return network


def begins(network: MultiExitNetwork) -> list[str]:
    """Collects what each forward pass from now on was, as it begins: "whole", or "staged" once a
    head runs.
    """
    seen: list[str] = []
    network.backbone.blocks[0].register_forward_pre_hook(lambda *_: seen.append("whole"))
    network.heads[0].register_forward_pre_hook(lambda *_: seen.__setitem__(-1, "staged"))
    return seen


# --- what is measured -----------------------------------------------------------------------------


def test_stages_heads_and_the_untouched_backbone_are_timed_apart(
    timed: MultiExitNetwork, clock: FakeClock
) -> None:
    costs = profile(timed, EXAMPLE, repeats=3, clock=clock)
    assert [part.p50 for part in costs.at(1).stages] == [1.0, 2.0, 1.25]
    assert [part.p50 for part in costs.at(1).heads] == [0.5, 0.5, 0.0]
    assert costs.exit_free_s() == 4.25
    assert costs.contract_s() == (1.5, 3.5, 4.25)
    assert costs.interruptible_s() == (1.5, 4.0, 5.25)


@pytest.mark.parametrize("repeats", [1, 7, 30])
def test_every_part_is_measured_as_often_as_asked(
    timed: MultiExitNetwork, clock: FakeClock, repeats: int
) -> None:
    batch = profile(timed, EXAMPLE, repeats=repeats, max_seconds=1e9, clock=clock).at(1)
    assert {part.n for part in (*batch.stages, *batch.heads, batch.exit_free)} == {repeats}


@pytest.mark.parametrize("warm_up", [0, 4])
def test_the_warm_up_is_run_and_not_counted(
    timed: MultiExitNetwork, clock: FakeClock, warm_up: int
) -> None:
    seen = begins(timed)
    cold = COUNTING + 2 * warm_up
    timed.backbone.blocks[0].register_forward_pre_hook(
        lambda *_: clock.advance(100.0 if len(seen) <= cold else 0.0)
    )
    batch = profile(timed, EXAMPLE, repeats=3, warm_up=warm_up, clock=clock).at(1)
    assert (batch.stages[0].max, batch.exit_free.max) == (1.0, 4.25)
    assert len(seen) == cold + 2 * 3


def test_a_slow_repeat_is_seen_in_the_maximum_and_not_in_the_median(
    timed: MultiExitNetwork, clock: FakeClock
) -> None:
    seen = begins(timed)
    timed.backbone.blocks[0].register_forward_pre_hook(
        lambda *_: clock.advance(100.0 if len(seen) == COUNTING + 2 * 5 else 0.0)
    )
    batch = profile(timed, EXAMPLE, repeats=9, warm_up=0, clock=clock).at(1)
    assert max(batch.stages[0].max, batch.exit_free.max) > 100.0
    assert (batch.stages[0].p50, batch.exit_free.p50) == (1.0, 4.25)


def test_the_order_alternates(network: MultiExitNetwork, clock: FakeClock) -> None:
    seen = begins(network)
    profile(network, EXAMPLE, repeats=4, warm_up=1, clock=clock)
    warm = ["whole", "staged"]
    pair = ["staged", "whole"]
    assert seen[COUNTING:] == warm + pair + warm + pair + warm


def test_measuring_stops_when_its_time_is_up(timed: MultiExitNetwork, clock: FakeClock) -> None:
    costs = profile(timed, EXAMPLE, repeats=300, max_seconds=25.5 * REPEAT_S, clock=clock)
    assert costs.at(1).stages[0].n == 26


def test_the_warm_up_does_not_use_up_the_time(timed: MultiExitNetwork, clock: FakeClock) -> None:
    costs = profile(
        timed, EXAMPLE, repeats=300, warm_up=50, max_seconds=25.5 * REPEAT_S, clock=clock
    )
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
    begin = clock.now()
    advance = clock.advance
    monkeypatch.setattr(clock, "advance", pending.append)
    # the function hides it
    module = sys.modules[profile.__module__]
    monkeypatch.setattr(
        module, "synchronise", lambda device: advance(sum(pending)) or pending.clear()
    )
    costs = profile(timed, EXAMPLE, repeats=3, warm_up=1, clock=clock)
    assert clock.now() > begin
    assert costs.contract_s() == (1.5, 3.5, 4.25)


# --- batch sizes, MACs, files ---------------------------------------------------------------------


def test_each_batch_size_is_measured(network: MultiExitNetwork, clock: FakeClock) -> None:
    shapes = []
    network.backbone.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    costs = profile(
        network, torch.randn(3, 8), batch_sizes=(2, 5), repeats=2, warm_up=0, clock=clock
    )
    assert sorted(costs.batches) == [2, 5]
    # what is counted is per sample
    assert shapes == [
        *[(1, 8)] * COUNTING,
        *[(2, 8)] * 4,
        *[(5, 8)] * 4,
    ]


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


def test_a_profile_names_its_exits_and_where_it_was_made(
    network: MultiExitNetwork, clock: FakeClock
) -> None:
    costs = profile(network, EXAMPLE, repeats=1, warm_up=0, clock=clock)
    assert costs.exits == ("blocks.0", "blocks.2", "output")
    made = costs.provenance
    assert (made.device, made.dtype, made.threads, made.engine) == (
        "cpu",
        "float32",
        torch.get_num_threads(),
        "eager",
    )


def test_a_profile_comes_back_from_its_file(
    timed: MultiExitNetwork, clock: FakeClock, tmp_path: Any
) -> None:
    costs = profile(timed, EXAMPLE, batch_sizes=(1, 2), repeats=3, clock=clock)
    costs.save(tmp_path / "costs.json")
    assert CostProfile.load(tmp_path / "costs.json") == costs


# --- bytes ----------------------------------------------------------------------------------------


def test_bytes_are_counted_by_operator(network: MultiExitNetwork, clock: FakeClock) -> None:
    # read, weights, biases, written
    linear = 4 * (8 + 8 * 8 + 8 + 8)
    relu = 4 * (8 + 8)
    classifier = 4 * (8 + 3 * 8 + 3 + 3)
    costs = profile(
        network, EXAMPLE.expand(3, 8), batch_sizes=(2,), repeats=1, warm_up=0, clock=clock
    )
    assert costs.stage_bytes == (linear + relu, 2 * (linear + relu), linear + relu + classifier)
    assert costs.head_bytes == (classifier, classifier, 0)
    assert costs.exit_free("bytes") == sum(costs.stage_bytes)


class Moves(nn.Module):
    """Runs a function as a model."""

    def __init__(self, function: Any, *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.inner = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.inner)


@pytest.mark.parametrize(
    ("function", "modules", "x", "moved"),
    [
        (
            lambda x: x.flatten().view(2, 4).t()[1:].expand(5, 3, 2).contiguous()[None],
            (),
            torch.zeros(1, 8),
            4 * (6 + 30),
        ),
        (lambda x: x.view(2, 4)[1:].detach(), (), torch.zeros(1, 8), 0),
        (lambda x: x.to(torch.float32).contiguous(), (), torch.zeros(1, 8), 0),
        (lambda x: torch.empty(100, 100), (), torch.zeros(1, 8), 0),
        (lambda x: x.to(torch.float64), (), torch.zeros(1, 8), 4 * 8 + 8 * 8),
        (lambda x: x + torch.empty(1, 1).expand(1, 8), (), torch.zeros(1, 8), 4 * (8 + 1 + 8)),
        (lambda x: x.clone().relu_(), (), torch.zeros(1, 8), 4 * 16 + 4 * 16),
        (
            lambda x, conv: conv(x),
            (nn.Conv2d(3, 4, 3, padding=1),),
            torch.zeros(1, 3, 8, 8),
            4 * (3 * 64 + 4 * 27 + 4 + 4 * 64),
        ),
        (
            lambda x, table: table(x),
            (nn.Embedding(1000, 16),),
            torch.zeros(1, 5).long(),
            8 * 5 + 4 * 2 * 5 * 16,
        ),
    ],
    ids=[
        "strided copy",
        "views",
        "no-ops",
        "allocation",
        "cast",
        "broadcast",
        "in place",
        "convolution",
        "embedding",
    ],
)
def test_what_moves_is_counted_and_what_does_not_is_not(
    function: Any, modules: Any, x: Tensor, moved: int
) -> None:
    assert count_traffic(Moves(function, *modules), x) == moved


def test_the_stages_of_any_network_move_what_running_it_moves(toy: ToyBackbone) -> None:
    image = torch.zeros(1, 3, 8, 8)
    deep = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 36, 3)
    )
    cut = attach_exits(deep, after=["0"], example=image)
    assert sum(stage_traffic(cut, image)[0]) == count_traffic(deep, image)
    several = Cascade([toy, nn.Linear(8, 3)])
    stages, heads = stage_traffic(several, EXAMPLE)
    # bytes of a few outputs: routing looks at what the networks say
    looking = 4 * 3 * 4
    assert count_traffic(toy, EXAMPLE) <= stages[0] <= count_traffic(toy, EXAMPLE) + looking
    assert 4 * (8 + 24 + 3 + 3) <= stages[1] <= 4 * (8 + 24 + 3 + 3) + looking
    assert heads == (0, 0)
    grown = AnytimeNet(width=2, num_classes=3)
    stages, heads = stage_traffic(grown, image)
    # sections are run again
    assert sum(stages) > count_traffic(grown.backbone, image)
    assert min((*stages, *heads[:-1])) > 0 == heads[-1]


def test_counting_bytes_needs_an_example_that_comes_to_every_exit() -> None:
    network = attach_exits(Skips(lambda x: len(x) > 1), after=["first", "middle"], example=EXAMPLE)
    with pytest.raises(ExitNotReached, match="came to 2 of 3 exits"):
        stage_traffic(network, torch.zeros(2, 8))


# --- noise ----------------------------------------------------------------------------------------


def test_the_untouched_backbone_is_compared_with_itself_back_to_back(
    timed: MultiExitNetwork, clock: FakeClock
) -> None:
    spells = [0.0]
    seen = begins(timed)

    # between the pairs alone: 0 1 | staged staged | 2 3 | ...
    def gets_slower(*_: Any) -> None:
        if len(seen) > 2 and seen[-2:] == ["staged", "staged"]:
            spells[0] += 1.0
        clock.advance(spells[0])

    timed.backbone.classifier.register_forward_pre_hook(gets_slower)
    batch = profile(timed, EXAMPLE, repeats=30, warm_up=0, max_seconds=1e9, clock=clock).at(1)
    assert batch.exit_free.max > batch.exit_free.p50
    assert batch.noise is not None
    assert (batch.noise.aa_ratio, batch.noise.spread, batch.noise.n) == (1.0, 0.0, 15)


def test_no_run_is_added_for_the_noise(timed: MultiExitNetwork, clock: FakeClock) -> None:
    seen = begins(timed)
    profile(timed, EXAMPLE, repeats=40, warm_up=0, max_seconds=1e9, clock=clock)
    assert len(seen) == COUNTING + 2 * 40


@pytest.mark.parametrize(("jitter", "warned"), [(0.0, False), (0.04, False), (0.5, True)])
def test_a_noisy_machine_is_warned_of(
    timed: MultiExitNetwork,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
    jitter: float,
    warned: bool,
) -> None:
    random = torch.Generator().manual_seed(1)
    seen = begins(timed)

    # every untouched run takes its 4.25 s, and by chance longer
    def shakes(*_: Any) -> None:
        clock.advance(
            4.25 * jitter * float(torch.rand(1, generator=random)) if seen[-1] == "whole" else 0.0
        )

    timed.backbone.classifier.register_forward_pre_hook(shakes)
    with caplog.at_level(logging.WARNING, logger="impatient"):
        costs = profile(
            timed, EXAMPLE, batch_sizes=(1, 2), repeats=60, max_seconds=1e9, clock=clock
        )
    noise = costs.at(1).noise
    assert noise is not None
    assert noise.too_noisy is warned
    # once, not for each batch size
    assert caplog.text.count("too noisy to say anything at batch size 1, 2:") == warned
    assert len(caplog.records) == warned
    assert (noise.spread > 0.0) is (jitter > 0.0)


def test_of_few_repeats_nothing_is_said_about_noise(
    timed: MultiExitNetwork, clock: FakeClock
) -> None:
    assert profile(timed, EXAMPLE, repeats=11, clock=clock).at(1).noise is None


# --- energy ---------------------------------------------------------------------------------------


class Meter:
    """Knows what the parts of a network draw: 1 J for a block, 0.25 J for a head, 0.5 J for the
    classifier.
    """

    name = "abacus"

    def __init__(self, network: MultiExitNetwork) -> None:
        self.spent = 0.0
        for modules, joules in (
            (network.backbone.blocks, 1.0),
            (network.heads, 0.25),
            ([network.backbone.classifier], 0.5),
        ):
            for module in modules:
                module.register_forward_pre_hook(lambda *_, joules=joules: self.spend(joules))

    def spend(self, joules: float) -> None:
        self.spent += joules

    def begin(self) -> None:
        self._before = self.spent

    def end(self) -> float:
        return self.spent - self._before


def test_joules_of_stages_and_heads_are_told_apart(
    timed: MultiExitNetwork, clock: FakeClock
) -> None:
    costs = profile(timed, EXAMPLE, batch_sizes=(4,), repeats=2, energy=Meter(timed), clock=clock)
    assert costs.stage_energy_j == (1.0, 2.0, 1.5)
    assert costs.head_energy_j == (0.25, 0.25, 0.0)
    assert (costs.exit_free("energy"), costs.energy_meter) == (4.5, "abacus")
    assert costs.cumulative("energy", "contract") == (1.25, 3.25, 4.5)
    assert costs.cumulative("energy", "interruptible") == (1.25, 3.5, 5.0)


def test_joules_that_differ_by_less_than_their_noise_count_as_none(
    timed: MultiExitNetwork, clock: FakeClock
) -> None:
    meter = Meter(timed)
    windows: list[float] = []

    # every window shows less than the one before
    def falling() -> float:
        windows.append(1.0 / (len(windows) + 1))
        return windows[-1]

    meter.end = falling  # type: ignore[method-assign]
    costs = profile(timed, EXAMPLE, repeats=1, energy=meter, clock=clock)
    assert costs.stage_energy_j is not None
    assert costs.head_energy_j is not None
    assert min((*costs.stage_energy_j, *costs.head_energy_j)) >= 0.0
    assert costs.stage_energy_j[0] > 0.0


@pytest.mark.parametrize("energy", [True, SimpleNamespace(name="abacus", begin=None)])
def test_what_is_no_meter_is_refused_before_anything_runs(
    timed: MultiExitNetwork, clock: FakeClock, energy: Any
) -> None:
    seen = begins(timed)
    with pytest.raises(CostError, match=r"expected a meter .*find_meter"):
        profile(timed, EXAMPLE, energy=energy, clock=clock)
    assert seen == []


def test_no_energy_is_measured_unless_asked_for(timed: MultiExitNetwork, clock: FakeClock) -> None:
    assert not profile(timed, EXAMPLE, repeats=1, clock=clock).holds("energy")


# --- engines --------------------------------------------------------------------------------------


class InEngine(Network):
    """A network as an engine runs it: no parameters, operators nobody sees, the structure of the
    original.
    """

    def __init__(self, network: MultiExitNetwork, engine: str, threads: int | None = None) -> None:
        super().__init__()
        # in a list: not a part of this module
        self._original = [network]
        self.engine = engine
        self.threads = threads

    @property
    def num_exits(self) -> int:
        return self._original[0].num_exits

    @property
    def exit_names(self) -> tuple[str, ...]:
        return self._original[0].exit_names

    @property
    def exit_free(self) -> nn.Module:
        return self._original[0].backbone

    @property
    def structure_fingerprint(self) -> str:
        return self._original[0].structure_fingerprint

    def exits(self, x: Any, *, keep: bool = False) -> Run:
        return self._original[0].exits(x, keep=keep)

    def stage_facts(self, x: Tensor) -> Any:
        return self._original[0].stage_facts(x)


def test_a_network_in_an_engine_is_profiled_as_such(
    timed: MultiExitNetwork, clock: FakeClock
) -> None:
    eager, other = (
        profile(net, EXAMPLE, repeats=3, clock=clock)
        for net in (timed, InEngine(timed, "made-up", threads=7))
    )
    assert (other.provenance.engine, other.provenance.threads) == ("made-up", 7)
    assert other.provenance.network == eager.provenance.network
    assert (other.contract_s(), other.exit_free_s()) == (eager.contract_s(), eager.exit_free_s())
    assert other.stage_macs == eager.stage_macs
    assert other.exit_free("macs") == eager.exit_free("macs")
    # rather than 0 bytes
    assert not other.holds("bytes")
    assert other.compare(eager)[0].ratio == 1.0
    assert set(other.differences(eager)) == {"engine", "threads", "dtype"}


def test_a_profile_of_another_engine_is_refused(timed: MultiExitNetwork, clock: FakeClock) -> None:
    there = InEngine(timed, "onnxruntime")
    eager, other = (profile(net, EXAMPLE, repeats=1, clock=clock) for net in (timed, there))
    check_profile(eager, timed, "measure again")
    check_profile(other, there, "measure again")
    with pytest.raises(
        StaleInput,
        match=r"another engine: 'eager', but here it is 'onnxruntime'. To fix this, measure again",
    ):
        check_profile(eager, there, "measure again")
    with pytest.raises(StaleInput, match=r"another engine: 'onnxruntime', but here it is 'eager'"):
        check_profile(other, timed, "measure again")


def test_an_engine_s_threads_and_version_must_be_those_of_its_profile(
    timed: MultiExitNetwork, clock: FakeClock
) -> None:
    costs = profile(
        InEngine(timed, "onnxruntime-int8-dynamic", threads=2), EXAMPLE, repeats=1, clock=clock
    )
    assert "onnxruntime" in costs.provenance.versions
    with pytest.raises(StaleInput, match=r"another number of threads: 2, but here it is 3"):
        check_profile(
            costs, InEngine(timed, "onnxruntime-int8-dynamic", threads=3), "measure again"
        )
    old = dataclasses.replace(
        costs.provenance, versions={**costs.provenance.versions, "onnxruntime": "0.1"}
    )
    with pytest.raises(StaleInput, match="another set of versions"):
        check_profile(
            dataclasses.replace(costs, provenance=old),
            InEngine(timed, "onnxruntime-int8-dynamic", 2),
            "measure again",
        )


# --- what is refused, and what is left as it was --------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"repeats": 0},
        {"repeats": -1},
        {"batch_sizes": ()},
        {"batch_sizes": (1, 0)},
        {"warm_up": -1},
    ],
)
def test_senseless_numbers_are_refused(network: MultiExitNetwork, options: dict[str, Any]) -> None:
    with pytest.raises(CostError, match="at least 1"):
        profile(network, EXAMPLE, **options)


def test_every_module_is_back_in_its_mode(network: MultiExitNetwork, clock: FakeClock) -> None:
    network.train()
    network.backbone.blocks[1].eval()
    modes = [module.training for module in network.modules()]
    seen = []
    network.backbone.classifier.register_forward_hook(
        lambda module, *_: seen.append(module.training)
    )
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
    [
        (lambda x: x.isnan().any(), torch.full((1, 8), torch.nan), (1,)),
        (lambda x: len(x) > 1, EXAMPLE, (1, 2)),
    ],
    ids=["always", "only at a larger batch size"],
)
def test_an_example_that_does_not_come_to_all_exits_is_refused(
    skips: Any, x: Tensor, sizes: Any, clock: FakeClock
) -> None:
    network = attach_exits(Skips(skips), after=["first", "middle"], example=EXAMPLE)
    with pytest.raises(ExitNotReached, match=r"(1 of 2 early|2 of 3) exits"):
        profile(network, x, batch_sizes=sizes, repeats=1, warm_up=0, clock=clock)


def test_a_progress_bar_changes_nothing(timed: MultiExitNetwork, clock: FakeClock) -> None:
    assert profile(timed, EXAMPLE, repeats=2, progress=True, clock=clock).contract_s() == (
        1.5,
        3.5,
        4.25,
    )


# --- the machine's own clock ----------------------------------------------------------------------


def test_real_times_are_positive_and_ordered(network: MultiExitNetwork) -> None:
    costs = profile(network, EXAMPLE, repeats=20, warm_up=2)
    assert 0.0 < costs.contract_s()[-1] < 1.0
    assert costs.exit_free_s() > 0.0
    for part in (*costs.at(1).stages, *costs.at(1).heads[:-1], costs.at(1).exit_free):
        assert 0.0 < part.p50 <= part.p90 <= part.p99 <= part.p999 <= part.max


# --- several networks in turn ---------------------------------------------------------------------


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
            # the machine gets slower with every run
            slow[0] += 1.0
            clock.advance(self.seconds * slow[0])
            return x

    models = Takes(1.0), Takes(2.0)
    one, two = time_in_turn(models, torch.zeros(1), repeats=10, warm_up=2, clock=clock)
    assert [model.ran for model in models] == [12, 12]
    assert two / one == pytest.approx(2.0, rel=0.01)
    assert all(model.training for model in models)


def test_no_repeat_in_turn_is_refused() -> None:
    with pytest.raises(CostError, match="repeats=0; expected 1 or more"):
        time_in_turn([nn.Identity()], torch.zeros(1), repeats=0)


@pytest.mark.parametrize("wrong", [{"batch_sizes": 4}, {"batch_sizes": ()}, {"repeats": 0}])
def test_batch_sizes_and_repeats_are_checked(
    network: MultiExitNetwork, wrong: dict[str, Any]
) -> None:
    with pytest.raises(CostError, match=r"expected at least 1 repeat, at least one batch size"):
        profile(network, torch.zeros(1, 3), **wrong)
