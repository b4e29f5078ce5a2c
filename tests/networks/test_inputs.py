"""Inputs and outputs that are not one tensor."""

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import impatient
from impatient.errors import NetworkError
from impatient.inputs import (
    batch_size_of,
    call_model,
    first_tensor,
    output_tensor,
    resized,
)
from impatient.networks import attach_exits
from impatient.networks.shrinking import kind_of
from impatient.trees import leaves, map_samples
from staging import CLASSES, WIDTH, assert_same, attach, linear, staged, x_of


@dataclass
class Answer:
    loss: Tensor | None
    logits: Tensor


@dataclass
class Hidden:
    note: str
    hidden: Tensor


class Shaped(nn.Module):
    """A model of two tensors whose output has a given form."""

    def __init__(
        self, form: Callable[[Tensor], Any], inner_form: Callable[[Tensor], Any] = lambda x: x
    ) -> None:
        super().__init__()
        self.block = Wrapped(inner_form)
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.form = form

    def forward(self, first: Tensor, second: Tensor | None = None) -> Any:
        features = self.block(first if second is None else first - second)
        return self.form(self.classifier(first_tensor(features)))


class Wrapped(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = linear()
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.layer(x))


def unchanged(x: Tensor) -> Tensor:
    return x


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": unchanged,
    "tuple": lambda x: (x, None),
    "late in a tuple": lambda x: (None, "note", x, x.sum()),
    "dict with logits": lambda x: {"loss": x.sum(), "logits": x},
    "dict without": lambda x: {"note": 1, "scores": x},
    "dataclass with logits": lambda x: Answer(x.sum(), x),
}


@pytest.mark.parametrize("form", FORMS)
def test_output_is_found_in_every_form(form: str) -> None:
    model = Shaped(FORMS[form])
    x = x_of()
    network = attach(model, "block")
    truth = model.classifier(model.block(x))
    assert_same([network(x)[-1], staged(network, x)[-1]], [truth, truth])
    assert [fact.features for fact in network.stage_facts(x)] == [(4, WIDTH), (4, CLASSES)]


@pytest.mark.parametrize(
    "form",
    [
        unchanged,
        lambda x: (x, None),
        lambda x: [None, x],
        lambda x: {"hidden": x},
        lambda x: Hidden("", x),
    ],
)
def test_features_are_found_in_every_form(form: Callable[[Tensor], Any]) -> None:
    model = Shaped(unchanged, form)
    x = x_of()
    network = attach(model, "block")
    truth = network.heads[0](model.block.layer(x))
    assert_same([network(x)[0], staged(network, x)[0]], [truth, truth])


def test_mappings_are_passed_as_keywords_and_sequences_as_positions() -> None:
    model = Shaped(unchanged)
    first = x_of()
    second = x_of()
    named = {"second": second, "first": first}
    network = attach(model, "block", example=named)
    truth = [network.heads[0](model.block(first - second)), model(first, second)]
    for x in (named, (first, second), [first, second]):
        assert_same(staged(network, x), truth)
        assert_same(network(x), truth)


def test_auto_placement_works_on_mappings(toy: nn.Module, toy_input: Tensor) -> None:
    network = attach_exits(toy, example={"x": toy_input}, count=3)
    assert_same(staged(network, {"x": toy_input}), network(toy_input))


def test_output_without_a_tensor_is_refused() -> None:
    with pytest.raises(NetworkError, match="without a tensor"):
        attach(Shaped(lambda x: {"note": 1}), "block")
    with pytest.raises(NetworkError, match="int without a tensor"):
        output_tensor(3)


def test_call_model_passes_one_tensor_as_it_is() -> None:
    assert call_model(lambda x: x, 7) == 7
    assert call_model(lambda *xs: xs, (1, 2)) == (1, 2)
    assert call_model(lambda **xs: xs, {"a": 1}) == {"a": 1}


# --- walking through an input ---------------------------------------------------------------------


class Pair(NamedTuple):
    words: Tensor
    mask: Tensor


class Batch(UserDict[str, Any]):
    """A mapping that torch does not know, such as a tokenizer's."""


def inputs_of(words: Tensor, mask: Tensor) -> list[Any]:
    return [
        words,
        [words, mask],
        Pair(words, mask),
        {"words": words, "rest": (mask, None)},
        Batch(words=words, mask=mask),
    ]


@pytest.mark.parametrize("kind", range(5))
def test_an_input_of_any_kind_is_resized_and_keeps_its_kind(kind: int) -> None:
    x = inputs_of(torch.arange(12).view(4, 3), torch.ones(4, 2))[kind]
    (wanted,) = [inputs_of(torch.tensor([[0, 1, 2]] * 6), torch.ones(6, 2))[kind]]
    found = resized(x, 6)
    assert type(found) is (dict if isinstance(x, Batch) else type(x))
    assert batch_size_of(found) == 6
    for part, other in zip(leaves(found), leaves(wanted), strict=True):
        assert torch.equal(part, other)


def test_what_has_no_row_per_sample_stays_as_it_is() -> None:
    scale = torch.tensor(2.0)
    anchors = torch.ones(7, 2)
    found = map_samples(lambda value: value[:1], {"x": torch.ones(4, 3), "s": scale, "a": anchors})
    assert found["x"].shape == (1, 3)
    assert found["s"] is scale
    assert found["a"] is anchors


class Nested(nn.Module):
    """Takes a scale for all samples, and a pair of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.block = linear()
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, scale: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.classifier(self.block(scale * pair[0] + pair[1]))


def test_samples_are_found_however_deep_and_behind_a_scalar() -> None:
    x = (torch.tensor(2.0), (x_of(4), x_of(4)))
    assert batch_size_of(x) == 4
    network = attach(Nested(), "block", example=x).eval()
    costs = impatient.profile(network, x, batch_sizes=(1, 4), repeats=5, warm_up=1)
    with impatient.Runner(network, costs) as runner:
        answers = [runner.run(x), runner.start(x).result()]
    for answer in answers:
        assert torch.equal(answer.output, network(x)[-1])


@pytest.mark.parametrize("x", [None, np.ones((2, 3)), torch.tensor(1.0), {"note": "a"}])
def test_an_input_without_samples_is_told_from_a_bad_cut(x: Any) -> None:
    with pytest.raises(NetworkError, match=r"an input of type \w+ holds no tensor.*as_tensor"):
        batch_size_of(x)


def test_a_named_tuple_goes_through_the_trial_of_shrinking_and_is_one_kind() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = linear()
            self.classifier = nn.Linear(WIDTH, CLASSES)

        def forward(self, words: Tensor, mask: Tensor) -> Tensor:
            return self.classifier(self.block(words * mask))

    x = Pair(x_of(4), torch.randn(4, 1))
    network = attach(Sums(), "block", example=x).eval()
    assert network.shrinks(x)
    assert kind_of(x) == kind_of(Pair(x_of(2), torch.randn(2, 1)))
    assert kind_of(x) != kind_of((x_of(4), torch.randn(4, 1)))
