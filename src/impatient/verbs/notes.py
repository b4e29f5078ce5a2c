"""Say what a verb does, in the log that the command line prints."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

log = logging.getLogger("impatient.verbs")


@contextlib.contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Log warnings as notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        log.warning("note: %s", warning.message)
