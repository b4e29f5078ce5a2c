"""Read tables of texts with their labels: csv, tsv, JSON lines and parquet."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from impatient.errors import DataError
from impatient.training.options import DataOptions
from impatient.training.split_names import split_names, unhidden

log = logging.getLogger(__name__)

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (".csv", ".tsv", *JSON_SUFFIXES, ".parquet")
TEXT_COLUMNS = ("text", "sentence", "content", "review", "document")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")
# How spreadsheets begin a file of two bytes a letter.
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of one split.

    Attributes:
        texts: for each column of text, all its rows.
        labels: numbers or names of the classes.
        budgets: seconds that each row may take, or None.
    """

    texts: Sequence[Sequence[str | None]]
    labels: Sequence[Any]
    budgets: Sequence[Any] | None = None


def table_files(path: Path) -> Mapping[str, Path]:
    """Find the table of each split: the file itself, or those in a folder.

    Raises:
        DataError: if there is none, or two could be the same split.
    """
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise DataError(
            f"no file or folder {path}; expected a file of the kinds {', '.join(SUFFIXES)}, or a "
            "folder with train and test as such files."
        )
    found: dict[str, Path] = {}
    for file in unhidden(path):
        if file.suffix.lower() in SUFFIXES and file.is_file():
            if file.stem in found:
                raise DataError(
                    f"{path} has {found[file.stem].name} and {file.name}; expected one of them. "
                    "Rename or join them."
                )
            found[file.stem] = file
    splits = split_names(found, str(path), loose=lambda _: True)
    if not splits:
        raise DataError(
            f"{path} has the tables {', '.join(found) or 'none'}; expected one named train, and "
            f"test or validation, of the kinds {', '.join(SUFFIXES)}."
        )
    return {split: found[name] for split, name in splits.items()}


def read_table(file: Path, options: DataOptions) -> Table:
    """Read the columns of text and labels, and of budgets if the options name one.

    Raises:
        DataError: if the file is damaged or of another kind, or lacks a column.
    """
    arrow = _arrow()
    suffix = file.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            return _separated(file, options)
        if suffix in JSON_SUFFIXES:
            return _json_lines(file, options)
        if suffix == ".parquet":
            rows = arrow.parquet.read_table(file)
            return _table(rows, choose_columns(rows.column_names, options, str(file)), options)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} holds text that is not UTF-8 ({error}); save the file as UTF-8."
        ) from error
    except (arrow.ArrowException, OSError) as error:
        advice = " Save the file as UTF-8." if "UTF8" in str(error) else ""
        lines = " Expected an object in each line." if suffix in JSON_SUFFIXES else ""
        raise DataError(f"{file} cannot be read as {suffix}: {error}.{advice}{lines}") from error
    raise DataError(f"{file} is of the kind {suffix!r}; expected {', '.join(SUFFIXES)}.")


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.csv
        import pyarrow.json
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "text: needs the package pyarrow. Install it with: pip install pyarrow."
        ) from error
    return pyarrow


def _separated(file: Path, options: DataOptions) -> Table:
    """Read a table of values with separators between them.

    Texts and labels are taken as they are written, never as the dates or numbers that they look
    like.
    """
    arrow = _arrow()
    with file.open("rb") as opened:
        begin = opened.read(1 << 16)
    encoding = "utf-16" if begin.startswith(UTF_16) else "utf-8"
    header = next(iter(begin.decode(encoding, "replace").splitlines()), "")
    tabs = file.suffix.lower() == ".tsv"
    separator = "\t" if tabs else _separator(header, file)
    # Quotes in a tsv file are part of the text.
    parse = arrow.csv.ParseOptions(
        delimiter=separator, quote_char=False if tabs else '"', newlines_in_values=not tabs
    )
    read = arrow.csv.ReadOptions(encoding=encoding)
    with arrow.csv.open_csv(file, read_options=read, parse_options=parse) as opened:
        texts, label = choose_columns(opened.schema.names, options, str(file))
    written = dict.fromkeys([*texts, label], arrow.string())
    rows = arrow.csv.read_csv(
        file,
        read_options=read,
        parse_options=parse,
        convert_options=arrow.csv.ConvertOptions(column_types=written),
    )
    found = _table(rows, (texts, label), options)
    return dataclasses.replace(found, labels=_as_meant(found.labels))


def _separator(header: str, file: Path) -> str:
    """Tell what separates columns: a comma, or else what spreadsheets write in its place."""
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if "," not in header and separator in header:
            log.info("%s: columns are separated by %s", file, name)
            return separator
    return ","


def _as_meant(labels: Sequence[str]) -> Sequence[str | int | float]:
    """Read labels that are all numbers as such, and any others as names."""
    if all(re.fullmatch("0|-?[1-9][0-9]{0,17}", label) for label in labels):
        return [int(label) for label in labels]
    numbers = all(re.fullmatch(r"-?[0-9]+(\.[0-9]*)?", label) for label in labels)
    if numbers and any("." in label for label in labels):
        return [float(label) for label in labels]
    return labels


def _json_lines(file: Path, options: DataOptions) -> Table:
    arrow = _arrow()
    rows = arrow.json.read_json(file)
    texts, label = choose_columns(rows.column_names, options, str(file))
    dates = [
        name for name in (*texts, label) if arrow.types.is_temporal(rows.schema.field(name).type)
    ]
    if dates:
        # As they are written, not as the dates that they look like.
        schema = arrow.schema([(name, arrow.string()) for name in dates])
        parse = arrow.json.ParseOptions(explicit_schema=schema)
        rows = arrow.json.read_json(file, parse_options=parse)
    return _table(rows, (texts, label), options)


def _table(rows: Any, chosen: tuple[Sequence[str], str], options: DataOptions) -> Table:
    """Take the columns of text and of labels out of an Arrow table, and that of budgets."""
    texts, label = chosen
    return Table(
        texts=[rows[name].to_pylist() for name in texts],
        labels=rows[label].to_pylist(),
        budgets=rows[options.budget].to_pylist() if options.budget else None,
    )


def choose_columns(
    names: Sequence[str], options: DataOptions, where: str
) -> tuple[Sequence[str], str]:
    """Return the columns of text, and that of the labels.

    Raises:
        DataError: if a named column is missing or there twice, or none or several have a usual
            name.
    """
    usual = [
        [name for name in names if name.strip().lower() in known]
        for known in (TEXT_COLUMNS, LABEL_COLUMNS)
    ]
    texts = options.text.split("+") if options.text else usual[0]
    labels = [options.label] if options.label else usual[1]
    chosen = [*texts, *labels, *([options.budget] if options.budget else [])]
    absent = [name for name in chosen if name not in names]
    if absent or len(labels) != 1 or not texts or (len(texts) != 1 and not options.text):
        raise DataError(
            f"{where} has the columns {', '.join(names)}; expected one of text and one of labels"
            f"{f', and no {absent[0]!r} is there' if absent else ''}. Name them, such as "
            "text=review,label=stars (pairs of texts: text=question+answer)."
        )
    twice = [name for name in chosen if names.count(name) > 1]
    if twice:
        raise DataError(
            f"{where} has several columns called {twice[0]!r}; expected one. Rename the others."
        )
    return texts, labels[0]
