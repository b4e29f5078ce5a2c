"""Costs of every stage and head on one device, and of the exits.

An answer from exit k costs the stages up to k and some heads:

* **interruptible**: every head on the way, because each exit posts its answer in case it is the
  last one;
* **contract**: head k alone, because the budget is known and the other heads are skipped.

A cost is time, multiply-accumulates, bytes moved or energy. Every function that takes a budget
takes one in any of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from impatient import checks
from impatient.errors import CostError, CostOrderError, StaleInput
from impatient.provenance import Provenance
from impatient.provenance import provenance as made_now
from impatient.store import Stored

Statistic = Literal["mean", "p50", "p90", "p99", "p999", "max"]
Mode = Literal["interruptible", "contract"]
Cost = Literal["time", "macs", "bytes", "energy"]
Verdict = Literal["faster", "slower", "cannot tell apart", "noise unknown"]
# Costs of the stages, of the heads and of the untouched backbone.
_PerSample = tuple[Sequence[float] | None, Sequence[float] | None, float | None]

# Units of the command line, in lower case. Inside, costs are in seconds, multiply-accumulates,
# bytes and joules.
UNITS: dict[str, tuple[Cost, float]] = {
    "ms": ("time", 1e-3),
    "mmacs": ("macs", 1e6),
    "mb": ("bytes", 1e6),
    "mj": ("energy", 1e-3),
}

# The engine of times that are known from elsewhere.
GIVEN = "given"

# If the median of the A/A ratios may be further from 1 than this, the differences that people ask
# for cannot be seen.
NOISE_LIMIT = 0.05


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
            raise CostError(
                f"measured times must be finite and not negative, got {times}. Measure again with "
                "profile()."
            )
        if not self.p50 <= self.p90 <= self.p99 <= self.p999 <= self.max:
            raise CostError(
                f"quantiles must not decrease, got {times[1:]}. Measure again with profile()."
            )

    def of_statistic(self, statistic: Statistic) -> float:
        """Return one of the statistics by name.

        Raises:
            CostError: if there is no such statistic.
        """
        checks.one_of(CostError, Statistic, statistic=statistic)
        return float(getattr(self, statistic))

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Self:
        """Summarise measured times.

        Quantiles are order statistics, rounded up, so p99 of few repeats is the maximum.
        """
        if len(times_s) == 0:
            raise CostError("no measured times to summarise; expected at least one repeat.")
        p50, p90, p99, p999 = np.quantile(times_s, [0.5, 0.9, 0.99, 0.999], method="higher")
        return cls(
            mean=float(np.mean(times_s)),
            p50=float(p50),
            p90=float(p90),
            p99=float(p99),
            p999=float(p999),
            max=float(np.max(times_s)),
            n=len(times_s),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Noise of a machine, from pairs of adjacent runs (A/A).

    Attributes:
        aa_ratio: median ratio of the two times of a pair; without noise it is 1.
        aa_low: lower end of the 95 % interval of the median ratio.
        aa_high: upper end of the 95 % interval of the median ratio.
        spread: half the width of the range that holds nine in ten of the ratios, as a factor: 0.03
            is +-3 %.
        n: number of pairs.
    """

    aa_ratio: float
    aa_low: float
    aa_high: float
    spread: float
    n: int

    def __post_init__(self) -> None:
        numbers = (self.aa_ratio, self.aa_low, self.aa_high, self.spread)
        if not (
            all(map(math.isfinite, numbers))
            and 0.0 < self.aa_low <= self.aa_ratio <= self.aa_high
            and self.spread >= 0.0
        ):
            raise CostError(
                f"an A/A ratio, its interval and spread cannot be {numbers}. Measure again with "
                "profile()."
            )

    @property
    def too_noisy(self) -> bool:
        """Whether the interval reaches beyond 1 +- 5 %.

        Small differences cannot be seen in such a profile.
        """
        return self.aa_low < 1.0 - NOISE_LIMIT or self.aa_high > 1.0 + NOISE_LIMIT

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Self | None:
        """Estimate the noise from times of one repeated thing.

        The first and second run make a pair, the third and fourth, and so on. The interval is one
        of order statistics. Half of the pairs are turned round, so that running second is no
        advantage.

        Returns:
            `None` if there are fewer than six pairs (no 95 % interval for the median) or the clock
            did not advance.
        """
        pairs = np.asarray(times_s[: len(times_s) // 2 * 2], dtype=np.float64).reshape(-1, 2)
        rank = _lower_rank(len(pairs))
        if rank < 1 or not (pairs > 0.0).all():
            return None
        pairs[1::2] = pairs[1::2, ::-1]
        ratios = np.sort(pairs[:, 0] / pairs[:, 1])
        low, high = np.quantile(np.log(ratios), [0.05, 0.95])
        return cls(
            aa_ratio=float(np.median(ratios)),
            aa_low=float(ratios[rank - 1]),
            aa_high=float(ratios[-rank]),
            spread=math.expm1((high - low) / 2),
            n=len(ratios),
        )


def _lower_rank(count: int) -> int:
    """Return the rank of the lower end of a median's 95 % interval.

    Ranks count from 1; 0 means that there is no such interval. The rank is the smallest k with
    P(heads <= k) >= 2.5 % in `count` tosses of a coin, in exact integers.
    """
    ways = 1
    below = 1
    rank = 0
    while 40 * below < 2**count:
        ways = ways * (count - rank) // (rank + 1)
        rank += 1
        below += ways
    return rank


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCosts:
    """Measured times at one batch size.

    Attributes:
        stages: times of the stages of the K exits.
        heads: times of the heads of the K exits; 0 for an exit without a head.
        exit_free: time of the untouched backbone.
        noise: noise of the machine during the measurement; None if it is not known.
    """

    stages: tuple[Quantiles, ...]
    heads: tuple[Quantiles, ...]
    exit_free: Quantiles
    noise: Noise | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One exit in two profiles, A and B, in contract mode.

    Attributes:
        batch_size: batch size of the times.
        exit: index of the exit; None is the untouched backbone.
        name: name of the exit.
        a_s: mean seconds in A until the exit's answer.
        b_s: mean seconds in B until the exit's answer.
        ratio: mean time in A divided by that in B: B is so many times as fast.
        p50_ratio: the same ratio of sums of medians.
        p99_ratio: the same ratio of sums of p99.
        noise: smallest difference from 1 that means something: the root of the summed squares of
            both A/A spreads; None if one is not known.
        verdict: what B is. It is "faster" or "slower" only if the ratios of the means and of the
            medians both differ by more than the noise: one late run moves the mean, not the median.
    """

    batch_size: int
    exit: int | None
    name: str
    a_s: float
    b_s: float
    ratio: float
    p50_ratio: float
    p99_ratio: float
    noise: float | None
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CostProfile(Stored, made_by="`impatient profile`"):
    """Cost of every stage and head on one device and engine.

    Attributes:
        exits: names of the K exits, shallow to deep.
        batches: measured times per batch size.
        stage_macs: multiply-accumulates of each stage per sample (1 MAC = 2 FLOPs).
        head_macs: multiply-accumulates of each head per sample.
        stage_parameters: number of parameters of each stage.
        head_parameters: number of parameters of each head.
        stage_bytes: bytes that the operators of each stage read and write per sample, at batch size
            1; None if they were not counted. See `counting.count_traffic`.
        head_bytes: bytes that the operators of each head read and write.
        stage_energy_j: joules of each stage per sample, at batch size 1; None if not measured.
        head_energy_j: joules of each head.
        exit_free_macs: multiply-accumulates of the untouched backbone; None means the sum of its
            stages.
        exit_free_bytes: bytes of the untouched backbone; None means the sum of its stages.
        exit_free_energy_j: joules of the untouched backbone; None means the sum of its stages.
        energy_meter: description of what measured the joules.
        provenance: machine, versions and network structure.
    """

    exits: tuple[str, ...]
    batches: Mapping[int, BatchCosts]
    stage_macs: tuple[int, ...]
    head_macs: tuple[int, ...]
    stage_parameters: tuple[int, ...]
    head_parameters: tuple[int, ...]
    stage_bytes: tuple[int, ...] | None = None
    head_bytes: tuple[int, ...] | None = None
    stage_energy_j: tuple[float, ...] | None = None
    head_energy_j: tuple[float, ...] | None = None
    exit_free_macs: int | None = None
    exit_free_bytes: int | None = None
    exit_free_energy_j: float | None = None
    energy_meter: str | None = None
    provenance: Provenance

    def __post_init__(self) -> None:
        if not self.exits or not self.batches:
            raise CostError(
                "a cost profile needs at least one exit and one batch size. Make one with "
                "profile()."
            )
        joules = (*(self.stage_energy_j or ()), *(self.head_energy_j or ()))
        if not all(math.isfinite(entry) and entry >= 0.0 for entry in joules):
            raise CostError(
                f"joules must be finite and not negative, got {joules}. Measure again with "
                "profile()."
            )
        rows = {
            f"{part}_{unit}": getattr(self, f"{part}_{unit}")
            for part in ("stage", "head")
            for unit in ("macs", "parameters", "bytes", "energy_j")
        }
        for size, costs in self.batches.items():
            rows |= {f"batches[{size}].stages": costs.stages, f"batches[{size}].heads": costs.heads}
        for name, row in rows.items():
            if row is not None and len(row) != self.num_exits:
                raise CostError(
                    f"{name} has {len(row)} entries for {self.num_exits} exits. Make the profile "
                    "again."
                )

    @classmethod
    def of(
        cls,
        *,
        cumulative_s: Sequence[float] = (),
        stages_s: Sequence[float] = (),
        heads_s: Sequence[float] = (),
        exit_free_s: float | None = None,
        stage_macs: Sequence[int] = (),
        exits: Sequence[str] = (),
        batch_size: int = 1,
        provenance: Provenance | None = None,
    ) -> Self:
        """Make a profile of times that are known from elsewhere.

        Give the times until each exit's answer, or those of every stage alone. `Runner` takes such
        a profile with any_profile=True only, because nothing says that it is of this machine.

        Args:
            cumulative_s: seconds from the start until the answer of each exit, shallow to deep; or
            stages_s: seconds of each stage alone.
            heads_s: seconds of each head alone, beside `stages_s`; by default 0.
            exit_free_s: seconds of the network without exits; by default the sum of its stages.
            stage_macs: multiply-accumulates of each stage; by default they are not known.
            exits: names of the exits; by default "exit 0" and so on.
            batch_size: number of samples that took these times together.
            provenance: where the times come from.
        Raises:
            CostError: if both or neither of cumulative and stage times are given, or if the numbers
                of entries differ.
            CostOrderError: if cumulative times do not increase.
        Example:
            >>> costs = CostProfile.of(cumulative_s=[0.001, 0.003, 0.004])
            >>> costs.contract_s() == CostProfile.of(stages_s=[0.001, 0.002, 0.001]).contract_s()
            True
        """
        if bool(len(cumulative_s)) == bool(len(stages_s)) or (len(heads_s) and not len(stages_s)):
            raise CostError(
                "expected either cumulative_s, the seconds until each exit's answer, or stages_s "
                "with or without heads_s, the seconds of every part alone."
            )
        if len(cumulative_s):
            reached = check_increasing(cumulative_s)
            stages = [after - before for before, after in itertools.pairwise((0.0, *reached))]
        else:
            stages = [float(seconds) for seconds in stages_s]
        unknown = (0,) * len(stages)
        names = tuple(exits) or tuple(f"exit {exit}" for exit in range(len(stages)))
        batch = BatchCosts(
            stages=tuple(map(_given, stages)),
            heads=tuple(map(_given, heads_s if len(heads_s) else unknown)),
            exit_free=_given(sum(stages) if exit_free_s is None else exit_free_s),
        )
        return cls(
            exits=names,
            batches={batch_size: batch},
            stage_macs=tuple(map(int, stage_macs)) or unknown,
            head_macs=unknown,
            stage_parameters=unknown,
            head_parameters=unknown,
            provenance=provenance or made_now(engine=GIVEN),
        )

    def __repr__(self) -> str:
        times = {
            size: " ".join(f"{seconds * 1e3:.3g}" for seconds in self.contract_s(batch_size=size))
            for size in self.batches
        }
        lines = "".join(f"\n  batch of {size}: {row} ms" for size, row in times.items())
        return f"CostProfile of {self.num_exits} exits, mean time until each one's answer:{lines}"

    @property
    def num_exits(self) -> int:
        return len(self.exits)

    @property
    def is_given(self) -> bool:
        """Whether the times were not measured by `profile`, but are known from elsewhere."""
        return self.provenance.engine == GIVEN

    def at(self, batch_size: int = 1) -> BatchCosts:
        """Return the measured times at one batch size.

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

    def holds(self, cost: Cost) -> bool:
        """Whether the profile has this cost."""
        stages = self._per_sample(cost)[0] if cost != "time" else ()
        # Multiply-accumulates that nobody counted are zeros.
        return cost == "time" or (any(stages or ()) if cost == "macs" else stages is not None)

    def require(self, cost: Cost) -> None:
        """Raise CostError unless the profile has this cost."""
        if not self.holds(cost):
            raise _missing(cost)

    def _per_sample(self, cost: Cost) -> _PerSample:
        checks.one_of(CostError, Cost, cost=cost)
        return {
            "macs": (self.stage_macs, self.head_macs, self.exit_free_macs),
            "bytes": (self.stage_bytes, self.head_bytes, self.exit_free_bytes),
            "energy": (self.stage_energy_j, self.head_energy_j, self.exit_free_energy_j),
        }[cost]

    def parts(
        self, cost: Cost, *, statistic: Statistic = "mean", batch_size: int = 1
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the cost of every stage and of every head alone.

        Args:
            cost: "time" in seconds of a batch; "macs", "bytes" and "energy" (joules) of one sample,
                at batch size 1.
            statistic: statistic of the measured times; other costs have only one.
            batch_size: batch size of the measured times; other costs are per sample.
        Raises:
            CostError: if the profile does not have this cost.
        """
        if cost == "time":
            batch = self.at(batch_size)
            return (
                tuple(part.of_statistic(statistic) for part in batch.stages),
                tuple(part.of_statistic(statistic) for part in batch.heads),
            )
        stages, heads, _ = self._per_sample(cost)
        if stages is None or heads is None:
            raise _missing(cost)
        return tuple(map(float, stages)), tuple(map(float, heads))

    def cumulative(
        self,
        cost: Cost,
        mode: Mode,
        *,
        statistic: Statistic = "mean",
        batch_size: int = 1,
        heads: Sequence[bool] | None = None,
    ) -> tuple[float, ...]:
        """Return the cost until the answer of each exit, shallow to deep.

        Args:
            cost: "time" in seconds of a batch; "macs", "bytes" and "energy" (joules) of one sample,
                at batch size 1.
            mode: which heads are paid on the way; see the module's docstring.
            statistic: statistic of the times that are added. Means add up exactly; sums of
                quantiles are upper bounds.
            batch_size: batch size of the measured times.
            heads: in interruptible mode, whether each exit's head runs when the exit is passed; by
                default, all heads run.
        Raises:
            CostError: if the profile does not have this cost, or this batch size was not measured.
        """
        stages, every_head = self.parts(cost, statistic=statistic, batch_size=batch_size)
        return _cumulative(stages, every_head, mode, heads)

    def exit_free(self, cost: Cost, *, statistic: Statistic = "mean", batch_size: int = 1) -> float:
        """Return the cost of the untouched backbone.

        Arguments and errors are as for `parts`.
        """
        if cost == "time":
            return self.at(batch_size).exit_free.of_statistic(statistic)
        # Also raises if the profile does not have this cost.
        stages, _ = self.parts(cost)
        total = self._per_sample(cost)[2]
        return sum(stages) if total is None else float(total)

    def interruptible_s(
        self, *, statistic: Statistic = "mean", batch_size: int = 1
    ) -> tuple[float, ...]:
        """Return the seconds until each exit's answer in interruptible mode.

        Every exit on the way answers, too. This is t_A in Impatient DNNs. Arguments and errors are
        as for `parts`.
        """
        return self.cumulative("time", "interruptible", statistic=statistic, batch_size=batch_size)

    def contract_s(
        self, *, statistic: Statistic = "mean", batch_size: int = 1
    ) -> tuple[float, ...]:
        """Return the seconds until each exit's answer in contract mode.

        Only this exit's head runs. This is t_B in Impatient DNNs. Arguments and errors are as for
        `parts`.
        """
        return self.cumulative("time", "contract", statistic=statistic, batch_size=batch_size)

    def exit_free_s(self, *, statistic: Statistic = "mean", batch_size: int = 1) -> float:
        """Return the seconds of the untouched backbone, measured in the same interleaved run.

        Arguments and errors are as for `parts`.
        """
        return self.exit_free("time", statistic=statistic, batch_size=batch_size)

    def compare(self, other: CostProfile, *, any_network: bool = False) -> tuple[Comparison, ...]:
        """Compare the times of two profiles exit by exit, with their noise.

        The two profiles were measured one after the other. If the machine was slower during one of
        them, this is seen as a difference. Measure small differences in turn, with
        `impatient.runtime.time_in_turn`.

        Args:
            other: profile B; this one is A.
            any_network: whether exits with the same index are compared even if they belong to
                different networks.
        Returns:
            One row per exit and one for the untouched backbone, for each batch size in both.
        Raises:
            StaleInput: if the profiles are of different networks, or of different cuts.
            CostError: if they have different numbers of exits, or no batch size in common.
        """
        if not any_network:
            self.provenance.require(
                "profile A", "compare profiles of one network", network=other.provenance.network
            )
            if self.exits != other.exits:
                raise StaleInput(
                    f"profile A has exits after {', '.join(self.exits)}, profile B after "
                    f"{', '.join(other.exits)}; compare profiles of one network, cut in the same "
                    "places."
                )
        if self.num_exits != other.num_exits:
            raise CostError(
                f"profile A has {self.num_exits} exits, profile B {other.num_exits}; expected as "
                "many in both."
            )
        sizes = sorted(self.batches.keys() & other.batches.keys())
        if not sizes:
            raise CostError(
                f"profile A has batch sizes {sorted(self.batches)}, profile B "
                f"{sorted(other.batches)}; expected one in both."
            )
        return tuple(
            _compared(self, other, size, exit)
            for size in sizes
            for exit in (*range(self.num_exits), None)
        )

    def differences(self, other: CostProfile) -> dict[str, tuple[str, str]]:
        """Return what differs in the origin of two profiles.

        The origin is the engine, threads, processor, versions and so on. The result has the texts
        of A and of B, by name.
        """
        mine = _origin(self.provenance)
        others = _origin(other.provenance)
        return {
            name: (mine.get(name, "none"), others.get(name, "none"))
            for name in {**mine, **others}
            if mine.get(name, "none") != others.get(name, "none")
        }


def _given(seconds: float) -> Quantiles:
    """Make the distribution of a time that was not measured here: n is 0."""
    return dataclasses.replace(Quantiles.of([float(seconds)]), n=0)


def _cumulative(
    stages: Sequence[float], heads: Sequence[float], mode: Mode, paid: Sequence[bool] | None
) -> tuple[float, ...]:
    reached = list(itertools.accumulate(stages))
    if mode == "contract":
        return tuple(stage + head for stage, head in zip(reached, heads, strict=True))
    checks.one_of(CostError, Mode, mode=mode)
    paid = [True] * len(heads) if paid is None else paid
    if len(paid) != len(heads):
        raise CostError(
            f"the mask has {len(paid)} entries for {len(heads)} exits; say of every exit whether "
            "its head runs."
        )
    passed = itertools.accumulate(
        (head if run else 0.0 for head, run in zip(heads, paid, strict=True)), initial=0.0
    )
    # The head of the exit that answers always runs, even if it does not run when it is passed.
    return tuple(
        stage + before + head for stage, before, head in zip(reached, passed, heads, strict=False)
    )


_MISSING = {
    "macs": "none were counted. Give stage_macs to CostProfile.of, or measure with profile().",
    "bytes": (
        "it was made by an older version, or in an engine whose operators cannot be seen. Profile "
        "the network in eager mode with this version."
    ),
    "energy": (
        "it was not measured. Profile again from Python with a meter: "
        "from impatient.experimental import energy, then "
        'impatient.profile(network, x, energy=energy.find_meter("cpu")).'
    ),
}


def _missing(cost: Cost) -> CostError:
    return CostError(f"this profile says nothing about {cost}: {_MISSING[cost]}")


def _compared(a: CostProfile, b: CostProfile, size: int, exit: int | None) -> Comparison:
    def taken(costs: CostProfile, statistic: Statistic) -> float:
        if exit is None:
            return costs.exit_free("time", statistic=statistic, batch_size=size)
        return costs.contract_s(statistic=statistic, batch_size=size)[exit]

    def ratio(statistic: Statistic) -> float:
        slow = taken(b, statistic)
        return taken(a, statistic) / slow if slow > 0.0 else math.nan

    of_a = a.at(size).noise
    of_b = b.at(size).noise
    noise = math.hypot(of_a.spread, of_b.spread) if of_a and of_b else None
    return Comparison(
        batch_size=size,
        exit=exit,
        name="without exits" if exit is None else a.exits[exit],
        a_s=taken(a, "mean"),
        b_s=taken(b, "mean"),
        ratio=ratio("mean"),
        p50_ratio=ratio("p50"),
        p99_ratio=ratio("p99"),
        noise=noise,
        verdict=_verdict((ratio("mean"), ratio("p50")), noise),
    )


def _verdict(ratios: Sequence[float], noise: float | None) -> Verdict:
    if noise is None:
        return "noise unknown"
    if all(ratio > 1.0 + noise for ratio in ratios):
        return "faster"
    if all(ratio < 1.0 / (1.0 + noise) for ratio in ratios):
        return "slower"
    return "cannot tell apart"


def _origin(made: Provenance) -> dict[str, str]:
    """Return what a measured time depends on, by name."""
    names = ("network", "engine", "threads", "device", "processor", "dtype")
    return {name: str(getattr(made, name)) for name in names} | {
        f"{name} version": text for name, text in made.versions.items()
    }


def check_positive(costs_s: Sequence[float]) -> tuple[float, ...]:
    """Return cumulative costs of any kind and order as floats.

    Raises:
        CostOrderError: if there are none, or they are not finite and positive.
    """
    costs = tuple(float(cost) for cost in costs_s)
    if not costs or not all(math.isfinite(cost) and cost > 0 for cost in costs):
        raise CostOrderError(
            f"cumulative costs must be positive and finite, got {costs}. Take them from a "
            "CostProfile."
        )
    return costs


def check_increasing(costs_s: Sequence[float]) -> tuple[float, ...]:
    """Return cumulative costs of any kind as floats after checking their order.

    Raises:
        CostOrderError: if they are not finite, positive and strictly increasing.
    """
    costs = check_positive(costs_s)
    for index, (before, after) in enumerate(itertools.pairwise(costs)):
        if after <= before:
            raise CostOrderError(
                f"cumulative costs must increase strictly, but exit {index + 1} costs {after:g} "
                f"after {before:g} at exit {index}. Measure with more repeats, or drop an exit "
                "that costs nothing."
            )
    return costs
