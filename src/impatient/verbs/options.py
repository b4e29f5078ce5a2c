"""Types of options that several verbs share: units, bounds and lists."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

from tyro.conf import FlagCreatePairsOff, Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from impatient.clock import positive_ms
from impatient.errors import TaskError


def _reader(
    kind: type[float], expected: str, low: float = -math.inf, high: float = math.inf
) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ValueError(f"{text!r}; expected {expected}.")
        return value

    return read


def _spec(
    metavar: str, read: Callable[[str], Any], shown: Callable[[Any], str] = str
) -> PrimitiveConstructorSpec[Any]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda texts: read(texts[0]),
        is_instance=lambda _: True,
        str_from_instance=lambda value: ["" if value is None else shown(value)],
    )


def one_of(choices: Any) -> PrimitiveConstructorSpec[Any]:
    """Describe an option that takes a Literal's values, or is left out."""
    names = get_args(choices)
    return dataclasses.replace(_spec(f"{{{','.join(names)}}}", str), choices=names)


def _listed(
    metavar: str, read: Callable[[str], Any], shown: Callable[[Any], str] = str
) -> PrimitiveConstructorSpec[Any]:
    def values(text: str) -> tuple[Any, ...]:
        parts = tuple(read(part.strip()) for part in text.split(",") if part.strip())
        if not parts:
            raise ValueError(f"{text!r}; expected {metavar}.")
        return parts

    return _spec(metavar, values, lambda value: ",".join(map(shown, value)))


def _part(metavar: str, read: Callable[[str], float], of: float) -> PrimitiveConstructorSpec[Any]:
    return _spec(metavar, lambda text: read(text) / of, lambda value: f"{value * of:g}")


def _seconds(text: str) -> float:
    return positive_ms(_number(text), "time") / 1e3


def _in_ms(seconds: float) -> str:
    return f"{seconds * 1e3:g}"


_number = _reader(float, "a number")
_count = _reader(int, "a whole number, 0 or more", 0)
_positive = _reader(int, "a whole number, 1 or more", 1)
# With many thousands torch cannot start its threads, and ends the process.
_threads = _reader(int, "a whole number from 0 to 1024", 0, 1024)
_share = _reader(float, "a share from 0 to 1", 0.0, 1.0)
# all 100 would allow any answer
_points = _reader(float, "points from 0 to below 100", 0.0, math.nextafter(100.0, 0.0))

# help says nothing of a default that is nothing
OFF = arg(
    help_behavior_hint=lambda default: (
        "" if default in ("", "''", "None", "False") else f"(default: {default})"
    )
)

# units at the door, and what they are inside: seconds, shares, numbers of operations or bytes
Milliseconds = Annotated[float | None, _spec("MS", _seconds, _in_ms), OFF]
Points = Annotated[float | None, _part("POINTS", _points, 100), OFF]
Millions = Annotated[
    float | None,
    _spec("MILLIONS", lambda text: _number(text) * 1e6, lambda count: f"{count / 1e6:g}"),
    OFF,
]
Millijoules = Annotated[float | None, _part("MJ", _number, 1e3), OFF]

# bounds
Share = Annotated[float, _spec("SHARE", _share)]
Count = Annotated[int, _spec("COUNT", _count)]
Positive = Annotated[int, _spec("COUNT", _positive)]
PositiveOrNone = Annotated[int | None, _spec("COUNT", _positive), OFF]

# values with commas between
Names = Annotated[tuple[str, ...], _listed("NAME,NAME,...", str), OFF]
Counts = Annotated[tuple[int, ...], _listed("COUNT,COUNT,...", _count), OFF]
Times = Annotated[tuple[float, ...], _listed("MS,MS,...", _seconds, _in_ms), OFF]

Text = Annotated[str | None, OFF]
Number = Annotated[float | None, OFF]
Flag = Annotated[bool, FlagCreatePairsOff, OFF]


def _run_path(text: str) -> Path:
    if not text.startswith("zoo:"):
        return Path(text)
    # of torch, which --help can do without
    from impatient.verbs.zoo import run_path

    return run_path(text)


# a run directory that is there, or a network of the zoo
RunPath = Annotated[Path, _spec("DIR", _run_path)]

# options of several verbs
Top = Annotated[
    int | None,
    _spec("COUNT", _positive),
    OFF,
    arg(
        help="Take an answer for right if the true class is among its COUNT likeliest ones "
        "(task classification:top=COUNT)."
    ),
]
Trust = Annotated[
    Names,
    arg(
        help="Modules, or MODULE:NAME, that may be called if DIR names them as its model, with "
        "commas between; aoti for that engine's programs. Say it for your own directories only."
    ),
]
Directory = Annotated[
    Positional[RunPath], arg(metavar="DIR", help="The run directory, or zoo:NAME.")
]
NewDirectory = Annotated[Positional[Path], arg(metavar="DIR", help="The run directory to make.")]
AnyProfile = Annotated[Flag, arg(help="Use a profile of another machine or version all the same.")]
Threads = Annotated[
    int,
    _spec("COUNT", _threads),
    arg(help="Threads of torch within an operation; 0 takes one fewer than the cores."),
]
# the same, for several measurements in turn
ThreadCounts = Annotated[tuple[int, ...], _listed("COUNT,COUNT,...", _threads), OFF]
Engine = Annotated[
    str, arg(help="eager, compile, or one that `impatient export` has made in DIR/engines.")
]
Quiet = Annotated[Flag, arg(help="Show no progress bars.")]
Force = Annotated[Flag, arg(help="Redo even if up to date.")]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VerbOptions:
    """Options of every verb."""

    json: Annotated[Flag, arg(help="Print the result as JSON, and notes on the error stream.")] = (
        False
    )


def with_top(task: str, top: int | None) -> str:
    """Return the name of a task, with the number of classes that an answer may name.

    Raises:
        TaskError: if a number is given for another task than classification.
    """
    if top is None:
        return task
    # it imports torch
    from impatient.tasks import named

    kind = task.partition(":")[0]
    if kind != "classification":
        raise TaskError(
            f"--top {top} is for classifications, but the task is {task}; leave it away."
        )
    return named(f"{kind}:top={top}").name


def task_and_top(task: str, top: int | None) -> str:
    """Name the task that --task and --top say together.

    Raises:
        TaskError: if they contradict each other.
    """
    both = with_top(task, top)
    if top and ":" in task and both != task:
        raise TaskError(f"--task {task} and --top {top}; expected one of them.")
    return both


def spare_a_core() -> None:
    """Leave one core to the rest of the machine, unless OMP_NUM_THREADS says how many to use.

    With a thread on every core, whatever else runs stops one of them, and the others wait for it.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        torch.set_num_threads(min(torch.get_num_threads(), max(1, cores - 1)))


def use_threads(threads: int) -> None:
    """Set torch's threads within an operation, unless it is 0."""
    if threads:
        import torch

        torch.set_num_threads(threads)
