"""The table of docs/how-to/data.md: what people bring, and what happens, row by row."""

import csv
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler

import texts
from impatient.errors import DataError
from impatient.training import Data, Samples, load_data

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "data.md"
RANDOM = np.random.default_rng(0)
COUNT = 60
LABELS = np.arange(COUNT) % 3
# makes what somebody brings in a folder, and reads it with the options that are said
Bring = Callable[[Path, str], Data]


def table() -> list[list[str]]:
    """Rows of the table in the docs, without the backticks."""
    section = PAGE.read_text().partition("## What people bring, and what happens")[2]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("`") for cell in line.split(" | ")] for line in rows_of(lines)]


def rows_of(lines: list[str]) -> list[str]:
    """Leave out the heads and the lines below them."""
    return [line.strip("|") for line in lines if not re.match(r"\| (you bring|---)", line)]


ROWS = table()


def read(spec: str, said: str) -> Data:
    data = load_data(f"{spec}:{said}" if said else spec, validation=0.2)
    # pictures are read when they are asked for
    for split in ("train", "validation", "test"):
        for _ in data.batches(split):
            pass
    return data


# --- arrays ---------------------------------------------------------------------------------------


def arrays(x: np.ndarray | Mapping[str, np.ndarray], y: Any = LABELS, **more: Any) -> Bring:
    def bring(folder: Path, said: str) -> Data:
        parts = x if isinstance(x, Mapping) else {"": x}
        splits = ("train", "test")
        named = {f"x_{split}{name}": part for split in splits for name, part in parts.items()}
        both = {"y_train": y, "y_test": y}
        np.savez(folder / "own.npz", **named, **both, **more)
        return read(f"npz:{folder / 'own.npz'}", said)

    return bring


def numbers(*shape: int, kind: str = "f4", least: int = 0, most: int = 200) -> np.ndarray:
    return RANDOM.integers(least, most, (COUNT, *shape)).astype(kind)


def broken(folder: Path, said: str) -> Data:
    arrays(numbers(5))(folder, "")
    file = folder / "own.npz"
    file.write_bytes(file.read_bytes()[:500])
    return read(f"npz:{file}", said)


def single(folder: Path, said: str) -> Data:
    np.save(folder / "own.npy", VECTORS)
    return read(f"npz:{folder / 'own.npy'}", said)


VECTORS = numbers(5)
SPOILED = np.where(np.arange(5) == 2, np.nan, VECTORS).astype("f4")
SECONDS = RANDOM.random(COUNT)

ARRAYS: dict[str, Bring] = {
    "bytes [N, 16, 16]": arrays(numbers(16, 16, kind="u1")),
    "bytes [N, 16, 16, 3]": arrays(numbers(16, 16, 3, kind="u1")),
    "bytes [N, 3, 16, 16]": arrays(numbers(3, 16, 16, kind="u1")),
    "floats [N, 5]": arrays(VECTORS),
    "floats [N, 9, 32]": arrays(numbers(9, 32)),
    "floats [N, 32, 9], time first": arrays(numbers(32, 9)),
    "floats [N, 8, 8]": arrays(numbers(8, 8)),
    "floats [N, 5, 6, 7]": arrays(numbers(5, 6, 7)),
    "pictures of 16 bits [N, 8, 8, 3]": arrays(numbers(8, 8, 3, kind="u2", most=65536)),
    "whole numbers from 0 [N, 12]": arrays(numbers(12, kind="i8")),
    "whole numbers below 0, too [N, 12]": arrays(numbers(12, kind="i2", least=-99)),
    "sound in 16 bits [N, 2, 50]": arrays(numbers(2, 50, kind="i2", least=-99)),
    "floats of foreign byte order": arrays(numbers(5, kind=">f4")),
    "NaN among the inputs": arrays(SPOILED),
    "x_train.left and x_train.right": arrays({".left": numbers(4), ".right": numbers(4)}),
    "x_train.input_ids and x_train.attention_mask": arrays(
        {".input_ids": numbers(6, kind="i8"), ".attention_mask": np.ones((COUNT, 6), "i8")}
    ),
    "true or false for each of five features": arrays(VECTORS > 90),
    "inputs without numbers [N, 0]": arrays(VECTORS[:, :0]),
    "object arrays (pickles)": arrays(VECTORS.astype(object)),
    "a file that was cut short": broken,
    "an .npy file": single,
    "labels from 1": arrays(VECTORS, LABELS + 1),
    "labels with gaps": arrays(VECTORS, LABELS * 2),
    "labels with gaps, and class_names of all": arrays(
        VECTORS, LABELS * 2, class_names=["a", "b", "c", "d", "e"]
    ),
    "one class alone": arrays(VECTORS, LABELS * 0),
    "hidden labels (-1)": arrays(VECTORS, LABELS - 1),
    "class names in bytes": arrays(VECTORS, class_names=np.array([b"a", b"b", b"c"])),
    "numbers to predict [N]": arrays(VECTORS, RANDOM.random(COUNT)),
    "class names in place of numbers": arrays(VECTORS, np.array(["ant", "bee", "cat"])[LABELS]),
    "classes in a column [N, 1]": arrays(VECTORS, LABELS[:, None]),
    "rows of zeros with a single 1, for classes": arrays(VECTORS, np.eye(3, dtype=int)[LABELS]),
    "0 or 1 for each of three labels [N, 3]": arrays(VECTORS, np.tri(3, dtype=int)[LABELS]),
    "masks [N, 8, 8] for pictures": arrays(numbers(8, 8, 3, kind="u1"), numbers(8, 8, kind="i8")),
    "seconds that each sample may take": arrays(VECTORS, limit_train=SECONDS, limit_test=SECONDS),
}

# --- pictures -------------------------------------------------------------------------------------


def picture(**options: Any) -> Image.Image:
    return Image.new(**{"mode": "RGB", "size": (40, 30), "color": 90, **options})


def folders(
    change: Callable[[Path], None] = lambda _: None,
    splits: tuple[str, ...] = ("train", "test"),
    classes: tuple[str, ...] = ("cat", "dog"),
    suffix: str = "png",
    **options: Any,
) -> Bring:
    def bring(folder: Path, said: str) -> Data:
        for split in splits:
            for name in classes:
                place = folder / "root" / split / name
                place.mkdir(parents=True)
                for number in range(6):
                    picture(**options).save(place / f"{number}.{suffix}")
        change(folder / "root")
        return read(f"imagefolder:{folder / 'root'}", said)

    return bring


def other_sizes(root: Path) -> None:
    picture(size=(30, 50)).save(root / "train" / "cat" / "0.png")


def turned(root: Path) -> None:
    for path in root.rglob("*.jpg"):
        exif = Image.Exif()
        exif[0x0112] = 6
        picture().save(path, exif=exif)


def damaged(root: Path) -> None:
    path = root / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:40])


def beside(root: Path) -> None:
    (root / "train" / "cat" / "notes.txt").write_text("not a picture")
    (root / "train" / ".hidden").mkdir()
    picture().save(root / "train" / "cat" / "._0.png")


def seventh(root: Path) -> None:
    (root / "test" / "fox").mkdir()
    picture().save(root / "test" / "fox" / "0.png")


PICTURES: dict[str, Bring] = {
    "train/CLASS/*.png and test/CLASS/*.png": folders(),
    "Training/CLASS and Valid/CLASS": folders(splits=("Training", "Valid")),
    "seg_train/CLASS and seg_test/CLASS": folders(splits=("seg_train", "seg_test")),
    "CLASS/*.png, without splits": folders(splits=("",)),
    "photos of different sizes": folders(other_sizes),
    "photos of different sizes, at a size of yours": folders(other_sizes),
    "photos turned by EXIF": folders(turned, suffix="jpg"),
    "pictures of 16 bits": folders(mode="I;16", color=9000),
    "transparent pictures": folders(mode="RGBA"),
    "pictures with a palette": folders(mode="P"),
    "pictures for print (CMYK)": folders(mode="CMYK", suffix="jpg"),
    "pictures of floating-point numbers": folders(mode="F", suffix="tiff"),
    "pictures as phones and browsers save them (.avif)": folders(suffix="avif"),
    "a damaged picture": folders(damaged),
    "hidden files, and files that are no pictures": folders(beside),
    "a class that is in the test folder alone": folders(seventh),
    "SPLIT/images and SPLIT/masks, a class per pixel": folders(
        classes=("images", "masks"), mode="L", color=1
    ),
    "masks drawn in black and white": folders(classes=("images", "masks"), mode="L", color=255),
}

# --- texts and tables -----------------------------------------------------------------------------


def texts_of(
    suffix: str = "csv", names: tuple[str, ...] = ("text", "label"), hole: bool = False
) -> Bring:
    def bring(folder: Path, said: str) -> Data:
        tokenizer = texts.save_tokenizer(folder / "tokenizer")
        rows = [dict(zip(names, (*row, 0.01), strict=False)) for row in texts.rows(COUNT)]
        if hole:
            rows[3][names[0]] = ""
        file = folder / f"table.{suffix}"
        if suffix == "jsonl":
            file.write_text("\n".join(map(json.dumps, rows)))
        elif suffix == "parquet":
            pyarrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        else:
            with file.open("w", newline="") as opened:
                writer = csv.DictWriter(opened, names, delimiter="\t" if suffix == "tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
        return read(f"text:{file}", said.replace("DIR", str(tokenizer)))

    return bring


def written(change: Callable[[str], str | bytes]) -> Bring:
    """Write a table of comma-separated values in another way."""

    def bring(folder: Path, said: str) -> Data:
        tokenizer = texts.save_tokenizer(folder / "tokenizer")
        texts.save_csv(folder / "table.csv", texts.rows(COUNT))
        texts.rewrite(folder / "table.csv", change)
        said = ",".join([f"tokenizer={tokenizer}", *([said] if said else [])])
        return read(f"text:{folder / 'table.csv'}", said)

    return bring


TEXTS: dict[str, Bring] = {
    **{
        f"a table of texts and labels, .{suffix}": texts_of(suffix)
        for suffix in ("csv", "tsv", "jsonl", "parquet")
    },
    "the same from a spreadsheet, with semicolons": written(lambda made: made.replace(",", ";")),
    "the same in 16 bits a letter (UTF-16)": written(lambda made: made.encode("utf-16")),
    "the same in an old encoding": written(
        lambda made: made.replace("word1", "wörd1").encode("latin1")
    ),
    "names of columns in capitals": written(lambda made: made.replace("text,label", "Text, LABEL")),
    "texts that look like numbers": written(lambda made: re.sub("word", "", made)),
    "labels from 1 in a table": written(
        lambda made: made.replace(",good", ",1").replace(",bad", ",2")
    ),
    "two columns of one name": written(
        lambda made: made.replace("\n", ",x\n").replace(",x", ",text", 1)
    ),
    "columns of other names": texts_of(names=("review", "stars")),
    "a row without its text": texts_of(hole=True),
    "a column of seconds for each text": texts_of(names=("text", "label", "limit")),
}


# --- in Python ------------------------------------------------------------------------------------

X = torch.randn(COUNT, 4)
Y = torch.from_numpy(LABELS)


def own(make: Callable[[], Any]) -> Bring:
    def bring(_: Path, said: str) -> Data:
        samples = eval(said, {"Samples": Samples}) if said else None
        return Data.of(make(), samples=samples)

    return bring


def samples(make: Callable[[int], Any]) -> Bring:
    return own(lambda: [make(place) for place in range(COUNT)])


def lengths(place: int) -> dict[str, Any]:
    return {"ids": [1] * (2 + place % 4), "label": place % 2}


OWN: dict[str, Bring] = {
    "TensorDataset(x, y)": own(lambda: TensorDataset(X, Y)),
    "Subset(dataset, places)": own(lambda: Subset(TensorDataset(X, Y), range(50))),
    "DataLoader(dataset, shuffle=True)": own(lambda: DataLoader(TensorDataset(X, Y), shuffle=True)),
    "a DataLoader with a weighted sampler": own(
        lambda: DataLoader(TensorDataset(X, Y), sampler=WeightedRandomSampler([1.0] * COUNT, COUNT))
    ),
    "a generator of pairs": own(lambda: ((X[place], Y[place]) for place in range(COUNT))),
    "samples {x, label}": samples(lambda place: {"x": X[place], "label": Y[place]}),
    "samples {x, stars}": samples(lambda place: {"x": X[place], "stars": Y[place]}),
    "samples (ids, mask, y)": samples(lambda place: (X[place], X[place], Y[place])),
    "samples of different lengths": samples(lengths),
    "targets {boxes, labels} of each picture": samples(
        lambda place: (X[place], {"boxes": [[0.5] * 4] * (place % 3), "labels": [1] * (place % 3)})
    ),
    "arrays (x, y) instead of samples": own(lambda: (X, Y)),
    "samples of text": samples(lambda place: ("a text", place % 2)),
}

BRINGS = ARRAYS | PICTURES | TEXTS | OWN


def test_the_table_has_a_row_for_everything_that_is_tried() -> None:
    assert [row[0] for row in ROWS] == list(BRINGS)


def gets(data: Data) -> str:
    """Say the shapes of one sample, and what its target is."""
    x = data.example()
    if isinstance(x, Tensor):
        shapes = str(list(x.shape[1:]))
    else:
        parts = x.values() if isinstance(x, Mapping) else x
        shapes = " and ".join(str(list(part.shape[1:])) for part in parts)
    budgets = ", budgets" if data.budgets("train") is not None else ""
    task = "" if data.task_hint == "classification" else f", {data.task_hint}"
    if data.examples("train").lengths is not None:
        # of any length
        shapes = re.sub(r"\d+", "T", shapes)
    return shapes + task + budgets


@pytest.mark.parametrize(("brought", "happens", "say", "wanted"), ROWS)
def test_what_people_bring(
    tmp_path: Path, brought: str, happens: str, say: str, wanted: str
) -> None:
    bring = BRINGS[brought]
    if happens == "refused":
        (tmp_path / "plain").mkdir()
        with pytest.raises(DataError) as refused:
            bring(tmp_path / "plain", "")
        # the error names the option
        assert say.removeprefix("Samples(").partition("=")[0] in str(refused.value)
        if not wanted:
            return
    data = bring(tmp_path, say)
    assert gets(data) == wanted
