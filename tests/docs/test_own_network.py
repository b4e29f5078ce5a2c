"""The page on networks of one's own: its code runs, and its table names what there is."""

import re
from pathlib import Path
from typing import Any

from impatient import Network, Run

PAGE = (Path(__file__).parents[2] / "docs/how-to/own-network.md").read_text(encoding="utf-8")


def test_the_network_of_the_page_answers_by_its_deadline() -> None:
    _, block = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(block, scope)
    assert scope["answer"].output.shape == (1, 10)
    assert scope["costs"].exits == ("exit 0", "exit 1", "exit 2")


def test_what_may_be_overridden_is_there() -> None:
    rows = re.findall(r"^\| `(.*?) \|", PAGE, flags=re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`?(\w+)(?:\(\w*\))?`", row)]
    assert len(names) >= 8
    assert all(hasattr(Network, name) or hasattr(Run, name) for name in names)
