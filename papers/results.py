"""From runs over seeds to numbers with their spread, CSV files, markdown tables and cards."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from scipy import stats

from impatient.errors import StorageError
from impatient.files import write_text
from impatient.provenance import versions

Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Spread:
    """Several runs' values of one number.

    Attributes:
        count: of runs.
        mean: over them.
        deviation: their sample standard deviation; NaN for a single run, which has no spread.
    """

    count: int
    mean: float
    deviation: float

    def text(self, digits: int = 1, *, sign: bool = False) -> str:
        """Format mean ± deviation, or the mean of a single run."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if math.isnan(self.deviation) else f"{mean} ± {self.deviation:.{digits}f}"


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation.

    Example:
        >>> spread([1.0, 2.0, 3.0]).text()
        '2.0 ± 1.0'
        >>> spread([2.0]).text()
        '2.0'
    """
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(len(values), statistics.fmean(values), deviation)


def csv_text(rows: Sequence[Row]) -> str:
    """Write rows of the same columns as CSV, with six significant digits."""
    stream = io.StringIO()
    table = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(
        {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        for row in rows
    )
    return stream.getvalue()


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as a CSV file, whole or not at all."""
    write_text(path, csv_text(rows))


def markdown(rows: Sequence[Row]) -> str:
    """Rows of the same columns as a markdown table.

    Example:
        >>> print(markdown([{"row": "uniform", "joint": "53.9"}]))
        | row | joint |
        |---|---|
        | uniform | 53.9 |
    """
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(
        [*lines, *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows)]
    )


def made_by(processor: str, module: str) -> str:
    """Machine, versions, commit, date and command, as one line.

    Args:
        processor: what the runs were made on; the tables may be made elsewhere.
        module: what was run with `python -m`.
    """
    describe = ["git", "describe", "--always", "--dirty"]
    here = Path(__file__).parent
    commit = subprocess.run(  # noqa: S603  git's own name and fixed arguments
        describe, capture_output=True, text=True, cwd=here, check=False
    ).stdout.strip()
    command = " ".join(["python", "-m", module, *sys.argv[1:]])
    return (
        f"{processor}; {platform.system()} {platform.release()}; "
        f"{', '.join(f'{name} {version}' for name, version in versions().items())}; commit "
        f"{commit or 'unknown'}; {datetime.now(UTC):%Y-%m-%d}. Command: `{command}`"
    )


def fill(card: Path, mark: str, text: str) -> None:
    """Replace the text between `<!-- MARK -->` and `<!-- /MARK -->` of a card.

    Raises:
        StorageError: if the card lacks the marks.
    """
    old = card.read_text(encoding="utf-8")
    begin = f"<!-- {mark} -->"
    end = f"<!-- /{mark} -->"
    before, found, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise StorageError(
            f"{card} lacks the marks {begin} and {end}; put them where the table belongs."
        )
    write_text(card, f"{before}{begin}\n{text.strip()}\n{end}{after}")


# --- claims ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement of a paper and what our runs say to it."""

    claim: str
    paper: str
    ours: str
    verdict: str


def claim_rows(claims: Iterable[Claim]) -> list[dict[str, object]]:
    """Return claims as rows of a table."""
    return [dataclasses.asdict(claim) for claim in claims]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Compute the 95 % interval of the mean by Student's t, everything for a single value.

    Example:
        >>> low, high = interval([1.0, 2.0, 3.0])
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    if len(values) < 2:
        return -math.inf, math.inf
    half = (
        float(stats.t.ppf(0.975, len(values) - 1))
        * statistics.stdev(values)
        / math.sqrt(len(values))
    )
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def sampling_half_width(shares: Sequence[float], tested: int) -> float:
    """Return the half width of the 95 % interval of two shares' difference, by the test alone.

    They are taken for those of two samples. Pairs of answers would give less.

    Args:
        shares: right answers of both, in [0, 1].
        tested: how many test samples.
    """
    return 1.96 * math.sqrt(sum(share * (1 - share) / tested for share in shares))


def judged(claim: str, paper: str, what: str, gains: Sequence[float]) -> Claim:
    """Judge a mean gain by its 95 % interval.

    The answer is yes if the interval is above 0, no if it is below 0, and else not told apart.
    """
    low, high = interval(gains)
    verdict = "yes" if low > 0 else "no" if high < 0 else "not told apart"
    bounds = (
        f"95 % interval {low:+.1f} to {high:+.1f}" if math.isfinite(low) else "one run, no interval"
    )
    return Claim(
        claim, paper, f"{what} {statistics.fmean(gains):+.1f} ({bounds}, n = {len(gains)})", verdict
    )
