"""Judge every exit and policy beside networks without exits and an oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from impatient.budgets import Budget, SampleBudgets, standard
from impatient.costs import Cost, CostProfile, Mode, Statistic
from impatient.errors import BudgetError, PolicyError, RecordingError, SplitReuseError
from impatient.evaluation.metrics import (
    Estimate,
    expected_calibration_error,
    mean_quality,
    mean_share,
    true_label_probabilities,
)
from impatient.evaluation.recording import Recording
from impatient.policies.outcome import Outcome, as_doubles, expected_hits
from impatient.policies.policy import Policy, check_exits, check_policy
from impatient.policies.splits import splits_overlap
from impatient.provenance import Provenance, provenance
from impatient.store import Stored
from impatient.tasks import Task, is_classification, known
from impatient.tasks.classification import top_of, top_probability
from impatient.terminal import as_text

# what one way to answer gets of each sample, under budgets
ExpectedHits = Callable[[Budget | SampleBudgets], Tensor]
Kind = Literal["exit", "policy", "exit_free", "static", "oracle"]
# the name of the network that was trained without exits
TRAINED_ALONE = "no exits, trained alone"


@dataclass(frozen=True, slots=True, kw_only=True)
class RealTime:
    """Samples answered one by one on the real clock.

    Attributes:
        samples: number of samples.
        mean_s: seconds until the answer.
        predicted_s: mean of what the recording and the cost profile say of the same samples.
    """

    samples: int
    mean_s: Estimate
    predicted_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to answer.

    Attributes:
        name, kind: the name and kind of this way to answer.
        accuracy: share of right answers, or mean quality, with its 95 % interval.
        interruptible_s: mean seconds per sample when every head on the way runs.
        contract_s: mean seconds when only the heads that are looked at run.
        macs: mean multiply-accumulates per sample, in contract mode.
        calibration_error: expected calibration error of the largest class probability; None where
            outputs are not of classes, or were not kept.
        p_true: mean probability of the true class, AnytimeNet's overall confidence; None in
            evaluations made before it was.
        metrics: metrics of the whole split by name, such as RMSE, where the task has some.
        real: what it took when some samples were really answered; None where they were not.
        shares: share of the samples answered by each exit.
    """

    name: str
    kind: Kind
    accuracy: Estimate
    interruptible_s: float
    contract_s: float
    macs: float
    calibration_error: float | None
    shares: tuple[float, ...]
    p_true: Estimate | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    real: RealTime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetRow:
    """Expected accuracy of one way to answer, under random budgets.

    No answer in time counts as wrong.

    Attributes:
        budget: name of the distribution of budgets.
        name: name of the way to answer.
        accuracy: expected accuracy, or quality, with its 95 % interval.
    """

    budget: str
    name: str
    accuracy: Estimate


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StaticBaseline:
    """Another network, which answers once: what one could run instead.

    Attributes:
        recording: recording of the same split of the same data; its last exit answers.
        time_s: mean seconds per sample; measure it in turn with the network that is judged
            (`time_in_turn`).
        macs: multiply-accumulates per sample.
    """

    recording: Recording
    time_s: float
    macs: float


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Evaluation(Stored, made_by="`impatient evaluate`"):
    """A judgement on one split.

    Print it to see its table.

    Attributes:
        rows: exits, policies, networks without exits, oracle.
        under_budgets: expected accuracies.
        budgets: the distributions, by name; of single samples' budgets that of their means.
        quality_name: what `accuracy` is called for the task.
        task: name of the task by which answers were judged.
        split, samples: what it was judged on.
        provenance: weights, data and the machine the times come from.
    """

    rows: tuple[Row, ...]
    under_budgets: tuple[BudgetRow, ...]
    budgets: Mapping[str, Budget]
    split: str
    samples: int
    provenance: Provenance
    quality_name: str = "accuracy"
    task: str = "classification"

    def __post_init__(self) -> None:
        unknown = sorted({row.budget for row in self.under_budgets} - self.budgets.keys())
        if unknown:
            raise BudgetError(
                f"accuracies under the budget {unknown[0]!r}, which is none of "
                f"{', '.join(self.budgets)}; expected a distribution for each."
            )

    def __repr__(self) -> str:
        names = [row.name for row in self.rows]
        return f"Evaluation(split={self.split!r}, samples={self.samples}, rows={names})"

    def __str__(self) -> str:
        from impatient.evaluation.tables import evaluation_table

        return as_text(evaluation_table(self), rest="its rows have all")

    def of(self, kind: Kind) -> tuple[Row, ...]:
        """Return the rows of one kind."""
        return tuple(row for row in self.rows if row.kind == kind)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {', '.join(row.name for row in self.rows)}.")


def evaluate(
    recording: Recording,
    costs: CostProfile,
    policies: Policy | Mapping[str, Policy] | None = None,
    *,
    exit_free: Recording | None = None,
    same_weights: bool = True,
    static: Mapping[str, StaticBaseline] | None = None,
    budgets: Mapping[str, Budget | SampleBudgets] | None = None,
    task: Task | None = None,
    statistic: Statistic = "mean",
    batch_size: int = 1,
) -> Evaluation:
    """Judge every exit and policy on a recording.

    Args:
        recording: recording of the split to judge on, usually "test".
        costs: cost profile of the same network.
        policies: one, or several by name: thresholds, gates, mixtures, selections.
        exit_free: recording of the same backbone trained without exits, on the same split; K = 1.
        same_weights: whether the last exit's output is the untouched backbone's own, so that it
            stands for the network without exits, too; say False where exits answer together.
        static: other networks to compare with, by name: smaller ones, say.
        budgets: distributions over budgets of time, or of any other cost that the profile holds, by
            name; by default the four standard shapes of time from 0 to 1.25 times the interruptible
            cost of the last exit. Of `static` networks only time and multiply-accumulates are
            known, so they are left out under budgets of bytes or energy. Those of single samples
            (`budgets.per_sample`) are for the samples of the recording, in their order.
        task: the recording's task, if it is one of your own that has a summary.
        statistic: which of the measured times is used.
        batch_size: size of the batches whose times are used.
    Returns:
        Accuracies with intervals, times, shares and calibration errors. The network without exits,
        with the same weights and if given with its own, and the oracle (the cheapest exit that is
        right) are always among the rows.
    Raises:
        BudgetError: if there is not one budget per sample where they are of single samples.
        SplitReuseError: if a policy was fitted on this very split.
        StaleInput: if a policy was fitted on another network's recording, or `exit_free` is of
            other data.
    """
    named = {} if policies is None else policies
    if not isinstance(named, Mapping):
        named = {"policy": named}
    for name, policy in named.items():
        check_judged(name, policy, recording)
    check_exits(RecordingError, recording, costs)
    options: _Options = {"statistic": statistic, "batch_size": batch_size}
    untouched = functools.partial(
        StaticBaseline,
        time_s=costs.exit_free("time", **options),
        macs=costs.exit_free("macs"),
    )
    once: dict[str, tuple[Kind, StaticBaseline]] = {}
    if same_weights:
        once["no exits, same weights"] = ("exit_free", untouched(recording=recording))
    if exit_free is not None:
        once[TRAINED_ALONE] = ("exit_free", untouched(recording=exit_free))
    once |= {name: ("static", other) for name, other in (static or {}).items()}
    for _, other in once.values():
        _check_same_split(other.recording, recording)
    meaning = task or known(recording.task)
    distributions: dict[str, Budget | SampleBudgets] = (
        dict(standard_budgets(costs.interruptible_s(**options)))
        if budgets is None
        else dict(budgets)
    )
    for name, budget in distributions.items():
        costs.require(budget.cost)
        if isinstance(budget, SampleBudgets) and len(budget) != len(recording):
            raise BudgetError(
                f"{name!r} has budgets of {len(budget)} samples, the recording {len(recording)}; "
                "expected one per sample, in the recording's order."
            )
    judge = _Judge(recording, costs, named, once, options, meaning)
    return Evaluation(
        rows=(*judge.exits(), *judge.policies(), *judge.references()),
        under_budgets=tuple(judge.under_budgets(distributions)),
        budgets={
            name: budget.summary() if isinstance(budget, SampleBudgets) else budget
            for name, budget in distributions.items()
        },
        split=recording.split,
        quality_name=meaning.quality_name if meaning else "quality",
        task=recording.task,
        samples=len(recording),
        provenance=provenance(
            network=recording.provenance.network,
            weights=recording.provenance.weights,
            data=recording.provenance.data,
            device=costs.provenance.device,
            processor=costs.provenance.processor,
            threads=costs.provenance.threads,
        ),
    )


def standard_budgets(interruptible_s: Sequence[float]) -> dict[str, Budget]:
    """Make the four standard shapes of budgets for a network.

    They go from 0 to 1.25 times the interruptible cost of the last exit, so that every way to
    answer may finish.
    """
    return standard(1.25 * interruptible_s[-1])


def check_judged(name: str, policy: Policy, recording: Recording) -> None:
    """Refuse a policy of another network, or fitted on this split."""
    check_policy(policy)
    if policy.num_exits != len(recording.exits):
        raise PolicyError(
            f"policy {name!r} is for {policy.num_exits} exits, the recording has "
            f"{len(recording.exits)}."
        )
    if policy.provenance is None:
        return
    policy.provenance.require(
        f"policy {name!r}", "fit it again", weights=recording.provenance.weights
    )
    reused = policy.split is not None and splits_overlap(policy.split, recording.split)
    if reused and policy.provenance.data == recording.provenance.data:
        raise SplitReuseError(
            f"policy {name!r} was fitted on split {policy.split!r} and cannot be judged on it: the "
            "result would be too good. Judge it on a recording of another split, such as "
            "record(network, data, split='test')."
        )


def _check_same_split(other: Recording, recording: Recording) -> None:
    what = "the recording to compare with"
    other.provenance.require(what, "record both on the same data", data=recording.provenance.data)
    if other.task != recording.task:
        raise RecordingError(
            f"{what} was judged as {other.task!r}, the other as {recording.task!r}; judge both "
            "alike, with recording.as_task(...)."
        )
    if other.split != recording.split:
        raise RecordingError(
            f"{what} is of split {other.split!r}, the other of {recording.split!r}; record the "
            "same split."
        )


class _Options(TypedDict):
    statistic: Statistic
    batch_size: int


class _Judge:
    """Outcomes of one recording under one cost profile."""

    def __init__(
        self,
        recording: Recording,
        costs: CostProfile,
        policies: Mapping[str, Policy],
        once: Mapping[str, tuple[Kind, StaticBaseline]],
        options: _Options,
        task: Task | None,
    ) -> None:
        self.recording = recording
        self.costs = costs
        self.options = options
        self.task = task
        self.named = policies
        # rows and budgets of time look at the same outcomes
        self.timed = {name: self._outcome(policy, "time") for name, policy in policies.items()}
        # networks that answer once, with what is judged of their answers
        self.once = {
            name: (kind, other, _judged(other.recording)[:, -1])
            for name, (kind, other) in once.items()
        }
        self.count = costs.num_exits
        self.samples = torch.arange(len(recording))
        self.judged = _judged(recording)
        self.hits: Float[Tensor, "K N"] = self.judged[0]
        # of each exit: interruptible seconds, contract seconds, multiply-accumulates
        self.exit_costs = [
            as_doubles(costs.interruptible_s(**options)),
            as_doubles(costs.contract_s(**options)),
            as_doubles(costs.cumulative("macs", "contract")),
        ]

    def exits(self) -> list[Row]:
        """Judge every exit."""
        return [
            self._row_of_exits(f"exit {k}", "exit", torch.full_like(self.samples, k))
            for k in range(self.count)
        ]

    def policies(self) -> list[Row]:
        """Judge every policy."""
        return [
            self._row(name, "policy", done.exits, (done.spent_s(), done.contract_s, done.macs))
            for name, done in self.timed.items()
        ]

    def references(self) -> list[Row]:
        """Judge the networks that answer once, and the oracle."""
        shares = (*(0.0,) * (self.count - 1), 1.0)
        rows = [
            _row(
                name,
                kind,
                judged,
                (other.time_s, other.time_s, other.macs),
                shares,
                self._metrics(other.recording, torch.full_like(self.samples, -1)),
            )
            for name, (kind, other, judged) in self.once.items()
        ]
        # the first exit that is right; 0, the cheapest, when none is
        return [*rows, self._row_of_exits("oracle", "oracle", self.hits.argmax(0))]

    def _outcome(self, policy: Policy, cost: Cost) -> Outcome:
        return policy.outcome(self.recording, self.costs, cost=cost, **self.options)

    def _row_of_exits(self, name: str, kind: Kind, exits: Int[Tensor, "N"]) -> Row:
        """Judge what costs no more than the exit that answers."""
        return self._row(name, kind, exits, [cost[exits] for cost in self.exit_costs])

    def _metrics(self, recording: Recording, exits: Int[Tensor, "N"]) -> Mapping[str, float]:
        if recording.statistics is None or self.task is None:
            return {}
        return self.task.metrics(recording.statistics[exits, self.samples])

    def _row(
        self, name: str, kind: Kind, exits: Int[Tensor, "N"], costs: Sequence[Float[Tensor, "N"]]
    ) -> Row:
        shares = torch.bincount(exits, minlength=self.count).double() / len(exits)
        means = [float(cost.mean()) for cost in costs]
        judged = self.judged[:, exits, self.samples]
        metrics = self._metrics(self.recording, exits)
        return _row(name, kind, judged, means, shares.tolist(), metrics)

    def under_budgets(self, budgets: Mapping[str, Budget | SampleBudgets]) -> list[BudgetRow]:
        """Judge all under every distribution of budgets."""
        ways = {cost: self._ways(cost) for cost in {budget.cost for budget in budgets.values()}}
        return [
            BudgetRow(budget=budget_name, name=name, accuracy=mean_share(of(budget)))
            for budget_name, budget in budgets.items()
            for name, of in ways[budget.cost].items()
        ]

    def _ways(self, cost: Cost) -> dict[str, ExpectedHits]:
        """Return, by name, what computes expected hits under a budget."""

        def of(costs: Sequence[float], hits: Tensor) -> ExpectedHits:
            return functools.partial(expected_hits, costs_s=costs, hits=hits)

        interruptible, contract = (
            self.costs.cumulative(cost, mode, **self.options) for mode in get_args(Mode)
        )
        ways = {
            "interruptible": of(interruptible, self.hits),
            "contract": of(contract, self.hits),
            "static oracle": of(contract, self.hits[self._best_so_far(contract)]),
        }
        for name, policy in self.named.items():
            done = self.timed[name] if cost == "time" else self._outcome(policy, cost)
            ways[name] = functools.partial(done.expected, hits=self.hits)
        for name, (kind, other, judged) in self.once.items():
            known = {"time": other.time_s, "macs": other.macs}
            if kind == "exit_free":
                known[cost] = self.costs.exit_free(cost, **self.options)
            if cost in known:
                ways[name] = of((known[cost],), judged[:1])
        return ways

    def _best_so_far(self, cost: Sequence[float]) -> list[int]:
        """For each exit, the most accurate one that costs no more.

        That is what one who knows the budget and all accuracies picks.
        """
        accuracy = self.hits.mean(1).tolist()
        affordable = [[k for k in range(self.count) if cost[k] <= most] for most in cost]
        return [max(exits, key=lambda k: (accuracy[k], -k)) for exits in affordable]


def _judged(recording: Recording) -> Float[Tensor, "J K N"]:
    """Collect the qualities.

    Of classifications how sure answers are, and p(truth), too.
    """
    if recording.outputs is None or not is_classification(recording.task):
        return recording.quality[None]
    top = top_of(recording.task)
    sure = (
        recording.scores["max_probability"] if top == 1 else top_probability(recording.outputs, top)
    )
    truth = true_label_probabilities(recording.outputs, recording.labels)
    return torch.stack([recording.quality, sure, truth])


def _row(
    name: str,
    kind: Kind,
    judged: Float[Tensor, "J N"],
    costs: Sequence[float],
    shares: Sequence[float],
    metrics: Mapping[str, float],
) -> Row:
    """Make a row from its three mean costs."""
    quality, *classes = judged
    interruptible_s, contract_s, macs = costs
    return Row(
        name=name,
        kind=kind,
        accuracy=mean_quality(quality),
        interruptible_s=interruptible_s,
        contract_s=contract_s,
        macs=macs,
        calibration_error=(
            expected_calibration_error(classes[0], quality.bool()) if classes else None
        ),
        shares=tuple(shares),
        p_true=mean_share(classes[1]) if classes else None,
        metrics=metrics,
    )
