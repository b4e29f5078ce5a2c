"""Data sets of pictures, and of maps that hold their classes."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from impatient.errors import DataError
from impatient.networks.transforms import Resizing, Transform
from impatient.provenance import fingerprint_bytes
from impatient.training.examples import Decoding, LazyExamples, Raw
from impatient.training.options import DataOptions
from impatient.training.pictures import (
    class_map,
    hash_of_file,
    opened,
    picture_files,
    read_image,
    shown_as,
    size_of,
)
from impatient.training.split_names import split_folders
from impatient.training.splitting import carved_out

# A usual ending of a map's name, behind that of its picture.
ENDING = "_mask"
# The number of pixels that count nowhere.
IGNORED = 255

Pair = tuple[Path, Path]


def map_folders(root: Path, options: DataOptions, transform: Transform | None) -> Raw:
    """Read ROOT/SPLIT/images and ROOT/SPLIT/MASKS, or ROOT/images/SPLIT and ROOT/MASKS/SPLIT.

    Without splits a fixed fifth is for the test. The maps are kept in memory, a byte per pixel.

    Raises:
        DataError: if a picture has no map or a map no picture, their sizes differ, or pixels of a
            map are no class numbers.
    """
    pairs = _pairs(root, options.images or "images", options.masks)
    images = [image for found in pairs.values() for image, _ in found]
    some = images[:: len(images) // 50 + 1]
    size, resizing = shown_as(options, transform, (size_of(path) for path in some))
    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as threads:
        read = functools.partial(_map, size=size, resizing=resizing)
        maps = {
            split: torch.from_numpy(np.stack(list(threads.map(read, found))))
            for split, found in pairs.items()
        }
        files = [path for found in pairs.values() for pair in found for path in pair]
        hashes = list(threads.map(hash_of_file, files))
    names = [f"{split}/{len(found)};" for split, found in pairs.items()]
    decoding = Decoding()
    maps = _numbered(maps, str(root), options)
    picture = functools.partial(read_image, size=size, channels=3, resizing=resizing)

    def examples(split: str) -> LazyExamples:
        sources = [image for image, _ in pairs[split]]
        return LazyExamples(sources, maps[split], picture, decoding)

    return Raw(
        train=examples("train"),
        test=examples("test"),
        class_names=(),
        named=False,
        resizing=resizing,
        content=fingerprint_bytes("".join([*names, *hashes, f"{size}{resizing}"]).encode()),
    )


def _pairs(root: Path, images: str, masks: str) -> dict[str, list[Pair]]:
    """Find the pictures of each split and their maps."""
    folders = _folders(root, images, masks)
    found = {split: _matched(*both) for split, both in folders.items()}
    if "test" in found:
        return found
    test = carved_out(np.zeros(len(found["train"]), dtype=np.int64))
    both = list(zip(found["train"], test, strict=True))
    return {
        "train": [pair for pair, is_test in both if not is_test],
        "test": [pair for pair, is_test in both if is_test],
    }


def _folders(root: Path, images: str, masks: str) -> dict[str, Pair]:
    """Find the folders of pictures and maps of every split."""
    if all((root / name).is_dir() for name in (images, masks)):
        inside = [split_folders(root / name) for name in (images, masks)]
        if inside[0].keys() != inside[1].keys():
            raise DataError(
                f"{root / images} has {' and '.join(inside[0])}, {root / masks} "
                f"{' and '.join(inside[1])}; expected the same splits in both."
            )
        return {split: (inside[0][split], inside[1][split]) for split in inside[0]}
    found = {}
    for split, folder in split_folders(root).items():
        both = (folder / images, folder / masks)
        absent = [path for path in both if not path.is_dir()]
        if absent:
            raise DataError(
                f"no folder {absent[0]}; expected SPLIT/{images} and SPLIT/{masks}, or the splits "
                f"in {images} and {masks}. Name them: imagefolder:DIR:images=NAME,masks=NAME."
            )
        found[split] = both
    return found


def _matched(images: Path, masks: Path) -> list[Pair]:
    """Give each picture the map of its name."""
    pictures = {_name(path, images): path for path in picture_files(images)}
    maps = {_name(path, masks).removesuffix(ENDING): path for path in picture_files(masks)}
    for have, lack, where in ((pictures, maps, masks), (maps, pictures, images)):
        alone = sorted(have.keys() - lack.keys())
        if alone:
            raise DataError(
                f"{len(alone)} files have no partner in {where}, the first is {have[alone[0]]}; "
                "expected a map for each picture, of the same name but for the suffix."
            )
    if not pictures:
        raise DataError(f"no images in {images}; expected some, and a map for each in {masks}.")
    return [(path, maps[name]) for name, path in sorted(pictures.items())]


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder).with_suffix(""))


def _map(pair: Pair, size: tuple[int, int], resizing: Resizing) -> np.ndarray:
    """Read a map, resized as its picture is without mixing classes."""
    image, path = pair
    shown = size_of(image)
    with opened(path) as stored:
        pixels = class_map(stored, str(path))
    if pixels.shape != shown:
        raise DataError(
            f"{path} has {pixels.shape[0]} x {pixels.shape[1]} pixels, its picture {image} "
            f"{shown[0]} x {shown[1]}; expected the same height and width."
        )
    nearest = dataclasses.replace(resizing, interpolation="nearest")
    return np.array(nearest(Image.fromarray(pixels), size))


def _numbered(maps: Mapping[str, Tensor], where: str, options: DataOptions) -> dict[str, Tensor]:
    """Number classes anew if that is said, and check them."""
    found = sorted({int(each) for part in maps.values() for each in part.unique()})
    if options.labels == "renumber":
        places = torch.zeros(256, dtype=torch.uint8)
        places[found] = torch.arange(len(found), dtype=torch.uint8)
        return {split: places[part.long()] for split, part in maps.items()}
    if found in ([0, IGNORED], [IGNORED]):
        raise DataError(
            f"{where}: maps hold {_listed(found)} alone, where {IGNORED} means pixels that do not "
            "count; expected class numbers. If it means a class, say labels=renumber."
        )
    return dict(maps)


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))
