"""Run a network by a deadline: contract runs, and starting interruptible ones.

A **contract** run knows its deadline: it goes on to the next exit only if a high quantile of what
that costs still fits, and skips the heads that will not be the answer. An **interruptible** run
posts the answer of every exit; whoever started it gets the latest one when the deadline comes or
when they interrupt, whatever the stage in flight is doing. A **policy** stops either when going on
is not worth it. Both can be stopped and go on later from where they were.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch

from impatient import checks
from impatient.anytime import Network, check_network
from impatient.clock import NEVER, SYSTEM_CLOCK, Clock, Deadline, check_deadline
from impatient.costs import BatchCosts, CostProfile, Statistic
from impatient.errors import CostError, NoAnswerInTime, PolicyError, RunError
from impatient.inputs import batch_size_of, resized
from impatient.networks.cascade import Cascade
from impatient.policies.policy import Policy, check_policy
from impatient.portable.timing import QUANTILES, SlowdownEstimator, TimePredictor

# here, too, for who plans deadlines
from impatient.portable.timing import (
    RESERVE_S as RESERVE_S,
)
from impatient.runtime.answer import Answer, StoppedBy, answered
from impatient.runtime.compaction import Compaction, When, covering
from impatient.runtime.interruptible import InterruptibleRun, Worker
from impatient.runtime.limits import Limit, Unit, limits_of
from impatient.runtime.profile import check_profile
from impatient.runtime.run_state import RunState


class Runner:
    """Answers by a deadline, as well as the time allows.

    Args:
        network: from `attach_exits`, or a `Network` of your own. Put it in eval mode yourself.
        costs: measured on this machine with `profile`; another machine's profile is refused.
        policy: when going on is not worth it; None goes on as long as time allows.
        statistic: the quantile of a stage's cost that must fit before it is begun. The lower, the
            deeper and the later.
        when_late: what to do when not even the first exit fits: "answer" late and say so, or
            "raise".
        compaction: whether samples that have stopped are taken out of their batch: "auto", where it
            pays by the profile, "never", "always", or a `Compaction` of your own.
        any_profile: use a profile of another machine, thread count or version all the same.
        clock: where time comes from.
    Raises:
        NetworkError: if the network is no `Network`, or gives less than one must.
        StaleInput: if the profile does not belong to this network and machine.
        PolicyError, CostError: if policy, profile and network have different numbers of exits.

    Thread:
        `run` may be called from several threads; runs that were started (`start`) share one worker
        and queue behind each other, with their deadlines ticking.
    """

    def __init__(
        self,
        network: Network,
        costs: CostProfile,
        policy: Policy | None = None,
        *,
        statistic: Statistic = "p99",
        when_late: Literal["answer", "raise"] = "answer",
        compaction: Compaction | When = "auto",
        any_profile: bool = False,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        check_network(network)
        if costs.num_exits != network.num_exits:
            raise CostError(
                f"the cost profile has {costs.num_exits} exits, the network {network.num_exits}; "
                f"profile it anew."
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
        self.policy = policy
        self.clock = clock
        self._when_late = when_late
        if not isinstance(compaction, Compaction):
            compaction = Compaction(costs=costs, when=compaction, buckets=network.buckets)
        self._compaction = compaction
        self._drift = SlowdownEstimator(QUANTILES[statistic])
        # learned gates take time, too
        gates = (0.0,) * costs.num_exits if policy is None else policy.added_s()
        self._paces = {
            size: _pace(batch, statistic, gates, self._drift)
            for size, batch in costs.batches.items()
        }
        self._runs = itertools.count()
        self._worker = Worker()
        weakref.finalize(self, self._worker.forget).atexit = False

    @property
    def drift(self) -> float:
        """How many times as long as profiled a stage may take now, as every prediction assumes; at
        least 1.

        It is a quantile, the same as `statistic`, of what the latest stages took over what the
        profile says that they take: of 200 stages at p99, of 2000 at p999. There a load shows at
            its second stage, and is forgotten when those have passed.
        """
        return self._drift.scale

    def run(
        self, x: Any, *, deadline: Deadline = NEVER, limits: Mapping[Unit, float] | None = None
    ) -> Answer:
        """Answer by a deadline that is known now (a contract run).

        Args:
            x: as the network takes it; the next larger batch size that was profiled is an upper
                bound of its costs.
            deadline: `Deadline.after(0.008)`; stamp it where the request comes in.
            limits: the most to spend of "macs", "bytes" or "energy_j", per sample.
        Returns:
            The answer of the deepest exit that fits, or of the exit at which the policy stopped.
        Raises:
            NoAnswerInTime: if not even the first exit fits and the runner was made with
                when_late="raise".
            CostError: if the batch is larger than all that were profiled, or the profile does not
                hold what is limited.
        """
        with self.open(x) as opened:
            return opened.run(deadline=deadline, limits=limits)

    def open(self, x: Any) -> ContractRun:
        """A contract run that can go on after it has answered: `run` it again with a later
        deadline.

        Use it in a `with` block, on one thread.

        Raises:
            CostError: if the batch is larger than all that were profiled.
        """
        return ContractRun(self, x)

    def start(
        self,
        x: Any,
        *,
        deadline: Deadline = NEVER,
        limits: Mapping[Unit, float] | None = None,
        resumable: bool = False,
    ) -> InterruptibleRun:
        """Start an interruptible run on the runner's own thread and return at once.

        Use it in a `with` block: leaving it abandons what is still being computed.

        Args:
            x: as the network takes it.
            deadline: when `InterruptibleRun.result` comes back at the latest.
            limits: the most to spend of "macs", "bytes" or "energy_j", per sample.
            resumable: let `InterruptibleRun.refine` go on after the run was stopped; until it is closed it then
                keeps its features. The stage in flight ends where it would, while that of other
                runs is cancelled if the network's engine can.
        Raises:
            NoAnswerInTime: if the limits do not allow the first exit and the runner was made with
                when_late="raise".
        """
        check_deadline(deadline)
        bounds = limits_of(self.costs, limits)
        self._check_limits(bounds)
        course = self._course(x)
        run = InterruptibleRun(
            course, self.clock, deadline, self._when_late, bounds, resumable=resumable, owner=self
        )
        self._worker.do(run, run._work, course if resumable else None)
        return run

    def warm_up(self, x: Any, times: int = 3) -> None:
        """Run a few times in both ways, so that the first answer that counts finds threads and
        memory ready.

        Args:
            x: an example; its first sample is repeated to each batch size that was profiled.
            times: at each size.
        """
        for size in self._paces:
            example = resized(x, size)
            for _ in range(times):
                # a cold start says nothing about the runs to come
                with ContractRun(self, example, observe=False) as opened:
                    opened.run()
                with self.start(example) as run:
                    run.result()

    def close(self) -> None:
        """End the worker thread: a run in flight ends at its next exit, a run in the queue never
        begins.

        Does not wait for it. `start` begins a new thread.
        """
        self._worker.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def drawn(self, policy: Policy | None, samples: int) -> Policy | None:
        """The policy; of one that is drawn at random sample by sample, the draw for one run."""
        self._check_policy(policy, self.network)
        return None if policy is None else policy.for_run(samples, next(self._runs))

    @staticmethod
    def _check_policy(policy: Policy | None, network: Network) -> None:
        """Raise PolicyError unless the network can be run under this policy."""
        if policy is None:
            return
        check_policy(policy)
        if policy.num_exits != network.num_exits:
            raise PolicyError(
                f"the policy is for {policy.num_exits} exits, the network has {network.num_exits}; "
                f"fit it anew."
            )
        if policy.routes and not isinstance(network, Cascade):
            raise PolicyError(
                f"a policy that chooses among networks cannot run a {type(network).__name__}; "
                f"expected a Cascade of the networks."
            )

    def _course(self, x: Any) -> RunState:
        return RunState(
            self.network, x, self.drawn(self.policy, batch_size_of(x)), self._compaction
        )

    def _pace(self, size: int) -> TimePredictor:
        if size in self._paces:
            return self._paces[size]
        profiled = covering(self._paces, size)
        if profiled is None:
            raise CostError(
                f"batch size {size} is larger than all that were profiled: {sorted(self._paces)}. "
                f"Run profile(network, x, batch_sizes=[..., {size}])."
            )
        return self._paces[profiled]

    def _check_limits(self, limits: tuple[Limit, ...]) -> None:
        for limit in limits:
            if self._when_late == "raise" and not limit.allows((), 0):
                raise NoAnswerInTime(
                    f"the first exit takes {limit.needs((), 0):g} {limit.unit}, the limit is "
                    f"{limit.most:g}. Allow more, "
                    "attach an earlier exit, or use when_late='answer'."
                )

    def _check_first(self, pace: TimePredictor, now: float, deadline: Deadline) -> None:
        if self._when_late == "raise" and not pace.fits(0, now, deadline.instant, RESERVE_S):
            needed_s = pace.needs_s(0)
            # in time, or a slow minute would refuse runs for ever
            self._drift.forget()
            raise NoAnswerInTime(
                f"{(deadline.instant - now) * 1e3:.3f} ms are left, but the first exit needs "
                f"{needed_s * 1e3:.3f} ms. "
                "Allow more time, attach an earlier exit, or use when_late='answer'."
            )


class ContractRun:
    """A contract run that stays where it stopped, and can go on from there; made by `Runner.open`.

    Thread:
        Must be run and closed on one thread.
    """

    def __init__(self, runner: Runner, x: Any, *, observe: bool = True) -> None:
        self._runner = runner
        self._observes = observe
        self._course = runner._course(x)
        self._pace = runner._pace(self._course.size)
        # the stage that led to where the run stands
        self._began = 0.0
        self._stage_s: float | None = (
            # what that took; None once it was observed, or if it says nothing
            None
        )

    def run(
        self,
        *,
        deadline: Deadline = NEVER,
        limits: Mapping[Unit, float] | None = None,
        policy: Policy | Literal["same"] | None = "same",
    ) -> Answer:
        """Go on as far as fits, from where the run stands, without computing anything twice.

        Args:
            deadline: when the answer must be there; `elapsed_s` counts from this call.
            limits: as for `Runner.run`, of all that was spent since the run was opened.
            policy: another one from here on, or None. With the one there was, a run that it has
                stopped stays stopped. Samples that were taken out of the batch keep their outputs.
        Returns:
            The deepest answer, which is the last one again if nothing more fits or is left.
        Raises:
            NoAnswerInTime: if not even the first exit fits and the runner was made with
                when_late="raise".
            RunError: if it was closed.
        """
        begin = self._runner.clock.now()
        course = self._course
        course.check_open()
        check_deadline(deadline)
        bounds = limits_of(self._runner.costs, limits)
        with torch.inference_mode():
            if not isinstance(policy, str):
                course.override(self._runner.drawn(policy, course.samples))
            if course.exit is None:
                self._runner._check_first(self._pace, begin, deadline)
                self._runner._check_limits(bounds)
                self._advance(begin)
            while (stopped_by := self._stops(deadline, bounds)) is None:
                self._advance(self._runner.clock.now())
            return self._answer(begin, deadline, stopped_by)

    def close(self) -> None:
        """Throw away what has not been computed; harmless afterwards."""
        with torch.inference_mode():
            self._course.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stops(self, deadline: Deadline, limits: tuple[Limit, ...]) -> StoppedBy | None:
        """Why to stop where the run stands."""
        course = self._course
        stopped_by = course.stops()
        if stopped_by is not None:
            return stopped_by
        if limits and not course.allowed(limits):
            return "limit"
        pace = self._runner._pace(course.size)
        now = self._runner.clock.now()
        return None if pace.fits(course.following, now, deadline.instant, RESERVE_S) else "deadline"

    def _advance(self, now: float) -> None:
        self._observe(self._stage_s, answered=False)
        self._pace = self._runner._pace(self._course.size)
        self._began = now
        exit = self._course.advance()
        # part of a batch, or of a batch larger than itself, says nothing about the profile of all
        # of it
        known = exit.whole and self._course.size in self._runner._paces
        self._stage_s = self._runner.clock.now() - now if known else None

    def _answer(self, begin: float, deadline: Deadline, stopped_by: StoppedBy) -> Answer:
        answer = answered(*self._course.answer(), self._runner.clock, begin, deadline, stopped_by)
        step_s = begin + answer.elapsed_s - self._began
        self._observe(None if self._stage_s is None else step_s, answered=True)
        return answer

    def _observe(self, taken_s: float | None, *, answered: bool) -> None:
        """Tell the drift what was predicted and what it took: of a head that answered, with its
        stage.
        """
        if taken_s is not None and self._observes:
            assert self._course.exit is not None
            self._pace.observe(self._course.exit.index, taken_s, answered=answered)
        self._stage_s = None


def _pace(
    costs: BatchCosts, statistic: Statistic, gates_s: tuple[float, ...], drift: SlowdownEstimator
) -> TimePredictor:
    """What the runner looks up at a boundary, for one batch size."""
    # a sum of quantiles is at least the quantile of the sum, for such nearly independent parts: the
    # safe side
    gate_s = [later - before for before, later in itertools.pairwise((0.0, *gates_s))]
    stage_s = [stage.of_statistic(statistic) for stage in costs.stages]
    head_s = [head.of_statistic(statistic) for head in costs.heads]
    next_s = [sum(parts) for parts in zip(stage_s, head_s, gate_s, strict=True)]
    return TimePredictor(next_s, QUANTILES[statistic], stage_s, drift)
