"""Gates: the recursion against brute force, what is paid, targets, files and mixtures."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from impatient.errors import InfeasibleTarget, NoEffectWarning, PolicyError, StorageError
from impatient.files import write_tensors
from impatient.policies.gate_fitting import GateTimes, backward, fit_gates, stop_gain, sweep_gates
from impatient.policies.gates import GatePolicy, gate_time_s
from impatient.policies.mixing import MixedPolicy, hull_of, lower_hull, mix, neighbours
from impatient.policies.risk import threshold_family
from impatient.tasks.scores import confidence_features
from papers.adaptive_neural_networks.exit_baselines import always, soft_oracle
from recordings import costs_of, drawn, recording_of, sure

INF = math.inf
COSTS = costs_of([1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.0])


def with_features(recording, features=None):
    """Pooled features: by default what the outputs are, before the head as it were."""
    return replace(recording, features=tuple(recording.outputs) if features is None else features)


def outcome_on(policy, recording, costs):
    """The exits that answer, and the seconds until they have."""
    found = policy.outcome(recording, costs)
    return found.exits, found.contract_s


def mean_s(policy, recording, costs=COSTS):
    return float(outcome_on(policy, recording, costs)[1].mean())


def accuracy(policy, recording, costs=COSTS):
    exits = outcome_on(policy, recording, costs)[0]
    return float(recording.quality[exits, torch.arange(len(exits))].mean())


# --- what a gate sees -----------------------------------------------------------------------------


def test_the_six_numbers_are_what_they_are_called():
    found = confidence_features(torch.tensor([[0.1, 0.6, 0.1, 0.2]]).log())[0].tolist()
    entropy = -sum(p * math.log(p) for p in (0.1, 0.6, 0.1, 0.2)) / math.log(4)
    assert found == pytest.approx([0.6, 0.2, 0.1, 0.4, 1 - entropy, math.log(3)], abs=1e-6)


@pytest.mark.parametrize("classes", [1, 2])
def test_few_classes_have_no_third(classes):
    found = confidence_features(torch.randn(5, classes))
    assert found.shape == (5, 6)
    assert (found[:, 2] == 0).all()


def test_very_sure_outputs_can_still_be_told_apart():
    found = confidence_features(torch.tensor([[40.0, 0.0, 0.0], [80.0, 0.0, 0.0]]))
    assert found.isfinite().all()
    assert found[:, 5].tolist() == [40.0, 80.0]


# --- one gate: the truth table --------------------------------------------------------------------

# losses of the exit, of what follows and of the last exit; what stopping gains where it saves 1 s
# at 0.1 a second
TRUTH = [
    ((1, 0, 1), {"full": 0.1, "none": -0.9, "downstream": -0.9}),
    ((1, 0, 0), {"full": -0.9, "none": -0.9, "downstream": -0.9}),
    ((0, 1, 0), {"full": 1.1, "none": 1.1, "downstream": 0.1}),
    ((0, 1, 1), {"full": 0.1, "none": 1.1, "downstream": 0.1}),
    ((1, 1, 0), {"full": 0.1, "none": 0.1, "downstream": 0.1}),
    ((1, 1, 1), {"full": 0.1, "none": 0.1, "downstream": 0.1}),
    ((0, 0, 0), {"full": 0.1, "none": 0.1, "downstream": 0.1}),
    ((0, 0, 1), {"full": 0.1, "none": 0.1, "downstream": 0.1}),
]


@pytest.mark.parametrize("reference", ["full", "none", "downstream"])
@pytest.mark.parametrize(("losses", "gains"), TRUTH)
def test_what_stopping_gains(losses, gains, reference):
    loss, ahead, full = torch.tensor(losses, dtype=torch.float64)[:, None]
    gain = stop_gain(loss, ahead, full, 1.0, time_price=0.1, reference=reference)
    assert gain.item() == pytest.approx(gains[reference])


def test_at_an_infinite_price_only_seconds_count():
    one = torch.ones(1)
    assert stop_gain(one, 0 * one, 0 * one, 3.0, time_price=INF).item() == 3.0


# --- the recursion against every table of decisions -----------------------------------------------

seconds = st.floats(0.0, 3.0)


@st.composite
def problems(draw, exits=3, samples=3):
    losses = draw(
        st.lists(
            st.lists(st.sampled_from([0.0, 1.0]), min_size=samples, max_size=samples),
            min_size=exits,
            max_size=exits,
        )
    )
    times = [[draw(seconds) for _ in range(count)] for count in (exits, exits, exits - 1)]
    return losses, times, draw(st.booleans())


def posed(problem):
    losses, (stages, heads, gates), heads_first = problem
    times = GateTimes(
        stages=tuple(stages), heads=tuple(heads), gates=tuple(gates), heads_first=heads_first
    )
    return torch.tensor(losses, dtype=torch.float64), times


def until_s(times, exit):
    """From the definition, with all gates open: stages, gates and heads up to an exit."""
    heads = sum(times.heads[: exit + 1]) if times.heads_first else times.heads[exit]
    return sum(times.stages[: exit + 1]) + sum(times.gates[: exit + 1]) + heads


def cost_of(stops, losses, times, price, reference):
    exits = torch.cat([stops, torch.ones_like(stops[:1])]).int().argmax(0)
    total = 0.0
    for sample, exit in enumerate(exits.tolist()):
        loss = float(losses[exit, sample])
        full = float(losses[-1, sample])
        total += (max(loss - full, 0.0) if reference == "full" else loss) + price * until_s(
            times, exit
        )
    return total


def knows(exit, gain):
    return gain > 0


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.05, 0.3, 1.0, 5.0]), st.sampled_from(["full", "none"]))
def test_no_table_of_decisions_is_better_than_the_recursion(problem, price, reference):
    losses, times = posed(problem)
    stops = backward(losses, times, knows, time_price=price, reference=reference, close=False)
    tables = (
        torch.tensor(table).reshape(2, 3) for table in itertools.product([False, True], repeat=6)
    )
    best = min(cost_of(table, losses, times, price, reference) for table in tables)
    assert cost_of(stops, losses, times, price, reference) == pytest.approx(best)


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.3, 5.0]), st.sampled_from(["full", "none"]))
def test_where_looking_costs_nothing_closing_gates_loses_nothing(problem, price, reference):
    losses, times = posed(problem)
    free = GateTimes(stages=times.stages, heads=times.heads, gates=(0.0, 0.0), heads_first=False)
    found = [
        cost_of(
            backward(losses, free, knows, time_price=price, reference=reference, close=close),
            losses,
            free,
            price,
            reference,
        )
        for close in (True, False)
    ]
    assert found[0] == pytest.approx(found[1])


def test_the_papers_reference_is_not_the_best_for_its_own_objective():
    """The last exit errs; one in between is right: the paper's rule goes on to it, though no error
    would count.
    """
    losses = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
    times = GateTimes(
        stages=(1.0, 1.0, 1.0), heads=(0.0, 0.0, 0.0), gates=(0.0, 0.0), heads_first=False
    )
    stops = {
        reference: backward(losses, times, knows, time_price=0.1, reference=reference)
        .flatten()
        .tolist()
        for reference in ("full", "downstream")
    }
    assert stops == {"full": [True, True], "downstream": [False, True]}


def test_a_gate_that_saves_less_than_it_costs_is_closed_and_not_paid_by_those_before():
    losses = torch.zeros(3, 4, dtype=torch.float64)
    asked = []

    def half(exit, gain):
        asked.append((exit, gain.tolist()))
        return torch.tensor([True, True, False, False])

    times = GateTimes(
        stages=(1.0, 1.0, 1.0), heads=(0.0, 0.0, 0.0), gates=(0.25, 0.75), heads_first=False
    )
    stops = backward(losses, times, half, time_price=1.0)
    # the second saves 0.5 on average, and costs 0.75
    assert stops.tolist() == [
        [True, True, False, False],
        [False] * 4,
    ]
    assert asked == [(1, [1.0] * 4), (0, [2.0] * 4)]


# --- fitted gates: what they reach ----------------------------------------------------------------


@pytest.mark.parametrize("learner", ["logistic", "svm", "mlp", "boosting"])
def test_gates_that_see_everything_reach_the_oracle(learner):
    """Features that say which exits are right; time costs next to nothing, so the fastest right
    exit is to be found.
    """
    random = torch.Generator().manual_seed(0)
    right = torch.rand(4, 400, generator=random) < torch.tensor([0.3, 0.4, 0.5, 0.6])[:, None]
    outputs, labels = sure(right.tolist(), [[0.9] * 400] * 4)
    # whether this exit is right, and whether any deeper one is
    later = [right[k + 1 :].any(0) for k in range(3)]
    features = tuple(
        torch.stack([right[k], later[k], right[k] | ~later[k]], 1).float() for k in range(3)
    )
    recording = with_features(recording_of(outputs, labels), (*features, torch.zeros(400, 1)))
    policy = fit_gates(
        recording, COSTS, time_price=0.01, reference="none", inputs="features", learner=learner
    )
    exits, times = outcome_on(policy, recording, COSTS)
    best, best_s = soft_oracle(recording, COSTS)
    assert exits.equal(best)
    assert times.tolist() == pytest.approx(best_s.tolist())


@pytest.mark.parametrize("inputs", ["confidences", "features", "both"])
def test_the_ends_of_the_price_are_the_whole_network_and_the_first_exit(inputs):
    recording = with_features(drawn(300, seed=1))
    with pytest.warns(NoEffectWarning, match="no sample leaves early"):
        dear = fit_gates(recording, COSTS, time_price=0.0, inputs=inputs)
    assert set(dear.exits_on(recording).tolist()) == {3}
    assert dear.open_exits() == (False, False, False, True)
    assert dear.target["mean_cost"] == pytest.approx(4.0)
    cheap = fit_gates(recording, COSTS, time_price=INF, inputs=inputs)
    assert set(cheap.exits_on(recording).tolist()) == {0}
    assert cheap.target["mean_cost"] == pytest.approx(1.1)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", ["confidences", "features", "both"])
@pytest.mark.parametrize(
    "target", [{"mean_time_s": 1.6}, {"mean_time_s": 3.0}, {"max_accuracy_loss": 0.02}]
)
def test_a_target_is_kept_on_the_recording_it_was_fitted_on(target, inputs):
    recording = with_features(drawn(300, seed=3))
    policy = fit_gates(recording, COSTS, inputs=inputs, **target)
    (name, wanted), *_ = target.items()
    assert policy.target[name] == wanted
    assert policy.target["mean_cost"] == pytest.approx(mean_s(policy, recording))
    assert policy.target["accuracy"] == pytest.approx(accuracy(policy, recording))
    assert policy.split == "validation"
    if name == "mean_time_s":
        assert policy.target["mean_cost"] <= wanted
    else:
        assert policy.target["accuracy"] >= float(recording.quality[-1].mean()) - wanted - 1e-6
        assert policy.target["mean_cost"] < 4.0


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["full", "none", "downstream"])
def test_gates_beat_rules_that_see_less_on_fresh_data(reference):
    known = drawn(3000, seed=4)
    fresh = drawn(3000, seed=5, split="test")
    gates = fit_gates(known, COSTS, mean_time_s=2.5, reference=reference)
    # two exits mixed without a look at the input
    fast, slow, share = neighbours(COSTS.contract_s(), known.quality.mean(1).tolist(), 2.5)
    right = fresh.quality.mean(1)
    blind = float((1.0 - share) * right[fast] + share * right[slow])
    # one threshold for all exits
    in_time = [policy for policy in threshold_family(known) if mean_s(policy, known) <= 2.5]
    short = max(in_time, key=lambda policy: accuracy(policy, known))
    assert mean_s(gates, fresh) <= 2.6
    assert accuracy(gates, fresh) > blind + 0.03
    assert accuracy(gates, fresh) > accuracy(short, fresh) - 0.005


@pytest.mark.slow
def test_where_features_say_what_confidences_do_not_gates_on_features_are_better():
    recording = drawn(1000, seed=6)
    told = tuple(hits[:, None].float() + 0.1 * torch.randn(1000, 1) for hits in recording.quality)
    recording = with_features(recording, told)
    reached = {
        inputs: fit_gates(recording, COSTS, max_accuracy_loss=0.0, inputs=inputs).target[
            "mean_cost"
        ]
        for inputs in ("confidences", "features", "both")
    }
    assert reached["features"] < reached["both"] + 0.05 < reached["confidences"]


# --- fitted gates: what is paid -------------------------------------------------------------------


def test_gates_on_features_pay_a_head_only_where_a_sample_leaves():
    """Heads that cost half a stage: in passing they are not paid; each sample pays the one it
    leaves by.
    """
    recording = with_features(drawn(300, seed=7))
    dear = costs_of([1.0] * 4, [0.5, 0.5, 0.5, 0.0])
    policy = fit_gates(recording, dear, time_price=0.25, inputs="features", gate_s=0.01)
    exits, times = outcome_on(policy, recording, dear)
    asked = [k for k in range(3) if policy.looks_at(k)]
    assert len(asked) > 1
    for exit, seconds in zip(exits.tolist(), times.tolist(), strict=True):
        gates = 0.01 * sum(k <= exit for k in asked)
        assert seconds == pytest.approx(exit + 1.0 + (0.5 if exit < 3 else 0.0) + gates)
    assert policy.target["mean_cost"] == pytest.approx(float(times.mean()))


def test_gates_on_confidences_pay_every_open_head():
    recording = drawn(300, seed=7)
    policy = fit_gates(recording, COSTS, time_price=0.2, gate_s=(0.01, 0.02, 0.04))
    exits, times = outcome_on(policy, recording, COSTS)
    asked = [k for k in range(3) if policy.looks_at(k)]
    assert len(asked) > 1
    for exit, seconds in zip(exits.tolist(), times.tolist(), strict=True):
        passed = sum(0.1 + policy.gate_s[k] for k in asked if k <= exit)
        assert seconds == pytest.approx(exit + 1.0 + passed)


def test_gates_that_take_longer_than_they_save_are_closed():
    with pytest.warns(NoEffectWarning):
        policy = fit_gates(drawn(200, seed=8), COSTS, max_accuracy_loss=0.001, gate_s=5.0)
    assert policy.added_s() == (0.0,) * 4
    assert policy.target["mean_cost"] == pytest.approx(4.0)


class Ticking:
    """A clock on which every look takes 1 ms."""

    def __init__(self):
        self.looks = 0

    def now(self):
        self.looks += 1
        return self.looks * 1e-3

    def wait(self, changed, until):
        raise AssertionError("nobody waits")


@pytest.mark.parametrize("inputs", ["confidences", "features", "both"])
def test_asking_a_gate_is_measured_and_closed_ones_take_nothing(inputs):
    recording = with_features(drawn(200, seed=9))
    policy = fit_gates(recording, COSTS, time_price=0.25, inputs=inputs)
    policy = replace(policy, gates=(None, *policy.gates[1:]))
    clock = Ticking()
    assert gate_time_s(policy, recording, repeats=5, warm_up=2, clock=clock) == pytest.approx(
        (0.0, 1e-3, 1e-3)
    )
    assert clock.looks == 2 * (5 + 2) * 2
    assert all(seconds > 0 for seconds in gate_time_s(policy, recording, repeats=3, warm_up=0)[1:])


@pytest.mark.parametrize("inputs", ["confidences", "features", "both"])
def test_gates_are_measured_as_a_runner_asks_them(inputs, monkeypatch):
    recording = with_features(drawn(200, seed=9))
    policy = fit_gates(recording, COSTS, time_price=0.25, inputs=inputs)
    asked = []

    def stops_one(self, exit, output, pooled):
        asked.append(exit)
        return False

    monkeypatch.setattr(GatePolicy, "stops_one", stops_one)
    gate_time_s(policy, recording, repeats=2, warm_up=1)
    assert asked == [exit for exit in range(3) for _ in range(3)]


@pytest.mark.parametrize("inputs", ["confidences", "features", "both"])
def test_asking_a_gate_is_measured_where_no_outputs_were_kept(inputs):
    recording = replace(with_features(drawn(200, seed=9)), outputs=None, targets=None)
    tables = replace(recording, task="regression")
    policy = fit_gates(tables, COSTS, time_price=0.25, inputs=inputs)
    times = gate_time_s(policy, tables, repeats=5, warm_up=2, clock=Ticking())
    open_gates = [gate is not None and gate.constant is None for gate in policy.gates]
    assert any(open_gates)
    assert times == pytest.approx([1e-3 * is_open for is_open in open_gates])


# --- the policy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["confidences", "features", "both"])
def test_asking_exit_by_exit_gives_what_asking_at_once_gives(inputs):
    recording = with_features(drawn(200, seed=10))
    policy = fit_gates(recording, COSTS, time_price=0.15, inputs=inputs)
    here = torch.arange(200)
    expected = torch.full((200,), -1)
    for exit in range(4):
        pooled = None if inputs == "confidences" else recording.features[exit][here]
        outputs = None if inputs == "features" else recording.outputs[exit, here]
        stops = policy.stops(exit, outputs, pooled)
        expected[here[stops]] = exit
        here = here[~stops]
    assert policy.exits_on(recording).equal(expected)
    assert len(expected.unique()) > 2


def test_a_closed_exit_is_not_looked_at_and_nobody_leaves_there():
    policy = fit_gates(drawn(200, seed=10), COSTS, time_price=0.25)
    closed = replace(policy, gates=(policy.gates[0], None, policy.gates[2]))
    assert [closed.looks_at(exit) for exit in range(4)] == [True, False, True, True]
    assert closed.open_exits() == (True, False, True, True)
    assert not closed.stops(1, torch.tensor([[1e5, 0.0, 0.0, 0.0, 0.0]])).any()
    assert closed.stops(3, torch.zeros(3, 5)).all()


def test_gates_that_lack_what_they_look_at_say_so():
    recording = with_features(drawn(100, seed=11))
    policy = fit_gates(recording, COSTS, time_price=0.1, inputs="both")
    exit = next(k for k in range(3) if policy.looks_at(k))
    with pytest.raises(PolicyError, match="'both' were given outputs; give stops the pooled"):
        policy.stops(exit, recording.outputs[exit])
    with pytest.raises(PolicyError, match="'both' were given pooled features"):
        policy.stops(exit, None, recording.features[exit])
    with pytest.raises(PolicyError, match="features=True"):
        policy.exits_on(replace(recording, features=()))
    with pytest.raises(PolicyError, match="features=True"):
        fit_gates(replace(recording, features=()), COSTS, time_price=0.1, inputs="features")


@pytest.mark.parametrize("learner", ["logistic", "svm", "mlp", "boosting"])
@pytest.mark.parametrize("inputs", ["confidences", "both"])
def test_a_saved_policy_decides_as_before(tmp_path, learner, inputs):
    recording = with_features(drawn(200, seed=12))
    policy = fit_gates(
        recording, COSTS, time_price=0.1, inputs=inputs, learner=learner, gate_s=1e-3
    )
    policy.save(tmp_path / "gates.safetensors")
    back = GatePolicy.load(tmp_path / "gates.safetensors")
    fresh = with_features(drawn(300, seed=13, split="test"))
    assert back.exits_on(fresh).equal(policy.exits_on(fresh))
    names = (
        "inputs",
        "gate_s",
        "time_price",
        "reference",
        "learner",
        "split",
        "target",
        "provenance",
    )
    assert all(getattr(back, name) == getattr(policy, name) for name in names)


def test_another_file_is_no_gate_policy(tmp_path):
    write_tensors(tmp_path / "other.safetensors", {}, {"kind": "shopping list"})
    for kind in (GatePolicy, MixedPolicy):
        with pytest.raises(StorageError, match=r"'shopping list'.*impatient fit"):
            kind.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "exactly one target"),
        ({"time_price": 1.0, "mean_time_s": 1.0}, "exactly one target"),
        ({"time_price": -1.0}, "0 or more"),
        ({"mean_time_s": math.nan}, "a positive number"),
        ({"time_price": 1.0, "gate_s": -1.0}, "gate_s"),
        ({"time_price": 1.0, "gate_s": (0.1, 0.1)}, "gate_s"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(given, complaint):
    with pytest.raises(PolicyError, match=complaint):
        fit_gates(drawn(20, seed=0), COSTS, **given)


def test_what_cannot_be_reached_is_refused():
    recording = drawn(100, seed=0)
    with pytest.raises(InfeasibleTarget, match=r"takes 1\.1\."):
        fit_gates(recording, COSTS, mean_time_s=1.0)
    with pytest.raises(PolicyError, match="4 exits, the cost profile 2"):
        fit_gates(recording, costs_of([1.0, 1.0], [0.0, 0.0]), time_price=1.0)
    with pytest.raises(PolicyError, match="for 4 exits, the recording has 3"):
        fit_gates(recording, COSTS, time_price=0.1).exits_of(recording.outputs[:3])


# --- sweeps, hulls and mixtures -------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep():
    torch.set_num_threads(1)
    recording = drawn(400, seed=14)
    return recording, sweep_gates(recording, COSTS)


def test_a_sweep_goes_from_the_whole_network_to_the_first_exit(sweep):
    recording, points = sweep
    assert len(points) == 100
    assert points[0].accuracy == pytest.approx(float(recording.quality[-1].mean()))
    assert points[0].mean_time_s == pytest.approx(4.0)
    assert points[-1].mean_time_s == pytest.approx(1.1)
    for point in points[10:90:20]:
        assert point.mean_time_s == pytest.approx(mean_s(point.policy, recording))
        assert point.accuracy == pytest.approx(accuracy(point.policy, recording))


def test_many_policies_are_asked_at_once(sweep):
    _, points = sweep
    fresh = with_features(drawn(200, seed=16, split="test"))
    policies = [point.policy for point in points[::10]]
    policies.append(
        fit_gates(with_features(drawn(200, seed=17)), COSTS, time_price=0.2, inputs="both")
    )
    asked = GatePolicy.exits_of_each(policies, fresh)
    assert [exits.tolist() for exits in asked] == [
        policy.exits_on(fresh).tolist() for policy in policies
    ]
    assert list(GatePolicy.exits_of_each([], fresh)) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=8))
def test_no_mixture_is_above_the_hull(points):
    times, heights = zip(*points, strict=True)
    hull = hull_of(times, heights)
    on = [(times[k], heights[k]) for k in hull]
    assert on == sorted(set(on))
    for time, height in points:
        assert height <= np.interp(time, *zip(*on, strict=True)) + 1e-9
    # none is to spare
    for k in range(1, len(on) - 1):
        assert on[k][1] > np.interp(
            on[k][0], [on[k - 1][0], on[k + 1][0]], [on[k - 1][1], on[k + 1][1]]
        )


def test_a_mixture_meets_a_mean_time_exactly_in_expectation(sweep):
    recording, points = sweep
    hull = lower_hull(points)
    for wanted in (1.1, 1.7, 2.4, 3.1):
        mixture = mix(points, mean_time_s=wanted)
        cheap = mean_s(mixture.fast, recording)
        dear = mean_s(mixture.slow, recording)
        assert cheap + mixture.share * (dear - cheap) == pytest.approx(wanted)
        gates = [point.policy for point in hull]
        assert gates.index(mixture.slow) == gates.index(mixture.fast) + 1
    assert mean_s(mix(points, mean_time_s=99.0), recording) == pytest.approx(hull[-1].mean_time_s)
    with pytest.raises(InfeasibleTarget, match="fastest"):
        mix(points, mean_time_s=1.0)


def test_a_run_of_a_mixture_follows_one_policy_per_sample_through_all_exits(sweep):
    recording, points = sweep
    mixture = MixedPolicy(fast=points[70].policy, slow=points[30].policy, share=0.4, seed=3)
    run = mixture.for_run(400)
    is_dear = mixture.drawn(400)
    assert 0.3 < float(is_dear.double().mean()) < 0.5
    stops = [
        run.stops(k, recording.outputs[k]) if run.looks_at(k) else torch.zeros(400).bool()
        for k in range(4)
    ]
    exits = torch.stack(stops).int().argmax(0)
    expected = torch.where(
        is_dear, mixture.slow.exits_on(recording), mixture.fast.exits_on(recording)
    )
    assert exits.equal(expected)
    assert outcome_on(mixture, recording, COSTS)[0].equal(expected)
    assert len(expected.unique()) > 2
    assert not mixture.drawn(400, run=1).equal(is_dear)
    single = [mixture.for_run(1, run=k).is_slow.item() for k in range(200)]
    assert 0.25 < sum(single) / 200 < 0.55


def test_a_saved_mixture_decides_as_before(sweep, tmp_path):
    recording, points = sweep
    for mixture in (
        mix(points, mean_time_s=2.0, seed=5),
        MixedPolicy(fast=always(1, 4), slow=always(2, 4), share=0.5),
    ):
        mixture.save(tmp_path / "mixture.safetensors")
        back = MixedPolicy.load(tmp_path / "mixture.safetensors")
        for ours, theirs in zip(
            *(outcome_on(each, recording, COSTS) for each in (mixture, back)), strict=True
        ):
            assert ours.equal(theirs)


def test_mixtures_that_make_no_sense_are_refused():
    with pytest.raises(PolicyError, match="a share from 0 to 1"):
        MixedPolicy(fast=always(0, 2), slow=always(1, 2), share=1.5)
    with pytest.raises(PolicyError, match="2 and 3 exits"):
        MixedPolicy(fast=always(0, 2), slow=always(1, 3), share=0.5)
