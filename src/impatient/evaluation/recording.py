"""Record how good and how sure all exits are, on one named split."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from impatient import checks
from impatient.anytime import Network, begin, check_network
from impatient.errors import (
    ONE_COLUMN,
    ClassCountMismatch,
    DataError,
    LogitsWarning,
    RecordingError,
    TaskError,
)
from impatient.evaluation.batch_tables import BatchTable, Tables
from impatient.progress import tracked
from impatient.provenance import Provenance
from impatient.provenance import provenance as made_now
from impatient.store import Stored
from impatient.tasks import Task, is_classification, named
from impatient.tasks.classification import check_labels, check_top, sum_of_shares
from impatient.trees import leaves, map_leaves, size


class LabelledData(Protocol):
    """What recording needs of a data set."""

    @property
    def fingerprint(self) -> str: ...

    def size(self, split: Any) -> int: ...

    def batches(self, split: Any, batch_size: int) -> Iterator[tuple[Any, Any]]: ...


@runtime_checkable
class PaddedData(LabelledData, Protocol):
    """A data set that may pad its batches, and yields them in any order, such as `Data`."""

    def by_length(self, split: Any) -> Tensor | None: ...

    def batches(
        self, split: Any, batch_size: int, order: Tensor | None = None
    ) -> Iterator[tuple[Any, Any]]: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Recording(Stored, made_by="`impatient record`"):
    """How good and how sure the answers of all exits are, on one split of one data set.

    Everything that follows reads these tables. Make one with `record`, or from outputs of your own
    with `Recording.of`.

    Attributes:
        quality: how good each answer is, float32, shape [K, N]; for classes 1 if right, else 0.
        scores: by name, how sure each answer looks, float32, shape [K, N].
        split: the split's name; a policy fitted on it is not judged on it.
        exits: names of the exits.
        task: name of the task, with its options.
        statistics: numbers of each answer whose sums give metrics of the data set, float64, shape
            [K, N, S]; None where the task has none.
        outputs: outputs of all exits, float32, shape [K, N, C], or None where they were not kept.
            Classifications keep them, as logits.
        targets: what was right, shape [N] for classes; None where outputs are.
        features: pooled features per exit, each [N, D], or empty.
        provenance: weights, data, versions.
    """

    quality: Float[Tensor, "K N"]
    scores: Mapping[str, Tensor]
    split: str
    exits: tuple[str, ...]
    task: str = "classification"
    statistics: Float[Tensor, "K N S"] | None = None
    outputs: Float[Tensor, "K N *C"] | None = None
    targets: Tensor | None = None
    features: tuple[Tensor, ...] = ()
    provenance: Provenance

    def __post_init__(self) -> None:
        expected = (len(self.exits), len(self))
        tables = {"quality": self.quality, "statistics": self.statistics, "outputs": self.outputs}
        tables |= {f"score {name!r}": table for name, table in self.scores.items()}
        for name, table in tables.items():
            if table is None:
                continue
            if tuple(table.shape[:2]) != expected or len(self) == 0:
                raise RecordingError(
                    f"{name} of shape {tuple(table.shape)} for {expected[0]} exits and "
                    f"{expected[1]} samples; expected [K, N, ...] with at least one sample."
                )
            if not table.is_floating_point():
                raise RecordingError(
                    f"{name} of {str(table.dtype).removeprefix('torch.')}; expected real numbers "
                    "in floating point."
                )
        if not self.scores:
            raise RecordingError("a recording without scores; expected at least one table [K, N].")
        if not 0.0 <= float(self.quality.min()) <= float(self.quality.max()) <= 1.0:
            raise RecordingError("qualities outside of [0, 1], or not numbers.")
        if self.targets is not None and len(self.targets) != len(self):
            raise RecordingError(f"{len(self.targets)} targets for {len(self)} samples.")
        if self.outputs is not None:
            for name, output in zip(self.exits, self.outputs, strict=True):
                _check_finite(name, output)
            if is_classification(self.task):
                self._check_tables()

    def _check_tables(self) -> None:
        """Refuse tables that are not of these outputs, such as after `dataclasses.replace`.

        Those that say nothing are refused, too.
        """
        check_top(self.task, self.logits().shape[-1])
        judge = named(self.task).quality
        found = [judge(output, self.labels) for output in self.logits()]
        if not torch.equal(torch.stack(found), self.quality):
            raise RecordingError(
                "the qualities are not those of the outputs; to change outputs, use "
                "recording.with_outputs(...)."
            )

    def __len__(self) -> int:
        return self.quality.shape[1]

    def __repr__(self) -> str:
        means = ", ".join(f"{mean:.3f}" for mean in self.quality.mean(1))
        return (
            f"Recording(split={self.split!r}, task={self.task!r}, samples={len(self)}, "
            f"mean quality of each exit: {means})"
        )

    @classmethod
    def of(
        cls,
        outputs: Float[Tensor, "K N *C"] | np.ndarray | Sequence[Any],
        targets: Any,
        *,
        split: str,
        task: str | Task = "classification",
        exits: Sequence[str] = (),
        features: Sequence[Tensor] = (),
        keep_outputs: bool = True,
        provenance: Provenance | None = None,
    ) -> Self:
        """Make a recording from outputs of any network with exits, yours included.

        Args:
            outputs: outputs of K exits on the same N samples, shallow to deep: one tensor or array,
                or one tree each. For classes logits [K, N, C].
            targets: what was right, the samples first.
            split: the split's name, such as "validation".
            task: what the outputs mean: a `Task`, or the name of a ready one.
            exits: their names; by default "exit 0" and so on.
            features: pooled features of every exit, each [N, D], for learned gates.
            keep_outputs: keep outputs and targets, if they are tensors.
            provenance: where they come from; a policy is refused on other weights and data.
        Raises:
            RecordingError: if shapes do not fit, or outputs are NaN or infinite.
            TaskError: if outputs or targets do not fit the task.
        Example:
            >>> logits = torch.tensor([[[2.0, 1.0], [2.0, 1.0]], [[3.0, 0.0], [0.0, 3.0]]])
            >>> recording = Recording.of(logits, torch.tensor([0, 1]), split="validation")
            >>> recording.quality.tolist()
            [[1.0, 0.0], [1.0, 1.0]]
        """
        task = named(task)
        outputs = map_leaves(_as_recorded, _as_tensors(outputs))
        targets = _as_tensors(targets)
        names = tuple(exits) or tuple(f"exit {exit}" for exit in range(len(outputs)))
        if task.is_logits:
            _check_logits(outputs, targets, len(names))
        if len(outputs) == 0:
            raise RecordingError("outputs of no exits; expected those of at least one.")
        for name, output in zip(names, outputs, strict=False):
            _check_finite(name, output)
        tables = Tables(task, size(outputs[0]))
        tables.add([*outputs], targets)
        quality, scores, statistics = tables.joined()
        kept = outputs if keep_outputs and isinstance(outputs, Tensor) else None
        return cls(
            quality=quality,
            scores=scores,
            statistics=statistics,
            split=split,
            exits=names,
            task=task.name,
            outputs=kept,
            targets=targets if kept is not None and isinstance(targets, Tensor) else None,
            features=tuple(features),
            provenance=provenance or made_now(),
        )

    @classmethod
    def of_splits(
        cls,
        outputs: Float[Tensor, "K N *C"] | np.ndarray,
        targets: Any,
        splits: Sequence[str] | np.ndarray,
        **options: Any,
    ) -> dict[str, Self]:
        """Make a recording of each split from outputs of all samples together.

        Args:
            outputs: as for `of`, one tensor or array.
            targets: what was right, one tensor or array.
            splits: name of each sample's split, such as "validation" or "test".
            **options: other arguments of `of`.
        Raises:
            RecordingError: if there are not as many names as samples.
        Example:
            >>> logits = 3.0 * torch.eye(2)[None]
            >>> found = Recording.of_splits(logits, torch.tensor([0, 0]), ["validation", "test"])
            >>> {name: recording.quality.tolist() for name, recording in found.items()}
            {'validation': [[1.0]], 'test': [[0.0]]}
        """
        outputs = torch.as_tensor(outputs)
        targets = _as_tensors(targets)
        if outputs.dim() < 2 or not len(splits) == outputs.shape[1] == len(targets):
            raise RecordingError(
                f"{len(splits)} names of splits for outputs of shape {tuple(outputs.shape)} and "
                f"{len(targets)} targets; expected [K, N, ...], and N of the others."
            )
        made = {"provenance": made_now()} | options
        names = np.asarray(splits)
        found = {}
        for name in dict.fromkeys(names.tolist()):
            rows = torch.from_numpy(np.flatnonzero(names == name))
            found[name] = cls.of(outputs[:, rows], targets[rows], split=name, **made)
        return found

    def logits(self) -> Float[Tensor, "K N C"]:
        """Return the outputs of a classification, before softmax.

        Raises:
            TaskError: if it is of another task.
            RecordingError: if they were not kept.
        """
        if not self.task.startswith("classification"):
            raise TaskError(
                f"this needs class probabilities; the recording is of task {self.task!r}."
            )
        if self.outputs is None:
            raise RecordingError(
                "the recording holds no outputs; record it with keep_outputs=True."
            )
        return self.outputs

    @property
    def labels(self) -> Int[Tensor, "N"]:
        """True classes of a classification.

        Raises:
            RecordingError: if outputs or targets were not kept.
        """
        self.logits()
        if self.targets is None:
            raise RecordingError("the recording holds outputs but no targets.")
        return self.targets

    def as_task(self, task: str | Task) -> Self:
        """Judge the same outputs by another task, such as "classification:top=5".

        Raises:
            RecordingError: if outputs and targets were not kept.
        """
        if self.outputs is None or self.targets is None:
            raise RecordingError(
                "the recording holds no outputs; record again for that task (keep_outputs=True)."
            )
        return self.with_outputs(self.outputs, task=task)

    def with_outputs(
        self,
        outputs: Float[Tensor, "K N *C"],
        targets: Tensor | None = None,
        *,
        task: str | Task | None = None,
        exits: Sequence[str] | None = None,
        features: Sequence[Tensor] | None = None,
    ) -> Self:
        """Replace the outputs, or more, and judge them anew.

        Args:
            outputs: outputs of all exits, before softmax.
            targets: targets [N, ...]; this and the others are by default the recording's own.
            task: what the outputs mean.
            exits: names of the exits.
            features: pooled features of each exit, [N, D].
        """
        return self.of(
            outputs,
            self.targets if targets is None else targets,
            split=self.split,
            task=task or self.task,
            exits=self.exits if exits is None else exits,
            features=self.features if features is None else features,
            provenance=self.provenance,
        )

    def take(self, places: Int[Tensor, "M"], split: str = "") -> Self:
        """Return the recording of some of the samples.

        The split may be named.
        """

        def rows(table: Tensor | None) -> Any:
            return None if table is None else table[:, places]

        return dataclasses.replace(
            self,
            quality=self.quality[:, places],
            scores={name: table[:, places] for name, table in self.scores.items()},
            statistics=rows(self.statistics),
            outputs=rows(self.outputs),
            targets=None if self.targets is None else self.targets[places],
            features=tuple(entry[places] for entry in self.features),
            split=split or self.split,
        )


def _check_logits(outputs: Any, labels: Any, exits: int) -> None:
    expected = (exits, len(labels))
    if not isinstance(outputs, Tensor) or outputs.dim() != 3 or outputs.shape[:2] != expected:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise RecordingError(
            f"outputs of shape {shape} do not fit {exits} exits and {len(labels)} labels; expected "
            "[K, N, C] with at least one sample."
        )
    if len(labels) == 0:
        raise RecordingError("no samples; expected at least one.")
    check_labels(labels, outputs.shape[2])
    _warn_of_probabilities(outputs)


def _warn_of_probabilities(outputs: Float[Tensor, "K N C"]) -> None:
    """Warn of probabilities or per cent in place of logits.

    Rows with a single number other than 0 may be either.
    """
    whole = sum_of_shares(outputs)
    if whole is not None and bool((outputs > 0).sum(-1).gt(1).any()):
        warnings.warn(
            f"the outputs are probabilities, all of which sum to {whole:g}; expected logits, from "
            "before the softmax. Give np.log(outputs.clip(1e-9)) instead.",
            LogitsWarning,
            stacklevel=4,
        )


def _check_finite(name: str, output: Any) -> None:
    for leaf in leaves(output):
        if not leaf.is_floating_point() or not leaf.numel():
            continue
        # Without a table as large as the outputs: extremes are NaN if any number is.
        if not all(math.isfinite(extreme) for extreme in leaf.aminmax()):
            called = name if name.startswith("exit ") else f"exit {name}"
            raise RecordingError(
                f"{called} gives NaN or infinite outputs; check the weights, or train again "
                "with a lower learning rate."
            )


def record(
    network: Network,
    data: LabelledData,
    *,
    split: str = "validation",
    task: str | Task | None = None,
    features: bool = False,
    keep_outputs: bool | None = None,
    batch_size: int = 256,
    device: str = "cpu",
    progress: bool = False,
) -> Recording:
    """Run a network over one split and judge the outputs of all exits.

    Args:
        network: the result of `attach_exits`, or a `Network` of your own; it is put in eval mode.
        data: the result of `load_data`.
        split: "train", "validation" or "test".
        task: what the outputs mean; by default the network's own task.
        features: keep the pooled features of every exit too, for learned gates.
        keep_outputs: keep outputs and targets; by default those of classifications. Temperatures,
            ensembles and selections need them.
        batch_size: samples at a time.
        device: where the network is.
        progress: show a bar.
    Raises:
        RecordingError: if an exit gives NaN or infinite outputs, or is not reached by every input.
        ClassCountMismatch: if a network of classes has one output column.
        TaskError: if outputs or targets do not fit the task.
    """
    check_network(network)
    checks.provides(
        DataError,
        "data",
        data,
        ("fingerprint", "size", "batches"),
        "Expected a Data from load_data, or an object of your own with fingerprint, size(split) "
        "and batches(split, batch_size), which yields inputs and targets.",
    )
    task = network.task if task is None else named(task)
    if task.is_logits and network.num_classes == 1:
        raise ClassCountMismatch(
            "the network has one output column; expected the logits of two or more classes. "
            f"{ONE_COLUMN}"
        )
    network.eval()
    keeps = task.is_logits if keep_outputs is None else keep_outputs
    names = network.exit_names
    samples = data.size(split)
    tables = Tables(task, samples)
    outputs = BatchTable(samples)
    targets = BatchTable(samples)
    kept = [BatchTable(samples) for _ in range(network.num_exits)]
    answered = [0] * network.num_exits
    batches, order = _batches(data, split, batch_size)
    count = -(-samples // batch_size)
    for inputs, truth in tracked(
        batches, f"recording {split}", total=count, unit="batches", wanted=progress
    ):
        found: list[Any] = []
        pooled: list[Tensor] = []
        with torch.inference_mode(), begin(network, map_leaves(_to(device), inputs)) as run:
            for exit in run:
                output = map_leaves(_as_recorded, exit.output())
                _check_finite(f"{exit.index} ({names[exit.index]})", output)
                found.append(output)
                answered[exit.index] += size(output)
                if features:
                    pooled.append(network.pooled(exit).float().cpu())
        if task.is_logits and found:
            _check_classes(split, truth, found[0].shape[1])
        if len(found) < network.num_exits or len(set(map(size, found))) > 1:
            # Refused below, when it is known how many samples are lacking.
            continue
        tables.add(found, truth)
        if keeps:
            outputs.add(found)
            targets.add([truth])
        for table, rows in zip(kept, pooled, strict=False):
            table.add([rows])
    if len(set(answered)) > 1:
        raise RecordingError(
            f"of {samples} samples the exits answered {answered}; record a network whose "
            "inputs all come to every exit."
        )
    quality, scores, statistics = tables.joined()
    recording = Recording(
        quality=quality,
        scores=scores,
        statistics=statistics,
        task=task.name,
        outputs=outputs.whole() if keeps else None,
        targets=targets.whole()[0] if keeps else None,
        split=split,
        exits=names,
        features=tuple(table.whole()[0] for table in kept) if features else (),
        provenance=made_now(
            data=data.fingerprint,
            device=device,
            network=network.structure_fingerprint,
            weights=network.weights_fingerprint,
            engine=network.engine,
        ),
    )
    return recording if order is None else recording.take(order.argsort())


def _batches(
    data: LabelledData, split: str, batch_size: int
) -> tuple[Iterator[tuple[Any, Any]], Tensor | None]:
    """Return the batches of a split, and the order of their samples where it is another.

    Samples of similar lengths share a batch.
    """
    if isinstance(data, PaddedData):
        order = data.by_length(split)
        if order is not None:
            return data.batches(split, batch_size, order), order
    return data.batches(split, batch_size), None


def _check_classes(split: str, labels: Tensor, classes: int) -> None:
    if len(labels) and int(labels.max()) >= classes:
        raise ClassCountMismatch(
            f"{split} has the label {int(labels.max())} for {classes} outputs of the network; "
            f"expected labels from 0 to {classes - 1}. Record a network with an output for every "
            "class."
        )


def _to(device: str) -> Callable[[Tensor], Tensor]:
    return lambda leaf: leaf.to(device)


def _as_tensors(value: Any) -> Any:
    """Take arrays of numpy for tensors, and stack the outputs of exits where they are alike."""
    if isinstance(value, np.ndarray):
        # Files of other machines have another order of bytes, which torch does not take.
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(np.ascontiguousarray(native))
    if not isinstance(value, list | tuple):
        return value
    parts = [_as_tensors(part) for part in value]
    alike = {part.shape if isinstance(part, Tensor) else None for part in parts}
    return torch.stack(parts) if len(alike) == 1 and None not in alike else parts


def _as_recorded(leaf: Tensor) -> Tensor:
    return leaf.cpu() if leaf.is_complex() else leaf.float().cpu()
