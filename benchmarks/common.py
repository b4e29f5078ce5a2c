"""Shared by the benchmark scripts: what machine this is, and writing a CSV with its page."""

from __future__ import annotations

import csv
import io
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from impatient.files import write_text
from impatient.provenance import machine, versions

RESULTS = Path(__file__).parent / "results"


def facts() -> str:
    """Machine, versions, commit, date and command, as one paragraph."""
    here = machine("cpu")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    command = " ".join(["python", *([sys.argv[0]] if sys.argv[0] else []), *sys.argv[1:]])
    return (
        f"{here['processor']}, {torch.get_num_threads()} torch threads at the end; {platform.system()} {platform.release()}; "
        f"{', '.join(f'{name} {version}' for name, version in versions().items())}; commit {commit or 'unknown'}; "
        f"{datetime.now(UTC):%Y-%m-%d}. Command: `{command}`"
    )


def write_results(name: str, title: str, text: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Write results/NAME.csv and results/NAME.md with the same rows."""
    columns = list(rows[0])
    stream = io.StringIO()
    table = csv.DictWriter(stream, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(RESULTS / f"{name}.csv", stream.getvalue())
    lines = [f"# {title}", "", text.strip(), "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    write_text(RESULTS / f"{name}.md", "\n".join([*lines, "", facts(), ""]))
    print(f"wrote {RESULTS / name}.csv and .md")


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median with its 95 % interval by order statistics (binomial, no assumption on the distribution)."""
    ordered = np.sort(np.asarray(values))
    half = 0.98 * np.sqrt(len(ordered))
    low, high = int(max(0, len(ordered) / 2 - half)), int(min(len(ordered) - 1, len(ordered) / 2 + half))
    return float(np.median(ordered)), float(ordered[low]), float(ordered[high])
