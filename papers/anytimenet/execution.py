"""Table I: the parts that really run in each iteration.

They are compared with the schedule and with the paper's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from impatient.inputs import evaluating
from impatient.networks import growth
from impatient.networks.anytimenet import AnytimeNet

PAPER_CUMULATIVE = (5, 12, 18, 24, 29, 34, 38)
# after the last iteration
PAPER_PARTS = {"IN": 1, "S1": 8, "S2": 10, "S3": 12, "OUT": 7}


def executed(network: AnytimeNet, x: Tensor) -> tuple[tuple[str, ...], ...]:
    """Record the parts that run in each iteration, by forward hooks.

    Example:
        >>> executed(AnytimeNet(schedule=growth.in_turn((2, 1)), width=1), torch.zeros(1, 3, 8, 8))
        (('IN', 'S1.1', 'S2.1', 'OUT'), ('S1.2', 'S2.1', 'OUT'))
    """
    ran: list[str] = []
    hooks = [
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, part in network.backbone.parts().items()
    ]
    iterations = []
    try:
        with evaluating(network), torch.inference_mode(), network.exits(x) as run:
            for exit in run:
                exit.output()
                iterations.append(tuple(ran))
                ran.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(iterations)


def table(network: AnytimeNet, x: Tensor) -> list[dict[str, Any]]:
    """Make a row for each iteration of the default schedule.

    A row has the parts that ran, their number so far, and the numbers of `growth.trace` and the
    paper.
    """
    counts = dict.fromkeys(PAPER_PARTS, 0)
    tally = 0
    rows = []
    for index, (names, scheduled) in enumerate(
        zip(executed(network, x), growth.trace(network.schedule), strict=True)
    ):
        tally += len(scheduled)
        for name in names:
            counts[name.split(".")[0]] += 1
        total = sum(counts.values())
        paper = PAPER_CUMULATIVE[index]
        agreed = names == scheduled and total == paper
        rows.append(
            {
                "iteration": index + 1,
                "blocks": network.exit_names[index],
                "executed": joined(names),
                "parts": len(names),
                **{f"{name} so far": count for name, count in counts.items()},
                "cumulative": total,
                "tally": tally,
                "paper": paper,
                "equal": "yes" if agreed else "no",
            }
        )
    return rows


def joined(names: Sequence[str]) -> str:
    """Join executions for reading, with successive blocks as ranges.

    Example:
        >>> joined(["S1.2", "S1.3", "S1.4", "S2.1", "OUT"])
        'S1.2-S1.4, S2.1, OUT'
    """
    runs: list[list[str]] = []
    for name in names:
        if runs and _follows(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _follows(before: str, name: str) -> bool:
    (section, _, old) = before.partition(".")
    (other, _, new) = name.partition(".")
    return section == other and bool(old and new) and int(new) == int(old) + 1
