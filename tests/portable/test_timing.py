"""How a runner finds out that its machine has become slower: simulated loads, which must cost
misses only while they are new.

The noise is lognormal. A load multiplies every stage by 2.5, spreads four times as wide, and
deschedules one stage in twenty for two to five times as long; none of it is known to the class
under test. Seeds are fixed, limits were set with room to spare.
"""

import math
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from impatient.portable import SlowdownEstimator, TimePredictor

NORMAL = {0.5: 0.0, 0.9: 1.2816, 0.99: 2.3263, 0.999: 3.0902}
SIGMA = 0.1


def idle(random: np.random.Generator, count: int, quantile: float) -> np.ndarray:
    """Measured over the profiled quantile, of stages on the machine that was profiled."""
    return np.exp(SIGMA * (random.normal(size=count) - NORMAL[quantile]))


def loaded(random: np.random.Generator, count: int, quantile: float) -> np.ndarray:
    descheduled = np.where(random.random(count) < 0.05, random.uniform(2.0, 5.0, count), 1.0)
    return (
        2.5
        * np.exp(4.0 * SIGMA * random.normal(size=count) - SIGMA * NORMAL[quantile])
        * descheduled
    )


def followed(drift: SlowdownEstimator, ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale before each stage, and whether the stage took longer than that."""
    scales = np.empty(len(ratios))
    for place, ratio in enumerate(ratios):
        scales[place] = drift.scale
        drift.observe(ratio)
    return scales, ratios > scales


@pytest.mark.parametrize("quantile", [0.9, 0.99, 0.999])
def test_without_a_load_the_scale_stays_near_one(quantile: float) -> None:
    scales, late = followed(
        SlowdownEstimator(quantile), idle(np.random.default_rng(0), 20_000, quantile)
    )
    assert scales.mean() < 1.03
    assert np.quantile(scales, 0.95) < 1.1
    assert late.mean() < 1.1 * (1.0 - quantile)


@pytest.mark.parametrize("quantile", [0.9, 0.99, 0.999])
def test_a_lasting_load_is_late_as_often_as_the_quantile_says(quantile: float) -> None:
    drift = SlowdownEstimator(quantile)
    random = np.random.default_rng(1)
    followed(drift, loaded(random, 4000, quantile))
    _, late = followed(drift, loaded(random, 40_000, quantile))
    # neighbouring scales are alike, and so come in clumps: wider than the binomial
    assert late.mean() == pytest.approx(1.0 - quantile, rel=0.25)


def test_a_load_is_late_only_while_it_is_new() -> None:
    """Over 100 loads: after 20 stages one in ten is late, after 100 one in forty, after 200 as few
    as wanted.
    """
    late = np.zeros((100, 800))
    for seed in range(100):
        drift = SlowdownEstimator(0.99)
        random = np.random.default_rng(seed)
        followed(drift, idle(random, 300, 0.99))
        _, late[seed] = followed(drift, loaded(random, 800, 0.99))
    assert late[:, 20:40].mean() < 0.12
    assert late[:, 40:100].mean() < 0.045
    assert late[:, 100:200].mean() < 0.025
    assert late[:, 200:].mean() < 0.0125


@pytest.mark.parametrize(("quantile", "stages"), [(0.9, 50), (0.99, 200), (0.999, 2000)])
def test_a_load_that_is_over_is_forgotten_when_the_window_has_passed(
    quantile: float, stages: int
) -> None:
    drift = SlowdownEstimator(quantile)
    random = np.random.default_rng(2)
    followed(drift, loaded(random, 3000, quantile))
    scales, _ = followed(drift, idle(random, 2 * stages, quantile))
    assert scales[stages // 2] > 2.0
    assert scales[stages + 1 :].max() < 1.2


def test_one_stage_in_a_thousand_descheduled_hardly_costs_depth() -> None:
    random = np.random.default_rng(3)
    ratios = idle(random, 50_000, 0.99) * np.where(random.random(50_000) < 0.001, 10.0, 1.0)
    scales, late = followed(SlowdownEstimator(0.99), ratios)
    assert np.mean(scales > 1.5) < 0.03
    assert late.mean() < 0.011


def test_one_descheduled_stage_alone_moves_nothing() -> None:
    drift = SlowdownEstimator(0.99)
    drift.observe(1e9)
    assert drift.scale == 1.0
    drift.observe(3.0)
    assert drift.scale == 3.0
    drift.observe(1e9)
    assert drift.scale == SlowdownEstimator.LARGEST


@pytest.mark.slow
@given(
    ratios=st.lists(st.floats(0.0, 200.0), max_size=300),
    quantile=st.sampled_from([0.5, 0.9, 0.99]),
    forgets=st.lists(st.booleans(), min_size=300, max_size=300),
)
def test_the_scale_is_the_order_statistic_of_the_window(
    ratios: list[float], quantile: float, forgets: list[bool]
) -> None:
    count = {0.5: 50, 0.9: 50, 0.99: 200}[quantile]
    drift = SlowdownEstimator(quantile)
    window = [1.0] * count
    for ratio, forget in zip(ratios, forgets, strict=False):
        if forget:
            drift.forget()
            window = [1.0 + 0.95 * (value - 1.0) for value in window]
        drift.observe(ratio)
        window = [*window[1:], min(ratio, 100.0)]
        wanted = sorted(window)[math.ceil((count + 1) * quantile) - 1]
        # below 1 it is rounded up, by at most a fifth
        least = max(0.01, min(wanted, 1.0), wanted)
        assert least * (1 - 1e-9) <= drift.scale <= max(least, min(1.0, least / 0.8)) * (1 + 1e-9)


@pytest.mark.parametrize(("quantile", "stages"), [(0.5, 50), (0.99, 200), (0.999, 2000)])
def test_a_profile_of_a_bad_moment_is_corrected_when_the_window_has_passed(
    quantile: float, stages: int
) -> None:
    drift = SlowdownEstimator(quantile)
    scales, late = followed(drift, idle(np.random.default_rng(5), 3 * stages, quantile) / 50.0)
    assert scales[: stages // 3].min() == 1.0
    assert 0.016 < scales[stages + 1 :].max() < 0.035
    # as seldom late as with a right profile, or less, since ratios are rounded up
    assert late[stages:].mean() <= 1.5 * (1.0 - quantile)
    # a machine that becomes as slow as the profile says is noticed at the second stage
    drift.observe(1.0)
    drift.observe(1.0)
    assert (drift.scale == 1.0) == (quantile > 0.9)


def test_stages_a_little_faster_than_profiled_change_nothing() -> None:
    drift = SlowdownEstimator(0.99)
    for _ in range(400):
        drift.observe(0.81)
    assert drift.scale == 1.0


def test_a_machine_that_is_given_nothing_to_do_is_believed_again_in_time() -> None:
    drift = SlowdownEstimator(0.99)
    for _ in range(200):
        drift.observe(9.0)
    for _ in range(100):
        drift.forget()
    assert 1.0 < drift.scale < 1.05


def test_stages_seen_by_several_threads_are_each_counted_once() -> None:
    drift = SlowdownEstimator(0.99)
    quantile = 0.99
    values = idle(np.random.default_rng(4), 4000, quantile) * 5.0

    def observe(part: np.ndarray) -> None:
        for ratio in part:
            drift.observe(ratio)

    threads = [threading.Thread(target=observe, args=(part,)) for part in np.split(values, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drift.scale > 1.0
    assert sorted(drift._latest) == drift._sorted
    assert len(drift._latest) == 200


@pytest.mark.parametrize("quantile", [-0.1, 0.0, 1.0, math.nan])
def test_a_quantile_that_is_none_is_an_error(quantile: float) -> None:
    with pytest.raises(ValueError, match="above 0 and below 1"):
        SlowdownEstimator(quantile)


# --- pace -----------------------------------------------------------------------------------------


def test_what_fits_follows_the_drift_that_batch_sizes_share() -> None:
    drift = SlowdownEstimator(0.99)
    one = TimePredictor([1.0, 2.0], 0.99, [0.5, 2.0], drift)
    many = TimePredictor([8.0, 16.0], 0.99, drift=drift)
    assert one.fits(1, now=1.0, deadline=3.5, reserve_s=0.5)
    assert not one.fits(1, now=1.0, deadline=3.4, reserve_s=0.5)
    for _ in range(2):
        # the stage alone took three times as long
        one.observe(0, 1.5)
    assert (one.scale, one.needs_s(1), many.needs_s(1)) == (3.0, 6.0, 48.0)
    many.observe(0, 40.0, answered=True)
    many.observe(0, 40.0, answered=True)
    assert one.scale == 5.0


def test_beyond_the_last_exit_everything_fits() -> None:
    pace = TimePredictor([1.0], 0.99)
    assert pace.fits(1, now=5.0, deadline=0.0, reserve_s=0.0)
    assert pace.needs_s(1) == 0.0


def test_a_stage_whose_profile_is_nothing_says_nothing() -> None:
    pace = TimePredictor([0.0], 0.99)
    for _ in range(10):
        pace.observe(0, 5.0)
    assert pace.scale == 1.0
