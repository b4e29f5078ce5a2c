"""Prediction periods and learned sampling: what is trained, and how it is compared."""

import numpy as np
import pytest

from impatient.training.balancing import balancer
from papers.anytime_neural_networks import appendix, fair, recipe
from papers.anytime_neural_networks.appendix import ALTERNATING, LEARNERS, METHODS, OPT, RATE

SCALE = fair.SCALES["smoke"]


@pytest.mark.parametrize(("period", "exits"), [(1, 16), (2, 8), (4, 4), (8, 2)])
def test_a_period_keeps_the_exits_that_the_paper_counts(period, exits) -> None:
    scale = fair.SCALES["cpu"]
    net = appendix.net_of(f"sieve, period {period}", scale)
    network = recipe.build(net, 1, (8, 8), 10)
    assert network.num_exits == exits
    assert network.exit_names[0] == f"blocks.{period - 1}"


def test_methods_differ_by_what_is_studied_alone() -> None:
    nets = {method: appendix.net_of(method, SCALE) for method in METHODS}
    assert len(set(nets.values())) == len(METHODS)
    assert nets[OPT].weights is None
    assert {nets[method].weights for method in METHODS if method != OPT} == {"sieve"}
    samplers = {"none", "alternating", "exp3", "rwm", "avgl"}
    assert {net.sampler for net in nets.values()} == samplers
    for method in (ALTERNATING, *LEARNERS):
        # a sampler that the library does not know would be refused
        balancer([0.5, 0.5, 1.0], nets[method].sampler, count=3)
    rates = {appendix.job(method, 0, SCALE).arguments["training"].lr for method in METHODS}
    assert rates == {RATE}


def known(**changed: list[float]) -> dict[str, np.ndarray]:
    """Errors of two seeds, by milestone 40, 30, 20, 10 where none are given."""
    given = {method.replace("sieve, ", "").replace(" ", ""): method for method in METHODS}
    seeds = np.array([[0.0], [1.0]])
    return {
        method: seeds + changed.get(name, [40.0, 30.0, 20.0, 10.0])
        for name, method in given.items()
    }


def test_periods_are_compared_where_all_have_an_exit() -> None:
    nan = float("nan")
    errors = known(period8=[nan, 20.0, 16.0, 11.0], period2=[nan, nan, nan, 9.0])
    errors[OPT][:, :3] = nan
    found = {claim.claim: claim for claim in appendix.claims(errors)}
    assert "+7.0" in found["SIEVE with period 8 is better than with 1 (mean at 0.5, 0.75)"].ours
    assert found["SIEVE with period 8 is better than with 1 (at the end)"].verdict == "no"
    assert found["SIEVE with period 2 is better than with 1 (at the end)"].verdict == "yes"
    assert not any("period 2" in name and "mean" in name for name in found)
    text = appendix.page(SCALE, errors, "abacus")
    assert "| sieve, period 8 |  | 20.5 ± 0.7 | 16.5 ± 0.7 | 11.5 ± 0.7 |" in text
    assert f"| {OPT} |  |  |  | 10.5 ± 0.7 |" in text


def test_learners_are_compared_with_alternating_weights() -> None:
    errors = known(exp3=[44.0, 34.0, 24.0, 12.0], avgl=[38.0, 28.0, 18.0, 11.0])
    found = {claim.claim: claim for claim in appendix.claims(errors)}
    assert "+4.0" in found["AANN is better than EXP3 (mean at 0.25, 0.5, 0.75)"].ours
    assert found["AANN is better than AVGL (at the end)"].verdict == "yes"
    assert found["AANN is better than AVGL (mean at 0.25, 0.5, 0.75)"].verdict == "no"
    assert found["AANN is better than RWM (at the end)"].verdict == "not told apart"


def test_the_smoke_scale_runs(tmp_path) -> None:
    appendix.main(["--scale", "smoke", "--runs", str(tmp_path), "--out", str(tmp_path)])
    lines = (tmp_path / "appendix.csv").read_text().splitlines()
    assert len(lines) == 1 + len(METHODS) * SCALE.seeds
    results = list((tmp_path / "smoke").glob("*/result.json"))
    assert len(results) == len(METHODS) * SCALE.seeds
    assert "AANN is better than EXP3" in (tmp_path / "appendix.md").read_text()
