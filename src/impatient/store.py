"""Frozen values on disk: one base class saves and loads all of them.

A value becomes JSON. If it contains tensors, the file is a safetensors file with the JSON as its
header. Reading is strict: what was read must be written in the same way again. So an entry that is
unknown, missing or of another type is refused, and the error says where in the file it is.

    costs.save("profile.json")
    CostProfile.load("profile.json")
    Policy.load("policy.safetensors")           # whichever kind of policy the file holds
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from impatient.errors import ImpatientError, StorageError
from impatient.files import file_errors, read_json, read_tensors, write_json, write_tensors
from impatient.schema1 import upgraded

if TYPE_CHECKING:
    import cattrs
    from torch import Tensor

# The version of the files. Those of impatient 0.1.0 have schema 1.
SCHEMA = 2

# The only key of the JSON object that stands for a tensor; its value is the tensor's name.
_TENSOR = "tensor"

Value = TypeVar("Value")


class Stored:
    """Base class of frozen dataclasses that can be saved and loaded.

    Args (of a class that derives from it):
        kind: name of the class in its files; by default made from the class's name.
        made_by: the command that makes such a value, for error messages.
    """

    __slots__ = ()
    kind: ClassVar[str]
    made_by: ClassVar[str] = "the call that made it"

    def __init_subclass__(cls, kind: str = "", made_by: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        # A dataclass with slots is made twice, the second time without these arguments.
        if "kind" not in vars(cls):
            cls.kind = kind or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
        if made_by:
            cls.made_by = made_by

    def save(self, path: str | Path) -> None:
        """Write one file atomically.

        It is JSON, or safetensors with a JSON header if the value has tensors.

        Raises:
            StorageError: if it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        content = _versioned(self, _plain(self, tensors))
        if tensors or Path(path).suffix == ".safetensors":
            write_tensors(path, tensors, content)
        else:
            write_json(path, content)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a value of this class, or of a class derived from it.

        Raises:
            StorageError: if the file is missing, damaged, of another kind or of a newer version.
        """
        tensors, content = read_tensors(path) if _is_safetensors(path) else ({}, read_json(path))
        return from_plain(content, cls, tensors=tensors, where=str(path))


# --- writing --------------------------------------------------------------------------------------


def to_plain(value: Any) -> dict[str, Any]:
    """Convert a value without tensors to JSON, to put it into another file.

    Example:
        >>> from impatient import budgets
        >>> to_plain(budgets.uniform(0.0, 0.5))["shape"]
        'uniform'
    """
    tensors: dict[str, Tensor] = {}
    plain = _plain(value, tensors)
    if tensors:
        raise StorageError(f"{', '.join(tensors)} are tensors; save the value in its own file.")
    return _versioned(value, plain)


def holds_tensors(value: Stored) -> bool:
    """Whether there is a tensor anywhere in a value."""
    tensors: dict[str, Tensor] = {}
    _plain(value, tensors)
    return bool(tensors)


def _versioned(value: Any, plain: dict[str, Any]) -> dict[str, Any]:
    own = isinstance(value, Stored)
    return {"kind": value.kind, "schema": SCHEMA} | plain if own else plain


def _plain(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """Convert a value to JSON, and collect its tensors by their path."""
    from torch import Tensor

    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if dataclasses.is_dataclass(value):
        own: dict[str, Any] = {"kind": value.kind} if isinstance(value, Stored) else {}
        parts = [part for part in dataclasses.fields(value) if part.metadata.get("stored", True)]
        value = own | {part.name: getattr(value, part.name) for part in parts}
    elif isinstance(value, Stored):
        raise StorageError(
            f"a {type(value).__name__} cannot be saved; expected a frozen dataclass."
        )

    def part(key: Any, entry: Any) -> Any:
        return _plain(entry, tensors, f"{name}/{key}" if name else str(key))

    if isinstance(value, Mapping):
        return {str(key): part(key, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [part(place, entry) for place, entry in enumerate(value)]
    return value


# --- reading --------------------------------------------------------------------------------------


def from_plain(
    content: Mapping[str, Any],
    kind: type[Value],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    where: str = "this value",
) -> Value:
    """Make a value from the content of a file or of `to_plain`.

    Args:
        content: the JSON.
        kind: the expected class.
        tensors: tensors of the value, by name.
        where: name of the content in errors.
    Raises:
        StorageError: if the content is damaged, or of another kind or version.
    """
    from cattrs import BaseValidationError, transform_error

    stored = kind if issubclass(kind, Stored) else None
    remedy = f"To make it again, use {(stored or Stored).made_by}."
    tree: Any = dict(content)
    # Files of version 0.1.0 do not say their schema here.
    schema = tree.pop("schema", 1 if stored else SCHEMA)
    if schema not in (1, SCHEMA):
        raise StorageError(
            f"{where} has schema version {schema!r}; this version of impatient reads 1 and "
            f"{SCHEMA}. Install the version that wrote it. {remedy}"
        )
    unread = dict(tensors or {})
    try:
        if schema == 1:
            tree, unread = upgraded(tree, unread)
        tree = _filled(tree, unread)
        value = _converter().structure(tree, kind)
    except (BaseValidationError, LookupError, StorageError, TypeError, ValueError) as error:
        cause: BaseException | None = error
        problems = transform_error(error, format_exception=_in_words)
    else:
        cause = None
        written: dict[str, Tensor] = {}
        differing = _differences(_plain(tree, {}), _plain(value, written), complete=schema != 1)
        unknown = [f"the tensor {name!r} is unknown" for name in unread.keys() - written.keys()]
        problems = [*differing, *unknown]
    if problems:
        name = stored.kind.replace("_", " ") if stored else kind.__name__
        raise StorageError(
            f"{where} is no {name} that can be read: {'; '.join(problems[:3])}. It was damaged, or "
            f"is another file. {remedy}"
        ) from cause
    return value


def _is_safetensors(path: str | Path) -> bool:
    """Whether a file begins with the length of a safetensors header."""
    with file_errors(f"read {path}"), Path(path).open("rb") as file:
        # The length has zeros, and JSON has none.
        return b"\0" in file.read(8)


def _filled(entry: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put tensors into their places in the JSON."""
    if isinstance(entry, dict):
        if entry.keys() == {_TENSOR}:
            return tensors.get(entry[_TENSOR], entry)
        return {key: _filled(part, tensors) for key, part in entry.items()}
    return [_filled(part, tensors) for part in entry] if isinstance(entry, list) else entry


def _in_words(error: BaseException, kind: type | None) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing"
    text = str(error).rstrip(".")
    if kind is None or isinstance(error, ImpatientError):
        return text
    return f"expected {inspect.formatannotation(kind)}: {text}"


def _differences(found: Any, written: Any, *, complete: bool, path: str = "$") -> Iterator[str]:
    """Compare what a file contains with what its value is written as.

    Args:
        found: the JSON of the file.
        written: the JSON of the value that was made from it.
        complete: whether entries with a default must be there, too.
        path: place in the file.
    """
    if isinstance(found, dict) and isinstance(written, dict):
        yield from (f"{name!r} is unknown @ {path}" for name in found.keys() - written.keys())
        for name, entry in written.items():
            if name in found:
                below = f"{path}.{name}"
                yield from _differences(found[name], entry, complete=complete, path=below)
            elif complete:
                yield f"{name!r} is missing @ {path}"
    elif isinstance(found, list) and isinstance(written, list):
        for place, pair in enumerate(zip(found, written, strict=False)):
            yield from _differences(*pair, complete=complete, path=f"{path}[{place}]")
    elif type(found) is not type(written) and (type(found), type(written)) != (int, float):
        yield f"expected {type(written).__name__}, got {reprlib.repr(found)} @ {path}"


def kinds_of(kind: type[Stored]) -> dict[str, type[Stored]]:
    """Map names in files to the classes derived from one, itself included."""
    found: dict[str, type[Stored]] = {}
    is_value: bool = dataclasses.is_dataclass(kind)
    if is_value and not inspect.isabstract(kind):
        found[kind.kind] = kind
    for derived in kind.__subclasses__():
        # Of two classes with one name the later counts: a dataclass with slots is made twice.
        found |= kinds_of(derived)
    return found


@functools.cache
def _converter() -> cattrs.Converter:
    import cattrs
    from cattrs.gen import make_dict_structure_fn
    from jaxtyping import AbstractArray
    from torch import Tensor

    converter = cattrs.Converter()

    def tensor(value: Any, kind: Any) -> Any:
        if not isinstance(value, kind):
            is_tensor = isinstance(value, Tensor)
            got = (
                f"{value.dtype} of shape {tuple(value.shape)}" if is_tensor else reprlib.repr(value)
            )
            raise StorageError(f"expected {kind.__name__}, got {got}.")
        return value

    @functools.cache
    def entries(kind: Any) -> Callable[[Any, Any], Any]:
        return make_dict_structure_fn(kind, converter)

    def of_its_kind(value: Any, base: Any) -> Any:
        kinds = kinds_of(base)
        name = value.get("kind", base.kind)
        if name not in kinds:
            raise StorageError(f"it is a {name!r}; expected {' or '.join(kinds)}.")
        kind: Any = kinds[name]
        return entries(kind)(value, kind)

    for base, structured in {Stored: of_its_kind, Tensor: tensor, AbstractArray: tensor}.items():
        converter.register_structure_hook_func(_is_a(base), structured)
    return converter


def _is_a(base: type) -> Callable[[Any], bool]:
    return lambda kind: inspect.isclass(kind) and issubclass(kind, base)
