"""The papers' runs: jobs, data, numbers, and the smoke scale of Impatient DNNs from end to end."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from impatient import Data, budgets, load_data
from impatient.errors import DataError, StorageError
from papers import data
from papers.impatient_dnn import recipe, tables
from papers.impatient_dnn.__main__ import main
from papers.jobs import Job, JobsFailed, run_jobs
from papers.results import csv_text, fill, markdown, spread
from smoke_runs import invoke

ROOT = Path(__file__).parents[2]

# jobs run in processes of their own: their functions must lie in a module those can import
TASKS = """
import os, threading, torch

def square(number, folder):
    with (folder / "runs.txt").open("a") as file:
        file.write("x")
    if number < 0:
        raise ValueError(f"{number} is negative")
    return {"square": number**2, "threads": torch.get_num_threads()}

def vanish(folder):
    os._exit(3)

def wait(folder):
    (folder / "checkpoint").write_text("begun")
    try:
        os.write(1, b"waiting\\n")  # at once: two processes share the pipe
        threading.Event().wait(60.0)
    except KeyboardInterrupt:
        (folder / "checkpoint").write_text("saved")
        raise
    return {}
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "paper_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("paper_tasks", None)
    import paper_tasks

    yield paper_tasks
    del sys.modules["paper_tasks"]


def times_run(folder: Path, name: str) -> int:
    return len((folder / name / "runs.txt").read_text())


def test_results_are_kept_and_only_the_missing_one_is_run_again(tasks, tmp_path):
    jobs = [Job(f"square-{number}", tasks.square, {"number": number}) for number in (2, 3)]
    first = run_jobs(jobs, tmp_path / "runs", workers=1)
    assert [result["square"] for result in first.values()] == [4, 9]
    (tmp_path / "runs" / "square-3" / "result.json").unlink()
    assert run_jobs(jobs, tmp_path / "runs", workers=1) == first
    assert [times_run(tmp_path / "runs", job.name) for job in jobs] == [1, 2]


def test_a_damaged_result_is_made_again(tasks, tmp_path):
    job = Job("square", tasks.square, {"number": 2})
    run_jobs([job], tmp_path, workers=1)
    (tmp_path / "square" / "result.json").write_text("{")
    assert run_jobs([job], tmp_path, workers=1)["square"]["square"] == 4


def test_other_arguments_run_the_job_again_without_the_old_files(tasks, tmp_path):
    run_jobs([Job("square", tasks.square, {"number": 2})], tmp_path, workers=1)
    (tmp_path / "square" / "checkpoint.safetensors").write_text("of the old arguments")
    assert (
        run_jobs([Job("square", tasks.square, {"number": 5})], tmp_path, workers=1)["square"][
            "square"
        ]
        == 25
    )
    assert not (tmp_path / "square" / "checkpoint.safetensors").exists()
    assert times_run(tmp_path, "square") == 1


def test_a_failure_is_named_after_the_others_have_finished(tasks, tmp_path):
    jobs = [Job("bad", tasks.square, {"number": -1}), Job("good", tasks.square, {"number": 2})]
    with pytest.raises(
        JobsFailed, match=r"1 of 2 jobs failed(.|\n)*bad: ValueError: -1 is negative"
    ):
        run_jobs(jobs, tmp_path, workers=1)
    assert json.loads((tmp_path / "good" / "result.json").read_text())["result"]["square"] == 4
    # the traceback
    assert "square" in (tmp_path / "bad" / "error.txt").read_text()


def test_processes_of_their_own_report_errors_and_deaths_and_keep_the_rest(tasks, tmp_path):
    jobs = [
        Job("bad", tasks.square, {"number": -1}),
        Job("dead", tasks.vanish, {}),
        Job("good", tasks.square, {"number": 2}),
    ]
    with pytest.raises(JobsFailed) as failure:
        run_jobs(jobs, tmp_path, workers=3, threads=1)
    assert "bad: ValueError: -1 is negative" in str(failure.value)
    assert "dead: its process ended with code 3" in str(failure.value)
    assert json.loads((tmp_path / "good" / "result.json").read_text())["result"] == {
        "square": 4,
        "threads": 1,
    }


def test_ctrl_c_stops_the_workers_cleanly(tasks, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "from pathlib import Path\nimport signal\nimport paper_tasks\n"
        "from papers.jobs import Job, run_jobs\n"
        "if __name__ == '__main__':\n"
        # a shell starts its background commands, and so these tests, deaf to SIGINT
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    jobs = [Job(name, paper_tasks.wait, {}) for name in ('one', 'two', 'three')]\n"
        "    try:\n        run_jobs(jobs, Path('runs'), workers=2)\n"
        "    except KeyboardInterrupt:\n        print('stopped', flush=True)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        try:
            assert [process.stdout.readline(), process.stdout.readline()] == ["waiting\n"] * 2
            process.send_signal(signal.SIGINT)
            # ends only when the workers, which share the pipe, have ended too
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert out == "stopped\n"
    assert [(tmp_path / "runs" / name / "checkpoint").read_text() for name in ("one", "two")] == [
        "saved"
    ] * 2
    assert not (tmp_path / "runs" / "three").exists()
    assert not list(tmp_path.glob("runs/*/result.json"))


def test_fingerprints_follow_arguments_and_function_but_not_their_order(tasks):
    base = Job("job", tasks.square, {"number": 1, "recipe": recipe.SCALES["smoke"].settings})
    assert (
        base.fingerprint()
        == Job("other", tasks.square, dict(reversed(base.arguments.items()))).fingerprint()
    )
    others = [
        Job("job", tasks.vanish, base.arguments),
        Job("job", tasks.square, {**base.arguments, "number": 2}),
        Job("job", tasks.square, {**base.arguments, "recipe": recipe.SCALES["cpu"].settings}),
    ]
    assert len({job.fingerprint() for job in (base, *others)}) == 4
    with pytest.raises(TypeError, match="Tensor"):
        Job("job", tasks.square, {"number": torch.zeros(1)}).fingerprint()


def test_two_jobs_of_one_name_are_refused(tasks, tmp_path):
    job = Job("same", tasks.square, {"number": 1})
    with pytest.raises(ValueError, match="same"):
        run_jobs([job, job], tmp_path, workers=1)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=60), st.integers(1, 60), st.integers(0, 5))
def test_a_subset_is_as_balanced_as_can_be(labels, count, seed):
    labels = np.array(labels)
    chosen = data._balanced(labels, min(count, len(labels)), seed)
    assert len(set(chosen)) == min(count, len(labels))
    there = np.bincount(labels, minlength=4)
    taken = np.bincount(labels[chosen], minlength=4)
    # a class that could still give is at most one behind any other
    for mine in range(4):
        assert taken[mine] == there[mine] or taken[mine] >= taken.max() - 1


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def test_a_subset_changes_the_fingerprint_and_leaves_the_test_split(digits):
    small = data.subset(digits, 100, seed=1, validation=50)
    assert [small.size(split) for split in ("train", "validation", "test")] == [
        100,
        50,
        digits.size("test"),
    ]
    assert torch.bincount(small.examples("train").labels).tolist() == [10] * 10
    again = data.subset(digits, 100, seed=1, validation=50)
    other = data.subset(digits, 100, seed=2, validation=50)
    assert small.fingerprint == again.fingerprint
    assert torch.equal(small.examples("train").inputs, again.examples("train").inputs)
    assert len({small.fingerprint, other.fingerprint, digits.fingerprint}) == 3
    assert data.subset(digits, None, seed=0) is digits
    # of the test split all seeds are judged on the same part
    parts = [data.subset(digits, None, seed=seed, test=90) for seed in (1, 2)]
    assert [part.size("test") for part in parts] == [90, 90]
    assert torch.equal(parts[0].examples("test").labels, parts[1].examples("test").labels)
    assert parts[0].size("train") == digits.size("train")


def test_without_the_shared_folder_the_error_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("IMPATIENT_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "nowhere"))):
        data.data_spec("fashion", tmp_path)
    assert data.data_spec("digits", tmp_path) == "digits"


LOAD = """
import numpy as np

def images(name, folder, want=("x", "y")):
    x = np.zeros((40, 32, 32, 3), np.uint8)
    x[:, 2:30, 2:30] = (10, 20, 30)
    y = (np.arange(40) % 4).astype(np.uint8)
    return x, y, x[:8], y[:8]
"""


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "load.py").write_text(LOAD)
    for part, tracks in (("a", np.arange(20) // 10), ("b", 2 + np.arange(20) // 10)):
        np.savez(folder / f"gtsrb32_train_{part}.npz", track_train=tracks.astype(np.uint8))
    monkeypatch.setenv("IMPATIENT_DATA", str(folder))
    return folder


def test_shared_images_are_converted_once(shared, tmp_path):
    spec = data.data_spec("cifar10", tmp_path / "data")
    assert load_data(spec).example().shape == (1, 3, 32, 32)
    (shared / "load.py").unlink()
    assert data.data_spec("cifar10", tmp_path / "data") == spec


def test_grey_cifar_is_the_middle_in_luma(shared, tmp_path):
    raw = load_data(data.data_spec("cifar10_grey", tmp_path)).examples("test").take([0])
    assert raw.shape == (1, 1, 28, 28)
    assert set(raw.flatten().tolist()) == {round(0.299 * 10 + 0.587 * 20 + 0.114 * 30)}


def test_gtsrb_is_split_by_track(shared, tmp_path):
    with np.load(data.data_spec("gtsrb", tmp_path).removeprefix("npz:")) as arrays:
        # 4 classes x 4 tracks
        assert len(np.unique(arrays["groups_train"])) == 16
        assert len(arrays["groups_train"]) == len(arrays["y_train"])


def test_a_spread_is_mean_and_sample_deviation():
    assert (spread([1.0, 2.0, 4.0]).mean, spread([1.0, 2.0, 4.0]).deviation) == pytest.approx(
        (7 / 3, 1.5275252)
    )
    assert (spread([0.25]).text(2), spread([1.0, 3.0]).text(sign=True)) == ("0.25", "+2.0 ± 1.4")


def test_rows_become_csv_and_markdown():
    rows = [{"name": "a", "value": 1 / 3}, {"name": "b", "value": 2.0}]
    assert csv_text(rows) == "name,value\na,0.333333\nb,2\n"
    assert markdown(rows).splitlines()[1:3] == ["|---|---|", f"| a | {1 / 3} |"]


def test_a_card_is_filled_between_its_marks_and_again(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("before\n<!-- cpu -->\nold\n<!-- /cpu -->\nafter\n")
    for text in ("new", "newer"):
        fill(card, "cpu", text)
        assert card.read_text() == f"before\n<!-- cpu -->\n{text}\n<!-- /cpu -->\nafter\n"
    with pytest.raises(StorageError, match="<!-- gpu -->"):
        fill(card, "gpu", "text")


@given(
    st.sampled_from(recipe.ROWS),
    st.lists(
        st.tuples(st.floats(0.01, 1.0), st.floats(0.0, 1.0)),
        min_size=1,
        max_size=5,
        unique_by=lambda pair: pair[0],
    ),
)
def test_expected_accuracy_is_that_of_the_deepest_exit_every_budget_pays_for(row, exits):
    budget = budgets.standard(1.0)[row]
    edges = np.linspace(0.0, 1.0, 2001)
    mass = np.diff(budget.probability_below(edges))
    # of the exits that fit, the deepest; none fits: a failure
    right = [
        next((accuracy for cost, accuracy in reversed(exits) if cost <= time), 0.0)
        for time in (edges[:-1] + edges[1:]) / 2
    ]
    costs, accuracies = zip(*exits, strict=True)
    assert tables.expected_percent(budget, costs, accuracies) == pytest.approx(
        100 * float(mass @ right), abs=1.0
    )


PAIR = recipe.Pair(name="toy", target="digits", source="digits", network="impatient:vgg", blocks=2)


def known_results(joint: float) -> dict[str, dict]:
    part = {"mean": 1.0, "p50": 1.0, "p90": 1.0, "p99": 1.0, "p999": 1.0, "max": 1.0, "n": 1}
    costs = {
        "exits": ["blocks.0", "output"],
        "stage_macs": [1, 1],
        "head_macs": [1, 0],
        "stage_parameters": [1, 1],
        "head_parameters": [1, 0],
        "batches": {
            "1": {"stages": [part, part], "heads": [part, {**part, "mean": 0.0}], "exit_free": part}
        },
        "provenance": {"versions": {}, "created": "", "schema": 1, "processor": "abacus"},
    }
    one = {"test": [0.5, 0.7], "validation": [0.5, 0.7]}
    results = {
        "toy-costs": costs,
        "toy-orig-0": one,
        "toy-ft-0": {
            "test": [0.4, 0.9],
            "validation": [0.4, 0.9],
            "alone": {"test": [0.8], "validation": [0.8]},
        },
    }
    return results | {
        f"toy-joint-{row}-0": {"test": [joint, 0.8], "validation": [joint, 0.8]}
        for row in recipe.ROWS
    }


def test_table_1_from_known_results():
    # one second per stage and per head: anytime 2 and 3 s, a priori 2 and 2 s, alone 1 s; budgets
    # up to 3.75 s
    rows = tables.per_seed([PAIR], known_results(0.6), [0])
    uniform = next(row for row in rows if row["budgets"] == "uniform")
    to_first = 1.0 / 3.75
    to_last = 0.75 / 3.75
    assert uniform["orig"] == pytest.approx(100 * (to_first * 0.5 + to_last * 0.7))
    assert uniform["ft"] == pytest.approx(100 * (to_first * 0.4 + to_last * 0.9))
    assert uniform["joint"] == pytest.approx(100 * (to_first * 0.6 + to_last * 0.8))
    # exit 0 costs as much as the deeper one
    assert uniform["joint_a_priori"] == pytest.approx(100 * 1.75 / 3.75 * 0.8)
    assert uniform["no_exits"] == pytest.approx(100 * 2.75 / 3.75 * 0.8)
    assert uniform["t_a_ms"] == pytest.approx(
        1e3 * (2 * to_first + 3 * to_last) / (to_first + to_last)
    )
    assert uniform["t_b_ms"] == pytest.approx(2e3)
    # 2 of 3.75 s buy no answer, which no method can change
    row = next(row for row in tables.summarised(rows) if row["budgets"] == "uniform")
    assert row["answered"] == pytest.approx(100 * (to_first + to_last))
    assert row["gain_answered"].mean == pytest.approx(row["gain"].mean / (to_first + to_last))
    assert f"{row['gain_answered'].mean:+.1f}" in tables.table1([row])


def test_rows_whose_runs_have_not_ended_are_left_out():
    results = known_results(0.6)
    del results["toy-joint-normal-0"]
    rows = tables.per_seed([PAIR], results, [0])
    assert [row["budgets"] for row in rows] == [row for row in recipe.ROWS if row != "normal"]
    methods = {row["method"] for row in tables.per_exit([PAIR], results, [0])}
    assert methods == {"orig", "ft", *(f"joint-{row}" for row in recipe.ROWS if row != "normal")}


def test_the_verdict_follows_the_numbers():
    def spoken(joint: float) -> str:
        return tables.verdict(tables.summarised(tables.per_seed([PAIR], known_results(joint), [0])))

    assert re.search(
        r"beats the better baseline in every row: \*\*yes\*\*.* in 4 of 4 rows", spoken(0.9)
    )
    assert re.search(r"every row: \*\*no\*\*.* in 0 of 4 rows.* Not in: toy uniform", spoken(0.1))


@pytest.mark.parametrize(
    ("gains", "answered", "verdict"),
    [
        ((1.0, 1.0, 2.0, 1.0), 50.0, "yes"),
        ((3.0, 1.0, 1.0, 1.0), 50.0, "no"),
        # per answered budget 2.2 points, more than in any other row
        ((2.0, 1.0, 1.1, 1.0), 50.0, "not testable here"),
        # the others have not ended
        ((None, None, 1.0, None), 50.0, "not testable here"),
        ((None, 2.0, 1.0, 1.0), 50.0, "not testable here"),
    ],
)
def test_most_for_small_budgets_depends_on_what_buys_no_answer(gains, answered, verdict):
    rows = [
        {
            **dict.fromkeys(("orig", "ft", "joint_a_priori", "no_exits", "t_b_ms", "t_a_ms"), 0.0),
            "pair": "toy",
            "budgets": budgets,
            "joint": gain,
            "answered": answered if budgets == "small_likely" else 100.0,
        }
        for budgets, gain in zip(recipe.ROWS, gains, strict=True)
        if gain is not None
    ]
    assert f"are likely: **{verdict}**" in tables.verdict(tables.summarised(rows))


def test_the_papers_gains_are_those_of_its_table():
    assert [
        round(tables._paper_gain(row), 1)
        for row in ("uniform", "large_likely", "small_likely", "normal")
    ] == [
        5.9,
        2.6,
        9.5,
        7.5,
    ]


def smoke(out: Path, runs: Path) -> str:
    result = invoke(main, ["--scale", "smoke", "--out", str(out), "--runs", str(runs)])
    assert result.exit_code == 0, result.output
    return result.output


def test_impatient_dnn_runs_from_end_to_end_and_resumes(tmp_path):
    printed = smoke(tmp_path / "out", tmp_path / "runs")
    # whole, however wide
    assert printed.endswith((tmp_path / "out" / "table1.md").read_text())
    assert "Joint training beats the better baseline" in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "table1.csv",
        "table1_seeds.csv",
        "table1.md",
        "table1.png",
        "exits.csv",
        "exits.png",
    }
    with (tmp_path / "out" / "table1_seeds.csv").open() as file:
        rows = list(csv.DictReader(file))
    # two networks, one seed
    assert [row["budgets"] for row in rows] == [*recipe.ROWS] * 2
    assert all(0.0 < float(row[name]) < 100.0 for row in rows for name in ("orig", "ft", "joint"))
    assert all(float(row["t_b_ms"]) <= float(row["t_a_ms"]) for row in rows)

    results = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("smoke/*/result.json")
    }
    gone = tmp_path / "runs" / "smoke" / "digits-resnet-joint-normal-0" / "result.json"
    before = json.loads(gone.read_text())["result"]
    gone.unlink()
    smoke(tmp_path / "again", tmp_path / "runs")
    changed = [path for path, written in results.items() if path.stat().st_mtime_ns != written]
    assert changed == [gone]
    # seeded
    assert json.loads(gone.read_text())["result"] == before
    assert not list((tmp_path / "runs").rglob("checkpoint*"))


def test_failed_runs_end_the_command_with_their_names(tmp_path, monkeypatch):
    def fail(**_: object) -> dict:
        raise DataError("no such data")

    monkeypatch.setattr(recipe, "measure_costs", fail)
    result = invoke(main, ["--scale", "smoke", "--out", str(tmp_path), "--runs", str(tmp_path)])
    assert result.exit_code == 1
    assert "digits-vgg-costs: DataError: no such data" in result.output
    published = invoke(main, ["--scale", "smoke", "--runs", str(tmp_path), "--publish"])
    assert published.exit_code == 1
    assert "no row is finished yet" in published.output


def test_the_card_has_room_for_both_scales():
    card = (ROOT / "papers" / "impatient_dnn" / "README.md").read_text()
    assert all(f"<!-- {mark}{scale} -->" in card for scale in ("cpu", "gpu") for mark in ("", "/"))
