"""Threshold policies, on scores that the network's files compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .errors import BundleError
from .parts import EnginePart
from .staged import Array, Exit


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """A policy that stops at the first exit whose score reaches its threshold.

    Attributes:
        score: name of the score, for people; the network's files compute it.
        thresholds: threshold of each exit; `inf` closes an exit, so that its head never runs.
        compares: whether an exit's score compares its output with that of the exit before, whose
            head must run, too.
    """

    score: str
    thresholds: tuple[float, ...]
    compares: bool = False

    def looks_at(self, exit: int) -> bool:
        """Tell whether the policy needs the output of this exit."""
        if self.thresholds[exit] < math.inf:
            return True
        after = exit + 1
        early = after < len(self.thresholds) - 1
        return self.compares and early and self.thresholds[after] < math.inf

    def stops(self, exit: int, scores: Array) -> Array:
        """Return a mask of the samples that stop at this exit.

        At the last exit all samples stop.

        Args:
            exit: number of the exit.
            scores: how sure each output looks, shape [B].
        """
        if exit == len(self.thresholds) - 1:
            return np.ones(len(scores), bool)
        done: Array = scores >= np.float32(self.thresholds[exit])
        return done


class Scores:
    """The scores of one run's outputs.

    Args:
        compare: part that compares outputs with those of the exit before; None where every head, or
            the session, gives its score itself.
    """

    def __init__(self, compare: EnginePart | None = None) -> None:
        self._compare = compare
        # Outputs of the exit before that was looked at; None at the first.
        self._before: Array | None = None

    def of(self, exit: Exit) -> Array:
        """Return the scores of an exit's outputs, shape [B]."""
        if self._compare is None:
            score: Array | None = exit.score()
            if score is None:
                raise BundleError(
                    "this network was exported without a policy, so that its heads give no scores; "
                    "expected one with a policy. Export it again with the policy."
                )
            return score
        output: Array = exit.output()
        before, self._before = self._before, output
        if before is None:
            # Nothing agrees with nothing: only an exit that is always open stops here.
            return np.full(len(output), -np.inf, np.float32)
        return self._compare.one(output, before)

    def keep(self, rows: Array) -> None:
        """Continue with some of the samples only."""
        if self._before is not None:
            self._before = self._before[rows]


def probabilities(outputs: Array) -> Array:
    """Compute the softmax over the last dimension, in float32."""
    shifted = outputs.astype(np.float32)
    powers = np.exp(shifted - shifted.max(-1, keepdims=True))
    shares: Array = powers / powers.sum(-1, keepdims=True)
    return shares
