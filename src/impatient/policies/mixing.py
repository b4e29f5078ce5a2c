"""Two policies mixed at random: any mean time between theirs, on the line between their accuracies."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from impatient.errors import InfeasibleTarget, PolicyError
from impatient.files import entries_under, read_tensors, write_tensors
from impatient.policies.gate_fitting import SweepPoint
from impatient.policies.gates import GatePolicy
from impatient.policies.rules import Policy, ThresholdPolicy
from impatient.provenance import Provenance

# one that draws nothing
Pure = GatePolicy | ThresholdPolicy


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixedPolicy:
    """For each sample, one of two policies, drawn by a seeded coin before its run and kept through
    all exits.

    Attributes:
        cheap, dear: the two.
        share: probability of `dear`.
        seed: of the coin.
    """

    cheap: Pure
    dear: Pure
    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise PolicyError(f"share={self.share}; expected a probability.")
        if self.cheap.num_exits != self.dear.num_exits:
            raise PolicyError(
                f"policies for {self.cheap.num_exits} and {self.dear.num_exits} exits cannot be "
                f"mixed."
            )

    @property
    def num_exits(self) -> int:
        return self.cheap.num_exits

    @property
    def split(self) -> str | None:
        return self.dear.split or self.cheap.split

    @property
    def provenance(self) -> Provenance | None:
        return self.dear.provenance or self.cheap.provenance

    def drawn(self, samples: int, run: int = 0) -> Bool[Tensor, "N"]:
        """Which samples of a run follow `dear`; the same for the same seed, run and number of
        samples.
        """
        coin = torch.Generator().manual_seed(self.seed * 1_000_003 + run)
        return torch.rand(samples, generator=coin) < self.share

    def for_run(self, samples: int, run: int = 0) -> Policy:
        """The rule of one run: a policy whose samples are drawn, so that all exits agree on them.

        Args:
            samples: batch size.
            run: its number; count runs, or each would draw the same.
        """
        return _Drawn(cheap=self.cheap, dear=self.dear, is_dear=self.drawn(samples, run))

    def save(self, path: str | Path) -> None:
        """Write as safetensors with a JSON header."""
        (cheap, cheap_header) = _parts(self.cheap)
        (dear, dear_header) = _parts(self.dear)
        arrays = {f"cheap/{name}": value for name, value in cheap.items()}
        arrays |= {f"dear/{name}": value for name, value in dear.items()}
        header = {
            "kind": "mixed_policy",
            "cheap": cheap_header,
            "dear": dear_header,
            "share": self.share,
            "seed": self.seed,
        }
        write_tensors(path, arrays, header)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            StorageError, PolicyError: if the file is missing, damaged or no mixed policy.
        """
        arrays, header = read_tensors(path)
        try:
            pair = {
                name: _of_parts(entries_under(f"{name}/", arrays), header[name])
                for name in ("cheap", "dear")
            }
            return cls(**pair, share=header["share"], seed=header["seed"])
        except (KeyError, TypeError) as error:
            raise PolicyError(
                f"{path} is not a mixed policy ({error!r}); make one with mix."
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Drawn:
    cheap: Pure
    dear: Pure
    is_dear: Bool[Tensor, "B"]

    @property
    def num_exits(self) -> int:
        return self.cheap.num_exits

    @property
    def inputs(self) -> str:
        wanted = {_inputs(policy) for policy, _ in self._parts()}
        return wanted.pop() if len(wanted) == 1 else "both"

    def looks_at(self, exit: int) -> bool:
        return any(policy.looks_at(exit) for policy, _ in self._parts())

    def stops(self, exit: int, outputs: Float[Tensor, "B C"]) -> Bool[Tensor, "B"]:
        return self.stops_on(exit, None, outputs)

    def stops_on(
        self,
        exit: int,
        pooled: Float[Tensor, "B *D"] | None,
        outputs: Float[Tensor, "B C"] | None = None,
    ) -> Bool[Tensor, "B"]:
        stops = torch.zeros_like(self.is_dear)
        for policy, mine in self._parts():
            if policy.looks_at(exit):
                stops |= mine & _asked(policy, exit, pooled, outputs).to(mine.device)
        given = outputs if outputs is not None else pooled
        return stops if given is None else stops.to(given.device)

    def for_rows(self, rows: Int[Tensor, "R"]) -> Self:
        """The rule for these samples of the batch, when it goes on with them only."""
        return dataclasses.replace(self, is_dear=self.is_dear[rows.to(self.is_dear.device)])

    def _parts(self) -> list[tuple[Pure, Tensor]]:
        pairs = [(self.cheap, ~self.is_dear), (self.dear, self.is_dear)]
        return [(policy, mine) for policy, mine in pairs if bool(mine.any())]


def _inputs(policy: Pure) -> str:
    return policy.inputs if isinstance(policy, GatePolicy) else "confidences"


def _asked(policy: Pure, exit: int, pooled: Tensor | None, outputs: Tensor | None) -> Tensor:
    if isinstance(policy, GatePolicy):
        return policy.stops_on(exit, pooled, outputs)
    if outputs is None:
        raise PolicyError("thresholds look at outputs; give stops_on the outputs of the exit.")
    return policy.stops(exit, outputs)


def _parts(policy: Pure) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return policy.to_parts() if isinstance(policy, GatePolicy) else ({}, policy.to_json())


def _of_parts(arrays: Mapping[str, Tensor], header: Mapping[str, Any]) -> Pure:
    kind = header["kind"]
    return (
        GatePolicy.from_parts(arrays, header)
        if kind == "gate_policy"
        else ThresholdPolicy.from_json(header)
    )


# --- curves ---------------------------------------------------------------------------------------


def hull_of(times_s: Sequence[float], accuracies: Sequence[float]) -> tuple[int, ...]:
    """Which points are on the upper hull of accuracy over time, from the fastest to the first of
    the most accurate.

    Mixing two of them at random reaches every point between, and no mixture of all the points is
    better.

    Example:
        >>> hull_of([1.0, 2.0, 3.0, 4.0], [0.5, 0.6, 0.9, 0.9])
        (0, 2)
    """
    order = sorted(range(len(times_s)), key=lambda point: (times_s[point], -accuracies[point]))
    hull: list[int] = []
    for point in order:
        if hull and accuracies[point] <= accuracies[hull[-1]]:
            continue
        while len(hull) > 1 and _below_line(hull[-2], hull[-1], point, times_s, accuracies):
            hull.pop()
        hull.append(point)
    return tuple(hull)


def _below_line(
    first: int, middle: int, last: int, times_s: Sequence[float], accuracies: Sequence[float]
) -> bool:
    rise = accuracies[last] - accuracies[first]
    run = times_s[last] - times_s[first]
    return (accuracies[middle] - accuracies[first]) * run <= rise * (
        times_s[middle] - times_s[first]
    )


def lower_hull(points: Sequence[SweepPoint]) -> tuple[SweepPoint, ...]:
    """The points of a sweep worth having: the lower hull of error over mean time, the fastest
    first.
    """
    kept = hull_of([point.mean_time_s for point in points], [point.accuracy for point in points])
    return tuple(points[index] for index in kept)


def neighbours(
    times_s: Sequence[float], accuracies: Sequence[float], mean_time_s: float
) -> tuple[int, int, float]:
    """The two neighbours on the hull around a mean time, and the share of the slower with which it
    is met in expectation.

    More time than the most accurate one needs is not used.

    Raises:
        InfeasibleTarget: if even the fastest takes longer.
    """
    hull = hull_of(times_s, accuracies)
    if not hull or not mean_time_s >= times_s[hull[0]]:
        least = f"{times_s[hull[0]]:g} s" if hull else "unknown: there is no policy"
        raise InfeasibleTarget(
            f"mean_time_s={mean_time_s:g} cannot be reached: the fastest takes {least}. Ask for "
            f"more."
        )
    for fast, slow in itertools.pairwise(hull):
        if mean_time_s < times_s[slow]:
            return fast, slow, (mean_time_s - times_s[fast]) / (times_s[slow] - times_s[fast])
    return hull[-1], hull[-1], 1.0


def mix(points: Sequence[SweepPoint], *, mean_time_s: float, seed: int = 0) -> MixedPolicy:
    """The best mixture of a sweep's policies whose mean time is, in expectation, exactly what is
    allowed.

    Args:
        points: of `sweep_gates`.
        mean_time_s: allowed. If it is more than the most accurate policy takes, that policy is
            given alone.
        seed: of the mixture's coin.
    Raises:
        InfeasibleTarget: if even the fastest takes longer.
    """
    times = [point.mean_time_s for point in points]
    accuracies = [point.accuracy for point in points]
    fast, slow, share = neighbours(times, accuracies, mean_time_s)
    return MixedPolicy(cheap=points[fast].policy, dear=points[slow].policy, share=share, seed=seed)
