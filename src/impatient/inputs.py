"""Call a model, and walk through its input, in any form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from impatient.errors import NetworkError
from impatient.trees import entries, leaves, map_samples


def call_model(model: Callable[..., Any], x: Any) -> Any:
    """Call a model on one input.

    A mapping is passed as keywords, a tuple or list as positions, anything else as it is.
    """
    # Asked first, because it is usual and because asking for a Mapping takes longer.
    if isinstance(x, Tensor):
        return model(x)
    if isinstance(x, Mapping):
        return model(**x)
    if isinstance(x, (tuple, list)):
        return model(*x)
    return model(x)


def first_tensor(value: Any) -> Tensor:
    """Return the first tensor of a tuple, list, mapping or dataclass.

    A tensor is returned as it is.

    Raises:
        NetworkError: if there is none.
    """
    if isinstance(value, Tensor):
        return value
    for _, entry in entries(value):
        if isinstance(entry, Tensor):
            return entry
    raise NetworkError(
        f"a module at a cut returned {type(value).__name__} without a tensor in it; expected a "
        "tensor, or a tuple, list, mapping or dataclass that holds one. Cut somewhere else."
    )


def input_tensor(x: Any) -> Tensor:
    """Return the first tensor of an input that can hold samples, however deep it lies.

    Raises:
        NetworkError: if there is none.
    """
    # Asked first, because it is usual.
    if isinstance(x, Tensor) and x.dim():
        return x
    for tensor in leaves(x):
        if tensor.dim():
            return tensor
    raise NetworkError(
        f"an input of type {type(x).__name__} holds no tensor with samples in its first dimension; "
        "expected a tensor, a mapping of them, which is passed as keywords, or a tuple or list of "
        "them, passed as positions. Convert arrays and numbers with torch.as_tensor."
    )


def batch_size_of(x: Any) -> int:
    """Return the number of samples in an input of any accepted kind."""
    tensor = input_tensor(x)
    samples = int(tensor.shape[0])
    if not samples:
        raise NetworkError(
            f"an input of shape {tuple(tensor.shape)} has no samples; expected at least one in the "
            "first dimension. Do not run empty batches."
        )
    return samples


# Which part of what a model returns is the answer: a key or attribute, a place, or a function.
OutputName = str | int | Callable[[Any], Tensor] | None


def output_tensor(value: Any, name: OutputName = None) -> Tensor:
    """Return a model's output as one tensor.

    Without a name it is the value itself, its `logits`, or the only tensor [B, C] in it.

    Raises:
        NetworkError: if that is not one tensor.
    """
    if callable(name):
        return _tensor(name(value), "the function output=")
    if isinstance(value, Tensor):
        return value
    if name is not None:
        return _named_output(value, name)
    if isinstance(value, Mapping):
        logits = value.get("logits")
    else:
        logits = value.logits if hasattr(value, "logits") else None
    return logits if isinstance(logits, Tensor) else _only_output(value)


def _tensor(value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise NetworkError(f"{what} gives a {type(value).__name__}; expected a tensor [B, C].")
    return value


def _named_output(value: Any, name: str | int) -> Tensor:
    try:
        if isinstance(name, int):
            found = list(entries(value))[name][1]
        else:
            found = value[name] if isinstance(value, Mapping) else getattr(value, name)
    except (LookupError, AttributeError):
        there = ", ".join(str(place) for place, _ in _tensors(value)) or "no tensors"
        raise NetworkError(
            f"the model returns a {type(value).__name__} without output={name!r}; expected one of "
            f"what it holds: {there}."
        ) from None
    return _tensor(found, f"output={name!r}")


def _only_output(value: Any) -> Tensor:
    """Return the only tensor [B, C] of a value, or its only tensor."""
    found = _tensors(value)
    tables = [entry for entry in found if entry[1].dim() == 2] or found
    if len(tables) == 1:
        return tables[0][1]
    if not tables:
        return first_tensor(value)
    listed = ", ".join(f"{place} {tuple(tensor.shape)}" for place, tensor in tables)
    several = (
        "Networks that answer several times derive from impatient.Network (see "
        "docs/how-to/own-network.md). "
        if isinstance(value, (list, tuple)) and len({tensor.shape for _, tensor in tables}) == 1
        else ""
    )
    places = [place for place, _ in tables]
    # one entry with several of them is no name: only a function reaches into it
    name = repr(places[-1]) if places.count(places[-1]) == 1 else "FUNCTION OF WHAT IT RETURNS"
    raise NetworkError(
        f"the model returns a {type(value).__name__} of several tensors that may be its answer: "
        f"{listed}; expected one, or `logits`. {several}Say which is the answer, such as "
        f"attach_exits(..., output={name}), or wrap the model in a module that returns it."
    )


def _tensors(value: Any) -> list[tuple[str | int, Tensor]]:
    """Return the different tensors in a value, each with the place of its outermost entry."""
    if isinstance(value, Tensor):
        return [(0, value)]
    found: dict[int, tuple[str | int, Tensor]] = {}
    for name, entry in entries(value):
        for _, tensor in _tensors(entry):
            found.setdefault(id(tensor), (name, tensor))
    return list(found.values())


# Where an input has its padding mask: a key of a mapping, a place in a tuple, or a function.
MaskName = str | int | Callable[[Any], Tensor | None] | None


def mask_of(x: Any, name: MaskName) -> Tensor | None:
    """Return the padding mask of an input, or None if it has none.

    Its shape is [B, T]; it is 0 where there is padding, and not 0 where there are tokens.
    """
    if name is None or isinstance(x, Tensor):
        return None
    if callable(name):
        return name(x)
    if isinstance(x, Mapping):
        return x.get(name)
    within = isinstance(name, int) and isinstance(x, (tuple, list)) and name < len(x)
    return x[name] if within else None


def resized(x: Any, batch_size: int) -> Any:
    """Make a batch of another size by repeating the first sample.

    Raises:
        NetworkError: if there is no sample.
    """
    batch_size_of(x)
    return map_samples(lambda value: value[:1].expand(batch_size, *value.shape[1:]).contiguous(), x)


class evaluating:  # noqa: N801  reads as a phrase: with evaluating(model)
    """Put a model in eval mode, and restore all modules' modes afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = {module: module.training for module in model.modules()}
        self._model = model

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self._modes.items():
            module.training = mode


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished, so that a time can be taken."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
