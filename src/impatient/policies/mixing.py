"""Two policies mixed at random: any mean time between theirs, on the line between their accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from impatient.costs import CostProfile, Statistic
from impatient.errors import InfeasibleTarget, PolicyError
from impatient.files import read_tensors, write_tensors
from impatient.policies.gate_fitting import SweepPoint
from impatient.policies.gates import GatePolicy, RecordedFeatures, exit_times_s
from impatient.policies.rules import Policy, ThresholdPolicy
from impatient.provenance import Provenance

Pure = GatePolicy | ThresholdPolicy  # one that draws nothing


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixedPolicy:
    """For each sample, one of two policies, drawn by a seeded coin before its run and kept through all exits.

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
            raise PolicyError(f"share={self.share}; needed: a probability.")
        if self.cheap.num_exits != self.dear.num_exits:
            raise PolicyError(f"policies for {self.cheap.num_exits} and {self.dear.num_exits} exits cannot be mixed.")

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
        """Which samples of a run follow `dear`; the same for the same seed, run and number of samples."""
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
        (cheap, cheap_header), (dear, dear_header) = _parts(self.cheap), _parts(self.dear)
        arrays = {f"cheap/{name}": value for name, value in cheap.items()}
        arrays |= {f"dear/{name}": value for name, value in dear.items()}
        header = {"kind": "mixed_policy", "cheap": cheap_header, "dear": dear_header, "share": self.share, "seed": self.seed}
        write_tensors(path, arrays, header)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            StorageError, PolicyError: if the file is missing, damaged or no mixed policy.
        """
        arrays, header = read_tensors(path)
        try:
            pair = {name: _of_parts(_below(arrays, f"{name}/"), header[name]) for name in ("cheap", "dear")}
            return cls(**pair, share=header["share"], seed=header["seed"])
        except (KeyError, TypeError) as error:
            raise PolicyError(f"{path} is not a mixed policy ({error!r}); make one with mix.") from error


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
        self, exit: int, pooled: Float[Tensor, "B *D"] | None, outputs: Float[Tensor, "B C"] | None = None
    ) -> Bool[Tensor, "B"]:
        stops = torch.zeros_like(self.is_dear)
        for policy, mine in self._parts():
            if policy.looks_at(exit):
                stops |= mine & _asked(policy, exit, pooled, outputs).to(mine.device)
        given = outputs if outputs is not None else pooled
        return stops if given is None else stops.to(given.device)

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
    return GatePolicy.from_parts(arrays, header) if kind == "gate_policy" else ThresholdPolicy.from_json(header)


def _below(arrays: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def outcome_on(
    policy: Pure | MixedPolicy,
    recording: RecordedFeatures,
    costs: CostProfile,
    *,
    statistic: Statistic = "mean",
    batch_size: int = 1,
) -> tuple[Int[Tensor, "N"], Float[Tensor, "N"]]:
    """What a policy does to each recorded sample: the exit that answers, and the seconds until it has.

    Only what really runs is paid: heads that are looked at or answer, and the gates that are asked.
    """
    if isinstance(policy, MixedPolicy):
        is_dear = policy.drawn(len(recording.labels))
        pair = [outcome_on(each, recording, costs, statistic=statistic, batch_size=batch_size)
                for each in (policy.cheap, policy.dear)]  # fmt: skip
        (cheap, cheap_s), (dear, dear_s) = pair
        return torch.where(is_dear, dear, cheap), torch.where(is_dear, dear_s, cheap_s)
    if isinstance(policy, GatePolicy):
        exits = policy.exits_on(recording)
        return exits, exit_times_s(policy, costs, statistic=statistic, batch_size=batch_size)[exits]
    exits = policy.exits_of(recording.outputs)
    times = costs.cumulative_s("interruptible", statistic=statistic, batch_size=batch_size, heads=policy.open_exits())
    return exits, torch.tensor(times, dtype=torch.float64)[exits]


# --- curves -------------------------------------------------------------------------------------------------------------


def hull_of(times_s: Sequence[float], accuracies: Sequence[float]) -> tuple[int, ...]:
    """Which points are on the upper hull of accuracy over time, from the fastest to the first of the most accurate.

    Mixing two of them at random reaches every point between, and no mixture of all the points is better.

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


def _below_line(first: int, middle: int, last: int, times_s: Sequence[float], accuracies: Sequence[float]) -> bool:
    rise, run = accuracies[last] - accuracies[first], times_s[last] - times_s[first]
    return (accuracies[middle] - accuracies[first]) * run <= rise * (times_s[middle] - times_s[first])


def lower_hull(points: Sequence[SweepPoint]) -> tuple[SweepPoint, ...]:
    """The points of a sweep worth having: the lower hull of error over mean time, the fastest first."""
    kept = hull_of([point.mean_time_s for point in points], [point.accuracy for point in points])
    return tuple(points[index] for index in kept)


def mix(points: Sequence[SweepPoint], *, mean_time_s: float, seed: int = 0) -> MixedPolicy:
    """The best mixture of a sweep's policies whose mean time is, in expectation, exactly what is allowed.

    Args:
        points: of `sweep_gates`.
        mean_time_s: allowed. If it is more than the most accurate policy takes, that policy is given alone.
        seed: of the mixture's coin.
    Raises:
        InfeasibleTarget: if even the fastest takes longer.
    """
    hull = lower_hull(points)
    return mixed([point.policy for point in hull], [point.mean_time_s for point in hull], mean_time_s, seed)


def mixed(policies: Sequence[Pure], times_s: Sequence[float], mean_time_s: float, seed: int = 0) -> MixedPolicy:
    """Mix the two neighbours around a mean time; `times_s` increase strictly."""
    if not policies or not mean_time_s >= times_s[0]:
        least = f"{times_s[0]:g} s" if policies else "unknown: there is no policy"
        raise InfeasibleTarget(f"mean_time_s={mean_time_s:g} cannot be reached: the fastest takes {least}. Ask for more.")
    below = max(index for index, time_s in enumerate(times_s) if time_s <= mean_time_s)
    if below == len(policies) - 1:
        return MixedPolicy(cheap=policies[below], dear=policies[below], share=1.0, seed=seed)
    share = (mean_time_s - times_s[below]) / (times_s[below + 1] - times_s[below])
    return MixedPolicy(cheap=policies[below], dear=policies[below + 1], share=share, seed=seed)
