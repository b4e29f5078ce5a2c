"""From numbers to files: CSV, figures and the page that fills the card."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from impatient.evaluation.plots import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    save_figure,
    styled,
)
from impatient.files import write_text
from papers.adaptive_neural_networks import exiting, selecting, times
from papers.adaptive_neural_networks.curves import share_of_saving
from papers.adaptive_neural_networks.gains import GAINED, draw_gains, gain_texts
from papers.adaptive_neural_networks.recipe import Case, Exits, Scale
from papers.results import Claim, Spread, claim_rows, made_by, markdown, spread, write_csv

# times faster at a point lost; how far a real run may be from its prediction
WANTED = 2.8
PREDICTED_WITHIN = 0.1
# our aims for selection: times faster in a real run by the accuracy that it was asked to lose, and
# the share of the soft oracle's saving at a point lost, in per cent
WANTED_REALLY = {0.0: 1.9, 0.01: 3.1}
WANTED_SHARE = 85.0
# which learned method the claims are about
OURS = "any, logistic"
OUR_GATES = "gates on both"
# per cent saved at 1, 2 and 5 points of top-5 accuracy lost (Table 1): its policy, its uniform
# mixture
PAPER = {"GoogLeNet": ((9, 22, 33), (2, 9, 20)), "ResNet-50": ((8, 18, 22), (1, 12, 10))}

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Results of finished jobs.

    These are trainings by job, measurements by case or exits, and fits by case or exits for each
    split.
    """

    networks: Mapping[str, Result]
    times: Mapping[str, Result]
    splits: Mapping[str, Sequence[Result]]


def write(scale: Scale, found: Found, folder: Path) -> str:
    """Write all tables and figures of finished jobs, and return a markdown page."""
    cases = [case for case in scale.cases if found.splits[case.name]]
    made = [exits for exits in scale.exits if found.splits[exits.name]]
    judgements = [*claims(cases, made, found)]
    if judgements:
        write_csv(folder / "claims.csv", claim_rows(judgements))
    parts = [
        *(["**Claims**", markdown(claim_rows(judgements))] if judgements else []),
        *(part for case in cases for part in _selection_part(case, found, folder)),
        *(_exits_part(made, found, folder) if made else []),
        *_guarantee_part([*cases, *made], found, folder),
        *_time_part(scale, found, folder),
        _made(found),
    ]
    _write_raw([*cases, *made], found, folder)
    page = "\n\n".join(parts)
    write_text(folder / "results.md", page + "\n")
    return page


# --- selection ------------------------------------------------------------------------------------


def methods(splits: Sequence[Result]) -> list[str]:
    """Names of the methods, in their order."""
    return list(dict.fromkeys(row["method"] for row in splits[0]["rows"]))


def values(splits: Sequence[Result], method: str, loss: float) -> list[dict[str, float]]:
    """Return what a method reached at a given loss of accuracy, for each split.

    Returns:
        "speedup", "saved" (1 - T/T_full, per cent); likewise "asked_speedup" of what was asked for
        on the part fitted on, and "asked_lost" in points, with halves of their 95 % intervals over
        samples.
    """
    rows = [
        row
        for split in splits
        for row in split["rows"]
        if row["method"] == method and row["loss"] == loss
    ]
    return [
        {
            "speedup": row["full_s"] / row["s"],
            "saved": 100.0 * (1.0 - row["s"] / row["full_s"]),
            "asked_speedup": row["full_s"] / row["asked_s"],
            "asked_lost": 100.0 * row["asked_lost"],
            "asked_lost_half": 100.0 * row["asked_lost_half"],
            "asked_speedup_half": row["full_s"] / row["asked_s"] ** 2 * row["asked_s_half"],
        }
        for row in rows
    ]


def over(splits: Sequence[Result], method: str, loss: float, what: str) -> Spread:
    """One of these values, over splits."""
    return spread([row[what] for row in values(splits, method, loss)])


def oracle_share(splits: Sequence[Result], method: str, loss: float, pays: str) -> Spread:
    """Compute which share of the soft oracle's saving a method reaches.

    It is in per cent, and NaN if the oracle saves nothing.
    """
    shares = []
    for split in splits:
        row = next(row for row in split["rows"] if row["method"] == method and row["loss"] == loss)
        shares.append(100.0 * share_of_saving(row["full_s"], row["s"], split["oracles"][pays]["s"]))
    return (
        Spread(len(shares), math.nan, math.nan) if any(map(math.isnan, shares)) else spread(shares)
    )


def limits(splits: Sequence[Result], pays: str, place: int) -> Spread:
    """Return the speed-up that is possible with known labels.

    It is for one of `selecting.LOSSES`. The full network alone is allowed, too.
    """
    full = [split["rows"][0]["full_s"] for split in splits]
    return spread(
        [
            max(1.0, one / split["oracles"][pays]["least_s"][place])
            for one, split in zip(full, splits, strict=True)
        ]
    )


def _selection_part(case: Case, found: Found, folder: Path) -> list[str]:
    splits = found.splits[case.name]
    singles = _accuracies(splits, "singles", "network")
    rows = [_selection_row(splits, method) for method in methods(splits)]
    for pays, counted in (("path", "all on the way paid"), ("chosen", "only the last paid")):
        rows.append(
            {
                **dict.fromkeys(rows[0], ""),
                "method": f"limit: labels known, {counted}",
                **{
                    _at(loss): limits(splits, pays, place).text(2)
                    for place, loss in enumerate(selecting.LOSSES)
                },
            }
        )
    save_figure(
        draw(f"Selection, {case.name}", splits[0], [dict(row) for row in splits[0]["singles"]]),
        folder / f"selection_{case.name}.png",
    )
    return [
        f"**Selection, {case.name}** ({_samples(splits)})",
        markdown(singles),
        markdown(rows),
        _soft_oracle(splits),
    ]


def _accuracies(
    splits: Sequence[Result], what: str, key: str, title: str | None = None
) -> list[dict[str, object]]:
    """Make rows of networks or exits: time, accuracy, and what was gained since the one before."""
    return [
        {
            title or key: row[key],
            "ms": f"{1e3 * row['s']:.3f}",
            "accuracy %": spread([100.0 * split[what][place]["accuracy"] for split in splits]).text(
                2
            ),
            GAINED: gained,
        }
        for place, (row, gained) in enumerate(
            zip(splits[0][what], gain_texts(splits, what), strict=True)
        )
    ]


def _soft_oracle(splits: Sequence[Result]) -> str:
    parts = []
    for pays, counted in (("path", "all on the way paid"), ("chosen", "only the chosen one paid")):
        faster = spread(
            [split["rows"][0]["full_s"] / split["oracles"][pays]["s"] for split in splits]
        )
        accuracy = spread([100.0 * split["oracles"][pays]["accuracy"] for split in splits])
        parts.append(f"{counted} {faster.text(2)} times faster at {accuracy.text(2)} %")
    return f"Soft oracle: {'; '.join(parts)}."


def _selection_row(splits: Sequence[Result], method: str) -> dict[str, object]:
    asked = values(splits, method, 0.01)
    return {
        "method": method,
        **{_at(loss): over(splits, method, loss, "speedup").text(2) for loss in selecting.LOSSES},
        "asked for 1: lost": over(splits, method, 0.01, "asked_lost").text(2, sign=True)
        + _half(asked, "asked_lost_half"),
        "asked for 1: times": over(splits, method, 0.01, "asked_speedup").text(2)
        + _half(asked, "asked_speedup_half"),
        "oracle's saving at 1, path": _share(oracle_share(splits, method, 0.01, "path")),
        "chosen": _share(oracle_share(splits, method, 0.01, "chosen")),
    }


def _at(loss: float) -> str:
    return f"times at {100.0 * loss:g} lost"


def _half(rows: Sequence[Mapping[str, float]], what: str) -> str:
    return f" (samples ± {sum(row[what] for row in rows) / len(rows):.2f})"


def _share(value: Spread) -> str:
    return "" if math.isnan(value.mean) else f"{value.mean:.0f} %"


def _samples(splits: Sequence[Result]) -> str:
    counts = splits[0]["samples"]
    divisions = f"{len(splits)} divisions" if len(splits) > 1 else "one division"
    return (
        f"fitted on {counts['fitted on']:,}, judged on {counts['judged on']:,} samples; {divisions}"
    )


# --- early exits ----------------------------------------------------------------------------------


def _exits_part(made: Sequence[Exits], found: Found, folder: Path) -> list[str]:
    parts = []
    losses = exiting.LOSSES
    for exits in made:
        splits = found.splits[exits.name]
        listed = _accuracies(splits, "exits", "exit", "exit after")
        rows: list[dict[str, object]] = [
            {
                "method": method,
                **{_saved(loss): over(splits, method, loss, "saved").text(1) for loss in losses},
                "asked for 1: lost": over(splits, method, 0.01, "asked_lost").text(2, sign=True)
                + _half(values(splits, method, 0.01), "asked_lost_half"),
                "asked for 1: % saved": spread(
                    [
                        100.0 * (1.0 - 1.0 / row["asked_speedup"])
                        for row in values(splits, method, 0.01)
                    ]
                ).text(1),
            }
            for method in methods(splits)
        ]
        for network, pair in PAPER.items():
            for kind, numbers in zip(("policy", "uniform"), pair, strict=True):
                rows.append(
                    {
                        **dict.fromkeys(rows[0], ""),
                        "method": f"the paper, {network}: {kind}",
                        **{
                            _saved(loss): number
                            for loss, number in zip((0.01, 0.02, 0.05), numbers, strict=True)
                        },
                    }
                )
        full = {
            "network": exits.net.name,
            "s": splits[0]["full"]["s"],
            "accuracy": splits[0]["full"]["accuracy"],
        }
        save_figure(
            draw(f"Early exits, {exits.name}", splits[0], [full]),
            folder / f"exits_{exits.name}.png",
        )
        save_figure(
            draw_gains(f"What more time buys, {exits.name}", splits[0]["exits"]),
            folder / f"gains_{exits.name}.png",
        )
        parts += [
            (
                f"**Early exits, {exits.name}** ({_samples(splits)}; without exits "
                f"{1e3 * full['s']:.3f} ms)"
            ),
            markdown(listed),
            markdown(rows),
            _soft_oracle(splits),
        ]
    return parts


def _saved(loss: float) -> str:
    return f"% saved at {100.0 * loss:g} lost"


# --- guarantees and times -------------------------------------------------------------------------


def guarantee_rows(whats: Sequence[Case | Exits], found: Found) -> list[dict[str, Any]]:
    """Summarise risk control over all divisions and draws of a case.

    There is a row for each kind of policy and each loss.
    """
    rows = []
    for what in whats:
        own = [row for split in found.splits[what.name] for row in split["guarantees"]]
        for policies, loss in dict.fromkeys((row["policies"], row["loss"]) for row in own):
            mine = [row for row in own if (row["policies"], row["loss"]) == (policies, loss)]
            draws = sum(row["draws"] for row in mine)
            rows.append(
                {
                    "case": what.name,
                    "policies": policies,
                    "loss": loss,
                    "epsilon": mine[0]["epsilon"],
                    "delta": mine[0]["delta"],
                    "calibration": mine[0]["calibration"],
                    "draws": draws,
                    "broken": sum(row["violations"] for row in mine),
                    "broken %": 100.0 * sum(row["violations"] for row in mine) / draws,
                    "full network %": 100.0 * sum(row["none"] for row in mine) / draws,
                    "true loss %": 100.0 * sum(row["risk"] * row["draws"] for row in mine) / draws,
                    "times": spread([row["full_s"] / row["s"] for row in mine]).mean,
                }
            )
    return rows


def _guarantee_part(whats: Sequence[Case | Exits], found: Found, folder: Path) -> list[str]:
    rows = guarantee_rows(whats, found)
    if not rows:
        return []
    write_csv(folder / "guarantees.csv", rows)
    readable = [
        {
            "case": row["case"],
            "policies": row["policies"],
            "loss": row["loss"].replace("_", " "),
            "may lose %": f"{100.0 * row['epsilon']:g}",
            "with probability": f"{1.0 - row['delta']:g}",
            "calibrated on": row["calibration"],
            "draws": row["draws"],
            "broken %": f"{row['broken %']:.1f}",
            "true loss %": f"{row['true loss %']:.2f}",
            "times faster": f"{row['times']:.2f}",
            "full network %": f"{row['full network %']:.0f}",
        }
        for row in rows
    ]
    return ["**Guarantees: how often they are broken**", markdown(readable)]


def _time_part(scale: Scale, found: Found, folder: Path) -> list[str]:
    whats = [what for what in scale.parts if what.name in found.times]
    if not whats:
        return []
    runs = [(what.name, run) for what in whats for run in found.times[what.name]["runs"]]
    rows = [times.real_row(name, run) for name, run in runs]
    write_csv(folder / "times.csv", rows)
    write_csv(
        folder / "times_raw.csv",
        [row for name, run in runs for row in times.raw_rows(name, run)],
    )
    readable = [
        {
            "what": row["what"],
            "asked to lose": f"{row['asked to lose']:g}",
            "used": row["used"],
            "images": row["images"],
            "measured ms": f"{row['measured ms']:.3f}",
            "predicted ms": f"{row['predicted ms']:.3f}",
            "measured over predicted": f"{row['measured over predicted']:.3f}",
            "full network ms": f"{row['full ms']:.3f}",
            "as profiled": f"{row['full profiled ms']:.3f}",
            "times faster": f"{row['speed-up']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
            "predicted times": f"{row['speed-up predicted']:.2f}",
            "accuracy %": f"{row['accuracy %']:.1f}",
            "on the recording": f"{row['recorded accuracy %']:.1f}",
            "full network %": f"{row['full network %']:.1f}",
            "same way %": f"{row['same way %']:.1f}",
        }
        for row in rows
    ]
    asked = "; ".join(
        f"{what.name} "
        + ", ".join(
            f"{name} {1e6 * seconds:.0f}"
            for name, seconds in found.times[what.name]["gate_s"].items()
        )
        for what in whats
    )
    threads = found.times[whats[0].name]["threads"]
    where = f"{threads} thread{'s' * (threads != 1)}, {_processors(found)}"
    title = f"**Real runs through the Runner, one image at a time** ({where})"
    return [title, markdown(readable), f"Time of one decision, µs: {asked}."]


# --- claims ---------------------------------------------------------------------------------------


def claims(cases: Sequence[Case], made: Sequence[Exits], found: Found) -> Iterator[Claim]:
    """Judge the paper's claims and our aims."""
    for case in cases:
        splits = found.splits[case.name]
        own = over(splits, OURS, 0.01, "speedup")
        asked = over(splits, OURS, 0.01, "asked_lost"), over(splits, OURS, 0.01, "asked_speedup")
        place = selecting.LOSSES.index(0.01)
        yield Claim(
            (
                f"selection: at most 1 point below the full network, at least {WANTED} times "
                f"faster ({case.name}, {OURS})"
            ),
            "up to 2.8, less than 1 point of top-5",
            f"{own.text(2)} times; asked for on the part fitted on: {asked[1].text(2)} times at "
            f"{asked[0].text(2, sign=True)} points lost; knowing the labels would allow "
            f"{limits(splits, 'path', place).text(2)}{_better(case, splits)}",
            "yes" if own.mean >= WANTED else "no",
        )
        share = oracle_share(splits, OURS, 0.01, "path")
        yield Claim(
            f"selection saves at least {WANTED_SHARE:g} % of what the oracle does, at 1 point lost "
            f"({case.name})",
            "our aim",
            f"{share.text(0)} %",
            "yes" if share.mean >= WANTED_SHARE else "no",
        )
        yield from _real_claims(case, found)
        for other in ("uniform", "myopic", "threshold per network", "agreement"):
            gain = _paired(splits, OURS, other, 0.01, "speedup")
            yield Claim(
                f"selection is faster than {other} at 1 point lost ({case.name})",
                "yes" if other in ("uniform", "myopic") else "our aim",
                f"by {gain.text(2, sign=True)} times",
                "yes" if gain.mean > 0 else "no",
            )
    for exits in made:
        splits = found.splits[exits.name]
        for other in ("uniform", "myopic", "threshold per exit"):
            gains = [
                _paired(splits, OUR_GATES, other, loss, "saved") for loss in (0.01, 0.02, 0.05)
            ]
            paper = "+7, +13, +13; +7, +6, +12" if other == "uniform" else "our aim"
            yield Claim(
                f"{OUR_GATES} save more than {other} at 1, 2 and 5 points lost ({exits.name})",
                paper,
                f"points of per cent: {', '.join(gain.text(1, sign=True) for gain in gains)}",
                "yes" if all(gain.mean > 0 for gain in gains) else "no",
            )
    for row in guarantee_rows([*cases, *made], found):
        yield Claim(
            (
                f"guarantees are broken at most as often as said ({row['case']}, "
                f"{row['policies']}, {row['loss']})"
            ),
            f"at most {100 * row['delta']:g} %",
            f"{row['broken %']:.1f} % of {row['draws']} draws",
            "yes" if row["broken %"] <= 100.0 * row["delta"] else "no",
        )
    runs = [(name, run) for name, result in found.times.items() for run in result["runs"]]
    for name, run in runs:
        measured = times.real_row(name, run)
        ratio = measured["measured over predicted"]
        drift = measured["full ms"] / measured["full profiled ms"]
        yield Claim(
            (
                f"a real run takes what was predicted, within a tenth ({name}, asked to lose "
                f"{measured['asked to lose']:g})"
            ),
            "our aim",
            f"{ratio:.3f} of it; the full network {drift:.3f} of its profile",
            "yes" if abs(ratio - 1.0) <= PREDICTED_WITHIN else "no",
        )


def _real_claims(case: Case, found: Found) -> Iterator[Claim]:
    """Judge how much faster selection is in real runs."""
    for run in found.times[case.name]["runs"]:
        if run["loss"] not in WANTED_REALLY:
            continue
        wanted = WANTED_REALLY[run["loss"]]
        row = times.real_row(case.name, run)
        lost = row["full network %"] - row["accuracy %"]
        yield Claim(
            f"in a real run asked to lose {row['asked to lose']:g}, selection is at least {wanted} "
            f"times faster ({case.name})",
            "our aim",
            f"{row['speed-up']:.2f} ({row['low']:.2f} to {row['high']:.2f}) times, at {lost:+.1f} "
            f"points lost on these {row['images']:,} images",
            "yes" if row["speed-up"] >= wanted else "no",
        )


def _better(case: Case, splits: Sequence[Result]) -> str:
    """Return a remark if the full network is not the most accurate one."""
    means = [
        sum(split["singles"][place]["accuracy"] for split in splits) / len(splits)
        for place in range(len(case.names))
    ]
    best = max(range(len(means)), key=means.__getitem__)
    above = 100.0 * (means[best] - means[-1])
    return (
        f"; {case.names[best]} alone is {above:.2f} points above the full network"
        if above > 0
        else ""
    )


def _paired(splits: Sequence[Result], own: str, other: str, loss: float, what: str) -> Spread:
    pairs = zip(values(splits, own, loss), values(splits, other, loss), strict=True)
    return spread([one[what] - two[what] for one, two in pairs])


# --- files and figures ----------------------------------------------------------------------------


def _write_raw(whats: Sequence[Case | Exits], found: Found, folder: Path) -> None:
    for file, what_rows in (("splits.csv", "rows"), ("curves.csv", "curves")):
        rows = [
            {"case": what.name, "split": seed, **row}
            for what in whats
            for seed, split in enumerate(found.splits[what.name])
            for row in split[what_rows]
        ]
        if rows:
            write_csv(folder / file, rows)


def _processors(found: Found) -> str:
    return ", ".join(sorted({str(result["processor"]) for result in found.times.values()}))


def _made(found: Found) -> str:
    trained = [result for result in found.networks.values() if "seconds" in result]
    every = [*found.networks.values(), *found.times.values()]
    processors = ", ".join(sorted({str(result["processor"]) for result in every})) or "no runs"
    hours = sum(result["seconds"] for result in trained) / 3600
    text = (
        f"{len(trained)} training{'s' * (len(trained) != 1)}, {hours:.2f} hours in all. "
        if trained
        else ""
    )
    return text + made_by(processors, "papers.adaptive_neural_networks")


LOOKS = {
    "uniform": (MUTED, "--"),
    "myopic": (SKY, "-"),
    "threshold per network": (GREEN, "-"),
    "threshold per exit": (GREEN, "-"),
    "agreement": (PURPLE, ":"),
    "chain, logistic": (ORANGE, "--"),
    "star, logistic": (ORANGE, ":"),
    "full, logistic": (ORANGE, "-"),
    "pairs, logistic": (ORANGE, "-."),
    "later first, logistic": (INK, "--"),
    OURS: (VERMILION, "-"),
    "gates on confidences": (ORANGE, "-"),
    "gates on features": (ORANGE, ":"),
    OUR_GATES: (VERMILION, "-"),
}


def draw(title: str, split: Result, singles: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot error over mean time, one line per method.

    Single networks and the soft oracles are points.
    """
    with styled():
        figure = Figure(figsize=(7.2, 4.6), dpi=100, layout="constrained")
        figure.suptitle(title, x=0.012, ha="left", size=11.5, weight="bold")
        axes = figure.add_subplot()
        for method in dict.fromkeys(row["method"] for row in split["curves"]):
            own = [row for row in split["curves"] if row["method"] == method]
            colour, line = LOOKS.get(method, (INK, ":"))
            axes.plot(
                [1e3 * row["s"] for row in own],
                [100.0 * (1.0 - row["accuracy"]) for row in own],
                color=colour,
                linestyle=line,
                linewidth=1.4,
                label=method,
            )
        for place, row in enumerate(singles):
            axes.plot(
                1e3 * row["s"],
                100.0 * (1.0 - row["accuracy"]),
                "o",
                color=BLUE,
                markersize=5,
                label="single network" if place == 0 else None,
            )
        for pays, marker in (("path", "*"), ("chosen", "P")):
            point = split["oracles"][pays]
            axes.plot(
                1e3 * point["s"],
                100.0 * (1.0 - point["accuracy"]),
                marker,
                color=INK,
                markersize=8,
                label=f"soft oracle, {pays} paid",
                linestyle="none",
            )
        slowest = max(row["s"] for row in singles)
        axes.set(
            xlim=(0.0, 1.15e3 * slowest), xlabel="mean time of a sample, ms", ylabel="error, %"
        )
        worst = max(
            [100.0 * (1.0 - row["accuracy"]) for row in singles]
            + [100.0 * (1.0 - point["accuracy"])]
        )
        axes.set_ylim(0.0, min(100.0, 1.6 * worst + 2.0))
        axes.grid(axis="y")
        figure.legend(loc="outside lower left", ncols=3)
    return figure
