"""Directories on which one process works at a time, which are replaced whole and swept."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from impatient.errors import StorageError
from impatient.files import UNCHANGED, file_errors, move, remove

log = logging.getLogger(__name__)

# Names that `tempfile` gives to what is not written whole yet, and exported directories to theirs.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.([a-z0-9_]{8}|[0-9]+)\.tmp")


@contextlib.contextmanager
def replaced_whole(directory: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of a directory if the block succeeds.

    Of a process that is killed while the two change places, `remove_stale` puts the old one back.

    Raises:
        StorageError: if it cannot be written; the old directory stays then.
    """
    with file_errors(f"write {directory}", UNCHANGED):
        directory.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{directory.name}."
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=directory.parent))
        try:
            new = temporary / "new"
            new.mkdir()
            yield new
            if directory.exists():
                directory.rename(temporary / "old")
            new.rename(directory)
        finally:
            _remove_folder(temporary, directory)


def _remove_folder(temporary: Path, directory: Path) -> None:
    """Remove a temporary folder, but for the directory in it that has no successor."""
    old = temporary / "old"
    if old.is_dir() and not directory.exists():
        move(old, directory)
        log.info("put back: %s", directory)
    shutil.rmtree(temporary, ignore_errors=True)


def remove_stale(directory: Path, folders: Sequence[str]) -> None:
    """Remove the temporary files that a killed process has left behind.

    Args:
        directory: a directory on which nobody else works; see `working_on`.
        folders: patterns of the folders in it that are looked through, "." for itself.
    Raises:
        StorageError: if they cannot be removed.
    """
    with file_errors(f"read {directory}"):
        for pattern in folders:
            for folder in [directory] if pattern == "." else directory.glob(pattern):
                for left in folder.glob(".*.tmp"):
                    _remove_left(left)


def _remove_left(left: Path) -> None:
    named = _TEMPORARY.fullmatch(left.name)
    if named is None:
        return
    if left.is_dir() and not left.is_symlink():
        _remove_folder(left, left.with_name(named["name"]))
    else:
        remove(left)
    log.info("removed %s, which a process that was killed had left behind", left)


# Directories that are worked on, by their path: the process and the thread.
_held: dict[Path, tuple[int, int]] = {}


@contextlib.contextmanager
def working_on(directory: Path, *, make: bool = False) -> Iterator[bool]:
    """Let no other process, and no other thread, work on a directory in the meantime.

    The lock is the kernel's, on the directory itself. So nothing is left behind, however the
    process ends. Within one thread it may be taken several times.

    Args:
        directory: the directory; without `make` nothing is locked if it does not exist.
        make: whether to make the directory; it is removed again if it stays empty.
    Yields:
        Whether nobody else has begun to work on it: not where disks have no locks.
    Raises:
        StorageError: if somebody else works on the directory, or it cannot be made.
    """
    try:
        import fcntl
    except ImportError:
        # Windows has no such locks.
        yield False
        return
    place = directory.resolve()
    me = (os.getpid(), threading.get_ident())
    made = [folder for folder in (place, *place.parents) if make and not folder.exists()]
    if _held.get(place) == me or not (make or place.exists()):
        yield False
        return
    with file_errors(f"write {directory}", UNCHANGED):
        place.mkdir(parents=True, exist_ok=True)
        handle = os.open(place, os.O_RDONLY)
    is_locked = True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"another process works on {directory} now. Wait until it has ended, or use "
                "another directory."
            ) from error
        except OSError:
            # Some network disks lock no directories; then nobody is kept out.
            log.info("%s is on a disk without locks; let one process work on it", directory)
            is_locked = False
        _held[place] = me
        try:
            yield is_locked
        finally:
            del _held[place]
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            for folder in made:
                # Fails unless the folder is empty.
                folder.rmdir()
