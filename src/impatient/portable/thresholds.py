"""Threshold policies and scores of `impatient.policies`, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .staged import Array


def probabilities(outputs: Array) -> Array:
    """Compute the softmax over the last dimension, in float32."""
    return np.exp(_log_softmax(outputs))


def _log_softmax(outputs: Array) -> Array:
    shifted = outputs.astype(np.float32)
    shifted = shifted - shifted.max(-1, keepdims=True)
    logs: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs


def max_probability(outputs: Array) -> Array:
    """Return the largest class probability, in [1/C, 1]."""
    largest: Array = probabilities(outputs).max(-1)
    return largest


def margin(outputs: Array) -> Array:
    """Return the difference of the two largest class probabilities, in [0, 1]."""
    if outputs.shape[-1] < 2:
        return np.ones(outputs.shape[:-1], np.float32)
    two = np.partition(probabilities(outputs), -2)[..., -2:]
    difference: Array = two[..., 1] - two[..., 0]
    return difference


def entropy(outputs: Array) -> Array:
    """Return one minus the normalised entropy of the class probabilities, in [0, 1]."""
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
    """A policy that stops at the first exit whose score reaches its threshold.

    Attributes:
        score: name of the score, a key of `SCORES`.
        thresholds: threshold of each exit; `inf` closes an exit, so that its head never runs.
    """

    score: str
    thresholds: tuple[float, ...]

    def looks_at(self, exit: int) -> bool:
        """Tell whether the policy needs the output of this exit."""
        return self.thresholds[exit] < math.inf

    def stops(self, exit: int, outputs: Array) -> Array:
        """Return a mask of the samples that stop at this exit.

        At the last exit all samples stop.
        """
        if exit == len(self.thresholds) - 1:
            return np.ones(len(outputs), bool)
        done: Array = SCORES[self.score](outputs) >= np.float32(self.thresholds[exit])
        return done
