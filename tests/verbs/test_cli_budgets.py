"""Budgets of single samples, from a column of the data to the evaluation."""

from pathlib import Path

import numpy as np
import pytest

from command_line import Call
from impatient import CostProfile, Evaluation, Recording


def test_a_column_of_budgets_judges_each_sample_by_its_own(tmp_path: Path, call: Call) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(120, 8)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    # from less than the first exit to more than the last, and one without a limit
    limits = np.append(np.geomspace(1e-7, 1.0, 39), np.inf)
    np.savez(
        tmp_path / "data.npz",
        x_train=x[:80],
        y_train=y[:80],
        x_test=x[80:],
        y_test=y[80:],
        limit_train=np.ones(80),
        limit_test=limits,
    )
    run = tmp_path / "run"
    data = f"npz:{tmp_path / 'data.npz'}:budget=limit"
    model = ["--model", "toys:mlp", "--after", "0,1", "--no-exit-free", "--epochs", "1", "--quiet"]
    for arguments in (
        ["train", run, "--data", data, *model],
        ["profile", run, "--repeats", "10", "--quiet", "--trust", "toys"],
        ["record", run, "--quiet", "--trust", "toys"],
        ["evaluate", run, "--trust", "toys"],
    ):
        code, said = call(*arguments)
        assert code == 0, said
    quality = Recording.load(run / "recordings" / "test.safetensors").quality.numpy()
    times = CostProfile.load(run / "profile.json").interruptible_s()
    paid = [np.flatnonzero(np.asarray(times) <= limit) for limit in limits]
    by_hand = [quality[exits[-1], row] if len(exits) else 0.0 for row, exits in enumerate(paid)]
    evaluation = Evaluation.load(run / "evaluation.json")
    [row] = [
        row
        for row in evaluation.under_budgets
        if (row.budget, row.name) == ("of each sample", "interruptible")
    ]
    assert row.accuracy.value == pytest.approx(np.mean(by_hand))
