"""Rules that combine the outputs of all exits so far into one output.

An exit that answers alone ignores the outputs of earlier exits. A rule uses them at the cost of
their heads. It mostly answers better, and less often loses a correct answer of an earlier exit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from impatient import checks
from impatient.errors import PolicyError

RuleName = Literal["boosted", "arithmetic", "geometric", "poe", "caching"]

# Log-probability of a class that a product has ruled out. The probability, 2e-9, is negligible, and
# the loss stays finite.
RULED_OUT = -20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule that combines outputs, with its settings.

    Let f_k be the output of exit k of K. The rules "boosted" and "caching" give logits. The others
    give log-probabilities, which softmax does not change.

    * "boosted": F_k = f_k + rate F_(k-1), for networks trained with this rule.
    * "arithmetic": mean of the probabilities.
    * "geometric": mean of the log-probabilities, normalised.
    * "poe": product of experts, where expert k is ReLU(f_k) ** ((k + 1) / K), normalised. A class
      whose output at one exit is not positive is ruled out for all deeper exits. If no class is
      left, the probabilities are those of the present exit.
    * "caching": output of the surest exit so far, the earliest if several are equal. The largest
      probability never decreases from exit to exit, whatever the temperatures. With recalibration
      it may decrease.

    Attributes:
        name: "boosted", "arithmetic", "geometric", "poe" or "caching".
        rate: factor of the earlier outputs in "boosted".
        detach: whether "boosted" stops the gradient into F_(k-1), so that each exit learns what
            earlier exits leave over.
        weights: weights of the exits in "geometric": "equal", or "depth" for k + 1.
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
        checks.one_of(PolicyError, RuleName, rule=self.name)
        if not math.isfinite(self.rate):
            raise PolicyError(f"rate={self.rate}; expected a finite number, such as 0.5.")
        checks.one_of(PolicyError, ("equal", "depth"), weights=self.weights)

    @classmethod
    def of(cls, rule: RuleName | Rule) -> Rule:
        """Return a rule by its name with default settings, or the given rule."""
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
        outputs: outputs of all K exits, before softmax.
        rule: name of a rule, or a `Rule` with its settings.
        temperatures: K positive numbers by which the exits' outputs are divided first.
        recalibration: K positive numbers by which the combined outputs are divided; they change no
            answer, only how sure it is.
    Returns:
        K combined outputs, before softmax, in single precision or better.
    Raises:
        PolicyError: if the rule is unknown, or there are not K positive temperatures.
    Example:
        >>> outputs = torch.tensor([[2.0, 1.0, -1.0], [1.0, 4.0, 0.0]])
        >>> combine(outputs, "poe").exp().round(decimals=3)
        tensor([[0.5860, 0.4140, 0.0000],
                [0.2610, 0.7390, 0.0000]])
    """
    running = Running(rule, len(outputs), temperatures=temperatures, recalibration=recalibration)
    return torch.stack(running.add_all(outputs))


class Running:
    """Combine the outputs of one run as they come, as `combine` does.

    Args:
        rule: name of a rule, or a `Rule` with its settings.
        count: number K of exits.
        temperatures: K positive numbers by which the exits' outputs are divided first.
        recalibration: K positive numbers by which the combined outputs are divided.
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
        """Add the output of one more exit.

        Args:
            output: output of the exit, before softmax.
            exit: number of the exit, which may leave out others; the default is the next one.
        Returns:
            The combined output of all exits so far.
        """
        index = self._next if exit is None else exit
        if not self._next <= index < self.count:
            raise PolicyError(
                f"an output of exit {index} after {self._next} of {self.count}; expected each exit "
                "once, from shallow to deep."
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
        """Add the outputs of several exits, in order."""
        return tuple(self.add(output) for output in outputs)


def as_temperatures(
    values: Sequence[float] | Tensor | None, count: int
) -> Float[Tensor, "K"] | None:
    """Check temperatures, and return them as a tensor.

    The values of a tensor are not checked, because that would wait for its device.
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


# One step of a rule takes the state kept of earlier outputs (None at first), the output, its exit
# and K. It returns the new state and the combined output.
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
    # Normalising the sum divides it by the number of exits.
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
    # The inner `where` keeps log(0) out of the gradient.
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
