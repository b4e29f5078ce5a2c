"""What trained weights expect to be done to pictures: their size, mean and deviation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from impatient import checks
from impatient.errors import DataError
from impatient.portable.pictures import resized

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

How = Literal["fit", "shorter", "stretch"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
# Two ways of resizing differ by rounding; a wrong size or filter differs by more.
TOLERANCE = 2 / 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Resizing:
    """How a picture of any size becomes one of the size that a network takes.

    Attributes:
        how: "fit" cuts out the largest centred part with the right proportions and resizes it;
            "shorter" resizes the shorter side and cuts out the centre; "stretch" resizes both
            sides, and cuts out the centre.
        before: height and width before the centre is cut out, for "shorter" and "stretch".
        interpolation: filter, as Pillow calls it.
        rounds_down: whether the centre begins at the pixel before, where it would be between two;
            otherwise at the even one, as in torchvision.
    """

    how: How = "fit"
    before: tuple[int, int] = (0, 0)
    interpolation: Interpolation = "bilinear"
    rounds_down: bool = False

    def __post_init__(self) -> None:
        checks.one_of(DataError, How, how=self.how)
        checks.one_of(DataError, Interpolation, interpolation=self.interpolation)
        if (self.how == "fit") != (min(self.before) == 0):
            raise DataError(
                f"how={self.how!r} and before={self.before}; expected the size before the centre "
                "is cut out, which 'fit' has not. Train again, or say size= in the data spec."
            )

    def __call__(self, picture: Image, size: tuple[int, int]) -> Image:
        """Resize a picture to a height and width."""
        return resized(
            picture,
            size,
            how=self.how,
            before=self.before,
            interpolation=self.interpolation,
            rounds_down=self.rounds_down,
        )

    def __str__(self) -> str:
        """Say what is done to pictures of another size."""
        if self.how == "fit":
            how = "the largest centred part with its proportions is"
        elif self.how == "shorter":
            how = f"the shorter side becomes {self.before[0]} pixels, and the centre is"
        else:
            how = f"both sides become {_by(self.before)} pixels, and the centre is"
        return f"{how} cut out ({self.interpolation})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """What trained weights expect to be done to pictures of 0 to 1.

    Attributes:
        mean: mean per channel that is subtracted.
        std: deviation per channel that the result is divided by.
        size: height and width of the input.
        resizing: how pictures of other sizes come to this one.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    resizing: Resizing

    def at(self, size: tuple[int, int] | None) -> Transform:
        """Make one for another size, in proportion.

        None leaves it.
        """
        if size in (None, self.size):
            return self
        before = tuple(
            round(old * new / own)
            for old, new, own in zip(self.resizing.before, size, self.size, strict=True)
        )
        resizing = replace(self.resizing, before=(before[0], before[1]))
        return replace(self, size=size, resizing=resizing)

    def for_channels(self, channels: int) -> Transform:
        """Make one for another number of channels: one channel has the mean of all.

        Raises:
            DataError: if neither is one.
        """
        if channels == len(self.mean):
            return self
        if channels == 1:
            mean, std = (sum(part) / len(part) for part in (self.mean, self.std))
            return replace(self, mean=(mean,), std=(std,))
        if len(self.mean) == 1:
            return replace(self, mean=self.mean * channels, std=self.std * channels)
        raise DataError(
            f"the weights expect pictures of {len(self.mean)} channels, and these have {channels}; "
            "expected as many. Say mean= and std= in the data spec, with a number per channel."
        )


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


# --- of each library ------------------------------------------------------------------------------


def of_torchvision(models: Any, name: str, weights: Any) -> Transform | None:
    """Read what torchvision says of some weights."""
    chosen = weights
    if isinstance(weights, str):
        full = "." in weights
        chosen = models.get_weight(weights) if full else models.get_model_weights(name)[weights]
    theirs = chosen.transforms()
    if not hasattr(theirs, "crop_size"):
        return None
    side = theirs.resize_size[0]
    height, width = (theirs.crop_size * 2)[:2]
    found = Transform(
        mean=tuple(theirs.mean),
        std=tuple(theirs.std),
        size=(height, width),
        resizing=Resizing(
            how="shorter", before=(side, side), interpolation=theirs.interpolation.value
        ),
    )
    return _checked(found, theirs, f"weights {chosen.name} of torchvision's {name}")


def of_timm(timm: Any, full: str) -> Transform | None:
    """Read what timm says of a model, without loading its weights."""
    if full.startswith("local-dir:"):
        from impatient.files import read_json

        about = read_json(Path(full.removeprefix("local-dir:")) / "config.json")["pretrained_cfg"]
    elif full.startswith("hf-hub:"):
        about = timm.create_model(full, pretrained=False).pretrained_cfg
    else:
        about = timm.get_pretrained_cfg(full).to_dict()
    config = timm.data.resolve_data_config(pretrained_cfg=about)
    _, height, width = config["input_size"]
    before = (int(height / config["crop_pct"]), int(width / config["crop_pct"]))
    found = Transform(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        size=(height, width),
        resizing=Resizing(
            how="stretch" if config["crop_mode"] == "squash" else "shorter",
            before=before,
            interpolation=config["interpolation"],
        ),
    )
    return _checked(found, timm.data.create_transform(**config), f"timm's {full}")


def of_transformers(transformers: Any, name: str) -> Transform | None:
    """Read the preprocessor_config.json of a pretrained model, if it has one for pictures."""
    file = "preprocessor_config.json"
    if Path(name).is_dir() and not (Path(name) / file).is_file():
        return None
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as reason:
        # A network for texts or sound, or a processor that is not of pictures.
        log.info("%s has no preprocessing of pictures: %s", name, reason)
        return None

    def theirs(picture: Image) -> Any:
        return processor(images=picture, return_tensors="pt")["pixel_values"][0]

    found = _of_processor(processor)
    return None if found is None else _checked(found, theirs, f"{file} of {name}")


def _of_processor(processor: Any) -> Transform | None:
    """Turn an image processor's settings into a transform, or None if it does not resize."""
    from PIL import Image

    said = processor.to_dict()
    size = said.get("size") or {}
    crop = (said.get("crop_size") or {}) if said.get("do_center_crop") else {}
    if not said.get("do_resize") or not {"shortest_edge", "height"} & {*size, *crop}:
        return None
    short = size.get("shortest_edge")
    final = crop or ({"height": short, "width": short} if short else size)
    before = (short, short) if short else (size["height"], size["width"])
    how: How = "shorter" if short else "stretch"
    if short and not crop and said.get("crop_pct"):
        # ConvNeXt's is larger before the centre is cut out, or stretched if it is large anyway.
        side = int(short / said["crop_pct"])
        how, before = ("shorter", (side, side)) if short < 384 else ("stretch", before)
    normalised = said.get("do_normalize")
    named: Any = Image.Resampling(int(said["resample"])).name.lower()
    return Transform(
        mean=tuple(said["image_mean"]) if normalised else (0.0,),
        std=tuple(said["image_std"]) if normalised else (1.0,),
        size=(final["height"], final["width"]),
        resizing=Resizing(
            how=how,
            before=before,
            rounds_down=True,
            interpolation=named,
        ),
    )


def _checked(found: Transform, theirs: Callable[[Image], Any], source: str) -> Transform | None:
    """Compare a transform with the library's own on a made-up picture."""
    from PIL import Image

    # Smooth, so that rounding differs little, and with other proportions than the input.
    rows, columns = np.mgrid[0:150, 0:210]
    waves = [np.sin(rows / 17 + shift) * np.cos(columns / 23) for shift in (0, 1, 2)]
    picture = Image.fromarray(np.uint8(127 + 100 * np.stack(waves, -1)))
    wanted = np.asarray(theirs(picture))
    mine = np.asarray(found.resizing(picture, found.size), dtype=np.float32).transpose(2, 0, 1)
    shape = (-1, 1, 1)
    scaled = (mine / 255 - np.reshape(found.mean, shape)) / np.reshape(found.std, shape)
    difference = np.abs(scaled - wanted) if scaled.shape == wanted.shape else np.array(np.inf)
    if float(difference.mean()) * max(found.std) <= TOLERANCE:
        return found
    log.warning(
        "%s: what is to be done to pictures is none of the ways known here; they are standardised "
        "by the data instead. Say size=, mean= and std= in the data spec.",
        source,
    )
    return None
