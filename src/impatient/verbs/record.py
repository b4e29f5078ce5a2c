"""Record what a run's network answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import impatient
from impatient.errors import ImpatientError
from impatient.verbs.notes import log
from impatient.verbs.options import NAMES, Directory, Engine, Flag, Force, Quiet


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordOptions:
    """Record the outputs of all exits, so that policies are fitted and judged without the network.

    Attributes:
        splits: Splits to record, with commas between.
        features: Keep pooled features too, for learned gates.
    """

    directory: Directory
    splits: Annotated[tuple[str, ...], NAMES] = ("validation", "test")
    features: Flag = False
    engine: Engine = "eager"
    force: Force = False
    quiet: Quiet = False


def record(options: RecordOptions) -> None:
    """Record the splits; with torch, also of the network without exits if there is one."""
    from impatient.verbs.run_directory import EAGER, RunDirectory

    run = RunDirectory(options.directory).engine(options.engine)
    data = run.data()
    networks = [(*run.network(), run.recording_file)]
    if run.exit_free_weights_file.is_file() and options.engine == EAGER:
        networks.append((*run.exit_free_network(), run.exit_free_recording_file))
    for network, weights, place in networks:
        for split in options.splits:
            file = place(split)
            if not options.force and _is_fresh(file, weights, data, options.features):
                log.info("up to date: %s (--force to record again)", file)
                continue
            impatient.record(
                network,
                data,
                split=split,
                features=options.features,
                progress=not options.quiet,
            ).save(file)
            log.info("recorded: %s", file)


def _is_fresh(file: Path, weights: str, data: impatient.Data, features: bool) -> bool:

    if not file.is_file():
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
        and bool(recording.features) >= features
    )
