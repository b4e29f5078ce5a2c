"""Measure the memory and processor time of recordings, by their samples, exits and classes.

    # about 3 minutes; the machine may be busy: memory does not depend on that
    python benchmarks/memory.py
    # seconds, to see that it runs
    python benchmarks/memory.py --smoke

A network without layers gives random logits, so that all memory is that of recording and judging.
From the base of 20,000 samples, 4 exits and 100 classes, one of the three grows at a time: samples
to 100,000, exits to 32, classes to 1,000. Every case is a process of its own. "peak" is how far
the resident memory rises above that before the step (VmHWM, reset before each step), over the size
of the recording's tensors; so 1.0 for "record" is the recording itself. Asked for: record at most
1.1. The recording is held during the later steps and does not count there; "load" holds a second
one. Processor seconds are those of one run: ten times the samples, exits or classes may take ten
times as long, and twice that is noise; nothing may take a hundred times as long.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import Row, run_cases
from torch import Tensor

from impatient import CostProfile, Recording, evaluate, fit_thresholds, record
from impatient.anytime import Exit, Network, Run
from impatient.evaluation.recording import LabelledData

BASE = (20_000, 4, 100)
CASES = {
    f"N={samples}, K={exits}, C={classes}": (samples, exits, classes)
    for samples, exits, classes in (
        BASE,
        (5_000, 4, 100),
        (100_000, 4, 100),
        (20_000, 8, 100),
        (20_000, 32, 100),
        (20_000, 4, 10),
        (20_000, 4, 1_000),
    )
}
SMOKE = "N=5000, K=4, C=100"


class Drawn(Network):
    """A network whose exits answer with random logits."""

    def __init__(self, exits: int, classes: int) -> None:
        super().__init__()
        self._count = exits
        self._draws = torch.randn(exits, 256, classes)

    @property
    def num_exits(self) -> int:
        return self._count

    # nothing is kept
    def exits(self, x: Tensor, *, keep: bool = False) -> Run:  # noqa: ARG002
        return Run(self._exits(x))

    def _exits(self, x: Tensor) -> Iterator[Exit]:
        for index in range(self._count):
            yield Exit(index, None, lambda _, index=index: self._draws[index, : len(x)] + x)


@dataclasses.dataclass(frozen=True)
class Samples(LabelledData):
    """One number per sample, and a class."""

    count: int
    classes: int
    fingerprint: str = "drawn"

    # all splits are alike
    def size(self, split: Any) -> int:  # noqa: ARG002
        return self.count

    def batches(self, split: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        draws = torch.Generator().manual_seed(0 if split == "validation" else 1)
        for start in range(0, self.count, batch_size):
            size = min(batch_size, self.count - start)
            labels = torch.randint(self.classes, (size,), generator=draws)
            yield torch.randn(size, 1, generator=draws), labels


def bytes_of(recording: Recording) -> int:
    tables = [recording.quality, *recording.scores.values(), recording.outputs, recording.targets]
    return sum(table.nbytes for table in tables if table is not None)


def peak_bytes(step: Callable[[], Any]) -> tuple[Any, int, float]:
    """Run a step, and return its result, how far memory rose, and its processor seconds."""
    gc.collect()
    # Begin a new high-water mark.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_bytes("VmRSS")
    begin = time.process_time()
    result = step()
    spent_s = time.process_time() - begin
    return result, _status_bytes("VmHWM") - before, spent_s


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition(f"{name}:")[2].split(maxsplit=1)[0])


# small cases are fast enough
def measure(samples: int, exits: int, classes: int, *, smoke: bool) -> list[Row]:  # noqa: ARG001
    torch.set_num_threads(1)
    network = Drawn(exits, classes)
    costs = CostProfile.of(cumulative_s=[0.001 * (exit + 1) for exit in range(exits)])
    # Whatever is imported late is imported now.
    small = Samples(400, classes)
    first, second = (record(network, small, split=split) for split in ("validation", "test"))
    evaluate(second, costs, fit_thresholds(first, costs, max_accuracy_loss=0.01))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recording.safetensors"
        data = Samples(samples, classes)
        held: dict[str, Any] = {}
        steps: dict[str, Callable[[], Any]] = {
            "record": lambda: record(network, data),
            "fit_thresholds": lambda: fit_thresholds(held["record"], costs, max_accuracy_loss=0.01),
            "evaluate": lambda: evaluate(
                dataclasses.replace(held["record"], split="test"), costs, held["fit_thresholds"]
            ),
            "save": lambda: held["record"].save(file),
            "load": lambda: Recording.load(file),
        }
        for name, step in steps.items():
            held[name], rose, spent_s = peak_bytes(step)
            size = bytes_of(held["record"])
            rows.append(
                {
                    "N": samples,
                    "K": exits,
                    "C": classes,
                    "recording MB": f"{size / 1e6:.1f}",
                    "step": name,
                    "peak MB": f"{rose / 1e6:.1f}",
                    "peak / recording": f"{rose / size:.2f}",
                    "processor s": f"{spent_s:.2f}",
                }
            )
    return rows


if __name__ == "__main__":
    run_cases("memory", "Memory of recordings", __doc__, CASES, measure, smoke=[SMOKE])
