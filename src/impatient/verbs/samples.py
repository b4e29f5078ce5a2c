"""Samples of a run to look at: their pictures or words, and what each exit makes of them."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import impatient
from impatient.errors import DataError, ModelSpecError
from impatient.evaluation import Example, Said
from impatient.files import written_whole
from impatient.tasks import Task
from impatient.tasks.words import numbers
from impatient.trees import leaves, take
from impatient.verbs.highlighting import highlighted
from impatient.verbs.notes import log
from impatient.verbs.run_directory import RunDirectory

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

# pixels; larger pictures of samples are made smaller
LARGEST = 64
# bytes; pictures that take more as PNG become JPEG
SMALL = 1000
# Okabe and Ito's colours, distinct with every common kind of colour blindness
COLOURS = ("e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7")
# bytes of all drawn answers of a page
MOST_BYTES = 50_000
# numbers that are drawn as dots
MOST_DOTS = 120
# how much of a picture is seen through a colour, of 255
OPAQUE = 150


def examples_of(
    run: RunDirectory,
    recording: impatient.Recording,
    policies: Mapping[str, impatient.Policy],
) -> list[Example]:
    """Pick test inputs that left early and late under the first policy."""
    if not policies:
        return []
    early, late = impatient.evaluation.select_examples(recording, next(iter(policies.values())))
    chosen = [*early, *late]
    names = run.class_names()
    if recording.outputs is not None and recording.targets is not None:
        outputs: list[Any] = list(recording.outputs[:, chosen])
        targets: Any = recording.targets[chosen]
    else:
        found = _answers(run, chosen)
        if found is None:
            return _by_quality(recording, chosen)
        outputs, targets = found
    task = impatient.tasks.named(recording.task)
    inputs = run.data().examples("test").take(chosen) if run.has_network else None
    words = highlighted(run, inputs, outputs[-1])
    made = [
        _example(
            index,
            [take(output, [place]) for output in outputs],
            take(targets, [place]),
            None if inputs is None else take(inputs, [place]),
            task,
            names,
            words[place] if words else (),
        )
        for place, index in enumerate(chosen)
    ]
    return list(_within(made, MOST_BYTES))


def _within(examples: Sequence[Example], most: int) -> Iterator[Example]:
    """Take the drawn answers away from samples that would make the page too large."""
    taken = 0
    for example in examples:
        layers = [example.layer, *(said.layer for said in example.exits)]
        taken += sum(len(layer) for layer in layers if layer)
        if taken <= most:
            yield example
            continue
        exits = tuple(dataclasses.replace(said, layer=None) for said in example.exits)
        yield dataclasses.replace(example, layer=None, exits=exits)


def numbers_of(
    run: RunDirectory, recording: impatient.Recording
) -> tuple[list[float], dict[str, list[float]]] | None:
    """Collect true numbers and what the first and the last exit say of them.

    Returns:
        None if answers are no few numbers, or the network may not be built.
    """
    task = impatient.tasks.named(recording.task)
    if task.says is not numbers or task.ideal is None:
        return None
    found = _answers(run, range(min(MOST_DOTS, len(recording))))
    if found is None or found[0][0].dim() > 2:
        return None
    outputs, targets = found
    # the first number of each sample, where there are several
    shown = {
        f"exit {exit}": outputs[exit].reshape(len(targets), -1)[:, 0].tolist()
        for exit in sorted({0, len(outputs) - 1})
    }
    return targets.reshape(len(targets), -1)[:, 0].tolist(), shown


def _answers(run: RunDirectory, chosen: Sequence[int]) -> tuple[list[Any], Any] | None:
    """Answer some test samples at every exit.

    None where the network may not be built.
    """
    import torch

    if not run.has_network:
        return None
    try:
        network, _ = run.network()
    except ModelSpecError as error:
        log.warning("note: answers are not drawn. %s", error)
        return None
    examples = run.data().examples("test")
    x = run.data().preprocess(examples.take(chosen))
    with torch.inference_mode():
        return list(network(x)), take(examples.labels, list(chosen))


def _by_quality(recording: impatient.Recording, chosen: Sequence[int]) -> list[Example]:
    """Let the quality stand for answers that are not at hand."""
    return [
        Example(
            sample=index,
            label=f"sample {index}",
            exits=tuple(Said(answer=f"{float(row[index]):.2f}") for row in recording.quality),
        )
        for index in chosen
    ]


def _example(
    index: int,
    outputs: Sequence[Any],
    target: Any,
    inputs: Any,
    task: Task,
    names: Sequence[str],
    words: tuple[tuple[str, float], ...] = (),
) -> Example:
    picture = shown_picture(inputs)
    # answers that are pictures themselves, such as of a loop that cleans them
    drawn = task.says is numbers and _picture(outputs[0]) is not None
    media, encoded = ("", None) if picture is None else _encoded(picture)
    truth = task.ideal(target, outputs[-1]) if task.ideal else None
    return Example(
        sample=index,
        label=f"sample {index}" if truth is None or drawn else task.says(truth, names),
        exits=tuple(
            Said(
                answer=(
                    f"quality {float(task.quality(output, target)):.2f}"
                    if drawn
                    else task.says(output, names)
                ),
                top=_likeliest(output, names) if task.is_logits else (),
                layer=_own_picture(output) if drawn else _layer(task, output, picture),
            )
            for output in outputs
        ),
        picture=encoded,
        media=media,
        layer=None
        if truth is None
        else _own_picture(truth)
        if drawn
        else _layer(task, truth, picture),
        words=words,
    )


def _likeliest(output: Tensor, names: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Name the likeliest classes of one output, with their probabilities."""
    top = output[0].softmax(-1).topk(min(3, output.shape[1]))
    shares = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    return tuple((names[index], share) for share, index in shares)


def shown_picture(raw: Any) -> Image.Image | None:
    """Make a small picture of a raw input [1, C, H, W] of bytes, or of numbers from 0 to 1."""
    picture = _picture(raw)
    if picture is not None:
        picture.thumbnail((LARGEST, LARGEST))
    return picture


def _picture(raw: Any) -> Image.Image | None:
    import torch
    from PIL import Image

    if not isinstance(raw, torch.Tensor) or raw.dim() != 4 or raw.shape[1] not in (1, 3):
        return None
    pixels = raw[0] if raw.dtype == torch.uint8 else (raw[0].float().clamp(0, 1) * 255).byte()
    shown = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    return Image.fromarray(shown.numpy())


def _layer(task: Task, output: Any, picture: Image.Image | None) -> bytes | None:
    """Encode what an output looks like over a picture."""
    if picture is None or task.layer is None:
        return None
    stream = io.BytesIO()
    seen = _coloured(task.layer(output, (picture.height, picture.width)))
    opacities = bytes([0, *[OPAQUE] * len(COLOURS)])
    seen.save(stream, format="PNG", optimize=True, transparency=opacities)
    return stream.getvalue()


def _own_picture(output: Any) -> bytes | None:
    picture = shown_picture(output)
    if picture is None:
        return None
    stream = io.BytesIO()
    # enough colours to look at, and a quarter of the bytes
    picture.quantize(16).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _coloured(layer: Tensor) -> Image.Image:
    """Turn numbers of colours into a picture with a palette."""
    import numpy as np
    from PIL import Image

    numbers = np.where(layer == 0, 0, (layer - 1) % len(COLOURS) + 1).astype(np.uint8)
    seen = Image.fromarray(numbers, mode="P")
    seen.putpalette(bytes.fromhex("000000" + "".join(COLOURS)))
    return seen


def save_drawn(task: Task, output: Any, raw: Any, place: Path) -> None:
    """Write a picture with the answer drawn over it.

    Raises:
        DataError: if the input is no picture, or answers of the task cannot be drawn.
    """
    picture = _picture(raw)
    if picture is None or task.layer is None:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves(raw))
        raise DataError(
            f"answers of task {task.name!r} on inputs of shape {shapes} cannot be drawn; expected "
            "masks or boxes (segmentation, detection) on pictures. Leave --pictures away."
        )
    layer = task.layer(output, (picture.height, picture.width))
    over = _coloured(layer).convert("RGB")
    mask = _mask(layer)
    place.parent.mkdir(parents=True, exist_ok=True)
    drawn = picture.convert("RGB")
    drawn.paste(over, mask=mask)
    with written_whole(place) as temporary:
        drawn.save(temporary, format="PNG")


def _mask(layer: Tensor) -> Image.Image:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.where(layer == 0, 0, OPAQUE).astype(np.uint8))


def _encoded(picture: Image.Image) -> tuple[str, bytes]:
    """Encode a picture as PNG, or as JPEG if that is much."""
    exact = io.BytesIO()
    picture.save(exact, format="PNG", optimize=True)
    if exact.tell() <= SMALL:
        return "image/png", exact.getvalue()
    close = io.BytesIO()
    picture.save(close, format="JPEG", quality=85)
    return "image/jpeg", close.getvalue()
