"""Networks that grow: what runs, and that it equals the sub-networks."""

import copy
import gc
import itertools
import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from growth_schedules import schedules
from impatient.clock import FakeClock
from impatient.errors import ExitPassed, ModelSpecError, NetworkError, NoEffectWarning
from impatient.evaluation import record
from impatient.networks import growth
from impatient.networks.anytimenet import (
    AnytimeNet,
    BaseBlock,
    BaseResNet,
    GrowingNetwork,
    IterationBatchNorm,
    SectionedNetwork,
    _in_iteration,
    block_macs,
    block_times,
)
from impatient.networks.combined_exits import RunningEnsemble
from impatient.networks.ensemble import EANN
from impatient.networks.gradients import GradientFlow
from impatient.networks.growth import PAPER, Schedule, in_turn, trace
from impatient.networks.heads import Pool
from impatient.networks.recalibration import recalibrate
from impatient.networks.resnet import PreActBlock, PreActBottleneck
from impatient.policies import ThresholdPolicy
from impatient.runtime import Runner, profile
from impatient.training import Recipe, fit, load_data
from recordings import Samples

SMALL = Schedule(((1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2)))
CLASSES = 3


class Residual(nn.Module):
    """A residual block on [B, 4], with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(torch.relu(self.norm(x)))


def growing(
    stem: nn.Module,
    sections: Sequence[Sequence[nn.Module]],
    out: nn.Module,
    *rest: Any,
    **options: Any,
) -> GrowingNetwork:
    return GrowingNetwork(SectionedNetwork(stem, sections, out), *rest, **options)


def residual(schedule: Schedule | Sequence[Sequence[int]], **options: Any) -> GrowingNetwork:
    """A network of such blocks, all different in weights and statistics."""
    counts = Schedule.of(schedule).final
    out = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, CLASSES))
    sections = [[Residual() for _ in range(count)] for count in counts]
    network = growing(nn.Linear(8, 4), sections, out, schedule, layout="ND", **options)
    shake(network)
    return network


def shake(network: nn.Module) -> None:
    """Weights and statistics as after some training."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)


def small(**options: Any) -> AnytimeNet:
    network = AnytimeNet(CLASSES, SMALL, width=2, in_channels=1, **options)
    shake(network)
    return network


def images(count: int = 2, channels: int = 1) -> Tensor:
    return torch.randn(count, channels, 8, 8)


def alone(network: GrowingNetwork, index: int, x: Tensor) -> Tensor:
    """Run the sub-network of one iteration by itself, without cached tensors.

    If statistics are not shared, a block uses those of the last iteration that runs it.
    """
    x = network.backbone.stem(x)
    ran = trace(network.schedule)[: index + 1]
    counts = network.schedule.counts[index]
    for section, (blocks, count) in enumerate(
        zip(network.backbone.sections, counts, strict=True), start=1
    ):
        for position, block in enumerate(list(blocks)[:count], start=1):
            with _in_iteration(
                max(k for k, names in enumerate(ran) if f"S{section}.{position}" in names)
            ):
                x = block(x)
    with _in_iteration(index):
        return network._out(index)(x)


def executions(network: GrowingNetwork) -> list[str]:
    """Grows by the name of each part that runs."""
    ran: list[str] = []
    for name, part in network.backbone.parts().items():
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
    return ran


def flat(names: Sequence[Sequence[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(names))


# --- the plain network ----------------------------------------------------------------------------


def test_base_resnet_has_the_papers_sizes() -> None:
    network = BaseResNet()
    assert network.counts == (8, 8, 8)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 1 + 2 * 24
    assert [convolution.out_channels for convolution in convolutions] == [16] + [16] * 16 + [
        32
    ] * 16 + [64] * 16
    strided = [
        index for index, convolution in enumerate(convolutions) if convolution.stride == (2, 2)
    ]
    # the first of the second and of the third section
    assert strided == [1 + 16, 1 + 32]
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 2 * 24 + 1
    assert {norm.eps for norm in norms} == {0.001}
    kernels = 3 * 16 * 9 + 9 * (16 * 16 * 16 + (16 * 32 + 15 * 32 * 32) + (32 * 64 + 15 * 64 * 64))
    norm_widths = 16 * 16 + (16 + 15 * 32) + (32 + 15 * 64) + 64
    assert (
        sum(parameter.numel() for parameter in network.parameters())
        == kernels + 2 * norm_widths + 64 * 10 + 10
    )


def test_a_plain_block_is_the_sum_of_its_input_and_its_convolutions() -> None:
    block = BaseBlock(3, 3).eval()
    x = torch.randn(2, 3, 5, 5)
    shake(block)
    expected = block.conv2(F.relu(block.bn2(block.conv1(F.relu(block.bn1(x))))))
    assert block(x).equal(expected + x)


@pytest.mark.parametrize("side", [6, 7])
def test_a_transition_takes_every_second_pixel_and_puts_zeros_behind(side: int) -> None:
    block = BaseBlock(2, 5, stride=2)
    x = torch.randn(1, 2, side, side)
    # only the input is left
    nn.init.zeros_(block.conv2.weight)
    assert block(x)[:, :2].equal(x[:, :, ::2, ::2])
    assert block(x)[:, 2:].abs().sum() == 0


def test_operations_of_the_papers_network_relative_to_the_plain_one() -> None:
    parts = block_macs(BaseResNet(), torch.zeros(1, 3, 32, 32))
    block = 2 * 16 * 16 * 9 * 32 * 32
    assert parts.stem == 3 * 16 * 9 * 32 * 32
    assert parts.sections == tuple((first * block, *[block] * 7) for first in (1.0, 0.75, 0.75))
    assert parts.out == 640
    assert growth.costs(PAPER, parts).overhead == pytest.approx(1.19, abs=0.002)


@pytest.mark.parametrize(
    "wrong",
    [{"blocks": (2, 0)}, {"blocks": ()}, {"width": 0}, {"num_classes": 1.5}, {"in_channels": -1}],
)
def test_sizes_that_make_no_network_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ModelSpecError, match="expected whole numbers of at least 1"):
        BaseResNet(**wrong)


# --- what runs ------------------------------------------------------------------------------------


def test_the_papers_38_executions_are_what_really_runs() -> None:
    network = AnytimeNet(width=1).eval()
    ran = executions(network)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad(), network.exits(x) as run:
        for exit in run:
            exit.output()
    assert ran == flat(trace(PAPER))
    assert len(ran) == 38
    ran.clear()
    network(x)
    assert ran == flat(trace(PAPER))
    ran.clear()
    network.backbone(x)
    assert len(ran) == 26


@settings(max_examples=50, deadline=None)
@given(schedules())
def test_what_runs_is_what_the_schedule_says(schedule: Schedule) -> None:
    torch.manual_seed(0)
    network = residual(schedule).eval()
    ran = executions(network)
    network(torch.randn(1, 8))
    assert ran == flat(trace(schedule))


def test_an_out_that_nobody_asks_for_does_not_run_and_one_asked_for_runs_once() -> None:
    network = small().eval()
    ran = executions(network)
    with network.exits(images()) as run:
        for exit in run:
            if exit.index == 1:
                assert exit.output() is exit.output()
    # and the last, which comes with its iteration
    assert ran.count("OUT") == 2
    assert [name for name in ran if name != "OUT"] == [
        name for name in flat(trace(SMALL)) if name != "OUT"
    ]


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    network = small().eval()
    ran = executions(network)
    with network.exits(images()) as run:
        assert ran == []
        next(run).output()
        assert ran == [*trace(SMALL)[0]]
        next(run)
        assert ran == [*trace(SMALL)[0], *trace(SMALL)[1][:-1]]
    assert next(run, None) is None
    assert len(ran) == 9 - 1


def test_a_run_goes_on_where_it_was_left_on_whatever_thread() -> None:
    network = small().eval()
    x = images()
    outputs = []
    with torch.no_grad():
        run = network.exits(x)
        outputs.append(next(run).output())
        # another run in between, of another input
        other = network.exits(images())
        next(other).output()
    thread = threading.Thread(target=lambda: outputs.extend(exit.output() for exit in run))
    thread.start()
    thread.join()
    assert torch.stack(outputs).equal(torch.stack([alone(network, index, x) for index in range(4)]))
    # as asked for
    assert not any(output.requires_grad for output in outputs)


# --- cached equals uncached -----------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(schedules(), st.sampled_from(["shared", "own"]), st.sampled_from(["shared", None]))
def test_in_eval_mode_every_iteration_gives_exactly_what_its_sub_network_gives(
    schedule: Schedule, outs: str, norms: str | None
) -> None:
    torch.manual_seed(0)
    network = residual(schedule, outs=outs, norms=norms).eval()
    x = torch.randn(3, 8)
    expected = torch.stack([alone(network, index, x) for index in range(network.num_exits)])
    assert torch.stack(network(x)).equal(expected)
    with network.exits(x) as run:
        assert torch.stack([exit.output() for exit in run]).equal(expected)
    assert network.backbone(x).equal(expected[-1])
    # each its own
    assert len({tuple(output.flatten().tolist()) for output in expected}) == network.num_exits


@settings(max_examples=50, deadline=None)
@given(schedules())
def test_in_train_mode_outputs_are_the_same_and_gradients_add_up(schedule: Schedule) -> None:
    torch.manual_seed(0)
    network = residual(schedule)
    x = torch.randn(6, 8)
    weights = torch.rand(network.num_exits) + 0.1
    twin = copy.deepcopy(network)
    outputs = network(x)
    expected = [alone(twin, index, x) for index in range(network.num_exits)]
    assert torch.stack(outputs).equal(torch.stack(expected))
    for results in (outputs, expected):
        sum(
            weight * output.square().sum() for weight, output in zip(weights, results, strict=True)
        ).backward()
    for (name, mine), theirs in zip(network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name, atol=1e-4, rtol=1e-4)


def test_in_train_mode_a_cached_block_updates_its_statistics_once_but_sub_networks_each_time() -> (
    None
):
    cached = residual(SMALL, norms="shared")
    x = torch.randn(6, 8)
    for module in cached.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
    apart = copy.deepcopy(cached)
    cached(x)
    for index in range(4):
        alone(apart, index, x)
    updates = {
        name: (
            part.norm.num_batches_tracked.item(),
            apart.backbone.parts()[name].norm.num_batches_tracked.item(),
        )
        for name, part in cached.backbone.parts().items()
        if name.startswith("S")
    }
    assert updates == {
        "S1.1": (1, 4),
        "S1.2": (1, 3),
        "S2.1": (2, 4),
        "S2.2": (1, 2),
        "S3.1": (3, 4),
        "S3.2": (1, 1),
    }
    # the same values, four times: 1 - 0.9 ** 4 of the way instead of a tenth
    once, often = (network.backbone.sections[0][0].norm.running_mean for network in (cached, apart))
    torch.testing.assert_close(often, once / 0.1 * (1 - 0.9**4))


@pytest.mark.parametrize("build", [PreActBlock, PreActBottleneck])
def test_the_blocks_of_our_residual_networks_grow(build: Any) -> None:
    sections = [[build(2, 4), build(4, 4)], [build(4, 8, 2), build(8, 8)]]
    out = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    check_growth(growing(nn.Conv2d(1, 2, 3, padding=1), sections, out, [(1, 1), (1, 2), (2, 2)]))


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.narrow(F.gelu(self.widen(inner))).permute(0, 3, 1, 2)


def test_convnext_blocks_behind_strided_convolutions_grow() -> None:
    down = nn.Sequential(nn.Conv2d(4, 6, 2, stride=2), ConvNeXtBlock(6))
    sections = [[ConvNeXtBlock(4), ConvNeXtBlock(4)], [down, ConvNeXtBlock(6), ConvNeXtBlock(6)]]
    out = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, CLASSES)
    )
    check_growth(growing(nn.Conv2d(1, 4, 2, stride=2), sections, out, [(1, 1), (2, 2), (2, 3)]))


def check_growth(network: GrowingNetwork) -> None:
    shake(network.eval())
    x = images()
    ran = executions(network)
    outputs = torch.stack(network(x))
    assert ran == flat(trace(network.schedule))
    assert outputs.equal(
        torch.stack([alone(network, index, x) for index in range(network.num_exits)])
    )
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == network.num_exits


# --- blocks that write in place -------------------------------------------------------------------


class InPlace(nn.Module):
    """Begins by overwriting its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(0.5).relu_()
        return x + self.linear(x)


class NotInPlace(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        x = (x + 0.5).relu()
        return x + self.linear(x)


def check_in_place(schedule: Schedule, *, inference: bool) -> None:
    def build(block: type[InPlace], *, inplace: bool) -> GrowingNetwork:
        out = nn.Sequential(nn.LeakyReLU(0.1, inplace=inplace), nn.Linear(4, CLASSES))
        sections = [[block() for _ in range(count)] for count in schedule.final]
        return growing(nn.Linear(8, 4), sections, out, schedule, layout="ND")

    writing = build(InPlace, inplace=True)
    safe = build(NotInPlace, inplace=False)
    safe.load_state_dict(writing.state_dict())
    x = torch.randn(3, 8)
    expected = torch.stack(safe(x))
    # samples differ: not everything has been cut to 0
    assert expected.std(1).min() > 1e-3
    assert torch.stack(writing(x)).equal(expected), "overwritten"
    with torch.inference_mode(inference), writing.exits(x) as run:
        assert torch.stack([exit.output() for exit in run]).equal(expected)
    with torch.no_grad(), writing.exits(x, keep=True) as run:
        assert torch.stack([exit.output() for exit in list(run)]).equal(expected)


@settings(max_examples=30, deadline=None)
@given(schedules(most=3), st.booleans())
def test_cached_tensors_are_safe_from_blocks_and_outs_that_write_in_place(
    schedule: Schedule, inference: bool
) -> None:
    torch.manual_seed(0)
    check_in_place(schedule, inference=inference)


@pytest.mark.parametrize(
    "schedule", [Schedule(((1, 1), (2, 1))), Schedule(((1,), (2,)))], ids=["blocks", "out"]
)
def test_the_test_above_would_notice_a_cached_tensor_that_is_overwritten(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_in_place(schedule, inference=False)
    monkeypatch.setattr(Tensor, "clone", lambda tensor: tensor)
    with pytest.raises(AssertionError, match="overwritten"):
        check_in_place(schedule, inference=False)


def test_training_goes_through_blocks_that_write_in_place() -> None:
    sections = [
        [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)) for _ in range(2)] for _ in range(2)
    ]
    network = growing(
        nn.Linear(8, 4), sections, nn.Linear(4, CLASSES), in_turn((2, 2)), layout="ND"
    )
    torch.stack(network(torch.randn(3, 8))).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


# --- exits ----------------------------------------------------------------------------------------


def test_features_are_those_of_the_last_section() -> None:
    network = small(norms="shared").eval()
    x = images(3)
    with network.exits(x) as run:
        for exit in run:
            assert exit.features.shape == (3, 8, 2, 2)
            assert network.pooled(exit).equal(exit.features.mean((2, 3)))
            assert network.backbone.out(exit.features).equal(exit.output())


def test_an_exit_that_has_passed_is_refused_unless_kept() -> None:
    network = small().eval()
    x = images()
    with network.exits(x) as run:
        exits = list(run)
    with pytest.raises(ExitPassed):
        exits[0].output()
    with network.exits(x, keep=True) as run:
        assert torch.stack([exit.output() for exit in list(run)]).equal(torch.stack(network(x)))


def test_a_block_that_fails_ends_the_run() -> None:
    network = small().eval()

    def fail(*_: Any) -> None:
        raise ValueError("out of order")

    network.backbone.sections[0][1].register_forward_pre_hook(fail)
    run = network.exits(images())
    first = next(run)
    with pytest.raises(ValueError, match="out of order"):
        next(run)
    assert next(run, None) is None
    with pytest.raises(ExitPassed, match="failed in a later stage"):
        first.output()


@pytest.mark.parametrize("how", ["closed", "dropped", "finished"])
def test_a_run_that_ends_frees_its_tensors(how: str) -> None:
    network = small().eval()
    tensors: list[weakref.ref[Tensor]] = []
    for part in network.backbone.parts().values():
        part.register_forward_hook(lambda _m, _a, output: tensors.append(weakref.ref(output)))
    gc.collect()
    # reference counts alone must do
    gc.disable()
    try:
        with torch.no_grad():
            run = network.exits(images())
        next(run)
        # of section 1: nothing goes on from the others
        assert sum(ref() is not None for ref in tensors) == 1
        next(run)
        if how == "closed":
            run.close()
        elif how == "finished":
            list(run)
        else:
            del run
        assert all(ref() is None for ref in tensors)
    finally:
        gc.enable()


def test_heads_run_in_the_modes_in_which_the_run_was_asked_for() -> None:
    network = small().eval()
    x = images()
    with torch.no_grad():
        run = network.exits(x)
    assert not any(exit.output().requires_grad for exit in run)
    with network.exits(x) as training, torch.inference_mode():
        assert all(exit.output().requires_grad for exit in training)


# --- gradients at the exits -----------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(schedules())
def test_in_equilibrium_every_exit_reaches_the_stem_with_an_equal_share(schedule: Schedule) -> None:
    torch.manual_seed(0)
    network = residual(schedule).eval()
    x = torch.randn(3, 8)
    for index in range(network.num_exits):
        shares = []
        for flow in (GradientFlow(), GradientFlow(equilibrium=True)):
            network.zero_grad()
            network(x, gradients=flow)[index].sum().backward()
            shares.append(network.backbone.stem.weight.grad.clone())
        torch.testing.assert_close(shares[1], shares[0] / network.num_exits)
    assert torch.stack(network(x, gradients=flow)).equal(torch.stack(network(x)))


def test_detached_channels_are_trained_by_the_exits_before_only() -> None:
    network = growing(
        nn.Linear(8, 4),
        [[nn.Linear(4, 4)], [nn.Identity()]],
        nn.Linear(4, CLASSES),
        [(1, 1)],
        layout="ND",
    )
    # nothing is deeper: detaching changes nothing
    assert network.num_exits == 1
    network(torch.randn(3, 8), gradients=GradientFlow(detach=0.5))[0].sum().backward()
    assert network.backbone.sections[0][0].weight.grad.abs().sum(1).min() > 0

    sections = [[nn.Linear(4, 4), nn.Linear(4, 4)], [nn.Identity()]]
    network = growing(
        nn.Linear(8, 4), sections, nn.Linear(4, CLASSES), [(1, 1), (2, 1)], layout="ND"
    )
    network(torch.randn(3, 8), gradients=GradientFlow(detach=0.5))[1].sum().backward()
    reached = sections[0][0].weight.grad.abs().sum(1) > 0
    assert reached.tolist() == [True, True, False, False]


def test_channels_to_detach_are_found_where_they_come_before_time() -> None:
    sections = [[nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)], [nn.Identity()]]
    out = nn.Sequential(Pool("NCT"), nn.Linear(4, CLASSES))
    network = growing(nn.Conv1d(8, 4, 1), sections, out, [(1, 1), (2, 1)], layout="NCT")
    network(torch.randn(3, 8, 6), gradients=GradientFlow(detach=0.5))[1].sum().backward()
    reached = sections[0][0].weight.grad.abs().sum((1, 2)) > 0
    assert reached.tolist() == [True, True, False, False]


# --- own OUTs, own statistics ---------------------------------------------------------------------


def test_own_outs_begin_equal_and_learn_apart() -> None:
    network = small(outs="own")
    x = images(4)
    assert len(network.heads) == 3
    assert len(small().heads) == 0
    assert (
        len({id(parameter) for head in network.heads for parameter in head.parameters()}) == 3 * 4
    )
    network(x)[1].sum().backward()
    assert [head[-1].weight.grad is not None for head in network.heads] == [False, True, False]
    assert network.backbone.out[-1].weight.grad is None
    twin = small(outs="own")
    assert all(head[-1].weight.equal(twin.backbone.out[-1].weight) for head in twin.heads)


def test_own_statistics_are_there_where_a_block_runs_in_several_iterations() -> None:
    network = small(norms="own")
    rows = {
        name: sorted(
            {len(norm._row) for norm in part.modules() if isinstance(norm, IterationBatchNorm)}
        )
        for name, part in network.backbone.parts().items()
    }
    assert rows == {
        "IN": [],
        "S1.1": [],
        "S1.2": [],
        "S2.1": [2],
        "S2.2": [],
        "S3.1": [3],
        "S3.2": [],
        "OUT": [4],
    }
    outs = small(norms="own", outs="own")
    assert not any(isinstance(module, IterationBatchNorm) for module in outs.backbone.out.modules())
    names = [name for name, _ in network.named_parameters()]
    # weights are shared
    assert names == [name for name, _ in small().named_parameters()]


def test_own_statistics_in_train_mode_each_see_their_own_iteration_only() -> None:
    network = residual(SMALL, norms="own")
    x = torch.randn(6, 8)
    norm = network.backbone.sections[2][0].norm
    inputs = []
    norm.register_forward_hook(lambda _m, args, _o: inputs.append(args[0].detach()))
    norm.reset_running_stats()
    network(x)
    assert len(inputs) == 3
    for row, seen in enumerate(inputs):
        torch.testing.assert_close(norm.running_mean[row], 0.1 * seen.mean(0))
        torch.testing.assert_close(norm.running_var[row], 0.9 + 0.1 * seen.var(0))
    assert norm.num_batches_tracked.tolist() == [1, 1, 1]


def test_own_statistics_give_in_train_mode_what_shared_ones_give() -> None:
    shared = residual(SMALL)
    x = torch.randn(6, 8)
    own = residual(SMALL, norms="own")
    own.load_state_dict(shared.state_dict())
    assert torch.stack(own(x)).equal(torch.stack(shared(x)))


def test_in_eval_mode_each_iteration_and_the_plain_network_go_by_their_own_statistics() -> None:
    network = residual(SMALL, norms="own").eval()
    x = torch.randn(3, 8)
    norm = network.backbone.sections[2][0].norm
    calls = []
    norm.register_forward_hook(lambda _m, args, output: calls.append((args[0], output)))
    outputs = network(x)
    for row, (features, output) in enumerate(calls):
        expected = F.batch_norm(
            features,
            norm.running_mean[row],
            norm.running_var[row],
            norm.weight,
            norm.bias,
            eps=norm.eps,
        )
        assert output.equal(expected)
    assert network.backbone(x).equal(outputs[-1])
    assert calls[3][1].equal(calls[2][1])
    with network.exits(x) as run:
        assert torch.stack([exit.output() for exit in run]).equal(torch.stack(outputs))


def test_weights_trained_with_shared_statistics_can_be_given_own_ones() -> None:
    shared = small().eval()
    own = small(norms="own").eval()
    state = shared.state_dict()
    own.load_state_dict(state)
    x = images()
    assert torch.stack(own(x)).equal(torch.stack(shared(x)))
    # left as it was
    assert all(state[name].shape == value.shape for name, value in shared.state_dict().items())
    own.load_state_dict(copy.deepcopy(own).state_dict())


@pytest.mark.parametrize("norms", ["shared", "own"])
def test_recalibrated_statistics_are_the_means_over_the_data(norms: str) -> None:
    network = residual(SMALL, norms=norms).eval()
    # runs in the first two iterations
    norm = network.backbone.sections[1][0].norm
    inputs: list[Tensor] = []
    norm.register_forward_hook(lambda _m, args, _o: inputs.append(args[0]))
    weights = [parameter.clone() for parameter in network.parameters()]
    recalibrate(network, iter([torch.randn(6, 8) + shift for shift in range(3)]))
    assert len(inputs) == 6
    means = torch.stack([seen.mean(0) for seen in inputs])
    variances = torch.stack([seen.var(0) for seen in inputs])
    if norms == "own":
        torch.testing.assert_close(
            norm.running_mean, torch.stack([means[0::2].mean(0), means[1::2].mean(0)])
        )
        torch.testing.assert_close(
            norm.running_var, torch.stack([variances[0::2].mean(0), variances[1::2].mean(0)])
        )
    else:
        torch.testing.assert_close(norm.running_mean, means.mean(0))
        torch.testing.assert_close(norm.running_var, variances.mean(0))
    assert all(
        before.equal(after) for before, after in zip(weights, network.parameters(), strict=True)
    )
    assert norm.momentum == 0.1
    assert not any(module.training for module in network.modules())


def test_recalibrated_own_statistics_bring_eval_near_training_where_shared_ones_cannot() -> None:
    shared = residual(Schedule(((1, 1), (4, 1), (4, 3))), norms="shared")
    own = residual(shared.schedule, norms="own")
    for parameter in shared.parameters():
        # so that depth changes what the second section sees
        nn.init.normal_(parameter, std=2.0)
    own.load_state_dict(shared.state_dict())
    x = torch.randn(512, 8)
    truth = torch.stack(copy.deepcopy(shared)(x)).detach()
    for network in (shared, own):
        recalibrate(network, [x])
        network.eval()

    def distance(network: GrowingNetwork) -> float:
        with torch.no_grad():
            return float((torch.stack(network(x)) - truth).square().mean() / truth.square().mean())

    # what is left: the variance with n - 1
    assert distance(own) < 1e-4
    assert distance(shared) > 100 * distance(own)


def test_no_batches_cannot_recalibrate_and_change_nothing() -> None:
    network = small()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(NetworkError, match="no batches"):
        recalibrate(network, [])
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())


def test_own_statistics_without_batch_norm_are_warned_of() -> None:
    with pytest.warns(NoEffectWarning, match="norms='own' changed nothing"):
        growing(
            nn.Identity(),
            [[nn.Linear(4, 4) for _ in range(2)]],
            nn.Linear(4, 3),
            [(1,), (2,)],
            norms="own",
        )


# --- what is refused ------------------------------------------------------------------------------


def test_networks_that_cannot_be_are_refused() -> None:
    blocks = [nn.Identity(), nn.Identity()]
    with pytest.raises(
        ModelSpecError, match=r"sections of \(2,\) blocks, but the schedule ends with \(1,\)"
    ):
        growing(nn.Identity(), [blocks], nn.Linear(4, 3), [(1,)])
    with pytest.raises(ModelSpecError, match="no section shrinks"):
        growing(nn.Identity(), [blocks], nn.Linear(4, 3), [(2,), (1,), (2,)])
    with pytest.raises(NetworkError, match="give num_classes"):
        growing(nn.Identity(), [blocks], nn.Flatten(), [(2,)])
    assert growing(nn.Identity(), [blocks], nn.Flatten(), [(2,)], num_classes=4).num_classes == 4
    for option in ("outs", "norms"):
        with pytest.raises(NetworkError, match=f"{option}='mine'; expected one of shared, own"):
            AnytimeNet(**{option: "mine"})


# --- the rest of the library ----------------------------------------------------------------------


def test_it_looks_like_a_network() -> None:
    network = AnytimeNet(num_classes=10)
    assert network.num_exits == 7
    assert network.exit_names == PAPER.names
    assert network.num_classes == 10
    assert type(network.backbone) is BaseResNet
    own = {id(parameter) for parameter in network.parameters()}
    assert own == {id(parameter) for parameter in network.backbone.parameters()}
    assert set(network.state_dict()) == {
        f"backbone.{name}" for name in network.backbone.state_dict()
    }
    assert set(network.backbone.state_dict()) == set(BaseResNet().state_dict())


def test_copies_are_independent_and_share_within_themselves() -> None:
    network = small(norms="own").eval()
    x = images()
    before = torch.stack(network(x))
    twin = copy.deepcopy(network)
    assert torch.stack(twin(x)).equal(before)
    for parameter in twin.parameters():
        nn.init.ones_(parameter)
    assert torch.stack(network(x)).equal(before)
    changed = torch.stack(twin(x))
    assert not changed.equal(before)
    assert twin.backbone(x).equal(changed[-1])


@pytest.mark.parametrize(
    "options", [{}, {"outs": "own"}, {"norms": "own"}], ids=["shared", "outs", "norms"]
)
def test_facts_are_what_runs(options: dict[str, Any]) -> None:
    network = small(**options)
    x = images(3)
    facts = network.stage_facts(x)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), network.eval().exits(x) as run:
        passed = 0
        for fact, exit in zip(facts, run, strict=True):
            reached = counter.get_total_flops()
            exit.output()
            answered = counter.get_total_flops()
            assert fact.stage_macs == (reached - passed) // 6
            assert fact.head_macs == (answered - reached) // 6
            assert fact.features == tuple(exit.features.shape)
            passed = answered
    total = sum(fact.stage_parameters + fact.head_parameters for fact in facts)
    assert total == sum(parameter.numel() for parameter in network.parameters())
    out = sum(parameter.numel() for parameter in network.backbone.out.parameters())
    assert [fact.head_parameters for fact in facts] == (
        [out, out, out, 0] if "outs" in options else [out, 0, 0, 0]
    )
    assert network.training is False


def test_it_describes_itself() -> None:
    lines = small().describe(images()).splitlines()
    assert len(lines) == 2 + 4 + 2
    assert lines[2].split()[:3] == ["0", "1-1-1", "8x2x2"]
    assert lines[-2].startswith("all iterations: ")
    assert "of a plain BaseResNet" in lines[-2]
    assert (
        lines[-1] == "mechanism: 4 iterations over 3 sections, each going on from cached tensors."
    )
    overhead = growth.costs(SMALL, block_macs(small().backbone, images())).overhead
    assert f"{overhead:.3f} times" in lines[-2]


def test_block_times_are_the_medians_of_what_each_part_takes() -> None:
    clock = FakeClock()
    network = BaseResNet(CLASSES, (2, 1), width=2, in_channels=1)
    durations = {
        "IN": [1.0, 1.0, 9.0],
        "S1.1": [2.0] * 3,
        "S1.2": [3.0] * 3,
        "S2.1": [4.0, 0.0, 5.0],
        "OUT": [0.5] * 3,
    }
    for name, part in network.parts().items():
        # the first is the warm-up
        scripted = iter([100.0, *durations[name]])
        part.register_forward_hook(lambda *_, scripted=scripted: clock.advance(next(scripted)))
    times = block_times(network, images(), repeats=3, warm_up=1, clock=clock)
    assert (times.stem, times.sections, times.out) == (1.0, ((2.0, 3.0), (4.0,)), 0.5)
    assert network.training


def test_measured_blocks_can_be_planned_with() -> None:
    network = BaseResNet(CLASSES, (2, 2, 2), width=2, in_channels=1)
    parts = block_times(network, images(), repeats=3, warm_up=1)
    schedule = growth.plan(parts, sizes=[3, 4, 6])
    assert AnytimeNet(CLASSES, schedule, width=2, in_channels=1).num_exits == 3


@pytest.mark.parametrize("options", [{}, {"outs": "own", "norms": "own"}], ids=["shared", "own"])
def test_forward_exits_and_recording_agree(options: dict[str, Any]) -> None:
    network = small(**options).eval()
    data = Samples(images(40), torch.randint(CLASSES, (40,)))
    expected = torch.stack(network(data.inputs))
    recorded = record(network, data, features=True, batch_size=40)
    assert recorded.outputs.equal(expected)
    assert recorded.exits == SMALL.names
    assert [tuple(entry.shape) for entry in recorded.features] == [(40, 8)] * 4


def test_profile_and_runner_take_it_for_a_network() -> None:
    network = small().eval()
    x = images(2)
    costs = profile(network, x, batch_sizes=[2], repeats=3, warm_up=1)
    assert costs.exits == SMALL.names
    assert costs.exit_free_macs == round(block_macs(network.backbone, x).plain)
    counted = growth.costs(SMALL, block_macs(network.backbone, x))
    assert costs.cumulative("macs", "interruptible") == counted.cumulative
    expected = network(x)
    runner = Runner(network, costs)
    final = runner.run(x)
    assert (final.exit, final.stopped_by) == (3, "final")
    assert final.output.equal(expected[3])
    policy = ThresholdPolicy(score="max_probability", thresholds=(2.0, 0.0, 2.0, -math.inf))
    stopped = Runner(network, costs, policy).run(x)
    assert (stopped.exit, stopped.stopped_by) == (1, "policy")
    assert stopped.output.equal(expected[1])
    with runner.start(x) as run:
        assert run.result().output.equal(expected[3])
    runner.close()


def test_ensembles_take_it_for_a_network() -> None:
    network = small().eval()
    x = images()
    running = RunningEnsemble(network, "geometric")
    with running.exits(x) as run:
        assert torch.stack([exit.output() for exit in run]).equal(torch.stack(running(x)))
    assert [fact.head_macs for fact in running.stage_facts(x)] == [0] * 4
    both = EANN(
        [AnytimeNet(CLASSES, [(1, 1), (2, 1)], width=2, in_channels=1).eval(), network],
        [[0.5, 0.4], [0.6, 0.3, 0.2, 0.1]],
    )
    with both.exits(x) as run:
        outputs = torch.stack([exit.output() for exit in run])
    assert outputs.equal(torch.stack(both(x)))
    assert outputs[3:].equal(torch.stack(network(x))[1:])


def test_it_learns() -> None:
    network = AnytimeNet(10, in_turn((2, 1)), width=4, in_channels=1, norms="own")
    recipe = Recipe(epochs=3, batch_size=32, lr=0.1)
    history = fit(
        network, load_data("digits"), weights="inverse_square", recipe=recipe, progress=False
    )
    assert len(history.epochs[-1].validation_accuracy) == 2
    assert min(history.epochs[-1].validation_accuracy) > 0.5


def test_own_outs_can_be_trained_alone() -> None:
    data = load_data("digits")
    network = AnytimeNet(10, in_turn((2, 1)), width=2, in_channels=1, outs="own")
    before = {name: value.clone() for name, value in network.backbone.named_parameters()}
    first = network.heads[0][-1].weight.detach().clone()
    fit(network, data, recipe=Recipe(epochs=1, regime="frozen"), progress=False)
    assert all(value.equal(before[name]) for name, value in network.backbone.named_parameters())
    assert not network.heads[0][-1].weight.equal(first)
