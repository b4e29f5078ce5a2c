"""How to train, as a value: needs neither torch nor a network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from impatient.errors import TrainingError

Schedule = Literal["cosine", "step"]
Regime = Literal["joint", "frozen", "mixed"]
Augmentation = Literal["none", "crop", "crop-flip"]
Sampler = Literal["none", "alternating", "exp3", "rwm", "avgl"]
HeadDecay = Literal["plain", "scaled"]

PHASES: dict[Regime, tuple[str, ...]] = {
    "joint": ("joint",),
    "frozen": ("heads",),
    "mixed": ("backbone", "joint"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: Passes over the training split, all phases together.
        batch_size: Samples per step and process.
        lr: Peak learning rate.
        momentum: Nesterov momentum of SGD.
        weight_decay: Weight decay of SGD.
        schedule: Learning rate over each phase; step means a tenth after 1/2 and 3/4.
        warmup: Share of each phase during which the learning rate grows.
        regime: What is trained: everything, only the heads, or the backbone before everything.
        backbone_share: Share of the epochs for the backbone alone, in the mixed regime.
        label_smoothing: Label smoothing of the cross-entropy.
        augment: Random changes of images: shifts by an eighth, with or without mirroring.
        clip_norm: Largest norm of the gradient; not limited by default.
        channels_last: Memory format of convolutions; usually faster.
        sampler: Draw one exit in each step to weigh more; alternating is that of AANN.
        sampler_gamma: The drawn exit's bonus as a share of the weights' sum.
        equilibrium: Balance the gradients of early and deeper exits.
        detach: Share of an early exit's channels that deeper exits do not train.
        distillation: Share of early exits' loss that is learning from the last exit.
        temperature: Softmax temperature for distillation.
        head_decay: Weight decay of early heads: plain, or scaled by their exits' weights.
        seed: Seed of weights, order, augmentation, dropout, splits and the sampler.
    """

    epochs: int = 20
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
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

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "temperature", "sampler_gamma", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise TrainingError(f"{name}={value}; expected a positive number.")
        for name in ("momentum", "label_smoothing", "warmup", "detach"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise TrainingError(f"{name}={value}; expected 0 or a share below 1.")
        if not 0.0 <= self.weight_decay < math.inf:
            raise TrainingError(
                f"weight_decay={self.weight_decay}; expected 0 or a positive number."
            )
        choices: dict[str, Any] = {
            "schedule": Schedule,
            "regime": Regime,
            "augment": Augmentation,
            "sampler": Sampler,
            "head_decay": HeadDecay,
        }
        for name, kind in choices.items():
            if (choice := getattr(self, name)) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise TrainingError(f"{name}={choice!r}; expected one of {known}.")
        if not 0.0 <= self.distillation <= 1.0:
            raise TrainingError(
                f"distillation={self.distillation}; expected a share between 0 and 1."
            )
        if not 0.0 < self.backbone_share < 1.0:
            raise TrainingError(
                f"backbone_share={self.backbone_share}; expected a share between 0 and 1."
            )
        if self.regime == "mixed" and self.epochs < 2:
            raise TrainingError(
                "the mixed regime needs at least 2 epochs: one for the backbone, one for "
                "everything."
            )

    def phases(self) -> list[tuple[str, int, int]]:
        """Give (name, first epoch, epoch after the last) of each phase."""
        names = PHASES[self.regime]
        if len(names) == 1:
            return [(names[0], 0, self.epochs)]
        turn = min(max(1, round(self.epochs * self.backbone_share)), self.epochs - 1)
        return [(names[0], 0, turn), (names[1], turn, self.epochs)]
