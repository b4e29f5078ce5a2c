"""Learning-rate schedules: pure functions of the share of training that is done, from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence


def cosine(done: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * min(max(done, 0.0), 1.0)))


def step(done: float, milestones: Sequence[float] = (0.5, 0.75), factor: float = 0.1) -> float:
    """1, multiplied by `factor` at every milestone passed."""
    return factor ** sum(done >= milestone for milestone in milestones)


def warmed_up(done: float, factor: float, share: float) -> float:
    """A factor that grows linearly from near 0 during the first `share` of training."""
    return factor * min(1.0, (done + 1e-3) / share) if share > 0 and done < share else factor
