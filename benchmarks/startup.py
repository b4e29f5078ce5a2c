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

import functools
import subprocess
import sys

from common import Row, in_turn, with_interval, write_results

ROUNDS, SMOKE_ROUNDS = 15, 2
ALL_NAMES = "import torch, impatient; [getattr(impatient, name) for name in impatient.__all__]"
PROCESSES = {
    "import torch": ["-c", "import torch"],
    "import impatient": ["-c", "import impatient"],
    "import torch, then every public name of impatient": ["-c", ALL_NAMES],
    "impatient --help": ["-m", "impatient.cli", "--help"],
}


def run_python(arguments: list[str]) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    smoke = "--smoke" in sys.argv
    calls = {
        name: functools.partial(run_python, arguments) for name, arguments in PROCESSES.items()
    }
    # the round that warms up fills the disk's cache
    taken = in_turn(calls, rounds=SMOKE_ROUNDS if smoke else ROUNDS, warm_up=1)
    rows: list[Row] = []
    for name, values in taken.items():
        rows.append(
            {
                "process": name,
                "n": len(values),
                "s (95 % interval)": with_interval(values, 2),
                "beyond torch s (95 % interval)": with_interval(values - taken["import torch"], 2),
            }
        )
        print(rows[-1])
    if not smoke:
        write_results("startup", "Before anything is computed", __doc__ or "", rows)


if __name__ == "__main__":
    main()
