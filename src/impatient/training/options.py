"""Options of data specs, such as "npz:FILE:layout=NHWC,mean=0.5,std=0.25"."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from impatient import checks
from impatient.errors import DataError

# What each letter of a layout means; N is always first.
LETTERS = {
    "N": "samples",
    "H": "height",
    "W": "width",
    "C": "channels",
    "T": "time or tokens",
    "D": "features",
}
LAYOUTS = ("NHW", "NHWC", "NCHW", "NCT", "NTC", "NT", "ND")
EXAMPLES = {
    "size": "size=64 or size=48x64 (height and width in pixels)",
    "layout": f"layout= one of {', '.join(LAYOUTS)}",
    "mean": "mean=0.5 or mean=[0.5,0.4,0.4] (one number, or one per channel)",
    "std": "std=0.25 or std=[0.2,0.2,0.3]",
    "normalise": "normalise=none (numbers pass as they are) or normalise=fit",
    "labels": "labels=renumber (classes are numbered anew from 0) or labels=onehot (rows of zeros "
    "with a single 1 are classes)",
    "budget": "budget=NAME (of the seconds that each sample may take)",
    "masks": "masks=FOLDER (of the maps of classes beside the pictures)",
    "images": "images=FOLDER (of the pictures, beside masks=)",
    "tokenizer": "tokenizer=NAME-OR-DIR (of transformers)",
    "text": "text=COLUMN (or text=FIRST+SECOND)",
    "label": "label=COLUMN",
    "length": "length=128 (most tokens of a text)",
}
PICTURE_OPTIONS = ("size", "mean", "std", "normalise")
MAP_OPTIONS = ("masks", "images", "labels")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """What a data spec says besides its source.

    Attributes:
        size: height and width that pictures are cut and resized to; None for their own size.
        layout: what each dimension of the arrays is; empty to go by shape and type.
        mean: mean to subtract, one number or one per channel; empty to fit it.
        std: standard deviation to divide by, one number or one per channel; empty to fit it.
        normalise: "fit" for mean and deviation of the training split, "none" for no change; empty
            for what trained weights expect, or else "fit".
        labels: "renumber" to number the classes anew from 0; "onehot" for rows of zeros with a
            single 1, at the place of the class; "keep" to take them as they are.
        budget: name of the column or array of the seconds that each sample may take; empty if
            there is none.
        masks: name of the folders of maps, which hold a class for every pixel; empty if folders
            are classes.
        images: name of the folders of pictures beside `masks`; empty for "images".
        tokenizer: name or folder of the tokenizer for texts.
        text: column of the texts, or two joined by "+"; empty for the usual names.
        label: column of the labels; empty for the usual names.
        length: most tokens of a text; 0 for what the tokenizer says.
    """

    size: tuple[int, int] | None = None
    layout: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    normalise: str = ""
    labels: str = "keep"
    budget: str = ""
    masks: str = ""
    images: str = ""
    tokenizer: str = ""
    text: str = ""
    label: str = ""
    length: int = 0

    def __post_init__(self) -> None:
        checks.one_of(DataError, LAYOUTS, layout=self.layout or LAYOUTS[0])
        checks.one_of(DataError, ("fit", "none"), normalise=self.normalise or "fit")
        checks.one_of(DataError, ("keep", "renumber", "onehot"), labels=self.labels)
        if bool(self.mean) != bool(self.std):
            raise DataError(
                f"mean={list(self.mean)} and std={list(self.std)}; expected both or none of them. "
                "Say mean=0 or std=1 for the one that changes nothing."
            )
        if self.mean and self.normalise == "none":
            raise DataError("normalise=none and mean= contradict each other; say one of them.")

    def require_only(self, *names: str) -> None:
        """Refuse options other than these.

        Raises:
            DataError: if another one is said.
        """
        others = [
            field.name
            for field in dataclasses.fields(self)
            if field.name not in names and getattr(self, field.name) != field.default
        ]
        if others:
            raise DataError(
                f"{', '.join(others)} cannot be said here; expected {', '.join(names)} alone."
            )

    @property
    def said(self) -> str:
        """What the user said that changes inputs or labels, as one text."""
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            # what else is said is in the fingerprint of the examples already
            if field.name in ("layout", "mean", "std", "normalise", "labels")
            and getattr(self, field.name) != field.default
        ]
        return ",".join(changed)


def read_options(rest: str, allowed: tuple[str, ...]) -> tuple[str, DataOptions]:
    """Split "PATH:key=value,key=value" into the path and its options.

    Args:
        rest: a data spec without its source.
        allowed: names of the options that this source has.
    Raises:
        DataError: if an option is unknown, or its value makes no sense.
    """
    path, colon, options = rest.rpartition(":")
    if not colon or "=" not in options:
        return rest, DataOptions()
    found: dict[str, Any] = {}
    for entry in _outer_commas(options):
        key, equals, value = entry.partition("=")
        if not equals or key not in allowed or key in found:
            raise _unreadable(entry, allowed)
        found[key] = _value(key, value, entry, allowed)
    return path, DataOptions(**found)


def _value(key: str, value: str, entry: str, allowed: tuple[str, ...]) -> Any:
    """Read the value of one option."""
    try:
        if key == "size":
            sides = value.split("x")
            if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
                raise ValueError(value)
            return int(sides[0]), int(sides[-1])
        if key == "length":
            if not value.isdecimal() or int(value) < 2:
                raise ValueError(value)
            return int(value)
        if key in ("mean", "std"):
            numbers = tuple(float(each) for each in value.strip("[]").split(","))
            if not all(map(math.isfinite, numbers)):
                raise ValueError(value)
            return numbers
    except ValueError:
        raise _unreadable(entry, allowed) from None
    return value


def _unreadable(entry: str, allowed: tuple[str, ...]) -> DataError:
    listed = "; ".join(EXAMPLES[name] for name in allowed)
    return DataError(f"cannot read the option {entry!r}; expected {listed}.")


def _outer_commas(text: str) -> list[str]:
    """Split a text at its commas, except inside brackets."""
    entries = [""]
    depth = 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            entries.append("")
        else:
            entries[-1] += letter
    return entries
