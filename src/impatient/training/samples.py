"""Tell input from target in samples, and make tensors of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from impatient.errors import DataError
from impatient.training.examples import padded
from impatient.training.pictures import class_map, image_tensor, shown_size
from impatient.trees import Ragged, collate, entries, map_values

TARGETS = ("label", "labels", "target", "targets", "y", "class")


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Where a sample's target stands, and how samples become a batch.

    Attributes:
        target: key, field or place of the target, or a function from a sample to (input, target).
            By default a sample is a pair, or one of its entries is called label, target or y.
        inputs: name of the one entry that is the input, or names of those that the network takes
            by name; by default all but the target.
        pad: by name of the entry, the number that shorter ones are filled up with; entries of
            different lengths need it.
        ragged: keep a list of one target per sample (`trees.Ragged`) even where all have one shape;
            where shapes differ, it is kept anyway.
    """

    target: str | int | Callable[[Any], tuple[Any, Any]] | None = None
    inputs: str | Sequence[str] = ()
    pad: Mapping[str, int] = dataclasses.field(default_factory=dict)
    ragged: bool = False

    def pair(self, sample: Any) -> tuple[Any, Any]:
        """Split a sample, or a batch, into input and target.

        Raises:
            DataError: if it is not said, or not unmistakable, which is which.
        """
        if callable(self.target):
            made = self.target(sample)
            if not isinstance(made, tuple) or len(made) != 2:
                raise DataError(
                    f"target= gave a {type(made).__name__}; expected a pair (input, target)."
                )
            return made
        parts = _parts(sample)
        place = self._place(sample, parts)
        target = parts.pop(place)
        return self._input(sample, parts), target

    def _place(self, sample: Any, parts: Mapping[str | int, Any]) -> str | int:
        """Find the target among the parts of a sample."""
        wanted = self.target
        if isinstance(wanted, int) and wanted < 0:
            wanted += len(parts)
        if isinstance(wanted, (str, int)):
            if wanted in parts:
                return wanted
            raise DataError(
                f"a sample is a {_described(sample, parts)}, and target={self.target!r} is not "
                "there; name one of its entries."
            )
        usual = [name for name in parts if name in TARGETS]
        if isinstance(sample, (tuple, list)) and len(parts) == 2:
            return list(parts)[1]
        if len(usual) == 1 and len(parts) > 1:
            return usual[0]
        raise DataError(
            f"a sample is a {_described(sample, parts)}; expected a pair (input, target), or one "
            f"entry named {', '.join(TARGETS)}. Say which is the target: Data.of(..., "
            "samples=Samples(target=NAME_OR_PLACE))."
        )

    def _input(self, sample: Any, parts: dict[str | int, Any]) -> Any:
        """Make the input of a sample's other parts."""
        names = [self.inputs] if isinstance(self.inputs, str) else list(self.inputs)
        absent = [name for name in names if name not in parts]
        if absent:
            raise DataError(
                f"a sample is a {_described(sample, parts)}, without {', '.join(absent)}; expected "
                "inputs= to name its entries."
            )
        if isinstance(self.inputs, str):
            return parts[self.inputs]
        if names:
            return {name: parts[name] for name in names}
        if isinstance(sample, (tuple, list)):
            values = tuple(parts.values())
            return values[0] if len(values) == 1 else values
        return {str(name): value for name, value in parts.items()}

    def batch(self, inputs: Sequence[Any]) -> Any:
        """Stack inputs, and fill up those that are to be padded."""
        if not self.pad:
            return collate(inputs)
        lists = {
            name: padded([each[name] for each in inputs], number, "right")
            for name, number in self.pad.items()
        }
        rest = [{name: each[name] for name in each if name not in self.pad} for each in inputs]
        return lists | (collate(rest) if rest[0] else {})


def _parts(sample: Any) -> dict[str | int, Any]:
    """Return the entries of a sample by name, key or place."""
    named = isinstance(sample, tuple) and hasattr(sample, "_fields")
    return sample._asdict() if named else dict(entries(sample))


def _described(sample: Any, parts: Mapping[str | int, Any]) -> str:
    name = type(sample).__name__
    return f"{name} of {', '.join(map(str, parts))}" if parts else name


def converted(tree: Any, where: str, *, classes: bool = False) -> Any:
    """Make tensors of the arrays, numbers and pictures in a sample.

    Numbers become float32 or int64, bytes stay bytes, pictures become bytes [C, H, W].

    Args:
        tree: an input or a target.
        where: name of it in errors.
        classes: whether pictures are maps of class numbers [H, W].
    Raises:
        DataError: if there is anything else in it, such as text.
    """

    def change(value: Any) -> Any:
        if isinstance(value, Ragged):
            return Ragged(converted(entry, where, classes=classes) for entry in value)
        return _tensor(value, where, classes)

    return map_values(change, tree, _is_numbers)


def _is_numbers(value: Any) -> bool:
    """Whether it is a list of numbers, or of such lists."""
    if type(value) not in (list, tuple):
        return False
    return all(isinstance(each, (int, float, np.number)) or _is_numbers(each) for each in value)


def _tensor(value: Any, where: str, classes: bool) -> Tensor:
    if isinstance(value, Image.Image):
        if classes:
            return torch.from_numpy(class_map(value, where))
        grey = value.mode in ("1", "L", "I;16")
        return image_tensor(value, shown_size(value), 1 if grey else 3, where)
    if not isinstance(value, Tensor):
        value = _from_numbers(value, where)
    tensor: Tensor = value
    if tensor.is_complex():
        raise DataError(f"{where} holds {tensor.dtype}; expected real numbers.")
    if tensor.is_floating_point():
        return tensor.float()
    small = tensor.dtype in (torch.uint8, torch.bool)
    # maps of classes stay bytes, which are an eighth as large
    kept = tensor.dtype == torch.uint8 and tensor.dim() > 1 if classes else small
    return tensor if kept else tensor.long()


def _from_numbers(value: Any, where: str) -> Tensor:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{where} holds lists of different lengths: {error}") from error
    if array.dtype.kind not in "fiub":
        text = isinstance(value, str)
        raise DataError(
            f"{where} holds {'text' if text else f'a {type(value).__name__}'}; expected tensors, "
            "arrays, numbers or pictures. "
            + ("Turn it into token ids or class numbers." if text else "Leave it out: inputs=NAMES")
        )
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    elif array.dtype not in (np.uint8, np.bool_):
        array = array.astype(np.int64)
    # a copy: the user's array may be read-only, of foreign byte order, or change
    return torch.from_numpy(np.array(array))
