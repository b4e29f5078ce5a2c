"""Ensembles over the exits: pure rules that make one output of those of all exits so far.

An exit that answers alone throws away what the exits before it have found out. A rule keeps it, for
the price of their heads, and mostly answers better, and takes back less often what an earlier exit
had right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from impatient.errors import PolicyError

RuleName = Literal["boosted", "arithmetic", "geometric", "poe", "caching"]

# Log-probability of a class that a product has ruled out: 2e-9, nothing as a probability and finite
# as a loss.
RULED_OUT = -20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule and its settings.

    Attributes:
        name: one of
            "boosted": F_k = f_k + rate F_(k-1); for networks trained so. The result is logits.
            "arithmetic": mean of the probabilities.
            "geometric": mean of the log-probabilities, normalised.
            "poe": product of experts, expert k being ReLU(f_k) ** ((k + 1) / K), normalised. A
            class that one exit holds below zero is out for all deeper ones. Where no class is left,
            the exit's own probabilities. "caching": the output of the surest exit so far, the
            earliest of equals: the largest probability never falls from exit to exit, whatever the
            temperatures before. A recalibration after it may let it fall again. All but "boosted"
            and "caching" give log-probabilities, which softmax leaves as they are.
        rate: of "boosted".
        detach: "boosted": no gradient into F_(k-1), so that each exit learns what those before it
            leave over.
        weights: of "geometric": "equal", or "depth" for k + 1.
    Source:
        "boosted": Yu et al. 2023 (BoostNet), rate 0.5. "geometric": Wolczyk et al. 2021 (ZTW); we
        differ: no learned weights and bias. "poe", "caching": Jazbec et al. 2023; we differ: a
        ruled out class keeps 2e-9, so that losses and recordings stay finite; and of exits that are
        equally sure their code takes the latest, but here an answer is taken back only for a surer
        one.
    """

    name: RuleName
    rate: float = 0.5
    detach: bool = True
    weights: Literal["equal", "depth"] = "equal"

    def __post_init__(self) -> None:
        if self.name not in get_args(RuleName):
            raise PolicyError(
                f"unknown rule {self.name!r} to combine outputs; expected one of "
                f"{', '.join(get_args(RuleName))}."
            )
        if not math.isfinite(self.rate):
            raise PolicyError(f"rate={self.rate}; expected a finite number, such as 0.5.")
        if self.weights not in ("equal", "depth"):
            raise PolicyError(f"weights={self.weights!r}; expected 'equal' or 'depth'.")

    @classmethod
    def of(cls, rule: RuleName | Rule) -> Rule:
        """A rule by its name, with the usual settings, or as given."""
        return rule if isinstance(rule, Rule) else cls(name=rule)


def combine(
    outputs: Float[Tensor, "K ... C"] | Sequence[Float[Tensor, "... C"]],
    rule: RuleName | Rule,
    *,
    temperatures: Sequence[float] | Tensor | None = None,
    recalibration: Sequence[float] | Tensor | None = None,
) -> Float[Tensor, "K ... C"]:
    """Combine the outputs of exits 0 to k, for every k.

    Args:
        outputs: of all K exits, before softmax.
        rule: by name, or with settings of its own.
        temperatures: K positive numbers that the exits' outputs are divided by first.
        recalibration: likewise, for the combined outputs; changes no answer, only how sure it is.
    Returns:
        K combined outputs, before softmax, in single precision or better.
    Raises:
        PolicyError: if the rule is unknown, or there are not K positive temperatures.
    Example:
        >>> combine(torch.tensor([[2.0, 1.0, -1.0], [1.0, 4.0, 0.0]]), "poe").exp().round(decimals=3)
        tensor([[0.5860, 0.4140, 0.0000],
                [0.2610, 0.7390, 0.0000]])
    """
    running = Running(rule, len(outputs), temperatures=temperatures, recalibration=recalibration)
    return torch.stack(running.add_all(outputs))


class Running:
    """Combines the outputs of one run as they come; gives what `combine` gives.

    Args:
        rule, temperatures, recalibration: as for `combine`.
        count: the number K of exits.
    Example:
        >>> running = Running("boosted", 2)
        >>> running.add(torch.tensor([4.0, 0.0])), running.add(torch.tensor([0.0, 1.0]))
        (tensor([4., 0.]), tensor([2., 1.]))
    """

    def __init__(
        self,
        rule: RuleName | Rule,
        count: int,
        *,
        temperatures: Sequence[float] | Tensor | None = None,
        recalibration: Sequence[float] | Tensor | None = None,
    ) -> None:
        self.rule = Rule.of(rule)
        self.count = count
        self._temperatures = as_temperatures(temperatures, count)
        self._recalibration = as_temperatures(recalibration, count)
        self._past: Any = None
        self._next = 0

    def add(
        self, output: Float[Tensor, "... C"], exit: int | None = None
    ) -> Float[Tensor, "... C"]:
        """Take in one more output.

        Args:
            output: of the exit, before softmax.
            exit: where it comes from, where exits were left out; by default the next one.
        Returns:
            The combined output of all exits so far.
        """
        index = self._next if exit is None else exit
        if not self._next <= index < self.count:
            raise PolicyError(
                f"an output of exit {index} after {self._next} of {self.count}; add each once, "
                "shallow to deep."
            )
        self._next = index + 1
        output = output if output.dtype == torch.float64 else output.float()
        if self._temperatures is not None:
            output = output / self._temperatures[index]
        self._past, combined = RULES[self.rule.name](
            self.rule, self._past, output, index, self.count
        )
        return combined if self._recalibration is None else combined / self._recalibration[index]

    def add_all(
        self, outputs: Iterable[Float[Tensor, "... C"]]
    ) -> tuple[Float[Tensor, "... C"], ...]:
        """Take in several, in order."""
        return tuple(self.add(output) for output in outputs)


def as_temperatures(
    values: Sequence[float] | Tensor | None, count: int
) -> Float[Tensor, "K"] | None:
    """Temperatures as a tensor, checked; a tensor is taken as it is, since looking into it would
    wait for its device.
    """
    if values is None or isinstance(values, Tensor):
        if values is not None and values.shape != (count,):
            raise PolicyError(
                f"temperatures of shape {tuple(values.shape)} for {count} exits; give one per exit."
            )
        return values
    if len(values) != count or not all(math.isfinite(value) and value > 0 for value in values):
        raise PolicyError(
            f"temperatures {tuple(values)} for {count} exits; expected a positive finite number "
            "per exit."
        )
    return torch.tensor(values, dtype=torch.float32)


# One step of a rule: what is kept of the outputs before (None at first), the output, its exit and K
# -> what is kept now, and the combined output.
Step = Callable[[Rule, Any, Tensor, int, int], tuple[Any, Tensor]]


def _boosted(
    rule: Rule, past: Tensor | None, output: Tensor, _exit: int, _count: int
) -> tuple[Tensor, Tensor]:
    if past is not None:
        output = output + rule.rate * (past.detach() if rule.detach else past)
    return output, output


def _arithmetic(
    _rule: Rule, past: Tensor | None, output: Tensor, _exit: int, _count: int
) -> tuple[Tensor, Tensor]:
    logs = output.log_softmax(-1)
    total = logs if past is None else torch.logaddexp(past, logs)
    # normalising the sum divides it by the number of exits
    return total, total.log_softmax(-1)


def _geometric(
    rule: Rule, past: tuple[Tensor, float] | None, output: Tensor, exit: int, _count: int
) -> tuple[tuple[Tensor, float], Tensor]:
    weight = exit + 1.0 if rule.weights == "depth" else 1.0
    total = weight * output.log_softmax(-1)
    if past is not None:
        total = past[0] + total
        weight = past[1] + weight
    return (total, weight), (total / weight).log_softmax(-1)


def _poe(
    _rule: Rule, past: Tensor | None, output: Tensor, exit: int, count: int
) -> tuple[Tensor, Tensor]:
    inside = output > 0
    # the inner where keeps log(0) out of the gradient
    expert = torch.where(
        inside, torch.where(inside, output, 1.0).log() * ((exit + 1) / count), -math.inf
    )
    product = expert if past is None else past + expert
    empty = (product == -math.inf).all(-1, keepdim=True)
    return product, torch.where(empty, output, product).log_softmax(-1).clamp(min=RULED_OUT)


def _caching(
    _rule: Rule, past: Tensor | None, output: Tensor, _exit: int, _count: int
) -> tuple[Tensor, Tensor]:
    if past is not None:
        surer = output.softmax(-1).amax(-1, keepdim=True) > past.softmax(-1).amax(-1, keepdim=True)
        output = torch.where(surer, output, past)
    return output, output


RULES: Mapping[str, Step] = {
    "boosted": _boosted,
    "arithmetic": _arithmetic,
    "geometric": _geometric,
    "poe": _poe,
    "caching": _caching,
}
