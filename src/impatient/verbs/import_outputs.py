"""Take outputs that another program computed into a run directory."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

import impatient
from impatient.errors import CostError, LogitsWarning, RecordingError, StorageError
from impatient.files import is_file
from impatient.provenance import fingerprint_bytes, provenance
from impatient.table import Table, in_ms
from impatient.verbs.compare import load_profile
from impatient.verbs.imported import Imported, opened
from impatient.verbs.notes import log
from impatient.verbs.options import OFF, Flag, Names, Times, Top, VerbOptions, task_and_top
from impatient.verbs.processes import alone
from impatient.verbs.replacing import discard_old, replaced
from impatient.verbs.run_directory import RunDirectory

if TYPE_CHECKING:
    import numpy as np

    from impatient.provenance import Provenance

EXPECTED = (
    "outputs [K, N, ...], targets [N, ...] and splits [N]; or validation_outputs, "
    "validation_targets, test_outputs and test_targets"
)
# what fit, evaluate and report read
NEEDED = ("validation", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions(VerbOptions):
    """Take outputs that another program computed, to judge them.

    Attributes:
        file: Npz file of K exits and N samples, with outputs [K, N, ...], targets [N, ...] and
            splits [N], the name of each sample's split; or with validation_outputs,
            validation_targets, test_outputs and test_targets. Outputs of classes are logits.
            An array class_names is optional.
        directory: The run directory to make.
        task: What the outputs mean: classification (with :top=5, ...), binary, multi_label,
            regression (with :tolerance=0.5 or :scale=2), segmentation, embedding or detection.
        costs_ms: Time until the answer of each exit, in ms.
        stages_ms: Time of each stage alone, in ms, instead of --costs-ms.
        profile: File of a cost profile that was measured, instead of --costs-ms.
        exits: Names of the exits.
        force: Replace outputs that were imported before, and what was made of them.
    """

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    directory: Annotated[Path, arg(name="into", metavar="DIR")]
    task: str = "classification"
    top: Top = None
    costs_ms: Times = ()
    stages_ms: Times = ()
    profile: Annotated[Path | None, OFF, arg(metavar="FILE")] = None
    exits: Names = ()
    force: Flag = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What was taken in.

    Attributes:
        directory: The run directory.
        quality_name: What the mean quality is called.
        exits: Names of the exits.
        costs_s: Seconds until the answer of each exit.
        samples: Number of samples of each split.
        quality: Mean quality of each exit, by split.
    """

    directory: Path
    quality_name: str
    exits: tuple[str, ...]
    costs_s: tuple[float, ...]
    samples: Mapping[str, int]
    quality: Mapping[str, tuple[float, ...]]


@alone(make=True)
def import_outputs(options: ImportOptions) -> Taken:
    """Make a run directory of outputs and costs, on which fit, evaluate and report work.

    Raises:
        DataError, RecordingError, TaskError: if the arrays do not fit each other or the task.
        CostError: if there is not one cost for each exit.
        StorageError: if the directory is taken.
    """
    run = RunDirectory(options.directory)
    _check_free(run, options)
    task = impatient.tasks.named(task_and_top(options.task, options.top))
    splits, class_names = _read(options.file)
    costs = _costs(options, exits=len(splits["validation"][0]))
    made = _origin(splits, costs)
    costs = dataclasses.replace(
        costs, provenance=dataclasses.replace(costs.provenance, network=made.network)
    )
    recordings = {
        split: _recorded(split, outputs, targets, task, costs.exits, made)
        for split, (outputs, targets) in splits.items()
    }
    about = Imported(
        source=str(options.file),
        exits=costs.exits,
        class_names=_names(class_names, recordings["test"]),
        task=task.name,
        provenance=made,
    )
    with replaced(run.path) as place:
        new = RunDirectory(place)
        for split, recording in recordings.items():
            recording.save(new.recording_file(split))
        costs.save(new.profile_file)
        about.save(new.imported_file)
    discard_old(run.path)
    log.info("imported: %s", run.path)
    return Taken(
        directory=run.path,
        quality_name=task.quality_name,
        exits=costs.exits,
        costs_s=costs.contract_s(batch_size=min(costs.batches)),
        samples={split: len(recording) for split, recording in recordings.items()},
        quality={
            split: tuple(recording.quality.mean(1).tolist())
            for split, recording in recordings.items()
        },
    )


def shown(_: ImportOptions, taken: Taken) -> Iterator[Table | str]:
    """Give the quality and the cost of every exit, and what to do next."""
    splits = [f"{split} ({count} samples)" for split, count in taken.samples.items()]
    yield Table(
        title=f"{taken.quality_name} of every exit, %",
        columns=("exit", *splits, "until its answer, ms"),
        rows=[
            (
                name,
                *(f"{quality[exit] * 100:.1f}" for quality in taken.quality.values()),
                in_ms(taken.costs_s[exit]),
            )
            for exit, name in enumerate(taken.exits)
        ],
    )
    yield f"next: impatient fit {taken.directory} --max-loss 1"


def _check_free(run: RunDirectory, options: ImportOptions) -> None:
    """Refuse a directory that holds anything that was not imported, or not to be replaced."""
    if is_file(run.spec_file):
        raise StorageError(
            f"{run.path} holds a network that was trained; expected a new directory. Say another "
            "one with --into."
        )
    if is_file(run.imported_file) and not options.force:
        raise StorageError(
            f"{run.path} holds outputs of {opened(run.path).facts()['outputs']} already; use "
            "another directory, or --force to replace them and what was made of them."
        )


def _read(path: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    """Read outputs and targets of every split, and the names of classes."""
    from impatient.training.arrays import read_archive, read_names
    from impatient.training.split_names import usual_split

    arrays = read_archive(path.expanduser(), EXPECTED)
    given = _named_splits(arrays, path) if "splits" in arrays else _prefixed_splits(arrays)
    found = {usual_split(name): part for name, part in given.items()}
    if len(found) < len(given):
        raise RecordingError(
            f"{path} has the splits {', '.join(given)}, two of which mean the same; expected one "
            "of them. Join them, or leave one out."
        )
    for split, (outputs, targets) in found.items():
        _check_shapes(f"{path}, {split}", outputs, targets)
    missing = [split for split in NEEDED if split not in found]
    if missing:
        others = [split for split in found if split not in NEEDED]
        held = f"samples of {', '.join(others)}" if others else ", ".join(arrays) or "nothing"
        raise RecordingError(
            f"{path} has no samples of {' and '.join(missing)}; it holds {held}. Expected "
            f"{EXPECTED}. Policies are fitted on validation and judged on test, so divide your "
            "samples, and name the splits so."
        )
    return found, read_names(arrays.get("class_names"))


def _named_splits(
    arrays: Mapping[str, np.ndarray], path: Path
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from impatient.training.arrays import read_names

    lacking = [name for name in ("outputs", "targets") if name not in arrays]
    if lacking:
        raise RecordingError(
            f"{path} has splits, but no {', '.join(lacking)}; expected {EXPECTED}."
        )
    outputs, targets, splits = arrays["outputs"], arrays["targets"], arrays["splits"]
    _check_shapes(str(path), outputs, targets)
    if splits.shape != (len(targets),) or splits.dtype.kind not in "US":
        raise RecordingError(
            f"{path}: splits are {splits.dtype} of shape {splits.shape}; expected the name of each "
            f"sample's split, {len(targets)} texts such as 'validation' and 'test'."
        )
    names = read_names(splits)
    rows = {name: [place for place, own in enumerate(names) if own == name] for name in set(names)}
    return {name: (outputs[:, place], targets[place]) for name, place in sorted(rows.items())}


def _prefixed_splits(
    arrays: Mapping[str, np.ndarray],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    names = [name.removesuffix("_outputs") for name in arrays if name.endswith("_outputs")]
    return {
        name: (arrays[f"{name}_outputs"], arrays[f"{name}_targets"])
        for name in names
        if f"{name}_targets" in arrays
    }


def _check_shapes(where: str, outputs: np.ndarray, targets: np.ndarray) -> None:
    if outputs.dtype.kind not in "fiu":
        raise RecordingError(f"{where}: outputs are {outputs.dtype}; expected numbers.")
    if outputs.ndim < 2 or targets.ndim < 1 or outputs.shape[1] != len(targets):
        turned = outputs.ndim > 1 and targets.ndim > 0 and len(outputs) == len(targets)
        hint = " Save outputs.swapaxes(0, 1), the exits first." if turned else ""
        raise RecordingError(
            f"{where}: outputs of shape {outputs.shape} and targets of shape {targets.shape}; "
            f"expected [K, N, ...] of K exits and N samples, and [N, ...].{hint}"
        )


def _costs(options: ImportOptions, *, exits: int) -> impatient.CostProfile:
    """Make the profile of the times that are given, or read the one that is named."""
    given = [bool(options.costs_ms), bool(options.stages_ms), options.profile is not None]
    if sum(given) != 1:
        raise CostError(
            f"{sum(given)} kinds of costs are given; expected one of --costs-ms MS,MS,... (until "
            "each exit's answer), --stages-ms MS,MS,... (each stage alone) and --profile FILE."
        )
    if options.exits and len(options.exits) != exits:
        raise CostError(
            f"--exits names {len(options.exits)} exits for outputs of {exits}; expected one name "
            "per exit."
        )
    if options.profile is not None:
        costs = load_profile(options.profile)
        costs = dataclasses.replace(costs, exits=options.exits) if options.exits else costs
    else:
        costs = impatient.CostProfile.of(
            cumulative_s=options.costs_ms, stages_s=options.stages_ms, exits=options.exits
        )
    if costs.num_exits != exits:
        raise CostError(
            f"costs of {costs.num_exits} exits for outputs of {exits}; expected one per exit."
        )
    return costs


def _origin(
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]], costs: impatient.CostProfile
) -> Provenance:
    """Take fingerprints of what was given, for want of network, weights and data."""
    outputs = [values.tobytes() for values, _ in splits.values()]
    targets = [values.tobytes() for _, values in splits.values()]
    shape = str([values.shape[2:] for values, _ in splits.values()] + [costs.num_exits])
    return provenance(
        network=costs.provenance.network or fingerprint_bytes(shape.encode()),
        weights=fingerprint_bytes(*outputs),
        data=fingerprint_bytes(*targets),
    )


def _recorded(
    split: str,
    outputs: np.ndarray,
    targets: np.ndarray,
    task: impatient.tasks.Task,
    exits: tuple[str, ...],
    made: Provenance,
) -> impatient.Recording:
    from impatient.training.arrays import read_targets

    # whole numbers are classes only where the task has some
    one_each = targets.ndim < 3 and targets.size == len(targets)
    measured = one_each and targets.dtype.kind in "iub" and not task.is_logits
    truth = read_targets(targets.astype("float32") if measured else targets, split)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", LogitsWarning)
            recording = impatient.Recording.of(
                outputs, truth, split=split, task=task, exits=exits, provenance=made
            )
    except LogitsWarning as error:
        raise RecordingError(f"{split}: {error}") from error
    if task.is_logits:
        _say_what_is_absent(recording)
    return recording


def _say_what_is_absent(recording: impatient.Recording) -> None:
    """Note classes that no sample has."""
    logits = recording.logits()
    absent = logits.shape[-1] - len(recording.labels.unique())
    if absent:
        log.info(
            "note: %s has no sample of %d of the %d classes",
            recording.split,
            absent,
            logits.shape[-1],
        )


def _names(given: tuple[str, ...], recording: impatient.Recording) -> tuple[str, ...]:
    """Name the classes, by their numbers if nobody named them."""
    if recording.outputs is None or not impatient.tasks.is_classification(recording.task):
        return given
    classes = recording.outputs.shape[-1]
    if given and len(given) != classes:
        raise RecordingError(
            f"{len(given)} class_names for outputs of {classes} classes; expected one per class."
        )
    return given or tuple(map(str, range(classes)))
