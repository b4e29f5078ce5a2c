"""Segmentation and embeddings, against scikit-learn and numbers by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score
from torch import Tensor, nn

import impatient
from impatient.clock import Deadline
from impatient.errors import TaskError
from impatient.evaluation import Recording, StaticBaseline
from impatient.evaluation.tables import evaluation_table
from impatient.policies import ThresholdPolicy, fit_thresholds, thresholds_for_shares
from impatient.tasks import embedding, named, segmentation
from impatient.tasks.segmentation import width
from plain_data import Plain, teach
from recordings import costs_of

CLASSES = 4


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def maps(count: int = 6) -> tuple[Tensor, Tensor]:
    output = torch.randn(count, CLASSES, 9, 11, generator=random())
    target = torch.randint(CLASSES - 1, (count, 9, 11), generator=random(1))
    target[torch.rand(target.shape, generator=random(2)) < 0.2] = 255
    return output, target


def test_the_iou_of_every_image_is_scikit_learns() -> None:
    output, target = maps()
    for found, said, truth in zip(
        segmentation().quality(output, target), output.argmax(1), target, strict=True
    ):
        kept = truth != 255
        present = np.union1d(said[kept], truth[kept])
        expected = jaccard_score(truth[kept], said[kept], labels=present, average="macro")
        assert float(found) == pytest.approx(expected)


def test_sums_over_images_give_the_miou_of_the_data_set() -> None:
    output, target = maps()
    task = segmentation()
    sums = task.statistics(output[:2], target[:2]).sum(0)
    sums = sums + task.statistics(output[2:], target[2:]).sum(0)
    kept = target != 255
    said, truth = output.argmax(1)[kept], target[kept]
    found = task.summary(sums)
    # class 3 is never true, but said: its IoU of 0 counts
    assert found["mIoU"] == pytest.approx(jaccard_score(truth, said, average="macro"))
    assert found["pixels right"] == pytest.approx(accuracy_score(truth, said))


def test_losses_are_means_over_the_pixels_that_count() -> None:
    output, target = maps()
    each = nn.functional.cross_entropy(output, target, ignore_index=255, reduction="none")
    expected = each.sum((1, 2)) / (target != 255).sum((1, 2))
    assert torch.allclose(segmentation().losses(output, target), expected)


def test_an_image_without_a_pixel_that_counts_loses_nothing() -> None:
    output, _ = maps(2)
    nothing = torch.full((2, 9, 11), 255)
    quality, _, statistics = segmentation().tables(output, nothing)
    assert quality.tolist() == [1, 1]
    assert segmentation().losses(output, nothing).tolist() == [0, 0]
    assert statistics.sum() == 0
    assert segmentation().summary(statistics.sum(0)) == {"mIoU": 1.0, "pixels right": 1.0}


def test_a_pixel_that_does_not_count_may_have_an_infinite_loss() -> None:
    output, target = maps()
    expected = segmentation().losses(output, target)
    output = output.masked_fill((target == 255)[:, None], 0.0)
    # class 0, which stands in for the number to ignore, is ruled out there
    output[:, 0].masked_fill_(target == 255, -torch.inf)
    output.requires_grad_()
    found = segmentation().losses(output, target)
    assert torch.allclose(found, expected)
    found.sum().backward()
    assert bool(torch.isfinite(output.grad).all())


def test_the_number_to_ignore_is_whole() -> None:
    assert named("segmentation:ignore=-1").name == "segmentation:ignore=-1"
    with pytest.raises(TaskError, match=r"ignore=1\.5; expected a whole number"):
        named("segmentation:ignore=1.5")


def test_a_network_needs_as_many_outputs_as_there_are_classes_in_the_masks() -> None:
    target = torch.tensor([[[0, 3], [255, 7]]])
    assert width(target) == 8
    assert width(target, ignore=7) == 256
    with pytest.raises(TaskError, match="counts nowhere"):
        width(torch.full((1, 2, 2), 255))


def test_scores_are_of_the_pixels_largest_probabilities() -> None:
    output, _ = maps()
    sure = output.softmax(1).amax(1).flatten(1)
    scores = segmentation().scores
    assert torch.allclose(scores["mean_probability"](output), sure.mean(1))
    assert torch.equal(scores["low_probability"](output), sure.sort(1).values[:, 4])


def test_the_distance_is_the_share_of_pixels_of_another_class() -> None:
    output, _ = maps(2)
    other = output.clone()
    # 3 of 99 pixels of the second image get the class that was the least likely
    least = output[1, :, 0, :3].argmin(0)
    other[1, least, 0, torch.arange(3)] = 10.0
    assert segmentation().distance(output, other).tolist() == pytest.approx([0.0, 3 / 99])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(6, 9, 10, dtype=torch.long), r"\(6, 9, 10\) for outputs .* Resize"),
        (torch.full((6, 9, 11), 4), "classes from 4 to 4 for 4 outputs"),
        (torch.full((6, 9, 11), -1), "classes from -1 to -1"),
        (torch.zeros(6, 9, 11), "expected whole numbers"),
    ],
)
def test_targets_that_do_not_fit_are_refused(target: Tensor, message: str) -> None:
    output, _ = maps()
    for judge in (segmentation().losses, segmentation().quality, segmentation().statistics):
        with pytest.raises(TaskError, match=message):
            judge(output, target)
    if target.min() < 0:
        assert segmentation(ignore=-1).quality(output, target).tolist() == [1] * 6


def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Squares and stripes of their own brightness, under noise."""
    draw = random(seed)
    target = torch.zeros(count, 16, 16, dtype=torch.long)
    for image in target:
        top, left, row = torch.randint(8, (3,), generator=draw).tolist()
        image[top : top + 7, left : left + 7] = 1
        image[row + 6 : row + 8] = 2
    x = target.float()[:, None] + 0.6 * torch.randn(count, 1, 16, 16, generator=draw)
    return x, target


def test_a_network_of_maps_is_trained_recorded_and_run_by_its_deadline() -> None:
    splits = {name: shapes(200, seed) for seed, name in enumerate(("train", "validation", "test"))}
    data = Plain(
        {name: x for name, (x, _) in splits.items()},
        {name: target for name, (_, target) in splits.items()},
    )
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU())]
    blocks += [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()) for _ in range(2)]
    network = impatient.attach_exits(
        nn.Sequential(*blocks, nn.Conv2d(16, 3, 1), nn.Upsample(scale_factor=2)),
        example=data.inputs["train"][:2],
        after=["0", "1"],
        task="segmentation",
    )
    teach(network, data, steps=60, lr=0.02)
    costs = costs_of([1.0, 1.0, 1.0], [0.1, 0.1, 0.0])
    validation = impatient.record(network, data, split="validation")
    assert fit_thresholds(validation, costs, mean_time_s=2.3).task == "segmentation"
    # a third of the images leave at each exit
    scores = validation.scores["mean_probability"]
    policy = ThresholdPolicy(
        score="mean_probability",
        thresholds=thresholds_for_shares(scores, [1 / 3] * 3),
        task="segmentation",
    )
    test = impatient.record(network, data, split="test")
    assert test.outputs is None
    row = impatient.evaluate(test, costs, policy)["policy"]
    # the metrics of a policy are those of the maps it gave
    exits = policy.exits_on(test)
    assert len(set(exits.tolist())) > 1
    with torch.inference_mode():
        outputs = torch.stack(network(data.inputs["test"]))
    given = outputs[exits, torch.arange(200)].argmax(1)
    expected = jaccard_score(data.targets["test"].flatten(), given.flatten(), average="macro")
    assert row.metrics["mIoU"] == pytest.approx(expected)
    assert expected > 0.6
    # a network that came without statistics has no mIoU, and its row none either
    bare = StaticBaseline(recording=replace(test, statistics=None), time_s=1e-3, macs=1)
    rows = evaluation_table(impatient.evaluate(test, costs, static={"bare": bare})).rows
    assert [bool(row[3]) for row in rows] == [row[0].text != "bare" for row in rows]
    measured = impatient.profile(network, data.inputs["test"][:1], batch_sizes=[1, 8], repeats=5)
    runner = impatient.Runner(network, measured, policy)
    answer = runner.run(data.inputs["test"][:8], deadline=Deadline.after(60.0))
    assert answer.exits == tuple(exits[:8].tolist())
    assert torch.equal(answer.output.argmax(1), given[:8])


def test_a_recording_holds_numbers_of_images_whatever_their_size(tmp_path: Path) -> None:
    # 5 exits, 500 images, 19 classes, as of Cityscapes, whose maps would be 400 GB
    outputs = torch.randn(5, 500, 19, 4, 4, generator=random())
    targets = torch.randint(19, (500, 4, 4), generator=random(1))
    recording = Recording.of(
        outputs, targets, split="test", task="segmentation", keep_outputs=False
    )
    assert recording.statistics is not None
    assert recording.statistics.shape == (5, 500, 2 * 19 + 2)
    recording.save(tmp_path / "test.safetensors")
    assert (tmp_path / "test.safetensors").stat().st_size < 1e6


def test_embeddings_are_judged_by_their_angle() -> None:
    output = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    target = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert embedding().quality(output, target).tolist() == pytest.approx([1.0, 0.5, 0.0])
    assert embedding().losses(output, target).tolist() == pytest.approx([0.0, 1.0, 2.0])
    with pytest.raises(TaskError, match=r"expected both \[B, D\]"):
        embedding().quality(output, target[:, :1])
