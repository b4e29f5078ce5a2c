"""Time what comes before anything is computed: imports, and the help of the command line.

    # under a minute; leave the machine alone
    python benchmarks/startup.py
    # seconds, to see that it runs
    python benchmarks/startup.py --smoke

Each row is a process of its own, and the rows are run in turn. Seconds are those of the wall, from
outside; "beyond torch" is the difference to the bare `import torch` of the same round.

Asked for: all public names at most 0.25 s beyond torch, `impatient --help` at most 0.4 s.
"""

from __future__ import annotations

import subprocess
import sys
import time

from common import Row, median_interval, write_results

ROUNDS, SMOKE_ROUNDS = 15, 2
ALL_NAMES = "import torch, impatient; [getattr(impatient, name) for name in impatient.__all__]"
PROCESSES = {
    "import torch": ["-c", "import torch"],
    "import impatient": ["-c", "import impatient"],
    "import torch, then every public name of impatient": ["-c", ALL_NAMES],
    "impatient --help": ["-m", "impatient.cli", "--help"],
}


def seconds(arguments: list[str]) -> float:
    """Time one process of Python."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    smoke = "--smoke" in sys.argv
    taken: dict[str, list[float]] = {name: [] for name in PROCESSES}
    # the first round warms the disk's cache, and is not counted
    for number in range(1 + (SMOKE_ROUNDS if smoke else ROUNDS)):
        for name, arguments in PROCESSES.items():
            second = seconds(arguments)
            if number:
                taken[name].append(second)
    rows: list[Row] = []
    torch = taken["import torch"]
    for name, values in taken.items():
        beyond = [value - base for value, base in zip(values, torch, strict=True)]
        row: Row = {"process": name, "n": len(values)}
        for column, found in (("s", values), ("beyond torch s", beyond)):
            middle, low, high = median_interval(found)
            row[f"{column} (95 % interval)"] = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        print(row)
        rows.append(row)
    if not smoke:
        write_results("startup", "Before anything is computed", __doc__ or "", rows)


if __name__ == "__main__":
    main()
