"""Objects in pictures, each a class and a box, from queries or anchors."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from impatient import checks
from impatient.errors import TaskError
from impatient.tasks.binary import f1
from impatient.tasks.box_head import BoxHead
from impatient.tasks.boxes import generalised_overlaps, overlaps
from impatient.tasks.task import Task
from impatient.tasks.words import CERTAIN, class_name, listed, outlines
from impatient.trees import entries

# a box is found if so much of it and the true one is common to both
FOUND = 0.5
# weights of DETR: of queries without an object, of distances of boxes, of their overlaps
NO_OBJECT, DISTANCE, OVERLAP = 0.1, 5.0, 2.0
# recalls at which the precision is read, as COCO does
RECALLS = 101
# of `statistics`: hits, false alarms, misses, and the number of classes
COUNTS = 4
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


class Found(NamedTuple):
    """What was found in some pictures, the surest first.

    What does not count has a score of -1.
    """

    scores: Float[Tensor, "B M"]
    labels: Int[Tensor, "B M"]
    boxes: Float[Tensor, "B M 4"]

    def believed(self, threshold: float) -> Objects:
        """Take what is sure enough for true."""
        return Objects(torch.where(self.scores >= threshold, self.labels, -1), self.boxes)


@functools.cache
def detection(threshold: float = 0.5, overlap: float = 1.0, keep: int = 100) -> Task:
    """Make the task of finding objects in pictures.

    Outputs are logits [B, Q, C + 1], of which the last column means that there is no object, and
    boxes [B, Q, 4]: as a mapping with `logits` and `boxes` (or `pred_logits` and `pred_boxes`), or
    side by side in one tensor [B, Q, C + 1 + 4]. A box is centre, width and height, as shares of
    the picture. Detectors of the DETR family answer so; those with anchors, such as SSD, do if
    their boxes are decoded, and need an `overlap` below 1.

    Targets are a list of one {"labels": [n], "boxes": [n, 4]} per picture (`trees.Ragged`), or one
    tensor [B, M, 5] of class and box, filled up with rows of class -1.

    Losses are those of DETR: each object is matched with one query. Quality is the F1 of that
    picture at an overlap of 0.5, or 1 where there is nothing and nothing is found. Summary: F1,
    precision and recall of all objects, and AP50. AP is no sum over pictures, so the `keep` surest
    detections of each picture and exit are in the statistics.

    Args:
        threshold: probability from which a detection counts for the quality.
        overlap: of detections of one class that overlap by more, only the surest is kept; 1 keeps
            all, as detectors that are trained with one query per object want it.
        keep: how many detections of a picture are judged, the surest first.
    Raises:
        TaskError: if an option is out of range.
    """
    checks.true_share(TaskError, threshold=threshold)
    checks.at_least(TaskError, 1, keep=keep)
    if not 0.0 <= overlap <= 1.0:
        raise TaskError(f"overlap={overlap}; expected a share from 0 to 1.")
    given = {"threshold": (threshold, 0.5), "overlap": (overlap, 1.0), "keep": (keep, 100)}
    options = [f"{name}={value!r}" for name, (value, usual) in given.items() if value != usual]
    find = functools.partial(found, overlap=float(overlap), keep=keep)
    return Task(
        name=":".join(["detection", *options]),
        losses=losses,
        quality=functools.partial(quality, find=find, threshold=threshold),
        scores={"mean_probability": mean_probability, "least_probability": least_probability},
        quality_name="F1 of a picture",
        head=BoxHead,
        reads=packed,
        distance=functools.partial(distance, find=find, threshold=threshold),
        statistics=functools.partial(statistics, find=find, threshold=threshold),
        summary=summary,
        overall=lambda rows: {"AP50": average_precision(rows)},
        says=functools.partial(said, find=find, threshold=threshold),
        layer=functools.partial(layer, find=find, threshold=threshold),
        ideal=ideal,
        outputs_for=classes_in,
    )


# --- outputs and targets --------------------------------------------------------------------------


def parts(output: Any) -> tuple[Float[Tensor, "B Q C"], Float[Tensor, "B Q 4"]]:
    """Return logits and boxes of an output.

    Raises:
        TaskError: if they are not there, or do not fit each other.
    """
    if isinstance(output, Tensor):
        if output.dim() != 3 or output.shape[2] < 6:
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


# --- losses ---------------------------------------------------------------------------------------


def losses(output: Any, target: Any) -> Float[Tensor, "B"]:
    """Compute the loss of each picture, after matching each object with one query.

    It is the cross-entropy of the queries, where those without an object count a tenth, plus 5
    times the distance and 2 times what the generalised overlap lacks to 1, both the mean over the
    objects.

    Source:
        Carion et al. 2020 (DETR). We differ: means are over each picture, not over the batch.
    """
    logits, boxes = parts(output)
    truth = _truth(output, target)
    picture, queries, places = match(logits, boxes, truth)
    said, true = boxes[picture, queries], truth.boxes[picture, places]
    off = DISTANCE * (said - true).abs().sum(1) + OVERLAP * (1 - generalised_overlaps(said, true))
    placed = torch.zeros(len(logits), device=off.device).index_add(0, picture, off)
    matched = torch.bincount(picture, minlength=len(logits)).clamp(min=1)
    nothing = logits.shape[2] - 1
    classes = torch.full(logits.shape[:2], nothing, device=logits.device)
    classes[picture, queries] = truth.labels[picture, places]
    each = F.cross_entropy(logits.transpose(1, 2), classes, reduction="none")
    weights = torch.where(classes == nothing, NO_OBJECT, 1.0)
    return (weights * each).sum(1) / weights.sum(1) + placed / matched


def match(
    logits: Float[Tensor, "B Q C"], boxes: Float[Tensor, "B Q 4"], truth: Objects
) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"], Int[Tensor, "P"]]:
    """Match objects with queries, so that the sum of their costs is the least.

    Returns:
        Pictures, queries, and places of objects in the targets. Where there are more objects than
        queries, all queries are matched.
    """
    from scipy.optimize import linear_sum_assignment

    with torch.no_grad():
        distances = torch.cdist(boxes, truth.boxes, p=1)
        near = generalised_overlaps(boxes[:, :, None], truth.boxes[:, None])
        columns = truth.labels.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1)
        likely = logits.softmax(-1).gather(2, columns)
        costs = DISTANCE * distances - OVERLAP * near - likely
    pairs: list[tuple[int, int, int]] = []
    # a network that has diverged is told of by its loss
    for picture, table in enumerate(torch.nan_to_num(costs).cpu().numpy()):
        objects = np.flatnonzero((truth.labels[picture] >= 0).cpu().numpy())
        queries, columns_of = linear_sum_assignment(table[:, objects])
        pairs += zip([picture] * len(queries), queries, objects[columns_of], strict=True)
    found = torch.as_tensor(np.array(pairs, dtype=np.int64).reshape(-1, 3), device=logits.device)
    return found[:, 0], found[:, 1], found[:, 2]


def _truth(output: Any, target: Any) -> Objects:
    """Read targets as those of an output, and on its device."""
    logits, _ = parts(output)
    read = objects_of(target, len(logits), logits.shape[2] - 1)
    return Objects(read.labels.to(logits.device), read.boxes.to(logits.device))


# --- quality --------------------------------------------------------------------------------------


def found(output: Any, *, overlap: float = 1.0, keep: int = 100) -> Found:
    """List what was found in each picture: the likeliest class of each query."""
    logits, boxes = (part.detach() for part in parts(output))
    scores, labels = logits.softmax(-1)[..., :-1].max(-1)
    # NaN would be the surest
    sure = torch.nan_to_num(scores, nan=-1.0)
    order = sure.argsort(dim=1, descending=True, stable=True)[:, :keep]
    one = Found(sure.gather(1, order), labels.gather(1, order), _rows(boxes, order))
    return _without_doubles(one, overlap) if overlap < 1.0 else one


def _rows(boxes: Float[Tensor, "B Q 4"], order: Int[Tensor, "B M"]) -> Float[Tensor, "B M 4"]:
    return boxes.gather(1, order[..., None].expand(-1, -1, 4))


def _without_doubles(one: Found, overlap: float) -> Found:
    """Keep of boxes of one class that overlap only the surest."""
    same = one.labels[:, :, None] == one.labels[:, None]
    doubles = ((overlaps(one.boxes, one.boxes) > overlap) & same).cpu().numpy()
    scores = one.scores.clone()
    for row, double in zip(scores, doubles, strict=True):
        kept: list[int] = []
        for place in range(len(double)):
            if not double[place, kept].any():
                kept.append(place)
        dropped = torch.ones_like(row, dtype=torch.bool)
        dropped[kept] = False
        row[dropped] = -1.0
    order = scores.argsort(dim=1, descending=True, stable=True)
    return Found(scores.gather(1, order), one.labels.gather(1, order), _rows(one.boxes, order))


def hits(one: Found, truth: Objects) -> Bool[Tensor, "B M"]:
    """Tell which detections found an object, the surest first, each object once.

    Source:
        COCO's evaluation: of the objects of its class that are left, a detection takes the one that
        it overlaps most.
    """
    same = (one.labels[:, :, None] == truth.labels[:, None]) & (one.scores >= 0)[..., None]
    shared = torch.where(same, torch.nan_to_num(overlaps(one.boxes, truth.boxes)), 0.0)
    right = np.zeros(one.scores.shape, dtype=bool)
    for row, table in zip(right, shared.cpu().numpy(), strict=True):
        # only what reaches an object
        for place in np.flatnonzero((table >= FOUND).any(1)):
            best = int(table[place].argmax())
            row[place] = table[place, best] >= FOUND
            if row[place]:
                table[:, best] = 0.0
    return torch.as_tensor(right, device=one.scores.device)


def quality(
    output: Any, target: Any, *, find: Any = found, threshold: float = 0.5
) -> Float[Tensor, "B"]:
    """Compute the F1 of each picture."""
    return _shares(_counts(find(output), _truth(output, target), threshold))


def distance(
    output: Any, other: Any, *, find: Any = found, threshold: float = 0.5
) -> Float[Tensor, "B"]:
    """Compute one minus the F1 of what one output finds, if the other's were true."""
    return 1.0 - _shares(_counts(find(output), find(other).believed(threshold), threshold))


def _counts(one: Found, truth: Objects, threshold: float) -> Int[Tensor, "B 3"]:
    """Count hits, false alarms and misses among what is sure enough."""
    sure = one.scores >= threshold
    hit = (hits(one, truth) & sure).sum(1)
    return torch.stack([hit, sure.sum(1) - hit, truth.counts - hit], 1)


def _shares(counts: Int[Tensor, "B 3"]) -> Float[Tensor, "B"]:
    return torch.tensor([f1(*each) for each in counts.tolist()], device=counts.device)


def mean_probability(output: Any) -> Float[Tensor, "B"]:
    """Mean over queries of the largest probability, that of no object included."""
    return parts(output)[0].softmax(-1).amax(-1).mean(1)


def least_probability(output: Any) -> Float[Tensor, "B"]:
    """Largest probability of the query that is the least sure."""
    return parts(output)[0].softmax(-1).amax(-1).amin(1)


# --- metrics of the data set ----------------------------------------------------------------------


def statistics(
    output: Any, target: Any, *, find: Any = found, threshold: float = 0.5
) -> Float[Tensor, "B S"]:
    """Count hits, false alarms, misses, classes and the objects of each.

    Then list detections.

    Each detection is its score, class, and whether it is right.
    """
    classes = parts(output)[0].shape[2] - 1
    one, truth = find(output), _truth(output, target)
    counts = _counts(one, truth, threshold)
    objects = F.one_hot(truth.labels + 1, classes + 1)[..., 1:].sum(1)
    listed = torch.stack([one.scores.double(), one.labels.double(), hits(one, truth).double()], 2)
    width = torch.full_like(counts[:, :1], classes)
    table = torch.cat([counts, width, objects], 1).double()
    return torch.cat([table, listed.flatten(1)], 1).cpu()


def summary(sums: Float[Tensor, "S"]) -> dict[str, float]:
    """Compute F1, precision and recall of all objects from sums of `statistics`."""
    hit, alarm, miss = sums[:3].tolist()
    return {
        "F1": f1(hit, alarm, miss),
        "precision": hit / (hit + alarm) if hit + alarm else 1.0,
        "recall": hit / (hit + miss) if hit + miss else 1.0,
    }


def average_precision(rows: Float[Tensor, "N S"]) -> float:
    """Compute the mean over classes of the average precision at an overlap of 0.5.

    It is that of the detections that `statistics` keeps, over the classes that occur; not a number
    where none does.

    Source:
        COCO: the precision at 101 recalls, each the best at that recall or a higher one.
    """
    classes = int(rows[0, COUNTS - 1])
    objects = rows[:, COUNTS:][:, :classes].sum(0)
    score, label, right = rows[:, COUNTS + classes :].reshape(-1, 3).unbind(1)
    order = score.argsort(descending=True, stable=True)
    order = order[score[order] >= 0]
    each = [
        _precision(right[order][label[order] == place], count)
        for place, count in enumerate(objects.tolist())
        if count
    ]
    return sum(each) / len(each) if each else math.nan


def _precision(right: Float[Tensor, "M"], objects: float) -> float:
    """Average the precision of detections in order, the surest first."""
    if not len(right):
        return 0.0
    hit = right.cumsum(0)
    precision = hit / torch.arange(1, len(hit) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)
    # so many hits are needed for each recall; rounding must not ask for one more
    needed = torch.ceil(torch.arange(RECALLS) / (RECALLS - 1) * objects - 1e-9).clamp(min=1)
    places = torch.searchsorted(hit, needed.double())
    reached = places < len(hit)
    return float(best[places[reached]].sum()) / RECALLS


# --- one picture, to be shown ---------------------------------------------------------------------


def said(output: Any, names: Sequence[str], *, find: Any = found, threshold: float = 0.5) -> str:
    """Name what was found in one picture, the surest first."""
    one = _sure(find(output), threshold)
    sure = [f" ({100 * score:.0f} %)" if score < 0.9995 else "" for score in one.scores.tolist()]
    names_of = (class_name(names, label) for label in one.labels.tolist())
    said_of = (f"{name}{share}" for name, share in zip(names_of, sure, strict=True))
    return listed(said_of, "nothing")


def layer(
    output: Any, size: tuple[int, int], *, find: Any = found, threshold: float = 0.5
) -> Int[Tensor, "H W"]:
    """Draw the boxes that were found in one picture, in the colours of their classes."""
    one = _sure(find(output), threshold)
    return outlines(one.boxes, one.labels, size)


def ideal(target: Any, output: Any) -> Float[Tensor, "1 N D"]:
    """Make the output that would be right."""
    classes = parts(output)[0].shape[2]
    read = objects_of(target, 1, classes - 1)
    columns = torch.where(read.labels >= 0, read.labels, classes - 1)
    return torch.cat([CERTAIN * F.one_hot(columns, classes).float(), read.boxes], -1)


def _sure(one: Found, threshold: float) -> Found:
    """Take what is sure enough of the first picture."""
    kept = one.scores[0] >= threshold
    return Found(*(part[0][kept] for part in one))
