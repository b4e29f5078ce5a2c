"""Runs that go on with some samples, and the trial for it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impatient.anytime import Exit
from impatient.errors import NetworkError
from impatient.networks import MultiExitNetwork, attach_exits
from impatient.networks.shrinking import kind_of, probe

WIDTH = 8
CLASSES = 3
CUTS = ["blocks.0", "blocks.1"]


class Chain(nn.Module):
    """Three blocks that record how many rows they ran on.

    Only the features cross a cut.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)
        )
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            self.rows.append(len(x))
            x = block(x)
        return self.classifier(x)


class Skipping(Chain):
    """Its input comes back after the second cut."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.classifier(x)


class Counting(Chain):
    """Takes the size of the batch from its input."""

    def forward(self, x: Tensor) -> Tensor:
        count = len(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.view(count, WIDTH))


class Centred(Chain):
    """Every sample's output depends on the others'."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) - x.mean(0)
        return self.classifier(x)


class Ordered(Chain):
    """A model that looks up a stored value of each sample by place.

    With fewer samples the number of values is right, but their rows are wrong.
    """

    from_end = False

    def forward(self, x: Tensor) -> Tensor:
        known = x.amax(1, keepdim=True)
        output = super().forward(x)
        return output + (known[-len(output) :] if self.from_end else known[: len(output)])


class OrderedFromEnd(Ordered):
    from_end = True


class InPlace(Chain):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).mul_(2.0)
        return self.classifier(x)


@dataclass
class Output:
    features: Tensor
    note: str


class Wrapped(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.linear(x).tanh())


class Wrapping(nn.Module):
    """Blocks that return more than a tensor."""

    def __init__(self, wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Wrapped(wrap) for _ in range(3))
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.unwrap = unwrap

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.unwrap(block(x))
        return self.classifier(x)


class Attending(nn.Module):
    """A model of token ids and an optional mask, which all blocks see.

    A mask that masks nothing is dropped, as libraries do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(3)
        )
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        padding = None if mask is None or bool(mask.all()) else mask == 0
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=padding)
        return self.classifier(x.mean(1))


def attach(model: nn.Module, x: Any = None) -> MultiExitNetwork:
    return attach_exits(model, after=CUTS, example=torch.zeros(1, WIDTH) if x is None else x).eval()


def x_of(batch: int = 5) -> Tensor:
    return torch.randn(batch, WIDTH)


def assert_rows(found: Tensor, whole: Tensor, rows: list[int]) -> None:
    # rows that are equal would be right in any order
    assert whole.std(0).min() > 1e-3
    torch.testing.assert_close(found, whole[rows])


# --- keep -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[4, 0], [3], [0, 1, 2, 3, 4], [2, 2, 1]])
def test_later_exits_have_the_rows_that_were_kept_in_their_order(rows: list[int]) -> None:
    network = attach(Chain())
    x = x_of()
    whole = network(x)
    with network.exits(x) as run:
        assert_rows(next(run).output(), whole[0], list(range(5)))
        run.keep(rows)
        for exit in run:
            assert_rows(exit.output(), whole[exit.index], rows)


def test_the_deeper_stages_run_on_the_kept_rows_only() -> None:
    network = attach(Chain())
    network.shrinks(x_of())
    network.backbone.rows.clear()
    with network.exits(x_of()) as run:
        next(run)
        run.keep([4, 1])
        next(run)
        run.keep(torch.tensor([1]))
        next(run)
    assert network.backbone.rows == [5, 2, 1]


def test_keeping_twice_at_an_exit_keeps_some_of_the_kept() -> None:
    network = attach(Chain())
    x = x_of()
    whole = network(x)
    with network.exits(x) as run:
        next(run)
        run.keep([4, 3, 0])
        run.keep([2, 0])
        assert_rows(next(run).output(), whole[1], [0, 4])


def test_the_exit_at_hand_keeps_all_its_rows_after_keep() -> None:
    network = attach(Chain())
    x = x_of()
    whole = network(x)
    with network.exits(x) as run:
        exit = next(run)
        run.keep([4, 0])
        assert_rows(exit.output(), whole[0], [0, 1, 2, 3, 4])


def test_gradients_flow_back_to_the_kept_samples_only() -> None:
    network = attach(Chain())
    x = x_of().requires_grad_()
    with network.exits(x) as run:
        next(run)
        run.keep([3, 1])
        next(run).output().sum().backward()
    assert x.grad is not None
    assert [bool(row.any()) for row in x.grad] == [False, True, False, True, False]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_keep_works_in_every_mode(mode: Any) -> None:
    network = attach(InPlace())
    x = x_of()
    whole = [output.detach() for output in network(x)]
    with mode(), network.exits(x) as run:
        next(run)
        run.keep([2, 0])
        assert_rows(next(run).output().detach(), whole[1], [2, 0])
        assert_rows(next(run).output().detach(), whole[2], [2, 0])


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: (x, None), lambda output: output[0]),
        (lambda x: {"x": x, "n": 1}, lambda output: output["x"]),
        (lambda x: Output(x, "hidden"), lambda output: output.features),
    ],
    ids=["tuple", "mapping", "dataclass"],
)
def test_features_inside_another_value_are_reduced_there(wrap: Any, unwrap: Any) -> None:
    network = attach(Wrapping(wrap, unwrap))
    x = x_of()
    assert network.shrinks(x)
    whole = network(x)
    with network.exits(x) as run:
        next(run)
        run.keep([3, 1])
        assert_rows(next(run).output(), whole[1], [3, 1])
        assert_rows(next(run).output(), whole[2], [3, 1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("way", ["paused", "straight"])
def test_kept_rows_stay_in_their_memory_format(layout: torch.memory_format, way: str) -> None:
    convolutions = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)]
    backbone = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    x = torch.randn(5, 4, 6, 6)
    network = attach_exits(backbone, example=x, after=["0"]).eval()
    network.to(memory_format=layout)
    seen: list[Tensor] = []

    def kept(exit: Exit) -> bool:
        if exit.index == 0:
            run.keep([3, 1])
        return False

    with torch.inference_mode(), network.exits(x.to(memory_format=layout)) as run:
        network.shrinks(x)
        backbone[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        if way == "straight":
            run.walk(kept)
        else:
            for exit in run:
                kept(exit)
    [features] = seen
    assert len(features) == 2
    assert features.is_contiguous(memory_format=layout)


def test_keep_before_the_first_exit_or_after_the_last_is_an_error() -> None:
    network = attach(Chain())
    with network.exits(x_of()) as run:
        with pytest.raises(NetworkError, match="after an exit"):
            run.keep([0])
        for _ in run:
            pass
        with pytest.raises(NetworkError, match="after an exit"):
            run.keep([0])


def test_a_network_that_does_not_shrink_says_what_to_do_and_goes_on_with_all() -> None:
    network = attach(Skipping())
    x = x_of()
    whole = network(x)
    with network.exits(x) as run:
        next(run)
        with pytest.raises(NetworkError, match="to_engine"):
            run.keep([0, 2])
        assert_rows(next(run).output(), whole[1], [0, 1, 2, 3, 4])


def test_one_kept_row_that_is_broadcast_over_the_old_batch_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = attach(Skipping())
    # as if the trial had missed it
    monkeypatch.setattr(network, "shrinks", lambda x: True)
    with network.exits(x_of()) as run:
        next(run)
        run.keep([2])
        next(run)
        with pytest.raises(
            NetworkError, match=r"after keep\(\) of 1 samples, exit 2 has shape \(5, 3\)"
        ):
            next(run)


# --- shrinks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shrinks"),
    [
        (Chain, True),
        (InPlace, True),
        (Skipping, False),
        (Counting, False),
        (Centred, False),
        (Ordered, False),
        (OrderedFromEnd, False),
    ],
)
def test_networks_are_found_to_shrink_or_not(model: Callable[[], nn.Module], shrinks: bool) -> None:
    assert attach(model()).shrinks(x_of()) is shrinks


@pytest.mark.parametrize(
    "x", [torch.zeros(1, WIDTH), torch.randn(7, WIDTH), torch.full((2, WIDTH), 3.0)]
)
def test_any_input_of_the_kind_will_do(x: Tensor) -> None:
    assert attach(Chain()).shrinks(x)


def test_a_mask_that_crosses_the_cuts_is_found_even_where_it_masks_nothing() -> None:
    ids = torch.randint(2, 20, (2, 6))
    network = attach(Attending(), (ids,))
    assert network.shrinks((ids,))
    assert not network.shrinks((ids, torch.ones_like(ids)))
    assert not network.shrinks({"ids": ids, "mask": torch.ones(2, 6, dtype=torch.bool)})


def test_batch_statistics_do_not_shrink_in_training_mode() -> None:
    model = nn.Sequential(
        *(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh())
            for _ in range(3)
        )
    )
    network = attach_exits(model, after=["0", "1"], example=torch.zeros(1, WIDTH))
    assert not network.train().shrinks(x_of())
    assert network.eval().shrinks(x_of())
    kept = attach_exits(model.eval(), after=["0", "1"], example=torch.zeros(1, WIDTH)).eval()
    # one layer that somebody forgot
    kept.backbone[1][1].train()
    assert not kept.shrinks(x_of())


def test_the_trial_is_made_once_per_kind_of_input() -> None:
    network = attach(Chain())
    names = list(network.state_dict())
    network.backbone.rows.clear()
    assert network.shrinks(x_of())
    assert network.backbone.rows == [4, 4, 4, 4, 3, 2]
    assert network.shrinks(x_of(9))
    assert len(network.backbone.rows) == 6
    # another kind
    assert network.shrinks({"x": x_of()})
    assert len(network.backbone.rows) == 12
    assert list(network.state_dict()) == names


def test_the_trial_draws_no_random_numbers() -> None:
    network = attach(Chain())
    x = x_of()
    before = torch.random.get_rng_state()
    network.shrinks(x)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_network_whose_outputs_are_all_equal_is_tried_again() -> None:
    network = attach(Chain())
    weight = network.backbone.classifier.weight.detach().clone()
    nn.init.zeros_(network.backbone.classifier.weight)
    assert not network.shrinks(x_of())
    network.backbone.classifier.weight.data.copy_(weight)
    assert network.shrinks(x_of())


def test_why_a_network_does_not_shrink_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        attach(Skipping()).shrinks(x_of())
    assert "do not shrink: RuntimeError: The size of tensor" in caplog.text


def test_several_threads_may_ask_at_once() -> None:
    network = attach(Chain())
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(network.shrinks(x_of()))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


# --- made-up samples ------------------------------------------------------------------------------


def test_made_up_samples_differ_and_have_the_kind_of_the_input() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.ones(1, 4, dtype=torch.long)
    x = {
        "image": torch.zeros(1, 3, 4, 4),
        "ids": ids,
        "mask": mask,
        "flag": True,
        "scale": torch.tensor(2.0),
    }
    made = probe(x, 3)
    assert kind_of(made) == kind_of(x)
    assert len({tuple(row.flatten().tolist()) for row in made["image"]}) == 3
    assert made["ids"].tolist() == [[5, 6, 7, 8], [8, 5, 6, 7], [7, 8, 5, 6]]
    assert made["mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert (made["flag"], made["scale"]) == (True, torch.tensor(2.0))


def test_no_mask_ever_masks_everything() -> None:
    assert probe(torch.ones(2, 3, dtype=torch.bool), 8).any(1).all()


def test_a_mask_of_infinities_stays_as_it_is() -> None:
    mask = torch.tensor([[0.0, -torch.inf]])
    assert probe(mask, 3).tolist() == mask.tolist() * 3
