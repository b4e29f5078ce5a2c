"""Tables of texts: what is read, what is refused, and that padding changes no exit."""

import csv
import json
from pathlib import Path

import pytest
import torch

import impatient
import texts
from impatient.errors import DataError
from impatient.training import Data, load_data

ROWS = texts.rows(60)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def save(file: Path, columns: dict[str, list]) -> Path:
    """Write a table in the format that its suffix names."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(columns)
    if file.suffix == ".parquet":
        from pyarrow import parquet

        parquet.write_table(table, file)
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, table.to_pylist())))
    else:
        with file.open("w", newline="") as opened:
            delimiter = "\t" if file.suffix == ".tsv" else ","
            rows = zip(*columns.values(), strict=True)
            csv.writer(opened, delimiter=delimiter).writerows([columns.keys(), *rows])
    return file


def columns() -> dict[str, list]:
    return {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}


def load(file: Path, tokenizer: Path, options: str = "") -> Data:
    return load_data(f"text:{file}:tokenizer={tokenizer}{options and ','}{options}")


def test_every_format_of_a_table_gives_the_same_data(tmp_path, tokenizer) -> None:
    found = [
        load(save(tmp_path / f"table{suffix}", columns()), tokenizer)
        for suffix in (".csv", ".tsv", ".jsonl", ".parquet")
    ]
    assert len({data.fingerprint for data in found}) == 1
    assert found[0].class_names == ("bad", "good")
    test = found[0].examples("test")
    batch = test.take(range(12))
    words = {3: "good", 4: "bad"}
    for ids, mask, label in zip(
        batch["input_ids"], batch["attention_mask"], test.labels, strict=True
    ):
        assert (ids[mask == 0] == 0).all()
        [said] = [words[int(number)] for number in ids if int(number) in words]
        assert said == found[0].class_names[label]


def test_a_folder_holds_a_table_per_split_and_columns_are_named(tmp_path, tokenizer) -> None:
    renamed = {"review": columns()["text"], "stars": [len(label) % 2 for _, label in ROWS]}
    save(tmp_path / "train.jsonl", renamed)
    save(tmp_path / "test.parquet", {name: each[:7] for name, each in renamed.items()})
    data = load(tmp_path, tokenizer, "text=review,label=stars")
    assert [data.size("test"), data.size("train") + data.size("validation")] == [7, 60]
    assert data.class_names == ("0", "1")


def test_budgets_stand_in_a_column(tmp_path, tokenizer) -> None:
    seconds = [len(text) / 1000 for text, _ in ROWS]
    table = save(tmp_path / "table.csv", columns() | {"limit": seconds})
    data = load(table, tokenizer, "budget=limit")
    lengths = data.examples("test").lengths
    budgets = data.budgets("test")
    assert lengths is not None
    assert budgets is not None
    assert len(budgets) == data.size("test")
    # a longer text has more letters
    assert float(torch.corrcoef(torch.stack([lengths.double(), budgets]))[0, 1]) > 0.9
    empty = columns() | {"limit": [None, *seconds[1:]]}
    with pytest.raises(DataError, match="1 rows have no budget, the first is row 0"):
        load(save(tmp_path / "table.jsonl", empty), tokenizer, "budget=limit")
    with pytest.raises(DataError, match="no 'other' is there"):
        load(table, tokenizer, "budget=other")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"text": [None, *columns()["text"][1:]]}, "1 rows have no text, the first is row 0"),
        ({"label": [*columns()["label"][1:], None]}, "rows have no label, the first is row 59"),
        ({"text": list(range(60))}, "row 0 holds 0 as its text"),
        ({"label": [0.5] * 60}, "labels are of the kinds float"),
        ({"label": ["good"] * 60}, "all training examples have the class good"),
        ({"label": [2 * (place % 2) for place in range(60)]}, "1 is not among them"),
        ({"sentence": columns()["text"]}, "expected one of text and one of labels"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(tmp_path, tokenizer, changes, complaint) -> None:
    table = save(tmp_path / "table.parquet", columns() | changes)
    with pytest.raises(DataError, match=complaint):
        load(table, tokenizer)


def test_damaged_and_unknown_tables_are_refused(tmp_path, tokenizer) -> None:
    for name in ("table.parquet", "table.jsonl"):
        (tmp_path / name).write_bytes(b"no table at all")
        with pytest.raises(DataError, match="cannot be read as"):
            load(tmp_path / name, tokenizer)
    (tmp_path / "table.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match=r"of the kind '.xlsx'"):
        load(tmp_path / "table.xlsx", tokenizer)
    good = save(tmp_path / "good.csv", columns())
    with pytest.raises(DataError, match="Name a tokenizer"):
        load_data(f"text:{good}")
    with pytest.raises(DataError, match="cannot load the tokenizer"):
        load(good, tmp_path / "nowhere")


def rewritten(folder: Path, change) -> Path:
    """Write a table of comma-separated values, with its text or bytes changed."""
    return texts.rewrite(save(folder / "table.csv", columns()), change)


def test_tables_of_spreadsheets_give_the_same_data(tmp_path, tokenizer, caplog) -> None:
    wanted = load(save(tmp_path / "table.csv", columns()), tokenizer).fingerprint
    for change in (
        lambda made: made.replace(",", ";"),
        lambda made: made.replace(",", "\t"),
        lambda made: made.encode("utf-16"),
        lambda made: made.encode("utf-8-sig"),
        lambda made: made.replace("\n", "\r\n"),
        lambda made: made.replace("text,label", "Text, LABEL"),
    ):
        with caplog.at_level("INFO"):
            assert load(rewritten(tmp_path, change), tokenizer).fingerprint == wanted
    assert "columns are separated by semicolons" in caplog.text


def test_texts_and_labels_are_taken_as_they_are_written(tmp_path, tokenizer) -> None:
    dates = [f"2020-01-{1 + place % 28:02d} 00:00:00" for place in range(60)]
    for label, names in (
        (["01", "02"], ("01", "02")),
        (["false", "true"], ("false", "true")),
        (["NA", "EU"], ("EU", "NA")),
        (["2020-01-01", "2020-01-02"], ("2020-01-01", "2020-01-02")),
        ([0, 1], ("0", "1")),
    ):
        table = {"text": dates, "label": [label[place % 2] for place in range(60)]}
        data = load(save(tmp_path / "table.csv", table), tokenizer)
        assert data.class_names == names
    # a number, a dash, a number, ... and not the words of a date in Python
    assert int(data.examples("test").lengths.min()) > 3
    table = {"text": dates, "label": [place % 2 for place in range(60)]}
    save(tmp_path / "table.jsonl", table).rename(tmp_path / "table.json")
    lines = load(tmp_path / "table.json", tokenizer)
    assert lines.fingerprint == data.fingerprint


def test_tables_that_are_not_utf_8_are_refused_with_what_to_do(tmp_path, tokenizer) -> None:
    odd = rewritten(tmp_path, lambda made: made.replace("word1", "wörd").encode("latin1"))
    with pytest.raises(DataError, match=r"table\.csv .*[Ss]ave the file as UTF-8"):
        load(odd, tokenizer)
    odd = rewritten(tmp_path, lambda made: made.replace("text", "tëxt").encode("latin1"))
    with pytest.raises(DataError, match=r"table\.csv .*[Ss]ave the file as UTF-8"):
        load(odd, tokenizer)


def test_columns_of_one_name_are_refused(tmp_path, tokenizer) -> None:
    table = save(tmp_path / "table.csv", columns() | {"other": [1] * 60})
    table.write_text(table.read_text().replace("other", "text", 1))
    with pytest.raises(DataError, match="several columns called 'text'"):
        load(table, tokenizer, "text=text,label=label")


def test_labels_from_1_are_renumbered_when_that_is_said(tmp_path, tokenizer) -> None:
    labels = [1 + place % 2 for place in range(60)]
    table = save(tmp_path / "table.csv", columns() | {"label": labels})
    with pytest.raises(DataError, match="say labels=renumber"):
        load(table, tokenizer)
    data = load(table, tokenizer, "labels=renumber")
    assert (data.class_names, set(data.examples("test").labels.tolist())) == (("1", "2"), {0, 1})


def test_tables_of_splits_have_usual_names_and_those_left_out_are_said(
    tmp_path, tokenizer, caplog
) -> None:
    for name in ("reviews_train.csv", "reviews_dev.csv", "unlabelled.csv"):
        save(tmp_path / name, columns())
    with caplog.at_level("WARNING"):
        assert load(tmp_path, tokenizer).size("test") == 60
    assert "left out: unlabelled" in caplog.text
    save(tmp_path / "reviews_train.tsv", columns())
    with pytest.raises(DataError, match=r"has reviews_train\.csv and reviews_train\.tsv"):
        load(tmp_path, tokenizer)


@pytest.mark.slow
def test_a_text_has_the_same_exits_in_every_batch(tmp_path, tokenizer) -> None:
    data = load(save(tmp_path / "table.csv", columns()), tokenizer)
    model = impatient.load_model(texts.MODEL, num_classes=2)
    network = impatient.attach_exits(model, example=data.example(2), after="auto", count=2)
    alone, few, all_of_them = (
        impatient.record(network, data, split="train", batch_size=size) for size in (1, 7, 64)
    )
    assert float(alone.logits().std()) > 0.01
    for other in (few, all_of_them):
        torch.testing.assert_close(other.logits(), alone.logits(), rtol=1e-4, atol=1e-5)
        assert torch.equal(other.labels, alone.labels)
