"""What a server counts, in the text format of Prometheus."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
# what is counted of every model beside its answers and refusals
COUNTED: Mapping[str, Callable[[Counters], float]] = {
    "cancelled_total": lambda one: one.cancelled,
    "works_total": lambda one: one.works,
    "rows_total": lambda one: one.rows,
    "busy_seconds_total": lambda one: one.busy_s,
}


@dataclass(slots=True)
class Counters:
    """What happened to a model's requests, for metrics and the page."""

    answers: collections.Counter[tuple[int, str, bool]] = field(default_factory=collections.Counter)
    refusals: collections.Counter[str] = field(default_factory=collections.Counter)
    cancelled: int = 0
    works: int = 0
    rows: int = 0
    answered_rows: int = 0
    busy_s: float = 0.0
    elapsed_s: float = 0.0
    # answers up to each bound and above the one before; at the end, those beyond the last
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))


def text_of(gauges: Mapping[str, float], counters: Mapping[str, Counters]) -> str:
    """Write gauges, and the counters of all models."""
    counters = {_escaped(name): one for name, one in counters.items()}
    lines = [*_gauges(gauges), *_answers(counters)]
    for kind, value in COUNTED.items():
        lines.append(f"# TYPE impatient_{kind} counter")
        lines += [
            f'impatient_{kind}{{model="{model}"}} {value(one)}' for model, one in counters.items()
        ]
    return "\n".join([*lines, *_times(counters)]) + "\n"


def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _gauges(gauges: Mapping[str, float]) -> Iterator[str]:
    for name, value in gauges.items():
        yield f"# TYPE impatient_{name} gauge"
        yield f"impatient_{name} {value}"


def _answers(counters: Mapping[str, Counters]) -> Iterator[str]:
    yield "# TYPE impatient_answers_total counter"
    for name, one in counters.items():
        for (exit, why, in_time), count in sorted(one.answers.items()):
            yield (
                f'impatient_answers_total{{model="{name}",exit="{exit}",stopped_by="{why}",'
                f'in_time="{str(in_time).lower()}"}} {count}'
            )
    yield "# TYPE impatient_refusals_total counter"
    for name, one in counters.items():
        for why, count in sorted(one.refusals.items()):
            yield f'impatient_refusals_total{{model="{name}",why="{why}"}} {count}'


def _times(counters: Mapping[str, Counters]) -> Iterator[str]:
    yield "# TYPE impatient_answer_seconds histogram"
    for model, one in counters.items():
        count = sum(one.answers.values())
        for bound, below in zip(BUCKETS_S, itertools.accumulate(one.buckets), strict=False):
            yield f'impatient_answer_seconds_bucket{{model="{model}",le="{bound}"}} {below}'
        yield f'impatient_answer_seconds_bucket{{model="{model}",le="+Inf"}} {count}'
        yield f'impatient_answer_seconds_sum{{model="{model}"}} {one.elapsed_s}'
        yield f'impatient_answer_seconds_count{{model="{model}"}} {count}'
