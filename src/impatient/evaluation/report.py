"""Write one self-contained page about one network."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One judged sample, to look at.

    Attributes:
        picture: as PNG, or None where there is nothing to see.
        label, predicted: names of the true and the given class.
        exit: which exit answered.
        score: how sure it was.
    """

    picture: bytes | None
    label: str
    predicted: str
    exit: int
    score: float


def select_examples(
    recording: Recording, policy: Policy, count: int = 8
) -> tuple[list[int], list[int]]:
    """Choose samples that left first, and samples that stayed longest.

    The surest of the first and the least sure of the others lead; none is in both.

    Returns:
        Two lists of at most `count` indices into the recording.
    """
    exits = policy.exits_on(recording)
    scores = (
        SCORES[policy.shown_score()](recording.outputs)[exits, np.arange(len(exits))]
        .double()
        .numpy()
    )
    order = np.lexsort((-scores, exits.numpy()))
    early = order[: min(count, (len(order) + 1) // 2)]
    late = order[len(early) :][::-1][:count]
    return early.tolist(), late.tolist()


def figure_svg(figure: Figure) -> str:
    """Convert a figure to inline SVG for a page.

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
        rf'<svg \1 role="img" aria-label="{_literal(title)}">',
        svg,
        count=1,
    )


def report_html(
    *,
    title: str,
    evaluation: Evaluation,
    costs: CostProfile,
    policies: Mapping[str, Policy],
    chosen_budget: tuple[str, Budget] | None = None,
    early: Sequence[Example] = (),
    late: Sequence[Example] = (),
    engines: Mapping[str, tuple[Sequence[PairedComparison], Evaluation]] | None = None,
    facts: Mapping[str, str] | None = None,
) -> str:
    """Write one self-contained page.

    The same values give the same bytes, and opening it loads nothing from anywhere.

    Args:
        title: of the page.
        evaluation: what the page is about.
        costs: the profile of the same network.
        policies: by the names they have in the evaluation.
        chosen_budget: name and distribution of the budgets this network was made for.
        early: samples that the first policy let go early.
        late: samples that the first policy kept late.
        engines: what other engines answered beside torch, and their evaluations, by name.
        facts: what else made the network: model spec, data, commands.
    """
    sizes = sorted(costs.batches)
    sections = [
        _section(
            "Accuracy over time",
            _CURVE,
            _figure(accuracy_time(evaluation, chosen_budget)),
            _table(evaluation_table(evaluation, costs.exits)),
            _table(real_times_table(evaluation))
            if any(row.real for row in evaluation.rows)
            else "",
        ),
        _section(
            "When time is short",
            _BUDGETS,
            _table(budgets_table(evaluation, chosen_budget[0] if chosen_budget else None)),
        ),
        _section(
            "Who answers",
            _SHARES,
            _figure(exit_shares(evaluation)),
            _policies_table(policies, costs.exits),
        ),
        _section(
            "Where the time goes",
            _COSTS,
            *(
                _figure(where_time_goes(costs, size)) + _table(costs_table(costs, size))
                for size in sizes
            ),
        ),
        _section(
            "In other engines",
            _ENGINES,
            *(_table(engine_table(name, *found)) for name, found in engines.items()),
        )
        if engines
        else "",
        _section(
            "What is easy and what is hard",
            _EXAMPLES,
            _examples("Left early", early),
            _examples("Stayed longest", late),
        )
        if early or late
        else "",
        _section("Where this comes from", "", _origins(evaluation, costs, facts or {})),
    ]
    return _PAGE.format(
        title=_e(title),
        style=_STYLE,
        headline=_headline(evaluation),
        sections="\n".join(filter(None, sections)),
        version=_e(evaluation.provenance.versions.get("impatient", "")),
    )


_CURVE = (
    "The line is what an interruptible run holds at each moment: every head on the way runs, in "
    "case it is the last. A hollow "
    "circle is the same exit when the time was known and only its head ran. Policies, and the "
    "networks without exits, stand "
    "at their mean time. Bars are 95 % intervals. The oracle knows the truth and takes the "
    "cheapest exit that is right: no "
    "policy gets there."
)
_BUDGETS = (
    "Share of right answers when the time allowed is drawn from a distribution; no answer in time "
    "counts as wrong. Below "
    "each, its 95 % interval. Bold: the best of a column, but for the static oracle, which knows "
    "each budget and the accuracy "
    "of every exit."
)
_SHARES = (
    "An exit answers when its score reaches the threshold; a closed exit is passed without "
    "running its head."
)
_COSTS = (
    "Each row is one stage and its head, in the order in which they run. Times are measured, not "
    "counted: MACs "
    "(multiply-accumulates) are beside them. p99 means that one run in a hundred took longer."
)
_EXAMPLES = (
    "Samples that the first policy let go at once because it was sure, and samples it "
    "kept "
    "for the deeper exits."
)


_ENGINES = (
    "The same weights run by another engine. In full precision its answers differ by rounding; in "
    "8 bits they are others, and "
    "what that costs stands here. The difference is one of paired samples, so its interval is "
    "narrower than either accuracy's."
)


def _e(value: object) -> str:
    return html.escape(str(value), quote=True)


def _literal(text: str) -> str:
    return text.replace("\\", r"\\")


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
        f"{evaluation.samples} samples of split "
        f"“{_e(evaluation.split)}” (95 % interval {interval(last.accuracy)}), after "
        f"{milliseconds(last.interruptible_s)} if "
        "every exit on the way answers too."
    )
    if free:
        text += f" The same network without exits takes {milliseconds(free[0].contract_s)}"
    trained = [row for row in free if "alone" in row.name]
    alone = (
        f"; trained alone it is right on {percent(trained[0].accuracy.value)}" if trained else ""
    )
    lines = [_policy_line(row, last, free[0] if free else None) for row in evaluation.of("policy")]
    judged = "".join(f"<li>{line}</li>" for line in lines)
    return f'<p class="lead">{text.removesuffix(".")}{alone}.</p>' + (
        f'<ul class="lead">{judged}</ul>' if judged else "<p>No policy was judged.</p>"
    )


def _policy_line(row: Row, last: Row, free: Row | None) -> str:
    """Say what a policy saves in measured time, or that it saves nothing."""
    points = (row.accuracy.value - last.accuracy.value) * 100
    accuracy = (
        f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"
        if abs(points) >= 0.05
        else "as often as"
    )
    judged = (
        f"Policy <strong>{_e(row.name)}</strong> is right on {percent(row.accuracy.value)} "
        f"({interval(row.accuracy)}), "
        f"{accuracy} the last exit, in {milliseconds(row.contract_s)} a sample on average"
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
    explained = f'<p class="note">{_e(note)}</p>' if note else ""
    return (
        f"<section>\n<h2>{_e(heading)}</h2>\n{explained}\n"
        + "\n".join(filter(None, parts))
        + "\n</section>"
    )


def _figure(figure: Figure) -> str:
    return f"<figure>{figure_svg(figure)}</figure>"


def _table(table: Table) -> str:
    """Render a table whose first cells name the rows."""
    shown = table.shown_in("page")
    head = "".join(f'<th scope="col">{_cell(column, "<br>")}</th>' for column in shown.columns)
    body = []
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


def _policies_table(policies: Mapping[str, Policy], exits: Sequence[str]) -> str:
    """Make a column per policy, since exits may be many."""
    if not policies:
        return ""
    columns = []
    for policy in policies.values():
        words = policy.described(exits)
        columns.append((words.looks_at, *_target(policy), *words.rules))
    names: list[str | Cell] = ["looks at", "fitted on", "asked for", "reached there"]
    names += [Cell(f"exit {exit}", name) for exit, name in enumerate(exits)]
    cells = zip(names, zip(*columns, strict=True), strict=False)
    rows = [(name, *row) for name, row in cells]
    return _table(Table(title=_RULES, columns=("", *policies), rows=rows))


_RULES = (
    "A number is a threshold: an exit answers if its score is at least this. A gate decides "
    "by what it has learned."
)


def _target(policy: Policy) -> tuple[str, str, str]:
    """Say where a policy was fitted, and to what.

    The third text is what it reached there.
    """
    target = policy.target
    if policy.split is None or not {"mean_cost", "accuracy", "samples"} <= set(target):
        return policy.split or "set by hand", "", ""
    cost = amount(target["mean_cost"], policy.cost)
    wanted = next(
        (
            _asked(name, value)
            for name, value in target.items()
            if name not in ("mean_cost", "accuracy", "samples")
        ),
        "",
    )
    return (
        f"{policy.split}, n = {target['samples']:.0f}",
        wanted,
        f"{percent(target['accuracy'])} in {cost}",
    )


def _asked(name: str, value: float) -> str:
    if name == "time_price":
        return f"{value:g} errors per second"
    if name == "max_accuracy_loss":
        return f"{value * 100:.1f} points lost at most"
    cost: dict[str, Cost] = {"mean_macs": "macs", "mean_bytes": "bytes", "mean_energy_j": "energy"}
    return f"{amount(value, cost.get(name, 'time'))} at most"


def _examples(heading: str, examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    return (
        f'<h3>{_e(heading)}</h3>\n<div class="examples">'
        + "\n".join(map(_card, examples))
        + "</div>"
    )


def _card(example: Example) -> str:
    picture = ""
    if example.picture is not None:
        data = base64.b64encode(example.picture).decode("ascii")
        picture = f'<img src="data:image/png;base64,{data}" alt="{_e(example.label)}">'
    right = example.predicted == example.label
    verdict = (
        f"{_e(example.predicted)} ✓"
        if right
        else f"{_e(example.predicted)} ✗ <small>is {_e(example.label)}</small>"
    )
    return (
        f'<figure class="{"right" if right else "wrong"}">{picture}<figcaption>{verdict}<br>'
        f"<small>exit {example.exit}, score {example.score:.3f}</small></figcaption></figure>"
    )


def _origins(evaluation: Evaluation, costs: CostProfile, facts: Mapping[str, str]) -> str:
    judged = {
        "split": evaluation.split,
        "samples": str(evaluation.samples),
        **_origin(evaluation.provenance, machine=False),
    }
    parts = [
        ("Network", facts),
        ("Evaluation", judged),
        ("Times", _origin(costs.provenance, machine=True)),
    ]
    return "\n".join(
        f"<h3>{heading}</h3>\n<dl>"
        + "".join(f"<dt>{_e(name)}</dt><dd>{_e(value)}</dd>" for name, value in entries.items())
        + "</dl>"
        for heading, entries in parts
        if entries
    )


def _origin(source: Provenance, *, machine: bool) -> dict[str, str]:
    shown = (
        ("network", "device", "processor", "threads", "dtype", "engine")
        if machine
        else ("network", "weights", "data", "seed")
    )
    entries = {
        name: str(getattr(source, name)) for name in shown if getattr(source, name) is not None
    }
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    return {**entries, "versions": versions, "made": source.created}


_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #22262b; --soft: #5c646d; --line: #d9dde1; --tint: #f3f5f7;
  --blue: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --ink: #e6e9ec; --soft: #a3abb3; --line: #383e45; --tint: #1e2227;
    --blue: #3f9bdc;
  }
}
@media print {
  :root {
    --paper: #ffffff; --ink: #000000; --soft: #444444; --line: #bbbbbb; --tint: #f3f3f3;
    --blue: #0072b2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 {
  font-size: 1.3rem; margin: 2.75rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
.lead { font-size: 1.1rem; max-width: 48rem; }
ul.lead { padding-left: 1.2rem; }
ul.lead li { margin: .4rem 0; }
.note, caption, small, footer { color: var(--soft); }
.note { max-width: 48rem; margin: 0 0 1rem; }
figure { margin: 1rem 0; }
section > figure { max-width: 47rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption {
  text-align: left; padding-bottom: .5rem; font-size: .875rem;
  max-width: min(48rem, calc(100vw - 2.5rem));
}
th, td {
  padding: .3rem .6rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line);
}
thead th { vertical-align: bottom; font-weight: 600; border-bottom: 2px solid var(--line); }
tbody th { font-weight: 400; text-align: left; min-width: 7rem; }
th:first-child { padding-left: 0; text-align: left; }
td { white-space: nowrap; }
tr.policy { background: var(--tint); }
tr.policy th { font-weight: 600; }
tr.oracle, tr.head { color: var(--soft); }
.examples {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: .75rem;
}
.examples figure {
  margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: 6px;
  font-size: .875rem;
}
.examples .wrong { border: 2px solid #d55e00; }
.examples figcaption { line-height: 1.3; overflow-wrap: anywhere; }
.examples img {
  display: block; width: 100%; image-rendering: pixelated; border-radius: 3px;
  margin-bottom: .4rem;
}
dl {
  display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0;
  font-size: .875rem;
}
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 3rem; font-size: .875rem; }
@media print {
  html { font-size: 11px; }
  body { font-size: 1rem; }
  main { padding: 0; }
  figure, tr, .examples figure { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .wide { overflow: visible; }
}
"""

# the policy makes sure that nothing is loaded, whatever a name on this page may hold
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
{headline}
</header>
{sections}
<footer>Made by impatient {version}.</footer>
</main>
</body>
</html>
"""
