"""Padding changes no answer: exits read the tokens that the mask keeps, whatever stands beside."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impatient.engines.network import NetworkFacts, exported
from impatient.engines.partition import partition
from impatient.errors import HeadError, NetworkError
from impatient.networks import FeatureShape, MultiExitNetwork, attach_exits, load_model
from impatient.networks.combined_exits import RunningEnsemble
from impatient.networks.heads import Pool

CLASSES = 3
VOCABULARY = 50
_ENCODER = "hidden_size=16,num_hidden_layers=4,num_attention_heads=2,intermediate_size=32"
MODELS = {
    "bert": f"BertConfig:vocab_size=50,{_ENCODER}",
    "distilbert": "DistilBertConfig:vocab_size=50,dim=16,n_heads=2,n_layers=4,hidden_dim=32",
    "roberta": f"RobertaConfig:vocab_size=50,{_ENCODER}",
    "electra": f"ElectraConfig:vocab_size=50,embedding_size=16,{_ENCODER}",
}


class Encoder(nn.Module):
    """A small text encoder that takes its mask in second place, and never mixes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        weights = torch.ones(ids.shape) if mask is None else mask.float()
        return self.classifier((x * weights[..., None]).sum(1) / weights.sum(1, keepdim=True))


def text(lengths: list[int], longest: int) -> dict[str, Tensor]:
    """Texts that begin alike, with other lengths and as much padding as that takes."""
    tokens = torch.randint(2, VOCABULARY, (longest,), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    # padding that is seen if it is read
    return {"input_ids": torch.where(mask == 1, tokens, 1), "attention_mask": mask}


def outputs(network: nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad(), network.exits(x) as run:
        return [exit.output().clone() for exit in run]


def assert_alike(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def encoder(heads: str = "linear", **options: Any) -> MultiExitNetwork:
    torch.manual_seed(0)
    given = text([3, 5], 6)
    example = {"ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    return attach_exits(
        Renamed(),
        after=["inner.blocks.0", "inner.blocks.1"],
        heads=heads,
        example=example,
        **options,
    ).eval()


class Renamed(nn.Module):
    """The encoder, with the usual name of the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Encoder()

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner(ids, attention_mask)


def renamed(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"ids": x["input_ids"], "attention_mask": x["attention_mask"]}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_text_gets_the_same_exits_at_any_padding_and_in_any_batch(model: str) -> None:
    torch.manual_seed(0)
    backbone = load_model(f"transformers:{MODELS[model]}", num_classes=CLASSES)
    network = attach_exits(backbone, after="auto", count=3, example=text([5], 9)).eval()
    alone = outputs(network, text([6], 6))
    for lengths, longest in (([6], 7), ([6], 30), ([6, 2, 12], 12), ([6, 12, 1], 20)):
        padded = outputs(network, text(lengths, longest))
        assert_alike([output[:1] for output in padded], alone)
    with torch.no_grad():
        assert_alike(list(network(text([6], 30))), alone)


@pytest.mark.parametrize("heads", ["linear", "relu_linear", "mlp", "conv1x1"])
def test_every_head_that_pools_tokens_leaves_padding_out(heads: str) -> None:
    network = encoder(heads)
    alone = outputs(network, renamed(text([4], 4)))
    padded = outputs(network, renamed(text([4, 9], 11)))
    assert_alike([output[:1] for output in padded], alone)


def test_gates_see_features_without_padding() -> None:
    network = encoder()
    for wrapped in (network, RunningEnsemble(network, "poe").eval()):
        seen = []
        for x in (text([4], 4), text([4], 9)):
            with torch.no_grad(), wrapped.exits(renamed(x)) as run:
                seen.append([wrapped.pooled(exit) for exit in run])
        assert_alike(seen[0], seen[1])


def test_without_a_mask_or_with_mask_none_all_tokens_count() -> None:
    x = renamed(text([4, 9], 9))
    network = encoder(mask=None)
    with network.exits(x) as run:
        features = next(run).features
        mean = features.mean(1)
        exit_output = network.heads[0][1](mean)
    assert torch.equal(outputs(network, x)[0], exit_output)
    assert encoder().mask_of({"ids": x["ids"]}) is None


@pytest.mark.parametrize("mask", [1, lambda x: x[1]], ids=["by its place", "by a function"])
def test_the_user_says_where_the_mask_is(mask: Any) -> None:
    torch.manual_seed(0)
    short, padded = (tuple(text([4], longest).values()) for longest in (4, 9))
    network = attach_exits(
        Encoder(), after=["blocks.0", "blocks.1"], example=padded, mask=mask
    ).eval()
    assert_alike(outputs(network, short), outputs(network, padded))


@pytest.mark.parametrize(("kind", "mask"), [(dict, "mask"), (dict, 1), (tuple, 2), (tuple, "mask")])
def test_a_mask_that_is_named_and_not_there_is_refused(kind: type, mask: str | int) -> None:
    both = text([4, 9], 9)
    example = both if kind is dict else tuple(both.values())
    with pytest.raises(NetworkError, match=f"mask={mask!r} is not in the example"):
        attach_exits(Encoder(), after=["blocks.0"], example=example, mask=mask)


def test_a_run_that_shrinks_shrinks_its_mask() -> None:
    torch.manual_seed(0)

    class Early(Encoder):
        """Reads its mask before the first cut only."""

        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.embedding(ids) * attention_mask[..., None]
            for block in self.blocks:
                x = block(x)
            return self.classifier(x.mean(1))

    x = text([4, 9, 2], 9)
    x = {"ids": x["input_ids"], "attention_mask": x["attention_mask"]}
    network = attach_exits(Early(), after=["blocks.0", "blocks.1"], example=x).eval()
    # masks of the trial differ in length only where its example has no padding
    assert network.shrinks(renamed(text([9], 9)))
    whole = outputs(network, x)
    with torch.no_grad(), network.exits(x) as run:
        first = next(run)
        run.keep([2, 0])
        # the exit at hand keeps all its rows
        assert torch.equal(first.output(), whole[0])
        second = next(run).output()
    torch.testing.assert_close(second, whole[1][[2, 0]])


def test_an_engine_pools_by_the_mask_in_its_stages() -> None:
    network = encoder()
    example = renamed(text([3, 5], 6))
    made = exported(partition(network, example), NetworkFacts.of(network, example))
    for lengths in ([6], [2, 6, 4], [1, 1]):
        x = renamed(text(lengths, 6))
        assert_alike(outputs(made, x), outputs(network, x))
        with torch.no_grad(), made.exits(x) as run, network.exits(x) as eager:
            pooled = [
                (made.pooled(one), network.pooled(other))
                for one, other in zip(run, eager, strict=True)
            ]
        assert_alike(*map(list, zip(*pooled, strict=True)))


def test_an_engine_refuses_heads_that_cannot_get_the_mask() -> None:
    with pytest.raises(NetworkError, match=r"inner\.blocks\.0 cannot get the padding mask"):
        partition(encoder("relu_linear"), renamed(text([3, 5], 6)))


def test_a_head_that_would_read_padding_is_refused() -> None:
    with pytest.raises(HeadError, match=r"would read padding.*'linear'.*mask=None"):
        encoder("flatten")
    assert encoder("flatten", mask=None).num_exits == 3


def test_a_head_of_the_users_own_gets_the_mask() -> None:
    class First(nn.Module):
        def __init__(self, features: FeatureShape, num_classes: int) -> None:
            super().__init__()
            self.pool = Pool(features.layout)
            self.linear = nn.Linear(features.channels, num_classes)

        def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.linear(self.pool(features, mask))

    network = encoder(First)  # type: ignore[arg-type]
    assert_alike(outputs(network, renamed(text([4], 4))), outputs(network, renamed(text([4], 9))))


def test_a_mask_of_other_positions_is_refused_with_both_sizes() -> None:
    with pytest.raises(HeadError, match=r"\(2, 7\), but the features have \[6\] positions"):
        Pool("NTD")(torch.zeros(2, 6, 3), torch.ones(2, 7))
    # a text of padding alone, and padding that holds infinities
    features = torch.full((2, 3, 4), torch.inf)
    features[1, :2] = 2.0
    pooled = Pool("NTD")(features, torch.tensor([[0, 0, 0], [1, 1, 0]]))
    assert pooled.tolist() == [[0.0] * 4, [2.0] * 4]


def test_positions_that_hold_several_tokens_count_where_one_of_them_is_real() -> None:
    features = torch.tensor([[[1.0], [2.0], [4.0]]])
    pool = Pool("NTD")
    for tokens, mask in ((6, [1, 1, 1, 0, 0, 0]), (5, [1, 1, 1, 0, 0])):
        assert len(mask) == tokens
        assert float(pool(features, torch.tensor([mask]))) == 1.5
    for tokens in (2, 4):
        with pytest.raises(HeadError, match="expected a mask"):
            pool(features, torch.ones(1, tokens))
