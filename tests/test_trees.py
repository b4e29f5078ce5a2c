"""Samples, targets and outputs in containers of any kind."""

from collections import OrderedDict, UserDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from impatient.errors import TreeError
from impatient.trees import (
    Ragged,
    collate,
    leaves,
    map_leaves,
    map_samples,
    map_values,
    named_leaves,
    size,
    take,
)


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Frame:
    left: Tensor
    note: str = "note"
    total: float = field(init=False, default=0.0)


def trees_of(rows: Tensor) -> list[Any]:
    """Every kind of container round the same rows."""
    return [
        rows,
        (rows, None),
        [rows, 3],
        Pair(rows, Pair(rows, "text")),
        {"x": rows, "deep": [{"y": rows}]},
        OrderedDict(x=rows),
        UserDict(x=rows),
        Frame(rows),
        {"x": rows, "boxes": Ragged(torch.ones(n, 4) * n for n in range(len(rows)))},
    ]


@pytest.mark.parametrize("kind", range(9))
def test_rows_are_taken_from_every_kind_of_tree(kind: int) -> None:
    tree = trees_of(torch.arange(12.0).view(4, 3))[kind]
    assert size(tree) == 4
    again = take(tree, torch.tensor([1, 3]))
    assert size(again) == 2
    assert type(again) is (dict if kind in (5, 6) else type(tree))
    rows = torch.arange(12.0).view(4, 3)[[1, 3]]
    parts = leaves(again)
    wanted = [rows, torch.ones(1, 4), torch.ones(3, 4) * 3] if kind == 8 else [rows] * len(parts)
    for part, right in zip(parts, wanted, strict=True):
        assert torch.equal(part, right)


# in the list there is a number, of which a tensor is made
@pytest.mark.parametrize("kind", [0, 1, 3, 4, 5, 6, 7])
def test_collating_samples_gives_their_batch(kind: int) -> None:
    rows = torch.arange(12.0).view(4, 3)
    samples = [trees_of(row)[kind] for row in rows]
    for leaf in leaves(collate(samples)):
        assert torch.equal(leaf, rows)


def test_rows_come_in_the_order_asked_for_ragged_ones_too() -> None:
    tree = {"x": torch.arange(3), "boxes": Ragged("abc")}
    found = take(tree, [2, 0, 2])
    assert found["x"].tolist() == [2, 0, 2]
    assert found["boxes"] == ["c", "a", "c"]


def test_what_has_no_row_per_sample_is_left() -> None:
    table = torch.eye(7)
    batch = {"x": torch.ones(3, 2), "table": table, "scale": torch.tensor(2.0)}
    assert take(batch, [1])["table"] is table
    assert map_samples(torch.neg, batch)["scale"] == 2.0


def test_values_that_are_no_tensors_are_changed_and_lists_of_numbers_may_be_one() -> None:
    tree = {"a": [1, 2], "b": (3, Frame(torch.zeros(1), "text"))}
    changed = map_values(str, tree, lambda value: value == [1, 2])
    assert changed["a"] == "[1, 2]"
    assert changed["b"][0] == "3"
    assert changed["b"][1].note == "text"
    assert changed["b"][1].left == "tensor([0.])"


def test_every_tensor_is_changed_those_in_ragged_lists_too_and_named() -> None:
    tree = {"a": (torch.zeros(2), 5), "boxes": Ragged([{"at": torch.zeros(1, 4)}, {}])}
    changed = map_leaves(lambda leaf: leaf + 1, tree)
    assert changed["a"][1] == 5
    assert torch.equal(changed["boxes"][0]["at"], torch.ones(1, 4))
    assert [name for name, _ in named_leaves(tree)] == ["a.0", "boxes.0.at"]


def test_numbers_become_tensors_and_other_things_ragged_lists() -> None:
    batch = collate([{"n": 1, "name": "a"}, {"n": 2, "name": "b"}])
    assert batch["n"].tolist() == [1, 2]
    assert batch["name"] == Ragged(["a", "b"])
    assert size(Ragged(["a", "b"])) == 2


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "no samples"),
        ([{"x": torch.ones(2)}, {"x": torch.ones(3)}], r"'x' has the shapes \(2,\), \(3,\)"),
        ([{"x": torch.ones(2)}, {"y": torch.ones(2)}], "of x in one sample and a dict of y"),
        ([torch.ones(2), torch.ones(3)], "the value has the shapes"),
    ],
)
def test_samples_that_do_not_fit_together_are_refused(samples: list[Any], message: str) -> None:
    with pytest.raises(TreeError, match=message):
        collate(samples)


def test_a_tree_without_tensors_has_no_size() -> None:
    with pytest.raises(TreeError, match="a dict holds no tensor with a first dimension"):
        size({"a": 3, "b": torch.tensor(1.0)})
