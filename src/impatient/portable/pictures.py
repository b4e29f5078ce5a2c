"""Read pictures as a viewer shows them, with numpy and Pillow alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

# The EXIF tag of how a picture is turned; from 5 on, height and width change places.
_ORIENTATION = 0x0112
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class PictureError(Exception):
    """A picture has no brightness from 0 to 1."""


def orientation(image: Image) -> int:
    """Return how a picture is turned, by the number that EXIF data give it."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # Damaged EXIF data; a viewer shows the picture as it is stored.
        return 1


def plain(image: Image, channels: int, name: str) -> Image:
    """Convert a picture to 8 bits, upright and without transparency.

    It is turned as its EXIF data say, 16 bits become 8, and what is transparent becomes white.

    Args:
        image: the picture.
        channels: 1, 3 or 4.
        name: name of the picture in errors.
    Raises:
        PictureError: if the picture is of a kind that has no brightness from 0 to 1.
    """
    import PIL.Image
    from PIL import ImageOps

    image.load()
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise PictureError(
            f"{name} holds floating-point numbers, whose range is unknown; save it with 8 or 16 "
            "bits, or put the numbers into an npz file."
        )
    if image.mode.startswith("I"):
        numbers = np.asarray(image).astype(np.int64)
        if numbers.min() < 0 or numbers.max() > 65535:
            raise PictureError(
                f"{name} holds numbers from {numbers.min()} to {numbers.max()}; expected 16 bits, "
                "0 to 65535."
            )
        image = PIL.Image.fromarray(np.round(numbers / 257.0).astype(np.uint8))
    if channels != 4 and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        seen = image.convert("RGBA")
        if np.asarray(seen)[..., 3].min() < 255:
            white = PIL.Image.new("RGBA", seen.size, "white")
            image = PIL.Image.alpha_composite(white, seen)
    return image.convert(MODES[channels])


def resized(
    picture: Image,
    size: tuple[int, int],
    *,
    how: str,
    before: tuple[int, int],
    interpolation: str,
    rounds_down: bool,
) -> Image:
    """Resize a picture to a height and width.

    The arguments are the attributes of `impatient.networks.Resizing`.
    """
    import PIL.Image
    from PIL import ImageOps

    tool = PIL.Image.Resampling[interpolation.upper()]
    if how == "fit":
        same = (picture.height, picture.width) == size
        return picture if same else ImageOps.fit(picture, (size[1], size[0]), tool)
    height, width = before
    if how == "shorter":
        # As torchvision rounds.
        shorter = min(picture.height, picture.width)
        height = int(before[0] * picture.height / shorter)
        width = int(before[0] * picture.width / shorter)
    if (picture.height, picture.width) != (height, width):
        picture = picture.resize((width, height), tool)
    rounded = int if rounds_down else round
    top = rounded((height - size[0]) / 2)
    left = rounded((width - size[1]) / 2)
    return picture.crop((left, top, left + size[1], top + size[0]))
