"""The command line, from training to answers, and what it says when something is wrong."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import urllib.request
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from command_line import TINY, Call
from fakes import wait_until
from impatient.files import read_json, write_json, write_tensors
from impatient.table import Table
from impatient.terminal import rich_table
from impatient.verbs.network_spec import save_weights
from impatient.verbs.run_directory import RunDirectory


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "three.png"
    Image.fromarray(np.full((20, 30), 128, np.uint8)).save(path)
    return path


def no_temporary_files(directory: Path) -> bool:
    return not list(directory.rglob("*.tmp"))


def test_every_verb_leaves_its_file(finished: Path) -> None:
    for name in (
        "network.json",
        "training.json",
        "weights.safetensors",
        "metrics.csv",
        "profile.json",
        "recordings/test.safetensors",
        "recordings/validation.safetensors",
        "policies/loss-2.json",
        "policies/ms-1000.json",
        "evaluation.json",
        "report.html",
        "exit_free/weights.safetensors",
        "exit_free/recordings/test.safetensors",
    ):
        assert (finished / name).is_file(), name
    assert no_temporary_files(finished)


def test_the_evaluation_always_has_the_networks_without_exits_and_the_oracle(
    finished: Path,
) -> None:
    names = {row["name"] for row in read_json(finished / "evaluation.json")["rows"]}

    assert {"exit 0", "exit 1", "exit 2", "loss-2", "ms-1000", "oracle"} <= names
    assert {"no exits, same weights", "no exits, trained alone"} <= names


def test_answers_for_images(call: Call, finished: Path, picture: Path) -> None:
    code, text = call(
        "run", finished, picture, picture, "--deadline-ms", 10_000, "--policy", "loss-2", "--json"
    )
    answers = json.loads(text)

    assert code == 0
    assert len(answers) == 2
    assert answers[0]["deadline_met"] is True
    assert answers[0]["answer"] in [str(digit) for digit in range(10)]
    assert answers[0]["exit"] in (0, 1, 2)


def test_statistics_of_the_runs_come_with_the_answers(
    call: Call, finished: Path, picture: Path
) -> None:
    command = ("run", finished, picture, picture, "--stats", "--repeats", 3)
    code, text = call(*command, "--deadline-ms", 0.000001, "--json")
    found = json.loads(text)
    assert (code, len(found["answers"])) == (0, 2)
    stats = found["stats"]
    # no rule keeps such a deadline
    assert (stats["runs"], stats["with_deadline"]) == (6, 6)
    assert (stats["missed"], stats["floor"], stats["exits"]) == (1.0, 1.0, {"0": 1.0})
    assert set(stats["spent"]) == {"waiting", "stages", "heads", "decisions", "hand-over"}
    assert sum(stats["spent"].values()) == pytest.approx(1.0)
    assert "first exit alone would have been late" in stats["advice"]

    code, text = call(*command)
    assert code == 0
    assert "6 runs" in text
    assert "floor" not in text
    assert "No run had a deadline" in text


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, "holds NaN or infinite values"),
        (np.zeros((1, 1, 8, 8)), "without a batch dimension"),
    ],
)
def test_inputs_that_are_none_are_refused(
    call: Call, finished: Path, tmp_path: Path, value: Any, said: str
) -> None:
    np.save(
        tmp_path / "x.npy",
        value if isinstance(value, np.ndarray) else np.full((1, 8, 8), value, np.float32),
    )
    code, text = call("run", finished, tmp_path / "x.npy")
    assert (code, said in text) == (1, True)
    code, text = call("run", finished, tmp_path)
    assert (code, "is a folder; name its files" in text) == (1, True)


def test_a_table_of_answers_says_whether_they_were_in_time(
    call: Call, finished: Path, picture: Path
) -> None:
    code, text = call("run", finished, picture, "--deadline-ms", 0.000001)

    assert code == 0
    assert "NO" in text
    assert "[" not in text.replace(str(picture), "")


def test_a_deadline_too_short_raises_when_asked_to(
    call: Call, finished: Path, picture: Path
) -> None:
    code, text = call("run", finished, picture, "--deadline-ms", 0.000001, "--when-late", "raise")

    assert code == 1
    assert "NoAnswerInTime" in text


@pytest.mark.parametrize("option", ["--deadline-ms", "--interrupt-ms"])
@pytest.mark.parametrize("time", ["0", "-5", "nan"])
def test_a_time_that_is_none_is_refused(
    call: Call, finished: Path, picture: Path, option: str, time: str
) -> None:
    code, text = call("run", finished, picture, f"{option}={time}")

    assert code == 2
    assert option in text
    assert "expected a" in text


def test_runs_are_interrupted_and_give_their_latest_answer(
    call: Call, finished: Path, picture: Path
) -> None:
    code, text = call("run", finished, picture, "--interrupt-ms", 0.000001, "--json")
    early = json.loads(text)[0]
    later, text = call("run", finished, picture, "--interrupt-ms", 2000, "--json")
    late = json.loads(text)[0]
    without, text = call("run", finished, picture, "--json")

    assert (code, later, without) == (0, 0, 0)
    assert early["exit"] <= late["exit"] == 2
    assert late["stopped_by"] == "final"
    assert early["back_after_ms"] >= 0
    assert "back_after_ms" not in json.loads(text)[0]


def test_doing_it_again_does_nothing(call: Call, run_dir: Path) -> None:
    before = {
        file: file.stat().st_mtime_ns
        for file in run_dir.rglob("*.safetensors")
        if "checkpoint" not in file.name
    }
    _, profiled = call("profile", run_dir, "--repeats", 30, "--quiet")
    _, recorded = call("record", run_dir, "--quiet")

    assert "up to date" in profiled
    assert recorded.count("up to date") == 4
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in before.items())


def test_training_again_changes_no_weight(call: Call, run_dir: Path) -> None:
    before = load_file(run_dir / "weights.safetensors")
    code, _ = call("train", run_dir, *TINY)
    after = load_file(run_dir / "weights.safetensors")

    assert code == 0
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--model", "impatient:resnet:n=2,c=8"], "--model impatient:resnet:n=1,c=8"),
        (["--exits", "2"], "--exits 3"),
        (["--seed", "1"], "--seed 0"),
        (["--heads", "mlp"], "--heads linear"),
        (["--weights", "sieve"], "--weights uniform"),
        (["--epochs", "4"], "another recipe"),
    ],
)
def test_training_on_with_other_settings_is_refused(
    call: Call, run_dir: Path, change: list[str], said: str
) -> None:
    code, text = call("train", run_dir, *TINY, *change)

    assert code == 1
    assert "StaleInput" in text
    assert said in text


def test_restart_throws_the_old_run_away(call: Call, run_dir: Path) -> None:
    code, _ = call("train", run_dir, *TINY, "--epochs", 1, "--no-exit-free", "--restart")

    assert code == 0
    assert not (run_dir / "evaluation.json").exists()


def retrained(run_dir: Path) -> None:
    run = RunDirectory(run_dir)
    network, _ = run.network()
    with torch.no_grad():
        network.backbone.classifier.bias.add_(1.0)
    save_weights(network, run.weights_file)


@pytest.mark.parametrize(
    ("verb", "remedy"),
    [("fit", "impatient record"), ("evaluate", "impatient record"), ("report", "impatient")],
)
def test_other_weights_make_everything_after_them_stale(
    call: Call, run_dir: Path, verb: str, remedy: str
) -> None:
    retrained(run_dir)
    code, text = call(verb, run_dir)

    assert code == 1
    assert "StaleInput" in text
    assert remedy in text


def test_a_profile_of_another_machine_is_refused_unless_asked_for(
    call: Call, run_dir: Path, picture: Path
) -> None:
    profile = read_json(run_dir / "profile.json")
    profile["provenance"]["processor"] = "abacus"
    write_json(run_dir / "profile.json", profile)
    refused, text = call("run", run_dir, picture)
    allowed, _ = call("run", run_dir, picture, "--any-profile")

    assert (refused, allowed) == (1, 0)
    assert "abacus" in text
    assert "impatient profile" in text


def test_a_profile_with_another_thread_count_is_measured_again(call: Call, run_dir: Path) -> None:
    profile = read_json(run_dir / "profile.json")
    profile["provenance"]["threads"] = 99
    write_json(run_dir / "profile.json", profile)
    _, text = call("profile", run_dir, "--repeats", 20, "--quiet")

    assert "measuring again" in text
    assert read_json(run_dir / "profile.json")["provenance"]["threads"] != 99


@pytest.mark.parametrize("verb", ["profile", "record", "fit", "evaluate", "report"])
def test_a_verb_in_an_empty_folder_says_what_to_run_first(
    call: Call, tmp_path: Path, verb: str
) -> None:
    code, text = call(verb, tmp_path)

    assert code == 1
    assert "impatient train" in text or "impatient evaluate" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "npz:nowhere.npz"], "no data file"),
        (["--data", "nonsense"], "digits, npz:FILE"),
        (["--model", "impatient:nothing"], "one of anytimenet"),
        (["--model", "noname"], "SOURCE:NAME"),
        (["--after", "blocks.0,blocks.7"], "blocks.1"),
        (["--heads", "tail"], "linear"),
        (["--epochs", "0"], "positive"),
        (["--regime", "lazy"], "joint"),
        (["--weights", "heavy"], "uniform"),
        (["--weights", "uniform:5:1"], "low < high"),
        (["--weights", "uniform:nan:1"], "not a number"),
        (["--model", "impatient:resnet:num_classes=7"], "num_classes=10"),
        (["--lr", "nan"], "positive"),
        (["--validation", "2"], "share"),
    ],
)
def test_bad_training_options_are_named(
    call: Call, tmp_path: Path, arguments: list[str], said: str
) -> None:
    code, text = call("train", tmp_path / "run", *TINY, *arguments)

    # what an option cannot take is a usage error
    assert code == (2 if arguments[0] in ("--heads", "--regime", "--validation") else 1)
    assert said in text
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_bad_policy_options_are_named(call: Call, run_dir: Path) -> None:
    code, text = call("fit", run_dir, "--score", "guess")
    assert (code, "max_probability, margin, entropy" in text) == (1, True)
    assert "cannot be reached" in call("fit", run_dir, "--mean-ms", "0.000001")[1]
    assert "exactly one target" in call("fit", run_dir, "--mean-ms", "1", "--max-loss", "1")[1]
    policies = sorted((run_dir / "policies").iterdir())
    assert "name their --learner" in call("fit", run_dir, "--inputs", "features")[1]
    assert sorted((run_dir / "policies").iterdir()) == policies


def test_names_that_look_like_emoji_are_printed_as_they_are(call: Call, run_dir: Path) -> None:
    spec = read_json(run_dir / "network.json")
    named = {**spec, "model": "some_module:factory:width=8"}
    write_json(run_dir / "network.json", named)
    code, text = call("profile", run_dir, "--force")
    assert (code, "the model 'some_module:factory:width=8'" in text) == (1, True)


def test_names_are_folded_in_narrow_tables_and_not_cut_off() -> None:
    names = [f"loss-{number}-logistic-confidences" for number in (5, 6)]
    printed = StringIO()
    table = Table(title="Policies.", columns=["policy", "ms"], rows=[[name, "1"] for name in names])
    Console(width=30, file=printed).print(rich_table(table, 30))
    lines = printed.getvalue().splitlines()
    column = "".join(line[:28].strip() for line in lines).replace(" 1", "")
    assert all(name in column for name in names)


def test_an_unknown_policy_is_answered_with_the_known_ones(
    call: Call, run_dir: Path, picture: Path
) -> None:
    assert "loss-2, ms-1000" in call("run", run_dir, picture, "--policy", "nobody")[1]


def test_files_that_are_no_images_are_named(call: Call, run_dir: Path, tmp_path: Path) -> None:
    text_file = tmp_path / "note.png"
    text_file.write_text("no picture")
    pickled = tmp_path / "bad.npy"
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)

    assert "cannot be read as an image" in call("run", run_dir, text_file)[1]
    assert "no such file" in call("run", run_dir, tmp_path / "gone.png")[1]
    assert "plain array" in call("run", run_dir, pickled)[1]


def test_damaged_files_are_named(call: Call, run_dir: Path, picture: Path) -> None:
    for name, arguments in (
        ("weights.safetensors", ["run", run_dir, picture]),
        ("profile.json", ["run", run_dir, picture]),
        ("recordings/validation.safetensors", ["fit", run_dir]),
        ("network.json", ["evaluate", run_dir]),
    ):
        whole = (run_dir / name).read_bytes()
        (run_dir / name).write_bytes(whole[: len(whole) // 2])
        code, text = call(*arguments)
        (run_dir / name).write_bytes(whole)

        assert code == 1, name
        assert Path(name).name in text


def test_nan_weights_are_refused(call: Call, run_dir: Path, picture: Path) -> None:
    state = load_file(run_dir / "weights.safetensors")
    state["backbone.classifier.bias"][0] = float("nan")
    write_tensors(run_dir / "weights.safetensors", state, {"kind": "weights"})
    code, text = call("run", run_dir, picture)

    assert code == 1
    assert "backbone.classifier.bias" in text


def test_changed_data_is_noticed(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    arrays = {"x_train": random.random((80, 6)), "x_test": random.random((20, 6))}
    labels = {"y_train": np.arange(80) % 2, "y_test": np.arange(20) % 2}
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), "
        "nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "
        "nn.Linear(4, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    np.savez("d.npz", **arrays, **labels)
    options = [
        "--model",
        "nets:net",
        "--data",
        "npz:d.npz",
        "--exits",
        "2",
        "--epochs",
        "1",
        "--quiet",
        "--no-exit-free",
    ]
    trained, _ = call("train", "run", *options)
    np.savez("d.npz", **{**arrays, "x_test": arrays["x_test"] + 1}, **labels)
    code, text = call("record", "run", "--quiet")

    assert (trained, code) == (0, 1)
    assert "has changed" in text


@pytest.mark.parametrize("verb", ["train", "profile", "record", "fit", "evaluate", "report"])
def test_a_full_disk_leaves_what_was_there(
    call: Call, run_dir: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    monkeypatch.setattr(os, "fsync", full)
    more = {"train": TINY, "profile": ["--force", "--repeats", "20"], "record": ["--force"]}.get(
        verb, []
    )
    code, text = call(verb, run_dir, *more)

    assert code == 1
    assert "No space left on device" in text
    assert {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_the_demo_ends_with_answers_by_deadlines_and_the_open_page(tmp_path: Path) -> None:
    directory = tmp_path / "impatient-demo"
    # a browser that writes down what it was to open
    opened = tmp_path / "opened"
    command = [sys.executable, "-m", "impatient.cli", "demo", directory, "--epochs", "2"]
    with subprocess.Popen(
        [*map(str, command), "--quiet", "--serve", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "BROWSER": f"sh -c 'echo %s > {opened}'"},
    ) as process:
        text = ""
        for line in process.stdout:
            text += line
            found = re.search(r"serving impatient-demo at (http://127\.0\.0\.1:\d+)", line)
            if found:
                break
        address = found[1]
        with urllib.request.urlopen(f"{address}/") as reply:
            assert "impatient: an answer by the time you said" in reply.read().decode()
        with urllib.request.urlopen(f"{address}/v2/models") as reply:
            assert json.load(reply) == {"models": ["impatient-demo"]}
        wait_until(lambda: opened.is_file() and opened.read_text())
        assert opened.read_text().split() == [address]
        process.send_signal(signal.SIGTERM)
        process.stdout.read()

    assert "answered in time" in text
    assert re.search(
        r"promised: answers by the deadline.* measured: \d+\.\d% of the answers by their deadline; "
        r"-?\d+\.\d points lost(?: \(missed; .*\))?, in \d.* ms on average instead of \d.* ms "
        r"to open: /.*report.html",
        " ".join(text.split()),
    )
    assert (directory / "report.html").is_file()
