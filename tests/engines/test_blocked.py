"""Residual branches that enter a stage: in ONNX Runtime's blocked layout, with the same numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from impatient.engines.blocked import enter_blocked
from impatient.portable import OnnxRuntimePart
from onnx_parts import node, write_onnx

RANDOM = np.random.default_rng(0)
SHAPE = ["b", 16, 8, 8]


def convolution(takes: str, gives: str) -> Any:
    return node("Conv", f"{takes} w", gives, kernel_shape=[3, 3], pads=[1, 1, 1, 1])


def write_stage(path: Path, blocks: int, *, residual: bool) -> None:
    nodes = []
    for block in range(blocks):
        takes = f"t{block}"
        nodes += [convolution(takes, f"c{block}"), node("Relu", f"c{block}", f"r{block}")]
        nodes += [convolution(f"r{block}", f"d{block}")]
        both = f"d{block} {takes}" if residual else f"d{block} d{block}"
        nodes += [node("Add", both, f"a{block}"), node("Relu", f"a{block}", f"t{block + 1}")]
    weights = RANDOM.normal(size=(16, 16, 3, 3)).astype(np.float32) * 0.1
    write_onnx(path, nodes, {"t0": SHAPE}, {f"t{blocks}": SHAPE}, {"w": weights})


def test_the_numbers_stay_and_nothing_else_changes(tmp_path: Path) -> None:
    path = tmp_path / "stage1.onnx"
    write_stage(path, 3, residual=True)
    x = RANDOM.normal(size=(2, 16, 8, 8)).astype(np.float32)
    before = OnnxRuntimePart(path).one(x)

    assert enter_blocked(path, ["t0"])

    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert [entry.op_type for entry in model.graph.node].count("AveragePool") == 1
    assert [entry.name for entry in model.graph.input] == ["t0"]
    np.testing.assert_allclose(OnnxRuntimePart(path).one(x), before, rtol=1e-5, atol=1e-6)
    # values that are no numbers stay what they are
    x[0, 0, 0, 0] = np.nan
    x[1, 0, 0, 0] = np.inf
    found = OnnxRuntimePart(path).one(x)
    assert np.isnan(found[0]).any()
    assert not np.isfinite(found[1]).all()
    # it is in already
    assert not enter_blocked(path, ["t0"])


@pytest.mark.parametrize("names", [["t0"], []])
def test_a_stage_that_would_gain_nothing_stays(tmp_path: Path, names: list[str]) -> None:
    path = tmp_path / "stage1.onnx"
    # with names, no residual branch; without, the value is an input of the network
    write_stage(path, 2, residual=not names)
    before = path.read_bytes()

    assert not enter_blocked(path, names)
    assert path.read_bytes() == before


def test_values_that_are_no_images_stay(tmp_path: Path) -> None:
    path = tmp_path / "stage1.onnx"
    nodes = [node("Tanh", "x", "h"), node("Add", "x h", "y")]
    write_onnx(path, nodes, {"x": ["b", 16]}, {"y": ["b", 16]})

    assert not enter_blocked(path, ["x"])
