"""Find the splits of a data set by the names of folders, files or tables."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from pathlib import Path

from impatient.errors import DataError

log = logging.getLogger(__name__)

USUAL = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation", "dev"),
}
# Of names that are listed together there must be one. Those for tests stand alone, since test data
# may stand beside those for validation: the first that is there is the test split.
TRAIN_NAMES = (frozenset(USUAL["train"]),)
TEST_NAMES = tuple(frozenset({name}) for name in (*USUAL["test"], *USUAL["validation"]))
ANY_NAME = frozenset(name for names in USUAL.values() for name in names)


def usual_split(name: str) -> str:
    """Give the split that a name means, in small letters."""
    small = name.lower()
    return next((split for split, names in USUAL.items() if small in names), small)


def split_folders(root: Path) -> Mapping[str, Path]:
    """Find the folders of the splits by their names.

    Without a folder for training, the whole folder is for training. Folders that are left out are
    said.

    Raises:
        DataError: if two folders could be the same split.
    """
    folders = {path.name: path for path in unhidden(root) if path.is_dir()}

    def holds_folders(name: str) -> bool:
        return any(map(Path.is_dir, unhidden(folders[name])))

    # A folder of pictures is a class, whatever it is called.
    names = split_names(folders, str(root), loose=holds_folders)
    return {split: folders[name] for split, name in names.items()} or {"train": root}


def split_names(
    names: Collection[str], where: str, *, loose: Callable[[str], bool]
) -> Mapping[str, str]:
    """Find which names are those of the training and the test split, if there are any.

    They are the usual ones in any case, or hold one as a word, as seg_train and seg_test do. Those
    that are left out are said.

    Args:
        names: names of folders, of files without their suffix, or of tables.
        where: where they are, in errors.
        loose: whether a name may be that of a split for holding a usual one as a word; it is asked
            of such names alone.
    Raises:
        DataError: if two of them could be the same split.
    """
    exact = {name: {name.lower()} for name in names}
    held = {name: ANY_NAME.intersection(re.findall("[a-z]+", name.lower())) for name in names}
    words = {name: own for name, own in held.items() if own and loose(name)}
    train = _only(TRAIN_NAMES, exact, where)
    is_exact = bool(train)
    if not is_exact and any(_holding(kind, each) for kind in TEST_NAMES for each in (exact, words)):
        train = _only(TRAIN_NAMES, words, where)
    words.pop(train, None)
    test = _only(TEST_NAMES, exact, where) or _only(TEST_NAMES, words, where)
    if not train or not (test or is_exact):
        return {}
    chosen = {split: name for split, name in (("train", train), ("test", test)) if name}
    left = sorted(set(names) - set(chosen.values()))
    if left:
        log.warning(
            "%s: %s; left out: %s",
            where,
            " and ".join(f"{name} is the {split} split" for split, name in chosen.items()),
            ", ".join(left),
        )
    return chosen


def _only(kinds: Iterable[Set[str]], words: Mapping[str, Set[str]], where: str) -> str:
    """Give the name with a word of the first kind that any has, "" if none has."""
    for kind in kinds:
        found = _holding(kind, words)
        if len(found) > 1:
            raise DataError(
                f"{where} has {' and '.join(found)}; expected one of them. Rename or join them."
            )
        if found:
            return found[0]
    return ""


def _holding(kind: Set[str], words: Mapping[str, Set[str]]) -> list[str]:
    return [name for name, own in words.items() if own & kind]


def unhidden(folder: Path) -> list[Path]:
    """List what is in a folder, but for what is hidden, in the order of names.

    Raises:
        DataError: if the folder cannot be read.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror or error}.") from error
    # The second is what macOS leaves in archives.
    return [path for path in entries if not path.name.startswith((".", "__MACOSX"))]
