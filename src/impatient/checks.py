"""Check single values, and raise the error that the caller names.

positive(TrainingError, lr=lr, temperature=temperature)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

from impatient.errors import ImpatientError

Raised = type[ImpatientError]


def one_of(error: Raised, known: Any, **values: object) -> None:
    """Refuse values that are not among the known ones.

    Args:
        error: class of the error.
        known: a Literal type, or a collection of values.
        **values: the values to check, by their names.
    Example:
        >>> one_of(ImpatientError, ("crop", "none"), augment="rotate")
        Traceback (most recent call last):
        impatient.errors.ImpatientError: augment='rotate'; expected one of crop, none.
    """
    choices = get_args(known) or tuple(known)
    for name, value in values.items():
        if value not in choices:
            raise error(f"{name}={value!r}; expected one of {', '.join(map(str, choices))}.")


def as_number(value: Any) -> float:
    """Convert a number of any library to float, and anything else to NaN.

    A text or a truth is no number, although Python converts both.

    Example:
        >>> as_number(2), as_number("2"), as_number(True)
        (2.0, nan, nan)
    """
    if isinstance(value, str | bytes | bytearray | bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def positive(error: Raised, **values: float) -> None:
    """Refuse values that are not finite numbers above 0."""
    for name, value in values.items():
        _check(0.0 < as_number(value) < math.inf, error, name, value, "a positive number")


def not_negative(error: Raised, **values: float) -> None:
    """Refuse values that are not finite numbers of at least 0."""
    for name, value in values.items():
        _check(0.0 <= as_number(value) < math.inf, error, name, value, "0 or a positive number")


def share(error: Raised, **values: float) -> None:
    """Refuse values that are not from 0 to 1."""
    for name, value in values.items():
        _check(0.0 <= as_number(value) <= 1.0, error, name, value, "a share from 0 to 1")


def share_below_one(error: Raised, **values: float) -> None:
    """Refuse values that are not from 0 to 1, and 1 itself."""
    for name, value in values.items():
        _check(0.0 <= as_number(value) < 1.0, error, name, value, "0 or a share below 1")


def true_share(error: Raised, **values: float) -> None:
    """Refuse values that are not strictly between 0 and 1."""
    for name, value in values.items():
        _check(
            0.0 < as_number(value) < 1.0, error, name, value, "a share between 0 and 1, such as 0.1"
        )


def at_least(error: Raised, least: int, **values: float) -> None:
    """Refuse values below the least allowed number."""
    for name, value in values.items():
        _check(as_number(value) >= least, error, name, value, f"{least} or more")


def provides(error: Raised, name: str, value: object, needed: Sequence[str], remedy: str) -> None:
    """Refuse an object that lacks a method or an attribute of what is expected.

    Args:
        error: class of the error.
        name: the argument's name.
        value: the object.
        needed: names that it must have.
        remedy: what is expected, and what to do.
    Example:
        >>> provides(ImpatientError, "data", [1], ["batches"], "Give load_data(...).")
        Traceback (most recent call last):
        impatient.errors.ImpatientError: data is a list, which lacks 'batches'. Give load_data(...).
    """
    # looked for in the class, too, so that no property is computed
    missing = [each for each in needed if each not in dir(value)]
    if missing:
        lacks = ", ".join(map(repr, missing))
        raise error(f"{name} is a {type(value).__name__}, which lacks {lacks}. {remedy}")


def _check(is_right: bool, error: Raised, name: str, value: float, expected: str) -> None:
    if not is_right:
        raise error(f"{name}={value!r}; expected {expected}.")
