"""When to stop: thresholds on how sure an output is, as `impatient.policies` has them, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .staged import Array


def probabilities(outputs: Array) -> Array:
    """Softmax over the last dimension, in float32."""
    return np.exp(_log_softmax(outputs))


def _log_softmax(outputs: Array) -> Array:
    shifted = outputs.astype(np.float32)
    shifted = shifted - shifted.max(-1, keepdims=True)
    logs: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs


def max_probability(outputs: Array) -> Array:
    """Largest class probability, in [1/C, 1]."""
    largest: Array = probabilities(outputs).max(-1)
    return largest


def margin(outputs: Array) -> Array:
    """Difference between the two largest class probabilities, in [0, 1]."""
    if outputs.shape[-1] < 2:
        return np.ones(outputs.shape[:-1], np.float32)
    two = np.partition(probabilities(outputs), -2)[..., -2:]
    difference: Array = two[..., 1] - two[..., 0]
    return difference


def entropy(outputs: Array) -> Array:
    """One minus the entropy of the class probabilities over its maximum, in [0, 1]."""
    if outputs.shape[-1] < 2:
        return np.ones(outputs.shape[:-1], np.float32)
    logs = _log_softmax(outputs)
    score: Array = 1.0 + (np.exp(logs) * logs).sum(-1) / np.float32(math.log(outputs.shape[-1]))
    return score


SCORES: dict[str, Callable[[Array], Array]] = {
    "max_probability": max_probability,
    "margin": margin,
    "entropy": entropy,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Stop at the first exit whose score reaches its threshold; `inf` closes an exit, so that its
    head never runs.
    """

    score: str
    thresholds: tuple[float, ...]

    def looks_at(self, exit: int) -> bool:
        """Whether the output of this exit is wanted."""
        return self.thresholds[exit] < math.inf

    def stops(self, exit: int, outputs: Array) -> Array:
        """Which samples are done at this exit; at the last one, all."""
        if exit == len(self.thresholds) - 1:
            return np.ones(len(outputs), bool)
        done: Array = SCORES[self.score](outputs) >= np.float32(self.thresholds[exit])
        return done
