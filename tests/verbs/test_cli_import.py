"""Outputs that another program computed, from one file to the report."""

import re
from pathlib import Path

import numpy as np
import pytest

from command_line import Call
from impatient import CostProfile, Evaluation, Recording
from impatient.evaluation import evaluate
from recordings import drawn

EXITS = 4
Arrays = dict[str, np.ndarray]
COSTS = ("--costs-ms", "1,2,3,4")


def classes(samples: int = 400) -> Arrays:
    """Logits of four exits, the first half for fitting."""
    recording = drawn(samples, seed=3)
    half = np.arange(samples) < samples // 2
    return {
        "outputs": recording.logits().numpy(),
        "targets": recording.labels.numpy(),
        "splits": np.where(half, "validation", "test"),
    }


def numbers() -> Arrays:
    """Estimates of three exits, each nearer to the truth."""
    random = np.random.default_rng(0)
    truth = random.normal(size=300)
    errors = random.normal(size=(3, 300)) * np.array([[1.0], [0.4], [0.1]])
    outputs = (truth + errors)[..., None]
    return {
        "validation_outputs": outputs[:, :150],
        "validation_targets": truth[:150],
        "test_outputs": outputs[:, 150:],
        "test_targets": truth[150:],
    }


def saved(folder: Path, arrays: Arrays) -> Path:
    np.savez(folder / "outputs.npz", **arrays)
    return folder / "outputs.npz"


def test_classes_go_through_every_step_up_to_the_report(tmp_path: Path, call: Call) -> None:
    arrays = classes()
    run = tmp_path / "run"
    code, said = call("import", saved(tmp_path, arrays), "--into", run, *COSTS)
    assert code == 0, said
    right = (arrays["outputs"].argmax(-1) == arrays["targets"])[:, 200:].mean(1)
    assert f"{right[0] * 100:.1f}" in said
    assert f"{right[-1] * 100:.1f}" in said
    for verb in (
        ["fit", run, "--max-loss", "2"],
        ["fit", run, "--max-loss", "20", "--delta", "0.1", "--name", "sure"],
        ["evaluate", run, "--budget", "uniform:0:5"],
        ["report", run],
        ["compare", run, run],
        ["show", run],
    ):
        code, said = call(*verb)
        assert code == 0, said
    assert "all is up to date" in said
    evaluation = Evaluation.load(run / "evaluation.json")
    assert [row.accuracy.value for row in evaluation.of("exit")] == pytest.approx(right.tolist())
    assert [row.contract_s for row in evaluation.of("exit")] == pytest.approx(
        [0.001, 0.002, 0.003, 0.004]
    )
    assert {row.name for row in evaluation.of("policy")} == {"loss-2", "sure"}
    page = (run / "report.html").read_text(encoding="utf-8")
    # nothing is said of what nobody counted
    assert 'scope="col">MACs' not in page
    assert "as they were given" in page


def test_other_tasks_and_measured_profiles_are_taken(tmp_path: Path, call: Call) -> None:
    CostProfile.of(stages_s=[0.001, 0.002, 0.001], heads_s=[0.0001] * 3).save(tmp_path / "p.json")
    run = tmp_path / "run"
    task = ("--task", "regression:tolerance=0.5", "--profile", tmp_path / "p.json")
    code, said = call("import", saved(tmp_path, numbers()), "--into", run, *task)
    assert code == 0, said
    for verb in (["fit", run, "--max-loss", "5", "--score", "agreement"], ["evaluate", run]):
        code, said = call(*verb)
        assert code == 0, said
    evaluation = Evaluation.load(run / "evaluation.json")
    arrays = numbers()
    error = arrays["test_outputs"][-1, :, 0] - arrays["test_targets"]
    assert evaluation["exit 2"].metrics["RMSE"] == pytest.approx(np.sqrt((error**2).mean()), 1e-5)
    code, said = call("report", run)
    assert code == 0, said


def test_python_takes_all_samples_together_and_judges_them_alike() -> None:
    arrays = classes()
    found = Recording.of_splits(arrays["outputs"], arrays["targets"], arrays["splits"].tolist())
    alone = Recording.of(arrays["outputs"][:, 200:], arrays["targets"][200:], split="test")
    assert found["test"].quality.equal(alone.quality)
    costs = CostProfile.of(cumulative_s=[1e-3, 2e-3, 3e-3, 4e-3])
    judged = evaluate(found["test"], costs)["exit 3"].accuracy.value
    assert judged == pytest.approx(float(alone.quality[3].double().mean()))


def test_splits_have_their_usual_names(tmp_path: Path, call: Call) -> None:
    own = classes()
    others = {"validation": "Val", "test": "Testing"}
    renamed = np.array([others.get(name, name) for name in own["splits"].tolist()])
    for name, arrays in (("own", own), ("renamed", own | {"splits": renamed})):
        file = saved(tmp_path, arrays)
        assert call("import", file, "--into", tmp_path / name, *COSTS)[0] == 0
    for split in ("validation", "test"):
        found = [
            Recording.load(tmp_path / name / "recordings" / f"{split}.safetensors")
            for name in ("own", "renamed")
        ]
        assert found[0].quality.equal(found[1].quality)


def test_detections_of_another_program_are_judged_by_their_boxes(
    tmp_path: Path, call: Call
) -> None:
    targets = np.zeros((400, 1, 5), dtype=np.float32)
    targets[..., 1:] = 0.5
    # one query, of two classes and no object: the last exit is right, the others find nothing
    outputs = np.full((EXITS, 400, 1, 7), 0.5, dtype=np.float32)
    outputs[..., :3] = [0.0, 0.0, 9.0]
    outputs[-1, ..., :3] = [9.0, 0.0, 0.0]
    arrays = {**classes(), "outputs": outputs, "targets": targets}
    run = tmp_path / "run"
    code, said = call(
        "import", saved(tmp_path, arrays), "--into", run, *COSTS, "--task", "detection"
    )
    assert code == 0, said
    test = Recording.load(run / "recordings" / "test.safetensors")
    assert test.quality.mean(1).tolist() == [0.0] * (EXITS - 1) + [1.0]


def spoilt(**changes: object) -> Arrays:
    """Arrays of which some are replaced, or with None left out."""
    changed = {name: value for name, value in changes.items() if value is not None}
    return {
        name: value for name, value in {**classes(), **changed}.items() if name not in changes
    } | {name: np.asarray(value) for name, value in changed.items()}


GOOD = classes()
BAD: dict[str, tuple[Arrays, tuple[str, ...], str]] = {
    "turned": (spoilt(outputs=GOOD["outputs"].swapaxes(0, 1)), COSTS, r"swapaxes\(0, 1\)"),
    "too few targets": (spoilt(targets=GOOD["targets"][:9]), COSTS, r"targets of shape \(9,\)"),
    "targets NaN": (spoilt(targets=np.full(400, np.nan)), COSTS, "200 target values are NaN"),
    "outputs NaN": (spoilt(outputs=GOOD["outputs"] * np.nan), COSTS, r"\): exit 0 gives NaN"),
    "absent class": (spoilt(targets=np.full(400, 7)), COSTS, "labels go from 7 to 7 for 5 outputs"),
    "hidden labels": (spoilt(targets=np.full(400, -1)), COSTS, "-1 is among them"),
    "no targets": (spoilt(targets=None), COSTS, "no targets; expected outputs"),
    "no splits": (spoilt(splits=None), COSTS, "no samples of validation and test"),
    "no test": (spoilt(splits=np.full(400, "validation")), COSTS, "no samples of test"),
    "splits as numbers": (spoilt(splits=np.zeros(400)), COSTS, "splits are float64"),
    "probabilities": (
        spoilt(outputs=np.full((EXITS, 400, 5), 0.2)),
        COSTS,
        r"probabilities, .*np\.log",
    ),
    "per cent": (
        spoilt(outputs=np.full((EXITS, 400, 5), 20.0)),
        COSTS,
        r"probabilities, all of which sum to 100; .*np\.log",
    ),
    "two tops": (
        GOOD,
        (*COSTS, "--task", "classification:top=2", "--top", "3"),
        "--task classification:top=2 and --top 3; expected one of them",
    ),
    "too few names": (GOOD, (*COSTS, "--exits", "a,b"), "names 2 exits for outputs of"),
    "a split twice": (
        spoilt(splits=np.where(np.arange(400) < 200, "val", "Validation")),
        COSTS,
        "two of which mean the same",
    ),
    "measured targets": (spoilt(targets=GOOD["targets"] / 2), COSTS, "task='regression'"),
    "another task": (GOOD, (*COSTS, "--task", "binary"), "one number per sample"),
    "labels by column": (GOOD, (*COSTS, "--task", "multi_label"), r"expected both \[B, C\]"),
    "all classes": (GOOD, (*COSTS, "--task", "classification:top=5"), "expected fewer than 5"),
    "numbers": (GOOD, (*COSTS, "--task", "regression"), "expected a number for each output"),
    "vectors": (GOOD, (*COSTS, "--task", "embedding"), r"expected both \[B, D\]"),
    "masks": (GOOD, (*COSTS, "--task", "segmentation"), r"expected .*\[B, C, H, W\]"),
    "boxes": (GOOD, (*COSTS, "--task", "detection"), r"expected \[B, Q, C \+ 1 \+ 4\]"),
    "no costs": (GOOD, (), "0 kinds of costs"),
    "two costs": (GOOD, (*COSTS, "--stages-ms", "1,1,1,1"), "2 kinds of costs"),
    "costs of other exits": (GOOD, ("--costs-ms", "1,2"), "costs of 2 exits for outputs of 4"),
    "falling costs": (GOOD, ("--costs-ms", "1,3,2,4"), "must increase strictly"),
    "names of other classes": (spoilt(class_names=["a", "b"]), COSTS, "2 class_names for outputs"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_refused_and_nothing_is_left(
    kind: str, tmp_path: Path, call: Call
) -> None:
    arrays, options, expected = BAD[kind]
    code, said = call("import", saved(tmp_path, arrays), "--into", tmp_path / "run", *options)
    assert code == 1
    assert re.search(expected, said), said
    assert not (tmp_path / "run").exists()


def test_only_imported_outputs_are_replaced_and_old_policies_go_with_them(
    tmp_path: Path, call: Call
) -> None:
    run = tmp_path / "run"
    file = saved(tmp_path, classes())
    assert call("import", file, "--into", run, *COSTS)[0] == 0
    assert call("fit", run)[0] == 0
    code, said = call("import", file, "--into", run, *COSTS)
    assert code == 1
    assert "--force" in said
    assert call("import", saved(tmp_path, classes(200)), "--into", run, *COSTS, "--force")[0] == 0
    assert not list((run / "policies").glob("*"))
    assert len(Recording.load(run / "recordings" / "test.safetensors")) == 100
    for verb in ("record", "profile", "describe"):
        code, said = call(verb, run)
        assert code == 1
        assert "without their network" in said


def test_the_likeliest_classes_are_counted_from_the_import_on(tmp_path: Path, call: Call) -> None:
    arrays = classes()
    run = tmp_path / "run"
    code, said = call("import", saved(tmp_path, arrays), "--into", run, *COSTS, "--top", 2)
    assert code == 0, said
    likeliest = arrays["outputs"][:, 200:].argsort(-1)[..., -2:]
    right = (likeliest == arrays["targets"][200:, None]).any(-1).mean(1)
    quality = Recording.load(run / "recordings" / "test.safetensors").quality.mean(1)
    assert quality.tolist() == pytest.approx(right.tolist())


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        ("regression", np.arange(400)[:, None] % 7 - 3),
        ("multi_label", np.arange(400)[:, None] % 2),
        ("binary", np.arange(400)[:, None] % 2 == 1),
    ],
)
def test_a_column_of_whole_numbers_is_no_column_of_classes(
    task: str, targets: np.ndarray, tmp_path: Path, call: Call
) -> None:
    # the last exit is right, the others are not
    outputs = np.zeros((EXITS, 400, 1), dtype=np.float32)
    right = targets.astype(np.float32)
    outputs[-1] = right if task == "regression" else 20 * right - 10
    outputs[:-1] = -50 * outputs[-1] - 1
    arrays = {**classes(), "outputs": outputs, "targets": targets}
    run = tmp_path / "run"
    code, said = call("import", saved(tmp_path, arrays), "--into", run, *COSTS, "--task", task)
    assert code == 0, said
    quality = Recording.load(run / "recordings" / "test.safetensors").quality.mean(1)
    assert float(quality[-1]) == pytest.approx(1.0)
    assert (quality[:-1] < 0.5).all()
