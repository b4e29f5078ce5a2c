"""Loops whose every turn is an exit: a module called several times, and what it returns first."""

import pytest
import torch
from torch import Tensor

import impatient
from impatient.clock import Deadline
from impatient.errors import ExitNotFound, HeadError
from toys import Refiner

X = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def loop(turns: int = 4, task: str = "regression") -> impatient.MultiExitNetwork:
    torch.manual_seed(0)
    return impatient.attach_exits(
        Refiner(turns), example=X, after="calls:step", heads="identity", task=task
    ).eval()


def after(network: impatient.MultiExitNetwork, turns: int) -> Tensor:
    """What the untouched loop answers after fewer turns."""
    network.backbone.turns = turns
    answer: Tensor = network.backbone(X)
    network.backbone.turns = 4
    return answer


def test_an_exit_is_the_answer_of_the_loop_if_it_ended_there() -> None:
    network = loop()
    assert network.exit_names == ("step@0", "step@1", "step@2", "output")
    # nothing is added to the loop
    assert list(network.parameters()) == list(network.backbone.parameters())
    outputs = network(X)
    for turn, output in enumerate(outputs, start=1):
        assert torch.equal(output, after(network, turn))
    assert not torch.equal(outputs[0], outputs[1])
    with network.exits(X) as run:
        assert all(torch.equal(exit.output(), outputs[exit.index]) for exit in run)


def test_every_turn_learns_through_the_shared_step() -> None:
    network = loop().train()
    losses = impatient.training.losses.task_losses(network.task, network(X), 2 * X)
    (first,) = torch.autograd.grad(losses[0].sum(), network.backbone.step.change.weight)
    assert float(first.abs().sum()) > 0
    losses = impatient.training.losses.task_losses(network.task, network(X), 2 * X)
    assert losses.shape == (4, 3)


@pytest.mark.parametrize("task", ["regression", "segmentation"])
def test_a_loop_answers_by_a_deadline_and_when_it_is_interrupted(task: str) -> None:
    network = loop(task=task)
    costs = impatient.profile(network, X[:1], batch_sizes=[1, 3], repeats=5)
    with impatient.Runner(network, costs) as runner:
        whole = runner.run(X, deadline=Deadline.after(60.0))
        assert torch.equal(whole.output, after(network, 4))
        # no time at all: the first turn
        late = runner.run(X, deadline=Deadline.after(1e-9))
        assert late.exit == 0
        assert torch.equal(late.output, after(network, 1))
        with runner.start(X) as started:
            begun = started.interrupt()
        assert torch.equal(begun.output, after(network, begun.exit + 1))


def test_what_is_no_loop_is_refused() -> None:
    with pytest.raises(ExitNotFound, match=r"'begin' is called once .* after=\['begin'\]"):
        impatient.attach_exits(Refiner(4), example=X, after="calls:begin", task="regression")
    with pytest.raises(ExitNotFound, match="no module 'stp'"):
        impatient.attach_exits(Refiner(4), example=X, after="calls:stp", task="regression")
    with pytest.raises(HeadError, match=r"gives \(3, 4, 6, 6\); expected shape \(3, 1, 6, 6\)"):
        impatient.attach_exits(
            Refiner(4), example=X, after=["begin"], heads="identity", task="regression"
        )
