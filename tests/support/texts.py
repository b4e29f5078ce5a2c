"""Small tables of texts, a tokenizer for them, and a tiny model of transformers."""

import csv
import random
from collections.abc import Callable
from pathlib import Path

WORDS = [f"word{number}" for number in range(20)]
MODEL = (
    "transformers:BertConfig:vocab_size=32,hidden_size=16,num_hidden_layers=2,"
    "num_attention_heads=2,intermediate_size=32,hidden_dropout_prob=0.0,"
    "attention_probs_dropout_prob=0.0"
)


def save_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of whole words, as transformers loads it."""
    import tokenizers
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "good", "bad", *WORDS]
    numbers = {word: number for number, word in enumerate(words)}
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="[UNK]"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    )
    made.save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0, longest: int = 12) -> list[tuple[str, str]]:
    """Make texts of 2 to 12 words, one of which says the label."""
    drawn = random.Random(seed)
    made = []
    for place in range(count):
        label = ("good", "bad")[place % 2]
        words = drawn.choices(WORDS, k=drawn.randint(1, longest - 1))
        words.insert(drawn.randint(0, len(words)), label)
        made.append((" ".join(words), label))
    return made


def save_csv(file: Path, made: list[tuple[str, str]]) -> None:
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([("text", "label"), *made])


def rewrite(file: Path, change: Callable[[str], str | bytes]) -> Path:
    """Change the text or the bytes of a file."""
    made = change(file.read_text())
    file.write_bytes(made if isinstance(made, bytes) else made.encode())
    return file
