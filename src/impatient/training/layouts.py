"""Tell the dimensions of arrays, and convert their numbers."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from impatient.errors import DataError

log = logging.getLogger(__name__)

# Numbers of channels by which a picture is known.
USUAL_CHANNELS = (1, 3, 4)


def as_input(inputs: np.ndarray, where: str, layout: str = "") -> Tensor:
    """Convert an array to what a network takes.

    Pictures become [N, C, H, W], and anything else keeps its dimensions.

    Args:
        inputs: pictures, series, vectors or token ids, [N, ...].
        where: name of the array in errors.
        layout: what each dimension is; empty to go by shape and type.
    Raises:
        DataError: if values are no finite numbers, or the array can be read in several ways.
    """
    letters = _checked_layout(inputs, where, layout) if layout else _layout(inputs, where)
    picture = "H" in letters
    values = as_numbers(inputs, where, ids=letters == "NT", picture=picture)
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if letters == "NHW":
        return tensor[:, None]
    return tensor.permute(0, 3, 1, 2).contiguous() if letters == "NHWC" else tensor


def _checked_layout(inputs: np.ndarray, where: str, layout: str) -> str:
    if len(layout) != inputs.ndim:
        raise DataError(
            f"{where}: layout={layout} has {len(layout)} dimensions, but the inputs have shape "
            f"{inputs.shape}; expected a letter per dimension."
        )
    if layout == "NT" and inputs.dtype.kind not in "iu":
        raise DataError(
            f"{where}: layout=NT is for token ids, but the inputs are {inputs.dtype}; expected "
            "integers. Say layout=ND for features."
        )
    return layout


def _layout(inputs: np.ndarray, where: str) -> str:
    """Tell the dimensions of an array that leaves one reading.

    "N..." are dimensions that stay as they are.
    """
    dims = inputs.ndim
    whole = inputs.dtype.kind in "iu" and inputs.dtype != np.uint8
    if whole and dims == 2:
        if inputs.min() >= 0:
            return "NT"
        raise _ambiguous(
            inputs, where, "token ids, which are not negative", "ND", "measured numbers"
        )
    if whole:
        raise _ambiguous(
            inputs,
            where,
            "pictures or token ids" if dims == 4 else "series or token ids",
            "NHWC or layout=NCHW" if dims == 4 else "NCT or layout=NTC",
            "pictures (save them as uint8, or as floats from 0 to 1)" if dims == 4 else "series",
        )
    if dims == 3 and inputs.dtype == np.uint8:
        return "NHW"
    if dims == 3 and inputs.dtype.kind == "f":
        if inputs.shape[1] == inputs.shape[2]:
            raise _ambiguous(
                inputs, where, "grey pictures or series", "NHW", "pictures, NCT or NTC for series"
            )
        log.info("%s: %s is taken for series; grey pictures need layout=NHW", where, inputs.shape)
    return _picture_layout(inputs, where) if dims == 4 else "N..."


def _picture_layout(inputs: np.ndarray, where: str) -> str:
    """Tell whether pictures have their channels first or last."""
    first, second, third = inputs.shape[1:]
    can_be_first = first in USUAL_CHANNELS
    can_be_last = third in USUAL_CHANNELS
    if can_be_first != can_be_last:
        return "NCHW" if can_be_first else "NHWC"
    square_first = second == third
    square_last = first == second
    if square_first != square_last:
        return "NCHW" if square_first else "NHWC"
    raise _ambiguous(
        inputs, where, "pictures with channels first or last", "NCHW", "the first, NHWC the last"
    )


def _ambiguous(
    inputs: np.ndarray, where: str, readings: str, layout: str, meaning: str
) -> DataError:
    return DataError(
        f"{where}: inputs of shape {inputs.shape} and type {inputs.dtype} could be {readings}; "
        f"expected to be told. Say layout={layout} for {meaning}."
    )


def as_numbers(
    inputs: np.ndarray, where: str, *, ids: bool = True, picture: bool = False
) -> np.ndarray:
    """Convert to float32, uint8 or int64, whichever fits.

    Args:
        ids: integers that are not bytes, and booleans, are token ids or masks; otherwise they are
            measured.
        picture: integers are brightness, from 0 to 255 or 65535.
    """
    if np.issubdtype(inputs.dtype, np.floating):
        with np.errstate(over="ignore"):
            inputs = inputs.astype(np.float32)
        if not np.isfinite(inputs).all():
            raise DataError(
                f"{where}: {int((~np.isfinite(inputs)).sum())} input values are NaN or infinite; "
                "clean them first."
            )
        return inputs
    if inputs.dtype.kind not in "iub":
        raise DataError(
            f"{where}: inputs are {inputs.dtype}; expected floats, bytes (uint8) or token ids "
            "(integers)."
        )
    if inputs.dtype == np.uint8:
        return inputs
    if picture and inputs.dtype.kind != "b":
        return _brightness(inputs, where)
    return inputs.astype(np.int64 if ids else np.float32)


def _brightness(inputs: np.ndarray, where: str) -> np.ndarray:
    """Convert wide integers to bytes, or 16 bits to floats."""
    least, most = int(inputs.min()), int(inputs.max())
    if least < 0 or most > 65535:
        raise DataError(
            f"{where}: pictures hold numbers from {least} to {most}; expected 0 to 255, or 0 to "
            "65535 for 16 bits. Save them as floats."
        )
    if inputs.dtype == np.uint16:
        return inputs.astype(np.float32) / np.float32(65535.0)
    if most > 255:
        raise DataError(
            f"{where}: pictures of type {inputs.dtype} hold numbers up to {most}; expected at most "
            "255. Save 16 bits as uint16."
        )
    return inputs.astype(np.uint8)
