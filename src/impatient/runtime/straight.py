"""A contract run of one sample that nobody pauses: the usual run, in few calls.

Between convolutions the caches are cold, and each object and call of Python takes microseconds. So
this is one function, which has in local variables what `ContractRun` has in objects. It does the
same at every exit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from impatient.anytime import Exit, begin
from impatient.clock import Deadline
from impatient.policies.policy import Policy
from impatient.runtime.answer import Answer, StoppedBy, TimeSpent, answered
from impatient.runtime.run_state import ended_early, looks_of

if TYPE_CHECKING:
    from impatient.runtime.runner import Runner


def answer_one(runner: Runner, x: Any, policy: Policy | None, deadline: Deadline) -> Answer:
    """Answer for one sample by a deadline.

    Args:
        runner: runner whose run it is, with costs of one sample.
        x: input of one sample, on the CPU.
        policy: rule of this run, which chooses no networks.
        deadline: deadline of the answer.
    """
    plan = runner._plan
    now = plan.now
    network = plan.network
    looks_at = plan.looks
    if policy is not None and policy is not plan.policy:
        looks_at = tuple(looks_of(policy, exit) for exit in range(plan.last))
    predictor = runner._predictors[1]
    until = deadline.instant
    bounded = until < math.inf
    stages_s = heads_s = decisions_s = first_s = began = 0.0
    stopped_by: StoppedBy | None = None
    output: Tensor | None = None
    exits: tuple[int, ...] = ()
    called = now()

    def visit(exit: Exit) -> bool:
        nonlocal began, decisions_s, exits, first_s, heads_s, output, stages_s, stopped_by
        index = exit.index
        instant = now()
        stage_s = instant - began
        stages_s += stage_s
        if not index:
            first_s = instant - called + runner._first_head_s
        following = exit.upcoming
        # Whether the head has run.
        ran = False
        if index == plan.last:
            stopped_by = "final"
        elif following is None:
            # The network itself has stopped.
            stopped_by = "policy"
        else:
            looks = looks_at[index]
            if looks is not None:
                rule: Any = policy
                seen = None
                if looks.outputs:
                    ran = True
                    seen = exit.output()
                    ended = now()
                    heads_s += ended - instant
                    instant = ended
                pooled = network.pooled(exit) if looks.features else None
                if rule.stops_one(index, seen, pooled):
                    stopped_by = "policy"
                decisions_s += now() - instant
            if bounded and stopped_by is None:
                instant = now()
                if not predictor.fits(following, instant, until, runner._reserve_s):
                    stopped_by = "deadline"
            if stopped_by is None:
                if exit.whole:
                    predictor.observe(index, stage_s)
                began = now()
                return False
        instant = now()
        output = exit.output()
        exits = exit.exits
        ended = now()
        if not ran:
            heads_s += ended - instant
        if exit.whole:
            predictor.observe(index, ended - began, answered=True)
        return True

    with runner._modes():
        if runner.when_late == "raise":
            runner._check_first(predictor, called, deadline)
        run = begin(network, x)
        began = now()
        run.walk(visit)
        if output is None or stopped_by is None:
            raise ended_early(plan.last)
        made = deadline.made
        waiting_s = 0.0 if made is None else max(0.0, called - made)
        spent = TimeSpent(waiting_s, stages_s, heads_s, decisions_s, first_s)
        answer = answered(output, exits, runner.clock, called, deadline, stopped_by, spent)
        runner._log.add(answer, until - called)
        if bounded:
            runner._drift.answered(late=not answer.deadline_met, exit=answer.exit)
        return answer
