"""Runs as people begin them: empty, in training mode, with one column, in a forked process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import impatient
from forks import in_children
from impatient import Recipe, Runner
from impatient.costs import CostProfile
from impatient.errors import (
    ClassCountMismatch,
    LogitsWarning,
    NetworkError,
    PolicyError,
    RunError,
)
from impatient.networks import MultiExitNetwork, attach_exits
from impatient.policies.mixing import MixedPolicy
from impatient.policies.rules import ThresholdPolicy
from impatient.training.loop import frozen_modules

X = torch.linspace(-1, 1, 16).reshape(2, 8)


def toy(classes: int = 3, *extra: nn.Module) -> MultiExitNetwork:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    return attach_exits(nn.Sequential(block, *extra, nn.Linear(8, classes)), after=["0"], example=X)


def costs_of(network: MultiExitNetwork) -> CostProfile:
    return impatient.profile(network, X, batch_sizes=(1, 2), repeats=5, warm_up=1)


WAYS: dict[str, Callable[[Runner, Any], Any]] = {
    "run": lambda runner, x: runner.run(x),
    "start": lambda runner, x: runner.start(x).result(),
    "open": lambda runner, x: runner.open(x).run(),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_batch_is_refused(way: str) -> None:
    network = toy().eval()
    with (
        Runner(network, costs_of(network)) as runner,
        pytest.raises(NetworkError, match=r"\(0, 8\) has no samples"),
    ):
        WAYS[way](runner, X[:0])
    with pytest.raises(NetworkError, match="has no samples"):
        impatient.profile(network, X[:0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.Dropout()])
def test_a_network_in_training_mode_is_refused_unchanged(way: str, layer: nn.Module) -> None:
    network = toy(3, layer).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with Runner(network, costs_of(network), any_profile=True) as runner:
        with pytest.raises(RunError, match=r"training mode.*network\.eval\(\)"):
            WAYS[way](runner, X)
        for name, value in network.state_dict().items():
            assert torch.equal(value, before[name])
        network.eval()
        assert WAYS[way](runner, X).exit is not None


def test_one_column_is_refused_where_it_would_be_a_class() -> None:
    with pytest.warns(LogitsWarning):
        network = toy(1).eval()
    policy = ThresholdPolicy(score="max_probability", thresholds=(0.9, -float("inf")))
    with pytest.raises(PolicyError, match=r"one output column.*two columns"):
        Runner(network, costs_of(network), policy)
    assert Runner(network, costs_of(network)).run(X).exit is not None
    mixed = MixedPolicy(fast=policy, slow=policy, share=0.5)
    with pytest.raises(PolicyError, match="one output column"):
        Runner(network, costs_of(network), mixed)


# --- training and recording -----------------------------------------------------------------------


class Three:
    """Data of three classes, as far as recording asks."""

    fingerprint = "0"

    def size(self, split: str) -> int:
        return 3

    def batches(self, split: str, batch_size: int) -> Any:
        yield torch.zeros(3, 8), torch.arange(3)


def test_fewer_outputs_than_classes_are_refused_when_recording() -> None:
    with pytest.raises(ClassCountMismatch, match="test has the label 2 for 2 outputs"):
        impatient.record(toy(2), Three(), split="test")
    with pytest.warns(LogitsWarning):
        single = toy(1)
    with pytest.raises(ClassCountMismatch, match="one output column"):
        impatient.record(single, Three(), split="test")


def digits(path: Path) -> impatient.Data:
    import numpy as np

    x = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    y = np.tile([0, 1, 2], 20)
    np.savez(path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    return impatient.load_data(f"npz:{path / 'a.npz'}")


def test_fewer_outputs_than_classes_are_refused_when_training(tmp_path: Path) -> None:
    data = digits(tmp_path)
    with pytest.raises(ClassCountMismatch, match=r"has 2 outputs.*3 classes.*num_classes=3"):
        impatient.fit(toy(2), data, progress=False)
    with pytest.warns(LogitsWarning):
        single = toy(1)
    with pytest.raises(ClassCountMismatch, match="two columns"):
        impatient.fit(single, data, progress=False)


def test_what_is_frozen_stays_in_eval_mode_in_training(tmp_path: Path) -> None:
    frozen, trained = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
    network = toy(3, frozen, trained).train()
    frozen.eval().requires_grad_(False)
    # in eval mode alone it is not frozen: fit leaves every network so
    network.backbone[0].eval()  # type: ignore[index]
    assert frozen_modules(network) == [frozen]
    before = frozen.running_mean.clone()  # type: ignore[union-attr]
    other = trained.running_mean.clone()  # type: ignore[union-attr]
    impatient.fit(network, digits(tmp_path), recipe=Recipe(epochs=1), progress=False)
    assert torch.equal(frozen.running_mean, before)  # type: ignore[arg-type]
    assert not torch.equal(trained.running_mean, other)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_an_exit_inside_a_checkpoint_trains_the_block_or_is_refused(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(8, 8)
            self.classifier = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(checkpoint(self.block, x, use_reentrant=reentrant))

    network = attach_exits(Saving(), after=["block"], example=X)
    x = X.clone().requires_grad_()
    if reentrant:
        with pytest.raises(NetworkError, match="use_reentrant=False"):
            network(x)
        with network.exits(x) as run, pytest.raises(NetworkError, match="use_reentrant=False"):
            next(run)
        # without gradients nothing is cut off
        with torch.no_grad():
            assert len(network(X)) == 2
    else:
        plain = attach_exits(
            nn.Sequential(network.backbone.block, network.backbone.classifier),  # type: ignore[arg-type]
            after=["0"],
            example=X,
        )
        plain.heads = network.heads
        grads = []
        for each in (network, plain):
            each.zero_grad()
            sum(output.square().sum() for output in each(x)).backward()  # type: ignore[union-attr]
            grads.append([parameter.grad.clone() for parameter in plain.parameters()])  # type: ignore[union-attr]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


# --- forks ----------------------------------------------------------------------------------------


pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")


def test_a_forked_process_starts_runs_of_its_own() -> None:
    network = toy().eval()
    with Runner(network, costs_of(network)) as runner:
        wanted = runner.start(X).result().output
        assert in_children(1, lambda: torch.equal(runner.start(X).result().output, wanted)) == [0]
        # and the parent goes on
        assert torch.equal(runner.start(X).result().output, wanted)


def test_a_run_of_the_parent_is_refused_in_a_child() -> None:
    network = toy().eval()
    with Runner(network, costs_of(network)) as runner, runner.start(X, resumable=True) as run:

        def refused() -> bool:
            for ask in (run.result, run.interrupt, run.refine):
                with pytest.raises(RunError, match="another process"):
                    ask()
            run.close()
            return True

        assert in_children(1, refused) == [0]
        assert run.result().exit is not None
