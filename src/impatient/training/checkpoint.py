"""Everything a training run needs to go on bit for bit where it stopped, in one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from impatient.errors import StorageError
from impatient.files import entries_under, read_tensors, write_tensors


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, header: Mapping[str, Any]
) -> None:
    """Write weights, optimizer state and random state, with a JSON header, whole or not at all."""
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
    write_tensors(path, tensors, {**header, "optimizer_numbers": numbers})


def load_checkpoint(
    path: Path, model: nn.Module
) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Put weights and random state back; return the header and the optimizer's state per parameter.

    Raises:
        StorageError: if the file is damaged or belongs to another model.
    """
    tensors, header = read_tensors(path)
    if "random/cpu" not in tensors:
        raise StorageError(
            f"{path} is no checkpoint of training; it lacks the random state. Delete it to start "
            "anew."
        )
    try:
        model.load_state_dict(entries_under("model/", tensors))
    except RuntimeError as error:
        raise StorageError(f"{path} belongs to another network: {error}") from error
    state: dict[int, dict[str, Any]] = {}
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
