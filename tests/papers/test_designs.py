"""Early prediction layers: how heads are trained on stored features, compared and judged."""

import dataclasses

import pytest
import torch

from impatient import CostProfile, Recording, attach_exits
from impatient.files import read_tensors
from impatient.networks.heads import FeatureShape, build_head
from papers.impatient_dnn import designs
from papers.impatient_dnn.designs import DESIGNS, PLANS
from papers.impatient_dnn.recipe import target_of

PLAN = dataclasses.replace(PLANS["smoke"], epochs=4)


@pytest.mark.parametrize("design", DESIGNS)
def test_scales_go_into_the_first_layer_of_every_design(design) -> None:
    torch.manual_seed(0)
    maps = torch.rand(3, 4, 6, 6)
    scale = torch.tensor([0.5, 2.0, 3.0, 1.0])
    head = build_head(design, FeatureShape(tuple(maps.shape), "NCHW"), 5).eval()
    scaled = head(maps * scale[None, :, None, None])
    assert not torch.allclose(head(maps), scaled, atol=1e-3)
    designs.absorb(head, scale)
    assert torch.allclose(head(maps), scaled, atol=1e-5)


def drawn(count: int, seed: int):
    """Two classes, told apart by the first channel, which varies little beside the second."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=random)
    maps = torch.randn(count, 2, 3, 3, generator=random) * torch.tensor([0.01, 5.0])[:, None, None]
    maps[:, 0] += 0.02 * labels[:, None, None]
    return {"place": maps.half(), "labels": labels}


def test_a_head_learns_from_channels_of_any_scale_and_the_given_one_stays() -> None:
    torch.manual_seed(0)
    found = {"train": drawn(400, 0), "validation": drawn(200, 1)}
    head = build_head("linear", FeatureShape((1, 2, 3, 3), "NCHW"), 2)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    plan = dataclasses.replace(PLAN, rates=(1e-6, 1e-1))
    rate, trained = designs.best_head(head, "place", found, plan, seed=0)
    assert rate == 1e-1
    guesses = designs.answers(trained, found["validation"]["place"]).argmax(1)
    assert (guesses == found["validation"]["labels"]).float().mean() > 0.95
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def recording(split: str, sure: int, right: int) -> Recording:
    """Ten samples, right at the last exit, where the first is sure of some and right on some."""
    labels = torch.zeros(10, dtype=torch.long)
    outputs = torch.zeros(2, 10, 2)
    outputs[0, :sure, 1] = 9.0
    outputs[0, :right] = torch.tensor([9.0, 0.0])
    outputs[0, sure:, 0] = 0.1
    outputs[1, :, 0] = 9.0
    return Recording.of(outputs, labels, split=split)


def test_runs_that_are_certain_stop_and_what_they_lose_is_judged_on_the_test_split() -> None:
    costs = CostProfile.of(stages_s=[1.0, 9.0])
    rows = designs.stopped(recording("validation", 6, 6), recording("test", 8, 7), costs)
    assert [row["allowed"] for row in rows] == list(designs.LOSSES)
    # all are right at the first exit on validation, and one is not on the test split
    assert rows[0]["seconds_on_validation"] == pytest.approx(1.0)
    assert rows[0]["seconds"] == pytest.approx(1.0)
    assert (rows[0]["lost"], rows[0]["early"]) == (pytest.approx(0.1), 1.0)
    # where the first exit's doubts are errors, only those that are sure stop
    doubtful = recording("validation", 6, 6)
    outputs = doubtful.outputs.clone()
    outputs[0, 6:] = torch.tensor([0.0, 0.1])
    doubtful = Recording.of(outputs, doubtful.labels, split="validation")
    row = designs.stopped(doubtful, recording("test", 8, 7), costs)[0]
    assert (row["early"], row["lost"]) == (pytest.approx(0.8), pytest.approx(0.1))
    assert row["seconds"] == pytest.approx(2.8)
    assert designs.faster({"until_s": [1.0, 10.0], "certain": [row]}, 0) == pytest.approx(10 / 2.8)


def results(first: dict[str, float], faster: dict[str, float]):
    """First exits with an accuracy on the test split, and runs with a speed on validation."""
    return {
        design: {
            "validation": [0.5, 0.6],
            "test": [first.get(design, 0.4), 0.7],
            "rates": [0.1, 0.1],
            "head_s": [0.001],
            "until_s": [0.002, 0.01],
            "head_macs": [2_000_000],
            "counts": {"train": 200, "validation": 100, "test": 1000},
            "processor": "abacus",
            "certain": [
                {
                    "allowed": allowed,
                    "seconds_on_validation": 0.01 / faster.get(design, 1.0),
                    "seconds": 0.01 / 1.5,
                    "lost": 0.012,
                    "early": 0.3,
                }
                for allowed in designs.LOSSES
            ],
        }
        for design in DESIGNS
    }


def test_the_best_head_is_chosen_on_validation_and_exits_are_compared_with_a_linear_one() -> None:
    found = results({"mlp": 0.5, "adaptive": 0.45}, {"adaptive": 2.0, "mlp": 1.2})
    assert designs.best_design(found) == "adaptive"
    text = designs.page(PLAN, found)
    assert "(95 % by the test images): mlp +10.0 (±4.3)." in text
    assert "(adaptive): 1.50 times as fast, 1.2 points lost, where 0.5 were allowed" in text
    assert "| mlp: pool, hidden layer of 128 | 50.0 | 1.000 | 2.00 |" in text
    assert len(list(designs.rows_of(found))) == len(DESIGNS)


def test_stored_maps_are_what_the_heads_see_in_the_network(tmp_path) -> None:
    plan = PLANS["smoke"]
    designs.compute_features(plan, 0, folder=tmp_path)
    target = target_of(plan.pair, plan.settings, 0)
    backbone = designs.backbone_of(plan.pair, target, 0)
    cuts = plan.pair.cuts()
    network = attach_exits(backbone, after=cuts, heads="flatten", example=target.example())
    network.eval()
    for split in designs.SPLITS:
        stored, _ = read_tensors(tmp_path / f"{split}.safetensors")
        rows = list(range(40))
        labels = target.examples(split).labels
        assert torch.equal(stored["labels"], labels)
        images = target.preprocess(target.examples(split).take(rows))
        with torch.inference_mode():
            expected = network(images)
        heads = [*network.heads, backbone.get_submodule("classifier")]
        for head, place, output in zip(heads, (*cuts, "classifier"), expected, strict=True):
            answered = designs.answers(head, stored[place][:40])
            assert torch.allclose(answered, output, atol=1e-2)
            assert output.std() > 0.05


def test_the_smoke_scale_runs(tmp_path, monkeypatch) -> None:
    few = dataclasses.replace(PLANS["smoke"], designs=("linear", "flatten"))
    monkeypatch.setitem(PLANS, "smoke", few)
    designs.main(["--scale", "smoke", "--runs", str(tmp_path), "--out", str(tmp_path)])
    assert (tmp_path / "smoke" / "flatten-seed0" / "result.json").is_file()
    text = (tmp_path / "designs.md").read_text()
    assert "| flatten: linear on the whole map |" in text
    lines = (tmp_path / "designs.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2
