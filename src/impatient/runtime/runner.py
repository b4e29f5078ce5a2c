"""Run a network by a deadline: contract runs, and starting interruptible ones.

A **contract** run knows its deadline. It continues to the next exit only if a high quantile of the
cost of that still fits, and skips heads that will not give the answer. An **interruptible** run
posts the answer of every exit. Whoever started it gets the latest one at the deadline or at an
interrupt, whatever the stage in flight is doing. A **policy** stops either run when continuing is
not worth its cost. Both can be stopped and continued later from where they were.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from impatient import checks
from impatient.anytime import Exit, Network, check_network
from impatient.clock import NEVER, SYSTEM_CLOCK, Clock, Deadline, check_deadline
from impatient.costs import BatchCosts, CostProfile, Statistic
from impatient.errors import ONE_COLUMN, CostError, NoAnswerInTime, PolicyError, RunError
from impatient.inputs import batch_size_of, resized
from impatient.networks.cascade import Cascade
from impatient.policies.policy import Policy, check_costs, check_policy
from impatient.portable.timing import QUANTILES, RESERVE_S, SlowdownEstimator, TimePredictor
from impatient.runtime.answer import Answer, StoppedBy, answered
from impatient.runtime.compaction import Compaction, When, covering
from impatient.runtime.interruptible import InterruptibleRun, Worker
from impatient.runtime.limits import Limit, Unit, limits_of
from impatient.runtime.miss_rate import LatestRatios, MissRate, spread_of
from impatient.runtime.profile import check_profile
from impatient.runtime.real_time import NAMES, Name, RealTime
from impatient.runtime.report import RunLog, RunReport
from impatient.runtime.right_in_time import RightInTime
from impatient.runtime.rows import (
    Deadlines,
    Limits,
    RowBudgets,
    largest,
    row_deadlines,
    row_limits,
)
from impatient.runtime.run_state import Plan, RunState


class Runner:
    """Answers by a deadline, as well as the time allows.

    Args:
        network: network from `attach_exits`, or a `Network` of your own. Put it in eval mode first.
        costs: profile from `profile`, measured on this machine.
        policy: policy that stops when continuing is not worth its cost; None continues as long as
            time allows.
        statistic: quantile of a stage's cost that must fit before the stage is begun. A lower one
            gives deeper answers, more often late.
        miss_rate: share of answers that may be late, such as 0.01, in place of `statistic`. What is
            late although the first exit alone answered is the machine's, and does not count. With
            "wrong", a late answer is as bad as a wrong one: most are right and in time.
        accuracy: share of right answers of each exit, for "wrong": `recording.quality.mean(1)`.
        when_late: what to do when not even the first exit fits: "answer" answers late and says so;
            "raise" raises an error.
        compaction: when to remove samples that have stopped from their batch: "auto" (where it
            saves time by the profile), "never", "always", or a `Compaction` of your own.
        real_time: ask the system to run this process on time, until `close`; a list names the
            settings of `RealTime` to make. The attribute says what became of each.
        any_profile: accept a profile of another machine, thread count or version.
        clock: clock to read and wait on.
    Raises:
        NetworkError: if the network is not a `Network`, or defines less than one must.
        StaleInput: if the profile does not belong to this network and machine.
        PolicyError: if the policy cannot run this network.
        CostError: if the profile has another number of exits than the network.

    Thread:
        `run` may be called from several threads. Runs begun by `start` share one worker and are
        computed one after the other; time in that queue counts against their deadlines.
    """

    def __init__(
        self,
        network: Network,
        costs: CostProfile,
        policy: Policy | None = None,
        *,
        statistic: Statistic = "p99",
        miss_rate: float | Literal["wrong"] | None = None,
        accuracy: Sequence[float] | Tensor | None = None,
        when_late: Literal["answer", "raise"] = "answer",
        compaction: Compaction | When = "auto",
        real_time: bool | Sequence[Name] = False,
        any_profile: bool = False,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        check_network(network)
        check_costs(costs)
        if costs.num_exits != network.num_exits:
            raise CostError(
                f"the cost profile has {costs.num_exits} exits, the network {network.num_exits}; "
                "profile it again."
            )
        self._check_policy(policy, network)
        checks.one_of(RunError, ("answer", "raise"), when_late=when_late)
        checks.one_of(CostError, Statistic, statistic=statistic)
        if not any_profile:
            check_profile(
                costs,
                network,
                "profile this network here, or pass any_profile=True to use it all the same",
            )
        self.network = network
        self.costs = costs
        self.policy = None if policy is None else policy.for_task(network.task)
        self.clock = clock
        self.when_late = when_late
        if not isinstance(compaction, Compaction):
            compaction = Compaction(costs=costs, when=compaction, buckets=network.buckets)
        self._compaction = compaction
        self._plan = Plan(network, self.policy, compaction, clock)
        self._drift = _estimator_of(statistic, miss_rate, accuracy, costs)
        # Late answers themselves say how much must be left.
        self._reserve_s = RESERVE_S if miss_rate is None else 0.0
        statistic = statistic if miss_rate is None else "p50"
        self._first_head_s = next(iter(costs.batches.values())).heads[0].p50
        self._log = RunLog()
        # Learned gates take time, too.
        gates = (0.0,) * costs.num_exits if policy is None else policy.added_s()
        self._predictors = {
            size: _predictor_of(batch, statistic, gates, self._drift, accuracy)
            for size, batch in costs.batches.items()
        }
        self._runs = itertools.count()
        self._worker = Worker()
        weakref.finalize(self, self._worker.forget).atexit = False
        names: Any = (NAMES if real_time else ()) if isinstance(real_time, bool) else real_time
        self.real_time = RealTime(names)
        self._quiet = self.real_time.quiet
        # As torch.inference_mode(), whose Python takes as long as a decision.
        self._modes: Callable[[], contextlib.AbstractContextManager[None]] = (
            functools.partial(_quietly, self._quiet)
            if "gc" in names
            else functools.partial(torch._C._InferenceMode, True)
        )
        weakref.finalize(self, self.real_time.close)

    def __reduce__(self) -> Any:
        raise RunError(
            "a runner cannot be pickled or copied: its thread and clock belong to this process. "
            "Send the network and its cost profile, and make a Runner there."
        )

    @property
    def drift(self) -> float:
        """Return the factor by which profiled times are multiplied now.

        It is a quantile, the same as `statistic`, of measured time over profiled time of the latest
        stages: of 200 stages at p99, of 2000 at p999. There a load shows at its second stage, and
        is forgotten when those stages have passed. It is below 1 when all of them were clearly
        faster than profiled.
        """
        return self._drift.scale

    def report(self) -> RunReport:
        """Summarise the latest 10,000 answers of contract runs: how many were late, and why."""
        return self._log.report()

    def run(self, x: Any, *, deadline: Deadlines = NEVER, limits: Limits | None = None) -> Answer:
        """Answer by a deadline that is known now, with a contract run.

        Args:
            x: input of the network. The costs of the next larger batch size that was profiled are
                used as an upper bound.
            deadline: deadline, such as `Deadline.after(0.008)`; make it where the request comes in.
                A list has one for each row of the batch: rows leave when theirs is spent.
            limits: most "macs", "bytes" or "energy_j" to spend, per sample; a list has one for each
                row.
        Returns:
            The answer of the deepest exit that fits, or of the exit at which the policy stopped.
            With deadlines or limits of rows, its `rows` say of each where and why it stopped.
        Raises:
            NoAnswerInTime: if not even the first exit fits and the runner was made with
                when_late="raise".
            CostError: if the batch is larger than all that were profiled, or if the profile has no
                measurements of a limited resource.
            RunError: if there is not one deadline or limit per row, or rows with budgets of their
                own are to be sent from network to network.
        """
        return ContractRun(self, x)._run_once(deadline, limits)

    def open(self, x: Any) -> ContractRun:
        """Make a contract run that can continue after it has answered.

        Call its `run` again with a later deadline. Use it in a `with` block, on one thread.

        Raises:
            CostError: if the batch is larger than all that were profiled.
        """
        return ContractRun(self, x)

    def start(
        self,
        x: Any,
        *,
        deadline: Deadlines = NEVER,
        limits: Limits | None = None,
        resumable: bool = False,
    ) -> InterruptibleRun:
        """Start an interruptible run on the runner's own thread and return at once.

        Use it in a `with` block: leaving the block abandons what is still being computed.

        Args:
            x: input of the network.
            deadline: latest time at which `InterruptibleRun.result` returns. A list has one for
                each row: it leaves once its deadline has passed, with the answer it had by then.
            limits: most "macs", "bytes" or "energy_j" to spend, per sample; a list has one for each
                row.
            resumable: whether `InterruptibleRun.refine` may continue the run after it was stopped.
                The run then keeps its features until it is closed, and its stage in flight is not
                cancelled.
        Raises:
            NoAnswerInTime: if the limits do not allow the first exit and the runner was made with
                when_late="raise".
            RunError: if there is not one deadline or limit per row, or rows with budgets of their
                own are to be sent from network to network, or the run is to be resumable.
        """
        state = self._new_state(x)
        rows, last, _ = self.by_row(state, deadline, limits, predicts=False)
        bounds = limits_of(self.costs, largest(limits))
        self._check_limits(bounds)
        if rows is not None and resumable:
            raise RunError(
                "rows have budgets of their own, so that those that have left cannot go on; "
                "expected resumable=False."
            )
        run = InterruptibleRun(self, state, last, bounds, resumable=resumable, rows=rows)
        self._worker.do(run, run._work, state if resumable else None)
        return run

    def warm_up(self, x: Any, times: int = 3) -> None:
        """Run both kinds a few times to prepare threads and memory.

        Args:
            x: example input; its first sample is repeated to each batch size that was profiled.
            times: number of runs of each kind and size.
        """
        for size in self._predictors:
            example = resized(x, size)
            for _ in range(times):
                # A cold start says nothing about the runs to come.
                with ContractRun(self, example, observe=False) as opened:
                    opened.run()
                with self.start(example) as run:
                    run.result()

    def close(self) -> None:
        """End the worker thread, without waiting for it.

        A run in flight ends at its next exit. A run in the queue never begins. `start` begins a new
        thread. Real-time settings are undone for good.
        """
        self._worker.stop()
        self.real_time.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begun(self, samples: int) -> Policy | None:
        """Check the network's mode, and make the random draws of one run."""
        if self.network.training and self._differs_in_training:
            raise RunError(
                "the network is in training mode, in which its answers are random or change its "
                "batch-norm statistics; expected eval mode. Call network.eval() first."
            )
        policy = self.policy
        return None if policy is None else policy.for_run(samples, next(self._runs))

    def drawn(self, policy: Policy | None, samples: int) -> Policy | None:
        """Check another policy, and make the random draws of one run."""
        self._check_policy(policy, self.network)
        if policy is None:
            return None
        return policy.for_task(self.network.task).for_run(samples, next(self._runs))

    @functools.cached_property
    def _differs_in_training(self) -> bool:
        """Tell whether a module of the network computes something else in training mode."""
        return any(isinstance(module, (_NormBase, _DropoutNd)) for module in self.network.modules())

    @staticmethod
    def _check_policy(policy: Policy | None, network: Network) -> None:
        """Raise PolicyError unless the network can be run under this policy."""
        if policy is None:
            return
        check_policy(policy)
        if policy.num_exits != network.num_exits:
            raise PolicyError(
                f"the policy is for {policy.num_exits} exits, the network has {network.num_exits}; "
                "fit it again."
            )
        if policy.reads_classes and network.num_classes == 1:
            raise PolicyError(
                f"a {type(policy).__name__} cannot stop a network with one output column. "
                f"{ONE_COLUMN}"
            )
        if policy.routes and not isinstance(network, Cascade):
            raise PolicyError(
                f"a policy that chooses among networks cannot run a {type(network).__name__}; "
                "expected a Cascade of the networks."
            )

    def _new_state(self, x: Any) -> RunState:
        samples = batch_size_of(x)
        policy = self.begun(samples)
        return RunState(self._plan, x, samples, policy)

    def by_row(
        self, state: RunState, deadline: Deadlines, limits: Limits | None, *, predicts: bool = True
    ) -> tuple[RowBudgets | None, Deadline, Deadline]:
        """Give each row of a run its own budgets, if there are any.

        Args:
            state: the run, before its first stage.
            deadline: deadline of all rows, or one each.
            limits: limits of all rows, or one each.
            predicts: whether rows leave before a stage that does not fit; else they leave when
                their deadline has passed.
        Returns:
            The rule that stops rows, if there is one, the last deadline and the first one.
        """
        deadlines = row_deadlines(deadline, state.samples)
        limited = row_limits(self.costs, limits, state.samples)
        ends: Any = deadlines or [deadline]
        last = max(ends, key=lambda entry: entry.instant)
        first = min(ends, key=lambda entry: entry.instant)
        if deadlines is None and limited is None:
            return None, last, first
        if state.policy is not None and state.policy.routes:
            raise RunError(
                "rows have budgets of their own, but the policy sends them from network to "
                "network; expected one deadline for all, or a policy that only stops."
            )
        rows = RowBudgets(
            state.policy,
            state,
            deadlines or [last] * state.samples,
            limited or [()] * state.samples,
            self.clock,
            (lambda: self._predictor(state.size)) if predicts else None,
        )
        state.override(rows)
        return rows, last, first

    def _predictor(self, size: int) -> TimePredictor:
        if size in self._predictors:
            return self._predictors[size]
        profiled = covering(self._predictors, size)
        if profiled is None:
            raise CostError(
                f"batch size {size} is larger than all that were profiled: "
                f"{sorted(self._predictors)}. Run profile(network, x, batch_sizes=[..., {size}])."
            )
        return self._predictors[profiled]

    def _check_limits(self, limits: tuple[Limit, ...]) -> None:
        for limit in limits:
            if self.when_late == "raise" and not limit.allows((), 0):
                raise NoAnswerInTime(
                    f"the first exit takes {limit.needs((), 0):g} {limit.unit}, the limit is "
                    f"{limit.most:g}. Allow more, attach an earlier exit, or use "
                    "when_late='answer'."
                )

    def _check_first(self, predictor: TimePredictor, now: float, deadline: Deadline) -> None:
        if self.when_late == "raise" and not predictor.fits(0, now, deadline.instant, RESERVE_S):
            needed_s = predictor.needs_s(0)
            # Otherwise one slow minute would refuse all runs for ever.
            self._drift.forget()
            raise NoAnswerInTime(
                f"{(deadline.instant - now) * 1e3:.3f} ms are left, but the first exit needs "
                f"{needed_s * 1e3:.3f} ms. Allow more time, attach an earlier exit, or use "
                "when_late='answer'."
            )


class ContractRun:
    """A contract run that can continue from where it stopped, made by `Runner.open`.

    Thread:
        Must be run and closed on one thread.
    """

    def __init__(self, runner: Runner, x: Any, *, observe: bool = True) -> None:
        self._runner = runner
        self._observes = observe
        # What the present call was given.
        self._begin = 0.0
        self._deadline = NEVER
        self._limits: tuple[Limit, ...] = ()
        # Budgets of single rows; None where all have the same.
        self._rows: RowBudgets | None = None
        # The deadline that comes first.
        self._earliest = NEVER
        # Whether there is a deadline or a limit.
        self._bounded = False
        # Why the run stops at the present exit; None if it goes on.
        self._stopped_by: StoppedBy | None = None
        self._state = runner._new_state(x)
        self._choose_predictor(self._state.samples)

    def run(
        self,
        *,
        deadline: Deadline = NEVER,
        limits: Mapping[Unit, float] | None = None,
        policy: Policy | Literal["same"] | None = "same",
    ) -> Answer:
        """Continue as far as fits without computing anything twice.

        Args:
            deadline: deadline of the answer, whose `elapsed_s` counts from this call.
            limits: limits as for `Runner.run`, on all that was spent since the run was opened.
            policy: another policy, or None, to use from here on. With "same", a run that the policy
                has stopped stays stopped. Samples that were removed from the batch keep their
                outputs.
        Returns:
            The deepest answer. It is the last one again if nothing more fits or is left.
        Raises:
            NoAnswerInTime: if not even the first exit fits and the runner was made with
                when_late="raise".
            RunError: if the run was closed.
        """
        begin = self._runner.clock.now()
        state = self._state
        state.check_open()
        if deadline is not NEVER:
            check_deadline(deadline)
        with self._runner._modes():
            self._prepare(begin, deadline, limits)
            state.reset_times()
            self._stopped_by = None
            if not isinstance(policy, str):
                state.override(self._runner.drawn(policy, state.samples))
            if state.exit is None:
                if self._runner.when_late == "raise":
                    self._check_first(begin)
                stops = self._step(state.advance())
            else:
                stops = self._step(state.exit, again=True)
            while not stops:
                stops = self._step(state.advance())
            return self._answer()

    def _run_once(self, deadline: Deadlines, limits: Limits | None) -> Answer:
        """Answer, and discard what has not been computed.

        Nothing pauses, so that is faster.
        """
        begin = self._begin = self._runner._plan.now()
        with self._runner._modes():
            if isinstance(deadline, Deadline) and not limits:
                if deadline is not NEVER:
                    self._prepare(begin, deadline, None)
            else:
                given = self._runner.by_row(self._state, deadline, limits)
                self._rows, last, self._earliest = given
                self._prepare(begin, last, largest(limits))
            if self._runner.when_late == "raise":
                self._check_first(begin)
            try:
                self._state.walk(self._step)
                if self._stopped_by is None:
                    raise self._state.ended_early()
                return self._answer()
            finally:
                if self._rows is not None:
                    # Otherwise they and the state would hold each other.
                    self._state.close()

    def close(self) -> None:
        """Discard what has not been computed. Closing twice is allowed."""
        with torch.inference_mode():
            self._state.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(
        self, begin: float, deadline: Deadline, limits: Mapping[Unit, float] | None
    ) -> None:
        self._begin = begin
        self._deadline = deadline
        if self._rows is None:
            self._earliest = deadline
        self._limits = limits_of(self._runner.costs, limits) if limits else ()
        self._bounded = deadline.instant < math.inf or bool(self._limits) or self._rows is not None

    def _check_first(self, now: float) -> None:
        self._runner._check_first(self._predictor, now, self._earliest)
        self._runner._check_limits(self._limits)

    def _choose_predictor(self, size: int) -> None:
        """Find the predictor for the number of rows that the next stage runs."""
        known = self._runner._predictors.get(size)
        self._predictor = self._runner._predictor(size) if known is None else known
        # Whether the time of a stage says something about the profile.
        self._profiled = self._observes and known is not None

    def _step(self, exit: Exit, *, again: bool = False) -> bool:
        """Do what is to be done at an exit, and tell whether to stop there.

        Args:
            exit: exit that the run has reached.
            again: whether the run has stopped here before, and is to go on if it may.
        """
        state = self._state
        # Seconds of the stage. None: they were observed already, or say nothing about the profile.
        stage_s = None
        now = self._begin
        if not again:
            now = state.reach(exit)
            # The time of a part of a batch says nothing about the profile of the whole.
            if self._profiled and exit.whole:
                stage_s = now - state.began
            if not exit.index:
                state.first_s = now - self._begin + self._runner._first_head_s
        stopped_by: StoppedBy | None = state.stops(now)
        if self._rows is not None:
            self._rows.mark(self._runner._plan.now())
        if stopped_by is None and self._bounded:
            stopped_by = self._within()
        if stopped_by is not None:
            self._stopped_by = stopped_by
            self._found = state.answer()
            if stage_s is not None:
                answer_s = self._runner._plan.now() - state.began
                self._predictor.observe(exit.index, answer_s, answered=True)
            return True
        if stage_s is not None:
            self._predictor.observe(exit.index, stage_s)
        if state.samples > 1:
            state.go_on()
            self._choose_predictor(state.size)
        else:
            state.began = self._runner._plan.now()
        return False

    def _within(self) -> StoppedBy | None:
        """Find out whether to stop at this exit because of a limit or the deadline."""
        state = self._state
        if self._limits and not state.allowed(self._limits):
            return "limit"
        predictor = self._predictor
        if state.samples > 1:
            predictor = self._runner._predictor(state.size)
        now = self._runner._plan.now()
        until = self._deadline.instant
        fits = predictor.fits(state.following, now, until, self._runner._reserve_s)
        return None if fits else "deadline"

    def _answer(self) -> Answer:
        state = self._state
        begin = self._begin
        deadline = self._deadline
        assert self._stopped_by is not None
        output, exits = self._found
        waiting_s = 0.0 if deadline.made is None else max(0.0, begin - deadline.made)
        answer = answered(
            output,
            exits,
            self._runner.clock,
            begin,
            deadline,
            self._stopped_by,
            state.times(waiting_s),
        )
        if self._rows is not None:
            rows = self._rows.answers(exits, begin, begin + answer.elapsed_s, self._stopped_by)
            deepest = max(rows, key=lambda row: row.exit)
            met = all(row.deadline_met for row in rows)
            answer = replace(answer, rows=rows, stopped_by=deepest.stopped_by, deadline_met=met)
        if self._observes:
            self._runner._log.add(answer, deadline.instant - begin)
            if deadline.instant < math.inf:
                self._runner._drift.answered(late=not answer.deadline_met, exit=answer.exit)
        return answer


@contextlib.contextmanager
def _quietly(quiet: contextlib.AbstractContextManager[None]) -> Iterator[None]:
    with quiet, torch.inference_mode():
        yield


def _estimator_of(
    statistic: Statistic,
    miss_rate: float | Literal["wrong"] | None,
    accuracy: Sequence[float] | Tensor | None,
    costs: CostProfile,
) -> SlowdownEstimator:
    """Make the estimate of how much slower than profiled the machine is."""
    if (accuracy is None) == (miss_rate == "wrong"):
        raise RunError(
            f"miss_rate={miss_rate!r} and accuracy={accuracy!r}; expected the accuracy of each "
            'exit with miss_rate="wrong", such as recording.quality.mean(1), and only with it.'
        )
    if miss_rate is None:
        return SlowdownEstimator(QUANTILES[statistic])
    spread = spread_of(next(iter(costs.batches.values())))
    return LatestRatios(spread) if miss_rate == "wrong" else MissRate(miss_rate, spread)


def _predictor_of(
    costs: BatchCosts,
    statistic: Statistic,
    gates_s: tuple[float, ...],
    drift: SlowdownEstimator,
    accuracy: Sequence[float] | Tensor | None,
) -> TimePredictor:
    """Make the predictor for one batch size."""
    # For such nearly independent parts, a sum of quantiles is at least the quantile of the sum, so
    # the prediction is conservative.
    gate_s = [later - before for before, later in itertools.pairwise((0.0, *gates_s))]
    stage_s = [stage.of_statistic(statistic) for stage in costs.stages]
    head_s = [head.of_statistic(statistic) for head in costs.heads]
    next_s = [sum(parts) for parts in zip(stage_s, head_s, gate_s, strict=True)]
    if accuracy is not None:
        assert isinstance(drift, LatestRatios)
        return RightInTime(next_s, stage_s, accuracy, drift)
    return TimePredictor(next_s, QUANTILES[statistic], stage_s, drift)
