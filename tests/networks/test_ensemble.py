"""Ensembles of growing depth: which exit answers, and what does not run."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from impatient.errors import ClassCountMismatch, ExitPassed, NetworkError, PolicyError
from impatient.evaluation import record
from impatient.networks import MultiExitNetwork, attach_exits
from impatient.networks.combined_exits import RunningEnsemble
from impatient.networks.ensemble import EANN, answering_exits
from impatient.policies import ThresholdPolicy
from impatient.provenance import fingerprint_tensors
from impatient.runtime import Runner, profile
from recordings import Samples
from staging import paused_runs
from toys import ToyBackbone

X = torch.zeros(1, 8)
ERRORS = [[0.5, 0.3], [0.4, 0.25, 0.2], [0.6, 0.5, 0.2, 0.15]]
# by hand
ANSWERS = (0, 1, 1, 3, 4, 4, 4, 7, 8)
SILENT = [index for index, answer in enumerate(ANSWERS) if answer != index]


def member(exits: int, num_classes: int = 3) -> MultiExitNetwork:
    backbone = ToyBackbone(num_classes)
    network = attach_exits(
        backbone, after=[f"blocks.{index}" for index in range(exits - 1)], example=X
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


@pytest.fixture
def members() -> list[MultiExitNetwork]:
    return [member(2), member(3), member(4)]


@pytest.fixture
def network(members: list[MultiExitNetwork]) -> EANN:
    return EANN(members, ERRORS).eval()


def heads_and_backbones_run(network: EANN) -> list[str]:
    """Grows by the name of each head and each block that runs."""
    ran: list[str] = []
    for number, inner in enumerate(network.networks):
        parts = {f"head {number}/{index}": head for index, head in enumerate(inner.heads)}
        parts |= {
            f"block {number}/{index}": block for index, block in enumerate(inner.backbone.blocks)
        }
        for name, part in parts.items():
            part.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    return ran


# --- who answers ----------------------------------------------------------------------------------


# early exits of finished networks do not come back
@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (ERRORS, ANSWERS),
        # the first network has nobody to leave the answer to
        ([[0.9, 0.1, 0.5]], (0, 1, 2)),
        # of equals, the running one
        ([[0.2], [0.2]], (0, 1)),
        (
            [[0.2], [0.3, 0.1, 0.3], [0.25]],
            (0, 0, 2, 0, 0),
        ),
        # the best finished one, not the last
        ([[0.2], [0.4], [0.3]], (0, 0, 0)),
    ],
)
def test_the_better_of_the_best_finished_and_the_running_network_answers(errors, expected):
    assert answering_exits(errors) == expected


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0]), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    )
)
def test_no_answer_is_worse_than_a_finished_network_or_comes_from_the_future(errors):
    flat = [error for member in errors for error in member]
    number = 0
    for order, own in enumerate(errors):
        finished = [done[-1] for done in errors[:order]]
        for error in own:
            answer = answering_exits(errors)[number]
            assert answer <= number
            assert flat[answer] == min([error, *finished])
            number += 1


def test_switches_say_where_each_network_takes_over(members):
    assert EANN(members, ERRORS).switches == (0, 1, 2)
    assert EANN(members[:2], [[0.5, 0.3], [0.4, 0.4, 0.4]]).switches == (0, 3)


# --- the same outputs by every way ----------------------------------------------------------------


def test_forward_exits_and_recording_give_the_members_own_outputs(network, members):
    data = Samples(3 * torch.randn(40, 8), torch.randint(3, (40,)))
    own = [output for inner in members for output in inner(data.inputs)]
    assert len({tuple(output.argmax(1).tolist()) for output in own}) == len(own)
    expected = torch.stack([own[answer] for answer in ANSWERS])

    assert torch.stack(network(data.inputs)).equal(expected)
    with network.exits(data.inputs) as run:
        assert torch.stack([exit.output() for exit in run]).equal(expected)
    recorded = record(network, data, features=True, batch_size=40)
    assert recorded.outputs.equal(expected)
    assert recorded.exits == network.exit_names
    inner_features = [
        entry
        for inner in members
        for entry in record(inner, data, features=True, batch_size=40).features
    ]
    assert all(
        entry.equal(own) for entry, own in zip(recorded.features, inner_features, strict=True)
    )


def test_an_ensemble_looks_like_a_network(network, members):
    assert network.num_exits == 9
    assert network.exit_names[:3] == ("0/blocks.0", "0/output", "1/blocks.0")
    assert network.exit_names[-1] == "2/output"
    assert network.num_classes == 3
    assert network.exit_free is members[-1].backbone


def test_the_last_final_of_an_ensemble_may_be_an_earlier_one(members, toy_input):
    network = EANN(members[:2], [[0.5, 0.3], [0.4, 0.4, 0.4]])
    assert network(toy_input)[-1].equal(members[0](toy_input)[-1])


def test_running_ensembles_and_ensembles_can_be_members(members, toy_input):
    inner = EANN(members[:2], ERRORS[:2])
    network = EANN(
        [RunningEnsemble(member(2), "geometric"), inner], [[0.5, 0.4], [0.5, 0.35, 0.3, 0.25, 0.2]]
    )
    with network.exits(toy_input) as run:
        staged = torch.stack([exit.output() for exit in run])
    assert staged.equal(torch.stack(network(toy_input)))
    assert staged[3].equal(inner(toy_input)[1])


# --- what is not run ------------------------------------------------------------------------------


def test_a_head_that_leaves_the_answer_to_a_finished_network_never_runs(network, toy_input):
    ran = heads_and_backbones_run(network)
    with network.exits(toy_input) as run:
        for exit in run:
            exit.output()
    assert [name for name in ran if name.startswith("head")] == ["head 0/0", "head 1/1", "head 2/2"]
    assert sum(name.startswith("block") for name in ran) == 12


def test_nothing_deeper_is_computed_than_asked_for(network, toy_input):
    ran = heads_and_backbones_run(network)
    with network.exits(toy_input) as run:
        for _ in range(3):
            last = next(run)
    assert last.index == 2
    assert ran == ["block 0/0", "block 0/1", "block 0/2", "block 0/3", "block 1/0"]


@pytest.mark.parametrize("asked", range(10))
def test_a_closed_run_ends_and_leaves_nothing_paused(network, toy_input, asked):
    before = paused_runs()
    run = network.exits(toy_input)
    for _ in range(asked):
        next(run, None)
    run.close()
    run.close()
    assert next(run, None) is None
    assert paused_runs() == before


def test_a_run_that_is_dropped_closes_itself(network, toy_input):
    before = paused_runs()
    run = network.exits(toy_input)
    next(run)
    assert paused_runs() == before + 1
    del run
    assert paused_runs() == before


def test_a_member_that_fails_ends_the_run(network, toy_input):
    def fail(*_: Any) -> None:
        raise ValueError("out of order")

    network.networks[0].backbone.blocks[2].register_forward_pre_hook(fail)
    run = network.exits(toy_input)
    next(run)
    with pytest.raises(ValueError, match="out of order"):
        next(run)
    assert next(run, None) is None


def test_every_member_runs_in_the_modes_in_which_the_run_was_asked_for(network, toy_input):
    with torch.no_grad():
        run = network.exits(toy_input)
    assert not any(exit.output().requires_grad for exit in run)
    with network.exits(toy_input) as training:
        assert all(exit.output().requires_grad for exit in training)


def test_an_exit_that_has_passed_is_refused_unless_kept(network, toy_input):
    with network.exits(toy_input) as run:
        exits = list(run)
    # a last exit's output is there already
    assert torch.is_tensor(exits[1].output())
    with pytest.raises(ExitPassed):
        exits[0].output()
    with network.exits(toy_input, keep=True) as run:
        exits = list(run)
    assert torch.stack([exit.output() for exit in exits]).equal(torch.stack(network(toy_input)))


# --- state ----------------------------------------------------------------------------------------


def test_a_state_dict_brings_the_errors_with_it(network, toy_input):
    other = EANN([member(2), member(3), member(4)], [[0.1, 0.1], [0.1] * 3, [0.1] * 4])
    assert other.answers == tuple(range(9))
    other.load_state_dict(network.state_dict())
    assert other.answers == ANSWERS
    assert other.validation_errors == tuple(map(tuple, ERRORS))
    assert torch.stack(other(toy_input)).equal(torch.stack(network(toy_input)))


def test_another_table_is_another_network(members, network):
    other = EANN(members, [[0.5, 0.3], [0.4, 0.25, 0.2], [0.6, 0.5, 0.2, 0.1]])
    assert fingerprint_tensors(other.state_dict()) != fingerprint_tensors(network.state_dict())


def test_copies_are_independent(network, toy_input):
    before = torch.stack(network(toy_input))
    twin = copy.deepcopy(network)
    assert torch.stack(twin(toy_input)).equal(before)
    twin.load_state_dict(
        EANN([member(2), member(3), member(4)], [[0.1] * 2, [0.1] * 3, [0.1] * 4]).state_dict()
    )
    assert twin.answers == tuple(range(9))
    assert network.answers == ANSWERS
    assert torch.stack(network(toy_input)).equal(before)
    assert not torch.stack(twin(toy_input)).equal(before)


# --- costs and the runner -------------------------------------------------------------------------


def test_facts_are_the_members_with_no_work_in_silent_heads(network, members):
    own = [fact for inner in members for fact in inner.stage_facts(X)]
    facts = network.stage_facts(X)
    assert [fact.exit for fact in facts] == list(network.exit_names)
    assert [fact.stage_macs for fact in facts] == [fact.stage_macs for fact in own]
    assert [fact.stage_parameters for fact in facts] == [fact.stage_parameters for fact in own]
    assert [fact.head_macs for fact in facts] == [
        0 if i in SILENT else fact.head_macs for i, fact in enumerate(own)
    ]
    assert all(own[index].head_macs > 0 for index in SILENT[:1])


def test_it_describes_who_takes_over_where(network):
    assert network.describe(X).splitlines()[-1] == (
        "answers: network 0 from 0/blocks.0, network 1 from 1/blocks.1, network 2 from 2/blocks.2."
    )
    never = EANN(list(network.networks)[:2], [[0.5, 0.3], [0.4, 0.4, 0.4]])
    assert (
        never.describe(X).splitlines()[-1] == "answers: network 0 from 0/blocks.0, network 1 never."
    )


def test_profile_and_runner_take_it_for_a_network(network, toy_input):
    costs = profile(network, toy_input, batch_sizes=[5], repeats=3, warm_up=1)
    assert costs.exits == network.exit_names
    runner = Runner(network, costs)
    final = runner.run(toy_input)
    assert (final.exit, final.stopped_by) == (8, "final")
    assert final.output.equal(network(toy_input)[8])
    policy = ThresholdPolicy(
        score="max_probability", thresholds=(*[2.0] * 5, 0.0, *[2.0] * 2, -math.inf)
    )
    stopped = Runner(network, costs, policy).run(toy_input)
    assert (stopped.exit, stopped.stopped_by) == (5, "policy")
    # a silent exit: the second network's last
    assert stopped.output.equal(network(toy_input)[4])


# --- what is refused ------------------------------------------------------------------------------


def test_ensembles_that_cannot_be_are_refused(members):
    with pytest.raises(NetworkError, match="no networks"):
        EANN([], [])
    with pytest.raises(NetworkError, match="is no network with exits"):
        EANN([ToyBackbone()], [[0.5]])
    with pytest.raises(ClassCountMismatch, match=r"\[3, 4\]"):
        EANN([member(2), member(2, num_classes=4)], [[0.5, 0.3]] * 2)


@pytest.mark.parametrize(
    "errors",
    [
        ERRORS[:2],
        [[0.5], *ERRORS[1:]],
        [*ERRORS, [0.1]],
        [[0.5, 1.2], *ERRORS[1:]],
        [[0.5, -0.1], *ERRORS[1:]],
        [[0.5, float("nan")], *ERRORS[1:]],
    ],
)
def test_wrong_errors_are_refused(members, errors):
    with pytest.raises(PolicyError, match="validation errors"):
        EANN(members, errors)


def test_errors_may_be_tensors(members):
    errors: list[Tensor] = [torch.tensor(own, dtype=torch.float64) for own in ERRORS]
    assert EANN(members, errors).answers == ANSWERS  # type: ignore[arg-type]
