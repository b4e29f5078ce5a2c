"""Answers in words and over pictures: what is said is what the task judges to be right."""

from typing import Any

import pytest
import torch

from drawn import random
from impatient.tasks import named
from impatient.tasks.words import numbers, outlines

NAMES = ("cat", "dog", "owl")
MASK = torch.zeros(1, 4, 6, dtype=torch.long)
MASK[0, :2, :3], MASK[0, 3] = 1, 2
BOXES = torch.tensor([[[1.0, 0.5, 0.5, 0.5, 0.5], [-1.0, 0.0, 0.0, 0.0, 0.0]]])


@pytest.mark.parametrize(
    ("task", "target", "output", "said"),
    [
        ("classification", torch.tensor([2]), torch.zeros(1, 3), "owl"),
        ("binary", torch.tensor([1]), torch.zeros(1, 1), "yes (100 %)"),
        ("multi_label", torch.tensor([[1, 0, 1]]), torch.zeros(1, 3), "cat, owl"),
        ("regression", torch.tensor([[0.25, -3.0]]), torch.zeros(1, 2), "0.25, -3"),
        ("segmentation", MASK, torch.zeros(1, 3, 4, 6), "dog 25 %, owl 25 %"),
        ("detection", BOXES, torch.zeros(1, 5, 8), "dog"),
    ],
)
def test_what_is_true_is_said_like_an_answer(
    task: str, target: Any, output: torch.Tensor, said: str
) -> None:
    made = named(task)
    assert made.ideal is not None
    right = made.ideal(target, output)
    assert float(made.quality(right, target)) == 1.0
    assert made.says(right, NAMES) == said


def test_what_has_no_name_is_said_by_its_number() -> None:
    assert named("binary").says(torch.tensor([[-1.0]]), ("ham", "spam")) == "ham (73 %)"
    assert named("multi_label").says(torch.tensor([[-1.0, -1.0]]), ()) == "none"
    assert named("multi_label").says(torch.tensor([[-1.0, 1.0]]), ()) == "class 1"
    assert named("detection").says(torch.zeros(1, 5, 8), NAMES) == "nothing"
    assert named("segmentation").says(torch.zeros(1, 3, 2, 2), NAMES) == "cat 100 %"
    long = torch.arange(12.0)[None]
    assert numbers(long) == "0, 1, 2, 3, 4, 5, 6, 7, ... (12 numbers)"


def test_a_mask_is_shown_at_the_size_of_the_picture() -> None:
    task = named("segmentation")
    assert task.layer is not None
    assert task.ideal is not None
    target = MASK.clone()
    target[0, 0, 0] = 255
    layer = task.layer(task.ideal(target, torch.zeros(1, 3, 4, 6)), (8, 12))
    expected = torch.where(target == 255, 0, target)[0]
    assert torch.equal(layer, expected.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_boxes_are_shown_by_their_edges_also_beyond_the_picture() -> None:
    layer = outlines(BOXES[0, :1, 1:], torch.tensor([1]), (8, 8))
    inside = torch.zeros(8, 8, dtype=torch.long)
    inside[2:6, 2:6] = 2
    inside[3:5, 3:5] = 0
    assert torch.equal(layer, inside)
    far = torch.rand(20, 4, generator=random()) * 3 - 1
    assert outlines(far, torch.zeros(20, dtype=torch.long), (5, 9)).shape == (5, 9)
