"""Which process works on a run directory: one at a time."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from impatient.directories import remove_stale, working_on

Options = TypeVar("Options", bound="InDirectory")
Result = TypeVar("Result")

# The folders of a run directory into which verbs write.
WRITTEN_TO = (
    *(
        ".",
        "recordings",
        "policies",
        "targets",
        "certificates",
        "exit_free",
        "exit_free/recordings",
    ),
    *("engines", "engines/*", "engines/*/recordings"),
)


class InDirectory(Protocol):
    """Options of a verb that works on one run directory."""

    @property
    def directory(self) -> Path: ...


def is_first() -> bool:
    """Tell whether no other process has started this one to train together."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def alone(
    *, make: bool = False
) -> Callable[[Callable[[Options], Result]], Callable[[Options], Result]]:
    """Let a verb run only while no other process works on its run directory.

    Args:
        make: whether the verb makes the directory.
    """

    def guarded(work: Callable[[Options], Result]) -> Callable[[Options], Result]:
        @functools.wraps(work)
        def run_alone(options: Options) -> Result:
            # Further processes of one training work together with the first.
            if not is_first():
                return work(options)
            with working_on(options.directory, make=make) as is_alone:
                if is_alone:
                    remove_stale(options.directory, WRITTEN_TO)
                return work(options)

        return run_alone

    return guarded
