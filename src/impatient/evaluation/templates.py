"""Fill in the templates of pages and pictures, with everything from outside escaped."""

from __future__ import annotations

import unicodedata
from importlib import resources
from typing import Any

import jinja2

# they turn the text around them
_TURNING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def rendered(name: str, **values: Any) -> str:
    """Fill in a template of this package.

    Texts are escaped; in them, characters that steer are made visible. A name that the template
    needs and is not given is an error.
    """
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        keep_trailing_newline=True,
    )
    return environment.from_string(own_file(name)).render(values)


def own_file(name: str) -> str:
    """Read a text file of this package."""
    return (resources.files("impatient.evaluation") / name).read_text("utf-8")


def visible(text: str) -> str:
    r"""Write characters that steer, turn text round or are none by their numbers.

    Example:
        >>> visible("safe\u202etxt.exe")
        'safe⟨U+202E⟩txt.exe'
    """
    return "".join(f"⟨U+{ord(letter):04X}⟩" if _steers(letter) else letter for letter in text)


def _steers(letter: str) -> bool:
    if unicodedata.category(letter) == "Cc":
        return letter not in "\t\n"
    # halves of characters, and numbers that are none: no file may hold them
    if unicodedata.category(letter) == "Cs" or ord(letter) & 0xFFFE == 0xFFFE:
        return True
    return unicodedata.bidirectional(letter) in _TURNING
