"""Detection, against values by hand and slow but simple ways to compute them."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import impatient
from drawn import Detector, objects, random
from impatient.clock import Deadline
from impatient.errors import TaskError
from impatient.policies import fit_thresholds
from impatient.tasks import detection, named
from impatient.tasks.boxes import generalised_overlaps, overlaps
from impatient.tasks.detection import average_precision, found
from impatient.tasks.objects import classes_in, packed
from impatient.trees import Ragged
from plain_data import Plain
from recordings import costs_of

LEFT, RIGHT = [0.25, 0.5, 0.4, 0.4], [0.75, 0.5, 0.4, 0.4]
# overlaps LEFT by a third
BESIDE = [0.45, 0.5, 0.4, 0.4]
NOTHING = 2


def answer(*rows: tuple[int, float, list[float]]) -> dict[str, Tensor]:
    """Make the output for one picture from (class, its probability, box)."""
    shares = torch.zeros(1, len(rows), NOTHING + 1)
    for shares_of_one, (label, sure, _) in zip(shares[0], rows, strict=True):
        shares_of_one[:] = (1 - sure) / 2
        shares_of_one[label] = sure
    return {"logits": shares.log(), "boxes": torch.tensor([[box for *_, box in rows]])}


def truth(*rows: tuple[int, list[float]]) -> Ragged[dict[str, Tensor]]:
    labels = torch.tensor([label for label, _ in rows], dtype=torch.long)
    return Ragged([{"labels": labels, "boxes": torch.tensor([b for _, b in rows]).view(-1, 4)}])


def both(ones: list[Any]) -> Any:
    return {name: torch.cat([one[name] for one in ones]) for name in ("logits", "boxes")}


def test_overlaps_are_those_of_areas_counted_in_pixels() -> None:
    boxes = torch.tensor([LEFT, RIGHT, BESIDE, [0.5, 0.5, 1.0, 1.0]])
    # pixels of 0.01, whose middles lie in a box or not
    middles = (torch.arange(100) + 0.5) / 100
    inside = [
        ((middles - box[0]).abs() < box[2] / 2)[None]
        & ((middles - box[1]).abs() < box[3] / 2)[:, None]
        for box in boxes
    ]
    for (row, one), (column, other) in itertools.product(enumerate(inside), repeat=2):
        expected = float((one & other).sum() / (one | other).sum())
        assert float(overlaps(boxes, boxes)[row, column]) == pytest.approx(expected, abs=0.01)
    # boxes that do not touch: the gap of 0.1 is a ninth of what is around both
    assert float(generalised_overlaps(boxes[0], boxes[1])) == pytest.approx(-1 / 9, abs=1e-5)


@pytest.mark.parametrize(
    ("output", "target", "expected"),
    [
        (answer((0, 0.9, LEFT), (1, 0.8, RIGHT)), truth((0, LEFT), (1, RIGHT)), 1.0),
        # one class is wrong: a hit, a false alarm, a miss
        (answer((0, 0.9, LEFT), (0, 0.8, RIGHT)), truth((0, LEFT), (1, RIGHT)), 0.5),
        # an object is found once: the second is a false alarm
        (answer((0, 0.9, LEFT), (0, 0.8, LEFT)), truth((0, LEFT)), 2 / 3),
        # not near enough
        (answer((0, 0.9, BESIDE)), truth((0, LEFT)), 0.0),
        # not sure enough
        (answer((0, 0.45, LEFT), (NOTHING, 0.9, LEFT)), truth((0, LEFT)), 0.0),
        (answer((NOTHING, 0.9, LEFT)), truth(), 1.0),
        (answer((1, 0.9, LEFT)), truth(), 0.0),
        # NaN boxes are false alarms, and hide nothing
        (answer((0, 0.9, [math.nan] * 4), (0, 0.8, LEFT)), truth((0, LEFT)), 2 / 3),
    ],
)
def test_the_f1_of_a_picture_by_hand(output: Any, target: Any, expected: float) -> None:
    assert float(detection().quality(output, target)) == pytest.approx(expected)
    side_by_side = packed({f"pred_{name}": value for name, value in output.items()})
    assert float(detection().quality(side_by_side, target)) == pytest.approx(expected)


def test_of_doubles_only_the_surest_is_kept_if_asked_for() -> None:
    output = answer((0, 0.8, LEFT), (0, 0.9, BESIDE), (1, 0.7, LEFT), (0, 0.6, RIGHT))
    assert found(output).scores[0].tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6])
    kept = found(output, overlap=0.3)
    assert kept.scores[0].tolist() == pytest.approx([0.9, 0.7, 0.6, -1.0])
    assert kept.labels[0, :3].tolist() == [0, 1, 0]
    task = named("detection:overlap=0.3")
    assert float(task.quality(output, truth((0, BESIDE), (1, LEFT), (0, RIGHT)))) == 1.0


def test_average_precision_by_hand() -> None:
    pictures = [
        (answer((0, 0.9, LEFT), (NOTHING, 0.9, LEFT)), truth((0, LEFT))),
        (answer((0, 0.8, BESIDE), (0, 0.7, RIGHT)), truth((0, RIGHT))),
    ]
    rows = torch.cat([detection().statistics(*picture) for picture in pictures])
    # right, wrong, right: precision 1 up to a recall of 1/2, then 2/3; class 1 never occurs
    assert average_precision(rows) == pytest.approx((51 + 50 * 2 / 3) / 101)
    sums = detection().summary(rows.sum(0))
    assert sums == pytest.approx({"F1": 0.8, "precision": 2 / 3, "recall": 1.0})
    metrics = detection().metrics(rows)
    assert metrics["AP50"] == average_precision(rows)
    nothing = detection().statistics(answer((0, 0.9, LEFT)), truth())
    assert math.isnan(average_precision(nothing))


def test_average_precision_is_what_a_slow_count_says() -> None:
    output = {
        "logits": 3 * torch.randn(60, 12, 4, generator=random()),
        "boxes": torch.rand(60, 12, 4, generator=random(1)) * 0.4 + 0.3,
    }
    target = torch.rand(60, 3, 5, generator=random(2)) * 0.4 + 0.3
    target[:, :, 0] = torch.randint(-1, 3, (60, 3), generator=random(3))
    each = []
    for label in range(3):
        listed = []
        objects = 0
        for picture in range(60):
            left = [row[1:] for row in target[picture] if row[0] == label]
            objects += len(left)
            shares = output["logits"][picture].softmax(-1)[:, :3]
            said = [q for q in range(12) if int(shares[q].argmax()) == label]
            for query in sorted(said, key=lambda q: -float(shares[q, label])):
                box = output["boxes"][picture, query][None]
                near = [float(overlaps(box, one[None])) for one in left]
                hit = bool(near) and max(near) >= 0.5
                if hit:
                    left.pop(near.index(max(near)))
                listed.append((float(shares[query, label]), hit))
        listed.sort(reverse=True)
        points = [
            (
                sum(hit for _, hit in listed[:count]) / objects,
                sum(hit for _, hit in listed[:count]) / count,
            )
            for count in range(1, len(listed) + 1)
        ]
        best = [
            max(
                (precision for recall, precision in points if recall >= step / 100 - 1e-12),
                default=0.0,
            )
            for step in range(101)
        ]
        each.append(sum(best) / 101)
    assert min(each) > 0.02
    found_here = average_precision(detection().statistics(output, target))
    assert found_here == pytest.approx(sum(each) / 3)


def test_the_loss_is_that_of_the_cheapest_matching() -> None:
    generator = random()
    logits = torch.randn(2, 4, 4, generator=generator)
    boxes = torch.rand(2, 4, 4, generator=generator) * 0.5 + 0.25
    labels = torch.tensor([2, 0, 2])
    true = torch.rand(3, 4, generator=generator) * 0.5 + 0.25
    target = Ragged([{"labels": labels, "boxes": true}, {"labels": labels[:0], "boxes": true[:0]}])
    losses = detection().losses({"logits": logits, "boxes": boxes}, target)
    logs = logits.log_softmax(-1)

    def placed(query: int, place: int) -> float:
        off = 5 * (boxes[0, query] - true[place]).abs().sum()
        return float(off + 2 * (1 - generalised_overlaps(boxes[0, query], true[place])))

    def cost(queries: tuple[int, ...]) -> float:
        near = sum(placed(query, place) for place, query in enumerate(queries))
        return near - sum(float(logs[0, q, labels[p]].exp()) for p, q in enumerate(queries))

    best = min(itertools.permutations(range(4), 3), key=cost)
    (idle,) = set(range(4)) - set(best)
    named_right = sum(-float(logs[0, query, labels[place]]) for place, query in enumerate(best))
    expected = (named_right - 0.1 * float(logs[0, idle, 3])) / 3.1
    expected += sum(placed(query, place) for place, query in enumerate(best)) / 3
    assert losses.tolist() == pytest.approx([expected, -float(logs[1, :, 3].mean())], rel=1e-4)
    # more objects than queries: all queries are matched
    many = {"labels": labels.repeat(2), "boxes": true.repeat(2, 1)}
    assert bool(
        torch.isfinite(detection().losses({"logits": logits, "boxes": boxes}, [many] * 2)).all()
    )


def test_a_network_that_has_diverged_has_a_loss_that_says_so() -> None:
    output = answer((0, 0.9, [math.nan] * 4), (1, 0.5, RIGHT))
    assert not math.isfinite(float(detection().losses(output, truth((0, LEFT)))))


def test_agreement_is_that_of_what_was_found() -> None:
    distance = detection().distance
    assert distance is not None
    one = answer((0, 0.9, LEFT), (1, 0.8, RIGHT))
    assert float(distance(one, answer((1, 0.7, RIGHT), (0, 0.6, LEFT)))) == 0.0
    assert float(distance(one, answer((0, 0.9, LEFT)))) == pytest.approx(1 / 3)
    assert float(distance(answer((2, 0.9, LEFT)), answer((2, 0.6, RIGHT)))) == 0.0
    scores = detection().scores
    assert float(scores["least_probability"](one)) == pytest.approx(0.8)
    assert float(scores["mean_probability"](one)) == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("output", "target", "message"),
    [
        (torch.zeros(1, 3, 5), truth(), "logits of 1 columns, one of which is no object"),
        (torch.zeros(1, 4), truth(), r"shape \(1, 4\); expected \[B, Q, C \+ 1 \+ 4\]"),
        ({"logits": torch.zeros(1, 4, 3)}, truth(), r"expected logits \[B, Q, C \+ 1\] and"),
        (answer((0, 0.9, LEFT)), torch.zeros(1, 2, 4), r"\(1, 2, 4\); expected \[B, M, 5\]"),
        (answer((0, 0.9, LEFT)), [*truth(), *truth()], "targets of 2 pictures for 1 outputs"),
        (answer((0, 0.9, LEFT)), [torch.zeros(4)], "holds Tensor; expected labels"),
        (answer((0, 0.9, LEFT)), truth((0, [math.nan] * 4)), "NaN or infinite"),
        (answer((0, 0.9, LEFT)), truth((0, [0.5, 0.5, 0.0, 0.2])), "expected more than 0"),
        (answer((0, 0.9, LEFT)), truth((0, [12.0, 9.0, 3.0, 4.0])), "Divide pixels"),
        (answer((0, 0.9, LEFT)), truth((2, LEFT)), "classes up to 2, and logits of 2 classes"),
        (
            answer((0, 0.9, LEFT)),
            [{"labels": torch.zeros(2, dtype=torch.long), "boxes": torch.ones(1, 4)}],
            r"labels of shape \(2,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(output: Any, target: Any, message: str) -> None:
    for judge in (detection().losses, detection().quality, detection().statistics):
        with pytest.raises(TaskError, match=message):
            judge(output, target)


def of_sigmoids(*rows: tuple[list[float], list[float]]) -> dict[str, Tensor]:
    """Make the output for one picture from (probabilities of both classes, box)."""
    shares = torch.tensor([[each for each, _ in rows]])
    return {"logits": shares.logit(), "boxes": torch.tensor([[box for _, box in rows]])}


def test_classes_with_a_sigmoid_each_are_judged_one_by_one() -> None:
    task = named("detection:sigmoid=1")
    target = truth((0, LEFT), (1, RIGHT))
    right = of_sigmoids(([0.9, 0.1], LEFT), ([0.2, 0.8], RIGHT))
    # a query that is sure of both classes is right and wrong
    both_classes = of_sigmoids(([0.9, 0.7], LEFT), ([0.2, 0.8], RIGHT))
    assert task.statistics is not None
    assert task.overall is not None
    assert task.ideal is not None
    assert float(task.quality(right, target)) == 1.0
    assert float(task.quality(both_classes, target)) == pytest.approx(4 / 5)
    assert float(task.quality(task.ideal(target, right), target)) == 1.0
    assert task.overall(task.statistics(right, target))["AP50"] == pytest.approx(1.0)
    # the false alarm of class 1, at 0.95, comes before its hit
    alarm = of_sigmoids(([0.9, 0.95], LEFT), ([0.2, 0.8], RIGHT))
    assert task.overall(task.statistics(alarm, target))["AP50"] == pytest.approx(0.75)
    assert float(task.scores["least_probability"](right)) == pytest.approx(0.8)


def test_losses_of_sigmoids_are_focal_and_those_of_the_boxes() -> None:
    output = of_sigmoids(([0.9, 0.3], LEFT), ([0.2, 0.6], BESIDE), ([0.1, 0.4], RIGHT))
    there = [0.9, 0.4]
    absent = [0.3, 0.2, 0.6, 0.1]
    focal = sum(-0.25 * (1 - share) ** 2 * math.log(share) for share in there)
    focal -= sum(0.75 * share**2 * math.log(1 - share) for share in absent)
    # both boxes are right, so that classes alone are left, twice their loss over two objects
    [loss] = detection(sigmoid=1).losses(output, truth((0, LEFT), (1, RIGHT))).tolist()
    assert loss == pytest.approx(2 * focal / 2, rel=1e-4)


def test_names_hold_the_options_that_are_not_usual() -> None:
    assert detection(keep=20).name == "detection:keep=20" == named("detection:keep=20").name
    for options in ("threshold=0", "overlap=1.5", "keep=0", "sigmoid=2"):
        with pytest.raises(TaskError, match=options.partition("=")[0]):
            named(f"detection:{options}")
    assert classes_in(truth((1, LEFT), (0, RIGHT))) == classes_in(objects(20, 0)[1]) == 2


def test_a_detector_is_trained_recorded_and_run_by_its_deadline() -> None:
    torch.manual_seed(0)
    splits = {n: objects(160, seed) for seed, n in enumerate(("train", "validation", "test"))}
    data = Plain({n: x for n, (x, _) in splits.items()}, {n: t for n, (_, t) in splits.items()})
    x = data.inputs["train"]
    # after maps, which the head's own queries look at, and after two layers of the decoder
    network = impatient.attach_exits(
        Detector(), example=x[:2], after=["maps", "layers.0", "layers.1"], task="detection"
    )
    assert [tuple(output.shape) for output in network(x[:5])] == [(5, 4, 7)] * 4
    optimizer = torch.optim.Adam(network.parameters(), lr=0.005)
    for step in range(60):
        rows = torch.arange(32 * step, 32 * step + 32) % 160
        losses = impatient.training.losses.task_losses(
            network.task, network(x[rows]), data.targets["train"][rows]
        )
        optimizer.zero_grad()
        losses.mean(1).sum().backward()
        optimizer.step()
    network.eval()
    test = impatient.record(network, data, split="test")
    assert float(test.quality[1:].mean(1).min()) > 0.4
    costs = costs_of([1.0] * 4, [0.1, 0.1, 0.1, 0.0])
    validation = impatient.record(network, data, split="validation")
    policy = fit_thresholds(validation, costs, mean_time_s=3.0, score="agreement")
    row = impatient.evaluate(test, costs, policy)["policy"]
    # the metrics of a policy are those of the boxes it gave
    exits = policy.exits_on(test)
    assert len(set(exits.tolist())) > 1
    with torch.inference_mode():
        outputs = torch.stack(network(data.inputs["test"]))
    given = outputs[exits, torch.arange(160)]
    assert row.metrics == pytest.approx(
        network.task.metrics(network.task.statistics(given, data.targets["test"]))
    )
    measured = impatient.profile(network, data.inputs["test"][:1], batch_sizes=[1, 8], repeats=5)
    with impatient.Runner(network, measured, policy) as runner:
        answered = runner.run(data.inputs["test"][:8], deadline=Deadline.after(60.0))
    assert answered.exits == tuple(exits[:8].tolist())
    assert torch.allclose(answered.output, given[:8], atol=1e-5)


def test_a_head_of_ones_own_goes_before_the_tasks() -> None:
    made = []

    def own(features: Any, outputs: int) -> nn.Module:
        made.append((features.channels, outputs))
        return nn.Linear(features.channels, 7)

    network = impatient.attach_exits(
        Detector(),
        example=torch.zeros(2, 1, 16, 16),
        after=["layers.0"],
        task="detection",
        heads=own,
    )
    assert made == [(32, 4)]
    assert isinstance(network.heads[0], nn.Linear)
