"""What options of several verbs have in common: units, bounds, lists and shared options."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from impatient.clock import positive_ms


def number(
    metavar: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    whole: bool = False,
) -> PrimitiveConstructorSpec[Any]:
    """Describe an option that takes a number between bounds."""

    def read(text: str) -> float:
        value = int(text) if whole else float(text)
        if not low <= value <= high:
            bounds = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
            raise ValueError(f"{text}; expected {bounds}")
        return value

    return _spec(metavar, read, str)


def quantity(
    metavar: str, read: Callable[[float], float], shown: Callable[[float], float]
) -> PrimitiveConstructorSpec[Any]:
    """Describe an option whose unit at the door is not the unit inside."""
    return _spec(metavar, lambda text: read(float(text)), lambda value: f"{shown(value):g}")


def listed(
    metavar: str, read: Callable[[str], Any] = str, shown: Callable[[Any], str] = str
) -> PrimitiveConstructorSpec[Any]:
    """Describe an option that takes values with commas between."""

    def values(text: str) -> tuple[Any, ...]:
        try:
            return tuple(read(part.strip()) for part in text.split(",")) if text else ()
        except ValueError as error:
            raise ValueError(f"{text!r}; expected {metavar}: {error}") from None

    return _spec(metavar, values, lambda value: ",".join(map(shown, value)))


def _spec(
    metavar: str, read: Callable[[str], Any], shown: Callable[[Any], str]
) -> PrimitiveConstructorSpec[Any]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda texts: read(texts[0]),
        is_instance=lambda _: True,
        str_from_instance=lambda value: ["none" if value is None else shown(value)],
    )


def _count(text: str) -> int:
    if (count := int(text)) < 0:
        raise ValueError(f"{count} is below 0")
    return count


def _seconds(ms: float) -> float:
    return positive_ms(ms, "time") / 1e3


MS = quantity("MS", _seconds, lambda seconds: seconds * 1e3)
POINTS = quantity("POINTS", lambda points: points / 100, lambda share: share * 100)
MILLIONS = quantity("MILLIONS", lambda millions: millions * 1e6, lambda count: count / 1e6)
MJ = quantity("MJ", lambda mj: mj / 1e3, lambda joules: joules * 1e3)
SHARE = number("SHARE", low=0.0, high=1.0)
COUNT = number("COUNT", low=0, whole=True)
POSITIVE = number("COUNT", low=1, whole=True)
NAMES = listed("NAME,NAME,...")
COUNTS = listed("COUNT,COUNT,...", _count)
TIMES_MS = listed(
    "MS,MS,...", lambda text: _seconds(float(text)), lambda seconds: f"{seconds * 1e3:g}"
)

Flag = Annotated[bool, FlagCreatePairsOff]
Directory = Annotated[Positional[Path], arg(metavar="DIR", help="The run directory.")]
NewDirectory = Annotated[Positional[Path], arg(metavar="DIR", help="The run directory to make.")]
AnyProfile = Annotated[Flag, arg(help="Use a profile of another machine or version all the same.")]
Threads = Annotated[
    int, COUNT, arg(help="Threads of torch within an operation; 0 leaves its own choice.")
]
Engine = Annotated[
    str, arg(help="eager, compile, or one that `impatient export` has made in DIR/engines.")
]
Quiet = Annotated[Flag, arg(help="Show no progress bars.")]
Force = Annotated[Flag, arg(help="Redo even if up to date.")]


def use_threads(threads: int) -> None:
    """Set torch's threads within an operation; 0 leaves its own choice."""
    if threads:
        import torch

        torch.set_num_threads(threads)
