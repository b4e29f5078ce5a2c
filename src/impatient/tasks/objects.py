"""Outputs and targets of detection: logits and boxes, and the objects of each picture."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from impatient.errors import TaskError
from impatient.trees import Ragged, entries

# beyond it, numbers are pixels and no shares of a picture
LARGEST_SHARE = 2.0


class Objects(NamedTuple):
    """What is in some pictures, filled up with class -1: int64 [B, N] and float32 [B, N, 4]."""

    labels: Int[Tensor, "B N"]
    boxes: Float[Tensor, "B N 4"]

    @property
    def counts(self) -> Int[Tensor, "B"]:
        """Count the objects of each picture."""
        return (self.labels >= 0).sum(1)


def parts(output: Any) -> tuple[Float[Tensor, "B Q C"], Float[Tensor, "B Q 4"]]:
    """Return logits and boxes of an output.

    Raises:
        TaskError: if they are not there, or do not fit each other.
    """
    if isinstance(output, Tensor):
        if output.dim() != 3 or output.shape[2] < 5:
            raise TaskError(
                f"an output of shape {tuple(output.shape)}; expected [B, Q, C + 1 + 4]: logits of "
                "C classes and of no object, then a box."
            )
        return output[..., :-4].float(), output[..., -4:].float()
    held: dict[str, Any] = dict(entries(output))
    logits: Any = held.get("logits", held.get("pred_logits"))
    boxes: Any = held.get("boxes", held.get("pred_boxes"))
    are_tensors = isinstance(logits, Tensor) and isinstance(boxes, Tensor)
    if not are_tensors or logits.dim() != 3 or boxes.shape != (*logits.shape[:2], 4):
        shown = {
            name: tuple(value.shape) for name, value in held.items() if hasattr(value, "shape")
        }
        raise TaskError(
            f"an output of {shown or type(output).__name__}; expected logits [B, Q, C + 1] and "
            "boxes [B, Q, 4], or pred_logits and pred_boxes. Wrap the model in a module that "
            "returns these."
        )
    return logits.float(), boxes.float()


def probabilities(logits: Float[Tensor, "B Q D"], sigmoid: bool) -> Float[Tensor, "B Q C"]:
    """Compute how likely each class is, that of no object left out."""
    classes = classes_of(logits, sigmoid)
    return logits.sigmoid() if sigmoid else logits.softmax(-1)[..., :classes]


def classes_of(logits: Float[Tensor, "B Q D"], sigmoid: bool) -> int:
    """Count the classes that logits are of, that of no object left out.

    Raises:
        TaskError: if there are none.
    """
    classes = logits.shape[2] if sigmoid else logits.shape[2] - 1
    if classes < 1:
        raise TaskError(
            f"logits of {logits.shape[2]} columns, one of which is no object; expected a column "
            "for each class beside it. If there is no such column, say detection:sigmoid=1."
        )
    return classes


def packed(output: Any) -> Float[Tensor, "B Q D"]:
    """Put logits and boxes side by side, as one tensor."""
    return output if isinstance(output, Tensor) else torch.cat(parts(output), -1)


def objects_of(target: Any, count: int, classes: int) -> Objects:
    """Read the targets of some pictures.

    Raises:
        TaskError: if there are not as many, a box is NaN, without area or in pixels, or a class is
            not among the network's.
    """
    if isinstance(target, Tensor):
        if target.dim() != 3 or target.shape[2] != 5:
            raise TaskError(
                f"targets of shape {tuple(target.shape)}; expected [B, M, 5]: class, centre, width "
                "and height, filled up with rows of class -1."
            )
        given = Objects(target[..., 0].long(), target[..., 1:].float())
    else:
        given = _filled_up([_of_one(one) for one in target])
    if len(given.labels) != count:
        raise TaskError(f"targets of {len(given.labels)} pictures for {count} outputs.")
    present = given.labels >= 0
    if bool(present.any()):
        _check(given.labels[present], given.boxes[present], classes)
    # boxes of rows that fill up may be anything
    return Objects(given.labels, torch.where(present[..., None], given.boxes, 0.5))


def _of_one(one: Any) -> tuple[Tensor, Tensor]:
    """Read the target of one picture."""
    if not isinstance(one, Mapping) or not {"labels", "boxes"} <= set(one):
        there = ", ".join(map(str, one)) if isinstance(one, Mapping) else type(one).__name__
        raise TaskError(
            f"the target of a picture holds {there}; expected labels [n] and boxes [n, 4]."
        )
    labels, boxes = (torch.as_tensor(one[name]) for name in ("labels", "boxes"))
    if labels.dim() != 1 or boxes.shape != (len(labels), 4) or labels.is_floating_point():
        raise TaskError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype}, boxes of shape "
            f"{tuple(boxes.shape)}; expected whole numbers [n] and boxes [n, 4]."
        )
    if bool((labels < 0).any()):
        raise TaskError(f"the class {int(labels.min())}; expected classes from 0.")
    return labels.long(), boxes.float()


def _filled_up(each: Sequence[tuple[Tensor, Tensor]]) -> Objects:
    pad = torch.nn.utils.rnn.pad_sequence
    if not each:
        return Objects(torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0, 4))
    return Objects(
        pad([labels for labels, _ in each], batch_first=True, padding_value=-1),
        pad([boxes for _, boxes in each], batch_first=True),
    )


def _check(labels: Int[Tensor, "T"], boxes: Float[Tensor, "T 4"], classes: int) -> None:
    if not bool(torch.isfinite(boxes).all()):
        raise TaskError("boxes that are NaN or infinite; leave these boxes out.")
    if not bool((boxes[:, 2:] > 0).all()):
        raise TaskError(
            f"boxes of width or height {float(boxes[:, 2:].min()):g}; expected more than 0. Boxes "
            "are centre, width and height; leave empty ones out."
        )
    if float(boxes.abs().max()) > LARGEST_SHARE:
        raise TaskError(
            f"boxes with numbers up to {float(boxes.abs().max()):g}; expected centre, width and "
            "height as shares of the picture, from 0 to 1. Divide pixels by its width and height."
        )
    if int(labels.max()) >= classes:
        raise TaskError(
            f"classes up to {int(labels.max())}, and logits of {classes} classes and of no object; "
            f"expected 0 to {classes - 1}."
        )


def classes_in(target: Any) -> int:
    """Count the classes of targets, the highest one plus one."""
    if isinstance(target, Tensor):
        labels = [target[..., 0]]
    else:
        labels = [torch.as_tensor(one["labels"]) for one in target]
    return 1 + max((int(each.max()) for each in labels if each.numel()), default=0)


def check_targets(targets: Any) -> None:
    """Raise TaskError unless targets are the objects of each picture."""
    if not isinstance(targets, (Tensor, Ragged)):
        raise TaskError(
            f"targets in a {type(targets).__name__}; expected the objects of each picture."
        )
    objects_of(targets, len(targets), classes=sys.maxsize)


def truth_of(output: Any, target: Any, sigmoid: bool) -> Objects:
    """Read targets as those of an output, and on its device."""
    logits, _ = parts(output)
    read = objects_of(target, len(logits), classes_of(logits, sigmoid))
    return Objects(read.labels.to(logits.device), read.boxes.to(logits.device))
