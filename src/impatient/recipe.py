"""How to train, as a value: needs neither torch nor a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from impatient import checks
from impatient.errors import TrainingError

Regime = Literal["joint", "frozen", "mixed"]
Augmentation = Literal["none", "crop", "crop-flip"]
Sampler = Literal["none", "alternating", "exp3", "rwm", "avgl"]
HeadDecay = Literal["plain", "scaled"]
Optimizer = Literal["sgd", "adamw"]

PHASES: dict[Regime, tuple[str, ...]] = {
    "joint": ("joint",),
    "frozen": ("heads",),
    "mixed": ("backbone", "joint"),
}


class Steps(NamedTuple):
    """When a learning rate falls, and to how much of it.

    Attributes:
        epochs: epochs of the phase after which it falls.
        factor: what remains of it each time.
    """

    epochs: tuple[float, ...]
    factor: float


class Phase(NamedTuple):
    """Consecutive epochs that train the same parameters.

    Attributes:
        name: parameters to train: "joint" (all of them), "heads" or "backbone".
        start: index of the first epoch.
        end: index after the last epoch.
    """

    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: Passes over the training split, all phases together.
        batch_size: Samples per step and process.
        lr: Peak learning rate; for adamw something like 0.001.
        momentum: Momentum of SGD, or the first beta of AdamW.
        weight_decay: Weight decay; adamw subtracts it from the weights, not through the gradient.
        schedule: Learning rate over each phase: cosine; step, a tenth after 1/2 and 3/4 of it;
            step:30,60, a tenth after 30 and 60 epochs; step:30,60:0.2, a fifth.
        warmup: Share of each phase during which the learning rate grows.
        regime: What is trained: everything, only the heads, or the backbone before everything.
        backbone_share: Share of the epochs for the backbone alone, in the mixed regime.
        label_smoothing: Label smoothing of the cross-entropy.
        augment: Random changes of images: shifts by an eighth, with or without mirroring.
        clip_norm: Largest norm of the gradient; not limited by default.
        channels_last: Memory format of convolutions; usually faster.
        sampler: Draw one exit in each step to weigh more; alternating is that of AANN.
        sampler_gamma: The drawn exit's bonus as a share of the weights' sum.
        sampler_even: Share of the drawing that exp3, rwm and avgl spread evenly; also the learning
            rate of exp3 and rwm.
        sampler_last: Reward of the last exit for them, as a share of the best other reward.
        sampler_memory: Share of its old values that avgl keeps in each step.
        equilibrium: Balance the gradients of early and deeper exits.
        detach: Share of an early exit's channels that deeper exits do not train.
        distillation: Share of early exits' loss that is learning from the last exit.
        temperature: Softmax temperature for distillation.
        head_decay: Weight decay of early heads: plain, or scaled by their exits' weights.
        seed: Seed of weights, order, augmentation, dropout, splits and the sampler.
        optimizer: SGD with momentum, or AdamW.
        nesterov: Nesterov's form of the momentum of SGD, instead of the plain one.
        backbone_lr: Peak learning rate of parameters that came from given weights; lr by default.
    """

    epochs: int = 20
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    regime: Regime = "joint"
    backbone_share: float = 0.5
    label_smoothing: float = 0.0
    augment: Augmentation = "none"
    clip_norm: float | None = None
    channels_last: bool = False
    sampler: Sampler = "none"
    sampler_gamma: float = 0.5
    equilibrium: bool = False
    detach: float = 0.0
    distillation: float = 0.0
    temperature: float = 1.0
    head_decay: HeadDecay = "plain"
    seed: int = 0
    optimizer: Optimizer = "sgd"
    nesterov: bool = True
    backbone_lr: float | None = None
    sampler_even: float = 0.3
    sampler_last: float = 0.85
    sampler_memory: float = 0.9

    def __post_init__(self) -> None:
        checks.positive(
            TrainingError,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            temperature=self.temperature,
            sampler_gamma=self.sampler_gamma,
            clip_norm=1.0 if self.clip_norm is None else self.clip_norm,
            backbone_lr=1.0 if self.backbone_lr is None else self.backbone_lr,
        )
        checks.share_below_one(
            TrainingError,
            momentum=self.momentum,
            label_smoothing=self.label_smoothing,
            warmup=self.warmup,
            detach=self.detach,
        )
        checks.not_negative(TrainingError, weight_decay=self.weight_decay, seed=self.seed)
        checks.share(TrainingError, distillation=self.distillation)
        checks.true_share(TrainingError, backbone_share=self.backbone_share)
        checks.share(
            TrainingError,
            sampler_even=self.sampler_even,
            sampler_last=self.sampler_last,
            sampler_memory=self.sampler_memory,
        )
        checks.one_of(TrainingError, Regime, regime=self.regime)
        checks.one_of(TrainingError, Augmentation, augment=self.augment)
        checks.one_of(TrainingError, Sampler, sampler=self.sampler)
        checks.one_of(TrainingError, HeadDecay, head_decay=self.head_decay)
        checks.one_of(TrainingError, Optimizer, optimizer=self.optimizer)
        if self.regime == "mixed" and self.epochs < 2:
            raise TrainingError(
                "the mixed regime needs at least 2 epochs: one for the backbone, one for "
                "everything."
            )
        longest = max(phase.end - phase.start for phase in self.phases())
        steps = self.steps(longest)
        if steps and steps.epochs[-1] >= longest:
            raise TrainingError(
                f"schedule={self.schedule!r} falls after {steps.epochs[-1]:g} epochs, but a phase "
                f"has {longest}; expected fewer. Say earlier epochs, or train for longer."
            )

    def steps(self, epochs: int) -> Steps | None:
        """Return when the learning rate falls in a phase of so many epochs.

        None for cosine.

        Raises:
            TrainingError: if the schedule cannot be read.
        """
        kind, _, rest = self.schedule.partition(":")
        if self.schedule == "step":
            return Steps((0.5 * epochs, 0.75 * epochs), 0.1)
        if self.schedule == "cosine":
            return None
        turns, _, factor = rest.partition(":")
        try:
            found = Steps(tuple(int(turn) for turn in turns.split(",")), float(factor or 0.1))
        except ValueError:
            found = Steps((), 0.0)
        rising = list(found.epochs) == sorted(set(found.epochs))
        if kind != "step" or not found.epochs or not rising or found.epochs[0] < 1:
            found = Steps((), 0.0)
        if not 0.0 < found.factor < 1.0:
            raise TrainingError(
                f"schedule={self.schedule!r}; expected cosine, step, or step:30,60 (rising epochs "
                "after which the learning rate falls to a tenth), or step:30,60:0.2 (to a fifth)."
            )
        return found

    def phases(self) -> list[Phase]:
        """Return the phases of training in order."""
        first, *others = PHASES[self.regime]
        if not others:
            return [Phase(first, 0, self.epochs)]
        turn = min(max(1, round(self.epochs * self.backbone_share)), self.epochs - 1)
        return [Phase(first, 0, turn), Phase(others[0], turn, self.epochs)]
