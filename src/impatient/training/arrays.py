"""Read arrays as people save them, one or several per sample."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from impatient.errors import DataError
from impatient.provenance import fingerprint_bytes
from impatient.training.examples import ArrayExamples, Raw, checked_budgets, class_numbers
from impatient.training.layouts import as_input, as_numbers
from impatient.training.options import DataOptions, read_options
from impatient.trees import named_leaves

log = logging.getLogger(__name__)

MOST_CLASSES = 1_000_000
NPZ_OPTIONS = ("layout", "mean", "std", "normalise", "labels", "budget")


def npz(rest: str) -> tuple[Raw, DataOptions]:
    """Read FILE or FILE:options."""
    name, options = read_options(rest, NPZ_OPTIONS)
    path = Path(name).expanduser()
    arrays = read_archive(path, "x_train, y_train, x_test and y_test")
    return from_arrays(arrays, where=str(path), options=options), options


def read_archive(path: Path, expected: str) -> dict[str, np.ndarray]:
    """Read all arrays of an npz file.

    Args:
        path: the file.
        expected: what should be in it, in words.
    Raises:
        DataError: if it is missing, damaged, or holds anything but plain arrays.
    """
    if not path.is_file():
        raise DataError(f"no data file {path}; expected an npz file with {expected}.")
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it holds a single array, without a name")
            with archive:
                return {name: archive[name] for name in archive.files}
    except Exception as error:
        # numpy raises ValueError, zipfile.BadZipFile, EOFError, zlib.error and others.
        raise DataError(
            f"{path} cannot be read as an npz file of plain arrays: {error}. Was it cut short?"
        ) from error


def from_arrays(arrays: Mapping[str, np.ndarray], where: str, options: DataOptions) -> Raw:
    """Make a data set of arrays.

    Args:
        arrays: x_train, y_train, x_test and y_test; the inputs may be several arrays, such as
            x_train.input_ids and x_train.attention_mask. Optional are class_names, groups_train,
            and the budgets that the options name.
        where: name of the arrays in errors.
        options: layout of the inputs, and what to do with the labels.
    Raises:
        DataError: if arrays are missing, or do not fit each other.
    """
    inputs = {split: _inputs(arrays, f"x_{split}") for split in ("train", "test")}
    present = {f"x_{split}" for split, found in inputs.items() if found} | arrays.keys()
    missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in present]
    if missing:
        raise DataError(
            f"{where} lacks {', '.join(missing)}; it contains {', '.join(arrays) or 'nothing'}."
        )
    _say_unused(arrays, where, options)
    arrays, names = _numbered(arrays, read_names(arrays.get("class_names")), where)
    train, test = (
        _one_part(inputs[split], arrays, split, where, options) for split in ("train", "test")
    )
    _check_alike(train, test, where)
    classes = _are_classes(train.labels)
    if not classes:
        _check_measured(train, test, where, options)
    groups = arrays.get("groups_train")
    if groups is not None and groups.shape != train.labels.shape[:1]:
        raise DataError(
            f"{where}: groups_train has shape {groups.shape}; expected one group per training "
            f"example, {tuple(train.labels.shape[:1])}."
        )
    count = _count(train, test, arrays, options) if classes else 0
    return Raw(
        train=train,
        test=test,
        class_names=names or tuple(map(str, range(count))),
        named=bool(names),
        groups=groups,
        content=_content((train, test), groups),
    )


def _say_unused(arrays: Mapping[str, np.ndarray], where: str, options: DataOptions) -> None:
    """Name the arrays that nothing here reads."""
    read = {"class_names", "groups_train"}
    for split in ("train", "test"):
        read |= {f"x_{split}", f"y_{split}", f"{options.budget}_{split}"}
        read |= {name for name in arrays if name.startswith(f"x_{split}.")}
    unused = [name for name in arrays if name not in read]
    if unused:
        log.warning("%s: arrays that are left out: %s", where, ", ".join(unused))


def _numbered(
    arrays: Mapping[str, np.ndarray], names: tuple[str, ...], where: str
) -> tuple[Mapping[str, np.ndarray], tuple[str, ...]]:
    """Number labels that are names of classes, in the order of the alphabet or of class_names.

    Returns all arrays, and the names.
    """
    labels = {name: arrays[name] for name in ("y_train", "y_test")}
    if any(each.dtype.kind not in "US" or each.ndim != 1 for each in labels.values()):
        return arrays, names
    written = {name: read_names(each) for name, each in labels.items()}
    names, numbers = class_numbers(written, names, where)
    return {**arrays, **numbers}, names


def _content(parts: Sequence[ArrayExamples], groups: np.ndarray | None) -> str:
    """Fingerprint all arrays of a data set."""
    content = [tensor.numpy().tobytes() for part in parts for tensor in part.tensors()]
    if groups is not None:
        content.append(np.unique(groups, return_inverse=True)[1].tobytes())
    return fingerprint_bytes(*content)


def _count(
    train: ArrayExamples,
    test: ArrayExamples,
    arrays: Mapping[str, np.ndarray],
    options: DataOptions,
) -> int:
    """Count the classes, those of one-hot rows by their width."""
    if options.labels == "onehot":
        return int(arrays["y_train"].shape[1])
    return int(max(train.labels.max(), test.labels.max())) + 1


def _are_classes(targets: Tensor) -> bool:
    return targets.dim() == 1 and not targets.is_floating_point()


def _check_measured(
    train: ArrayExamples, test: ArrayExamples, where: str, options: DataOptions
) -> None:
    """Check targets that are no classes: numbers, labels by column, or masks."""
    one, other = train.labels, test.labels
    if one.shape[1:] != other.shape[1:] or one.dtype != other.dtype:
        raise DataError(
            f"{where}: training targets are {one.dtype} of shape {tuple(one.shape)}, test targets "
            f"{other.dtype} of shape {tuple(other.shape)}; expected the same but for the number of "
            "samples."
        )
    if options.labels != "keep":
        raise DataError(
            f"{where}: labels={options.labels} is for classes; targets are {one.dtype} of shape "
            f"{tuple(one.shape)}. Leave it away."
        )
    log.info("%s: targets of shape %s and type %s", where, tuple(one.shape), one.dtype)


def read_targets(values: np.ndarray, where: str) -> Tensor:
    """Read targets of one split.

    They are classes [N] or [N, 1], numbers [N] or [N, D], or masks [N, H, W].

    Raises:
        DataError: if they are no numbers, NaN or infinite, or no plausible classes.
    """
    if values.dtype.kind not in "iufb":
        raise DataError(f"{where}: targets are {values.dtype}; expected numbers.")
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise DataError(
                f"{where}: {int((~np.isfinite(values)).sum())} target values are NaN or infinite; "
                "leave these samples out."
            )
        return torch.from_numpy(values.astype(np.float32))
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim > 1:
        return torch.from_numpy(values.astype(np.int64))
    if values.min() < 0:
        raise DataError(
            f"{where}: labels must be integers from 0, but {values.min()} is among them; hidden "
            "labels cannot be used."
        )
    if values.max() >= MOST_CLASSES:
        raise DataError(
            f"{where}: the label {values.max()} is no plausible class; expected numbers below "
            f"{MOST_CLASSES:,}. An unsigned -1 looks like this."
        )
    return torch.from_numpy(values.astype(np.int64))


def _inputs(arrays: Mapping[str, np.ndarray], name: str) -> Any:
    """Return the arrays of inputs by their names after the dot."""
    if name in arrays:
        return {"": arrays[name]}
    start = f"{name}."
    return {key.removeprefix(start): arrays[key] for key in arrays if key.startswith(start)}


def read_names(given: np.ndarray | None) -> tuple[str, ...]:
    """Read an array of names, which may be bytes."""
    if given is None:
        return ()
    return tuple(
        name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        for name in given.tolist()
    )


def _check_alike(train: ArrayExamples, test: ArrayExamples, where: str) -> None:
    """Check that inputs of both splits have equal names, shapes, types."""
    one, other = (dict(named_leaves(part.inputs)) for part in (train, test))
    if one.keys() != other.keys():
        raise DataError(
            f"{where}: training inputs are {', '.join(one)}, test inputs {', '.join(other)}; "
            "expected the same."
        )
    for name, first in one.items():
        second = other[name]
        if first.shape[1:] != second.shape[1:] or first.dtype != second.dtype:
            raise DataError(
                f"{where}: training inputs {name and f'{name!r} '}have shape "
                f"{tuple(first.shape[1:])}, test inputs {tuple(second.shape[1:])}; types "
                f"{first.dtype} and {second.dtype}."
            )


def _one_part(
    inputs: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray],
    split: str,
    where: str,
    options: DataOptions,
) -> ArrayExamples:
    """Read inputs, targets and budgets of one split."""
    labels = arrays[f"y_{split}"]
    where = f"{where}, {split}"
    if labels.ndim < 1 or any(each.ndim < 2 - (name != "") for name, each in inputs.items()):
        shapes = ", ".join(f"{name}{each.shape}" for name, each in inputs.items())
        raise DataError(
            f"{where}: inputs have shape {shapes} and labels {labels.shape}; expected [N, "
            "...] and [N]."
        )
    for each in inputs.values():
        if len(each) == 0 or len(each) != len(labels):
            raise DataError(
                f"{where}: {len(each)} inputs and {len(labels)} labels; expected as many of each, "
                "and some."
            )
        if each.size == 0:
            raise DataError(
                f"{where}: inputs of shape {each.shape} hold no numbers; expected some per sample."
            )
    return ArrayExamples(
        inputs=_tree(inputs, where, options),
        labels=read_targets(_from_one_hot(labels, where, options), where),
        budgets=_budgets(arrays, split, where, options),
    )


def _from_one_hot(labels: np.ndarray, where: str, options: DataOptions) -> np.ndarray:
    """Give the places of the ones, if that is said."""
    if options.labels != "onehot":
        return labels
    ones = labels == 1
    if labels.ndim != 2 or not (ones | (labels == 0)).all() or not (ones.sum(1) == 1).all():
        raise DataError(
            f"{where}: labels=onehot is for rows of zeros with a single 1, [N, classes]; targets "
            f"of shape {labels.shape} are none. Leave it away."
        )
    places: np.ndarray = ones.argmax(1)
    return places


def _tree(inputs: Mapping[str, np.ndarray], where: str, options: DataOptions) -> Any:
    """Convert inputs to a tensor, or to several by their names."""
    if "" in inputs:
        return as_input(inputs[""], where, options.layout)
    if options.layout:
        raise DataError(
            f"{where}: layout={options.layout} is for one array of inputs, but there are "
            f"{', '.join(inputs)}, which reach the network as they are; leave it away."
        )
    # Several arrays are what the network takes by name, so their dimensions stay.
    return {
        name: torch.from_numpy(as_numbers(each, f"{where}, {name}"))
        for name, each in inputs.items()
    }


def _budgets(
    arrays: Mapping[str, np.ndarray], split: str, where: str, options: DataOptions
) -> Tensor | None:
    """Return the budgets of one split's samples, if the options name them."""
    if not options.budget:
        return None
    name = f"{options.budget}_{split}"
    if name not in arrays:
        raise DataError(
            f"{where}: budget={options.budget} asks for {name}, seconds per sample, but there are "
            f"{', '.join(arrays)}."
        )
    return checked_budgets(arrays[name], len(arrays[f"y_{split}"]), where)
