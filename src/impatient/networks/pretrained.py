"""Models with the trained weights of their libraries, and classifiers of another width."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from impatient.errors import ModelSpecError
from impatient.networks.given_weights import (
    GivenWeights,
    given_by,
    listed,
    replaced_classifier,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loaded:
    """A model, and what of it was trained before.

    Attributes:
        model: the model itself.
        trained: whether a library gave it trained weights.
        fresh: names of tensors that start anew all the same, such as those of a classifier of
            another width.
        notes: what of this a user should know, a sentence each.
    """

    model: nn.Module
    trained: bool = False
    fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def given(self, source: str) -> GivenWeights | None:
        """Say what was loaded as if somebody had given it, or None if nothing was.

        Args:
            source: what the weights came from, such as a spec.
        """
        return given_by(self.model, source, self.fresh, self.notes) if self.trained else None


# --- torchvision ----------------------------------------------------------------------------------


def from_torchvision(
    models: Any, name: str, options: dict[str, Any], num_classes: int | None
) -> Loaded:
    """Build a model of torchvision with trained weights, and a classifier of the right width.

    Args:
        models: the module torchvision.models.
        name: name of the model.
        options: its options, with weights, and perhaps num_classes, which goes before the argument.
        num_classes: width of the output; None leaves that of the weights.
    """
    weights = options["weights"]
    wanted = options.pop("num_classes", None) or num_classes
    chosen = weights
    if isinstance(weights, str):
        full = "." in weights
        chosen = models.get_weight(weights) if full else models.get_model_weights(name)[weights]
    model = models.get_model(name, **{**options, "weights": chosen})
    if name == "inception_v3" and "aux_logits" not in options:
        # Otherwise its output in training mode is a pair. It cannot be told before loading.
        model.aux_logits = False
        model.AuxLogits = None
    width = len(chosen.meta["categories"])
    source = f"weights {chosen.name} of torchvision's {name}"
    if wanted in (None, width):
        return Loaded(model=model, trained=True, notes=(_kept(source, width),))
    fresh = _replace_classifier(model, width, wanted, source)
    return Loaded(
        model=model, trained=True, fresh=fresh, notes=(_replaced(source, fresh, width, wanted),)
    )


def _replace_classifier(model: nn.Module, was: int, now: int, source: str) -> tuple[str, ...]:
    """Put new layers in place of those with as many outputs as there were classes."""
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and _width(layer) == was
    }
    if not found:
        raise ModelSpecError(
            f"{source} are for {was} classes, not {now}, and no layer of {type(model).__name__} "
            f"has {was} outputs; expected a classifier to replace. Build the model yourself, and "
            "name it as package.module:factory."
        )
    for name, layer in found.items():
        holder, _, entry = name.rpartition(".")
        setattr(model.get_submodule(holder), entry, _like(layer, now))
    return tuple(
        f"{name}.{entry}" for name in found for entry in model.get_submodule(name).state_dict()
    )


def _width(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _like(layer: nn.Linear | nn.Conv2d, width: int) -> nn.Module:
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, width, bias)
    return nn.Conv2d(
        layer.in_channels,
        width,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        bias=bias,
    )


# --- timm -----------------------------------------------------------------------------------------


def timm_name(name: str) -> str:
    """Return a name as timm knows it: folders and names on the Hub have a prefix."""
    if (Path(name) / "config.json").is_file():
        return f"local-dir:{name}"
    return f"hf-hub:{name}" if "/" in name else name


def from_timm(model: Any, name: str, *, pretrained: bool) -> Loaded:
    """Say what timm did with a model's weights.

    It replaces classifiers by itself, silently.
    """
    if not pretrained:
        return Loaded(model=model)
    about = model.pretrained_cfg
    source = f"trained weights of timm's {name}"
    notes = []
    channels = _first_channels(model, about)
    if channels not in (None, about["input_size"][0]):
        notes.append(
            f"the first layer has {channels} input channels here and {about['input_size'][0]} "
            "there: timm adapts its weights"
        )
    was, now = about["num_classes"], model.num_classes
    if was == now:
        return Loaded(model=model, trained=True, notes=(*notes, _kept(source, now)))
    classifiers = about["classifier"] or ()
    prefixes = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    fresh = tuple(
        key
        for key in model.state_dict()
        if any(key.startswith(f"{prefix}.") for prefix in prefixes)
    )
    notes.append(_replaced(source, fresh, was, now))
    return Loaded(model=model, trained=True, fresh=fresh, notes=tuple(notes))


def _first_channels(model: Any, about: dict[str, Any]) -> int | None:
    """Count the input channels of the layer that timm says is the first."""
    first = about.get("first_conv")
    if not isinstance(first, str):
        return None
    layer = model.get_submodule(first)
    return layer.in_channels if isinstance(layer, nn.Conv2d) else None


# --- transformers ---------------------------------------------------------------------------------


def from_transformers(kind: Any, name: str, config: Any) -> Loaded:
    """Load a classifier of transformers, whose last layers may have another width or be missing.

    Args:
        kind: class that loads it.
        name: name on the Hub or a folder.
        config: its configuration, with the number of classes that is wanted.
    """
    with _quiet("transformers.modeling_utils"):
        # It would report missing and replaced tensors by itself, as a table.
        model, found = kind.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
    source = f"trained weights of {name}"
    shapes = {key: (tuple(was), tuple(now)) for key, was, now in sorted(found["mismatched_keys"])}
    replaced = replaced_classifier(model, shapes, config.num_labels)
    if len(replaced) != len(shapes):
        wrong = listed(f"{key} {list(was)}, not {list(now)}" for key, (was, now) in shapes.items())
        raise ModelSpecError(
            f"{source} have other shapes than the model: {wrong}. Expected the same shapes, with "
            "at most a classifier of another width. Leave the options that change them away."
        )
    own = model.state_dict()
    missing = tuple(key for key in own if key in found["missing_keys"])
    if 2 * len(missing) > len(own):
        raise ModelSpecError(
            f"{source} lack {len(missing)} of the {len(own)} tensors of {type(model).__name__}: "
            f"{listed(missing)}. Expected weights of this architecture; see its config.json."
        )
    notes = []
    if replaced:
        was, now = shapes[replaced[0]]
        notes.append(_replaced(source, replaced, was[0], now[0]))
    if missing:
        notes.append(f"{source} lack {listed(missing)}, which start anew")
    if not notes:
        notes.append(_kept(source, config.num_labels))
    return Loaded(model=model, trained=True, fresh=(*replaced, *missing), notes=tuple(notes))


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Let a logger say errors alone."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


# --- what is said ---------------------------------------------------------------------------------


def _kept(source: str, width: int) -> str:
    return (
        f"{source}: the classifier came with them, {width} wide; the data's classes must be in "
        "its order"
    )


def _replaced(source: str, names: tuple[str, ...], was: int, now: int) -> str:
    if not names:
        return f"{source}: the classifier, {was} wide, is left away"
    there = f"is {was} wide there and {now} here" if was else "is not there"
    return f"{source}: the classifier ({listed(names)}) {there}: it starts anew"
