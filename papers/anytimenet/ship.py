"""Put a trained AnytimeNet into the zoo: `python -m papers.anytimenet.ship RUNS`.

RUNS is the folder of `papers.anytimenet.long`. The weights are kept in half precision; recordings
and the card's figures are those of the very weights that are shipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from impatient import CostProfile, Data, Recording, load_model, profile, record
from impatient.evaluation.metrics import mean_quality
from impatient.files import read_json, write_tensors, write_text
from impatient.networks.zoo import SHIPPED
from impatient.provenance import fingerprint_tensors
from impatient.verbs.network_spec import spec_of
from papers.anytimenet.long import chosen_scale, options_parser
from papers.anytimenet.recipe import Scale, key
from papers.command import say
from papers.data import load
from papers.results import made_by, markdown

CLASSES = {
    "cifar10": (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
}
LICENCES = {
    "cifar10": "None stated by the authors of CIFAR-10 (Krizhevsky 2009, Learning Multiple Layers "
    "of Features from Tiny Images), which is used everywhere for research. Of its training images "
    "49,923 are the exact originals and 77 decoded JPEGs; of the test images 9,979 and 21. The "
    "weights are under this library's licence.",
    "digits": "BSD-3-Clause, as scikit-learn, with which the digits come.",
}


def half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Round all numbers but counters to half precision."""
    return {
        name: value.half() if value.is_floating_point() else value for name, value in state.items()
    }


def ship(scale: Scale, runs: Path, shelf: Path, *, seed: int = 0, repeats: int = 1000) -> Path:
    """Write a zoo's folder of the scale's first case, and return it.

    Args:
        runs: folder in which its trainings have ended.
        shelf: folder of the zoo.
        seed: which of the trainings.
        repeats: measurements of the card's times.
    """
    case = scale.cases[0]
    run = runs / key(case, "anytime", seed)
    data = load(case.data, train=case.images, validation=case.validation, seed=seed)
    counts = "/".join("-".join(map(str, counts)) for counts in scale.net.counts)
    model = f"impatient:anytimenet:schedule={counts},width={scale.net.width},norms=own"
    network: Any = load_model(
        model, num_classes=data.num_classes, in_channels=data.preprocess.channels
    )
    kept = half(load_file(run / "weights.safetensors"))
    network.load_state_dict(kept)
    network.eval()
    folder = shelf / f"anytimenet-{case.name}"
    _describe(network, data, model, seed, folder)
    header = {"kind": "weights", "fingerprint": fingerprint_tensors(kept)}
    write_tensors(folder / "weights.safetensors", kept, header)
    recordings = {
        split: record(network, data, split=split, keep_outputs=False)
        for split in ("validation", "test")
    }
    for split, recording in recordings.items():
        recording.save(folder / "recordings" / f"{split}.safetensors")
    costs = profile(network, data.example(), repeats=repeats)
    result = read_json(run / "result.json")["result"]
    text = card(folder.name, scale, data, result, recordings["test"], costs)
    write_text(folder / "card.md", text)
    return folder


def _describe(network: nn.Module, data: Data, model: str, seed: int, folder: Path) -> None:
    """Write network.json, without the place where the data lay."""
    name = data.name.partition(":")[2]
    called = f"npz:{Path(name).name}" if name else data.name
    spec = spec_of(network, data, model=model, seed=seed, validation=0.1)
    dataclasses.replace(
        spec,
        data=called,
        class_names=CLASSES.get(Path(name).stem, data.class_names),
        after=tuple(network.exit_names[:-1]),  # type: ignore[union-attr, arg-type]
        heads="own",
    ).save(folder / "network.json")


def card(
    name: str,
    scale: Scale,
    data: Data,
    result: dict[str, Any],
    recording: Recording,
    costs: CostProfile,
) -> str:
    """Write the card: data, recipe, accuracy per exit, times, and the licence of the data."""
    case = scale.cases[0]
    training = scale.training
    middle = costs.contract_s(statistic="p50")
    late = costs.contract_s(statistic="p99")
    samples = recording.quality.shape[1]
    rows = []
    for index, exit in enumerate(recording.exits):
        accuracy = mean_quality(recording.quality[index].double())
        rows.append(
            {
                "exit": exit,
                "accuracy, %": f"{100 * accuracy.value:.2f}",
                "95 % interval": f"{100 * accuracy.low:.2f} to {100 * accuracy.high:.2f}",
                "p50, ms": f"{1e3 * middle[index]:.2f}",
                "p99, ms": f"{1e3 * late[index]:.2f}",
            }
        )
    made = made_by(str(costs.provenance.processor), "papers.anytimenet.ship")
    counts = scale.net.counts[-1]
    return f"""# {name}

AnytimeNet (Kim et al. 2020), {"-".join(map(str, counts))} blocks, {scale.net.width} channels, with
batch-norm statistics of every iteration; weights in half precision, computed in single precision.

{markdown(rows)}

Test split, {samples:,} images, of the shipped weights. Times of one image on one thread, known
budget (contract). {made}

- **Data**: {case.name}, {data.size("train"):,} training images, {data.size("validation"):,} held
  out and never trained on; one seed.
- **Recipe**: {case.epochs} epochs, batch {case.batch_size}, one cycle with a learning rate of
  {training.lr}, weight decay {training.weight_decay}, augmentation {case.augment}, precision
  {training.precision}, losses weighted by the inverse square of the exits left; statistics from
  {training.calibration:,} training images. {result["seconds"]:.0f} s on one thread of
  {result["processor"]}, while other programs ran.
- **Licence of the data**: {LICENCES[case.data]}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Ship the long training's network."""
    parser = options_parser(__doc__)
    parser.add_argument("--shelf", type=Path, default=SHIPPED)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    say(f"shipped: {ship(chosen_scale(options), options.runs, options.shelf)}")


if __name__ == "__main__":
    main()
