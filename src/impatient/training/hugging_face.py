"""Data sets of Hugging Face, with a column of pictures or of texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from impatient.errors import DataError
from impatient.networks.transforms import Transform
from impatient.provenance import fingerprint_bytes
from impatient.training.examples import Raw
from impatient.training.folders import lazy_pictures
from impatient.training.options import PICTURE_OPTIONS, DataOptions, read_options
from impatient.training.pictures import hash_of_file, image_tensor, shown_as, shown_size
from impatient.training.split_names import split_names
from impatient.training.text import TEXT_OPTIONS, from_tables
from impatient.training.text_tables import Table, choose_columns


def hugging_face(rest: str, transform: Transform | None = None) -> tuple[Raw, DataOptions]:
    """Read NAME-OR-PATH or NAME-OR-PATH:options: a column of pictures or of texts, and labels."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "hf: needs the package datasets. Install it with: pip install datasets."
        ) from error
    name, options = read_options(rest, (*PICTURE_OPTIONS, *TEXT_OPTIONS))
    saved = (Path(name) / "dataset_dict.json").is_file()
    try:
        tables = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:
        raise DataError(f"datasets cannot load {name!r}: {error}") from error
    names = split_names(tables, name, loose=lambda _: False)
    if not names:
        raise DataError(
            f"{name} has the splits {', '.join(tables) or 'none'}; expected train, and test or "
            "validation."
        )
    found = {split: tables[own] for split, own in names.items()}
    if "test" not in found:
        # The test split must not change with the user's seed.
        found = found["train"].train_test_split(test_size=0.2, seed=0)
    train, test = found["train"], found["test"]
    if options.tokenizer:
        return _texts({"train": train, "test": test}, datasets, options, name), options
    if options.budget:
        raise DataError(
            f"{name}: budget={options.budget} is for texts and npz files; leave it away for "
            "pictures."
        )
    image, label = _columns(train, datasets, name)
    rows = {
        split: [
            ((table, place), identity, number)
            for place, (number, identity) in enumerate(
                zip(table[label], _identities(table, image, datasets), strict=True)
            )
        ]
        for split, table in (("train", train), ("test", test))
    }
    numbers = [number for split in rows.values() for _, _, number in split]
    odd = [place for place, number in enumerate(numbers) if not isinstance(number, int)]
    if odd:
        row = odd[0] if odd[0] < len(train) else odd[0] - len(train)
        raise DataError(
            f"{name}: labels must be integers, but {numbers[odd[0]]!r} is among them, in row {row} "
            f"of {'train' if odd[0] < len(train) else 'test'}; make the column a ClassLabel."
        )

    def read(source: tuple[Any, int]) -> Tensor:
        table, place = source
        return image_tensor(_picture(table, place, image), shown, 3, f"picture {place}", resizing)

    feature = train.features[label]
    named = isinstance(feature, datasets.ClassLabel)
    classes = feature.names if named else map(str, range(max(train[label]) + 1))
    some = range(min(50, len(train)))
    shown, resizing = shown_as(
        options, transform, (shown_size(_picture(train, place, image)) for place in some)
    )
    raw = lazy_pictures(rows, list(classes), read, shown, named=named, resizing=resizing)
    return raw, options


def _identities(table: Any, column: str, datasets: Any) -> list[str]:
    """Hash the stored bytes of every picture, or the file that a row names."""
    plain = table.cast_column(column, datasets.Image(decode=False))

    def identity(picture: Any) -> str:
        if picture is None:
            return "none"
        if picture["bytes"] is not None:
            return fingerprint_bytes(picture["bytes"])
        path = Path(picture["path"])
        return hash_of_file(path) if path.is_file() else f"missing {path.name}"

    return [identity(row[column]) for row in plain.select_columns([column])]


def _texts(tables: Mapping[str, Any], datasets: Any, options: DataOptions, name: str) -> Raw:
    """Turn the columns of text into token ids."""
    columns, label = choose_columns(tables["train"].column_names, options, name)
    feature = tables["train"].features[label]
    known = feature.names if isinstance(feature, datasets.ClassLabel) else ()
    found = {
        split: Table(
            texts=[list(table[column]) for column in columns],
            labels=list(table[label]),
            budgets=list(table[options.budget]) if options.budget else None,
        )
        for split, table in tables.items()
    }
    return from_tables(found, options, name, known)


def _picture(table: Any, place: int, column: str) -> Any:
    """Decode the picture of one row.

    Raises:
        DataError: if there is none, or it is damaged.
    """
    try:
        picture = table[place][column]
    except Exception as error:
        # Pillow's errors, and those of datasets for files that are gone.
        raise DataError(f"picture {place} is damaged: {error}.") from error
    if picture is None:
        raise DataError(f"row {place} has no picture; remove the row.")
    return picture


def _columns(table: Any, datasets: Any, name: str) -> tuple[str, str]:
    """Return the names of the image column and of the label column."""

    def of_kind(kind: type) -> list[str]:
        return [column for column, feature in table.features.items() if isinstance(feature, kind)]

    images = of_kind(datasets.Image)
    labels = of_kind(datasets.ClassLabel)
    labels += [column for column in ("label", "labels") if column in table.features]
    if not images or not labels:
        raise DataError(
            f"{name} has columns {dict(table.features)}; expected an image column and a class "
            "label. For texts, name a tokenizer: hf:NAME:tokenizer=bert-base-uncased."
        )
    return images[0], labels[0]
