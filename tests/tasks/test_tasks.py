"""What ready-made tasks say of outputs and targets, against values by hand."""

import math

import pytest
import torch
from sklearn.metrics import f1_score, mean_absolute_error, r2_score, root_mean_squared_error

from impatient.errors import RecordingError, TaskError
from impatient.evaluation import Recording
from impatient.tasks import Task, binary, classification, embedding, multi_label, named, regression


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def summed(task: Task, output: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    assert task.statistics is not None
    assert task.summary is not None
    halves = [task.statistics(output[part::2], target[part::2]).sum(0) for part in (0, 1)]
    return dict(task.summary(halves[0] + halves[1]))


def test_top_k_counts_the_true_class_among_the_likeliest() -> None:
    logits = torch.randn(200, 7, generator=random())
    labels = torch.randint(7, (200,), generator=random(1))
    places = (logits > logits.gather(1, labels[:, None])).sum(1)
    for top in (1, 3, 7, 9):
        assert torch.equal(classification(top).quality(logits, labels), (places < top).float())


def test_equal_outputs_name_no_more_classes_than_asked() -> None:
    quality = classification(2).quality(torch.zeros(5, 5), torch.arange(5))
    assert quality.sum() == 2


def test_yes_or_no_is_the_sign_of_one_logit() -> None:
    task = binary()
    logits = torch.tensor([[2.0], [-1.0], [0.5], [-3.0]])
    truth = torch.tensor([1, 1, 0, 0])
    assert task.quality(logits, truth).tolist() == [1, 0, 0, 1]
    assert task.scores["max_probability"](logits)[0] == pytest.approx(1 / (1 + math.exp(-2)))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits[:, 0], truth.float(), reduction="none"
    )
    assert torch.equal(task.losses(logits, truth), expected)
    assert summed(task, logits, truth) == {"accuracy": 0.5, "F1": 0.5}


def test_labels_are_counted_as_scikit_learn_counts_them() -> None:
    logits = torch.randn(100, 6, generator=random())
    truth = torch.randint(2, (100, 6), generator=random(1))
    said = (logits > 0).long()
    found = summed(multi_label(), logits, truth)
    assert found["F1"] == pytest.approx(f1_score(truth, said, average="micro"))
    assert found["samples all right"] == pytest.approx(float((said == truth).all(1).float().mean()))
    quality = multi_label().quality(logits, truth)
    assert float(quality.mean()) == pytest.approx(found["labels right"])


def test_sums_over_samples_give_the_metrics_of_all_numbers() -> None:
    output = torch.randn(101, 3, generator=random())
    target = output + torch.randn(101, 3, generator=random(1))
    found = summed(regression(), output, target)
    truth, said = target.flatten(), output.flatten()
    assert found["RMSE"] == pytest.approx(root_mean_squared_error(truth, said))
    assert found["MAE"] == pytest.approx(mean_absolute_error(truth, said))
    assert found["R2"] == pytest.approx(r2_score(truth, said))


def test_quality_of_numbers_is_by_scale_or_tolerance() -> None:
    output, target = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.5, 2.0])
    assert regression(tolerance=0.5).quality(output, target).tolist() == [1, 1, 0]
    expected = [1.0, math.exp(-0.25), math.exp(-1.0)]
    assert regression(scale=2.0).quality(output, target).tolist() == pytest.approx(expected)
    assert regression(tolerance=0.5).quality(output[:, None], target[:, None])[2] == 0


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("classification", classification()),
        ("classification:top=5", classification(5)),
        ("regression:tolerance=0.5", regression(tolerance=0.5)),
        ("binary", binary()),
    ],
)
def test_a_task_comes_back_from_its_name(name: str, made: Task) -> None:
    assert named(name).name == name == made.name
    assert named(made) is made


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("guessing", "no ready-made task 'guessing'; there are classification"),
        ("classification:best=5", "no option 'best'; classification takes top"),
        ("classification:top=five", "top='five'; expected a number"),
        ("classification:top=0", "top"),
        ("regression:scale=1:tolerance=1", "expected one of them"),
        ("regression:scale=-1", "scale"),
        ("binary:top=2", "binary takes none"),
    ],
)
def test_names_that_make_no_task_are_refused(name: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        named(name)


@pytest.mark.parametrize(
    ("task", "output", "target", "message"),
    [
        (binary(), torch.zeros(3, 2), torch.zeros(3), "expected one number per sample"),
        (binary(), torch.zeros(3, 1), torch.tensor([0, 1, 2]), "expected 0 and 1"),
        (multi_label(), torch.zeros(3, 4), torch.zeros(3), r"expected both \[B, C\]"),
        (multi_label(), torch.zeros(3, 4), torch.full((3, 4), 0.5), "other than 0 and 1"),
        (regression(), torch.zeros(3, 2), torch.zeros(3), "a number for each output"),
        (regression(), torch.zeros(2), torch.tensor([0.0, math.nan]), "NaN or infinite"),
        (binary(), torch.zeros(2, 1), torch.tensor([0.0, math.nan]), "expected 0 and 1"),
        # one target must not stand for all
        (binary(), torch.zeros(2, 1), torch.zeros(1), "as many targets as outputs"),
        (multi_label(), torch.zeros(1, 2), torch.tensor([[1.0, math.nan]]), "other than 0 and 1"),
        (embedding(), torch.ones(1, 2), torch.tensor([[1.0, math.nan]]), "NaN or infinite"),
        (
            classification(),
            torch.zeros(2, 3),
            torch.tensor([0, 1, 2]),
            "as many targets as outputs",
        ),
        (classification(), torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "name the task"),
        (classification(), torch.zeros(2, 3), torch.tensor([0, 3]), "from 0 to 3 for 3 outputs"),
    ],
)
def test_targets_that_do_not_fit_the_task_are_refused(
    task: Task, output: torch.Tensor, target: torch.Tensor, message: str
) -> None:
    with pytest.raises((TaskError, RecordingError), match=message):
        task.tables(output, target)


def own(**changes: object) -> Task:
    parts: dict[str, object] = {
        "name": "own",
        "losses": lambda output, target: (output - target)[:, 0] ** 2,
        "quality": lambda output, target: ((output - target)[:, 0].abs() < 1).float(),
        "scores": {"size": lambda output: output[:, 0].abs()},
    }
    return Task(**(parts | changes))  # type: ignore[arg-type]


def test_a_task_of_ones_own_is_recorded_without_a_word_of_classes() -> None:
    outputs = torch.tensor([[[0.0], [3.0]], [[1.0], [1.0]]])
    recording = Recording.of(outputs, torch.tensor([[0.5], [0.5]]), split="test", task=own())
    assert recording.quality.tolist() == [[1, 0], [1, 1]]
    assert recording.scores["size"].tolist() == [[0, 3], [1, 1]]
    assert recording.task == "own"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quality": lambda output, target: 2 * output[:, 0]}, "goes from 2 to 2"),
        ({"quality": lambda output, target: output}, "expected one number per sample"),
        ({"scores": {"odd": lambda output: output[:, 0] / 0}}, "score 'odd'.* is NaN or infinite"),
        ({"scores": {"few": lambda output: output[:1, 0]}}, r"expected one number per sample, \[3"),
    ],
)
def test_functions_that_give_other_numbers_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        own(**changes).tables(torch.ones(3, 1), torch.ones(3, 1))


@pytest.mark.parametrize("changes", [{"scores": {}}, {"summary": dict}])
def test_a_task_that_lacks_something_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(TaskError, match=r"has no scores|only one of statistics and summary"):
        own(**changes)
