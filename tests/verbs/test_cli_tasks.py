"""Tasks that are not classes, through every verb, on data that comes with scikit-learn."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_diabetes, load_digits

import toys
from command_line import Call
from drawn import objects
from impatient.evaluation import Evaluation, Recording
from impatient.evaluation.report import select_examples
from impatient.verbs.run_directory import RunDirectory

TASKS = ["regression:tolerance=0.5", "binary", "multi_label"]


def arrays(task: str) -> dict[str, np.ndarray]:
    if task.startswith("regression"):
        table = load_diabetes()
        x = table.data.astype(np.float32)
        y = ((table.target - table.target.mean()) / table.target.std()).astype(np.float32)[:, None]
    else:
        table = load_digits()
        x = (table.data / 16).astype(np.float32)
        # even; and which strokes: even, above four, a multiple of three
        facts = [table.target % 2 == 0, table.target > 4, table.target % 3 == 0]
        y = np.stack(facts[: 1 if task == "binary" else 3], 1).astype(np.float32)
    train = np.random.default_rng(0).permutation(len(x)) < 0.8 * len(x)
    return {"x_train": x[train], "y_train": y[train], "x_test": x[~train], "y_test": y[~train]}


def alone(*arguments: object) -> str:
    """Run the command line in a process of its own."""
    paths = [str(Path(toys.__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", "from impatient.cli import main; main()", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=TASKS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    found = arrays(request.param)
    np.savez(folder / "data.npz", **found)
    run = folder / "run"
    model = f"toys:mlp:inputs={found['x_train'].shape[1]}"
    recipe = ["--epochs", 15, "--batch-size", 32, "--lr", 0.05, "--quiet"]
    data = ["--data", f"npz:{folder / 'data.npz'}", "--task", request.param]
    alone("train", run, *data, "--model", model, "--after", "0,1", *recipe)
    alone("profile", run, "--repeats", 20, "--trust", "toys")
    alone("record", run, "--quiet", "--trust", "toys")
    return run


def test_every_verb_speaks_of_the_tasks_own_quality(trained: Path) -> None:
    recording = Recording.load(trained / "recordings" / "test.safetensors")
    score = ["--score", "agreement"] if recording.task.startswith("regression") else []
    alone("fit", trained, "--max-loss", 5, *score)
    alone("evaluate", trained, "--trust", "toys")
    evaluation = Evaluation.load(trained / "evaluation.json")
    assert evaluation["exit 2"].accuracy.value == pytest.approx(float(recording.quality[2].mean()))
    assert evaluation["exit 2"].metrics
    alone("report", trained, "--trust", "toys")
    page = (trained / "report.html").read_text()
    assert ("Predicted against true" in page) == recording.task.startswith("regression")
    np.save(trained / "x.npy", np.load(trained.parent / "data.npz")["x_test"][0])
    [answer] = json.loads(alone("run", trained, trained / "x.npy", "--json", "--trust", "toys"))
    assert answer["probability"] is None
    expected = {"binary": r"(yes|no) \(\d+ %\)", "multi_label": r"none|class \d(, class \d)*"}
    assert re.fullmatch(expected.get(recording.task, r"-?[\d.]+"), answer["answer"])


def test_a_loop_is_trained_and_run_from_the_command_line(call: Call, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    clean = draw.random((120, 1, 6, 6)).astype(np.float32)
    noisy = clean + 0.3 * draw.normal(size=clean.shape).astype(np.float32)
    parts = {"x_train": noisy[:100], "x_test": noisy[100:]}
    np.savez(tmp_path / "data.npz", **parts, y_train=clean[:100], y_test=clean[100:])
    np.save(tmp_path / "x.npy", noisy[0])
    run = tmp_path / "run"
    train = ["train", run, "--data", f"npz:{tmp_path / 'data.npz'}:layout=NCHW", "--quiet"]
    train += ["--model", "toys:refiner", "--task", "regression", "--epochs", 1, "--no-exit-free"]
    train += ["--after", "calls:step", "--heads", "identity", "--lr", 0.01]
    # the second time it is found to be trained
    for arguments in (train, train, ["profile", run, "--trust", "toys", "--repeats", 5]):
        code, printed = call(*arguments)
        assert code == 0, printed
    code, printed = call("run", run, tmp_path / "x.npy", "--json", "--trust", "toys")
    assert code == 0, printed
    assert RunDirectory(run).spec().after == ("step@0", "step@1")


HOSTILE = "<script>alert(1)</script>"


def test_boxes_are_drawn_in_the_report_and_beside_answers(call: Call, tmp_path: Path) -> None:
    (x, y), (x_test, y_test) = objects(60, 0), objects(40, 1)
    arrays = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}
    # bytes, as pictures are
    for split in ("train", "test"):
        bright = (arrays[f"x_{split}"].clamp(0, 1) * 255).byte()
        arrays[f"x_{split}"] = bright
    names = np.array([HOSTILE, "hollow"])
    np.savez(tmp_path / "data.npz", class_names=names, **{k: v.numpy() for k, v in arrays.items()})
    np.save(tmp_path / "x.npy", arrays["x_test"][0].numpy())
    run, trust = tmp_path / "run", ("--trust", "drawn")
    train = ["--data", f"npz:{tmp_path / 'data.npz'}:layout=NCHW", "--task", "detection", "--quiet"]
    train += ["--model", "drawn:Detector", "--after", "layers.0,layers.1", "--epochs", 1]
    for arguments in (
        # a threshold at which something is found without much training
        ["train", run, *train, "--optimizer", "adamw", "--lr", 0.002, "--no-exit-free"],
        ["profile", run, "--repeats", 5, *trust],
        ["record", run, "--quiet", *trust],
        ["fit", run, "--max-loss", 5],
        ["evaluate", run, *trust],
        ["report", run, *trust],
        ["run", run, tmp_path / "x.npy", "--pictures", tmp_path / "seen", *trust],
    ):
        code, printed = call(*arguments)
        assert code == 0, printed
    page = (run / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 250_000
    assert HOSTILE not in page
    # every picture beside what is true, and what each of three exits says
    ran = RunDirectory(run)
    early, late = select_examples(ran.recording("test"), ran.policy("loss-5"))
    shown = len(early) + len(late)
    assert shown >= 8
    assert page.count('class="layer"') >= 2 * shown
    assert page.count('"layer":"data:image/png;base64,') == 3 * shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    with Image.open(tmp_path / "seen" / "0-x.png") as seen:
        assert seen.size == (16, 16)
    code, printed = call("run", run, tmp_path / "x.npy", "--json", *trust)
    assert code == 0
    assert '"answer"' in printed
