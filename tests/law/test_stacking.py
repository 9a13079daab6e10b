"""Plain forecasts from running sums, and the say that their past errors give them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from grpo_fast.law.posterior import GRID, Posterior
from grpo_fast.law.stacking import EXPERTS, Say, Stack, bounds_of, least_squares

UNIT = (0.0, 1.0)
EXPONENTIAL, RECENT, ANY = range(len(EXPERTS))


def run(rewards, *, seen=1.0, bounds=UNIT, variances=None):
    """A stack and the sums behind it after a share of a budget that the rewards fill."""
    posterior, stack = Posterior(), Stack()
    size = len(rewards)
    for index, reward in enumerate(rewards[: round(seen * size)]):
        variance = 1e-6 if variances is None else variances[index]
        posterior.add((index + 1) / size, float(reward), variance)
        stack.add(posterior, float(reward), bounds)
    return stack, posterior


def said(rewards, *, seen=1.0, bounds=UNIT, unit=1.0):
    stack, posterior = run(rewards, seen=seen, bounds=bounds)
    return stack.say(posterior, bounds, unit)


def exponential(size=100, tau=0.3):
    x = np.arange(1, size + 1) / size
    return 0.2 + 0.6 * -np.expm1(-x / tau)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.1, 0.55), (-2.0, 3.0)])
def test_fits_are_the_bounded_least_squares(bounds):
    generator = np.random.default_rng(0)
    rewards = exponential(40) + 0.1 * generator.standard_normal(40)
    variances = generator.uniform(0.5, 2.0, 40)
    _, posterior = run(rewards, variances=variances)
    start, end, loss = least_squares(posterior, bounds)
    x = np.arange(1, 41) / 40
    for index in range(0, GRID.num_rising, 13):
        u = GRID.rise(x)[index] / GRID.asymptote[index]
        root = 1 / np.sqrt(variances)
        found = lsq_linear(np.stack([1 - u, u], 1) * root[:, None], rewards * root, bounds=bounds, tol=1e-14)
        assert loss[index] == pytest.approx(2 * found.cost, rel=1e-6, abs=1e-9)
        assert [start[index], end[index]] == pytest.approx(found.x, abs=1e-4)


def test_an_edge_is_met_where_the_free_fit_leaves_the_bounds():
    _, posterior = run(exponential(40))
    start, end, _ = least_squares(posterior, (0.3, 0.5))
    assert (start >= 0.3).all()
    assert (end <= 0.5).all()
    assert (end == 0.5).any()


def test_an_exponential_is_carried_on_and_gets_the_say():
    rewards = exponential(tau=float(GRID._weibull.first[GRID.exponentials[8]]))
    say = said(rewards, seen=0.4)
    assert say.curves[EXPONENTIAL][-1] == pytest.approx(rewards[-1], abs=1e-3)
    assert say.weights[EXPONENTIAL] > 0.4
    assert say.weights.argmax() != RECENT
    assert say.weights.sum() > 0.9


def test_a_level_gives_the_recent_mean_its_say():
    rewards = 0.5 + 0.01 * np.random.default_rng(1).standard_normal(200)
    moving = np.concatenate([np.linspace(0.1, 0.5, 20), rewards])
    say = said(moving, seen=0.45)
    assert say.curves[RECENT][0] == pytest.approx(0.5, abs=0.01)
    assert say.weights[RECENT] > 0.25


def test_the_say_grows_with_the_record():
    short, long = (said(exponential(size), seen=0.5).weights.sum() for size in (12, 200))
    assert short < long


def test_an_early_jump_that_none_foretold_leaves_the_posterior_the_say():
    say = said([0.1] * 20 + [0.9] * 100, seen=0.25)
    assert say.weights.sum() < 0.15


def test_where_a_late_jump_led_to_is_carried_on():
    noise = 0.1 * np.random.default_rng(0).standard_normal(120)
    say = said(np.repeat([0.2, 0.8], 60) + noise, seen=0.9)
    assert say.weights[ANY] > 0.8
    assert say.curves[ANY][-1] == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("then", [0.75, 0.1])
def test_what_no_single_rise_follows_is_left_to_the_posterior(then):
    x = np.arange(1, 301) / 300
    mean = np.where(x < 0.6, 0.4 - 0.3 * np.exp(-x / 0.05), then)
    noise = 0.02 * np.random.default_rng(0).standard_normal(300)
    followed = 0.4 - 0.3 * np.exp(-x / 0.05) + noise
    assert said(followed, seen=0.7).weights[ANY] > 0.95
    assert said(mean + noise, seen=0.7).weights[ANY] < 0.05


def test_the_share_falls_as_thirds_of_the_newest_fifth_lie_apart():
    rewards = exponential(200) + 0.02 * np.random.default_rng(3).standard_normal(200)
    rewards[130:141] -= 0.04
    say = said(rewards, seen=141 / 200)
    missed = rewards[113:141] - np.interp(np.arange(114, 142) / 200, np.linspace(0, 1, 65), say.curves[ANY])
    missed[np.abs(missed).argmax()] = 0
    noise = (np.mean(np.abs(np.diff(rewards[:141]))) * np.sqrt(np.pi) / 2) ** 2
    means, sizes = [missed[:10].mean(), missed[10:19].mean(), missed[19:].mean()], [10, 9, 9]
    excess = np.mean(np.square(means) / (noise / np.array(sizes) + 0.005**2)) - 1
    assert 2 < excess < 9
    odds = 4 * (141 / 59) ** 6 * 141 / 151
    assert say.weights[ANY] == pytest.approx(odds / (1 + odds) / (1 + (excess / 4) ** 4))


def test_one_reward_far_off_does_not_make_a_bad_fit():
    rewards = exponential(200) + 0.05 * np.random.default_rng(3).standard_normal(200)
    rewards[149] = 0.0
    assert said(rewards, seen=0.75).weights[ANY] > 0.95
    rewards[140:149] -= 0.3
    assert said(rewards, seen=0.75).weights[ANY] < 0.1


@pytest.mark.parametrize(("seen", "odds"), [(0.2, 4 / 4096), (0.5, 4.0), (0.6, 4 * 1.5**6), (0.9, 4 * 9.0**6)])
def test_any_shape_says_the_more_the_less_is_to_be_carried_on(seen, odds):
    share = said(exponential(200), seen=seen).weights[ANY]
    size = 200 * seen
    assert share / (1 - share) == pytest.approx(odds * size / (size + 10))


def untold(y, u):
    """The newest of y (n,) by free least squares with the rise u (n,) on all the others."""
    design = np.stack([1 - u, u], 1)
    return design[-1] @ np.linalg.lstsq(design[:-1], y[:-1], rcond=None)[0]


def squares(y, u, fit):
    """What a fit leaves, the newest as the others foretell it, and never worse than by their mean."""
    left = y - np.stack([1 - u, u], 1) @ fit
    foretold = abs(y[-1] - untold(y, u)) if np.ptp(u[:-1]) > 1e-6 * np.ptp(u) else np.inf
    return left[:-1] @ left[:-1] + max(abs(left[-1]), min(foretold, abs(y[-1] - y[:-1].mean()))) ** 2


def test_any_shape_is_a_mean_by_fit_and_price():
    rewards = exponential(80) + 0.02 * np.random.default_rng(5).standard_normal(80)
    rewards[44:56] -= 0.25
    stack, posterior = run(rewards, seen=0.7)
    x, y, places = np.arange(1, 57) / 80, rewards[:56], np.linspace(0, 1, 65)
    flat = y - y.mean()
    flat[-1] = y[-1] - y[:-1].mean()
    logs, curves = [-0.5 * evidence(56) * np.log(flat @ flat)], [np.full(65, y.mean())]
    for index in range(GRID.num_rising):
        u, all_u = (GRID.rise(at)[index] / GRID.asymptote[index] for at in (x, places))
        level = np.full(2, y.mean())
        fit = lsq_linear(np.stack([1 - u, u], 1), y, bounds=UNIT, tol=1e-14).x if u.std() > 1e-3 else level
        price = np.log(GRID.num_in_class[GRID.classes[index]]) + 0.5 * np.log(evidence(56))
        logs.append(-0.5 * evidence(56) * np.log(squares(y, u, fit)) - price)
        curves.append(fit[0] * (1 - all_u) + fit[1] * all_u)
    weight = np.exp(np.array(logs) - max(logs))
    mean = weight / weight.sum() @ np.array(curves)
    np.testing.assert_allclose(stack.say(posterior, UNIT, 1.0).curves[ANY], mean, atol=1e-5)


def evidence(size):
    return size / (1 + size / 300)


def test_noise_is_not_carried_on_as_a_rise():
    for seed in range(5):
        rewards = 0.5 + 0.1 * np.random.default_rng(seed).standard_normal(200)
        say = said(rewards, seen=0.5)
        assert say.curves[ANY][-1] == pytest.approx(rewards[:100].mean(), abs=0.03)


@pytest.mark.parametrize("size", [20, 40, 92])
def test_one_high_reward_of_a_sparse_run_is_no_rise(size):
    rewards = 0.12 * np.random.default_rng(4).binomial(2, 0.2, size)
    rewards[-1] = 0.8
    ahead = np.concatenate([rewards, np.full(size, 0.1)])
    at_first, with_another = (said(ahead, seen=(size + more) / ahead.size).curves[ANY][-1] for more in (0, 3))
    assert at_first < rewards[:-1].mean() + 0.7 * 0.3
    assert with_another < at_first + 0.05


def test_a_rise_that_several_rewards_bear_out_is_one():
    rewards = 0.1 + 0.02 * np.random.default_rng(4).standard_normal(100)
    rewards[46:] += 0.6
    assert said(rewards, seen=0.5).curves[ANY][-1] == pytest.approx(0.7, abs=0.05)


def test_a_shape_of_which_nothing_is_known_is_a_level():
    _, posterior = run(exponential(40), seen=0.25)
    start, end, _ = least_squares(posterior, UNIT)
    to_come = GRID.rise(np.array([0.25]))[: GRID.num_rising, 0] < 1e-3 * GRID.asymptote[: GRID.num_rising]
    assert to_come.sum() > 5
    np.testing.assert_allclose(start[to_come], exponential(40)[:10].mean())
    np.testing.assert_allclose(end[to_come], start[to_come])


def test_the_posterior_is_alone_at_first():
    say = said(exponential(4))
    assert not say.weights.any()
    moved, wider = say.correction(np.array([1.0]), np.array([0.3]), np.array([0.1]))
    assert (moved[0], wider[0]) == (0.0, 1.0)


def test_nothing_behind_is_moved_and_what_lies_ahead_is():
    say = Say(np.array([0.5, 0.0, 0.0]), np.full((3, 65), 0.8), now=0.5)
    moved, _ = say.correction(np.array([0.2, 0.5, 0.525, 0.55, 1.0]), np.full(5, 0.4), np.full(5, 0.329))
    np.testing.assert_allclose(moved, [0.0, 0.0, 0.1, 0.2, 0.2], atol=1e-12)


def test_an_exponential_has_no_say_in_an_s_shape():
    steps = np.arange(1, 151)
    rewards = 0.1 + 0.75 / (1 + np.exp(-(steps - 30) / 7)) + 0.02 * np.random.default_rng(0).standard_normal(150)
    say = said(rewards, seen=0.67)
    assert say.curves[EXPONENTIAL][-1] > 0.9, "it still sees a rise"
    assert say.weights[EXPONENTIAL] < 0.05
    assert say.weights[ANY] > 0.9
    assert say.curves[ANY][-1] == pytest.approx(0.85, abs=0.02)


def test_forecasters_that_disagree_widen_what_lies_ahead():
    say = Say(np.array([0.5, 0.0, 0.0]), np.full((3, 65), 0.8), now=0.5)
    x, middle, width = np.array([0.4, 1.0]), np.full(2, 0.4), np.full(2, 0.329)
    # Half of the mixture lies 0.4 off: its variance is 0.01 + 0.25 * 0.16.
    _, wider = say.correction(x, middle, width)
    np.testing.assert_allclose(wider, [1.0, np.sqrt(5.0)])


def test_a_constant_run_divides_by_nothing():
    say = said([0.5] * 30)
    assert np.isfinite(say.weights).all()
    assert say.curves[:, -1] == pytest.approx([0.5] * 3)


def test_records_do_not_grow_with_the_run():
    stack, _ = run(exponential(3000))
    assert len(stack._records) < 150


def test_a_known_range_bounds_fits_and_an_unknown_one_gives_half_the_span():
    assert bounds_of(UNIT, (0.2, 0.4)) == UNIT
    assert bounds_of(None, (0.2, 0.4)) == pytest.approx((0.1, 0.5))
