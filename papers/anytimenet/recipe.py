"""What is trained and timed at each scale.

A job is one network on one data set with one seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_model
from torch import Tensor

from impatient import Data, MultiExitNetwork, Recipe, Recording, attach_exits, fit, record
from impatient.evaluation.derived import ensembled
from impatient.files import written_whole
from impatient.networks import growth
from impatient.networks.anytimenet import AnytimeNet, BaseResNet
from impatient.networks.recalibration import recalibrate
from impatient.provenance import machine
from papers.anytimenet.confidence import class_confidence
from papers.data import load
from papers.jobs import Job

Kind = Literal["anytime", "baseline"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# batch-norm statistics: of all iterations, as in the paper, and of each one
NORMS = (
    "shared",
    "own",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A data set and how long it is looked at.

    Attributes:
        data, images, validation: see `papers.data.load`; nothing is chosen by the validation split.
        test: how many test images judge; None takes all.
    """

    name: str
    data: str
    images: int | None
    validation: int | None
    epochs: int
    batch_size: int
    augment: Literal["none", "crop", "crop-flip"]
    test: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How every network of one scale is trained, BASELINE like AnytimeNet.

    Attributes:
        calibration: training images from which own batch-norm statistics are computed; None takes
            all.
        precision: of Lightning Fabric.
        weights: of the iterations' losses, as `parse_weights` reads them; the paper's by default.
    """

    lr: float
    schedule: Literal["cosine", "step"]
    warmup: float
    calibration: int | None
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    weight_decay: float = 1e-4
    weights: str = "inverse_square"


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """An AnytimeNet, whose BASELINE is its complete network in a plain run.

    Attributes:
        counts: block counts of each section, iteration by iteration.
        outs: one OUT for all iterations, as in the paper, or one for each.
    """

    width: int
    counts: tuple[growth.Counts, ...] = growth.PAPER.counts
    outs: Literal["shared", "own"] = "shared"

    @property
    def schedule(self) -> growth.Schedule:
        return growth.Schedule(self.counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Networks whose iterations are timed, with their batch sizes and image shape.

    A repeat with several images is as long as one with one image for as many repeats, so there are
    fewer.
    """

    nets: tuple[Net, ...]
    shape: tuple[int, int, int]
    repeats: int
    warm_up: int
    batches: tuple[int, ...] = (1,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What is trained and timed.

    Attributes:
        seeds: how many; a seed decides the training subset, the validation split, the initial
            weights and the order.
    """

    cases: tuple[Case, ...]
    net: Net
    training: Training
    timing: Timing
    seeds: int


TINY = Net(width=4, counts=growth.in_turn((2, 2, 2)).counts)
THIN = Net(width=8)
FULL = Net(width=16)
# GTSRB with as few images a class as SFCARS, which has 8,144 of 196 classes
SCARCE = 43 * 41

SCALES = {
    "smoke": Scale(
        cases=(
            Case(
                name="digits",
                data="digits",
                images=300,
                validation=50,
                epochs=2,
                batch_size=32,
                augment="none",
            ),
            Case(
                name="scarce",
                data="digits",
                images=100,
                validation=50,
                epochs=2,
                batch_size=32,
                augment="crop",
            ),
        ),
        net=TINY,
        training=Training(lr=0.1, schedule="cosine", warmup=0.1, calibration=200),
        timing=Timing(nets=(TINY,), shape=(1, 8, 8), repeats=20, warm_up=2),
        seeds=2,
    ),
    # about 50,000 images come by in every training, since that is what 45 minutes hold; the larger
    # sets therefore in few epochs
    "cpu": Scale(
        cases=(
            Case(
                name="cifar10",
                data="cifar10",
                images=24_000,
                validation=500,
                epochs=2,
                batch_size=32,
                augment="none",
            ),
            Case(
                name="gtsrb",
                data="gtsrb",
                images=16_000,
                validation=430,
                epochs=3,
                batch_size=32,
                augment="none",
            ),
            Case(
                name="scarce",
                data="gtsrb",
                images=SCARCE,
                validation=430,
                epochs=25,
                batch_size=32,
                augment="crop",
            ),
        ),
        net=THIN,
        training=Training(lr=0.1, schedule="cosine", warmup=0.05, calibration=2048),
        timing=Timing(
            nets=(FULL, THIN), shape=(3, 32, 32), repeats=300, warm_up=20, batches=(1, 8)
        ),
        seeds=3,
    ),
    # no mirrored traffic signs: right and left are classes
    "gpu": Scale(
        cases=(
            Case(
                name="cifar10",
                data="cifar10",
                images=None,
                validation=None,
                epochs=200,
                batch_size=256,
                augment="crop-flip",
            ),
            Case(
                name="gtsrb",
                data="gtsrb",
                images=None,
                validation=None,
                epochs=200,
                batch_size=256,
                augment="crop",
            ),
            Case(
                name="scarce",
                data="gtsrb",
                images=SCARCE,
                validation=430,
                epochs=200,
                batch_size=128,
                augment="crop",
            ),
        ),
        net=FULL,
        training=Training(
            lr=0.1, schedule="step", warmup=0.0, calibration=None, precision="bf16-mixed"
        ),
        timing=Timing(nets=(FULL,), shape=(3, 32, 32), repeats=300, warm_up=20),
        seeds=1,
    ),
}


def key(case: Case, kind: Kind, seed: int) -> str:
    """Name of a training's job."""
    return f"{case.name}-{kind}-seed{seed}"


def jobs(scale: Scale) -> list[Job]:
    """All trainings, those of a seed before those of the next."""
    return [
        Job(
            key(case, kind, seed),
            train,
            {
                "case": case,
                "training": scale.training,
                "net": scale.net,
                "kind": kind,
                "seed": seed,
            },
        )
        for seed in range(scale.seeds)
        for case in scale.cases
        for kind in KINDS
    ]


def train(
    case: Case, training: Training, net: Net, kind: Kind, seed: int, *, folder: Path
) -> dict[str, Any]:
    """Train one network, or resume from its checkpoint.

    The trained weights, of AnytimeNet with its own statistics, stay in `weights.safetensors`.

    Returns:
        Per kind of batch-norm statistics what `judged` says of the test split; training seconds and
        last training loss.
    """
    data = load(case.data, train=case.images, validation=case.validation, seed=seed, test=case.test)
    torch.manual_seed(seed)
    network = build(net, kind, data)
    checkpoint = folder / "checkpoint.safetensors"
    history = fit(
        network,
        data,
        weights=training.weights,
        recipe=recipe_of(case, training, seed),
        fabric=_fabric(training),
        checkpoint=checkpoint,
        progress=False,
    )
    device = str(next(network.parameters()).device)
    result = {"shared": judged(record(network, data, split="test", device=device))}
    trained: torch.nn.Module = network
    if isinstance(network, AnytimeNet):
        own = with_own_norms(
            network, net, data, calibration(data, case.batch_size, training.calibration, seed)
        )
        result["own"] = judged(record(own, data, split="test", device=device))
        trained = own
    with written_whole(folder / "weights.safetensors") as temporary:
        save_model(trained, str(temporary))
    checkpoint.unlink(missing_ok=True)
    return {
        **result,
        "train_loss": list(history.epochs[-1].train_loss),
        "images": data.size("train"),
        "seconds": sum(epoch.seconds for epoch in history.epochs),
        "processor": machine(device)["processor"],
    }


def build(net: Net, kind: Kind, data: Data) -> AnytimeNet | MultiExitNetwork:
    """Build an untrained network of either kind.

    Both kinds have the same blocks and, from the same random state, the same weights.
    """
    channels = data.preprocess.channels
    if kind == "anytime":
        return AnytimeNet(
            data.num_classes,
            net.schedule,
            width=net.width,
            in_channels=channels,
            outs=net.outs,
            norms="shared",
        )
    plain = BaseResNet(data.num_classes, net.schedule.final, net.width, channels)
    return attach_exits(plain, after=[], example=data.example())


def with_own_norms(
    trained: AnytimeNet, net: Net, data: Data, batches: Iterator[Tensor]
) -> AnytimeNet:
    """Copy the weights to a network with batch-norm statistics per iteration.

    The statistics are computed from training images. Nothing is trained.
    """
    weight = next(trained.parameters())
    own = AnytimeNet(
        data.num_classes,
        net.schedule,
        width=net.width,
        in_channels=data.preprocess.channels,
        outs=net.outs,
        norms="own",
    )
    own.load_state_dict(trained.state_dict())
    recalibrate(own.to(weight.device), (batch.to(weight.device) for batch in batches))
    return own


def calibration(data: Data, batch_size: int, most: int | None, seed: int) -> Iterator[Tensor]:
    """Training images as the network takes them, unchanged, in whole batches.

    They are shuffled: batch norm goes by the batch meanwhile, and data sets may lie sorted by
        class.
    """
    order = torch.randperm(data.size("train"), generator=torch.Generator().manual_seed(seed))[:most]
    for places in order[: max(batch_size, len(order) - len(order) % batch_size)].split(batch_size):
        yield data.preprocess(data.examples("train").take(places.tolist()))


def judged(recording: Recording) -> dict[str, Any]:
    """Compute accuracy and confidence of every iteration.

    They are over all samples and for each class, and for the surest answer so far.
    """
    cached = ensembled(recording, "caching")
    found = class_confidence(recording)
    surest = class_confidence(cached)
    there = list(found.classes)
    return {
        "accuracy": recording.quality.double().mean(1).tolist(),
        "p_true": [estimate.value for estimate in found.overall],
        "p_max": [estimate.value for estimate in found.max_probability],
        "correlation": [estimate and estimate.value for estimate in found.correlations],
        "sample_correlation": [
            estimate and estimate.value for estimate in found.sample_correlations
        ],
        "surest_accuracy": cached.quality.double().mean(1).tolist(),
        "surest_p_true": [estimate.value for estimate in surest.overall],
        "surest_p_max": [estimate.value for estimate in surest.max_probability],
        "classes": there,
        "counts": found.counts[there].tolist(),
        "class_p_true": found.confidence[:, there].tolist(),
        "class_accuracy": found.accuracy[:, there].tolist(),
    }


def recipe_of(case: Case, training: Training, seed: int) -> Recipe:
    """Put together how a case is trained at a scale."""
    return Recipe(
        epochs=case.epochs,
        batch_size=case.batch_size,
        lr=training.lr,
        schedule=training.schedule,
        warmup=training.warmup,
        augment=case.augment,
        weight_decay=training.weight_decay,
        channels_last=True,
        seed=seed,
    )


def _fabric(training: Training) -> Any:
    from lightning_fabric import Fabric

    return Fabric(accelerator="auto", devices=1, precision=training.precision)
