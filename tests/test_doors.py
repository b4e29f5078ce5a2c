"""What is no recording, profile, data set, network or run is told what was expected."""

import pytest
import torch
from torch import nn

import impatient
from impatient import CostProfile, Exit, Network
from impatient.errors import CostError, DataError, ImpatientError, NetworkError
from impatient.training import ForTrainer
from recordings import Samples, drawn

COSTS = CostProfile.of(cumulative_s=[1.0, 2.0, 3.0, 4.0])
SAMPLES = Samples(torch.zeros(4, 8), torch.zeros(4, dtype=torch.long))


class Generated(Network):
    """Returns a bare generator of exits in place of a run."""

    num_exits = 1

    def exits(self, x, *, keep=False):
        return (Exit(0, None, each) for each in [torch.zeros(len(x), 3)])


def calls(network: Network) -> dict[str, tuple]:
    """What is called, the error, and what it must say."""
    recording = drawn(40, seed=0)
    return {
        "a list of batches": (
            lambda: impatient.record(network, [(torch.zeros(1, 8), torch.zeros(1))]),
            (DataError, "list, which lacks 'fingerprint', 'size', 'batches'"),
        ),
        "data to train on": (
            lambda: impatient.fit(network, SAMPLES),
            (DataError, "Samples; expected a Data, from load_data"),
        ),
        "times in a list": (
            lambda: impatient.fit_thresholds(recording, [1.0, 2.0, 3.0, 4.0], mean_time_s=2.0),
            (CostError, r"list; expected a CostProfile.*CostProfile\.of"),
        ),
        "outputs alone": (
            lambda: impatient.policies.rules.fit_thresholds(
                recording.outputs, COSTS, mean_time_s=2.0
            ),
            (ImpatientError, r"Tensor, which lacks 'quality'.*Recording\.of"),
        ),
        "a runner's times": (
            lambda: impatient.Runner(network, {"exit 0": 1.0}),
            (CostError, "dict; expected a CostProfile"),
        ),
        "a generator": (
            lambda: impatient.record(Generated(), SAMPLES),
            (
                NetworkError,
                r"Generated\.exits\(x\) returned a generator; expected an impatient.Run",
            ),
        ),
        "a generator to profile": (
            lambda: impatient.profile(Generated(), torch.zeros(1, 8), repeats=1),
            (NetworkError, "returned a generator"),
        ),
        "a plain model": (
            lambda: ForTrainer(nn.Linear(1, 1)),
            (NetworkError, "Linear is no network with exits"),
        ),
    }


@pytest.mark.parametrize("kind", calls(Generated()))
def test_a_wrong_thing_is_told_what_was_expected(kind: str, toy: nn.Module) -> None:
    example = torch.zeros(2, 8)
    network = impatient.attach_exits(toy, after=["blocks.0"], example=example)
    call, (error, said) = calls(network)[kind]
    with pytest.raises(error, match=said):
        call()


def test_the_wrapper_for_trainers_weighs_the_exits_losses(toy: nn.Module) -> None:
    x = torch.randn(5, 8)
    labels = torch.tensor([0, 1, 2, 0, 1])
    network = impatient.attach_exits(toy, after=["blocks.0"], example=x)
    found = ForTrainer(network, weights=[0.25, 1.0])(x=x, labels=labels)
    early, last = (nn.functional.cross_entropy(output, labels) for output in network(x))
    torch.testing.assert_close(found["loss"], 0.25 * early + last)
    torch.testing.assert_close(found["logits"], network(x)[-1])
    assert "loss" not in ForTrainer(network)(x=x)
