"""What every stage and every head costs, measured on one device, and the two cumulative costs that follow.

An answer from exit k costs the stages up to k and

* **interruptible**: every head on the way, since each posts its answer in case it is the last;
* **contract**: head k alone, since the budget was known and the other heads were skipped.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from impatient.errors import CostError, CostOrderError
from impatient.files import read_json, write_json
from impatient.provenance import Provenance

Statistic = Literal["mean", "p50", "p90", "p99", "p999", "max"]
Mode = Literal["interruptible", "contract"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Distribution of one measured time, in seconds, over n repeats."""

    mean: float
    p50: float
    p90: float
    p99: float
    p999: float
    max: float
    n: int

    def __post_init__(self) -> None:
        times = (self.mean, self.p50, self.p90, self.p99, self.p999, self.max)
        if not all(math.isfinite(time) and time >= 0.0 for time in times):
            raise CostError(f"measured times must be finite and not negative, got {times}. Measure again with profile().")
        if not self.p50 <= self.p90 <= self.p99 <= self.p999 <= self.max:
            raise CostError(f"quantiles must not decrease, got {times[1:]}. Measure again with profile().")

    def of_statistic(self, statistic: Statistic) -> float:
        """One of the numbers, by name.

        Raises:
            CostError: if there is no such number.
        """
        if statistic not in get_args(Statistic):
            raise CostError(f"unknown statistic {statistic!r}; needed: one of {', '.join(get_args(Statistic))}.")
        return float(getattr(self, statistic))

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Self:
        """Summarise measured times; quantiles are order statistics, rounded up, so p99 of few repeats is the maximum."""
        if len(times_s) == 0:
            raise CostError("no measured times to summarise; needed: at least one repeat.")
        p50, p90, p99, p999 = np.quantile(times_s, [0.5, 0.9, 0.99, 0.999], method="higher")
        return cls(
            mean=float(np.mean(times_s)), p50=float(p50), p90=float(p90), p99=float(p99), p999=float(p999),
            max=float(np.max(times_s)), n=len(times_s),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCosts:
    """Measured times at one batch size: K stages, K heads (0 where an exit has none), and the untouched backbone."""

    stages: tuple[Quantiles, ...]
    heads: tuple[Quantiles, ...]
    exit_free: Quantiles


@dataclass(frozen=True, slots=True, kw_only=True)
class CostProfile:
    """Cost of every stage and head of one network on one device and engine.

    Attributes:
        exits: names of the K exits, shallow to deep.
        batches: measured times per batch size.
        stage_macs, head_macs: multiply-accumulates per sample (1 MAC = 2 FLOPs).
        stage_parameters, head_parameters: parameter counts.
        exit_free_macs: of the untouched backbone; by default the sum of the stages.
        provenance: machine, versions, network structure.
    """

    exits: tuple[str, ...]
    batches: Mapping[int, BatchCosts]
    stage_macs: tuple[int, ...]
    head_macs: tuple[int, ...]
    stage_parameters: tuple[int, ...]
    head_parameters: tuple[int, ...]
    exit_free_macs: int = -1
    provenance: Provenance

    def __post_init__(self) -> None:
        if self.exit_free_macs < 0:
            object.__setattr__(self, "exit_free_macs", sum(self.stage_macs))
        if not self.exits or not self.batches:
            raise CostError("a cost profile needs at least one exit and one batch size. Make one with profile().")
        rows: list[tuple[str, Sequence[object]]] = [
            ("stage_macs", self.stage_macs), ("head_macs", self.head_macs),
            ("stage_parameters", self.stage_parameters), ("head_parameters", self.head_parameters),
        ]  # fmt: skip
        for size, costs in self.batches.items():
            rows += [(f"batches[{size}].stages", costs.stages), (f"batches[{size}].heads", costs.heads)]
        for name, row in rows:
            if len(row) != len(self.exits):
                raise CostError(f"{name} has {len(row)} entries for {len(self.exits)} exits. Make the profile again.")

    @property
    def num_exits(self) -> int:
        return len(self.exits)

    def at(self, batch_size: int = 1) -> BatchCosts:
        """Measured times at one batch size.

        Raises:
            CostError: if that batch size was not measured.
        """
        try:
            return self.batches[batch_size]
        except KeyError:
            raise CostError(
                f"batch size {batch_size} was not measured; measured: {sorted(self.batches)}. "
                f"Run profile(network, x, batch_sizes=[..., {batch_size}])."
            ) from None

    def cumulative_s(
        self, mode: Mode, *, statistic: Statistic = "mean", batch_size: int = 1, heads: Sequence[bool] | None = None
    ) -> tuple[float, ...]:
        """Seconds until the answer of each exit is there, shallow to deep.

        Args:
            mode: which heads are paid on the way; see the module's docstring.
            statistic: which number of each part is added. Means add up exactly; sums of quantiles are upper bounds.
            batch_size: a measured one.
            heads: in interruptible mode, whether each exit's head runs when it is passed (default: all do).
        """
        costs = self.at(batch_size)
        stages = [part.of_statistic(statistic) for part in costs.stages]
        return _cumulative(stages, [part.of_statistic(statistic) for part in costs.heads], mode, heads)

    def interruptible_s(self, *, statistic: Statistic = "mean", batch_size: int = 1) -> tuple[float, ...]:
        """Seconds until each exit has answered when every exit on the way answers too (t_A in Impatient DNNs)."""
        return self.cumulative_s("interruptible", statistic=statistic, batch_size=batch_size)

    def contract_s(self, *, statistic: Statistic = "mean", batch_size: int = 1) -> tuple[float, ...]:
        """Seconds until each exit has answered when only that exit's head runs (t_B in Impatient DNNs)."""
        return self.cumulative_s("contract", statistic=statistic, batch_size=batch_size)

    def exit_free_s(self, *, statistic: Statistic = "mean", batch_size: int = 1) -> float:
        """Seconds of the untouched backbone, measured in the same interleaved run."""
        return self.at(batch_size).exit_free.of_statistic(statistic)

    def cumulative_macs(self, mode: Mode, heads: Sequence[bool] | None = None) -> tuple[float, ...]:
        """Multiply-accumulates until the answer of each exit is there."""
        return _cumulative(self.stage_macs, self.head_macs, mode, heads)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "cost_profile", **dataclasses.asdict(self), "provenance": self.provenance.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        try:
            batches = {int(size): _batch_costs(costs) for size, costs in value["batches"].items()}
            integers = {
                name: tuple(int(entry) for entry in value[name])
                for name in ("stage_macs", "head_macs", "stage_parameters", "head_parameters")
            }
            return cls(
                exits=tuple(value["exits"]), batches=batches, provenance=Provenance.from_json(value["provenance"]),
                exit_free_macs=int(value.get("exit_free_macs", -1)), **integers,
            )  # fmt: skip
        except CostError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CostError(f"this is not a cost profile ({error!r}). Make one with `impatient profile`.") from error

    def save(self, path: str | Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        return cls.from_json(read_json(path))


def _cumulative(stages: Sequence[float], heads: Sequence[float], mode: Mode, paid: Sequence[bool] | None) -> tuple[float, ...]:
    reached = list(itertools.accumulate(stages))
    if mode == "contract":
        return tuple(stage + head for stage, head in zip(reached, heads, strict=True))
    if mode != "interruptible":
        raise CostError(f"unknown mode {mode!r}; needed: 'interruptible' or 'contract'.")
    paid = [True] * len(heads) if paid is None else paid
    if len(paid) != len(heads):
        raise CostError(f"the mask has {len(paid)} entries for {len(heads)} exits; say of every exit whether its head runs.")
    passed = itertools.accumulate((head if run else 0.0 for head, run in zip(heads, paid, strict=True)), initial=0.0)
    # the head of the exit that answers always runs, whether or not it would when merely passed
    return tuple(stage + before + head for stage, before, head in zip(reached, passed, heads, strict=False))


def _batch_costs(value: Mapping[str, Any]) -> BatchCosts:
    return BatchCosts(
        stages=tuple(Quantiles(**part) for part in value["stages"]),
        heads=tuple(Quantiles(**part) for part in value["heads"]),
        exit_free=Quantiles(**value["exit_free"]),
    )


def check_increasing(costs_s: Sequence[float]) -> tuple[float, ...]:
    """Return cumulative costs as floats if they are finite and strictly increasing.

    Raises:
        CostOrderError: otherwise, naming the first offender.
    """
    costs = tuple(float(cost) for cost in costs_s)
    if not costs or not all(math.isfinite(cost) and cost > 0 for cost in costs):
        raise CostOrderError(f"cumulative costs must be positive finite seconds, got {costs}. Take them from a CostProfile.")
    for index, (before, after) in enumerate(itertools.pairwise(costs)):
        if after <= before:
            raise CostOrderError(
                f"cumulative costs must increase strictly, but exit {index + 1} costs {after:g} s after {before:g} s at "
                f"exit {index}. Measure with more repeats, or drop an exit that costs nothing."
            )
    return costs
