"""A task that the data contradict is refused before anything is trained or written."""

import re
from pathlib import Path

import numpy as np
import pytest

from command_line import Call
from impatient.tasks import READY

COUNT, TEST = 80, 20
CLASSES = np.arange(COUNT) % 10
DRAW = np.random.default_rng(0)
ROWS = np.zeros((COUNT, 2, 5), dtype=np.float32)
ROWS[:, 0, 1:] = 0.5
ROWS[:, 1, 0] = -1
# what targets are, as an error has to say it, and the tasks that they are right for
TARGETS: dict[str, tuple[np.ndarray, str, set[str]]] = {
    "classes": (CLASSES, r"shape \(\d+,\)|from 0 to 9", {"classification"}),
    "yes or no": (CLASSES % 2, r"shape \(\d+,\)", {"classification", "binary"}),
    "labels": (
        DRAW.integers(2, size=(COUNT, 3)).astype(np.float32),
        r"shape \(\d+, 3\)",
        {"multi_label", "regression", "embedding"},
    ),
    "one number": (
        DRAW.normal(size=COUNT).astype(np.float32),
        r"shape \(\d+,\)|from -\d",
        {"regression"},
    ),
    "numbers": (
        DRAW.normal(size=(COUNT, 2)).astype(np.float32),
        r"shape \(\d+, 2\)|other than 0 and 1",
        {"regression", "embedding"},
    ),
    "masks": (
        DRAW.integers(3, size=(COUNT, 8, 8)),
        r"shape \(\d+, 8, 8\)",
        {"segmentation"},
    ),
    "boxes": (ROWS, r"shape \(\d+, 2, 5\)", {"detection"}),
}
WRONG = [
    (kind, task) for kind, (_, _, right) in TARGETS.items() for task in READY if task not in right
]
QUICK = ("--exits", 2, "--epochs", 1, "--no-exit-free", "--quiet")


def data_of(targets: np.ndarray, folder: Path) -> tuple[str, str]:
    x = DRAW.random((COUNT, 1, 8, 8)).astype(np.float32)
    parts = {"train": slice(TEST, None), "test": slice(TEST)}
    arrays = {f"x_{split}": x[rows] for split, rows in parts.items()}
    arrays |= {f"y_{split}": targets[rows] for split, rows in parts.items()}
    np.savez(folder / "data.npz", **arrays)
    return "--data", f"npz:{folder / 'data.npz'}:layout=NCHW"


@pytest.mark.parametrize(("kind", "task"), WRONG)
def test_training_says_what_was_given_and_expected(
    kind: str, task: str, tmp_path: Path, call: Call
) -> None:
    targets, given, _ = TARGETS[kind]
    run = tmp_path / "run"
    code, said = call("train", run, *data_of(targets, tmp_path), "--task", task, *QUICK)
    assert code == 1
    assert re.search(f"targets (of )?({given}).*expected", said), said
    assert not run.exists()


@pytest.mark.parametrize("kind", ["labels", "numbers"])
def test_what_may_be_meant_in_several_ways_is_taken(kind: str, tmp_path: Path, call: Call) -> None:
    targets, _, right = TARGETS[kind]
    for task in right:
        data = data_of(targets, tmp_path)
        assert call("train", tmp_path / task, *data, "--task", task, *QUICK)[0] == 0


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_model_of_classes_is_refused_where_outputs_are_more(
    task: str, tmp_path: Path, call: Call
) -> None:
    kind = {"segmentation": "masks", "detection": "boxes"}[task]
    run = tmp_path / "run"
    code, said = call("train", run, *data_of(TARGETS[kind][0], tmp_path), "--task", task, *QUICK)
    assert code == 1
    assert re.search(r"an output of shape \(1, \d\); expected", said), said
    assert not run.exists()


def test_all_classes_at_the_top_are_refused_before_training(tmp_path: Path, call: Call) -> None:
    run = tmp_path / "run"
    code, said = call("train", run, *data_of(CLASSES, tmp_path), "--top", 10, *QUICK)
    assert code == 1
    assert "there are 10 classes; expected fewer than 10" in said
    assert not run.exists()


def test_an_old_run_survives_a_task_that_does_not_fit(tmp_path: Path, call: Call) -> None:
    run, data = tmp_path / "run", data_of(CLASSES, tmp_path)
    assert call("train", run, *data, *QUICK)[0] == 0
    before = {file.name: file.read_bytes() for file in run.glob("*.*")}
    assert call("train", run, *data, "--task", "binary", "--restart", *QUICK)[0] == 1
    assert {file.name: file.read_bytes() for file in run.glob("*.*")} == before


@pytest.mark.parametrize(
    ("targets", "way"),
    [
        (np.eye(10)[CLASSES], "say labels=onehot in --data"),
        (CLASSES.astype(np.float32), "If the numbers are classes, save them as integers"),
    ],
)
def test_targets_that_may_be_classes_are_refused_with_both_readings(
    targets: np.ndarray, way: str, tmp_path: Path, call: Call
) -> None:
    run = tmp_path / "run"
    data = data_of(targets, tmp_path)
    code, said = call("train", run, *data, *QUICK)
    assert code == 1
    assert "say --task" in said
    assert way in " ".join(said.split())
    if "onehot" in way:
        assert call("train", run, data[0], f"{data[1]},labels=onehot", *QUICK)[0] == 0
