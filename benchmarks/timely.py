"""Timely accuracy of scheduling rules under load: late, refused and missing answers are wrong.

    python benchmarks/timely.py --measure      # a minute: stage times, in processor time
    python benchmarks/timely.py                # simulated over these, on any machine; an hour

The network is the zoo's anytimenet-cifar10. All rules have its exits: each exit is a network of
its own size for the rules that choose among networks, and the last one is the network without
exits. Rules see the recording of the validation split, requests are samples of the test split. A
simulation drives the scheduler of the server through a trace in virtual time; how well that agrees
with the server is in timely_agreement.py. Work takes the measured times for its batch size times a
random factor (gamma, 10 %). Load 1 is what the whole network can do at the batch size that is
cheapest per sample. Budgets are log-uniform between multiples of one whole pass alone: "roomy" 1.5
to 10, "wide" 0.3 to 10, where no rule can answer everybody by the last exit.

The fluid bound is of rules that do not know how sure an answer looks: stages and requests are
taken for divisible, and all samples for average. What is compared with it is the same requests.

Asked for: 99 % in time wherever the first exit can be. "Can be" is what "first exits alone" gives:
our admission and our first batches, and nothing deeper that anybody would have to wait for. "With
foresight" is our rule if it knew who comes until its next work ends: it begins none that would lose
one of them. What it gains is lost by not knowing the future, not by what is done first.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, ROOT, Row, write_results

import impatient
from impatient.evaluation.recording import Recording
from impatient.files import read_json, write_json, write_text
from impatient.networks.zoo import zoo_folder
from impatient.serving import (
    ClockworkLike,
    DynamicProgramme,
    EdgeServingLike,
    FirstThenRoundRobin,
    Fixed,
    GainTable,
    GreedyGain,
    InfaasLike,
    Request,
    Rule,
    ServedModel,
    Simulation,
    SymphonyLike,
    Work,
    fluid_bound,
    simulate,
)
from impatient.serving.load import arrivals
from impatient.serving.rules import without_answer
from impatient.serving.scheduler import Choice, Pending, first_exits_fit
from papers.data import shared_folder


class FirstAlone(FirstThenRoundRobin):
    """Answer with the first exit and go no deeper: as many are in time as can be."""

    at_once = True


class Foresight(GreedyGain):
    """Ours, which knows who comes, and begins no work that would lose one of them.

    Instead it gives one first answer, or waits for the next arrival.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        self._case = case
        self._until = math.inf

    def choose(
        self, waiting: Sequence[Pending], models: Mapping[str, ServedModel], now: float
    ) -> Choice | None:
        self._until = math.inf
        first = without_answer(waiting)
        found = super().choose(waiting, models, now)
        alone = [Choice(pending=[one], last=0) for one in first]
        for choice in [] if found is None else [found, *alone]:
            if self._loses_nobody(choice, first, models, now):
                return choice
        place = np.searchsorted(self._case.arrivals_s, now, side="right")
        coming = float(self._case.arrivals_s[place]) if place < len(self._case.order) else math.inf
        if found is None or not first_exits_fit(first, models, coming):
            return found
        self._until = coming
        return None

    def _loses_nobody(
        self,
        choice: Choice,
        first: Sequence[Pending],
        models: Mapping[str, ServedModel],
        now: float,
    ) -> bool:
        (model,) = models.values()
        begun = choice.pending[0].exit + 1
        end = now + 1.1 * model.work_s(begun, choice.last, len(choice.pending))
        coming = range(*np.searchsorted(self._case.arrivals_s, (now, end), side="right"))
        left = [one for one in first if one not in choice.pending]
        for place in coming:
            arrival = float(self._case.arrivals_s[place])
            deadline = arrival + float(self._case.budgets_s[place])
            request = Request(id=int(place), model=model.name, arrival=arrival, deadline=deadline)
            left.append(Pending(request=request, expected=model.quality))
        left.sort(key=lambda one: one.request.deadline)
        return not coming or first_exits_fit(left, models, end)

    def deepens(self, one: Pending) -> bool:  # noqa: ARG002  it looks at every stage
        return False

    def ask_again(self, waiting: Sequence[Pending], now: float) -> float:  # noqa: ARG002
        return self._until


NETWORK = "anytimenet-cifar10"
TIMES = ROOT / "benchmarks" / "recordings" / "timely-times.json"
SIZES = (1, 2, 4, 8)
OURS = "greedy gain (ours)"
FIRST = "first exits alone"
KNOWING = "ours with foresight"
UNPLANNED = "ours without a plan"
RULES: dict[str, Callable[[], Rule]] = {
    OURS: GreedyGain,
    UNPLANNED: lambda: GreedyGain(prices=()),
    "first exits, then round robin": FirstThenRoundRobin,
    FIRST: FirstAlone,
    "dynamic programme (Yao et al.)": DynamicProgramme,
    "fixed small": lambda: Fixed(0),
    "fixed large": lambda: Fixed(-1),
    "first in, first out, one by one": lambda: Fixed(-1),
    "switching (INFaaS-like)": InfaasLike,
    "EDF with drop (Clockwork-like)": ClockworkLike,
    "deferred (Symphony-like)": SymphonyLike,
    "stability score (EdgeServing-like)": EdgeServingLike,
}
# by "stages_s" and "heads_s", for each batch size as text, seconds of all exits
Times = Mapping[str, Mapping[str, Sequence[float]]]
# Rules of ours, which are no rivals.
OWN = (OURS, UNPLANNED, KNOWING, "first exits, then round robin", FIRST)
# What these do is not batched: LitServe and Ray Serve as they come.
ALONE = ("first in, first out, one by one",)
# it takes as long as all others together
SLOW = "dynamic programme (Yao et al.)"
LOADS = (0.3, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0)
TRACES = ("poisson", "mmpp", "azure_llm_conv_t", "azure_llm_code_t")
BUDGETS = {"roomy": (1.5, 10.0), "wide": (0.3, 10.0)}
BOUND_REQUESTS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A trace of requests with their budgets and samples.

    Attributes:
        trace, budgets: their names.
        load: requests per second, as a share of the whole network's throughput.
        seed: of all draws.
        arrivals_s, budgets_s: instants and budgets, [R].
        order: the sample of each request, [R].
    """

    trace: str
    budgets: str
    load: float
    seed: int
    arrivals_s: np.ndarray
    budgets_s: np.ndarray
    order: np.ndarray


def the_model(times: Times) -> ServedModel:
    """Make the model from measured times and the recording of the validation split."""
    hits, scores = recorded("validation")
    stages_s, heads_s = (
        {int(size): tuple(row) for size, row in times[what].items()}
        for what in ("stages_s", "heads_s")
    )
    return ServedModel(
        name="net",
        stages_s=stages_s,
        heads_s=heads_s,
        quality=tuple(hits.mean(1).tolist()),
        gains=GainTable.of(hits, scores),
        max_batch=max(SIZES),
    )


def recorded(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Load quality and scores of a split, [K, N] each."""
    recording = Recording.load(zoo_folder(NETWORK) / "recordings" / f"{split}.safetensors")
    scores = recording.scores["max_probability"]
    return recording.quality.double().numpy(), scores.double().numpy()


def cheapest_s(model: ServedModel) -> list[float]:
    """Return the least seconds of a sample to each exit, over all batch sizes."""
    sizes = range(1, model.max_batch + 1)
    return [
        min(model.work_s(0, last, rows) / rows for rows in sizes) for last in range(model.num_exits)
    ]


def instants(trace: str, count: int, rate: float, seed: int) -> np.ndarray:
    """Draw instants of arrival, or stretch a part of a real trace to the rate."""
    if trace in ("poisson", "mmpp"):
        return arrivals(trace, rate=rate, count=count, seed=seed)
    whole = np.load(shared_folder() / "traces.npz")[trace].astype(float)
    start = np.random.default_rng(seed).integers(len(whole) - count)
    part = whole[start : start + count] - whole[start]
    return part * (count / rate / max(part[-1], 1e-9))


def case_of(
    model: ServedModel,
    trace: str,
    load: float,
    *,
    budgets: str = "roomy",
    seed: int = 0,
    count: int = 1500,
    samples: int = 10_000,
) -> Case:
    """Draw a case."""
    rng = np.random.default_rng(1000 + seed)
    whole_s = model.work_s(0, model.num_exits - 1, 1)
    low, high = np.log(np.array(BUDGETS[budgets]) * whole_s)
    return Case(
        trace=trace,
        budgets=budgets,
        load=load,
        seed=seed,
        arrivals_s=instants(trace, count, load / cheapest_s(model)[-1], seed),
        budgets_s=np.exp(rng.uniform(low, high, count)),
        order=rng.permutation(samples)[np.arange(count) % samples],
    )


def simulated(
    model: ServedModel,
    name: str,
    case: Case,
    test: tuple[np.ndarray, np.ndarray],
    *,
    slowdown: float = 1.0,
    reserve_s: float = 0.0,
) -> Simulation:
    """Serve a case by a rule in virtual time.

    Args:
        model: the model.
        name: the rule's name.
        case: the requests.
        test: quality and scores of the test split, [K, N] each.
        slowdown: how many times as long as its stages and head a work takes.
        reserve_s: time kept before every deadline.
    """
    rng = np.random.default_rng(case.seed)

    def true_s(work: Work, rows: int) -> float:
        return model.work_s(work.first, work.last, rows) * rng.gamma(100.0, 0.01) * slowdown

    quality, scores = test
    return simulate(
        model,
        Foresight(case) if name == KNOWING else RULES[name](),
        arrivals_s=case.arrivals_s,
        budgets_s=case.budgets_s,
        quality_KN=quality[:, case.order],
        scores_KN=scores[:, case.order],
        true_s=true_s,
        reserve_s=reserve_s,
    )


def bound_of(model: ServedModel, case: Case, quality: np.ndarray) -> float:
    """Bound the mean timely quality of the first requests of a case."""
    part = slice(0, BOUND_REQUESTS)
    count = len(case.arrivals_s[part])
    return fluid_bound(
        cheapest_s(model),
        np.tile(quality[:, case.order[part]].mean(1), (count, 1)),
        case.arrivals_s[part],
        case.budgets_s[part],
        alone_s=[model.work_s(0, last, 1) for last in range(model.num_exits)],
    )


def compared(
    case: Case, models: tuple[ServedModel, ServedModel], test: tuple[np.ndarray, np.ndarray]
) -> Iterator[Row]:
    """Give a row per rule, where the second model is the first without batches."""
    bound = bound_of(models[0], case, test[0])
    for name in (*RULES, KNOWING):
        found = simulated(models[name in ALONE], name, case, test)
        answered = found.exits[found.in_time]
        same = found.quality[:BOUND_REQUESTS].mean()
        yield {
            "trace": case.trace.removesuffix("_t"),
            "budgets": case.budgets,
            "load": case.load,
            "seed": case.seed,
            "rule": name,
            "timely accuracy": round(found.timely_quality, 4),
            "in time": round(found.share_in_time, 4),
            "mean exit": round(float(answered.mean()), 2) if len(answered) else "",
            "busy": round(found.busy_s / found.span_s, 3),
            "of the fluid bound": round(float(same) / bound, 4),
            "requests": len(case.order),
        }


def summary(rows: Sequence[Row]) -> list[Row]:
    """Average over seeds."""
    keys = ("trace", "budgets", "load", "rule")
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    columns = ("timely accuracy", "in time", "of the fluid bound")
    return [
        {
            **dict(zip(keys, group, strict=True)),
            **{
                column: round(float(np.mean([float(str(row[column])) for row in members])), 4)
                for column in columns
            },
            "lowest to highest": "{:.3f} to {:.3f}".format(
                min(float(str(row["timely accuracy"])) for row in members),
                max(float(str(row["timely accuracy"])) for row in members),
            ),
        }
        for group, members in groups.items()
    ]


def sentences(rows: Sequence[Row]) -> str:
    """Say per trace and load how the best rival compares with our rule."""
    lines = [
        "| trace | budgets | load | ours | best of others | ours - best | in time | first exits "
        "alone in time | of the bound | with foresight: right, in time, of the bound |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for trace, budgets, load in dict.fromkeys(
        (row["trace"], row["budgets"], row["load"]) for row in rows
    ):
        here = {
            str(row["rule"]): row
            for row in rows
            if (row["trace"], row["budgets"], row["load"]) == (trace, budgets, load)
        }
        right = {name: float(str(row["timely accuracy"])) for name, row in here.items()}
        best = max(right.keys() - set(OWN), key=lambda name: right[name])
        lines.append(
            f"| {trace} | {budgets} | {load} | {right[OURS]:.3f} | {best}, {right[best]:.3f} | "
            f"{right[OURS] - right[best]:+.3f} | {here[OURS]['in time']} | "
            f"{here[FIRST]['in time']} | "
            f"{here[OURS]['of the fluid bound']} | {right[KNOWING]:.3f}, "
            f"{here[KNOWING]['in time']}, {here[KNOWING]['of the fluid bound']} |"
        )
    return "\n".join([*lines, "", best_sentence(rows), "", in_time_sentence(rows)])


def best_sentence(rows: Sequence[Row]) -> str:
    """Say in how many cases our rule is at or above the best of others, with and without a plan."""
    right: dict[str, list[float]] = {}
    for row in rows:
        right.setdefault(str(row["rule"]), []).append(float(str(row["timely accuracy"])))
    others = np.max([values for name, values in right.items() if name not in OWN], axis=0)
    said = []
    for name in (OURS, UNPLANNED):
        ahead = np.array(right[name]) - others
        said.append(
            f"{name} in {(ahead >= 0).sum()} of {len(ahead)} cases, by {ahead.min():+.3f} to "
            f"{ahead.max():+.3f}, {ahead.mean():+.4f} on average"
        )
    return f"At or above the best of others: {'; '.join(said)}."


def in_time_sentence(rows: Sequence[Row]) -> str:
    """Say in how many cases 99 % of those are in time that can be."""
    shares = {
        name: [float(str(row["in time"])) for row in rows if row["rule"] == name]
        for name in (OURS, KNOWING, FIRST)
    }
    of_possible = [ours / first for ours, first in zip(shares[OURS], shares[FIRST], strict=True)]
    good = sum(share >= 0.99 for share in of_possible)
    return (
        f"In time: of those that first exits alone answer in time, at least 99 % in {good} of "
        f"{len(of_possible)} cases, at worst {100 * min(of_possible):.1f} %; where first exits "
        f"alone have 99 % of all, in {_reached(shares[OURS], shares[FIRST])}, and with foresight "
        f"in {_reached(shares[KNOWING], shares[FIRST])}."
    )


def _reached(shares: Sequence[float], of_first: Sequence[float]) -> str:
    can = [share for share, first in zip(shares, of_first, strict=True) if first >= 0.99]
    good = sum(share >= 0.99 for share in can)
    return f"{good} of {len(can)}" + (f", at worst {100 * min(can):.1f} %" if can else "")


def plot(rows: Sequence[Row], file: Path) -> None:
    """Draw timely accuracy against load, one panel per trace and kind of budgets."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "timely"
    panels = list(dict.fromkeys((row["trace"], row["budgets"]) for row in rows))
    figure = Figure(figsize=(4 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for name in RULES:
            line = [r for r in rows if (r["trace"], r["budgets"], r["rule"]) == (*panel, name)]
            axis.plot(
                [row["load"] for row in line],
                [row["timely accuracy"] for row in line],
                label=name,
                linewidth=2.5 if name == OURS else 1.2,
                linestyle="-" if name == OURS else "--",
            )
        axis.set(title=", ".join(map(str, panel)), xlabel="load", ylim=(0, 1))
    axes[0].set_ylabel("right and in time")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    write_text(file, drawn.getvalue())


def measured(repeats: int = 250) -> Times:
    """Measure stages and heads on this machine, with one thread.

    The least processor time of many passes counts, since other programs only ever add to it.
    """
    torch.set_num_threads(1)
    network = impatient.load_zoo(NETWORK)
    inputs = {size: torch.zeros(size, 3, 32, 32) for size in SIZES}
    least = {size: np.full((2, network.num_exits), np.inf) for size in SIZES}
    with torch.inference_mode():
        for _ in range(repeats):
            for size, x in inputs.items():
                least[size] = np.minimum(least[size], pass_s(network, x))
    return {
        what: {str(size): table[place].tolist() for size, table in least.items()}
        for place, what in enumerate(("stages_s", "heads_s"))
    }


def pass_s(network: impatient.Network, x: torch.Tensor) -> np.ndarray:
    """Run a network once, and return seconds of all stages, and of all heads, [2, K]."""
    found = np.zeros((2, network.num_exits))
    before = time.thread_time()
    for exit in network.exits(x):
        after = time.thread_time()
        exit.output()
        end = time.thread_time()
        found[:, exit.index] = after - before, end - after
        before = time.thread_time()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="seconds, writes nothing")
    parser.add_argument("--quick", action="store_true", help="without the slow rule")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    parser.add_argument("--traces", nargs="+", default=TRACES)
    parser.add_argument("--budgets", nargs="+", default=tuple(BUDGETS))
    args = parser.parse_args()
    if args.measure:
        write_json(TIMES, measured())
        return
    model = the_model(read_json(TIMES))
    models = model, replace(model, max_batch=1)
    test = recorded("test")
    if args.quick:
        RULES.pop(SLOW)
    if args.smoke:
        args.requests, args.seeds, args.loads, args.traces = 60, 1, (1.0,), ("poisson",)
    rows: list[Row] = []
    for trace in args.traces:
        for budgets in args.budgets:
            for load in args.loads:
                for seed in range(args.seeds):
                    case = case_of(
                        models[0],
                        trace,
                        load,
                        budgets=budgets,
                        seed=seed,
                        count=args.requests,
                        samples=test[0].shape[1],
                    )
                    rows += compared(case, models, test)
    means = summary(rows)
    table = sentences(means)
    print(table)
    if not args.smoke:
        text = f"{__doc__}\n\n![Timely accuracy](timely.svg)\n\n{table}\n\nMeans over seeds:"
        write_results("timely", "Timely accuracy under load", text, means)
        plot(means, RESULTS / "timely.svg")


if __name__ == "__main__":
    main()
