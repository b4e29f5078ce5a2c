"""Objects in pictures, each a class and a box, from queries or anchors."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
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
from impatient.tasks.boxes import overlaps
from impatient.tasks.matching import focal_losses, losses
from impatient.tasks.objects import (
    Objects,
    check_targets,
    classes_in,
    classes_of,
    objects_of,
    packed,
    parts,
    probabilities,
    truth_of,
)
from impatient.tasks.task import Task
from impatient.tasks.words import CERTAIN, class_name, listed, outlines

# a box is found if so much of it and the true one is common to both
FOUND = 0.5
# recalls at which the precision is read, as COCO does
RECALLS = 101
# of `statistics`: hits, false alarms, misses, and the number of classes
COUNTS = 4


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
def detection(
    threshold: float = 0.5, overlap: float = 1.0, keep: int = 100, sigmoid: int = 0
) -> Task:
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
        sigmoid: 1 for logits [B, Q, C] of which each is a class's own, through a sigmoid, as those
            of Deformable DETR and RT-DETR; there is no column for no object.
    Raises:
        TaskError: if an option is out of range.
    """
    checks.true_share(TaskError, threshold=threshold)
    checks.at_least(TaskError, 1, keep=keep)
    if not 0.0 <= overlap <= 1.0:
        raise TaskError(f"overlap={overlap}; expected a share from 0 to 1.")
    checks.one_of(TaskError, (0, 1), sigmoid=sigmoid)
    given = {
        "threshold": (threshold, 0.5),
        "overlap": (overlap, 1.0),
        "keep": (keep, 100),
        "sigmoid": (sigmoid, 0),
    }
    options = [f"{name}={value!r}" for name, (value, usual) in given.items() if value != usual]
    find = functools.partial(found, overlap=float(overlap), keep=keep, sigmoid=bool(sigmoid))
    return Task(
        name=":".join(["detection", *options]),
        losses=focal_losses if sigmoid else losses,
        quality=functools.partial(quality, find=find, threshold=threshold, sigmoid=bool(sigmoid)),
        scores={
            "mean_probability": functools.partial(mean_probability, sigmoid=bool(sigmoid)),
            "least_probability": functools.partial(least_probability, sigmoid=bool(sigmoid)),
        },
        quality_name="F1 of a picture",
        head=BoxHead,
        reads=packed,
        distance=functools.partial(distance, find=find, threshold=threshold),
        statistics=functools.partial(
            statistics, find=find, threshold=threshold, sigmoid=bool(sigmoid)
        ),
        summary=summary,
        overall=lambda rows: {"AP50": average_precision(rows)},
        says=functools.partial(said, find=find, threshold=threshold),
        layer=functools.partial(layer, find=find, threshold=threshold),
        ideal=functools.partial(ideal, sigmoid=bool(sigmoid)),
        outputs_for=classes_in,
        check_targets=check_targets,
    )


# --- quality --------------------------------------------------------------------------------------


def found(output: Any, *, overlap: float = 1.0, keep: int = 100, sigmoid: bool = False) -> Found:
    """List what was found in each picture.

    That is the likeliest class of each query, or, of sigmoids, all classes of all queries.
    """
    logits, boxes = (part.detach() for part in parts(output))
    shares = probabilities(logits, sigmoid)
    if sigmoid:
        classes = shares.shape[2]
        scores = shares.flatten(1)
        labels = torch.arange(classes, device=scores.device).repeat(shares.shape[1])
        labels = labels.expand(len(scores), -1)
        boxes = boxes.repeat_interleave(classes, 1)
    else:
        scores, labels = shares.max(-1)
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
    output: Any,
    target: Any,
    *,
    find: Any = found,
    threshold: float = 0.5,
    sigmoid: bool = False,
) -> Float[Tensor, "B"]:
    """Compute the F1 of each picture."""
    return _shares(_counts(find(output), truth_of(output, target, sigmoid), threshold))


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


def mean_probability(output: Any, *, sigmoid: bool = False) -> Float[Tensor, "B"]:
    """Mean over queries of the largest probability, that of no object included."""
    return _sureness(output, sigmoid).mean(1)


def least_probability(output: Any, *, sigmoid: bool = False) -> Float[Tensor, "B"]:
    """Largest probability of the query that is the least sure."""
    return _sureness(output, sigmoid).amin(1)


def _sureness(output: Any, sigmoid: bool) -> Float[Tensor, "B Q"]:
    """Compute how sure each query is, of its likeliest class or that there is no object."""
    logits, _ = parts(output)
    if not sigmoid:
        return logits.softmax(-1).amax(-1)
    likeliest = logits.sigmoid().amax(-1)
    return torch.maximum(likeliest, 1.0 - likeliest)


# --- metrics of the data set ----------------------------------------------------------------------


def statistics(
    output: Any,
    target: Any,
    *,
    find: Any = found,
    threshold: float = 0.5,
    sigmoid: bool = False,
) -> Float[Tensor, "B S"]:
    """Count hits, false alarms, misses, classes and the objects of each.

    Then list detections.

    Each detection is its score, class, and whether it is right.
    """
    classes = classes_of(parts(output)[0], sigmoid)
    one, truth = find(output), truth_of(output, target, sigmoid)
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


def ideal(target: Any, output: Any, *, sigmoid: bool = False) -> Float[Tensor, "1 N D"]:
    """Make the output that would be right."""
    logits, _ = parts(output)
    classes = classes_of(logits, sigmoid)
    read = objects_of(target, 1, classes)
    nothing = torch.where(read.labels >= 0, read.labels, classes)
    right = F.one_hot(nothing, classes + 1)[..., : logits.shape[2]].float()
    return torch.cat([CERTAIN * (2 * right - 1 if sigmoid else right), read.boxes], -1)


def _sure(one: Found, threshold: float) -> Found:
    """Take what is sure enough of the first picture."""
    kept = one.scores[0] >= threshold
    return Found(*(part[0][kept] for part in one))
