"""Places of exits, found automatically or named by a user."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from impatient.errors import (
    AmbiguousCut,
    CutOrderError,
    ExitNotFound,
    ImpatientError,
    NetworkError,
)
from impatient.inputs import evaluating
from impatient.networks import MultiExitNetwork, PreActResNet, attach_exits, placement
from impatient.networks.placement import _even, _levels, choose, every, resolve, trace
from impatient.networks.stages import Cut


class PlainConvolutions(nn.Module):
    """Like VGG: one long list of single layers."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 8), (8, 8), (8, 8), (8, 8)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers, nn.MaxPool2d(2))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 16), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class Repeated(nn.Module):
    """Like ALBERT: one block called several times."""

    def __init__(self, times: int = 4) -> None:
        super().__init__()
        self.groups = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh())])
        self.classifier = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 8)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.groups[0](x)
        return self.classifier(x)


class Nested(nn.Module):
    """Like ResNet: stages of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        for stage in range(1, 4):
            setattr(self, f"layer{stage}", nn.Sequential(Block(), Block()))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer3(self.layer2(self.layer1(self.stem(x)))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.tanh(self.one(x)))


@pytest.fixture(autouse=True)
def _every_block_takes_a_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "time", SimpleNamespace(perf_counter=itertools.count().__next__))


X = torch.ones(2, 8)
IMAGES = torch.ones(2, 3, 8, 8)


def running_order(model: nn.Module, x: Any, cuts: list[Cut]) -> list[Cut]:
    order = list(trace(model, x, sorted({cut.module for cut in cuts})).ended_s)
    return sorted(cuts, key=lambda cut: order.index((cut.module, cut.call)))


# --- by themselves --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "x", "expected"),
    [
        (Nested, X, [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)]),
        (lambda: PreActResNet(n=2, c=4), IMAGES, [f"blocks.{index}" for index in range(6)]),
        (PlainConvolutions, IMAGES, [f"features.{index}" for index in (1, 3, 5, 7, 8)]),
        (Repeated, X, ["groups.0"]),
    ],
    ids=["resnet", "preact resnet", "vgg", "albert"],
)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_exits_go_after_blocks_in_running_order(
    build: Callable[[], nn.Module], x: Tensor, expected: list[str], count: int
) -> None:
    model = build()
    cuts = choose(model, x, count, repeats=1)
    assert len(cuts) == len(set(cuts)) == count - 1
    assert {cut.module for cut in cuts} <= set(expected)
    assert cuts == running_order(model, x, cuts)


def test_toys_exits_go_after_its_blocks(toy: nn.Module, toy_input: Tensor) -> None:
    network = attach_exits(toy, example=toy_input, count=4)
    assert set(network.exit_names) < {"blocks.0", "blocks.1", "blocks.2", "blocks.3", "output"}
    assert network.exit_names[-1] == "output"
    assert network.num_exits == 4


def test_one_block_called_often_is_cut_between_its_calls() -> None:
    cuts = choose(Repeated(times=6), X, 4, repeats=1)
    assert {cut.module for cut in cuts} == {"groups.0"}
    calls = [cut.call for cut in cuts]
    assert calls == sorted(set(calls))


class Slow(nn.Module):
    """Blocks that take given times, on a clock that nothing else moves."""

    def __init__(self, clock: SimpleNamespace, costs_s: Sequence[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in costs_s)
        self.classifier = nn.Linear(8, 3)
        self.clock = clock
        self.costs_s = costs_s

    def forward(self, x: Tensor) -> Tensor:
        for block, cost_s in zip(self.blocks, self.costs_s, strict=True):
            self.clock.now_s += cost_s
            x = block(x)
        self.clock.now_s += 0.5
        return self.classifier(x)


@pytest.mark.parametrize(
    ("costs_s", "count", "expected"),
    [
        ([3, 1, 1, 1], 2, [0]),
        ([1, 1, 1, 3], 2, [2]),
        ([1, 1, 1, 1, 1, 1, 1, 1], 2, [3]),
        ([1, 1, 1, 1, 1, 1, 1, 1], 4, [1, 3, 5]),
        ([5, 1, 1, 1, 5, 1, 1, 1], 3, [0, 4]),
    ],
)
def test_exits_lie_at_even_shares_of_the_measured_time(
    monkeypatch: pytest.MonkeyPatch, costs_s: list[float], count: int, expected: list[int]
) -> None:
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(placement, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))
    assert choose(Slow(clock, costs_s), X, count) == [Cut(f"blocks.{index}") for index in expected]


@pytest.mark.parametrize("held_up", [0, 1, 2])
def test_one_run_held_up_does_not_hide_the_last_block(
    monkeypatch: pytest.MonkeyPatch, held_up: int
) -> None:
    clock = SimpleNamespace(now_s=0.0)
    runs = itertools.count()

    class HeldUp(Slow):
        def forward(self, x: Tensor) -> Tensor:
            self.costs_s = [1000, 1, 1, 1] if next(runs) == held_up else [1, 1, 1, 1]
            return super().forward(x)

    monkeypatch.setattr(placement, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))
    assert choose(HeldUp(clock, [1, 1, 1, 1]), X, 5) == [
        Cut(f"blocks.{index}") for index in range(4)
    ]


def test_one_slow_run_does_not_move_the_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now_s=0.0)
    runs = itertools.count()

    class Hiccup(Slow):
        def forward(self, x: Tensor) -> Tensor:
            self.costs_s = [1, 1, 1, 30] if next(runs) in (1, 4, 5, 7) else [1, 1, 1, 1]
            return super().forward(x)

    monkeypatch.setattr(placement, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))
    assert choose(Hiccup(clock, [1, 1, 1, 1]), X, 2) == [Cut("blocks.1")]


def test_coarse_blocks_are_taken_when_they_suffice_and_finer_ones_when_not() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x))

    model = nn.Sequential(nn.Sequential(Stage(), Stage(), Stage()), nn.Linear(8, 3))
    assert list(_levels(model))[:2] == [
        ["0.0", "0.1", "0.2"],
        [f"0.{stage}.blocks.{i}" for stage in (0, 1, 2) for i in (0, 1)],
    ]
    assert {cut.module for cut in choose(model, X, 3, repeats=1)} <= {"0.0", "0.1", "0.2"}
    assert all(".blocks." in cut.module for cut in choose(model, X, 5, repeats=1))


@pytest.mark.parametrize(
    ("costs_s", "expected"),
    [
        ([[1, 1], [1, 1], [1, 1], [1, 1]], ["0.0", "0.1", "0.2"]),
        # uneven, but nowhere by a fifth
        ([[1, 1], [1, 1], [3, 1], [4, 1]], ["0.0", "0.1", "0.2"]),
        ([[1, 1], [1, 1], [8, 9], [2, 1]], ["0.1.blocks.1", "0.2.blocks.0", "0.2.blocks.1"]),
        # finer blocks are no better
        ([[9, 1], [1, 1], [1, 1], [1, 1]], ["0.0", "0.1", "0.2"]),
    ],
)
def test_finer_blocks_are_taken_where_coarse_ones_lie_far_from_even_shares(
    monkeypatch: pytest.MonkeyPatch, costs_s: list[list[float]], expected: list[str]
) -> None:
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(placement, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))

    class Stage(nn.Module):
        def __init__(self, costs_s: list[float]) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.costs_s = costs_s

        def forward(self, x: Tensor) -> Tensor:
            for block, cost_s in zip(self.blocks, self.costs_s, strict=True):
                clock.now_s += cost_s
                x = block(x)
            return x

    model = nn.Sequential(nn.Sequential(*(Stage(costs) for costs in costs_s)), nn.Linear(8, 3))
    assert [str(cut) for cut in choose(model, X, 4)] == expected


def test_features_that_do_not_begin_with_the_batch_are_named() -> None:
    class TimeFirst(nn.Module):
        """Like XLNet: [T, B, D] inside."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block(), Block()])
            self.classifier = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1)
            for block in self.blocks:
                x = block(x)
            return self.classifier(x.mean(0))

    with pytest.raises(
        ExitNotFound,
        match=r"0 places.*blocks\.0: its features, of shape \(5, 2, 8\), have .* dimension 1",
    ):
        choose(TimeFirst(), torch.randn(2, 5, 8), 2)


class Sideways(nn.Module):
    """Blocks of which some are on a side path that is not used."""

    def __init__(
        self, idle: Sequence[int], *, tuples: bool = False, zero_head: bool = False
    ) -> None:
        super().__init__()
        aside: Callable[[Tensor], Any] = lambda x: (-x, x + 1)  # noqa: E731
        self.blocks = nn.ModuleList(
            Former(aside) if tuples and index in idle else Block() for index in range(6)
        )
        self.classifier = nn.Linear(8, 3)
        self.idle = idle
        if zero_head:
            nn.init.zeros_(self.classifier.weight)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            given = block(x)
            x = given[1] if isinstance(given, tuple) else x if index in self.idle else given
        return self.classifier(x)


@pytest.mark.parametrize("idle", [(), (2,), (0, 2, 4), (1, 2, 3), (5,), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("tuples", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_blocks_on_side_paths_are_left_out(idle: Sequence[int], count: int, tuples: bool) -> None:
    useful = [f"blocks.{index}" for index in range(6) if index not in idle]
    model = Sideways(idle, tuples=tuples)
    if len(useful) < count - 1:
        with pytest.raises(ExitNotFound):
            choose(model, X, count, repeats=1)
    else:
        assert {cut.module for cut in choose(model, X, count, repeats=1)} <= set(useful)


def test_calls_of_one_block_on_side_paths_are_left_out() -> None:
    class SomeCalls(Repeated):
        def forward(self, x: Tensor) -> Tensor:
            for index in range(self.times):
                y = self.groups[0](x)
                x = x if index % 2 else y
            return self.classifier(x)

    assert [cut.call for cut in choose(SomeCalls(times=6), X, 4, repeats=1)] == [0, 2, 4]


def test_head_of_zeros_does_not_hide_the_blocks() -> None:
    assert choose(Sideways((), zero_head=True), X, 4, repeats=1) == choose(
        Sideways(()), X, 4, repeats=1
    )


def test_trying_what_matters_changes_neither_weights_nor_input() -> None:
    model = nn.Sequential(
        *(nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity())) for _ in range(4)),
        nn.Linear(8, 3),
    )
    x = torch.randn(2, 8)
    before = [parameter.clone() for parameter in model.parameters()]
    kept = x.clone()
    choose(model, x, 3, repeats=1)
    assert torch.equal(x, kept)
    assert all(
        torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True)
    )


def test_chosen_places_are_logged(
    toy: nn.Module, toy_input: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="impatient"):
        network = attach_exits(toy, example=toy_input, count=3)
    for name in network.exit_names[:-1]:
        assert name in caplog.text


def test_one_exit_is_the_backbones_own(toy: nn.Module, toy_input: Tensor) -> None:
    assert attach_exits(toy, example=toy_input, count=1).exit_names == ("output",)


@pytest.mark.parametrize("count", [0, -2])
def test_fewer_than_one_exit_is_refused(toy: nn.Module, toy_input: Tensor, count: int) -> None:
    with pytest.raises(ExitNotFound, match=f"count={count}; expected at least 1"):
        attach_exits(toy, example=toy_input, count=count)


def test_more_exits_than_places_is_refused_naming_the_places(
    toy: nn.Module, toy_input: Tensor
) -> None:
    with pytest.raises(
        ExitNotFound,
        match=r"ToyBackbone has \d+ places.*blocks\.0.*asked for 39.*Lower count.*after=",
    ):
        attach_exits(toy, example=toy_input, count=40)


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(ExitNotFound, match=r"Linear has 0 places.*none"):
        attach_exits(nn.Linear(8, 3), example=X, count=2)


class Awkward(nn.Module):
    """Blocks whose features no head can read.

    They are integers, no tensor, of another batch size, or of six dimensions.
    """

    def __init__(self) -> None:
        super().__init__()
        six_dimensions: Callable[[Tensor], Any] = lambda x: x[:, :, None, None, None, None]  # noqa: E731
        forms = [
            lambda x: x.long(),
            lambda x: "text",
            lambda x: x.repeat(2, 1),
            six_dimensions,
            lambda x: x,
        ]
        self.blocks = nn.ModuleList(Former(form) for form in forms)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            block(x)
        return self.classifier(x)


class Former(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.inner(x))


def test_blocks_whose_features_no_head_can_read_are_passed_over() -> None:
    assert choose(Awkward(), X, 2, repeats=1) == [Cut("blocks.4")]
    with pytest.raises(
        ExitNotFound, match=r"has 1 places.*\(blocks\.4\).*Passed over, for one: blocks\.0: .*int64"
    ):
        choose(Awkward(), X, 3, repeats=1)


def test_finer_blocks_that_are_of_less_use_do_not_replace_coarser_ones() -> None:
    class Hollow(Block):
        """A block made of two blocks whose features no head can read."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([Former(lambda x: x.long()), Former(lambda x: x.long())])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.inner:
                block(x)
            return super().forward(x)

    model = nn.Sequential(nn.Sequential(Hollow(), Hollow(), Hollow()), nn.Linear(8, 3))
    with pytest.raises(ExitNotFound, match=r"has 3 places .*\(0\.0, 0\.1, 0\.2\)"):
        choose(model, X, 5)


# --- where a user says ----------------------------------------------------------------------------


def cut_after(model: nn.Module, *after: str, x: Tensor = X) -> MultiExitNetwork:
    return attach_exits(model, example=x, after=list(after))


def test_names_are_taken_as_given() -> None:
    assert cut_after(Nested(), "stem.0", "layer1.1", "layer3").exit_names == (
        "stem.0",
        "layer1.1",
        "layer3",
        "output",
    )


@pytest.mark.parametrize(
    ("wrong", "candidates"),
    [
        ("layer5", ["layer1", "layer2", "layer3"]),
        ("layer1.7", ["layer1.1", "layer1"]),
        ("Layer2", ["layer2"]),
        ("nonsense", ["stem", "layer1", "layer2", "layer3", "fc"]),
        ("", ["layer1"]),
        ("layer9@1", ["layer1"]),
    ],
)
def test_wrong_name_is_refused_with_candidates(wrong: str, candidates: list[str]) -> None:
    with pytest.raises(ExitNotFound, match=r"no module .* in Nested; candidates:") as caught:
        cut_after(Nested(), "stem", wrong)
    listed = str(caught.value).split("candidates: ")[1].rstrip(".").split(", ")
    assert set(candidates) <= set(listed)


def test_nearest_names_come_first() -> None:
    with pytest.raises(ExitNotFound, match=r"candidates: layer2\.1, "):
        cut_after(Nested(), "layr2.1")


def test_one_string_is_refused_with_the_list_that_was_meant(toy: nn.Module) -> None:
    with pytest.raises(
        ExitNotFound, match=r"after='blocks\.0' is one string.*after=\['blocks\.0'\]"
    ):
        attach_exits(toy, example=X, after="blocks.0")


def test_module_called_several_times_needs_a_call_number() -> None:
    with pytest.raises(
        AmbiguousCut, match=r"called 3 times.*groups\.0@0, groups\.0@1, groups\.0@2"
    ):
        cut_after(Repeated(times=3), "groups.0")
    network = cut_after(Repeated(times=3), "groups.0@0", "groups.0@2")
    assert network.exit_names == ("groups.0@0", "groups.0@2", "output")
    # the names are those that are asked for
    assert cut_after(Repeated(times=3), *network.exit_names[:-1]).cuts == network.cuts
    with pytest.raises(CutOrderError, match=r"order: \['groups\.0@0', 'groups\.0@2'\]"):
        cut_after(Repeated(times=3), "groups.0@2", "groups.0@0")


def test_cuts_of_older_files_keep_their_names() -> None:
    cuts = [Cut.named("groups.0"), Cut.named("groups.0@1")]
    network = attach_exits(Repeated(times=3), example=X, after=cuts)
    assert network.exit_names == ("groups.0", "groups.0@1", "output")


def test_call_number_too_high_is_refused() -> None:
    with pytest.raises(
        ExitNotFound, match=r"called 3 times on the example; there is no groups\.0@3"
    ):
        cut_after(Repeated(times=3), "groups.0@3")


def test_first_call_may_be_named_or_not(toy: nn.Module) -> None:
    assert (
        cut_after(toy, "blocks.1@0").cuts == cut_after(toy, "blocks.1").cuts == (Cut("blocks.1"),)
    )


def test_module_the_example_never_calls_is_refused() -> None:
    with pytest.raises(ExitNotFound, match="'unused' exists, but the example never calls it"):
        cut_after(Repeated(), "unused")


@pytest.mark.parametrize(
    "after",
    [("layer2", "layer1"), ("layer1", "layer1.0"), ("layer1", "layer2", "layer2"), ("fc", "stem")],
)
def test_names_out_of_running_order_or_twice_are_refused_with_the_right_order(
    after: tuple[str, ...],
) -> None:
    right = [name for name in ("stem", "layer1.0", "layer1", "layer2", "fc") if name in after]
    with pytest.raises(CutOrderError, match="expected each once, from shallow to deep") as caught:
        cut_after(Nested(), *after)
    assert str(caught.value).endswith(f"In running order: {right}.")


def test_same_call_named_in_two_ways_is_refused(toy: nn.Module) -> None:
    with pytest.raises(CutOrderError):
        cut_after(toy, "blocks.1", "blocks.1@0")


def test_order_is_that_of_running_not_of_definition() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Linear(8, 3)
            self.early = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.late(self.early(x))

    assert cut_after(Backwards(), "early", "late").exit_names == ("early", "late", "output")
    with pytest.raises(CutOrderError):
        cut_after(Backwards(), "late", "early")


def test_errors_can_be_caught_as_ours_and_as_value_errors() -> None:
    for kind in (ExitNotFound, AmbiguousCut, CutOrderError):
        assert issubclass(kind, ImpatientError)
        assert issubclass(kind, ValueError)


# --- what placing leaves behind -------------------------------------------------------------------


def hooks_and_modes(model: nn.Module) -> list[tuple[bool, int]]:
    return [(module.training, len(module._forward_hooks)) for module in model.modules()]


def mixed_modes() -> Nested:
    model = Nested().train()
    # a frozen batch norm
    model.stem[1].eval()
    model.layer2[0].eval()
    return model


@pytest.mark.parametrize("after", ["auto", ["layer1"]])
def test_each_modules_mode_is_put_back_after_attaching(after: Any) -> None:
    model = mixed_modes()
    modes = [module.training for module in model.modules()]
    assert True in modes
    assert False in modes
    attach_exits(model, example=X, after=after, count=3)
    assert [module.training for module in model.modules()] == modes


def test_statistics_gradients_and_random_state_are_untouched_by_attaching() -> None:
    model = mixed_modes()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attach_exits(model, example=torch.randn(4, 8), count=3)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_refused_attachment_leaves_the_model_as_it_was() -> None:
    model = mixed_modes()
    before = hooks_and_modes(model)
    for wrong in (["layer9"], ["layer2", "layer1"], "layer1"):
        with pytest.raises(ExitNotFound if wrong != ["layer2", "layer1"] else CutOrderError):
            attach_exits(model, example=X, after=wrong)
    with pytest.raises(NetworkError):
        attach_exits(model, example=torch.ones(2, 9), count=3)
    with pytest.raises(RuntimeError):
        trace(model, torch.ones(2, 9), ["layer1"])
    assert hooks_and_modes(model) == before


def test_attaching_leaves_one_hook_per_cut_module_and_no_other() -> None:
    model = Nested()
    attach_exits(model, example=X, after=["layer1", "layer2"])
    attach_exits(model, example=X, count=4)
    hooked = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    assert max(hooked.values()) == hooked["layer1"] == hooked["layer2"] == 1


def test_modes_come_back_after_an_error() -> None:
    model = mixed_modes()
    modes = [module.training for module in model.modules()]
    with contextlib.suppress(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes


def test_trace_notes_calls_times_and_outputs_in_order() -> None:
    traced = trace(Repeated(times=3), X, ["groups.0", "classifier"])
    assert list(traced.ended_s) == [
        ("groups.0", 0),
        ("groups.0", 1),
        ("groups.0", 2),
        ("classifier", 0),
    ]
    assert traced.calls("groups.0") == 3
    assert traced.calls("unused") == 0
    times = list(traced.ended_s.values())
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] <= traced.total_s
    assert traced.features["classifier", 0].shape == (2, 3)
    assert trace(Repeated(), X, ["groups.0"], features=False).features == {}


def test_resolve_gives_cuts_with_calls() -> None:
    assert resolve(Repeated(), X, ["groups.0@1", "groups.0@3"]) == [
        Cut("groups.0", 1),
        Cut("groups.0", 3),
    ]
    assert resolve(Repeated(), X, []) == []


# --- even shares ----------------------------------------------------------------------------------


def distance(shares: list[float], chosen: tuple[int, ...], count: int) -> float:
    return sum(
        (shares[index] - target / count) ** 2 for target, index in enumerate(chosen, start=1)
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=9).map(sorted), st.data())
def test_even_shares_are_the_best_of_all_choices(shares: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(2, len(shares) + 1))
    chosen = _even(shares, count)
    assert len(chosen) == count - 1
    assert list(chosen) == sorted(set(chosen))
    best = min(
        distance(shares, others, count)
        for others in itertools.combinations(range(len(shares)), count - 1)
    )
    assert distance(shares, chosen, count) == pytest.approx(best, abs=1e-12)


# squares: two small distances, not a perfect one and a large one
@pytest.mark.parametrize(
    ("shares", "count", "chosen"),
    [
        ([0.25, 0.5, 0.75], 4, (0, 1, 2)),
        ([0.1, 0.5, 0.52, 0.9], 2, (1,)),
        ([0.9, 0.95, 0.99], 4, (0, 1, 2)),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 3, (2, 6)),
        ([0.5], 2, (0,)),
        (
            [0.05, 0.6, 0.75],
            3,
            (1, 2),
        ),
    ],
)
def test_even_shares_of_known_cases(
    shares: list[float], count: int, chosen: tuple[int, ...]
) -> None:
    assert _even(shares, count) == chosen


def test_prices_count_as_squared_distances() -> None:
    shares = [0.2, 0.25, 0.35, 0.7]
    assert _even(shares, 2, [0.0] * 4) == _even(shares, 2) == (2,)
    assert _even(shares, 2, [0.0, 0.0, 0.03, 0.0]) == (3,)
    assert _even(shares, 3, [0.0, 0.0, 1.0, 1.0]) == (0, 1)


class Narrowing(nn.Module):
    """Blocks of which the third hands on a tenth of the bytes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 80, 80, 8, 80, 80)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(before, width), nn.ReLU())
            for before, width in itertools.pairwise(widths)
        )
        self.last = nn.Linear(80, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def test_for_an_engine_exits_are_placed_where_few_bytes_cross(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Narrowing(), torch.randn(2, 8)
    shares = {"blocks.0": 0.2, "blocks.1": 0.45, "blocks.2": 0.58, "blocks.3": 0.8}

    def measured(*given: object) -> list[float]:
        cuts: Any = given[2]
        return [shares.get(cut.module, 0.9) for cut in cuts]

    monkeypatch.setattr(placement, "_shares", measured)

    def placed(count: int, engine: str) -> list[str]:
        return [str(cut) for cut in choose(model, x, count, engine=engine)]

    assert placed(2, "eager") == placed(2, "onnxruntime-session") == ["blocks.1"]
    assert placed(2, "onnxruntime") == placed(2, "openvino") == ["blocks.2"]
    # not at any price
    shares["blocks.2"] = 0.7
    assert placed(2, "onnxruntime") == ["blocks.1"]
    network = attach_exits(model, example=x, count=2, engine="onnxruntime")
    assert network.exit_names[:-1] == ("blocks.1",)
    with pytest.raises(NetworkError, match="engine='tensorrt'; expected one of eager") as refused:
        attach_exits(model, example=x, engine="tensorrt")
    assert not isinstance(refused.value, ExitNotFound)


# --- a period apart -------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 12), st.data())
def test_a_period_apart_are_the_blocks_the_paper_counts(blocks: int, data: st.DataObject) -> None:
    period = data.draw(st.integers(1, blocks - 1))
    model = nn.Sequential(*(Block() for _ in range(blocks)), nn.Linear(8, 3))
    predicting = list(range((blocks - 1) % period, blocks, period))
    # the last block predicts always: through the output
    assert predicting[-1] == blocks - 1
    assert every(model, X, period) == [Cut(str(index)) for index in predicting[:-1]]


def test_a_period_counts_the_outermost_blocks_and_the_calls_of_one() -> None:
    assert [str(cut) for cut in every(Nested(), X, 2)] == ["layer1.1", "layer2.1"]
    assert [str(cut) for cut in every(Repeated(times=4), X, 2)] == ["groups.0@1"]


def test_a_period_does_not_depend_on_the_time_that_blocks_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(placement, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))
    # its last block ends so late that nothing seems to follow
    slow = Slow(clock, [1, 1, 1, 1000])
    assert every(slow, X, 1) == [Cut(f"blocks.{index}") for index in range(3)]
    assert every(Slow(clock, [1000, 1, 1, 1]), X, 3) == [Cut("blocks.0")]


def test_a_period_passes_over_blocks_whose_features_no_head_can_read() -> None:
    class Half(Awkward):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                Former(lambda x: x) if index % 2 else Former(lambda x: x.long())
                for index in range(6)
            )

    assert every(Half(), X, 1) == [Cut("blocks.1"), Cut("blocks.3")]


@pytest.mark.parametrize("period", [0, -2, 6, 7])
def test_a_period_that_leaves_no_early_exit_is_refused(period: int) -> None:
    with pytest.raises(
        ExitNotFound,
        match=rf"a period of {period} blocks; Nested has 6 .*layer1\.0.*expected 1 to 5.*after=",
    ):
        every(Nested(), X, period)


def test_a_period_of_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ExitNotFound, match=r"Linear has no repeated blocks.*after="):
        every(nn.Linear(8, 3), X, 1)


def test_an_interruption_in_every_run_moves_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = [placement.Cut(name, 0) for name in "abc"]
    numbers = itertools.count()

    def interrupted(*_: object, **__: object) -> SimpleNamespace:
        # four stretches of 1 s each, of which one takes 10 s; another one in every run
        spoiled = next(numbers) % 4
        ends = list(itertools.accumulate(10.0 if at == spoiled else 1.0 for at in range(4)))
        ended_s = {(cut.module, cut.call): end for cut, end in zip(cuts, ends, strict=False)}
        return SimpleNamespace(ended_s=ended_s, total_s=ends[-1])

    monkeypatch.setattr(placement, "trace", interrupted)
    shares = placement._shares(nn.Identity(), None, cuts, repeats=5)
    assert shares == pytest.approx([0.25, 0.5, 0.75])
