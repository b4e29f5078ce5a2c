"""Every kind of policy, found by itself: saved, judged, described, run, kept in a run directory."""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blocks
import impatient
from impatient import CostProfile, Recording, Runner, evaluate
from impatient.errors import PolicyError
from impatient.networks.cascade import Cascade
from impatient.policies import (
    STOP,
    DrawnPolicy,
    GatePolicy,
    MixedPolicy,
    Policy,
    PolicyPoint,
    SelectionPolicy,
    ThresholdPolicy,
    Topology,
    control_risk,
    fit_gates,
    fit_selection,
    fit_thresholds,
    mix,
    sweep_gates,
    sweep_selection,
    threshold_family,
)
from impatient.policies.policy import check_policy
from impatient.policies.risk import ControlledPolicy
from impatient.provenance import fingerprint_tensors
from impatient.store import _plain, kinds_of
from impatient.verbs.network_spec import save_weights
from impatient.verbs.run_directory import RunDirectory
from recordings import costs_of, recording_of

CLASSES = 3
SAMPLES = 80
COSTS = costs_of([1.0, 2.0, 3.0, 4.0], [0.1, 0.1, 0.1, 0.1])


def small(noise: float, seed: int) -> nn.Module:
    """A classifier that is right the more often, the less noise it has."""
    layer = nn.Linear(CLASSES, CLASSES)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(CLASSES) * 3.0)
        layer.weight += noise * torch.randn(CLASSES, CLASSES, generator=random)
        layer.bias.zero_()
    return nn.Sequential(nn.Identity(), layer)


NETWORK = Cascade([small(2.0, 0), small(1.0, 1), small(0.5, 2), small(0.0, 3)]).eval()
WEIGHTS = fingerprint_tensors(NETWORK.state_dict())


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=random)
    x = nn.functional.one_hot(labels, CLASSES) + 0.5 * torch.randn(
        SAMPLES, CLASSES, generator=random
    )
    return x, labels


@functools.cache
def recorded(split: str) -> Recording:
    x, labels = inputs(0 if split == "validation" else 1)
    with torch.inference_mode():
        outputs = torch.stack(NETWORK(x)).clone()
    return recording_of(outputs, labels, split=split, weights=WEIGHTS, features=(x,) * 4)


def thresholds() -> ThresholdPolicy:
    return fit_thresholds(recorded("validation"), COSTS, max_accuracy_loss=0.05)


def gates() -> GatePolicy:
    return fit_gates(recorded("validation"), COSTS, time_price=0.05, inputs="both")


def selection() -> SelectionPolicy:
    return fit_selection(
        recorded("validation"), (1.1, 2.1, 3.1, 4.1), Topology.full(4), time_price=0.05, pooled=True
    )


def mixed() -> MixedPolicy:
    return MixedPolicy(fast=gates(), slow=selection(), share=0.4, seed=2)


def drawn() -> DrawnPolicy:
    return MixedPolicy(fast=thresholds(), slow=gates(), share=0.5).for_run(SAMPLES)


def controlled() -> ControlledPolicy:
    family = threshold_family(4)
    return control_risk(family, recorded("validation"), epsilon=0.3, delta=0.2)


EXAMPLES: dict[type[Policy], Callable[[], Policy]] = {
    ThresholdPolicy: thresholds,
    GatePolicy: gates,
    SelectionPolicy: selection,
    MixedPolicy: mixed,
    DrawnPolicy: drawn,
    ControlledPolicy: controlled,
}


def kinds() -> list[type[Policy]]:
    """All that is derived from Policy in the library."""
    found: dict[str, Any] = kinds_of(Policy)
    return [kind for kind in found.values() if kind.__module__.startswith("impatient.")]


KINDS = pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)


def content(policy: Policy) -> tuple[Any, dict[str, list[Any]]]:
    tensors: dict[str, Tensor] = {}
    plain = _plain(policy, tensors)
    return plain, {name: value.tolist() for name, value in tensors.items()}


def test_there_are_the_kinds_that_there_are() -> None:
    assert {kind.__name__ for kind in kinds()} == {kind.__name__ for kind in EXAMPLES}


@KINDS
def test_every_kind_has_an_example(kind: type[Policy]) -> None:
    assert type(EXAMPLES[kind]()) is kind


@KINDS
def test_it_comes_back_from_its_file(kind: type[Policy], tmp_path: Path) -> None:
    policy = EXAMPLES[kind]()
    policy.save(tmp_path / "policy")
    back = Policy.load(tmp_path / "policy")
    assert type(back) is kind
    assert content(back) == content(policy)
    assert torch.equal(back.exits_on(recorded("test")), policy.exits_on(recorded("test")))


@KINDS
def test_it_is_judged_on_a_recording(kind: type[Policy]) -> None:
    policy = EXAMPLES[kind]()
    recording = recorded("test")
    row = evaluate(recording, COSTS, policy)["policy"]
    exits = policy.exits_on(recording)
    assert row.shares == pytest.approx((exits.bincount(minlength=4) / SAMPLES).tolist())
    right = recording.outputs[exits, torch.arange(SAMPLES)].argmax(-1) == recording.labels
    assert row.accuracy.value == pytest.approx(float(right.double().mean()))
    assert 1.0 < row.contract_s <= row.interruptible_s + 1e-9
    assert len(exits.unique()) > 1


@KINDS
def test_it_is_described(kind: type[Policy]) -> None:
    words = EXAMPLES[kind]().described(["a", "b", "c", "d"])
    assert words.looks_at
    assert len(words.rules) == 4
    assert any(words.rules)


@KINDS
def test_it_runs_as_it_does_on_a_recording(kind: type[Policy]) -> None:
    policy = EXAMPLES[kind]()
    x, _ = inputs(1)
    costs = CostProfile(**{**_fields(COSTS), "batches": {SAMPLES: COSTS.at(1)}})
    for compaction in ("never", "always"):
        runner = Runner(NETWORK, costs, policy, any_profile=True, compaction=compaction)
        answer = runner.run(x)
        assert answer.exits == tuple(policy.exits_on(recorded("test")).tolist())
        outputs = recorded("test").outputs[torch.tensor(answer.exits), torch.arange(SAMPLES)]
        assert torch.allclose(answer.output, outputs, atol=1e-5)


@KINDS
def test_it_is_kept_in_a_run_directory(kind: type[Policy], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    save_weights(NETWORK, run.weights_file)
    policy = EXAMPLES[kind]()
    # in the place of one of another kind, of which nothing stays
    run.save_policy("mine", gates())
    run.save_policy("mine", thresholds())
    run.save_policy("mine", policy)
    assert list(run.policy_files()) == ["mine"]
    assert content(run.policies()["mine"]) == content(run.policy("mine")) == content(policy)
    assert len(list((tmp_path / "policies").iterdir())) == 1


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


# --- mixtures of any two --------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["thresholds", "gates", "selections"])
def test_any_curve_is_mixed_to_the_mean_time_that_is_asked_for(of: str) -> None:
    recording = recorded("validation")
    points: Any = {
        "thresholds": lambda: [
            PolicyPoint.of(policy, recording, COSTS) for policy in threshold_family(recording)
        ],
        "gates": lambda: sweep_gates(recording, COSTS),
        "selections": lambda: sweep_selection(recording, (1.1, 2.1, 3.1, 4.1), Topology.full(4)),
    }[of]()
    times = sorted({point.mean_time_s for point in points})
    wanted = (times[0] + times[-1]) / 2
    policy = mix(points, mean_time_s=wanted, seed=1)
    fast, slow = (
        float(part.outcome(recording, COSTS).contract_s.mean())
        for part in (policy.fast, policy.slow)
    )
    assert fast + policy.share * (slow - fast) == pytest.approx(min(wanted, slow))


def test_a_mixture_of_two_selections_is_judged_and_run_on_its_cascade() -> None:
    first, last = (
        SelectionPolicy(
            topology=Topology.star(4),
            moves=((move,), *(((STOP,),) * 3)),
            decisions={},
            node_s=(1.0,) * 4,
        )
        for move in (STOP, 3)
    )
    policy = MixedPolicy(fast=first, slow=last, share=0.5, seed=4)
    answers = torch.where(policy.drawn(SAMPLES), 3, 0)
    assert 0 < int((answers == 3).sum()) < SAMPLES
    assert torch.equal(policy.exits_on(recorded("test")), answers)
    judged = evaluate(recorded("test"), COSTS, policy)["policy"]
    share = float((answers == 3).double().mean())
    assert judged.shares == (1 - share, 0.0, 0.0, share)
    assert judged.contract_s == pytest.approx(1.1 + share * 4.1)
    costs = CostProfile(**{**_fields(COSTS), "batches": {SAMPLES: COSTS.at(1)}})
    runner = Runner(NETWORK, costs, policy, any_profile=True)
    x, _ = inputs(1)
    assert runner.run(x).exits == tuple(answers.tolist())
    # another run, another draw
    assert runner.run(x).exits != tuple(answers.tolist())
    with runner.start(x) as run:
        assert set(run.result().exits) == {0, 3}


def test_what_a_selection_needs_is_a_cascade() -> None:
    with pytest.raises(PolicyError, match="cannot run a MultiExitNetwork; expected a Cascade"):
        Runner(blocks.NETWORK, COSTS, selection(), any_profile=True)


# --- a policy of one's own ------------------------------------------------------------------------


class Alternating(impatient.Policy):
    """Stops every sample at exit 1, and asks for nothing more than a policy must have."""

    num_exits = 4

    def looks_at(self, exit: int) -> bool:
        return exit == 1

    def stops(self, exit: int, outputs: Any = None, pooled: Any = None) -> Tensor:
        return torch.ones(len(outputs), dtype=torch.bool)


def test_three_methods_make_a_policy() -> None:
    policy = Alternating()
    assert policy.exits_on(recorded("test")).tolist() == [1] * SAMPLES
    row = evaluate(recorded("test"), COSTS, policy)["policy"]
    assert (row.contract_s, row.interruptible_s) == pytest.approx((3.1, 3.2))
    assert policy.described(["a", "b", "c", "d"]).rules == ("closed", "asked", "closed", "always")
    costs = CostProfile(**{**_fields(COSTS), "batches": {SAMPLES: COSTS.at(1)}})
    assert Runner(NETWORK, costs, policy, any_profile=True).run(inputs(1)[0]).exit == 1


def test_a_policy_with_a_misspelt_method_is_refused_at_once() -> None:
    class Misspelt(impatient.Policy):
        num_exits = 4

        def look_at(self, exit: int) -> bool:
            return True

        def stops(self, exit: int, outputs: Any = None, pooled: Any = None) -> Tensor:
            return torch.ones(len(outputs), dtype=torch.bool)

    with pytest.raises(
        PolicyError, match=r"Misspelt does not define looks_at \(look_at in its place\?\)"
    ):
        Misspelt()


class Duck:
    """Has all methods, and is no policy."""

    num_exits = 4
    looks_at = Alternating.looks_at
    stops = Alternating.stops


@pytest.mark.parametrize("policy", [Duck(), "same", math.inf], ids=["duck", "text", "number"])
@pytest.mark.parametrize(
    "use",
    [
        lambda policy: Runner(NETWORK, COSTS, policy, any_profile=True),
        check_policy,
        lambda policy: control_risk([policy], recorded("validation"), epsilon=0.2),
    ],
    ids=["Runner", "evaluate", "control_risk"],
)
def test_what_is_no_policy_is_refused_at_once(use: Callable[[Any], Any], policy: Any) -> None:
    with pytest.raises(PolicyError, match=r"is no policy; expected .* impatient\.Policy"):
        use(policy)


def test_what_another_policy_began_on_a_cascade_is_not_taken_up() -> None:
    costs = CostProfile(**{**_fields(COSTS), "batches": {SAMPLES: COSTS.at(1)}})
    with Runner(NETWORK, costs, Alternating(), any_profile=True).open(inputs(1)[0]) as opened:
        opened.run()
        with pytest.raises(PolicyError, match="begin a new run"):
            opened.run(policy=selection())


def test_mixtures_describe_themselves_by_their_parts() -> None:
    policy = MixedPolicy(fast=thresholds(), slow=gates(), share=0.25)
    rules: Mapping[int, str] = dict(enumerate(policy.described(["a", "b", "c", "d"]).rules))
    assert rules[0] == "25% follow the slower policy"
    assert (policy.target, policy.split) == (gates().target, "validation")
