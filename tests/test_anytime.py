"""What is asked of networks, runs and exits: a network of one's own, and what is refused."""

import copy
from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import impatient
from impatient import Exit, FakeClock, Network, Run, Runner, ThresholdPolicy
from impatient.anytime import ToTheLastExit, check_network
from impatient.errors import ExitNotReached, NetworkError
from impatient.networks import EANN, Cascade, RunningEnsemble

WIDTH = 4
CLASSES = 3


class Own(Network):
    """The least a network gives: `num_exits` and `exits`."""

    num_exits = 3

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(3))

    def exits(self, x: Any, *, keep: bool = False) -> Run:
        return Run(self._exits(x))

    def _exits(self, x: Tensor) -> Generator[Exit]:
        for index, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            x = stage(x).relu()
            yield Exit(index, x, head)


@pytest.fixture
def own() -> Own:
    return Own().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, WIDTH)


def by_hand(network: Own, x: Tensor) -> list[Tensor]:
    outputs = []
    for stage, head in zip(network.stages, network.heads, strict=True):
        x = stage(x).relu()
        outputs.append(head(x))
    return outputs


# --- what a network of one's own can do -----------------------------------------------------------


def test_a_network_gives_the_outputs_of_all_its_exits(own: Own, x: Tensor) -> None:
    for found, wanted in zip(own(x), by_hand(own, x), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(own.exit_free(x), by_hand(own, x)[-1])


def test_a_network_trains_through_its_exits(own: Own, x: Tensor) -> None:
    sum(output.sum() for output in own(x)).backward()
    assert all(parameter.grad is not None for parameter in own.parameters())


def test_a_head_runs_only_when_it_is_asked_and_once(own: Own, x: Tensor) -> None:
    ran = []
    for number, head in enumerate(own.heads):
        head.register_forward_hook(lambda *_, number=number: ran.append(number))
    with own.exits(x) as run:
        next(run)
        exit = next(run)
        assert "not computed" in repr(exit)
        assert exit.output() is exit.output()
    assert ran == [1]


def test_a_closed_run_gives_nothing_more(own: Own, x: Tensor) -> None:
    run = own.exits(x)
    next(run)
    run.close()
    run.close()
    assert list(run) == []


def test_a_network_is_counted_by_running_it(own: Own, x: Tensor) -> None:
    facts = own.stage_facts(x)
    weights, head = WIDTH * WIDTH, WIDTH * CLASSES
    # the last head belongs to the last stage
    assert [fact.stage_macs for fact in facts] == [weights, weights, weights + head]
    assert [fact.head_macs for fact in facts] == [head, head, 0]
    assert sum(fact.stage_parameters + fact.head_parameters for fact in facts) == sum(
        parameter.numel() for parameter in own.parameters()
    )
    assert [fact.exit for fact in facts] == ["exit 0", "exit 1", "exit 2"]
    assert "3 exits of its own" in own.describe(x)


def test_a_network_is_profiled_and_run_by_every_runner(own: Own, x: Tensor) -> None:
    costs = impatient.profile(own, x[:1], repeats=2, warm_up=0)
    assert costs.exits == own.exit_names
    runner = Runner(own, costs)
    wanted = by_hand(own, x[:1])[-1]
    assert torch.equal(runner.run(x[:1]).output, wanted)
    with runner.start(x[:1]) as run:
        assert torch.equal(run.result().output, wanted)


def test_the_last_head_is_paid_with_the_last_stage(own: Own, x: Tensor) -> None:
    clock = FakeClock()
    own.heads[-1].register_forward_hook(lambda *_: clock.advance(2.0))
    batch = impatient.profile(own, x[:1], repeats=2, warm_up=0, clock=clock).batches[1]
    assert (batch.stages[-1].mean, batch.heads[-1].mean) == (2.0, 0.0)


def test_samples_of_a_batch_stop_at_different_exits(own: Own, x: Tensor) -> None:
    wanted = torch.stack(by_hand(own, x)).detach()
    middle = float(wanted[0].softmax(-1).amax(-1).median())
    policy = ThresholdPolicy(score="max_probability", thresholds=(middle, 2.0, -torch.inf))
    costs = impatient.profile(own, x, batch_sizes=[5], repeats=2, warm_up=0)
    answer = Runner(own, costs, policy, compaction="always").run(x)
    assert set(answer.exits) == {0, 2}
    assert torch.equal(answer.output, wanted[list(answer.exits), range(5)])


def test_a_network_may_be_a_member_of_an_ensemble(own: Own, x: Tensor) -> None:
    own.num_classes = CLASSES
    ensemble = EANN([own, copy.deepcopy(own)], [[0.9, 0.5, 0.6], [0.9, 0.9, 0.1]]).eval()
    for found, exit in zip(ensemble(x), ensemble.exits(x), strict=True):
        assert torch.equal(found, exit.output())
    assert torch.equal(ensemble.pooled(exit), exit.features)


def test_features_that_are_not_flat_need_a_method_of_ones_own(own: Own) -> None:
    with pytest.raises(NetworkError, match=r"\(2, 3, 4\); expected \[B, D\]"):
        own.pooled(Exit(0, torch.zeros(2, 3, 4), torch.zeros(2, 3)))


def test_a_run_cannot_be_reduced_unless_it_says_how(own: Own, x: Tensor) -> None:
    assert not own.shrinks(x)
    with pytest.raises(NetworkError, match="keep"):
        own.exits(x).keep(torch.tensor([0]))


# --- what is refused at the door ------------------------------------------------------------------


def doors(network: Any) -> list[Any]:
    x = torch.zeros(1, WIDTH)
    costs = impatient.profile(Own().eval(), x, repeats=1, warm_up=0)
    return [
        lambda: impatient.profile(network, x),
        lambda: impatient.record(network, None),  # type: ignore[arg-type]  # refused before
        lambda: impatient.fit(network, None),  # type: ignore[arg-type]  # refused before
        lambda: Runner(network, costs, any_profile=True),
        lambda: EANN([network], [[0.5]]),
    ]


def assert_refused(network: Any, message: str) -> None:
    for door in doors(network):
        with pytest.raises(NetworkError, match=message):
            door()


def test_what_is_no_network_is_refused_with_what_to_do() -> None:
    assert_refused(nn.Linear(4, 3), "a Linear is no network with exits.*attach_exits.*derive")


def test_a_method_that_is_missing_is_named_with_what_may_be_meant() -> None:
    class Misspelt(Network):
        num_exits = 3

        def exit_at(self, x: Any) -> Run:
            raise AssertionError

    assert_refused(Misspelt(), "lacks 'exits'; it has exit_at .did you mean 'exit_at' to be it")
    with pytest.raises(NetworkError, match=r"has no exits\(x\)"):
        Misspelt()(torch.zeros(1, 1))


def test_a_number_of_exits_that_is_missing_is_named() -> None:
    class Numberless(Network):
        number_exits = 3

        def exits(self, x: Any, *, keep: bool = False) -> Run:
            raise AssertionError

    assert_refused(Numberless(), "lacks 'num_exits'.*did you mean 'number_exits'")


@pytest.mark.parametrize("name", ["exit_name", "shrink", "poled", "early_head", "stage_fact"])
def test_a_misspelt_override_is_no_silent_default(name: str) -> None:
    network = type("Mine", (Own,), {name: lambda *_: None})()
    assert_refused(network, f"Mine has '{name}', which nobody asks for; did you mean")


def test_names_of_ones_own_are_nobodys_business() -> None:
    class Rich(Own):
        heads: Any

        def backbone(self) -> None: ...
        def stage(self) -> None: ...
        def _exit_names(self) -> None: ...

    check_network(Rich())


def test_exits_that_yield_are_told_to_return_a_run() -> None:
    class Yields(Network):
        num_exits = 1

        def exits(self, x: Any, *, keep: bool = False) -> Any:
            yield Exit(0, x, x)

    assert_refused(Yields(), r"exits is a generator function; expected .* a Run")


def test_a_submodule_cannot_be_hidden_by_what_is_asked_of_networks() -> None:
    class Hidden(Own):
        def __init__(self) -> None:
            super().__init__()
            self.engine = nn.Linear(1, 1)  # type: ignore[assignment]

    with pytest.raises(NetworkError, match="'engine' means something for every network"):
        Hidden()


def test_a_number_of_exits_that_depends_on_the_object_is_a_property() -> None:
    class Counted(Network):
        def __init__(self) -> None:
            super().__init__()
            self.num_exits = 3  # type: ignore[misc]

    with pytest.raises(NetworkError, match=r"cannot set it.*a property"):
        Counted()


def test_a_run_that_never_comes_to_its_last_exit_has_no_answer(own: Own, x: Tensor) -> None:
    own.stages = own.stages[:2]
    own.heads = own.heads[:2]
    with pytest.raises(ExitNotReached, match="2, the last"):
        ToTheLastExit(own)(x)


def kinds(of: type) -> list[type]:
    return [kind for part in of.__subclasses__() for kind in (part, *kinds(part))]


def test_our_own_networks_have_no_name_that_looks_misspelt(own: Own) -> None:
    ours = [kind for kind in kinds(Network) if kind.__module__.startswith("impatient.")]
    assert {Cascade, EANN, RunningEnsemble} <= set(ours)
    for kind in ours:
        network = kind.__new__(kind)
        check_network(network)
