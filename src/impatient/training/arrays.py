"""Read arrays as people save them: pictures, series, vectors, token ids, and several together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from impatient.errors import DataError
from impatient.provenance import fingerprint_bytes
from impatient.training.examples import ArrayExamples, Raw
from impatient.training.options import DataOptions, read_options
from impatient.trees import named_leaves

log = logging.getLogger(__name__)

MOST_CLASSES = 1_000_000
NPZ_OPTIONS = ("layout", "mean", "std", "normalise", "labels")
# Numbers of channels by which a picture is known.
USUAL_CHANNELS = (1, 3, 4)


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
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
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
            x_train.input_ids and x_train.attention_mask. Optional are class_names and
            groups_train.
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
    train, test = (
        _one_part(inputs[split], arrays[f"y_{split}"], f"{where}, {split}", options)
        for split in ("train", "test")
    )
    _check_alike(train, test, where)
    names = read_names(arrays.get("class_names"))
    if not _are_classes(train.labels):
        return _measured(train, test, names, where, options)
    if options.labels == "renumber":
        train, test, names = _renumbered(train, test, names, where)
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    groups = arrays.get("groups_train")
    if groups is not None and groups.shape != train.labels.shape:
        raise DataError(
            f"{where}: groups_train has shape {groups.shape}; expected one group per training "
            f"example, {tuple(train.labels.shape)}."
        )
    content = [
        values.numpy().tobytes()
        for part in (train, test)
        for values in (*(tensor for _, tensor in named_leaves(part.inputs)), part.labels)
    ]
    if groups is not None:
        content.append(np.unique(groups, return_inverse=True)[1].tobytes())
    return Raw(
        train=train,
        test=test,
        class_names=names or tuple(map(str, range(classes))),
        named=bool(names),
        groups=groups,
        content=fingerprint_bytes(*content),
    )


def _are_classes(targets: Tensor) -> bool:
    return targets.dim() == 1 and not targets.is_floating_point()


def _measured(
    train: ArrayExamples,
    test: ArrayExamples,
    names: tuple[str, ...],
    where: str,
    options: DataOptions,
) -> Raw:
    """Make a data set whose targets are no classes: numbers, labels by column, or masks."""
    one, other = train.labels, test.labels
    if one.shape[1:] != other.shape[1:] or one.dtype != other.dtype:
        raise DataError(
            f"{where}: training targets are {one.dtype} of shape {tuple(one.shape)}, test targets "
            f"{other.dtype} of shape {tuple(other.shape)}; expected the same but for the number of "
            "samples."
        )
    if options.labels == "renumber":
        raise DataError(
            f"{where}: labels={options.labels} is for classes, [N]; targets have shape "
            f"{tuple(one.shape)}. Leave it away."
        )
    log.info("%s: targets of shape %s and type %s", where, tuple(one.shape), one.dtype)
    content = [
        values.numpy().tobytes()
        for part in (train, test)
        for values in (*(tensor for _, tensor in named_leaves(part.inputs)), part.labels)
    ]
    return Raw(
        train=train,
        test=test,
        class_names=names,
        named=bool(names),
        groups=None,
        content=fingerprint_bytes(*content),
    )


def read_targets(values: np.ndarray, where: str) -> Tensor:
    """Read targets: classes [N], or numbers [N], [N, D], or masks [N, H, W].

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
    """Return the inputs of one split: an array, or several by their names after the dot."""
    if name in arrays:
        return {"": arrays[name]}
    start = f"{name}."
    return {key.removeprefix(start): arrays[key] for key in arrays if key.startswith(start)}


def read_names(given: np.ndarray | None) -> tuple[str, ...]:
    """Read an array of names, of text or bytes; none if there is no array."""
    if given is None:
        return ()
    return tuple(
        name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        for name in given.tolist()
    )


def _check_alike(train: ArrayExamples, test: ArrayExamples, where: str) -> None:
    """Check that the inputs of both splits have the same names, shapes and types."""
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


def _renumbered(
    train: ArrayExamples, test: ArrayExamples, names: tuple[str, ...], where: str
) -> tuple[ArrayExamples, ArrayExamples, tuple[str, ...]]:
    """Number the classes that occur anew from 0; unnamed ones are called by their old numbers."""
    old = torch.cat([train.labels, test.labels]).unique()
    if names and len(names) != len(old):
        raise DataError(
            f"{where}: {len(old)} different labels and {len(names)} class names with "
            "labels=renumber; expected a name for each label, in their order."
        )
    parts = [
        ArrayExamples(part.inputs, torch.searchsorted(old, part.labels)) for part in (train, test)
    ]
    return parts[0], parts[1], names or tuple(map(str, old.tolist()))


def _one_part(
    inputs: Mapping[str, np.ndarray], labels: np.ndarray, where: str, options: DataOptions
) -> ArrayExamples:
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
    targets = read_targets(labels, where)
    if "" in inputs:
        return ArrayExamples(as_input(inputs[""], where, options.layout), targets)
    if options.layout:
        raise DataError(
            f"{where}: layout={options.layout} is for one array of inputs, but there are "
            f"{', '.join(inputs)}, which reach the network as they are; leave it away."
        )
    # Several arrays are what the network takes by name, so their dimensions stay.
    tree = {
        name: torch.from_numpy(_numbers(each, f"{where}, {name}")) for name, each in inputs.items()
    }
    return ArrayExamples(tree, targets)


def as_input(inputs: np.ndarray, where: str, layout: str = "") -> Tensor:
    """Convert an array to what a network takes: pictures [N,C,H,W], anything else as it stands.

    Args:
        inputs: pictures, series, vectors or token ids, [N, ...].
        where: name of the array in errors.
        layout: what each dimension is; empty to go by shape and type.
    Raises:
        DataError: if values are no finite numbers, or the array can be read in several ways.
    """
    letters = _checked_layout(inputs, where, layout) if layout else _layout(inputs, where)
    picture = "H" in letters
    values = _numbers(inputs, where, ids=letters == "NT", picture=picture)
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if letters == "NHW":
        return tensor[:, None]
    return tensor.permute(0, 3, 1, 2).contiguous() if letters == "NHWC" else tensor


def _checked_layout(inputs: np.ndarray, where: str, layout: str) -> str:
    if len(layout) != inputs.ndim:
        raise DataError(
            f"{where}: layout={layout} has {len(layout)} dimensions, but the inputs have shape "
            f"{inputs.shape}; expected a letter per dimension."
        )
    if layout == "NT" and inputs.dtype.kind not in "iu":
        raise DataError(
            f"{where}: layout=NT is for token ids, but the inputs are {inputs.dtype}; expected "
            "integers. Say layout=ND for features."
        )
    return layout


def _layout(inputs: np.ndarray, where: str) -> str:
    """Tell what the dimensions of an array are, where shape and type leave one reading.

    "N..." are dimensions that stay as they are.
    """
    dims = inputs.ndim
    whole = inputs.dtype.kind in "iu" and inputs.dtype != np.uint8
    if whole and dims == 2:
        if inputs.min() >= 0:
            return "NT"
        raise _ambiguous(
            inputs, where, "token ids, which are not negative", "ND", "measured numbers"
        )
    if whole:
        raise _ambiguous(
            inputs,
            where,
            "pictures or token ids" if dims == 4 else "series or token ids",
            "NHWC or layout=NCHW" if dims == 4 else "NCT or layout=NTC",
            "pictures (save them as uint8, or as floats from 0 to 1)" if dims == 4 else "series",
        )
    if dims == 3 and inputs.dtype == np.uint8:
        return "NHW"
    if dims == 3 and inputs.dtype.kind == "f":
        if inputs.shape[1] == inputs.shape[2]:
            raise _ambiguous(
                inputs, where, "grey pictures or series", "NHW", "pictures, NCT or NTC for series"
            )
        log.info("%s: %s is taken for series; grey pictures need layout=NHW", where, inputs.shape)
    return _picture_layout(inputs, where) if dims == 4 else "N..."


def _picture_layout(inputs: np.ndarray, where: str) -> str:
    """Tell whether pictures have their channels first or last."""
    first, second, third = inputs.shape[1:]
    can_be_first = first in USUAL_CHANNELS
    can_be_last = third in USUAL_CHANNELS
    if can_be_first != can_be_last:
        return "NCHW" if can_be_first else "NHWC"
    square_first = second == third
    square_last = first == second
    if square_first != square_last:
        return "NCHW" if square_first else "NHWC"
    raise _ambiguous(
        inputs, where, "pictures with channels first or last", "NCHW", "the first, NHWC the last"
    )


def _ambiguous(
    inputs: np.ndarray, where: str, readings: str, layout: str, meaning: str
) -> DataError:
    return DataError(
        f"{where}: inputs of shape {inputs.shape} and type {inputs.dtype} could be {readings}; "
        f"expected to be told. Say layout={layout} for {meaning}."
    )


def _numbers(
    inputs: np.ndarray, where: str, *, ids: bool = True, picture: bool = False
) -> np.ndarray:
    """Convert to float32, uint8 or int64, whichever fits.

    Args:
        ids: integers that are not bytes are token ids or masks; otherwise they are measured.
        picture: integers are brightness, from 0 to 255 or 65535.
    """
    if np.issubdtype(inputs.dtype, np.floating):
        with np.errstate(over="ignore"):
            inputs = inputs.astype(np.float32)
        if not np.isfinite(inputs).all():
            raise DataError(
                f"{where}: {int((~np.isfinite(inputs)).sum())} input values are NaN or infinite; "
                "clean them first."
            )
        return inputs
    if inputs.dtype.kind not in "iub":
        raise DataError(
            f"{where}: inputs are {inputs.dtype}; expected floats, bytes (uint8) or token ids "
            "(integers)."
        )
    if inputs.dtype == np.uint8:
        return inputs
    if picture and inputs.dtype.kind != "b":
        return _brightness(inputs, where)
    return inputs.astype(np.int64 if ids or inputs.dtype.kind == "b" else np.float32)


def _brightness(inputs: np.ndarray, where: str) -> np.ndarray:
    """Convert pictures of wide integers to bytes, or to floats from 0 to 1 if they have 16 bits."""
    least, most = int(inputs.min()), int(inputs.max())
    if least < 0 or most > 65535:
        raise DataError(
            f"{where}: pictures hold numbers from {least} to {most}; expected 0 to 255, or 0 to "
            "65535 for 16 bits. Save them as floats."
        )
    if inputs.dtype == np.uint16:
        return inputs.astype(np.float32) / np.float32(65535.0)
    if most > 255:
        raise DataError(
            f"{where}: pictures of type {inputs.dtype} hold numbers up to {most}; expected at most "
            "255. Save 16 bits as uint16."
        )
    return inputs.astype(np.uint8)
