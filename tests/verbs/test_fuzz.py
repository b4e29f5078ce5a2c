"""Damaged files of every format are read or refused: never raw errors, hangs or pickles.

The long run of the same is `benchmarks/fuzz.py`.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import fuzz
from benchmarks.damage import Found, damage_entry, quiet
from command_line import TINY

PER_FILE = 25
FLIPS = 12
COMMANDS = 24


@pytest.fixture(autouse=True)
def _no_notes() -> Iterator[None]:
    with quiet():
        yield


@pytest.fixture
def run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory with what the fuzzer needs beside the finished one's."""
    for options in fuzz.STEPS[3:6]:
        assert fuzz.call(options[0], run_dir, *options[1:])[0] == 0
    monkeypatch.setattr(fuzz, "TRAINED", TINY)
    return run_dir


def raw(found: dict[str, Found]) -> dict[str, dict[str, int]]:
    return {name: each.raw for name, each in found.items() if each.raw}


def test_damaged_files_are_read_or_refused(run: Path, tmp_path: Path) -> None:
    brought = tmp_path / "brought"
    marker = tmp_path / "unpickled"
    fuzz.make_brought(brought)
    files = fuzz.readers(run, brought)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    found = fuzz.through_python(files, PER_FILE, random.Random(1), marker)
    assert raw(found) == {}
    assert not any(each.slow for each in found.values())
    assert {each.files for each in found.values()} == {PER_FILE}
    # most damage is noticed, in every format
    assert all(each.refused > PER_FILE // 8 for each in found.values())
    ours = {name: read for name, read in files.items() if Path(name).is_relative_to(run)}
    flipped = fuzz.with_one_bit(ours, FLIPS, random.Random(2))
    assert {name: each.refused for name, each in flipped.items()} == dict.fromkeys(ours, FLIPS)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_commands_on_damaged_files_end_with_our_errors(run: Path, tmp_path: Path) -> None:
    brought = tmp_path / "brought"
    marker = tmp_path / "unpickled"
    fuzz.make_brought(brought)
    found = fuzz.through_command_line(run, brought, COMMANDS, random.Random(3), marker)
    assert raw(found) == {}
    assert sum(each.files for each in found.values()) == COMMANDS
    assert sum(each.refused for each in found.values()) > COMMANDS // 4
    assert not marker.exists()


def test_the_fuzzer_would_see_raw_errors_hangs_and_changes() -> None:
    found = Found()

    def late() -> None:
        while True:
            pass

    assert not found.add(lambda: {}["a"])
    assert list(found.raw) == ["KeyError at elsewhere: 'a'"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.damage.LIMIT_S", 1)
        assert not found.add(late)
    assert (found.slow, found.files, found.refused) == (1, 2, 0)
    tree = {"a": [1, {"b": 2.0}], "c": None}
    assert sum(damage_entry(tree, random.Random(seed)) != tree for seed in range(50)) > 40
