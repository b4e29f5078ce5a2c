"""Cost profiles: quantiles of measured times, and the two cumulative costs that follow."""

import dataclasses
import json
import math
from typing import Any

import pytest

from impatient.costs import BatchCosts, CostProfile, Quantiles, check_increasing
from impatient.errors import CostError, CostOrderError, StorageError
from impatient.files import read_json, write_json
from impatient.provenance import provenance


def exactly(seconds: float) -> Quantiles:
    return Quantiles.of([seconds])


def batch(stages: list[float], heads: list[float], exit_free: float = 7.0) -> BatchCosts:
    return BatchCosts(stages=tuple(map(exactly, stages)), heads=tuple(map(exactly, heads)), exit_free=exactly(exit_free))


def made(**changes: Any) -> CostProfile:
    """Four exits: stages of 1, 2, 3 and 4 s; heads of 1/2, 1/4, 1/8 s and none."""
    values: dict[str, Any] = {
        "exits": ("a", "b", "c", "output"),
        "batches": {
            1: batch([1.0, 2.0, 3.0, 4.0], [0.5, 0.25, 0.125, 0.0]),
            8: batch([2.0, 4.0, 6.0, 8.0], [1.0, 0.5, 0.25, 0.0], 15.0),
        },
        "stage_macs": (10, 20, 30, 40), "head_macs": (5, 6, 7, 0),
        "stage_parameters": (1, 2, 3, 4), "head_parameters": (5, 6, 7, 0),
        "provenance": provenance(device="cpu", threads=2),
    }  # fmt: skip
    return CostProfile(**{**values, **changes})


# --- quantiles --------------------------------------------------------------------------------------------------------


def test_quantiles_are_order_statistics_rounded_up():
    summary = Quantiles.of([float(value) for value in range(1000, -1, -1)])
    assert summary == Quantiles(mean=500.0, p50=500.0, p90=900.0, p99=990.0, p999=999.0, max=1000.0, n=1001)


def test_of_few_repeats_the_high_quantiles_are_the_maximum():
    summary = Quantiles.of([3.0, 1.0, 2.0])
    assert (summary.p50, summary.p90, summary.p99, summary.max, summary.n) == (2.0, 3.0, 3.0, 3.0, 3)
    assert Quantiles.of([1.0, 2.0]).p50 == 2.0  # up, never between two measurements


def test_one_repeat_is_all_its_quantiles():
    assert set(dataclasses.astuple(exactly(0.25))) == {0.25, 1}


@pytest.mark.parametrize("times", [[], [math.nan], [1.0, math.inf], [-1.0]])
def test_times_that_are_missing_negative_or_not_finite_are_refused(times):
    with pytest.raises(CostError, match="measured times"):
        Quantiles.of(times)


def test_quantiles_that_decrease_are_refused():
    with pytest.raises(CostError, match="must not decrease"):
        Quantiles(mean=1.0, p50=2.0, p90=1.0, p99=3.0, p999=3.0, max=3.0, n=3)


# --- cumulative costs -------------------------------------------------------------------------------------------------


def test_an_interruptible_run_pays_every_head_on_the_way():
    assert made().interruptible_s() == (1.5, 3.75, 6.875, 10.875)


def test_a_contract_run_pays_only_the_head_that_answers():
    assert made().contract_s() == (1.5, 3.25, 6.125, 10.0)


@pytest.mark.parametrize(
    ("heads", "wanted"),
    [
        ([True, True, True, True], (1.5, 3.75, 6.875, 10.875)),
        ([False, False, False, False], (1.5, 3.25, 6.125, 10.0)),  # nothing posted on the way: as a contract run
        ([True, False, True, True], (1.5, 3.75, 6.625, 10.625)),
        ([False, True, False, False], (1.5, 3.25, 6.375, 10.25)),
    ],
)
def test_a_head_that_does_not_run_when_passed_is_paid_only_by_its_own_exit(heads, wanted):
    assert made().cumulative_s("interruptible", heads=heads) == wanted


def test_multiply_accumulates_add_up_like_seconds():
    assert made().cumulative_macs("contract") == (15, 36, 67, 100)
    assert made().cumulative_macs("interruptible") == (15, 41, 78, 118)
    assert made().cumulative_macs("interruptible", heads=[False, True, True, True]) == (15, 36, 73, 113)


def test_costs_are_those_of_the_batch_size_asked_for():
    assert made().contract_s(batch_size=8) == (3.0, 6.5, 12.25, 20.0)
    assert (made().exit_free_s(), made().exit_free_s(batch_size=8)) == (7.0, 15.0)


def test_the_statistic_asked_for_is_the_one_added():
    slow = Quantiles(mean=1.0, p50=2.0, p90=3.0, p99=4.0, p999=5.0, max=6.0, n=9)
    costs = made(
        exits=("output",), batches={1: BatchCosts(stages=(slow,), heads=(exactly(0.0),), exit_free=slow)},
        stage_macs=(1,), head_macs=(0,), stage_parameters=(1,), head_parameters=(0,),
    )  # fmt: skip
    for wanted, statistic in enumerate(("mean", "p50", "p90", "p99", "p999", "max"), start=1):
        assert costs.contract_s(statistic=statistic) == costs.interruptible_s(statistic=statistic) == (float(wanted),)
        assert costs.exit_free_s(statistic=statistic) == float(wanted)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_batch_size_that_was_not_measured_is_refused_with_those_that_were():
    with pytest.raises(CostError, match=r"batch size 4 was not measured; measured: \[1, 8\]\. Run profile"):
        made().contract_s(batch_size=4)


@pytest.mark.parametrize(("mode", "statistic"), [("anytime", "mean"), ("contract", "p95"), ("contract", "n")])
def test_an_unknown_mode_or_statistic_is_refused(mode, statistic):
    with pytest.raises(CostError, match=r"unknown .*; needed: "):
        made().cumulative_s(mode, statistic=statistic)


@pytest.mark.parametrize("heads", [[True], [True] * 5, []])
def test_a_mask_of_another_length_is_refused(heads):
    with pytest.raises(CostError, match=f"{len(heads)} .* 4 exits"):
        made().cumulative_s("interruptible", heads=heads)
    with pytest.raises(CostError, match=f"{len(heads)} .* 4 exits"):
        made().cumulative_macs("interruptible", heads=heads)


@pytest.mark.parametrize("name", ["stage_macs", "head_macs", "stage_parameters", "head_parameters"])
def test_a_row_of_another_length_is_refused(name):
    with pytest.raises(CostError, match=f"{name} has 3 entries for 4 exits"):
        made(**{name: (1, 2, 3)})


def test_measured_times_of_another_length_are_refused():
    with pytest.raises(CostError, match=r"batches\[1\]\.stages has 3 entries for 4 exits"):
        made(batches={1: batch([1.0] * 3, [1.0] * 4)})
    with pytest.raises(CostError, match=r"batches\[2\]\.heads has 5 entries for 4 exits"):
        made(batches={2: batch([1.0] * 4, [1.0] * 5)})


def test_a_profile_without_exits_or_measurements_is_refused():
    with pytest.raises(CostError, match="at least one exit and one batch size"):
        made(batches={})
    with pytest.raises(CostError, match="at least one exit and one batch size"):
        made(exits=())


# --- order ------------------------------------------------------------------------------------------------------------


def test_increasing_costs_pass_as_floats():
    assert check_increasing([1, 2]) == (1.0, 2.0)
    assert check_increasing([1e-9]) == (1e-9,)


def test_costs_that_do_not_increase_name_the_first_offender():
    with pytest.raises(CostOrderError, match="exit 2 costs 3 s after 3 s at exit 1"):
        check_increasing([1.0, 3.0, 3.0, 2.0])


@pytest.mark.parametrize("costs", [[], [0.0], [-1.0, 2.0], [1.0, math.nan], [math.inf]])
def test_costs_that_are_no_positive_finite_times_are_refused(costs):
    with pytest.raises(CostOrderError, match="must be positive finite seconds"):
        check_increasing(costs)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_profile_survives_its_file(tmp_path):
    made().save(tmp_path / "costs.json")
    assert CostProfile.load(tmp_path / "costs.json") == made(provenance=CostProfile.load(tmp_path / "costs.json").provenance)
    back = CostProfile.load(tmp_path / "costs.json")
    assert (back.provenance.device, back.provenance.threads) == ("cpu", 2)
    assert back.interruptible_s(batch_size=8) == made().interruptible_s(batch_size=8)


def damaged(path: list[Any], value: Any) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(json.dumps(made().to_json()))
    place: Any = whole
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return whole


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["exits"], KeyError), (["batches"], []), (["batches"], {}), (["batches"], None), (["batches"], {"one": {}}),
        (["batches", "1", "stages"], 3), (["batches", "1", "exit_free"], KeyError),
        (["batches", "1", "heads"], [{"mean": 1.0}]),
        (["batches", "1", "exit_free", "p50"], "fast"), (["batches", "1", "exit_free", "p50"], None),
        (["batches", "1", "exit_free", "mean"], math.nan), (["stage_macs"], ["many", 1, 1, 1]), (["stage_macs"], None),
        (["head_macs"], [1]), (["provenance"], KeyError), (["provenance"], None), (["provenance", "versions"], KeyError),
    ],
)  # fmt: skip
def test_json_that_is_no_cost_profile_is_refused(tmp_path, path, value):
    write_json(tmp_path / "costs.json", damaged(path, value))
    with pytest.raises(CostError):
        CostProfile.load(tmp_path / "costs.json")


def test_the_damage_is_what_is_refused(tmp_path):
    write_json(tmp_path / "costs.json", damaged(["exits", 0], "a"))
    assert CostProfile.load(tmp_path / "costs.json").exits == made().exits


def test_a_profile_of_another_schema_or_another_file_is_refused(tmp_path):
    with pytest.raises(StorageError, match="schema version 99"):
        CostProfile.from_json(damaged(["provenance", "schema"], 99))
    (tmp_path / "costs.json").write_text('{"exits": ')
    with pytest.raises(StorageError, match="not valid JSON"):
        CostProfile.load(tmp_path / "costs.json")
    write_json(tmp_path / "costs.json", {"kind": "recording"})
    assert read_json(tmp_path / "costs.json")
    with pytest.raises(CostError, match="not a cost profile"):
        CostProfile.load(tmp_path / "costs.json")
