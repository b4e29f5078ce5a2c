"""Walk through samples, targets and outputs: tensors in containers of any kind.

A tree is a tensor, or a tuple, named tuple, list, mapping or dataclass of trees. Anything else in
it, such as a number or None, is left as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from impatient.errors import TreeError

Element = TypeVar("Element")


class Ragged(list[Element]):
    """A list of one entry per sample, for what differs in shape, such as boxes.

    Its entries are never stacked. A plain list is a container like a tuple.

    Example:
        >>> take({"image": torch.zeros(3, 2), "boxes": Ragged("abc")}, [2, 0])["boxes"]
        ['c', 'a']
    """


def entries(tree: Any) -> Iterable[tuple[Any, Any]]:
    """Return a container's entries, each after its key, place or name.

    None for a leaf.
    """
    if isinstance(tree, Tensor):
        return ()
    if isinstance(tree, Mapping):
        return tree.items()
    if isinstance(tree, (tuple, list)):
        return enumerate(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    return ()


def leaves(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree, in order."""
    return [tensor for _, tensor in named_leaves(tree)]


def named_leaves(tree: Any, within: str = "") -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of a tree, each after its place.

    Example:
        >>> [name for name, _ in named_leaves({"text": (torch.ones(1), torch.ones(1))})]
        ['text.0', 'text.1']
    """
    if isinstance(tree, Tensor):
        yield within, tree
    for key, entry in entries(tree):
        yield from named_leaves(entry, f"{within}.{key}" if within else str(key))


def map_leaves(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """Change every tensor of a tree.

    Its structure stays the same.

    A mapping that is no dataclass becomes a dict.
    """
    if isinstance(tree, Tensor):
        # the usual tree, in fewer steps
        return change(tree)

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, Ragged):
            return Ragged(map_leaves(change, entry) for entry in leaf)
        return change(leaf) if isinstance(leaf, Tensor) else leaf

    return _mapped(changed, tree)


def map_values(change: Callable[[Any], Any], tree: Any, is_value: Callable[[Any], bool]) -> Any:
    """Change all values of a tree, but not its containers.

    Args:
        change: what becomes of a value.
        tree: the tree; its containers stay.
        is_value: whether a container counts as a value, such as a list of numbers.
    """
    return _mapped(change, tree, is_value)


def map_samples(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Change every tensor of a tree that has one row per sample."""
    count = size(tree)
    return _mapped(lambda leaf: change(leaf) if _has_rows(leaf, count) else leaf, tree)


def size(tree: Any) -> int:
    """Return the number of samples: rows of the first tensor, or entries of a ragged list.

    Raises:
        TreeError: if there is neither.
    """
    found = _size(tree)
    if found is None:
        raise TreeError(
            f"a {type(tree).__name__} holds no tensor with a first dimension; expected a tensor, "
            "or a tuple, list, mapping or dataclass that holds one."
        )
    return found


def take(tree: Any, rows: Sequence[int] | Tensor) -> Any:
    """Take some samples: the rows of every tensor that has one per sample, and of ragged lists.

    Args:
        tree: samples, targets or outputs, the samples first.
        rows: places of the samples, [B'].
    """
    count = size(tree)
    places = torch.as_tensor(rows, dtype=torch.long)

    def taken(leaf: Any) -> Any:
        if isinstance(leaf, Ragged):
            return Ragged(leaf[place] for place in places.tolist())
        return leaf[places.to(leaf.device)] if _has_rows(leaf, count) else leaf

    return _mapped(taken, tree)


def collate(samples: Sequence[Any]) -> Any:
    """Stack samples into a batch.

    Args:
        samples: trees of one structure, without a batch dimension. Numbers become tensors [B], and
            anything else that is no tensor becomes a ragged list.
    Raises:
        TreeError: if there is none, or they differ in structure or in the shape of a tensor.
    """
    if not samples:
        raise TreeError("no samples to collate; expected at least one.")
    return _joined(samples, "")


def _mapped(
    change: Callable[[Any], Any], tree: Any, is_value: Callable[[Any], bool] | None = None
) -> Any:
    if isinstance(tree, (Tensor, Ragged)) or (is_value is not None and is_value(tree)):
        return change(tree)
    values = [_mapped(change, entry, is_value) for _, entry in entries(tree)]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return _replaced(tree, values)
    if isinstance(tree, Mapping):
        return dict(zip(tree, values, strict=True))
    if isinstance(tree, (tuple, list)):
        return _rebuilt(tree, values)
    return change(tree)


def _rebuilt(like: Any, values: list[Any]) -> Any:
    """Make a tuple or list of another's type."""
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)


def _replaced(like: Any, values: list[Any]) -> Any:
    fields = dataclasses.fields(like)
    changed = {field.name: value for field, value in zip(fields, values, strict=True) if field.init}
    return dataclasses.replace(like, **changed)


def _size(tree: Any) -> int | None:
    if isinstance(tree, Tensor):
        return tree.shape[0] if tree.dim() else None
    if isinstance(tree, Ragged):
        return len(tree)
    sizes = (_size(entry) for _, entry in entries(tree))
    return next((found for found in sizes if found is not None), None)


def _has_rows(leaf: Any, count: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == count


def _joined(trees: Sequence[Any], where: str) -> Any:
    """Stack trees leaf by leaf."""
    first = trees[0]
    keys = [key for key, _ in entries(first)]
    if not keys or isinstance(first, Ragged):
        return _stacked(trees, where)
    for tree in trees[1:]:
        others = [key for key, _ in entries(tree)]
        if set(others) != set(keys):
            raise TreeError(
                f"{_named(where)} is a {type(first).__name__} of {_listed(keys)} in one sample and "
                f"a {type(tree).__name__} of {_listed(others)} in another; expected one structure."
            )
    columns = [dict(entries(tree)) for tree in trees]
    values = [
        _joined([column[key] for column in columns], f"{where}.{key}" if where else str(key))
        for key in keys
    ]
    if dataclasses.is_dataclass(first):
        return _replaced(first, values)
    if isinstance(first, Mapping):
        return dict(zip(keys, values, strict=True))
    return _rebuilt(first, values)


def _stacked(values: Sequence[Any], where: str) -> Any:
    if all(isinstance(value, Tensor) for value in values):
        _check_shapes(values, where)
        return torch.stack(list(values))
    if all(isinstance(value, (bool, int, float)) for value in values):
        return torch.tensor(values)
    return Ragged(values)


def _check_shapes(values: Sequence[Tensor], where: str) -> None:
    shapes = sorted({tuple(value.shape) for value in values})
    if len(shapes) > 1:
        raise TreeError(
            f"{_named(where)} has the shapes {_listed(shapes[:4])} in different samples; expected "
            "one shape. Pad or resize them, or keep them in a Ragged list."
        )


def _named(where: str) -> str:
    return f"the entry {where!r}" if where else "the value"


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values)) or "nothing"
