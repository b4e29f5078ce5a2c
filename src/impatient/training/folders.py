"""Data sets of pictures in folders, one folder per class."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from impatient.errors import DataError
from impatient.networks.transforms import Resizing, Transform
from impatient.provenance import fingerprint_bytes
from impatient.training.examples import Decoding, LazyExamples, Raw
from impatient.training.map_folders import map_folders
from impatient.training.options import MAP_OPTIONS, PICTURE_OPTIONS, DataOptions, read_options
from impatient.training.pictures import (
    FIT,
    class_files,
    hash_of_file,
    read_image,
    shown_as,
    size_of,
)
from impatient.training.split_names import split_folders
from impatient.training.splitting import carved_out


def imagefolder(rest: str, transform: Transform | None = None) -> tuple[Raw, DataOptions]:
    """Read DIR or DIR:options, resized as trained weights expect it."""
    name, options = read_options(rest, (*PICTURE_OPTIONS, *MAP_OPTIONS))
    root = Path(name).expanduser()
    if not root.is_dir():
        raise DataError(
            f"no folder {root}; expected one with train/CLASS/*.png and test/CLASS/*.png."
        )
    if options.masks:
        return map_folders(root, options, transform), options
    options.require_only(*PICTURE_OPTIONS)
    folders = split_folders(root)
    files = {split: class_files(folder) for split, folder in folders.items()}
    classes = sorted({label for found in files.values() for _, label in found})
    if not classes:
        raise DataError(f"no images in {root}; expected train/CLASS/*.png and test/CLASS/*.png.")
    _check_no_pairs(files["train"], classes)
    numbers = {label: number for number, label in enumerate(classes)}
    if "test" not in files:
        test = carved_out(np.array([numbers[label] for _, label in files["train"]]))
        both = list(zip(files["train"], test, strict=True))
        files = {
            "train": [file for file, is_test in both if not is_test],
            "test": [file for file, is_test in both if is_test],
        }
    paths = {split: [path for path, _ in found] for split, found in files.items()}
    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as threads:
        hashes = {split: list(threads.map(hash_of_file, found)) for split, found in paths.items()}
    rows = {
        split: [
            (path, f"{path.relative_to(folders.get(split, folders['train']))}/{hashed}", number)
            for (path, label), hashed in zip(found, hashes[split], strict=True)
            for number in [numbers[label]]
        ]
        for split, found in files.items()
    }
    some = files["train"][:: max(1, len(files["train"]) // 50)]
    shown, resizing = shown_as(options, transform, (size_of(path) for path, _ in some))
    read = functools.partial(read_image, size=shown, channels=3, resizing=resizing)
    return lazy_pictures(rows, classes, read, shown, resizing=resizing), options


def _check_no_pairs(files: Sequence[tuple[Path, str]], classes: Sequence[str]) -> None:
    """Refuse to read pictures and their maps as two classes."""
    names = {label: {path.stem for path, each in files if each == label} for label in classes}
    alike = len({frozenset(each) for each in names.values()}) == 1
    if len(names) == 2 and "images" in names and alike:
        other = next(label for label in classes if label != "images")
        raise DataError(
            f"the folders images and {other} hold files of the same names: they could be two "
            f"classes, or pictures and their maps of classes. Say masks={other}, or rename a "
            "folder if it is a class."
        )


def lazy_pictures(
    rows: Mapping[str, Sequence[tuple[Any, str, int]]],
    classes: Sequence[str],
    read: Callable[[Any], Tensor],
    size: tuple[int, int],
    *,
    named: bool = True,
    resizing: Resizing = FIT,
) -> Raw:
    """Make a data set of images that are decoded on demand.

    Args:
        rows: for "train" and "test", the source, the identity and the label of each image.
        classes: name of each class.
        read: function that makes the raw input from a source.
        size: height and width of the inputs.
        named: whether the classes have names.
        resizing: how pictures come to this size.
    """
    empty = [split for split in ("train", "test") if not rows[split]]
    if empty:
        raise DataError(f"no images for {' and '.join(empty)}.")
    decoding = Decoding()

    def examples(split: str) -> LazyExamples:
        sources, _, labels = zip(*rows[split], strict=True)
        return LazyExamples(sources, torch.tensor(labels, dtype=torch.int64), read, decoding)

    listed = "".join(
        f"{split}/{identity}:{label};" for split in rows for _, identity, label in rows[split]
    )
    # Nothing for the usual way, as in older run directories.
    resized = "" if resizing == FIT else f"{resizing}"
    return Raw(
        train=examples("train"),
        test=examples("test"),
        class_names=tuple(classes),
        named=named,
        resizing=resizing,
        content=fingerprint_bytes(listed.encode(), f"{size}{resized}".encode()),
    )
