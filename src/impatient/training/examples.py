"""Raw examples of a split: held in memory, or read when they are asked for."""

from __future__ import annotations

import abc
import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from impatient.networks.transforms import Resizing
from impatient.trees import take

Indices = Sequence[int] | Tensor | np.ndarray


class Examples(abc.ABC):
    """Raw inputs and targets of one split, by index.

    Attributes:
        labels: true classes, int64 [N]; for other tasks a tree of targets, the samples first.
    """

    __slots__ = ()
    labels: Any

    @abc.abstractmethod
    def take(self, indices: Indices) -> Any:
        """Return the raw inputs at these indices, batch first: a tensor, or a tree of them."""

    @abc.abstractmethod
    def subset(self, indices: Indices) -> Examples:
        """Return the examples at these indices."""

    @property
    def lengths(self) -> Tensor | None:
        """Return the length of each sample, int64 [N], where batches are padded; else None."""
        return None


def rows_of(tree: Any, indices: Indices) -> Any:
    """Take the samples at these indices out of a tree."""
    return take(tree, torch.as_tensor(np.asarray(indices)))


@dataclass(frozen=True, slots=True)
class ArrayExamples(Examples):
    """Inputs held in memory: a tensor, or a tree of them."""

    inputs: Any
    labels: Any

    def take(self, indices: Indices) -> Any:
        return rows_of(self.inputs, indices)

    def subset(self, indices: Indices) -> ArrayExamples:
        return ArrayExamples(self.take(indices), rows_of(self.labels, indices))


@dataclass(frozen=True, slots=True)
class LazyExamples(Examples):
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
    """

    train: Examples
    test: Examples
    class_names: tuple[str, ...]
    groups: np.ndarray | None = None
    named: bool = True
    content: str
    resizing: Resizing = field(default_factory=Resizing)
