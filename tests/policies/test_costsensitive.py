"""Cost-sensitive learning: against brute force, against scikit-learn, and through files."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from impatient.errors import PolicyError
from impatient.policies import STOP, SelectionPolicy, Topology, costsensitive
from impatient.policies.costsensitive import RIDGE, Decision, Standardised, fit_decision

LEARNERS = ["logistic", "svm", "mlp", "boosting"]
METHODS = ["filter_tree", "regression"]


def drawn(samples=300, actions=3, seed=0):
    """Costs that depend on features, and noise."""
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, 4, generator=random)
    return features, features @ torch.randn(4, actions, generator=random) + torch.randn(
        samples, actions, generator=random
    )


def paid(decision, features, costs):
    return float(costs.gather(1, decision.choose(features)[:, None]).double().sum())


def by_state(seed, states=4, actions=3):
    """A few states, told apart by a one-hot feature, in each of which every action has random
    costs.
    """
    random = torch.Generator().manual_seed(seed)
    state = torch.arange(400) % states
    expected = torch.randint(0, 10, (states, actions), generator=random).float()
    return (
        torch.eye(states)[state],
        expected[state] + torch.randn(400, actions, generator=random),
        state,
    )


# --- the right choices ----------------------------------------------------------------------------


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("method", METHODS)
def test_no_table_of_choices_is_cheaper(method, learner):
    for seed, actions in ((0, 2), (1, 3)):
        features, costs, state = by_state(seed, actions=actions)
        tables = itertools.product(range(actions), repeat=4)
        best = min(
            float(costs.gather(1, torch.tensor(table)[state][:, None]).double().sum())
            for table in tables
        )
        assert paid(
            fit_decision(features, costs, learner=learner, method=method), features, costs
        ) == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_a_filter_tree_of_five_actions_finds_the_cheapest_in_every_state(seed, actions):
    features, costs, state = by_state(seed, actions=actions)
    sums = torch.stack([costs[state == each].double().sum(0) for each in range(4)])
    # a regularised learner may miss a near tie
    assert (
        paid(fit_decision(features, costs), features, costs)
        <= float(sums.amin(1).sum()) + 0.02 * 400
    )


def test_what_the_winners_below_cost_is_what_they_chose_not_what_they_could_have_chosen():
    """Nothing tells samples apart: action 0 is best, though the better of 1 and 2 would be free if
    one knew which.
    """
    costs = torch.tensor([[3.0, 0.0, 10.0], [3.0, 10.0, 0.0]]).repeat(10, 1)
    assert fit_decision(torch.zeros(20, 1), costs).choose(torch.zeros(3, 1)).tolist() == [0] * 3


def test_with_two_actions_it_is_the_weighted_binary_problem():
    from sklearn.linear_model import LogisticRegression

    features, costs = drawn(actions=2)
    gain = (costs[:, 0] - costs[:, 1]).double().numpy()
    weights = np.abs(gain) / np.abs(gain).mean()
    standard = (
        (features.double() - features.double().mean(0)) / features.double().std(0, correction=0)
    ).numpy()
    model = LogisticRegression(C=1 / RIDGE, tol=1e-10, max_iter=1000).fit(
        standard, gain > 0, weights
    )
    decision = fit_decision(features, costs)
    assert decision.machines["slopes"].numpy() == pytest.approx(model.coef_, abs=1e-5)
    assert decision.machines["offsets"].numpy() == pytest.approx(model.intercept_, abs=1e-5)
    assert decision.choose(features).tolist() == model.predict(standard).astype(int).tolist()


def test_actions_of_neighbouring_cost_meet_first():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(200, 3, generator=random)
    for means, first_pair in (
        ((0.0, 10.0, 11.0), [1, 2]),
        ((0.0, 1.0, 10.0), [0, 1]),
        ((11.0, 0.0, 10.0), [0, 2]),
    ):
        costs = torch.tensor(means) + 20 * torch.randn(200, 3, generator=random)
        costs = costs - costs.mean(0) + torch.tensor(means)
        assert fit_decision(features, costs).children[0].tolist() == first_pair


# --- weights, ties, constants ---------------------------------------------------------------------


def test_a_sample_that_weighs_two_counts_as_two():
    features, costs = drawn(80)
    features = torch.cat([features, -features])
    costs = torch.cat([costs, costs.roll(1, 1)])
    # with each sample its mirror image: both ways, the same mean
    twice = torch.arange(160) % 80 < 20
    seen = Standardised.of(features)
    heavy = fit_decision(seen, costs, weights=1.0 + twice.float())
    rows = torch.cat([torch.arange(160), torch.arange(160)[twice]])
    repeated = Standardised(seen.values[rows.numpy()], seen.mean, seen.scale)
    # weights are normalised to 1 on average, so the ridge is weaker by what there is more of
    # samples
    assert (
        heavy.choose(features) == fit_decision(repeated, costs[rows]).choose(features)
    ).double().mean() > 0.98


def test_samples_without_weight_say_nothing():
    features, costs = drawn()
    weights = (torch.arange(300) % 2).float()
    lies = torch.where(weights[:, None] > 0, costs, -100 * costs)
    for method in METHODS:
        told, lied = (
            fit_decision(features, given, weights=weights, method=method) for given in (costs, lies)
        )
        assert told.choose(features).equal(lied.choose(features))


@pytest.mark.parametrize("learner", LEARNERS)
def test_an_action_that_always_wins_is_chosen_without_looking(learner):
    features, costs = drawn()
    costs[:, 1] = costs.amin(1) - 1.0
    decision = fit_decision(features, costs, learner=learner)
    assert decision.constant == 1
    assert decision.choose(torch.full((2, 4), math.nan)).tolist() == [1, 1]


@pytest.mark.parametrize("weights", [None, torch.zeros(300)])
def test_where_nothing_tells_actions_apart_it_takes_the_first(weights):
    features, costs = drawn()
    assert (
        fit_decision(
            features, costs[:, :1].repeat(1, 3) if weights is None else costs, weights=weights
        ).constant
        == 0
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_single_action_is_chosen(method):
    features, costs = drawn(actions=1)
    assert fit_decision(features, costs, method=method).choose(features).unique().tolist() == [0]


def test_a_constant_feature_does_no_harm():
    features, costs = drawn()
    wider = torch.cat([features, torch.full((300, 1), 0.1)], 1)
    new = torch.cat([features, torch.full((300, 1), 5.0)], 1)
    assert (
        fit_decision(wider, costs).choose(new).equal(fit_decision(features, costs).choose(features))
    )


# --- arrays and scikit-learn ----------------------------------------------------------------------


def models(learner, method):
    """scikit-learn's own, with the settings that are documented."""
    from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.svm import LinearSVC, LinearSVR

    hidden = {"hidden_layer_sizes": 8, "solver": "lbfgs", "alpha": 1.0, "random_state": 0}
    trees = {"n_estimators": 50, "max_depth": 3, "init": "zero", "random_state": 0}
    return {
        ("logistic", "filter_tree"): LogisticRegression(tol=1e-10, max_iter=1000),
        ("svm", "filter_tree"): LinearSVC(dual="auto", random_state=0),
        ("mlp", "filter_tree"): MLPClassifier(**hidden),
        ("boosting", "filter_tree"): GradientBoostingClassifier(**trees),
        ("logistic", "regression"): Ridge(alpha=1.0),
        ("svm", "regression"): LinearSVR(
            loss="squared_epsilon_insensitive", dual="auto", random_state=0
        ),
        ("mlp", "regression"): MLPRegressor(**hidden),
        ("boosting", "regression"): GradientBoostingRegressor(**trees),
    }[learner, method]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_arrays_say_what_scikit_learn_says(learner, method):
    features, costs = drawn(400, actions=2)
    fresh = drawn(500, seed=1)[0]
    decision = fit_decision(features, costs, learner=learner, method=method)
    seen = Standardised.of(features)
    new = (fresh.double().numpy() - seen.mean) / seen.scale
    model = models(learner, method)
    price = costs.double().numpy()
    if method == "filter_tree":
        gain = price[:, 0] - price[:, 1]
        model.fit(seen.values, gain > 0, sample_weight=np.abs(gain) / np.abs(gain).mean())
        if learner == "mlp":
            odds = model.predict_proba(new)
            expected = np.log(odds[:, 1] / odds[:, 0])
        else:
            expected = model.decision_function(new)
    else:
        target = price - price.mean(1, keepdims=True)
        target = target[:, 0] / target.std()
        centre = target.mean() if learner == "boosting" else 0.0
        expected = model.fit(seen.values, target - centre, np.ones(400)).predict(new) + centre
    assert decision.scores(fresh)[:, 0].numpy() == pytest.approx(expected, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 6.0), st.floats(0.0, 4.0))
def test_newton_is_as_good_as_the_solver_it_replaces(seed, spread, separation):
    """Weights over many orders of magnitude, classes that can be told apart without error, features
    that say the same.
    """
    from scipy.special import xlogy
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(seed)
    features = random.normal(size=(60, 3))
    features = np.hstack([features, features[:, :1] - features[:, 1:2]])
    second = random.random(60) < 0.3
    features[:, 0] += separation * second
    if second.all() or not second.any():
        return
    weights = 10.0 ** (spread * random.random(60))
    weights /= weights.mean()

    def objective(slopes, offset):
        odds = 1 / (1 + np.exp(-np.clip(features @ slopes + offset, -500, 500)))
        likelihood = weights * (xlogy(second, odds) + xlogy(~second, 1 - odds))
        return RIDGE / 2 * (slopes**2).sum() - likelihood.sum()

    ours = costsensitive._logistic(features, second, weights, 0)
    model = LogisticRegression(C=1 / RIDGE, tol=1e-8, max_iter=2000).fit(features, second, weights)
    theirs = objective(model.coef_[0], model.intercept_[0])
    assert objective(ours["slopes"], ours["offsets"]) <= theirs + 1e-3 * max(1.0, abs(theirs))


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_decision_comes_back_from_a_file(learner, method, tmp_path):
    features, costs = drawn(actions=4)
    decision = fit_decision(features, costs, learner=learner, method=method)
    policy = SelectionPolicy(
        topology=Topology.star(4),
        moves=((STOP, 1, 2, 3), (STOP,), (STOP,), (STOP,)),
        decisions={0: decision},
        node_s=(1.0,) * 4,
    )
    policy.save(tmp_path / "policy.safetensors")
    back = SelectionPolicy.load(tmp_path / "policy.safetensors").decisions[0]
    fresh = drawn(200, seed=1)[0]
    assert back.choose(fresh).equal(decision.choose(fresh))
    assert len(decision.choose(fresh).unique()) > 1
    # nobody comes
    assert len(back.choose(fresh[:0])) == 0


def test_the_same_seed_gives_the_same_decision():
    features, costs = drawn()
    one, two = (
        fit_decision(features, costs, learner="mlp", seed=3).scores(features) for _ in range(2)
    )
    assert one.equal(two)


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"features": Standardised.of(torch.zeros(7, 2))}, "7, 2"),
        ({"costs": torch.full((300, 3), math.nan)}, "finite"),
        ({"features": torch.full((300, 4), math.inf)}, "infinite"),
        ({"weights": -torch.ones(300)}, "not negative"),
        ({"costs": torch.zeros(300, 0)}, "expected"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(change, complaint):
    features, costs = drawn()
    given = {"features": features, "costs": costs, **change}
    with pytest.raises(PolicyError, match=complaint):
        fit_decision(given.pop("features"), given.pop("costs"), **given)


def test_other_features_are_refused():
    features, costs = drawn()
    with pytest.raises(PolicyError, match="3 features were given to a decision on 4"):
        fit_decision(features, costs).choose(features[:, :3])


@pytest.mark.parametrize(
    "change",
    [
        {"root": 9},
        {"machines": {}},
        {"children": torch.tensor([[0, 7]])},
    ],
)
def test_arrays_that_make_no_choice_are_refused(change):
    with pytest.raises(PolicyError):
        dataclasses.replace(fit_decision(*drawn()), **change)


@pytest.mark.parametrize("shape", [(), (1, 1), (1, 2)])
def test_offsets_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    def decision(offsets: torch.Tensor) -> Decision:
        return Decision(
            num_actions=2,
            mean=torch.zeros(3),
            scale=torch.ones(3),
            machines={"slopes": torch.ones(1, 3, dtype=torch.float64), "offsets": offsets},
            children=torch.tensor([[0, 1]]),
            root=2,
        )

    assert decision(torch.zeros(1, dtype=torch.float64)).linear is not None
    with pytest.raises(PolicyError, match="do not fit each other"):
        decision(torch.zeros(shape, dtype=torch.float64))
