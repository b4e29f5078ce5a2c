"""Networks cut into parts by torch.export: outputs as those of the eager staged run, whatever
crosses the cuts.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impatient.engines.partition import Parts, input_names, input_tensors, partition
from impatient.errors import ExitNotReached, ExportFailed, NetworkError
from impatient.networks import MultiExitNetwork, attach_exits, load_model
from impatient.networks.combined_exits import RunningEnsemble
from impatient.networks.specs import import_torchvision
from impatient.portable import Staged, StagedRun
from toys import ToyBackbone

Batch = Callable[[int], Any]


def vectors(batch: int) -> Tensor:
    return torch.randn(batch, 8)


def images(size: int) -> Batch:
    return lambda batch: torch.randn(batch, 3, size, size)


def masked_tokens(batch: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, 9, dtype=torch.long)
    mask[0, 5:] = 0
    return {"input_ids": torch.randint(1, 64, (batch, 9)), "attention_mask": mask}


class Skip(nn.Module):
    """Two values are alive at the second cut, and the batch's size is computed with after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        deeper = self.second(hidden.relu())
        halves = deeper.view(x.shape[0] * 2, 4).exp().view(x.shape[0], 8)
        return self.last(self.third(halves) + hidden)


class Shared(nn.Module):
    """One block, called four times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.block(x)
        return self.last(x)


class Overwriting(nn.Module):
    """The layers after the cuts write over the features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3),
            nn.ReLU(inplace=True),
            nn.Dropout(),
        )
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(x).mean((2, 3)))


class TwoInputs(nn.Module):
    """Positions, one of them a table without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: float, table: Tensor) -> Tensor:
        return self.last(self.first(x).relu() * scale + table)


def vision_transformer() -> nn.Module:
    model = import_torchvision().models.VisionTransformer(
        image_size=16,
        patch_size=8,
        num_layers=3,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=7,
    )
    # torchvision's zeros would make any comparison pass
    nn.init.normal_(model.heads.head.weight)
    return model


def bert() -> nn.Module:
    options = (
        "num_hidden_layers=3,hidden_size=32,num_attention_heads=2,"
        "intermediate_size=64,vocab_size=64"
    )
    return load_model(f"transformers:BertConfig:{options}", num_classes=7)


def positions(batch: int) -> tuple[Tensor, float, Tensor]:
    return torch.randn(batch, 8), 0.5, torch.arange(8.0)[None].expand(7, 8)[0]


@dataclasses.dataclass
class Case:
    build: Callable[[], nn.Module]
    batch: Batch
    after: Any
    exact: bool = True


CASES = {
    "toy": Case(ToyBackbone, vectors, ["blocks.0", "blocks.2"]),
    "skip": Case(Skip, vectors, ["first", "second"]),
    "shared": Case(Shared, vectors, ["block@0", "block@2"]),
    "overwriting": Case(Overwriting, images(12), ["layers.0", "layers.2"]),
    "two inputs": Case(TwoInputs, positions, ["first"]),
    "preactivated": Case(
        lambda: load_model("impatient:resnet:n=1,c=4", num_classes=5, in_channels=3),
        images(16),
        "every:1",
    ),
    "resnet18": Case(
        lambda: load_model("torchvision:resnet18", num_classes=7),
        images(64),
        ["layer1.1", "layer2.0.bn1"],
    ),
    "vision transformer": Case(
        vision_transformer,
        images(16),
        ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"],
        exact=False,
    ),
    "bert": Case(bert, masked_tokens, ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
}


@dataclasses.dataclass
class Cut:
    case: Case
    network: MultiExitNetwork
    parts: Parts

    def run(self, x: Any) -> StagedRun:
        values = input_tensors(x, self.parts.wiring.inputs)
        return Staged(self.parts.wiring, self.parts.stages, self.parts.heads)(values)

    def agree(self, one: Tensor, other: Tensor) -> bool:
        if self.case.exact:
            return torch.equal(one, other)
        return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


@pytest.fixture(scope="module", params=CASES)
def cut(request: pytest.FixtureRequest) -> Cut:
    torch.manual_seed(0)
    case = CASES[request.param]
    network = attach_exits(case.build(), after=case.after, example=case.batch(1)).eval()
    return Cut(case, network, partition(network, case.batch(1)))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def rows_of(x: Any, rows: list[int]) -> Any:
    """The same samples of an input of any kind; the batch is the first tensor's."""
    if isinstance(x, Tensor):
        return x[rows]
    if isinstance(x, tuple):
        return (x[0][rows], *x[1:])
    return {name: value[rows] for name, value in x.items()}


# --- equal to the eager run -----------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_outputs_equal_those_of_the_eager_run(cut: Cut, batch: int) -> None:
    x = cut.case.batch(batch)
    with cut.network.exits(x) as run:
        wanted = [exit.output() for exit in run]
    given = [exit.output() for exit in cut.run(x)]
    assert len(given) == cut.network.num_exits
    for one, other in zip(given, wanted, strict=True):
        assert cut.agree(one, other)
        # zeros would prove nothing
        assert float(other.std()) > 1e-4
    assert cut.agree(cut.parts.whole(*input_tensors(x, cut.parts.wiring.inputs)), wanted[-1])


def test_outputs_hang_on_the_features_at_every_cut(cut: Cut) -> None:
    x = cut.case.batch(2)
    untouched = [exit.output() for exit in cut.run(x)]
    for place in range(cut.network.num_exits - 1):
        run = cut.run(x)
        changed = []
        for exit in run:
            changed.append(exit.output())
            if exit.index == place:
                name = cut.parts.wiring.features[place]
                if name not in run._values:
                    # pooled by a mask for its head; what goes on are the tokens
                    name = next(
                        name
                        for name in cut.parts.wiring.gives[place]
                        if name in run._values and run._values[name].dim() == 3
                    )
                run._values[name] = run._values[name] + torch.randn_like(run._values[name])
        assert not torch.allclose(changed[-1], untouched[-1], atol=1e-5)


def test_a_run_goes_on_with_the_kept_rows_alone(cut: Cut) -> None:
    x = cut.case.batch(5)
    rows = [3, 0]
    full = [exit.output() for exit in cut.run(x)]
    run = cut.run(x)
    first = next(run)
    run.keep(torch.tensor(rows))
    assert torch.equal(first.output(), full[0])
    # the size of a batch may change the order of sums in a matrix product
    for exit in run:
        assert torch.allclose(exit.output(), full[exit.index][rows], atol=1e-5)
        assert exit.output().shape == (2, cut.network.num_classes)


def test_features_of_an_exit_stay_as_they_were(cut: Cut) -> None:
    x = cut.case.batch(2)
    held = list(cut.run(x))
    with cut.network.exits(x, keep=True) as run:
        for ours, eager in zip(held, run, strict=True):
            masked = ours.features.dim() < eager.features.dim()
            wanted = cut.network.pooled(eager) if masked else eager.features
            assert cut.agree(ours.features, wanted)


def test_parts_share_the_parameters_of_the_network(cut: Cut) -> None:
    own = {parameter.data_ptr() for parameter in cut.network.parameters()}
    for part in (*cut.parts.stages, *cut.parts.heads[:-1], cut.parts.whole):
        assert part is not None
        assert {parameter.data_ptr() for parameter in part.parameters()} <= own


def test_wiring_names_what_the_parts_take_and_give(cut: Cut) -> None:
    wiring = cut.parts.wiring
    examples = cut.parts.examples
    known = set(wiring.inputs)
    for stage, takes, gives in zip(cut.parts.stages, wiring.takes, wiring.gives, strict=True):
        assert set(takes) <= known
        given = stage(*(examples[name] for name in takes))
        assert [value.shape for value in given] == [examples[name].shape for name in gives]
        known |= set(gives)
    assert set(wiring.features) <= known
    assert set(wiring.batch_dims) == known == set(examples)
    assert all(
        examples[name].shape[dim] == 2 for name, dim in wiring.batch_dims.items() if dim is not None
    )


def test_network_stays_in_its_mode_and_untouched() -> None:
    network = attach_exits(Overwriting(), after=["layers.0"], example=images(12)(1)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    partition(network, images(12)(3))
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


class Chain(nn.Module):
    """Layers that each add the output of some earlier one."""

    def __init__(self, sources: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in sources)
        self.last = nn.Linear(8, 3)
        self.sources = sources

    def forward(self, x: Tensor) -> Tensor:
        made = [x]
        for layer, source in zip(self.layers, self.sources, strict=True):
            made.append(layer(made[-1].tanh()) + made[source % len(made)])
        return self.last(made[-1])


@pytest.mark.parametrize("seed", range(2))
def test_whatever_skips_across_the_cuts_arrives(seed: int) -> None:
    draw = random.Random(seed)
    sources = [draw.randrange(5) for _ in range(5)]
    places = sorted(draw.sample(range(5), 2))
    network = attach_exits(
        Chain(sources), after=[f"layers.{place}" for place in places], example=vectors(1)
    ).eval()
    parts = partition(network, vectors(1))
    x = vectors(3)
    given = [exit.output() for exit in Staged(parts.wiring, parts.stages, parts.heads)([x])]
    for one, other in zip(given, network(x), strict=True):
        assert torch.equal(one, other)
        assert float(one.std()) > 1e-3


def test_export_works_inside_inference_mode() -> None:
    network = attach_exits(ToyBackbone(), after=["blocks.0"], example=vectors(1)).eval()
    with torch.inference_mode():
        parts = partition(network, vectors(1))
    assert parts.whole(vectors(3)).shape == (3, 3)


# --- inputs ---------------------------------------------------------------------------------------


def test_inputs_are_named() -> None:
    assert input_names(torch.zeros(1)) == ("x",)
    assert input_names({"ids": torch.zeros(1), "labels": None, "mask": torch.ones(1)}) == (
        "ids",
        "mask",
    )
    assert input_names(positions(1)) == ("x0", "x2")
    assert [
        float(value)
        for value in input_tensors({"b": torch.tensor(2.0), "a": torch.tensor(1.0)}, ["a", "b"])
    ] == [1, 2]
    with pytest.raises(NetworkError, match=r"the tensors ids; expected ids, mask"):
        input_tensors({"ids": torch.zeros(1)}, ["ids", "mask"])
    with pytest.raises(NetworkError, match="type str"):
        input_names("image.png")


def test_what_has_no_batch_is_carried_whole() -> None:
    network = attach_exits(TwoInputs(), after=["first"], example=positions(1)).eval()
    wiring = partition(network, positions(1)).wiring
    assert wiring.takes == (("x0",), ("x2", "stage0_linear"))
    assert wiring.batch_dims == {"x0": 0, "x2": None, "stage0_linear": 0, "stage1_linear_1": 0}


# --- what cannot be cut ---------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self, rule: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)
        self.rule = rule
        self.drop = nn.Dropout()
        self.register_buffer("seen", torch.zeros(()))
        self.shallow = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rule(self, self.first(x)))


def odd(rule: Callable[[Any, Tensor], Tensor], after: list[str] | None = None) -> MultiExitNetwork:
    return attach_exits(Odd(rule), after=after or ["first"], example=vectors(1)).eval()


def test_control_flow_on_the_data_is_said_to_be_the_reason() -> None:
    network = odd(lambda _, x: x * 2 if x.sum() > 0 else x)
    with pytest.raises(
        ExportFailed, match=r'cannot trace Odd: .*data-dependent.*engine="eager" runs'
    ):
        partition(network, vectors(1))


def test_batch_of_one_that_goes_its_own_way_is_noticed() -> None:
    network = odd(lambda _, x: x * 2 if x.shape[0] == 1 else x)
    with pytest.raises(ExportFailed, match="a batch of one differently"):
        partition(network, vectors(2))


def test_model_that_writes_to_its_buffers_is_refused() -> None:
    def count(model: Any, x: Tensor) -> Tensor:
        model.seen += 1
        return x

    with pytest.raises(ExportFailed, match=r"writes to its buffers \(backbone.seen\)"):
        partition(odd(count), vectors(1))


def test_exits_without_anything_between_them_are_refused() -> None:
    network = odd(lambda model, x: model.drop(x), ["first", "drop"])
    with pytest.raises(
        NetworkError, match="nothing is computed between the exit at drop and the one before it"
    ):
        partition(network, vectors(1))


def test_example_that_misses_an_exit_is_refused() -> None:
    network = odd(lambda model, x: x if model.shallow else model.drop(x * 2), ["first", "drop"])
    network.backbone.shallow = True
    with pytest.raises(ExitNotReached, match="reaches 1 of 2 early exits"):
        partition(network, vectors(1))


class Mixing(nn.Module):
    """Halves of samples are rows of their own, and are needed on both sides of the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        halves = self.first(x.view(-1, 4))
        return self.last(self.second(halves.view(-1, 8)) + halves.tanh().view(-1, 8))


def test_value_that_mixes_samples_and_places_may_not_cross() -> None:
    network = attach_exits(Mixing(), after=["second"], example=vectors(1)).eval()
    with pytest.raises(NetworkError, match="with samples and positions mixed in one dimension"):
        partition(network, vectors(1))


def test_networks_without_one_backbone_are_refused() -> None:
    network = attach_exits(ToyBackbone(), after=["blocks.0"], example=vectors(1)).eval()
    with pytest.raises(
        NetworkError, match="RunningEnsemble cannot be cut into parts; expected a MultiExitNetwork"
    ):
        partition(RunningEnsemble(network, "poe"), vectors(1))  # type: ignore[arg-type]
