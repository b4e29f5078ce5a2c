"""The table of tasks: what is drawn is what the targets say, and a row is made by commands."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def table(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tasks")


def test_the_boxes_are_those_of_the_masks(table: ModuleType) -> None:
    images, masks, boxes = table.task_data._shapes(np.zeros((40, 32, 32, 3), np.uint8), 0)
    assert set(np.unique(masks)) == {0, 1, 2, 3}
    drawn = 0
    for image, mask, rows in zip(images, masks, boxes, strict=True):
        assert not image[mask == 0].any()
        for kind, right, down, width, height in rows[rows[:, 0] >= 0]:
            low = np.round([32 * (down - height / 2), 32 * (right - width / 2)]).astype(int)
            high = np.round([32 * (down + height / 2), 32 * (right + width / 2)]).astype(int)
            inside = mask[low[0] : high[0], low[1] : high[1]] == kind + 1
            # a shape reaches all sides of its box
            assert all(inside.any(axis)[[0, -1]].all() for axis in (0, 1))
            drawn += 1
    assert drawn > 40


def test_a_row_is_trained_judged_and_run_by_commands(table: ModuleType, tmp_path: Path) -> None:
    source = table.task_data.Source(None, share=0.01)
    table.train_case("numbers", 0, source, tmp_path, epochs=1)
    table.judge_case("numbers", 0, tmp_path, repeats=5)
    run = tmp_path / "numbers" / "seed-0"
    table.write_json(run / "onnx.json", {"refused": {"export": "no reason"}, "commands": []})
    row = table.row_of(run)
    assert len(row["quality"]) == len(row["ms"]) == 4
    assert row["asked"] == 32
    # trained alike, and judged on the same samples
    assert row["alone_metrics"].keys() == row["metrics"].keys() == {"RMSE", "MAE", "R2"}
    written = table.page([row])
    low, high = row["interval"][-1]
    last = f"{100 * row['quality'][-1]:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    assert f"| {last} | {100 * row['alone']:.1f} |" in written
    assert "* numbers, `export --engine onnxruntime`: no reason" in written
