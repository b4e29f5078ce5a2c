"""Heads on cached features: what is cached, when training ends, and what is left of it."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from impatient import attach_exits
from impatient.training.data import load_data
from papers.adaptive_neural_networks import __main__ as command
from papers.adaptive_neural_networks import recipe
from papers.adaptive_neural_networks.cached import Features, Stopping, features_of, train_head
from papers.adaptive_neural_networks.gains import gain_texts, gains
from papers.adaptive_neural_networks.networks import CifarResNet, strided_head
from smoke_runs import assert_only_lost_runs_again, run_smoke


def test_cached_features_are_those_of_every_image_in_order() -> None:
    data = load_data("digits")
    torch.manual_seed(0)
    network = attach_exits(
        CifarResNet(depth=8, width=4, in_channels=1),
        example=data.example(),
        after=["layer1", "layer2"],
        heads=strided_head,
    )
    first, second = features_of(network, data, "validation", 100)
    assert torch.equal(first.labels, data.examples("validation").labels)
    assert len(second.values) == len(second.labels) == data.size("validation")
    with torch.inference_mode():
        (x, _), *_ = data.batches("validation", data.size("validation"))
        # in their own precision, and in batches of another size
        kept = [exit.features.clone() for exit in network.exits(x)][:2]
    for cached, own in zip((first, second), kept, strict=True):
        assert cached.values.dtype == torch.bfloat16
        error = (cached.values.float() - own).abs().mean() / own.abs().mean()
        assert float(error) < 0.02


def planted(count: int, seed: int, noise: float) -> Features:
    """Features whose sign is the class, but for a share of the labels."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 4, generator=random)
    wrong = torch.rand(count, generator=random) < noise
    labels = (values[:, 0] > 0).logical_xor(wrong).long()
    return Features(values.bfloat16(), labels)


def test_a_head_is_left_as_it_was_at_its_best() -> None:
    torch.manual_seed(0)
    # large enough to learn a few noisy labels by heart
    head = nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 2))
    validation = planted(500, 1, noise=0.2)
    how = Stopping(lr=0.5, longest=40, batch_size=16, patience=2, falls=1)
    history = train_head(head, planted(60, 0, noise=0.2), validation, how, seed=0)
    losses = history["validation_loss"]
    best = losses.index(min(losses))
    # two epochs without a better one, at two rates
    assert len(losses) < how.longest
    assert best < len(losses) - 2
    assert not head.training
    with torch.inference_mode():
        own = nn.functional.cross_entropy(head(validation.values.float()), validation.labels)
    assert float(own) == pytest.approx(losses[best], rel=0.02)
    assert losses[-1] > losses[best]


def test_training_goes_on_while_the_loss_falls() -> None:
    torch.manual_seed(0)
    head = nn.Linear(4, 2)
    how = Stopping(lr=0.001, longest=12, batch_size=100)
    history = train_head(head, planted(1000, 0, 0.0), planted(300, 1, 0.0), how, seed=0)
    assert len(history["train_loss"]) == 12
    assert history["validation_loss"] == sorted(history["validation_loss"], reverse=True)


def test_gains_are_points_per_millisecond() -> None:
    rows = [{"s": s, "accuracy": share} for s, share in ((0.001, 0.5), (0.002, 0.6), (0.004, 0.7))]
    assert gains(rows) == pytest.approx([10.0, 5.0])
    slower = [{"s": s, "accuracy": share} for s, share in ((0.002, 0.5), (0.001, 0.6))]
    assert math.isnan(gains(slower)[0])
    assert gain_texts([{"exits": slower}] * 2, "exits") == ["", ""]
    better = [{**row, "accuracy": row["accuracy"] * 2} for row in rows]
    texts = gain_texts([{"exits": rows}, {"exits": better}], "exits")
    assert texts == ["", "15.00 ± 7.07", "7.50 ± 3.54"]


# --- the smoke scale ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("exits")
    return folder, run_smoke(command.main, folder, "--case", "exits")


def test_exits_have_tables_of_their_own(smoke) -> None:
    folder, arguments = smoke
    page = (folder / "out" / "results.md").read_text()
    for way in ("cached", "joint"):
        assert f"**Early exits, digits-wide-exits-{way}**" in page
        assert (folder / "out" / f"gains_digits-wide-exits-{way}.png").is_file()
    assert "**Selection" not in page
    lost = folder / "runs" / "smoke" / "digits-wide-exits-joint" / "result.json"
    assert_only_lost_runs_again(command.main, [*arguments, "--table", "networks"], lost)


def test_only_joint_training_changes_the_network(smoke) -> None:
    runs = smoke[0] / "runs" / "smoke"
    cached, joint = recipe.SCALES["smoke"].better
    alone = recipe.built(cached.case, cached.net, runs)
    x = recipe.data_of(cached.case).example(4)
    with torch.inference_mode():
        assert torch.equal(alone(x), recipe.built_exits(cached, runs).backbone(x))
        assert not torch.allclose(alone(x), recipe.built_exits(joint, runs).backbone(x))


def test_the_card_shows_the_exits_that_are_trained() -> None:
    card = (command.HERE / "README.md").read_text(encoding="utf-8")
    assert "<!-- cpu-exits -->" in card
    for exits in recipe.SCALES["cpu"].better:
        figures = [f"results/cpu-exits/{kind}_{exits.name}.png" for kind in ("exits", "gains")]
        assert all(f in card for f in figures if (command.HERE / f).is_file())
        network = recipe.load_model(
            exits.net.spec.replace("depth", "width=2,depth"), num_classes=10
        )
        recipe.attach_exits(
            network, example=torch.zeros(1, 3, 8, 8), after=exits.after, heads=strided_head
        )


# --- answers that name several classes ------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    run_smoke(command.main, folder, "--case", "top5")
    return folder


def test_answers_that_name_several_classes_are_judged_so(several: Path) -> None:
    (exits,) = recipe.SCALES["smoke"].several
    page = (several / "out" / "results.md").read_text()
    assert f"**Early exits, {exits.name}**" in page
    (recording,) = recipe.recordings_of(exits, several / "runs" / "smoke")
    assert recording.task == exits.case.task == "classification:top=3"
    named = recording.outputs.topk(3, -1).indices
    truly = (named == recording.labels[:, None]).any(-1).double().mean(1)
    alone = recording.as_task("classification").quality.double().mean(1)
    assert recording.quality.double().mean(1).tolist() == pytest.approx(truly.tolist())
    # a stricter judge finds fewer
    assert (alone < truly).all()


def test_signs_are_named_five_at_a_time() -> None:
    (exits,) = recipe.SCALES["cpu"].several
    assert (exits.case.data, exits.case.task) == ("gtsrb", "classification:top=5")
    assert "<!-- cpu-top5 -->" in (command.HERE / "README.md").read_text(encoding="utf-8")
