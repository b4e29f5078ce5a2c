import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_model

from impatient import Recording, load_data, record
from impatient.clock import FakeClock
from impatient.files import read_json
from impatient.networks import growth, zoo
from impatient.networks.anytimenet import AnytimeNet, IterationBatchNorm
from impatient.provenance import machine, provenance
from impatient.training import schedules
from papers import throughput
from papers.anytimenet import __main__ as command
from papers.anytimenet import execution, learning, long, recipe, ship, tables, times
from papers.anytimenet.recipe import KINDS, SCALES, Net, key
from papers.anytimenet.times import Middle
from papers.data import load
from papers.jobs import finished
from smoke_runs import assert_only_lost_runs_again, invoke, read, run_smoke, smoke_arguments

SCALE = dataclasses.replace(SCALES["cpu"], seeds=2)
CASES = {case.name: case for case in SCALE.cases}
NAMES = SCALE.net.schedule.names


# --- Table I --------------------------------------------------------------------------------------


def test_table_1_is_the_papers_and_the_traces() -> None:
    rows = execution.table(AnytimeNet(width=1), torch.zeros(1, 3, 8, 8))
    assert [row["cumulative"] for row in rows] == [5, 12, 18, 24, 29, 34, 38]
    assert [row["tally"] for row in rows] == [5, 12, 18, 24, 29, 34, 38]
    assert {row["equal"] for row in rows} == {"yes"}
    assert rows[0]["executed"] == "IN, S1.1, S2.1, S3.1, OUT"
    assert rows[3]["executed"] == "S2.2-S2.5, S3.1, OUT"
    assert [rows[-1][f"{part} so far"] for part in ("IN", "S1", "S2", "S3", "OUT")] == [
        1,
        8,
        10,
        12,
        7,
    ]


def test_a_run_that_is_not_the_papers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = execution.executed

    def once_more(network: AnytimeNet, x: torch.Tensor) -> tuple[tuple[str, ...], ...]:
        first, second, *rest = real(network, x)
        return (first, ("S1.1", *second), *rest)

    monkeypatch.setattr(execution, "executed", once_more)
    rows = execution.table(AnytimeNet(width=1), torch.zeros(1, 3, 8, 8))
    assert [row["equal"] for row in rows] == ["yes"] + ["no"] * 6


def test_the_trace_leaves_no_hooks_and_the_network_as_it_was() -> None:
    network = AnytimeNet(width=1)
    execution.executed(network, torch.zeros(1, 3, 8, 8))
    assert network.training
    assert not any(part._forward_hooks for part in network.backbone.parts().values())


# --- Table II -------------------------------------------------------------------------------------


def scripted(seconds: float = 1.0) -> tuple[AnytimeNet, FakeClock]:
    """A network of which every part takes as long, by a clock of its own."""
    network = AnytimeNet(width=1)
    clock = FakeClock()
    for part in network.backbone.parts().values():
        part.register_forward_hook(lambda *_: clock.advance(seconds))
    return network, clock


def measured(repeats: int = 2) -> dict[str, object]:
    network, clock = scripted()
    result = times.timed(network, torch.zeros(1, 3, 8, 8), repeats=repeats, warm_up=1, clock=clock)
    return {
        **result,
        "macs": [1.0] * 7,
        "exits": list(network.exit_names),
        "threads": 1,
        "processor": "abacus",
        "batch": 1,
    }


def test_parts_of_equal_cost_give_the_counts_of_executions() -> None:
    result = measured(repeats=3)
    assert result["plain"] == [26.0] * 3
    assert result["cumulative"] == [[5.0, 12.0, 18.0, 24.0, 29.0, 34.0, 38.0]] * 3
    assert result["alone"] == [[5.0, 9.0, 12.0, 16.0, 19.0, 23.0, 26.0]] * 3
    assert result["predicted"] == [[5.0, 7.0, 6.0, 6.0, 5.0, 5.0, 4.0]] * 3


def test_table_2_from_known_times() -> None:
    result = measured()
    rows = times.table(result)
    assert rows[4]["over BASELINE"] == Middle(29 / 26, 29 / 26, 29 / 26)
    assert [row["over predicted"].median for row in rows] == [1.0] * 7
    assert {row["within the spread"] for row in rows} == {"yes"}
    assert times.per_part(Net(width=1), result) == (1.0, 1.0)
    slow = {**result, "cumulative": [[cost + 1.0 for cost in row] for row in result["cumulative"]]}
    # one second more in the first
    assert [row["within the spread"] for row in times.table(slow)] == ["no"] + ["yes"] * 6


def test_claims_about_time_follow_the_times() -> None:
    result = measured()
    verdicts = {
        claim.claim.split("(")[0].strip(): claim for claim in times.claims(Net(width=1), result)
    }
    saved, overhead, level, predicted = verdicts.values()
    # 110 executions against 38
    assert (saved.ours, saved.verdict) == (
        "2.89 (2.89 to 2.89) times",
        "yes",
    )
    # 38 against 26
    assert (overhead.ours, overhead.verdict) == ("1.462 (1.462 to 1.462)", "no")
    assert overhead.paper == "CIFAR-10 +9.6%, GTSRB +5.5%, SFCARS +16.4%"
    assert (level.verdict, predicted.verdict) == ("no", "yes")
    quick = {**result, "plain": [cost * 1.22 for cost in result["plain"]]}
    assert [claim.verdict for claim in times.claims(Net(width=1), quick)] == [
        "yes",
        "yes",
        "yes",
        "yes",
    ]
    few = {**result, "alone": [[5.0] * 7] * 2}
    assert next(times.claims(Net(width=1), few)).verdict == "no"


def test_the_middle_is_the_median_between_tenths() -> None:
    assert Middle.of(range(11)) == Middle(5.0, 1.0, 9.0)
    assert Middle.of([0.001, 0.002, 0.003]).text(1, 1e3) == "2.0 (1.2 to 2.8)"


# --- what is trained ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def test_the_scarce_case_has_as_few_images_a_class_as_sfcars() -> None:
    assert {
        CASES["scarce"].images,
        next(case for case in SCALES["gpu"].cases if case.name == "scarce").images,
    } == {43 * 41}
    assert 8144 // 196 == 41


def test_long_trainings_keep_results_and_the_very_weights_that_were_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long.main([str(tmp_path), "--smoke"])
    scale = long.in_faster_precision(long.smoke(), tmp_path)
    (case,) = scale.cases
    results = finished(recipe.jobs(scale), tmp_path)
    assert set(results) == {key(case, kind, 0) for kind in KINDS}
    folder = tmp_path / key(case, "anytime", 0)
    assert not (folder / "checkpoint.safetensors").exists()
    data = load(case.data, train=case.images, validation=case.validation, seed=0)
    network = AnytimeNet(10, scale.net.schedule, width=scale.net.width, in_channels=1, norms="own")
    load_model(network, folder / "weights.safetensors")
    network.eval()
    again = recipe.judged(record(network, data, split="test"))
    assert again["accuracy"] == results[key(case, "anytime", 0)]["own"]["accuracy"]

    last = f"{100 * again['accuracy'][-1]:.1f}"
    assert re.search(rf"\| 2-2-2 \| {last}[^|]*\|", (tmp_path / "long.md").read_text())
    assert "not been trained" not in (tmp_path / "long.md").read_text()
    alone = long.page(scale, {name: results[name] for name in results if "anytime" in name})
    assert "BASELINE has not been trained at this size yet" in alone
    # into the zoo, in half precision
    monkeypatch.setattr(zoo, "SHIPPED", tmp_path / "zoo")
    shipped = ship.ship(scale, tmp_path, zoo.SHIPPED, repeats=20)
    assert zoo.zoo_names() == (shipped.name,)
    rounded = recipe.judged(record(zoo.load_zoo(shipped.name), data, split="test"))
    assert rounded["accuracy"] == pytest.approx(again["accuracy"], abs=0.02)
    kept = Recording.load(shipped / "recordings" / "test.safetensors")
    assert kept.quality.double().mean(1).tolist() == rounded["accuracy"]


def test_long_trainings_are_held_against_those_baselines_that_are_done() -> None:
    scale = dataclasses.replace(long.smoke(), seeds=3)
    (case,) = scale.cases
    count = len(scale.net.schedule.names)

    def judged(last: float) -> dict[str, Any]:
        return {"accuracy": [0.5] * (count - 1) + [last], "counts": [200] * 10}

    results: dict[str, Any] = {
        key(case, "anytime", seed): {
            "own": judged(last),
            "shared": judged(0.4),
            "seconds": 60.0,
            "images": 100,
            "processor": "abacus",
        }
        for seed, last in enumerate((0.80, 0.82, 0.90))
    }
    for seed, last in ((0, 0.81), (2, 0.86)):
        results[key(case, "baseline", seed)] = {"shared": judged(last)}
    rows = long.seed_rows(scale, results)
    assert [row["own"] for row in rows if row["iteration"] == "BASELINE"] == [81.0, 86.0]
    assert len(rows) == 3 * count + 2
    text = long.page(scale, results)
    # -1 and +4 points, of the same seeds
    assert "The last iteration minus BASELINE, 2 seeds: +1.5 ± 3.5 points" in text
    assert re.search(rf"{scale.net.schedule.names[-1]} \| 84.0 ± 5.3 \| .* \| 83.5 ± 3.5 \|", text)


@pytest.mark.parametrize("name", ["cifar10", "gtsrb", "scarce"])
def test_long_trainings_take_any_case_with_its_own_augmentation(name: str, tmp_path: Path) -> None:
    options = long.options_parser(None).parse_args([str(tmp_path), "--case", name, "--epochs", "6"])
    scale = long.long_scale(
        long.CASES[options.case], long.THIN, epochs=options.epochs, seeds=1, width=8
    )
    (case,) = scale.cases
    assert (case.name, case.epochs, case.batch_size) == (name, 6, 128)
    assert case.augment == ("crop-flip" if name == "cifar10" else "crop")


def test_long_trainings_take_the_faster_precision_once_and_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faster(precision: str) -> None:
        def rates(*_: object, modes: Sequence[throughput.Mode], repeats: int) -> dict[Any, Any]:
            return {mode: [9.0 if mode.precision == precision else 5.0] * repeats for mode in modes}

        monkeypatch.setattr(throughput, "step_rates", rates)

    faster("bf16-mixed")
    assert long.in_faster_precision(long.smoke(), tmp_path / "a").training.precision == "bf16-mixed"
    faster("32-true")
    # another machine, the same run: its precision stays
    assert long.in_faster_precision(long.smoke(), tmp_path / "a").training.precision == "bf16-mixed"
    assert long.in_faster_precision(long.smoke(), tmp_path / "b").training.precision == "32-true"
    kept = read_json(tmp_path / "a" / "precision.json")
    assert kept["images_per_second"] == {"32-true": 5.0, "bf16-mixed": 9.0}
    assert (kept["batch"], kept["processor"]) == (128, machine("cpu")["processor"])


def test_the_gpu_scale_is_the_papers_recipe() -> None:
    scale = SCALES["gpu"]
    assert (scale.net.counts, scale.net.width) == (growth.PAPER.counts, 16)
    for case in scale.cases:
        made = recipe.recipe_of(case, scale.training, seed=0)
        rates = [
            schedules.learning_rate(made, epoch / made.epochs)
            for epoch in (0, 99, 100, 149, 150, 199)
        ]
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
        # a mirrored sign may be another
        assert case.augment != "crop-flip" or case.data != "gtsrb"


def test_both_kinds_start_from_the_same_weights(digits) -> None:
    states = []
    for kind in KINDS:
        torch.manual_seed(3)
        network = recipe.build(SCALES["smoke"].net, kind, digits)
        states.append(network.backbone.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_images_for_the_statistics_come_shuffled_in_whole_batches(digits) -> None:
    batches = list(recipe.calibration(digits, 32, 100, seed=0))
    assert [len(batch) for batch in batches] == [32] * 3
    assert torch.equal(batches[0], next(recipe.calibration(digits, 32, 100, seed=0)))
    assert not torch.equal(batches[0], digits.example(32))
    assert [len(batch) for batch in recipe.calibration(digits, 32, 10, seed=0)] == [10]
    every = torch.cat(list(recipe.calibration(digits, 1, None, seed=1)))
    assert len(every) == digits.size("train")


def test_own_statistics_leave_the_trained_network_and_its_weights_alone(digits) -> None:
    net = SCALES["smoke"].net
    trained = recipe.build(net, "anytime", digits)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    own = recipe.with_own_norms(trained, net, digits, recipe.calibration(digits, 16, 64, seed=0))
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in own.named_parameters())
    again = [module for module in own.modules() if isinstance(module, IterationBatchNorm)]
    assert again
    assert any(not torch.allclose(norm.running_mean[0], norm.running_mean[-1]) for norm in again)


def recording(outputs, labels) -> Recording:
    outputs = torch.tensor(outputs).log()
    exits = tuple(map(str, range(len(outputs))))
    return Recording.of(
        outputs,
        torch.tensor(labels),
        split="test",
        exits=exits,
        provenance=provenance(),
    )


def test_what_is_judged_of_a_known_recording() -> None:
    found = recipe.judged(
        recording(
            [
                [[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.6, 0.4, 0.0001]],
                [[0.6, 0.4, 0.0001], [0.1, 0.8, 0.1], [0.3, 0.7, 0.0001]],
            ],
            [0, 1, 1],
        )
    )
    assert found["accuracy"] == pytest.approx([2 / 3, 1.0])
    assert found["p_true"] == pytest.approx([1.6 / 3, 2.1 / 3], abs=1e-4)
    assert found["p_max"] == pytest.approx([1.8 / 3, 2.1 / 3], abs=1e-4)
    # the first sample keeps its first answer
    assert found["surest_p_max"] == pytest.approx([1.8 / 3, 2.2 / 3], abs=1e-4)
    assert found["surest_accuracy"] == pytest.approx([2 / 3, 1.0])
    # the third class has no samples
    assert (found["classes"], found["counts"]) == ([0, 1], [1, 2])
    assert np.allclose(found["class_p_true"], [[0.7, 0.45], [0.6, 0.75]], atol=1e-4)
    assert found["class_accuracy"] == [[1.0, 0.5], [1.0, 1.0]]
    # of two classes there is none
    assert found["correlation"] == [None, None]


# --- figures 3 and 4 ------------------------------------------------------------------------------


def planted(accuracy, plain: float = 0.5, scale: recipe.Scale = SCALE) -> dict[str, dict]:
    """Invent results in which accuracy and confidence are `accuracy(case, iteration, seed)`."""
    results: dict[str, dict] = {}
    for case, kind, seed in itertools.product(scale.cases, KINDS, range(scale.seeds)):
        values = (
            [accuracy(case.name, index, seed) for index in range(7)]
            if kind == "anytime"
            else [plain]
        )
        judged = {
            **dict.fromkeys(
                ("accuracy", "p_true", "p_max", "surest_accuracy", "surest_p_true", "surest_p_max"),
                values,
            ),
            "correlation": [0.5] * len(values),
            "sample_correlation": [0.25] * len(values),
            "classes": [0, 2],
            "counts": [3, 4],
            "class_p_true": [[0.2, 0.6]] * len(values),
            "class_accuracy": [[0.3, 0.9]] * len(values),
        }
        results[key(case, kind, seed)] = {
            "shared": judged,
            "train_loss": [1.0] * len(values),
            "images": 1763,
            "seconds": 36.0,
            "processor": "abacus",
        } | ({"own": judged} if kind == "anytime" else {})
    return results


def rising(case: str, index: int, seed: int) -> float:
    return {"gtsrb": 0.6, "cifar10": 0.5, "scarce": 0.4}[case] + 0.02 * index + 0.002 * seed


def found(results: dict[str, dict]) -> dict[str, str]:
    seeds = {name: [0, 1] for name in CASES}
    return {claim.claim: claim.verdict for claim in learning.claims(SCALE.cases, seeds, results)}


def test_every_claim_holds_where_it_is_planted() -> None:
    verdicts = found(planted(rising, plain=0.3))
    assert len(verdicts) == 2 * (6 + 3 + 1 + 3)
    order = {name for name in verdicts if name.startswith("GTSRB is answered best")}
    assert {verdicts.pop(name) for name in order} == {"not testable here"}
    assert set(verdicts.values()) == {"yes"}


def test_one_fall_is_enough_to_deny_a_rise_and_is_named() -> None:
    def falls(case: str, index: int, seed: int) -> float:
        return rising(case, index, seed) - (0.03 if case == "gtsrb" and index == 3 else 0.0)

    claims = {
        claim.claim: claim
        for claim in learning.claims(SCALE.cases, {name: [0, 1] for name in CASES}, planted(falls))
    }
    denied = claims["accuracy rises with every iteration on average (gtsrb, shared statistics)"]
    assert denied.verdict == "no"
    assert (
        denied.ours
        == "in 5 of 6 iterations; 60.1 to 72.1 %; most wrong in iteration 4 (-1.00 points)"
    )
    assert (
        claims[
            "accuracy rises with every iteration on average (cifar10, shared statistics)"
        ].verdict
        == "yes"
    )


def test_a_rise_is_the_mean_of_the_seeds_rises_row_by_row() -> None:
    def opposed(case: str, index: int, seed: int) -> float:
        return 0.5 + (0.03 if seed else -0.01) * index

    *rows, plain = learning.table(CASES["gtsrb"], "own", NAMES, [0, 1], planted(opposed))
    assert [row["accuracy rises"] for row in rows] == ["", *["yes"] * 6]
    assert rows[1]["accuracy rise"].mean == pytest.approx(1.0)
    assert rows[1]["accuracy rise"].deviation == pytest.approx(4.0 / math.sqrt(2))
    assert rows[6]["accuracy %"].mean == pytest.approx(56.0)
    assert (plain["iteration"], plain["accuracy %"].mean) == ("BASELINE", 50.0)
    assert rows[0]["correlation over classes"].mean == 0.5


def test_a_worse_last_iteration_is_told() -> None:
    verdicts = found(planted(rising, plain=0.9))
    assert (
        verdicts["the last iteration is more accurate than BASELINE (scarce, own statistics)"]
        == "no"
    )


def test_a_seed_counts_when_both_its_trainings_are_done() -> None:
    results = planted(rising)
    del results[key(CASES["gtsrb"], "baseline", 1)]
    assert learning.complete(CASES["gtsrb"], range(2), results) == [0]
    assert learning.complete(CASES["cifar10"], range(2), results) == [0, 1]


def test_the_page_and_the_files_hold_the_numbers(tmp_path: Path) -> None:
    results = {**planted(rising), times.name(SCALE.net): measured()}
    page = tables.write(SCALE, results, tmp_path)
    assert "| 7 | 8-8-8 | S3.6-S3.8, OUT | 4 | 38 | 38 | 38 | yes |" in page
    assert "1,763 training images" in page
    assert "abacus" in page
    assert {path.name for path in tmp_path.iterdir()} == {
        "accuracy.csv",
        "accuracy.png",
        "blocks.csv",
        "claims.csv",
        "classes.csv",
        "classes_cifar10.png",
        "classes_gtsrb.png",
        "classes_scarce.png",
        "results.md",
        "seeds.csv",
        "times.csv",
        "times_raw.csv",
    }
    rows = list(read(tmp_path / "seeds.csv"))
    # cases, seeds, two kinds of statistics and BASELINE
    assert len(rows) == 3 * 2 * (2 * 7 + 1)
    assert len(list(read(tmp_path / "classes.csv"))) == 3 * 2 * 2 * 7 * 2
    assert float(next(read(tmp_path / "times_raw.csv"))["alone_7_s"]) == 26.0


def test_the_card_has_the_marks_and_shows_the_figures_that_are_written() -> None:
    card = (command.HERE / "README.md").read_text(encoding="utf-8")
    for mark in ("cpu", "gpu"):
        assert f"<!-- {mark} -->" in card
        assert f"<!-- /{mark} -->" in card
    assert all(f"results/cpu/classes_{name}.png" in card for name in CASES)


# --- the smoke run, end to end --------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """All of the smoke scale with one seed."""
    folder = tmp_path_factory.mktemp("anytimenet")
    return folder, run_smoke(command.main, folder, "--seeds", "1")


def test_the_smoke_run_writes_every_table(smoke) -> None:
    folder, _ = smoke
    page = (folder / "out" / "results.md").read_text()
    for title in ("**Claims**", "**Table I", "**Table II", "**digits", "**scarce"):
        assert title in page
    assert not list(folder.rglob("checkpoint.safetensors"))
    rows = [row for row in read(folder / "out" / "seeds.csv") if row["case"] == "digits"]
    # better than chance
    assert all(0.1 < float(row["accuracy"]) < 1.0 for row in rows)
    surest = [float(row["surest_p_max"]) for row in rows if row["statistics"] == "own"]
    # by construction
    assert surest == sorted(surest)


def test_only_what_is_missing_is_run_again_and_with_the_same_result(smoke) -> None:
    folder, arguments = smoke
    lost = folder / "runs" / "smoke" / "scarce-anytime-seed0" / "result.json"
    assert_only_lost_runs_again(command.main, [*arguments, "--table", "accuracy"], lost)


@pytest.mark.parametrize("option", [["--publish"], ["--table", "blocks"]])
def test_table_1_needs_no_runs(tmp_path, option) -> None:
    done = invoke(command.main, smoke_arguments(tmp_path, *option))
    assert done.exit_code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"blocks.csv", "results.md"}
    assert not (tmp_path / "runs").exists()
