"""Export a run's network to another engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

import impatient
from impatient.files import is_file
from impatient.table import Table, in_ms
from impatient.verbs.notes import log
from impatient.verbs.options import (
    OFF,
    Directory,
    Flag,
    Positive,
    Quiet,
    Text,
    Threads,
    Trust,
    VerbOptions,
    use_threads,
)
from impatient.verbs.processes import alone
from impatient.verbs.run_directory import RunDirectory

if TYPE_CHECKING:
    from impatient.engines.comparison import EngineTimes

Engine = Literal["onnxruntime", "openvino", "onnxruntime-session", "openvino-session", "aoti"]
Precision = Literal["fp32", "int8-dynamic", "int8-static"]
# training samples by which ranges for 8 bits are found
CALIBRATION_BATCH = 16
CALIBRATION_BATCHES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions(VerbOptions):
    """Export the network to another engine, and check it there.

    Attributes:
        engine: Engine: onnxruntime or openvino, which run without torch, a session per stage;
            these with -session behind the name, one session with all exits; or aoti (torch's
            compiler, ahead of time).
        precision: Precision: fp32, int8-dynamic (weights and linear layers in 8 bits) or
            int8-static (features, too; their ranges come from the training split).
        policy: Name of a fitted policy of thresholds, to go with the network.
        place: Where to write instead of DIR/engines/ENGINE[-PRECISION].
        lean: Leave out the network without exits, for comparisons only.
        repeats: Measurements of each stage.
        force: Replace what is there.
    """

    directory: Directory
    engine: Engine = "onnxruntime"
    precision: Precision = "fp32"
    policy: Text = None
    place: Annotated[Path | None, arg(name="out"), OFF] = None
    lean: Flag = False
    repeats: Positive = 300
    threads: Threads = 0
    force: Flag = False
    quiet: Quiet = False
    trust: Trust = ()


@alone()
def export(options: ExportOptions) -> tuple[EngineTimes, ...]:
    """Export the trained network, measure it, and compare it with torch.

    Nothing is fitted. Inputs for the check of agreement, and for the ranges of 8 bits, are the
    first of the training split.
    """
    import torch

    from impatient.engines.comparison import engine_times
    from impatient.engines.export import add_costs, read_bundle
    from impatient.engines.network import engine_label
    from impatient.trees import take

    use_threads(options.threads)
    engine = options.engine
    run = RunDirectory(options.directory, trust=options.trust)
    seen = run.engine(engine_label(engine, options.precision))
    (network, _) = run.network()
    rule = run.policy(options.policy) if options.policy else None
    if rule is not None:
        # one that cannot be exported is refused before anything is written
        rule.portable_rule()
    spec = run.spec()
    batches = run.data().batches("train", CALIBRATION_BATCH)
    samples = [x for x, _ in itertools.islice(batches, CALIBRATION_BATCHES)]
    # a run that was stopped before the profile was written is done again
    stopped = options.place is None and not is_file(seen.profile_file)
    target = impatient.export(
        network,
        options.place or seen.here,
        engine=engine,
        precision=options.precision,
        example=take(samples[0], range(4)),
        threads=torch.get_num_threads(),
        calibration=samples,
        policy=rule,
        class_names=spec.class_names,
        preprocess=None if spec.example_parts else spec.preprocess,
        lean=options.lean,
        force=options.force or stopped,
        progress=not options.quiet,
    )
    log.info("exported: %s", target)
    if engine != "aoti":
        log.info(
            "to run it without torch: cd %s && python run.py %s --deadline-ms 5 "
            "(python run.py --help)",
            target,
            # several arrays do not go into one .npy file
            "INPUT.npz"
            if spec.example_parts
            else "PICTURE"
            if spec.preprocess.size
            else "INPUT.npy",
        )
    made = impatient.load_engine(target)
    costs = impatient.profile(made, samples[0], repeats=options.repeats, progress=not options.quiet)
    add_costs(target, costs)
    if options.place is None:
        costs.save(seen.profile_file)
    # others cannot be exported
    assert isinstance(network, impatient.MultiExitNetwork)
    agreement = read_bundle(target)["agreement"]
    return engine_times(
        network,
        made,
        agreement,
        take(samples[0], [0]),
        repeats=options.repeats,
        progress=not options.quiet,
    )


def shown(_: ExportOptions, rows: Sequence[EngineTimes]) -> Iterator[Table]:
    """Give whether the engine answers the same, and how long its stages take."""
    yield Table(
        title="in the engine and in torch, in turn; medians in ms",
        columns=("exit", "after", "largest difference", "engine", "torch", "engine / torch"),
        left=2,
        rows=[
            (
                str(index) if index < len(rows) - 1 else "",
                row.name,
                f"{row.agreement:.1e}",
                in_ms(row.engine_s),
                in_ms(row.eager_s),
                f"{row.engine_s / row.eager_s:.2f}",
            )
            for index, row in enumerate(rows)
        ],
    )
