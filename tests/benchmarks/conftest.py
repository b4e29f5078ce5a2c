"""Scripts of benchmarks/, which find what is beside them."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Load a script by its name, as it is when it runs."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module
