"""Write one self-contained page about one network.

The recording travels in the page, so that every number follows the reader's dials. The page says
its result without them, too: without JavaScript it is a static report.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from impatient.budgets import Budget
from impatient.characters import visible
from impatient.costs import Cost, CostProfile
from impatient.evaluation.advice import advice, bolder, without_loss
from impatient.evaluation.evaluate import Evaluation, Row
from impatient.evaluation.opening import Opening, by_when, opening_of
from impatient.evaluation.paired import PairedComparison
from impatient.evaluation.payload import Payload, make_payload
from impatient.evaluation.picture import Part, network_svg
from impatient.evaluation.plots import (
    BLUE,
    INK,
    LOG_BEYOND,
    PAPER,
    accuracy_time,
    predicted_true,
    styled,
)
from impatient.evaluation.recording import Recording
from impatient.evaluation.tables import (
    amount,
    budgets_table,
    costs_table,
    engine_table,
    evaluation_table,
    real_times_table,
)
from impatient.evaluation.templates import own_file, rendered
from impatient.policies.policy import Policy
from impatient.policies.rules import scores_of
from impatient.policies.targets import FittedTo
from impatient.portable.timing import RESERVE_S
from impatient.provenance import Provenance, fingerprint_bytes
from impatient.table import Cell, Table, grouped, percent, points

_CURVE = (
    "Interruptible is the time when every head on the way runs, in case it is the last; contract "
    "when the time was known and only heads that are looked at run. The oracle knows the truth and "
    "takes the cheapest exit that is right: no policy gets there."
)
_BUDGETS = (
    "The time allowed, the budget, is drawn from the distribution above each column. "
    "Interruptible runs until it is over; contract knows it before. Below each, its 95 % interval. "
    "Bold: the best of a column, but for the static oracle, which knows each budget and the "
    "accuracy of every exit."
)
_RULES = (
    "A number is a threshold: an exit answers if its score is at least this. A gate decides by "
    "what it has learned."
)
_COSTS = (
    "Each row is one stage and its head, in the order in which they run. Times are measured, not "
    "counted: MACs (multiply-accumulates) are beside them. p99 means that one run in a hundred "
    "took longer."
)
_ENGINES = (
    "The same weights run by another engine. In full precision its answers differ by rounding; in "
    "8 bits they are others, and what that costs stands here. The difference is one of paired "
    "samples, so its interval is narrower than either accuracy's."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What one exit says about a sample.

    Attributes:
        answer: the answer in a word or two.
        top: the likeliest answers and their probabilities, the likeliest first.
        layer: bytes of a PNG to be seen over the picture, such as a mask; None without.
    """

    answer: str
    top: tuple[tuple[str, float], ...] = ()
    layer: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One recorded sample, to look at.

    Attributes:
        sample: its index in the recording.
        label: name of the true class, or what else is true.
        exits: what each exit says, shallow to deep.
        picture: bytes of a picture, or None where there is nothing to see.
        media: media type of the picture.
        layer: bytes of a PNG that shows over the picture what is true; None without.
        words: words of a text, each with how much the answer depends on it, from -1 to 1.
    """

    sample: int
    label: str
    exits: tuple[Said, ...]
    picture: bytes | None = None
    media: str = "image/png"
    layer: bytes | None = None
    words: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that a page about one network shows.

    Attributes:
        title: title of the page.
        evaluation: what the page is about.
        recording: the recording that was evaluated; it travels in the page.
        costs: the profile of the same network.
        policies: policies by the names they have in the evaluation.
        chosen_budget: name and distribution of the budgets this network was made for.
        examples: samples to look at.
        numbers: true numbers and what exits say of them, by the exits' names, to draw.
        engines: answers of other engines beside torch's, and their evaluations, by name.
        compared: evaluations of other networks on the same data, or on other machines, by name.
        network: stages and heads of the network with their shares of the time, to draw.
        facts: what else made the network: model spec, data, commands.
        targets: what policies were fitted to, by name.
    """

    title: str
    evaluation: Evaluation
    recording: Recording
    costs: CostProfile
    policies: Mapping[str, Policy]
    chosen_budget: tuple[str, Budget] | None = None
    examples: Sequence[Example] = ()
    numbers: tuple[Sequence[float], Mapping[str, Sequence[float]]] | None = None
    engines: Mapping[str, tuple[Sequence[PairedComparison], Evaluation]] = field(
        default_factory=dict
    )
    compared: Mapping[str, Evaluation] = field(default_factory=dict)
    network: Sequence[Part] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    targets: Mapping[str, FittedTo] = field(default_factory=dict)


def select_examples(
    recording: Recording, policy: Policy, count: int = 8
) -> tuple[list[int], list[int]]:
    """Choose samples that left first and samples that stayed longest.

    Those that left first all left at one exit, the surest ahead; the others all stayed beyond it,
    the longest and the least sure ahead. If every sample left at one exit, nobody stayed.

    Returns:
        Two lists of at most `count` indices into the recording.
    """
    exits = policy.exits_on(recording)
    scores = scores_of(recording, policy.shown_score())[exits, np.arange(len(exits))]
    order = np.lexsort((-scores.double().numpy(), exits.numpy()))
    left = int((exits == exits.min()).sum())
    return order[:left][:count].tolist(), order[left:][::-1][:count].tolist()


def figure_svg(figure: Figure) -> str:
    """Draw a figure as inline SVG for a page.

    Text stays text, ink and paper follow the page, and equal figures give equal text.
    """
    stream = io.StringIO()
    with styled():
        figure.savefig(
            stream,
            format="svg",
            facecolor="none",
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    svg = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = (
        svg.replace(INK, "currentColor")
        .replace(PAPER, "var(--paper, #ffffff)")
        .replace(BLUE, f"var(--blue, {BLUE})")
    )
    # matplotlib's ids are unique in a figure, not on a page
    mark = f"f{fingerprint_bytes(svg.encode())[:8]}-"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{mark}", svg)
    # hundredths of a pixel are enough
    svg = re.sub(
        r' (?:d|x|y|transform)="[^"]*"',
        lambda found: re.sub(r"(\.\d\d)\d+|\s*\n", r"\1", found[0]),
        svg,
    )
    title = escape(" ".join(text.get_text() for text in figure.texts))
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        lambda found: f'<svg {found[1]} role="img" aria-label="{visible(title)}">',
        visible(svg),
        count=1,
    )


def report_html(report: Report) -> str:
    """Write one self-contained page.

    The same values give the same bytes. Opening the page loads nothing from anywhere, and no script
    but the page's own runs in it.
    """
    evaluation = report.evaluation
    costs = report.costs
    samples = [example.sample for example in report.examples]
    payload = make_payload(report.recording, costs, report.policies, keep=samples)
    opening = opening_of(evaluation, report.recording, costs, payload)
    script = own_file("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    content = payload.content | _content(report, payload, opening)
    budget = report.chosen_budget
    verdict, *sentences = _advice(report, payload)
    return rendered(
        "report.html",
        title=report.title,
        style=own_file("report.css"),
        script=script,
        script_hash=f"sha256-{digest}",
        data=_embedded(content),
        line=Markup("<br>"),
        exits_word=_many(costs.num_exits, "exit"),
        samples=grouped(evaluation.samples),
        split=evaluation.split,
        machine=_machine(costs),
        opening=opening,
        by_when=by_when(evaluation, opening),
        reserve=f"{RESERVE_S * 1e3:g}\N{NO-BREAK SPACE}ms",
        words=content["words"],
        verdict=verdict,
        advice=sentences,
        figure=figure_svg(accuracy_time(evaluation, budget)),
        compared=content["compared"],
        examples=[_card(report, payload, example) for example in report.examples],
        numbers=figure_svg(predicted_true(*report.numbers)) if report.numbers else "",
        network=network_svg(report.network, timed=True) if report.network else "",
        sections=list(_sections(report)),
        origins=_origins(evaluation, costs, report.facts),
        version=evaluation.provenance.versions.get("impatient", ""),
    )


def _embedded(content: Any) -> str:
    """Write JSON that cannot end the element it stands in."""
    text = json.dumps(
        _all_visible(content), ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _all_visible(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {key: _all_visible(entry) for key, entry in value.items()}
    return [*map(_all_visible, value)] if isinstance(value, list | tuple) else value


def _many(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _machine(costs: CostProfile) -> str:
    made = costs.provenance
    threads = f"{_many(made.threads, 'thread')} of " if made.threads else ""
    return f"{threads}{made.processor or made.device or 'an unknown machine'}"


# --- what the script reads ------------------------------------------------------------------------


def _content(report: Report, payload: Payload, opening: Opening) -> dict[str, Any]:
    """Return what a page's script needs beside the recording."""
    evaluation = report.evaluation
    rows = [_row(row) for row in evaluation.rows]
    low, high, logarithmic = _range(report, opening)
    others = {f"engine {name}": found[1] for name, found in report.engines.items()}
    others |= report.compared
    free = evaluation.of("exit_free")
    return {
        "rows": rows,
        "free": _row(max(free, key=lambda row: row.accuracy.value)) if free else None,
        "deadline": opening.deadline_ms,
        "reserve": RESERVE_S * 1e3,
        "range": [low, high],
        "logarithmic": logarithmic,
        "budget": _budget(report.chosen_budget, low, high),
        "asked": [[name, _target(policy)[1]] for name, policy in report.policies.items()],
        "words": _words(evaluation.quality_name, yes_or_no=payload.content["bits"]),
        "yes_or_no": payload.content["bits"],
        "compared": [
            {
                "name": name,
                "exits": [
                    [row.interruptible_s * 1e3, row.accuracy.value] for row in other.of("exit")
                ],
                "policies": [
                    {
                        "name": row.name,
                        "time": row.contract_s * 1e3,
                        "quality": row.accuracy.value,
                    }
                    for row in other.of("policy")
                ],
            }
            for name, other in others.items()
        ],
        "examples": [_example(payload, example) for example in report.examples],
    }


def _words(quality: str, *, yes_or_no: bool) -> dict[str, str]:
    """Say what the quality of an answer is called, and what is good and bad of it."""
    if yes_or_no and quality == "accuracy":
        right = {"it_is": "it is right on", "good": "right", "bad": "wrong"}
    else:
        right = {
            "it_is": f"its {quality} is",
            "good": quality,
            "bad": "what lacks to a perfect one",
        }
    return {"quality": quality, "only": "the only exit", **right}


def _row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "kind": row.kind,
        "quality": row.accuracy.value,
        "interval": [row.accuracy.low, row.accuracy.high],
        "interruptible": row.interruptible_s * 1e3,
        "contract": row.contract_s * 1e3,
    }


def _range(report: Report, opening: Opening) -> tuple[float, float, bool]:
    """Find the ends of the axis of time, in milliseconds, and whether it is logarithmic."""
    times = [
        time * 1e3
        for row in report.evaluation.rows
        for time in (row.contract_s, row.interruptible_s)
        if time > 0.0
    ]
    high = max(1.25 * opening.deadline_ms, 1.05 * max(times))
    logarithmic = max(times) > LOG_BEYOND * min(times)
    return (min(times) / 1.4 if logarithmic else 0.0), high, logarithmic


def _budget(budget: tuple[str, Budget] | None, low: float, high: float) -> dict[str, Any] | None:
    """Return how likely budgets of each time are, relative to the likeliest."""
    if budget is None or budget[1].cost != "time":
        return None
    name, distribution = budget
    edges = np.linspace(max(low, 1e-6), high, 121)
    below = np.asarray(distribution.probability_below(edges / 1e3))
    heights = np.diff(below)
    tallest = float(heights.max())
    if tallest <= 0.0:
        return None
    return {
        "name": name,
        "times": ((edges[1:] + edges[:-1]) / 2).round(6).tolist(),
        "heights": (heights / tallest).round(4).tolist(),
    }


def _example(payload: Payload, example: Example) -> dict[str, Any]:
    return {
        "row": int(np.flatnonzero(payload.rows == example.sample)[0]),
        "label": example.label,
        "answers": [
            {
                "said": said.answer,
                "top": [[name, round(share, 4)] for name, share in said.top],
                "layer": _png(said.layer),
            }
            for said in example.exits
        ],
    }


def _card(report: Report, payload: Payload, example: Example) -> dict[str, Any]:
    """Say of a sample where it leaves before anybody turns a dial."""
    exit = report.costs.num_exits - 1
    if payload.shown is not None:
        exit = int(payload.shown.exits_on(report.recording)[example.sample])
    source = ""
    if example.picture is not None:
        data = base64.b64encode(example.picture).decode("ascii")
        source = f"data:{example.media};base64,{data}"
    return {
        "source": source,
        "layer": _png(example.exits[exit].layer),
        "truth": _png(example.layer),
        "words": [(word, _shade(weight)) for word, weight in example.words],
        "label": example.label,
        "exit": exit,
        "answer": example.exits[exit].answer,
        "probable": any(said.top for said in example.exits),
        "right": bool(report.recording.quality[exit, example.sample] > 0.5),
    }


def _png(layer: bytes | None) -> str:
    return f"data:image/png;base64,{base64.b64encode(layer).decode('ascii')}" if layer else ""


def _shade(weight: float) -> str:
    """Name how strongly a word speaks for the answer or against it, for the style sheet."""
    strength = round(3 * min(abs(weight), 1.0))
    return f"{'for' if weight > 0 else 'against'}-{strength}" if strength else ""


def _advice(report: Report, payload: Payload) -> list[str]:
    """Say whether exits pay, and then what to change."""
    verdict, *said = advice(report.evaluation, report.costs, report.chosen_budget, report.targets)
    more = ""
    if report.policies:
        more = without_loss(report.evaluation, payload.families, report.recording, report.costs)
    families = [family for family in payload.families if family.fitted]
    return [f"{verdict} {more}".strip(), *said, *bolder(families, report.recording, report.costs)]


# --- tables ---------------------------------------------------------------------------------------


def _sections(report: Report) -> Iterator[tuple[str, str, list[Table]]]:
    evaluation = report.evaluation
    costs = report.costs
    chosen = report.chosen_budget[0] if report.chosen_budget else None
    ways = [evaluation_table(evaluation, costs.exits), real_times_table(evaluation)]
    yield "Every way to answer", _CURVE, ways
    yield "When time is short", _BUDGETS, [budgets_table(evaluation, chosen)]
    yield "Policies", "", [_policies_table(report.policies, costs.exits)]
    yield (
        "Where the time goes",
        _COSTS,
        [costs_table(costs, size) for size in sorted(costs.batches)],
    )
    yield (
        "In other engines",
        _ENGINES,
        [engine_table(name, *found) for name, found in report.engines.items()],
    )


def _policies_table(policies: Mapping[str, Policy], exits: Sequence[str]) -> Table:
    """Describe each policy in a column, since exits may be many."""
    described = [(policy.described(exits), _target(policy)) for policy in policies.values()]
    columns = [(words.looks_at, *target, *words.rules) for words, target in described]
    names: list[str | Cell] = ["looks at", "fitted on", "asked for", "reached there"]
    names += [Cell(f"exit {exit}", name) for exit, name in enumerate(exits)]
    cells = zip(names, zip(*columns, strict=True), strict=False)
    return Table(title=_RULES, columns=("", *policies), rows=[(name, *row) for name, row in cells])


def _target(policy: Policy) -> tuple[str, str, str]:
    """Say where a policy was fitted, what for, and what it reached."""
    target = dict(policy.target)
    if policy.split is None or not {"mean_cost", "accuracy", "samples"} <= set(target):
        return policy.split or "set by hand", "", ""
    cost = amount(target.pop("mean_cost"), policy.cost)
    reached = f"{percent(target.pop('accuracy'))} in {cost}"
    fitted = f"{policy.split}, n = {grouped(round(target.pop('samples')))}"
    return fitted, next(itertools.starmap(_asked, target.items()), ""), reached


def _asked(name: str, value: float) -> str:
    if name == "time_price":
        return f"{value:g} errors per second"
    if name == "max_accuracy_loss":
        return f"{points(value)} lost at most"
    cost: dict[str, Cost] = {"mean_macs": "macs", "mean_bytes": "bytes", "mean_energy_j": "energy"}
    return f"{amount(value, cost.get(name, 'time'))} at most"


def _origins(
    evaluation: Evaluation, costs: CostProfile, facts: Mapping[str, str]
) -> list[tuple[str, list[tuple[str, object]]]]:
    judged = {
        "split": evaluation.split,
        "samples": grouped(evaluation.samples),
        **_origin(evaluation.provenance, "network", "weights", "data", "seed"),
    }
    machine = ("network", "device", "processor", "threads", "dtype", "engine")
    parts: dict[str, Mapping[str, object]] = {
        "Network": facts,
        "Evaluation": judged,
        "Times": _origin(costs.provenance, *machine),
    }
    return [(heading, list(entries.items())) for heading, entries in parts.items()]


def _origin(source: Provenance, *names: str) -> dict[str, object]:
    known = {name: getattr(source, name) for name in names}
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    return {
        **{name: value for name, value in known.items() if value is not None},
        "versions": versions,
        "made": source.created,
    }
