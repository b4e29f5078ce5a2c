"""Rules that combine exits: each against its formula worked out by hand or by plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from impatient.ensembling import RULED_OUT, RULES, Rule, Running, combine
from impatient.errors import PolicyError

NAMES = sorted(RULES)

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def outputs_of(
    seed: int, exits: int = 4, classes: int = 5, samples: int = 7, scale: float = 2.0
) -> Tensor:
    return scale * torch.randn(
        exits, samples, classes, generator=torch.Generator().manual_seed(seed)
    )


drawn = st.builds(
    outputs_of,
    st.integers(0, 10_000),
    exits=st.integers(1, 6),
    classes=st.integers(2, 8),
    samples=st.integers(1, 9),
    scale=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
)
any_rule = st.sampled_from(
    [*NAMES, Rule(name="geometric", weights="depth"), Rule(name="boosted", rate=0.9, detach=False)]
)


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([math.log(value) for value in probabilities])


# --- by hand --------------------------------------------------------------------------------------


def test_boosted_adds_half_of_all_that_was_before():
    combined = combine(torch.tensor([[4.0, 0.0], [0.0, 8.0], [1.0, 1.0]]), "boosted")
    assert combined.tolist() == [[4.0, 0.0], [2.0, 8.0], [2.0, 5.0]]
    doubled = combine(torch.tensor([[4.0, 0.0], [0.0, 8.0]]), Rule(name="boosted", rate=2.0))
    assert doubled.tolist() == [[4.0, 0.0], [8.0, 8.0]]


def test_arithmetic_is_the_mean_of_probabilities():
    combined = combine(torch.stack([logs(0.9, 0.1), logs(0.1, 0.9), logs(0.2, 0.8)]), "arithmetic")
    torch.testing.assert_close(combined.exp(), torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.4, 0.6]]))


@pytest.mark.parametrize(("weights", "share"), [("equal", 1 / 2), ("depth", 2 / 3)])
def test_geometric_is_the_normalised_product_of_powers(weights, share):
    combined = combine(
        torch.stack([logs(0.9, 0.1), logs(0.2, 0.8)]), Rule(name="geometric", weights=weights)
    )
    first = 0.9 ** (1 - share) * 0.2**share
    second = 0.1 ** (1 - share) * 0.8**share
    expected = torch.tensor([[0.9, 0.1], [first / (first + second), second / (first + second)]])
    torch.testing.assert_close(combined.exp(), expected)


def test_product_of_experts_by_hand():
    # K = 2: sqrt(ReLU(first)), then times ReLU(second)
    combined = combine(torch.tensor([[4.0, 1.0, -1.0], [1.0, 3.0, 5.0]]), "poe")
    torch.testing.assert_close(
        combined.exp(),
        torch.tensor([[2 / 3, 1 / 3, 0.0], [2 / 5, 3 / 5, 0.0]]),
        atol=1e-6,
        rtol=1e-6,
    )
    assert combined[:, 2].tolist() == [RULED_OUT, RULED_OUT]


def test_where_no_class_is_left_the_exit_speaks_for_itself():
    outputs = torch.tensor([[2.0, -1.0], [-2.0, 3.0], [4.0, 1.0]])
    combined = combine(outputs, "poe")
    torch.testing.assert_close(combined[1:], outputs[1:].log_softmax(-1))
    torch.testing.assert_close(combine(-torch.ones(1, 2), "poe").exp(), torch.tensor([[0.5, 0.5]]))


def test_caching_keeps_the_surest_and_the_earliest_of_equals():
    outputs = torch.stack([logs(0.6, 0.4), logs(0.4, 0.6), logs(0.2, 0.8), logs(0.7, 0.3)])
    assert combine(outputs, "caching").equal(outputs[[0, 0, 2, 2]])


# --- what holds for any outputs -------------------------------------------------------------------


def brute(name: str, outputs: Tensor) -> Tensor:
    """The probabilities, straight from the papers' formulas."""
    combined = []
    for last in range(len(outputs)):
        so_far = outputs[: last + 1].double()
        if name == "boosted":
            weights = 0.5 ** torch.arange(last, -1, -1.0, dtype=torch.float64)
            combined.append((weights[:, None, None] * so_far).sum(0).softmax(-1))
        elif name == "arithmetic":
            combined.append(so_far.softmax(-1).mean(0))
        elif name == "geometric":
            combined.append(so_far.mean(0).softmax(-1))
        elif name == "poe":
            powers = torch.arange(1, last + 2, dtype=torch.float64)[:, None, None] / len(outputs)
            product = (so_far.relu() ** powers).prod(0)
            total = product.sum(-1, keepdim=True)
            combined.append(torch.where(total > 0, product / total, so_far[-1].softmax(-1)))
        else:
            # 1 - 1e-9 is as sure as 1
            surest = so_far.float().softmax(-1).amax(-1).argmax(0)
            combined.append(so_far[surest, torch.arange(outputs.shape[1])].softmax(-1))
    return torch.stack(combined)


@pytest.mark.parametrize("name", NAMES)
@quick
@given(outputs=drawn)
def test_rules_are_the_formulas_of_their_papers(name, outputs):
    torch.testing.assert_close(
        combine(outputs, name).double().softmax(-1), brute(name, outputs), atol=2e-5, rtol=1e-3
    )


@quick
@given(outputs=drawn, rule=any_rule)
def test_one_by_one_is_all_at_once(outputs, rule):
    running = Running(rule, len(outputs))
    one_by_one = torch.stack([running.add(output) for output in outputs])
    assert one_by_one.equal(combine(outputs, rule))
    assert one_by_one.equal(combine(list(outputs), rule))


@quick
@given(outputs=drawn, rule=any_rule)
def test_an_exit_knows_nothing_of_deeper_ones(outputs, rule):
    changed = torch.cat([outputs[:-1], -3 * outputs[-1:]])
    assert combine(outputs, rule)[:-1].equal(combine(changed, rule)[:-1])


@quick
@given(outputs=drawn)
def test_caching_never_grows_less_sure(outputs):
    for temperatures in (None, torch.linspace(2.0, 0.2, len(outputs))):
        surety = combine(outputs, "caching", temperatures=temperatures).softmax(-1).amax(-1)
        assert (surety.diff(dim=0) >= 0).all()


@quick
@given(outputs=drawn, rounded=st.booleans())
def test_caching_gives_bit_by_bit_the_output_that_a_plain_loop_holds(outputs, rounded):
    # with many exits that are equally sure
    outputs = outputs.round() if rounded else outputs
    combined = combine(outputs, "caching")
    surety = outputs.softmax(-1).amax(-1)
    for sample in range(outputs.shape[1]):
        held = 0
        for exit in range(len(outputs)):
            if surety[exit, sample] > surety[held, sample]:
                held = exit
            assert combined[exit, sample].equal(outputs[held, sample])


def test_recalibration_takes_from_caching_that_it_never_grows_less_sure():
    outputs = torch.stack([logs(0.8, 0.2), logs(0.6, 0.4)])
    surety = combine(outputs, "caching", recalibration=[1.0, 2.0]).softmax(-1).amax(-1)
    # the square roots of 0.8 and 0.2 are as 2 to 1
    torch.testing.assert_close(surety, torch.tensor([0.8, 2 / 3]))


@quick
@given(outputs=drawn)
def test_a_class_that_the_product_has_ruled_out_stays_out(outputs):
    left = (outputs > 0).cumprod(0).bool()
    ruled_out = combine(outputs, "poe") == RULED_OUT
    # elsewhere the exit speaks for itself
    kept = left.any(-1)
    assert ruled_out[kept][~left[kept]].all()
    again = ruled_out[:-1] & ~ruled_out[1:] & kept[1:, :, None] & ~left[1:]
    assert not again.any()


@quick
@given(outputs=drawn, name=st.sampled_from(["arithmetic", "geometric", "poe"]))
def test_probability_rules_give_log_probabilities(outputs, name):
    combined = combine(outputs, name)
    assert torch.isfinite(combined).all()
    torch.testing.assert_close(
        combined.exp().sum(-1), torch.ones(combined.shape[:-1]), atol=1e-5, rtol=0
    )


@quick
@given(outputs=drawn, rule=any_rule)
def test_exits_that_agree_are_not_changed_in_what_they_answer(outputs, rule):
    same = outputs[:1].expand_as(outputs)
    assert combine(same, rule).argmax(-1).equal(same.argmax(-1))


@pytest.mark.parametrize("name", NAMES)
def test_extreme_outputs_stay_finite(name):
    outputs = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]])
    assert torch.isfinite(combine(outputs, name)).all()


@pytest.mark.parametrize("name", NAMES)
def test_any_dimensions_between_exits_and_classes(name):
    outputs = outputs_of(0, samples=6)
    whole = combine(outputs, name)
    assert combine(outputs.reshape(4, 2, 3, 5), name).equal(whole.reshape(4, 2, 3, 5))
    assert combine(outputs[:, 0], name).equal(whole[:, 0])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_combined_in_single(name):
    outputs = outputs_of(0).bfloat16()
    combined = combine(outputs, name)
    assert combined.dtype == torch.float32
    assert combined.equal(combine(outputs.float(), name))
    assert combine(outputs.double(), name).dtype == torch.float64


# --- gradients ------------------------------------------------------------------------------------


def test_boosted_exits_learn_what_is_left_over_and_do_not_teach_earlier_ones():
    outputs = outputs_of(1).requires_grad_()
    combine(outputs, "boosted")[-1].square().sum().backward()
    assert (outputs.grad[:-1] == 0).all()
    assert (outputs.grad[-1] != 0).all()


def test_without_detaching_boosted_gradients_shrink_with_the_rate():
    outputs = outputs_of(1).requires_grad_()
    combine(outputs, Rule(name="boosted", detach=False))[-1].sum().backward()
    assert outputs.grad[:, 0, 0].tolist() == [0.125, 0.25, 0.5, 1.0]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_small_steps(name):
    outputs = outputs_of(2, exits=3, classes=3, samples=2).double().requires_grad_()
    rule = Rule(name=name, detach=False)
    # from exit 1 on, the product of the first sample has lost every class, that of the second has
    # not
    assert torch.autograd.gradcheck(lambda value: combine(value, rule), outputs)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_gradients_of_a_product_at_zero_are_finite(zero):
    outputs = torch.tensor([[zero, 1.0, -1.0], [2.0, zero, -1.0]], requires_grad=True)
    torch.nn.functional.cross_entropy(combine(outputs, "poe")[1:], torch.tensor([2])).backward()
    assert torch.isfinite(outputs.grad).all()


# --- temperatures ---------------------------------------------------------------------------------


@quick
@given(outputs=drawn, rule=any_rule)
def test_temperatures_divide_before_and_recalibration_after(outputs, rule):
    before = torch.linspace(0.5, 2.0, len(outputs))
    after = before.flip(0)
    by_hand = combine(outputs / before[:, None, None], rule) / after[:, None, None]
    assert combine(outputs, rule, temperatures=before, recalibration=after).equal(by_hand)
    listed = combine(outputs, rule, temperatures=before.tolist(), recalibration=after.tolist())
    assert listed.equal(by_hand)


@quick
@given(outputs=drawn)
def test_a_product_does_not_heed_temperatures_where_a_class_is_left(outputs):
    kept = (outputs > 0).all(0).any(-1)
    cooled = combine(outputs, "poe", temperatures=[0.3] * len(outputs))
    torch.testing.assert_close(
        cooled[:, kept], combine(outputs, "poe")[:, kept], atol=1e-4, rtol=1e-4
    )


# --- what is refused ------------------------------------------------------------------------------


def test_outputs_may_be_left_out_but_not_come_twice_or_backwards():
    outputs = outputs_of(3)
    running = Running("poe", 4, temperatures=[1.0, 1.0, 2.0, 1.0])
    running.add(outputs[0])
    combined = running.add(outputs[2], exit=2)
    product = outputs[0].relu() ** 0.25 * (outputs[2] / 2).relu() ** 0.75
    kept = product.sum(-1) > 0
    assert kept.any()
    expected = (product / product.sum(-1, keepdim=True))[kept]
    torch.testing.assert_close(combined.exp()[kept], expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(PolicyError, match="exit 1 after 3 of 4"):
        running.add(outputs[1], exit=1)
    running.add(outputs[3])
    with pytest.raises(PolicyError, match="exit 4 after 4 of 4"):
        running.add(outputs[3])


@pytest.mark.parametrize(
    "temperatures",
    [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.inf], [1.0, math.nan], torch.ones(3)],
)
def test_there_is_one_positive_temperature_per_exit(temperatures):
    for name in ("temperatures", "recalibration"):
        with pytest.raises(PolicyError, match="2 exits"):
            combine(torch.zeros(2, 1, 3), "poe", **{name: temperatures})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "majority"}, "majority.*expected one of boosted"),
        ({"name": "boosted", "rate": math.nan}, "rate=nan"),
        ({"name": "geometric", "weights": "late"}, "weights='late'"),
    ],
)
def test_rules_that_are_none_are_refused(options, message):
    with pytest.raises(PolicyError, match=message):
        Rule(**options)
