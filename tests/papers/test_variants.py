"""AnytimeNet's OUTs and weights: what differs between the variants, and who is better."""

import dataclasses

import pytest
import torch

from impatient import load_data
from impatient.networks.anytimenet import AnytimeNet
from impatient.training.weights import inverse_square, parse_weights
from papers.anytimenet import long, recipe, variants
from papers.anytimenet.variants import EXPONENTS, OWN_OUTS, PAPER
from papers.jobs import finished
from papers.results import csv_text

SCALE = dataclasses.replace(long.smoke(), seeds=3)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_all_weights_have_the_papers_sum(count) -> None:
    made = {
        exponent: parse_weights(variants.weights_text(exponent, count), count)
        for exponent in EXPONENTS.values()
    }
    for weights in made.values():
        assert sum(weights) == pytest.approx(sum(inverse_square(count)))
    assert made[2] == inverse_square(count)
    assert made[0] == pytest.approx([made[0][0]] * count)
    assert [made[1][-1] / weight for weight in made[1]] == pytest.approx(range(count, 0, -1))


def test_only_what_is_compared_differs_between_the_variants() -> None:
    jobs = {variant: variants.job(variant, 0, SCALE) for variant in EXPONENTS}
    assert len({job.name for job in jobs.values()}) == len(jobs)
    plain = jobs[PAPER].arguments
    for variant, job in jobs.items():
        outs = "own" if variant == OWN_OUTS else "shared"
        weights = job.arguments["training"].weights
        assert (weights == "inverse_square") == (variant in (PAPER, OWN_OUTS))
        training = dataclasses.replace(plain["training"], weights=weights)
        net = dataclasses.replace(plain["net"], outs=outs)
        assert job.arguments == {**plain, "training": training, "net": net}


def test_own_outs_are_built_and_keep_their_weights_with_own_statistics() -> None:
    data = load_data("digits")
    net = variants.job(OWN_OUTS, 0, SCALE).arguments["net"]
    trained = recipe.build(net, "anytime", data)
    assert isinstance(trained, AnytimeNet)
    assert len(trained.heads) == trained.num_exits - 1
    with torch.no_grad():
        trained.heads[0].get_parameter(_bias(trained)).fill_(7.0)
    own = recipe.with_own_norms(trained, net, data, recipe.calibration(data, 16, 64, seed=0))
    assert own.heads[0].get_parameter(_bias(trained)).eq(7.0).all()


def _bias(network: AnytimeNet) -> str:
    return [name for name, _ in network.heads[0].named_parameters() if name.endswith("bias")][-1]


def results(last, rest):
    """Results in which the last iteration and the others have given accuracies by variant."""
    count = len(SCALE.net.counts)
    return {
        variants.job(variant, seed, SCALE).name: {
            norms: {
                "accuracy": [rest[variant] + 0.01 * seed] * (count - 1)
                + [last[variant] + 0.01 * seed],
                "counts": [100, 200],
            }
            for norms in recipe.NORMS
        }
        | {"images": 300, "seconds": 60.0, "processor": "abacus"}
        for variant in EXPONENTS
        for seed in range(SCALE.seeds)
    }


def test_the_papers_choice_is_judged_by_pairs_of_seeds() -> None:
    other, uniform = list(EXPONENTS)[2:]
    last = {PAPER: 0.5, OWN_OUTS: 0.4, other: 0.6, uniform: 0.5}
    rest = {PAPER: 0.5, OWN_OUTS: 0.4, other: 0.6, uniform: 0.5}
    found = results(last, rest)
    # a difference that changes with the seed
    for norms in recipe.NORMS:
        found[variants.job(uniform, 0, SCALE).name][norms]["accuracy"] = [0.9] * 4
    verdicts = [claim.verdict for claim in variants.claims(SCALE, found)]
    assert verdicts == ["yes", "yes", "no", "no", "not told apart", "not told apart"] * 2
    text = variants.page(SCALE, found)
    assert "| mean | 51.0 ± 1.0 | 41.0 ± 1.0 | 61.0 ± 1.0 |" in text
    assert "300 test images. 12 minutes of training" in text
    rows = csv_text(list(variants.raw_rows(SCALE, found))).splitlines()
    assert len(rows) == 1 + 4 * 2 * 3 * 4


def test_the_smoke_scale_runs_and_goes_on(tmp_path) -> None:
    variants.main([str(tmp_path), "--smoke"])
    scale = long.in_faster_precision(long.smoke(), tmp_path)
    wanted = [variants.job(variant, 0, scale) for variant in EXPONENTS]
    found = finished(wanted, tmp_path)
    assert len(found) == len(EXPONENTS)
    losses = {tuple(run["train_loss"]) for run in found.values()}
    assert len(losses) == len(EXPONENTS)
    before = (tmp_path / wanted[0].name / "result.json").stat().st_mtime_ns
    variants.main([str(tmp_path), "--smoke"])
    assert (tmp_path / wanted[0].name / "result.json").stat().st_mtime_ns == before
    assert "better than uniform" in (tmp_path / "variants.md").read_text()
