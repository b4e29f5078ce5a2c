"""Checks of single values: what passes, what is refused, and how it is said."""

import math
from typing import Literal

import pytest

from impatient import checks
from impatient.errors import BudgetError, TrainingError


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (checks.positive, [1, 1e-9], [0, -1.0, math.inf, math.nan]),
        (checks.not_negative, [0, 2.5], [-1e-9, math.inf, math.nan]),
        (checks.share, [0.0, 0.5, 1.0], [-0.1, 1.1, math.nan]),
        (checks.share_below_one, [0.0, 0.9], [-0.1, 1.0, math.nan]),
        (checks.true_share, [0.1, 0.9], [0.0, 1.0, math.nan]),
    ],
)
def test_numbers_are_checked_at_their_ends(check, right, wrong):
    for value in right:
        check(TrainingError, lr=value)
    for value in [*wrong, "0.5", True, None]:
        with pytest.raises(TrainingError, match=rf"^lr={value!r}; expected .*\.$"):
            check(TrainingError, lr=value)


def test_every_value_is_checked_and_the_error_names_the_one_that_is_wrong():
    with pytest.raises(BudgetError, match=r"^rounds=1; expected 2 or more\.$"):
        checks.at_least(BudgetError, 2, repeats=2, rounds=1)


@pytest.mark.parametrize(
    "known", [Literal["crop", "none"], ("crop", "none"), {"crop": 1, "none": 2}]
)
def test_choices_come_from_a_type_or_a_list(known):
    checks.one_of(TrainingError, known, augment="none")
    with pytest.raises(TrainingError, match=r"^augment='turn'; expected one of crop, none\.$"):
        checks.one_of(TrainingError, known, augment="turn")
