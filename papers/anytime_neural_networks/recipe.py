"""What is trained at each scale.

A job is one network with one seed. Its result is the costs and errors of each exit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from impatient import Data, MultiExitNetwork, Recipe, attach_exits, fit, profile, record
from impatient.files import read_tensors, write_tensors
from impatient.networks.ensemble import EANN
from impatient.networks.resnet import PreActResNet
from impatient.provenance import machine
from impatient.recipe import Sampler
from impatient.training.balancing import AdaLoss
from impatient.training.weights import every
from papers.data import load
from papers.jobs import Job

WEIGHTINGS = ("const", "linear", "half_end", "sieve", "exp_lin", "adaloss")
SAMPLERS: tuple[Sampler, ...] = ("none", "alternating")
ENSEMBLES = ("sieve", "exp_lin", "const", "linear")
SHAPES = {"digits": (1, 8, 8), "fashion": (1, 28, 28), "cifar10": (3, 32, 32)}
# of the total cost: the milestones
SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Options of training for all networks and methods of one scale.

    Attributes:
        data, images, validation: see `papers.data.load`.
        update_every: steps between AdaLoss's updates; the authors tried 1 and 100, and there are
            few steps at small scales.
        precision: of Lightning Fabric.
    """

    data: str
    images: int | None
    validation: int | None
    epochs: int
    batch_size: int
    lr: float
    schedule: Literal["cosine", "step"]
    augment: Literal["none", "crop-flip"]
    update_every: int
    precision: Literal["32-true", "bf16-mixed"] = "32-true"


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """One network to train: a pre-activation ResNet (n, c).

    Attributes:
        depth: only its first blocks, and the classifier; None keeps all.
        weights: of the exits; None trains the network without early exits (OPT).
        sampler: "alternating" is AANN.
        period: there is an exit after every block, or after every second, third and so on.
    """

    n: int
    c: int
    depth: int | None = None
    weights: str | None = None
    sampler: Sampler = "none"
    period: int = 1

    @property
    def blocks(self) -> int:
        return self.depth or 3 * self.n

    @property
    def name(self) -> str:
        how = f"depth{self.blocks}" if self.weights is None else f"{self.weights}-{self.sampler}"
        return f"n{self.n}-c{self.c}-{how}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What is trained.

    Attributes:
        networks: (n, c) of the milestone table.
        members: n of an EANN's networks, shallow to deep, of `channels` channels.
        seeds: how many; a seed decides the training subset, the validation split, the initial
            weights and the order.
    """

    training: Training
    networks: tuple[tuple[int, int], ...]
    members: tuple[int, ...]
    channels: int
    seeds: int


SCALES = {
    "smoke": Scale(
        training=Training(
            data="digits",
            images=300,
            validation=None,
            epochs=1,
            batch_size=64,
            lr=0.05,
            schedule="cosine",
            augment="none",
            update_every=1,
        ),
        networks=((2, 4),),
        members=(1, 2),
        channels=4,
        seeds=2,
    ),
    # lr per image as in the paper (0.1 at batch 128); smaller batches, for there are few images
    "cpu": Scale(
        training=Training(
            data="fashion",
            images=6000,
            validation=1000,
            epochs=3,
            batch_size=64,
            lr=0.05,
            schedule="cosine",
            augment="none",
            update_every=1,
        ),
        networks=((3, 16),),
        members=(1, 2, 4),
        channels=16,
        seeds=3,
    ),
    "gpu": Scale(
        training=Training(
            data="cifar10",
            images=None,
            validation=5000,
            epochs=10,
            batch_size=128,
            lr=0.1,
            schedule="step",
            augment="crop-flip",
            update_every=100,
            precision="bf16-mixed",
        ),
        networks=((9, 32), (17, 32)),
        members=(2, 4, 9),
        channels=32,
        seeds=1,
    ),
}


def opt_depths(n: int) -> tuple[int, ...]:
    """Return the depths of OPT, about 1/4, 1/2, 3/4 and all blocks.

    Source:
        The authors' launch scripts: `opt_at` {1,4,6,8} for n=3, {6,13,19,26} for n=9, ...
        (0-based), which round to the nearest. We differ: the first is rounded down where it would
        cost more than a quarter of the whole, so that every milestone lies between two networks of
        OPT.
    Example:
        >>> opt_depths(3)
        (2, 5, 7, 9)
    """
    nearest = [math.floor(3 * n * share + 0.5) for share in SHARES[1:]]
    # the two blocks that down-sample cost 3/4 of the others; the stem's share decides between 0.125
    # and 0.2
    return tuple(sorted({max(1, math.floor(3 * n / 4 - 0.2)), *nearest}))


def milestone_nets(n: int, c: int) -> list[Net]:
    """OPT at its depths, and every weighting, static and alternating."""
    opt = [Net(n=n, c=c, depth=depth) for depth in opt_depths(n)]
    return opt + [
        Net(n=n, c=c, weights=weights, sampler=sampler)
        for weights in WEIGHTINGS
        for sampler in SAMPLERS
    ]


def member_nets(scale: Scale, weights: str | None) -> list[Net]:
    """Return the networks of an EANN, or with None those of the plain ensemble.

    Networks of the plain ensemble have no early exits. Those of an EANN are trained with
    alternating weights, as in the paper ("EANN computes AANNs sequentially").
    """
    sampler: Sampler = "none" if weights is None else "alternating"
    return [
        Net(
            n=n,
            c=scale.channels,
            weights=weights,
            sampler=sampler,
            depth=3 * n if weights is None else None,
        )
        for n in scale.members
    ]


def ensemble_nets(scale: Scale) -> list[Net]:
    """Every member of every EANN and of the plain ensemble."""
    return [net for weights in (*ENSEMBLES, None) for net in member_nets(scale, weights)]


def jobs(scale: Scale, table: str = "all") -> list[Job]:
    """List the trainings of a table ("milestones", "eann" or "all"), seed by seed.

    The first network and the EANN figure, with whose OPT+ its OPT belongs, come before the other
    networks.
    """
    n, c = scale.networks[0]
    figure = [*(Net(n=n, c=c, depth=depth) for depth in opt_depths(n)), *ensemble_nets(scale)]
    parts = (
        [milestone_nets(n, c) for n, c in scale.networks] if table in ("milestones", "all") else []
    )
    if table in ("eann", "all"):
        parts.insert(1, figure)
    checked = [net.name for net in member_nets(scale, ENSEMBLES[0])]
    wanted = {
        f"{net.name}-seed{seed}": Job(
            f"{net.name}-seed{seed}",
            train,
            {
                "training": scale.training,
                "net": net,
                "seed": seed,
                "keep": seed == 0 and net.name in checked,
            },
        )
        for nets in parts
        for seed in range(scale.seeds)
        for net in nets
    }
    return list(wanted.values())


def check_job(scale: Scale, validation_errors: Sequence[Sequence[float]], folder: Path) -> Job:
    """Make a job that runs the first EANN of the first seed as a network.

    The trainings of its members are under `folder`.
    """
    nets = member_nets(scale, ENSEMBLES[0])
    folders = [folder / f"{net.name}-seed0" for net in nets]
    arguments = {
        "training": scale.training,
        "nets": nets,
        "seed": 0,
        "validation_errors": validation_errors,
    }
    return Job("check-eann", check_ensemble, {**arguments, "folders": folders})


def time_jobs(scale: Scale) -> list[Job]:
    """List the measurements of the time until each exit.

    There is one for each size of network. Its name is the beginning of the trainings' names.
    """
    sizes = dict.fromkeys([*scale.networks, *((n, scale.channels) for n in scale.members)])
    shape = SHAPES[scale.training.data]
    return [
        Job(f"n{n}-c{c}", measure, {"net": Net(n=n, c=c, weights="const"), "shape": shape})
        for n, c in sizes
    ]


def build(net: Net, channels: int, size: tuple[int, int], num_classes: int) -> MultiExitNetwork:
    """Build an untrained network, with an exit after every block or fewer, or without exits."""
    backbone = PreActResNet(num_classes, net.n, net.c, channels, depth=net.depth)
    early = [] if net.weights is None else every(net.blocks, net.period)[:-1]
    after = [f"blocks.{index}" for index in early]
    return attach_exits(
        backbone, after=after, heads="relu_linear", example=torch.zeros(1, channels, *size)
    )


def _built_for(net: Net, data: Data) -> MultiExitNetwork:
    shape = data.example(1).shape
    return build(net, shape[1], (shape[2], shape[3]), data.num_classes)


def train(training: Training, net: Net, seed: int, keep: bool, *, folder: Path) -> dict[str, Any]:
    """Train one network, or resume from its checkpoint.

    Args:
        keep: write the weights to model.safetensors.
    Returns:
        Per exit: MACs of its stage and its head, errors on validation and test; training seconds
            and last training loss.
    """
    data = load(training.data, train=training.images, validation=training.validation, seed=seed)
    torch.manual_seed(seed)
    network = _built_for(net, data)
    facts = network.stage_facts(data.example(1))
    checkpoint = folder / "checkpoint.safetensors"
    history = fit(
        network,
        data,
        weights=_weights(training, net),
        recipe=_recipe(training, net, seed),
        fabric=_fabric(training),
        checkpoint=checkpoint,
        progress=False,
    )
    device = str(next(network.parameters()).device)
    errors = {
        split: (
            1.0 - record(network, data, split=split, device=device).quality.double().mean(1)
        ).tolist()
        for split in ("validation", "test")
    }
    if keep:
        write_tensors(
            folder / "model.safetensors", network.state_dict(), {"net": net.name, "seed": seed}
        )
    checkpoint.unlink(missing_ok=True)
    return {
        "stage_macs": [fact.stage_macs for fact in facts],
        "head_macs": [fact.head_macs for fact in facts],
        "validation_error": errors["validation"],
        "test_error": errors["test"],
        "train_loss": list(history.epochs[-1].train_loss),
        "seconds": sum(epoch.seconds for epoch in history.epochs),
        "processor": machine(device)["processor"],
    }


def _weights(training: Training, net: Net) -> str | AdaLoss:
    if net.weights == "adaloss":
        return AdaLoss(update_every=training.update_every)
    return net.weights or "const"


def _recipe(training: Training, net: Net, seed: int) -> Recipe:
    return Recipe(
        epochs=training.epochs,
        batch_size=training.batch_size,
        lr=training.lr,
        schedule=training.schedule,
        augment=training.augment,
        weight_decay=2e-4,
        head_decay="scaled",
        sampler=net.sampler,
        channels_last=True,
        seed=seed,
    )


def _fabric(training: Training) -> Any:
    from lightning_fabric import Fabric

    return Fabric(accelerator="auto", devices=1, precision=training.precision)


def check_ensemble(
    training: Training,
    nets: Sequence[Net],
    seed: int,
    folders: Sequence[Path],
    validation_errors: Sequence[Sequence[float]],
    *,
    folder: Path,
) -> dict[str, Any]:
    """Run trained members as one EANN, and return its MACs and test errors.

    They are those of each exit in the EANN's own recording.

    Args:
        folders: of the members' jobs, which kept their weights.
        validation_errors: per member and exit.
    """
    del folder
    data = load(training.data, train=training.images, validation=training.validation, seed=seed)
    networks = []
    for net, own in zip(nets, folders, strict=True):
        network = _built_for(net, data)
        network.load_state_dict(read_tensors(own / "model.safetensors")[0])
        networks.append(network.eval())
    ensemble = EANN(networks, validation_errors)
    facts = ensemble.stage_facts(data.example(1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hits = record(ensemble.to(device), data, split="test", device=device).quality
    return {
        "stage_macs": [fact.stage_macs for fact in facts],
        "head_macs": [fact.head_macs for fact in facts],
        "test_error": (1.0 - hits.double().mean(1)).tolist(),
    }


def measure(net: Net, shape: tuple[int, int, int], *, folder: Path) -> dict[str, Any]:
    """Measure the median seconds until each exit's answer on one sample.

    Only the head of that exit runs. The weights do not matter.
    """
    del folder
    network = build(net, shape[0], shape[1:], num_classes=10)
    costs = profile(network, torch.randn(1, *shape), repeats=50, warm_up=5, max_seconds=5.0)
    return {"contract_s": list(costs.contract_s(statistic="p50"))}
