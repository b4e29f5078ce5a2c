"""Names of a package that are imported when they are first asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def deferred(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the `__getattr__` and the `__dir__` of a package whose names wait in its modules.

    Args:
        package: the package's own `__name__`.
        homes: the names that each module of the package gives; a module's own name gives the
            module.
    Source:
        PEP 562; like lazy_loader of Scientific Python.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = importlib.import_module(f"{package}.{home_of[name]}")
        value = home if name == home_of[name] else getattr(home, name)
        # the next time it is found without coming here
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*home_of, *vars(sys.modules[package])})
