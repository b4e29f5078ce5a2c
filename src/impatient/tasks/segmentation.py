"""A class for every pixel, from logits [B, C, H, W]."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from impatient.errors import TaskError
from impatient.tasks.task import Task, check_array
from impatient.tasks.words import class_name, listed

# the share of pixels that may be less sure than `low_probability`
LOW = 0.05


@functools.cache
def segmentation(ignore: int = 255) -> Task:
    """Make the task of naming a class for every pixel.

    Outputs are logits [B, C, H, W]; targets are class numbers [B, H, W], of the same height and
    width. Quality is the mean IoU of that image, over the classes in its prediction or its target.
    Its mean over images is not the mIoU of the data set: that is in the summary, exact, beside the
    share of right pixels. An image whose pixels are all ignored has quality 1 and loss 0.

    Args:
        ignore: the number of pixels that count nowhere.
    Raises:
        TaskError: if `ignore` is no whole number.
    Example:
        >>> logits = torch.eye(2)[torch.tensor([[[0, 1], [1, 1]]])].movedim(-1, 1)
        >>> round(float(segmentation().quality(logits, torch.tensor([[[0, 1], [0, 255]]]))), 3)
        0.5
    """
    if not isinstance(ignore, int):
        raise TaskError(
            f"ignore={ignore!r}; expected a whole number, that of the pixels that do not count."
        )
    return Task(
        name="segmentation" if ignore == 255 else f"segmentation:ignore={ignore}",
        losses=functools.partial(losses, ignore=ignore),
        quality=functools.partial(quality, ignore=ignore),
        scores={"mean_probability": mean_probability, "low_probability": low_probability},
        quality_name="IoU of an image",
        distance=distance,
        says=said,
        layer=layer,
        ideal=functools.partial(ideal, ignore=ignore),
        outputs_for=functools.partial(width, ignore=ignore),
        statistics=functools.partial(statistics, ignore=ignore),
        summary=summary,
        check_targets=functools.partial(
            check_array, dims=3, whole=True, expected="a class number for every pixel, [N, H, W]"
        ),
    )


def losses(
    output: Float[Tensor, "B C H W"], target: Int[Tensor, "B H W"], *, ignore: int = 255
) -> Float[Tensor, "B"]:
    """Compute the mean cross-entropy of each image, over the pixels that count."""
    counts = _counting(output, target, ignore)
    truth = torch.where(counts, target.long(), 0)
    each = F.cross_entropy(output.float(), truth, reduction="none")
    # chosen, not multiplied: the loss of a pixel that does not count may be infinite
    kept = torch.where(counts, each, 0.0)
    return kept.sum((1, 2)) / counts.sum((1, 2)).clamp(min=1)


def quality(
    output: Float[Tensor, "B C H W"], target: Int[Tensor, "B H W"], *, ignore: int = 255
) -> Float[Tensor, "B"]:
    """Compute the mean IoU of each image."""
    both, either = _overlaps(output, target, ignore)
    present = either > 0
    shares = both / either.clamp(min=1)
    found = (shares * present).sum(1) / present.sum(1).clamp(min=1)
    return torch.where(present.any(1), found, 1.0).float()


def width(target: Int[Tensor, "B H W"], *, ignore: int = 255) -> int:
    """Count the classes of masks, those between them that are absent included.

    Raises:
        TaskError: if no pixel counts.
    """
    counting = target[target != ignore]
    if not len(counting):
        raise TaskError(
            f"every pixel of the masks is {ignore}, which counts nowhere; expected class numbers "
            "from 0. Name another number with segmentation:ignore=N."
        )
    return int(counting.max()) + 1


def mean_probability(output: Float[Tensor, "B C H W"]) -> Float[Tensor, "B"]:
    """Mean over pixels of the largest class probability."""
    return _surest(output).mean((1, 2))


def low_probability(output: Float[Tensor, "B C H W"]) -> Float[Tensor, "B"]:
    """Largest class probability that all but 5 % of the pixels reach."""
    sure = _surest(output).flatten(1)
    place = max(1, round(LOW * sure.shape[1]))
    # not kthvalue, which no engine has
    return sure.topk(place, dim=1, largest=False).values[:, -1]


def _surest(output: Tensor) -> Float[Tensor, "B H W"]:
    if output.dim() != 4:
        raise TaskError(
            f"an output of shape {tuple(output.shape)}; expected logits of every pixel, "
            "[B, C, H, W]."
        )
    return output.float().softmax(1).amax(1)


def distance(
    output: Float[Tensor, "B C H W"], other: Float[Tensor, "B C H W"]
) -> Float[Tensor, "B"]:
    """Compute the share of pixels that get another class."""
    return (output.argmax(1) != other.argmax(1)).float().mean((1, 2))


def statistics(
    output: Float[Tensor, "B C H W"], target: Int[Tensor, "B H W"], *, ignore: int = 255
) -> Float[Tensor, "B S"]:
    """Count intersection and union of every class, pixels that count, and right ones."""
    both, either = _overlaps(output, target, ignore)
    counts = _counting(output, target, ignore)
    return torch.cat([both, either, counts.sum((1, 2))[:, None], both.sum(1, keepdim=True)], 1)


def summary(sums: Float[Tensor, "S"]) -> dict[str, float]:
    """Compute mIoU, over the classes that occur, and the share of right pixels.

    Both are 1 where no pixel counts.
    """
    classes = (len(sums) - 2) // 2
    both, either, rest = sums.split([classes, classes, 2])
    present = either > 0
    counted, right = rest.tolist()
    return {
        "mIoU": float((both[present] / either[present]).mean()) if bool(present.any()) else 1.0,
        "pixels right": right / counted if counted else 1.0,
    }


def said(output: Float[Tensor, "1 C H W"], names: Sequence[str]) -> str:
    """Say the shares of the pixels of each class, but for class 0 if there are others."""
    shares = torch.bincount(output[0].argmax(0).flatten(), minlength=output.shape[1]).double()
    shares = (100 * shares / shares.sum()).round()
    found = [label for label in shares.nonzero()[:, 0].tolist() if label] or [0]
    return listed((f"{class_name(names, label)} {shares[label]:.0f} %" for label in found), "none")


def layer(output: Float[Tensor, "1 C H W"], size: tuple[int, int]) -> Int[Tensor, "H W"]:
    """Give each pixel the number of its class.

    Class 0 is not coloured.
    """
    labels = output.argmax(1, keepdim=True).float()
    return F.interpolate(labels, size=size, mode="nearest")[0, 0].long().cpu()


def ideal(
    target: Int[Tensor, "1 H W"], output: Float[Tensor, "1 C H W"], *, ignore: int = 255
) -> Float[Tensor, "1 C H W"]:
    """Make the output that would be right.

    Pixels that do not count get class 0.
    """
    labels = torch.where(target == ignore, 0, target.long())
    return F.one_hot(labels, output.shape[1]).movedim(-1, 1).float()


def _overlaps(output: Tensor, target: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """Count the pixels of intersection and union, float64 [B, C] each."""
    counts = _counting(output, target, ignore)
    classes = output.shape[1]
    said = _per_class(output.argmax(1), counts, classes)
    true = _per_class(target, counts, classes)
    both = _per_class(target, counts & (output.argmax(1) == target), classes)
    return both, said + true - both


def _per_class(labels: Tensor, counts: Bool[Tensor, "B H W"], classes: int) -> Tensor:
    """Count the pixels of each class among those that count."""
    batch = len(labels)
    rows = torch.arange(batch, device=labels.device)[:, None, None] * classes
    places = (rows + labels.long())[counts]
    found = torch.bincount(places, minlength=batch * classes)
    return found.view(batch, classes).double()


def _counting(output: Tensor, target: Tensor, ignore: int) -> Bool[Tensor, "B H W"]:
    """Return which pixels count, once output and target fit each other."""
    if output.dim() != 4 or target.shape != (len(output), *output.shape[2:]):
        raise TaskError(
            f"targets of shape {tuple(target.shape)} for outputs of shape {tuple(output.shape)}; "
            "expected [B, H, W] for [B, C, H, W]. Resize the targets, or let the network give "
            "outputs of their size."
        )
    if target.is_floating_point():
        raise TaskError(f"targets of type {target.dtype}; expected whole numbers, the classes.")
    counts = target != ignore
    kept = target[counts]
    if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < output.shape[1]:
        raise TaskError(
            f"classes from {int(kept.min())} to {int(kept.max())} for {output.shape[1]} outputs; "
            f"expected 0 to {output.shape[1] - 1}, or {ignore} for pixels that do not count "
            "(segmentation:ignore=NUMBER)."
        )
    return counts
