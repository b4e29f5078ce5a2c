"""Draw docs/img/accuracy-time.svg, the README's picture, from examples/cifar10/evaluation.json."""

from __future__ import annotations

from pathlib import Path

from impatient import Evaluation
from impatient.evaluation.plots import accuracy_time, save_figure

ROOT = Path(__file__).parent.parent

if __name__ == "__main__":
    save_figure(
        accuracy_time(Evaluation.load(ROOT / "examples/cifar10/evaluation.json")),
        ROOT / "docs/img/accuracy-time.svg",
    )
