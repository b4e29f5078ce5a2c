"""beartype for jaxtyping's import hook (`--jaxtyping-packages=...,typecheck.checked`).

The hook decorates functions one by one, and beartype refuses some whole: methods that speak of
`Self`, and functions of protocols that cannot be checked at run time. Those stay unchecked; all
others have their shapes and types checked.
"""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintException

# an int is a float, as for mypy
_checking = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return _checking(function)
    except BeartypeDecorHintException:
        return function
