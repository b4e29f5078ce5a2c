import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from papers.anytime_neural_networks import __main__ as command
from papers.anytime_neural_networks import claims, comparison, recipe, tables
from papers.anytime_neural_networks.curves import (
    Curve,
    alone,
    ensemble,
    excess,
    inflation,
    reference,
)
from papers.anytime_neural_networks.recipe import SAMPLERS, SCALES, WEIGHTINGS, Net, opt_depths
from papers.jobs import finished
from papers.results import Spread, spread
from smoke_runs import assert_only_lost_runs_again, invoke, run_smoke, smoke_arguments

SCALE = dataclasses.replace(SCALES["cpu"], networks=((2, 4),), members=(1, 2), channels=4, seeds=2)


def result(costs, test, validation=None, head=0):
    stages = [costs[0], *np.diff(costs).tolist()]
    return {
        "stage_macs": stages,
        "head_macs": [head] * (len(costs) - 1) + [0],
        "test_error": list(test),
        "validation_error": list(validation or test),
        "train_loss": [1.0] * len(costs),
        "seconds": 36.0,
        "processor": "abacus",
    }


def opt_error(share):
    return 0.2 / (1.0 + share)


def planted(worse, scale=SCALE):
    """Results in which OPT's error falls along a known line and a method's is `worse(net, share,
    seed)` times it.
    """
    results = {}
    for job in recipe.jobs(scale):
        net = job.arguments["net"]
        seed = job.arguments["seed"]
        whole = 3 * net.n
        depths = [net.blocks] if net.weights is None else range(1, whole + 1)
        factor = [
            1.0 if net.weights is None else worse(net, depth / whole, seed) for depth in depths
        ]
        errors = [opt_error(depth / whole) * own for depth, own in zip(depths, factor, strict=True)]
        results[job.name] = result([100.0 * depth for depth in depths], errors)
    return results


# --- what is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "scripts"),
    [
        (3, (1, 4, 6, 8)),
        (7, (4, 10, 15, 20)),
        (9, (6, 13, 19, 26)),
        (13, (9, 19, 28, 38)),
        (17, (12, 25, 37, 50)),
        (25, (18, 37, 55, 74)),
    ],
)
def test_opt_is_trained_at_the_scripts_depths_but_never_first_beyond_a_quarter(n, scripts):
    theirs = [index + 1 for index in scripts]
    assert list(opt_depths(n)[1:]) == theirs[1:]
    assert opt_depths(n)[0] in (theirs[0], theirs[0] - 1)


@pytest.mark.parametrize(("n", "c", "channels"), [(2, 4, 1), (3, 16, 1), (9, 32, 3), (17, 32, 3)])
def test_the_first_network_of_opt_costs_at_most_a_quarter(n, c, channels):
    image = torch.zeros(1, channels, 32, 32)
    first, whole = (
        alone(
            {
                **_costs(recipe.build(Net(n=n, c=c, depth=depth), channels, (32, 32), 10), image),
                "test_error": [0.0],
            }
        )
        for depth in (opt_depths(n)[0], 3 * n)
    )
    assert first.costs[0] <= whole.costs[0] / 4


def _costs(network, image):
    facts = network.stage_facts(image)
    return {
        "stage_macs": [fact.stage_macs for fact in facts],
        "head_macs": [fact.head_macs for fact in facts],
    }


def test_methods_of_one_seed_start_from_the_same_weights():
    networks = []
    for weights in ("sieve", "const", None):
        torch.manual_seed(3)
        networks.append(recipe.build(Net(n=1, c=4, weights=weights), 1, (8, 8), 10))
    assert networks[0].num_exits == 3
    assert networks[2].num_exits == 1
    for name, value in networks[2].backbone.state_dict().items():
        assert torch.equal(value, networks[0].backbone.state_dict()[name])
    for name, value in networks[1].state_dict().items():
        assert torch.equal(value, networks[0].state_dict()[name])


@pytest.mark.parametrize("scale", SCALES.values(), ids=list(SCALES))
def test_every_training_has_a_name_of_its_own_and_both_tables_together_are_all(scale):
    parts = [job.name for table in ("milestones", "eann") for job in recipe.jobs(scale, table)]
    assert set(parts) == {job.name for job in recipe.jobs(scale)}
    first = recipe.jobs(scale)[: 4 + 12]
    assert {job.arguments["net"].n for job in first} == {scale.networks[0][0]}
    fingerprints = [job.fingerprint() for job in recipe.jobs(scale)]
    assert len(set(fingerprints)) == len(fingerprints)


# --- curves ---------------------------------------------------------------------------------------


def test_an_anytime_curve_answers_with_its_latest_and_before_the_first_not_at_all():
    curve = Curve((2.0, 5.0), (0.4, 0.1))
    assert curve.at([1.0, 2.0, 4.9, 5.0, 99.0]).tolist() == [1.0, 0.4, 0.4, 0.1, 0.1]


def test_a_head_is_paid_alone_or_with_all_before_it():
    one = result([10, 20, 30], [0.3, 0.2, 0.1], head=1)
    assert alone(one).costs == (11, 21, 30)
    assert alone(one, heads="all").costs == (11, 22, 32)


def test_an_ensemble_answers_with_the_better_by_validation_and_leaves_the_other_heads_out():
    small = result([10, 20], test=[0.5, 0.3], validation=[0.5, 0.35], head=1)
    large = result([10, 20, 30], test=[0.6, 0.35, 0.2], validation=[0.6, 0.34, 0.1], head=1)
    made = ensemble([small, large])
    # the second's first exit is worse than the first's final one, its second is better by
    # validation though not by test
    assert made.errors == (0.5, 0.3, 0.3, 0.35, 0.2)
    assert made.costs == (11, 21, 31, 42, 52)


def test_a_member_that_ends_worse_than_the_one_before_does_not_replace_it():
    members = [result([10], [0.2]), result([10], [0.4]), result([10, 20], [0.3, 0.1])]
    assert ensemble(members).errors == (0.2, 0.2, 0.2, 0.1)


def test_opt_plus_takes_the_least_error_so_far():
    opt = reference([result([30], [0.3]), result([10], [0.4]), result([20], [0.2])])
    assert opt == Curve((10, 20, 30), (0.4, 0.2, 0.2))


def test_excess_is_the_mean_over_budgets():
    opt = Curve((1.0, 3.0), (0.4, 0.2))
    curve = Curve((1.0, 3.0), (0.5, 0.2))
    assert excess(curve, opt, [1.0, 2.0, 3.0, 4.0]) == pytest.approx((25 + 25 + 0 + 0) / 4)


def test_inflation_divides_by_what_opt_plus_spends_to_do_better():
    opt = Curve((1.0, 2.0, 4.0), (0.4, 0.3, 0.1))
    curve = Curve((2.0, 6.0), (0.4, 0.1))
    # 0.4 is beaten at cost 2, 0.1 by none, so the dearest counts
    assert inflation(curve, opt, [3.0, 5.0, 8.0]).tolist() == [1.5, 2.5, 2.0]


# --- the tables, from known results ---------------------------------------------------------------


def test_the_milestone_table_finds_the_planted_increases():
    results = planted(
        lambda net, share, seed: 1.0 + 0.3 * share + 0.1 * seed if net.weights == "const" else 1.0
    )
    rows = {
        (row["weights"], row["kind"]): row
        for row in comparison.milestone_rows(comparison.measured(SCALE, results))
    }
    assert rows["const", "static"]["pairs"] == 2
    # +30 % and +40 %
    assert rows["const", "static"]["at 1"].mean == pytest.approx(35.0)
    assert rows["const", "static"]["at 1"].deviation == pytest.approx(math.sqrt(50.0))
    assert rows["sieve", "alternating"]["at 1"].mean == pytest.approx(0.0, abs=1e-9)
    assert rows["const", "static"]["final error"].mean == pytest.approx(100 * opt_error(1.0) * 1.35)


def test_a_seed_with_a_missing_training_takes_no_part():
    results = planted(lambda *_: 1.1)
    del results["n2-c4-adaloss-none-seed1"]
    table = comparison.measured(SCALE, results)
    assert {pair.seed for pairs in table.values() for pair in pairs} == {0}
    assert comparison.ensembles(SCALE, results) is not None
    del results["n1-c4-sieve-alternating-seed0"], results["n1-c4-depth3-seed1"]
    assert comparison.ensembles(SCALE, results) is None


def _factor(net, share, seed, *, wiggle=0.001):
    """As the paper says: const and linear lose late, the proposed ones early, alternating wins
    late.
    """
    late = {
        "const": 0.2,
        "linear": 0.15,
        "half_end": 0.02,
        "sieve": 0.01,
        "exp_lin": 0.01,
        "adaloss": 0.02,
    }[net.weights]
    early = {
        "const": 0.1,
        "linear": 0.3,
        "half_end": 0.5,
        "sieve": 0.4,
        "exp_lin": 0.2,
        "adaloss": 0.3,
    }[net.weights]
    better = 0.005 * share if net.sampler == "alternating" else 0.0
    return 1.0 + late * share + early * (1.0 - share) - better + wiggle * seed


def test_every_claim_is_affirmed_where_it_is_planted():
    results = planted(_factor)
    found = {
        claim.claim: claim.verdict
        for claim in claims.milestone_claims(comparison.measured(SCALE, results))
    }
    assert len(found) == 15
    assert set(found.values()) == {"yes"}


def test_every_claim_is_denied_where_the_opposite_is_planted():
    results = planted(lambda net, share, seed: 1.8 - _factor(net, share, seed))
    found = {
        claim.claim: claim.verdict
        for claim in claims.milestone_claims(comparison.measured(SCALE, results))
    }
    assert set(found.values()) == {"no"}


def test_nothing_is_told_apart_from_one_run():
    scale = dataclasses.replace(SCALE, seeds=1)
    judged = [*claims.milestone_claims(comparison.measured(scale, planted(_factor, scale)))]
    # the last one counts weightings and milestones
    assert {claim.verdict for claim in judged[:-1]} == {"not told apart"}


def test_alternating_wins_as_often_as_planted():
    def worse(net, share, seed):
        return 1.2 if (net.sampler == "none") == (share > 0.6 or seed == 0) else 1.1

    rates = comparison.win_rates(comparison.measured(SCALE, planted(worse)))
    assert rates["1"].rate == 1.0
    assert rates["0.25"].rate == 0.5
    assert rates["1"].pairs == 12
    assert rates["0.75 and 1"].pairs == 24


def test_the_interval_is_student_s():
    values = [1.0, 2.0, 4.0]
    low, high = claims.interval(values)
    half = 4.302653 * np.std(values, ddof=1) / math.sqrt(3)
    assert (low, high) == (
        pytest.approx(np.mean(values) - half),
        pytest.approx(np.mean(values) + half),
    )
    assert claims.interval([3.0]) == (-math.inf, math.inf)


def test_ensembles_of_better_members_are_nearer_to_opt_plus():
    compared = comparison.ensembles(SCALE, planted(_factor))
    assert compared is not None
    rows = {row["ensemble"]: row for row in comparison.ensemble_rows(compared)}
    assert rows["EANN exp_lin"]["above OPT+, %"].mean < rows["EANN const"]["above OPT+, %"].mean
    found = {
        claim.claim: claim.verdict for claim in claims.ensemble_claims(compared, claims.base(SCALE))
    }
    assert found["EANN of sieve and exp_lin is nearer to OPT+ than of const and linear"] == "yes"


def test_the_base_is_the_growth_of_depth_and_gives_the_papers_numbers():
    assert claims.base(dataclasses.replace(SCALE, members=(1, 2, 4))) == pytest.approx(2.0)
    formulas = claims.analytic_inflation(2.0)
    assert formulas["EANN"] == pytest.approx((3.0, 2.443), abs=1e-3)
    assert formulas["plain ensemble"][0] == pytest.approx(4.0)


def test_the_page_and_the_files_hold_the_numbers(tmp_path):
    page = tables.write(SCALE, planted(_factor), {"n2-c4": [0.001] * 6}, 0.0, tmp_path)
    assert "| const | static | 2 |" in page
    assert "abacus" in page
    assert {path.name for path in tmp_path.iterdir()} == {
        "curves.csv",
        "eann.csv",
        "eann.png",
        "eann_claims.csv",
        "eann_curves.csv",
        "milestone_claims.csv",
        "milestones.csv",
        "milestones.png",
        "results.md",
        "win_rates.csv",
    }
    assert len((tmp_path / "milestones.csv").read_text().splitlines()) == 1 + len(WEIGHTINGS) * len(
        SAMPLERS
    )
    assert (
        tables.write(SCALE, {}, {}, None, tmp_path / "empty")
        == "No seed of any table is complete yet."
    )
    assert not (tmp_path / "empty").exists()


def test_a_spread_is_two_columns_in_a_file_and_one_in_the_page():
    row = {"weights": "sieve", "at 1": spread([1.0, 3.0])}
    assert tables._flat(row) == {
        "weights": "sieve",
        "at 1": 2.0,
        "at 1 sd": pytest.approx(math.sqrt(2)),
    }
    assert isinstance(row["at 1"], Spread)
    assert tables._readable(row, "+.1f")["at 1"] == "+2.0 ± 1.4"


# --- the smoke run, end to end --------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """All of the smoke scale with one seed."""
    folder = tmp_path_factory.mktemp("ann")
    return folder, run_smoke(command.main, folder, "--seeds", "1")


def test_the_smoke_run_writes_every_table(smoke):
    folder, _ = smoke
    page = (folder / "out" / "results.md").read_text()
    assert "| sieve | alternating | 1 |" in page
    assert "| EANN sieve | 1 |" in page
    assert (folder / "out" / "milestones.png").stat().st_size > 10_000
    assert not list(folder.rglob("checkpoint.safetensors"))


def test_an_ensemble_run_as_a_network_is_what_was_assembled_from_its_members(smoke):
    folder, _ = smoke
    scale = dataclasses.replace(SCALES["smoke"], seeds=1)
    results = finished(recipe.jobs(scale), folder / "runs" / "smoke")
    assert command.checked(scale, results, folder / "runs" / "smoke") == 0.0


def test_only_what_is_missing_is_trained_again(smoke):
    folder, arguments = smoke
    lost = folder / "runs" / "smoke" / "n2-c4-sieve-none-seed0" / "result.json"
    assert_only_lost_runs_again(command.main, arguments, lost)


def test_publishing_trains_nothing(tmp_path):
    done = invoke(command.main, smoke_arguments(tmp_path, "--publish"))
    assert done.exit_code == 0
    assert "No seed of any table is complete yet" in done.output
    assert not list(itertools.chain(tmp_path.rglob("*.json"), tmp_path.rglob("*.png")))
