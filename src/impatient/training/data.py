"""Data sets with three named splits: train, validation and test.

The validation split is taken from the training examples, by a seed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from impatient import checks
from impatient.errors import DataError
from impatient.networks.transforms import Transform
from impatient.provenance import fingerprint_bytes
from impatient.training.arrays import from_arrays, npz
from impatient.training.datasets import from_datasets
from impatient.training.examples import Examples, Raw, rows_of
from impatient.training.folders import imagefolder
from impatient.training.hugging_face import hugging_face
from impatient.training.options import DataOptions
from impatient.training.preprocess import Preprocess, as_expected, fit_preprocess
from impatient.training.samples import Samples
from impatient.training.splitting import carved_out, held_out_mask
from impatient.training.text import text
from impatient.trees import Ragged, size

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """A labelled data set with raw examples per split and their preprocessing.

    Samples and targets are tensors, or trees of them (see `impatient.trees`).

    Attributes:
        name: specification that the data set was loaded from.
        splits: raw examples of "train", "validation" and "test".
        class_names: name of each class; empty where the targets are no classes.
        preprocess: conversion of raw inputs to the network's input, fitted on the training split.
        fingerprint: hash that changes when the data or the splits change.
    """

    name: str
    splits: Mapping[Split, Examples]
    class_names: tuple[str, ...]
    preprocess: Preprocess
    fingerprint: str

    @classmethod
    def of(
        cls,
        train: Any,
        validation: Any = None,
        test: Any = None,
        *,
        samples: Samples | None = None,
        class_names: Sequence[str] = (),
        options: DataOptions | None = None,
        name: str = "data of your own",
        seed: int = 0,
        share: float = 0.1,
    ) -> Data:
        """Make a data set of torch data sets, loaders or samples.

        They are read once, for their targets and a fingerprint; inputs are read again when they are
        asked for. What has no order, such as a generator, is kept in memory.

        Args:
            train: a map-style data set, a `DataLoader`, or anything finite to go through once.
            validation: the same; by default a share of `train`, chosen by the seed.
            test: the same; by default a fifth of `train`, whatever the seed.
            samples: where the target stands in a sample, and how samples are batched. By default a
                sample is a pair (input, target), or has one entry with a usual name of targets.
            class_names: names of the classes; by default their numbers.
            options: what is done to inputs; by default they reach the network as they are.
            name: name of the data in messages.
            seed: seed that chooses the validation split.
            share: share of the training examples held out for validation.
        Raises:
            DataError: if the form of the data or of a sample is not known, or samples do not fit
                together.
        Example:
            >>> x, y = torch.randn(100, 4), torch.arange(100) % 2
            >>> data = Data.of(torch.utils.data.TensorDataset(x, y))
            >>> [data.size(split) for split in ("train", "validation", "test")]
            [72, 8, 20]
        """
        checks.true_share(DataError, share=share)
        checks.not_negative(DataError, seed=seed)
        options = options or DataOptions(normalise="none")
        options.require_only("mean", "std", "normalise", "layout")
        parts = {"train": train, "validation": validation, "test": test}
        given = {split: part for split, part in parts.items() if part is not None}
        raw = from_datasets(given, samples or Samples(), name, class_names)
        return _finish(name, raw, options, seed, share)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def size(self, split: Split) -> int:
        return size(self.examples(split).labels)

    def examples(self, split: Split) -> Examples:
        """Raw examples of one split.

        Raises:
            DataError: if there is no such split.
        """
        if split not in self.splits:
            raise DataError(f"no split {split!r}; there are {', '.join(SPLITS)}.")
        return self.splits[split]

    def budgets(self, split: Split) -> Tensor | None:
        """Return the seconds that each sample may take, float64 [N], or None."""
        return self.examples(split).budgets

    def by_length(self, split: Split) -> Tensor | None:
        """Return the places of all samples, the shortest first, int64 [N], or None.

        In batches of this order little is padding. None is for samples of one length.
        """
        lengths = self.examples(split).lengths
        return None if lengths is None else lengths.argsort(stable=True)

    def batches(
        self, split: Split, batch_size: int = 256, order: Tensor | None = None
    ) -> Iterator[tuple[Any, Any]]:
        """Yield preprocessed inputs with their labels.

        Args:
            split: "train", "validation" or "test".
            batch_size: samples at a time; the last batch may have fewer.
            order: places of the samples, int64 [N]; by default as they are.
        Raises:
            DataError: if there is no such split.
        """
        examples = self.examples(split)
        places = torch.arange(self.size(split)) if order is None else order
        for indices in places.split(batch_size):
            yield self.preprocess(examples.take(indices)), rows_of(examples.labels, indices)

    def example(self, batch_size: int = 1) -> Any:
        """Return the first training inputs, preprocessed.

        Where lengths differ, as of texts, it begins at a sample that nine in ten do not exceed:
        what is measured with it should be enough for most.
        """
        examples = self.examples("train")
        count = self.size("train")
        first = 0
        shortest_first = self.by_length("train")
        if shortest_first is not None:
            first = int(shortest_first[int(0.9 * (count - 1))])
        places = [(first + place) % count for place in range(min(batch_size, count))]
        return self.preprocess(examples.take(places))

    @property
    def task_hint(self) -> str:
        """Name the task that the targets look like.

        It is "classification", "binary", "multi_label", "regression", "segmentation", "detection",
        or "" where none fits.
        """
        return task_of(self.examples("train").labels)


def task_of(targets: Any) -> str:
    """Name the task that targets look like, or "" if none fits."""
    if isinstance(targets, Ragged):
        boxes = all(
            isinstance(each, Mapping) and {"boxes", "labels"} <= set(each) for each in targets
        )
        return "detection" if boxes else ""
    if not isinstance(targets, Tensor):
        return ""
    if targets.is_floating_point():
        zero_or_one = bool(((targets == 0) | (targets == 1)).all())
        multi = targets.dim() == 2 and targets.shape[1] > 1 and zero_or_one
        return "multi_label" if multi else "regression" if targets.dim() <= 2 else ""
    names = {1: "classification", 3: "segmentation"}
    zero_or_one = bool(((targets == 0) | (targets == 1)).all())
    return "multi_label" if targets.dim() == 2 and zero_or_one else names.get(targets.dim(), "")


def load_data(
    spec: str, *, seed: int = 0, validation: float = 0.1, transform: Transform | None = None
) -> Data:
    """Load a data set by name.

    Args:
        spec: name of the data set: "digits" (1,797 images 8x8, comes with scikit-learn); "npz:FILE"
            with x_train, y_train, x_test, y_test; "imagefolder:DIR" with DIR/train/CLASS/* and
            DIR/test/CLASS/*, or masks=NAME; "text:FILE-OR-DIR" (csv, tsv, jsonl or parquet, with
            tokenizer=NAME-OR-DIR); "hf:NAME-OR-PATH" (Hugging Face datasets with a column of
            images, or of text with tokenizer=). Options follow after a colon:
            "imagefolder:DIR:size=64,mean=0.5,std=0.25".
        seed: seed that chooses the validation split.
        validation: share of the training examples held out for validation, stratified by class.
        transform: what trained weights expect to be done to pictures
            (`impatient.networks.transform_of`), unless the spec says otherwise. Pictures in files
            get its size; arrays keep theirs.
    Raises:
        DataError: if the data set is missing, empty or malformed.
    """
    checks.true_share(DataError, validation=validation)
    checks.not_negative(DataError, seed=seed)
    source, _, rest = spec.partition(":")
    loaders: dict[str, Callable[[str], tuple[Raw, DataOptions]]] = {
        "digits": _digits,
        "npz": npz,
        "imagefolder": functools.partial(imagefolder, transform=transform),
        "text": text,
        "hf": functools.partial(hugging_face, transform=transform),
    }
    if source not in loaders or (source != "digits" and not rest):
        raise DataError(
            f"cannot read the data spec {spec!r}; expected digits, npz:FILE, imagefolder:DIR, "
            "text:FILE-OR-DIR or hf:NAME-OR-PATH."
        )
    raw, options = loaders[source](rest)
    if options.labels == "onehot" and source != "npz":
        raise DataError(f"{spec}: labels=onehot is for npz files; leave it away.")
    return _finish(spec, raw, options, seed, validation, transform)


def _finish(
    name: str,
    raw: Raw,
    options: DataOptions,
    seed: int,
    validation: float,
    transform: Transform | None = None,
) -> Data:
    classes = task_of(raw.train.labels) == "classification"
    if classes and options.labels == "renumber":
        raw = _renumbered(name, raw)
    if classes:
        _check_labels(name, raw)
    splits = _splits(raw, classes, seed, validation)
    if classes:
        _check_classes(name, raw)
    if transform is not None:
        options = as_expected(name, raw.train, options, transform)
    fingerprint = fingerprint_bytes(
        raw.content.encode(), f"{seed}|{validation}".encode(), options.said.encode()
    )
    return Data(
        name=name,
        splits=splits,
        class_names=raw.class_names,
        preprocess=fit_preprocess(splits["train"], options, raw.resizing),
        fingerprint=fingerprint,
    )


def _splits(raw: Raw, classes: bool, seed: int, share: float) -> dict[Split, Examples]:
    """Take a validation split out of the training examples."""
    if raw.validation is not None:
        return {"train": raw.train, "validation": raw.validation, "test": raw.test}
    count = size(raw.train.labels)
    # without classes, there is nothing to stratify by
    labels = raw.train.labels.numpy() if classes else np.zeros(count, dtype=np.int64)
    groups = labels if raw.groups is None else raw.groups
    held_out = held_out_mask(groups, labels, seed, share)
    return {
        "train": raw.train.subset(np.flatnonzero(~held_out)),
        "validation": raw.train.subset(np.flatnonzero(held_out)),
        "test": raw.test,
    }


def _check_classes(name: str, raw: Raw) -> None:
    """Check that there are several classes and no unused numbers."""
    classes = raw.train.labels.unique().tolist()
    if len(classes) < 2:
        raise DataError(
            f"{name}: all training examples have the class {raw.class_names[classes[0]]}; expected "
            "two classes or more. Add examples of another."
        )
    absent = sorted(set(range(len(raw.class_names))) - set(classes))
    if absent and not raw.named:
        listed = ", ".join(map(str, absent[:10]))
        raise DataError(
            f"{name}: labels are from {classes[0]} to {classes[-1]}, but {listed} "
            f"{'is' if len(absent) == 1 else 'are'} not among them. Either the classes are "
            "numbered with gaps or from 1: say labels=renumber. Or there are classes without "
            "examples: name all classes in class_names."
        )


def _renumbered(name: str, raw: Raw) -> Raw:
    """Number the classes that occur anew from 0.

    Those without names are called by their old numbers.
    """
    parts = {"train": raw.train, "validation": raw.validation, "test": raw.test}
    there: dict[str, Any] = {split: part for split, part in parts.items() if part is not None}
    old = torch.cat([part.labels for part in there.values()]).unique()
    if raw.named and len(raw.class_names) != len(old):
        raise DataError(
            f"{name}: {len(old)} different labels and {len(raw.class_names)} class names with "
            "labels=renumber; expected a name for each label, in their order."
        )
    anew = {
        split: dataclasses.replace(part, labels=torch.searchsorted(old, part.labels))
        for split, part in there.items()
    }
    names = raw.class_names if raw.named else tuple(map(str, old.tolist()))
    return dataclasses.replace(raw, class_names=names, **anew)


def _check_labels(name: str, raw: Raw) -> None:
    train = set(raw.train.labels.tolist())
    others = {"test": raw.test, "validation": raw.validation}
    held = {split: set(part.labels.tolist()) for split, part in others.items() if part is not None}
    least = min(train.union(*held.values()))
    largest = max(train.union(*held.values()))
    if least < 0:
        raise DataError(
            f"{name}: labels must be integers from 0, but {least} is among them; hidden labels "
            "cannot be used."
        )
    if largest >= len(raw.class_names):
        raise DataError(
            f"{name} names {len(raw.class_names)} classes, but labels go up to {largest}."
        )
    for split, labels in held.items():
        unseen = [raw.class_names[label] for label in sorted(labels - train)]
        if unseen:
            raise DataError(
                f"{name}: classes {', '.join(unseen[:10])} are in the {split} split but not in the "
                "training split."
            )


def _digits(rest: str) -> tuple[Raw, DataOptions]:
    if rest:
        raise DataError(f"digits takes no options, got {rest!r}.")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    test = carved_out(bunch.target)
    arrays = {
        "x_train": images[~test],
        "y_train": bunch.target[~test],
        "x_test": images[test],
        "y_test": bunch.target[test],
    }
    options = DataOptions()
    return from_arrays(arrays, "digits", options), options
