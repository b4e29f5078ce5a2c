"""Two ways to get more from networks with exits that are trained already, each again a network with
exits.

python examples/3_ensembles.py

EANN runs networks of growing depth one after the other; RunningEnsemble lets the exits of one
network answer together.
"""

import impatient
from impatient.evaluation import conditional_monotonicity, ensembled
from impatient.networks import EANN, RunningEnsemble
from impatient.policies import fit_temperatures


def trained(data: impatient.Data, n: int, epochs: int) -> impatient.MultiExitNetwork:
    """A pre-activation ResNet with an exit after every block, trained with weights that alternate
    around SIEVE.
    """
    backbone = impatient.load_model(
        f"impatient:resnet:n={n},c=8", num_classes=data.num_classes, in_channels=1
    )
    network = impatient.attach_exits(
        backbone, after="every:1", heads="relu_linear", example=data.example()
    )
    recipe = impatient.Recipe(epochs=epochs, batch_size=64, lr=0.1, sampler="alternating")
    impatient.fit(network, data, weights="sieve", recipe=recipe, progress=False)
    return network


def report(name: str, recording: impatient.Recording) -> list[float]:
    accuracy = recording.quality.mean(1).tolist()
    falls = (
        conditional_monotonicity(recording.outputs, recording.labels, tolerances=(0.1,))
        .violations[0]
        .value
    )
    print(
        f"{name:22} {' '.join(f'{value:6.1%}' for value in accuracy)}   takes back what it knew: "
        f"{falls:.1%}"
    )
    return accuracy


def main(epochs: int = 8) -> dict[str, list[float]]:
    data = impatient.load_data("digits")
    small = trained(data, 1, epochs)
    large = trained(data, 2, epochs)
    validation = {network: impatient.record(network, data) for network in (small, large)}

    errors = [(1.0 - validation[network].quality.mean(1)).tolist() for network in (small, large)]
    growing = EANN([small, large], errors)

    before = fit_temperatures(validation[large])
    after = fit_temperatures(ensembled(validation[large], "geometric", temperatures=before))
    together = RunningEnsemble(large, "geometric", before, recalibration=after)

    networks = {"one network": large, "its exits together": together, "growing networks": growing}
    return {
        name: report(name, impatient.record(network, data, split="test"))
        for name, network in networks.items()
    }


if __name__ == "__main__":
    main()
