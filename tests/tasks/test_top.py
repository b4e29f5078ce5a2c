"""Top-k reaches targets, gates, selection, guarantees and baselines."""

import numpy as np
import pytest
import torch

from impatient import CostProfile, Recording, evaluate, fit_thresholds
from impatient.evaluation import StaticBaseline
from impatient.policies import Topology, control_risk, fit_gates, fit_selection, threshold_family
from impatient.policies.risk import exit_losses, policy_losses
from recordings import drawn, in_top

TOP = 3
GAINS = (0.5, 1.0, 2.0)
COSTS = CostProfile.of(cumulative_s=[1.0, 2.0, 4.0])
NODES_S = (1.0, 2.0, 4.0)


def recording(split: str, seed: int) -> Recording:
    return drawn(600, seed, gains=GAINS, classes=10, split=split).as_task(
        f"classification:top={TOP}"
    )


VALIDATION = recording("validation", 1)
TEST = recording("test", 2)


HITS = in_top(TEST, TOP)
VALIDATION_HITS = in_top(VALIDATION, TOP)


def test_rows_budgets_and_baselines_count_the_likeliest_classes() -> None:
    static = {"small": StaticBaseline(recording=TEST.take(torch.arange(600)), time_s=1.5, macs=0)}
    found = evaluate(TEST, COSTS, static=static)
    for exit in range(3):
        assert found[f"exit {exit}"].accuracy.value == pytest.approx(HITS[exit].mean())
    assert found["small"].accuracy.value == pytest.approx(HITS[2].mean())
    assert found["oracle"].accuracy.value == pytest.approx(HITS.any(0).mean())
    assert (found.quality_name, found.task) == ("top-3 accuracy", "classification:top=3")
    # budgets from 0 to 5 s: 20 % reach the first exit, 40 % the second, 20 % the third
    [uniform] = [
        row for row in found.under_budgets if (row.budget, row.name) == ("uniform", "interruptible")
    ]
    assert uniform.accuracy.value == pytest.approx(HITS.mean(1) @ [0.2, 0.4, 0.2])
    # an answer of several classes is as sure as they are together
    shares = np.sort(TEST.outputs[2].softmax(-1).numpy())[:, -TOP:].sum(1)
    assert abs(shares.mean() - HITS[2].mean()) <= found["exit 2"].calibration_error + 1e-6


@pytest.mark.parametrize("kind", ["thresholds", "gates", "selection"])
def test_policies_keep_targets_that_are_counted_by_hand(kind: str) -> None:
    loss = 0.02
    if kind == "thresholds":
        policy = fit_thresholds(VALIDATION, COSTS, max_accuracy_loss=loss)
    elif kind == "gates":
        policy = fit_gates(VALIDATION, COSTS, max_accuracy_loss=loss)
    else:
        chain = Topology.chain(("a", "b", "c"))
        policy = fit_selection(VALIDATION, NODES_S, chain, max_accuracy_loss=loss)
    exits = policy.exits_on(VALIDATION).numpy()
    mean = VALIDATION_HITS[exits, np.arange(600)].mean()
    assert mean >= VALIDATION_HITS[2].mean() - loss - 1e-9
    # some leave early, so that the target is not kept by running on
    assert exits.mean() < 2


def test_guarantees_are_of_the_likeliest_classes() -> None:
    gap = exit_losses(VALIDATION, "positive_gap").numpy()
    assert (gap == (VALIDATION_HITS[-1] & ~VALIDATION_HITS)).all()
    sets = np.sort(np.argsort(-VALIDATION.outputs.numpy(), axis=-1)[..., :TOP])
    other = exit_losses(VALIDATION, "disagreement").numpy()
    assert (other == (sets != sets[-1]).any(-1)).all()
    # each bounds the next
    assert (gap <= other).all()
    candidates = threshold_family(3)
    controlled = control_risk(candidates, VALIDATION, epsilon=0.05, delta=0.1)
    chosen = controlled.certificate.chosen
    assert chosen is not None
    losses = policy_losses(candidates[chosen : chosen + 1], VALIDATION, "positive_gap")
    assert controlled.certificate.risk == pytest.approx(float(losses.mean()))
