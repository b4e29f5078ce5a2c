"""Checkpoints, from which a training run continues bit for bit.

A checkpoint is one safetensors file with weights, optimizer state and random state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from impatient.errors import ImpatientError, StorageError
from impatient.files import entries_under, read_tensors, write_tensors


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, header: Mapping[str, Any]
) -> None:
    """Write weights, optimizer state, random state and a JSON header atomically."""
    tensors: dict[str, Tensor] = {
        f"model/{name}": value for name, value in model.state_dict().items()
    }
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    numbers: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            else:
                numbers[f"{index}/{name}"] = value
    count = len(entries_under("optimizer/", tensors))
    write_tensors(
        path, tensors, {**header, "optimizer_numbers": numbers, "optimizer_tensors": count}
    )


def load_checkpoint(
    path: Path, model: nn.Module
) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Restore weights and random state from a checkpoint.

    Returns:
        The header, and the optimizer's state of each parameter by its index.
    Raises:
        StorageError: if the file is damaged or belongs to another model.
    """
    tensors, header = read_tensors(path)
    if "random/cpu" not in tensors:
        raise StorageError(
            f"{path} is not a training checkpoint: it has no random state. Delete it to start "
            "again."
        )
    weights = entries_under("model/", tensors)
    try:
        check_types(weights, model)
        model.load_state_dict(weights)
    except (RuntimeError, StorageError) as error:
        raise StorageError(f"{path} belongs to another network: {error}") from error
    found = len(entries_under("optimizer/", tensors))
    if found != header.get("optimizer_tensors", found):
        raise StorageError(
            f"{path} is damaged: it has {found} of the {header['optimizer_tensors']} tensors of "
            "the optimizer. Delete it to start again."
        )
    state: dict[int, dict[str, Any]] = {}
    with damage_named(path):
        for key, value in {
            **entries_under("optimizer/", tensors),
            **header.get("optimizer_numbers", {}),
        }.items():
            index, _, name = key.partition("/")
            state.setdefault(int(index), {})[name] = value
        torch.set_rng_state(tensors["random/cpu"])
        if "random/cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random/cuda"])
    return header, state


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what comes of entries of the wrong kind into an error that names the checkpoint.

    Raises:
        StorageError: if the block meets an entry that is missing or of the wrong kind.
    """
    try:
        yield
    except ImpatientError:
        # It says already what is wrong.
        raise
    except Exception as error:
        # What torch, numpy and Python raise for an entry of the wrong kind differs.
        raise StorageError(
            f"{path} is damaged: an entry is missing or of the wrong kind ({error!r}). Delete it "
            "to start again."
        ) from error


def check_types(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Compare types of weights with the model's, which torch would convert without a word.

    Raises:
        StorageError: if whole numbers stand for fractions, or the other way round.
    """
    for name, own in model.state_dict().items():
        if name in state and state[name].is_floating_point() != own.is_floating_point():
            raise StorageError(f"{name} is {state[name].dtype}; expected {own.dtype}.")
