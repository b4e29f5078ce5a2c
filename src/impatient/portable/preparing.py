"""Prepare raw inputs for an exported network: pictures, and arrays of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from .errors import BundleError
from .pictures import PictureError, plain, resized
from .staged import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """Conversion of raw inputs to the input of the network, as in training.

    Attributes:
        mean: mean per channel, or one for all; empty for inputs that are not changed.
        std: standard deviation per channel, or one for all; empty like the mean.
        channels_at: dimension of the channels.
        size: height and width of pictures; None where the network takes none.
        channels: number of channels of pictures.
        resizing: how pictures of other sizes come to this one.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_at: int
    size: tuple[int, int] | None
    channels: int
    resizing: Mapping[str, Any]

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Self:
        """Read one from JSON."""
        size = value["size"]
        return cls(
            mean=tuple(map(float, value["mean"])),
            std=tuple(map(float, value["std"])),
            channels_at=int(value["channels_at"]),
            size=None if size is None else (int(size[0]), int(size[1])),
            channels=int(value["channels"]),
            resizing=dict(value["resizing"]),
        )

    def __call__(self, raw: Array) -> Array:
        """Convert raw inputs, batch first: bytes become 0 to 1, then they are standardised."""
        if not self.mean:
            return raw.astype(np.float32) if raw.dtype == np.uint8 else raw
        x = raw.astype(np.float32)
        x = x / np.float32(255.0) if raw.dtype == np.uint8 else x
        shape = [1] * raw.ndim
        shape[self.channels_at] = -1
        mean, std = (np.array(row, np.float32).reshape(shape) for row in (self.mean, self.std))
        prepared: Array = (x - mean) / std
        return prepared

    def picture(self, path: Path) -> Array:
        """Read a picture as raw input [1, C, H, W], uint8.

        Raises:
            BundleError: if the network takes no pictures, Pillow is missing, or the file is none.
        """
        if self.size is None:
            raise BundleError(
                f"cannot read {path}: this network takes no pictures; expected a .npy or .npz file."
            )
        try:
            from PIL import Image
        except ImportError as error:
            raise BundleError(
                f"reading {path} needs Pillow, which is not installed: pip install pillow."
            ) from error
        try:
            with Image.open(path) as image:
                seen = plain(image, self.channels, str(path))
                settings = {**self.resizing, "before": tuple(self.resizing["before"])}
                pixels = np.array(resized(seen, self.size, **settings))
        except PictureError as error:
            raise BundleError(str(error)) from error
        except Exception as error:
            # Pillow raises OSError, SyntaxError, ValueError, struct.error and others.
            raise BundleError(f"{path} cannot be read as a picture: {error}.") from error
        turned = pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)
        return np.ascontiguousarray(turned)[None]
