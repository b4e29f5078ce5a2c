"""Words that an answer depends on are those without which it changes."""

from typing import Any

import torch
from torch import Tensor, nn

from impatient.verbs.highlighting import _one, _weighed, _whole_words

WORDS = ["[PAD]", "[CLS]", "a", "fine", "un", "##happy", "film"]


class Reader(nn.Module):
    """Says class 1 for each "fine", and class 0 for each "##happy", if they are not masked."""

    def forward(self, text: dict[str, Tensor]) -> tuple[Tensor, ...]:
        real = text["attention_mask"]
        fine, happy = (((text["input_ids"] == word) * real).sum(1).float() for word in (3, 5))
        return (torch.stack([happy, 2 * fine], 1),)


class Tokenizer:
    """As much as is asked of one."""

    all_special_ids = (0, 1)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [WORDS[place] for place in ids]


def test_a_word_weighs_what_the_answer_loses_without_it() -> None:
    ids = torch.tensor([[1, 2, 3, 6, 4, 5, 0, 0], [1, 2, 3, 6, 4, 5, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    network = Reader()
    one = _one(inputs, 0)
    assert one["input_ids"].shape == (1, 6)
    tokenizer: Any = Tokenizer()
    found = dict(_weighed(network, one, network(inputs)[-1][0], tokenizer))
    assert list(found) == ["a", "fine", "film", "unhappy"]
    # for the answer, and against it; the others change nothing
    assert found["fine"] == 1.0
    assert -1.0 < found["unhappy"] < 0.0
    assert found["a"] == found["film"] == 0.0
    # the text itself is left as it was
    assert one["attention_mask"].tolist() == [[1] * 6]


def test_the_rest_of_a_cut_word_stands_alone() -> None:
    assert list(_whole_words(["##ing", "up", "##on"], [0.1, 0.2, -0.4])) == [
        ("ing", 0.1),
        ("upon", -0.4),
    ]
