"""Fill in the templates of pages and pictures, with everything from outside escaped."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2

from impatient.characters import visible


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
