"""Measure what each real-time setting gains on this machine.

    # trains heads; about 4 minutes; the settings are made for the whole process, as root if all are
    # to be permitted
    python benchmarks/tuning.py
    # seconds, to see that it runs; writes nothing
    python benchmarks/tuning.py --smoke

The pretrained CIFAR-10 ResNet-20 of the shared data with eight exits (benchmarks/deadlines.py),
eager, batch 1, one thread: `impatient.runtime.tuning.tune`, which `impatient tune` prints. Blocks
of 25 runs with and without a setting take turns; every run sleeps for 2 ms first. Ratios are time
with the setting over time without it, with 95 % intervals that resample pairs of blocks; below 1 is
shorter. "nothing" compares nothing with nothing (A/A): where it differs from 1, so may the others.
"""

from __future__ import annotations

import sys

import torch
from alternatives import trained
from common import Row, write_results
from deadlines import EXITS

from impatient.runtime.tuning import Tuned, tune

RUNS = 5_000


def rows(found: list[Tuned]) -> list[Row]:
    made: list[Row] = []
    for each in found:
        known: Row = {
            "setting": each.setting.name if each.setting else "nothing",
            "in force": each.setting.note if each.setting else "",
            "runs": each.runs,
        }
        if not each.ratios:
            made.append(known)
        for what, ratios in each.ratios.items():
            said = {
                name: f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
                for name, ratio in ratios.items()
            }
            made.append(known | {"what": what} | said)
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    smoke = "--smoke" in sys.argv
    given = trained(20, EXITS, small=smoke)
    found = tune(given.network, given.images[:1], runs=200 if smoke else RUNS, max_seconds=120)
    if smoke:
        for row in rows(found):
            print(row)
    else:
        write_results("tuning", "What real-time settings gain", __doc__ or "", rows(found))
