"""Which words of a text an answer depends on: what changes when one of them is masked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import impatient
from impatient.errors import ModelSpecError
from impatient.verbs.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor

Words = tuple[tuple[str, float], ...]
# what begins the rest of a word in WordPiece
REST = "##"
# tokens of a text that are masked, each in a run of its own
MOST_TOKENS = 96


def highlighted(run: RunDirectory, inputs: Any, output: Any) -> list[Words]:
    """Weigh the words of some texts by what the last exit's answer loses without each.

    Args:
        run: the run directory.
        inputs: raw inputs, padded to one length.
        output: the last exit's output for each, logits of classes.
    Returns:
        Words with weights from -1 to 1 for each text; none where inputs are no texts with a mask,
        or the network may not be built.
    """
    import torch

    from impatient.training.text import tokenizer_of

    texts = isinstance(inputs, Mapping) and {"input_ids", "attention_mask"} <= inputs.keys()
    tokenizer = tokenizer_of(run.spec().data) if texts else None
    if tokenizer is None or not run.spec().means.is_logits:
        return []
    try:
        network, _ = run.network()
    except ModelSpecError:
        # the caller has said so
        return []
    with torch.inference_mode():
        return [
            _weighed(network, _one(inputs, row), output[row], tokenizer)
            for row in range(len(output))
        ]


def _one(inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """Take one text, without its padding if that stands at the end."""
    length = int(inputs["attention_mask"][row].nonzero().max()) + 1
    return {name: part[row : row + 1, :length] for name, part in inputs.items()}


def _weighed(
    network: impatient.Network, text: Mapping[str, Tensor], output: Tensor, tokenizer: Any
) -> Words:
    """Mask the tokens of a text one by one."""
    import torch

    ids = text["input_ids"][0].tolist()
    special = set(tokenizer.all_special_ids)
    places = [place for place, token in enumerate(ids) if token not in special][:MOST_TOKENS]
    if not places:
        return ()
    many = {name: part.repeat(len(places), 1) for name, part in text.items()}
    many["attention_mask"][torch.arange(len(places)), torch.tensor(places)] = 0
    answer = int(output.argmax())
    without = network(many)[-1].softmax(-1)[:, answer]
    lost = (output.softmax(-1)[answer] - without).tolist()
    tokens = tokenizer.convert_ids_to_tokens([ids[place] for place in places])
    words = list(_whole_words(tokens, lost))
    most = max(abs(weight) for _, weight in words) or 1.0
    return tuple((word, weight / most) for word, weight in words)


def _whole_words(tokens: Sequence[str], weights: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Join the parts of words.

    A word weighs what its heaviest part weighs.
    """
    word, heaviest = "", 0.0
    for token, weight in zip(tokens, weights, strict=True):
        if word and not token.startswith(REST):
            yield word, heaviest
            word, heaviest = "", 0.0
        word += token.removeprefix(REST)
        heaviest = max(heaviest, weight, key=abs)
    if word:
        yield word, heaviest
