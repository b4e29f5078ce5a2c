"""Static exit weights, pinned against definitions written down a second time."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impatient.errors import TrainingError
from impatient.training import weights
from impatient.training.weights import (
    STATIC,
    check_weights,
    every,
    only,
    parse_weights,
    rescaled,
    spread,
)

LENGTHS = (8, 12, 15, 16, 27)
every_length = pytest.mark.parametrize("count", LENGTHS)
every_scheme = pytest.mark.parametrize(
    "scheme", [getattr(weights, name) for name in STATIC if name != "uniform"]
)

# early weights before scaling: counted by hand for 8, 12 and 16, in decimal arithmetic with
# ROUND_HALF_UP for 15 and 27
SIEVE = {
    8: [1, 2, 1, 3, 1, 2, 1],
    12: [1, 3, 3, 1, 3, 4, 1, 3, 3, 1, 3],
    15: [1, 2, 1, 3, 1, 2, 1, 5, 2, 1, 3, 1, 2, 1],
    16: [1, 2, 1, 3, 1, 2, 1, 4, 1, 2, 1, 3, 1, 2, 1],
    27: [1, 2, 4, 1, 2, 1, 4, 3, 1, 3, 1, 2, 1, 6, 2, 1, 3, 1, 3, 4, 1, 2, 1, 4, 2, 1],
}
# what exp-lin's early weights have beyond 1, as {position from 1: weight}: L/2, L/4, ... and L/8 at
# three quarters
EXP_LIN = {
    8: {4: 4, 2: 2, 1: 1, 6: 1},
    12: {6: 6, 3: 3, 2: 1.5, 1: 0.75, 9: 1.5},
    15: {8: 7.5, 4: 3.75, 2: 1.875, 1: 0.9375, 11: 1.875},
    16: {8: 8, 4: 4, 2: 2, 1: 1, 12: 2},
    27: {14: 13.5, 7: 6.75, 4: 3.375, 2: 1.6875, 1: 0.84375, 20: 3.375},
}


def sieve_by_fractions(count: int) -> list[Fraction]:
    """For each p and k the nearest position to k L / p, halves up, in exact arithmetic."""
    early = dict.fromkeys(range(1, count), 0)
    parts = 2
    while min(early.values()) == 0:
        for k in range(1, parts):
            position = next(
                i
                for i in range(count + 1)
                if i - Fraction(1, 2) <= Fraction(k * count, parts) < i + Fraction(1, 2)
            )
            if position in early:
                early[position] += 1
        parts *= 2
    return [Fraction(weight, sum(early.values())) for weight in early.values()]


def exp_lin_by_steps(count: int) -> list[Fraction]:
    """1 everywhere; L / 2**k at positions that halve from the last; L/8 at three quarters; the
    early ones scaled to 1.
    """
    raw = [Fraction(1)] * count
    places = [count - 1]
    while places[-1]:
        places.append(places[-1] // 2)
    for k, place in enumerate(places):
        raw[place] += Fraction(count, 2**k)
    raw[3 * count // 4 - 1] += Fraction(count, 8)
    return [weight / sum(raw[:-1]) for weight in raw[:-1]]


def shares(scheme: tuple[float, ...]) -> list[float]:
    """What the first 1/8, 1/4, 1/2 and 3/4 of the exits hold of the early weight."""
    early = scheme[:-1]
    return [sum(early[: len(scheme) * eighths // 8]) / sum(early) for eighths in (1, 2, 4, 6)]


# --- the schemes ----------------------------------------------------------------------------------


@every_length
def test_constant_weights_are_all_one(count):
    assert weights.const(count) == (1.0,) * count


@every_length
def test_linear_weights_rise_from_a_quarter_to_one_in_equal_steps(count):
    wanted = [
        Fraction(1, 4) + Fraction(3, 4) * Fraction(i - 1, count - 1) for i in range(1, count + 1)
    ]
    assert weights.linear(count) == pytest.approx([float(weight) for weight in wanted])
    assert (weights.linear(count)[0], weights.linear(count)[-1]) == (0.25, 1.0)


@every_length
def test_half_end_spreads_one_half_evenly_over_the_early_exits(count):
    assert weights.half_end(count) == pytest.approx([1 / (count - 1)] * (count - 1) + [1.0])


@every_length
def test_sieve_is_the_formula_in_exact_arithmetic(count):
    assert weights.sieve(count) == pytest.approx(
        [float(weight) for weight in (*sieve_by_fractions(count), 1)]
    )


@every_length
def test_sieve_is_the_vector_written_down(count):
    early = SIEVE[count]
    assert weights.sieve(count) == pytest.approx([weight / sum(early) for weight in early] + [1.0])


@every_length
def test_exp_lin_is_the_vector_written_down(count):
    early = [1 + EXP_LIN[count].get(place, 0.0) for place in range(1, count)]
    assert weights.exp_lin(count) == pytest.approx(
        [weight / sum(early) for weight in early] + [1.0]
    )


def test_linear_and_half_end_of_small_numbers_by_hand():
    assert weights.linear(4) == (0.25, 0.5, 0.75, 1.0)
    assert weights.half_end(5) == (0.25, 0.25, 0.25, 0.25, 1.0)


def test_sieve_of_twelve_peaks_at_the_middle():
    assert max(range(11), key=weights.sieve(12).__getitem__) + 1 == 6


def test_sieve_of_twelve_counted_by_hand():
    """p = 2: 6; p = 4: 3 6 9; p = 8: 1.5 3 4.5 6 7.5 9 10.5 go up to 2 3 5 6 8 9 11; p = 16: 0.75
    k.
    """
    counted = {6: 1}
    for position in (3, 6, 9, 2, 3, 5, 6, 8, 9, 11, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11):
        counted[position] = counted.get(position, 0) + 1
    total = sum(counted.values())
    assert weights.sieve(12) == pytest.approx([counted[i] / total for i in range(1, 12)] + [1.0])


@every_length
def test_exp_lin_is_its_steps_in_exact_arithmetic(count):
    assert weights.exp_lin(count) == pytest.approx(
        [float(weight) for weight in (*exp_lin_by_steps(count), 1)]
    )


def test_cumulative_shares_of_64_exits_are_those_of_the_papers():
    assert shares(weights.exp_lin(64)) == pytest.approx([0.172, 0.351, 0.709, 0.888], abs=5e-4)


def test_cumulative_shares_of_64_exits_of_sieve_follow_from_counting():
    """Position i of 2**m holds one more than the times 2 divides i, so the first n hold 2 n - (ones
    in binary n).

    The reference quotes .100 .225 .483 .750; these are the authors' code, whose positions lie one
    deeper than the text's.
    """
    counted = [2 * n - n.bit_count() for n in range(64)]
    assert shares(weights.sieve(64)) == pytest.approx(
        [counted[n] / counted[63] for n in (8, 16, 32, 48)]
    )
    one_deeper = [(1 + counted[n - 1]) / (1 + counted[62]) for n in (8, 16, 32, 48)]
    assert one_deeper == pytest.approx([0.100, 0.225, 0.483, 0.750], abs=5e-4)


@pytest.mark.parametrize("count", [8, 16, 32, 64, 1024])
def test_exp_lin_gives_every_halving_of_the_depth_its_share(count):
    early = weights.exp_lin(count)[:-1]
    for halvings in range(1, int(math.log2(count))):
        assert sum(early[: count // 2**halvings]) >= 2**-halvings


def test_inverse_square_of_seven_is_the_vector_of_the_paper():
    assert weights.inverse_square(7) == (1 / 49, 1 / 36, 1 / 25, 1 / 16, 1 / 9, 1 / 4, 1.0)
    assert sum(weights.inverse_square(7)) == pytest.approx(1.5118, abs=5e-5)
    normalised = [weight / sum(weights.inverse_square(7)) for weight in weights.inverse_square(7)]
    assert normalised == pytest.approx(
        [0.0135, 0.0184, 0.0265, 0.0413, 0.0735, 0.1654, 0.6615], abs=5e-5
    )


# --- what they share ------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("count", [1, 2, 3, 5, *LENGTHS])
def test_every_scheme_gives_one_positive_weight_per_exit_and_the_last_weighs_one(scheme, count):
    made = scheme(count)
    assert len(made) == count
    assert all(weight > 0 for weight in made)
    assert made[-1] == 1.0


@pytest.mark.parametrize("scheme", [weights.half_end, weights.sieve, weights.exp_lin])
@pytest.mark.parametrize("count", [2, 3, 7, *LENGTHS, 100])
def test_half_of_the_total_lies_on_the_last_exit(scheme, count):
    assert sum(scheme(count)[:-1]) == pytest.approx(1.0)


@every_scheme
def test_a_single_exit_weighs_one(scheme):
    assert scheme(1) == (1.0,)


def test_two_exits():
    assert weights.linear(2) == (0.25, 1.0)
    assert weights.half_end(2) == weights.sieve(2) == weights.exp_lin(2) == (1.0, 1.0)
    assert weights.inverse_square(2) == (0.25, 1.0)


@every_scheme
@pytest.mark.parametrize("count", [0, -3])
def test_no_exits_are_refused(scheme, count):
    with pytest.raises(TrainingError, match=f"{count} exits; expected at least 1"):
        scheme(count)


def test_every_scheme_has_a_name():
    assert STATIC["uniform"] is STATIC["const"] is weights.const
    assert set(STATIC) == {
        "uniform",
        "const",
        "linear",
        "half_end",
        "sieve",
        "exp_lin",
        "inverse_square",
    }


# --- other shares and sums ------------------------------------------------------------------------


@every_scheme
@every_length
@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_the_last_to_early_ratio_works_with_every_scheme_and_leaves_the_early_weights(
    scheme, count, ratio
):
    made = rescaled(scheme(count), last_to_early=ratio)
    assert made[:-1] == scheme(count)[:-1]
    assert made[-1] == pytest.approx(ratio * sum(made[:-1]))


@every_scheme
@every_length
@pytest.mark.parametrize("ratio", [None, 2.0])
def test_a_total_is_a_common_factor_and_comes_after_the_ratio(scheme, count, ratio):
    plain = rescaled(scheme(count), last_to_early=ratio)
    wanted = {"last": plain[-1], "all": sum(plain), "log": sum(plain) / math.log2(count + 1)}
    for total, unit in wanted.items():
        made = rescaled(scheme(count), last_to_early=ratio, total=total)
        assert made == pytest.approx([weight / unit for weight in plain])
    assert rescaled(scheme(count), last_to_early=ratio, total="last")[-1] == 1.0


def test_totals_by_hand():
    assert rescaled([1, 3, 4]) == (1.0, 3.0, 4.0)
    assert rescaled([1, 3, 4], total="last") == (0.25, 0.75, 1.0)
    assert rescaled([1, 3, 4], total="all") == (0.125, 0.375, 0.5)
    # log2(4) = 2
    assert rescaled([1, 3, 4], total="log") == (0.25, 0.75, 1.0)
    assert rescaled([1, 3, 9], last_to_early=3) == (1.0, 3.0, 12.0)
    assert rescaled([1, 3, 9], last_to_early=3, total="all") == (1 / 16, 3 / 16, 12 / 16)


@pytest.mark.parametrize("total", ["last", "all", "log"])
def test_a_single_exit_weighs_one_under_every_total_and_has_no_ratio(total):
    assert rescaled([5.0], last_to_early=7.0, total=total) == (1.0,)


def test_what_weighs_nothing_cannot_be_scaled():
    with pytest.raises(TrainingError, match="the weight of the last exit is 0"):
        rescaled([1.0, 0.0], total="last")
    with pytest.raises(TrainingError, match="the weight of the early exits is 0"):
        rescaled([0.0, 1.0], last_to_early=1.0)


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.inf, math.nan])
def test_a_ratio_that_is_not_positive_is_refused(ratio):
    with pytest.raises(TrainingError, match="expected a positive number"):
        rescaled([1.0, 1.0], last_to_early=ratio)


def test_an_unknown_total_is_refused_with_the_known_ones():
    with pytest.raises(TrainingError, match="total='half'; expected one of as_is, last, all, log"):
        rescaled([1.0, 1.0], total="half")


# --- not every exit predicts ----------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 70))
def test_one_exit_in_a_period_predicts_counted_from_the_last(count, period):
    assert every(count, period) == tuple(i for i in range(count) if (count - 1 - i) % period == 0)
    assert len(every(count, period)) == 1 + (count - 1) // period


def test_predictors_by_hand():
    assert every(9, 1) == tuple(range(9))
    assert every(9, 2) == (0, 2, 4, 6, 8)
    assert every(10, 4) == (1, 5, 9)
    assert every(3, 5) == (2,)


@every_scheme
def test_a_scheme_weighs_the_predictors_of_a_period_and_no_other_exit(scheme):
    predicting = every(15, 4)
    made = spread(scheme(len(predicting)), predicting, 15)
    assert [made[i] for i in (2, 6, 10, 14)] == list(scheme(4))
    assert sum(made) == pytest.approx(sum(scheme(4)))


def test_weights_follow_their_exits_in_any_order():
    assert spread([1.0, 2.0], [2, 0], 3) == (2.0, 0.0, 1.0)


@pytest.mark.parametrize("exits", [[0, 0], [0, 3], [-1, 0]])
def test_exits_that_do_not_exist_or_come_twice_are_refused(exits):
    with pytest.raises(TrainingError, match="expected different ones from 0 to 2"):
        spread([1.0, 1.0], exits, 3)


def test_more_weights_than_exits_are_refused():
    with pytest.raises(TrainingError, match="3 exit weights for 2 exits"):
        spread([1.0, 1.0, 1.0], [0, 1], 3)


@pytest.mark.parametrize("period", [0, -2])
def test_a_period_below_one_is_refused(period):
    with pytest.raises(TrainingError, match=r"period=.*; expected 1 or more"):
        every(4, period)


def test_opt_weighs_one_exit():
    assert only(1, 3) == (0.0, 1.0, 0.0)
    assert only(0, 1) == (1.0,)
    with pytest.raises(TrainingError, match="from 0 to 2"):
        only(3, 3)
    with pytest.raises(TrainingError, match="0 exits"):
        only(0, 0)


# --- weights as text ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATIC)
@every_length
def test_the_name_of_a_scheme_is_its_weights(name, count):
    assert parse_weights(name, count) == STATIC[name](count)


def test_options_follow_the_name_or_the_numbers():
    assert parse_weights("sieve:last_to_early=2,total=all", 4) == pytest.approx(
        [1 / 12, 2 / 12, 1 / 12, 8 / 12]
    )
    assert parse_weights("1,3,4:total=all", 3) == (0.125, 0.375, 0.5)
    assert parse_weights("const:total=log", 7) == pytest.approx([3 / 7] * 7)
    assert parse_weights("const:last_to_early=1", 3) == (1.0, 1.0, 2.0)


def test_plain_numbers_are_weights():
    assert parse_weights("1,0.5,1", 3) == parse_weights(" 1, .5, 1e0 ", 3) == (1.0, 0.5, 1.0)
    assert parse_weights("2", 1) == (2.0,)


@pytest.mark.parametrize("text", ["", "seive", "1;2", "1,,2", "sieve,const", "log", "0.1,x"])
def test_a_text_that_is_neither_is_refused_with_what_is_known(text):
    with pytest.raises(
        TrainingError, match=r"expected one of uniform, const, .*, or 3 numbers separated by commas"
    ):
        parse_weights(text, 3)


@pytest.mark.parametrize(
    "text", ["uniform:0:10", "sieve:", "sieve:ratio=2", "sieve:total", "sieve:total=all,total=last"]
)
def test_unknown_options_are_refused_with_an_example(text):
    with pytest.raises(
        TrainingError, match=r"cannot read the options .* such as sieve:last_to_early=2,total=all"
    ):
        parse_weights(text, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,1", "2 exit weights for 3 exits"),
        ("1,-1,1", "not negative"),
        ("0,0,0", "one must be positive"),
        ("1,nan,1", "finite"),
        ("const:total=half", "expected one of as_is"),
        ("const:last_to_early=x", "could not convert"),
        ("const:last_to_early=0", "expected a positive number"),
    ],
)
def test_texts_that_give_no_weights_are_refused(text, message):
    with pytest.raises(TrainingError, match=message):
        parse_weights(text, 3)


# --- weights as given -----------------------------------------------------------------------------


def test_good_weights_pass_as_floats():
    assert check_weights([0, 1, 2.5], 3) == (0.0, 1.0, 2.5)


@pytest.mark.parametrize("count", [1, 3])
def test_weights_of_another_number_are_refused(count):
    with pytest.raises(TrainingError, match=f"2 exit weights for {count} exits"):
        check_weights([1.0, 1.0], count)


@pytest.mark.parametrize("bad", [[-1.0, 1.0], [math.nan, 1.0], [math.inf, 1.0], [0.0, 0.0]])
def test_weights_that_are_negative_not_finite_or_all_zero_are_refused(bad):
    with pytest.raises(
        TrainingError, match="must be finite and not negative, and one must be positive"
    ):
        check_weights(bad, 2)
