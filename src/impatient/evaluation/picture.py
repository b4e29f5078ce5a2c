"""Draw a network: its stages, its heads, their shapes and their share of the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from impatient.costs import CostProfile
from impatient.counting import StageFacts
from impatient.evaluation.tables import count
from impatient.evaluation.templates import rendered
from impatient.table import Cell, Column, Table, percent


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stage of a network with its head, and what they take.

    Attributes:
        facts: shapes, operations and parameters.
        stage_share: share of an interruptible run's time, or of its operations if no times are
            known, that the stage takes.
        head_share: likewise for the head.
    """

    facts: StageFacts
    stage_share: float
    head_share: float


def parts_of(facts: Sequence[StageFacts], costs: CostProfile | None = None) -> tuple[Part, ...]:
    """Find which share of a run each stage and head takes.

    Args:
        facts: counts of the stages and heads.
        costs: measured times; without them multiply-accumulates stand for them.
    """
    if costs is None:
        stages: Sequence[float] = [entry.stage_macs for entry in facts]
        heads: Sequence[float] = [entry.head_macs for entry in facts]
    else:
        stages, heads = costs.parts("time", batch_size=min(costs.batches))
    total = sum(stages) + sum(heads) or 1.0
    return tuple(
        Part(facts=entry, stage_share=stage / total, head_share=head / total)
        for entry, stage, head in zip(facts, stages, heads, strict=True)
    )


def network_svg(parts: Sequence[Part], *, timed: bool, alone: bool = False) -> str:
    """Draw a network from top to bottom, as SVG for a page, its names escaped.

    Args:
        parts: its stages and heads.
        timed: whether the shares are of measured time.
        alone: whether it is a file of its own, which brings its colours, light and dark.
    """
    rows = [
        {
            "name": _tail(part.facts.exit, 26),
            "whole": part.facts.exit,
            "shape": _shape(part.facts.features),
            "macs": count(part.facts.stage_macs),
            "stage": part.stage_share,
            "stage_words": percent(part.stage_share, 0),
            "head": _tail(part.facts.head, 22) if part.facts.head else "",
            "head_share": part.head_share,
            "head_words": percent(part.head_share, 1),
        }
        for part in parts
    ]
    what = "time" if timed else "operations"
    return rendered("network.svg", rows=rows, what=what, alone=alone)


def network_table(parts: Sequence[Part], *, timed: bool) -> Table:
    """List the stages and heads of a network for the terminal."""
    what = "time" if timed else "MACs"
    rows = []
    for exit, part in enumerate(parts):
        facts = part.facts
        bar = "█" * max(1, round(part.stage_share * 20)) + "▒" * round(part.head_share * 20)
        rows.append(
            (
                str(exit),
                Cell(facts.exit, facts.head.strip("()")),
                _shape(facts.features),
                f"{count(facts.stage_macs)} + {count(facts.head_macs)}",
                f"{facts.stage_parameters + facts.head_parameters:,}",
                f"{percent(part.stage_share, 0)} + {percent(part.head_share, 0)}",
                bar,
            )
        )
    return Table(
        title=f"Stages and heads, shallow to deep; share of the {what} of a run with all heads",
        columns=(
            "exit",
            "stage to (its head)",
            Column("features", optional=True),
            Column("MACs", optional=True),
            Column("parameters", optional=True),
            f"share of {what}",
            "",
        ),
        left=2,
        rows=rows,
    )


def _shape(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes[1:] or sizes))


def _tail(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"
