"""Time the report in a real Chromium: its size, its first paint, and one move of each dial.

    # under a minute; leave the machine alone
    python benchmarks/report.py
    # seconds, to see that it runs
    python benchmarks/report.py --smoke

The page has a recording of 10,000 samples and 6 exits, thresholds, gates, budgets and another
network. First paint is Chromium's own "first-contentful-paint", from the start of the navigation of
a file. A move is an input event of the dial, with the layout that it asks for, until the script has
drawn everything; the first move of a dial is among them. Needs Debian's chromium and
chromium-driver.

Asked for: under 250 kB, first paint under 200 ms, a move under 16 ms.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from common import ROOT, Row, with_interval, write_results

sys.path.insert(0, str(ROOT / "tests" / "support"))

from browser import Browser, browser
from impatient import budgets
from impatient.evaluation import Report, evaluate, report_html
from impatient.policies import fit_gates, fit_thresholds
from recordings import costs_of, drawn

SAMPLES, SMOKE_SAMPLES = 10_000, 500
LOADS, SMOKE_LOADS = 20, 2
MOVES, SMOKE_MOVES = 200, 10
DIALS = ("deadline", "sure")
PAINT = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"
MOVE = """
const dial = document.getElementById(arguments[0]);
const taken = [];
for (let move = 0; move < arguments[1]; move++) {
  dial.value = Math.round(((move * 37) % 100) / 100 * dial.max);
  const begin = performance.now();
  dial.dispatchEvent(new Event("input"));
  document.body.getBoundingClientRect();
  taken.push(performance.now() - begin);
}
return taken;
"""


def page(samples: int) -> str:
    gains = (1.5, 2.0, 2.6, 2.9, 3.1, 3.2)
    costs = costs_of(
        [0.75e-3, 0.55e-3, 0.45e-3, 0.5e-3, 0.45e-3, 0.4e-3],
        [8e-5, 5e-5, 5e-5, 5e-5, 5e-5, 0.0],
        exit_free_s=2.55e-3,
    )
    fitted_on = drawn(2000, seed=1, gains=gains, classes=10)
    recording = drawn(samples, seed=2, gains=gains, classes=10, split="test")
    policies = {
        "thresholds": fit_thresholds(fitted_on, costs, max_accuracy_loss=0.01),
        "gates": fit_gates(fitted_on, costs, mean_time_s=1.5e-3),
    }
    budget = budgets.uniform(0.0, 4e-3)
    evaluation = evaluate(recording, costs, policies, budgets={"uniform": budget})
    return report_html(
        Report(
            title="10,000 samples, 6 exits",
            evaluation=evaluation,
            recording=recording,
            costs=costs,
            policies=policies,
            chosen_budget=("uniform", budget),
            compared={"the same": evaluation},
        )
    )


def first_paints(window: Browser, file: Path, times: int) -> np.ndarray:
    found = []
    # the first one fills Chromium's own caches
    for load in range(times + 1):
        window.open(file)
        paint = None
        while paint is None:
            paint = window.run(PAINT)
        found += [paint] if load else []
    return np.asarray(found)


def main() -> None:
    smoke = "--smoke" in sys.argv
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, browser() as window:
        file = Path(folder) / "report.html"
        file.write_text(page(SMOKE_SAMPLES if smoke else SAMPLES), encoding="utf-8")
        window.size(1200)
        rows.append(
            {"what": "size, kB", "value (95 % interval)": f"{file.stat().st_size / 1e3:.0f}"}
        )
        measured = {"first paint, ms": first_paints(window, file, SMOKE_LOADS if smoke else LOADS)}
        for dial in DIALS:
            window.open(file)
            moves = window.run(MOVE, dial, SMOKE_MOVES if smoke else MOVES)
            measured[f"a move of the dial {dial!r}, ms"] = np.asarray(moves)
        for what, values in measured.items():
            rows.append(
                {
                    "what": what,
                    "n": len(values),
                    "value (95 % interval)": with_interval(values, 2),
                    "p99": f"{np.quantile(values, 0.99, method='higher'):.2f}",
                    "longest": f"{values.max():.2f}",
                }
            )
    for row in rows:
        print(row)
    if not smoke:
        write_results("report", "The report in Chromium", __doc__ or "", rows)


if __name__ == "__main__":
    main()
