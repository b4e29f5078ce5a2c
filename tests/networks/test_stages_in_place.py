"""Features that a model overwrites after a cut are refused, unless kept."""

import pytest
import torch
from torch import Tensor, nn

from impatient.errors import ExitPassed
from impatient.networks import MultiExitNetwork
from staging import CLASSES, WIDTH, assert_same, attach, linear, staged, x_of


def in_place(inplace: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(4 * 4 * 4, CLASSES)
    )


@pytest.fixture
def overwriting() -> tuple[MultiExitNetwork, Tensor, Tensor]:
    """Return a network that overwrites its features, an input and the right output."""
    x = torch.randn(5, 2, 6, 6)
    network = attach(in_place(), "0", example=x)
    with torch.no_grad():
        features = network.backbone[0](x)
        right = network.heads[0](features)
        wrong = network.heads[0](features.relu())
    assert (right - wrong).abs().min() > 1e-3
    return network, x, right


def test_output_asked_at_once_is_right(
    overwriting: tuple[MultiExitNetwork, Tensor, Tensor],
) -> None:
    network, x, right = overwriting
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_same([staged(network, x)[0]], [right])


def test_output_asked_at_once_can_be_read_again_later(
    overwriting: tuple[MultiExitNetwork, Tensor, Tensor],
) -> None:
    network, x, right = overwriting
    walk = network.exits(x)
    exit = next(walk)
    exit.output()
    list(walk)
    assert_same([exit.output()], [right])


def test_output_asked_after_the_run_went_on_is_refused(
    overwriting: tuple[MultiExitNetwork, Tensor, Tensor],
) -> None:
    network, x, _ = overwriting
    early, _ = network.exits(x)
    with pytest.raises(ExitPassed, match=r"exit 0 was passed \(the run is at exit 1\).*keep=True"):
        early.output()


def test_kept_features_give_the_right_output_later(
    overwriting: tuple[MultiExitNetwork, Tensor, Tensor],
) -> None:
    network, x, right = overwriting
    early, last = network.exits(x, keep=True)
    assert_same([early.output()], [right])
    assert_same([last.output()], [network.backbone(x)])


def test_forward_gives_the_right_output_in_training(
    overwriting: tuple[MultiExitNetwork, Tensor, Tensor],
) -> None:
    network, x, right = overwriting
    assert_same(network.train()(x), [right, network.backbone(x)])


def test_gradients_are_those_of_a_model_that_does_not_overwrite(
    overwriting: tuple[MultiExitNetwork, Tensor, Tensor],
) -> None:
    network, x, _ = overwriting
    careful = attach(in_place(inplace=False), "0", example=x)
    careful.load_state_dict(network.state_dict())
    for run in (
        lambda n: n(x),
        lambda n: staged(n, x),
        lambda n: [e.output() for e in list(n.exits(x, keep=True))],
    ):
        for one in (network, careful):
            one.zero_grad()
            sum(output.square().sum() for output in run(one)).backward()
        for ours, truth in zip(network.parameters(), careful.parameters(), strict=True):
            assert truth.grad.abs().sum() > 0
            torch.testing.assert_close(ours.grad, truth.grad)


class FailsLate(nn.Module):
    """Overwrites its features and then fails."""

    def __init__(self) -> None:
        super().__init__()
        self.block = linear()
        self.relu = nn.ReLU(inplace=True)
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.block(x))
        if self.fails:
            raise MemoryError("later stage")
        return self.classifier(x)


def test_output_after_a_later_stage_failed_is_refused_unless_kept() -> None:
    network = attach(FailsLate(), "block")
    x = x_of()
    right = network(x)[0]
    network.backbone.fails = True
    for keep in (False, True):
        walk = network.exits(x, keep=keep)
        exit = next(walk)
        with pytest.raises(MemoryError):
            next(walk)
        if keep:
            assert_same([exit.output()], [right])
        else:
            with pytest.raises(ExitPassed, match="failed in a later stage"):
                exit.output()
