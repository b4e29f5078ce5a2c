"""Make this folder's page, numbers and table, and the README's pictures, by the commands beside it.

    python examples/cifar10/make.py cifar10.npz

Two minutes on an idle machine; times are measured anew. Nothing is trained: the network is the
zoo's. The commands are read from README.md, so that they are what was run.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

# the papers' tables
sys.path.insert(0, str(Path(__file__).parents[2]))

from impatient import CostProfile, Evaluation
from impatient.evaluation.evaluate import Row
from impatient.files import write_text
from impatient.provenance import own_version
from impatient.table import milliseconds, percent
from papers.results import fill, markdown

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
README = HERE / "README.md"
KEPT = ("report.html", "evaluation.json", "profile.json")


def commands(readme: str, repeats: str | None) -> list[list[str]]:
    """Read the commands between the first fences of shell."""
    block = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)[0]
    if repeats:
        block = re.sub(r"--repeats \d+", f"--repeats {repeats}", block)
    return [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("impatient ")]


def run_all(steps: Sequence[Sequence[str]], data: Path, folder: Path) -> Path:
    """Run the commands in a folder of their own, and return the run directory."""
    (folder / "cifar10.npz").symlink_to(data.resolve())
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "MPLCONFIGDIR": mpl.get_cachedir(),
        "OMP_NUM_THREADS": "1",
    }
    for step in steps:
        print("impatient", *step, flush=True)
        command = [sys.executable, "-m", "impatient.cli", *step]
        subprocess.run(command, cwd=folder, env=environment, check=True)
    (run,) = folder.glob("cache/impatient/zoo/*")
    return run


def table(evaluation: Evaluation) -> str:
    """List every exit, policy and network without exits, as Markdown."""
    accuracy = f"accuracy on {evaluation.samples:,} test images"
    return markdown(
        [
            {
                "": f"policy {row.name}" if row.kind == "policy" else row.name,
                accuracy: f"{percent(row.accuracy.value)} "
                f"({row.accuracy.low * 100:.1f} to {row.accuracy.high * 100:.1f})",
                "contract": milliseconds(row.contract_s),
                "interruptible": milliseconds(row.interruptible_s),
                "million MACs": f"{row.macs / 1e6:.2f}",
            }
            for row in evaluation.rows
        ]
    )


def machine(costs: CostProfile) -> str:
    """Say on what the times were measured, and how steady it was."""
    made = costs.provenance
    one = costs.at(1)
    noisy = one.noise is not None and one.noise.too_noisy
    return (
        f"Times: {made.processor}, {made.threads} torch thread, torch {made.versions['torch']}, "
        f"impatient {own_version()}, one image at a time, means of n = {one.stages[0].n:,}, "
        f"{made.created[:10]}{'. The machine was not idle: do not quote them' if noisy else ''}."
    )


def with_caption(readme: str, evaluation: Evaluation) -> str:
    """Say in the main README what its picture shows."""
    first, last = (evaluation.of("exit")[place] for place in (0, -1))
    free = evaluation["no exits, same weights"]
    exits = len(evaluation.of("exit"))
    alt = f"Accuracy against measured time of an AnytimeNet with {exits} exits on CIFAR-10"
    said = (
        "*CIFAR-10, the [AnytimeNet](docs/how-to/models.md#trained-networks-that-come-along) that "
        f"comes along, {exits} exits, one CPU thread, one image at a time. Grey: the answer at "
        f"hand at each moment, {_plainly(first)} at first and {_plainly(last)} at last. Blue: "
        "stop when an answer is sure, at its mean time. Red: the same "
        f"weights without exits, {_plainly(free)}. "
        "Its [page and commands](examples/cifar10/README.md).*"
    )
    readme = re.sub(r'alt="Accuracy against[^"]*"', f'alt="{alt}"', readme, count=1)
    return re.sub(r"^\*CIFAR-10, .*\*$", said, readme, count=1, flags=re.MULTILINE)


def _plainly(row: Row) -> str:
    text = f"{percent(row.accuracy.value)} after {milliseconds(row.interruptible_s)}"
    return text.replace("\N{NO-BREAK SPACE}", " ")


def main() -> None:
    """Run the commands, keep the files, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="CIFAR-10 as README.md describes it")
    parser.add_argument("--repeats", help="measure less often, to try it out")
    options = parser.parse_args()
    readme = README.read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        run = run_all(commands(readme, options.repeats), options.data, Path(folder))
        for name in KEPT:
            shutil.copyfile(run / name, HERE / name)
    evaluation = Evaluation.load(HERE / "evaluation.json")
    costs = CostProfile.load(HERE / "profile.json")
    fill(README, "table", f"{table(evaluation)}\n\n{machine(costs)}")
    page = ROOT / "README.md"
    write_text(page, with_caption(page.read_text("utf-8"), evaluation))
    subprocess.run([sys.executable, ROOT / "docs" / "draw_readme_figure.py"], check=True)


if __name__ == "__main__":
    main()
