"""Write the tree of modules in docs/architecture.md from the modules' own docstrings.

Rooms stand in the order of the import contract: a room may import those above it. With --check,
fail if the page is out of date.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
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


def order_of_rooms() -> list[str]:
    """Return names below the package as the import contract has them, the ground floor first."""
    settings = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [name for layer in reversed(layers) for name in re.findall(r"impatient\.(\w+)", layer)]


def lines(folder: Path, depth: int = 0) -> Iterator[str]:
    """Yield a line for a folder, its modules and its sub-folders."""
    title = "src/impatient/" if folder == PACKAGE else f"{'  ' * depth}{folder.name}/"
    yield f"{title:26}{summary(folder / '__init__.py')}"
    for file in sorted(folder.glob("*.py")):
        if file.name != "__init__.py":
            yield f"{'  ' * (depth + 1) + file.name:26}{summary(file)}"
    order = order_of_rooms()
    rooms = [room for room in folder.iterdir() if (room / "__init__.py").is_file()]
    # what no contract names stands last
    places = {name: place for place, name in enumerate(order)}
    for room in sorted(rooms, key=lambda room: (places.get(room.name, len(order)), room.name)):
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
