"""Exit weights that change while a network trains.

They have two layers. The base weights are given or adapted to the losses (AdaLoss). A sampler draws
one exit for every step and adds a bonus to its weight: AANN's alternating weights or a no-regret
learner. Every training loop can use them:

    weights = balancer(sieve(9), "alternating", count=9, seed=0)
    for epoch in range(epochs):
        weights.begin_epoch(epoch)
        for batch in batches:
            losses_K = ...
            weighted_loss(losses_K, weights.weights()).backward()
            weights.observe(losses_K)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from impatient import checks
from impatient.errors import StaleInput, TrainingError
from impatient.recipe import Sampler
from impatient.training.weights import check_weights, const

# Below any loss worth balancing. It keeps 1 / loss and loss / loss finite.
EPS = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """Constants of "exp3", "rwm" and "avgl", by default those of Anytime Neural Networks' authors.

    Attributes:
        even_share: share of the drawing probability that is spread evenly; also the learning rate
            of "exp3" and "rwm".
        last_reward: reward of the last exit, which has no next exit to compare with, as a share of
            the best reward.
        memory: share of the old values that "avgl" keeps in each step.
    """

    even_share: float = 0.3
    last_reward: float = 0.85
    memory: float = 0.9

    def __post_init__(self) -> None:
        checks.share(
            TrainingError,
            even_share=self.even_share,
            last_reward=self.last_reward,
            memory=self.memory,
        )


PAPER = Learner()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaLoss:
    """Base weights inversely proportional to the running average of each exit's loss.

    They minimise the sum of the logarithms of the losses, so that no exit counts more because its
    loss is larger.

    Attributes:
        momentum: share of the old running average that each step keeps; with 0, only the last step
            counts.
        update_every: number of steps between updates of the weights; every exit weighs 1 until the
            first update.
        final_extra: amount added to the last exit's weight after the largest weight has been scaled
            to 1.
        gamma: smallest weight an exit can have; the largest weight is 1.

    Source:
        AdaLoss (Hu et al. 2019, Learning anytime predictions), the authors' code, with the
        constants of its CIFAR scripts.
        We differ: 1 / (average + 1e-8), where the code has 1 / average + 1e-8, which does not
            protect against 0.
    """

    momentum: float = 0.99
    update_every: int = 100
    final_extra: float = 1.0
    gamma: float = 0.07

    def __post_init__(self) -> None:
        checks.share_below_one(TrainingError, momentum=self.momentum)
        checks.at_least(TrainingError, 1, update_every=self.update_every)
        checks.not_negative(TrainingError, final_extra=self.final_extra)
        checks.share(TrainingError, gamma=self.gamma)


class Balancer:
    """Exit weights for every step of a training run.

    Those of this class never change. Each step calls `weights` once before the backward pass and
    `observe` once after it.
    """

    def __init__(self, base: Sequence[float]) -> None:
        self.base = torch.tensor(base, dtype=torch.float64)

    def weights(self) -> Float[Tensor, "K"]:
        """Return the weights for the next step, float32 on the CPU.

        A sampler draws another exit at every call.
        """
        return self.base.float()

    def observe(self, losses_K: Float[Tensor, "K"]) -> None:
        """Learn from a step's mean loss per exit.

        With several processes, give the mean over all of them. Otherwise their weights would
        diverge. A step whose losses are not all finite changes nothing.
        """

    def begin_epoch(self, epoch: int) -> None:
        """Tell which epoch, from 0, the next steps belong to."""

    def state(self) -> dict[str, Any]:
        """Return everything that changes, as plain values for a JSON file."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, bit for bit.

        Raises:
            StaleInput: if the state is from another kind of balancer or number of exits.
        """
        if _sizes(state) != _sizes(self.state()):
            raise StaleInput(
                f"this state belongs to other exit weights: it has {_sizes(state)} (numbers per "
                f"entry), expected {_sizes(self.state())}. Continue with the weights and the "
                "sampler it was made with, or start again."
            )


def _sizes(state: Mapping[str, Any]) -> dict[str, int]:
    return {name: len(value) if isinstance(value, list) else 1 for name, value in state.items()}


def balancer(
    base: Sequence[float] | AdaLoss,
    sampler: str = "none",
    *,
    count: int,
    gamma: float = 0.5,
    seed: int = 0,
    learner: Learner = PAPER,
) -> Balancer:
    """Make exit weights for every step of a training run.

    Args:
        base: base weight of each exit, such as `sieve(count)`, or `AdaLoss`.
        sampler: rule by which one exit in each step gets a bonus. "none" gives no bonus.
            "alternating" draws the exit in proportion to the base weights. "exp3", "rwm" and "avgl"
            learn, from the second epoch on, to draw the exits that the next one improves on most.
        count: number of exits.
        gamma: bonus of the drawn exit, as a share of the sum of the base weights.
        seed: seed of a separate generator for the draws; other random numbers do not change.
        learner: constants of "exp3", "rwm" and "avgl".
    Raises:
        TrainingError: if the base does not fit the number of exits or the sampler is unknown.
    Source:
        Anytime Neural Networks, section 4 (alternating weights, AANN) and appendix (the learners,
        which the paper found not better). The mean of alternating weights is the base times 1 +
        gamma.
    Example:
        >>> alternating = balancer([0.5, 0.5, 1.0], "alternating", count=3)
        >>> alternating.weights().tolist()  # half of the sum, 1, goes to one exit
        [0.5, 0.5, 2.0]
    """
    checks.one_of(TrainingError, Sampler, sampler=sampler)
    checks.not_negative(TrainingError, gamma=gamma)
    inner = (
        _Adaptive(base, count)
        if isinstance(base, AdaLoss)
        else Balancer(check_weights(base, count))
    )
    if sampler == "none":
        return inner
    return _Sampled(inner, sampler, count, bonus=gamma, seed=seed, learner=learner)


# --- the rules, as plain functions ----------------------------------------------------------------


def adaloss_weights(averages_K: Float[Tensor, "K"], settings: AdaLoss) -> Float[Tensor, "K"]:
    """Compute AdaLoss's weights, between gamma and 1, from running averages of losses.

    Example:
        >>> adaloss_weights(torch.tensor([2.0, 1.0, 0.5]), AdaLoss(final_extra=0.0, gamma=0.0))
        tensor([0.2500, 0.5000, 1.0000])
    """
    weights = 1.0 / (averages_K.clamp(min=0.0) + EPS)
    weights = weights / weights.max()
    weights[-1] += settings.final_extra
    return (1.0 - settings.gamma) * weights / weights.max() + settings.gamma


def rewards(losses_K: Float[Tensor, "K"], last_reward_rate: float) -> Float[Tensor, "K"]:
    """Compute the relative decrease from each exit's loss to the next one's.

    A reward is at most 1. The last exit's reward is `last_reward_rate` times the best of the other
    rewards, and 0 if there are no others. Where a loss is 0, the divisor is 1e-8 instead: the
    reward is 0 if the next loss is 0, too, and very negative if it is not.

    Source:
        Anytime Neural Networks, appendix: r[i] = 1 - loss[i + 1] / loss[i], r[L] = C max r.
    """
    losses = losses_K.clamp(min=0.0)
    early = (losses[:-1] - losses[1:]) / losses[:-1].clamp(min=EPS)
    last = last_reward_rate * early.max() if len(early) else torch.zeros((), dtype=losses.dtype)
    return torch.cat([early, last[None]])


def mixed(values_K: Float[Tensor, "K"], gamma: float) -> Float[Tensor, "K"]:
    """Make probabilities in proportion to the values, with a share spread evenly.

    Args:
        values_K: non-negative values; if all are 0, the probabilities are equal.
        gamma: share of the probability that is spread evenly.
    """
    even = torch.full_like(values_K, 1.0 / len(values_K))
    total = values_K.sum()
    return (1.0 - gamma) * (values_K / total if total > 0.0 else even) + gamma * even


def draw(probabilities_K: Float[Tensor, "K"], uniform: float) -> int:
    """Return the exit at which the running sum of probabilities passes a number.

    An exit of probability 0 is never drawn.

    Args:
        probabilities_K: probability of each exit, up to a common factor.
        uniform: number in [0, 1), drawn from the uniform distribution.
    """
    ends = probabilities_K.cumsum(0)
    return int(
        torch.searchsorted(ends / ends[-1], torch.tensor(uniform, dtype=ends.dtype), right=True)
    )


def exp3(
    values_K: Float[Tensor, "K"],
    rewards_K: Float[Tensor, "K"],
    drawn: int,
    probability: float,
    gamma: float,
) -> Float[Tensor, "K"]:
    """Return EXP3's values after a step.

    The value of the drawn exit is multiplied by exp(gamma reward / (probability K)).
    """
    gains = torch.zeros_like(values_K)
    gains[drawn] = gamma * rewards_K[drawn] / (probability * len(values_K))
    return _grown(values_K, gains, gamma)


def rwm(
    values_K: Float[Tensor, "K"], rewards_K: Float[Tensor, "K"], gamma: float
) -> Float[Tensor, "K"]:
    """Return the values of randomised weighted majority after a step.

    Every value is multiplied by exp(gamma reward / 2).
    """
    return _grown(values_K, 0.5 * gamma * rewards_K, gamma)


def avgl(
    values_K: Float[Tensor, "K"], rewards_K: Float[Tensor, "K"], memory: float = 0.9
) -> Float[Tensor, "K"]:
    """Return AVGL's values after a step.

    Each value is `memory` times the old one plus the reward, and at least 0.
    """
    return (memory * values_K + rewards_K).clamp(min=0.0)


def _grown(values_K: Tensor, gains_K: Tensor, gamma: float) -> Tensor:
    # A softmax of the logarithms: if all rewards are very negative, exp would be 0 for every exit
    # and the learned values would be lost.
    return mixed(torch.softmax(values_K.log() + gains_K, 0), 0.001 * gamma)


# --- the balancers, which keep state --------------------------------------------------------------


class _Adaptive(Balancer):
    """Balancer that follows the losses by AdaLoss."""

    def __init__(self, settings: AdaLoss, count: int) -> None:
        super().__init__(const(count))
        self.settings = settings
        self.averages = torch.zeros_like(self.base)
        self.steps = 0

    def observe(self, losses_K: Tensor) -> None:
        losses = _finite_losses(losses_K, len(self.base))
        if losses is None:
            return
        # The average starts at the first losses, not at 0.
        momentum = self.settings.momentum if self.steps else 0.0
        self.averages = momentum * self.averages + (1.0 - momentum) * losses
        self.steps += 1
        if self.steps % self.settings.update_every == 0:
            self.base = adaloss_weights(self.averages, self.settings)

    def state(self) -> dict[str, Any]:
        return {"base": self.base.tolist(), "averages": self.averages.tolist(), "steps": self.steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.base = torch.tensor(state["base"], dtype=torch.float64)
        self.averages = torch.tensor(state["averages"], dtype=torch.float64)
        self.steps = state["steps"]


class _Sampled(Balancer):
    """Balancer that adds a bonus for one drawn exit to another balancer."""

    def __init__(
        self,
        inner: Balancer,
        sampler: str,
        count: int,
        *,
        bonus: float,
        seed: int,
        learner: Learner,
    ) -> None:
        self.inner = inner
        self.learner = learner
        self.sampler = sampler
        self.bonus = bonus
        self.random = np.random.default_rng(seed)
        # The sum of rewards of avgl starts at 0. The values of the others start equal.
        self.values = torch.full(
            (count,), 0.0 if sampler == "avgl" else 1.0 / count, dtype=torch.float64
        )
        # -1: no exit has been drawn yet
        self.drawn = -1
        self.epoch = 0

    def weights(self) -> Tensor:
        weights = self.inner.weights()
        probabilities = (
            mixed(weights.double(), 0.0) if self.sampler == "alternating" else self._learned()
        )
        self.drawn = draw(probabilities, self.random.random())
        weights[self.drawn] += self.bonus * weights.sum()
        return weights

    def observe(self, losses_K: Tensor) -> None:
        self.inner.observe(losses_K)
        losses = _finite_losses(losses_K, len(self.values))
        if losses is None or self.sampler == "alternating" or self.epoch < 1:
            return
        gained = rewards(losses, self.learner.last_reward)
        if self.sampler == "rwm":
            self.values = rwm(self.values, gained, self.learner.even_share)
        elif self.sampler == "avgl":
            self.values = avgl(self.values, gained, self.learner.memory)
        elif self.drawn >= 0:
            self.values = exp3(
                self.values,
                gained,
                self.drawn,
                float(self._learned()[self.drawn]),
                self.learner.even_share,
            )

    def _learned(self) -> Tensor:
        return mixed(self.values, self.learner.even_share)

    def begin_epoch(self, epoch: int) -> None:
        self.inner.begin_epoch(epoch)
        self.epoch = epoch

    def state(self) -> dict[str, Any]:
        return {
            "inner": self.inner.state(),
            "values": self.values.tolist(),
            "drawn": self.drawn,
            "epoch": self.epoch,
            "random": dict(self.random.bit_generator.state),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.inner.restore(state["inner"])
        self.values = torch.tensor(state["values"], dtype=torch.float64)
        self.drawn = state["drawn"]
        self.epoch = state["epoch"]
        self.random.bit_generator.state = state["random"]


def _finite_losses(losses_K: Tensor, count: int) -> Tensor | None:
    """Return losses as doubles on the CPU, or None if not finite."""
    if losses_K.shape != (count,):
        raise TrainingError(
            f"losses of shape {tuple(losses_K.shape)}; expected the mean loss of each of {count} "
            "exits."
        )
    losses = losses_K.detach().to("cpu", torch.float64)
    return losses if bool(torch.isfinite(losses).all()) else None
