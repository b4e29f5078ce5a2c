"""The command line of deciding: cascades, learned gates, guarantees."""

from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import Call
from impatient import Recipe, load_data
from impatient.evaluation import Evaluation
from impatient.files import read_json, write_tensors
from impatient.networks import Cascade
from impatient.policies import GatePolicy, MixedPolicy, SelectionPolicy, fit_gates
from impatient.verbs.run_directory import RunDirectory
from impatient.verbs.train import TrainOptions, train


@pytest.fixture(scope="module")
def small_networks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("networks")
    for name, size, epochs in (("small", "n=1,c=2", 2), ("large", "n=1,c=8", 4)):
        train(
            TrainOptions(
                directory=folder / name,
                model=f"impatient:resnet:{size}",
                exits=1,
                exit_free=False,
                recipe=Recipe(epochs=epochs),
                quiet=True,
            )
        )
    return [folder / "small", folder / "large"]


@pytest.mark.slow
def test_a_cascade_of_run_directories_specs_and_files_goes_through_every_verb(
    call: Call,
    small_networks: list[Path],
    tmp_path: Path,
) -> None:
    small, large = small_networks
    weights = tmp_path / "own.safetensors"
    state = RunDirectory(small).network()[0].backbone.state_dict()
    write_tensors(weights, state, {})
    members = [f"impatient:resnet:n=1,c=2@{weights}", small, large]
    command = [
        "select",
        tmp_path / "cascade",
        *members,
        "--repeats",
        "20",
        "--price",
        "0.01",
        "--quiet",
    ]
    code, text = call(*command)
    assert code == 0, text
    assert "times as fast as the last network alone" in text
    run = RunDirectory(tmp_path / "cascade")
    cascade = run.network()[0]
    policy = run.policy("price-0.01")
    assert isinstance(cascade, Cascade)
    assert isinstance(policy, SelectionPolicy)
    assert (
        cascade.exit_names == ("resnet:n=1,c=2", "small", "large")
        or len(set(cascade.exit_names)) == 3
    )
    recording = run.recording("test")
    # the same weights, from a file and from a directory
    assert torch.equal(recording.outputs[0], recording.outputs[1])
    image = tmp_path / "digit.npy"
    np.save(image, load_data("digits").examples("test").take([0])[0].numpy())
    for verb in (
        command,
        ["evaluate", run.path],
        ["report", run.path],
        ["run", run.path, image, "--policy", "price-0.01"],
        ["run", run.path, image, "--deadline-ms", "1000"],
    ):
        code, text = call(*verb)
        assert code == 0, text
    code, text = call("evaluate", run.path, "--real", "5")
    assert (code, "really answered, one by one" in text) == (0, True)
    real = Evaluation.load(run.evaluation_file)["price-0.01"].real
    assert real is not None
    assert real.samples == 5
    # of five samples on a busy machine the interval may reach below 0
    assert real.mean_s.low <= real.mean_s.value > 0.0
    # of the same samples
    assert real.predicted_s == pytest.approx(
        float(policy.outcome(recording, run.profile()).contract_s[:5].mean())
    )
    assert call("report", run.path)[0] == 0
    assert "Test samples really answered" in run.report_file.read_text()
    code, text = call("evaluate", run.path, "--real", "-1")
    assert (code, "--real: '-1'; expected a whole number" in text) == (2, True)
    assert "stop or to" in run.report_file.read_text() or "to large" in run.report_file.read_text()
    code, text = call(*command[:2], small, large, *command[5:])
    assert (code, "use another directory, or --force" in text) == (1, True)
    code, text = call("select", run.path, small, "--force", "--quiet")
    assert (code, "1 network to choose among; expected two or more" in text) == (1, True)
    code, text = call("select", run.path, small, "nowhere:nothing", "--force", "--quiet")
    # what was there still is
    assert (code, list(run.policy_files())) == (1, ["price-0.01"])
    code, text = call("select", run.path, small, large, "--force", "--quiet", "--repeats", "20")
    assert (code, list(run.policy_files())) == (0, ["loss-1"])
    code, text = call("train", run.path, "--epochs", "1")
    assert (code, "is made of trained members" in text) == (1, True)
    code, text = call(
        "select",
        tmp_path / "other",
        small,
        large,
        "--topology",
        "ring",
        "--quiet",
        "--repeats",
        "20",
    )
    assert (code, "invalid choice 'ring'" in text) == (2, True)


def test_gates_are_fitted_judged_and_run(call: Call, run_dir: Path) -> None:
    for inputs in ("confidences", "features"):
        code, text = call(
            "fit", run_dir, "--max-loss", "30", "--learner", "logistic", "--inputs", inputs
        )
        assert code == 0, text
    run = RunDirectory(run_dir)
    gates = run.policy("loss-30-logistic-features")
    assert isinstance(gates, GatePolicy)
    # asking was measured
    assert max(gates.gate_s) > 0.0
    for verb in (["evaluate", run_dir, "--real", "3"], ["report", run_dir]):
        code, text = call(*verb)
        assert code == 0, text
    names = {row["name"] for row in read_json(run_dir / "evaluation.json")["rows"]}
    assert {"loss-30-logistic-features", "loss-30-logistic-confidences"} <= names
    code, text = call("fit", run_dir, "--mean-mmacs", "1", "--learner", "logistic")
    assert (code, "--mean-ms or --max-loss" in text) == (1, True)


def test_a_mixture_in_a_run_directory_goes_through_every_verb(
    call: Call, run_dir: Path, tmp_path: Path
) -> None:
    run = RunDirectory(run_dir)
    thresholds = run.policy("loss-2")
    costs = run.profile(any_machine=True)
    gates = fit_gates(run.recording("validation"), costs, max_accuracy_loss=0.5)
    run.save_policy("mixed", MixedPolicy(fast=gates, slow=thresholds, share=0.5))
    code, text = call("evaluate", run_dir)
    assert (code, "mixed" in text) == (0, True), text
    code, text = call("report", run_dir)
    assert code == 0, text
    assert "50% follow the slower policy" in (run_dir / "report.html").read_text()
    image = tmp_path / "digit.npy"
    np.save(image, load_data("digits").examples("test").take([0])[0].numpy())
    code, text = call("run", run_dir, image, "--policy", "mixed")
    assert code == 0, text
    code, text = call("export", run_dir, "--policy", "mixed")
    assert (code, "an exported network takes thresholds" in text) == (1, True)


def test_a_guarantee_is_kept_with_its_policy_and_forgotten_with_it(
    call: Call, run_dir: Path
) -> None:
    run = RunDirectory(run_dir)
    command = ["fit", run_dir, "--max-loss", "30", "--delta", "0.2", "--name", "sure"]
    code, text = call(*command)
    assert code == 0, text
    assert "With probability 80 %" in text
    assert read_json(run.certificate_file("sure"))["delta"] == 0.2
    assert run.policy("sure").split == "validation"
    code, text = call(*command, "--learner", "logistic")
    assert code == 0, text
    assert isinstance(run.policy("sure"), GatePolicy)
    assert len(list((run_dir / "policies").glob("sure.*"))) == 1
    code, text = call("fit", run_dir, "--max-loss", "30", "--name", "sure")
    assert code == 0, text
    assert not run.certificate_file("sure").is_file()
    code, text = call("fit", run_dir, "--max-loss", "0.1", "--delta", "0.05")
    # so many samples are not there
    assert (code, "which so needs twice as many" in text) == (1, True)
    code, text = call("fit", run_dir, "--mean-ms", "100", "--delta", "0.05")
    assert (code, "give --delta with --max-loss" in text) == (1, True)
