"""The examples run as they are written; what they print is not looked at, what they return is."""

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_a_loop_of_ones_own_learns() -> None:
    accuracy = main_of("own_loop.py")(epochs=2)
    assert len(accuracy) == 3
    assert accuracy[-1] > 0.3


def test_ensembles_are_networks_with_exits() -> None:
    accuracy = main_of("ensembles.py")(epochs=1)
    assert [len(values) for values in accuracy.values()] == [6, 6, 9]
    assert accuracy["its exits together"][0] == accuracy["one network"][0]  # the first exit is alone either way


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="the example's model is torchvision's")
def test_a_run_is_interrupted() -> None:
    reached = main_of("interrupt.py")(runs=2)
    assert all(0 <= exit <= 5 for exit in reached)
