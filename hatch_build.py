"""Make the README's links absolute in the package, so that they work on its page on PyPI."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

REPOSITORY = "https://github.com/impatient-dnn/impatient"
RAW = "https://raw.githubusercontent.com/impatient-dnn/impatient/main"
MARKDOWN = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)\s]+)(\))")
PICTURES = re.compile(r"(\bsrc(?:set)?=\")(?!https?:)([^\"]+)(\")")


def absolute_links(text: str, root: Path) -> str:
    """Replace links to files of the repository by their addresses on the web.

    Args:
        text: a page in Markdown, at the root of the repository.
        root: the repository, which tells folders from files.
    """

    def page(found: re.Match[str]) -> str:
        path, _, place = found[2].partition("#")
        kind = "tree" if (root / path).is_dir() else "blob"
        return f"{found[1]}{REPOSITORY}/{kind}/main/{path}{'#' * bool(place)}{place}{found[3]}"

    def picture(found: re.Match[str]) -> str:
        # Otherwise GitHub sends pictures in SVG as text.
        return f"{found[1]}{RAW}/{found[2]}?sanitize=true{found[3]}"

    return PICTURES.sub(picture, MARKDOWN.sub(page, text))


class AbsoluteReadme(MetadataHookInterface):
    """Give the package the README with absolute links."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the readme, which pyproject.toml leaves to this hook."""
        root = Path(self.root)
        text = (root / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute_links(text, root)}
