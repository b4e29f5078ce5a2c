"""Replace the files of a run: what is not of a run is left alone, and nothing goes too early."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from impatient.files import file_errors, is_file, move, remove

# What `impatient export` writes into a directory, and what `python run.py --profile` adds to it.
EXPORTED = (
    *("bundle.json", "costs.json", "README.txt", "run.py"),
    *("standalone/*.py", "standalone/__pycache__/*.pyc"),
    *("stage*.*", "head*.*", "whole.*", "session.*", "aoti.*"),
)
# The files of a run, without those of other people.
KNOWN = (
    *(
        "network.json",
        "imported.json",
        "training.json",
        "metrics.csv",
        "evaluation.json",
        "report.html",
    ),
    *("weights.safetensors", "checkpoint.safetensors", "profile.json", "profile-t*.json"),
    *("recordings/*.safetensors", "policies/*.safetensors", "policies/*.json"),
    *("targets/*.json", "certificates/*.json", "exit_free/recordings/*.safetensors"),
    *("exit_free/weights.safetensors", "exit_free/checkpoint.safetensors", "exit_free/metrics.csv"),
    *("engines/*/profile.json", "engines/*/profile-t*.json", "engines/*/evaluation.json"),
    *("engines/*/recordings/*.safetensors", *(f"engines/*/{name}" for name in EXPORTED)),
)
# What says that a directory is a run's; it comes last and goes first.
MARKS = ("network.json", "imported.json")
# Where the files of a run are that is being replaced.
OLD = "replaced"


def _files(directory: Path) -> list[Path]:
    """List the files of a run, what says that it is one last."""
    with file_errors(f"read {directory}"):
        found = {
            file.relative_to(directory)
            for pattern in KNOWN
            for file in directory.glob(pattern)
            if file.is_file()
        }
    return sorted(found, key=lambda file: (file.name in MARKS, file))


def _move_files(directory: Path, target: Path, *, over: bool = False) -> None:
    """Move the files of a run, what says that it is one last.

    Args:
        directory: where they are.
        target: where they go.
        over: whether they replace those of the same name there, or are removed instead.
    """
    files = _files(directory)
    for file in files:
        if over or not is_file(target / file):
            move(directory / file, target / file)
        else:
            remove(directory / file)
    _remove_empty_folders(directory, files)


def _remove_files(directory: Path) -> None:
    files = _files(directory)
    for file in reversed(files):
        remove(directory / file)
    _remove_empty_folders(directory, files)


def _remove_empty_folders(directory: Path, files: Sequence[Path]) -> None:
    """Remove the folders of files that were removed, where nothing else is in them."""
    folders = {directory / parent for file in files for parent in file.parents}
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        with contextlib.suppress(OSError):
            # Fails unless the folder is empty.
            folder.rmdir()


@contextlib.contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """Yield a new directory, whose files take the place of a run's if the block succeeds.

    The old files go to the folder "replaced"; see `discard_old`. Only files that this library
    writes are moved, and none if the directory holds no run.
    """
    with file_errors(f"write {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".new.", suffix=".tmp", dir=directory))
    try:
        yield new
        old = directory / OLD
        if any(is_file(directory / mark) for mark in MARKS):
            # An unfinished run does not push out a trained one that was set aside before.
            weights = "weights.safetensors"
            if is_file(directory / weights) or not is_file(old / weights):
                _remove_files(old)
            _move_files(directory, old)
        _move_files(new, directory, over=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def discard_old(directory: Path) -> None:
    """Remove the files of the run that was replaced."""
    _remove_files(directory / OLD)
