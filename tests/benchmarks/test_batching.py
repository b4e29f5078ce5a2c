"""The bare stages that batches are held against: the same outputs, and the rows of the runs."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impatient import Runner, attach_exits, load_model, profile
from impatient.policies.rules import ThresholdPolicy, thresholds_for_shares
from impatient.runtime.compaction import Compaction, When
from impatient.tasks.scores import SCORES

MODELS = {
    "impatient:resnet:n=2,c=4": "every:2",
    "torchvision:resnet18": ["layer1", "layer2", "layer3"],
}


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("batching")


@pytest.mark.parametrize("spec", MODELS)
def test_parts_cut_by_hand_compute_what_the_network_does(script: ModuleType, spec: str) -> None:
    x = torch.randn(3, 3, 32, 32)
    network = attach_exits(load_model(spec), example=x, after=MODELS[spec]).eval()
    parts = script.cut_by_hand(network)
    compute = script.in_modules(parts)
    with torch.inference_mode():
        assert len(parts) == network.num_exits
        assert torch.allclose(compute(x, [3] * len(parts)), network.backbone(x), atol=1e-5)
        assert compute(x, [3, 2]).shape[0] == 2


@pytest.mark.engine
def test_plain_sessions_compute_what_the_network_does(script: ModuleType, tmp_path: Path) -> None:
    from impatient.engines.export import export

    spec = "impatient:resnet:n=2,c=4"
    x = torch.randn(3, 3, 32, 32)
    network = attach_exits(load_model(spec), example=x, after=MODELS[spec]).eval()
    folder = export(network, tmp_path / "network", engine="onnxruntime", example=x)
    compute = script.in_sessions(folder, 1)
    with torch.inference_mode():
        whole = network.backbone(x)
    [output] = compute(x, [3, 3, 3])
    assert torch.allclose(torch.tensor(output), whole, atol=1e-4)
    [fewer] = compute(x, [3, 2, 1])
    assert torch.allclose(torch.tensor(fewer), whole[:1], atol=1e-4)


@pytest.mark.parametrize("when", ["never", "always", "auto"])
def test_rows_are_those_of_the_stages_in_the_run(script: ModuleType, when: When) -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)]
    x = torch.randn(32, 16)
    seen: list[int] = []

    def count(_: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append(len(given[0]))

    network = attach_exits(
        nn.Sequential(*blocks, nn.Linear(16, 3)), example=x, after=["0", "1", "2"]
    ).eval()
    with torch.inference_mode():
        scores = torch.stack([SCORES["max_probability"](output) for output in network(x)])
        row_bytes = [exit.row_bytes for exit in network.exits(x)]
    bounds = thresholds_for_shares(scores, (0.3, 0.0, 0.3, 0.4))
    policy = ThresholdPolicy(score="max_probability", thresholds=bounds)
    costs = profile(network, x[:1], batch_sizes=(1, 32), repeats=3)
    # So "auto" copies at the first exit where it may, whatever this machine takes.
    rule = Compaction(costs=costs, when=when, keep_s=-1.0)
    runner = Runner(network, costs, policy, compaction=rule)
    runner.run(x)
    for block in blocks:
        block.register_forward_pre_hook(count)
    exits = runner.run(x).exits
    assert script.rows_of_stages(exits, rule, row_bytes) == tuple(seen)
    assert (seen[-1] == 32) == (when == "never")


def test_what_is_missing_is_told_apart(script: ModuleType) -> None:
    times = {name: script.np.full(9, 1.0) for name in ("whole", "whole again", "never")}
    times |= {"auto": script.np.full(9, 0.8), "attainable auto": script.np.full(9, 0.7)}
    row = script.row(times, None, "auto", script.np.full(9, 0.5), "eager")
    assert row["share of the ideal saving"].startswith("0.400")
    assert row["share of the attainable saving"].startswith("0.667")
    assert row["missing: the network's"].startswith("0.400")
    assert row["missing: ours"].startswith("0.200")
    assert row["met"] == row["met of the attainable"] == "no"


def test_rows_left_out_are_the_first(script: ModuleType) -> None:
    seen: list[Tensor] = []

    def part(x: Tensor) -> Tensor:
        seen.append(x)
        return x + 1

    compute = script.in_modules([part, part])
    script.Split(compute, [torch.arange(4.0)], [(4, 2)])()
    assert [given.tolist() for given in seen] == [[0, 1, 2, 3], [1, 2]]
