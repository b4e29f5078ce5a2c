"""Record what a run's network answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import impatient
from impatient.errors import ImpatientError
from impatient.files import is_file
from impatient.verbs.notes import log
from impatient.verbs.options import (
    Directory,
    Engine,
    Flag,
    Force,
    Names,
    Quiet,
    Top,
    Trust,
    VerbOptions,
    with_top,
)
from impatient.verbs.processes import alone
from impatient.verbs.run_directory import EAGER, RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordOptions(VerbOptions):
    """Record what all exits answer, to fit and judge policies.

    Attributes:
        splits: Splits to record.
        features: Keep pooled features too, for learned gates.
    """

    directory: Directory
    splits: Names = ("validation", "test")
    features: Flag = False
    top: Top = None
    engine: Engine = "eager"
    force: Force = False
    quiet: Quiet = False
    trust: Trust = ()


@alone()
def record(options: RecordOptions) -> list[Path]:
    """Record the splits, in torch also of the network without exits.

    Returns:
        The files, those that were up to date among them.
    """
    run = RunDirectory(options.directory, trust=options.trust).engine(options.engine)
    data = run.data()
    recorded = [run]
    if run.exit_free.is_trained and options.engine == EAGER:
        recorded.append(run.exit_free)
    files = []
    for part in recorded:
        network, weights = part.network()
        task = with_top(network.task.name, options.top)
        for split in options.splits:
            file = part.recording_file(split)
            files.append(file)
            if not options.force and _is_fresh(file, weights, data, options.features, task):
                log.info("up to date: %s (--force to record again)", file)
                continue
            impatient.record(
                network,
                data,
                split=split,
                task=task if options.top else None,
                features=options.features,
                progress=not options.quiet,
            ).save(file)
            log.info("recorded: %s", file)
    return files


def _is_fresh(file: Path, weights: str, data: impatient.Data, features: bool, task: str) -> bool:
    if not is_file(file):
        return False
    try:
        recording = impatient.Recording.load(file)
    except ImpatientError:
        # damaged: made again
        return False
    source = recording.provenance
    return (
        source.weights == weights
        and source.data == data.fingerprint
        and recording.task == task
        and bool(recording.features) >= features
    )
