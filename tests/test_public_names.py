"""The names others count on."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import impatient

FACES = [
    "impatient",
    "impatient.networks",
    "impatient.training",
    "impatient.policies",
    "impatient.evaluation",
    "impatient.runtime",
    "impatient.engines",
    "impatient.serving",
]


@pytest.mark.parametrize("face", FACES)
def test_what_a_face_exports_is_there_sorted_and_nothing_else(face: str) -> None:
    module = importlib.import_module(face)
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not (inspect.ismodule(value) and name not in module.__all__)
    }

    assert public - set(module.__all__) <= {"own_version", "deferred"}
    assert all(hasattr(module, name) for name in module.__all__)
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("face", ["impatient", "impatient.evaluation"])
def test_what_waits_to_be_imported_is_what_type_checkers_see(face: str) -> None:
    module = importlib.import_module(face)
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: entry.module
        for node in tree.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Attribute)
        for entry in node.body
        if isinstance(entry, ast.ImportFrom)
        for alias in entry.names
    }
    eager = {"__version__"} | {
        alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(module.__all__) - eager == set(seen)
    for name, home in seen.items():
        found = getattr(module, name)
        if inspect.ismodule(found):
            assert found.__name__ == f"{home}.{name}"
        else:
            assert found is getattr(importlib.import_module(home), name)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'impatient' has no attribute 'atach_exits'"):
        impatient.atach_exits  # noqa: B018


def imported_by(statement: str) -> set[str]:
    """Packages that a fresh interpreter has imported after a statement."""
    script = f"import json, sys\n{statement}\nprint(json.dumps(list(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(run.stdout)}


@pytest.mark.parametrize("module", ["impatient", "impatient.cli"])
def test_neither_the_package_nor_its_command_line_waits_for_torch(module: str) -> None:
    heavy = {"torch", "numpy", "scipy", "sklearn", "matplotlib", "PIL", "lightning_fabric"}
    assert heavy.isdisjoint(imported_by(f"import {module}"))


def test_all_public_names_come_without_what_only_some_calls_need() -> None:
    found = imported_by("from impatient import *")
    assert "torch" in found
    assert {"scipy", "sklearn", "matplotlib", "lightning_fabric", "torchvision"}.isdisjoint(found)


def test_the_calls_of_the_design_exist() -> None:
    for name in (
        "attach_exits",
        "profile",
        "fit",
        "record",
        "fit_thresholds",
        "evaluate",
        "Runner",
        "Deadline",
        "Budget",
    ):
        assert hasattr(impatient, name)
    assert len(impatient.training.weights.sieve(16)) == 16
    assert impatient.budgets.uniform(0.0, 0.010).high == 0.010


def test_every_error_is_in_the_tree_of_the_docstring() -> None:
    from impatient import errors

    defined = [
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value)
        and issubclass(value, Exception)
        and not issubclass(value, Warning)
    ]

    assert [name for name in defined if name not in errors.__doc__] == []


def test_every_name_of_the_package_that_our_code_uses_is_found_without_an_import_before() -> None:
    used = {
        (node.attr, file.name)
        for file in Path(impatient.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "impatient"
    }
    deferred = subprocess.run(
        [sys.executable, "-c", "import impatient; print(*impatient.__dir__())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(used) > 30
    assert {(name, file) for name, file in used if name not in deferred.stdout.split()} == set()
