"""Data sets of texts, through a tokenizer of transformers."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from impatient.errors import DataError
from impatient.provenance import fingerprint_bytes
from impatient.training.examples import (
    Examples,
    Indices,
    Raw,
    checked_budgets,
    class_numbers,
    padded,
    rows_of,
)
from impatient.training.options import PICTURE_OPTIONS, DataOptions, read_options
from impatient.training.splitting import carved_out
from impatient.training.text_tables import Table, read_table, table_files

log = logging.getLogger(__name__)

TEXT_OPTIONS = ("tokenizer", "text", "label", "labels", "length", "budget")
# Some tokenizers say that any length will do.
USUAL_LENGTH = 512


@dataclass(frozen=True, slots=True)
class TextExamples(Examples):
    """Texts as token ids, padded to the longest of each batch.

    Attributes:
        tokens: for each entry of the network's input, the numbers of every text.
        labels: true classes, int64 [N].
        padding: what each entry is padded with.
        side: where padding stands.
        budgets: seconds that each text may take, or None.
    """

    tokens: Mapping[str, Sequence[Tensor]]
    labels: Any
    padding: Mapping[str, int]
    side: Literal["left", "right"]
    budgets: Tensor | None = None

    def take(self, indices: Indices) -> dict[str, Tensor]:
        return {
            name: padded([lists[int(index)] for index in indices], self.padding[name], self.side)
            for name, lists in self.tokens.items()
        }

    def subset(self, indices: Indices) -> TextExamples:
        tokens = {
            name: [lists[int(index)] for index in indices] for name, lists in self.tokens.items()
        }
        return dataclasses.replace(
            self,
            tokens=tokens,
            labels=rows_of(self.labels, indices),
            budgets=rows_of(self.budgets, indices),
        )

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(ids) for ids in self.tokens["input_ids"]])


def text(rest: str) -> tuple[Raw, DataOptions]:
    """Read FILE:options, or DIR:options with train.csv and test.csv (or tsv, jsonl, parquet)."""
    name, options = read_options(rest, TEXT_OPTIONS)
    path = Path(name).expanduser()
    tables = {split: read_table(file, options) for split, file in table_files(path).items()}
    return from_tables(tables, options, str(path)), options


def from_tables(
    tables: Mapping[str, Table],
    options: DataOptions,
    where: str,
    class_names: Sequence[str] = (),
) -> Raw:
    """Turn tables of texts into token ids.

    Args:
        tables: those of "train" and "test"; without a test table a fixed fifth is carved out.
        options: tokenizer and longest length.
        where: name of the tables in errors.
        class_names: names of the classes where labels are numbers.
    Raises:
        DataError: if a row lacks its text or label, or the tokenizer cannot be loaded.
    """
    for split, table in tables.items():
        _check_rows(table, f"{where}, {split}")
    names, numbers = _numbered(tables, class_names, where)
    tokenizer = load_tokenizer(options, where)
    parts = {
        split: _tokenized(tokenizer, table, numbers[split], options, f"{where}, {split}")
        for split, table in tables.items()
    }
    if "test" not in parts:
        test = carved_out(numbers["train"])
        whole = parts["train"]
        parts = {
            "train": whole.subset(np.flatnonzero(~test)),
            "test": whole.subset(np.flatnonzero(test)),
        }
    content = [
        numbers.tobytes()
        for part in parts.values()
        for numbers in (
            part.lengths.numpy(),
            *(torch.cat(list(lists)).numpy() for lists in part.tokens.values()),
            part.labels.numpy(),
            *(() if part.budgets is None else (part.budgets.numpy(),)),
        )
    ]
    given = bool(class_names) or not isinstance(tables["train"].labels[0], int)
    return Raw(
        train=parts["train"],
        test=parts["test"],
        class_names=names,
        named=given,
        content=fingerprint_bytes(*content),
    )


def _check_rows(table: Table, where: str) -> None:
    if not table.labels:
        raise DataError(f"{where} has no rows; expected some.")
    kinds = {type(label) for label in table.labels}
    for what, column in (*(("text", texts) for texts in table.texts), ("label", table.labels)):
        empty = [row for row, value in enumerate(column) if value is None or value == ""]
        if empty:
            raise DataError(
                f"{where}: {len(empty)} rows have no {what}, the first is row {empty[0]}; remove "
                "them."
            )
    for texts in table.texts:
        odd = [row for row, value in enumerate(texts) if not isinstance(value, str)]
        if odd:
            raise DataError(
                f"{where}: row {odd[0]} holds {texts[odd[0]]!r} as its text; expected text. Name "
                "the column, such as text=review."
            )
    if not kinds <= {str} and not kinds <= {int, bool}:
        listed = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(
            f"{where}: labels are of the kinds {listed}; expected names of classes, or integers "
            "from 0."
        )


def _numbered(
    tables: Mapping[str, Table], class_names: Sequence[str], where: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return class names, and the number of each row's class."""
    found = {label for table in tables.values() for label in table.labels}
    if len({isinstance(label, str) for label in found}) > 1:
        raise DataError(f"{where}: labels are names in one table and numbers in another.")
    if isinstance(next(iter(found)), str):
        labels = {split: table.labels for split, table in tables.items()}
        return class_numbers(labels, class_names, where)
    numbers = {split: np.array(table.labels, np.int64) for split, table in tables.items()}
    most = max(int(part.max()) for part in numbers.values())
    if most > 1_000_000:
        raise DataError(f"{where}: the label {most} is no plausible class.")
    return tuple(class_names) or tuple(map(str, range(most + 1))), numbers


def load_tokenizer(options: DataOptions, where: str) -> Any:
    """Load the tokenizer that the options name.

    Raises:
        DataError: if none is named, it cannot be loaded, or it cannot pad.
    """
    if not options.tokenizer:
        raise DataError(
            f"{where} holds texts; expected to be told how to turn them into token ids. Name a "
            "tokenizer of transformers, such as tokenizer=bert-base-uncased, or its folder."
        )
    try:
        import transformers
    except ImportError as error:
        raise DataError(
            "texts need the package transformers. Install it with: pip install transformers."
        ) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            options.tokenizer, trust_remote_code=False
        )
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError and those of the Hub.
        first = str(error).strip().splitlines()[:1]
        raise DataError(
            f"transformers cannot load the tokenizer {options.tokenizer!r}: {' '.join(first)}"
        ) from error
    if tokenizer.pad_token_id is None:
        raise DataError(
            f"the tokenizer {options.tokenizer!r} has no padding token; expected one. Set "
            "tokenizer.pad_token, and save it with save_pretrained."
        )
    return tokenizer


def tokens_of(spec: str, text: str) -> dict[str, Tensor]:
    """Turn one text into tokens [1, T], as the data of a spec were.

    Args:
        spec: data spec of texts, with its tokenizer.
        text: the text.
    Raises:
        DataError: if the spec is not of texts, or its tokenizer cannot be loaded.
    """
    options = _options_of(spec)
    tokenizer = load_tokenizer(options, f"the data spec {spec!r}")
    most = _most_tokens(options, tokenizer)
    encoded = tokenizer([text], truncation=True, max_length=most, return_attention_mask=True)
    return {name: torch.tensor(ids) for name, ids in encoded.items()}


def _most_tokens(options: DataOptions, tokenizer: Any) -> int:
    return options.length or min(tokenizer.model_max_length, USUAL_LENGTH)


def _tokenized(
    tokenizer: Any, table: Table, labels: np.ndarray, options: DataOptions, where: str
) -> TextExamples:
    most = _most_tokens(options, tokenizer)
    # Only the cut off texts are as long as this.
    encoded = tokenizer(
        *(list(texts) for texts in table.texts),
        truncation=True,
        max_length=most + 1,
        return_attention_mask=True,
    )
    cut = sum(len(ids) > most for ids in encoded["input_ids"])
    if cut:
        log.warning("%s: %d of %d texts are cut off after %d tokens", where, cut, len(labels), most)
        encoded = tokenizer(
            *(list(texts) for texts in table.texts),
            truncation=True,
            max_length=most,
            return_attention_mask=True,
        )
    names = [name for name in encoded if name in tokenizer.model_input_names]
    return TextExamples(
        tokens={name: [torch.tensor(ids) for ids in encoded[name]] for name in names},
        labels=torch.from_numpy(labels),
        padding=_padding(tokenizer, names),
        side=tokenizer.padding_side,
        budgets=_budgets(table, where),
    )


def _budgets(table: Table, where: str) -> Tensor | None:
    if table.budgets is None:
        return None
    empty = [row for row, value in enumerate(table.budgets) if value is None]
    if empty:
        raise DataError(
            f"{where}: {len(empty)} rows have no budget, the first is row {empty[0]}; say inf for "
            "no limit."
        )
    return checked_budgets(table.budgets, len(table.labels), where)


def check_vocabulary(model: nn.Module, parts: Iterable[Examples], name: str) -> None:
    """Check that a model knows all tokens of texts, and their places.

    Raises:
        DataError: if a number of a token, or the length of a text, is beyond it.
    """
    hub = sys.modules.get("transformers")
    texts = [part for part in parts if isinstance(part, TextExamples)]
    if hub is None or not texts or not isinstance(model, hub.PreTrainedModel):
        return
    largest = max(int(ids.max()) for part in texts for ids in part.tokens["input_ids"])
    known, most = _known_by(model)
    if largest >= known:
        raise DataError(
            f"{name} has tokens up to number {largest}, but {type(model).__name__} knows {known}; "
            f"expected all of them. Name the model's own tokenizer, or say vocab_size="
            f"{largest + 1} if the model is new."
        )
    longest = max(int(part.lengths.max()) for part in texts)
    if most and longest > most:
        raise DataError(
            f"{name} has texts of {longest} tokens, but {type(model).__name__} takes {most}; "
            f"expected no longer ones. Say length={most} in the data spec."
        )


def _known_by(model: Any) -> tuple[int, int | None]:
    """Return how many tokens a model of transformers knows, and how many a text may have."""
    tokens: int = model.get_input_embeddings().num_embeddings
    return tokens, model.config.to_dict().get("max_position_embeddings")


def tokenizer_of(spec: str) -> Any | None:
    """Load the tokenizer of a data spec of texts.

    None for other specs.
    """
    options = _options_of(spec)
    return load_tokenizer(options, spec) if options.tokenizer else None


def _options_of(spec: str) -> DataOptions:
    """Read what a data spec says of its texts."""
    source, _, rest = spec.partition(":")
    if source not in ("text", "hf"):
        return DataOptions()
    return read_options(rest, (*PICTURE_OPTIONS, *TEXT_OPTIONS))[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextForm:
    """How texts come to a network.

    Attributes:
        padding: by name, what shorter ones are filled up with.
        side: where padding stands.
        longest: the most tokens of a text.
        vocabulary: the number of tokens that the network knows, if that is known.
    """

    padding: Mapping[str, int]
    side: Literal["left", "right"]
    longest: int
    vocabulary: int | None = None


def form_of(spec: str, names: Iterable[str], network: nn.Module) -> TextForm | None:
    """Tell how texts of a data spec come to a network, None for other data.

    Args:
        spec: the data spec.
        names: names of the network's inputs.
        network: the network, which may be one of transformers with exits.
    Raises:
        DataError: if the tokenizer cannot be loaded.
    """
    options = _options_of(spec)
    if not options.tokenizer:
        return None
    tokenizer = load_tokenizer(options, spec)
    longest = _most_tokens(options, tokenizer)
    vocabulary = None
    hub = sys.modules["transformers"]
    for model in network.modules():
        if isinstance(model, hub.PreTrainedModel):
            vocabulary, most = _known_by(model)
            longest = min(longest, most or longest)
            break
    return TextForm(
        padding=_padding(tokenizer, names),
        side=tokenizer.padding_side,
        longest=longest,
        vocabulary=vocabulary,
    )


def _padding(tokenizer: Any, names: Iterable[str]) -> dict[str, int]:
    known = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    return {name: known.get(name, 0) for name in names}
