"""What is trained and recorded at each scale.

A job is one network on one data set, or the heads of one network.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from impatient import (
    Data,
    MultiExitNetwork,
    Recipe,
    Recording,
    attach_exits,
    fit,
    load_model,
    record,
)
from impatient.files import read_tensors, write_tensors
from impatient.networks.cascade import Cascade
from impatient.policies import split_recording
from impatient.provenance import fingerprint_bytes, machine, provenance
from impatient.training.data import Split
from papers.adaptive_neural_networks.cached import Stopping, features_of, train_head
from papers.adaptive_neural_networks.networks import (
    CIFAR_MEAN,
    CIFAR_STD,
    load_pretrained,
    strided_head,
)
from papers.data import load, shared_folder
from papers.jobs import Job
from papers.throughput import chosen_precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a network, or its heads, is trained.

    Attributes:
        images: how many training examples; None takes all but the validation split.
    """

    epochs: int
    lr: float
    images: int | None = None
    batch_size: int = 64
    augment: Literal["none", "crop", "crop-flip"] = "none"
    weight_decay: float = 5e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """A network to be had.

    Attributes:
        name: unique within its case; of the pretrained ones also their name in the shared data.
        spec: for `impatient.load_model`.
        training: None: its weights are in the shared data.
    """

    name: str
    spec: str
    training: Training | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Networks for one data set, the least expensive first and the full one last.

    Attributes:
        data, validation: see `papers.data.load`.
        fitted_on: where policies are fitted. "validation": judged on the test split. "test": fitted
            on one part of it and judged on the rest, since some networks were trained on all there
            is beside it.
        pixels: mean and deviation, if not those of the training split.
        task: of early exits: which answers are right.
    """

    name: str
    data: str
    nets: tuple[Net, ...]
    validation: int | None = None
    fitted_on: Literal["validation", "test"] = "validation"
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    task: str = "classification"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(net.name for net in self.nets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exits:
    """Early exits on one network of a case.

    Attributes:
        case: whose data and protocol are used.
        after: modules after which the exits lie.
        way: "frozen": the backbone stays as it is, and the heads are trained together for some
            epochs; "cached": likewise, but each until it stops improving, on cached features;
            "joint": all is trained together, from the network with cached heads on.
    """

    case: Case
    net: Net
    after: tuple[str, ...]
    training: Training
    way: Literal["frozen", "cached", "joint"] = "frozen"

    @property
    def name(self) -> str:
        kind = "exits" if self.way == "frozen" else f"exits-{self.way}"
        return f"{self.case.name}-{self.net.name}-{kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Measurements at batch size 1, on one thread.

    Attributes:
        repeats: of each network or stage.
        images: that are run for real.
        losses: accuracy that each policy which is run for real may lose, of selection.
        exit_losses: likewise of early exits.
    """

    repeats: int
    images: int
    losses: tuple[float, ...]
    exit_losses: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """How policies are fitted and judged.

    Attributes:
        splits: how many seeded divisions of a test split; a case fitted on validation has one.
        prices: of time, in the sweeps of learned policies.
        boosted: likewise with gradient-boosted trees, which take a hundred times as long to fit.
        boosted_topologies: on which those are tried.
        draws: calibration samples per division, for the guarantees.
        calibration: size of each.
        epsilon, delta: what is guaranteed.
    """

    splits: int
    prices: int
    boosted: int
    boosted_topologies: tuple[str, ...]
    draws: int
    calibration: int
    epsilon: float
    delta: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """All there is to do.

    Attributes:
        better: exits that are trained for longer, with tables of their own.
        several: exits whose answers name several classes, with tables of their own.
    """

    cases: tuple[Case, ...]
    exits: tuple[Exits, ...]
    better: tuple[Exits, ...]
    several: tuple[Exits, ...]
    timing: Timing
    judging: Judging

    @property
    def parts(self) -> tuple[Case | Exits, ...]:
        """All that policies are fitted for."""
        return (*self.cases, *self.exits)


OWN = "papers.adaptive_neural_networks.networks"
PRETRAINED = tuple(
    Net(name=f"resnet{depth}", spec=f"{OWN}:CifarResNet:depth={depth}")
    for depth in (20, 32, 44, 56)
)
# every two or three blocks, from the end of the first stage on
CUTS = {
    "resnet20": ("layer1.2", "layer2.0", "layer2.2", "layer3.0", "layer3.1"),
    "resnet32": ("layer1.4", "layer2.1", "layer2.4", "layer3.0", "layer3.2"),
    "resnet56": (
        "layer1.8",
        "layer2.2",
        "layer2.5",
        "layer2.8",
        "layer3.1",
        "layer3.4",
        "layer3.6",
    ),
}


def _cifar(small: Training, middle: Training) -> Case:
    own = (
        Net(name="resnet8", spec=f"{OWN}:CifarResNet:depth=8", training=small),
        Net(name="resnet14", spec=f"{OWN}:CifarResNet:depth=14", training=middle),
    )
    return Case(
        name="cifar10",
        data="cifar10",
        nets=(*own, *PRETRAINED),
        validation=1000,
        fitted_on="test",
        pixels=(CIFAR_MEAN, CIFAR_STD),
    )


def _fashion(epochs: tuple[int, int, int], images: int | None, batch_size: int = 64) -> Case:
    nets = {"resnet8-thin": "depth=8,width=4", "resnet8": "depth=8", "resnet20": "depth=20"}
    return Case(
        name="fashion",
        data="fashion",
        nets=tuple(
            Net(
                name=name,
                spec=f"{OWN}:CifarResNet:{options}",
                training=Training(epochs=count, lr=0.1, images=images, batch_size=batch_size),
            )
            for (name, options), count in zip(nets.items(), epochs, strict=True)
        ),
    )


def _text(
    data: str,
    words: tuple[int, int],
    bag: Training,
    conv: Training,
    width: int = 64,
    blocks: int = 4,
) -> Case:
    return Case(
        name=f"text-{data.replace('_', '-')}",
        data=data,
        nets=(
            Net(name="bag", spec=f"{OWN}:BagOfWords:words={words[0]},width=8", training=bag),
            Net(
                name="convolutions",
                spec=f"{OWN}:TextResNet:words={words[1]},width={width},blocks={blocks}",
                training=conv,
            ),
        ),
    )


def _exits(case: Case, names: Sequence[str], training: Training) -> tuple[Exits, ...]:
    by_name = {net.name: net for net in case.nets}
    return tuple(
        Exits(case=case, net=by_name[name], after=CUTS[name], training=training) for name in names
    )


def _better(exits: Sequence[Exits], *epochs: int) -> tuple[Exits, ...]:
    """Exits with heads on cached features, and then trained jointly for so many epochs each."""
    made: list[Exits] = []
    for one, count in zip(exits, epochs, strict=True):
        cached = Training(epochs=40, lr=0.1, batch_size=128)
        joint = Training(epochs=count, lr=0.02, batch_size=128, augment="crop-flip")
        # all that is held out says when a head stops improving
        case = dataclasses.replace(one.case, validation=None)
        made += [
            dataclasses.replace(one, case=case, training=cached, way="cached"),
            dataclasses.replace(one, case=case, training=joint, way="joint"),
        ]
    return tuple(made)


def _signs(epochs: int, images: int | None) -> Exits:
    """Exits with heads on cached features, on a ResNet whose answers name 5 of 43 traffic signs."""
    training = Training(epochs=epochs, lr=0.1, images=images, batch_size=128, augment="crop")
    net = Net(name="resnet20", spec=f"{OWN}:CifarResNet:depth=20", training=training)
    case = Case(
        name="gtsrb-top5",
        data="gtsrb",
        nets=(net,),
        fitted_on="test",
        task="classification:top=5",
    )
    heads = dataclasses.replace(training, epochs=40, augment="none")
    return Exits(case=case, net=net, after=CUTS["resnet20"], training=heads, way="cached")


DIGITS = Case(
    name="digits",
    data="digits",
    fitted_on="test",
    nets=tuple(
        Net(
            name=name,
            spec=f"{OWN}:CifarResNet:{options}",
            training=Training(epochs=epochs, lr=0.1, images=800, batch_size=32),
        )
        for name, options, epochs in (
            ("thin", "depth=8,width=2", 1),
            ("narrow", "depth=8,width=4", 2),
            ("wide", "depth=14,width=8", 3),
        )
    ),
)

DIGITS_EXITS = (
    Exits(
        case=DIGITS,
        net=DIGITS.nets[-1],
        after=("layer1.1", "layer2.1"),
        training=Training(epochs=1, lr=0.1, batch_size=32),
    ),
)

CPU_CIFAR = _cifar(
    Training(epochs=30, lr=0.1, batch_size=128, augment="crop-flip"),
    Training(epochs=9, lr=0.1, augment="crop-flip"),
)
GPU_CIFAR = _cifar(
    Training(epochs=160, lr=0.1, batch_size=128, augment="crop-flip", weight_decay=1e-4),
    Training(epochs=160, lr=0.1, batch_size=128, augment="crop-flip", weight_decay=1e-4),
)

SCALES = {
    "smoke": Scale(
        cases=(
            DIGITS,
            _text(
                "digits_tokens",
                (18, 18),
                Training(epochs=4, lr=4.0, batch_size=32),
                Training(epochs=4, lr=0.1, batch_size=32),
                width=16,
                blocks=1,
            ),
        ),
        exits=DIGITS_EXITS,
        better=_better(DIGITS_EXITS, 1),
        several=(
            dataclasses.replace(
                DIGITS_EXITS[0],
                case=dataclasses.replace(
                    DIGITS, name="digits-top3", task="classification:top=3", validation=None
                ),
                way="cached",
            ),
        ),
        timing=Timing(repeats=20, images=20, losses=(0.02,), exit_losses=(0.02,)),
        judging=Judging(
            splits=2,
            prices=5,
            boosted=2,
            boosted_topologies=("star",),
            draws=2,
            calibration=100,
            epsilon=0.1,
        ),
    ),
    "cpu": Scale(
        cases=(
            CPU_CIFAR,
            _fashion((8, 5, 4), 24_000),
            _text(
                "ag_news",
                (1000, 20_002),
                Training(epochs=3, lr=4.0, weight_decay=0.0),
                Training(epochs=3, lr=0.1, images=60_000, weight_decay=1e-5),
            ),
        ),
        exits=_exits(
            CPU_CIFAR, ("resnet32", "resnet56"), Training(epochs=2, lr=0.05, images=12_000)
        ),
        better=_better(
            _exits(CPU_CIFAR, ("resnet20", "resnet56"), Training(epochs=1, lr=0.02)), 4, 2
        ),
        several=(_signs(5, 16_000),),
        timing=Timing(repeats=300, images=1000, losses=(0.0, 0.01), exit_losses=(0.01, 0.02, 0.05)),
        judging=Judging(
            splits=10,
            prices=30,
            boosted=6,
            boosted_topologies=("chain",),
            draws=20,
            calibration=2500,
            epsilon=0.02,
        ),
    ),
    "gpu": Scale(
        cases=(
            GPU_CIFAR,
            _fashion((30, 30, 30), None, 128),
            _text(
                "ag_news",
                (1000, 20_002),
                Training(epochs=5, lr=4.0, weight_decay=0.0),
                Training(epochs=5, lr=0.1, weight_decay=1e-5),
            ),
        ),
        exits=_exits(
            GPU_CIFAR, ("resnet32", "resnet56"), Training(epochs=20, lr=0.1, batch_size=128)
        ),
        better=_better(
            _exits(GPU_CIFAR, ("resnet20", "resnet56"), Training(epochs=1, lr=0.02)), 60, 60
        ),
        several=(_signs(30, None),),
        timing=Timing(repeats=300, images=1000, losses=(0.0, 0.01), exit_losses=(0.01, 0.02, 0.05)),
        judging=Judging(
            splits=20,
            prices=30,
            boosted=10,
            boosted_topologies=("chain", "full"),
            draws=50,
            calibration=2500,
            epsilon=0.02,
        ),
    ),
}


# --- jobs -----------------------------------------------------------------------------------------


def key(case: Case, net: Net) -> str:
    """Name of a network's job, and of the folder of its weights and recordings."""
    return f"{case.name}-{net.name}"


def stages(scale: Scale) -> list[list[Job]]:
    """Return groups of jobs, each of which needs the results of earlier groups.

    The jobs of a group may run at the same time.
    """
    of_cases = [(case, net) for case in scale.cases for net in case.nets]
    under_exits = [(made.case, made.net) for made in scale.exits if made.net.training is not None]
    nets = {
        key(case, net): Job(key(case, net), make, {"case": case, "net": net})
        for case, net in [*of_cases, *under_exits]
    }
    exits = [(made.way, Job(made.name, train_exits, {"exits": made})) for made in scale.exits]
    return [
        [*nets.values()],
        [job for way, job in exits if way != "joint"],
        [job for way, job in exits if way == "joint"],
    ]


def make(case: Case, net: Net, *, folder: Path) -> dict[str, Any]:
    """Train a network, or fetch its weights, and record its outputs and pooled features.

    Returns:
        Accuracy on the splits recorded, and what training took.
    """
    data = data_of(case, net.training)
    network = build(net, data)
    result = {}
    if net.training is None:
        load_pretrained(network, net.name, shared_folder() / "cifar10_resnets.npz")
    else:
        result = _train(
            attach_exits(network, example=data.example(), after=[]),
            data,
            net.training,
            "joint",
            folder,
        )
    write_tensors(
        folder / "weights.safetensors",
        _plain(network.state_dict()),
        {"kind": "weights", "job": folder.name},
    )
    alone = Cascade([network], [net.name]).eval()
    return {
        **result,
        "accuracy": _recorded(alone, data, case, folder),
        "processor": machine(_device(network))["processor"],
    }


def train_exits(exits: Exits, *, folder: Path) -> dict[str, Any]:
    """Attach exits to a trained network, train them in their way, and record all exits.

    The recordings include the features.
    """
    data = data_of(exits.case, exits.training)
    if exits.way == "joint":
        network = built_exits(dataclasses.replace(exits, way="cached"), folder.parent)
        result = _train_jointly(exits, network, data, folder)
    else:
        network = with_exits(exits, built(exits.case, exits.net, folder.parent), data)
        if exits.way == "cached":
            result = _train_cached(network, data, exits.training)
        else:
            result = _train(network, data, exits.training, "frozen", folder)
    write_tensors(
        folder / "weights.safetensors",
        _plain(network.state_dict()),
        {"kind": "weights", "job": folder.name},
    )
    accuracy = _recorded(network, data, exits.case, folder)
    return {**result, "accuracy": accuracy, "processor": machine(_device(network))["processor"]}


def _train_cached(network: MultiExitNetwork, data: Data, how: Training) -> dict[str, Any]:
    begin = time.perf_counter()
    train, validation = (
        features_of(network, data, split, how.batch_size) for split in ("train", "validation")
    )
    stopping = Stopping(lr=how.lr, longest=how.epochs, batch_size=how.batch_size)
    losses = [
        train_head(head, *features, stopping, seed=0)
        for head, *features in zip(network.early_heads(), train, validation, strict=True)
    ]
    return {
        "images": data.size("train"),
        "seconds": time.perf_counter() - begin,
        "epochs": [len(found["train_loss"]) for found in losses],
        "losses": losses,
    }


def _train_jointly(
    exits: Exits, network: MultiExitNetwork, data: Data, folder: Path
) -> dict[str, Any]:
    """Train in the faster precision.

    The last exit weighs as much as all others together.
    """
    images, labels = next(data.batches("train", exits.training.batch_size))
    trial = with_exits(exits, build(exits.net, data), data)
    precision = chosen_precision(
        trial, images, torch.as_tensor(labels), folder / "precision.json", repeats=3
    )
    result = _train(
        network,
        data,
        exits.training,
        "joint",
        folder,
        weights="half_end",
        fabric=Fabric(accelerator="auto", devices=1, precision=precision),
    )
    return {**result, "precision": precision}


def _train(
    network: MultiExitNetwork,
    data: Data,
    how: Training,
    regime: Literal["joint", "frozen"],
    folder: Path,
    *,
    weights: str | None = None,
    fabric: Fabric | None = None,
) -> dict[str, Any]:
    checkpoint = folder / "checkpoint.safetensors"
    recipe = Recipe(
        epochs=how.epochs,
        batch_size=how.batch_size,
        lr=how.lr,
        augment=how.augment,
        weight_decay=how.weight_decay,
        regime=regime,
        channels_last=data.preprocess.size is not None,
    )
    history = fit(
        network,
        data,
        weights=weights,
        recipe=recipe,
        fabric=fabric,
        checkpoint=checkpoint,
        progress=False,
    )
    checkpoint.unlink(missing_ok=True)
    return {
        "images": data.size("train"),
        "seconds": sum(epoch.seconds for epoch in history.epochs),
        "train_loss": list(history.epochs[-1].train_loss),
    }


def _recorded(network: Any, data: Data, case: Case, folder: Path) -> dict[str, list[float]]:
    splits: tuple[Split, ...] = ("test",) if case.fitted_on == "test" else ("validation", "test")
    accuracy: dict[str, list[float]] = {}
    for split in splits:
        recording = record(network, data, split=split, features=True, device=_device(network))
        recording.save(folder / f"{split}.safetensors")
        accuracy[split] = recording.quality.double().mean(1).tolist()
    return accuracy


# --- what jobs have made --------------------------------------------------------------------------


def data_of(case: Case, training: Training | None = None) -> Data:
    """Load a case's data with the number of examples that a training uses.

    The other splits are the same for all trainings.
    """
    data = load(
        case.data, train=training.images if training else None, validation=case.validation, seed=0
    )
    if case.pixels is None:
        return data
    mean, std = case.pixels
    return dataclasses.replace(
        data, preprocess=dataclasses.replace(data.preprocess, mean=mean, std=std)
    )


def build(net: Net, data: Data) -> nn.Module:
    """Build an untrained network."""
    torch.manual_seed(0)
    return load_model(
        net.spec, num_classes=data.num_classes, in_channels=data.preprocess.channels or None
    )


def built(case: Case, net: Net, runs: Path) -> nn.Module:
    """Build a network with weights from `make` or from the shared data."""
    network = build(net, data_of(case, net.training))
    if net.training is None:
        load_pretrained(network, net.name, shared_folder() / "cifar10_resnets.npz")
    else:
        network.load_state_dict(read_tensors(runs / key(case, net) / "weights.safetensors")[0])
    return network.eval()


def with_exits(exits: Exits, backbone: nn.Module, data: Data) -> MultiExitNetwork:
    """Early exits with untrained heads."""
    torch.manual_seed(0)
    return attach_exits(
        backbone,
        example=data.example(),
        after=exits.after,
        heads=strided_head,
        task=exits.case.task,
    )


def built_exits(exits: Exits, runs: Path) -> MultiExitNetwork:
    """Build a network with the weights that `train_exits` has left."""
    data = data_of(exits.case, exits.training)
    network = with_exits(exits, build(exits.net, data), data)
    network.load_state_dict(read_tensors(runs / exits.name / "weights.safetensors")[0])
    return network.eval()


def recording_of(case: Case, split: str, runs: Path) -> Recording:
    """Join the recordings of a case's networks to one."""
    parts = [Recording.load(runs / key(case, net) / f"{split}.safetensors") for net in case.nets]
    whose = [f"{part.provenance.weights}{part.provenance.network}".encode() for part in parts]
    return Recording.of(
        torch.cat([part.logits() for part in parts]),
        parts[0].labels,
        split=split,
        exits=case.names,
        features=tuple(part.features[0] for part in parts),
        provenance=provenance(
            weights=fingerprint_bytes(*whose), data=fingerprint_bytes(case.data.encode())
        ),
    )


def parts_of(recordings: Sequence[Recording], seed: int) -> tuple[Recording, Recording]:
    """Return the recordings for fitting and judging, or the halves of a single one."""
    if len(recordings) == 2:
        return recordings[0], recordings[1]
    return split_recording(recordings[0], 0.5, seed=seed)


def recordings_of(what: Case | Exits, runs: Path) -> list[Recording]:
    """Load the recordings that policies are fitted and judged on.

    They are of the validation and test splits, or of the test split alone.
    """
    case = what if isinstance(what, Case) else what.case
    splits = ("test",) if case.fitted_on == "test" else ("validation", "test")
    if isinstance(what, Case):
        return [recording_of(what, split, runs) for split in splits]
    return [Recording.load(runs / what.name / f"{split}.safetensors") for split in splits]


def judged_places(count: int, case: Case, seed: int) -> Tensor:
    """Where in the test split of `count` samples those lie that `parts_of` judges on."""
    if case.fitted_on == "validation":
        return torch.arange(count)
    # as `split_recording` has it
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[round(0.5 * count) :].sort().values


def taken(recording: Recording, places: Tensor) -> Recording:
    """Select samples of a recording, with repetitions."""
    return recording.take(places)


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _device(network: nn.Module) -> str:
    return str(next(network.parameters()).device)
