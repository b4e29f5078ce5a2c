"""Tasks that are not classes, from training to a run by a deadline."""

from typing import Any

import pytest
import torch
from torch import nn

import impatient
from impatient.clock import Deadline
from impatient.errors import TaskError
from impatient.networks import MultiExitNetwork
from impatient.policies import fit_gates, fit_thresholds
from impatient.policies.risk import control_risk, scaled_family
from impatient.policies.rules import ThresholdPolicy
from impatient.policies.splits import split_recording
from plain_data import Plain, teach
from recordings import costs_of

COSTS = costs_of([1.0, 1.0, 1.0], [0.1, 0.1, 0.0])
SAMPLES = 600


def plain(kind: str) -> Plain:
    weights = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    data = Plain({}, {})
    for seed, split in enumerate(("train", "validation", "test")):
        x = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(seed + 1))
        truth = (x @ weights).tanh()
        data.inputs[split] = x
        data.targets[split] = {
            "regression": truth,
            "regression:tolerance=0.2": truth,
            "binary": (truth[:, 0] > 0).long(),
            "multi_label": (truth > 0).long(),
        }[kind]
    return data


def trained(task: str, data: Plain) -> MultiExitNetwork:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 16), nn.ReLU())]
    blocks += [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2)]
    outputs = 1 if task == "binary" else 3
    network = impatient.attach_exits(
        nn.Sequential(*blocks, nn.Linear(16, outputs)),
        example=data.inputs["train"][:2],
        after=["0", "1"],
        task=task,
    )
    teach(network, data, steps=150, lr=0.01)
    return network


TASKS = ["regression", "regression:tolerance=0.2", "binary", "multi_label"]


@pytest.fixture(scope="module", params=TASKS)
def made(request: pytest.FixtureRequest) -> tuple[str, Plain, MultiExitNetwork]:
    data = plain(request.param)
    return request.param, data, trained(request.param, data)


def test_every_exit_is_judged_by_the_task(made: Any) -> None:
    task, data, network = made
    recording = impatient.record(network, data, split="test")
    assert recording.task == task
    with torch.inference_mode():
        outputs = network(data.inputs["test"])
    for row, output in zip(recording.quality, outputs, strict=True):
        assert torch.equal(row, network.task.quality(output, data.targets["test"]).float())
    evaluation = impatient.evaluate(recording, COSTS)
    assert evaluation.quality_name == network.task.quality_name
    last = evaluation["exit 2"]
    assert last.accuracy.value == pytest.approx(float(recording.quality[2].mean()))
    assert last.calibration_error is None
    whole = network.task.statistics(outputs[2], data.targets["test"]).sum(0)
    assert last.metrics == pytest.approx(network.task.summary(whole))
    assert last.accuracy.value > 0.5


def test_thresholds_stop_a_run_where_the_recording_says(made: Any) -> None:
    _, data, network = made
    validation = impatient.record(network, data, split="validation")
    score = "agreement" if network.task.name.startswith("regression") else None
    policy = fit_thresholds(validation, COSTS, mean_time_s=2.4, score=score)
    test = impatient.record(network, data, split="test")
    expected = policy.exits_on(test)
    assert len(set(expected.tolist())) > 1
    costs = impatient.profile(network, data.inputs["test"][:1], batch_sizes=[1, 64], repeats=5)
    runner = impatient.Runner(network, costs, policy)
    answer = runner.run(data.inputs["test"][:64], deadline=Deadline.after(60.0))
    assert answer.exits == tuple(expected[:64].tolist())
    # one at a time, as well
    for row in range(8):
        one = runner.run(data.inputs["test"][row : row + 1], deadline=Deadline.after(60.0))
        assert one.exits == (int(expected[row]),)


def test_a_policy_of_another_task_is_refused(made: Any) -> None:
    _, data, network = made
    costs = impatient.profile(network, data.inputs["test"][:1], repeats=2)
    policy = ThresholdPolicy(score="margin", thresholds=(0.5, 0.5, -float("inf")))
    with pytest.raises((TaskError, impatient.errors.PolicyError), match=r"task|one output column"):
        impatient.Runner(network, costs, policy)


def test_gates_predict_the_quality_from_features(made: Any) -> None:
    _, data, network = made
    validation = impatient.record(network, data, split="validation", features=True)
    policy = fit_gates(validation, COSTS, inputs="features", time_price=0.02)
    test = impatient.record(network, data, split="test", features=True)
    evaluation = impatient.evaluate(test, COSTS, {"gates": policy})
    assert 0.0 < evaluation["gates"].accuracy.value <= 1.0


def test_a_guarantee_on_graded_quality_holds_on_the_test_split(made: Any) -> None:
    task, data, network = made
    validation = impatient.record(network, data, split="validation")
    fit, calibration = split_recording(validation)
    score = "agreement" if task.startswith("regression") else None
    base = fit_thresholds(fit, COSTS, mean_time_s=2.6, score=score)
    family = [base] if score else scaled_family(base)
    controlled = control_risk(family, calibration, epsilon=0.2, delta=0.1)
    test = impatient.record(network, data, split="test")
    lost = test.quality[-1] - test.quality[controlled.exits_on(test), torch.arange(SAMPLES)]
    assert float(lost.clamp(min=0).mean()) <= 0.2 + 0.05


def test_dense_outputs_get_dense_heads_at_any_input_size() -> None:
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 5, 1),
        nn.Upsample(scale_factor=2),
    )
    task = impatient.tasks.Task(
        name="maps",
        losses=lambda output, target: ((output - target) ** 2).mean((1, 2, 3)),
        quality=lambda output, target: (-(output - target).abs().mean((1, 2, 3))).exp(),
        scores={"size": lambda output: output.abs().mean((1, 2, 3))},
    )
    network = impatient.attach_exits(
        backbone, example=torch.rand(2, 3, 8, 12), after=["1"], task=task
    )
    for size in ((8, 12), (16, 10)):
        outputs = network.eval()(torch.rand(4, 3, *size))
        assert [tuple(output.shape) for output in outputs] == [(4, 5, *size)] * 2
