"""Values on disk: what comes back, what is refused and where it says the damage is, old files."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from impatient import CostProfile, Evaluation, Recording, budgets
from impatient.budgets import Budget
from impatient.errors import StorageError
from impatient.files import read_json, read_tensors, write_json, write_tensors
from impatient.policies import MixedPolicy, Policy, ThresholdPolicy
from impatient.policies.gates import GatePolicy
from impatient.policies.risk import Certificate
from impatient.policies.routing import SelectionPolicy
from impatient.store import SCHEMA, Stored, from_plain, to_plain
from impatient.verbs.network_spec import NetworkSpec
from recordings import drawn

OLD = Path(__file__).parent / "data" / "0.1.0"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    weight: Tensor
    share: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tree(Stored, made_by="a gardener"):
    name: str
    count: int
    tall: bool
    colour: Literal["red", "green"]
    leaves: tuple[Leaf | None, ...] = ()
    size: tuple[int, int] | None = None
    heights: Mapping[int, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Oak(Tree):
    acorns: int = 0


PLAIN = Tree(name="a", count=3, tall=True, colour="red", size=(1, 2), heights={1: math.inf, 2: 0.5})
LEAFY = Oak(
    name="b",
    count=0,
    tall=False,
    colour="green",
    leaves=(None, Leaf(weight=torch.arange(3), share=-math.inf)),
    acorns=9,
)


# --- what comes back ------------------------------------------------------------------------------


def test_a_value_without_tensors_is_json_and_comes_back(tmp_path: Path) -> None:
    PLAIN.save(tmp_path / "tree.json")
    assert Tree.load(tmp_path / "tree.json") == PLAIN
    content = json.loads((tmp_path / "tree.json").read_text())
    assert (content["kind"], content["schema"]) == ("tree", SCHEMA)


def test_tensors_stand_beside_the_json_under_their_path(tmp_path: Path) -> None:
    LEAFY.save(tmp_path / "tree")
    tensors, header = read_tensors(tmp_path / "tree")
    assert list(tensors) == ["leaves/1/weight"]
    assert header["leaves"][1]["weight"] == {"tensor": "leaves/1/weight"}
    back = Oak.load(tmp_path / "tree")
    assert back.leaves[0] is None
    assert torch.equal(back.leaves[1].weight, torch.arange(3))
    assert back.leaves[1].share == -math.inf


def test_the_file_says_which_kind_of_a_family_it_holds(tmp_path: Path) -> None:
    for tree in (PLAIN, LEAFY):
        tree.save(tmp_path / "tree")
        assert type(Tree.load(tmp_path / "tree")) is type(tree)


def test_a_value_with_tensors_does_not_go_into_another_file() -> None:
    with pytest.raises(StorageError, match="leaves/1/weight are tensors"):
        to_plain(LEAFY)


def test_nan_comes_back(tmp_path: Path) -> None:
    dataclasses.replace(PLAIN, heights={3: math.nan}).save(tmp_path / "tree.json")
    assert math.isnan(Tree.load(tmp_path / "tree.json").heights[3])


# --- what is refused ------------------------------------------------------------------------------

DAMAGE = [
    ({"count": 3.5}, "expected int, got 3.5 @ $.count"),
    ({"count": "3"}, "expected int, got '3' @ $.count"),
    ({"count": True}, "expected int, got True @ $.count"),
    ({"count": "many"}, "expected int: invalid literal for int() with base 10: 'many' @ $.count"),
    ({"tall": 1}, "expected bool, got 1 @ $.tall"),
    ({"name": None}, "expected str, got None @ $.name"),
    ({"colour": "blue"}, "blue not in literal typing.Literal['red', 'green'] @ $.colour"),
    ({"size": [1]}, "Not enough values in [1]"),
    ({"size": "12"}, "expected list, got '12' @ $.size"),
    ({"heights": {"1": "low"}}, "could not convert string to float: 'low' @ $.heights['1']"),
    ({"heights": {"1": True}}, "expected float, got True @ $.heights.1"),
    ({"heights": {"one": 1.0}}, "invalid literal for int() with base 10: 'one' @ $.heights"),
    ({"heights": [1.0]}, "expected collections.abc.Mapping[int, float]"),
    ({"leaves": [None, {"weight": [1], "share": 1.0}]}, "expected Tensor, got [1] @ $.leaves[1]"),
    ({"leaves": [{"share": 1.0}]}, "'weight' is missing @ $.leaves[0]"),
    ({"flowers": 2}, "'flowers' is unknown @ $"),
    ({"kind": "fish"}, "it is a 'fish'; expected tree or oak @ $"),
    ({"schema": 99}, "schema version 99; this version of impatient reads 1 and 2"),
]


@pytest.mark.parametrize(("change", "complaint"), DAMAGE, ids=lambda value: str(value)[:40])
def test_damage_is_refused_with_its_place_and_the_remedy(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    write_json(tmp_path / "tree.json", to_plain(PLAIN) | change)
    with pytest.raises(StorageError) as caught:
        Tree.load(tmp_path / "tree.json")
    assert complaint in str(caught.value)
    assert str(tmp_path / "tree.json") in str(caught.value)
    assert "use a gardener." in str(caught.value)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Tree)])
def test_a_missing_entry_is_refused_even_if_it_has_a_default(tmp_path: Path, name: str) -> None:
    content = to_plain(PLAIN)
    del content[name]
    write_json(tmp_path / "tree.json", content)
    with pytest.raises(StorageError, match=rf"'{name}' is missing @ \$"):
        Tree.load(tmp_path / "tree.json")


def test_missing_and_unknown_tensors_are_refused(tmp_path: Path) -> None:
    LEAFY.save(tmp_path / "tree")
    tensors, header = read_tensors(tmp_path / "tree")
    write_tensors(tmp_path / "tree", {}, header)
    with pytest.raises(StorageError, match=r"expected Tensor.* @ \$\.leaves\[1\]\.weight"):
        Oak.load(tmp_path / "tree")
    write_tensors(tmp_path / "tree", tensors | {"stem": torch.ones(1)}, header)
    with pytest.raises(StorageError, match="the tensor 'stem' is unknown"):
        Oak.load(tmp_path / "tree")


@pytest.mark.parametrize("tree", [PLAIN, LEAFY], ids=["json", "safetensors"])
def test_a_truncated_file_is_refused(tmp_path: Path, tree: Tree) -> None:
    tree.save(tmp_path / "tree")
    whole = (tmp_path / "tree").read_bytes()
    for length in (0, 4, 20, len(whole) - 3):
        (tmp_path / "tree").write_bytes(whole[:length])
        with pytest.raises(StorageError, match="tree"):
            Tree.load(tmp_path / "tree")


def test_a_recording_of_another_shape_is_refused(tmp_path: Path) -> None:
    drawn(5, seed=1).save(tmp_path / "test.safetensors")
    tensors, header = read_tensors(tmp_path / "test.safetensors")
    write_tensors(tmp_path / "test.safetensors", tensors | {"targets": torch.rand(4)}, header)
    with pytest.raises(StorageError, match=r"4 targets for 5 samples.*impatient record"):
        Recording.load(tmp_path / "test.safetensors")


def test_a_value_that_is_no_dataclass_cannot_be_saved(tmp_path: Path) -> None:
    class Own(Policy):
        num_exits = 2

        def looks_at(self, exit: int) -> bool:
            return True

        def stops(self, exit: int, outputs: Any = None, pooled: Any = None) -> Tensor:
            return torch.ones(len(outputs), dtype=torch.bool)

    with pytest.raises(StorageError, match=r"Own cannot be saved; expected a frozen dataclass"):
        Own().save(tmp_path / "own")
    assert not (tmp_path / "own").exists()


# --- files of version 0.1.0 -----------------------------------------------------------------------


def profile(costs: CostProfile) -> None:
    assert costs.contract_s()[0] == 0.00013142003332594263
    assert (costs.provenance.threads, costs.exit_free("macs")) == (1, 189248)


def thresholds(policy: ThresholdPolicy) -> None:
    assert policy.thresholds == (0.23591672398564156, 0.3523302194057456, -math.inf)
    assert (policy.split, policy.cost) == ("validation", "time")


def gates(policy: GatePolicy) -> None:
    assert policy.open_exits() == (False, True, True)
    gate = policy.gates[1]
    assert gate is not None
    assert round(gate.scores(torch.ones(1, len(gate.mean))).item(), 4) == 12.7528


def selection(policy: SelectionPolicy) -> None:
    assert policy.moves == ((1, 2), (-1, 2, 3), (-1, 3), (-1,))
    answers = policy.exits_on(drawn(200, seed=1))
    assert answers.bincount(minlength=4).tolist() == [0, 36, 140, 24]


def mixture(policy: MixedPolicy) -> None:
    answers = policy.exits_on(drawn(200, seed=1))
    assert answers.bincount(minlength=4).tolist() == [1, 13, 92, 94]
    assert (policy.share, policy.seed) == (0.25, 7)


def mixed_selection(policy: MixedPolicy) -> None:
    selection(policy.fast)  # type: ignore[arg-type]
    assert (type(policy), policy.share, policy.seed) == (MixedPolicy, 0.5, 3)


def certificate(made: Certificate) -> None:
    assert made.statement.startswith("With probability 90 %, at most 10 % of inputs")
    assert (made.bound, made.candidates) == (0.09167718977155041, 65)


def evaluation(found: Evaluation) -> None:
    assert found["loss-2"].accuracy.value == 0.935933147632312
    assert found.budgets["uniform"].shape == "uniform"


def recording(found: Recording) -> None:
    assert found.labels.tolist() == [3, 2, 1]
    assert round(float(found.outputs.sum()), 5) == -6.36693
    assert [entry[0, 0].item() for entry in found.features] == [0.0, 1.0, 2.0, 3.0]


def network(spec: NetworkSpec) -> None:
    assert (spec.model, spec.preprocess.size) == ("impatient:resnet:n=1,c=8", (8, 8))


def cascade(spec: NetworkSpec) -> None:
    assert (spec.cascade, len(spec.members)) == (True, 2)


def budget(found: Budget) -> None:
    assert found == budgets.empirical([0.5, 0.25], cost="energy")


FILES: dict[str, tuple[type[Stored], Callable[[Any], None]]] = {
    "profile.json": (CostProfile, profile),
    "thresholds.json": (Policy, thresholds),
    "gates.safetensors": (Policy, gates),
    "selection.safetensors": (Policy, selection),
    "mixed_policy.safetensors": (Policy, mixture),
    "mixed_selection.safetensors": (Policy, mixed_selection),
    "certificate.json": (Certificate, certificate),
    "evaluation.json": (Evaluation, evaluation),
    "recording.safetensors": (Recording, recording),
    "network.json": (NetworkSpec, network),
    "cascade.json": (NetworkSpec, cascade),
    "budget.json": (Budget, budget),
}


def test_every_old_file_has_its_test() -> None:
    assert sorted(FILES) == sorted(file.name for file in OLD.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_version_0_1_0_loads_and_is_saved_anew(tmp_path: Path, name: str) -> None:
    kind, check = FILES[name]
    value = kind.load(OLD / name)
    check(value)
    value.save(tmp_path / name)
    check(kind.load(tmp_path / name))


def test_damage_in_an_old_file_is_refused_with_its_place(tmp_path: Path) -> None:
    content = read_json(OLD / "profile.json")
    content["batches"]["1"]["stages"][1]["p50"] = "soon"
    write_json(tmp_path / "profile.json", content)
    with pytest.raises(
        StorageError, match=r"'soon' @ \$\.batches\['1'\]\.stages\[1\]\.p50.*`impatient profile`"
    ):
        CostProfile.load(tmp_path / "profile.json")
    tensors, header = read_tensors(OLD / "gates.safetensors")
    del tensors["1/mean"]
    write_tensors(tmp_path / "gates.safetensors", tensors, header)
    with pytest.raises(StorageError, match=r"'mean' is missing @ \$\.gates\[1\].*`impatient fit`"):
        Policy.load(tmp_path / "gates.safetensors")


def test_plain_values_come_back_from_another_file() -> None:
    costs = CostProfile.load(OLD / "profile.json")
    assert from_plain(json.loads(json.dumps(to_plain(costs))), CostProfile) == costs
