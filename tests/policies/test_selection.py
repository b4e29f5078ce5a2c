"""Selection among networks: graphs, the recursion against brute force, what a fitted policy does,
and curves.
"""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from impatient.errors import InfeasibleTarget, NoEffectWarning, PolicyError, StorageError
from impatient.files import read_tensors, write_tensors
from impatient.policies import selection
from impatient.policies.costsensitive import Decision
from impatient.policies.mixing import mix, neighbours
from impatient.policies.policy import STOP
from impatient.policies.routing import SelectionPolicy, selection_features
from impatient.policies.selection import (
    decision_time_s,
    fit_selection,
    reference_losses,
    sweep_selection,
)
from impatient.policies.topology import Topology
from impatient.store import from_plain, to_plain
from papers.adaptive_neural_networks.selection_baselines import (
    oracle_route,
    single_route,
)
from recordings import costs_of, drawn, recording_of, sure

DIAMOND = Topology.of({"A": ["B", "C"], "B": ["D"], "C": ["D"], "D": []})


def problem(right, probabilities, times=1):
    """A recording in which each column of states stands `times` times."""
    outputs, labels = sure([row * times for row in right], [row * times for row in probabilities])
    return recording_of(outputs, labels)


def cost_of(policy, recording, price, reference="none"):
    """Loss plus priced time per sample of what a policy does, straight from the definition."""
    route = policy.route(recording.outputs, recording.features)
    losses = reference_losses(1.0 - recording.quality.double(), reference)
    return losses[route.answering, torch.arange(len(route.answering))] + price * route.time_s


# --- graphs ---------------------------------------------------------------------------------------


def test_the_papers_topologies():
    assert Topology.chain(["A", "G", "R"]).edges == ((0, 1), (1, 2))
    assert Topology.star(3).edges == ((0, 1), (0, 2))
    assert Topology.full(3).edges == ((0, 1), (0, 2), (1, 2))
    assert Topology.chain(2) == Topology.full(2) == Topology.star(2)
    assert Topology.chain(1).order() == (0,)


def test_nodes_may_come_in_any_order_of_the_recording():
    topology = Topology.of({"big": [], "small": ["big", "middle"], "middle": ["big"]})
    assert (topology.source, topology.order()) == (1, (1, 2, 0))
    assert topology.moves(1) == (0, 2)


def test_what_is_known_is_what_every_path_has_run():
    assert DIAMOND.known(3) == (0, 3)
    assert DIAMOND.known(1) == (0, 1)
    assert Topology.chain(4).known(3) == (0, 1, 2, 3)


def test_cheapest_paths():
    assert DIAMOND.cheapest_paths([1.0, 5.0, 2.0, 1.0]) == ((0,), (0, 1), (0, 2), (0, 2, 3))
    assert Topology.chain(3).cheapest_paths([1.0, 1.0, 1.0])[2] == (0, 1, 2)


@pytest.mark.parametrize(
    ("nodes", "edges", "complaint"),
    [
        ((), (), "at least one"),
        (("A", "A"), ((0, 1),), "name of its own"),
        (("A", "B"), ((0, 2),), r"\(0, 2\)"),
        (("A",), ((0, 0),), "to another"),
        (("A", "B"), ((0, 1), (0, 1)), "at most once"),
        (("A", "B", "C"), ((0, 1), (1, 2), (2, 1)), "B -> C -> B|C -> B -> C"),
        (("A", "B", "C"), ((0, 2), (1, 2)), "A, B; expected one"),
    ],
)
def test_graphs_that_are_no_topology_are_refused(nodes, edges, complaint):
    with pytest.raises(PolicyError, match=complaint):
        Topology(nodes=nodes, edges=edges)


def test_a_move_to_an_unknown_node_is_refused():
    with pytest.raises(PolicyError, match="lead to R without"):
        Topology.of({"A": ["R"]})


def test_a_topology_comes_back_from_json():
    assert from_plain(to_plain(DIAMOND), Topology) == DIAMOND
    with pytest.raises(StorageError, match="'edges' is missing"):
        from_plain({"nodes": ["A"]}, Topology)


# --- what decisions see ---------------------------------------------------------------------------


def test_features_tell_the_probabilities_and_who_agrees():
    first = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]])
    second = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.6, 0.1]])
    features = selection_features([first.log(), second.log()], pooled=torch.tensor([[5.0], [6.0]]))
    assert features[:, :4].tolist() == [pytest.approx([0.7, 0.2, 0.1, 0.5])] * 2
    assert features[0, 5].item() == pytest.approx(math.log(3.5))
    assert features[:, -3:].tolist() == [
        pytest.approx([1.0, 0.6, 5.0]),
        pytest.approx([0.0, 0.3, 6.0]),
    ]


def test_features_of_all_networks_on_a_chain_hold_those_before():
    outputs = torch.randn(3, 7, 4)
    deep = {tuple(column) for column in selection_features(list(outputs)).T.tolist()}
    assert deep >= {tuple(column) for column in selection_features(list(outputs[:2])).T.tolist()}


# --- the recursion --------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["none", "full"])
def test_the_second_decision_alone_follows_the_corrected_truth_table(reference):
    # (L2, L3) = (1, 0): go. (0, 1), (0, 0), (1, 1): stop. The seed's labels have the first two the
    # other way round.
    right = [[0, 1, 1, 0], [1, 0, 1, 0]]
    recording = problem(right, [[0.55, 0.9, 0.8, 0.7], [0.6, 0.6, 0.6, 0.6]], times=50)
    policy = fit_selection(
        recording, [1.0, 10.0], Topology.chain(2), time_price=0.01, reference=reference
    )
    assert policy.route(recording.outputs).answering.tolist() == [1, 0, 0, 0] * 50


def test_labels_and_weights_of_the_second_decision_are_those_of_the_paper_corrected(monkeypatch):
    seen = []
    fit = selection.fit_decision

    def watched(features, costs, **rest):
        seen.append(costs)
        return fit(features, costs, **rest)

    monkeypatch.setattr(selection, "fit_decision", watched)
    recording = problem([[0, 1, 1, 0], [1, 0, 1, 0]], [[0.55, 0.9, 0.8, 0.7], [0.6] * 4])
    fit_selection(recording, [1.0, 10.0], Topology.chain(2), time_price=0.01, reference="full")
    # theta_2 and W_2, times the price: tau(N3) against (L(N2) - L(N3))_+
    stop, go = seen[0].T
    assert (stop - go).tolist() == pytest.approx([1 - 0.1, -0.1, -0.1, -0.1])


class Table(Decision):
    """A decision that can say anything: the cheapest action of each distinct row of features."""

    def choose(self, features):
        return torch.tensor([self.table[tuple(row)] for row in features.tolist()])


def fit_table(features, costs, *, weights=None, **_):
    rows = [tuple(row) for row in features.tolist()]
    counts = torch.ones(len(rows)) if weights is None else weights
    sums = {}
    for row, cost, count in zip(rows, costs, counts, strict=True):
        sums[row] = sums.get(row, 0.0) + count * cost
    none = torch.zeros(0)
    no_pairs = torch.zeros(0, 2).long()
    table = Table(
        num_actions=costs.shape[1], mean=none, scale=none, machines={}, children=no_pairs, root=0
    )
    object.__setattr__(table, "table", {row: int(total.argmin()) for row, total in sums.items()})
    return table


def best_of_all_tables(recording, node_s, topology, price, reference):
    """Find the least cost of any assignment of moves to distinct feature values at each node."""
    losses = reference_losses(1.0 - recording.quality.double(), reference).numpy()
    states = {}
    for node in topology.order():
        rows = selection_features([recording.outputs[k] for k in topology.known(node)]).tolist()
        distinct = sorted(set(map(tuple, rows)))
        states[node] = [distinct.index(tuple(row)) for row in rows]
    places = {node: max(state) + 1 for node, state in states.items()}

    @functools.cache
    def cost(node, sample, tables):
        move = tables[node][states[node][sample]]
        return (
            losses[node, sample]
            if move == STOP
            else price * node_s[move] + cost(move, sample, tables)
        )

    every = [
        itertools.product((STOP, *topology.moves(node)), repeat=places[node])
        for node in range(len(node_s))
    ]
    samples = range(len(recording.labels))
    totals = (
        sum(cost(topology.source, sample, tables) for sample in samples)
        for tables in itertools.product(*every)
    )
    return min(totals) / len(samples) + price * node_s[topology.source]


@pytest.mark.parametrize("reference", ["none", "full"])
@pytest.mark.parametrize(
    "topology",
    [Topology.chain(3), Topology.full(3), Topology.star(3)],
    ids=["chain", "full", "star"],
)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_brute_force_over_all_decision_tables_equals_the_recursion(topology, reference, data):
    bits = st.lists(st.booleans(), min_size=5, max_size=5)
    right = data.draw(st.tuples(bits, bits, bits))
    levels = data.draw(
        st.tuples(*[st.lists(st.sampled_from([0.6, 0.8]), min_size=5, max_size=5)] * 3)
    )
    price = data.draw(st.sampled_from([0.0, 0.01, 0.05, 0.11, 0.3, 2.0]))
    outputs, _ = sure(right, levels)
    labels = torch.arange(5) % 2
    recording = recording_of(outputs, labels)
    node_s = [1.0, 2.0, 4.0]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(selection, "fit_decision", fit_table)
        policy = fit_selection(recording, node_s, topology, time_price=price, reference=reference)
        found = float(cost_of(policy, recording, price, reference).mean())
    assert found == pytest.approx(
        best_of_all_tables(recording, node_s, topology, price, reference), abs=1e-9
    )


@pytest.mark.parametrize("method", ["filter_tree", "regression"])
@pytest.mark.parametrize("learner", ["boosting", "mlp"])
def test_a_learner_that_can_represent_the_best_moves_finds_them(learner, method):
    right = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    recording = problem(
        right, [[0.95, 0.85, 0.75, 0.6], [0.6, 0.9, 0.7, 0.6], [0.9, 0.6, 0.9, 0.6]], times=10
    )
    policy = fit_selection(
        recording, [1.0, 2.0, 4.0], Topology.full(3), time_price=0.1, learner=learner, method=method
    )
    route = policy.route(recording.outputs)
    assert route.answering.tolist() == [0, 1, 2, 0] * 10
    # straight to the right one
    assert route.visited[:4].int().tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [1, 0, 1],
        [1, 0, 0],
    ]
    assert route.time_s[:4].tolist() == [1.0, 3.0, 5.0, 1.0]


def test_the_prices_of_nothing_and_of_everything_are_the_two_ends():
    recording = drawn(500, seed=1)
    node_s = [1.0, 2.0, 4.0, 8.0]
    for reference, topology in itertools.product(
        ("none", "full"), (Topology.chain(4), Topology.full(4))
    ):
        free = fit_selection(
            recording, node_s, topology, time_price=0.0, reference=reference
        ).route(recording.outputs)
        assert free.accuracy(recording) >= recording.quality[-1].mean().item() - 1e-6
        dear = fit_selection(recording, node_s, topology, time_price=2.0, reference=reference)
        assert dear.visits == (0,)
        assert dear.route(recording.outputs).time_s.tolist() == [1.0] * 500


# right as often as the errata's toy
TOY = drawn(20_000, seed=3, gains=(1.03, 2.82, 4.2), classes=5)
TOY_S = [1.0, 4.0, 14.0]


def test_corrected_labels_escalate_more_as_the_price_falls():
    assert (1 - TOY.quality.mean(1)).tolist() == pytest.approx([0.59, 0.21, 0.058], abs=0.012)
    points = sweep_selection(
        TOY, TOY_S, Topology.chain(3), time_prices=[1 / 40, 1 / 80, 1 / 160, 1 / 320]
    )
    errors = [1 - point.accuracy for point in points]
    times = [point.mean_time_s for point in points]
    assert errors == sorted(errors, reverse=True)
    assert times == sorted(times)
    # erratum 1: the seed labels never go on to N3, and stay at 0.21
    assert errors[0] < 0.19
    assert errors[-1] < 0.08
    fresh = drawn(5000, seed=4, gains=(1.03, 2.82, 4.2), classes=5, split="test")
    gains = []
    for point in points:
        route = point.policy.route(fresh.outputs)
        # the best mixture of two networks that does not look at the input
        accuracies = fresh.quality.double().mean(1).tolist()
        fast, slow, share = neighbours(TOY_S, accuracies, route.mean_time_s)
        blind = (1.0 - share) * accuracies[fast] + share * accuracies[slow]
        gains.append(route.accuracy(fresh) - blind)
    # two standard errors; with time to spare both are the full network
    assert min(gains[:2]) > 2 * 0.5 / math.sqrt(5000)


def test_sweeps_fit_to_the_samples_that_arrive():
    # most samples stop at node 0, but would go on at node 1, where the others, which had better
    # stop there, look like them
    right = [[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0, 1]]
    recording = problem(right, [[0.9] * 4 + [0.6] * 3, [0.7] * 7, [0.7] * 7], times=20)
    fit = functools.partial(
        fit_selection, recording, [1.0, 1.0, 1.0], Topology.chain(3), time_price=0.1, inputs="node"
    )
    costs = [float(cost_of(fit(sweeps=count), recording, 0.1).mean()) for count in (0, 1)]
    assert costs == pytest.approx([0.1 + (2 + 0.1 * 6) / 7, 0.1 + (1 + 0.1 * 3) / 7])


def test_sweeps_never_cost_more_on_their_own_samples():
    recording = drawn(600, seed=9)
    fit = functools.partial(
        fit_selection, recording, [1.0, 2.0, 4.0, 8.0], Topology.full(4), inputs="node"
    )
    for price in (0.01, 0.05):
        once, again = (fit(time_price=price, sweeps=count) for count in (0, 3))
        assert (
            cost_of(again, recording, price).mean() <= cost_of(once, recording, price).mean() + 1e-9
        )


# --- pruning and the price of deciding ------------------------------------------------------------


def test_a_network_that_nobody_is_sent_to_is_pruned():
    # the second is never better than the first
    right = [[1, 0, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1]]
    recording = problem(right, [[0.9, 0.6, 0.9, 0.6], [0.7] * 4, [0.8] * 4], times=20)
    policy = fit_selection(recording, [1.0, 1.0, 2.0], Topology.full(3), time_price=0.1)
    assert policy.visits == (0, 2)
    assert policy.moves == ((STOP, 2), (), (STOP,))
    with pytest.raises(PolicyError, match="pruned"):
        policy.next_node(1, {1: recording.outputs[1]})


def test_where_all_go_on_nothing_is_decided_and_no_decision_is_paid():
    recording = problem(
        [[0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]],
        [[0.9] * 4, [0.9, 0.6, 0.9, 0.6], [0.8] * 4],
        times=20,
    )
    policy = fit_selection(
        recording, [1.0, 1.0, 2.0], Topology.chain(3), time_price=0.1, gate_s=0.5
    )
    assert policy.moves == ((1,), (STOP, 2), (STOP,))
    assert policy.sees(0) == ()
    assert policy.route(recording.outputs).time_s[:2].tolist() == [2.5, 4.5]


def test_a_decision_that_does_not_earn_its_time_is_left_out():
    recording = problem([[1, 0], [1, 1]], [[0.9, 0.6], [0.8, 0.8]], times=40)
    # blind: 0.1 x 4 for all; with a decision 0.1 x 4 for half of them, and the decision: worth it
    # below 2 seconds
    fit = functools.partial(fit_selection, recording, [1.0, 4.0], Topology.chain(2), time_price=0.1)
    assert fit(gate_s=1.9).decisions
    assert fit(gate_s=2.1).moves == ((1,), (STOP,))


def test_the_time_of_later_decisions_counts_before_them():
    # node 1 decides for 2 seconds; going there and on is worth 0.6 without them, and not worth 0.6
    # with them
    recording = problem(
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[0.9, 0.6, 0.6], [0.8, 0.9, 0.6], [0.8] * 3], times=40
    )
    fit = functools.partial(
        fit_selection, recording, [1.0, 1.0, 4.0], Topology.chain(3), time_price=0.15
    )
    assert 2 in fit().visits
    assert 2 not in fit(gate_s=2.0).visits


# --- what a policy does ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "topology", [DIAMOND, Topology.full(4), Topology.chain(4)], ids=["diamond", "full", "chain"]
)
def test_samples_move_along_edges_and_one_node_at_a_time_gives_the_same(topology):
    recording = drawn(400, seed=5)
    node_s = (1.0, 2.0, 2.5, 5.0)
    policy = fit_selection(recording, node_s, topology, time_price=0.01, gate_s=0.01)
    assert policy.decisions
    route = policy.route(recording.outputs)
    for sample in range(0, 400, 7):
        node = topology.source
        time = 0.0
        visited = []
        while node != STOP:
            visited.append(node)
            time += node_s[node] + 0.01 * (len(policy.moves[node]) > 1)
            answered = node
            run = {k: recording.outputs[k, sample, None] for k in visited}
            node = int(policy.next_node(node, run))
            assert node == STOP or (answered, node) in topology.edges
        assert (route.visited[sample].nonzero()[:, 0].tolist(), int(route.answering[sample])) == (
            sorted(visited),
            answered,
        )
        assert float(route.time_s[sample]) == pytest.approx(time)


def test_where_two_paths_meet_only_what_both_know_is_looked_at():
    recording = drawn(400, seed=6, gains=(0.5, 2.0, 2.0, 3.0, 5.0))
    topology = Topology.of({"A": ["B", "C"], "B": ["D"], "C": ["D"], "D": ["E"], "E": []})
    policy = fit_selection(recording, [1.0] * 5, topology, time_price=0.01)
    route = policy.route(recording.outputs)
    assert policy.sees(3) == (0, 3)
    here = route.visited[:, 3].nonzero()[:, 0]
    going = policy.next_node(3, {k: recording.outputs[k, here] for k in (0, 3)})
    assert going.equal(torch.where(route.answering[here] == 3, STOP, 4))
    with pytest.raises(PolicyError, match=r"at node D needs outputs of nodes \[0\]"):
        policy.next_node(3, {3: recording.outputs[3]})


def test_pooled_features_decide_where_outputs_cannot():
    outputs, labels = sure([[1, 0] * 40, [1] * 80], [[0.7] * 80, [0.7] * 80])
    told = torch.tensor([[1.0, 0.0], [-1.0, 0.0]] * 40)
    recording = recording_of(outputs, labels, features=(told, torch.zeros(80, 3)))
    policy = fit_selection(recording, [1.0, 2.0], Topology.chain(2), time_price=0.1, pooled=True)
    assert policy.route(outputs, recording.features).answering.tolist() == [0, 1] * 40
    with pytest.raises(PolicyError, match="pooled features"):
        policy.route(outputs)
    with pytest.raises(PolicyError, match="pooled features"):
        policy.next_node(0, {0: outputs[0]})
    with pytest.raises(PolicyError, match="0 of 4"):
        fit_selection(drawn(20, seed=1), [1.0] * 4, Topology.chain(4), time_price=0.1, pooled=True)
    with pytest.raises(PolicyError, match="0 of 2"):
        decision_time_s(policy, recording_of(outputs, labels), repeats=1)


def test_losses_of_ones_own():
    recording = problem([[1, 0, 1, 0], [1, 1, 1, 1]], [[0.9, 0.6, 0.9, 0.6], [0.8] * 4], times=20)
    # what is right costs, what is wrong does not
    dear = torch.tensor([[5.0, 0.0] * 40, [0.0] * 80])
    policy = fit_selection(recording, [1.0, 2.0], Topology.chain(2), time_price=0.1, losses=dear)
    assert policy.route(recording.outputs).answering.tolist() == [1, 0] * 40


@pytest.mark.parametrize("learner", ["logistic", "boosting"])
def test_a_saved_policy_does_the_same(tmp_path, learner):
    recording = drawn(300, seed=7)
    policy = fit_selection(
        recording, [1.0, 2.0, 4.0, 8.0], DIAMOND, time_price=0.01, learner=learner, gate_s=0.1
    )
    policy.save(tmp_path / "policy.safetensors")
    loaded = SelectionPolicy.load(tmp_path / "policy.safetensors")
    old = policy.route(recording.outputs)
    new = loaded.route(recording.outputs)
    assert old.visited.equal(new.visited)
    assert old.time_s.equal(new.time_s)
    assert (loaded.topology, loaded.moves, loaded.target) == (DIAMOND, policy.moves, policy.target)
    assert (loaded.split, loaded.provenance, loaded.time_price) == (
        "validation",
        recording.provenance,
        0.01,
    )


@pytest.mark.parametrize(
    "change", [{"moves": [[-1]]}, {"node_s": [1.0]}, {"topology": {}}, {"inputs": "tea leaves"}]
)
def test_a_damaged_policy_is_refused(tmp_path, change):
    path = tmp_path / "policy.safetensors"
    fit_selection(
        drawn(100, seed=7), [1.0, 2.0, 4.0, 8.0], Topology.chain(4), time_price=0.01
    ).save(path)
    tensors, header = read_tensors(path)
    write_tensors(path, tensors, header | change)
    with pytest.raises(StorageError, match="is no selection policy"):
        SelectionPolicy.load(path)
    with pytest.raises(StorageError):
        SelectionPolicy.load(tmp_path / "nothing.safetensors")


def test_a_policy_refuses_another_number_of_networks():
    policy = fit_selection(
        drawn(100, seed=7), [1.0, 2.0, 4.0, 8.0], Topology.chain(4), time_price=0.01
    )
    with pytest.raises(PolicyError, match=r"for 4 networks.* 3 and 0"):
        policy.route(torch.zeros(3, 5, 5))


def test_one_network_alone_answers_all():
    recording = drawn(20, seed=8, gains=(1.0,))
    route = fit_selection(recording, [2.0], Topology.chain(1), time_price=0.1).route(
        recording.outputs
    )
    assert route.time_s.tolist() == [2.0] * 20


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"topology": Topology.chain(3)}, "of 4 networks, the topology of 3"),
        ({"node_s": [1.0] * 3}, "of each of 4"),
        ({"node_s": [1.0, 1.0, 0.0, 1.0]}, "positive"),
        ({"time_price": None}, "given: none"),
        ({"time_price": -1.0}, "positive"),
        ({"mean_time_s": 1.0}, "given: time_price, mean_time_s"),
        ({"reference": "downstream"}, "downstream"),
        ({"inputs": "all"}, "'all'"),
        ({"sweeps": -1}, "sweeps=-1"),
        ({"gate_s": math.nan}, "gate_s=nan"),
        ({"losses": torch.zeros(3, 50)}, r"\(3, 50\)"),
    ],
)
def test_what_cannot_be_fitted_is_refused(changes, complaint):
    given = {"node_s": [1.0] * 4, "topology": Topology.chain(4), "time_price": 0.1} | changes
    with pytest.raises((PolicyError, TypeError), match=complaint):
        fit_selection(drawn(50, seed=8), **given)


# --- targets and curves ---------------------------------------------------------------------------

FEW = drawn(500, seed=11)
FEW_S = [1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize("topology", [Topology.chain(4), Topology.star(4)], ids=["chain", "star"])
def test_fitted_targets_are_kept_on_their_own_samples(topology):
    full = single_route(3, 500, FEW_S).accuracy(FEW)
    for wanted in (2.0, 3.5):
        policy = fit_selection(FEW, FEW_S, topology, mean_time_s=wanted)
        route = policy.route(FEW.outputs)
        assert 0.8 * wanted < route.mean_time_s <= wanted
        assert (policy.target["mean_time_s"], policy.target["mean_cost"]) == (
            wanted,
            pytest.approx(route.mean_time_s),
        )
    policy = fit_selection(FEW, FEW_S, topology, max_accuracy_loss=0.05)
    route = policy.route(FEW.outputs)
    assert full - 0.05 - 1e-6 <= route.accuracy(FEW) <= full
    assert route.mean_time_s < FEW_S[-1]
    assert policy.target["accuracy"] == pytest.approx(route.accuracy(FEW))


def test_less_time_than_the_first_network_takes_is_infeasible():
    with pytest.raises(InfeasibleTarget, match="fastest way to an answer takes 1"):
        fit_selection(FEW, FEW_S, Topology.chain(4), mean_time_s=0.5)


def test_a_target_that_leaves_no_choice_warns():
    with pytest.warns(NoEffectWarning, match="nothing is decided"):
        policy = fit_selection(FEW, FEW_S, Topology.chain(4), mean_time_s=1.0)
    assert policy.visits == (0,)


def test_two_neighbours_mixed_meet_a_mean_time():
    points = sweep_selection(FEW, FEW_S, Topology.chain(4), time_prices=[0.0, 0.01, 0.1, 0.5])
    fast, slow = sorted(point.mean_time_s for point in points)[1:3]
    mixed = mix(points, mean_time_s=0.75 * fast + 0.25 * slow, seed=5)
    assert mixed.share == pytest.approx(0.25)
    many = recording_of(FEW.outputs.repeat(1, 80, 1), FEW.labels.repeat(80))
    done = mixed.outcome(many, costs_of(FEW_S, [0.0] * 4))
    assert float(done.contract_s.mean()) == pytest.approx(0.75 * fast + 0.25 * slow, rel=0.01)
    with pytest.raises(InfeasibleTarget):
        mix(points, mean_time_s=0.5)
    assert mix(points, mean_time_s=1e6).share == 1.0


def test_no_policy_beats_the_oracle():
    route = fit_selection(FEW, FEW_S, Topology.full(4), time_price=0.01, learner="svm").route(
        FEW.outputs
    )
    oracle = oracle_route(FEW, FEW_S, Topology.full(4))
    right = route.hits(FEW).bool()
    assert oracle.hits(FEW)[right].all()
    assert (oracle.time_s <= route.time_s)[right].all()
