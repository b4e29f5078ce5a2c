"""Write the tree of modules in docs/architecture.md from the modules' own docstrings.

With --check, fail if the page is out of date.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).parent
PAGE = DOCS / "architecture.md"
PACKAGE = DOCS.parent / "src" / "impatient"
BEGIN = "<!-- tree: made by docs/generate_tree.py -->\n"
END = "<!-- end of tree -->\n"


def summary(file: Path) -> str:
    """Return the first paragraph of a module's docstring, on one line, without its full stop."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).rstrip(".")


def lines(folder: Path, depth: int = 0) -> Iterator[str]:
    """Yield a line for a folder, its modules and its sub-folders."""
    title = "src/impatient/" if folder == PACKAGE else f"{'  ' * depth}{folder.name}/"
    yield f"{title:26}{summary(folder / '__init__.py')}"
    for file in sorted(folder.glob("*.py")):
        if file.name != "__init__.py":
            yield f"{'  ' * (depth + 1) + file.name:26}{summary(file)}"
    for room in sorted(folder.iterdir()):
        if (room / "__init__.py").is_file():
            yield from lines(room, depth + 1)


def page() -> str:
    """Return the page with today's tree in it."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + "\n```text\n" + "\n".join(lines(PACKAGE)) + "\n```\n\n" + END + after


def main() -> None:
    """Write the page, or check it."""
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE} is out of date; run: python docs/generate_tree.py")


if __name__ == "__main__":
    main()
