"""Check that JSON has the form that is expected: its names, types and ranges."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# Larger numbers are no counts, sizes or dimensions.
MOST = 2**31 - 1
# In place of a name: any names, with entries of one form.
ANY = "*"


@dataclass(frozen=True, slots=True)
class Entry:
    """A value that is neither a list nor an object.

    Attributes:
        what: what is expected, for error messages.
        fits: function that tells whether a value is that.
    """

    what: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Maybe:
    """A value of a form, or null."""

    form: Form


@dataclass(frozen=True, slots=True)
class Pair:
    """A list of two values of one form."""

    form: Form


# A list has one form for all its entries. An object has a form for each name; names that end with
# a question mark may be missing.
Form = Entry | Maybe | Pair | list["Form"] | dict[str, "Form"]


def whole(least: int, most: int = MOST) -> Entry:
    """Expect a whole number in a range."""
    return Entry(
        f"a whole number from {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
    )


def one_of(*values: str) -> Entry:
    """Expect one of some texts."""
    return Entry(f"one of {', '.join(values)}", lambda value: value in values)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e300


TEXT = Entry("text", lambda value: isinstance(value, str))
FLAG = Entry("true or false", lambda value: isinstance(value, bool))
NUMBER = Entry("a finite number", _is_number)
POSITIVE = Entry("a positive number", lambda value: _is_number(value) and value > 0.0)
SECONDS = Entry("seconds, at least 0", lambda value: _is_number(value) and value >= 0.0)
BOUND = Entry(
    "a number or infinity",
    lambda value: _is_number(value) or (isinstance(value, float) and math.isinf(value)),
)
FILE = Entry(
    "the name of a file in this directory",
    lambda value: (
        isinstance(value, str)
        and value.isprintable()
        and not {"", "."} & {*value.split("/")}
        and ".." not in value.split("/")
        and "\\" not in value
    ),
)


def misfit(value: Any, form: Form) -> str | None:
    """Say which entry does not have its form, or None if all do."""
    return next(_misfits(value, form, ""), None)


def _misfits(value: Any, form: Form, where: str) -> Iterator[str]:
    if isinstance(form, Maybe):
        if value is not None:
            yield from _misfits(value, form.form, where)
    elif isinstance(form, Entry):
        if not form.fits(value):
            yield f"{where} is {reprlib.repr(value)}; expected {form.what}"
    elif isinstance(form, Pair | list):
        pair = isinstance(form, Pair)
        if not isinstance(value, list) or (pair and len(value) != 2):
            what = "a list of two" if pair else "a list"
            yield f"{where} is {reprlib.repr(value)}; expected {what}"
            return
        for place, entry in enumerate(value):
            part = form.form if isinstance(form, Pair) else form[0]
            yield from _misfits(entry, part, f"{where}[{place}]")
    elif not isinstance(value, dict):
        yield f"{where} is {reprlib.repr(value)}; expected an object"
    else:
        yield from _misfits_of_object(value, form, where)


def _misfits_of_object(value: dict[str, Any], form: dict[str, Form], where: str) -> Iterator[str]:
    before = f"{where}." if where else ""
    if ANY in form:
        form = dict.fromkeys(value, form[ANY])
    for name, entry in form.items():
        plain = name.removesuffix("?")
        if plain in value:
            yield from _misfits(value[plain], entry, f"{before}{plain}")
        elif plain == name:
            yield f"{before}{name} is missing"
