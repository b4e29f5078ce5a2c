"""Static exit weights, pinned against definitions written down a second time."""

import math
from fractions import Fraction

import pytest

from impatient.errors import TrainingError
from impatient.training import weights
from impatient.training.weights import STATIC, check_weights

LENGTHS = (8, 12, 15, 16, 27)
every_length = pytest.mark.parametrize("count", LENGTHS)
every_scheme = pytest.mark.parametrize("scheme", [getattr(weights, name) for name in STATIC if name != "uniform"])

# early weights before scaling, from counting fractions k/2, k/4, k/8, ... of the depth by hand
SIEVE = {
    8: [1, 2, 1, 3, 1, 2, 1],
    12: [1, 2, 4, 1, 2, 5, 1, 2, 4, 1, 3],
    16: [1, 2, 1, 3, 1, 2, 1, 4, 1, 2, 1, 3, 1, 2, 1],
}


def sieve_by_fractions(count: int) -> list[Fraction]:
    """For each p and k the nearest position to k L / p, halves up, in exact arithmetic."""
    early, parts = dict.fromkeys(range(1, count), 0), 2
    while min(early.values()) == 0:
        for k in range(1, parts):
            position = next(
                i for i in range(count + 1) if i - Fraction(1, 2) <= Fraction(k * count, parts) < i + Fraction(1, 2)
            )
            if position in early:
                early[position] += 1
        parts *= 2
    return [Fraction(weight, sum(early.values())) for weight in early.values()]


def exp_lin_by_steps(count: int) -> list[Fraction]:
    """1 everywhere; L / 2**k at positions that halve from the last; L/8 at three quarters; the early ones scaled to 1."""
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


# --- the schemes ------------------------------------------------------------------------------------------------------


@every_length
def test_constant_weights_are_all_one(count):
    assert weights.const(count) == (1.0,) * count


@every_length
def test_linear_weights_rise_from_a_quarter_to_one_in_equal_steps(count):
    wanted = [Fraction(1, 4) + Fraction(3, 4) * Fraction(i - 1, count - 1) for i in range(1, count + 1)]
    assert weights.linear(count) == pytest.approx([float(weight) for weight in wanted])
    assert (weights.linear(count)[0], weights.linear(count)[-1]) == (0.25, 1.0)


@every_length
def test_half_end_spreads_one_half_evenly_over_the_early_exits(count):
    assert weights.half_end(count) == pytest.approx([1 / (count - 1)] * (count - 1) + [1.0])


@every_length
def test_sieve_is_the_formula_in_exact_arithmetic(count):
    assert weights.sieve(count) == pytest.approx([float(weight) for weight in (*sieve_by_fractions(count), 1)])


@pytest.mark.parametrize("count", [8, 16])
def test_sieve_at_a_power_of_two_is_the_vector_of_the_paper(count):
    early = SIEVE[count]
    assert weights.sieve(count) == pytest.approx([weight / sum(early) for weight in early] + [1.0])


def test_sieve_of_twelve_peaks_at_the_middle():
    assert max(range(11), key=weights.sieve(12).__getitem__) + 1 == 6


def test_sieve_of_twelve_counted_by_hand():
    """p = 2: 6; p = 4: 3 6 9; p = 8: 1.5 3 4.5 6 7.5 9 10.5 go up to 2 3 5 6 8 9 11; p = 16: 0.75 k."""
    counted = {6: 1}
    for position in (3, 6, 9, 2, 3, 5, 6, 8, 9, 11, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11):
        counted[position] = counted.get(position, 0) + 1
    total = sum(counted.values())
    assert weights.sieve(12) == pytest.approx([counted[i] / total for i in range(1, 12)] + [1.0])


@every_length
def test_exp_lin_is_its_steps_in_exact_arithmetic(count):
    assert weights.exp_lin(count) == pytest.approx([float(weight) for weight in (*exp_lin_by_steps(count), 1)])


def test_cumulative_shares_of_64_exits_are_those_of_the_papers():
    assert shares(weights.exp_lin(64)) == pytest.approx([0.172, 0.351, 0.709, 0.888], abs=5e-4)


def test_cumulative_shares_of_64_exits_of_sieve_follow_from_counting():
    """Position i of 2**m holds one more than the times 2 divides i, so the first n hold 2 n - (ones in binary n).

    The reference quotes .100 .225 .483 .750; these are the authors' code, whose positions lie one deeper than the text's.
    """
    counted = [2 * n - n.bit_count() for n in range(64)]
    assert shares(weights.sieve(64)) == pytest.approx([counted[n] / counted[63] for n in (8, 16, 32, 48)])
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
    assert normalised == pytest.approx([0.0135, 0.0184, 0.0265, 0.0413, 0.0735, 0.1654, 0.6615], abs=5e-5)


# --- what they share --------------------------------------------------------------------------------------------------


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
    with pytest.raises(TrainingError, match=f"{count} exits; needed: at least 1"):
        scheme(count)


def test_every_scheme_has_a_name():
    assert STATIC["uniform"] is STATIC["const"] is weights.const
    assert set(STATIC) == {"uniform", "const", "linear", "half_end", "sieve", "exp_lin", "inverse_square"}


# --- weights as given -------------------------------------------------------------------------------------------------


def test_good_weights_pass_as_floats():
    assert check_weights([0, 1, 2.5], 3) == (0.0, 1.0, 2.5)


@pytest.mark.parametrize("count", [1, 3])
def test_weights_of_another_number_are_refused(count):
    with pytest.raises(TrainingError, match=f"2 exit weights for {count} exits"):
        check_weights([1.0, 1.0], count)


@pytest.mark.parametrize("bad", [[-1.0, 1.0], [math.nan, 1.0], [math.inf, 1.0], [0.0, 0.0]])
def test_weights_that_are_negative_not_finite_or_all_zero_are_refused(bad):
    with pytest.raises(TrainingError, match="must be finite and not negative, and one must be positive"):
        check_weights(bad, 2)
