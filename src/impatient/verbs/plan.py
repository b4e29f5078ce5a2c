"""Plan the order in which a network grows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

import impatient
from impatient.errors import ModelSpecError
from impatient.table import Table, in_ms
from impatient.verbs.network_spec import load_fresh
from impatient.verbs.options import (
    Counts,
    Positive,
    PositiveOrNone,
    Quiet,
    Threads,
    Times,
    VerbOptions,
    use_threads,
)

if TYPE_CHECKING:
    from impatient.networks.growth import GrowthCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions(VerbOptions):
    """Find the cheapest order in which a network can grow.

    Attributes:
        model: A network that grows: impatient:anytimenet[:key=value,...], or package.module:factory
            of a GrowingNetwork.
        data: Data as for train; decides the size of the input.
        iterations: Number of iterations, in the order of least overhead.
        sizes: Blocks of each iteration, instead of --iterations.
        times_s: Times at which the iterations are to end, instead of --iterations.
        batch_size: Samples at a time.
        repeats: Measurements of each block.
    """

    model: str = "impatient:anytimenet"
    data: str = "digits"
    iterations: PositiveOrNone = None
    sizes: Counts = ()
    times_s: Annotated[Times, arg(name="times-ms")] = ()
    batch_size: Positive = 1
    repeats: Positive = 200
    threads: Threads = 0
    quiet: Quiet = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthPlan:
    """A schedule for a network that grows, beside the model's own.

    Attributes:
        schedule: The planned schedule.
        costs: What it costs here, in seconds.
        own_schedule: The model's own schedule.
        own_costs: What that costs here, in seconds.
    """

    schedule: impatient.networks.Schedule
    costs: GrowthCosts
    own_schedule: impatient.networks.Schedule
    own_costs: GrowthCosts


def plan(options: PlanOptions) -> GrowthPlan:
    """Measure every block of a network, and find the order of least overhead.

    With neither iterations, sizes nor times, the model's own schedule is only costed.

    Raises:
        ModelSpecError: if the model does not grow, or more than one wish is given, or none can be
            met.
    """
    from impatient.networks import growth
    from impatient.networks.anytimenet import block_times

    use_threads(options.threads)
    if sum(map(bool, (options.iterations, options.sizes, options.times_s))) > 1:
        raise ModelSpecError("expected one of iterations, sizes and times, or none of them.")
    data = impatient.load_data(options.data, seed=0)
    network = load_fresh(options.model, data.num_classes, data.preprocess, seed=0).model
    if not isinstance(network, impatient.networks.GrowingNetwork):
        raise ModelSpecError(
            f"{options.model} is a {type(network).__name__}, which does not grow; expected "
            "impatient:anytimenet, or a factory of your own that returns a GrowingNetwork."
        )
    example = data.example(options.batch_size)
    parts = block_times(
        network.backbone, example, repeats=options.repeats, progress=not options.quiet
    )
    schedule = network.schedule
    if options.times_s:
        schedule = growth.place(parts, options.times_s)
    elif options.iterations or options.sizes:
        schedule = growth.plan(parts, iterations=options.iterations, sizes=options.sizes or None)
    return GrowthPlan(
        schedule=schedule,
        costs=growth.costs(schedule, parts),
        own_schedule=network.schedule,
        own_costs=growth.costs(network.schedule, parts),
    )


def shown(_: PlanOptions, found: GrowthPlan) -> Iterator[Table | str]:
    """Give the planned schedule, and the model's own if it is another."""
    own = "the model's own"
    planned = found.schedule != found.own_schedule
    yield _table("planned" if planned else own, found.costs, found.schedule)
    if planned:
        yield _table(own, found.own_costs, found.own_schedule)
        yield f"to train it: schedule={found.schedule}"


def _table(name: str, costs: GrowthCosts, schedule: impatient.networks.Schedule) -> Table:
    from impatient.networks import growth

    iterations = zip(
        schedule.names, growth.trace(schedule), costs.per_iteration, costs.cumulative, strict=True
    )
    return Table(
        title=f"{name}: all iterations take {costs.overhead:.3f} times a plain run "
        f"({in_ms(costs.plain)} ms)",
        columns=("iteration", "blocks", "executions", "ms", "ms so far", "of a plain run"),
        left=2,
        rows=[
            (
                str(number),
                blocks,
                str(len(executed)),
                in_ms(alone),
                in_ms(so_far),
                f"{so_far / costs.plain:.0%}",
            )
            for number, (blocks, executed, alone, so_far) in enumerate(iterations, start=1)
        ],
    )
