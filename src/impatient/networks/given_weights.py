"""Load weights that somebody brings: checkpoint files as people save them, and run directories."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from impatient.errors import ModelSpecError, NetworkError, StorageError
from impatient.files import file_errors, is_file, read_tensors
from impatient.provenance import fingerprint_tensors

log = logging.getLogger(__name__)

# Where a checkpoint has the weights, if several of its entries fit.
ENTRIES = ("state_dict", "model_state_dict", "model", "net", "module", "weights")
# What wrappers put into the middle of names.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".th", ".pkl")
# Batch norm has counted its batches since torch 1.0; older files lack the count.
COUNTER = "num_batches_tracked"
CLASSIFIERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SHOWN = 8


def _plain_values() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """List what training scripts save beside weights: options, and numbers of numpy.

    None of it runs anything when it is made anew.
    """
    makers: dict[str, Any] = {
        "scalar": np.float64(0.0).__reduce__()[0],
        "_reconstruct": np.zeros(1).__reduce__()[0],
    }
    # The first is where they were before numpy 2.
    named = [
        (maker, f"numpy.{place}.multiarray.{name}")
        for name, maker in makers.items()
        for place in ("core", "_core")
    ]
    return [
        *(argparse.Namespace, np.ndarray, np.dtype),
        *(type(np.dtype(code)) for code in "?bhilqBHILQefd"),
        *named,
    ]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GivenWeights:
    """What was loaded into a module, and what was not.

    Attributes:
        module: the module itself, which now has the weights.
        source: file or run directory that they came from.
        fingerprint: fingerprint of the weights that were loaded.
        loaded: names in the module's state_dict whose values were loaded.
        replaced: names of the classifier, which has another width than the one given; its values
            are the module's own.
        left: names in the source that belong to other parts, such as the heads of a run.
        notes: what of this a user should know, a sentence each.
    """

    module: nn.Module
    source: str
    fingerprint: str
    loaded: tuple[str, ...]
    replaced: tuple[str, ...]
    left: tuple[str, ...]
    notes: tuple[str, ...]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that were loaded."""
        return self._named(self.loaded)

    def replaced_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the classifier that was replaced, if any."""
        return self._named(self.replaced)

    def _named(self, names: tuple[str, ...]) -> Iterator[nn.Parameter]:
        own = dict(self.module.named_parameters(remove_duplicate=False))
        return (own[name] for name in names if name in own)


def load_weights(
    module: nn.Module, path: str | Path, *, num_classes: int | None = None
) -> GivenWeights:
    """Load weights from a checkpoint file or a run directory into a module.

    Names and shapes are compared one by one, and nothing is loaded unless all of them fit. Only a
    classifier may have another width: then the module keeps its own, and the log says so. Weights
    in another floating-point type are converted.

    Args:
        module: the model, usually without exits; of a network with exits its `backbone`.
        path: a .safetensors file; a .pt, .pth, .ckpt, .bin or .tar file of `torch.save`, read with
            weights_only=True, so that nothing in it can run; or a run directory, of whose trained
            network the part with the module's names is taken. Weights may stand under any entry,
            and their names behind any prefix, if only one of each fits; of several entries one
            with a usual name (`state_dict`, `model`, `net`, ...) is taken.
        num_classes: width of the module's classifier, if it is known.
    Returns:
        What was loaded; pass it to `fit(..., given=...)`.
    Raises:
        StorageError: if the file is missing, damaged, or holds other things than weights.
        NetworkError: if names or shapes do not fit.
        ModelSpecError: if a weight is NaN or infinite.
    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "model.pt"
        >>> torch.save({"state_dict": nn.Linear(4, 10).state_dict()}, file)
        >>> load_weights(nn.Linear(4, 10), file).loaded
        ('weight', 'bias')
    """
    path = Path(path)
    own = {
        name: value
        for name, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }
    chosen_part, prefix, others = _fitting(_read(path), own, path, type(module).__name__)
    given = chosen_part.tensors
    inside = {
        name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)
    }
    left = tuple(name for name in given if not name.startswith(prefix))
    shapes = {
        name: (tuple(inside[name].shape), tuple(value.shape))
        for name, value in own.items()
        if name in inside and inside[name].shape != value.shape
    }
    replaced = replaced_classifier(module, shapes, num_classes)
    _check_names(inside, own, replaced, f"{path} does not fit {type(module).__name__}")
    chosen = {name: value for name, value in inside.items() if name not in replaced}
    for name, value in chosen.items():
        _check_plausible(path, name, value)
    notes = (
        *_notes(chosen_part.place(path), prefix, chosen, own, inside, replaced, left),
        *(f"left away, though it fits as well: the entry {other}" for other in others),
    )
    for note in notes:
        log.info(note)
    module.load_state_dict({**module.state_dict(), **chosen})
    return GivenWeights(
        module=module,
        source=str(path),
        fingerprint=fingerprint_tensors(chosen),
        loaded=tuple(chosen),
        replaced=replaced,
        left=left,
        notes=notes,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """Tensors that stand side by side in a file.

    Attributes:
        tensors: the tensors by name.
        entry: the keys that lead to them; none at the top.
    """

    tensors: Mapping[str, Tensor]
    entry: tuple[str, ...] = ()

    @property
    def called(self) -> str:
        return ".".join(self.entry)

    @property
    def usual(self) -> bool:
        return bool(self.entry) and self.entry[-1] in ENTRIES

    def place(self, path: Path) -> str:
        return f"{path}, entry {self.called}" if self.entry else str(path)


def _read(path: Path) -> Sequence[_Part]:
    """Read named tensors from a file or a run directory."""
    if path.is_dir():
        file = path / "weights.safetensors"
        if not is_file(file):
            raise StorageError(
                f"{path} has no trained weights (no weights.safetensors); expected a run directory "
                "of `impatient train`, or a file. Name the file with the weights itself."
            )
        return [_Part(tensors=read_tensors(file)[0])]
    if not is_file(path):
        raise StorageError(
            f"there is no file {path} (looked in {Path.cwd()}); expected weights in .safetensors "
            "or .pt, or a run directory. Check the path."
        )
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return [_Part(tensors=_unwrapped(_read_safetensors(path)))]
    if suffix in PICKLED:
        return _parts_of(_read_pickled(path), path)
    raise StorageError(
        f"{path} ends in {path.suffix or 'nothing'!r}; expected .safetensors or one of "
        f"{', '.join(PICKLED)}. Give the file with the weights; of several parts make one."
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of any origin.

    Ours are compared with their checksum.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            if "header" not in (file.metadata() or {}):
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except Exception as error:
        # safetensors has an error type of its own, which is not public.
        raise StorageError(
            f"{path} cannot be read as safetensors ({error}); it was damaged or is another file. "
            "Get it again."
        ) from error
    return read_tensors(path)[0]


def _read_pickled(path: Path) -> Any:
    with file_errors(f"read {path}"):
        path.open("rb").close()
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_plain_values()):
            # Of formats that are refused below, and of numbers in fewer bits.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged files make torch and its unpickler raise nearly anything.
        raise StorageError(
            f"{path} cannot be read as tensors and plain values alone ({_reason(error)}); it was "
            "damaged, or something in it would have to run. Get it again; or, where you trust it, "
            "save its weights anew with torch.save(model.state_dict(), FILE) or as .safetensors."
        ) from error


def _reason(error: Exception) -> str:
    """Say in a line why torch refuses a file.

    Its own advice is to trust it.
    """
    _, found, inner = str(error).partition("WeightsUnpickler error:")
    text = (inner if found else str(error)).partition("Please use")[0].strip()
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first}".rstrip(": ")[:200]


def _parts_of(value: Any, path: Path) -> Sequence[_Part]:
    """Find tensors in what a checkpoint holds, which may be nested."""
    if not isinstance(value, Mapping):
        raise StorageError(
            f"{path} holds a {type(value).__name__}; expected named tensors. Save "
            "model.state_dict()."
        )
    parts: list[_Part] = []
    rest: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), value)]
    # An entry may hold itself.
    seen = {id(value)}
    # It grows while it is walked.
    for entry, mapping in rest:
        tensors = {
            name: part
            for name, part in mapping.items()
            if isinstance(name, str) and isinstance(part, Tensor)
        }
        if tensors:
            parts.append(_Part(tensors=_unwrapped(tensors), entry=entry))
        for name, part in mapping.items():
            if isinstance(part, Mapping) and id(part) not in seen:
                seen.add(id(part))
                rest.append(((*entry, str(name)), part))
    if not parts:
        raise StorageError(
            f"{path} has the entries {listed(map(str, value)) or '(none)'}, none of which holds "
            f"weights; expected named tensors, or those under an entry such as "
            f"{', '.join(ENTRIES)}. Save model.state_dict()."
        )
    return parts


def _unwrapped(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Leave wrappers' parts of names away."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        found[name] = value
    return found if len(found) == len(tensors) else tensors


def _fitting(
    parts: Sequence[_Part], own: Mapping[str, Tensor], path: Path, model: str
) -> tuple[_Part, str, tuple[str, ...]]:
    """Find the part, and the prefix there, that has most of a module's names.

    Returns them, and the entries that fit as well.
    """
    counts = {
        (place, prefix): count
        for place, part in enumerate(parts)
        for prefix, count in _prefixes(part.tensors, own).items()
    }
    if not own:
        return parts[0], "", ()
    if not counts:
        there = max((part.tensors for part in parts), key=len)
        raise NetworkError(
            f"{path} does not fit {model}: no name is the same. It has {listed(there)}; expected "
            f"{listed(own)}. Build the model that the weights were made for, or rename them."
        )
    most = max(counts.values())
    best = sorted((key for key, count in counts.items() if count == most), key=lambda key: key[1])
    best = [key for key in best if parts[key[0]].usual] or best
    part, prefix = parts[best[0][0]], best[0][1]
    # A few names that happen to be the same do not say which part is meant.
    if len(best) > 1 and 2 * most > len(own):
        entries = [parts[place].called for place in sorted({place for place, _ in best})]
        if len(entries) > 1:
            key = "".join(f"[{name!r}]" for name in part.entry)
            raise StorageError(
                f"{path} has weights in several entries ({listed(entries)}); expected them in one. "
                f"Save the one you mean: torch.save(checkpoint{key}, FILE)."
            )
        raise NetworkError(
            f"{path} has the weights of several models, under "
            f"{' and '.join(repr(prefix) for _, prefix in best[:SHOWN])}; expected those of one "
            f"{model}. Save the one you mean by itself."
        )
    others = {parts[place].called for (place, _), count in counts.items() if count == most}
    return part, prefix, tuple(sorted(others - {part.called}))


def _prefixes(names: Iterable[str], own: Mapping[str, Tensor]) -> Counter[str]:
    """Count behind which prefix how many of a module's names stand."""
    counts: Counter[str] = Counter()
    for name in names:
        steps = name.split(".")
        for cut in range(len(steps)):
            if ".".join(steps[cut:]) in own:
                counts["".join(f"{step}." for step in steps[:cut])] += 1
    return counts


def _check_plausible(path: Path, name: str, value: Tensor) -> None:
    """Refuse values with which a network answers nothing."""
    if value.is_floating_point() and not value.isfinite().all():
        raise ModelSpecError(
            f"{path} holds NaN or infinite weights in {name!r}; expected finite ones. Take a "
            "checkpoint from before training diverged."
        )
    if name.endswith("running_var") and value.numel() and value.min() < 0:
        raise ModelSpecError(
            f"{path} holds negative variances in {name!r}; expected none. The file was damaged, or "
            "is of another model."
        )


def replaced_classifier(
    module: nn.Module,
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    num_classes: int | None,
) -> tuple[str, ...]:
    """Name the tensors of the classifier, if it is all that has another shape.

    Only linear layers and convolutions count whose number of outputs alone differs. Were it an
    inner layer's, then the layer behind it would have another number of inputs. All of them must go
    from one width to one other, which is the number of classes where that is known.

    Args:
        module: the model.
        shapes: of every tensor with another shape, its shape there and its shape in the model.
        num_classes: width of the model's output, if it is known.
    """
    widths = set()
    for name, (was, now) in shapes.items():
        holder, _, entry = name.rpartition(".")
        fits = (
            isinstance(module.get_submodule(holder), CLASSIFIERS)
            and entry in ("weight", "bias")
            and len(was) == len(now) > 0
            and was[1:] == now[1:]
        )
        if not fits:
            return ()
        widths.add((was[0], now[0]))
    if len(widths) != 1 or num_classes not in (None, *(now for _, now in widths)):
        return ()
    return tuple(shapes)


def given_by(
    module: nn.Module, source: str, fresh: tuple[str, ...], notes: tuple[str, ...]
) -> GivenWeights:
    """Say of a module's present weights that they were given, but for some that start anew."""
    own = module.state_dict()
    loaded = {name: value for name, value in own.items() if name not in fresh}
    return GivenWeights(
        module=module,
        source=source,
        fingerprint=fingerprint_tensors(loaded),
        loaded=tuple(loaded),
        replaced=fresh,
        left=(),
        notes=notes,
    )


def _check_names(
    given: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    replaced: tuple[str, ...],
    what: str,
) -> None:
    """Refuse weights that lack names, have others, or have other shapes or types."""
    # A tied tensor has several names, of which safetensors keeps one.
    there = {id(value) for name, value in own.items() if name in given}
    missing = [
        name
        for name, value in own.items()
        if name not in given and id(value) not in there and not name.endswith(COUNTER)
    ]
    shapes = [
        f"{name} {list(given[name].shape)}, not {list(value.shape)}"
        for name, value in own.items()
        if name in given and name not in replaced and given[name].shape != value.shape
    ]
    types = [
        f"{name} {_kind(given[name])}, not {value.dtype}"
        for name, value in own.items()
        if name in given
        and (
            given[name].is_floating_point() != value.is_floating_point()
            or _kind(given[name]) != str(given[name].dtype)
        )
    ]
    wrong = {
        "missing": missing,
        "unexpected": [name for name in given if name not in own],
        "of another shape": shapes,
        "of another type": types,
    }
    said = [f"{len(names)} {kind}: {listed(names)}" for kind, names in wrong.items() if names]
    if said:
        raise NetworkError(
            f"{what}. {'. '.join(said)}. Expected the names and shapes of this very model, with at "
            "most a classifier of another width. Build the model that the weights were made for "
            "(see its options), or rename the tensors."
        )


def _kind(value: Tensor) -> str:
    """Say the type of a tensor's numbers, and whether they are there one by one."""
    if value.is_meta:
        return f"{value.dtype} without values (meta)"
    return str(value.dtype if value.layout == torch.strided else value.layout)


def _notes(
    place: str,
    prefix: str,
    chosen: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    inside: Mapping[str, Tensor],
    replaced: tuple[str, ...],
    left: tuple[str, ...],
) -> tuple[str, ...]:
    """Say what is loaded, converted, replaced and left away."""
    behind = f", whose names there begin with {prefix!r}" if prefix else ""
    said = [f"weights from {place}: {len(chosen)} tensors{behind}"]
    converted = {
        f"{value.dtype} to {own[name].dtype}".replace("torch.", "")
        for name, value in chosen.items()
        if value.dtype != own[name].dtype
    }
    if converted:
        said.append(f"weights are converted: {', '.join(sorted(converted))}")
    if replaced:
        was, now = inside[replaced[0]].shape[0], own[replaced[0]].shape[0]
        said.append(
            f"the classifier ({listed(replaced)}) is {was} wide there and {now} here: it is not "
            "loaded, and starts anew"
        )
    uncounted = [name for name in own if name.endswith(COUNTER) and name not in inside]
    if uncounted:
        said.append(f"{len(uncounted)} batch norms have no count of batches there; it starts anew")
    if left:
        said.append(f"left away, for they are no part of the model: {listed(left)}")
    return tuple(said)


def listed(names: Iterable[str]) -> str:
    """List the first names, and count the others."""
    every = list(names)
    more = len(every) - SHOWN
    return ", ".join(every[:SHOWN]) + (f" and {more} others" if more > 0 else "")
