"""From numbers to files: CSV, figures and the page that fills the card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from impatient.evaluation.plots import BLUE, INK, MUTED, ORANGE, VERMILION, save_figure, styled
from impatient.files import write_text
from impatient.networks.anytimenet import AnytimeNet
from papers.anytimenet import execution, learning, times
from papers.anytimenet.learning import NORMS_IN_WORDS, Results, per_iteration
from papers.anytimenet.recipe import NORMS, Case, Net, Scale, key
from papers.anytimenet.times import Middle
from papers.results import Spread, claim_rows, made_by, markdown, write_csv

UNITLESS = ("correlation over classes", "over samples")
COLOURS = {"shared": BLUE, "own": ORANGE}


def write(scale: Scale, results: Results, folder: Path) -> str:
    """Write all tables and figures of finished jobs, and return a markdown page.

    Args:
        results: of trainings and measurements, by job name; some may be missing.
        folder: for the files.
    """
    names = [
        (net, times.name(net, batch)) for net in scale.timing.nets for batch in scale.timing.batches
    ]
    timed = [(net, results[name]) for net, name in names if name in results]
    seeds = {
        case.name: learning.complete(case, range(scale.seeds), results) for case in scale.cases
    }
    when = next((times.over_baseline(result) for net, result in timed if net == scale.net), None)
    learnt = _learning_part(scale, seeds, results, when, folder)
    took = _times_part(timed, folder)
    claims = [*learning.claims(scale.cases, seeds, results)]
    claims += [claim for net, result in timed for claim in times.claims(net, result)]
    if claims:
        write_csv(folder / "claims.csv", claim_rows(claims))
    parts = [
        *(["**Claims**", markdown(claim_rows(claims))] if claims else []),
        *_execution_part(folder),
        *took,
        *learnt,
        _made(scale, results),
    ]
    page = "\n\n".join(parts)
    write_text(folder / "results.md", page + "\n")
    return page


def _execution_part(folder: Path) -> list[str]:
    rows = execution.table(AnytimeNet(), torch.zeros(1, 3, 32, 32))
    write_csv(folder / "blocks.csv", rows)
    readable = [
        {
            "iteration": row["iteration"],
            "blocks": row["blocks"],
            "executed": row["executed"],
            "parts": row["parts"],
            "so far": row["cumulative"],
            "`growth.trace`": row["tally"],
            "the paper": row["paper"],
            "equal": row["equal"],
        }
        for row in rows
    ]
    counts = ", ".join(
        f"{name} {rows[-1][f'{name} so far']} (the paper: {paper})"
        for name, paper in execution.PAPER_PARTS.items()
    )
    return [
        "**Table I: what one run of AnytimeNet executed, from its trace**",
        markdown(readable),
        f"In all {counts}.",
    ]


def _times_part(timed: Sequence[tuple[Net, Mapping[str, Any]]], folder: Path) -> list[str]:
    parts: list[str] = []
    flat = []
    raw = []
    for net, result in timed:
        rows = times.table(result)
        name = times.name(net, result["batch"])
        flat += [{"network": name, **_flat(row)} for row in rows]
        raw += list(_raw_times(name, result))
        plain, grown = times.per_part(net, result)
        parts += [
            f"**Table II: time of each iteration, {times.in_words(net, result['batch'])}** (median "
            f"of {len(result['plain'])} repeats, in brackets the quantiles 0.1 and 0.9; "
            f"{_counted(result['threads'], 'thread')}, {result['processor']})",
            markdown([_readable_times(row) for row in rows]),
            f"BASELINE takes {Middle.of(result['plain']).text(2, 1e3)} ms, {1e6 * plain:.0f} µs "
            f"for each part it executes; AnytimeNet {1e6 * grown:.0f} µs for each of its.",
        ]
    if flat:
        write_csv(folder / "times.csv", flat)
        # networks have equally many iterations
        write_csv(folder / "times_raw.csv", raw)
    return parts


def _readable_times(row: Mapping[str, Any]) -> dict[str, object]:
    return {
        "iteration": row["iteration"],
        "blocks": row["blocks"],
        "so far, ms": row["seconds so far"].text(2, 1e3),
        "over BASELINE": row["over BASELINE"].text(),
        "multiply-accumulates over BASELINE": f"{row['MACs over BASELINE']:.3f}",
        "its own, ms": row["seconds"].text(2, 1e3),
        "predicted, ms": row["predicted"].text(2, 1e3),
        "over predicted": row["over predicted"].text(3),
        "within the spread": row["within the spread"],
    }


def _raw_times(name: str, result: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for repeat, plain in enumerate(result["plain"]):
        row = {"network": name, "repeat": repeat, "plain_s": plain}
        for what in ("cumulative", "alone", "predicted"):
            row |= {
                f"{what}_{index + 1}_s": value for index, value in enumerate(result[what][repeat])
            }
        yield row


def _learning_part(
    scale: Scale,
    seeds: Mapping[str, Sequence[int]],
    results: Results,
    when: Sequence[float] | None,
    folder: Path,
) -> list[str]:
    cases = [case for case in scale.cases if seeds[case.name]]
    names = scale.net.schedule.names
    if not cases:
        return []
    rows = {
        (case.name, norms): learning.table(case, norms, names, seeds[case.name], results)
        for case in cases
        for norms in NORMS
    }
    write_csv(
        folder / "accuracy.csv",
        [
            {"case": case, "statistics": norms, **_flat(row)}
            for (case, norms), table in rows.items()
            for row in table[:-1]
        ],
    )
    every = [(case, seeds[case.name]) for case in cases]
    write_csv(
        folder / "seeds.csv",
        [row for case, own in every for row in learning.raw_rows(case, names, own, results)],
    )
    write_csv(
        folder / "classes.csv",
        [row for case, own in every for row in learning.class_rows(case, names, own, results)],
    )
    save_figure(draw_iterations(cases, seeds, results, when), folder / "accuracy.png")
    for case in cases:
        save_figure(
            draw_classes(case, seeds[case.name], results, names),
            folder / f"classes_{case.name}.png",
        )
    parts = []
    for case in cases:
        for norms in NORMS:
            title = f"**{_case_in_words(case, results)}, {NORMS_IN_WORDS[norms]}**"
            counted = f" ({_counted(len(seeds[case.name]), 'seed')}, mean ± standard deviation)"
            parts += [title + counted, markdown([_readable(row) for row in rows[case.name, norms]])]
    return parts


def _case_in_words(case: Case, results: Results) -> str:
    images = (
        results[key(case, "anytime", 0)]["images"]
        if key(case, "anytime", 0) in results
        else case.images
    )
    how = f", augmentation {case.augment}" if case.augment != "none" else ""
    return (
        f"{case.name}: {images:,} training images, {_counted(case.epochs, 'epoch')}, batch "
        f"{case.batch_size}{how}"
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _readable(row: Mapping[str, Any]) -> dict[str, object]:
    """Format a row for reading, with spreads as mean ± deviation."""
    return {
        name: value.text(2 if name in UNITLESS else 1, sign=name.endswith("rise"))
        if isinstance(value, Spread)
        else value
        for name, value in row.items()
    }


def _flat(row: Mapping[str, Any]) -> dict[str, object]:
    """Format a row for a file, with spreads and medians as separate columns."""
    flat: dict[str, object] = {}
    for name, value in row.items():
        if isinstance(value, Spread):
            flat |= {name: value.mean, f"{name} sd": value.deviation}
        elif isinstance(value, Middle):
            flat |= {name: value.median, f"{name} q10": value.low, f"{name} q90": value.high}
        else:
            flat |= {name: value, **({f"{name} sd": ""} if name.endswith("rise") else {})}
    return flat


def _made(scale: Scale, results: Results) -> str:
    trained = [result for name, result in results.items() if "seconds" in result]
    processors = sorted({str(result["processor"]) for result in results.values()})
    how = scale.training
    training = (
        f"Learning rate {how.lr} ({how.schedule}), weights of the losses {how.weights}, "
        f"{scale.net.width} channels; {_counted(len(trained), 'training')}, "
        f"{sum(result['seconds'] for result in trained) / 3600:.2f} hours of training in all. The "
        "test split is used for these tables alone. "
    )
    return (training if trained else "") + made_by(
        ", ".join(processors) or "no runs", "papers.anytimenet"
    )


# --- figures --------------------------------------------------------------------------------------


def draw_iterations(
    cases: Sequence[Case],
    seeds: Mapping[str, Sequence[int]],
    results: Results,
    when: Sequence[float] | None,
) -> Figure:
    """Plot figure 3, accuracy and confidence over the time so far.

    Accuracy is above confidence. There is a column per case, and BASELINE is a point.

    Args:
        when: time until each iteration's answer, over BASELINE's; None draws over the number of the
            iteration, and BASELINE as a line.
    """
    with styled():
        figure = Figure(figsize=(2.5 * len(cases) + 1.2, 5.6), dpi=100, layout="constrained")
        figure.suptitle(
            "Accuracy and confidence, iteration by iteration",
            x=0.012,
            ha="left",
            size=11.5,
            weight="bold",
        )
        panels = figure.subplots(2, len(cases), sharex=True, squeeze=False)
        for column, case in enumerate(cases):
            own = seeds[case.name]
            for row, (what, label) in enumerate(
                (("accuracy", "accuracy, %"), ("p_true", "confidence, %"))
            ):
                axes = panels[row][column]
                for norms in NORMS:
                    values = per_iteration(case, norms, what, own, results)
                    deviations = (
                        values.std(0, ddof=1) if len(own) > 1 else np.zeros(values.shape[1])
                    )
                    axes.errorbar(
                        when or range(1, values.shape[1] + 1),
                        values.mean(0),
                        deviations,
                        color=COLOURS[norms],
                        marker="o",
                        markersize=4,
                        capsize=3,
                        linewidth=1.5,
                        label=NORMS_IN_WORDS[norms],
                    )
                _draw_baseline(
                    axes, learning.baseline(case, what, own, results), timed=when is not None
                )
                axes.grid(axis="y")
                if column == 0:
                    axes.set_ylabel(label)
            panels[0][column].set_title(case.name, size=10.5)
            panels[1][column].set_xlabel("iteration" if when is None else "time over BASELINE's")
            if when is None:
                panels[1][column].xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def _draw_baseline(axes: Axes, values: np.ndarray, *, timed: bool) -> None:
    if timed:
        deviation = values.std(ddof=1) if len(values) > 1 else 0.0
        axes.errorbar(
            [1.0],
            [values.mean()],
            [deviation],
            color=VERMILION,
            marker="*",
            markersize=10,
            capsize=3,
            linestyle="none",
            label="BASELINE",
            zorder=5,
        )
    else:
        axes.axhline(
            values.mean(), color=VERMILION, linewidth=1.4, linestyle=(0, (5, 2)), label="BASELINE"
        )


def draw_classes(
    case: Case, seeds: Sequence[int], results: Results, names: Sequence[str]
) -> Figure:
    """Plot figure 4, accuracy of each class over its confidence.

    Values are means over seeds. There is a panel per iteration, with its correlations.
    """
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    with styled():
        figure = Figure(figsize=(7.2, 2.1 * lines + 1.0), dpi=100, layout="constrained")
        figure.suptitle(
            f"Accuracy and confidence of each class, {case.name}",
            x=0.012,
            ha="left",
            size=11.5,
            weight="bold",
        )
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        for index, axes in enumerate(panels[: len(names)]):
            correlations = []
            for norms in NORMS:
                x, y = (
                    per_iteration(case, norms, what, seeds, results)[:, index].mean(0)
                    for what in ("class_p_true", "class_accuracy")
                )
                axes.plot(
                    x,
                    y,
                    linestyle="none",
                    marker="o",
                    markersize=4,
                    alpha=0.6,
                    markeredgewidth=0.0,
                    clip_on=False,
                    color=COLOURS[norms],
                    label=NORMS_IN_WORDS[norms],
                )
                correlation = per_iteration(case, norms, "correlation", seeds, results)[:, index]
                correlations.append(f"{correlation.mean():.2f}")
            title = f"{index + 1}: r = {', '.join(correlations)}"
            axes.set_title(title, size=9.0, loc="left", color=INK)
            axes.axline(
                (100.0, 100.0),
                slope=1.0,
                color=MUTED,
                linewidth=1.0,
                linestyle=(0, (5, 2)),
                zorder=1,
            )
            axes.set(xlim=(0.0, 100.0), ylim=(0.0, 100.0))
            axes.grid()
            if index % columns == 0:
                axes.set_ylabel("accuracy, %")
            if index + columns >= len(names):
                axes.set_xlabel("confidence, %")
                axes.tick_params(labelbottom=True)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure
