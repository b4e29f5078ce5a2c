"""Fit gates from the deepest exit to the shallowest."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from impatient import checks
from impatient.costs import CostProfile, Statistic
from impatient.errors import NoEffectWarning, PolicyError
from impatient.policies.costsensitive import Decision, Learner, Standardised, fit_decision
from impatient.policies.gates import (
    STOP_ACTION,
    GatePolicy,
    Inputs,
    Reference,
    exit_times_s,
    gate_inputs,
    per_gate,
    seen_on,
)
from impatient.policies.policy import Recorded, check_exits, errors_of, features_of
from impatient.policies.targets import PRICE, Target
from impatient.progress import counted, tracked

# --- the recursion --------------------------------------------------------------------------------


def stop_gain(
    loss: Float[Tensor, "N"],
    ahead: Float[Tensor, "N"],
    full: Float[Tensor, "N"],
    saved_s: Float[Tensor, "N"] | float,
    *,
    time_price: float,
    reference: Reference = "full",
) -> Float[Tensor, "N"]:
    """Compute how much better stopping is than going on.

    The sign is a gate's label, the size the label's weight.

    Args:
        loss: loss of the exit's own answer.
        ahead: loss of the answer that the later gates, fixed, will give.
        full: loss of the last exit's answer.
        saved_s: seconds that stopping saves.
        time_price: loss units per second; infinite: time is all that counts.
        reference: what the loss is held against:
            "full": only errors that the last exit does not make count.
            "none": all errors count, so that an exit that is right where the last one is wrong
            gains by stopping. "downstream": only errors that going on would not make count, as the
            paper has it. A heuristic: it solves no global problem, and sees no gain in stopping
            while the answer is right.
    Returns:
        In loss units; in seconds if the price is infinite.
    Source:
        Bolukbasi et al. 2017, eq. 4 to 6. We differ: the price multiplies time, and is finite at
        both ends.
    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> # the last exit errs here, too
        >>> stop_gain(one, zero, one, 2.0, time_price=0.1, reference="full").item()
        0.20000000298023224
        >>> stop_gain(one, zero, one, 2.0, time_price=0.1, reference="downstream").item()
        -0.800000011920929
    """
    if reference == "none":
        lost = loss - ahead
    elif reference == "full":
        lost = (loss - full).clamp(min=0.0) - (ahead - full).clamp(min=0.0)
    elif reference == "downstream":
        lost = (loss - ahead).clamp(min=0.0)
    else:
        raise PolicyError(
            f"reference={reference!r}; expected one of {', '.join(get_args(Reference))}."
        )
    return saved_s + 0.0 * lost if math.isinf(time_price) else time_price * saved_s - lost


@dataclass(frozen=True, slots=True, kw_only=True)
class GateTimes:
    """Seconds of K stages, K heads and K - 1 gates.

    With `heads_first`, the head of an open gate is paid before the gate is asked.
    """

    stages: tuple[float, ...]
    heads: tuple[float, ...]
    gates: tuple[float, ...]
    heads_first: bool

    def looking(self, exit: int) -> float:
        """Return what is paid at an open exit, whether samples stop or not."""
        return self.gates[exit] + (self.heads[exit] if self.heads_first else 0.0)

    def leaving(self, exit: int) -> float:
        """Return what stopping costs on top."""
        return 0.0 if self.heads_first else self.heads[exit]


# exit, gain of stopping -> which samples stop
Decide = Callable[[int, Float[Tensor, "N"]], Bool[Tensor, "N"]]


def backward(
    losses: Float[Tensor, "K N"],
    times: GateTimes,
    decide: Decide,
    *,
    time_price: float,
    reference: Reference = "full",
    close: bool = True,
) -> Bool[Tensor, "E N"]:
    """Decide gate by gate, from the deepest to the shallowest.

    The later gates stay fixed.

    If `decide` stops exactly where the gain is positive, no table of decisions has a smaller mean
    of loss (against the reference) plus price times time, for "none" and "full", as long as all
    gates are open or looking costs nothing.

    Args:
        losses: losses of each exit's answer.
        times: seconds of stages, heads and gates.
        decide: learns a gate from the gains, and says what it does.
        time_price, reference: the arguments of `stop_gain` of these names.
        close: close gates that gain no more than looking costs; else all are paid by everyone who
            comes by.
    Returns:
        Which samples each of the E = K - 1 gates stops, if they come to it.
    Source:
        Bolukbasi et al. 2017, eq. 4 to 6; looking costs the same on both branches, so it matters
        only to the gates before.
    """
    last = len(losses) - 1
    ahead_N = losses[last]
    left_N = torch.full_like(losses[last], times.heads[last])
    stops = torch.zeros(last, losses.shape[1], dtype=torch.bool)
    for exit in reversed(range(last)):
        beyond_N = times.stages[exit + 1] + left_N
        saved_N = beyond_N - times.leaving(exit)
        gain_N = stop_gain(
            losses[exit], ahead_N, losses[last], saved_N, time_price=time_price, reference=reference
        )
        stops_N = decide(exit, gain_N)
        if close:
            price = 1.0 if math.isinf(time_price) else time_price
            if float((gain_N * stops_N).mean()) <= price * times.looking(exit):
                left_N = beyond_N
                continue
        stops[exit] = stops_N
        left_N = times.looking(exit) + torch.where(stops_N, times.leaving(exit), beyond_N)
        ahead_N = torch.where(stops_N, losses[exit], ahead_N)
    return stops


# --- fitting --------------------------------------------------------------------------------------

# how many prices are tried for a target, infinity among them; how often they are then halved, and
# once more without a gate that opens
PRICES = 24
HALVINGS = 8
HALVINGS_WITHOUT = 12
CANDIDATES = PRICES + HALVINGS + HALVINGS_WITHOUT


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SweepPoint:
    """A policy fitted for one price of time, and its results there.

    `mean_time_s` and `accuracy` are those on the split it was fitted on.
    """

    time_price: float
    policy: GatePolicy
    mean_time_s: float
    accuracy: float


class GateSettings(TypedDict, total=False):
    """How gates are learned, and at which costs.

    Attributes:
        reference: what an error is held against; "full" by default, see `stop_gain`.
        learner: what learns the gates; "logistic" by default, see `fit_decision`.
        inputs: what gates look at, which decides whether heads are paid in passing; "confidences"
            by default. "features" and "both" need a recording with features.
        gate_s: seconds that asking a gate takes, or one time per early exit (`gate_time_s`); 0 by
            default.
        seed: seed of what a learner draws; 0 by default.
        statistic: which measured number of each stage and head is added up; "mean" by default.
        batch_size: batch size at which the costs were measured; 1 by default.
    """

    reference: Reference
    learner: Learner
    inputs: Inputs
    gate_s: float | Sequence[float]
    seed: int
    statistic: Statistic
    batch_size: int


def fit_gates(
    recording: Recorded,
    costs: CostProfile,
    *,
    time_price: float | None = None,
    mean_time_s: float | None = None,
    max_accuracy_loss: float | None = None,
    progress: bool = False,
    **settings: Unpack[GateSettings],
) -> GatePolicy:
    """Learn one gate per early exit.

    Args:
        recording: recording of a split that neither trained the network nor will judge the policy;
            usually "validation".
        costs: cost profile of the same network.
        time_price: what a second is worth, in loss units (errors): 10 spends 1 ms to spare 1 error
            in 100; or
        mean_time_s: most accurate policy whose mean time is at most this; or
        max_accuracy_loss: fastest policy that loses at most this much accuracy against the last
            exit (0.01: one point).
        progress: whether to show a progress bar.
        **settings: see `GateSettings`.
    Returns:
        A policy; its `target` says what was asked for and what was reached here.
    Raises:
        PolicyError: unless exactly one target is given, or if the recording lacks what gates look
            at.
        InfeasibleTarget: if no policy reaches it.
    Source:
        Bolukbasi et al. 2017, sec. 3.1. We differ: closed gates are not paid, and prices are
        searched for a target.
    """
    target = Target.of(
        recording,
        time_price=time_price,
        mean_time_s=mean_time_s,
        max_accuracy_loss=max_accuracy_loss,
    )
    problem = _Problem(recording, costs, **settings)
    with counted(
        problem.solve,
        "fitting gates",
        total=1 if target.name == PRICE else CANDIDATES,
        unit="fits",
        wanted=progress,
    ) as solve:
        best = (
            solve(target.wanted)
            if target.name == PRICE
            else target.best(problem.candidates(target, solve))
        )
    if all(gate is None for gate in best.policy.gates):
        warnings.warn(
            f"with {target.name}={target.wanted:g} no sample leaves early: the policy is the last "
            "exit. Give time a higher price, or allow a larger loss or less time.",
            NoEffectWarning,
            stacklevel=2,
        )
    reached = {**best.policy.target, target.name: target.wanted}
    return dataclasses.replace(best.policy, target=reached)


def sweep_gates(
    recording: Recorded,
    costs: CostProfile,
    time_prices: Sequence[float] | None = None,
    *,
    progress: bool = False,
    **settings: Unpack[GateSettings],
) -> tuple[SweepPoint, ...]:
    """Learn gates for many prices of time.

    They make the whole curve of accuracy against mean time.

    Args:
        recording: the recording that `fit_gates` takes.
        costs: cost profile of the same network.
        time_prices: loss units per second, infinity allowed; by default 100, from 0 to infinity.
        progress: whether to show a progress bar.
        **settings: see `GateSettings`.
    Returns:
        One point per price, in their order. `lower_hull` keeps those worth having, `mix` meets a
        mean time between two.
    """
    problem = _Problem(recording, costs, **settings)
    prices = problem.prices(100) if time_prices is None else time_prices
    shown = tracked(prices, "fitting gates", total=len(prices), unit="fits", wanted=progress)
    return tuple(problem.solve(float(price)) for price in shown)


@dataclass(eq=False)
class _Problem:
    """One recording, seen as gates see it, to be solved for many prices."""

    recording: Recorded
    costs: CostProfile
    reference: Reference = "full"
    learner: Learner = "logistic"
    inputs: Inputs = "confidences"
    gate_s: float | Sequence[float] = 0.0
    seed: int = 0
    statistic: Statistic = "mean"
    batch_size: int = 1

    def __post_init__(self) -> None:
        recording = self.recording
        check_exits(PolicyError, recording, self.costs)
        checks.one_of(PolicyError, Inputs, inputs=self.inputs)
        pooled = (
            [None] * len(recording.quality)
            if self.inputs == "confidences"
            else features_of(recording)
        )
        looks: Sequence[Tensor | None] = (
            [None] * len(recording.quality) if self.inputs == "features" else seen_on(recording)
        )
        self.features = [
            gate_inputs(self.inputs, *seen).double()
            for seen in zip(pooled[:-1], looks[:-1], strict=True)
        ]
        self.standard = [Standardised.of(features) for features in self.features]
        self.losses = errors_of(recording)
        stages, heads = self.costs.parts(
            "time", statistic=self.statistic, batch_size=self.batch_size
        )
        self.times = GateTimes(
            stages=stages,
            heads=heads,
            gates=per_gate(self.gate_s, len(self.features)),
            heads_first=self.inputs != "features",
        )

    def prices(self, count: int) -> list[float]:
        """Space prices from 0 to infinity.

        They are closest where a whole run is worth a thousandth to thirty errors.
        """
        whole = sum(self.times.stages) + sum(self.times.heads)
        return [0.0, *(np.geomspace(1e-3, 30.0, count - 2) / whole).tolist(), math.inf]

    def solve(self, price: float, allowed: Sequence[bool] | None = None) -> SweepPoint:
        checks.at_least(PolicyError, 0, time_price=price)
        early = len(self.features)
        gates: dict[int, Decision] = {}

        def decide(exit: int, gain_N: Float[Tensor, "N"]) -> Bool[Tensor, "N"]:
            if allowed is not None and not allowed[exit]:
                return torch.zeros_like(gain_N, dtype=torch.bool)
            # stop, go on
            columns = torch.stack([torch.zeros_like(gain_N), gain_N], 1)
            gates[exit] = fit_decision(
                self.standard[exit], columns, learner=self.learner, seed=self.seed
            )
            return gates[exit].choose(self.features[exit]) == STOP_ACTION

        stops = backward(
            self.losses, self.times, decide, time_price=price, reference=self.reference
        )
        comes = torch.cat([torch.ones_like(stops[:1]), ~stops]).cumprod(0)[:early].bool()
        used = (stops & comes).any(1).tolist()
        return self._point(
            price, tuple(gates[exit] if used[exit] else None for exit in range(early)), stops
        )

    def always(self, exit: int) -> SweepPoint:
        """Make all samples leave at one exit."""
        early = len(self.features)
        stops = torch.zeros(early, self.losses.shape[1], dtype=torch.bool)
        stops[exit : exit + 1] = True
        stop = fit_decision(torch.zeros(1, 1), torch.tensor([[0.0, 1.0]]))
        return self._point(
            math.nan, tuple(stop if k == exit else None for k in range(early)), stops
        )

    def _point(
        self, price: float, gates: tuple[Decision | None, ...], stops: Bool[Tensor, "E N"]
    ) -> SweepPoint:
        recording = self.recording
        samples = torch.arange(self.losses.shape[1])
        policy = GatePolicy(
            gates=gates,
            inputs=self.inputs,
            gate_s=self.times.gates,
            time_price=None if math.isnan(price) else price,
            reference=self.reference,
            learner=self.learner,
            split=recording.split,
            provenance=recording.provenance,
            task=recording.task,
        )
        exits = torch.cat([stops, torch.ones_like(samples, dtype=torch.bool)[None]]).int().argmax(0)
        times_s = exit_times_s(
            policy, self.costs, statistic=self.statistic, batch_size=self.batch_size
        )
        mean_s = float(times_s[exits].mean())
        accuracy = 1.0 - float(self.losses[exits, samples].mean())
        target = {"mean_cost": mean_s, "accuracy": accuracy, "samples": float(len(samples))}
        target |= {} if math.isnan(price) else {"time_price": price}
        return SweepPoint(
            time_price=price,
            policy=dataclasses.replace(policy, target=target),
            mean_time_s=mean_s,
            accuracy=accuracy,
        )

    def candidates(self, target: Target, solve: Callable[..., SweepPoint]) -> list[SweepPoint]:
        """Fit policies over a range of prices, and constant ones.

        Args:
            solve: what `self.solve` does.
        """
        prices = self.prices(PRICES)[:-1]
        found = target.search(solve, prices, HALVINGS)
        low, below = max(
            (entry for entry in found if not target.is_crossed(entry[1])),
            key=lambda entry: entry[0],
            default=found[0],
        )
        # where a gate opens the mean time jumps; what lies between is reached without that gate
        gates = [gate is not None for gate in below.policy.gates]
        without = functools.partial(solve, allowed=gates)
        found += target.bisect(without, low, prices[-1], HALVINGS_WITHOUT)
        points = [point for _, point in found]
        always = [self.always(exit) for exit in range(len(self.losses))]
        return [*points, solve(math.inf), *always]
