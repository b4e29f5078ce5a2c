"""Frozen values on disk: one pair of functions saves and loads all of them.

A value becomes JSON; tensors in it go beside the JSON, into one safetensors file whose header is
the JSON. Reading is strict: an entry that is unknown, missing or of another type is refused, and
the error says where in the file it is.

    costs.save("profile.json")                  # or save(costs, "profile.json")
    CostProfile.load("profile.json")            # or load("profile.json", CostProfile)
    Policy.load("policy.safetensors")           # whichever kind of policy the file holds
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from impatient.errors import StorageError
from impatient.files import read_json, read_tensors, write_json, write_tensors
from impatient.schema1 import upgraded

if TYPE_CHECKING:
    import cattrs
    from torch import Tensor

# of the files; those of version 0.1.0 are of schema 1
SCHEMA = 2

Value = TypeVar("Value")


class Stored:
    """A value with files of its own: derive from this, and it can be saved and loaded.

    Args (of a class that derives from it):
        kind: what its files say that they hold; by default the class's name.
        made_by: the command that makes one, for errors.
    """

    __slots__ = ()
    kind: ClassVar[str]
    made_by: ClassVar[str] = "the call that made it"

    def __init_subclass__(cls, kind: str = "", made_by: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        # a dataclass with slots is made twice, the second time without these arguments
        if "kind" not in vars(cls):
            cls.kind = kind or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
        if made_by:
            cls.made_by = made_by

    def save(self, path: str | Path) -> None:
        """Write as one file: JSON, or safetensors with a JSON header if it holds tensors.

        Raises:
            StorageError: if it cannot be written.
        """
        save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote, of this kind or one derived from it.

        Raises:
            StorageError: if the file is missing, damaged or of another kind.
        """
        return load(path, cls)


# --- writing --------------------------------------------------------------------------------------


def save(value: Stored, path: str | Path) -> None:
    """Write a value as one file, whole or not at all.

    Raises:
        StorageError: if it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    content = _versioned(value, _plain(value, "", tensors))
    if tensors or Path(path).suffix == ".safetensors":
        write_tensors(path, tensors, content)
    else:
        write_json(path, content)


def to_plain(value: Any) -> dict[str, Any]:
    """A value without tensors as JSON takes it, to be put into another file.

    Example:
        >>> from impatient import budgets
        >>> to_plain(budgets.uniform(0.0, 0.5))["shape"]
        'uniform'
    """
    tensors: dict[str, Tensor] = {}
    plain = _plain(value, "", tensors)
    if tensors:
        raise StorageError(
            f"{', '.join(tensors)} are tensors; save the value in a file of its own."
        )
    return _versioned(value, plain)


def holds_tensors(value: Stored) -> bool:
    """Whether there is a tensor anywhere in a value."""
    tensors: dict[str, Tensor] = {}
    _plain(value, "", tensors)
    return bool(tensors)


def _versioned(value: Any, plain: dict[str, Any]) -> dict[str, Any]:
    own = isinstance(value, Stored)
    return {"kind": value.kind, "schema": SCHEMA} | plain if own else plain


def _plain(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON takes it; its tensors go into `tensors`, by their path."""
    from torch import Tensor

    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, Stored) and not _is_dataclass(value):
        raise StorageError(
            f"a {type(value).__name__} cannot be saved; expected a frozen dataclass."
        )
    if _is_dataclass(value):
        entries = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        kind = {"kind": value.kind} if isinstance(value, Stored) else {}
        return _plain(kind | entries, name, tensors)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, _in(name, key), tensors) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, _in(name, place), tensors) for place, entry in enumerate(value)]
    return value


# what stands in the JSON where a tensor was
_TENSOR = "tensor"


def _in(name: str, key: Any) -> str:
    return f"{name}/{key}" if name else str(key)


# --- reading --------------------------------------------------------------------------------------


def load(path: str | Path, kind: type[Value]) -> Value:
    """Read a value of a kind, or of one derived from it, as the file says.

    Raises:
        StorageError: if the file is missing, damaged, of another kind or of a newer version.
    """
    tensors, content = read_tensors(path) if _is_safetensors(path) else ({}, read_json(path))
    return from_plain(content, kind, tensors=tensors, where=str(path))


def from_plain(
    content: Mapping[str, Any],
    kind: type[Value],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    where: str = "this value",
) -> Value:
    """What `to_plain` gave, or what was in a file.

    Args:
        content: the JSON.
        kind: what it is expected to be.
        tensors: those that belong to it, by name.
        where: what errors call it.
    Raises:
        StorageError: if it is of another kind or version, or damaged.
    """
    made_by = kind.made_by if issubclass(kind, Stored) else Stored.made_by
    remedy = f"To make it anew, use {made_by}."
    tree: Any = dict(content)
    schema = tree.pop("schema", 1 if issubclass(kind, Stored) else SCHEMA)
    if schema not in (1, SCHEMA):
        raise StorageError(
            f"{where} has schema version {schema!r}; this version of impatient reads 1 and "
            f"{SCHEMA}. Install the version that wrote it. {remedy}"
        )
    from cattrs import BaseValidationError, transform_error

    try:
        if schema == 1:
            tree, tensors = _upgraded(tree, dict(tensors or {}))
        tree = _filled(tree, dict(tensors or {}))
        return _converter(schema == SCHEMA).structure(tree, kind)
    except (BaseValidationError, Unfit) as error:
        found = "; ".join(transform_error(error, format_exception=_in_words)[:3])
        raise StorageError(
            f"{where} is no {_name(kind)} that can be read: {found}. It was damaged, or is another "
            f"file. {remedy}"
        ) from error


def _upgraded(tree: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    try:
        return upgraded(tree, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise Unfit(f"lacks what version 0.1.0 wrote ({error!r})") from error


class Unfit(ValueError):
    """An entry is not what it should be; the message is about the entry alone."""


def _name(kind: type) -> str:
    return kind.kind.replace("_", " ") if issubclass(kind, Stored) else kind.__name__


def _is_safetensors(path: str | Path) -> bool:
    """Whether a file begins with the length of a safetensors header, which no JSON does."""
    try:
        with Path(path).open("rb") as file:
            return b"\0" in file.read(8)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}.") from error


def _filled(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The JSON with its tensors in their places."""
    unused = set(tensors)

    def filled(entry: Any) -> Any:
        if isinstance(entry, dict) and entry.keys() == {_TENSOR}:
            unused.discard(entry[_TENSOR])
            return tensors.get(entry[_TENSOR], entry)
        if isinstance(entry, dict):
            return {key: filled(part) for key, part in entry.items()}
        return [filled(part) for part in entry] if isinstance(entry, list) else entry

    whole = filled(tree)
    if unused:
        raise Unfit(f"unknown tensors {', '.join(sorted(unused))}")
    return whole


def _in_words(error: BaseException, kind: type | None) -> str:
    from cattrs import ForbiddenExtraKeysError

    if isinstance(error, KeyError):
        return f"lacks {error}"
    if isinstance(error, ForbiddenExtraKeysError):
        return f"unknown entries {', '.join(sorted(error.extra_fields))}"
    if isinstance(error, Unfit) or kind is None:
        return str(error).rstrip(".")
    return f"expected {kind}, {error}"


# --- what an entry must be ------------------------------------------------------------------------


def kinds_of(kind: type[Stored]) -> dict[str, type[Stored]]:
    """All kinds of value derived from one, itself among them, by the names in their files."""
    own = _is_dataclass(kind) and not inspect.isabstract(kind)
    found: dict[str, type[Stored]] = {kind.kind: kind} if own else {}
    for derived in kind.__subclasses__():
        # the later of two that have one name: a dataclass with slots is made twice
        found |= kinds_of(derived)
    return found


@functools.cache
def _converter(strict: bool) -> cattrs.Converter:
    """What makes values of JSON; if it is not strict, entries with a default may be missing."""
    import cattrs
    from cattrs.gen import make_dict_structure_fn
    from jaxtyping import AbstractArray
    from torch import Tensor

    made = cattrs.Converter(forbid_extra_keys=True)

    def exactly(*kinds: type) -> Callable[[Any, Any], Any]:
        def structured(value: Any, kind: Any) -> Any:
            if type(value) not in kinds:
                raise Unfit(f"expected {kind.__name__}, got {_shown(value)}")
            return kind(value)

        return structured

    for kind, kinds in {int: (int,), float: (float, int), str: (str,), bool: (bool,)}.items():
        made.register_structure_hook(kind, exactly(*kinds))

    def one_of(value: Any, kind: Any) -> Any:
        known = typing.get_args(kind)
        if value not in known:
            raise Unfit(f"expected one of {', '.join(map(repr, known))}, got {_shown(value)}")
        return value

    def many(value: Any, kind: Any) -> tuple[Any, ...]:
        kinds = typing.get_args(kind)
        _expect(value, list, "a list")
        kinds = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
        if len(value) != len(kinds):
            raise Unfit(f"expected {len(kinds)} entries, got {len(value)}")
        places = zip(range(len(value)), value, kinds, strict=True)
        return tuple(_each(made, places, kind))

    def mapped(value: Any, kind: Any) -> dict[Any, Any]:
        key_kind, entry_kind = typing.get_args(kind)
        _expect(value, dict, "an object")
        keys = [_key(key, key_kind) for key in value]
        places = ((key, entry, entry_kind) for key, entry in zip(keys, value.values(), strict=True))
        return dict(zip(keys, _each(made, places, kind), strict=True))

    def tensor(value: Any, kind: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise Unfit(f"expected a tensor, got {_shown(value)}")
        if not isinstance(value, kind):
            raise Unfit(
                f"expected {kind.__name__}, got {value.dtype} of shape {tuple(value.shape)}"
            )
        made: Tensor = value
        return made

    def entries(cls: Any) -> Callable[[Any, Any], Any]:
        fill = make_dict_structure_fn(cls, made)
        names = [field.name for field in dataclasses.fields(cls)]

        def structured(value: Any, _: Any) -> Any:
            _expect(value, dict, "an object")
            missing = [name for name in names if name not in value]
            if strict and missing:
                raise Unfit(f"lacks {', '.join(missing)}")
            return fill(value, cls)

        return structured

    def by_kind(cls: Any) -> Callable[[Any, Any], Any]:
        def structured(value: Any, _: Any) -> Any:
            _expect(value, dict, "an object")
            rest = dict(value)
            kinds = kinds_of(cls)
            name = rest.pop("kind", cls.kind)
            if name not in kinds:
                raise Unfit(f"holds a {name!r}, expected {' or '.join(kinds)}")
            found: Any = kinds[name]
            return of_kind(found)(rest, found)

        return structured

    def registered(matches: Callable[[Any], bool], structured: Callable[[Any, Any], Any]) -> None:
        made.register_structure_hook_func(matches, structured)

    of_kind = functools.cache(entries)
    made.register_structure_hook_factory(dataclasses.is_dataclass, entries)
    made.register_structure_hook_factory(lambda kind: _is_a(kind, Stored), by_kind)
    registered(lambda kind: _origin(kind) is tuple, many)
    registered(lambda kind: _origin(kind) is typing.Literal, one_of)
    registered(lambda kind: _is_a(_origin(kind), Mapping), mapped)
    registered(lambda kind: _is_a(kind, Tensor) or _is_a(kind, AbstractArray), tensor)
    return made


def _origin(kind: Any) -> Any:
    return typing.get_origin(kind)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value)


def _is_a(kind: Any, wanted: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, wanted)


def _each(
    converter: cattrs.Converter, places: Iterable[tuple[Any, Any, Any]], whole: Any
) -> list[Any]:
    """Entries of a list or an object, each as its kind; all that are wrong in one error."""
    from cattrs import IterableValidationError, IterableValidationNote

    found = []
    errors = []
    for place, entry, kind in places:
        try:
            found.append(converter.structure(entry, kind))
        except Exception as error:
            error.add_note(IterableValidationNote(f"at {place}", place, kind))
            errors.append(error)
    if errors:
        raise IterableValidationError("wrong entries", errors, whole)
    return found


def _key(key: str, kind: Any) -> Any:
    try:
        return kind(key) if kind is int else key
    except ValueError:
        raise Unfit(f"expected whole numbers as names, got {key!r}") from None


def _expect(value: Any, kind: type, name: str) -> None:
    if not isinstance(value, kind):
        raise Unfit(f"expected {name}, got {_shown(value)}")


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{type(value).__name__} {shown[:37]}..."
