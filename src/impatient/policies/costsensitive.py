"""Learn to choose an action where every wrong choice has its own price.

A choice between two actions is an importance-weighted binary problem: the label is the cheaper
action, the weight what the other costs more. More actions are a filter tree of such problems,
or a regression of each action's cost.
"""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from impatient import checks
from impatient.errors import PolicyError

Learner = Literal["logistic", "svm", "mlp", "boosting"]
Method = Literal["filter_tree", "regression"]
# one scoring function
Arrays = dict[str, np.ndarray]

# weight of half the squared slopes, beside samples that weigh 1 on average
RIDGE = 1.0
# of "mlp" and "boosting"
HIDDEN = 8
TREES = 50
DEPTH = 3
# as root: no tree, the scores are predicted costs
REGRESSION = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decision:
    """A learned choice among A actions, as plain arrays.

    `fit_decision` makes it.

    Items 0 to A - 1 are the actions; item A + m is the winner of comparison m, whose score is
    positive where the second of its two children wins. Comparisons that one side always wins are
    left out, so a constant choice has none.

    Attributes:
        num_actions: A.
        mean, scale: mean and deviation by which features are standardised.
        machines: the scoring functions' arrays, M rows each: of linear functions, of networks with
            a hidden layer, or of trees.
        children: the two items that each comparison is between.
        root: the item that is chosen; -1: no comparisons, the scores are A predicted costs and the
            least is chosen.
    """

    num_actions: int
    mean: Float[Tensor, "D"]
    scale: Float[Tensor, "D"]
    machines: Mapping[str, Tensor]
    children: Int[Tensor, "M 2"]
    root: int
    # What `linear` gives, once it was asked for.
    _prepared: Linear | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False, metadata={"stored": False}
    )

    def __post_init__(self) -> None:
        items = self.num_actions + len(self.children)
        if (
            self.num_actions < 1
            or not REGRESSION <= self.root < items
            or self.children.shape[1:] != (2,)
            or bool(((self.children >= items) | (self.children < 0)).any())
        ):
            raise PolicyError(
                f"root {self.root} and comparisons {self.children.tolist()} make no choice of "
                f"{self.num_actions}."
            )
        if self.constant is None and not any(set(self.machines) == set(names) for names in _SCORES):
            raise PolicyError(
                f"scoring functions of {sorted(self.machines)}; expected the arrays of one kind of "
                "learner."
            )
        if self.constant is None:
            self._check_machines()

    def _check_machines(self) -> None:
        """Refuse scoring functions whose arrays do not fit each other."""
        wanted = self.num_actions if self.root == REGRESSION else len(self.children)
        try:
            found = self.scores(self.mean[None]).shape
            # one for all, or a table of them, would fit as well
            if (offsets := tuple(self.machines["offsets"].shape)) != (wanted,):
                raise ValueError(f"offsets of shape {offsets}, expected {(wanted,)}")
            real = not any(value.is_complex() for value in (self.scale, *self.machines.values()))
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise PolicyError(
                f"the arrays of the scoring functions do not fit each other ({error}); fit again."
            ) from error
        if found != (1, wanted) or len(self.scale) != len(self.mean) or not real:
            raise PolicyError(
                f"scoring functions give scores of shape {tuple(found)} for {len(self.mean)} "
                f"features; expected real numbers of shape {(1, wanted)}. Fit again."
            )

    @property
    def linear(self) -> Linear | None:
        """The scoring functions for single samples, if they are linear.

        Prepared at first use.
        """
        if (
            self._prepared is None
            and self.constant is None
            and set(self.machines) == {"offsets", "slopes"}
        ):
            object.__setattr__(self, "_prepared", Linear.of(self))
        return self._prepared

    @property
    def constant(self) -> int | None:
        """The action that is always chosen, or None if features matter."""
        return self.root if 0 <= self.root < self.num_actions else None

    def scores(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N M"]:
        """Evaluate the scoring functions, in double precision.

        A score is a predicted cost, or is positive where the second child wins.
        """
        standard = (features.detach().cpu().double() - self.mean) / self.scale
        return _SCORES[tuple(sorted(self.machines))](self.machines, standard)

    def choose(self, features: Float[Tensor, "N D"]) -> Int[Tensor, "N"]:
        """Choose the action for each sample, on the device of the features."""
        if self.constant is not None:
            return torch.full((len(features),), self.constant, device=features.device)
        if features.shape[1] != len(self.mean):
            raise PolicyError(
                f"{features.shape[1]} features were given to a decision on {len(self.mean)}; fit "
                "it again."
            )
        scores = self.scores(features)
        if self.root == REGRESSION:
            return scores.argmin(1).to(features.device)
        items: list[Any] = list(range(self.num_actions))
        for second_wins, (first, second) in zip(
            (scores > 0).unbind(1), self.children.tolist(), strict=True
        ):
            items.append(torch.where(second_wins, items[second], items[first]))
        chosen: Tensor = items[self.root]
        return chosen.to(features.device)


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A decision by linear functions, for one sample whose features are plain numbers.

    It is several times faster than `Decision.choose`, because calling an operator takes longer than
    what it computes here.

    Attributes:
        slopes: slopes of each function, divided by the features' scales.
        offsets: offset of each function, with the features' means taken off.
        close: for each function, the size of scores that single precision may compute otherwise.
        children: the two items that each comparison is between.
        table: the slopes as an array, for many features.
        actions, root: as in `Decision`.
    """

    slopes: tuple[tuple[float, ...], ...]
    offsets: tuple[float, ...]
    close: tuple[float, ...]
    children: tuple[tuple[int, int], ...]
    table: np.ndarray
    actions: int
    root: int

    @classmethod
    def of(cls, decision: Decision) -> Self:
        mean, scale = decision.mean.double().numpy(), decision.scale.double().numpy()
        table = decision.machines["slopes"].double().numpy() / scale
        offsets = decision.machines["offsets"].double().numpy() - table @ mean
        # Single precision has 7 digits; features are within a few deviations of their mean.
        close = 1e-5 * (np.abs(table) @ (np.abs(mean) + 3.0 * scale) + np.abs(offsets))
        return cls(
            tuple(map(tuple, table.tolist())),
            tuple(offsets.tolist()),
            tuple(close.tolist()),
            tuple((first, second) for first, second in decision.children.tolist()),
            table,
            decision.num_actions,
            decision.root,
        )

    def choose(self, row: Sequence[float]) -> int | None:
        """Choose the action.

        None where it is so close that `Decision.choose` must say.
        """
        scores = self.scores(row)
        if self.root == REGRESSION:
            least, next_to_least = sorted(scores)[:2]
            clear = next_to_least - least > 2.0 * max(self.close)
            return scores.index(least) if clear else None
        items = list(range(self.actions))
        for score, close, pair in zip(scores, self.close, self.children, strict=True):
            if not abs(score) > close:
                return None
            items.append(items[pair[score > 0.0]])
        return items[self.root]

    def scores(self, row: Sequence[float]) -> list[float]:
        """Evaluate the functions."""
        # For fewer numbers than this, numpy takes longer to call than to compute.
        if len(row) * len(self.offsets) > 48:
            found: list[float] = (self.table @ np.array(row) + self.offsets).tolist()
            return found
        return [
            sum(map(operator.mul, slopes, row), offset)
            for slopes, offset in zip(self.slopes, self.offsets, strict=True)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Standardised:
    """Features of mean 0 and deviation 1, with their old mean and scale.

    Worth keeping where many decisions look at the same features.
    """

    values: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, features: Float[Tensor, "N D"]) -> Self:
        values = features.detach().cpu().double().numpy()
        if not np.isfinite(values).all():
            raise PolicyError("features are NaN or infinite; check the network's outputs.")
        mean = values.mean(0)
        scale = values.std(0)
        # a constant feature's deviation is rounding error, and would blow up what new samples have
        # there
        scale[scale <= 1e-9 * np.maximum(np.abs(mean), 1.0)] = 1.0
        return cls((values - mean) / scale, mean, scale)


def fit_decision(
    features: Float[Tensor, "N D"] | Standardised,
    costs: Float[Tensor, "N A"],
    *,
    learner: Learner = "logistic",
    method: Method = "filter_tree",
    weights: Float[Tensor, "N"] | None = None,
    seed: int = 0,
) -> Decision:
    """Learn to choose the action that costs least.

    Args:
        features: what the choice may depend on; standardised inside, unless they are already.
        costs: of each action for each sample, in any unit; only differences matter.
        learner: what solves the binary problems or the regressions: "logistic" (or ridge
            regression), "svm" (linear, squared hinge or squared error), "mlp" (8 hidden units) or
            "boosting" (50 trees of depth 3).
        method: "filter_tree", which with two actions is the weighted binary problem itself; or
            "regression" of each action's cost, of which the least is chosen.
        weights: how much each sample counts, such as how often it comes here; by default all count
            alike.
        seed: seed of what a learner draws ("mlp", "svm").
    Returns:
        A decision. Where nothing tells two actions apart, it takes the first.
    Raises:
        PolicyError: if shapes do not fit, or a number is NaN or infinite.
    Source:
        Beygelzimer, Langford, Ravikumar 2007 (filter tree). We differ: actions of neighbouring mean
        cost meet first.
    Example:
        >>> features = torch.linspace(-1, 1, 101)[:, None]
        >>> decision = fit_decision(features, torch.cat([features, -features], 1))
        >>> decision.choose(torch.tensor([[-0.5], [0.5]])).tolist()
        [0, 1]
    """
    checks.one_of(PolicyError, Learner, learner=learner)
    checks.one_of(PolicyError, Method, method=method)
    price = costs.detach().cpu().double().numpy()
    counts = np.ones(len(price)) if weights is None else weights.detach().cpu().double().numpy()
    given = features.values if isinstance(features, Standardised) else features
    if not len(given) == len(price) == len(counts) > 0 or price.shape[1] == 0:
        raise PolicyError(
            f"features of {tuple(given.shape)}, costs of {price.shape}, {len(counts)} weights; "
            "expected [N, D], [N, A] and N."
        )
    if not np.isfinite(price).all() or not np.isfinite(counts).all() or (counts < 0).any():
        raise PolicyError("costs and weights must be finite, and weights not negative.")
    seen = features if isinstance(features, Standardised) else Standardised.of(features)

    def fit(features: np.ndarray, target: np.ndarray, weights: np.ndarray) -> Arrays:
        return _LEARNERS[learner](features, target, weights / weights.mean(), seed)

    machines, children, root = _METHODS[method](seen.values, price, counts, fit)
    return Decision(
        num_actions=price.shape[1],
        mean=torch.from_numpy(seen.mean),
        scale=torch.from_numpy(seen.scale),
        root=root,
        machines=_stacked(machines),
        children=torch.tensor(children, dtype=torch.int64).reshape(-1, 2),
    )


# features [N, D], labels or targets [N], weights [N] -> one scoring function; labels are booleans
Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], Arrays]
# scoring functions, children, root
Found = tuple[list[Arrays], list[tuple[int, int]], int]


def _filter_tree(features: np.ndarray, costs: np.ndarray, counts: np.ndarray, fit: Fit) -> Found:
    """Learn comparisons from the leaves of a tree up.

    Each is learned on all samples, with what the winners below it cost them.
    """
    machines: list[Arrays] = []
    children: list[tuple[int, int]] = []
    actions = costs.shape[1]
    means = (counts[:, None] * costs).sum(0)
    row = [(int(action), costs[:, action]) for action in np.argsort(means, kind="stable")]
    while len(row) > 1:
        low, high = _waiting(row, counts)
        met = []
        for pair in zip(row[low:high:2], row[low + 1 : high : 2], strict=True):
            # ties go to the first action
            (first, first_cost), (second, second_cost) = sorted(pair, key=lambda item: item[0])
            gain = first_cost - second_cost
            weights = counts * np.abs(gain)
            kept = weights > 0.0
            wins = gain[kept] > 0.0
            if wins.all() or not wins.any():
                met.append((second, second_cost) if wins.any() else (first, first_cost))
                continue
            machines.append(fit(features[kept], wins, weights[kept]))
            children.append((first, second))
            goes = _scored(machines[-1], features) > 0
            met.append((actions + len(machines) - 1, np.where(goes, second_cost, first_cost)))
        row = [*row[:low], *met, *row[high:]]
    return machines, children, row[0][0]


def _waiting(row: Sequence[tuple[int, np.ndarray]], counts: np.ndarray) -> tuple[int, int]:
    """Choose the slice of a row that is paired.

    Of an odd number, the end farther from its neighbour in mean cost waits a round.
    """
    if len(row) % 2 == 0:
        return 0, len(row)
    means = [float((counts * cost).sum()) for _, cost in row]
    return (
        (1, len(row))
        if abs(means[1] - means[0]) > abs(means[-1] - means[-2])
        else (0, len(row) - 1)
    )


def _regression(features: np.ndarray, costs: np.ndarray, counts: np.ndarray, fit: Fit) -> Found:
    if costs.shape[1] == 1 or not counts.any():
        return [], [], 0
    kept = counts > 0.0
    # what all actions cost alike decides nothing
    costs = costs[kept] - costs[kept].mean(1, keepdims=True)
    spread = costs.std() or 1.0
    machines = [fit(features[kept], cost / spread, counts[kept]) for cost in costs.T]
    return machines, [], REGRESSION


_METHODS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, Fit], Found]] = {
    "filter_tree": _filter_tree,
    "regression": _regression,
}


# --- scoring functions: arrays with one row per function, evaluated at once -----------------------


def _linear(machines: Mapping[str, Tensor], standard: Float[Tensor, "N D"]) -> Float[Tensor, "N M"]:
    return torch.addmm(machines["offsets"], standard, machines["slopes"].T)


def _layered(
    machines: Mapping[str, Tensor], standard: Float[Tensor, "N D"]
) -> Float[Tensor, "N M"]:
    hidden_NMH = torch.relu(
        torch.einsum("nd,mhd->nmh", standard, machines["inner_slopes"]) + machines["inner_offsets"]
    )
    return torch.sum(hidden_NMH * machines["slopes"], -1) + machines["offsets"]


def _trees(machines: Mapping[str, Tensor], standard: Float[Tensor, "N D"]) -> Float[Tensor, "N M"]:
    """Evaluate complete binary trees.

    Node i has children 2i + 1 and 2i + 2.
    """
    columns, bounds, values = (
        machines[name].flatten(0, 1) for name in ("columns", "bounds", "values")
    )
    # as scikit-learn grew them
    seen = standard.float().double()
    node_NT = torch.zeros(len(standard), len(values), dtype=torch.int64)
    tree_T = torch.arange(len(values))
    for _ in range(columns.shape[1].bit_length()):
        right_NT = seen.gather(1, columns[tree_T, node_NT]) > bounds[tree_T, node_NT]
        node_NT = 2 * node_NT + 1 + right_NT
    leaf_NT = values[tree_T, node_NT - columns.shape[1]]
    return torch.sum(leaf_NT.unflatten(1, machines["values"].shape[:2]), -1) + machines["offsets"]


# by the names of their arrays, sorted
_SCORES: dict[tuple[str, ...], Callable[[Mapping[str, Tensor], Tensor], Tensor]] = {
    ("offsets", "slopes"): _linear,
    ("inner_offsets", "inner_slopes", "offsets", "slopes"): _layered,
    ("bounds", "columns", "offsets", "values"): _trees,
}


def _stacked(machines: Sequence[Arrays]) -> dict[str, Tensor]:
    """Put scoring functions of one kind together, a row for each."""
    names = machines[0] if machines else ()
    return {name: torch.from_numpy(np.stack([row[name] for row in machines])) for name in names}


def _scored(machine: Arrays, features: np.ndarray) -> np.ndarray:
    stacked = _stacked([machine])
    scores = _SCORES[tuple(sorted(stacked))](stacked, torch.from_numpy(features))
    return scores[:, 0].numpy()


# --- learners, of weights with mean 1 ------------------------------------------------------------


@contextmanager
def _quick() -> Iterator[None]:
    """Accept a learner that stops at its last iteration.

    It is judged by what it decides.
    """
    from sklearn import config_context
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(), config_context(assume_finite=True):
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _logistic(features: np.ndarray, target: np.ndarray, weights: np.ndarray, seed: int) -> Arrays:
    """Fit by Newton's method.

    Scikit-learn's checks alone would take longer, and a sweep solves thousands of these problems.
    """
    if target.dtype != bool:
        from sklearn.linear_model import Ridge

        return _of_linear(Ridge(alpha=RIDGE, random_state=seed).fit(features, target, weights))
    from scipy.special import expit

    columns = np.hstack([features, np.ones((len(features), 1))])
    # the offset is free
    ridge = np.append(np.full(features.shape[1], RIDGE), 0.0)
    slopes = np.zeros(len(ridge))
    for _ in range(25):
        odds = expit(columns @ slopes)
        gradient = columns.T @ (weights * (odds - target)) + ridge * slopes
        curvature = (columns * (weights * odds * (1.0 - odds))[:, None]).T @ columns
        try:
            slopes = slopes - np.linalg.solve(curvature + np.diag(ridge), gradient)
        except np.linalg.LinAlgError:
            # all odds are 0 or 1: a step went too far
            break
        # near the end a step squares the error: no need to look again
        if np.abs(gradient).max() <= 1e-4 * len(features):
            return {"slopes": slopes[:-1], "offsets": slopes[-1]}
    from sklearn.linear_model import LogisticRegression

    with _quick():
        return _of_linear(
            LogisticRegression(C=1.0 / RIDGE, random_state=seed).fit(features, target, weights)
        )


def _svm(features: np.ndarray, target: np.ndarray, weights: np.ndarray, seed: int) -> Arrays:
    from sklearn.svm import LinearSVC, LinearSVR

    options = {"C": 1.0 / RIDGE, "dual": "auto", "random_state": seed}
    model = (
        LinearSVC(**options)
        if target.dtype == bool
        else LinearSVR(loss="squared_epsilon_insensitive", **options)
    )
    with _quick():
        return _of_linear(model.fit(features, target, sample_weight=weights))


def _mlp(features: np.ndarray, target: np.ndarray, weights: np.ndarray, seed: int) -> Arrays:
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    kind = MLPClassifier if target.dtype == bool else MLPRegressor
    model = kind(hidden_layer_sizes=HIDDEN, solver="lbfgs", alpha=RIDGE, random_state=seed)
    with _quick():
        model.fit(features, target, sample_weight=weights)
    inner, outer = model.coefs_
    inner_offsets, offsets = model.intercepts_
    return {
        "inner_slopes": inner.T,
        "inner_offsets": inner_offsets,
        "slopes": outer[:, 0],
        "offsets": offsets[0],
    }


def _boosting(features: np.ndarray, target: np.ndarray, weights: np.ndarray, seed: int) -> Arrays:
    from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor

    kind = GradientBoostingClassifier
    centre = 0.0
    if target.dtype != bool:
        kind = GradientBoostingRegressor
        centre = float(np.average(target, weights=weights))
        target = target - centre
    model = kind(n_estimators=TREES, max_depth=DEPTH, init="zero", random_state=seed)
    return _of_trees(model.fit(features, target, weights), centre)


_LEARNERS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, int], Arrays]] = {
    "logistic": _logistic,
    "svm": _svm,
    "mlp": _mlp,
    "boosting": _boosting,
}


def _of_linear(model: Any) -> Arrays:
    return {
        "slopes": np.ravel(model.coef_).astype(float),
        "offsets": np.asarray(np.ravel(model.intercept_)[0]),
    }


def _of_trees(model: Any, offset: float) -> Arrays:
    """Convert grown trees to complete ones.

    A leaf higher up is repeated below itself, where all bounds are infinite.
    """
    inner = 2**DEPTH - 1
    columns = np.zeros((TREES, inner), dtype=np.int64)
    bounds = np.full((TREES, inner), np.inf)
    values = np.zeros((TREES, inner + 1))
    for index, tree in enumerate(estimator.tree_ for estimator in model.estimators_[:, 0]):
        # which grown node is at each place of the complete tree
        place = np.zeros(2 * inner + 1, dtype=np.int64)
        for node in range(inner):
            grown = place[node]
            leaf = tree.children_left[grown] < 0
            place[2 * node + 1 : 2 * node + 3] = (
                grown if leaf else (tree.children_left[grown], tree.children_right[grown])
            )
            if not leaf:
                columns[index, node] = tree.feature[grown]
                bounds[index, node] = tree.threshold[grown]
        values[index] = model.learning_rate * tree.value[place[inner:], 0, 0]
    return {"columns": columns, "bounds": bounds, "values": values, "offsets": np.asarray(offset)}
