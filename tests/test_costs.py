"""Cost profiles: quantiles of measured times, and the two cumulative costs that follow."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from impatient.costs import BatchCosts, CostProfile, Noise, Quantiles, check_increasing
from impatient.errors import CostError, CostOrderError, StaleInput, StorageError
from impatient.files import read_json, write_json
from impatient.provenance import provenance
from impatient.store import from_plain, to_plain


def exactly(seconds: float) -> Quantiles:
    return Quantiles.of([seconds])


def batch(stages: list[float], heads: list[float], exit_free: float = 7.0) -> BatchCosts:
    return BatchCosts(
        stages=tuple(map(exactly, stages)),
        heads=tuple(map(exactly, heads)),
        exit_free=exactly(exit_free),
    )


def made(**changes: Any) -> CostProfile:
    """Four exits: stages of 1, 2, 3 and 4 s; heads of 1/2, 1/4, 1/8 s and none."""
    values: dict[str, Any] = {
        "exits": ("a", "b", "c", "output"),
        "batches": {
            1: batch([1.0, 2.0, 3.0, 4.0], [0.5, 0.25, 0.125, 0.0]),
            8: batch([2.0, 4.0, 6.0, 8.0], [1.0, 0.5, 0.25, 0.0], 15.0),
        },
        "stage_macs": (10, 20, 30, 40),
        "head_macs": (5, 6, 7, 0),
        "stage_parameters": (1, 2, 3, 4),
        "head_parameters": (5, 6, 7, 0),
        "stage_bytes": (100, 200, 300, 400),
        "head_bytes": (50, 60, 70, 0),
        "stage_energy_j": (0.125, 0.25, 0.5, 1.0),
        "head_energy_j": (0.0625, 0.0625, 0.03125, 0.0),
        "provenance": provenance(device="cpu", threads=2),
    }
    return CostProfile(**{**values, **changes})


# --- quantiles ------------------------------------------------------------------------------------


def test_quantiles_are_order_statistics_rounded_up():
    summary = Quantiles.of([float(value) for value in range(1000, -1, -1)])
    assert summary == Quantiles(
        mean=500.0, p50=500.0, p90=900.0, p99=990.0, p999=999.0, max=1000.0, n=1001
    )


def test_of_few_repeats_the_high_quantiles_are_the_maximum():
    summary = Quantiles.of([3.0, 1.0, 2.0])
    assert (summary.p50, summary.p90, summary.p99, summary.max, summary.n) == (
        2.0,
        3.0,
        3.0,
        3.0,
        3,
    )
    # up, never between two measurements
    assert Quantiles.of([1.0, 2.0]).p50 == 2.0


def test_one_repeat_is_all_its_quantiles():
    assert set(dataclasses.astuple(exactly(0.25))) == {0.25, 1}


@pytest.mark.parametrize("times", [[], [math.nan], [1.0, math.inf], [-1.0]])
def test_times_that_are_missing_negative_or_not_finite_are_refused(times):
    with pytest.raises(CostError, match="measured times"):
        Quantiles.of(times)


def test_quantiles_that_decrease_are_refused():
    with pytest.raises(CostError, match="must not decrease"):
        Quantiles(mean=1.0, p50=2.0, p90=1.0, p99=3.0, p999=3.0, max=3.0, n=3)


# --- cumulative costs -----------------------------------------------------------------------------


def test_an_interruptible_run_pays_every_head_on_the_way():
    assert made().interruptible_s() == (1.5, 3.75, 6.875, 10.875)


def test_a_contract_run_pays_only_the_head_that_answers():
    assert made().contract_s() == (1.5, 3.25, 6.125, 10.0)


# nothing posted on the way: as a contract run
@pytest.mark.parametrize(
    ("heads", "wanted"),
    [
        ([True, True, True, True], (1.5, 3.75, 6.875, 10.875)),
        (
            [False, False, False, False],
            (1.5, 3.25, 6.125, 10.0),
        ),
        ([True, False, True, True], (1.5, 3.75, 6.625, 10.625)),
        ([False, True, False, False], (1.5, 3.25, 6.375, 10.25)),
    ],
)
def test_a_head_that_does_not_run_when_passed_is_paid_only_by_its_own_exit(heads, wanted):
    assert made().cumulative("time", "interruptible", heads=heads) == wanted


def test_multiply_accumulates_add_up_like_seconds():
    assert made().cumulative("macs", "contract") == (15, 36, 67, 100)
    assert made().cumulative("macs", "interruptible") == (15, 41, 78, 118)
    assert made().cumulative("macs", "interruptible", heads=[False, True, True, True]) == (
        15,
        36,
        73,
        113,
    )


@pytest.mark.parametrize(
    ("cost", "contract", "interruptible", "exit_free"),
    [
        ("time", (1.5, 3.25, 6.125, 10.0), (1.5, 3.75, 6.875, 10.875), 7.0),
        ("macs", (15, 36, 67, 100), (15, 41, 78, 118), 100),
        ("bytes", (150, 360, 670, 1000), (150, 410, 780, 1180), 1000),
        ("energy", (0.1875, 0.4375, 0.90625, 1.875), (0.1875, 0.5, 1.03125, 2.03125), 1.875),
    ],
)
def test_every_cost_adds_up_in_the_same_way(cost, contract, interruptible, exit_free):
    assert made().cumulative(cost, "contract") == contract
    assert made().cumulative(cost, "interruptible") == interruptible
    assert made().cumulative(cost, "interruptible", heads=[False] * 4) == contract
    assert made().exit_free(cost) == exit_free
    assert made().holds(cost)


@pytest.mark.parametrize(("cost", "remedy"), [("bytes", "eager"), ("energy", "energy.find_meter")])
def test_a_cost_that_a_profile_does_not_hold_is_refused_with_what_to_do(cost, remedy):
    lacking = {
        "bytes": ("stage_bytes", "head_bytes"),
        "energy": ("stage_energy_j", "head_energy_j"),
    }[cost]
    costs = made(**dict.fromkeys(lacking))
    assert not costs.holds(cost)
    for asked in (costs.parts, costs.exit_free, lambda cost: costs.cumulative(cost, "contract")):
        with pytest.raises(CostError, match=f"says nothing about {cost}: .*{remedy}"):
            asked(cost)


def test_an_unknown_cost_is_refused():
    with pytest.raises(CostError, match="cost='money'; expected one of time, macs, bytes, energy"):
        made().cumulative("money", "contract")


@pytest.mark.parametrize("joules", [(-1.0, 0.0, 0.0, 0.0), (math.nan, 0.0, 0.0, 0.0)])
def test_joules_that_cannot_be_are_refused(joules):
    with pytest.raises(CostError, match="joules must be finite"):
        made(stage_energy_j=joules)


def test_costs_are_those_of_the_batch_size_asked_for():
    assert made().contract_s(batch_size=8) == (3.0, 6.5, 12.25, 20.0)
    assert (made().exit_free_s(), made().exit_free_s(batch_size=8)) == (7.0, 15.0)


def test_the_statistic_asked_for_is_the_one_added():
    slow = Quantiles(mean=1.0, p50=2.0, p90=3.0, p99=4.0, p999=5.0, max=6.0, n=9)
    costs = made(
        exits=("output",),
        batches={1: BatchCosts(stages=(slow,), heads=(exactly(0.0),), exit_free=slow)},
        stage_macs=(1,),
        head_macs=(0,),
        stage_parameters=(1,),
        head_parameters=(0,),
        stage_bytes=None,
        head_bytes=None,
        stage_energy_j=None,
        head_energy_j=None,
    )
    for wanted, statistic in enumerate(("mean", "p50", "p90", "p99", "p999", "max"), start=1):
        assert (
            costs.contract_s(statistic=statistic)
            == costs.interruptible_s(statistic=statistic)
            == (float(wanted),)
        )
        assert costs.exit_free_s(statistic=statistic) == float(wanted)


# --- what is refused ------------------------------------------------------------------------------


def test_a_batch_size_that_was_not_measured_is_refused_with_those_that_were():
    with pytest.raises(
        CostError, match=r"batch size 4 was not measured; measured: \[1, 8\]\. Run profile"
    ):
        made().contract_s(batch_size=4)


@pytest.mark.parametrize(
    ("mode", "statistic"), [("anytime", "mean"), ("contract", "p95"), ("contract", "n")]
)
def test_an_unknown_mode_or_statistic_is_refused(mode, statistic):
    with pytest.raises(CostError, match=r"(mode|statistic)=.*; expected "):
        made().cumulative("time", mode, statistic=statistic)


@pytest.mark.parametrize("heads", [[True], [True] * 5, []])
def test_a_mask_of_another_length_is_refused(heads):
    with pytest.raises(CostError, match=f"{len(heads)} .* 4 exits"):
        made().cumulative("time", "interruptible", heads=heads)
    with pytest.raises(CostError, match=f"{len(heads)} .* 4 exits"):
        made().cumulative("macs", "interruptible", heads=heads)


@pytest.mark.parametrize(
    "name",
    [
        "stage_macs",
        "head_macs",
        "stage_parameters",
        "head_parameters",
        "stage_bytes",
        "head_bytes",
        "stage_energy_j",
        "head_energy_j",
    ],
)
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


# --- noise ----------------------------------------------------------------------------------------


def test_the_same_time_again_and_again_is_no_noise():
    assert Noise.of([0.25] * 40) == Noise(aa_ratio=1.0, aa_low=1.0, aa_high=1.0, spread=0.0, n=20)
    assert not Noise.of([0.25] * 40).too_noisy


def test_noise_is_that_of_pairs_not_of_a_machine_that_gets_slower_on_the_whole():
    slower = [1.0 + pair for pair in range(30) for _ in range(2)]
    assert Noise.of(slower) == Noise.of([1.0] * 60)


def test_what_always_runs_second_has_no_advantage():
    noise = Noise.of([1.0, 1.1] * 20)
    assert noise.aa_ratio == pytest.approx(1.0, abs=0.01)
    assert (noise.aa_low, noise.aa_high) == (pytest.approx(1 / 1.1), pytest.approx(1.1))
    assert noise.too_noisy


@pytest.mark.parametrize(("pairs", "known"), [(0, False), (5, False), (6, True)])
def test_the_median_of_few_pairs_has_no_interval(pairs, known):
    assert (Noise.of([1.0, 2.0] * pairs + [9.0]) is not None) == known


def test_of_six_pairs_the_interval_is_all_of_them():
    noise = Noise.of([1.0, 1.0, 1.0, 1.02, 0.97, 1.0, 1.0, 1.01, 1.0, 1.0, 1.0, 1.0])
    assert (noise.aa_low, noise.aa_high, noise.n) == (0.97, 1.02, 6)


def test_the_interval_ends_at_the_ranks_of_scipys_binomial_distribution():
    for pairs in (*range(6, 60), 1000, 2001):
        ratios = np.arange(1.0, pairs + 1.0) / pairs
        # every second pair is turned round
        times = [(r, 1.0) if place % 2 == 0 else (1.0, r) for place, r in enumerate(ratios)]
        noise = Noise.of(np.ravel(times).tolist())
        assert noise.aa_low == ratios[int(stats.binom.ppf(0.025, pairs, 0.5)) - 1]


def test_a_clock_that_shows_no_time_shows_no_noise():
    assert Noise.of([0.0] * 40) is None


@given(st.integers(6, 300), st.floats(0.001, 0.5), st.integers(0, 2**32 - 1))
def test_the_interval_holds_the_median_and_the_spread_grows_with_the_noise(pairs, size, seed):
    drawn = np.random.default_rng(seed).normal(size=2 * pairs)
    little, much = (Noise.of(np.exp(scale * drawn).tolist()) for scale in (size / 2, size))
    assert little.aa_low <= little.aa_ratio <= little.aa_high
    assert little.spread < much.spread
    # the same pairs, pulled further apart
    assert much.aa_low <= little.aa_low <= 1.0 + 1e-9 or little.aa_low > 1.0


def test_the_interval_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    held = [
        noise.aa_low <= 1.0 <= noise.aa_high
        for noise in (Noise.of(np.exp(0.1 * random.normal(size=60)).tolist()) for _ in range(400))
    ]
    # 95.7 % for 30 pairs
    assert 0.93 <= np.mean(held) <= 0.985


@pytest.mark.parametrize(
    "numbers",
    [(1.0, 1.1, 1.2, 0.0), (math.nan, 1.0, 1.0, 0.0), (1.0, 0.0, 1.0, 0.0), (1.0, 1.0, 1.0, -0.1)],
)
def test_noise_that_cannot_be_is_refused(numbers):
    with pytest.raises(CostError, match="A/A ratio"):
        Noise(**dict(zip(("aa_ratio", "aa_low", "aa_high", "spread"), numbers, strict=True)), n=10)


# --- comparing ------------------------------------------------------------------------------------


def spread(half: float) -> Noise:
    return Noise(aa_ratio=1.0, aa_low=0.99, aa_high=1.01, spread=half, n=100)


def noisy(noise: Noise | None, speed: float = 1.0, **changes: Any) -> CostProfile:
    """Two exits, of 1 s and 3 s, and `speed` times as fast."""
    costs = batch([1.0 / speed, 2.0 / speed], [0.0, 0.0], 2.5 / speed)
    rows = dict.fromkeys(("stage_bytes", "head_bytes", "stage_energy_j", "head_energy_j"))
    rows |= dict.fromkeys(
        ("stage_macs", "head_macs", "stage_parameters", "head_parameters"), (1, 1)
    )
    values = {
        "exits": ("a", "output"),
        "batches": {1: dataclasses.replace(costs, noise=noise)},
        **rows,
        **changes,
    }
    return made(**values)


@pytest.mark.parametrize(
    ("speed", "verdict"),
    [
        (1.31, "faster"),
        (1.06, "faster"),
        (1.04, "cannot tell apart"),
        (1.0, "cannot tell apart"),
        (0.96, "cannot tell apart"),
        (0.94, "slower"),
    ],
)
def test_a_difference_beyond_the_noise_of_both_is_one(speed, verdict):
    # 3-4-5: the noise of both is 5 %
    rows = noisy(spread(0.03)).compare(noisy(spread(0.04), speed))
    assert [(row.exit, row.name) for row in rows] == [
        (0, "a"),
        (1, "output"),
        (None, "without exits"),
    ]
    for row in rows:
        assert (row.ratio, row.p50_ratio, row.p99_ratio, row.noise) == pytest.approx(
            (speed, speed, speed, 0.05)
        )
        assert row.verdict == verdict
    assert (rows[1].a_s, rows[1].b_s) == pytest.approx((3.0, 3.0 / speed))


def test_one_late_run_that_moves_the_mean_is_no_difference():
    late = Quantiles(mean=2.0, p50=1.0, p90=1.0, p99=100.0, p999=100.0, max=100.0, n=100)
    slow = BatchCosts(
        stages=(late, exactly(2.0)),
        heads=(exactly(0.0),) * 2,
        exit_free=exactly(2.5),
        noise=spread(0.01),
    )
    row, *_ = noisy(spread(0.01)).compare(noisy(None, batches={1: slow}))
    assert (row.ratio, row.p50_ratio, row.verdict) == (0.5, 1.0, "cannot tell apart")


@pytest.mark.parametrize(("a", "b"), [(None, spread(0.01)), (spread(0.01), None), (None, None)])
def test_where_noise_is_not_known_nothing_is_said(a, b):
    assert {row.verdict for row in noisy(a).compare(noisy(b, 5.0))} == {"noise unknown"}


def test_a_time_of_nothing_compares_with_nothing():
    nothing = batch([0.0, 0.0], [0.0, 0.0], 0.0)
    row, *_ = noisy(spread(0.0)).compare(
        noisy(None, batches={1: dataclasses.replace(nothing, noise=spread(0.0))})
    )
    assert math.isnan(row.ratio)
    assert row.verdict == "cannot tell apart"


def test_only_batch_sizes_of_both_are_compared():
    one = made()
    eight = made(batches={8: made().at(8), 16: made().at(8)})
    assert {row.batch_size for row in one.compare(eight)} == {8}
    with pytest.raises(
        CostError, match=r"batch sizes \[1\], profile B \[16\]; expected one in both"
    ):
        made(batches={1: made().at(1)}).compare(made(batches={16: made().at(8)}))


def test_profiles_of_different_networks_are_refused_unless_asked_for():
    other = noisy(spread(0.01), provenance=provenance(network="another"))
    with pytest.raises(StaleInput, match=r"network structure: None.*'another'"):
        noisy(spread(0.01)).compare(other)
    with pytest.raises(StaleInput, match=r"exits after a, output, profile B after b, output"):
        noisy(None).compare(noisy(None, exits=("b", "output")))
    assert len(noisy(spread(0.01)).compare(other, any_network=True)) == 3
    with pytest.raises(CostError, match="2 exits, profile B 4"):
        noisy(spread(0.01)).compare(made(), any_network=True)


def test_what_differs_is_named():
    a = made(provenance=provenance(engine="eager", threads=1, device="cpu"))
    b = dataclasses.replace(
        a.provenance,
        engine="openvino",
        threads=2,
        versions={**a.provenance.versions, "openvino": "1"},
    )
    assert a.differences(made(provenance=b)) == {
        "engine": ("eager", "openvino"),
        "threads": ("1", "2"),
        "openvino version": ("none", "1"),
    }
    assert a.differences(a) == {}


# --- order ----------------------------------------------------------------------------------------


def test_increasing_costs_pass_as_floats():
    assert check_increasing([1, 2]) == (1.0, 2.0)
    assert check_increasing([1e-9]) == (1e-9,)


def test_costs_that_do_not_increase_name_the_first_offender():
    with pytest.raises(CostOrderError, match="exit 2 costs 3 after 3 at exit 1"):
        check_increasing([1.0, 3.0, 3.0, 2.0])


@pytest.mark.parametrize("costs", [[], [0.0], [-1.0, 2.0], [1.0, math.nan], [math.inf]])
def test_costs_that_are_no_positive_finite_times_are_refused(costs):
    with pytest.raises(CostOrderError, match="must be positive and finite"):
        check_increasing(costs)


# --- files ----------------------------------------------------------------------------------------


def test_a_profile_survives_its_file(tmp_path):
    made().save(tmp_path / "costs.json")
    assert CostProfile.load(tmp_path / "costs.json") == made(
        provenance=CostProfile.load(tmp_path / "costs.json").provenance
    )
    back = CostProfile.load(tmp_path / "costs.json")
    assert (back.provenance.device, back.provenance.threads) == ("cpu", 2)
    assert back.interruptible_s(batch_size=8) == made().interruptible_s(batch_size=8)


def test_noise_and_the_meter_survive_the_file(tmp_path):
    noise = Noise(aa_ratio=1.0, aa_low=0.5, aa_high=2.0, spread=0.25, n=9)
    made(batches={1: dataclasses.replace(made().at(1), noise=noise)}, energy_meter="abacus").save(
        tmp_path / "costs.json"
    )
    back = CostProfile.load(tmp_path / "costs.json")
    assert (back.at(1).noise, back.energy_meter) == (noise, "abacus")
    assert back.cumulative("energy", "contract") == made().cumulative("energy", "contract")
    assert back.exit_free("bytes") == 1000


def test_the_backbone_takes_what_its_stages_take_unless_more_is_known():
    costs = made(exit_free_macs=None, exit_free_bytes=None, exit_free_energy_j=None)
    for cost in ("macs", "bytes", "energy"):
        assert costs.exit_free(cost) == sum(costs.parts(cost)[0])
    assert made(exit_free_macs=3).exit_free("macs") == 3.0


def test_minus_one_for_what_is_not_known_is_read_in_files_of_version_0_1_0(tmp_path):
    unknown = {"stage_bytes": None, "head_bytes": None, "stage_energy_j": None}
    costs = made(**unknown, head_energy_j=None, exit_free_bytes=None, exit_free_energy_j=None)
    value = json.loads(json.dumps(to_plain(costs)))
    del value["schema"]
    value["provenance"]["schema"] = 1
    value |= {"kind": "cost_profile", "exit_free_bytes": -1, "exit_free_energy_j": -1.0}
    write_json(tmp_path / "costs.json", value)
    back = CostProfile.load(tmp_path / "costs.json")
    assert (back.exit_free_bytes, back.exit_free_energy_j) == (None, None)
    assert back == costs


def test_a_file_from_before_bytes_energy_and_noise_still_loads():
    value = json.loads(json.dumps(to_plain(made())))
    new = (
        "schema",
        "stage_bytes",
        "head_bytes",
        "stage_energy_j",
        "head_energy_j",
        "exit_free_bytes",
        "exit_free_energy_j",
        "energy_meter",
    )
    for name in new:
        del value[name]
    for costs in value["batches"].values():
        del costs["noise"]
    old = from_plain(value, CostProfile)
    assert [old.holds(cost) for cost in ("time", "macs", "bytes", "energy")] == [
        True,
        True,
        False,
        False,
    ]
    assert old.contract_s() == made().contract_s()
    assert old.at(1).noise is None


def damaged(path: list[Any], value: Any) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(json.dumps(to_plain(made())))
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
        (["exits"], KeyError),
        (["batches"], []),
        (["batches"], {}),
        (["batches"], None),
        (["batches"], {"one": {}}),
        (["batches", "1", "stages"], 3),
        (["batches", "1", "exit_free"], KeyError),
        (["batches", "1", "heads"], [{"mean": 1.0}]),
        (["batches", "1", "exit_free", "p50"], "fast"),
        (["batches", "1", "exit_free", "p50"], None),
        (["batches", "1", "exit_free", "mean"], math.nan),
        (["stage_macs"], ["many", 1, 1, 1]),
        (["stage_macs"], None),
        (["head_macs"], [1]),
        (["stage_bytes"], ["many"]),
        (["head_energy_j"], [1.0]),
        (["batches", "1", "noise"], {"n": 3}),
        (["provenance"], KeyError),
        (["provenance"], None),
        (["provenance", "versions"], KeyError),
    ],
)
def test_json_that_is_no_cost_profile_is_refused(tmp_path, path, value):
    write_json(tmp_path / "costs.json", damaged(path, value))
    with pytest.raises(StorageError, match=r"costs.json is no cost profile .*impatient profile"):
        CostProfile.load(tmp_path / "costs.json")


def test_the_damage_is_what_is_refused(tmp_path):
    write_json(tmp_path / "costs.json", damaged(["exits", 0], "a"))
    assert CostProfile.load(tmp_path / "costs.json").exits == made().exits


def test_a_profile_of_another_schema_or_another_file_is_refused(tmp_path):
    with pytest.raises(StorageError, match="schema version 99"):
        from_plain(damaged(["schema"], 99), CostProfile)
    (tmp_path / "costs.json").write_text('{"exits": ')
    with pytest.raises(StorageError, match="not valid JSON"):
        CostProfile.load(tmp_path / "costs.json")
    write_json(tmp_path / "costs.json", {"kind": "recording"})
    assert read_json(tmp_path / "costs.json")
    with pytest.raises(StorageError, match="it is a 'recording'; expected cost_profile"):
        CostProfile.load(tmp_path / "costs.json")
