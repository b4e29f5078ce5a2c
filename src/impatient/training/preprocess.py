"""Convert raw inputs to the input of a network."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from impatient import checks
from impatient.errors import DataError
from impatient.networks.transforms import Resizing, Transform
from impatient.training.examples import Examples
from impatient.training.options import DataOptions
from impatient.training.pictures import image_tensor, read_image
from impatient.trees import map_leaves, size


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """Conversion of raw inputs to the input of a network.

    Bytes are scaled to [0, 1]. Then the mean is subtracted and the result divided by the standard
    deviation.

    Attributes:
        mean: mean per channel, or one for all; empty for inputs that are not changed, such as token
            ids. Bytes then become floats from 0 to 255.
        std: standard deviation per channel, or one for all; empty like the mean.
        size: height and width of images; None for other inputs.
        channels: number of channels of images; 0 for other inputs.
        channels_at: dimension of the channels: 1, or -1 for series [N, T, C].
        dtype: type of the raw inputs that it was fitted on: "uint8", "float32" or "int64"; empty if
            that is not known.
        resizing: how pictures in files come to this size.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None
    channels: int = 0
    channels_at: int = 1
    dtype: str = ""
    resizing: Resizing = field(default_factory=Resizing)

    def __post_init__(self) -> None:
        known = not self.channels or len(self.mean) in (0, self.channels)
        fit = len(self.mean) == len(self.std) and known and self.channels_at in (1, -1)
        if not fit or not all(map(math.isfinite, self.mean)):
            raise DataError(
                f"mean={self.mean} and std={self.std} for {self.channels} channels; expected a "
                "finite number of each per channel."
            )
        for std in self.std:
            checks.positive(DataError, std=std)

    def __call__(self, raw: Any) -> Any:
        """Convert raw inputs, batch first, on the device of `raw`.

        A tree of them stays a tree.

        Raises:
            DataError: if `raw` is no tensor, or has other channels than the mean.
        """
        if not self.mean:
            return map_leaves(_as_floats, raw)
        self._check_tensor(raw)
        x = raw.float().div_(255.0) if raw.dtype == torch.uint8 else raw.float()
        shape = [1] * raw.dim()
        shape[self.channels_at] = -1
        mean = torch.tensor(self.mean, device=x.device).view(shape)
        std = torch.tensor(self.std, device=x.device).view(shape)
        return (x - mean) / std

    def _check_tensor(self, raw: Any) -> None:
        given = type(raw).__name__
        if isinstance(raw, Tensor):
            given = f"a tensor of shape {tuple(raw.shape)}"
            at = self.channels_at % max(1, raw.dim())
            if raw.dim() > at and len(self.mean) in (1, raw.shape[at]):
                return
        expected = f"a tensor with {len(self.mean)} channels in dimension {self.channels_at}"
        advice = "Convert it, such as by torch.as_tensor(numbers)[None] for a single sample."
        if self.channels:
            expected = "a tensor [N, C, H, W]"
            advice = (
                "A frame [H, W, C] becomes one by torch.as_tensor(frame).permute(2, 0, 1)[None]; "
                ".image(FILE) reads a picture."
            )
        raise DataError(f"inputs to preprocess are {given}; expected {expected}. {advice}")

    def __str__(self) -> str:
        """Say what is done to inputs, in one sentence."""
        resized = ""
        if self.size is not None:
            resized = f"; of pictures of other sizes than {self.size[0]}x{self.size[1]}, "
            resized += str(self.resizing)
        if not self.mean:
            kept = "bytes reach the network as numbers from 0 to 255"
            as_they_are = "numbers reach the network as they are"
            return f"{kept if self.dtype == 'uint8' else as_they_are}{resized}"
        shown = [
            ", ".join(f"{number:.4g}" for number in numbers[:4]) + ", ..." * (len(numbers) > 4)
            for numbers in (self.mean, self.std)
        ]
        scaled = "bytes are scaled to [0, 1], then " if self.channels else ""
        return (
            f"{scaled}the mean {shown[0]} is subtracted, and divided by the deviation {shown[1]}"
            f"{resized}"
        )

    def checked(self, raw: Tensor, where: str) -> Tensor:
        """Convert raw inputs to the type that the network was trained on.

        Raises:
            DataError: if their values do not fit in, or are not finite.
        """
        if not torch.isfinite(raw.float()).all():
            raise DataError(f"{where} holds NaN or infinite values; expected finite numbers.")
        wanted = self.dtype or str(raw.dtype).removeprefix("torch.")
        if wanted == "float32":
            raw = raw.float()
        whole = not raw.is_floating_point() and not raw.is_complex()
        fits = whole or wanted == "float32"
        if wanted == "uint8" and raw.dtype != torch.uint8:
            whole = whole and raw.dtype != torch.bool
            fits = whole and bool(((raw >= 0) & (raw <= 255)).all())
            raw = raw.to(torch.uint8) if fits else raw
        if not fits:
            raise DataError(
                f"{where} holds {str(raw.dtype).removeprefix('torch.')}; the network was trained "
                f"on {wanted}. Convert it to {wanted}: "
                f"{'pixels are from 0 to 255' if wanted == 'uint8' else 'token ids are integers'}."
            )
        return raw

    def image(self, picture: str | Path | Image.Image) -> Tensor:
        """Read a picture as raw input [1, C, H, W], uint8, resized.

        Args:
            picture: a file, or a picture of Pillow, such as `Image.fromarray(frame)`.
        Raises:
            DataError: if the file is missing or not an image, or if the network does not take
                images.
        """
        if self.size is None:
            raise DataError(
                f"cannot read {picture}: this network was trained on inputs that are not images."
            )
        if isinstance(picture, Image.Image):
            read = image_tensor(picture, self.size, self.channels, "the picture", self.resizing)
        else:
            read = read_image(Path(picture), self.size, self.channels, self.resizing)
        return read[None]


def _as_floats(raw: Tensor) -> Tensor:
    return raw.float() if raw.dtype == torch.uint8 else raw


def as_expected(
    name: str, train: Examples, options: DataOptions, transform: Transform
) -> DataOptions:
    """Fill in the mean and deviation that trained weights expect, where the user says none.

    Raises:
        DataError: if the pictures do not go from 0 to 1, which the weights expect.
    """
    if options.mean or options.normalise:
        return options
    count = size(train.labels)
    sample = train.take(range(0, count, max(1, count // 200)))
    if not isinstance(sample, Tensor) or sample.dim() != 4:
        return options
    least, most = sample.min().item(), sample.max().item()
    if sample.dtype != torch.uint8 and not 0 <= least <= most <= 1:
        raise DataError(
            f"{name}: pictures hold numbers from {least:g} to {most:g}, but the weights of the "
            "model expect 0 to 1 before mean and deviation. Say normalise=none if these numbers "
            "are what they expect; or mean= and std=; or normalise=fit for those of the data."
        )
    expected = transform.for_channels(sample.shape[1])
    return dataclasses.replace(options, mean=expected.mean, std=expected.std)


def fit_preprocess(
    train: Examples, options: DataOptions, resizing: Resizing, most: int = 2000
) -> Preprocess:
    """Compute mean and standard deviation of up to `most` training inputs.

    They are computed per channel for images and over all features for vectors.
    """
    count = size(train.labels)
    fitted = options.normalise != "none" and not options.mean
    step = max(1, count // most) if fitted else count
    sample = train.take(range(0, count, step))
    if not isinstance(sample, Tensor) or sample.dtype in (torch.int64, torch.int32):
        if options.mean:
            raise DataError(
                f"mean={list(options.mean)} for token ids or several inputs; expected one array of "
                "measured numbers. Leave mean and std away."
            )
        kind = str(sample.dtype).removeprefix("torch.") if isinstance(sample, Tensor) else ""
        return Preprocess(mean=(), std=(), dtype=kind)
    image = sample.dim() == 4
    channels_at = -1 if options.layout == "NTC" else 1
    channels = sample.shape[channels_at]
    mean, std = _fitted(sample, channels_at) if fitted else (options.mean, options.std)
    if options.mean and image:
        mean, std = (numbers * (channels if len(numbers) == 1 else 1) for numbers in (mean, std))
    if len(mean) not in (0, 1, channels) or len(mean) != len(std):
        raise DataError(
            f"mean={list(mean)} and std={list(std)} for {channels} channels; expected one number "
            "of each, or one per channel."
        )
    return Preprocess(
        mean=mean,
        std=std,
        size=(sample.shape[2], sample.shape[3]) if image else None,
        channels=channels if image else 0,
        channels_at=channels_at,
        dtype=str(sample.dtype).removeprefix("torch."),
        resizing=resizing,
    )


def _fitted(sample: Tensor, channels_at: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute mean and standard deviation, per channel if there is more than features."""
    values = sample.float() / (255.0 if sample.dtype == torch.uint8 else 1.0)
    several = tuple(dim for dim in range(values.dim()) if dim != channels_at % values.dim())
    dims = several if values.dim() > 2 else tuple(range(values.dim()))
    mean = values.mean(dims).reshape(-1)
    std = values.std(dims).reshape(-1).clamp_min(1e-3)
    return (
        tuple(round(float(value), 6) for value in mean),
        tuple(round(float(value), 6) for value in std),
    )
