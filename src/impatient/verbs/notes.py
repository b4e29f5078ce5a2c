"""Say what a verb does, in the log that the command line prints."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator

log = logging.getLogger("impatient.verbs")

# Characters that a terminal obeys, turns around or cannot print; not line ends and tabs.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Show the characters that would control a terminal, as JSON writes them.

    Names in files of somebody else's may hold them.

    Example:
        >>> print(visible("ant\x1b[2J"))
        ant\u001b[2J
    """
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


@contextlib.contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Log warnings as notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        log.warning("note: %s", warning.message)
