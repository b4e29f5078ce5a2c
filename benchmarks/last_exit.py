"""Why a last exit loses against the network without exits: rows of `tasks.py`, one thing changed.

python benchmarks/last_exit.py --data FOLDER --case cifar    about 20 minutes on one core
python benchmarks/last_exit.py --smoke                       a minute, writes no page
python benchmarks/last_exit.py --page                        writes the page from what is there

Every training is kept under runs/bench/last_exit, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import task_data
import torch
from common import KEPT, Row, write_results
from tasks import CASES, HALF_END, TRUST, Log

from impatient.files import read_json, write_json
from impatient.training.batch_norm import mean_quality
from impatient.verbs.run_directory import RunDirectory

# exits of each row, the last among them
EXITS = {"cifar": 4, "masks": 5, "loop": 5}
# as long as the table trained at first; now it trains three times as long
EPOCHS = {"cifar": 8, "masks": 6, "loop": 6}
# networks that are twice as wide, and a loop whose corrections do not add up
MODELS = {
    "wide": {
        "cifar": "impatient:resnet:n=1,c=32",
        "masks": "task_models:painter:width=64",
        "loop": "task_models:Cleaner:width=32",
    },
    "anew": {"loop": "task_models:Cleaner:anew=True"},
}
TEXT = """
Quality on the test split times 100, mean and standard deviation over the seeds. "lost" is the last
exit against the same network without exits that was trained as long, seed by seed, with
the standard error of its mean. "last loss" is the last exit's loss on the training split in the
last epoch. Without exits means a weight of 0 for every exit but the last. CIFAR-10 trains for 8
epochs, the others for 6; corrections anew for three times as many.
"""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is changed about a row.

    Attributes:
        options: of `impatient train`.
        longer: factor of the epochs.
        model: one of MODELS, or that of the row.
        alone: whether the last exit alone is trained.
    """

    options: Sequence[object] = ()
    longer: int = 1
    model: str = ""
    alone: bool = False

    @property
    def reference(self) -> str:
        """The variant of the same network without exits that is trained as long."""
        size = {"longer": self.longer, "model": self.model, "alone": True}
        return next(
            name
            for name, other in VARIANTS.items()
            if {key: getattr(other, key) for key in size} == size
        )


VARIANTS = {
    "without exits": Variant(alone=True),
    "equal weights": Variant(),
    "half_end": Variant(options=HALF_END),
    "equal weights of sum 1": Variant(options=("--weights", "uniform:total=all")),
    "equilibrium": Variant(options=("--equilibrium",)),
    "backbone first": Variant(options=("--regime", "mixed")),
    "detach 0.5": Variant(options=("--detach", "0.5")),
    "without exits, 3 x epochs": Variant(alone=True, longer=3),
    "equal weights, 3 x epochs": Variant(longer=3),
    "half_end, 3 x epochs": Variant(options=HALF_END, longer=3),
    "without exits, 2 x width": Variant(alone=True, model="wide"),
    "equal weights, 2 x width": Variant(model="wide"),
    "half_end, 2 x width": Variant(options=HALF_END, model="wide"),
    "without exits, corrections anew": Variant(alone=True, model="anew", longer=3),
    "equal weights, corrections anew": Variant(model="anew", longer=3),
}


def _data(case: str, source: task_data.Source, place: Path) -> str:
    """Make the data of a row, and return their spec."""
    made = CASES[case].data
    return made if isinstance(made, str) else made(source, place / case / "data")


def train_variant(
    case: str, name: str, seed: int, data: str, place: Path, *, smoke: bool = False
) -> None:
    """Train a variant of a row once, and keep what came of it."""
    row, variant = CASES[case], VARIANTS[name]
    run = place / case / f"{name}-{seed}".replace(" ", "_").replace(",", "")
    kept = run / "found.json"
    if kept.is_file():
        return
    begin = time.perf_counter()
    options = [option for option in row.train if option not in HALF_END]
    model = MODELS[variant.model][case] if variant.model else row.model
    weights = ("--weights", ",".join(["0"] * (EXITS[case] - 1) + ["1"])) if variant.alone else ()
    epochs = 2 if smoke else EPOCHS[case] * variant.longer
    Log().call(
        "train",
        run,
        *("--data", data, "--model", model, "--task", row.task, *options),
        *variant.options,
        *weights,
        *("--epochs", epochs, "--seed", seed, "--no-exit-free", "--restart", "--quiet"),
    )
    directory = RunDirectory(run, trust=TRUST[1:])
    network, _ = directory.network()
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        metrics = list(csv.DictReader(file))
    found = {
        "case": case,
        "variant": name,
        "seed": seed,
        "quality": mean_quality(network, directory.data(), "test"),
        "metrics": metrics[-2 * EXITS[case] :],
        "seconds": round(time.perf_counter() - begin, 1),
    }
    write_json(kept, found)
    shown = " ".join(f"{100 * value:.1f}" for value in found["quality"])
    print(f"{case}, {name}, seed {seed}: {shown} ({found['seconds']:.0f} s)", flush=True)


def rows_of(place: Path) -> list[Row]:
    """Give a row for each variant, from all seeds that are there."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for file in place.glob("*/*/found.json"):
        one = dict(read_json(file))
        found.setdefault((one["case"], one["variant"]), {})[one["seed"]] = one
    rows: list[Row] = []
    for case in EXITS:
        for name, variant in VARIANTS.items():
            mine = found.get((case, name), {})
            alone = found.get((case, variant.reference), {})
            if not mine:
                continue
            both = sorted(mine.keys() & alone.keys())
            gaps = [mine[seed]["quality"][-1] - alone[seed]["quality"][-1] for seed in both]
            runs = list(mine.values())
            rows.append(
                {
                    "row": case,
                    "variant": name,
                    "n": len(runs),
                    "first exit": "" if variant.alone else _spread([r["quality"][0] for r in runs]),
                    "last exit": _spread([r["quality"][-1] for r in runs]),
                    "lost": "" if variant.alone else _mean_error(gaps),
                    "last loss": f"{statistics.fmean(_last_loss(r) for r in runs):.3f}",
                }
            )
    return rows


def _last_loss(found: dict[str, Any]) -> float:
    train = [row for row in found["metrics"] if row["split"] == "train"]
    return float(train[-1]["loss"])


def _spread(values: Sequence[float]) -> str:
    middle = f"{100 * statistics.fmean(values):.1f}"
    return f"{middle} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else middle


def _mean_error(gaps: Sequence[float]) -> str:
    if not gaps:
        return ""
    middle = f"{100 * statistics.fmean(gaps):+.1f}"
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
    return middle if error is None else f"{middle} (s.e. {100 * error:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of archives")
    parser.add_argument("--case", action="append", choices=EXITS, help="rows")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="what is changed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="two epochs on stand-ins")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--place", type=Path, default=KEPT / "last_exit")
    options = parser.parse_args()
    if not (options.data or options.smoke or options.page):
        parser.error("--data FOLDER, or --smoke")
    torch.set_num_threads(1)
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            spec = _data("loop", task_data.Source(None, share=0.01), Path(folder))
            for name in ("without exits", "equal weights"):
                train_variant("loop", name, 0, spec, Path(folder), smoke=True)
            print(rows_of(Path(folder)))
        return
    cases = [] if options.page else options.case or list(EXITS)
    source = task_data.Source(options.data)
    data = {case: _data(case, source, options.place) for case in cases}
    for seed in range(options.seeds):
        for case in cases:
            for name in options.variant or VARIANTS:
                if case not in MODELS.get(VARIANTS[name].model, EXITS):
                    continue
                train_variant(case, name, seed, data[case], options.place)
    write_results(
        "last_exit", "What exits cost the last exit, and why", TEXT, rows_of(options.place)
    )


if __name__ == "__main__":
    main()
