"""Try out whether a run can go on with some samples of its batch.

The reduced features take the place of the old ones; an attention mask, a skip connection or a shape
that the model took from its input do not. So a batch of made-up samples is run twice, whole and
with one sample less after every cut, in another order; every output of the second run must be that
of the same sample in the first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from impatient.anytime import Run
from impatient.inputs import map_samples

# Differences in rounding stay far below this share of the distance between two samples' outputs; a
# wrong sample is at 1.
TOLERANCE = {torch.float16: 0.2, torch.bfloat16: 0.2}
USUAL_TOLERANCE = 0.02


class Verdict(NamedTuple):
    """Whether a network shrinks, None where the trial could not tell, and what went wrong
    otherwise.
    """

    shrinks: bool | None
    reason: str = ""


def judge(begin: Callable[[Any], Run], num_exits: int, x: Any) -> Verdict:
    """Try out whether samples may be taken out after each cut.

    Args:
        begin: begins a run of the network on an input, in eval mode.
        num_exits: of the network.
        x: an example input. Its shapes, types and masks count; samples are made up from its first
            one.
    """
    samples = probe(x, num_exits + 1)
    kept = kept_rows(num_exits)
    try:
        with torch.inference_mode():
            whole = _outputs(begin(samples), kept[:1] * num_exits)
            reduced = _outputs(begin(samples), kept)
    except Exception as error:
        # whatever a model raises when its values do not fit together
        return Verdict(False, f"{type(error).__name__}: {error}")
    if not len(whole) == len(reduced) == num_exits:
        return Verdict(
            None, f"made-up samples came to {len(whole)} and {len(reduced)} of {num_exits} exits"
        )
    verdicts = [_compared(*outputs) for outputs in zip(whole, reduced, kept, strict=True)]
    return next((verdict for verdict in verdicts if not verdict.shrinks), Verdict(True))


def kept_rows(num_exits: int) -> list[list[int]]:
    """Which of K + 1 samples an exit of the trial has: one less and in reverse order after every
    cut, 2 at the last exit.

    Example:
        >>> kept_rows(3)
        [[0, 1, 2, 3], [3, 2, 1], [1, 2]]
    """
    rows = [list(range(num_exits + 1))]
    for _ in range(num_exits - 1):
        rows.append(rows[-1][:0:-1])
    return rows


def _outputs(run: Run, kept: Sequence[Sequence[int]]) -> list[Tensor]:
    """Outputs of all exits of a run; `kept` says which samples, by their places in the whole batch,
    each exit is to have.
    """
    outputs = []
    with run:
        for exit in run:
            # before the features may be overwritten
            outputs.append(exit.output().clone())
            for following in kept[exit.index + 1 : exit.index + 2]:
                run.keep(torch.tensor([kept[exit.index].index(place) for place in following]))
    return outputs


def _compared(whole: Tensor, reduced: Tensor, places: Sequence[int]) -> Verdict:
    wanted = whole[list(places)]
    if reduced.shape != wanted.shape:
        return Verdict(
            False, f"an output has shape {tuple(reduced.shape)} for {len(places)} samples"
        )
    apart = float(torch.pdist(whole.flatten(1).double(), p=float("inf")).median())
    off = float((reduced - wanted).double().abs().max())
    if not off <= apart * TOLERANCE.get(whole.dtype, USUAL_TOLERANCE):
        return Verdict(False, f"outputs are off by {off:.2g}, where samples are {apart:.2g} apart")
    return Verdict(True) if apart > 0.0 else Verdict(None, "outputs of different samples are equal")


def kind_of(x: Any) -> Hashable:
    """Return what a model treats alike: structure, shapes of one sample, types, devices."""
    leaves, structure = tree_flatten(x)
    kinds = (
        (leaf.shape[1:], leaf.dtype, leaf.device)
        if isinstance(leaf, Tensor)
        else tuple((name, kind_of(value)) for name, value in leaf.items())
        if isinstance(leaf, Mapping)
        else str(type(leaf))
        for leaf in leaves
    )
    return (str(structure), *kinds)


def probe(x: Any, count: int) -> Any:
    """Make an input of several samples that differ, of the kind of another one.

    Numbers become noise, masks differ in length, token ids are turned round.
    """
    return map_samples(lambda value: _probe(value, count), x)


def _probe(value: Tensor, count: int) -> Tensor:
    first = value[0].detach()
    if value.is_floating_point():
        return _noise(first, count)
    return torch.stack([_turned(first, number) for number in range(count)])


def _noise(first: Tensor, count: int) -> Tensor:
    """Random samples of the same mean and spread; a sample with infinities is a mask and stays as
    it is.
    """
    spread, mean = torch.std_mean(first.float(), correction=0)
    if not bool(torch.isfinite(mean)):
        return torch.stack([first] * count)
    noise = torch.randn(count, *first.shape, generator=torch.Generator().manual_seed(0))
    return (noise * (float(spread) or 1.0) + float(mean)).to(device=first.device, dtype=first.dtype)


def _turned(first: Tensor, number: int) -> Tensor:
    """A row of whole numbers, another one for each number, with values that are in it anyway; of a
    row of ones a mask.
    """
    if not first.dim() or first.shape[-1] < 2:
        return first
    if not bool((first == 1).all()):
        return first.roll(number, -1)
    masked = first.clone()
    masked[..., first.shape[-1] - number % first.shape[-1] :] = 0
    return masked
