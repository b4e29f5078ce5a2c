"""The papers' data sets from the shared data folder, and smaller training sets.

Files are converted once. The smaller sets are balanced over classes and chosen by a seed.
"""

from __future__ import annotations

import dataclasses
import os
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from impatient import Data, load_data
from impatient.errors import DataError
from impatient.files import written_whole
from impatient.provenance import fingerprint_bytes
from impatient.training.examples import Examples

ROOT = Path(__file__).parent.parent
CONVERTED = ROOT / "runs" / "data"
SHARED_NAMES = {"fashion": "fashion_mnist", "cifar10": "cifar10", "gtsrb": "gtsrb32"}
# of a text of AG News: what is behind is cut off, rarer words are one
TOKENS = 64
WORDS = 20_000


def shared_folder() -> Path:
    """Return the folder of the shared data.

    It is named by the environment variable IMPATIENT_DATA, or is ../shared/data.

    Raises:
        DataError: if there is no load.py.
    """
    named = os.environ.get("IMPATIENT_DATA")
    folder = Path(named).expanduser() if named else ROOT.parent / "shared" / "data"
    if not (folder / "load.py").is_file():
        raise DataError(
            f"no shared data: {folder} has no load.py. Set IMPATIENT_DATA to the folder that has "
            "it, or run --scale smoke, which needs only scikit-learn's digits."
        )
    return folder


def data_spec(name: str, folder: Path = CONVERTED) -> str:
    """Return the data spec of a data set, and convert its file if needed.

    Images are "digits", "fashion" (1x28x28), "cifar10" (3x32x32), "gtsrb" (3x32x32) and
    "cifar10_grey" (1x28x28). Token ids are "ag_news" (64 of 20,002; 0 is padding, the last one
    stands for all rarer words) and "digits_tokens" (64 pixels; 18). All but the digits are written
    as one npz file under `folder` when they are first asked for. Grey images of CIFAR-10 are
    weighted by ITU-R 601 and cropped to the middle 28x28.

    Raises:
        DataError: if there is no such set, or no shared data to make it from.
    """
    if name == "digits":
        return "digits"
    path = folder / f"{name}.npz"
    if not path.is_file():
        _write(path, _arrays(name))
    return f"npz:{path}"


def _arrays(name: str) -> dict[str, np.ndarray]:
    if name == "cifar10_grey":
        colour = _arrays("cifar10")
        return {
            key: _grey(array) if key.startswith("x_") else array for key, array in colour.items()
        }
    if name in TEXTS:
        return TEXTS[name]()
    if name not in SHARED_NAMES:
        known = ["digits", "cifar10_grey", *TEXTS, *SHARED_NAMES]
        raise DataError(f"no data set {name!r}; there are {', '.join(known)}.")
    folder = shared_folder()
    tools = runpy.run_path(str(folder / "load.py"))
    x_train, y_train, x_test, y_test = tools["images"](SHARED_NAMES[name], folder=folder)
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    # one sign was photographed many times: a track lies whole on one side of the validation split
    if name == "gtsrb":
        arrays["groups_train"] = y_train.astype(np.int64) * 10_000 + _tracks(folder)
    return arrays


def _ag_news() -> dict[str, np.ndarray]:
    folder = shared_folder()
    tools = runpy.run_path(str(folder / "load.py"))
    arrays: dict[str, np.ndarray] = {}
    for split, (ids, lengths, labels) in zip(
        ("train", "test"), tools["ag_news"](folder / "ag_news_ids.npz.xz"), strict=True
    ):
        arrays |= {f"x_{split}": padded(ids, lengths), f"y_{split}": labels}
    return arrays


def padded(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Make rows of `TOKENS` ids from texts that are stored one after the other.

    Rows are cut off or filled with 0. Ids from `WORDS` on become one id.

    Example:
        >>> padded(np.array([5, 30_000, 7]), np.array([2, 1]))[:, :3].tolist()
        [[5, 20001, 0], [7, 0, 0]]
    """
    begins = np.cumsum(lengths, dtype=np.int64) - lengths
    places = begins[:, None] + np.arange(TOKENS)
    there = np.arange(TOKENS) < lengths[:, None]
    known = np.where(ids <= WORDS, ids, WORDS + 1)
    return np.where(there, known[np.minimum(places, len(ids) - 1)], 0).astype(np.uint16)


def _digits_tokens() -> dict[str, np.ndarray]:
    """Make token ids without shared data, from the digits' pixels as 64 words."""
    digits = load_data("digits")
    parts = {
        "train": [digits.examples("train"), digits.examples("validation")],
        "test": [digits.examples("test")],
    }
    arrays = {}
    for split, pieces in parts.items():
        pixels = (
            torch.cat([piece.take(range(len(piece.labels))) for piece in pieces]).flatten(1).numpy()
        )
        arrays[f"x_{split}"] = (np.round(pixels * (16.0 / 255.0)) + 1).astype(np.uint16)
        arrays[f"y_{split}"] = torch.cat([piece.labels for piece in pieces]).numpy()
    return arrays


TEXTS: dict[str, Callable[[], dict[str, np.ndarray]]] = {
    "ag_news": _ag_news,
    "digits_tokens": _digits_tokens,
}


def _tracks(folder: Path) -> np.ndarray:
    parts = [np.load(folder / f"gtsrb32_train_{part}.npz")["track_train"] for part in "ab"]
    return np.concatenate(parts).astype(np.int64)


def _grey(images: np.ndarray) -> np.ndarray:
    grey = images[:, 2:30, 2:30].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return grey.round().astype(np.uint8)


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def subset(
    data: Data,
    train: int | None,
    seed: int,
    *,
    validation: int | None = None,
    test: int | None = None,
) -> Data:
    """Reduce the training examples of a data set, evenly over classes where possible.

    Args:
        data: from `load_data`.
        train: how many training examples to keep; None, or more than there are, keeps all.
        seed: of the choice.
        validation: likewise for the validation split.
        test: likewise for the test split, whose choice is the same for all seeds.
    """
    wanted = {"train": train, "validation": validation, "test": test}
    splits = {
        split: _part(data.examples(split), wanted.get(split), 0 if split == "test" else seed)
        for split in data.splits
    }
    if all(len(splits[split].labels) == data.size(split) for split in splits):
        return data
    which = f"{train}|{validation}|{seed}" + ("" if test is None else f"|{test}")
    fingerprint = fingerprint_bytes(data.fingerprint.encode(), which.encode())
    return dataclasses.replace(data, splits=splits, fingerprint=fingerprint)


def load(
    name: str, *, train: int | None, validation: int | None, seed: int, test: int | None = None
) -> Data:
    """Load a data set with `data_spec`, `load_data` and `subset`.

    `seed` determines the validation split and the choice of examples.
    """
    data = load_data(data_spec(name), seed=seed)
    return subset(data, train, seed, validation=validation, test=test)


def _part(examples: Examples, count: int | None, seed: int) -> Examples:
    if count is None or count >= len(examples.labels):
        return examples
    if count < 1:
        raise DataError(f"{count} examples wanted of {len(examples.labels)}; expected at least 1.")
    return examples.subset(_balanced(examples.labels.numpy(), count, seed))


def _balanced(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose `count` examples evenly over classes, and keep their order.

    The classes take turns, in random order, while they have examples left.
    """
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(labels))
    # the how-manieth of its class each example is
    turn = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        own = shuffled[labels[shuffled] == label]
        turn[own] = np.arange(len(own))
    first = shuffled[np.argsort(turn[shuffled], kind="stable")]
    return np.sort(first[:count])
