"""Ctrl-C: what every verb says, and that this is what is left."""

import contextlib
import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import TINY, Call
from impatient.files import read_json
from recordings import drawn

RUN = "the run directory"
PICTURE = "a picture"
# what is interrupted, and what else is said on the command line
STEPS = {
    "train": ("impatient.fit", [RUN, *TINY]),
    "profile": ("impatient.profile", [RUN, "--force"]),
    "record": ("impatient.record", [RUN, "--force"]),
    "fit": ("impatient.fit_thresholds", [RUN]),
    "evaluate": ("impatient.evaluate", [RUN]),
    "report": ("impatient.evaluation.report_html", [RUN]),
    "run": ("impatient.Runner", [RUN, PICTURE]),
    "show": ("impatient.verbs.show.opened", [RUN]),
    "describe": ("impatient.evaluation.picture.parts_of", [RUN]),
    "export": ("impatient.engines.export.write_parts", [RUN]),
    "compare": ("impatient.verbs.compare.load_profile", [RUN, RUN]),
    "tail": ("impatient.runtime.tail.times_to_exits", [RUN]),
    "tune": ("impatient.runtime.tuning.tune", [RUN]),
    "recalibrate": ("impatient.training.batch_norm.recalibrate_on", [RUN]),
    "ensemble": ("impatient.verbs.ensemble.save_weights", [RUN, RUN, "--force"]),
    "select": ("impatient.verbs.select.save_weights", [RUN, RUN, RUN, "--force"]),
    "bench-serve": ("impatient.serving.load.send_load", [RUN]),
    "plan": ("impatient.networks.anytimenet.block_times", []),
}
# what is said where more than all files may be left, or less than a new start is needed
SAID = {
    "train": "the checkpoint is kept",
    "profile": "profiles that were finished",
    "record": "splits that were finished",
    "run": "pictures of answers",
    "export": "an exported network is kept if it was written whole",
    "recalibrate": "the weights from before are kept",
    "select": "steps that were finished are kept",
}


@contextlib.contextmanager
def interrupted(place: str, *, after: int = 0) -> Iterator[None]:
    """Let Ctrl-C be pressed where a function is called, after so many calls of it."""
    where, _, name = place.rpartition(".")
    module = importlib.import_module(where)
    real = getattr(module, name)
    calls = []

    def pressed(*arguments: object, **options: object) -> object:
        calls.append(name)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, pressed)
        yield


def files_of(directory: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture
def given(run_dir: Path, tmp_path: Path) -> dict[str, Path]:
    """What stands on the command lines."""
    Image.fromarray(np.full((20, 30), 128, np.uint8)).save(tmp_path / "three.png")
    return {RUN: run_dir, PICTURE: tmp_path / "three.png"}


@pytest.mark.parametrize("verb", STEPS)
def test_ctrl_c_stops_every_verb_cleanly(call: Call, given: dict[str, Path], verb: str) -> None:
    before = files_of(given[RUN])
    place, arguments = STEPS[verb]
    with interrupted(place):
        code, text = call(verb, *(given.get(part, part) for part in arguments))

    assert code == 130
    assert f"stopped; {SAID.get(verb, 'all files are as they were before.')}" in text
    assert files_of(given[RUN]) == before


def test_outputs_that_were_imported_before_stay_if_new_ones_are_stopped(
    call: Call, tmp_path: Path
) -> None:
    recording = drawn(40, seed=3)
    outputs, labels = recording.logits().numpy(), recording.labels.numpy()
    parts = {"validation": slice(0, 20), "test": slice(20, 40)}
    given = {f"{name}_outputs": outputs[:, part] for name, part in parts.items()}
    given |= {f"{name}_targets": labels[part] for name, part in parts.items()}
    np.savez(tmp_path / "outputs.npz", **given)
    command = ("import", tmp_path / "outputs.npz", "--into", tmp_path / "run")
    code, text = call(*command, "--costs-ms", "1,2,3,4", "--json")
    assert code == 0, text
    # notes come after it, on the error stream
    taken, _ = json.JSONDecoder().raw_decode(text)
    assert taken["samples"] == {"test": 20, "validation": 20}
    before = files_of(tmp_path / "run")
    # the last of the files
    with interrupted("impatient.verbs.import_outputs.Imported"):
        code, text = call(*command, "--costs-ms", "2,3,4,5", "--force")
    assert code == 130
    assert "stopped; all files are as they were before." in text
    assert files_of(tmp_path / "run") == before


@pytest.mark.slow
def test_an_export_that_is_stopped_while_it_is_timed_is_kept_and_made_anew(
    call: Call, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interrupted("impatient.profile"):
        code, text = call("export", run_dir, "--quiet")
    assert code == 130
    assert "an exported network is kept if it was written whole, without its times" in text
    made = run_dir / "engines" / "onnxruntime"
    assert read_json(made / "bundle.json")["costs"] is None
    assert not (made / "profile.json").exists()
    # as on a terminal, which shows progress
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    code, text = call("export", run_dir, "--repeats", 20)
    assert code == 0, text
    for step in ("tracing the network", "writing ONNX", "comparing it with torch", "profiling"):
        assert step in text
    assert "timing onnxruntime beside torch" in text
    assert read_json(made / "bundle.json")["costs"]


def test_networks_that_were_recalibrated_before_ctrl_c_are_kept(call: Call, run_dir: Path) -> None:
    before = files_of(run_dir)
    with interrupted("impatient.training.batch_norm.recalibrate_on", after=1):
        code, text = call("recalibrate", run_dir, "--quiet")
    assert code == 130
    assert "but of a network that was finished" in text
    changed = {file.relative_to(run_dir) for file in before if file.read_bytes() != before[file]}
    assert changed == {Path("weights.safetensors"), Path("checkpoint.safetensors")}


@pytest.mark.slow
def test_a_selection_goes_on_after_ctrl_c(
    call: Call,
    finished: Path,
    tmp_path: Path,
) -> None:
    command = ("select", tmp_path / "cascade", finished, finished, "--repeats", 20, "--quiet")
    with interrupted("impatient.record", after=1):
        code, text = call(*command)
    assert code == 130
    assert "Run the same command again, without --force, to go on." in text
    before = files_of(tmp_path / "cascade")
    names = {str(file.relative_to(tmp_path / "cascade")) for file in before}
    assert names == {
        "network.json",
        "weights.safetensors",
        "profile.json",
        "recordings/validation.safetensors",
    }
    code, text = call(*command)
    assert code == 0, text
    assert before.items() <= files_of(tmp_path / "cascade").items()


@pytest.mark.slow
def test_the_demo_goes_on_after_ctrl_c(call: Call, tmp_path: Path) -> None:
    command = ("demo", tmp_path / "demo", "--epochs", 1, "--quiet")
    with interrupted("impatient.fit_thresholds"):
        code, text = call(*command)
    assert code == 130
    assert "steps that were finished are kept, and of the training the checkpoint" in text
    steps = [tmp_path / "demo" / name for name in ("profile.json", "recordings/test.safetensors")]
    before = [file.read_bytes() for file in steps]
    code, text = call(*command)
    assert code == 0, text
    assert [file.read_bytes() for file in steps] == before


@pytest.mark.slow
def test_a_real_ctrl_c_while_training_keeps_the_checkpoint_and_resumes(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "impatient.cli",
        "train",
        str(directory),
        *TINY,
        "--epochs",
        "200",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoint = directory / "checkpoint.safetensors"
    while not checkpoint.is_file() and process.poll() is None:
        # another process: its files are all there is to wait for
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == 130, errors
    assert "stopped" in errors
    assert checkpoint.is_file()
    assert not list(directory.rglob("*.tmp"))
