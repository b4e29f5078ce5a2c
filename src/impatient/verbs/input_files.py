"""Read one sample from a file, as a run's network takes it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import wave
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from impatient.errors import DataError
from impatient.verbs.network_spec import NetworkSpec, SampleArray

if TYPE_CHECKING:
    from torch import Tensor

    from impatient.training import Preprocess


def read_raw(spec: NetworkSpec, file: Path) -> Any:
    """Read a picture, an array, several by their names, sound or text, not preprocessed.

    Raises:
        DataError: if the file is missing or damaged, or holds another kind of sample.
    """
    if not file.is_file():
        raise DataError(
            f"{file} is a folder; name its files." if file.is_dir() else f"no such file: {file}."
        )
    suffix = file.suffix.lower()
    if spec.example_parts:
        return _tokens(spec, file) if suffix == ".txt" else _several(spec, file)
    readers: Mapping[str, Callable[[Path], Tensor]] = {
        ".npy": _array,
        ".npz": _only_array,
        ".wav": functools.partial(_sound, spec),
    }
    raw = readers.get(suffix, spec.preprocess.image)(file)
    if tuple(raw.shape[1:]) != spec.example_shape:
        raise DataError(
            f"{file} has shape {tuple(raw.shape[1:])}; expected one raw sample of shape "
            f"{spec.example_shape}, without a batch dimension."
        )
    return spec.preprocess.checked(raw, str(file))


def _only_array(file: Path) -> Tensor:
    """Read the array of a .npz file that has one."""
    found = _arrays(file)
    if len(found) != 1:
        raise DataError(
            f"{file} holds {', '.join(found) or 'no arrays'}; expected one array, of one raw "
            "sample."
        )
    return next(iter(found.values()))


def _sound(spec: NetworkSpec, file: Path) -> Tensor:
    """Read a .wav file of 8, 16 or 32 bits as numbers from -1 to 1, [1, ...] as the network takes.

    Raises:
        DataError: if it is no such file, or of another length or number of channels.
    """
    import torch

    try:
        with wave.open(str(file)) as opened:
            channels, width = opened.getnchannels(), opened.getsampwidth()
            content = opened.readframes(opened.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise DataError(f"{file} cannot be read as sound: {error}.") from error
    if width not in (1, 2, 4):
        raise DataError(f"{file} has {8 * width} bits a number; expected 8, 16 or 32. Convert it.")
    whole = content[: len(content) - len(content) % (width * channels)]
    numbers = np.frombuffer(whole, {1: "u1", 2: "<i2", 4: "<i4"}[width]).astype(np.float32)
    # 8 bits are the only ones without a sign.
    numbers = (numbers - 128.0) / 128.0 if width == 1 else numbers / 2.0 ** (8 * width - 1)
    frames = torch.from_numpy(numbers.reshape(-1, channels))
    layouts = (frames.T, frames, frames[:, 0]) if channels == 1 else (frames.T, frames)
    fitting = [part for part in layouts if tuple(part.shape) == spec.example_shape]
    if not fitting:
        raise DataError(
            f"{file} holds {len(frames)} numbers in {channels} channels; expected the shape "
            f"{spec.example_shape} of the samples that the network was trained on. Cut or resample "
            "it."
        )
    return fitting[0][None].contiguous()


def _tokens(spec: NetworkSpec, file: Path) -> dict[str, Tensor]:
    """Read a .txt file as the tokens of one sample, by the tokenizer of the training data."""
    from impatient.training.text import tokens_of

    with _readable(file):
        text = file.read_text(encoding="utf-8").strip()
    found = tokens_of(spec.data, text)
    return {name: found[name].to(part.torch_dtype()) for name, part in spec.example_parts.items()}


def _several(spec: NetworkSpec, file: Path) -> dict[str, Tensor]:
    """Read the arrays of one sample."""
    wanted = spec.example_parts
    found = _arrays(file) if file.suffix == ".npz" else {}
    if found.keys() != wanted.keys():
        raise DataError(
            f"{file} holds {', '.join(found) or 'no arrays by name'}; expected a .npz file with "
            f"{', '.join(wanted)}, each of one sample and without a batch dimension."
        )
    return {
        name: _fitting(part, found[name], spec.preprocess, f"{file}, {name},")
        for name, part in wanted.items()
    }


def _fitting(wanted: SampleArray, raw: Tensor, preprocess: Preprocess, where: str) -> Tensor:
    if raw.dim() - 1 != len(wanted.shape):
        raise DataError(
            f"{where} has shape {tuple(raw.shape[1:])}; expected as many dimensions as "
            f"{wanted.shape}, without a batch dimension."
        )
    typed = dataclasses.replace(preprocess, dtype=wanted.dtype)
    return typed.checked(raw, where).to(wanted.torch_dtype())


def _array(file: Path) -> Tensor:
    with _readable(file):
        return _tensor(np.load(file, allow_pickle=False))


def _arrays(file: Path) -> dict[str, Tensor]:
    with _readable(file), file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
        return {name: _tensor(archive[name]) for name in archive.files}


def _tensor(array: Any) -> Tensor:
    import torch

    if array.dtype.kind not in "fiub":
        raise TypeError(f"it holds {array.dtype}; expected numbers.")
    # Files of other machines have another order of bytes, which torch does not take.
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))[None]


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn whatever reading an array raises into an error of ours."""
    try:
        yield
    except Exception as error:
        # numpy reads the header as Python, and raises what that raises.
        raise DataError(f"{file} cannot be read as a plain array: {error}") from error
