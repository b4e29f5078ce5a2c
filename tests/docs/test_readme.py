"""README: short enough to be read, and the tree of modules in docs/architecture.md is true."""

import importlib.util
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

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


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The hook of the build, with a stand-in for hatchling, which only builds install."""
    name = "hatchling.metadata.plugin.interface"
    stand_in = types.ModuleType(name)
    stand_in.MetadataHookInterface = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, stand_in)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_work_on_the_page_of_the_package(hook: types.ModuleType) -> None:
    made = hook.AbsoluteReadme()
    made.root = str(ROOT)
    metadata: dict[str, dict[str, str]] = {}
    made.update(metadata)
    text = metadata["readme"]["text"]
    links = re.findall(r"\]\(([^)\s]+)\)|\bsrc(?:set)?=\"([^\"]+)\"", text)
    assert len(links) > 20
    for link in ("".join(pair) for pair in links):
        assert link.startswith("https://")
        kind, _, path = link.partition("/main/")
        if kind.endswith(("/blob", "/raw", "/impatient")):
            assert (ROOT / path.partition("#")[0].partition("?")[0]).is_file(), link
        elif kind.endswith("/tree"):
            assert (ROOT / path).is_dir(), link


def test_every_extra_is_used_in_the_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    files = (ROOT / "src").rglob("*.py")
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    extras = project["optional-dependencies"]
    for extra in extras.keys() - {"dev"}:
        for package in extras[extra]:
            name = re.split(r"[\[>=]", package)[0]
            if name in ("httptools", "uvloop"):
                # uvicorn takes them where they are
                continue
            name = {"grpcio": "grpc", "protobuf": "google.protobuf"}.get(name, name)
            loads = rf"import {name}\b|from {name}[. ]|\"{name}\""
            assert re.search(loads, source), (extra, name)


def test_the_tree_of_modules_in_the_docs_is_up_to_date() -> None:
    script = ROOT / "docs/generate_tree.py"
    made = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
