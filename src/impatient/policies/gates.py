"""Gates: a learned rule per exit says whether going on is worth it.

Each gate is an importance-weighted binary problem, solved from the deepest exit to the shallowest
with the later gates fixed.
What a gate may look at decides which time is paid:

* **confidences** of the output, or **both**: the head of every open exit runs, whether or not the
  sample leaves there;
* **features**, pooled before the head: the head runs only where the sample leaves.

A gate at which no sample stops, or that saves less than looking costs, is closed: neither it nor
its head is paid.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from impatient import checks
from impatient.clock import SYSTEM_CLOCK, Clock, times_of
from impatient.costs import CostProfile, Statistic
from impatient.errors import PolicyError
from impatient.policies.costsensitive import Decision, Learner
from impatient.policies.outcome import as_doubles
from impatient.policies.policy import (
    Description,
    Recorded,
    features_of,
)
from impatient.policies.task_policy import TaskPolicy
from impatient.tasks import is_classification, named, rows
from impatient.tasks.scores import confidence_features
from impatient.tasks.task import AGREEMENT

Inputs = Literal["confidences", "features", "both"]
Reference = Literal["full", "none", "downstream"]

# the action of a gate's decision that stops; 1 goes on
STOP_ACTION = 0


# --- what a gate sees -----------------------------------------------------------------------------


def gate_inputs(inputs: Inputs, pooled: Tensor | None, seen: Tensor | None) -> Float[Tensor, "B D"]:
    """Collect what a gate looks at, as one row of numbers per sample.

    Args:
        inputs: the kind of it.
        pooled: pooled features, if it looks at them.
        seen: what the task says of the outputs (`Task.seen`), if it looks at them.
    Raises:
        PolicyError: if some of it is missing.
    """
    if (pooled is None and inputs != "confidences") or (seen is None and inputs != "features"):
        given = [
            name
            for name, value in (("pooled features", pooled), ("outputs", seen))
            if value is not None
        ]
        raise PolicyError(
            f"gates on {inputs!r} were given {' and '.join(given) or 'nothing'}; give stops the "
            "pooled features of the exit, and its outputs for 'confidences' and 'both'."
        )
    parts = [] if pooled is None or inputs == "confidences" else [pooled.flatten(1).float()]
    if seen is not None and inputs != "features":
        parts.append(seen.to(parts[0].device if parts else seen.device))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def seen_on(recording: Recorded) -> tuple[Float[Tensor, "N D"], ...]:
    """Return what gates see of the outputs of every exit of a recording."""
    if is_classification(recording.task):
        seen = named(recording.task).seen
        return tuple(seen(output) for output in recording.logits())
    scores = [table for name, table in recording.scores.items() if name != AGREEMENT]
    return tuple(torch.stack(scores, 2))


# --- the policy -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GatePolicy(TaskPolicy):
    """Stop at the first exit whose gate says so, or at the last.

    Attributes:
        gates: one per early exit, choosing between 0 (stop) and 1 (go on); None where the exit is
            closed.
        inputs: what the gates look at.
        gate_s: seconds that each early exit's gate takes, as counted when fitting; closed and
            constant gates take none.
        time_price: loss units per second for which it was fitted.
        reference, learner: how it was fitted.
    """

    gates: tuple[Decision | None, ...]
    inputs: Inputs
    gate_s: tuple[float, ...] = ()
    time_price: float | None = None
    reference: Reference = "full"
    learner: Learner = "logistic"

    def __post_init__(self) -> None:
        checks.one_of(PolicyError, Inputs, inputs=self.inputs)
        if any(gate is not None and gate.num_actions != 2 for gate in self.gates):
            raise PolicyError(
                "a gate chooses between 2 actions, stop and go on; fit it with costs of shape [N, "
                "2]."
            )
        object.__setattr__(self, "gate_s", per_gate(self.gate_s or 0.0, len(self.gates)))

    @property
    def num_exits(self) -> int:
        return len(self.gates) + 1

    def looks_at(self, exit: int) -> bool:
        """Whether the gate of this exit is open.

        The output of the last exit is always computed.
        """
        return exit == len(self.gates) or self.gates[exit] is not None

    @property
    def needs_outputs(self) -> bool:
        """Whether gates look at outputs.

        Gates that look at features alone are asked before the head runs.
        """
        return self.inputs != "features"

    @property
    def needs_features(self) -> bool:
        """Whether gates look at pooled features."""
        return self.inputs != "confidences"

    def added_s(self) -> tuple[float, ...]:
        """Per exit, seconds that the gates take until it answers, its own included."""
        asked = (gate is not None and gate.constant is None for gate in self.gates)
        paid = [seconds if asks else 0.0 for seconds, asks in zip(self.gate_s, asked, strict=True)]
        return tuple(itertools.accumulate([*paid, 0.0]))

    def stops(
        self,
        exit: int,
        outputs: Float[Tensor, "B *C"] | None = None,
        pooled: Float[Tensor, "B *D"] | None = None,
    ) -> Bool[Tensor, "B"]:
        """Which samples are done at this exit.

        Args:
            exit: its index.
            outputs: outputs of the head; expected unless the gates look at features alone.
            pooled: features before the head, `network.pooled(exit)`; expected unless the gates look
                at confidences alone.
        Raises:
            PolicyError: if what the gates look at is missing.
        """
        given = outputs if outputs is not None else pooled
        if given is None:
            raise PolicyError("give stops the outputs of the exit, its pooled features, or both.")
        gate = self.gates[exit] if exit < len(self.gates) else None
        action = gate.constant if gate is not None else int(exit < len(self.gates))
        if gate is None or action is not None:
            return torch.full((len(given),), action == STOP_ACTION, device=given.device)
        looks = outputs is not None and self.needs_outputs
        seen = self.means.seen(outputs) if looks else None
        chosen = self.choice(exit, gate_inputs(self.inputs, pooled, seen))
        return chosen.to(given.device) == STOP_ACTION

    def stops_one(self, exit: int, output: Tensor | None, pooled: Tensor | None) -> bool:
        """Tell by plain numbers, if possible, whether the only sample is done."""
        gate = self.gates[exit] if exit < len(self.gates) else None
        linear = None if gate is None else gate.linear
        if linear is not None and type(self).choice is GatePolicy.choice:
            row = self._seen_of_one(output, pooled)
            action = linear.choose(row) if len(row) == len(linear.slopes[0]) else None
            if action is not None:
                return action == STOP_ACTION
        return bool(self.stops(exit, output, pooled))

    def _seen_of_one(self, output: Tensor | None, pooled: Tensor | None) -> list[float]:
        """Collect what a gate looks at in plain numbers.

        Too few where tensors are faster.
        """
        seen: list[float] = []
        if self.inputs != "confidences" and pooled is not None:
            seen = pooled.flatten(1).float().tolist()[0]
        if self.inputs != "features" and output is not None:
            row = rows.row_of(output) if self.means.looks is confidence_features else None
            return [] if row is None else seen + rows.confidence_features(row)
        return seen

    def choice(self, exit: int, inputs: Float[Tensor, "B D"]) -> Int[Tensor, "B"]:
        """Choose 0, stop, or 1, go on, from what an open gate looks at."""
        gate = self.gates[exit]
        if gate is None:
            raise PolicyError(f"exit {exit} is closed; expected one whose gate is open.")
        return gate.choose(inputs)

    @classmethod
    def exits_of_each(
        cls, policies: Sequence[Self], recording: Recorded
    ) -> Iterator[Int[Tensor, "N"]]:
        """Give the exits under each of several policies.

        What gates look at is computed once for all.
        """
        pooled = features_of(recording) if any(part.needs_features for part in policies) else ()
        looks = seen_on(recording) if any(part.needs_outputs for part in policies) else ()

        @functools.cache
        def seen(inputs: Inputs, exit: int) -> Tensor:
            features = pooled[exit] if pooled else None
            return gate_inputs(inputs, features, looks[exit] if looks else None).double()

        for policy in policies:
            policy._check_count(len(recording.quality))
            exits = torch.full((len(recording),), len(policy.gates))
            # so that the first exit has the last word
            for exit, gate in reversed(list(enumerate(policy.gates))):
                if gate is not None:
                    exits[gate.choose(seen(policy.inputs, exit)) == STOP_ACTION] = exit
            yield exits

    def described(self, exits: Sequence[str]) -> Description:  # noqa: ARG002  one gate each
        """Describe the policy in words."""
        rules = ("closed" if gate is None else "gate" for gate in self.gates)
        return Description(looks_at=f"{self.inputs} ({self.learner})", rules=(*rules, "always"))


def per_gate(gate_s: float | Sequence[float], count: int) -> tuple[float, ...]:
    """Seconds of each gate, from one number or one for each."""
    seconds = (
        (float(gate_s),) * count if isinstance(gate_s, int | float) else tuple(map(float, gate_s))
    )
    if len(seconds) != count or not all(math.isfinite(entry) and entry >= 0.0 for entry in seconds):
        raise PolicyError(
            f"gate_s={gate_s}; expected one time in seconds, or one per early exit ({count}), not "
            "negative."
        )
    return seconds


def gate_time_s(
    policy: GatePolicy,
    recording: Recorded,
    *,
    repeats: int = 200,
    warm_up: int = 20,
    clock: Clock = SYSTEM_CLOCK,
) -> tuple[float, ...]:
    """Measure what asking each gate takes on this machine, without the head.

    Gates of one learner and one kind of inputs take the same time whatever they have learned: fit
    once, measure, and fit again with these times as `gate_s`.

    Args:
        policy: the fitted policy.
        recording: whose first sample is asked about. Without outputs its scores are given, and
            what computing them takes is not measured.
        repeats: how often each gate is asked.
        warm_up: how often each gate is asked before that, without counting.
        clock: where time comes from.
    Returns:
        Mean seconds for each of the K - 1 early exits; 0 where there is nothing to ask: closed
        exits, constant gates.
    """
    nothing: Sequence[Tensor | None] = [None] * policy.num_exits
    pooled = [entry[:1] for entry in features_of(recording)] if policy.needs_features else nothing
    outputs = None if recording.outputs is None else recording.outputs[:, :1]
    looks = seen_on(recording) if policy.needs_outputs and outputs is None else ()

    @torch.inference_mode()
    def ask(exit: int) -> bool:
        # a runner asks that, and so waits
        if looks:
            inputs = gate_inputs(policy.inputs, pooled[exit], looks[exit][:1])
            return bool((policy.choice(exit, inputs) == STOP_ACTION).all())
        output = None if outputs is None else outputs[exit]
        return policy.stops_one(exit, output, pooled[exit])

    found = [0.0] * len(policy.gates)
    for exit, gate in enumerate(policy.gates):
        if gate is not None and gate.constant is None:
            asked = functools.partial(ask, exit)
            times = times_of(asked, repeats=repeats, warm_up=warm_up, clock=clock)
            found[exit] = statistics.fmean(times)
    return tuple(found)


def exit_times_s(
    policy: GatePolicy, costs: CostProfile, *, statistic: Statistic = "mean", batch_size: int = 1
) -> Float[Tensor, "K"]:
    """Compute the seconds until each exit has answered under a policy.

    They are those of the stages, of the heads that run, and of the gates.
    """
    run = costs.cumulative(
        "time",
        "interruptible",
        statistic=statistic,
        batch_size=batch_size,
        heads=policy.open_exits(),
    )
    return as_doubles(run) + as_doubles(policy.added_s())
