"""Try out whether a run can go on with some of its samples.

Reduced features replace the old ones, but an attention mask, a skip connection or a shape that the
model took from its input stay as they are. So a batch of made-up samples is run twice: whole, and
with one sample less after every cut, in another order. Every output of the second run must equal
that of the same sample in the first run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from impatient.anytime import Run
from impatient.trees import entries, map_samples

# Largest allowed difference, as a share of the distance between two samples' outputs. Rounding
# differs far less, and a wrong sample by 1.
TOLERANCE = {torch.float16: 0.2, torch.bfloat16: 0.2}
USUAL_TOLERANCE = 0.02


class Verdict(NamedTuple):
    """The result of a trial.

    Attributes:
        shrinks: whether the network can go on with some samples; None if the trial did not show it.
        reason: why it cannot, or why the trial did not show it.
    """

    shrinks: bool | None
    reason: str = ""


def judge(begin: Callable[[Any], Run], num_exits: int, x: Any) -> Verdict:
    """Try out whether samples may be taken out after each cut.

    Args:
        begin: function that begins a run of the network on an input, in eval mode.
        num_exits: number of the network's exits.
        x: an example input; samples are made up from the shapes, types and masks of its first one.
    """
    samples = probe(x, num_exits + 1)
    kept = kept_rows(num_exits)
    try:
        with torch.inference_mode():
            whole = _outputs(begin(samples), kept[:1] * num_exits)
            reduced = _outputs(begin(samples), kept)
    except Exception as error:
        # A model may raise anything if its values do not fit together.
        return Verdict(False, f"{type(error).__name__}: {error}")
    if not len(whole) == len(reduced) == num_exits:
        return Verdict(
            None, f"made-up samples came to {len(whole)} and {len(reduced)} of {num_exits} exits"
        )
    verdicts = [_compared(*outputs) for outputs in zip(whole, reduced, kept, strict=True)]
    return next((verdict for verdict in verdicts if not verdict.shrinks), Verdict(True))


def kept_rows(num_exits: int) -> list[list[int]]:
    """List which of K + 1 samples each exit of the trial has.

    After every cut there is one sample less, and the order is reversed. The last exit has two.

    Example:
        >>> kept_rows(3)
        [[0, 1, 2, 3], [3, 2, 1], [1, 2]]
    """
    rows = [list(range(num_exits + 1))]
    for _ in range(num_exits - 1):
        rows.append(rows[-1][:0:-1])
    return rows


def _outputs(run: Run, kept: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the outputs of all exits of a run.

    `kept` has the samples of each exit, by their places in the whole batch.
    """
    outputs = []
    with run:
        for exit in run:
            # Now, because a later stage may overwrite the features.
            outputs.append(exit.output().clone())
            for following in kept[exit.index + 1 : exit.index + 2]:
                run.keep(torch.tensor([kept[exit.index].index(place) for place in following]))
    return outputs


def _compared(whole: Tensor, reduced: Tensor, places: Sequence[int]) -> Verdict:
    expected = whole[list(places)]
    if reduced.shape != expected.shape:
        return Verdict(
            False, f"an output has shape {tuple(reduced.shape)} for {len(places)} samples"
        )
    apart = float(torch.pdist(whole.flatten(1).double(), p=float("inf")).median())
    off = float((reduced - expected).double().abs().max())
    if not off <= apart * TOLERANCE.get(whole.dtype, USUAL_TOLERANCE):
        return Verdict(False, f"outputs are off by {off:.2g}, where samples are {apart:.2g} apart")
    return Verdict(True) if apart > 0.0 else Verdict(None, "outputs of different samples are equal")


def kind_of(x: Any) -> Hashable:
    """Return an input's structure, and its samples' shapes, types and devices."""
    if isinstance(x, Tensor):
        return (x.shape[1:], x.dtype, x.device)
    return (type(x), *((key, kind_of(entry)) for key, entry in entries(x)))


def probe(x: Any, count: int) -> Any:
    """Make an input of several different samples, of the same kind.

    Numbers become noise, masks get different lengths, and token ids are rotated.
    """
    return map_samples(lambda value: _probe(value, count), x)


def _probe(value: Tensor, count: int) -> Tensor:
    first = value[0].detach()
    if value.is_floating_point():
        return _noise(first, count)
    return torch.stack([_rotated(first, number) for number in range(count)])


def _noise(first: Tensor, count: int) -> Tensor:
    """Return random samples of the same mean and standard deviation.

    A sample with infinities is a mask, and is repeated.
    """
    spread, mean = torch.std_mean(first.float(), correction=0)
    if not bool(torch.isfinite(mean)):
        return torch.stack([first] * count)
    noise = torch.randn(count, *first.shape, generator=torch.Generator().manual_seed(0))
    return (noise * (float(spread) or 1.0) + float(mean)).to(device=first.device, dtype=first.dtype)


def _rotated(first: Tensor, number: int) -> Tensor:
    """Return another row of whole numbers for each number, with the same values.

    A row of ones is a mask, and gets zeros at its end.
    """
    if not first.dim() or first.shape[-1] < 2:
        return first
    if not bool((first == 1).all()):
        return first.roll(number, -1)
    masked = first.clone()
    masked[..., first.shape[-1] - number % first.shape[-1] :] = 0
    return masked
