"""Read one sample from a file, as a run's network takes it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impatient.errors import DataError
from impatient.verbs.network_spec import NetworkSpec, SampleArray

if TYPE_CHECKING:
    from torch import Tensor

    from impatient.training import Preprocess


def read_input(spec: NetworkSpec, file: Path) -> Any:
    """Read a picture, or arrays, as a batch of one.

    Raises:
        DataError: if the file is missing or damaged, or holds another kind of sample.
    """
    if not file.is_file():
        raise DataError(
            f"{file} is a folder; name its files." if file.is_dir() else f"no such file: {file}."
        )
    if spec.example_parts:
        return spec.preprocess(_several(spec, file))
    raw = _array(file) if file.suffix == ".npy" else spec.preprocess.image(file)
    if tuple(raw.shape[1:]) != spec.example_shape:
        raise DataError(
            f"{file} has shape {tuple(raw.shape[1:])}; expected one raw sample of shape "
            f"{spec.example_shape}, without a batch dimension."
        )
    return spec.preprocess(spec.preprocess.checked(raw, str(file)))


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
    import numpy as np

    with _readable(file):
        return _tensor(np.load(file, allow_pickle=False))


def _arrays(file: Path) -> dict[str, Tensor]:
    import numpy as np

    with _readable(file), file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
        return {name: _tensor(archive[name]) for name in archive.files}


def _tensor(array: Any) -> Tensor:
    import torch

    if array.dtype.kind not in "fiub":
        raise TypeError(f"it holds {array.dtype}; expected numbers.")
    return torch.from_numpy(array)[None]


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn whatever reading an array raises into an error of ours."""
    try:
        yield
    except Exception as error:
        # numpy reads the header as Python, and raises what that raises.
        raise DataError(f"{file} cannot be read as a plain array: {error}") from error
