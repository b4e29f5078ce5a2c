"""Damaged files of every format, through Python and through the command line.

    # about 25 minutes
    python benchmarks/fuzz.py
    # seconds, to see that it runs
    python benchmarks/fuzz.py --smoke

A run directory on the digits, in which every verb has run, and files as people bring them are
damaged with a fixed seed: bytes flipped, cut, doubled, overwritten; entries of the wrong type,
range or depth, with a checksum that fits and with none; tensors of other types and shapes; pickles.
Every file is read as the library reads it. It must be read, or refused with an error of our own,
within 10 s; nothing is unpickled, and nothing written elsewhere. Of files of ours with one flipped
bit all must be refused.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import impatient
from benchmarks.damage import Found, damage, flip_a_bit, quiet
from impatient import cli
from impatient.budgets import parse_budget
from impatient.files import read_header, write_tensors
from impatient.portable.bundle import Bundle
from impatient.recipe import Recipe
from impatient.verbs.input_files import read_raw
from impatient.verbs.network_spec import NetworkSpec
from impatient.verbs.run_directory import RunDirectory
from impatient.verbs.train import TrainingChoice

Row = dict[str, object]
# Reads one file, as the library does.
Reader = Callable[[Path], object]

TRAINED = ("--model", "impatient:resnet:n=1,c=4", "--exits", "3", "--epochs", "2", "--quiet")
STEPS = (
    ("train", *TRAINED),
    ("profile", "--repeats", "20", "--quiet"),
    ("record", "--features", "--quiet"),
    ("fit", "--max-loss", "1"),
    ("fit", "--max-loss", "20", "--delta", "0.05"),
    ("fit", "--max-loss", "5", "--learner", "logistic", "--inputs", "features", "--name", "gates"),
    ("evaluate",),
    ("report",),
    ("export", "--repeats", "5", "--quiet", "--policy", "loss-1"),
)


def call(*arguments: object) -> tuple[int, str]:
    """Run the command line in this process.

    Returns the exit code and all that was printed.
    """
    printed = io.StringIO()
    before = sys.argv
    sys.argv = ["impatient", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            cli.main()
    except SystemExit as end:
        return int(end.code or 0), printed.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("the command line ends with an exit code")


def prepared(spec: NetworkSpec, file: Path) -> Any:
    """Read a sample as `impatient run` does."""
    return spec.preprocess(read_raw(spec, file))


def make_run(place: Path) -> None:
    """Make a run directory in which every verb has run."""
    for verb, *options in STEPS:
        code, printed = call(verb, place, *options)
        if code:
            raise RuntimeError(f"{verb} failed: {printed}")


def make_brought(place: Path) -> None:
    """Make files as people bring them: arrays, pictures, weights, texts and a log of budgets."""
    dice = np.random.default_rng(0)
    place.mkdir()
    pixels = dice.integers(0, 255, (8, 8), dtype=np.uint8)
    np.save(place / "x.npy", pixels[None])
    Image.fromarray(pixels).save(place / "x.png")
    Image.fromarray(pixels).save(place / "x.jpg")
    x = dice.normal(size=(60, 8)).astype(np.float32)
    y = np.tile([0, 1, 2], 20)
    np.savez(place / "data.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    rows = "".join(f'"text number {row}",{"ab"[row % 2]}\n' for row in range(40))
    (place / "texts.csv").write_text("text,label\n" + rows)
    budgets = [f"{value:.3f}" for value in dice.uniform(1, 9, 50)]
    (place / "budgets.txt").write_text("\n".join(budgets))
    state = nn.Linear(8, 3).state_dict()
    torch.save({"state_dict": state}, place / "weights.pt")
    write_tensors(place / "given.safetensors", state, {"kind": "weights"})


def readers(run: Path, brought: Path) -> dict[str, Reader]:
    """Say how every file is read, by its path in one of the two directories."""
    spec = NetworkSpec.load(run / "network.json")
    network = RunDirectory(run).network()[0]
    data = RunDirectory(run).data()
    training = TrainingChoice.load(run / "training.json")
    engine = run / "engines" / "onnxruntime"
    begun = read_header(run / "checkpoint.safetensors")
    x = spec.example().numpy()

    def resumed(file: Path) -> object:
        return impatient.fit(
            network,
            data,
            recipe=Recipe(**begun["recipe"]),
            weights=training.numbers,
            checkpoint=file,
            progress=False,
        )

    def exported(_: Path) -> object:
        Bundle(engine).run(x)
        return [exit.output() for exit in impatient.load_engine(engine).exits(torch.from_numpy(x))]

    of_run: dict[str, Reader] = {
        "network.json": lambda file: NetworkSpec.load(file).build(),
        "training.json": TrainingChoice.load,
        "weights.safetensors": lambda _: RunDirectory(run).network(),
        "checkpoint.safetensors": resumed,
        "profile.json": lambda file: impatient.CostProfile.load(file).contract_s(),
        "evaluation.json": impatient.Evaluation.load,
        "certificates/loss-20-sure.json": lambda file: (
            impatient.policies.Certificate.load(file).statement
        ),
    }
    if (engine / "bundle.json").is_file():
        of_run["engines/onnxruntime/bundle.json"] = exported
    loaded = {"policies": impatient.Policy.load, "recordings": impatient.Recording.load}
    for folder, load in loaded.items():
        for file in sorted((run / folder).iterdir()):
            of_run[f"{folder}/{file.name}"] = load
    of_people: dict[str, Reader] = {
        "x.npy": functools.partial(prepared, spec),
        "x.png": functools.partial(prepared, spec),
        "x.jpg": functools.partial(prepared, spec),
        "data.npz": lambda file: impatient.load_data(f"npz:{file}"),
        "texts.csv": lambda file: impatient.load_data(f"text:{file}"),
        "budgets.txt": lambda file: parse_budget(f"log:{file}"),
        "weights.pt": lambda file: impatient.load_weights(nn.Linear(8, 3), file),
        "given.safetensors": lambda file: impatient.load_weights(nn.Linear(8, 3), file),
    }
    return {str(run / name): read for name, read in of_run.items()} | {
        str(brought / name): read for name, read in of_people.items()
    }


@contextlib.contextmanager
def kept(file: Path) -> Iterator[bytes]:
    """Give a file's content, and write it back afterwards."""
    content = file.read_bytes()
    try:
        yield content
    finally:
        file.write_bytes(content)


def through_python(
    files: Mapping[str, Reader], count: int, dice: random.Random, marker: Path
) -> dict[str, Found]:
    """Damage every file so many times, and read it."""
    found = {}
    for name, read in files.items():
        file = Path(name)
        found[name] = Found()
        for _ in range(count):
            with kept(file):
                damage(file, dice, marker)
                found[name].add(lambda: read(file))  # noqa: B023  called at once
    return found


def with_one_bit(files: Mapping[str, Reader], count: int, dice: random.Random) -> dict[str, Found]:
    """Flip one bit of every file of ours so many times, and read it."""
    found = {}
    for name, read in files.items():
        file = Path(name)
        found[name] = Found()
        for _ in range(count):
            with kept(file) as content:
                file.write_bytes(flip_a_bit(content, dice))
                found[name].add(lambda: read(file))  # noqa: B023  called at once
    return found


def commands(run: Path, brought: Path) -> dict[str, list[Sequence[object]]]:
    """Say which commands read which file."""
    # JSON if no gate is open, so that there are no tensors
    gates = next((run / "policies").glob("gates.*")).name
    run_it = ("run", run, brought / "x.npy", "--deadline-ms", 100, "--policy")
    return {
        "network.json": [("show", run), ("describe", run), (*run_it, "loss-1"), ("report", run)],
        "training.json": [("train", run, *TRAINED), ("evaluate", run)],
        "weights.safetensors": [("show", run), (*run_it, "loss-1"), ("record", run, "--quiet")],
        "checkpoint.safetensors": [("train", run, *TRAINED)],
        "profile.json": [("show", run), ("fit", run), ("evaluate", run), (*run_it, "gates")],
        "evaluation.json": [("show", run), ("report", run)],
        "policies/loss-1.json": [("show", run), (*run_it, "loss-1"), ("evaluate", run)],
        f"policies/{gates}": [("show", run), (*run_it, "gates"), ("evaluate", run)],
        "recordings/test.safetensors": [("show", run), ("evaluate", run), ("report", run)],
        "recordings/validation.safetensors": [("fit", run), ("show", run)],
    }


def through_command_line(
    run: Path, brought: Path, count: int, dice: random.Random, marker: Path
) -> dict[str, Found]:
    """Damage files so many times altogether, and call a verb that reads them."""
    whole = run.with_name("whole")
    shutil.copytree(run, whole)
    ways = [(name, each) for name, verbs in commands(run, brought).items() for each in verbs]
    found: dict[str, Found] = {}
    for number in range(count):
        name, command = ways[number % len(ways)]
        damage(run / name, dice, marker)
        found.setdefault(str(command[0]), Found()).add(functools.partial(_called, command))
        # A verb may have changed any file.
        shutil.rmtree(run)
        shutil.copytree(whole, run)
    return found


def _called(command: Sequence[object]) -> None:
    """Run a command, and raise an error of ours if it ended with one."""
    code, printed = call(*command)
    if "Traceback" in printed:
        raise RuntimeError(f"a traceback was printed: {printed[-300:]}")
    if (code == 1 and printed.lstrip().startswith("error (")) or "\nerror (" in printed:
        raise impatient.errors.StorageError(printed[:100])
    if code:
        raise RuntimeError(f"{command[0]} ended with {code}: {printed[-300:]}")


def rows_of(what: str, found: Mapping[str, Found]) -> list[Row]:
    """Make a row per format, and say where raw errors came from."""
    for name, each in found.items():
        for place, times in each.raw.items():
            print(f"RAW {what} {Path(name).name}: {times} x {place}", flush=True)
    return [
        {
            "through": what,
            "file or verb": Path(name).name,
            "damaged": each.files,
            "refused": each.refused,
            "read": each.files - each.refused - sum(each.raw.values()) - each.slow,
            "raw errors": sum(each.raw.values()),
            "over 10 s": each.slow,
            "longest, s": f"{each.longest_s:.2f}",
        }
        for name, each in found.items()
    ]


def total(rows: Sequence[Row], what: str) -> Row:
    """Add up the rows of one kind."""
    own = [row for row in rows if row["through"] == what]
    sums: dict[str, Any] = {"through": what, "file or verb": "all"}
    for column in ("damaged", "refused", "read", "raw errors", "over 10 s"):
        sums[column] = sum(int(str(row[column])) for row in own)
    return sums | {"longest, s": max((str(row["longest, s"]) for row in own), key=float)}


def main() -> None:
    """Damage, read, count, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few files; writes nothing")
    parser.add_argument("--files", type=int, default=20_000, help="damaged files through Python")
    parser.add_argument("--commands", type=int, default=1_000, help="through the command line")
    parser.add_argument("--bits", type=int, default=1_200, help="files with one flipped bit")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    dice = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder, quiet():
        run, brought = Path(folder) / "run", Path(folder) / "brought"
        marker = Path(folder) / "unpickled"
        make_run(run)
        make_brought(brought)
        files = readers(run, brought)
        ours = {name: read for name, read in files.items() if Path(name).is_relative_to(run)}
        before = set(Path(folder).rglob("*")), set(Path.cwd().iterdir())
        count = 3 if asked.smoke else -(-asked.files // len(files))
        rows = rows_of("Python", through_python(files, count, dice, marker))
        count = 1 if asked.smoke else -(-asked.bits // len(ours))
        rows += rows_of("Python, one bit", with_one_bit(ours, count, dice))
        assert (set(Path(folder).rglob("*")), set(Path.cwd().iterdir())) == before
        count = 10 if asked.smoke else asked.commands
        rows += rows_of("command line", through_command_line(run, brought, count, dice, marker))
        assert set(Path.cwd().iterdir()) == before[1]
        assert not marker.exists()
    for row in rows:
        if row["through"] == "Python, one bit" and row["read"]:
            print(f"NOT NOTICED: {row['read']} of {row['damaged']} {row['file or verb']}")
    totals = [total(rows, what) for what in dict.fromkeys(str(row["through"]) for row in rows)]
    for row in totals:
        print(", ".join(f"{column}: {value}" for column, value in row.items()))
    if not asked.smoke:
        sys.path.insert(0, str(Path(__file__).parent))
        from common import write_results

        write_results("fuzz", "Damaged files", str(__doc__), [*totals, *rows])


if __name__ == "__main__":
    main()
