"""Say what follows from the numbers of an evaluation: what to do next, in sentences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from impatient.budgets import Budget
from impatient.costs import CostProfile
from impatient.evaluation.evaluate import TRAINED_ALONE, Evaluation
from impatient.evaluation.payload import Family
from impatient.evaluation.recording import Recording
from impatient.evaluation.vectorised import judge_policies
from impatient.policies.targets import LOSS, FittedTo
from impatient.table import grouped, milliseconds, percent

# shares, and changes of times, below this are nothing to act on
SMALL = 0.02
# so many points more or less accuracy make no difference that one would act on
POINT = 0.01
# half of the last digit that a share is written with
UNSEEN = 0.0005


def advice(
    evaluation: Evaluation,
    costs: CostProfile,
    budget: tuple[str, Budget] | None = None,
    targets: Mapping[str, FittedTo] | None = None,
) -> tuple[str, ...]:
    """Say whether exits pay here, and what to change.

    Args:
        evaluation: what was judged.
        costs: cost profile of the same network.
        budget: name and distribution of the time budgets that the network is for.
        targets: what policies were fitted to, by name.
    Returns:
        Sentences, of which the first says whether exits pay. None of them is a guess: each
        compares numbers that are in the evaluation.
    """
    return tuple(
        itertools.chain(
            _whether_exits_pay(evaluation),
            missed_targets(evaluation, targets or {}),
            _too_late(evaluation, budget),
            _beaten_by_others(evaluation),
            _useless_exits(evaluation),
            _held_back(evaluation),
            _noise(costs),
        )
    )


def _whether_exits_pay(evaluation: Evaluation) -> Iterator[str]:
    free = next(iter(evaluation.of("exit_free")), None)
    policies = evaluation.of("policy")
    exits = evaluation.of("exit")
    if len(exits) == 1:
        yield "This network has one exit, so it always takes the same time; attach more exits."
        return
    early = (
        f"Exits still pay where the time varies: exit 0 is there after "
        f"{milliseconds(exits[0].contract_s)}, with {percent(exits[0].accuracy.value)}."
    )
    if free is None or not policies:
        yield (
            f"No policy was judged, so no sample leaves early. {early} "
            "Fit a policy with `impatient fit`."
            if not policies
            else f"There is no network without exits to compare with. {early}"
        )
        return
    # the one that saves most among those that lose little
    whole = max(row.accuracy.value for row in (*evaluation.of("exit_free"), exits[-1]))
    near = [row for row in policies if row.accuracy.value >= whole - 2 * POINT]
    best = (
        min(near, key=lambda row: row.contract_s)
        if near
        else max(policies, key=lambda row: row.accuracy.value)
    )
    saved = 1.0 - best.contract_s / free.contract_s
    change = _points(best.accuracy.value - whole, evaluation.quality_name)
    if not near and saved >= SMALL:
        yield (
            f"No policy here comes within 2 points of the best {evaluation.quality_name}, "
            f"{percent(whole)}: {best.name}, the most accurate, takes {percent(saved, 0)} less "
            f"time {change}. {early}"
        )
    elif saved < SMALL:
        yield (
            f"Exits save no time on average here: policy {best.name} takes "
            f"{milliseconds(best.contract_s)}, the network without exits "
            f"{milliseconds(free.contract_s)}. {early}"
        )
    else:
        yield (
            f"Exits pay here: policy {best.name} takes {percent(saved, 0)} less time than the "
            f"network without exits, {change}."
        )


def points_to_guarantee(target: FittedTo) -> float:
    """Return the points to ask a guarantee for, on as many samples."""
    # Half of them test. Even if none is lost, (1 - loss) ** half must be at most delta, 0.05.
    shown = 1.0 - 0.05 ** (1.0 / max(1, target.samples // 2))
    return target.wanted * 100 if target.wanted >= shown else math.ceil(shown * 100)


def missed_targets(evaluation: Evaluation, targets: Mapping[str, FittedTo]) -> Iterator[str]:
    """Name policies that lose or take more than they were fitted to, on these samples.

    Args:
        evaluation: what was judged.
        targets: what policies were fitted to, by name.
    """
    last = evaluation.of("exit")[-1].accuracy.value
    rows = [(row, targets[row.name]) for row in evaluation.of("policy") if row.name in targets]
    losing = [
        (row.name, target, last - row.accuracy.value)
        for row, target in rows
        # beyond rounding
        if target.name == LOSS and last - row.accuracy.value > target.wanted + 1e-9
    ]
    if losing:
        names, fitted, lost = zip(*losing, strict=True)
        first = min(map(points_to_guarantee, fitted))
        yield (
            f"{_policies(names)} to lose at most {_each([f'{t.wanted * 100:g}' for t in fitted])} "
            f"point{'' if {t.wanted for t in fitted} == {0.01} else 's'} of "
            f"{evaluation.quality_name}, and here {_each([f'{loss * 100:.1f}' for loss in lost])} "
            f"are lost: {_met(fitted, evaluation)}. For a bound on new samples ask for a "
            f"guarantee: `impatient fit DIR --max-loss {first:g} --delta 0.05`."
        )
    slow = [
        (row.name, target, row.contract_s)
        for row, target in rows
        if target.name == "mean_time_s" and row.contract_s > target.wanted * (1.0 + SMALL)
    ]
    if slow:
        names, fitted, taken = zip(*slow, strict=True)
        yield (
            f"{_policies(names)} to take {_each([milliseconds(t.wanted) for t in fitted])} on "
            f"average, and here it is {_each(list(map(milliseconds, taken)))}: "
            f"{_met(fitted, evaluation)}. Fit to a shorter time, or on more samples."
        )


def _policies(names: Sequence[str]) -> str:
    return f"Policy {names[0]} was" if len(names) == 1 else f"Policies {_each(names)} were"


def _met(fitted: Sequence[FittedTo], evaluation: Evaluation) -> str:
    """Say on which samples targets were met."""
    counts = [grouped(count) for count in sorted({target.samples for target in fitted})]
    those = "that it was fitted to" if len(fitted) == 1 else "for fitting"
    return (
        f"the target was met on the {_each(counts)} samples {those}, and these are "
        f"{grouped(evaluation.samples)} others"
    )


def _each(words: Sequence[str]) -> str:
    """List words in a sentence."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _points(change: float, quality: str) -> str:
    if abs(change) < UNSEEN:
        return f"with as much {quality}"
    return f"for {abs(change) * 100:.1f} points {'less' if change < 0 else 'more'} {quality}"


def _too_late(evaluation: Evaluation, budget: tuple[str, Budget] | None) -> Iterator[str]:
    if budget is None or budget[1].cost != "time":
        return
    first = evaluation.of("exit")[0].contract_s
    late = budget[1].probability_below(first)
    if late >= SMALL:
        yield (
            f"The first exit comes too late for {percent(late, 0)} of your budgets "
            f"({budget[0]}): it answers after {milliseconds(first)}. Place an exit earlier, or run "
            "in a faster engine (`impatient export`)."
        )


def _beaten_by_others(evaluation: Evaluation) -> Iterator[str]:
    """Name networks that are better and faster than an exit, since nothing speaks for it then."""
    exits = list(enumerate(evaluation.of("exit")))
    for other in evaluation.of("static"):
        beaten = [
            exit
            for exit, row in exits
            if other.contract_s <= row.contract_s and other.accuracy.low > row.accuracy.high
        ]
        if beaten:
            yield (
                f"Network {other.name!r} is surely better than {_exits(beaten)} in no more "
                "time: for a fixed time near that, take it."
            )


def _useless_exits(evaluation: Evaluation) -> Iterator[str]:
    exits = evaluation.of("exit")
    policies = evaluation.of("policy")
    worse = [
        exit
        for exit in range(1, len(exits))
        if exits[exit].accuracy.high < max(row.accuracy.low for row in exits[:exit])
    ]
    if worse:
        yield (
            f"{_exits(worse).capitalize()} {'is' if len(worse) == 1 else 'are'} surely worse than "
            f"a shallower one: leave {_them(worse)} out, or train longer."
        )
    unused = [
        exit
        for exit in range(len(exits) - 1)
        if policies and all(row.shares[exit] == 0.0 for row in policies) and exit not in worse
    ]
    if unused:
        yield (
            f"{_exits(unused).capitalize()} never answer{'s' if len(unused) == 1 else ''} under "
            f"any policy: if no deadline needs {_them(unused)}, leave {_them(unused)} out."
        )


def _held_back(evaluation: Evaluation) -> Iterator[str]:
    """Say what helps a last exit that the early ones cost quality."""
    last = evaluation.of("exit")[-1].accuracy
    for row in evaluation.of("exit_free"):
        if row.name == TRAINED_ALONE and last.high < row.accuracy.low:
            yield (
                f"The last exit reaches {percent(last.value)}, the network without exits "
                f"{percent(row.accuracy.value)} when trained alone: early exits hold it back. "
                "Try more epochs (`--epochs`), or half of the weight for the last exit "
                "(`--weights half_end`)."
            )


def _them(numbers: Sequence[int]) -> str:
    return "it" if len(numbers) == 1 else "them"


def _exits(numbers: Sequence[int]) -> str:
    return f"exit{'' if len(numbers) == 1 else 's'} {_each(list(map(str, numbers)))}"


def _noise(costs: CostProfile) -> Iterator[str]:
    noise = costs.at(min(costs.batches)).noise
    if noise is not None and noise.too_noisy:
        yield (
            "The machine was too noisy for small differences while times were measured: close "
            "other programs and run `impatient profile --force`."
        )


def bolder(families: Sequence[Family], recording: Recording, costs: CostProfile) -> tuple[str, ...]:
    """Say where bolder thresholds than the fitted ones would have lost nothing.

    Args:
        families: fitted thresholds, and bolder and more careful ones.
        recording: recording on which they are judged.
        costs: cost profile of the same network.
    """
    said = []
    for family in families:
        judged = judge_policies(
            recording, costs, family.steps[: family.start + 1], batch_size=min(costs.batches)
        )
        fitted = judged.accuracy[-1]
        best = int((judged.accuracy >= fitted).int().argmax())
        saved = 1.0 - float(judged.contract_s[best] / judged.contract_s[-1])
        if saved >= SMALL:
            said.append(
                f"Policy {family.name} could be {family.words[best]} and lose nothing on these "
                f"samples, with {percent(saved, 0)} less time: fit it again with a larger "
                "--max-loss, and judge it anew."
            )
    return tuple(said)


def without_loss(
    evaluation: Evaluation, families: Sequence[Family], recording: Recording, costs: CostProfile
) -> str:
    """Say what exits save at best where nothing may be lost; empty if nobody can tell.

    It is the best case, since thresholds are chosen on the samples that judge them.

    Args:
        evaluation: what was judged.
        families: thresholds from bold to careful.
        recording: recording on which they are judged.
        costs: cost profile of the same network.
    """
    free = max(evaluation.of("exit_free"), key=lambda row: row.accuracy.value, default=None)
    steps = [step for family in families for step in family.steps]
    if free is None or not steps:
        return ""
    judged = judge_policies(recording, costs, steps, batch_size=min(costs.batches))
    # what is less than what one reads is no loss
    keeps = judged.accuracy >= free.accuracy.value - UNSEEN
    if not bool(keeps.any()):
        return (
            f"No thresholds on this page reach the {evaluation.quality_name} of the best network "
            f"without exits, {percent(free.accuracy.value)}."
        )
    least = float(judged.contract_s[keeps].min())
    change = least / free.contract_s - 1.0
    what = "save at most" if change < 0.0 else "cost at least"
    gain = f"{what} {percent(abs(change), 0)} of the time"
    return (
        f"Where nothing may be lost, exits {gain if abs(change) >= SMALL else 'gain nothing'}: the "
        f"fastest thresholds with as much {evaluation.quality_name} as without exits, found on "
        f"these very samples, take {milliseconds(least)}."
    )
