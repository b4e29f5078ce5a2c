"""The figures of how a code base is written, on a package small enough to count by eye."""

from pathlib import Path

import pytest

from benchmarks import house

ROOT = Path(__file__).resolve().parent.parent

FIRST = '''"""A docstring that counts nowhere."""

from toy import second  # behind code


class Point:
    """A point."""

    def moved(self, a, b, c, d, e, f, g):
        return a, b, c, d, e, f, g


def public(value):
    # above code
    low, high = value, "many words in one token"
    return getattr(value, "name", low or high)
'''
SECOND = """from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toy.third import Other


@dataclass
class Kind:
    one: int = 1  # fmt: skip


def ask(value):
    from . import first

    return isinstance(value, (first.Point, GatePolicy)) or isinstance(value, PolicyError)
"""
THIRD = "from .second import Kind\n\nOther = Kind\n"


@pytest.fixture
def checkout(tmp_path):
    package = tmp_path / "src" / "toy"
    package.mkdir(parents=True)
    for name, text in {"__init__": "", "first": FIRST, "second": SECOND, "third": THIRD}.items():
        (package / f"{name}.py").write_text(text)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_toy.py").write_text("assert True\n" * 10)
    return tmp_path


def test_names_lines_and_habits_of_a_toy_package_are_counted(checkout):
    found = house.figures_of(checkout)
    assert (found.modules, found.lines, found.test_lines) == (4, 37, 10)
    assert (found.classes, found.dataclasses, found.functions, found.methods) == (2, 1, 2, 1)
    # of Point, moved, public, Kind and ask only Point says what it is
    assert (found.public, found.documented, found.docstring_lines) == (5, 1, 2)
    assert (found.comments, found.trailing_comments, found.format_skips) == (3, 2, 1)
    assert (found.parallel_assignments, found.getattr_defaults) == (1, 1)
    assert found.policy_isinstances == 1
    assert sorted(found.parameters) == [1, 1, 7]
    assert sorted(found.function_lines) == [2, 3, 3]


def test_a_string_is_one_token_and_a_docstring_none(tmp_path):
    (tmp_path / "__init__.py").write_text('"""Some\nlines."""\nname = "two words"  # and more\n')
    found = house.figures_of(tmp_path)
    assert (found.tokens, found.code_lines) == (3, 1)


def test_circles_do_not_count_what_is_imported_for_types_alone(checkout):
    found = house.figures_of(checkout)
    assert (found.circles, found.circles_with_deferred) == (0, 1)
    (checkout / "src" / "toy" / "second.py").write_text("from toy.third import Other\n")
    assert house.figures_of(checkout).circles == 1


def test_checkouts_stand_side_by_side_in_a_table(checkout):
    lines = house.table([checkout, ROOT]).splitlines()
    assert lines[0] == f"| | {checkout.name} | {ROOT.name} |"
    assert {line.count("|") for line in lines} == {4}


def test_a_folder_without_a_package_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="expected a checkout"):
        house.figures_of(tmp_path)
