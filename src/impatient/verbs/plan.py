"""Plan the order in which a network grows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

import impatient
from impatient.errors import ModelSpecError
from impatient.table import Table, in_ms
from impatient.verbs.options import COUNTS, POSITIVE, TIMES_MS, Threads, use_threads

if TYPE_CHECKING:
    from impatient.networks.growth import GrowthCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Measure the blocks of a network that grows, and find the order of growing that costs least.

    Attributes:
        model: A network that grows: impatient:anytimenet[:key=value,...], or package.module:factory
            of a GrowingNetwork.
        data: Data as for train: it decides the size of the input.
        iterations: How many iterations, in the order of least overhead.
        sizes: Instead of --iterations: blocks that the iterations are to have, with commas between.
        times_s: Instead of --iterations: times at which they are to end, with commas between.
        batch_size: Samples at a time.
        repeats: Measurements of each block.
    """

    model: str = "impatient:anytimenet"
    data: str = "digits"
    iterations: Annotated[int | None, POSITIVE] = None
    sizes: Annotated[tuple[int, ...], COUNTS] = ()
    times_s: Annotated[tuple[float, ...], TIMES_MS, arg(name="times-ms")] = ()
    batch_size: Annotated[int, POSITIVE] = 1
    repeats: Annotated[int, POSITIVE] = 200
    threads: Threads = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthPlan:
    """A schedule for a network that grows, beside the one the model came with.

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
    """Measure every block of a network that grows, and find the order of least overhead.

    With neither iterations, sizes nor times, the model's own schedule is only costed.

    Raises:
        ModelSpecError: if the model does not grow, or more than one wish is given, or none can be
            met.
    """
    from impatient.networks import growth
    from impatient.networks.anytimenet import GrowingNetwork, block_times
    from impatient.verbs.run_directory import fresh_model

    use_threads(options.threads)
    if sum(map(bool, (options.iterations, options.sizes, options.times_s))) > 1:
        raise ModelSpecError("expected one of iterations, sizes and times, or none of them.")
    data = impatient.load_data(options.data, seed=0)
    network = fresh_model(options.model, data.num_classes, data.preprocess, seed=0)
    if not isinstance(network, GrowingNetwork):
        raise ModelSpecError(
            f"{options.model} is a {type(network).__name__}, which does not grow; expected "
            "impatient:anytimenet, or a factory of your own that returns a GrowingNetwork."
        )
    example = data.example(options.batch_size)
    parts = block_times(network.backbone, example, repeats=options.repeats)
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
