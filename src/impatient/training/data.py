"""Data sets with three named splits: train, validation and test.

The validation split is taken from the training examples, by a seed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from impatient import checks
from impatient.errors import DataError
from impatient.provenance import fingerprint_bytes
from impatient.training.pictures import (
    class_files,
    image_tensor,
    read_image,
    shown_size,
    size_of,
    split_folders,
)

Split = Literal["train", "validation", "test"]
MOST_CLASSES = 1_000_000
SPLITS: tuple[Split, ...] = get_args(Split)
Indices = Sequence[int] | Tensor | np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """Conversion of raw inputs to the input of a network.

    Bytes are scaled to [0, 1]. Then the mean is subtracted and the result divided by the standard
    deviation.

    Attributes:
        mean: mean per channel; empty for token ids, which are not changed.
        std: standard deviation per channel; empty for token ids.
        size: height and width of images; None for other inputs.
        channels: number of channels of images; 0 for other inputs.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None
    channels: int = 0

    def __post_init__(self) -> None:
        fit = len(self.mean) == len(self.std) and self.channels in (0, len(self.mean))
        if not fit or not all(map(math.isfinite, self.mean)):
            raise DataError(
                f"mean={self.mean} and std={self.std} for {self.channels} channels; expected a "
                "finite number of each per channel."
            )
        for std in self.std:
            checks.positive(DataError, std=std)

    def __call__(self, raw: Tensor) -> Tensor:
        """Convert raw inputs, batch first, on the device of `raw`."""
        if not self.mean:
            return raw
        x = raw.float().div_(255.0) if raw.dtype == torch.uint8 else raw.float()
        shape = (1, -1, *(1,) * (raw.dim() - 2))
        mean = torch.tensor(self.mean, device=x.device).view(shape)
        std = torch.tensor(self.std, device=x.device).view(shape)
        return (x - mean) / std

    def image(self, path: str | Path) -> Tensor:
        """Read one image file as raw input [1, C, H, W], uint8.

        Raises:
            DataError: if the file is missing or not an image, or if the network does not take
                images.
        """
        if self.size is None:
            raise DataError(
                f"cannot read {path}: this network was trained on inputs that are not images."
            )
        return read_image(Path(path), self.size, self.channels)[None]


class Examples(Protocol):
    """Raw inputs and labels of one split, by index."""

    @property
    def labels(self) -> Tensor:
        """Return the true classes, int64 [N]."""
        ...

    def take(self, indices: Indices) -> Tensor:
        """Return the raw inputs at these indices, batch first."""
        ...

    def subset(self, indices: Indices) -> Examples:
        """Return the examples at these indices."""
        ...


@dataclass(frozen=True, slots=True)
class ArrayExamples:
    """Inputs held in memory."""

    inputs: Tensor
    labels: Tensor

    def take(self, indices: Indices) -> Tensor:
        return self.inputs[torch.as_tensor(indices)]

    def subset(self, indices: Indices) -> ArrayExamples:
        return ArrayExamples(self.take(indices), self.labels[torch.as_tensor(indices)])


@dataclass(frozen=True, slots=True)
class LazyExamples:
    """Images that threads decode when they are asked for.

    Threads help because decoding releases Python's global lock.
    """

    sources: Sequence[Any]
    labels: Tensor
    read: Callable[[Any], Tensor]
    threads: concurrent.futures.ThreadPoolExecutor

    def take(self, indices: Indices) -> Tensor:
        return torch.stack(list(self.threads.map(self.read, self._chosen(indices))))

    def subset(self, indices: Indices) -> LazyExamples:
        return dataclasses.replace(
            self, sources=self._chosen(indices), labels=self.labels[torch.as_tensor(indices)]
        )

    def _chosen(self, indices: Indices) -> list[Any]:
        return [self.sources[int(index)] for index in indices]


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """A labelled data set with raw examples per split and their preprocessing.

    Attributes:
        name: specification that the data set was loaded from.
        splits: raw examples of "train", "validation" and "test".
        class_names: name of each class.
        preprocess: conversion of raw inputs to the network's input, fitted on the training split.
        fingerprint: hash that changes when the data or the splits change.
    """

    name: str
    splits: Mapping[Split, Examples]
    class_names: tuple[str, ...]
    preprocess: Preprocess
    fingerprint: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def size(self, split: Split) -> int:
        return len(self.examples(split).labels)

    def examples(self, split: Split) -> Examples:
        """Raw examples of one split.

        Raises:
            DataError: if there is no such split.
        """
        if split not in self.splits:
            raise DataError(f"no split {split!r}; there are {', '.join(SPLITS)}.")
        return self.splits[split]

    def batches(self, split: Split, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield preprocessed inputs with their labels, in order."""
        examples = self.examples(split)
        for indices in torch.arange(len(examples.labels)).split(batch_size):
            yield self.preprocess(examples.take(indices)), examples.labels[indices]

    def example(self, batch_size: int = 1) -> Tensor:
        """Return the first training inputs, preprocessed."""
        count = min(batch_size, self.size("train"))
        return self.preprocess(self.examples("train").take(range(count)))


def load_data(spec: str, *, seed: int = 0, validation: float = 0.1) -> Data:
    """Load a data set by name.

    Args:
        spec: name of the data set: "digits" (1,797 images 8x8, comes with scikit-learn); "npz:FILE"
            with x_train, y_train, x_test, y_test; "imagefolder:DIR" with DIR/train/CLASS/* and
            DIR/test/CLASS/*; "hf:NAME-OR-PATH" (Hugging Face datasets with an image column).
            Options follow after a colon: "imagefolder:DIR:size=64".
        seed: seed that chooses the validation split.
        validation: share of the training examples held out for validation, stratified by class.
    Raises:
        DataError: if the data set is missing, empty or malformed.
    """
    checks.true_share(DataError, validation=validation)
    checks.not_negative(DataError, seed=seed)
    source, _, rest = spec.partition(":")
    loaders: dict[str, Callable[[str], _Raw]] = {
        "digits": _digits,
        "npz": _npz,
        "imagefolder": _imagefolder,
        "hf": _hugging_face,
    }
    if source not in loaders or (source != "digits" and not rest):
        raise DataError(
            f"cannot read the data spec {spec!r}; expected digits, npz:FILE, imagefolder:DIR or "
            "hf:NAME-OR-PATH."
        )
    return _finish(spec, loaders[source](rest), seed, validation)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Raw:
    """Examples of a data set before the validation split is taken out.

    Attributes:
        train: examples for training and validation.
        test: examples for the test split.
        class_names: name of each class.
        groups: group of each training example, or None; a group is never split between training and
            validation.
        content: fingerprint of the examples.
    """

    train: Examples
    test: Examples
    class_names: tuple[str, ...]
    groups: np.ndarray | None = None
    content: str


def _finish(name: str, raw: _Raw, seed: int, validation: float) -> Data:
    _check_labels(name, raw)
    labels = raw.train.labels.numpy()
    held_out = _held_out(labels if raw.groups is None else raw.groups, labels, seed, validation)
    splits: dict[Split, Examples] = {
        "train": raw.train.subset(np.flatnonzero(~held_out)),
        "validation": raw.train.subset(np.flatnonzero(held_out)),
        "test": raw.test,
    }
    fingerprint = fingerprint_bytes(raw.content.encode(), f"{seed}|{validation}".encode())
    return Data(
        name=name,
        splits=splits,
        class_names=raw.class_names,
        preprocess=_fit_preprocess(splits["train"]),
        fingerprint=fingerprint,
    )


def _check_labels(name: str, raw: _Raw) -> None:
    train, test = (set(part.labels.tolist()) for part in (raw.train, raw.test))
    least = min(train | test)
    largest = max(train | test)
    if least < 0:
        raise DataError(
            f"{name}: labels must be integers from 0, but {least} is among them; hidden labels "
            "cannot be used."
        )
    if largest >= len(raw.class_names):
        raise DataError(
            f"{name} names {len(raw.class_names)} classes, but labels go up to {largest}."
        )
    unseen = [raw.class_names[label] for label in sorted(test - train)]
    if unseen:
        raise DataError(
            f"{name}: classes {', '.join(unseen[:10])} are in the test split but not in the "
            "training split."
        )


def _held_out(groups: np.ndarray, labels: np.ndarray, seed: int, share: float) -> np.ndarray:
    """Choose the examples to hold out, as a mask.

    A share of each class is held out, or of each class's groups where groups are given. Every class
    keeps at least one training example. A group is held out completely, even where it has examples
    of several classes.
    """
    random = np.random.default_rng(seed)
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        if groups is labels:
            mask[random.permutation(places)[: _held_out_count(len(places), share)]] = True
        else:
            kinds = random.permutation(np.unique(groups[places]))
            already = len(np.unique(groups[places[mask[places]]]))
            wanted = _held_out_count(len(kinds), share) - already
            mask = _with_groups(mask, kinds, wanted, groups, labels)
    if not mask.any() or mask.all():
        raise DataError(
            f"{len(labels)} training examples are too few to hold out {share:.0%} for validation; "
            "add data."
        )
    return mask


def _held_out_count(count: int, share: float) -> int:
    return min(max(1, round(share * count)), count - 1)


def _with_groups(
    mask: np.ndarray, kinds: np.ndarray, wanted: int, groups: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Add groups to a mask until as many are held out as wanted.

    A group is skipped if a class would be left without training examples.
    """
    classes = len(np.unique(labels))
    for kind in kinds:
        if wanted <= 0:
            break
        more = mask | (groups == kind)
        if not np.array_equal(more, mask) and len(np.unique(labels[~more])) == classes:
            mask = more
            wanted = wanted - 1
    return mask


def _fit_preprocess(train: Examples, most: int = 2000) -> Preprocess:
    """Compute mean and standard deviation of up to `most` training inputs.

    They are computed per channel for images and over all features for vectors.
    """
    count = len(train.labels)
    sample = train.take(range(0, count, max(1, count // most)))
    if sample.dtype in (torch.int64, torch.int32):
        return Preprocess(mean=(), std=())
    values = sample.float() / (255.0 if sample.dtype == torch.uint8 else 1.0)
    dims = (0, *range(2, values.dim())) if values.dim() > 2 else tuple(range(values.dim()))
    mean = values.mean(dims).reshape(-1)
    std = values.std(dims).reshape(-1).clamp_min(1e-3)
    image = values.dim() == 4
    return Preprocess(
        mean=tuple(round(float(value), 6) for value in mean),
        std=tuple(round(float(value), 6) for value in std),
        size=(values.shape[2], values.shape[3]) if image else None,
        channels=values.shape[1] if image else 0,
    )


def _digits(rest: str) -> _Raw:
    if rest:
        raise DataError(f"digits takes no options, got {rest!r}.")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    test = _carved_out(bunch.target)
    arrays = {
        "x_train": images[~test],
        "y_train": bunch.target[~test],
        "x_test": images[test],
        "y_test": bunch.target[test],
    }
    return _arrays(arrays, where="digits")


def _carved_out(labels: np.ndarray) -> np.ndarray:
    """Choose a fifth of the examples for the test split, as a mask.

    The choice does not depend on the user's seed.
    """
    return _held_out(labels, labels, seed=0, share=0.2)


def _npz(rest: str) -> _Raw:
    path = Path(rest).expanduser()
    if not path.is_file():
        raise DataError(
            f"no data file {path}; expected an npz file with x_train, y_train, x_test and y_test."
        )
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:
        # numpy raises ValueError, zipfile.BadZipFile, EOFError, zlib.error and others.
        raise DataError(
            f"{path} cannot be read as an npz file of plain arrays: {error}. Was it cut short?"
        ) from error
    return _arrays(arrays, where=str(path))


def _arrays(arrays: Mapping[str, np.ndarray], where: str) -> _Raw:
    missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in arrays]
    if missing:
        raise DataError(
            f"{where} lacks {', '.join(missing)}; it contains {', '.join(arrays) or 'nothing'}."
        )
    train = _one_part(arrays["x_train"], arrays["y_train"], f"{where}, train")
    test = _one_part(arrays["x_test"], arrays["y_test"], f"{where}, test")
    if train.inputs.shape[1:] != test.inputs.shape[1:] or train.inputs.dtype != test.inputs.dtype:
        raise DataError(
            f"{where}: training inputs have shape {tuple(train.inputs.shape[1:])}, test inputs "
            f"{tuple(test.inputs.shape[1:])}; types {train.inputs.dtype} and {test.inputs.dtype}."
        )
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    names = tuple(map(str, arrays.get("class_names", range(classes))))
    groups = arrays.get("groups_train")
    if groups is not None and groups.shape != train.labels.shape:
        raise DataError(
            f"{where}: groups_train has shape {groups.shape}; expected one group per training "
            f"example, {tuple(train.labels.shape)}."
        )
    content = [
        values.numpy().tobytes()
        for values in (train.inputs, train.labels, test.inputs, test.labels)
    ]
    if groups is not None:
        content.append(np.unique(groups, return_inverse=True)[1].tobytes())
    return _Raw(
        train=train,
        test=test,
        class_names=names,
        groups=groups,
        content=fingerprint_bytes(*content),
    )


def _one_part(inputs: np.ndarray, labels: np.ndarray, where: str) -> ArrayExamples:
    if inputs.ndim < 2 or labels.ndim < 1:
        raise DataError(
            f"{where}: inputs have shape {inputs.shape} and labels {labels.shape}; expected [N, "
            "...] and [N]."
        )
    if len(inputs) == 0 or len(inputs) != len(labels):
        raise DataError(
            f"{where}: {len(inputs)} inputs and {len(labels)} labels; expected as many of each, "
            "and some."
        )
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise DataError(
            f"{where}: labels must be a list of integers from 0, got {labels.dtype} of shape "
            f"{labels.shape}."
        )
    if labels.max() >= MOST_CLASSES:
        raise DataError(
            f"{where}: the label {labels.max()} is no plausible class; expected numbers below "
            f"{MOST_CLASSES:,}. An unsigned -1 looks like this."
        )
    if inputs.ndim == 4 and inputs.dtype.kind in "iu" and inputs.dtype != np.uint8:
        raise DataError(
            f"{where}: inputs of shape {inputs.shape} are {inputs.dtype}, which could be pictures "
            "or token ids. Save pictures as uint8, or as floats from 0 to 1; token ids as [N, T]."
        )
    if np.issubdtype(inputs.dtype, np.floating):
        with np.errstate(over="ignore"):
            inputs = inputs.astype(np.float32)
        if not np.isfinite(inputs).all():
            raise DataError(
                f"{where}: {int((~np.isfinite(inputs)).sum())} input values are NaN or infinite; "
                "clean them first."
            )
    elif inputs.dtype.kind not in "iub":
        raise DataError(
            f"{where}: inputs are {inputs.dtype}; expected floats, bytes (uint8) or token ids "
            "(integers)."
        )
    elif inputs.dtype != np.uint8:
        # Integers that are not bytes are token ids.
        inputs = inputs.astype(np.int64)
    return ArrayExamples(
        _channels_first(torch.from_numpy(np.ascontiguousarray(inputs))),
        torch.from_numpy(labels.astype(np.int64)),
    )


def _channels_first(inputs: Tensor) -> Tensor:
    """Convert images [N,H,W] or [N,H,W,C] to [N,C,H,W] and leave other inputs unchanged."""
    if inputs.dtype == torch.int64 or inputs.dim() < 3:
        return inputs
    if inputs.dim() == 3:
        return inputs[:, None]
    if inputs.dim() == 4 and inputs.shape[3] in (1, 3, 4) and inputs.shape[1] not in (1, 3):
        return inputs.permute(0, 3, 1, 2).contiguous()
    return inputs


def _imagefolder(rest: str) -> _Raw:
    name, size = _path_and_size(rest)
    root = Path(name).expanduser()
    if not root.is_dir():
        raise DataError(
            f"no folder {root}; expected one with train/CLASS/*.png and test/CLASS/*.png."
        )
    files = {split: class_files(folder) for split, folder in split_folders(root).items()}
    classes = sorted({label for found in files.values() for _, label in found})
    if not classes:
        raise DataError(f"no images in {root}; expected train/CLASS/*.png and test/CLASS/*.png.")
    numbers = {label: number for number, label in enumerate(classes)}
    if "test" not in files:
        test = _carved_out(np.array([numbers[label] for _, label in files["train"]]))
        both = list(zip(files["train"], test, strict=True))
        files = {
            "train": [file for file, is_test in both if not is_test],
            "test": [file for file, is_test in both if is_test],
        }
    rows = {
        split: [
            (path, f"{path.parent.name}/{path.name}/{path.stat().st_size}", numbers[label])
            for path, label in found
        ]
        for split, found in files.items()
    }
    some = files["train"][:: max(1, len(files["train"]) // 50)]
    shown = size or _common_size(size_of(path) for path, _ in some)
    return _lazy(rows, classes, lambda path: read_image(path, shown, 3), shown)


def _common_size(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the size that all images have, or 224 x 224."""
    found = set(sizes)
    return found.pop() if len(found) == 1 else (224, 224)


def _path_and_size(rest: str) -> tuple[str, tuple[int, int] | None]:
    """Split "PATH:size=64" into the path and the size of square images."""
    path, colon, options = rest.rpartition(":")
    if not colon or "=" not in options:
        return rest, None
    key, _, value = options.partition("=")
    if key != "size" or not value.isdecimal() or int(value) == 0:
        raise DataError(
            f"cannot read the options {options!r}; expected a size in pixels, such as size=64."
        )
    return path, (int(value), int(value))


def _lazy(
    rows: Mapping[str, Sequence[tuple[Any, str, int]]],
    classes: Sequence[str],
    read: Callable[[Any], Tensor],
    size: tuple[int, int],
) -> _Raw:
    """Make a data set of images that are decoded on demand.

    Args:
        rows: for "train" and "test", the source, the identity and the label of each image.
        classes: name of each class.
        read: function that makes the raw input from a source.
        size: height and width of the inputs.
    """
    empty = [split for split in ("train", "test") if not rows[split]]
    if empty:
        raise DataError(f"no images for {' and '.join(empty)}.")
    threads = concurrent.futures.ThreadPoolExecutor(max_workers=4, thread_name_prefix="decode")

    def examples(split: str) -> LazyExamples:
        sources, _, labels = zip(*rows[split], strict=True)
        return LazyExamples(sources, torch.tensor(labels, dtype=torch.int64), read, threads)

    listed = "".join(
        f"{identity}:{label};" for _, identity, label in (*rows["train"], *rows["test"])
    )
    return _Raw(
        train=examples("train"),
        test=examples("test"),
        class_names=tuple(classes),
        content=fingerprint_bytes(listed.encode(), f"{size}".encode()),
    )


def _hugging_face(rest: str) -> _Raw:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "hf: needs the package datasets. Install it with: pip install 'impatient[hub]'."
        ) from error
    name, size = _path_and_size(rest)
    saved = (Path(name) / "dataset_dict.json").is_file()
    try:
        tables = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:
        raise DataError(f"datasets cannot load {name!r}: {error}") from error
    if "train" not in tables:
        raise DataError(
            f"{name} has the splits {', '.join(tables) or 'none'}; expected train, and test or "
            "validation."
        )
    if not {"test", "validation"} & tables.keys():
        # The test split must not change with the user's seed.
        tables = tables["train"].train_test_split(test_size=0.2, seed=0)
    train = tables["train"]
    test = tables["test" if "test" in tables else "validation"]
    image, label = _columns(train, datasets, name)
    rows = {
        split: [
            ((table, place), f"{table._fingerprint}/{place}", number)
            for place, number in enumerate(table[label])
        ]
        for split, table in (("train", train), ("test", test))
    }
    numbers = [number for split in rows.values() for _, _, number in split]
    odd = [place for place, number in enumerate(numbers) if not isinstance(number, int)]
    if odd:
        row = odd[0] if odd[0] < len(train) else odd[0] - len(train)
        raise DataError(
            f"{name}: labels must be integers, but {numbers[odd[0]]!r} is among them, in row {row} "
            f"of {'train' if odd[0] < len(train) else 'test'}; make the column a ClassLabel."
        )

    def read(source: tuple[Any, int]) -> Tensor:
        table, place = source
        return image_tensor(_picture(table, place, image), shown, 3, f"picture {place}")

    feature = train.features[label]
    named = isinstance(feature, datasets.ClassLabel)
    classes = feature.names if named else map(str, range(max(train[label]) + 1))
    some = range(min(50, len(train)))
    shown = size or _common_size(shown_size(_picture(train, place, image)) for place in some)
    return _lazy(rows, list(classes), read, shown)


def _picture(table: Any, place: int, column: str) -> Any:
    """Decode the picture of one row.

    Raises:
        DataError: if there is none, or it is damaged.
    """
    try:
        picture = table[place][column]
    except Exception as error:
        # Pillow's errors, and those of datasets for files that are gone.
        raise DataError(f"picture {place} is damaged: {error}.") from error
    if picture is None:
        raise DataError(f"row {place} has no picture; remove the row.")
    return picture


def _columns(table: Any, datasets: Any, name: str) -> tuple[str, str]:
    """Return the names of the image column and of the label column."""

    def of_kind(kind: type) -> list[str]:
        return [column for column, feature in table.features.items() if isinstance(feature, kind)]

    images = of_kind(datasets.Image)
    labels = of_kind(datasets.ClassLabel)
    labels += [column for column in ("label", "labels") if column in table.features]
    if not images or not labels:
        raise DataError(
            f"{name} has columns {dict(table.features)}; expected an image column and a class "
            "label. Text must be turned into token ids first and saved as npz (x_train: int64 [N, "
            "T])."
        )
    return images[0], labels[0]
