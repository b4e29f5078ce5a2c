"""Import the names of a package when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def deferred(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the `__getattr__` and `__dir__` of a package with lazy names.

    Args:
        package: `__name__` of the package.
        homes: names that each module of the package defines; the module's own name stands for the
            module itself.
    Source:
        PEP 562; like lazy_loader of Scientific Python.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = importlib.import_module(f"{package}.{home_of[name]}")
        value = home if name == home_of[name] else getattr(home, name)
        # Next time, Python finds it without this function.
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*home_of, *vars(sys.modules[package])})
