"""A network with exits inside a model with exits."""

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from impatient.networks import MultiExitNetwork
from staging import Containing, assert_same, attach, paused_runs, staged, toy_network, x_of


def last_of_forward(network: MultiExitNetwork, x: Tensor) -> Tensor:
    return network(x)[-1]


def sum_of_exits(network: MultiExitNetwork, x: Tensor) -> Tensor:
    return sum(staged(network, x))


def first_exit(network: MultiExitNetwork, x: Tensor) -> Tensor:
    return next(network.exits(x)).output()


def just_the_backbone(network: MultiExitNetwork, x: Tensor) -> Tensor:
    return network.backbone(x)


uses = pytest.mark.parametrize(
    "use", [last_of_forward, sum_of_exits, first_exit, just_the_backbone]
)


@uses
def test_network_inside_a_model_with_exits_runs_as_it_does_alone(
    toy: nn.Module, use: Callable[..., Tensor]
) -> None:
    inner = toy_network(toy)
    model = Containing(inner, use)
    x = x_of()
    plain = model(x)
    outer = attach(model, "before", "after")
    before = model.before(x)
    after = model.after(use(inner, before))
    by_hand = [outer.heads[0](before), outer.heads[1](after), plain]
    assert_same(outer(x), by_hand)
    assert_same(staged(outer, x), by_hand)


def test_outer_run_may_pause_while_an_inner_one_is_paused(toy: nn.Module) -> None:
    class Alternating(Containing):
        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            for exit in self.inner.exits(x):
                # the outer cut
                x = self.after(exit.output())
            return self.classifier(x)

    model = Alternating(toy_network(toy), last_of_forward)
    x = x_of()
    plain = model(x)
    outer = attach(model, "before", "after@0", "after@2")
    before = paused_runs()
    assert_same([staged(outer, x)[-1]], [plain])
    assert_same(staged(outer, x), outer(x))
    walk = outer.exits(x)
    next(walk), next(walk)
    assert paused_runs() == before + 2
    walk.close()
    assert paused_runs() == before
