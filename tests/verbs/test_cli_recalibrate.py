"""The command line's recalibrate: new statistics, old weights, and what follows is out of date."""

import json
from pathlib import Path

import pytest
import torch

from command_line import TINY, Call
from impatient.files import read_tensors
from impatient.verbs.run_directory import RunDirectory

WEIGHTS = ("weights.safetensors", "exit_free/weights.safetensors")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def test_only_statistics_change_and_results_are_out_of_date(
    call: Call, finished: Path, run_dir: Path
) -> None:
    code, text = call("recalibrate", run_dir)
    assert code == 0, text
    for file in WEIGHTS:
        old, new = (read_tensors(run / file)[0] for run in (finished, run_dir))
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        assert changed
        assert {name.rpartition(".")[2] for name in changed} <= set(STATISTICS)
    code, text = call("evaluate", run_dir)
    assert code == 1
    assert "(StaleInput)" in text
    assert call("record", run_dir, "--quiet")[0] == 0
    code, text = call("evaluate", run_dir)
    assert code == 1
    assert "`impatient fit" in text
    # the table has told the truth
    code, text = call("recalibrate", run_dir, "--json")
    value = json.loads(text[text.index("{") :].partition("recalibrated:")[0])
    told = value["with exits"]["after"]
    assert value["with exits"]["before"] == told
    recorded = RunDirectory(run_dir).recording("validation").quality.float().mean(1)
    assert told == pytest.approx(recorded.tolist(), abs=1e-6)


def test_training_that_has_ended_does_not_bring_the_old_statistics_back(
    call: Call, finished: Path, run_dir: Path
) -> None:
    assert call("recalibrate", run_dir)[0] == 0
    new = fingerprints(run_dir)
    code, text = call("train", run_dir, *TINY)
    assert code == 0, text
    assert fingerprints(run_dir) == new != fingerprints(finished)


def fingerprints(run: Path) -> list[str]:
    return [read_tensors(run / file)[1]["fingerprint"] for file in WEIGHTS]


PLAIN = """
from torch import nn

def build(num_classes):
    layers = [nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes)]
    return nn.Sequential(*layers)
"""


def test_a_network_without_batch_norm_is_refused(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "without_norms_for_tests.py").write_text(PLAIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = "without_norms_for_tests:build"
    options = ["--after", "1", "--epochs", "1", "--no-exit-free", "--quiet"]
    code, text = call("train", "run", "--model", model, *options)
    assert code == 0, text
    before = Path("run/weights.safetensors").read_bytes()
    code, text = call("recalibrate", "run", "--trust", model)
    assert code == 1
    assert "has no batch norm that keeps statistics" in text
    assert Path("run/weights.safetensors").read_bytes() == before
