"""What every stage and head costs on one device, and what follows for exits.

An answer from exit k costs the stages up to k and

* **interruptible**: every head on the way, since each posts its answer in case it is the last;
* **contract**: head k alone, since the budget was known and the other heads were skipped.

A cost is time, multiply-accumulates, bytes moved or energy; whatever takes a budget takes one in
any of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from impatient import checks
from impatient.errors import CostError, CostOrderError, StaleInput
from impatient.provenance import Provenance
from impatient.store import Stored

Statistic = Literal["mean", "p50", "p90", "p99", "p999", "max"]
Mode = Literal["interruptible", "contract"]
Cost = Literal["time", "macs", "bytes", "energy"]
Verdict = Literal["faster", "slower", "cannot tell apart", "noise unknown"]

# Inside: seconds, multiply-accumulates, bytes, joules. At the door, in lower case:
UNITS: dict[str, tuple[Cost, float]] = {
    "ms": ("time", 1e-3),
    "mmacs": ("macs", 1e6),
    "mb": ("bytes", 1e6),
    "mj": ("energy", 1e-3),
}

# an A/A median that may be further from 1 than this cannot show the differences people ask for
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
                f"profile()."
            )
        if not self.p50 <= self.p90 <= self.p99 <= self.p999 <= self.max:
            raise CostError(
                f"quantiles must not decrease, got {times[1:]}. Measure again with profile()."
            )

    def of_statistic(self, statistic: Statistic) -> float:
        """One of the numbers, by name.

        Raises:
            CostError: if there is no such number.
        """
        checks.one_of(CostError, Statistic, statistic=statistic)
        return float(getattr(self, statistic))

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Self:
        """Summarise measured times; quantiles are order statistics, rounded up, so p99 of few
        repeats is the maximum.
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
    """How well a machine repeats itself: the untouched backbone against itself, in pairs of
    adjacent runs (A/A).

    Attributes:
        aa_ratio: median of the paired ratios; 1 but for noise.
        aa_low, aa_high: its 95 % interval.
        spread: half the width of the range that holds nine in ten of the single ratios, as a
            factor: 0.03 is +-3 %.
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
                f"profile()."
            )

    @property
    def too_noisy(self) -> bool:
        """Whether the interval reaches beyond 1 +- 5 %: then the profile can say little about
        anything.
        """
        return self.aa_low < 1.0 - NOISE_LIMIT or self.aa_high > 1.0 + NOISE_LIMIT

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Self | None:
        """From times of one and the same thing, of which the first and second, third and fourth,
        ... ran back to back.

        The interval is one of order statistics. Half of the pairs are turned round, so that running
        second is no advantage.

        Returns:
            None of fewer than six pairs, whose median has no 95 % interval, or where the clock
            shows no time at all.
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
    """Rank, counted from 1, of the lower end of a median's 95 % interval; 0 if there is none.

    The smallest k with P(heads <= k) >= 2.5 % in so many tosses of a coin, in exact integers.
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
        stages, heads: of the K exits; a head is 0 where an exit has none.
        exit_free: of the untouched backbone.
        noise: how well the machine repeated itself meanwhile; None where that is not known.
    """

    stages: tuple[Quantiles, ...]
    heads: tuple[Quantiles, ...]
    exit_free: Quantiles
    noise: Noise | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One exit in two profiles, A and B, in contract mode.

    Attributes:
        batch_size: of the times.
        exit, name: which exit; None is the untouched backbone.
        a_s, b_s: mean seconds until its answer.
        ratio: A's mean over B's, which is how many times as fast B is.
        p50_ratio, p99_ratio: likewise, of sums of these quantiles.
        noise: by how much a ratio may differ from 1 and say nothing: the A/A spreads of both, added
            as squares; None where one is not known.
        verdict: what B is; "faster" and "slower" only where the ratios of the means and of the
            medians both say so beyond the noise. One late run moves the mean and not the median.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CostProfile(Stored, made_by="`impatient profile`"):
    """Cost of every stage and head of one network on one device and engine.

    Attributes:
        exits: names of the K exits, shallow to deep.
        batches: measured times per batch size.
        stage_macs, head_macs: multiply-accumulates per sample (1 MAC = 2 FLOPs).
        stage_parameters, head_parameters: parameter counts.
        stage_bytes, head_bytes: bytes that operators read and write per sample, at batch size 1;
            see `counting.count_traffic`. None where they were not counted, as in files
            made before they were.
        stage_energy_j, head_energy_j: joules per sample, at batch size 1; None where they were not
            measured.
        exit_free_macs, exit_free_bytes, exit_free_energy_j: of the untouched backbone; None where
            it takes what its stages take together.
        energy_meter: what measured the joules, in words.
        provenance: machine, versions, network structure.
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
        rows: list[tuple[str, Sequence[object]]] = [
            ("stage_macs", self.stage_macs),
            ("head_macs", self.head_macs),
            ("stage_parameters", self.stage_parameters),
            ("head_parameters", self.head_parameters),
        ]
        optional = {
            "stage_bytes": self.stage_bytes,
            "head_bytes": self.head_bytes,
            "stage_energy_j": self.stage_energy_j,
            "head_energy_j": self.head_energy_j,
        }
        rows += [(name, row) for name, row in optional.items() if row is not None]
        joules = (*(self.stage_energy_j or ()), *(self.head_energy_j or ()))
        if not all(math.isfinite(entry) and entry >= 0.0 for entry in joules):
            raise CostError(
                f"joules must be finite and not negative, got {joules}. Measure again with "
                f"profile()."
            )
        for size, costs in self.batches.items():
            rows += [
                (f"batches[{size}].stages", costs.stages),
                (f"batches[{size}].heads", costs.heads),
            ]
        for name, row in rows:
            if len(row) != len(self.exits):
                raise CostError(
                    f"{name} has {len(row)} entries for {len(self.exits)} exits. Make the profile "
                    f"again."
                )

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

    def holds(self, cost: Cost) -> bool:
        """Whether the profile knows this cost; bytes and energy may be missing."""
        return {"bytes": self.stage_bytes, "energy": self.stage_energy_j}.get(cost, ()) is not None

    def parts(
        self, cost: Cost, *, statistic: Statistic = "mean", batch_size: int = 1
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What every stage and every head costs by itself, shallow to deep.

        Args:
            cost: "time" in seconds of a batch; "macs", "bytes" and "energy" (joules) of one sample,
                at batch size 1.
            statistic: which of the measured times is used; of time alone.
            batch_size: size of the batches that were timed; of time alone.
        Raises:
            CostError: if the profile does not hold this cost.
        """
        if cost == "time":
            batch = self.at(batch_size)
            return (
                tuple(part.of_statistic(statistic) for part in batch.stages),
                tuple(part.of_statistic(statistic) for part in batch.heads),
            )
        known = {
            "macs": (self.stage_macs, self.head_macs),
            "bytes": (self.stage_bytes, self.head_bytes),
            "energy": (self.stage_energy_j, self.head_energy_j),
        }
        checks.one_of(CostError, Cost, cost=cost)
        stages, heads = known[cost]
        if stages is None or heads is None:
            raise CostError(f"this profile says nothing about {cost}: {_MISSING[cost]}")
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
        """Cost until the answer of each exit is there, shallow to deep.

        Args:
            cost: "time" in seconds of a batch; "macs", "bytes" and "energy" (joules) of one sample,
                at batch size 1.
            mode: which heads are paid on the way; see the module's docstring.
            statistic: of time, which number of each part is added. Means add up exactly; sums of
                quantiles are upper bounds.
            batch_size: of time, a measured one.
            heads: in interruptible mode, whether each exit's head runs when it is passed (default:
                all do).
        Raises:
            CostError: if the profile does not hold this cost, or that batch size was not measured.
        """
        stages, every_head = self.parts(cost, statistic=statistic, batch_size=batch_size)
        return _cumulative(stages, every_head, mode, heads)

    def exit_free(self, cost: Cost, *, statistic: Statistic = "mean", batch_size: int = 1) -> float:
        """Cost of the untouched backbone; arguments and errors as for `parts`."""
        if cost == "time":
            return self.at(batch_size).exit_free.of_statistic(statistic)
        # raises where there is none
        stages, _ = self.parts(cost)
        whole = {
            "macs": self.exit_free_macs,
            "bytes": self.exit_free_bytes,
            "energy": self.exit_free_energy_j,
        }[cost]
        return sum(stages) if whole is None else float(whole)

    def cumulative_s(
        self,
        mode: Mode,
        *,
        statistic: Statistic = "mean",
        batch_size: int = 1,
        heads: Sequence[bool] | None = None,
    ) -> tuple[float, ...]:
        """Seconds until the answer of each exit is there; arguments as for `cumulative`."""
        return self.cumulative(
            "time", mode, statistic=statistic, batch_size=batch_size, heads=heads
        )

    def interruptible_s(
        self, *, statistic: Statistic = "mean", batch_size: int = 1
    ) -> tuple[float, ...]:
        """Seconds until each exit has answered when every exit on the way answers too (t_A in
        Impatient DNNs).
        """
        return self.cumulative_s("interruptible", statistic=statistic, batch_size=batch_size)

    def contract_s(
        self, *, statistic: Statistic = "mean", batch_size: int = 1
    ) -> tuple[float, ...]:
        """Seconds until each exit has answered when only that exit's head runs (t_B in Impatient
        DNNs).
        """
        return self.cumulative_s("contract", statistic=statistic, batch_size=batch_size)

    def exit_free_s(self, *, statistic: Statistic = "mean", batch_size: int = 1) -> float:
        """Seconds of the untouched backbone, measured in the same interleaved run."""
        return self.exit_free("time", statistic=statistic, batch_size=batch_size)

    def cumulative_macs(self, mode: Mode, heads: Sequence[bool] | None = None) -> tuple[float, ...]:
        """Multiply-accumulates until the answer of each exit is there."""
        return self.cumulative("macs", mode, heads=heads)

    def compare(self, other: CostProfile, *, any_network: bool = False) -> tuple[Comparison, ...]:
        """How many times as fast another profile is, exit by exit, and whether the noise of the two
        lets one say so.

        Two profiles were measured one after the other, so a machine that was slower on the whole
        while one of them was made shows up as a difference. For small differences measure both in
        turn: `impatient.runtime.time_in_turn`.

        Args:
            other: B; this one is A.
            any_network: compare exits of the same number although they belong to different
                networks.
        Returns:
            For each batch size in both: one row per exit, and one for the untouched backbone.
        Raises:
            StaleInput: if they are of different networks, or of one cut in different places.
            CostError: if they have different numbers of exits, or no batch size in common.
        """
        if not any_network:
            self.provenance.require(
                "profile A", "compare profiles of one network", network=other.provenance.network
            )
            if self.exits != other.exits:
                raise StaleInput(
                    f"profile A has exits after {', '.join(self.exits)}, profile B after "
                    f"{', '.join(other.exits)}; compare "
                    "profiles of one network, cut in the same places."
                )
        if self.num_exits != other.num_exits:
            raise CostError(
                f"profile A has {self.num_exits} exits, profile B {other.num_exits}; expected as "
                f"many."
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
        """What differs in where two profiles come from: engine, threads, processor, versions, ...;
        by name, A's and B's.
        """
        mine, others = (_origin(costs.provenance) for costs in (self, other))
        pairs = {
            name: (mine.get(name, "none"), others.get(name, "none")) for name in {**mine, **others}
        }
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _cumulative(
    stages: Sequence[float], heads: Sequence[float], mode: Mode, paid: Sequence[bool] | None
) -> tuple[float, ...]:
    reached = list(itertools.accumulate(stages))
    if mode == "contract":
        return tuple(stage + head for stage, head in zip(reached, heads, strict=True))
    if mode != "interruptible":
        raise CostError(f"unknown mode {mode!r}; expected 'interruptible' or 'contract'.")
    paid = [True] * len(heads) if paid is None else paid
    if len(paid) != len(heads):
        raise CostError(
            f"the mask has {len(paid)} entries for {len(heads)} exits; say of every exit whether "
            f"its head runs."
        )
    passed = itertools.accumulate(
        (head if run else 0.0 for head, run in zip(heads, paid, strict=True)), initial=0.0
    )
    # the head of the exit that answers always runs, whether or not it would when merely passed
    return tuple(
        stage + before + head for stage, before, head in zip(reached, passed, heads, strict=False)
    )


_MISSING = {
    "bytes": "it was made by an older version, or in an engine whose operators cannot be seen. "
    "Profile the network in eager "
    "mode with this version.",
    "energy": (
        "it was not measured. Profile again from Python with a meter: "
        'impatient.profile(network, x, energy=impatient.experimental.energy.find_meter("cpu")).'
    ),
}


def _compared(a: CostProfile, b: CostProfile, size: int, exit: int | None) -> Comparison:
    def taken(costs: CostProfile, statistic: Statistic) -> float:
        if exit is None:
            return costs.exit_free("time", statistic=statistic, batch_size=size)
        return costs.contract_s(statistic=statistic, batch_size=size)[exit]

    def ratio(statistic: Statistic) -> float:
        return taken(a, statistic) / taken(b, statistic) if taken(b, statistic) > 0.0 else math.nan

    noises = [costs.at(size).noise for costs in (a, b)]
    noise = math.hypot(*(known.spread for known in noises if known)) if all(noises) else None
    return Comparison(
        batch_size=size,
        exit=exit,
        name="untouched backbone" if exit is None else a.exits[exit],
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
    """What a measured time depends on, in words, by name."""
    names = ("network", "engine", "threads", "device", "processor", "dtype")
    return {name: str(getattr(made, name)) for name in names} | {
        f"{name} version": text for name, text in made.versions.items()
    }


def check_increasing(costs_s: Sequence[float]) -> tuple[float, ...]:
    """Return cumulative costs, of any kind, as floats if they are finite and strictly increasing.

    Raises:
        CostOrderError: otherwise, naming the first offender.
    """
    costs = tuple(float(cost) for cost in costs_s)
    if not costs or not all(math.isfinite(cost) and cost > 0 for cost in costs):
        raise CostOrderError(
            f"cumulative costs must be positive and finite, got {costs}. Take them from a "
            f"CostProfile."
        )
    for index, (before, after) in enumerate(itertools.pairwise(costs)):
        if after <= before:
            raise CostOrderError(
                f"cumulative costs must increase strictly, but exit {index + 1} costs {after:g} "
                f"after {before:g} at "
                f"exit {index}. Measure with more repeats, or drop an exit that costs nothing."
            )
    return costs
