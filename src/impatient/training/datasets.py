"""Read data sets, loaders and samples of any form, when asked for."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.dataloader import default_collate

from impatient.errors import DataError
from impatient.provenance import fingerprint_bytes
from impatient.training.arrays import MOST_CLASSES
from impatient.training.examples import Examples, Indices, Raw, rows_of
from impatient.training.samples import TARGETS, Samples, converted
from impatient.training.splitting import carved_out
from impatient.trees import Ragged, collate, map_leaves, named_leaves, size

log = logging.getLogger(__name__)

# Samples that are read twice, to see whether they are the same again.
CHECKED = 3


@runtime_checkable
class _MapStyle(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, place: int) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetExamples(Examples):
    """Samples of a data set, read when they are asked for.

    Attributes:
        source: gives the sample at a place.
        places: places of these samples, int64 [N].
        samples: what a sample is.
        join: the user's own way from samples to a batch, or None.
        labels: targets, the samples first.
        tokens: length of each sample where they are padded, or None.
    """

    source: _MapStyle
    places: Tensor
    samples: Samples
    join: Callable[[list[Any]], Any] | None
    labels: Any
    tokens: Tensor | None = None
    budgets: Tensor | None = None

    def take(self, indices: Indices) -> Any:
        places = self.places[torch.as_tensor(np.asarray(indices))].tolist()
        found = [self.source[place] for place in places]
        if self.join is not None:
            return converted(self.samples.pair(self.join(found))[0], "a batch")
        return self.samples.batch(
            [
                converted(self.samples.pair(sample)[0], f"sample {place}")
                for sample, place in zip(found, places, strict=True)
            ]
        )

    def subset(self, indices: Indices) -> DatasetExamples:
        return dataclasses.replace(
            self,
            places=rows_of(self.places, indices),
            labels=rows_of(self.labels, indices),
            tokens=rows_of(self.tokens, indices),
        )

    @property
    def lengths(self) -> Tensor | None:
        return self.tokens


def from_datasets(
    parts: Mapping[str, Any], samples: Samples, name: str, class_names: Sequence[str]
) -> Raw:
    """Read data sets once, for their targets and a fingerprint.

    Args:
        parts: data sets of "train" and, if there are any, of "validation" and "test".
        samples: what a sample is.
        name: name of the data in messages.
        class_names: names of the classes, or none.
    Raises:
        DataError: if the form of the data or of a sample is not known, or samples do not fit
            together.
    """
    read = {split: _read(part, samples, f"{name}, {split}") for split, part in parts.items()}
    ragged = samples.ragged or any(_differ(part.targets) for part in read.values())
    examples = {split: part.examples(samples, ragged) for split, part in read.items()}
    named = tuple(class_names) or _names_of(parts["train"], samples)
    if "test" not in examples:
        whole = examples["train"]
        classes = _are_classes(whole.labels)
        test = carved_out(whole.labels.numpy() if classes else np.zeros(size(whole.labels), int))
        examples["train"] = whole.subset(np.flatnonzero(~test))
        examples["test"] = whole.subset(np.flatnonzero(test))
    return Raw(
        train=examples["train"],
        validation=examples.get("validation"),
        test=examples["test"],
        class_names=named or _numbers(examples.values()),
        named=bool(named),
        content=fingerprint_bytes(*(part.content.encode() for part in read.values())),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """What reading a data set once has told.

    Attributes:
        source: gives the sample at a place.
        targets: target of each sample.
        tokens: length of each sample, or None.
        content: fingerprint.
        join: the user's own way from samples to a batch, or None.
    """

    source: _MapStyle
    targets: Sequence[Any]
    tokens: Tensor | None
    content: str
    join: Callable[[list[Any]], Any] | None

    def examples(self, samples: Samples, ragged: bool) -> Examples:
        """Make examples whose targets are one tree or a list."""
        labels = Ragged(_of_one_kind(self.targets)) if ragged else collate(self.targets)
        return DatasetExamples(
            source=self.source,
            places=torch.arange(len(self.targets)),
            samples=samples,
            join=self.join,
            labels=labels,
            tokens=self.tokens,
        )


def _read(part: Any, samples: Samples, where: str) -> _Read:
    """Read all samples once."""
    source, join = _opened(part, where)
    targets, prints, lengths = [], [], []
    first: Any = None
    for place in range(len(source)):
        x, target = _sample(source, place, samples, join, where)
        form = _form(x, samples.pad)
        first = first or form
        if form != first:
            raise DataError(
                f"{where}: the input of sample {place} is {_listed(form)}, that of sample 0 "
                f"{_listed(first)}; expected the same. Resize or crop them, or fill up those of "
                "different lengths: Samples(pad={NAME: NUMBER})."
            )
        targets.append(target)
        prints.append((_print(x), _print(target)))
        if samples.pad:
            lengths.append(len(x[next(iter(samples.pad))]))
    looked_at = range(0, len(source), max(1, len(source) // CHECKED))
    again = {place: _sample(source, place, samples, join, where)[0] for place in looked_at}
    same = all(_print(x) == prints[place][0] for place, x in again.items())
    if not same:
        log.warning(
            "%s: a sample differs when it is read again, as with random augmentation; only targets "
            "are in the fingerprint, so changed inputs are not noticed",
            where,
        )
    return _Read(
        source=source,
        targets=targets,
        tokens=torch.tensor(lengths) if lengths else None,
        content=fingerprint_bytes(
            *(print.encode() for pair in prints for print in pair[0 if same else 1 :])
        ),
        join=join,
    )


def _opened(part: Any, where: str) -> tuple[_MapStyle, Callable[[list[Any]], Any] | None]:
    """Return samples by place, and the user's way to a batch."""
    join = None
    if isinstance(part, DataLoader):
        _check_loader(part, where)
        join = None if part.collate_fn is default_collate else part.collate_fn
        part = part.dataset
    arrays = (Tensor, np.ndarray)
    columns = isinstance(part, tuple) and any(isinstance(each, arrays) for each in part)
    if columns or isinstance(part, (str, Path, Mapping, *arrays)):
        raise DataError(
            f"{where}: {type(part).__name__} is no data set; expected one of torch, a DataLoader, "
            "or samples to go through. Arrays become one by torch.utils.data.TensorDataset(x, y), "
            "names by impatient.load_data(NAME), and of a mapping each split is given for itself."
        )
    if isinstance(part, IterableDataset) or not isinstance(part, _MapStyle):
        part = _all_of(part, where)
    if len(part) == 0:
        raise DataError(f"{where}: no samples; expected some.")
    return part, join


def _check_loader(loader: DataLoader[Any], where: str) -> None:
    """Refuse loaders whose choice of samples would be lost."""
    sampled = not isinstance(loader.dataset, IterableDataset)
    plain = type(loader.batch_sampler) is BatchSampler and type(loader.sampler) in (
        RandomSampler,
        SequentialSampler,
    )
    if loader.batch_size is None or (sampled and not plain):
        raise DataError(
            f"{where}: a DataLoader with {type(loader.sampler).__name__} and batch_size="
            f"{loader.batch_size}; expected one that goes through all samples, in any order, since "
            "training draws an order of its own. Give loader.dataset, or "
            "torch.utils.data.Subset(dataset, places)."
        )
    if loader.num_workers:
        log.info("%s: samples are read in this process, not by workers", where)


def _all_of(part: Any, where: str) -> list[Any]:
    """Go through samples once, and keep them."""
    if not isinstance(part, Iterable):
        raise DataError(
            f"{where}: a {type(part).__name__} has no length, and cannot be gone through; expected "
            "a data set with __len__ and __getitem__, or with __iter__."
        )
    try:
        return list(part)
    except Exception as error:
        # whatever the user's code raises
        raise DataError(f"{where}: going through the samples failed: {error!r}") from error


def _sample(
    source: _MapStyle,
    place: int,
    samples: Samples,
    join: Callable[[list[Any]], Any] | None,
    where: str,
) -> tuple[Any, Any]:
    """Read one sample as its input and its target, both of tensors."""
    where = f"{where}, sample {place}"
    try:
        found = source[place]
        found = found if join is None else join([found])
    except Exception as error:
        # whatever the user's code raises
        raise DataError(f"{where}: it cannot be read: {error!r}") from error
    x, target = samples.pair(found)
    target = converted(target, f"{where}, its target", classes=True)
    if join is None:
        return converted(x, where), target
    # a batch of one
    one = target[0] if isinstance(target, (list, tuple)) else map_leaves(_first, target)
    return map_leaves(_first, converted(x, where)), one


def _first(leaf: Tensor) -> Tensor:
    return leaf[0]


def _form(x: Any, pad: Mapping[str, int]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Return names, shapes and types of arrays, lengths left out."""
    return [(name, tuple(leaf.shape)[name in pad :], leaf.dtype) for name, leaf in named_leaves(x)]


def _listed(form: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{name}{shape} {dtype}" for name, shape, dtype in form)


def _print(tree: Any) -> str:
    """Fingerprint the names, shapes, types and contents of a tree's tensors."""
    return fingerprint_bytes(
        *(
            part
            for name, leaf in named_leaves(tree)
            for part in (
                f"{name}{tuple(leaf.shape)}{leaf.dtype}".encode(),
                leaf.contiguous().numpy().tobytes(),
            )
        )
    )


def _differ(targets: Sequence[Any]) -> bool:
    """Whether targets stay a list, as boxes always do."""
    if isinstance(targets[0], Mapping) and "boxes" in targets[0]:
        return True
    return len({tuple((n, leaf.shape) for n, leaf in named_leaves(t)) for t in targets}) > 1


def _of_one_kind(targets: Sequence[Any]) -> list[Any]:
    """Give empty arrays the shape and type of the others."""
    models = {
        name: leaf[:0]
        for target in targets
        for name, leaf in named_leaves(target)
        if leaf.dim() and len(leaf)
    }

    def of_kind(name: str, leaf: Any) -> Any:
        empty = isinstance(leaf, Tensor) and leaf.dim() > 0 and not len(leaf)
        return models.get(name, leaf) if empty else leaf

    return [
        {name: of_kind(name, leaf) for name, leaf in target.items()}
        if isinstance(target, Mapping)
        else of_kind("", target)
        for target in targets
    ]


def _names_of(source: Any, samples: Samples) -> tuple[str, ...]:
    """Return the class names that a Hugging Face table holds."""
    hub = sys.modules.get("datasets")
    if hub is None or not isinstance(source, hub.Dataset):
        return ()
    names = [samples.target] if samples.target is not None else TARGETS
    features = [source.features[name] for name in names if name in source.features]
    return next((tuple(f.names) for f in features if isinstance(f, hub.ClassLabel)), ())


def _are_classes(labels: Any) -> bool:
    return isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()


def _numbers(parts: Iterable[Examples]) -> tuple[str, ...]:
    """Name classes by their numbers, if targets are classes."""
    labels = [part.labels for part in parts]
    if not all(map(_are_classes, labels)):
        return ()
    most = max(int(each.max()) for each in labels)
    if most >= MOST_CLASSES:
        raise DataError(
            f"the label {most} is no plausible class; expected numbers below {MOST_CLASSES:,}."
        )
    return tuple(map(str, range(most + 1)))
