"""Top-k on the command line, from training to the report."""

import csv
from pathlib import Path

import pytest

from command_line import TINY, Call
from impatient import Evaluation, Recording
from recordings import in_top

TOP = 3


def test_the_command_line_counts_them_from_training_to_the_report(
    tmp_path: Path, call: Call
) -> None:
    def done(*arguments: object) -> None:
        code, said = call(*arguments)
        assert code == 0, said

    run = tmp_path / "run"
    quick = ["--exits", "2", "--epochs", "1", "--no-exit-free", "--batch-size", "256"]
    done("train", run, *TINY, *quick, "--top", TOP)
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    done("record", run, "--quiet")
    found = {
        split: Recording.load(run / "recordings" / f"{split}.safetensors")
        for split in ("validation", "test")
    }
    hits = in_top(found["validation"], TOP).mean(1)
    last = [row for row in rows if row["split"] == "validation"][-len(hits) :]
    assert [float(row["accuracy"]) for row in last] == pytest.approx(hits.tolist(), abs=1e-4)
    done("profile", run, "--repeats", 10, "--quiet")
    done("fit", run, "--max-loss", 2)
    # the same outputs, judged by their likeliest class, and back
    for top in (1, TOP):
        done("evaluate", run, "--top", top)
        evaluation = Evaluation.load(run / "evaluation.json")
        judged = in_top(found["test"], top)[0].mean()
        assert evaluation["exit 0"].accuracy.value == pytest.approx(judged)
    # all ten classes would always hold the true one
    for verb in (["record", run, "--quiet"], ["fit", run, "--max-loss", 2], ["evaluate", run]):
        code, said = call(*verb, "--top", 10)
        assert (code, "there are 10 classes; expected fewer than 10" in said) == (1, True)
    done("report", run)
    assert "top-3 accuracy" in (run / "report.html").read_text(encoding="utf-8")
