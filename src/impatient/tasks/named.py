"""Ready-made tasks by name, as files and the command line have them."""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from impatient.errors import TaskError
from impatient.tasks.binary import binary
from impatient.tasks.classification import classification
from impatient.tasks.detection import detection
from impatient.tasks.embedding import embedding
from impatient.tasks.multi_label import multi_label
from impatient.tasks.regression import regression
from impatient.tasks.segmentation import segmentation
from impatient.tasks.task import Task

READY: Mapping[str, Callable[..., Task]] = {
    make.__name__: make
    for make in (
        classification,
        binary,
        multi_label,
        regression,
        segmentation,
        embedding,
        detection,
    )
}


def _as_pickled(task: Task) -> Any:
    """Say how a task is pickled and copied: a ready-made one by its name.

    So networks go to other processes, where their functions are made anew.
    """
    if task.name.partition(":")[0] in READY and _made(task.name) is task:
        return named, (task.name,)
    return object.__reduce_ex__(task, 2)


copyreg.pickle(Task, _as_pickled)


def named(task: str | Task) -> Task:
    """Return a task, or make a ready one from its name and options.

    Raises:
        TaskError: if there is none of this name, or an option is unknown or no number.
    Example:
        >>> named("classification:top=5").quality_name
        'top-5 accuracy'
    """
    return task if isinstance(task, Task) else _made(task)


def known(name: str) -> Task | None:
    """Return a ready-made task, or None where the name is of somebody's own."""
    return named(name) if name.partition(":")[0] in READY else None


def is_classification(name: str) -> bool:
    """Whether a task of this name is about classes."""
    return name.partition(":")[0] == classification.__name__


@functools.cache
def _made(task: str) -> Task:
    name, *options = task.split(":")
    if name not in READY:
        raise TaskError(
            f"no ready-made task {task!r}; there are {', '.join(READY)}. For a task of your own "
            "give the Task itself."
        )
    make = READY[name]
    allowed = inspect.signature(make).parameters
    given: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in allowed:
            raise TaskError(
                f"task {task!r}: no option {key!r}; {name} takes {', '.join(allowed) or 'none'}."
            )
        given[key] = _number(task, key, value)
    return make(**given)


def _number(task: str, key: str, value: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    raise TaskError(f"task {task!r}: {key}={value!r}; expected a number.")
