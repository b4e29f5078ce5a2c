"""Data for the table of tasks: real pictures and texts, and what is drawn on them by a seed.

CIFAR-10, GTSRB and SST-2 lie in a folder of archives (`--data`); without one, at the smoke scale,
the two photographs of scikit-learn and made-up sentences stand in for them.
"""

from __future__ import annotations

import importlib.util
import json
import lzma
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SIDE = 32
# shapes in a picture, and their kinds: disc, square, triangle
MOST_SHAPES = 3
KINDS = 3
# of signs: is it round, triangular, red at its edge, blue, a number, the end of something
SIGNS = 43
SPEEDS = {*range(6), 7, 8}
ENDS = {6, 32, 41, 42}
DANGERS = {11, *range(18, 32)}
ORDERS = set(range(33, 41))
FORBIDDEN = {*SPEEDS, 9, 10, 15, 16, 17}


@dataclass(frozen=True)
class Source:
    """Where raw data come from, and how many of them are used.

    Attributes:
        folder: archives of pictures and texts; None for stand-ins.
        share: factor of all numbers of examples.
    """

    folder: Path | None
    share: float = 1.0

    def count(self, number: int) -> int:
        return max(60, int(number * self.share))

    def pictures(self, name: str, train: int, test: int) -> dict[str, np.ndarray]:
        """Draw some pictures of a set, [N, 32, 32, 3], and their labels, by seed 0."""
        if self.folder is None:
            return _patches(self.count(train), self.count(test))
        spec = importlib.util.spec_from_file_location("load", self.folder / "load.py")
        assert spec is not None
        assert spec.loader is not None
        load = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(load)
        arrays = load.images(name, folder=self.folder)
        draw = np.random.default_rng(0)
        found = {}
        for split, (x, y), number in zip(
            ("train", "test"), (arrays[:2], arrays[2:]), (train, test), strict=True
        ):
            rows = draw.permutation(len(x))[: self.count(number)]
            found |= {f"x_{split}": x[rows], f"y_{split}": y[rows].astype(np.int64)}
        return found

    def sentences(self, train: int) -> dict[str, list[tuple[str, str]]]:
        """Return labels and sentences of SST-2."""
        if self.folder is None:
            draw = np.random.default_rng(0)
            words = [["good", "fine", "great"], ["bad", "dull", "poor"]]
            return {
                split: [
                    (str(label), f"a {draw.choice(words[label])} film " * int(draw.integers(1, 4)))
                    for label in draw.integers(2, size=self.count(number)).tolist()
                ]
                for split, number in {"train": train, "test": 800}.items()
            }
        found = {}
        for split, file in {"train": "sst2_train", "test": "sst2_dev"}.items():
            text = lzma.decompress((self.folder / f"{file}.tsv.xz").read_bytes()).decode("utf-8")
            head, *rows = (line.split("\t", 1) for line in text.splitlines())
            # the other column is called sentence or content
            label = head.index("label")
            sentence = 1 - label
            found[split] = [(row[label], row[sentence]) for row in rows]
        order = np.random.default_rng(0).permutation(len(found["train"]))
        found["train"] = [found["train"][place] for place in order[: self.count(train)]]
        return found


def _patches(train: int, test: int) -> dict[str, np.ndarray]:
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    draw = np.random.default_rng(0)
    found = {}
    for split, count in {"train": train, "test": test}.items():
        labels = draw.integers(2, size=count)
        corners = draw.integers(0, (427 - SIDE, 640 - SIDE), size=(count, 2))
        found[f"x_{split}"] = np.stack(
            [
                photographs[label][top : top + SIDE, left : left + SIDE]
                for label, (top, left) in zip(labels, corners, strict=True)
            ]
        )
        found[f"y_{split}"] = labels
    return found


# --- one function per row of the table, each writes files and returns the data spec ---------------


def cifar(source: Source, folder: Path) -> str:
    """Ten classes of pictures."""
    return _saved(folder, source.pictures("cifar10", 5000, 2000))


def signs(source: Source, folder: Path) -> str:
    """Facts about traffic signs, which follow from their class: several labels each."""
    facts = np.zeros((SIGNS, 6), dtype=np.float32)
    edges = FORBIDDEN | DANGERS | {13, 14}
    columns = [FORBIDDEN | ENDS | ORDERS, DANGERS, edges, ORDERS, SPEEDS | {6}, ENDS]
    for column, classes in enumerate(columns):
        facts[list(classes), column] = 1
    found = source.pictures("gtsrb32", 4000, 2000)
    return _saved(
        folder, {**found, **{f"y_{split}": facts[found[f"y_{split}"]] for split in _SPLITS}}
    )


def sentences(source: Source, folder: Path) -> str:
    """Sentences that praise or blame a film, and the words that are known, from the training."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    found = source.sentences(12000)
    texts = folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for split, rows in found.items():
        lines = [json.dumps({"sentence": text, "label": int(label)}) for label, text in rows]
        (texts / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    known = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    known.normalizer = normalizers.BertNormalizer()
    known.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=4000, special_tokens=special)
    known.train_from_iterator((text for _, text in found["train"]), trainer)
    known.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=known,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder / "words")
    return f"text:{texts}:tokenizer={folder / 'words'},length=64"


def diabetes(source: Source, folder: Path) -> str:  # noqa: ARG001  comes with scikit-learn
    """How far a disease goes on within a year, from ten measurements."""
    from sklearn.datasets import load_diabetes

    table = load_diabetes()
    x = (table.data / table.data.std(0)).astype(np.float32)
    y = ((table.target - table.target.mean()) / table.target.std()).astype(np.float32)[:, None]
    train = np.random.default_rng(0).permutation(len(x)) < 0.75 * len(x)
    parts = {"train": train, "test": ~train}
    arrays = {
        f"{name}_{split}": array[rows]
        for name, array in {"x": x, "y": y}.items()
        for split, rows in parts.items()
    }
    return _saved(folder, arrays)


def _drawn(source: Source, train: int) -> tuple[dict[str, np.ndarray], ...]:
    """Draw shapes on CIFAR-10, and return pictures, masks and boxes as arrays by name."""
    found = source.pictures("cifar10", train, 1000)
    drawn = {split: _shapes(found[f"x_{split}"], seed) for seed, split in enumerate(_SPLITS)}
    return tuple(
        {f"{name}_{split}": arrays[place] for split, arrays in drawn.items()}
        for place, name in enumerate("xyy")
    )


def masks(source: Source, folder: Path) -> str:
    """Shapes drawn on CIFAR-10.

    A class for every pixel.
    """
    images, kinds, _ = _drawn(source, 4000)
    return _saved(folder, images | kinds)


def large_masks(source: Source, folder: Path) -> str:
    """The same, of twice the size, for a network made for large pictures."""
    spec = masks(source, folder)
    with np.load(spec.removeprefix("npz:").removesuffix(_LAYOUT)) as archive:
        doubled = {
            name: array.repeat(2, 1).repeat(2, 2)[: len(array) // 4]
            for name, array in archive.items()
        }
    return _saved(folder, doubled)


def boxes(source: Source, folder: Path) -> str:
    """The same shapes.

    The box of each.
    """
    images, _, around = _drawn(source, 2000)
    return _saved(folder, images | around)


def noise(source: Source, folder: Path) -> str:
    """Traffic signs under noise of different strength.

    What they were.
    """
    found = source.pictures("gtsrb32", 1000, 500)
    draw = np.random.default_rng(0)
    arrays = {}
    for split in _SPLITS:
        clean = found[f"x_{split}"].transpose(0, 3, 1, 2).astype(np.float32) / 255
        strength = draw.uniform(0.0, 0.4, (len(clean), 1, 1, 1))
        noisy = clean + strength * draw.normal(size=clean.shape)
        arrays |= {f"x_{split}": noisy.astype(np.float32), f"y_{split}": clean}
    return _saved(folder, arrays, layout="NCHW") + ",normalise=none"


_SPLITS = ("train", "test")
_LAYOUT = ":layout=NHWC"


def _saved(folder: Path, arrays: Mapping[str, np.ndarray], layout: str = "") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "data.npz"
    np.savez(file, **arrays)
    if not layout and arrays["x_train"].ndim == 4:
        layout = "NHWC"
    return f"npz:{file}" + (f":layout={layout}" if layout else "")


def _shapes(images: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one to three shapes on pictures.

    Returns:
        Pictures, masks [N, 32, 32] of 0 and the kinds from 1, and rows [N, 3, 5] of kind from 0,
        centre, width and height, filled up with -1.
    """
    draw = np.random.default_rng(seed)
    images = images.copy()
    kinds = np.zeros(images.shape[:3], dtype=np.int64)
    around = np.zeros((len(images), MOST_SHAPES, 5), dtype=np.float32)
    around[:, :, 0] = -1
    down, right = np.mgrid[:SIDE, :SIDE]
    for image, mask, rows in zip(images, kinds, around, strict=True):
        for place in range(int(draw.integers(1, MOST_SHAPES + 1))):
            kind, half = int(draw.integers(KINDS)), int(draw.integers(4, 8))
            top, left = draw.integers(half, SIDE - half, size=2)
            inside = _inside(kind, down - top, right - left, half) & (mask == 0)
            # what others cover but for a corner is not drawn
            if inside.sum() < 0.5 * half**2:
                continue
            image[inside] = draw.integers(256, size=3)
            mask[inside] = kind + 1
            middles = np.nonzero(inside)
            low, high = (np.array([ends.min(), ends.max() + 1]) for ends in middles)
            centre = [right_.sum() / 2 / SIDE for right_ in (high, low)]
            size = [np.ptp(ends) / SIDE for ends in (high, low)]
            rows[place] = [kind, *centre, *size]
    return images, kinds, around


def _inside(kind: int, down: np.ndarray, right: np.ndarray, half: int) -> np.ndarray:
    if kind == 0:
        return down**2 + right**2 <= half**2
    square = np.maximum(abs(down), abs(right)) < half
    return square if kind == 1 else square & (2 * abs(right) <= down + half)
