"""The commit that stands on a page: changed code makes it "dirty", pages do not."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def common(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("common")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("src/code.py", "benchmarks/results/page.md", "docs/coverage.md"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("before")
    who = ("-c", "user.name=me", "-c", "user.email=me@here")
    for command in (("init",), ("add", "."), (*who, "commit", "--message", "first")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "is_dirty"),
    [("src/code.py", True), ("benchmarks/results/page.md", False), ("docs/coverage.md", False)],
)
def test_a_commit_is_dirty_if_code_was_changed(
    common: ModuleType, checkout: Path, changed: str, is_dirty: bool
) -> None:
    clean = common.commit(checkout)
    assert clean
    assert "dirty" not in clean
    (checkout / changed).write_text("after")
    assert common.commit(checkout) == clean + "-dirty" * is_dirty


def test_where_there_is_no_checkout_the_commit_is_unknown(
    common: ModuleType, tmp_path: Path
) -> None:
    assert common.commit(tmp_path) == "unknown"


@pytest.mark.parametrize(
    ("called", "said"),
    [
        (str(ROOT / "benchmarks" / "timely.py"), "`python benchmarks/timely.py --quick`"),
        ("timely.py", "`python benchmarks/timely.py --quick`"),
        ("", "`python --quick`"),
        ("/elsewhere/timely.py", "`python /elsewhere/timely.py --quick`"),
    ],
)
def test_a_page_names_the_command_from_the_root_on(
    common: ModuleType, monkeypatch: pytest.MonkeyPatch, called: str, said: str
) -> None:
    monkeypatch.chdir(ROOT / "benchmarks")
    monkeypatch.setattr("sys.argv", [called, "--quick"])
    assert f"Command: {said}" in common.facts()
