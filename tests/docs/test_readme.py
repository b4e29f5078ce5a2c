"""README: its code runs, its tree is true."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::impatient.errors.NoEffectWarning")
def test_the_python_blocks_run_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    scope: dict[str, object] = {}
    for block in blocks:
        exec(block, scope)

    assert len(blocks) >= 2
    assert scope["answer"].output.shape == (1, 10)  # type: ignore[attr-defined]
    recording: Any = scope["recording"]
    accuracy = (recording.outputs.argmax(-1) == recording.labels).float().mean(1)
    # a newcomer sees a network that works, to the last exit
    assert accuracy[-1] > 0.8
    assert "exit" in capsys.readouterr().out


def test_the_quickstart_has_at_most_20_lines_of_code() -> None:
    quickstart = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]

    assert (
        len(
            [
                line
                for line in quickstart.splitlines()
                if line.strip() and not line.startswith(("import", "from", "#"))
            ]
        )
        <= 20
    )


def test_every_path_in_the_tree_exists_and_every_module_is_in_it() -> None:
    tree = re.search(
        r"## What is where\n(.*?)\n## |## What is where\n(.*)", README, flags=re.DOTALL
    )
    assert tree
    text = tree.group(0)
    modules = [
        file.relative_to(ROOT / "src/impatient") for file in (ROOT / "src/impatient").rglob("*.py")
    ]
    missing = [
        str(module)
        for module in modules
        if module.name != "__init__.py" and module.name not in text
    ]

    assert not missing


def test_links_to_files_are_right() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)

    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
