"""Raw examples of a split, in memory or read when asked for."""

from __future__ import annotations

import abc
import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from impatient.errors import DataError
from impatient.networks.transforms import Resizing
from impatient.trees import leaves, take

Indices = Sequence[int] | Tensor | np.ndarray


class Examples(abc.ABC):
    """Raw inputs and targets of one split, by index.

    Attributes:
        labels: true classes, int64 [N]; for other tasks a tree of targets, the samples first.
        budgets: seconds that each sample may take, float64 [N], or None where nobody says.
    """

    __slots__ = ()
    labels: Any
    budgets: Tensor | None

    @abc.abstractmethod
    def take(self, indices: Indices) -> Any:
        """Return the raw inputs at these indices, batch first."""

    @abc.abstractmethod
    def subset(self, indices: Indices) -> Examples:
        """Return the examples at these indices."""

    @property
    def lengths(self) -> Tensor | None:
        """Return the length of each sample, int64 [N], or None.

        Only where batches are padded to their longest sample, lengths matter.
        """
        return None


def rows_of(tree: Any, indices: Indices) -> Any:
    """Take the samples at these indices out of a tree.

    None stays None.
    """
    return None if tree is None else take(tree, torch.as_tensor(np.asarray(indices)))


def padded(values: Sequence[Tensor], number: int, side: Literal["left", "right"]) -> Tensor:
    """Stack arrays, filled up with a number to the longest."""
    return pad_sequence(list(values), batch_first=True, padding_value=number, padding_side=side)


def checked_budgets(values: Any, count: int, where: str) -> Tensor:
    """Read the seconds that each sample may take, float64 [N].

    Infinity is no limit.

    Raises:
        DataError: if there is not one per sample, or one is no time.
    """
    budgets = np.asarray(values)
    if budgets.dtype.kind not in "iuf" or budgets.shape != (count,):
        raise DataError(
            f"{where}: budgets are {budgets.dtype} of shape {budgets.shape}; expected seconds, one "
            f"per sample, ({count},)."
        )
    bad = np.flatnonzero(~(budgets >= 0))
    if len(bad):
        raise DataError(
            f"{where}: the budget of sample {bad[0]} is {budgets[bad[0]]}; expected seconds, 0 or "
            "more."
        )
    return torch.from_numpy(budgets.astype(np.float64))


def class_numbers(
    labels: Mapping[str, Sequence[str]], class_names: Sequence[str], where: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Number labels that are names of classes.

    Args:
        labels: those of each part.
        class_names: names of all classes in their order; empty for the order of the alphabet.
        where: where the labels are, in errors.
    Returns:
        The names of the classes, and for each part its numbers, int64 [N].
    Raises:
        DataError: if a label is none of the names.
    """
    found = sorted({label for part in labels.values() for label in part})
    names = tuple(class_names) or tuple(found)
    places = {name: place for place, name in enumerate(names)}
    unknown = [label for label in found if label not in places]
    if unknown:
        raise DataError(f"{where}: the label {unknown[0]!r} is none of {', '.join(names)}.")
    numbers = {
        name: np.array([places[label] for label in part], np.int64) for name, part in labels.items()
    }
    return names, numbers


@dataclass(frozen=True, slots=True)
class ArrayExamples(Examples):
    """Inputs held in memory: a tensor, or a tree of them."""

    inputs: Any
    labels: Any
    budgets: Tensor | None = None

    def take(self, indices: Indices) -> Any:
        return rows_of(self.inputs, indices)

    def subset(self, indices: Indices) -> ArrayExamples:
        return ArrayExamples(
            inputs=self.take(indices),
            labels=rows_of(self.labels, indices),
            budgets=rows_of(self.budgets, indices),
        )

    def tensors(self) -> list[Tensor]:
        """Return all that is held: inputs, targets, budgets."""
        return leaves((self.inputs, self.labels, self.budgets))


class Decoding:
    """Threads that decode pictures, started when there are some, and anew in a forked process.

    Threads help because decoding releases Python's global lock.
    """

    def __init__(self, threads: int = 4) -> None:
        self._threads = threads
        self._process: int | None = None
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def all(self, read: Callable[[Any], Tensor], sources: Sequence[Any]) -> list[Tensor]:
        """Decode all sources, in their order."""
        if self._pool is None or self._process != os.getpid():
            self._process = os.getpid()
            self._pool = concurrent.futures.ThreadPoolExecutor(
                self._threads, thread_name_prefix="decode"
            )
        return list(self._pool.map(read, sources))

    def __reduce__(self) -> tuple[Any, ...]:
        # Threads stay where they are; another process starts its own.
        return Decoding, (self._threads,)


@dataclass(frozen=True, slots=True)
class LazyExamples(Examples):
    """Images that threads decode when they are asked for."""

    sources: Sequence[Any]
    labels: Tensor
    read: Callable[[Any], Tensor]
    decoding: Decoding
    budgets: Tensor | None = None

    def take(self, indices: Indices) -> Tensor:
        return torch.stack(self.decoding.all(self.read, self._chosen(indices)))

    def subset(self, indices: Indices) -> LazyExamples:
        return dataclasses.replace(
            self,
            sources=self._chosen(indices),
            labels=rows_of(self.labels, indices),
            budgets=rows_of(self.budgets, indices),
        )

    def _chosen(self, indices: Indices) -> list[Any]:
        return [self.sources[int(index)] for index in indices]


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """Examples of a data set before the validation split is taken out.

    Attributes:
        train: examples for training and validation.
        test: examples for the test split.
        class_names: name of each class.
        groups: group of each training example, or None; a group is never split between training and
            validation.
        named: whether the data name their classes; otherwise these are the labels' numbers.
        content: fingerprint of the examples.
        resizing: how pictures in files come to their size.
        validation: examples of a validation split of its own, or None to take some of `train`.
    """

    train: Examples
    test: Examples
    class_names: tuple[str, ...]
    groups: np.ndarray | None = None
    named: bool = True
    content: str
    resizing: Resizing = field(default_factory=Resizing)
    validation: Examples | None = None
