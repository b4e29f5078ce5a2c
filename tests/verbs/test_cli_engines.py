"""`impatient export` and what follows it, on the digits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import Call
from impatient.files import read_json, write_json
from impatient.verbs.export import ExportOptions, export
from impatient.verbs.network_spec import save_weights
from impatient.verbs.run_directory import RunDirectory


@pytest.fixture(scope="module")
def run_dir(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that has come as far as torch alone takes it."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "digits"))


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    """Where it was exported."""
    torch.set_num_threads(1)
    export(ExportOptions(directory=run_dir, policy="loss-2", repeats=20, quiet=True))
    return run_dir / "engines" / "onnxruntime"


@pytest.fixture
def digit(run_dir: Path, tmp_path: Path) -> Path:
    file = tmp_path / "digit.npy"
    np.save(file, RunDirectory(run_dir).data().examples("test").take([0])[0].numpy())
    return file


def test_an_exported_network_agrees_and_has_its_own_costs(exported: Path) -> None:
    bundle = read_json(exported / "bundle.json")

    assert max(bundle["agreement"]) < 1e-4
    assert bundle["costs"]["1"]["stages"][0]["n"] == 20
    assert bundle["policy"]["score"] == "max_probability"
    assert bundle["threads"] == 1
    assert read_json(exported / "profile.json")["provenance"]["engine"] == "onnxruntime"


@pytest.mark.usefixtures("exported")
def test_exporting_again_needs_force(call: Call, run_dir: Path) -> None:
    code, text = call("export", run_dir)

    assert code == 1
    assert "is already an exported network" in text


def test_a_learned_policy_is_not_exported(call: Call, run_dir: Path, tmp_path: Path) -> None:
    call("fit", run_dir, "--max-loss", 2, "--learner", "logistic", "--name", "learned")
    code, text = call("export", run_dir, "--policy", "learned", "--out", tmp_path / "made")

    assert code == 1
    assert "an exported network takes thresholds" in text


@pytest.mark.usefixtures("exported")
def test_answers_by_a_deadline_are_torch_s(call: Call, run_dir: Path, digit: Path) -> None:
    code, text = call(
        "run",
        run_dir,
        digit,
        "--engine",
        "onnxruntime",
        "--deadline-ms",
        10_000,
        "--json",
        "--any-profile",
    )
    _, wanted = call("run", run_dir, digit, "--deadline-ms", 10_000, "--json", "--any-profile")

    found = json.loads(text)[0]
    expected = json.loads(wanted)[0]

    assert code == 0
    assert (found["answer"], found["exit"]) == (expected["answer"], expected["exit"])
    assert found["probability"] == pytest.approx(expected["probability"], abs=1e-4)


@pytest.mark.usefixtures("exported")
def test_recordings_and_evaluations_are_the_engine_s_own(call: Call, run_dir: Path) -> None:
    code, _ = call("record", run_dir, "--engine", "onnxruntime", "--quiet")
    judged, text = call("evaluate", run_dir, "--engine", "onnxruntime")
    reported, _ = call("report", run_dir)
    here = RunDirectory(run_dir).engine("onnxruntime")
    found = here.recording("test")
    wanted = RunDirectory(run_dir).recording("test")

    assert (code, judged, reported) == (0, 0, 0)
    assert found.provenance.engine == "onnxruntime"
    assert not torch.equal(found.outputs, wanted.outputs)
    torch.testing.assert_close(found.outputs, wanted.outputs, rtol=1e-3, atol=1e-3)
    assert "samples as torch" in text
    assert "loss-2" in text
    page = (run_dir / "report.html").read_text()
    assert "In other engines" in page
    assert "onnxruntime, on the same" in page


@pytest.mark.usefixtures("exported")
def test_eight_bits_have_their_own_accuracy(call: Call, run_dir: Path) -> None:
    exported, said = call(
        "export", run_dir, "--precision", "int8-dynamic", "--lean", "--repeats", 20, "--quiet"
    )
    recorded, _ = call(
        "record", run_dir, "--engine", "onnxruntime-int8-dynamic", "--splits", "test", "--quiet"
    )
    judged, text = call("evaluate", run_dir, "--engine", "onnxruntime-int8-dynamic")
    seen = RunDirectory(run_dir).engine("onnxruntime-int8-dynamic")
    outputs = seen.recording("test").outputs
    wanted = RunDirectory(run_dir).recording("test").outputs

    assert (exported, recorded, judged) == (0, 0, 0)
    assert "largest difference" in said
    assert "engine / torch" in said
    assert 1e-4 < float((outputs - wanted).abs().max() / wanted.abs().max()) < 0.3
    assert "same answer" in text
    # fitted in torch, judged on what 8 bits answer
    assert "loss-2" in text


@pytest.mark.usefixtures("exported")
def test_a_profile_is_of_one_engine(call: Call, run_dir: Path, tmp_path: Path, digit: Path) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    shutil.copy(copy / "engines" / "onnxruntime" / "profile.json", copy / "profile.json")
    code, text = call("run", copy, digit, "--any-profile")

    assert code == 1
    assert "StaleInput" in text
    assert "another engine" in text


@pytest.mark.usefixtures("exported")
def test_doing_it_again_does_nothing_and_another_engine_must_be_exported(
    call: Call, run_dir: Path
) -> None:
    code, text = call("profile", run_dir, "--engine", "onnxruntime", "--repeats", 20, "--quiet")
    missing, said = call("profile", run_dir, "--engine", "openvino")

    assert code == 0
    assert "up to date" in text
    assert missing == 1
    assert "--engine openvino" in said


@pytest.mark.usefixtures("exported")
def test_other_weights_make_an_exported_network_stale(
    call: Call, run_dir: Path, tmp_path: Path
) -> None:
    run = RunDirectory(shutil.copytree(run_dir, tmp_path / "run"))
    network, _ = run.network()
    with torch.no_grad():
        next(network.parameters()).add_(1.0)
    save_weights(network, run.weights_file)
    code, text = call("record", run.path, "--engine", "onnxruntime")

    assert code == 1
    assert "StaleInput" in text
    assert "with other weights" in text


@pytest.mark.usefixtures("exported")
def test_a_damaged_directory_says_what_to_do(call: Call, run_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    write_json(
        copy / "engines" / "onnxruntime" / "bundle.json",
        {"kind": "impatient_bundle", "schema": 1, "engine": "openvino"},
    )
    code, text = call("profile", copy, "--engine", "onnxruntime")

    assert code == 1
    assert "StorageError" in text
    assert "export it again" in text


def test_other_runs_are_not_timed_in_another_engine(call: Call, run_dir: Path) -> None:
    code, text = call("evaluate", run_dir, "--engine", "onnxruntime", "--against", run_dir)

    assert code == 1
    assert "--against" in text
