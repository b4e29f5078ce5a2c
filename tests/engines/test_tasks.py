"""Tasks of every kind in exported directories: their scores, and policies on them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from torch import Tensor, nn

from drawn import Detector, objects
from impatient import ThresholdPolicy, attach_exits, export, load_engine
from impatient.engines.onnx_files import OnnxFile, write_file
from impatient.engines.partition import FreeDims
from impatient.errors import ExportFailed, RunError, TaskError
from impatient.files import read_json, write_json
from impatient.networks import MultiExitNetwork
from impatient.portable import Bundle
from impatient.tasks import READY, Task, named
from impatient.tasks.task import AGREEMENT
from toys import ToyBackbone

ROWS = 6
# Outputs of a sample, for each ready-made task.
SHAPES = {
    "classification": (4,),
    "binary": (1,),
    "multi_label": (5,),
    "regression": (3,),
    "segmentation": (3, 4, 5),
    "embedding": (6,),
    # Four queries: logits of two classes and of no object, then a box.
    "detection": (4, 7),
}
# Tasks whose distance depends on what is found, which no file can compute.
UNWRITTEN = ("detection",)


class Maps(nn.Module):
    """A class for every pixel, behind three convolutions."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (1, 6, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(size, 6, 3, padding=1), nn.ReLU()) for size in sizes
        )
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class AllScores(nn.Module):
    """Every score and distance of all ready-made tasks, as one file computes them."""

    def forward(self, *outputs: Tensor) -> tuple[Tensor, ...]:
        pairs = dict(zip(SHAPES, zip(outputs[::2], outputs[1::2], strict=True), strict=True))
        return tuple(
            value.float()
            for name, (output, before) in pairs.items()
            for value in (
                *(score(output) for score in named(name).scores.values()),
                *(() if name in UNWRITTEN else [named(name).distance(output, before)]),
            )
        )


def test_every_score_of_every_ready_task_is_computed_by_the_engines(tmp_path: Path) -> None:
    assert set(SHAPES) == set(READY)
    draw = torch.Generator().manual_seed(0)
    outputs = {
        f"{name}{which}": 2.0 * torch.randn(ROWS, *shape, generator=draw)
        for name, shape in SHAPES.items()
        for which in ("", "_before")
    }
    wanted = [value.numpy() for value in AllScores()(*outputs.values())]
    names = [f"score{index}" for index in range(len(wanted))]
    dims = [FreeDims(batch=0)] * len(outputs)
    write_file(
        OnnxFile(name="scores", part=AllScores(), takes=outputs, dims=dims, gives=names),
        tmp_path,
    )
    arrays = {name: value.numpy() for name, value in outputs.items()}
    file = str(tmp_path / "scores.onnx")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for given in (session.run(None, arrays), list(compiled(arrays).values())):
        for here, there in zip(given, wanted, strict=True):
            assert here.shape == (ROWS,)
            np.testing.assert_allclose(here, there, atol=1e-5)
    # all but both constants
    assert sum(np.ptp(value) > 1e-3 for value in wanted) == len(wanted) - 2


def middle(values: Tensor) -> float:
    """A threshold that half of the samples reach, far from each of them."""
    return float(values.sort().values[ROWS // 2 - 1 : ROWS // 2 + 1].mean())


def exits_in_torch(network: MultiExitNetwork, policy: ThresholdPolicy, x: Tensor) -> Any:
    """Where every sample leaves, and with what, computed one exit after the other."""
    with torch.no_grad():
        outputs = network(x)
    run = policy.for_run(ROWS)
    left = torch.full((ROWS,), network.num_exits - 1)
    answer = outputs[-1].clone()
    for index, output in enumerate(outputs[:-1]):
        here = (left == network.num_exits - 1) & run.stops(index, output)
        left[here], answer[here] = index, output[here]
    return tuple(left.tolist()), answer.numpy()


@pytest.fixture(scope="module")
def maps() -> MultiExitNetwork:
    torch.manual_seed(4)
    network = attach_exits(
        Maps(), example=pictures(), after=["blocks.0", "blocks.1"], task="segmentation"
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            # or its answers would hardly depend on the input
            parameter.mul_(2.0)
    return network


def pictures() -> Tensor:
    return torch.randn(ROWS, 1, 8, 8, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("engine", "score"),
    [
        ("onnxruntime", AGREEMENT),
        ("onnxruntime-session", AGREEMENT),
        ("onnxruntime-session", "low_probability"),
    ],
)
def test_policies_of_maps_stop_where_torch_stops(
    maps: MultiExitNetwork, tmp_path: Path, engine: str, score: str
) -> None:
    x = pictures()
    with torch.no_grad():
        outputs = maps(x)
    if score == AGREEMENT:
        assert maps.task.distance is not None
        thresholds = (math.inf, middle(-maps.task.distance(outputs[1], outputs[0])), -math.inf)
    else:
        scores = [maps.task.scores[score](output) for output in outputs[:2]]
        thresholds = (*map(middle, scores), -math.inf)
    policy = ThresholdPolicy(score=score, thresholds=thresholds, task="segmentation")
    place = export(maps, tmp_path / "maps", engine=engine, example=x, policy=policy, lean=True)
    exits, answer = exits_in_torch(maps, policy, x)
    given = Bundle(place).run(x.numpy())

    assert len(set(exits)) > 1
    assert given.exits == exits
    np.testing.assert_allclose(given.output, answer, atol=1e-4)
    assert load_engine(place).task.name == "segmentation"


def test_a_detector_gives_logits_and_boxes_in_every_engine(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, _ = objects(ROWS, seed=0)
    network = attach_exits(Detector(), example=x, after=["layers.0"], task="detection").eval()
    with torch.no_grad():
        outputs = network(x)
        bound = middle(network.task.scores["least_probability"](outputs[0]))
        wanted = network.backbone(x)
    policy = ThresholdPolicy(
        score="least_probability", thresholds=(bound, -math.inf), task="detection"
    )
    place = export(
        network, tmp_path / "made", engine="onnxruntime", example=x, policy=policy, lean=True
    )
    exits, answer = exits_in_torch(network, policy, x)
    assert len(set(exits)) == 2
    for engine in ("onnxruntime", "openvino"):
        write_json(place / "bundle.json", {**read_json(place / "bundle.json"), "engine": engine})
        bundle = Bundle(place)
        given = bundle.run(x.numpy())
        assert given.exits == exits
        np.testing.assert_allclose(given.output, answer, atol=1e-4)
        *_, last = bundle.exits(x.numpy())
        np.testing.assert_allclose(last.output()[..., :3], wanted["logits"], atol=1e-4)
        np.testing.assert_allclose(last.output()[..., 3:], wanted["boxes"], atol=1e-4)
        (described,) = bundle.description["outputs"]
        assert described["shape"] == [None, 4, 7]
        found = [exit.output() for exit in load_engine(place).exits(x)]
        for here, there in zip(found, outputs, strict=True):
            assert torch.allclose(here, there, atol=1e-4)


def halves(**changes: Any) -> Task:
    """A task of the user's own, whose score the exporter can trace."""
    given: dict[str, Any] = {
        "name": "halves",
        "losses": lambda output, target: (output[:, 0] - target) ** 2,
        "quality": lambda output, target: ((output[:, 0] - target).abs() <= 0.5).float(),
        "scores": {"small": lambda output: -output[:, 0].abs()},
    }
    return Task(**(given | changes))


def own(task: Task) -> MultiExitNetwork:
    torch.manual_seed(5)
    return attach_exits(
        ToyBackbone(), example=torch.zeros(1, 8), after=["blocks.1"], task=task
    ).eval()


def test_a_task_of_ones_own_is_exported_and_must_be_given_to_torch(tmp_path: Path) -> None:
    network = own(halves())
    x = torch.randn(ROWS, 8)
    with torch.no_grad():
        bound = middle(-network(x)[0][:, 0].abs())
    policy = ThresholdPolicy(score="small", thresholds=(bound, -math.inf), task="halves")
    policy = policy.for_task(network.task)
    place = export(
        network, tmp_path / "own", engine="onnxruntime", example=x, policy=policy, lean=True
    )

    assert Bundle(place).run(x.numpy()).exits == exits_in_torch(network, policy, x)[0]
    assert load_engine(place, task=network.task).task is network.task
    with pytest.raises(TaskError, match="no ready-made task 'halves'"):
        load_engine(place)


@pytest.mark.parametrize(
    ("changes", "score", "engine", "error", "said"),
    [
        (
            {"scores": {"small": lambda output: torch.ones(len(output))}},
            "small",
            "onnxruntime",
            ExportFailed,
            "x.shape",
        ),
        ({}, AGREEMENT, "onnxruntime", TaskError, "has no distance"),
        ({}, "small", "aoti", RunError, "packages of aoti need torch"),
    ],
)
def test_policies_that_cannot_be_computed_without_torch_are_refused(
    tmp_path: Path, changes: Any, score: str, engine: str, error: Any, said: str
) -> None:
    network = own(halves(**changes))
    policy = ThresholdPolicy(score=score, thresholds=(0.0, -math.inf), task="halves")
    x = torch.randn(2, 8)
    with pytest.raises(error, match=said):
        export(network, tmp_path / "own", engine=engine, example=x, policy=policy, lean=True)
    assert list(tmp_path.iterdir()) == []
