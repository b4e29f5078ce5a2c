"""Compare early exit with the alternatives that a user has.

All use the same trained network and images. Time per image and accuracy are measured in turn.

    # trains heads, fetches earlyon; about 4 minutes; the machine may be busy
    python benchmarks/alternatives.py --prepare
    # about 8 minutes; a run that was stopped goes on where it was
    python benchmarks/alternatives.py
    # a minute, to see that it runs
    python benchmarks/alternatives.py --smoke

Two networks with four exits: the pretrained CIFAR-10 ResNet-56 of the shared data with three linear
heads trained on its frozen features (without the shared data: a small ResNet on scikit-learn's
digits), and torchvision's MobileNetV3-small at 224 pixels with random weights, heads and images, of
which only the times mean anything; there the threshold lets half of the images leave at the first
exit. One rule: leave at the first exit whose greatest probability is at least the threshold. Every
way has its own copy of the modules on the same tensors: backbone, heads and weights are equal.
Times are means over the images, over those of the network without exits and over those of the
exception, by the clock and by the thread's processor time, which other work disturbs least:

* **Runner**: `impatient.Runner` with a `ThresholdPolicy`; in batches, samples that are done are
  taken out;
* **Runner, deadline**: the same with a deadline that is far enough, so a contract run;
* **exits**: the plain loop over `network.exits(x)`; stops when all samples of the batch are sure;
* **earlyon** 0.3.0: `EarlyExitWrapper` around the same backbone, given the same heads. In batches
  its `forward_inference_batched` leaves when all samples are sure;
* **exception**: a hook that raises, 20 lines of one's own; stops when all samples of the batch are
  sure;
* **split**: an nn.Sequential per stage, cut by hand, and a loop over them;
* **oracle**: leaves where that is known beforehand, with neither other heads nor scores: the limit;
* **exception again**, **whole again**: the same once more (A/A);
* **extractor**: torchvision's `create_feature_extractor`; computes everything, then asks the heads;
* **whole**: the network without exits.

What could not be made equal: Runner and earlyon return more than the outputs (why it stopped;
shares of operations), and pay for it; the extractor runs a traced graph. At batch 1 all that leave
early must agree in exit and output.
"""

from __future__ import annotations

import functools
import itertools
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import KEPT, Row, ratio_of_means, run_cases, twin
from torch import Tensor, nn

from impatient import Deadline, Runner, attach_exits, load_data, load_model, profile
from impatient.errors import DataError
from impatient.evaluation.metrics import proportion
from impatient.files import read_json, read_tensors, write_json, write_tensors
from impatient.networks import MultiExitNetwork
from impatient.networks.specs import import_torchvision
from impatient.policies import ThresholdPolicy
from papers.adaptive_neural_networks.networks import (
    CIFAR_MEAN,
    CIFAR_STD,
    CifarResNet,
    load_pretrained,
)
from papers.data import data_spec, shared_folder

EARLYON = KEPT / "earlyon"
PACKAGES = ["earlyon==0.3.0", "fvcore", "iopath", "yacs", "portalocker", "tabulate", "termcolor"]
EXITS = ["layer1.8", "layer2.8", "layer3.4"]
MOBILE_EXITS = ["features.3", "features.6", "features.9"]
MOBILE_IMAGES = 128
THRESHOLDS = (0.5, 0.7, 0.9)
# so far off that it stops no run, seconds
FAR = 10.0
# measured at batch 1; four times as many at batch 32
IMAGES = 960
SECONDS = 36.0

# outputs, and the exit of each sample
Answer = tuple[Tensor, list[int]]
Way = Callable[[Tensor], Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A network whose exits were trained, and what it is tested on.

    Attributes:
        labels: None where nothing was learned.
        accuracy: per exit, on all test images.
        data: which, in words.
    """

    network: MultiExitNetwork
    images: Tensor
    labels: Tensor | None
    accuracy: tuple[float, ...]
    data: str


class TraceableResNet(CifarResNet):
    """The same network, in words that torch.fx can follow, which the extractor needs."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def trained(depth: int, exits: list[str], *, small: bool = False) -> Trained:
    """Load a pretrained CIFAR ResNet with trained heads, or train and keep them.

    Args:
        depth: 20, 32, 44 or 56.
        exits: modules of it.
        small: the digits instead, with a network of seconds; also without the shared data.
    """
    if small or not _has_shared_data():
        return _digits(exits)
    torch.manual_seed(0)
    archive = np.load(data_spec("cifar10").removeprefix("npz:"))
    backbone = TraceableResNet(depth=depth)
    load_pretrained(backbone, f"resnet{depth}", shared_folder() / "cifar10_resnets.npz")
    network = attach_exits(backbone, example=torch.zeros(1, 3, 32, 32), after=exits).eval()
    images = _normalised(archive["x_test"])
    labels = torch.from_numpy(archive["y_test"].astype(np.int64))
    folder = KEPT / "trained" / f"resnet{depth}-{'-'.join(exits)}"
    if not (folder / "accuracy.json").is_file():
        some = np.random.default_rng(0).permutation(len(archive["x_train"]))[:20_000]
        _train_heads(
            network,
            _normalised(archive["x_train"][some]),
            torch.from_numpy(archive["y_train"][some].astype(np.int64)),
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(
            folder / "heads.safetensors", dict(network.heads.state_dict()), {"kind": "weights"}
        )
        write_json(folder / "accuracy.json", {"accuracy": _accuracy(network, images, labels)})
    network.heads.load_state_dict(read_tensors(folder / "heads.safetensors")[0])
    return Trained(
        network=network,
        images=images,
        labels=labels,
        accuracy=tuple(read_json(folder / "accuracy.json")["accuracy"]),
        data="CIFAR-10 (9,979 exact test images + 21)",
    )


def mobilenet(*, small: bool = False) -> Trained:
    """Build a MobileNetV3 with random weights, heads and images, of which only times mean much."""
    torch.manual_seed(0)
    images = torch.randn(8 if small else MOBILE_IMAGES, 3, 224, 224)
    backbone = load_model("torchvision:mobilenet_v3_small")
    network = attach_exits(backbone, example=images[:1], after=MOBILE_EXITS).eval()
    return Trained(
        network=network,
        images=images,
        labels=None,
        accuracy=(),
        data="MobileNetV3-small, random weights and images of 224 pixels",
    )


def half_leave(network: MultiExitNetwork, images: Tensor) -> float:
    """Return the threshold at which half of some images leave at the first exit."""
    with torch.inference_mode():
        first = [network(image)[0].softmax(1).amax(1) for image in images.split(1)]
    return float(torch.cat(first).quantile(0.5))


def _has_shared_data() -> bool:
    try:
        shared_folder()
    except DataError:
        return False
    return True


def _normalised(images: np.ndarray) -> Tensor:
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    return (
        (x - torch.tensor(CIFAR_MEAN)[:, None, None]) / torch.tensor(CIFAR_STD)[:, None, None]
    ).contiguous()


def _digits(exits: list[str]) -> Trained:
    torch.manual_seed(0)
    data = load_data("digits")
    backbone = TraceableResNet(depth=14, in_channels=data.example().shape[1])
    after = (
        [f"layer{number}.0" for number in range(1, 4)][: len(exits)]
        if len(exits) <= 3
        else "every:1"
    )
    network = attach_exits(backbone, example=data.example(), after=after)
    x, y = (torch.cat(parts) for parts in zip(*data.batches("train"), strict=True))
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    for part in torch.randperm(len(x) * 6).remainder(len(x)).split(64):
        optimiser.zero_grad()
        sum(nn.functional.cross_entropy(output, y[part]) for output in network(x[part])).backward()
        optimiser.step()
    network.eval()
    images, labels = (torch.cat(parts) for parts in zip(*data.batches("test"), strict=True))
    accuracy = tuple(_accuracy(network, images, labels))
    return Trained(
        network=network,
        images=images,
        labels=labels,
        accuracy=accuracy,
        data="scikit-learn's digits",
    )


def _train_heads(network: MultiExitNetwork, images: Tensor, labels: Tensor) -> None:
    """Train linear layers for 20 epochs on features that the frozen backbone gives once."""
    pooled: list[list[Tensor]] = [[] for _ in network.heads]
    with torch.no_grad():
        for batch in images.split(250):
            with network.exits(batch) as run:
                for exit in run:
                    if exit.index < len(pooled):
                        pooled[exit.index].append(network.pooled(exit))
    for head, parts in zip(network.heads, pooled, strict=True):
        features = torch.cat(parts)
        layer = next(module for module in head.modules() if isinstance(module, nn.Linear))
        optimiser = torch.optim.Adam(layer.parameters(), lr=0.01)
        for part in torch.randint(len(features), (20 * len(features),)).split(500):
            optimiser.zero_grad()
            nn.functional.cross_entropy(layer(features[part]), labels[part]).backward()
            optimiser.step()


def _accuracy(network: MultiExitNetwork, images: Tensor, labels: Tensor) -> list[float]:
    with torch.inference_mode():
        outputs = [
            torch.cat(parts)
            for parts in zip(*(network(batch) for batch in images.split(250)), strict=True)
        ]
    return [float((output.argmax(1) == labels).float().mean()) for output in outputs]


# --- the ways -------------------------------------------------------------------------------------


def sure(output: Tensor, threshold: float) -> bool:
    return bool((output.softmax(1).amax(1) >= threshold).all())


def copied(network: MultiExitNetwork) -> MultiExitNetwork:
    """Copy the modules of a network, but share its tensors."""
    heads = [twin(head) for head in network.heads]
    return MultiExitNetwork(
        twin(network.backbone), heads, network.cuts, network.layouts, network.num_classes
    ).eval()


def with_runner(
    network: MultiExitNetwork, x: Tensor, threshold: float, *, deadline: bool = False
) -> Way:
    made = copied(network)
    costs = profile(made, x[:1], batch_sizes=sorted({1, len(x)}), repeats=30, max_seconds=5)
    thresholds = (*([threshold] * len(made.heads)), -math.inf)
    runner = Runner(made, costs, ThresholdPolicy(score="max_probability", thresholds=thresholds))

    def answer(x: Tensor) -> Answer:
        given = runner.run(x, deadline=Deadline.after(FAR)) if deadline else runner.run(x)
        return given.output, list(given.exits)

    return answer


def with_exits(network: MultiExitNetwork, threshold: float) -> Way:
    made = copied(network)

    def answer(x: Tensor) -> Answer:
        with torch.inference_mode(), made.exits(x) as run:
            for exit in run:
                if sure(exit.output(), threshold):
                    break
            return exit.output(), [exit.index] * len(x)

    return answer


def with_earlyon(network: MultiExitNetwork, x: Tensor, threshold: float) -> Way:
    import_torchvision()
    # behind everything else: its small dependencies only where there are none
    sys.path.append(str(EARLYON))
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint

    points = [ExitPoint(f"e{index}", cut.module, 1) for index, cut in enumerate(network.cuts)]
    heads = {point.name: twin(head) for point, head in zip(points, network.heads, strict=True)}
    config = EarlyExitConfig(
        backbone="custom",
        num_classes=network.num_classes,
        exit_points=points,
        confidence_thresholds=[threshold] * len(points),
    )
    # for its estimate of operations, made once, in the warm-up
    shape = (1, *x.shape[1:])
    wrapper = EarlyExitWrapper(
        twin(network.backbone), heads, lambda output: output, config, input_shape=shape
    ).eval()

    def answer(x: Tensor) -> Answer:
        result = wrapper(x) if len(x) == 1 else wrapper.forward_inference_batched(x)
        output = result.prediction if len(x) == 1 else result.predictions
        return output, [len(points) if result.exit_taken < 0 else result.exit_taken] * len(x)

    return answer


class Left(Exception):
    """A batch is sure: with which output, at which exit."""


def with_exception(network: MultiExitNetwork, threshold: float) -> Way:
    backbone = twin(network.backbone)

    def leave(
        head: nn.Module, index: int, _module: nn.Module, _args: Any, features: Tensor
    ) -> None:
        output = head(features)
        if sure(output, threshold):
            raise Left(output, index)

    for index, (cut, head) in enumerate(zip(network.cuts, network.heads, strict=True)):
        backbone.get_submodule(cut.module).register_forward_hook(
            functools.partial(leave, twin(head), index)
        )

    def answer(x: Tensor) -> Answer:
        with torch.inference_mode():
            try:
                return backbone(x), [len(network.heads)] * len(x)
            except Left as left:
                return left.args[0], [left.args[1]] * len(x)

    return answer


def with_split(network: MultiExitNetwork, threshold: float) -> Way:
    parts = split_by_hand(twin(network.backbone), [cut.module for cut in network.cuts])
    heads = [twin(head) for head in network.heads]

    def answer(x: Tensor) -> Answer:
        with torch.inference_mode():
            for index, (part, head) in enumerate(zip(parts, heads, strict=False)):
                x = part(x)
                output = head(x)
                if sure(output, threshold):
                    return output, [index] * len(x)
            return parts[-1](x), [len(heads)] * len(x)

    return answer


def split_by_hand(backbone: nn.Module, after: list[str]) -> list[nn.Sequential]:
    """Cut a CIFAR ResNet, or a MobileNetV3, after these blocks."""
    if not isinstance(backbone, CifarResNet):
        places = [int(name.removeprefix("features.")) + 1 for name in after]
        blocks = list(backbone.features)
        cut = [blocks[low:high] for low, high in itertools.pairwise((0, *places, len(blocks)))]
        cut[-1] += [backbone.avgpool, nn.Flatten(), backbone.classifier]
        return [nn.Sequential(*part) for part in cut]
    stem = nn.Sequential(backbone.conv1, backbone.bn1, nn.ReLU())
    end = nn.Sequential(Average(), backbone.linear)
    named = [
        (f"layer{number}.{index}", block)
        for number in (1, 2, 3)
        for index, block in enumerate(backbone.get_submodule(f"layer{number}"))
    ]
    parts = [[stem]]
    for name, block in named:
        parts[-1].append(block)
        if name in after:
            parts.append([])
    parts[-1].append(end)
    return [nn.Sequential(*part) for part in parts]


class Average(nn.Module):
    """The mean over space."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def with_oracle(network: MultiExitNetwork, threshold: float) -> Way:
    backbone = twin(network.backbone)
    ask = with_exits(network, threshold)
    known: dict[int, int] = {}
    leaving: list[int] = []

    def leave(
        head: nn.Module, index: int, _module: nn.Module, _args: Any, features: Tensor
    ) -> None:
        if leaving[0] == index:
            raise Left(head(features), index)

    for index, (cut, head) in enumerate(zip(network.cuts, network.heads, strict=True)):
        backbone.get_submodule(cut.module).register_forward_hook(
            functools.partial(leave, twin(head), index)
        )

    def answer(x: Tensor) -> Answer:
        leaving[:] = [known[id(x)]]
        with torch.inference_mode():
            try:
                return backbone(x), [len(network.heads)] * len(x)
            except Left as left:
                return left.args[0], [left.args[1]] * len(x)

    def prepare(x: Tensor) -> None:
        known[id(x)] = ask(x)[1][0]

    PREPARED["oracle"] = prepare
    return answer


# what a way is told of an input before anything is timed
PREPARED: dict[str, Callable[[Tensor], None]] = {}


def with_extractor(network: MultiExitNetwork, threshold: float) -> Way:
    import_torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    backbone = twin(network.backbone)
    heads = [twin(head) for head in network.heads]
    names = [cut.module for cut in network.cuts]
    last = get_graph_node_names(backbone)[1][-1]
    extractor = create_feature_extractor(backbone, [*names, last]).eval()

    def answer(x: Tensor) -> Answer:
        with torch.inference_mode():
            features = extractor(x)
            for index, name in enumerate(names):
                output = heads[index](features[name])
                if sure(output, threshold):
                    return output, [index] * len(x)
            return features[last], [len(names)] * len(x)

    return answer


def without_exits(network: MultiExitNetwork) -> Way:
    backbone = twin(network.backbone)

    def answer(x: Tensor) -> Answer:
        with torch.inference_mode():
            return backbone(x), [len(network.heads)] * len(x)

    return answer


# --- measuring ------------------------------------------------------------------------------------


def measure(model: str, batch: int, threshold: float | None, *, smoke: bool) -> list[Row]:
    torch.set_num_threads(1)
    given = mobilenet(small=smoke) if model == "mobilenet" else trained(56, EXITS, small=smoke)
    if threshold is None:
        threshold = half_leave(given.network, given.images[:64])
    count = 4 * batch if smoke else IMAGES * (4 if batch > 1 else 1)
    # again from the first where there are too few
    places = np.resize(np.random.default_rng(1).permutation(len(given.images)), count)
    batches = [
        torch.from_numpy(part) for part in np.array_split(places, max(1, len(places) // batch))
    ]
    first = given.images[:batch]
    network = given.network
    ways = {
        "whole": without_exits(network),
        "Runner": with_runner(network, first, threshold),
        "Runner, deadline": with_runner(network, first, threshold, deadline=True),
        "exits": with_exits(network, threshold),
        "earlyon": with_earlyon(network, first, threshold),
        "exception": with_exception(network, threshold),
        "exception again": with_exception(network, threshold),
        "split": with_split(network, threshold),
        "oracle": with_oracle(network, threshold),
        "extractor": with_extractor(network, threshold),
        "whole again": without_exits(network),
    }
    seen = list(timed(ways, given.images, batches))
    if batch == 1:
        agree([answers for _, answers in seen])
    times = {way: np.array([taken[way] for taken, _ in seen]) / batch for way in seen[0][0]}
    return [
        {
            "data": given.data,
            "batch": batch,
            "threshold": f"{threshold:.4g}",
            "way": way,
            "batches": len(seen),
            "ms an image": f"{np.mean(times[way]) * 1e3:.3f}",
            "time / whole": in_words(times[way], times["whole"]),
            "time / exception": in_words(times[way], times["exception"]),
            "processor / exception": in_words(
                times[f"{way}, processor"], times["exception, processor"]
            ),
            "mean exit": f"{np.mean([exit for _, got in seen for exit in got[way][1]]):.2f}",
            "accuracy": ""
            if given.labels is None
            else right(
                [answers[way][0] for _, answers in seen],
                [given.labels[part] for part in batches[: len(seen)]],
            ),
        }
        for way in ways
    ]


def timed(
    ways: dict[str, Way], images: Tensor, batches: list[Tensor]
) -> Iterator[tuple[dict[str, float], dict[str, Answer]]]:
    """Per batch, seconds and answers of all ways, asked in random order."""
    order = np.random.default_rng(0)
    names = list(ways)
    first = images[batches[0]]
    for prepare in PREPARED.values():
        prepare(first)
    for name in names * 3:
        ways[name](first)
    begin = time.perf_counter()
    for number, part in enumerate(batches):
        if number >= 5 and time.perf_counter() - begin > SECONDS:
            return
        x = images[part]
        for prepare in PREPARED.values():
            prepare(x)
        taken = {}
        answers = {}
        for name in order.permutation(names):
            before = time.perf_counter()
            processor = time.thread_time()
            answers[name] = ways[name](x)
            taken[f"{name}, processor"] = time.thread_time() - processor
            taken[name] = time.perf_counter() - before
        yield taken, answers


def agree(answers: list[dict[str, Answer]]) -> None:
    """Raise unless all that leave early left at the same exit with the same output."""
    for given in answers:
        output, exits = given["exits"]
        for way in given.keys() - {"exits", "whole", "whole again"}:
            if given[way][1] != exits or not torch.allclose(given[way][0], output, atol=1e-4):
                raise RuntimeError(
                    f"{way} left at {given[way][1]}, the plain loop at {exits}, or their outputs "
                    "differ."
                )


def in_words(values: np.ndarray, base: np.ndarray) -> str:
    ratio, low, high = ratio_of_means(values, base)
    return f"{ratio:.3f} ({low:.3f} to {high:.3f})"


def right(outputs: list[Tensor], labels: list[Tensor]) -> str:
    hits = sum(
        int((output.argmax(1) == label).sum())
        for output, label in zip(outputs, labels, strict=True)
    )
    share = proportion(hits, sum(len(label) for label in labels))
    return f"{share.value:.2%} ({share.low:.2%} to {share.high:.2%})"


CASES: dict[str, tuple[str, int, float | None]] = {
    f"{batch}-{threshold}": ("resnet56", batch, threshold)
    for batch in (1, 32)
    for threshold in THRESHOLDS
} | {f"mobilenet-{batch}": ("mobilenet", batch, None) for batch in (1, 32)}


def prepare() -> None:
    if not EARLYON.is_dir():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(EARLYON),
            *PACKAGES,
        ]
        subprocess.run(pip, check=True)
    trained(56, EXITS)


if __name__ == "__main__":
    if not EARLYON.is_dir() and "--prepare" not in sys.argv:
        sys.exit(
            "earlyon is not there; run with --prepare first (it is put into runs/bench, not into "
            "this environment)."
        )
    run_cases(
        "alternatives",
        "Against the alternatives",
        __doc__,
        CASES,
        measure,
        smoke=["1-0.9", "32-0.9", "mobilenet-1"],
        prepare=prepare,
    )
