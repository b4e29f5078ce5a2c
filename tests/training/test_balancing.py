"""Exit weights that change while training: draws counted, updates worked out by hand, states
carried through JSON.
"""

import json
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from impatient.errors import StaleInput, TrainingError
from impatient.recipe import Sampler
from impatient.training import balancing
from impatient.training.balancing import AdaLoss, Learner, balancer
from impatient.training.weights import only, sieve

SAMPLERS = get_args(Sampler)
BASE = (0.5, 0.25, 0.25, 1.0)
PROMPT = AdaLoss(momentum=0.5, update_every=2, final_extra=1.0, gamma=0.1)
LEARNERS = ("exp3", "rwm", "avgl")
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
every_base = pytest.mark.parametrize(
    "base", [BASE, PROMPT, AdaLoss(update_every=1)], ids=["static", "prompt", "adaloss"]
)
loss_values = st.one_of(st.just(0.0), st.floats(0.0, 2.0**100, width=32))
losses_of = {count: st.lists(loss_values, min_size=count, max_size=count) for count in (1, 2, 5)}


def losses(*values):
    return torch.tensor(values, dtype=torch.float64)


def drawn(weights, base):
    """The exit that weighs more than its base."""
    (exit,) = (weights - torch.tensor(base)).nonzero().flatten().tolist()
    return exit


def draws(made, base, count):
    """How often each exit was drawn in this many steps without learning."""
    counts = [0] * len(base)
    for _ in range(count):
        counts[drawn(made.weights(), base)] += 1
    return counts


def steps(made, count, exits=4, seed=0):
    """The weights of this many steps with random losses, which are the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    taken = []
    for _ in range(count):
        taken.append(made.weights().tolist())
        made.observe(torch.rand(exits, generator=random) + 0.1)
    return taken


# --- the base alone -------------------------------------------------------------------------------


def test_without_a_sampler_every_step_has_the_base_weights():
    made = balancer(BASE, count=4)
    assert steps(made, 5) == [list(BASE)] * 5
    assert made.weights().dtype == torch.float32


@every_sampler
@every_base
def test_changing_the_weights_that_were_given_changes_nothing_inside(base, sampler):
    made = balancer(base, sampler, count=4)
    other = balancer(base, sampler, count=4)
    made.weights().fill_(math.nan)
    other.weights()
    assert made.weights().tolist() == other.weights().tolist()


# --- alternating ----------------------------------------------------------------------------------


def test_alternating_adds_gamma_times_the_sum_to_one_exit():
    made = balancer(BASE, "alternating", count=4, gamma=0.25)
    for _ in range(20):
        extra = made.weights() - torch.tensor(BASE)
        # 0.25 of 2
        assert sorted(extra.tolist()) == pytest.approx([0, 0, 0, 0.5])


def test_alternating_gives_sieve_one_more_at_the_drawn_exit_as_in_the_authors_code():
    made = balancer(sieve(9), "alternating", count=9)
    assert max((made.weights() - torch.tensor(sieve(9))).tolist()) == pytest.approx(1.0)


def test_alternating_draws_in_proportion_to_the_base():
    counts = draws(balancer(BASE, "alternating", count=4, seed=1), BASE, 4000)
    assert stats.chisquare(counts, [1000, 500, 500, 2000]).pvalue > 0.01


def test_the_mean_of_alternating_weights_is_the_base_times_one_plus_gamma():
    made = balancer(BASE, "alternating", count=4, gamma=0.5, seed=2)
    count = 4000
    mean = torch.stack([made.weights().double() for _ in range(count)]).mean(0)
    for weight, average in zip(BASE, mean.tolist(), strict=True):
        # of being drawn, for a bonus of 1
        chance = weight / 2
        error = math.sqrt(chance * (1 - chance) / count)
        assert average == pytest.approx(1.5 * weight, abs=3 * error)


def test_an_exit_without_weight_is_never_drawn():
    base = (0.0, 1.0, 0.0, 0.0)
    made = balancer(base, "alternating", count=4)
    assert draws(made, base, 200) == [0, 200, 0, 0]


def test_without_a_bonus_nothing_is_added():
    assert balancer(BASE, "alternating", count=4, gamma=0.0).weights().tolist() == list(BASE)


def test_alternating_draws_from_the_weights_adaloss_has_now():
    settings = AdaLoss(update_every=1, final_extra=0.0, gamma=0.0)
    made = balancer(settings, "alternating", count=3)
    plain = balancer(settings, count=3)
    counts = [0, 0, 0]
    for _ in range(700):
        made.observe(losses(2, 1, 0.5))
        plain.observe(losses(2, 1, 0.5))
        counts[drawn(made.weights(), plain.weights().tolist())] += 1
    assert plain.weights().tolist() == pytest.approx([0.25, 0.5, 1.0])
    assert stats.chisquare(counts, [100, 200, 400]).pvalue > 0.01


@pytest.mark.parametrize(("uniform", "exit"), [(0.0, 1), (0.24, 1), (0.25, 3), (0.999999, 3)])
def test_a_draw_is_where_the_running_sum_passes_the_number(uniform, exit):
    assert balancing.draw(losses(0.0, 0.25, 0.0, 0.75, 0.0), uniform) == exit


# --- rewards and probabilities --------------------------------------------------------------------


def test_the_reward_is_the_relative_gain_of_the_next_exit():
    assert balancing.rewards(losses(2, 1, 0.8, 1), 0.85).tolist() == pytest.approx(
        [0.5, 0.2, -0.25, 0.85 * 0.5]
    )


def test_the_last_reward_follows_the_best_one_where_all_are_negative():
    assert balancing.rewards(losses(1, 2, 3), 0.8).tolist() == pytest.approx([-1.0, -0.5, -0.4])


def test_rewards_of_losses_of_nothing_are_finite():
    assert balancing.rewards(losses(0, 0, 0), 0.85).tolist() == [0.0, 0.0, 0.0]
    early, late, last = balancing.rewards(losses(0, 1, 0), 0.85).tolist()
    assert (early, late, last) == (-1e8, 1.0, 0.85)


def test_a_single_exit_has_no_reward():
    assert balancing.rewards(losses(3), 0.85).tolist() == [0.0]


@pytest.mark.parametrize("count", [1, 2, 5])
@given(data=st.data(), gamma=st.floats(0.0, 1.0))
def test_probabilities_are_a_distribution_of_which_gamma_is_even(count, data, gamma):
    values = data.draw(st.lists(st.floats(0.0, 1e6), min_size=count, max_size=count))
    probabilities = balancing.mixed(losses(*values), gamma)
    assert float(probabilities.sum()) == pytest.approx(1.0)
    assert float(probabilities.min()) >= gamma / count * (1 - 1e-12)


def test_mixed_by_hand():
    assert balancing.mixed(losses(3, 1), 0.2).tolist() == pytest.approx([0.7, 0.3])
    assert balancing.mixed(losses(0, 0), 0.2).tolist() == [0.5, 0.5]


# --- the learners ---------------------------------------------------------------------------------

# rewards 0.5, -1 and 0.85 * 0.5
STEP = (1.0, 0.5, 1.0)


def kept(values, gamma=0.3):
    """Values as EXP3 and RWM keep them: sum 1, of which 0.001 gamma even."""
    return [
        (1 - 0.001 * gamma) * value / sum(values) + 0.001 * gamma / len(values) for value in values
    ]


def learning(sampler, **options):
    made = balancer((1.0, 1.0, 1.0), sampler, count=3, **options)
    made.begin_epoch(1)
    return made


def test_rwm_of_two_steps_by_hand():
    made = learning("rwm")
    rewards = (0.5, -1.0, 0.425)
    once = kept([math.exp(0.15 * reward) / 3 for reward in rewards])
    twice = kept(
        [value * math.exp(0.15 * reward) for value, reward in zip(once, rewards, strict=True)]
    )
    for wanted in (once, twice):
        made.weights()
        made.observe(losses(*STEP))
        assert made.state()["values"] == pytest.approx(wanted)


def test_exp3_of_two_steps_by_hand():
    made = learning("exp3")
    rewards = (0.5, -1.0, 0.425)
    values = [1 / 3] * 3
    for _ in range(2):
        exit = drawn(made.weights(), (1.0, 1.0, 1.0))
        probability = 0.7 * values[exit] / sum(values) + 0.1
        values[exit] *= math.exp(0.3 * rewards[exit] / (probability * 3))
        values = kept(values)
        made.observe(losses(*STEP))
        assert made.state()["values"] == pytest.approx(values)


def test_rwm_tells_exits_apart_where_all_rewards_are_very_negative():
    values = balancing.rwm(losses(0.5, 0.5), losses(-1e5, -1e5 + 10), gamma=0.3)
    assert values.tolist() == pytest.approx(kept([1.0, math.exp(1.5)]))


def test_exp3_moves_the_drawn_exit_alone():
    values = balancing.exp3(
        losses(0.5, 0.25, 0.25), losses(0.5, 9.0, 9.0), drawn=0, probability=0.45, gamma=0.3
    )
    grown = 0.5 * math.exp(0.3 * 0.5 / (0.45 * 3))
    assert values.tolist() == pytest.approx(kept([grown, 0.25, 0.25]))


def test_avgl_of_three_steps_by_hand():
    made = learning("avgl")
    for wanted in ([0.5, 0.0, 0.425], [0.95, 0.0, 0.8075]):
        made.weights()
        made.observe(losses(*STEP))
        assert made.state()["values"] == pytest.approx(wanted)
    # rewards -2, 0, 0
    made.observe(losses(1.0, 3.0, 3.0))
    assert made.state()["values"] == pytest.approx([0.0, 0.0, 0.72675])


@pytest.mark.parametrize(
    ("sampler", "wanted"),
    [("avgl", [0.7 * 0.5 / 0.925 + 0.1, 0.1, 0.7 * 0.425 / 0.925 + 0.1]), ("rwm", None)],
)
def test_learners_draw_from_what_they_learned_mixed_with_gamma(sampler, wanted):
    made = learning(sampler, seed=3)
    made.observe(losses(*STEP))
    wanted = wanted or [0.7 * value + 0.1 for value in made.state()["values"]]
    counts = draws(made, (1.0, 1.0, 1.0), 3000)
    assert stats.chisquare(counts, [3000 * share for share in wanted]).pvalue > 0.01


@pytest.mark.parametrize("sampler", LEARNERS)
def test_before_the_second_epoch_the_learners_draw_evenly_and_learn_nothing(sampler):
    made = balancer(BASE, sampler, count=4, seed=4)
    before = made.state()["values"]
    made.begin_epoch(0)
    steps(made, 5)
    assert made.state()["values"] == before
    assert stats.chisquare(draws(made, BASE, 2000)).pvalue > 0.01
    made.begin_epoch(1)
    steps(made, 1)
    assert made.state()["values"] != before


@pytest.mark.parametrize("sampler", LEARNERS)
def test_the_bonus_of_a_learner_is_half_of_the_sum_whatever_the_exit_weighs(sampler):
    made = balancer(BASE, sampler, count=4)
    for weights in steps(made, 10):
        assert sorted((torch.tensor(weights) - torch.tensor(BASE)).tolist()) == pytest.approx(
            [0, 0, 0, 1.0]
        )


@pytest.mark.parametrize("sampler", LEARNERS)
def test_learners_find_a_planted_best_exit(sampler):
    made = balancer([1.0] * 5, sampler, count=5, learner=Learner(last_reward=0.5))
    made.begin_epoch(1)
    random = torch.Generator().manual_seed(0)
    for _ in range(600):
        made.weights()
        # the second: reward 0.8
        made.observe(losses(1, 1, 0.2, 0.2, 0.2) * (1 + 0.02 * torch.rand(5, generator=random)))
    counts = draws(made, [1.0] * 5, 500)
    assert max(range(5), key=counts.__getitem__) == 1
    # avgl: 0.7 * 0.8 / (0.8 + 0.4) + 0.06
    assert counts[1] / 500 > (0.6 if sampler != "avgl" else 0.4)


def test_a_learners_constants_are_its_own():
    # two exits whose rewards are 0.5 and, from the other, last_reward times that
    for learner, wanted in (
        (Learner(), (0.5 + 0.9 * 0.5, 0.425 + 0.9 * 0.425)),
        (Learner(memory=0.0, last_reward=0.2), (0.5, 0.1)),
    ):
        made = balancer([1.0, 1.0], "avgl", count=2, learner=learner)
        made.begin_epoch(1)
        for _ in range(2):
            made.weights()
            made.observe(losses(1.0, 0.5))
        assert made.state()["values"] == pytest.approx(wanted)
    # all of the drawing spread evenly: nothing that was learned counts
    even = balancer([1.0, 1.0], "avgl", count=2, learner=Learner(even_share=1.0))
    even.begin_epoch(1)
    for _ in range(5):
        even.weights()
        even.observe(losses(1.0, 1.0))
    assert even._learned().tolist() == [0.5, 0.5]
    with pytest.raises(TrainingError, match=r"memory=1\.5"):
        Learner(memory=1.5)


def test_exp3_learns_nothing_of_a_step_without_a_draw():
    made = learning("exp3")
    made.observe(losses(*STEP))
    assert made.state()["values"] == [1 / 3] * 3


# --- AdaLoss --------------------------------------------------------------------------------------


def test_adaloss_by_hand():
    """Averages 2, 1, 1/2 give 1/4, 1/2, 1; plus 1 on the last, over 2: 1/8, 1/4, 1; a tenth of it
    even.
    """
    settings = AdaLoss(final_extra=1.0, gamma=0.1)
    made = balancing.adaloss_weights(losses(2, 1, 0.5), settings)
    assert made.tolist() == pytest.approx([0.9 / 8 + 0.1, 0.9 / 4 + 0.1, 1.0])


def test_adaloss_has_the_constants_of_the_authors_scripts():
    assert AdaLoss() == AdaLoss(momentum=0.99, update_every=100, final_extra=1.0, gamma=0.07)


def test_adaloss_weighs_everything_one_until_its_first_update_and_updates_by_period():
    made = balancer(AdaLoss(momentum=0.5, update_every=2, final_extra=0.0, gamma=0.0), count=2)
    seen = []
    for step in (losses(4, 1), losses(2, 1), losses(1, 1), losses(1, 1), losses(9, 9)):
        seen.append(made.weights().tolist())
        made.observe(step)
    # averages: (4, 1), (3, 1), (2, 1), (1.5, 1)
    assert seen[0] == seen[1] == [1.0, 1.0]
    assert seen[2] == seen[3] == pytest.approx([1 / 3, 1.0])
    assert seen[4] == made.weights().tolist() == pytest.approx([2 / 3, 1.0])


def test_the_running_average_starts_at_the_first_losses():
    made = balancer(AdaLoss(momentum=0.99, update_every=1, final_extra=0.0, gamma=0.0), count=2)
    made.observe(losses(3, 1))
    assert made.state()["averages"] == [3.0, 1.0]
    made.observe(losses(5, 1))
    assert made.state()["averages"] == pytest.approx([3.02, 1.0])


def test_steady_losses_times_their_weights_are_all_the_same():
    steady = losses(2.3, 1.7, 0.9, 0.4)
    made = balancer(AdaLoss(update_every=10, final_extra=0.0, gamma=0.0), count=4)
    for _ in range(10):
        made.observe(steady)
    shares = made.weights() * steady
    assert shares.tolist() == pytest.approx([0.4] * 4)


@pytest.mark.parametrize("sampler", LEARNERS)
def test_adaloss_goes_on_below_a_sampler(sampler):
    made = balancer(PROMPT, sampler, count=4)
    plain = balancer(PROMPT, count=4)
    steps(made, 6)
    steps(plain, 6)
    assert made.state()["inner"] == plain.state()
    extra = made.weights() - plain.weights()
    assert sorted(extra.tolist()) == pytest.approx([0, 0, 0, 0.5 * float(plain.weights().sum())])


@pytest.mark.parametrize("count", [1, 2, 5])
@given(data=st.data(), extra=st.floats(0, 10), gamma=st.floats(0, 1))
def test_adaloss_weights_lie_between_gamma_and_one_and_the_largest_is_one(
    count, data, extra, gamma
):
    averages = losses(*data.draw(losses_of[count]))
    made = balancing.adaloss_weights(averages, AdaLoss(final_extra=extra, gamma=gamma))
    assert float(made.max()) == pytest.approx(1.0)
    assert float(made.min()) >= gamma * (1 - 1e-12)


# --- whatever the losses are ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
@every_sampler
@settings(max_examples=15, deadline=None)
@given(data=st.data(), adaptive=st.booleans(), gamma=st.floats(0.0, 1.0))
def test_weights_are_finite_whatever_the_losses(count, sampler, data, adaptive, gamma):
    base = AdaLoss(update_every=1, momentum=0.5, gamma=gamma) if adaptive else [1.0] * count
    made = balancer(base, sampler, count=count)
    made.begin_epoch(1)
    for step in data.draw(st.lists(losses_of[count], min_size=1, max_size=6)):
        assert torch.isfinite(made.weights()).all()
        made.observe(torch.tensor(step))
    weights = made.weights()
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    assert weights.sum() > 0
    assert all(math.isfinite(value) for value in made.state().get("values", []))


def test_many_steps_of_losses_that_get_ever_worse_keep_the_learners_on_their_feet():
    for sampler in LEARNERS:
        made = learning(sampler)
        for _ in range(100):
            made.weights()
            made.observe(losses(0.0, 1.0, 1e30))
        assert torch.isfinite(made.weights()).all()


@every_sampler
@every_base
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_whose_losses_are_not_finite_changes_nothing(base, sampler, bad):
    made = balancer(base, sampler, count=4)
    made.begin_epoch(1)
    steps(made, 3)
    before = made.state()
    made.observe(losses(1, bad, 1, 1))
    assert made.state() == before


@every_sampler
def test_a_single_exit_keeps_its_weight_but_for_the_bonus(sampler):
    made = balancer([2.0], sampler, count=1)
    made.begin_epoch(1)
    wanted = [2.0] if sampler == "none" else [3.0]
    assert steps(made, 4, exits=1) == [wanted] * 4


# --- seeds and states -----------------------------------------------------------------------------


@every_sampler
@every_base
def test_a_state_through_json_goes_on_as_if_nothing_had_happened(base, sampler):
    made = balancer(base, sampler, count=4, seed=5)
    for epoch in range(2):
        made.begin_epoch(epoch)
        steps(made, 7, seed=epoch)
    # a step half done
    made.weights()
    text = json.dumps(made.state(), allow_nan=False)
    made.observe(losses(1, 0.9, 0.7, 0.6))
    fresh = balancer(base, sampler, count=4, seed=77)
    fresh.restore(json.loads(text))
    fresh.observe(losses(1, 0.9, 0.7, 0.6))
    assert steps(fresh, 30, seed=9) == steps(made, 30, seed=9)
    assert fresh.state() == made.state()


@every_sampler
def test_a_state_is_a_copy(sampler):
    made = balancer(PROMPT, sampler, count=4)
    made.begin_epoch(1)
    state = made.state()
    before = json.dumps(state)
    steps(made, 5)
    assert json.dumps(state) == before


@pytest.mark.parametrize("sampler", SAMPLERS[1:])
def test_the_same_seed_draws_the_same_exits_and_another_one_others(sampler):
    taken = [steps(balancer(BASE, sampler, count=4, seed=seed), 40) for seed in (6, 6, 7)]
    assert taken[0] == taken[1] != taken[2]


@every_sampler
def test_drawing_leaves_the_global_generator_alone(sampler):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    made = balancer(PROMPT, sampler, count=4)
    made.begin_epoch(1)
    steps(made, 5)
    made.restore(json.loads(json.dumps(made.state())))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_alone_decides_the_draws_whatever_the_global_generator_does():
    torch.manual_seed(1)
    first = steps(balancer(BASE, "alternating", count=4), 20)
    torch.manual_seed(2)
    assert steps(balancer(BASE, "alternating", count=4), 20) == first


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        ((BASE, "none"), (BASE, "exp3")),
        ((BASE, "none"), (PROMPT, "none")),
        ((BASE, "exp3"), (PROMPT, "exp3")),
        ((PROMPT, "exp3"), (PROMPT, "none")),
    ],
)
def test_the_state_of_another_kind_is_refused(mine, other):
    with pytest.raises(StaleInput, match="this state belongs to other exit weights"):
        balancer(mine[0], mine[1], count=4).restore(balancer(other[0], other[1], count=4).state())


@pytest.mark.parametrize(
    ("base", "sampler"), [("adaloss", "none"), ("adaloss", "rwm"), ("static", "rwm")]
)
def test_the_state_of_another_number_of_exits_is_refused(base, sampler):
    def made(count):
        return balancer(PROMPT if base == "adaloss" else [1.0] * count, sampler, count=count)

    with pytest.raises(StaleInput, match="numbers per entry"):
        made(4).restore(made(3).state())


# --- what is refused ------------------------------------------------------------------------------


def test_an_unknown_sampler_is_refused_with_the_known_ones():
    with pytest.raises(
        TrainingError, match="'ucb'; expected one of none, alternating, exp3, rwm, avgl"
    ):
        balancer(BASE, "ucb", count=4)


def test_a_base_of_another_number_of_exits_is_refused():
    with pytest.raises(TrainingError, match="4 exit weights for 3 exits"):
        balancer(BASE, count=3)
    with pytest.raises(TrainingError, match="0 exits"):
        balancer(AdaLoss(), count=0)


@pytest.mark.parametrize("sampler", ["rwm", "none"])
def test_losses_of_another_number_of_exits_are_refused(sampler):
    made = balancer(PROMPT, sampler, count=4)
    with pytest.raises(
        TrainingError, match=r"losses of shape \(3,\); expected the mean loss of each of 4 exits"
    ):
        made.observe(losses(1, 1, 1))


@pytest.mark.parametrize("gamma", [-0.1, math.nan, math.inf])
def test_a_bonus_that_is_no_share_is_refused(gamma):
    with pytest.raises(TrainingError, match=r"^gamma=.*; expected 0 or a positive"):
        balancer(BASE, "alternating", count=4, gamma=gamma)


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (AdaLoss, {"momentum": 1.0}),
        (AdaLoss, {"momentum": -0.1}),
        (AdaLoss, {"update_every": 0}),
        (AdaLoss, {"final_extra": -1.0}),
        (AdaLoss, {"final_extra": math.inf}),
        (AdaLoss, {"gamma": 1.1}),
        (AdaLoss, {"gamma": math.nan}),
    ],
)
def test_constants_out_of_range_are_refused_by_name(value, options):
    with pytest.raises(TrainingError, match=f"{next(iter(options))}=.*; expected"):
        value(**options)


def test_opt_can_be_a_base():
    made = balancer(only(2, 4), "alternating", count=4)
    assert made.weights().tolist() == [0.0, 0.0, 1.5, 0.0]
