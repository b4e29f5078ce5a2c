"""The command line of costs: profiles by thread count, comparisons, targets and budgets in other
units than time.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import TINY, Call
from impatient.costs import CostProfile, Noise
from impatient.evaluation import Evaluation
from impatient.files import read_json
from impatient.policies import ThresholdPolicy
from impatient.recipe import Recipe
from impatient.runtime import tail
from impatient.verbs.run_directory import RunDirectory
from impatient.verbs.train import TrainOptions, train


def with_joules(run_dir: Path) -> None:
    """As if the joules of the profile had been measured: this machine may have no meter."""
    file = RunDirectory(run_dir).profile_file
    costs = CostProfile.load(file)
    joules = {
        "stage_energy_j": (0.001,) * costs.num_exits,
        "head_energy_j": (0.0001,) * costs.num_exits,
    }
    dataclasses.replace(costs, exit_free_energy_j=None, **joules).save(file)


# --- profiles -------------------------------------------------------------------------------------


def test_every_thread_count_has_its_file_and_the_first_is_the_one_that_counts(
    call: Call, run_dir: Path
) -> None:
    code, text = call("profile", run_dir, "--threads", "1,2", "--repeats", "20", "--quiet")
    assert code == 0, text
    # of one thread, it was there
    assert "up to date" in text
    assert "profile-t2.json" in text
    one, two = (CostProfile.load(run_dir / name) for name in ("profile.json", "profile-t2.json"))
    assert (one.provenance.threads, two.provenance.threads) == (1, 2)
    # as before
    assert torch.get_num_threads() == 1
    code, text = call("profile", run_dir, "--threads", "2,1", "--repeats", "20", "--quiet")
    assert code == 0, text
    assert CostProfile.load(run_dir / "profile.json").provenance.threads == 2
    assert CostProfile.load(run_dir / "profile-t1.json").provenance.threads == 1


def test_the_table_of_a_profile_says_how_noisy_the_machine_was(call: Call, run_dir: Path) -> None:
    code, text = call("profile", run_dir, "--repeats", "30", "--quiet", "--force")
    assert code == 0, text
    assert "A/A " in text
    assert "spread" in text
    assert CostProfile.load(run_dir / "profile.json").holds("bytes")


@pytest.mark.parametrize("threads", ["-1", "1,-2", "two", ""])
def test_thread_counts_that_are_none_are_refused(call: Call, run_dir: Path, threads: str) -> None:
    code, text = call("profile", run_dir, f"--threads={threads}")
    assert code == 2
    assert "--threads" in text


def test_an_engine_that_was_not_exported_to_says_how(call: Call, run_dir: Path) -> None:
    code, text = call(
        "profile", run_dir, "--engines", "eager,onnxruntime", "--repeats", "20", "--quiet"
    )
    assert code == 1
    assert f"impatient export {run_dir} --engine onnxruntime" in text


# --- tuning ---------------------------------------------------------------------------------------


def test_settings_are_reported_measured_and_judged(call: Call, run_dir: Path) -> None:
    code, text = call("tune", run_dir, "--settings", "gc,governor", "--runs", "25", "--quiet")
    assert code == 0
    assert "what this system permits" in text
    assert "gc yes" in text
    assert "nothing (A/A) waking up" in text
    # 25 runs have no p99, so "nothing" would be a claim that nobody measured
    assert "25 runs are too few for a p99" in text
    assert "Worth setting" not in text
    code, text = call("tune", run_dir, "--settings", "speed", "--quiet")
    assert code == 1
    assert "expected one of priority, affinity" in text


def test_a_tail_is_bounded_or_refused_exit_by_exit(
    call: Call, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = call("tail", run_dir, "--runs", "20", "--deadline-ms", "5", "--quiet")
    assert code == 0
    assert "exit 2: times of shape (20,); expected at least 1000" in text
    assert "beyond 5.000 ms, counted" in text
    # not what was measured here, which a busy machine may make anything
    drawn = np.random.default_rng(0).exponential(1e-3, (1, 2000))
    monkeypatch.setattr(tail, "times_to_exits", lambda *_, **__: drawn)
    code, text = call("tail", run_dir, "--deadline-ms", "9.2", "--json", "--quiet")
    (found,) = json.loads(text)
    assert code == 0
    # e^-9.2 is 1e-4
    assert found["late"]["low"] < 1e-4 < found["late"]["high"]
    assert found["counted"]["value"] == (drawn > 9.2e-3).mean()
    assert found["bounds_s"]["0.0001"]["low"] < 9.2e-3 < found["bounds_s"]["0.0001"]["high"]
    code, text = call("tail", run_dir, "--deadline-ms", "9.2", "--quiet")
    assert "1 in 10,000 beyond, at most" in text


# --- comparing ------------------------------------------------------------------------------------


def test_two_profiles_are_compared_exit_by_exit(call: Call, run_dir: Path) -> None:
    costs = CostProfile.load(run_dir / "profile.json")
    # not what was measured: that may say that this machine is too busy to compare anything
    quiet = Noise(aa_ratio=1.0, aa_low=0.99, aa_high=1.01, spread=0.01, n=30)
    half = {
        name: tuple(
            dataclasses.replace(
                part, **{f.name: getattr(part, f.name) / 2 for f in dataclasses.fields(part)[:-1]}
            )
            for part in getattr(costs.at(1), name)
        )
        for name in ("stages", "heads")
    }
    made = dataclasses.replace(costs.provenance, threads=99)
    a = dataclasses.replace(costs, batches={1: dataclasses.replace(costs.at(1), noise=quiet)})
    b = dataclasses.replace(
        costs, batches={1: dataclasses.replace(costs.at(1), noise=quiet, **half)}, provenance=made
    )
    a.save(run_dir / "profile.json")
    b.save(run_dir / "fast.json")
    code, text = call("compare", run_dir, run_dir / "fast.json")
    assert code == 0, text
    assert "threads: 1 (A), 99 (B)" in text
    assert text.count("2.00 times faster") == costs.num_exits
    # the untouched backbone, which was left as it was
    assert text.count("cannot tell apart") == 1
    code, text = call("compare", run_dir / "fast.json", run_dir)
    assert text.count("2.00 times slower") == costs.num_exits


def test_profiles_of_different_networks_are_compared_only_when_asked_to(
    call: Call, run_dir: Path
) -> None:
    costs = CostProfile.load(run_dir / "profile.json")
    other = dataclasses.replace(
        costs, provenance=dataclasses.replace(costs.provenance, network="another")
    )
    other.save(run_dir / "other.json")
    code, text = call("compare", run_dir, run_dir / "other.json")
    assert (code, "another network structure" in text) == (1, True)
    assert call("compare", run_dir, run_dir / "other.json", "--any")[0] == 0


def test_a_profile_that_is_not_there_is_named(call: Call, run_dir: Path, tmp_path: Path) -> None:
    code, text = call("compare", run_dir, tmp_path)
    assert (
        code,
        f"no profile at {tmp_path / 'profile.json'}; make one with `impatient profile {tmp_path}`"
        in text,
    ) == (
        1,
        True,
    )
    code, text = call("compare", run_dir, tmp_path / "none.json")
    assert (code, "impatient profile DIR" in text) == (1, True)


# --- targets and budgets --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "cost"),
    [("--mean-mmacs", 1000, "macs"), ("--mean-mb", 1000, "bytes"), ("--mean-mj", 2.5, "energy")],
)
def test_a_target_may_be_in_any_cost(
    call: Call, run_dir: Path, option: str, value: float, cost: str
) -> None:
    with_joules(run_dir)
    code, text = call("fit", run_dir, option, value)
    assert code == 0, text
    policy = RunDirectory(run_dir).policy(f"{option.removeprefix('--mean-')}-{value:g}")
    assert isinstance(policy, ThresholdPolicy)
    assert policy.cost == cost
    scale = {"macs": 1e6, "bytes": 1e6, "energy": 1e-3}[cost]
    assert (
        policy.target["mean_cost"]
        <= next(iter(policy.target.values()))
        == pytest.approx(value * scale)
    )
    for verb in ("evaluate", "report"):
        code, text = call(verb, run_dir)
        assert code == 0, text
    unit = {
        "macs": "MACs at most",
        "bytes": "1.00\N{NO-BREAK SPACE}GB at most",
        "energy": "2.5\N{NO-BREAK SPACE}mJ at most",
    }[cost]
    assert unit in RunDirectory(run_dir).report_file.read_text()


def test_what_a_loss_is_to_save_may_be_any_cost(call: Call, run_dir: Path) -> None:
    code, text = call("fit", run_dir, "--max-loss", "30", "--cost", "bytes")
    assert code == 0, text
    assert RunDirectory(run_dir).policy("loss-30-bytes").cost == "bytes"  # type: ignore[union-attr]
    code, text = call("fit", run_dir, "--max-loss", "30", "--cost", "energy")
    assert (code, "says nothing about energy" in text) == (1, True)
    code, text = call("fit", run_dir, "--max-loss", "30", "--cost", "macs", "--learner", "logistic")
    assert (code, "--cost macs goes with plain thresholds" in text) == (1, True)
    code, text = call("fit", run_dir, "--max-loss", "30", "--cost", "money")
    assert (code, "invalid choice 'money'" in text) == (2, True)
    code, text = call("fit", run_dir, "--mean-mb", "1", "--learner", "logistic")
    assert (code, "gates are fitted to time" in text) == (1, True)


def test_budgets_of_every_cost_are_judged_and_shown(call: Call, run_dir: Path) -> None:
    with_joules(run_dir)
    for budget in ("uniform:0:40mmacs", "point:100mb", "uniform:0:5mj"):
        for command in (["evaluate", run_dir, "--budget", budget], ["report", run_dir]):
            code, text = call(*command)
            assert code == 0, text
        assert budget in RunDirectory(run_dir).report_file.read_text()
        evaluation = Evaluation.load(RunDirectory(run_dir).evaluation_file)
        names = {row.name for row in evaluation.under_budgets if row.budget == budget}
        assert {"contract", "interruptible", "loss-2", "no exits, same weights"} <= names


@pytest.mark.parametrize(("unit", "high"), [("mmacs", 100.0), ("mb", 1000.0)])
def test_weights_may_come_from_a_budget_of_another_cost(
    tmp_path: Path, unit: str, high: float
) -> None:
    budget = f"uniform:0:{high:g}{unit}"
    run = RunDirectory(tmp_path / "run")
    train(
        TrainOptions(
            directory=run.path,
            model="impatient:resnet:n=1,c=8",
            exits=3,
            weights=budget,
            exit_free=False,
            recipe=Recipe(epochs=1),
            quiet=True,
        )
    )
    cost = {"mmacs": "macs", "mb": "bytes"}[unit]
    reached = run.profile(any_machine=True).cumulative(cost, "interruptible")  # type: ignore[arg-type]
    ends = [*(amount / (high * 1e6) for amount in reached), 1.0]
    wanted = [after - before for before, after in itertools.pairwise(ends)]
    numbers = read_json(run.path / "training.json")["numbers"]
    assert numbers == pytest.approx([part / sum(wanted) for part in wanted])
    assert len(set(numbers)) == 3


def test_a_unit_that_is_none_is_refused(call: Call, tmp_path: Path, run_dir: Path) -> None:
    code, text = call("train", tmp_path / "new", *TINY, "--weights", "uniform:0:40miles")
    assert (code, "unknown unit 'miles'" in text) == (1, True)
    code, text = call("evaluate", run_dir, "--budget", "uniform:0:40miles")
    assert (code, "unknown unit 'miles'" in text) == (1, True)
    code, text = call("evaluate", run_dir, "--budget", "uniform")
    assert (code, "cannot read 'uniform' as a budget" in text) == (1, True)
