"""Guarantees: how often the word is broken, and how near the best threshold they come.

The truth is known: 100,000 samples of one law stand for all that will ever come. 1,000 times 1,000
of them are drawn as calibration split, and a candidate is chosen of 60 thresholds. Its true mean
loss and cost are those on all samples. The best threshold is the cheapest that truly keeps epsilon.
Beside the mean cost stands what the most powerful tests would leave (least_cost.py).

python benchmarks/guarantees.py            some minutes
python benchmarks/guarantees.py --smoke    seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from common import Row, write_results
from least_cost import least_cost
from torch import Tensor

from impatient.evaluation.metrics import proportion
from impatient.policies.bounds import betting_p_values, binomial_p_values, learn_then_test

COSTS = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
GAINS = torch.tensor([0.6, 1.1, 1.5, 1.8], dtype=torch.float64)
DELTA = 0.05
CANDIDATES = 60
# the least first, which is the hardest
EPSILONS = (0.01, 0.02, 0.05)
PValues = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Losses and costs of all candidates on all samples there are.

    Attributes:
        losses: loss of each candidate on each sample, [J, N].
        costs: mean cost of each candidate, [J].
    """

    losses: Tensor
    costs: Tensor

    def best(self, epsilon: float) -> float:
        """Return the cost of the cheapest candidate that keeps epsilon."""
        return float(self.costs[self.losses.mean(1) <= epsilon].min())

    def least(self, epsilon: float, size: int) -> float:
        """Return the mean cost that the most powerful tests on so many samples would leave."""
        return least_cost(
            self.losses.numpy(),
            self.costs.numpy(),
            float(COSTS[-1]),
            epsilon=epsilon,
            delta=DELTA,
            size=size,
        )


def truths(samples: int, seed: int) -> Iterator[tuple[str, bool, Truth]]:
    """Draw the law, and give each kind of loss, with whether it is 0 or 1."""
    random = torch.Generator().manual_seed(seed)
    shape = (len(GAINS), samples)
    ease = torch.randn(samples, generator=random, dtype=torch.float64)
    own = torch.randn(shape, generator=random, dtype=torch.float64)
    margin = GAINS[:, None] + ease + 0.5 * own
    seen = margin + 0.5 * torch.randn(shape, generator=random, dtype=torch.float64)
    places = np.quantile(seen[:-1].numpy(), np.linspace(1.0, 0.0, CANDIDATES))
    always = torch.ones(1, samples, dtype=torch.bool)
    stops = (torch.cat([seen[:-1] >= place, always]) for place in places)
    exits = torch.stack([each.int().argmax(0) for each in stops])
    costs = COSTS[exits].mean(1)
    for name, quality in (("right or wrong", (margin > 0).double()), ("graded", margin.sigmoid())):
        gap = (quality[-1] - quality).gather(0, exits)
        yield f"{name}, lost", name != "graded", Truth(losses=gap.clamp(min=0.0), costs=costs)
        yield f"{name}, lost or gained", False, Truth(losses=gap, costs=costs)


def plug_in_p_values(losses: Tensor, epsilon: float) -> Tensor:
    """Bet as before: a stake that suits the variance so far, whatever was won."""
    x = losses.double()
    count = torch.arange(1, x.shape[-1] + 1, dtype=torch.float64) + 1
    means = (0.5 + x.cumsum(-1)) / count
    variances = (0.25 + (x - means).square().cumsum(-1)) / count
    before = torch.cat([torch.full_like(variances[..., :1], 0.25), variances[..., :-1]], -1)
    stakes = (-2 * math.log(DELTA) / (x.shape[-1] * before)).sqrt().clamp(max=1.0)
    wealth = torch.log1p(-stakes * (x - epsilon)).cumsum(-1).amax(-1)
    return (-wealth).exp().clamp(max=1.0)


def chosen(truth: Truth, p_values: PValues, epsilon: float, draws: int, size: int) -> Tensor:
    """Choose a candidate on each of many calibration splits.

    -1 is the full network.
    """
    random = torch.Generator().manual_seed(1)
    found = []
    # many at once, since betting goes sample by sample
    for some in torch.arange(draws).split(40):
        rows = torch.randint(truth.losses.shape[1], (len(some), size), generator=random)
        losses = truth.losses[:, rows].transpose(0, 1)
        passed = learn_then_test(losses, epsilon=epsilon, delta=DELTA, p_values=p_values)
        found.append(passed.sum(-1) - 1)
    return torch.cat(found)


def judged(truth: Truth, places: Tensor, epsilon: float) -> Row:
    """Say how often epsilon is broken, and what the choice costs beside the best threshold."""
    risks = torch.cat([truth.losses.mean(1), torch.zeros(1, dtype=torch.float64)])
    costs = torch.cat([truth.costs, COSTS[-1:]])[places]
    broken = proportion(float((risks[places] > epsilon).sum()), len(places))
    ratio = costs / truth.best(epsilon)
    return {
        "broken": round(broken.value, 4),
        "broken, 95 % interval": f"{broken.low:.3f} to {broken.high:.3f}",
        "cost beside the best": round(float(ratio.mean()), 4),
        "standard deviation": round(float(ratio.std()), 4),
        "within 5 %": "yes" if float(ratio.mean()) <= 1.05 else "no",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    samples, draws, size = (4000, 5, 300) if smoke else (100_000, 1000, 1000)
    rows: list[Row] = []
    for loss, is_binary, truth in truths(samples, seed=0):
        methods: dict[str, PValues] = {
            "betting, before": plug_in_p_values,
            "betting": functools.partial(betting_p_values, delta=DELTA),
        }
        if is_binary:
            methods["binomial tail (default here)"] = binomial_p_values
        for epsilon in EPSILONS:
            least = truth.least(epsilon, size)
            for method, p_values in methods.items():
                places = chosen(truth, p_values, epsilon, draws, size)
                rows.append(
                    {"loss": loss, "epsilon": epsilon, "method": method, "draws": draws}
                    | judged(truth, places, epsilon)
                    | {"the most powerful tests": round(least / truth.best(epsilon), 4)}
                )
                print(rows[-1], flush=True)
    if not smoke:
        write_results("guarantees", "Guarantees: how often broken, how near the best", WORDS, rows)


WORDS = (
    f"How often a guarantee with delta = {DELTA} is broken on 1,000 calibration splits of 1,000 "
    "samples, and the mean cost of what was chosen, divided by that of the best threshold, which "
    "nobody knows. “Before” are the stakes of 0.1.0. The last column is what is left by the most "
    "powerful tests there are, which know the law of the losses."
)

if __name__ == "__main__":
    main()
