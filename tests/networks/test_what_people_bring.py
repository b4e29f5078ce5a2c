"""Models as people bring them: what cannot be read rightly is refused, and says what to do."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impatient.engines.network import NetworkFacts, exported
from impatient.engines.partition import partition
from impatient.errors import (
    AmbiguousCut,
    HeadError,
    ImpatientError,
    LogitsWarning,
    NetworkError,
)
from impatient.networks import MultiExitNetwork, attach_exits

X = torch.linspace(-1, 1, 16).reshape(2, 8)


def blocks(count: int = 3) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(count)]


class Several(nn.Module):
    """Gives an embedding and logits in a form."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks())
        self.classifier = nn.Linear(8, 3)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.form(x, self.classifier(x))


def outputs(network: MultiExitNetwork, x: Any) -> list[Tensor]:
    with torch.no_grad(), network.exits(x) as run:
        return [exit.output().clone() for exit in run]


# --- which output is the answer -------------------------------------------------------------------

FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {
    "place": (lambda embedding, logits: (embedding, logits), 1),
    "place from the end": (lambda embedding, logits: [embedding, logits], -1),
    "key": (lambda embedding, logits: {"features": embedding, "pred": logits}, "pred"),
    "function": (
        lambda embedding, logits: {"inner": {"features": embedding, "pred": logits}},
        lambda value: value["inner"]["pred"],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_is_named_and_not_guessed(form: str) -> None:
    make, name = FORMS[form]
    model = Several(make).eval()
    with pytest.raises(NetworkError, match=r"several tensors that may be its answer.*output="):
        attach_exits(model, after=["blocks.0"], example=X)
    for after in (["blocks.0"], "auto"):
        network = attach_exits(model, after=after, count=2, example=X, output=name).eval()
        truth = model.classifier(model.blocks[2](model.blocks[1](model.blocks[0](X))))
        assert torch.equal(network(X)[-1], truth)
        assert torch.equal(outputs(network, X)[-1], truth)
    made = exported(partition(network, X), NetworkFacts.of(network, X))
    torch.testing.assert_close(outputs(made, X)[-1], truth)  # type: ignore[arg-type]
    torch.testing.assert_close(made.exit_free(X), truth)


def test_answers_within_one_entry_are_taken_out_by_a_function() -> None:
    make, name = FORMS["function"]
    with pytest.raises(NetworkError, match=r"output=FUNCTION OF WHAT IT RETURNS"):
        attach_exits(Several(make).eval(), after=["blocks.0"], example=X)
    attach_exits(Several(make).eval(), after=["blocks.0"], example=X, output=name)


def test_a_list_of_outputs_of_one_shape_points_to_networks_of_ones_own() -> None:
    with pytest.raises(NetworkError, match=r"derive from impatient\.Network"):
        attach_exits(Several(lambda _, logits: [logits, logits * 2]), after=["blocks.0"], example=X)


def test_a_name_that_is_not_there_lists_what_is() -> None:
    model = Several(lambda embedding, logits: {"features": embedding, "pred": logits})
    with pytest.raises(NetworkError, match=r"without output='logits'.*features, pred"):
        attach_exits(model, after=["blocks.0"], example=X, output="logits")
    with pytest.raises(NetworkError, match=r"gives a float; expected a tensor"):
        attach_exits(model, after=["blocks.0"], example=X, output=lambda _: 1.0)


# --- logits ---------------------------------------------------------------------------------------


class PerCent(nn.Module):
    def forward(self, shares: Tensor) -> Tensor:
        return 100 * shares


@pytest.mark.parametrize(
    ("end", "word"),
    [
        ([nn.Linear(8, 1)], "one output column"),
        ([nn.Linear(8, 4), nn.Softmax(1)], "look like probabilities"),
        ([nn.Linear(8, 4), nn.Softmax(1), PerCent()], "rows that sum to 100"),
    ],
)
def test_outputs_that_are_no_logits_are_noticed(end: list[nn.Module], word: str) -> None:
    with pytest.warns(LogitsWarning, match=word):
        attach_exits(nn.Sequential(*blocks(), *end), after=["0"], example=X)


def test_logits_pass_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_exits(nn.Sequential(*blocks(), nn.Linear(8, 4)), after=["0"], example=X)


# --- features that do not begin with the batch ----------------------------------------------------


class TimeFirst(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(
            nn.LSTM(8, 8) if kind == "lstm" else nn.TransformerEncoderLayer(8, 2, 16)
            for _ in range(3)
        )
        self.classifier = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.classifier(x.mean(0))


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
@pytest.mark.parametrize("shape", [(1, 7), (2, 7), (7, 7), (1, 1)])
def test_samples_in_another_dimension_are_refused(kind: str, shape: tuple[int, int]) -> None:
    ids = torch.arange(shape[0] * shape[1]).reshape(shape) % 20
    with pytest.raises(HeadError, match=r"in dimension 1.*batch_first=True"):
        attach_exits(TimeFirst(kind), after=["layers.0"], example=ids)
    if kind == "transformer":
        with pytest.raises(NetworkError, match="batch_first=True"):
            attach_exits(TimeFirst(kind), after="auto", count=2, example=ids)


def test_a_model_for_one_batch_size_is_judged_by_the_example() -> None:
    class Fixed(Several):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.reshape(2, 8))

    model = Fixed(lambda _, logits: logits)
    assert attach_exits(model, after=["blocks.0"], example=X).num_exits == 2


# --- modules --------------------------------------------------------------------------------------


def test_another_name_of_a_shared_block_is_followed() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model = nn.Sequential(nn.Linear(8, 8), block, block, nn.Linear(8, 3))
    with pytest.raises(AmbiguousCut, match="1@0, 1@1"):
        attach_exits(model, after=["2"], example=X)
    with attach_exits(model, after=["2@1"], example=X).exits(X) as run:
        assert torch.equal(next(run).features, block(block(model[0](X))))


class Adapted(nn.Module):
    """A layer with a low-rank part beside it, as LoRA makes them."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.low = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.low(x)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_exits_follow_modules_that_are_replaced(copied: bool, whole: bool) -> None:
    model = Several(lambda _, logits: logits)
    network = attach_exits(model, after=["blocks.0", "blocks.1"], example=X).eval()
    if copied:
        network = copy.deepcopy(network)
    inner = network.backbone
    assert isinstance(inner, Several)
    if whole:
        inner.blocks = nn.ModuleList(blocks())
    else:
        inner.blocks[1] = Adapted(inner.blocks[1])
    features = inner.blocks[1](inner.blocks[0](X))
    with network.exits(X) as run:
        next(run)
        assert torch.equal(next(run).features, features)
    assert torch.equal(network(X)[1], network.heads[1](features))


def test_a_cut_whose_module_is_gone_says_so() -> None:
    model = Several(lambda _, logits: logits)
    network = attach_exits(model, after=["blocks.2"], example=X)
    model.blocks = nn.ModuleList(blocks(2))
    with pytest.raises(NetworkError, match=r"no module 'blocks.2' any more.*Attach exits after"):
        network(X)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_say_how_to_switch_them_off() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 3)
            self.classifier = nn.Linear(8, 3)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.classifier(self.encoder(x, src_key_padding_mask=mask)[:, 0])

    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with pytest.raises(HeadError, match="enable_nested_tensor=False"):
        attach_exits(Masked(), after=["encoder.layers.0"], example={"x": x, "mask": mask})
    with pytest.raises(NetworkError, match="enable_nested_tensor=False"):
        attach_exits(Masked(), after="auto", count=2, example={"x": x, "mask": mask})
    network = attach_exits(Masked(), after=["encoder.layers.0"], example={"x": x}).eval()
    with pytest.raises(HeadError, match="enable_nested_tensor=False"):
        outputs(network, {"x": x, "mask": mask})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("after", [["1"], "auto"])
def test_scripted_and_exported_models_are_refused(after: Any) -> None:
    model = nn.Sequential(*blocks(), nn.Linear(8, 3)).eval()
    for made in (
        torch.jit.script(model),
        torch.jit.trace(model, X),
        torch.export.export(model, (X,)).module(),
    ):
        with pytest.raises(NetworkError, match="scripted, traced or exported"):
            attach_exits(made, after=after, count=2, example=X)
    graph = torch.fx.symbolic_trace(model)
    assert attach_exits(graph, after=["1.1"], example=X).num_exits == 2


# --- what attach_exits is given -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (
            {"example": X[:, :3]},
            r"fails on the example, a Tensor \(\(2, 3\) of torch.float32\): mat1",
        ),
        ({"example": X.long()}, r"of torch.int64\): "),
        ({"example": (X, X)}, r"a tuple \(0 \(2, 8\) of .*positional arguments.*as positions"),
        ({"example": X.numpy()}, r"a ndarray \(without tensors\)"),
        ({"after": [1]}, r"after=\[1\] holds 1; expected names of modules, such as '0'"),
        ({"after": "auto", "count": "2"}, r"count='2'; expected at least 1 exit"),
        ({"heads": nn.Linear(8, 3)}, r"a Linear, a module that is made already.*heads=lambda"),
        ({"heads": [nn.Linear(8, 3)]}, r"a Linear, a module that is made already.*heads=lambda"),
    ],
)
def test_a_wrong_argument_is_said_with_what_is_expected(given: dict[str, Any], word: str) -> None:
    model = nn.Sequential(*blocks(), nn.Linear(8, 3))
    with pytest.raises(ImpatientError, match=word):
        attach_exits(model, **{"after": ["0"], "example": X, **given})
