"""README: short enough to be read, and the tree of modules in docs/architecture.md is true."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_read_in_three_minutes() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert len(README.splitlines()) <= 110
    assert len(prose.split()) <= 700


def test_the_loop_and_the_deadline_are_examples_of_a_few_lines() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 3
    assert all(len(block.splitlines()) <= 8 for block in blocks)


def test_the_tree_of_modules_in_the_docs_is_up_to_date() -> None:
    script = ROOT / "docs/generate_tree.py"
    made = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
