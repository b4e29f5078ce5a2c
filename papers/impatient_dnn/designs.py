"""Early prediction layers compared: `python -m papers.impatient_dnn.designs`.

The paper names several architectures of early prediction layers; its figure of them is lost. Here
every head of the library is trained on the features of one frozen network, which are computed
once: what does each exit answer right, how long does the head take, and how much cheaper do runs
get that stop when they are certain already?
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from impatient import (
    CostProfile,
    Data,
    MultiExitNetwork,
    Recording,
    attach_exits,
    fit_thresholds,
    load_model,
    profile,
)
from impatient.errors import NoEffectWarning
from impatient.files import read_tensors, write_tensors, write_text
from impatient.provenance import machine
from papers.data import ROOT, shared_folder
from papers.impatient_dnn.long import LONG
from papers.impatient_dnn.mobilenet import MobileNet, imagenet_weights
from papers.impatient_dnn.recipe import IMAGENET, SCALES, Pair, Settings, target_of
from papers.jobs import Job, run_jobs
from papers.results import fill, made_by, markdown, sampling_half_width, write_csv

HERE = Path(__file__).parent
RUNS = ROOT / "runs" / "papers" / "impatient_dnn" / "designs"
DESIGNS = {
    "linear": "pool, linear",
    "mlp": "pool, hidden layer of 128",
    "adaptive": "pool to 2x2, linear",
    "flatten": "linear on the whole map",
    "conv1x1": "1x1 convolution, pool, linear",
    "rescale": "resize to 7x7, 1x1 convolution, pool, linear",
    "msdnet": "two 3x3 convolutions, pool, linear",
}
SPLITS = ("train", "validation", "test")
# how much accuracy runs that stop early may lose on the validation split
LOSSES = (0.005, 0.01)
CLASSIFIER = "classifier"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is trained.

    Attributes:
        settings: its sizes of the splits alone.
        designs: which of `DESIGNS`.
        rates: learning rates of AdamW to choose from, for each head by itself.
        repeats: of the cost measurement.
    """

    pair: Pair
    settings: Settings
    designs: tuple[str, ...]
    epochs: int
    batch_size: int
    rates: tuple[float, ...]
    repeats: int


PLANS = {
    "smoke": Plan(
        pair=SCALES["smoke"].pairs[1],
        settings=dataclasses.replace(SCALES["smoke"].settings, train=200, validation=100),
        designs=tuple(DESIGNS),
        epochs=2,
        batch_size=32,
        rates=(1e-3, 1e-2),
        repeats=20,
    ),
    "cpu": Plan(
        pair=LONG.pairs[0],
        settings=dataclasses.replace(LONG.settings, train=4000, validation=2000),
        # at the first exit MSDNet's computes half as much as the whole network, and trains longest
        designs=tuple(name for name in DESIGNS if name != "msdnet"),
        epochs=6,
        batch_size=64,
        rates=(2e-3, 1e-2),
        repeats=200,
    ),
}


def run(plan: Plan, folder: Path, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Compute the features once, then train, time and judge each design."""
    arguments = {"plan": plan, "seed": seed}
    features = Job(f"features-seed{seed}", compute_features, arguments)
    run_jobs([features], folder, workers=1)
    jobs = [
        Job(f"{design}-seed{seed}", train_design, {**arguments, "design": design})
        for design in plan.designs
    ]
    results = run_jobs(jobs, folder, workers=1)
    return {design: results[job.name] for design, job in zip(plan.designs, jobs, strict=True)}


def backbone_of(pair: Pair, target: Data, seed: int) -> nn.Module:
    """Build the frozen network, as ImageNet taught it or, for other sources, untrained."""
    torch.manual_seed(seed)
    backbone = load_model(
        pair.network, num_classes=target.num_classes, in_channels=target.preprocess.channels
    )
    if pair.source == IMAGENET:
        assert isinstance(backbone, MobileNet)
        imagenet_weights(backbone, shared_folder() / "mobilenets_imagenet_u8.npz")
    return backbone.eval()


def compute_features(plan: Plan, seed: int, *, folder: Path) -> dict[str, Any]:
    """Write the maps at all cuts, and what the classifier sees, in half precision."""
    target = target_of(plan.pair, plan.settings, seed)
    backbone = backbone_of(plan.pair, target, seed)
    counts = {}
    for split in SPLITS:
        maps = _maps(backbone, plan.pair, target, split)
        labels = target.examples(split).labels
        write_tensors(folder / f"{split}.safetensors", {**maps, "labels": labels}, {"split": split})
        counts[split] = len(labels)
    return {"counts": counts}


def _maps(backbone: nn.Module, pair: Pair, target: Data, split: str) -> dict[str, Tensor]:
    kept: dict[str, list[Tensor]] = {name: [] for name in (*pair.cuts(), CLASSIFIER)}
    hooks = [
        backbone.get_submodule(name).register_forward_hook(
            lambda _, __, output, parts=kept[name]: parts.append(output.half())
        )
        for name in pair.cuts()
    ]
    hooks.append(
        backbone.get_submodule(CLASSIFIER).register_forward_pre_hook(
            lambda _, inputs: kept[CLASSIFIER].append(inputs[0].half())
        )
    )
    with torch.inference_mode():
        for inputs, _ in target.batches(split, 64):  # type: ignore[arg-type]
            backbone(inputs)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


def train_design(plan: Plan, seed: int, design: str, *, folder: Path) -> dict[str, Any]:
    """Train the heads of one design, then time and judge the network with them.

    Returns:
        Accuracy by exit and split, each head's rate, cost profile in medians, and what stopping
        early brings.
    """
    found = {
        split: read_tensors(folder.parent / f"features-seed{seed}" / f"{split}.safetensors")[0]
        for split in SPLITS
    }
    target = target_of(plan.pair, plan.settings, seed)
    backbone = backbone_of(plan.pair, target, seed)
    torch.manual_seed(seed)
    network = attach_exits(backbone, after=plan.pair.cuts(), heads=design, example=target.example())
    places = (*plan.pair.cuts(), CLASSIFIER)
    rates = []
    outputs: dict[str, list[Tensor]] = {"validation": [], "test": []}
    for index, place in enumerate(places):
        head = backbone.get_submodule(CLASSIFIER) if place == CLASSIFIER else network.heads[index]
        rate, trained = best_head(head, place, found, plan, seed)
        head.load_state_dict(trained.state_dict())
        rates.append(rate)
        for split, parts in outputs.items():
            parts.append(answers(head, found[split][place]))
    recordings = {
        split: Recording.of(
            torch.stack(parts), found[split]["labels"], split=split, exits=network.exit_names
        )
        for split, parts in outputs.items()
    }
    costs = profile(network, target.example(), repeats=plan.repeats)
    return {
        **{split: recording.quality.mean(1).tolist() for split, recording in recordings.items()},
        "rates": rates,
        **_times(costs, network),
        "certain": stopped(recordings["validation"], recordings["test"], costs),
        "counts": {split: len(found[split]["labels"]) for split in SPLITS},
        "processor": machine("cpu")["processor"],
    }


def best_head(
    head: nn.Module, place: str, found: Mapping[str, Mapping[str, Tensor]], plan: Plan, seed: int
) -> tuple[float, nn.Module]:
    """Train a copy of a head at every rate, and return the best on the validation split."""
    best = (-1.0, 0.0, head)
    for rate in plan.rates:
        trained = trained_head(
            head, found["train"][place], found["train"]["labels"], rate, plan, seed
        )
        guesses = answers(trained, found["validation"][place]).argmax(1)
        accuracy = float((guesses == found["validation"]["labels"]).float().mean())
        if accuracy > best[0]:
            best = (accuracy, rate, trained)
    return best[1], best[2]


def trained_head(
    head: nn.Module, maps: Tensor, labels: Tensor, rate: float, plan: Plan, seed: int
) -> nn.Module:
    """Train a copy of a head on maps whose channels are scaled to deviation 1.

    The scales then go into its first layer, so that it takes the maps as they are.
    """
    trained = copy.deepcopy(head).train()
    channels = [dim for dim in range(maps.dim()) if dim != 1]
    scale = 1.0 / maps.float().std(channels).clamp(min=1e-3)
    shaped = scale.reshape(1, -1, *[1] * (maps.dim() - 2))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=rate, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    steps = plan.epochs * (len(labels) // plan.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(plan.epochs):
        order = torch.randperm(len(labels), generator=generator)
        whole = order[: len(order) - len(order) % plan.batch_size]
        for rows in whole.split(plan.batch_size):
            loss = nn.functional.cross_entropy(trained(maps[rows].float() * shaped), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    absorb(trained, scale)
    return trained.eval()


def absorb(head: nn.Module, scale: Tensor) -> None:
    """Multiply the weights of a head's first layer, so that it takes unscaled channels."""
    first = next(layer for layer in head.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    # a linear layer on a map has the positions of a channel side by side
    repeated = scale.repeat_interleave(first.weight.shape[1] // len(scale))
    with torch.no_grad():
        first.weight.mul_(repeated.reshape(1, -1, *[1] * (first.weight.dim() - 2)))


def answers(head: nn.Module, maps: Tensor) -> Tensor:
    """Run a head on stored maps."""
    with torch.inference_mode():
        return torch.cat([head(part.float()) for part in maps.split(256)])


def _times(costs: CostProfile, network: MultiExitNetwork) -> dict[str, Any]:
    """Return medians in seconds: of each early head alone, and until each exit's answer."""
    early = len(network.heads)
    heads = [each.p50 for each in costs.batches[1].heads[:early]]
    return {
        "head_s": heads,
        "until_s": list(costs.contract_s(statistic="p50")),
        "head_macs": list(costs.head_macs[:early]),
    }


def stopped(validation: Recording, test: Recording, costs: CostProfile) -> list[dict[str, float]]:
    """Fit thresholds that may lose so much on validation, and judge them on the test split."""
    rows = []
    for loss in LOSSES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEffectWarning)
            policy = fit_thresholds(validation, costs, max_accuracy_loss=loss, statistic="p50")
        seconds = {
            part.split: float(policy.outcome(part, costs, statistic="p50").contract_s.mean())
            for part in (validation, test)
        }
        exits = policy.outcome(test, costs, statistic="p50").exits
        hits = test.quality[exits, torch.arange(len(test))]
        rows.append(
            {
                "allowed": loss,
                "seconds_on_validation": seconds["validation"],
                "seconds": seconds["test"],
                "lost": float(test.quality[-1].mean() - hits.mean()),
                "early": float((exits < costs.num_exits - 1).float().mean()),
            }
        )
    return rows


def best_design(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the design whose runs are fastest on the validation split, at the largest loss."""
    return max(results, key=lambda name: faster(results[name], -1, "seconds_on_validation"))


def faster(result: Mapping[str, Any], row: int, which: str = "seconds") -> float:
    """Return how many times as fast runs are that stop early as those to the last exit.

    Both are sums of the same stages' medians. The network without exits is no measure here: on a
    core that is shared, a run of some milliseconds is interrupted more often than a stage is.
    """
    whole = float(result["until_s"][-1])
    return whole / float(result["certain"][row][which])


def rows_of(results: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield accuracy and time of every early exit of every design."""
    for design, result in results.items():
        for exit, seconds in enumerate(result["head_s"]):
            yield {
                "design": design,
                "exit": exit,
                "rate": result["rates"][exit],
                "validation": result["validation"][exit],
                "test": result["test"][exit],
                "head_ms": 1e3 * seconds,
                "until_ms": 1e3 * result["until_s"][exit],
                "head_macs": result["head_macs"][exit],
            }


def page(plan: Plan, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Write both tables as markdown, with what follows from them."""
    first = results["linear"]
    best = best_design(results)
    counts = first["counts"]
    head_table = [
        {
            "head": f"{design}: {DESIGNS[design]}",
            "accuracy by early exit, %": _each(result["test"][:-1], 100, 1),
            "its own time, ms": _each(result["head_s"], 1e3, 3),
            "multiply-accumulates, millions": _each(result["head_macs"], 1e-6, 2),
        }
        for design, result in results.items()
    ]
    return f"""- {_verdict(results)}
- Runs that stop when they are certain already, best head by the validation split ({best}): \
{_certain(results[best])}

{markdown(head_table)}

The last exit, the network's own classifier on the same frozen features, is the same for all: \
{100 * first["test"][-1]:.1f} %, {1e3 * first["until_s"][-1]:.2f} ms from the start.

{markdown([_certain_row(design, result) for design, result in results.items()])}

{plan.pair.name}, {len(first["head_s"]) + 1} exits; heads trained on {counts["train"]:,} images, \
{plan.epochs} epochs of AdamW, each head's rate chosen by the {counts["validation"]:,} validation \
images from {", ".join(f"{rate:g}" for rate in plan.rates)}; thresholds fitted on these, judged on \
{counts["test"]:,} test images; one seed. Times: medians of {plan.repeats} at batch size 1, while \
other programs ran; of runs by recordings and profile, against the last exit without the others. \
{made_by(str(first["processor"]), "papers.impatient_dnn.designs")}"""


def _each(values: Sequence[float], factor: float, digits: int) -> str:
    return " ".join(f"{factor * value:.{digits}f}" for value in values)


def _verdict(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Say which head answers best at every exit, and by how much the designs differ there."""
    early = len(results["linear"]["head_s"])
    parts = []
    for exit in range(early):
        at = {design: result["test"][exit] for design, result in results.items()}
        best = max(at, key=at.__getitem__)
        gain = at[best] - at["linear"]
        half = sampling_half_width((at[best], at["linear"]), results[best]["counts"]["test"])
        parts.append(f"{best} {100 * gain:+.1f} (±{100 * half:.1f})")
    return (
        "Best head of every early exit, in points over a linear one (95 % by the test images): "
        f"{'; '.join(parts)}."
    )


def _certain(result: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{faster(result, place):.2f} times as fast, {100 * row['lost']:.1f} points lost, where "
        f"{100 * row['allowed']:g} were allowed on validation"
        for place, row in enumerate(result["certain"])
    )


def _certain_row(design: str, result: Mapping[str, Any]) -> dict[str, str]:
    row = {"head": design}
    for place, found in enumerate(result["certain"]):
        allowed = f"at most {100 * found['allowed']:g} lost"
        row |= {
            f"{allowed}: times as fast": f"{faster(result, place):.2f}",
            f"{allowed}: points lost": f"{100 * found['lost']:.1f}",
            f"{allowed}: stop early, %": f"{100 * found['early']:.0f}",
        }
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the tables and fill the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=list(PLANS), required=True)
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--out", type=Path, help="folder of the tables; by default of the card")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan = PLANS[options.scale]
    results = run(plan, options.runs / options.scale)
    text = page(plan, results)
    out = options.out or HERE / "results" / f"designs-{options.scale}"
    write_csv(out / "designs.csv", list(rows_of(results)))
    write_text(out / "designs.md", text + "\n")
    if options.out is None and options.scale != "smoke":
        fill(HERE / "README.md", "designs", text)


if __name__ == "__main__":
    main()
