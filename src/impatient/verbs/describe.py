"""Draw the network of a run: its stages, heads, shapes, and their share of the time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from impatient.files import is_file, write_text
from impatient.table import Table
from impatient.verbs.notes import log
from impatient.verbs.options import OFF, Directory, Trust, VerbOptions
from impatient.verbs.run_directory import RunDirectory

if TYPE_CHECKING:
    from impatient.evaluation.picture import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribeOptions(VerbOptions):
    """Draw the stages and heads of a run's network.

    Attributes:
        svg: File to draw the network into, as SVG.
    """

    directory: Directory
    svg: Annotated[Path | None, OFF, arg(metavar="FILE")] = None
    trust: Trust = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A network's stages and heads.

    Attributes:
        model: What the network is made of.
        timed: Whether shares are of measured time; else they are of multiply-accumulates.
        parts: Its stages and heads, shallow to deep.
    """

    model: str
    timed: bool
    parts: tuple[Part, ...]


def describe(options: DescribeOptions) -> Described:
    """Build the network of a run, and look at it.

    Shares are of the times in its profile, of whichever machine, or of its operations if it has
    none.
    """
    from impatient.evaluation.picture import network_svg, parts_of

    run = RunDirectory(options.directory, trust=options.trust)
    spec = run.spec()
    facts = spec.build(run.trust).stage_facts(spec.example())
    costs = run.profile(any_machine=True) if is_file(run.profile_file) else None
    parts = parts_of(facts, costs)
    timed = costs is not None
    if options.svg is not None:
        drawn = network_svg(parts, timed=timed, alone=True)
        write_text(options.svg, drawn)
        log.info("drawn: %s", options.svg)
    return Described(model=spec.model, timed=timed, parts=parts)


def shown(_: DescribeOptions, found: Described) -> Iterator[Table]:
    """Give a row per stage and its head."""
    from impatient.evaluation.picture import network_table

    yield network_table(found.parts, timed=found.timed)
