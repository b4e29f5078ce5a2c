"""What a policy is fitted to, and the search that meets it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

from impatient import checks
from impatient.errors import InfeasibleTarget, PolicyError
from impatient.policies.policy import Recorded, errors_of
from impatient.store import Stored

LOSS = "max_accuracy_loss"
PRICE = "time_price"


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedTo(Stored, kind="target", made_by="`impatient fit`"):
    """What a policy was fitted to, kept beside it.

    Attributes:
        name: the argument that was given, such as "max_accuracy_loss".
        wanted: its value.
        samples: size of the split that it was fitted on.
    """

    name: str
    wanted: float
    samples: int


class Reached(Protocol):
    """What a policy does on the split it was fitted on."""

    @property
    def mean_time_s(self) -> float: ...

    @property
    def accuracy(self) -> float: ...


SomePoint = TypeVar("SomePoint", bound=Reached)
# each price with what was found for it
Found = list[tuple[float, SomePoint]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a policy is fitted to.

    Attributes:
        name: the argument that was given.
        wanted: its value.
        floor: the least accuracy allowed, if the loss of accuracy is limited.
    """

    name: str
    wanted: float
    floor: float

    @classmethod
    def of(cls, recording: Recorded, **targets: float | None) -> Self:
        """Return the only target that is given.

        Raises:
            PolicyError: if none or several are given, or the value is not possible.
        """
        given = [(name, float(value)) for name, value in targets.items() if value is not None]
        if len(given) != 1:
            names = ", ".join(name for name, _ in given)
            raise PolicyError(
                f"give exactly one target of {', '.join(targets)}; given: {names or 'none'}."
            )
        [(name, wanted)] = given
        if name == LOSS:
            checks.not_negative(PolicyError, **{name: wanted})
            if wanted >= 1.0:
                raise PolicyError(
                    f"{name}={wanted:g} allows any loss; expected a share below 1, such as 0.01 "
                    "for one point."
                )
        elif name != PRICE:
            checks.positive(PolicyError, **{name: wanted})
        # room for rounding alone
        floor = 1.0 - float(errors_of(recording)[-1].mean()) - wanted - 1e-12
        return cls(name=name, wanted=wanted, floor=floor)

    def is_crossed(self, point: Reached) -> bool:
        """Whether a point lies where prices are beyond the target."""
        if self.name == LOSS:
            return point.accuracy < self.floor
        return point.mean_time_s <= self.wanted

    def search(
        self, solve: Callable[[float], SomePoint], prices: Sequence[float], steps: int
    ) -> Found[SomePoint]:
        """Solve for rising prices, then by bisection where the target is crossed."""
        found = [(price, solve(price)) for price in prices]
        low = max(
            (price for price, point in found if not self.is_crossed(point)), default=prices[0]
        )
        high = min(
            (price for price, point in found if price > low and self.is_crossed(point)),
            default=prices[-1],
        )
        return found + self.bisect(solve, low, high, steps)

    def bisect(
        self, solve: Callable[[float], SomePoint], low: float, high: float, steps: int
    ) -> Found[SomePoint]:
        """Halve a range of prices towards where the target is crossed."""
        found: Found[SomePoint] = []
        for _ in range(steps):
            middle = math.sqrt(low * high) if low > 0 else high / 2
            point = solve(middle)
            found.append((middle, point))
            low, high = (low, middle) if self.is_crossed(point) else (middle, high)
        return found

    def best(self, points: Sequence[SomePoint]) -> SomePoint:
        """Choose the best point that keeps the target.

        It is the fastest that is accurate enough, or the most accurate that is fast enough.

        Raises:
            InfeasibleTarget: if all points take longer than wanted.
        """
        if self.name == LOSS:
            kept = [point for point in points if point.accuracy >= self.floor]
            return min(kept, key=lambda point: (point.mean_time_s, -point.accuracy))
        kept = [point for point in points if point.mean_time_s <= self.wanted]
        if not kept:
            least = min(point.mean_time_s for point in points)
            raise InfeasibleTarget(
                f"{self.name}={self.wanted:g} cannot be reached: the fastest way to an answer "
                f"takes {least:g}. Ask for at least that, or use an earlier exit or a faster "
                "network."
            )
        return max(kept, key=lambda point: (point.accuracy, -point.mean_time_s))
