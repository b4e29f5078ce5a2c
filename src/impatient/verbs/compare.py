"""Compare two cost profiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

import impatient
from impatient.errors import StorageError
from impatient.files import is_file
from impatient.table import Table, in_ms
from impatient.verbs.options import Flag, VerbOptions

if TYPE_CHECKING:
    from impatient.costs import Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions(VerbOptions):
    """Compare two cost profiles exit by exit.

    Attributes:
        a: A profile, or a directory with a profile.json.
        b: Another profile; the table shows how many times as fast it is, and what is noise.
        any_network: Compare although they are of different networks.
    """

    a: Annotated[Positional[Path], arg(metavar="A")]
    b: Annotated[Positional[Path], arg(metavar="B")]
    any_network: Annotated[Flag, arg(name="any")] = False


def compare(
    options: CompareOptions,
) -> tuple[impatient.CostProfile, impatient.CostProfile, list[Comparison]]:
    """Compare two profiles, batch size by batch size.

    Returns:
        Both profiles, and a row per exit and batch size.
    """
    first = load_profile(options.a)
    second = load_profile(options.b)
    return first, second, list(first.compare(second, any_network=options.any_network))


def load_profile(path: str | Path) -> impatient.CostProfile:
    """Load a profile from its file, or from a directory with a profile.json."""
    given = Path(path)
    file = given / "profile.json" if given.is_dir() else given
    if not is_file(file):
        raise StorageError(
            f"no profile at {file}; make one with `impatient profile "
            f"{given if given.is_dir() else 'DIR'}`."
        )
    return impatient.CostProfile.load(file)


def shown(
    _: CompareOptions, found: tuple[impatient.CostProfile, impatient.CostProfile, list[Comparison]]
) -> Iterator[Table | str]:
    """Give what differs between the profiles' origins, and a table per batch size."""
    first, second, rows = found
    for name, (one, other) in first.differences(second).items():
        yield f"{name}: {one} (A), {other} (B)"
    for size in dict.fromkeys(row.batch_size for row in rows):
        yield _table([row for row in rows if row.batch_size == size], first, second)


def _table(rows: Sequence[Comparison], a: impatient.CostProfile, b: impatient.CostProfile) -> Table:
    from impatient.evaluation.tables import noise_note

    size = rows[0].batch_size
    return Table(
        title=f"contract times of B beside A at batch size {size}; ratios say how many times as "
        f"fast B is\nA: {noise_note(a.at(size).noise)}\nB: {noise_note(b.at(size).noise)}",
        columns=(
            "exit",
            "after",
            "A mean ms",
            "B mean ms",
            "means",
            "medians",
            "p99s",
            "verdict on B",
        ),
        left=2,
        rows=[
            (
                "" if row.exit is None else str(row.exit),
                row.name,
                in_ms(row.a_s),
                in_ms(row.b_s),
                f"{row.ratio:.3f}",
                f"{row.p50_ratio:.3f}",
                f"{row.p99_ratio:.3f}",
                _verdict(row),
            )
            for row in rows
        ],
    )


def _verdict(row: Comparison) -> str:
    known = {
        "faster": f"{row.ratio:.2f} times faster",
        "slower": f"{1.0 / row.ratio:.2f} times slower",
    }
    verdict = known.get(row.verdict, row.verdict) if row.ratio > 0.0 else row.verdict
    return verdict if row.noise is None else f"{verdict} (noise \N{PLUS-MINUS SIGN}{row.noise:.0%})"
