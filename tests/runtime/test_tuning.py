"""What a setting gains is told apart from noise, with the error that is said."""

import numpy as np
import pytest

from fakes import FakeNetwork, X
from impatient.clock import SYSTEM_CLOCK, FakeClock
from impatient.errors import CostError, RunError
from impatient.runtime.real_time import Setting
from impatient.runtime.tuning import BLOCK, PAIRS, Ratio, Tuned, _ratio, _ratios, tune

GC = Setting(name="gc", done=True, note="")


def table(rng: np.random.Generator, blocks: int, factor: float = 1.0) -> np.ndarray:
    """Times whose blocks differ as a machine's do."""
    level = rng.lognormal(0.0, 0.05, (blocks, 1))
    return factor * level * rng.lognormal(0.0, 0.2, (blocks, BLOCK))


def test_equal_times_are_rarely_told_apart_and_gains_are_found() -> None:
    rng = np.random.default_rng(0)
    equal = [_ratio(table(rng, 20), table(rng, 20), 0.5) for _ in range(60)]
    told = sum(ratio.verdict != "cannot tell apart" for ratio in equal)
    assert told <= 9
    gained = _ratios(table(rng, 200, 0.8), table(rng, 200))
    assert set(gained) == {"p50", "p99", "p99.9"}
    assert all(ratio.low < 0.8 < ratio.high for ratio in gained.values())
    assert gained["p50"].verdict == gained["p99"].verdict == "shorter"


def test_quantiles_of_too_few_runs_are_left_out() -> None:
    few = table(np.random.default_rng(0), 8)
    assert set(_ratios(few, few)) == {"p50"}
    assert _ratios(few[:7], few[:7]) == {}


def test_a_setting_that_makes_something_longer_is_not_worth_it() -> None:
    shorter = {"p99": Ratio(value=0.8, low=0.7, high=0.9)}
    longer = {"p99": Ratio(value=1.2, low=1.1, high=1.3)}
    gain = Tuned(setting=GC, runs=1, ratios={"waking up": shorter})
    assert gain.is_worth_setting
    mixed = Tuned(setting=GC, runs=1, ratios={"waking up": shorter, "first exit": longer})
    assert not mixed.is_worth_setting
    assert not Tuned(setting=None, runs=1, ratios={"waking up": shorter}).is_worth_setting


def test_every_setting_is_measured_beside_a_control() -> None:
    network = FakeNetwork(FakeClock(), [1.0, 1.0])
    control, gc, governor = tune(network, X, ["gc", "governor"], runs=2 * BLOCK)
    assert (control.setting, control.runs, gc.runs, governor.runs) == (None, 50, 50, 0)
    assert set(gc.ratios) == {"waking up", "first exit", "whole network"}
    assert governor.ratios == {}
    # warm-up and two pairs of blocks, for the control and for gc
    assert network.ran.count("head 1") == 2 * 3 * 2 * BLOCK


def test_a_setting_that_takes_too_long_is_measured_in_the_fewest_pairs() -> None:
    clock = FakeClock()
    network = FakeNetwork(clock, [1.0, 1.0])
    (control,) = tune(network, X, [], runs=100 * BLOCK, max_seconds=1.0, clock=clock)
    assert control.runs == PAIRS * BLOCK


def test_no_run_and_no_setting_of_a_name_are_refused() -> None:
    network = FakeNetwork(FakeClock(), [1.0])
    with pytest.raises(CostError, match="runs=0"):
        tune(network, X, runs=0)
    with pytest.raises(RunError, match="real_time='speed'"):
        tune(network, X, ["speed"], runs=1, clock=SYSTEM_CLOCK)  # type: ignore[list-item]
