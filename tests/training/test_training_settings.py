"""Every option of training with every other: all pairs of settings pass the same checks."""

import dataclasses
import itertools
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from impatient.errors import StaleInput, TrainingError
from impatient.networks import MultiExitNetwork, RunningEnsemble
from impatient.training import AdaLoss, Recipe, loop
from small_training import BRIEF, few, small, state, train

# one row of weights per sample of few()
ROWS = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 2.0]]).repeat(44, 1)

SETTINGS: dict[str, tuple[Any, ...]] = {
    "weights": ("uniform", "sieve:total=all", (0.2, 0.3, 0.5), AdaLoss(update_every=3), ROWS),
    "sampler": ("none", "alternating", "exp3", "rwm", "avgl"),
    "equilibrium": (False, True),
    "detach": (0.0, 0.5),
    "distillation": (0.0, 0.5),
    "head_decay": ("plain", "scaled"),
    "regime": ("joint", "frozen", "mixed"),
    "rule": ("", "boosted"),
}


def makes_sense(setting: dict[str, Any]) -> bool:
    return not isinstance(setting["weights"], Tensor) or setting["sampler"] == "none"


def all_pairs() -> list[dict[str, Any]]:
    """A few settings in which every two values of different options meet."""
    names = list(SETTINGS)
    places = {name: range(len(values)) for name, values in SETTINGS.items()}

    def pairs(setting: dict[str, int]) -> set[Any]:
        return {((a, setting[a]), (b, setting[b])) for a, b in itertools.combinations(names, 2)}

    def values(setting: dict[str, int]) -> dict[str, Any]:
        return {name: SETTINGS[name][place] for name, place in setting.items()}

    everything = [
        dict(zip(names, choice, strict=True)) for choice in itertools.product(*places.values())
    ]
    possible = [setting for setting in everything if makes_sense(values(setting))]
    # in an order, so that every run has the same settings
    missing = set().union(*map(pairs, possible))
    chosen = []
    while missing:
        best = max(
            possible[:: 1 + len(possible) // 997]
            + [s for s in possible if min(missing) in _items(s)],
            key=lambda setting: len(pairs(setting) & missing),
        )
        missing -= pairs(best)
        chosen.append(values(best))
    return chosen


def _items(setting: dict[str, int]) -> set[Any]:
    return {((a, setting[a]), (b, setting[b])) for a, b in itertools.combinations(setting, 2)}


PAIRS = all_pairs()


def built(setting: dict[str, Any], **options: Any) -> MultiExitNetwork | RunningEnsemble:
    network = small(**options)
    return RunningEnsemble(network, setting["rule"]) if setting["rule"] else network


def recipe_of(setting: dict[str, Any], **more: Any) -> Recipe:
    own = {
        name: setting[name]
        for name in ("sampler", "equilibrium", "detach", "distillation", "head_decay", "regime")
    }
    return dataclasses.replace(BRIEF, temperature=2.0, **own, **more)


def named(setting: dict[str, Any]) -> str:
    plain = {**setting, "weights": type(setting["weights"]).__name__}
    return "-".join(
        f"{value}" for value in plain.values() if value not in ("", False, 0.0, "none", "plain")
    )


def test_the_table_meets_every_pair_that_makes_sense() -> None:
    for (a, these), (b, those) in itertools.combinations(SETTINGS.items(), 2):
        for one, other in itertools.product(these, those):
            if {a, b} == {"weights", "sampler"} and isinstance(one, Tensor) and other != "none":
                continue
            assert any(setting[a] is one and setting[b] is other for setting in PAIRS), (
                a,
                one,
                b,
                other,
            )
    assert len(PAIRS) < 50


@pytest.mark.slow
@pytest.mark.parametrize("setting", PAIRS, ids=named)
def test_the_loss_falls_and_every_exit_that_weighs_learns(setting: dict[str, Any]) -> None:
    network = built(setting, dropout=0.0)
    before = state(network)
    history = train(
        network, recipe=recipe_of(setting, epochs=8, augment="none"), weights=setting["weights"]
    )
    # where the last exit's own output stays as it is
    if setting["regime"] != "frozen":
        assert history.epochs[-1].train_loss[-1] < history.epochs[0].train_loss[-1]
    assert history.epochs[-1].train_loss[0] < history.epochs[0].train_loss[0]
    moved = {
        name for name, value in network.state_dict().items() if not torch.equal(value, before[name])
    }
    assert all(any(f"heads.{exit}." in name for name in moved) for exit in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("setting", PAIRS, ids=named)
def test_stopped_in_the_middle_of_an_epoch_it_goes_on_bit_for_bit(
    setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(setting, epochs=3)
    whole = built(setting)
    stopped = built(setting)
    train(whole, recipe=recipe, weights=setting["weights"])
    steps = itertools.count()
    update = loop._Training._update

    def until_the_tenth(self: Any, *args: Any) -> Tensor:
        # of 18: in the second epoch, when the samplers have begun to learn
        if next(steps) == 9:
            signal.raise_signal(signal.SIGINT)
        return update(self, *args)

    monkeypatch.setattr(loop._Training, "_update", until_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        train(
            stopped,
            recipe=recipe,
            weights=setting["weights"],
            checkpoint=tmp_path / "c.safetensors",
        )
    monkeypatch.undo()
    resumed = built(setting)
    train(resumed, recipe=recipe, weights=setting["weights"], checkpoint=tmp_path / "c.safetensors")
    for (name, one), other in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.slow
@pytest.mark.parametrize("setting", PAIRS, ids=named)
def test_what_was_trained_together_answers_the_same_exit_by_exit(setting: dict[str, Any]) -> None:
    network = built(setting)
    train(network, recipe=recipe_of(setting, epochs=2), weights=setting["weights"])
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad(), network.exits(x) as run:
        one_by_one = [exit.output() for exit in run]
        together = network(x)
    assert all(torch.equal(a, b) for a, b in zip(one_by_one, together, strict=True))


# --- each option by itself ------------------------------------------------------------------------


def one_step(**options: Any) -> tuple[MultiExitNetwork, dict[str, Tensor]]:
    """A network after one plain step of gradient descent on one batch, and its weights before."""
    weights = options.pop("weights", "uniform")
    network = small(dropout=0.0)
    before = state(network)
    recipe = Recipe(epochs=1, batch_size=88, lr=0.05, momentum=0.0, weight_decay=0.0, warmup=0.0)
    train(network, recipe=dataclasses.replace(recipe, **options), weights=weights)
    return network, before


def test_weights_of_samples_that_are_all_alike_are_weights_of_exits() -> None:
    one, _ = one_step(weights=[0.5, 0.25, 1.0])
    other, _ = one_step(weights=torch.tensor([[0.5, 0.25, 1.0]]).repeat(88, 1))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_sample_without_weight_teaches_nothing() -> None:
    rows = torch.ones(88, 3)
    rows[44:] = 0.0
    network, _ = one_step(weights=rows)
    spoilt = small(dropout=0.0)
    data = few()
    # their labels do not matter
    data.examples("train").labels[44:] = 0
    recipe = Recipe(epochs=1, batch_size=88, lr=0.05, momentum=0.0, weight_decay=0.0, warmup=0.0)
    train(spoilt, data, recipe, weights=rows)
    for a, b in zip(network.parameters(), spoilt.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (torch.ones(87, 3), "87, 3.*88 training samples and 3 exits"),
        (torch.ones(88, 4), "88 training samples and 3 exits"),
        (-torch.ones(88, 3), "not negative"),
        (torch.zeros(88, 3), "one must be positive"),
        (torch.full((88, 3), float("nan")), "finite"),
    ],
)
def test_weights_of_samples_that_make_no_sense_are_refused(rows: Tensor, complaint: str) -> None:
    with pytest.raises(TrainingError, match=complaint):
        train(small(), weights=rows)


def test_weights_of_samples_cannot_be_sampled_from() -> None:
    with pytest.raises(TrainingError, match="one set of weights"):
        train(small(), weights=ROWS, recipe=dataclasses.replace(BRIEF, sampler="alternating"))


def test_head_decay_follows_the_weights() -> None:
    """With no gradient to speak of, weight decay alone shrinks the heads, each in proportion to its
    exit's weight.
    """
    kept = {}
    for head_decay in ("plain", "scaled"):
        network = small(dropout=0.0)
        before = state(network)
        recipe = Recipe(
            epochs=1,
            batch_size=88,
            lr=1e-4,
            momentum=0.0,
            weight_decay=1000.0,
            warmup=0.0,
            head_decay=head_decay,
        )
        train(network, recipe=recipe, weights=[0.25, 0.5, 1e-6])
        name = "heads.{}.1.weight"
        kept[head_decay] = [
            float((network.state_dict()[name.format(exit)] / before[name.format(exit)]).median())
            for exit in range(2)
        ]
        classifier = network.backbone.classifier.weight / before["backbone.classifier.weight"]
        # 1 - lr decay: no head
        assert float(classifier.detach().median()) == pytest.approx(0.9, abs=2e-3)
    assert kept["plain"] == pytest.approx([0.9, 0.9], abs=2e-3)
    assert kept["scaled"] == pytest.approx([1 - 0.1 * 0.25, 1 - 0.1 * 0.5], abs=2e-3)


def test_distillation_alone_moves_early_heads_towards_the_last_exit() -> None:
    network = small(dropout=0.0)
    x = few().preprocess(few().examples("train").take(range(88)))

    def distance() -> float:
        with torch.no_grad():
            first, _, last = (output.log_softmax(-1) for output in network(x))
        return float((last.exp() * (last - first)).sum(-1).mean())

    before = distance()
    train(
        network,
        recipe=dataclasses.replace(
            BRIEF, epochs=8, augment="none", regime="frozen", distillation=1.0
        ),
    )
    assert distance() < 0.5 * before


def test_adaloss_gives_more_weight_where_the_loss_is_small(tmp_path: Path) -> None:
    from impatient.files import read_header

    settings = AdaLoss(momentum=0.5, update_every=1, final_extra=0.0, gamma=0.0)
    train(
        small(dropout=0.0),
        recipe=dataclasses.replace(BRIEF, epochs=8),
        weights=settings,
        checkpoint=tmp_path / "c",
    )
    held = read_header(tmp_path / "c")["balancer"]
    averages = torch.tensor(held["averages"])
    base = torch.tensor(held["base"])
    torch.testing.assert_close(base, averages.min() / averages)
    assert held["steps"] == 8 * 6


def test_adaloss_has_a_name() -> None:
    train(small(), recipe=dataclasses.replace(BRIEF, epochs=1), weights="adaloss")


@pytest.mark.parametrize(
    "other",
    [
        {"sampler": "exp3"},
        {"equilibrium": True},
        {"detach": 0.5},
        {"distillation": 0.1},
        {"head_decay": "scaled"},
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    train(small(), recipe=dataclasses.replace(BRIEF, epochs=1), checkpoint=tmp_path / "c")
    with pytest.raises(StaleInput, match="another recipe"):
        train(
            small(), recipe=dataclasses.replace(BRIEF, epochs=1, **other), checkpoint=tmp_path / "c"
        )


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"sampler": "ucb"}, "sampler='ucb'; expected one of none, alternating"),
        ({"detach": 1.0}, "detach=1.0"),
        ({"distillation": 1.5}, "distillation=1.5"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"sampler_gamma": -1.0}, "sampler_gamma=-1.0"),
        ({"head_decay": "no"}, "head_decay='no'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TrainingError, match=complaint):
        Recipe(**options)
