"""Losses of detection: each object is matched with one query."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from impatient.tasks.boxes import generalised_overlaps
from impatient.tasks.objects import Objects, parts, probabilities, truth_of

# weights of DETR: of queries without an object, of distances of boxes, of their overlaps
NO_OBJECT, DISTANCE, OVERLAP = 0.1, 5.0, 2.0
# of sigmoids: weight of the focal loss, share of those that are there, exponent of what is missing
FOCAL, THERE, FOCUS = 2.0, 0.25, 2.0


def losses(output: Any, target: Any) -> Float[Tensor, "B"]:
    """Compute the loss of each picture, after matching each object with one query.

    It is the cross-entropy of the queries, where those without an object count a tenth, plus 5
    times the distance and 2 times what the generalised overlap lacks to 1, both the mean over the
    objects.

    Source:
        Carion et al. 2020 (DETR). We differ: means are over each picture, not over the batch.
    """
    logits, boxes = parts(output)
    truth = truth_of(output, target, sigmoid=False)
    picture, queries, places = match(logits, boxes, truth)
    placed, matched = _placed(boxes, truth, (picture, queries, places))
    nothing = logits.shape[2] - 1
    classes = torch.full(logits.shape[:2], nothing, device=logits.device)
    classes[picture, queries] = truth.labels[picture, places]
    each = F.cross_entropy(logits.transpose(1, 2), classes, reduction="none")
    weights = torch.where(classes == nothing, NO_OBJECT, 1.0)
    return (weights * each).sum(1) / weights.sum(1) + placed / matched


def focal_losses(output: Any, target: Any) -> Float[Tensor, "B"]:
    """Compute the loss of each picture where each class has a sigmoid of its own.

    Boxes count as in `losses`; classes by twice the focal loss, per object.

    Source:
        Zhu et al. 2021 (Deformable DETR), Lin et al. 2017 (focal loss). We differ: means are over
        each picture, and objects are matched by probabilities.
    """
    logits, boxes = parts(output)
    truth = truth_of(output, target, sigmoid=True)
    picture, queries, places = match(logits, boxes, truth, sigmoid=True)
    placed, matched = _placed(boxes, truth, (picture, queries, places))
    wanted = torch.zeros_like(logits)
    wanted[picture, queries, truth.labels[picture, places]] = 1.0
    each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    missing = (wanted - logits.sigmoid()).abs() ** FOCUS
    weights = torch.where(wanted > 0, THERE, 1.0 - THERE)
    return (FOCAL * (weights * missing * each).sum((1, 2)) + placed) / matched


def _placed(
    boxes: Float[Tensor, "B Q 4"], truth: Objects, pairs: tuple[Tensor, Tensor, Tensor]
) -> tuple[Float[Tensor, "B"], Int[Tensor, "B"]]:
    """Sum how far boxes of each picture are off, and count the objects that have a query."""
    picture, queries, places = pairs
    said, true = boxes[picture, queries], truth.boxes[picture, places]
    off = DISTANCE * (said - true).abs().sum(1) + OVERLAP * (1 - generalised_overlaps(said, true))
    placed = torch.zeros(len(boxes), device=off.device).index_add(0, picture, off)
    return placed, torch.bincount(picture, minlength=len(boxes)).clamp(min=1)


def match(
    logits: Float[Tensor, "B Q D"],
    boxes: Float[Tensor, "B Q 4"],
    truth: Objects,
    *,
    sigmoid: bool = False,
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
        likely = probabilities(logits, sigmoid).gather(2, columns)
        costs = DISTANCE * distances - OVERLAP * near - likely
    pairs: list[tuple[int, int, int]] = []
    # a network that has diverged is told of by its loss
    for picture, table in enumerate(torch.nan_to_num(costs).cpu().numpy()):
        objects = np.flatnonzero((truth.labels[picture] >= 0).cpu().numpy())
        queries, columns_of = linear_sum_assignment(table[:, objects])
        pairs += zip([picture] * len(queries), queries, objects[columns_of], strict=True)
    found = torch.as_tensor(np.array(pairs, dtype=np.int64).reshape(-1, 3), device=logits.device)
    return found[:, 0], found[:, 1], found[:, 2]
