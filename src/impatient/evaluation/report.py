"""Write one self-contained page about one network."""

from __future__ import annotations

import base64
import html
import io
import itertools
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

import numpy as np
from matplotlib.figure import Figure

from impatient.budgets import Budget
from impatient.costs import Cost, CostProfile
from impatient.evaluation.evaluate import Evaluation, Row
from impatient.evaluation.paired import PairedComparison
from impatient.evaluation.plots import (
    BLUE,
    INK,
    PAPER,
    accuracy_time,
    exit_shares,
    styled,
    where_time_goes,
)
from impatient.evaluation.recording import Recording
from impatient.evaluation.tables import (
    amount,
    budgets_table,
    costs_table,
    engine_table,
    evaluation_table,
    interval,
    real_times_table,
)
from impatient.policies.policy import Policy
from impatient.policies.scores import SCORES
from impatient.provenance import Provenance, fingerprint_bytes
from impatient.table import Cell, Column, Table, milliseconds, percent

_CURVE = (
    "The line is what an interruptible run holds at each moment: every head on the way runs, in "
    "case it is the last. A hollow circle is the same exit when the time was known and only its "
    "head ran. Policies, and the networks without exits, stand at their mean time. Bars are 95 % "
    "intervals. The oracle knows the truth and takes the cheapest exit that is right: no policy "
    "gets there."
)
_BUDGETS = (
    "Share of right answers when the time allowed is drawn from a distribution; no answer in time "
    "counts as wrong. Below each, its 95 % interval. Bold: the best of a column, but for the "
    "static oracle, which knows each budget and the accuracy of every exit."
)
_SHARES = (
    "An exit answers when its score reaches the threshold; a closed exit is passed without "
    "running its head."
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
_EXAMPLES = (
    "Samples that the first policy let go at once because it was sure, and samples it kept for "
    "the deeper exits."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One judged sample, to look at.

    Attributes:
        picture: PNG, or None where there is nothing to see.
        label: Name of the true class.
        predicted: Name of the class that was answered.
        exit: Which exit answered.
        score: How sure it was.
    """

    picture: bytes | None
    label: str
    predicted: str
    exit: int
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that a page about one network shows.

    Attributes:
        title: Title of the page.
        evaluation: What the page is about.
        costs: The profile of the same network.
        policies: Policies by the names they have in the evaluation.
        chosen_budget: Name and distribution of the budgets this network was made for.
        early: Samples that the first policy let go early.
        late: Samples that the first policy kept late.
        engines: Answers of other engines beside torch's, and their evaluations, by name.
        facts: What else made the network: model spec, data, commands.
    """

    title: str
    evaluation: Evaluation
    costs: CostProfile
    policies: Mapping[str, Policy]
    chosen_budget: tuple[str, Budget] | None = None
    early: Sequence[Example] = ()
    late: Sequence[Example] = ()
    engines: Mapping[str, tuple[Sequence[PairedComparison], Evaluation]] = field(
        default_factory=dict
    )
    facts: Mapping[str, str] = field(default_factory=dict)


def select_examples(
    recording: Recording, policy: Policy, count: int = 8
) -> tuple[list[int], list[int]]:
    """Choose samples that left first and samples that stayed longest.

    Of the first the surest come ahead, of the others the least sure. No sample is in both lists.

    Returns:
        Two lists of at most `count` indices into the recording.
    """
    exits = policy.exits_on(recording)
    scores = SCORES[policy.shown_score()](recording.outputs)[exits, np.arange(len(exits))]
    order = np.lexsort((-scores.double().numpy(), exits.numpy()))
    early = order[: min(count, (len(order) + 1) // 2)]
    late = order[len(early) :][::-1][:count]
    return early.tolist(), late.tolist()


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
    title = _e(" ".join(text.get_text() for text in figure.texts))
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        lambda found: f'<svg {found[1]} role="img" aria-label="{title}">',
        svg,
        count=1,
    )


def report_html(report: Report) -> str:
    """Write one self-contained page.

    The same values give the same bytes. Opening the page loads nothing from anywhere.
    """
    evaluation = report.evaluation
    costs = report.costs
    budget = report.chosen_budget
    sections = [
        _section(
            "Accuracy over time",
            _CURVE,
            _figure(accuracy_time(evaluation, budget)),
            _table(evaluation_table(evaluation, costs.exits)),
            _table(real_times_table(evaluation)),
        ),
        _section(
            "When time is short",
            _BUDGETS,
            _table(budgets_table(evaluation, budget[0] if budget else None)),
        ),
        _section(
            "Who answers",
            _SHARES,
            _figure(exit_shares(evaluation)),
            _table(_policies_table(report.policies, costs.exits)),
        ),
        _section(
            "Where the time goes",
            _COSTS,
            *(
                _figure(where_time_goes(costs, size)) + _table(costs_table(costs, size))
                for size in sorted(costs.batches)
            ),
        ),
        _section(
            "In other engines",
            _ENGINES,
            *(_table(engine_table(name, *found)) for name, found in report.engines.items()),
        ),
        _section(
            "What is easy and what is hard",
            _EXAMPLES,
            _examples("Left early", report.early),
            _examples("Stayed longest", report.late),
        ),
        _section("Where this comes from", "", _origins(evaluation, costs, report.facts)),
    ]
    return string.Template(_file("report.html")).substitute(
        title=_e(report.title),
        style=_file("report.css"),
        headline=_headline(evaluation),
        sections="\n".join(filter(None, sections)),
        version=_e(evaluation.provenance.versions.get("impatient", "")),
    )


def _file(name: str) -> str:
    return (resources.files("impatient.evaluation") / name).read_text("utf-8")


def _e(value: object) -> str:
    return html.escape(str(value))


def _against(value: float, reference: float) -> str:
    """Say how much less or more than a reference."""
    change = value / reference - 1.0 if reference else 0.0
    if abs(change) < 0.005:
        return "as much"
    return f"{percent(abs(change), 0)} {'less' if change < 0 else 'more'}"


def _headline(evaluation: Evaluation) -> str:
    last = evaluation.of("exit")[-1]
    free = evaluation.of("exit_free")
    text = (
        f"The last exit is right on <strong>{percent(last.accuracy.value)}</strong> of "
        f"{evaluation.samples} samples of split “{_e(evaluation.split)}” (95 % interval "
        f"{interval(last.accuracy)}), after {milliseconds(last.interruptible_s)} if every exit on "
        "the way answers too."
    )
    if free:
        text += f" The same network without exits takes {milliseconds(free[0].contract_s)}"
    for row in free:
        if "alone" in row.name:
            text += f"; trained alone it is right on {percent(row.accuracy.value)}"
    lines = [_policy_line(row, last, free[0] if free else None) for row in evaluation.of("policy")]
    judged = "".join(f"<li>{line}</li>" for line in lines)
    return f'<p class="lead">{text.removesuffix(".")}.</p>' + (
        f'<ul class="lead">{judged}</ul>' if judged else "<p>No policy was judged.</p>"
    )


def _policy_line(row: Row, last: Row, free: Row | None) -> str:
    """Say what a policy saves in measured time, even if that is nothing."""
    points = (row.accuracy.value - last.accuracy.value) * 100
    accuracy = (
        f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"
        if abs(points) >= 0.05
        else "as often as"
    )
    judged = (
        f"Policy <strong>{_e(row.name)}</strong> is right on {percent(row.accuracy.value)} "
        f"({interval(row.accuracy)}), {accuracy} the last exit, in "
        f"{milliseconds(row.contract_s)} a sample on average"
    )
    if free is None:
        return f"{judged}."
    time = _against(row.contract_s, free.contract_s)
    macs = _against(row.macs, free.macs)
    if row.contract_s < 0.995 * free.contract_s:
        verdict = f"<strong>{time} time</strong> than without exits, with {_than(macs, 'MACs')}"
    else:
        verdict = (
            f"which <strong>saves no time</strong>: {_than(time, 'time')} without exits, "
            f"with {_than(macs, 'MACs')}"
        )
    return f"{judged}, {verdict}."


def _than(change: str, what: str) -> str:
    if change == "as much":
        return f"as much {what} as" if what == "time" else f"as many {what}"
    return (
        f"{change} {what} than" if what == "time" else f"{change.replace('less', 'fewer')} {what}"
    )


def _section(heading: str, note: str, *parts: str) -> str:
    """Put parts under a heading, or nothing if there are none."""
    body = "\n".join(filter(None, parts))
    explained = f'<p class="note">{_e(note)}</p>' if note else ""
    return f"<section>\n<h2>{heading}</h2>\n{explained}\n{body}\n</section>" if body else ""


def _figure(figure: Figure) -> str:
    return f"<figure>{figure_svg(figure)}</figure>"


def _table(table: Table) -> str:
    """Write a table, if it has rows, with their kinds as classes."""
    shown = table.shown_in("page")
    if not shown.rows:
        return ""
    head = "".join(f'<th scope="col">{_cell(column, "<br>")}</th>' for column in shown.columns)
    body = []
    # the first cell of each row names it
    for (name, *cells), kind in zip(shown.rows, shown.kinds or [""] * len(shown.rows), strict=True):
        mark = f' class="{kind}"' if kind else ""
        body.append(
            f'<tr{mark}><th scope="row">{_cell(name, " ")}</th>'
            + "".join(f"<td>{_cell(cell, '<br>')}</td>" for cell in cells)
            + "</tr>"
        )
    titled = f"<caption>{_e(shown.title)}</caption>" if shown.title else ""
    return (
        f'<div class="wide"><table>{titled}<thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def _cell(cell: str | Cell | Column, space: str) -> str:
    if not isinstance(cell, Cell):
        return _e(cell)
    text = f"<strong>{_e(cell.text)}</strong>" if cell.strong else _e(cell.text)
    return f"{text}{space}<small>{_e(cell.detail)}</small>" if cell.detail else text


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
    fitted = f"{policy.split}, n = {target.pop('samples'):.0f}"
    return fitted, next(itertools.starmap(_asked, target.items()), ""), reached


def _asked(name: str, value: float) -> str:
    if name == "time_price":
        return f"{value:g} errors per second"
    if name == "max_accuracy_loss":
        return f"{value * 100:.1f} points lost at most"
    cost: dict[str, Cost] = {"mean_macs": "macs", "mean_bytes": "bytes", "mean_energy_j": "energy"}
    return f"{amount(value, cost.get(name, 'time'))} at most"


def _examples(heading: str, examples: Sequence[Example]) -> str:
    cards = "\n".join(map(_card, examples))
    return f'<h3>{heading}</h3>\n<div class="examples">{cards}</div>' if cards else ""


def _card(example: Example) -> str:
    picture = ""
    if example.picture is not None:
        data = base64.b64encode(example.picture).decode("ascii")
        picture = f'<img src="data:image/png;base64,{data}" alt="{_e(example.label)}">'
    right = example.predicted == example.label
    verdict = "✓" if right else f"✗ <small>is {_e(example.label)}</small>"
    return (
        f'<figure class="{"right" if right else "wrong"}">{picture}<figcaption>'
        f"{_e(example.predicted)} {verdict}<br>"
        f"<small>exit {example.exit}, score {example.score:.3f}</small></figcaption></figure>"
    )


def _origins(evaluation: Evaluation, costs: CostProfile, facts: Mapping[str, str]) -> str:
    judged = {
        "split": evaluation.split,
        "samples": evaluation.samples,
        **_origin(evaluation.provenance, "network", "weights", "data", "seed"),
    }
    machine = ("network", "device", "processor", "threads", "dtype", "engine")
    parts = {
        "Network": facts,
        "Evaluation": judged,
        "Times": _origin(costs.provenance, *machine),
    }
    return "\n".join(
        f"<h3>{heading}</h3>\n<dl>"
        + "".join(f"<dt>{_e(name)}</dt><dd>{_e(value)}</dd>" for name, value in entries.items())
        + "</dl>"
        for heading, entries in parts.items()
        if entries
    )


def _origin(source: Provenance, *names: str) -> dict[str, object]:
    known = {name: getattr(source, name) for name in names}
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    return {
        **{name: value for name, value in known.items() if value is not None},
        "versions": versions,
        "made": source.created,
    }
