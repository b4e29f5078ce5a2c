"""What is trained for Table 1 of Impatient DNNs.

There are sizes for each scale, and a function for each kind of run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from impatient import (
    CostProfile,
    Data,
    MultiExitNetwork,
    Recipe,
    Recording,
    attach_exits,
    exit_weights,
    fit,
    load_model,
    load_weights,
    profile,
    record,
)
from impatient.budgets import STANDARD
from impatient.evaluation.evaluate import standard_budgets
from impatient.files import read_tensors, write_tensors
from impatient.networks import GivenWeights
from impatient.networks.heads import FeatureShape, HeadFactory, build_head
from impatient.provenance import fingerprint_structure, fingerprint_tensors, provenance
from impatient.store import from_plain, to_plain
from impatient.training.data import Split
from papers import data
from papers.impatient_dnn.mobilenet import MobileNet, imagenet_weights
from papers.impatient_dnn.probes import linear_probes
from papers.jobs import Job, finished, run_jobs

# the order of the paper's table
ROWS = ("uniform", "large_likely", "small_likely", "normal")
assert set(ROWS) == set(STANDARD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A network on a data set, with the data that it is pretrained on.

    The paper pretrains on ImageNet.

    Attributes:
        name: of data and network, for people and folders.
        target, source: data sets of `papers.data`; the source "imagenet" stands for the weights of
            the shared data's MobileNet, which nobody here trains.
        network: a model spec whose blocks are named blocks.0, blocks.1, ...
        blocks: how many it has; an exit after each, the last one's being the network's own output.
    """

    name: str
    target: str
    source: str
    network: str
    blocks: int

    def cuts(self) -> list[str]:
        """Modules after which the early exits lie."""
        return [f"blocks.{index}" for index in range(self.blocks - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes of one scale, the same for all compared methods.

    Attributes:
        train, validation: how many examples of the target's splits are kept; None keeps all. Test
            splits stay whole.
        source_train: likewise for what is trained on beforehand.
        pretraining: recipe on the source.
        training: recipe on the target, of FT and of joint training alike; its seed is replaced by
            the run's.
    """

    train: int | None
    validation: int | None
    source_train: int | None
    pretraining: Recipe
    training: Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Everything a scale decides.

    Attributes:
        repeats: of the cost measurement.
        threads: of torch in each run.
        head_lr: learning rate of the early heads in joint training; by default the recipe's.
            A pretrained backbone may need a smaller one than new heads.
        heads_first: whether early heads begin as logistic regressions on the pretrained network's
            features, and not at random.
    """

    pairs: tuple[Pair, ...]
    settings: Settings
    seeds: int
    workers: int
    threads: int
    repeats: int
    head_lr: float | None = None
    heads_first: bool = False


def _pairs(
    networks: Mapping[str, tuple[str, int]], data_sets: Mapping[str, str]
) -> tuple[Pair, ...]:
    return tuple(
        Pair(name=f"{target}-{name}", target=target, source=source, network=spec, blocks=blocks)
        for target, source in data_sets.items()
        for name, (spec, blocks) in networks.items()
    )


IMAGENET = "imagenet"

# of the SVMs; a wider range takes most of the time and changed little
STRENGTHS = (
    1e-3,
    1e-2,
    1e-1,
)

SMALL = {"vgg": ("impatient:vgg", 6), "resnet": ("impatient:resnet:n=2,c=8", 6)}
TINY = {
    "vgg": ("impatient:vgg:width=4,blocks=[1,1,1]", 3),
    "resnet": ("impatient:resnet:n=1,c=4", 3),
}
LARGE = {
    "vgg": ("impatient:vgg:width=32,blocks=[2,2,4,4]", 12),
    "resnet": ("impatient:resnet:n=9,c=32", 27),
}

SCALES: dict[str, Scale] = {
    # digits are pretrained on digits: this scale shows that the machinery works, and nothing else
    "smoke": Scale(
        pairs=_pairs(TINY, {"digits": "digits"}),
        seeds=1,
        workers=1,
        threads=1,
        repeats=100,
        settings=Settings(
            train=None,
            validation=None,
            source_train=None,
            pretraining=Recipe(epochs=2, batch_size=32, lr=0.05),
            training=Recipe(epochs=4, batch_size=32, lr=0.05),
        ),
    ),
    "cpu": Scale(
        pairs=_pairs(SMALL, {"fashion": "cifar10_grey", "cifar10": "gtsrb"}),
        seeds=3,
        workers=2,
        threads=1,
        repeats=1000,
        settings=Settings(
            train=6000,
            validation=1000,
            source_train=6000,
            pretraining=Recipe(epochs=4, batch_size=64, lr=0.05, channels_last=True),
            training=Recipe(epochs=4, batch_size=64, lr=0.05, channels_last=True),
        ),
    ),
    "gpu": Scale(
        pairs=_pairs(LARGE, {"cifar10": "gtsrb"}),
        seeds=1,
        workers=4,
        threads=4,
        repeats=1000,
        settings=Settings(
            train=None,
            validation=None,
            source_train=None,
            pretraining=Recipe(
                epochs=10, batch_size=128, lr=0.1, augment="crop", channels_last=True
            ),
            training=Recipe(
                epochs=30, batch_size=128, lr=0.1, augment="crop-flip", channels_last=True
            ),
        ),
    ),
}


def run(scale: Scale, folder: Path) -> None:
    """Run what is missing of a scale.

    Args:
        scale: pairs, settings, seeds and workers.
        folder: of the runs.
    """
    # costs first and one by one, before anything else keeps the machine busy
    costs = run_jobs([_cost_job(pair, scale) for pair in scale.pairs], folder, workers=1, threads=1)
    sources = [
        _source_job(pair, scale, seed) for pair in scale.pairs for seed in range(scale.seeds)
    ]
    for jobs in (sources, _target_jobs(scale, costs)):
        run_jobs(jobs, folder, workers=scale.workers, threads=scale.threads)


def results_so_far(scale: Scale, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results of a scale that are there, by name, and run nothing.

    They are none unless the costs are there: budgets, and so weights, depend on them.
    """
    costs = finished([_cost_job(pair, scale) for pair in scale.pairs], folder)
    if len(costs) < len(scale.pairs):
        return {}
    return {**costs, **finished(_target_jobs(scale, costs), folder)}


def _target_jobs(scale: Scale, costs: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    return [
        job
        for seed in range(scale.seeds)
        for pair in scale.pairs
        for job in _jobs_on_target(pair, scale, seed, costs)
    ]


def _cost_job(pair: Pair, scale: Scale) -> Job:
    return Job(f"{pair.name}-costs", measure_costs, {"pair": pair, "repeats": scale.repeats})


def _source_name(pair: Pair, seed: int) -> str:
    return f"{pair.name}-pretrained-{seed}"


def _source_job(pair: Pair, scale: Scale, seed: int) -> Job:
    return Job(
        _source_name(pair, seed), pretrain, {"pair": pair, "settings": scale.settings, "seed": seed}
    )


def _jobs_on_target(
    pair: Pair, scale: Scale, seed: int, costs: Mapping[str, Mapping[str, Any]]
) -> list[Job]:
    common = {"pair": pair, "settings": scale.settings, "seed": seed}
    jobs = [
        Job(f"{pair.name}-orig-{seed}", probe_pretrained, common),
        Job(f"{pair.name}-ft-{seed}", fine_tune, common),
    ]
    times = from_plain(costs[f"{pair.name}-costs"], CostProfile).interruptible_s()
    for row in ROWS:
        shares = exit_weights(standard_budgets(times)[row], times, normalise=True)
        # 1 on average, as with equal weights: steps of a usual size
        weights = [len(times) * share for share in shares]
        # without the options, arguments and fingerprints are as they always were
        heads: dict[str, Any] = {} if scale.head_lr is None else {"head_lr": scale.head_lr}
        if scale.heads_first:
            heads["heads_first"] = True
        arguments = {**common, "weights": weights, **heads}
        jobs.append(Job(f"{pair.name}-joint-{row}-{seed}", train_jointly, arguments))
    return jobs


def measure_costs(*, pair: Pair, repeats: int, folder: Path) -> dict[str, Any]:
    """Measure the times of the network with all exits, at batch size 1.

    They hold for every method, because the heads are alike.
    """
    del folder
    examples = data.load(pair.target, train=100, validation=100, seed=0)
    network = with_exits(_backbone(pair, examples, seed=0), pair, examples)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return to_plain(profile(network.to(device), examples.example().to(device), repeats=repeats))


def pretrain(*, pair: Pair, settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """Train the network without exits on the source, and keep its weights."""
    if pair.source == IMAGENET:
        return _imagenet(pair, seed, folder)
    source = data.load(
        pair.source, train=settings.source_train, validation=settings.validation, seed=seed
    )
    network = _without_exits(_backbone(pair, source, seed), source)
    accuracy = _fit(network, source, "const", settings.pretraining, seed, folder)
    write_tensors(
        folder / "weights.safetensors",
        network.backbone.state_dict(),
        {"kind": "weights", "job": folder.name},
    )
    _checkpoint(folder).unlink()
    return {"validation": accuracy}


def _imagenet(pair: Pair, seed: int, folder: Path) -> dict[str, Any]:
    """Keep the weights of ImageNet as `pretrain` keeps trained ones."""
    torch.manual_seed(seed)
    network = load_model(pair.network)
    assert isinstance(network, MobileNet)
    imagenet_weights(network, data.shared_folder() / "mobilenets_imagenet_u8.npz")
    write_tensors(
        folder / "weights.safetensors",
        network.state_dict(),
        {"kind": "weights", "job": folder.name},
    )
    return {"validation": []}


def probe_pretrained(*, pair: Pair, settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """ORIG: linear SVMs on every exit's features of the network that never saw the target."""
    target = target_of(pair, settings, seed)
    return _probes(_pretrained(pair, target, seed, folder), pair, target)


def fine_tune(*, pair: Pair, settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """Run FT: train the network without exits on the target, then probe it.

    The network's own accuracy is the static comparison.
    """
    target = target_of(pair, settings, seed)
    network = _without_exits(_pretrained(pair, target, seed, folder), target)
    _fit(network, target, "const", settings.training, seed, folder)
    result = {"alone": _judged(network, target), **_probes(network.backbone, pair, target)}
    _checkpoint(folder).unlink()
    return result


def train_jointly(
    *,
    pair: Pair,
    settings: Settings,
    seed: int,
    weights: Sequence[float],
    head_lr: float | None = None,
    heads_first: bool = False,
    folder: Path,
) -> dict[str, Any]:
    """Train all exits together from the pretrained weights.

    An exit weighs as much as the probability that its answer is the last in time.
    """
    target = target_of(pair, settings, seed)
    network = with_exits(_pretrained(pair, target, seed, folder), pair, target, standardised_linear)
    if heads_first:
        fit_heads(network, _features(network.backbone, pair, target, "train"))
    recipe, given = settings.training, None
    if head_lr is not None:
        recipe = dataclasses.replace(recipe, lr=head_lr, backbone_lr=recipe.lr)
        # the backbone's own classifier stays the new one, but learns as FT's does
        given = _given(network.backbone, pair, seed, folder)
    _fit(network, target, weights, recipe, seed, folder, given)
    result = _judged(network, target)
    _checkpoint(folder).unlink()
    return result


def _given(backbone: nn.Module, pair: Pair, seed: int, folder: Path) -> GivenWeights:
    """Say of a backbone with pretrained weights that it has them."""
    return load_weights(backbone, folder.parent / _source_name(pair, seed) / "weights.safetensors")


def with_exits(
    backbone: nn.Module, pair: Pair, examples: Data, heads: str | HeadFactory = "relu_linear"
) -> MultiExitNetwork:
    """Linear heads on pooled features after every block."""
    # with a ReLU, as before the backbones' own classifiers: after a pre-activation block it
    # matters, after VGG's it does not
    return attach_exits(backbone, example=examples.example(), after=pair.cuts(), heads=heads)


def standardised_linear(features: FeatureShape, num_classes: int) -> nn.Module:
    """Build a head of ReLU, pool, standardisation and a linear layer.

    It can compute the same functions as "relu_linear" and as the SVMs, which are standardised, too.

    Its cost is that of "relu_linear": in use, the batch norm belongs into the linear layer.
    """
    relu, pool, linear = build_head("relu_linear", features, num_classes).children()
    return nn.Sequential(relu, pool, nn.BatchNorm1d(features.channels), linear)


def fit_heads(network: MultiExitNetwork, features: Recording) -> None:
    """Begin with early heads that a logistic regression has fitted to features as they are.

    Args:
        network: with heads of `standardised_linear`.
        features: pooled, of the training split, at every exit of the network.
    """
    assert features.features is not None
    for head, own in zip(network.early_heads(), features.features, strict=False):
        norm, linear = list(head.children())[-2:]
        assert isinstance(norm, nn.BatchNorm1d)
        assert isinstance(linear, nn.Linear)
        deviation, mean = torch.std_mean(own, dim=0, correction=0)
        norm.running_mean.copy_(mean)  # type: ignore[union-attr]
        norm.running_var.copy_(deviation.square())  # type: ignore[union-attr]
        scaled = (own - mean) / (deviation.square() + norm.eps).sqrt()
        fitted = LogisticRegression(C=0.1, max_iter=1000).fit(scaled, features.labels)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(fitted.coef_))
            linear.bias.copy_(torch.from_numpy(fitted.intercept_))


def target_of(pair: Pair, settings: Settings, seed: int) -> Data:
    """Load the target's data, with pixels as the pretrained network takes them."""
    target = data.load(pair.target, train=settings.train, validation=settings.validation, seed=seed)
    if pair.source != IMAGENET:
        return target
    # what the MobileNets were trained on: numbers from -1 to 1
    middle = (0.5,) * target.preprocess.channels
    seen = dataclasses.replace(target.preprocess, mean=middle, std=middle)
    return dataclasses.replace(target, preprocess=seen)


def _backbone(pair: Pair, examples: Data, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return load_model(
        pair.network, num_classes=examples.num_classes, in_channels=examples.preprocess.channels
    )


def _without_exits(backbone: nn.Module, examples: Data) -> MultiExitNetwork:
    return attach_exits(backbone, example=examples.example(), after=[])


def _pretrained(pair: Pair, examples: Data, seed: int, folder: Path) -> nn.Module:
    """Build the backbone with the source's weights and a new classifier."""
    backbone = _backbone(pair, examples, seed)
    weights, _ = read_tensors(folder.parent / _source_name(pair, seed) / "weights.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("classifier.")}
    missing, unexpected = backbone.load_state_dict(kept, strict=False)
    assert not unexpected
    assert all(name.startswith("classifier.") for name in missing)
    return backbone


def _checkpoint(folder: Path) -> Path:
    """Keep a checkpoint only while a run lasts.

    Finished runs are many, and are copied between machines.
    """
    return folder / "checkpoint.safetensors"


def _fit(
    network: MultiExitNetwork,
    examples: Data,
    weights: Sequence[float] | str,
    recipe: Recipe,
    seed: int,
    folder: Path,
    given: GivenWeights | None = None,
) -> list[float]:
    """Train or resume, and return the validation accuracy per exit."""
    history = fit(
        network,
        examples,
        weights=weights,
        recipe=dataclasses.replace(recipe, seed=seed),
        given=given,
        checkpoint=_checkpoint(folder),
        metrics_csv=folder / "metrics.csv",
        progress=False,
    )
    return list(history.epochs[-1].validation_accuracy)


def _judged(network: MultiExitNetwork, target: Data) -> dict[str, list[float]]:
    """Accuracy per exit on the validation and the test split."""
    device = str(next(network.parameters()).device)
    splits = ("validation", "test")
    return {
        split: _accuracies(record(network, target, split=split, device=device)) for split in splits
    }


def _accuracies(recording: Recording) -> list[float]:
    return recording.quality.mean(1).tolist()


def _probes(backbone: nn.Module, pair: Pair, target: Data) -> dict[str, Any]:
    """Compute the accuracy of a linear SVM per exit.

    That of the last exit takes the features of the network's classifier.
    """
    splits: tuple[Split, ...] = ("train", "validation", "test")
    train, validation, test = (_features(backbone, pair, target, split) for split in splits)
    judged = linear_probes(train, validation, validation, test, C=STRENGTHS)
    return dict(zip(("validation", "test"), map(_accuracies, judged), strict=True))


def _features(backbone: nn.Module, pair: Pair, target: Data, split: Split) -> Recording:
    """Compute the features after every block as other methods' heads get them.

    They are passed through ReLU and averaged over space.
    """
    device = next(backbone.parameters()).device
    cuts = [f"blocks.{index}" for index in range(pair.blocks)]
    network = attach_exits(backbone, example=target.example().to(device), after=cuts).eval()
    kept: list[list[Tensor]] = [[] for _ in cuts]
    for inputs, _ in target.batches(split, 256):
        with torch.inference_mode(), network.exits(inputs.to(device)) as run:
            for exit in itertools.islice(run, len(cuts)):
                kept[exit.index].append(exit.features.relu().mean((2, 3)).float().cpu())
    labels = target.examples(split).labels
    state = backbone.state_dict()
    made = provenance(
        network=fingerprint_structure(state),
        weights=fingerprint_tensors(state),
        data=target.fingerprint,
    )
    return Recording.of(
        torch.zeros(len(cuts), len(labels), target.num_classes),
        labels,
        split=split,
        exits=tuple(cuts),
        features=tuple(torch.cat(parts) for parts in kept),
        provenance=made,
    )
