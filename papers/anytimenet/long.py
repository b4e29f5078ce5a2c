"""Trainings that take hours, one after the other: `python -m papers.anytimenet.long RUNS`.

AnytimeNet and BASELINE on all of CIFAR-10 or GTSRB, or of the scarce case, seed by seed, on one
thread. The precision is the one in which a step was faster on this machine; RUNS/precision.json has
the measurement. Stop them at any time; the same command goes on. Each result is in
RUNS/NAME/result.json as soon as it is there.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from impatient.files import write_text
from papers.anytimenet.recipe import NORMS, SCALES, THIN, Case, Net, Scale, build, jobs, key
from papers.data import load
from papers.jobs import finished, run_jobs
from papers.results import fill, made_by, markdown, sampling_half_width, spread, write_csv
from papers.throughput import chosen_precision

HERE = Path(__file__).parent
# with their augmentations
CASES = {case.name: case for case in SCALES["gpu"].cases}


def long_scale(case: Case, net: Net, *, epochs: int, seeds: int, width: int) -> Scale:
    """Return a scale whose learning rate rises for a quarter and falls along a cosine: one cycle.

    Its precision is still to be chosen.
    """
    cpu = SCALES["cpu"]
    training = dataclasses.replace(
        cpu.training, lr=0.4, warmup=0.25, calibration=4096, weight_decay=5e-4
    )
    return dataclasses.replace(
        cpu,
        cases=(dataclasses.replace(case, epochs=epochs, batch_size=128),),
        net=dataclasses.replace(net, width=width),
        training=training,
        seeds=seeds,
    )


def smoke() -> Scale:
    """Return the same trainings of a tiny network on digits, one seed."""
    small = SCALES["smoke"]
    scale = long_scale(small.cases[0], small.net, epochs=2, seeds=1, width=small.net.width)
    training = dataclasses.replace(scale.training, lr=0.1, calibration=200)
    return dataclasses.replace(scale, training=training)


def in_faster_precision(scale: Scale, folder: Path) -> Scale:
    """Measure a training step of the scale's AnytimeNet, unless the folder has a measurement."""
    case = scale.cases[0]
    data = load(case.data, train=case.images, validation=case.validation, seed=0)
    images, labels = next(data.batches("train", case.batch_size))
    network = build(scale.net, "anytime", data)
    precision = chosen_precision(
        network, images, torch.as_tensor(labels), folder / "precision.json"
    )
    return dataclasses.replace(
        scale, training=dataclasses.replace(scale.training, precision=precision)
    )


def options_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that say which long training is meant."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("runs", type=Path, help="folder of checkpoints and results")
    parser.add_argument("--smoke", action="store_true", help="on digits, to see that it runs")
    parser.add_argument("--case", choices=list(CASES), default="cifar10")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=THIN.width, help="channels; the paper's: 16")
    return parser


def chosen_scale(options: argparse.Namespace) -> Scale:
    """Return the scale that the options mean, in the faster precision."""
    case = CASES[options.case]
    size = {"epochs": options.epochs, "seeds": options.seeds, "width": options.width}
    scale = smoke() if options.smoke else long_scale(case, THIN, **size)
    return in_faster_precision(scale, options.runs)


def page(scale: Scale, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the accuracy of every iteration as markdown, with what follows from it.

    BASELINE's stands beside it, of those seeds whose training is among the results.
    """
    (case,) = scale.cases
    names = scale.net.schedule.names
    seeds = range(scale.seeds)
    runs = [results[key(case, "anytime", seed)] for seed in seeds]
    plain = baseline(scale, results)
    accuracies = {
        norms: [[100 * share for share in run[norms]["accuracy"]] for run in runs]
        for norms in NORMS
    }
    rows = [
        {
            "iteration": name,
            "own statistics, %": spread([run[place] for run in accuracies["own"]]).text(),
            "shared statistics, %": spread([run[place] for run in accuracies["shared"]]).text(),
            "BASELINE, %": spread([*plain.values()]).text()
            if plain and place == len(names) - 1
            else "",
        }
        for place, name in enumerate(names)
    ]
    rises = sum(all(here < deeper for here, deeper in pairwise(run)) for run in accuracies["own"])
    training = scale.training
    seconds = sum(run["seconds"] for run in runs) / scale.seeds
    tested = sum(runs[0]["own"]["counts"])
    made = made_by(str(runs[0]["processor"]), "papers.anytimenet.long")
    times = f"{rises} of {scale.seeds}"
    return f"""- Accuracy rises with every iteration, with own statistics: in {times} runs.
- {_against([run[-1] for run in accuracies["own"]], plain, tested)}

{markdown(rows)}

{case.name}, {runs[0]["images"]:,} training images, {case.epochs} epochs, batch {case.batch_size}, \
one cycle up to a learning rate of {training.lr}, {training.precision}, \
{scale.net.width} channels; {scale.seeds} seed{"s" * (scale.seeds > 1)}. \
AnytimeNet trained for {seconds:.0f} s on one thread, while other programs ran. {made}"""


def seed_rows(scale: Scale, results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per seed and iteration, with accuracies in per cent."""
    plain = baseline(scale, results)
    rows = []
    for seed in range(scale.seeds):
        run = results[key(scale.cases[0], "anytime", seed)]
        shares = zip(*(run[norms]["accuracy"] for norms in NORMS), strict=True)
        for name, found in zip(scale.net.schedule.names, shares, strict=True):
            row = {"seed": seed, "iteration": name}
            rows.append(row | {n: 100 * share for n, share in zip(NORMS, found, strict=True)})
        if seed in plain:
            row = {"seed": seed, "iteration": "BASELINE"}
            rows.append(row | dict.fromkeys(NORMS, plain[seed]))
    return rows


def baseline(scale: Scale, results: Mapping[str, Mapping[str, Any]]) -> dict[int, float]:
    """Return BASELINE's accuracies in per cent, by seed, of trainings that are done."""
    keys = {seed: key(scale.cases[0], "baseline", seed) for seed in range(scale.seeds)}
    return {
        seed: 100 * results[name]["shared"]["accuracy"][-1]
        for seed, name in keys.items()
        if name in results
    }


def _against(last: Sequence[float], plain: Mapping[int, float], tested: int) -> str:
    """Say how the last iterations stand to BASELINE, both in per cent, seed by seed."""
    if not plain:
        return "BASELINE has not been trained at this size yet; nothing is claimed against it."
    gain = spread([last[seed] - other for seed, other in plain.items()])
    seed, other = next(iter(plain.items()))
    half = 100 * sampling_half_width((last[seed] / 100, other / 100), tested)
    seeds = f"{len(plain)} seed{'s' * (len(plain) > 1)}"
    return f"""The last iteration minus BASELINE, {seeds}: {gain.text(sign=True)} points; of one \
seed, the {tested:,} test images alone leave ±{half:.1f} (95 %, as if they were two samples)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the table.

    With the default folder the card is filled.
    """
    parser = options_parser(__doc__)
    parser.add_argument("--out", type=Path, help="folder of the table; by default of the card")
    parser.add_argument(
        "--publish", action="store_true", help="run nothing; BASELINE may lack in the table"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    scale = chosen_scale(options)
    if options.publish:
        results = finished(jobs(scale), options.runs)
    else:
        results = run_jobs(jobs(scale), options.runs, workers=1, threads=1)
    kind = "" if options.case == "cifar10" else f"-{options.case}"
    width = "" if scale.net.width == THIN.width else f"-{scale.net.width}"
    name = f"long{kind}{width}"
    text = page(scale, results)
    if options.smoke or options.out:
        write_text((options.out or options.runs) / "long.md", text + "\n")
    else:
        write_text(HERE / "results" / "long" / f"{name}.md", text + "\n")
        write_csv(HERE / "results" / "long" / f"{name}.csv", seed_rows(scale, results))
        fill(HERE / "README.md", name, text)


if __name__ == "__main__":
    main()
