"""Build models by name, such as "torchvision:resnet50".

A name begins with the source: "torchvision:...", "timm:...", "transformers:...",
"impatient:resnet", "zoo:NAME" for a trained network that comes with the library, or
"package.module:factory". This library's models are `PreActResNet` ("resnet"),
`preact_resnet_imagenet` ("resnet_imagenet"), `SmallVGG` ("vgg"), `BaseResNet` ("base_resnet") and
`AnytimeNet` ("anytimenet"), which already has exits. Options follow a second colon, such as
"torchvision:resnet50:weights=DEFAULT" or "impatient:resnet:n=5,c=16". A value may be a list:
"impatient:resnet:n=[3,4,6,3],block=bottleneck". Pretrained weights are loaded by the loaders of
those libraries; a classifier of another width is replaced, and that is said.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from impatient.errors import ImpatientError, ModelSpecError
from impatient.networks.anytimenet import AnytimeNet, BaseResNet
from impatient.networks.pretrained import (
    Loaded,
    from_timm,
    from_torchvision,
    from_transformers,
    timm_name,
)
from impatient.networks.resnet import PreActResNet, preact_resnet_imagenet
from impatient.networks.transforms import (
    Transform,
    of_timm,
    of_torchvision,
    of_transformers,
)
from impatient.networks.vgg import SmallVGG

log = logging.getLogger(__name__)

OWN: dict[str, Callable[..., nn.Module]] = {
    "resnet": PreActResNet,
    "resnet_imagenet": preact_resnet_imagenet,
    "vgg": SmallVGG,
    "base_resnet": BaseResNet,
    "anytimenet": AnytimeNet,
}


def load_model(
    spec: str, *, num_classes: int | None = None, in_channels: int | None = None
) -> nn.Module:
    """Build the model that a spec string names.

    Args:
        spec: "SOURCE:NAME" or "SOURCE:NAME:key=value,key=value". SOURCE is torchvision, timm,
            transformers, impatient, zoo, or a Python module whose attribute NAME is a factory that
            returns an `nn.Module`.
        num_classes: number of classes, passed on if the source has the option and the spec does not
            set it. A trained classifier of another width is replaced, and the log says so.
        in_channels: channels of the image, passed on if the source has the option and the spec does
            not set it.
    Raises:
        ModelSpecError: if the spec cannot be read, the library is missing or the factory fails.
    Example:
        >>> load_model("impatient:resnet:n=1,c=8", num_classes=10).classifier.out_features
        10
    """
    loaded = load_with_weights(spec, num_classes=num_classes, in_channels=in_channels)
    for note in loaded.notes:
        log.info(note)
    return loaded.model


def load_with_weights(
    spec: str, *, num_classes: int | None = None, in_channels: int | None = None
) -> Loaded:
    """Build the model that a spec names, and say what of it has trained weights.

    Args, errors: as for `load_model`.
    """
    source, name, options = _parse(spec)
    known = {"num_classes": num_classes, "in_channels": in_channels}
    build = _SOURCES.get(source) or functools.partial(_from_module, source)
    try:
        built = build(name, options, known)
    except ModelSpecError:
        raise
    except ImportError as error:
        raise ModelSpecError(
            f"{spec!r} needs a package that cannot be imported: {error}. {_remedy(source)}"
        ) from error
    except Exception as error:
        raise ModelSpecError(
            f"cannot build the model {spec!r}: {type(error).__name__}: {error}"
        ) from error
    loaded = built if isinstance(built, Loaded) else Loaded(model=built)
    if not isinstance(loaded.model, nn.Module):
        raise ModelSpecError(
            f"{spec!r} returned a {type(loaded.model).__name__}; expected a torch.nn.Module."
        )
    return loaded


# Options of the known sources by which they would run code or unpickle files.
_RUNNING_CODE = ("trust_remote_code", "code_revision", "checkpoint_path", "pretrained_cfg")


def check_trusted(spec: str, trust: Sequence[str]) -> None:
    """Refuse to build a model whose spec was written by somebody else, unless it is trusted.

    Nothing is imported.

    Args:
        spec: the spec, as read from a file.
        trust: modules, MODULE:NAME, or whole specs, that the user trusts.
    Raises:
        ModelSpecError: if its source is no known one and not trusted, or an option of it would run
            code.
    """
    source, name, options = _parse(spec)
    if {source, f"{source}:{name}", spec} & set(trust):
        return
    running = [option for option in options if option.startswith(_RUNNING_CODE)]
    if source not in _SOURCES or running:
        what = f"the option {running[0]}" if source in _SOURCES else f"{source}:{name}"
        raise ModelSpecError(
            f"the model {spec!r} was named by a file, not by you, and to build it would call "
            f"{what}, which could do anything. If you wrote the file, or trust whoever did, say "
            f"--trust {source}:{name} (in Python: RunDirectory(path, trust=[...]))."
        )


def has_trained_weights(spec: str) -> bool | None:
    """Tell whether a spec names a model with trained weights.

    Returns:
        None where that is not known: a factory may load some.
    Example:
        >>> has_trained_weights("torchvision:resnet50:weights=DEFAULT")
        True
        >>> has_trained_weights("impatient:resnet")
        False
    """
    source, name, options = _parse(spec)
    if source not in _SOURCES:
        return None
    if source == "transformers":
        return not name.endswith(("Config", ".json"))
    if source == "zoo":
        return True
    option = {"torchvision": "weights", "timm": "pretrained"}.get(source)
    return bool(option and options.get(option))


def transform_of(spec: str) -> Transform | None:
    """Say what the trained weights that a spec names expect to be done to pictures.

    Returns:
        None if it names none, or that is not known.
    Raises:
        ModelSpecError: if the library of the model cannot tell.
    """
    source, name, options = _parse(spec)
    if not has_trained_weights(spec):
        return None
    try:
        if source == "torchvision":
            return of_torchvision(import_torchvision().models, name, options["weights"])
        if source == "timm":
            import_torchvision()
            return of_timm(importlib.import_module("timm"), timm_name(name))
        with contextlib.suppress(ImportError):
            import_torchvision()
        return of_transformers(importlib.import_module("transformers"), name)
    except ImpatientError:
        raise
    except Exception as error:
        # Whatever is wrong with the spec is wrong when the model is built, too.
        raise ModelSpecError(
            f"cannot tell what {spec!r} expects to be done to pictures: "
            f"{type(error).__name__}: {error}"
        ) from error


def _parse(spec: str) -> tuple[str, str, dict[str, Any]]:
    source, colon, rest = spec.partition(":")
    name, _, options = rest.partition(":")
    if not (source and colon and name):
        raise ModelSpecError(
            f"cannot read the model spec {spec!r}; expected SOURCE:NAME, such as impatient:resnet, "
            "torchvision:resnet50, timm:vit_tiny_patch16_224, transformers:org/name or "
            "mypackage.mymodule:factory."
        )
    parsed: dict[str, Any] = {}
    for entry in filter(None, _outer_commas(options)):
        key, equals, value = entry.partition("=")
        if not equals or not key.isidentifier():
            raise ModelSpecError(
                f"cannot read the option {entry!r} of {spec!r}; expected key=value, such as n=5."
            )
        parsed[key] = _literal(value)
    return source, name, parsed


def _outer_commas(text: str) -> list[str]:
    """Split a text at its commas, except inside a list or a tuple."""
    entries = [""]
    depth = 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            entries.append("")
        else:
            entries[-1] += letter
    return entries


def _literal(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _remedy(source: str) -> str:
    known = ("torchvision", "timm", "transformers")
    return (
        f"Install it with: pip install {source}."
        if source in known
        else "Is it installed, or in this folder?"
    )


def _accepted(
    factory: Callable[..., Any], options: dict[str, Any], known: dict[str, Any]
) -> dict[str, Any]:
    """Add the known values that the factory takes by name to the options."""
    parameters = inspect.signature(factory).parameters
    given = {key: value for key, value in known.items() if value is not None and key in parameters}
    return {**given, **options}


def _own(name: str, options: dict[str, Any], known: dict[str, Any]) -> Any:
    if name not in OWN:
        raise ModelSpecError(
            f"no network {name!r} in impatient; expected one of {', '.join(sorted(OWN))}."
        )
    return OWN[name](**_accepted(OWN[name], options, known))


def _zoo(name: str, options: dict[str, Any], known: dict[str, Any]) -> Any:
    from impatient.networks.zoo import load_zoo

    if options:
        raise ModelSpecError(
            f"zoo:{name} is trained as it is; expected no options, not {', '.join(options)}."
        )
    network = load_zoo(name)
    wanted = known["num_classes"] or network.num_classes
    if wanted != network.num_classes:
        raise ModelSpecError(
            f"zoo:{name} tells {network.num_classes} classes apart, not {wanted}; expected data of "
            "the same classes. For others, begin a network of your own with --init."
        )
    return network


def _torchvision(name: str, options: dict[str, Any], known: dict[str, Any]) -> Any:
    models = import_torchvision().models
    if name not in models.list_models():
        raise ModelSpecError(
            f"torchvision has no model {name!r}. {_near(name, models.list_models())}"
        )
    if options.get("weights"):
        return from_torchvision(models, name, options, known["num_classes"])
    if known["num_classes"]:
        options.setdefault("num_classes", known["num_classes"])
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, "aux_logits": False, **options}
    return models.get_model(name, **options)


def _timm(name: str, options: dict[str, Any], known: dict[str, Any]) -> Any:
    # timm imports torchvision, and would fail where it needs the repair.
    import_torchvision()
    import timm

    full = timm_name(name)
    if full == name and not timm.is_model(name.split(".")[0]):
        raise ModelSpecError(f"timm has no model {name!r}. {_near(name, timm.list_models())}")
    # timm leaves out options that are None.
    usual = {"num_classes": known["num_classes"], "in_chans": known["in_channels"]}
    model = timm.create_model(full, **{**usual, **options})
    return from_timm(model, name, pretrained=bool(options.get("pretrained")))


def _transformers(name: str, options: dict[str, Any], known: dict[str, Any]) -> Any:
    """Build a classifier of transformers.

    The name is that of a pretrained model ("transformers:org/name"). Or the weights are random, and
    it is that of a configuration class ("transformers:BertConfig") or of a local configuration file
    ("transformers:path/config.json").
    """
    with contextlib.suppress(ImportError):
        # transformers imports torchvision if it is installed, and would fail where it needs the
        # repair.
        import_torchvision()
    import transformers

    text = bool(options.pop("text", False))
    if known["num_classes"]:
        options.setdefault("num_labels", known["num_classes"])
    if name.endswith("Config") and hasattr(transformers, name):
        config = getattr(transformers, name)(**options)
    elif name.endswith(".json"):
        # transformers would look for a missing file on the internet.
        if not Path(name).is_file():
            raise ModelSpecError(f"there is no configuration file {name} (looked in {Path.cwd()}).")
        config = transformers.AutoConfig.from_pretrained(name, **options)
    else:
        config = transformers.AutoConfig.from_pretrained(name, **options)
        return from_transformers(_auto_class(transformers, config, text), name, config)
    # transformers fails on None where a configuration belongs to several classes.
    config.architectures = config.architectures or []
    return _auto_class(transformers, config, text).from_config(config)


def _auto_class(transformers: Any, config: Any, text: bool) -> Any:
    """Return the first kind of classifier (image, text, audio, video) that exists."""
    texts = transformers.AutoModelForSequenceClassification
    images = transformers.AutoModelForImageClassification
    others = (
        transformers.AutoModelForAudioClassification,
        transformers.AutoModelForVideoClassification,
    )
    kinds = (texts,) if text else (images, texts, *others)
    return next((kind for kind in kinds if type(config) in kind._model_mapping), texts)


def _from_module(source: str, name: str, options: dict[str, Any], known: dict[str, Any]) -> Any:
    here = str(Path.cwd())
    # A user's module is usually in the working directory.
    if here not in sys.path:
        sys.path.insert(0, here)
    module = importlib.import_module(source)
    factory = getattr(module, name, None)
    if not callable(factory):
        public = [
            entry
            for entry in dir(module)
            if not entry.startswith("_") and callable(getattr(module, entry))
        ]
        raise ModelSpecError(
            f"{source} has no factory {name!r}; expected one of its callables: "
            f"{', '.join(public[:12]) or '(none)'}."
        )
    return factory(**_accepted(factory, options, known))


def _near(name: str, names: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, names, n=5)
    return f"Similar names: {', '.join(near)}." if near else f"It has {len(names)} others."


_SOURCES: dict[str, Callable[..., Any]] = {
    "impatient": _own,
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
    "zoo": _zoo,
}


def import_torchvision() -> Any:
    """Import torchvision, if needed without its compiled operators.

    PyPI's torchvision is built for torch with CUDA. With a CPU-only torch its import fails, because
    torchvision::nms is not registered. Declaring the two operators that the import needs makes
    every classification model work.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    import torch

    log.info(
        "torchvision was built for another torch; using it without its compiled operators (no "
        "detection models)"
    )
    for operator in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{operator}",
            "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        )
    for module in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
        # Remove modules that the failed import has left.
        del sys.modules[module]
    return importlib.import_module("torchvision")
