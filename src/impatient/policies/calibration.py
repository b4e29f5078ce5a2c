"""Temperatures: how sure the exits of a recording should be.

They change no answer of an exit alone, so they help what *reports* probabilities or *combines*
exits, and hardly what routes by raw thresholds. Before combining, fit them on the recording of the
network; after it, on the recording of the ensemble:

    before = fit_temperatures(recording)
    combined = ensembled(recording, "geometric", temperatures=before)
    after = fit_temperatures(combined)          # a running product is too sure, or not sure enough
    network = RunningEnsemble(network, "geometric", before, recalibration=after)

"poe" does not change with temperatures before it (a constant factor of an expert is normalised
away): there, only after. And where it rules out many true classes (few classes, weak exits), no
temperature makes it honest; take "geometric" there.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from impatient.ensembling import RULED_OUT
from impatient.policies.policy import Recorded

# an exit that is always right would have no least temperature
RANGE = (1e-3, 1e3)


def fit_temperatures(recording: Recorded) -> tuple[float, ...]:
    """Fit one temperature per exit.

    Outputs divided by it have the least negative log-likelihood.

    Args:
        recording: recording of a split that the network was not trained on; usually "validation".
    Returns:
        K temperatures; above 1 where an exit is too sure, below 1 where it is not sure enough.
    Source:
        Guo et al. 2017, per exit. We differ: samples whose true class a product of experts has
        ruled out are left out, since no temperature can repair them and each would count as much as
        thousands of others.
    """
    return tuple(_fit(outputs, recording.labels) for outputs in recording.logits())


def _fit(outputs_NC: Float[Tensor, "N C"], labels_N: Int[Tensor, "N"]) -> float:
    # imported here: it takes 0.2 s, which nobody else should wait for
    from scipy.optimize import minimize_scalar

    possible_N = outputs_NC.gather(1, labels_N.long()[:, None])[:, 0] != RULED_OUT
    if not possible_N.any():
        return 1.0
    logits = outputs_NC[possible_N].double()
    labels = labels_N[possible_N].long()

    def loss(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / math.exp(log_temperature), labels))

    low, high = map(math.log, RANGE)
    # convex in 1 / T, so with a single minimum in log T
    return math.exp(
        minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-4}).x
    )
