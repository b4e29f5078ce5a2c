"""Inputs and outputs that are not one tensor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor, nn

from impatient.errors import NetworkError
from impatient.networks import attach_exits
from impatient.networks.describe import stage_facts
from impatient.networks.stages import call_model, first_tensor, output_tensor
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
    """Takes two tensors, one by keyword, and gives its output in the form asked for."""

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
    "late in a tuple": lambda x: (None, "note", x, x * 2),
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
    assert [fact.features for fact in stage_facts(network, x)] == [(4, WIDTH), (4, CLASSES)]


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
