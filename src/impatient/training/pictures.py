"""Read pictures as a viewer shows them, and find them in folders as people have them."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from impatient.errors import DataError
from impatient.networks.transforms import Resizing, Transform
from impatient.portable.pictures import PictureError, orientation, plain
from impatient.training.options import DataOptions
from impatient.training.split_names import unhidden

log = logging.getLogger(__name__)

FIT = Resizing()
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".gif"),
    *(".ppm", ".pgm", ".tif", ".tiff", ".jpe", ".jp2", ".avif"),
)


def read_image(
    path: Path, size: tuple[int, int], channels: int, resizing: Resizing = FIT
) -> Tensor:
    """Decode, crop and resize an image file to uint8 [C, H, W].

    Raises:
        DataError: if the file is missing, not an image, too large or damaged.
    """
    with opened(path) as image:
        return image_tensor(image, size, channels, str(path), resizing)


def size_of(path: Path) -> tuple[int, int]:
    """Return the height and width of an image file as a viewer shows it."""
    with opened(path) as image:
        return shown_size(image)


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Return the height and width of a picture as a viewer shows it."""
    turned = orientation(image) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def opened(path: Path) -> Image.Image:
    """Open a picture file, whose pixels are read later.

    Raises:
        DataError: if it is missing, or no picture.
    """
    try:
        return Image.open(path)
    except Exception as error:
        # OSError, and Pillow's own for pictures that are too large.
        raise DataError(f"{path} cannot be read as an image: {error}.") from error


def hash_of_file(path: Path) -> str:
    """Hash a file's contents.

    Threads help, because reading and hashing release Python's global lock.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error


def shown_as(
    options: DataOptions, transform: Transform | None, sizes: Iterable[tuple[int, int]]
) -> tuple[tuple[int, int], Resizing]:
    """Decide what size pictures get, and how.

    The user decides, then the weights, then their own size.

    Args:
        options: what the user says.
        transform: what trained weights expect, if there are any.
        sizes: sizes of some pictures.
    """
    if transform is None:
        return options.size or common_size(sizes), FIT
    expected = transform.at(options.size)
    return expected.size, expected.resizing


def common_size(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the size that all images have, or 224 x 224."""
    found = set(sizes)
    return found.pop() if len(found) == 1 else (224, 224)


def image_tensor(
    image: Image.Image,
    size: tuple[int, int],
    channels: int,
    name: str,
    resizing: Resizing = FIT,
) -> Tensor:
    """Convert a picture to uint8 [C, H, W].

    It is turned as its EXIF data say, 16 bits become 8, and what is transparent becomes white.

    Args:
        image: the picture.
        size: height and width.
        channels: 1, 3 or 4.
        name: name of the picture in errors.
        resizing: how it comes to this size; by default the largest centred part with the same
            proportions is cut out.
    Raises:
        DataError: if the picture is damaged, or of a kind that has no brightness from 0 to 1.
    """
    try:
        picture = resizing(_plain(image, channels, name), size)
    except DataError:
        raise
    except Exception as error:
        # Pillow raises OSError, SyntaxError, ValueError, struct.error and others.
        raise DataError(f"{name} is damaged: {error}.") from error
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def class_map(image: Image.Image, name: str) -> np.ndarray:
    """Read a picture's pixels as class numbers [H, W].

    They are places in its palette, or grey values.

    Raises:
        DataError: if the picture is damaged, or has colours instead of numbers.
    """
    try:
        image.load()
    except Exception as error:
        # Pillow raises OSError, SyntaxError, ValueError, struct.error and others.
        raise DataError(f"{name} is damaged: {error}.") from error
    pixels = np.asarray(image)
    if pixels.ndim == 3 and image.mode == "RGB" and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    if pixels.ndim != 2 or pixels.dtype.kind not in "iub":
        raise DataError(
            f"{name} is a picture of mode {image.mode}, whose pixels are no class numbers; "
            "expected a palette (P) or grey values (L). Save the numbers of the classes."
        )
    if pixels.min() < 0 or pixels.max() > 255:
        raise DataError(
            f"{name} holds numbers from {pixels.min()} to {pixels.max()}; expected classes from 0 "
            "to 254, and 255 for pixels that do not count."
        )
    return pixels.astype(np.uint8)


def _plain(image: Image.Image, channels: int, name: str) -> Image.Image:
    try:
        return plain(image, channels, name)
    except PictureError as error:
        raise DataError(str(error)) from error


def class_files(folder: Path) -> list[tuple[Path, str]]:
    """List the image files of a split with their classes, which are the names of folders.

    What is hidden is passed over; other files are counted and said, and classes without pictures
    are named.
    """
    found: list[tuple[Path, str]] = []
    others: list[Path] = []
    empty: list[str] = []
    for entry in unhidden(folder):
        if not entry.is_dir():
            others.append(entry)
            continue
        pictures, rest = _pictures_and_others(entry)
        found += [(path, entry.name) for path in pictures]
        others += rest
        if not pictures:
            empty.append(entry.name)
    _say_others(folder, others)
    if empty:
        log.warning("%s: folders without pictures are no classes: %s", folder, ", ".join(empty))
    return found


def picture_files(folder: Path) -> list[Path]:
    """List image files in and below a folder, hidden ones left out.

    Other files are counted and said.
    """
    found, others = _pictures_and_others(folder)
    _say_others(folder, others)
    return found


def _pictures_and_others(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the image files in and below a folder, and the other files there."""
    found: list[Path] = []
    others: list[Path] = []
    for path in _files_in(folder):
        (found if path.suffix.lower() in IMAGE_SUFFIXES else others).append(path)
    return found, others


def _say_others(folder: Path, others: Sequence[Path]) -> None:
    if others:
        suffixes = Counter(path.suffix.lower() or "without suffix" for path in others)
        counts = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))
        log.warning("%s: files that are no pictures of a class are left out: %s", folder, counts)


def _files_in(folder: Path) -> list[Path]:
    """List all files in a folder and below, linked ones too, but none of the folders above it."""
    above = folder.absolute().parent.resolve()
    return _below(folder, (above, *above.parents))


def _below(folder: Path, above: Sequence[Path]) -> list[Path]:
    """List all files in a folder, but none of those above it that are linked there."""
    here = folder.resolve()
    if here in above:
        return []
    files: list[Path] = []
    for path in unhidden(folder):
        files += _below(path, (*above, here)) if path.is_dir() else [path]
    return sorted(files)
