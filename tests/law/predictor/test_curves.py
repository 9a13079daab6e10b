"""Forecasts of known curves, and how sure they are."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from grpo_fast.law import OnlinePredictor, Prior, RunFacts
from grpo_fast.law.prior import FEATURES, PARTS
from grpo_fast.law.shapes import CLASSES
from tests.law.predictor.curves import STEPS, UNIT, exponential, logistic, noisy, told


@pytest.mark.parametrize(
    ("curve", "end", "x80", "x95"),
    [
        # Logistic: middle + width * logit of (0.8, 0.95), as it starts close to its floor; exponential: 1.609 and 2.996 tau.
        (logistic, 0.9, 200 * (0.3 + 0.05 * 1.3863), 200 * (0.3 + 0.05 * 2.9444)),
        (exponential, 0.7, 200 * 0.15 * 1.6094, 200 * 0.15 * 2.9957),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_known_curves_are_recovered(curve, end, x80, x95, noise):
    forecast = told(noisy(curve(STEPS), 1, noise)[:140], 200, reward_range=UNIT)
    assert forecast.identifiable
    assert forecast.median == pytest.approx(end, abs=0.02)
    assert forecast.plateau == pytest.approx(end, abs=0.03)
    assert forecast.low <= curve(1.0) <= forecast.high
    assert forecast.x80 == pytest.approx(x80, abs=10)
    assert forecast.x95 == pytest.approx(x95, abs=20)
    for when, interval in ((forecast.x80, forecast.x80_interval), (forecast.x95, forecast.x95_interval)):
        assert 1 <= interval[0] <= when <= (interval[1] or 201)
    assert forecast.x80 < forecast.x95
    assert forecast.p_gain_below_eps > 0.5


def test_the_interval_narrows_and_the_phases_pass_as_a_rise_unfolds():
    rewards = noisy(logistic(STEPS), 2)
    forecasts = [told(rewards[:seen], 200, reward_range=UNIT) for seen in (10, 70, 100, 150, 200)]
    widths = [forecast.high - forecast.low for forecast in forecasts]
    assert widths[0] > 0.3
    assert widths[-1] < 0.06
    assert widths == sorted(widths, reverse=True)
    assert [forecast.identifiable for forecast in forecasts] == [False, True, True, True, True]
    assert forecasts[1].phase == "rapid improvement"
    assert forecasts[3].phase == "plateau"
    assert forecasts[1].p_gain_below_eps < 0.05
    assert forecasts[1].expected_gain > 0.1
    for forecast in forecasts:
        assert sum(forecast.phase_probabilities) == pytest.approx(1.0)
        assert forecast.phase_probability == max(forecast.phase_probabilities)


def test_nine_of_ten_intervals_hold_the_end_of_simulated_runs():
    held = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        start, top = rng.uniform(0.1, 0.4), rng.uniform(0.5, 0.9)
        middle, width = rng.uniform(0.1, 0.5), rng.uniform(0.04, 0.1)
        kind = (logistic(STEPS, start, top, middle, width), exponential(STEPS, start, top, middle), np.full(200, start))[
            seed % 3
        ]
        rewards = noisy(kind, seed, 0.05)
        for seen in (40, 80, 120, 160):
            forecast = told(rewards[:seen], 200, reward_range=UNIT)
            held.append(forecast.low <= kind[-1] <= forecast.high)
    assert 0.85 <= np.mean(held) <= 0.99


def averaged(rewards, keep):
    """Their exponential moving average, as logs are smoothed for pictures."""
    return np.array(list(itertools.accumulate(rewards, lambda mean, reward: keep * mean + (1 - keep) * reward)))


def two_rises(seed):
    """A rise, and three tenths of one of another time: no shape of the grid."""
    rng = np.random.default_rng(seed)
    start, top, middle, width = rng.uniform((0.1, 0.5, 0.1, 0.04), (0.4, 0.9, 0.5, 0.1))
    first = exponential(STEPS, start, top, middle) if seed % 2 else logistic(STEPS, start, top, middle, width)
    return 0.7 * first + 0.3 * exponential(STEPS, start, top, 2 * middle)


@pytest.mark.parametrize("keep", [0.9, 0.95])
def test_intervals_of_smoothed_rewards_hold_what_comes(keep):
    """Their scatter is a tenth of what it was, and they say no more of the end: two in five ends used to lie outside."""
    held = []
    for seed in range(16):
        rewards = averaged(noisy(two_rises(seed), seed, 0.08), keep)
        for seen in (120, 160):
            forecast = told(rewards[:seen], 200, reward_range=UNIT)
            held.append(forecast.low <= rewards[-20:].mean() <= forecast.high)
    assert np.mean(held) >= 0.8


def test_intervals_of_rewards_without_noise_miss_by_little():
    """No shape is exactly true, and the width says so: five in six intervals used to miss, half of them by 0.75 widths."""
    misses = []
    for seed in range(16):
        mean = two_rises(seed)
        for seen in (120, 160):
            forecast = told(mean[:seen], 200, reward_range=UNIT)
            outside = max(forecast.low - mean[-1], mean[-1] - forecast.high, 0.0)
            misses.append(outside / (forecast.high - forecast.low))
    assert np.mean(np.array(misses) == 0) >= 0.6
    assert np.quantile(misses, 0.9) < 0.7


def test_slow_start_gives_no_certainty():
    forecast = told(noisy(np.full(30, 0.12), 0, 0.035), 200, reward_range=UNIT)
    assert not forecast.identifiable
    assert "width before the first step" in forecast.reason
    assert f"{forecast.low:.3g} to {forecast.high:.3g}" in forecast.reason
    assert forecast.p_gain_below_eps < 0.75
    assert forecast.expected_gain > 0.02
    assert forecast.high > 0.4
    assert (forecast.x80, forecast.x95, forecast.x80_interval, forecast.x95_interval) == (None, None, None, None)
    # Were it known that a rise comes, this would be its slow start.
    risen, late = np.zeros((len(PARTS), len(FEATURES))), np.zeros((len(CLASSES), len(FEATURES)))
    risen[4, 0], late[CLASSES.index("S-shaped, late"), 0] = 8.0, 8.0
    sure = told(noisy(np.full(30, 0.12), 0, 0.035), 200, reward_range=UNIT, prior=Prior(risen, late))
    assert sure.phase == "slow start"
    assert sure.phase_probabilities[0] > 0.8


@pytest.mark.parametrize("level", [0.0, 0.4, 1.0])
def test_a_constant_curve_has_nothing_left_to_gain(level):
    forecast = told(np.full(190, level), 200, reward_range=UNIT)
    assert forecast.identifiable
    assert forecast.phase == "plateau"
    assert forecast.p_gain_below_eps > 0.9
    assert forecast.median == pytest.approx(level, abs=0.01)
    assert forecast.x80 is None


def test_the_end_of_the_budget_is_no_plateau_by_itself():
    """Nothing is left to gain there, of whatever rises too."""
    rising, flat = told(0.1 + 0.6 * STEPS, 200, reward_range=UNIT), told(noisy(0.5 + 0 * STEPS, 0), 200, reward_range=UNIT)
    assert rising.p_gain_below_eps == flat.p_gain_below_eps == pytest.approx(1.0)
    assert rising.phase == "rapid improvement"
    assert flat.phase == "plateau"


def test_short_histories_are_wide_and_say_so():
    predictor = OnlinePredictor(100, reward_range=UNIT)
    prior = predictor.forecast()
    assert (prior.step, prior.num_observations, prior.identifiable) == (0, 0, False)
    assert prior.high - prior.low > 0.6
    for step in range(1, 5):
        forecast = predictor.observe(step, step / 100, 0.3, num_prompts=8, num_generations=8)
        assert not forecast.identifiable
        assert f"only {step} rewards" in forecast.reason
        assert forecast.high - forecast.low > 0.15
        assert (forecast.trend, forecast.trend_low, forecast.trend_high) == (0.0, -1.0, 1.0)


def test_a_probe_before_the_first_step_narrows_the_forecast():
    bare, informed = OnlinePredictor(100, reward_range=UNIT), OnlinePredictor(100, reward_range=UNIT)
    informed.inform(RunFacts(start=0.3, start_error=0.01))
    one, other = bare.forecast(), informed.forecast()
    assert other.high - other.low < one.high - one.low
    assert other.band.median[0] == pytest.approx(0.3, abs=0.02)
    assert other.band.high[0] - other.band.low[0] < 0.1 < one.band.high[0] - one.band.low[0]
    vague = OnlinePredictor(100, reward_range=UNIT, facts=RunFacts(start=0.3, start_error=0.2)).forecast()
    assert vague.band.high[0] - vague.band.low[0] > 3 * (other.band.high[0] - other.band.low[0])
    assert informed.num_observations == 0, "a probe is no step"
    assert other == OnlinePredictor(100, reward_range=UNIT, facts=RunFacts(start=0.3, start_error=0.01)).forecast()
    with pytest.raises(ValueError, match=r"reward=1\.3 at the start is outside"):
        bare.inform(RunFacts(start=1.3))
    assert bare.forecast() == one, "what is refused changes nothing"
    large = OnlinePredictor(100, epsilon=1.0, reward_range=(0, 100), facts=RunFacts(start=30.0, start_error=1.0)).forecast()
    assert (large.low, large.median, large.high) == pytest.approx((100 * other.low, 100 * other.median, 100 * other.high))
    bare.inform(RunFacts(start=0.3, start_error=0.01))
    assert bare.forecast() == other
    bare.absorb(1, 0.01, 0.3)
    with pytest.raises(ValueError, match="step 1 was observed already"):
        bare.inform(RunFacts())


def test_steps_follow_the_course_of_the_learning_rate():
    # Linear decay: progress p = 2u - u^2, so the step of progress p is horizon * (1 - sqrt(1 - p)).
    progress = 2 * STEPS - STEPS**2
    forecast = told(logistic(progress)[:80], 200, progress=progress[:80], reward_range=UNIT)
    expected = 200 * (1 - math.sqrt(1 - (0.3 + 0.05 * 2.9444)))
    assert forecast.x95 == pytest.approx(expected, abs=8)
    # At 40 % of the steps 64 % of the progress are done; who takes the falling rate for a plateau expects too little.
    end, now = exponential(np.array([1.0, 0.64]), tau=0.5)
    warped = told(exponential(progress, tau=0.5)[:80], 200, progress=progress[:80], reward_range=UNIT)
    plain = told(exponential(progress, tau=0.5)[:80], 200, reward_range=UNIT)
    assert plain.median < warped.median - 0.003
    assert plain.expected_gain < warped.expected_gain - 0.003
    assert warped.median == pytest.approx(end, abs=0.004)
    assert warped.expected_gain == pytest.approx(end - now, abs=0.005)


def test_the_prior_stretches_what_lies_ahead_only():
    rewards, plain = noisy(logistic(STEPS), 9)[:80], Prior.default()
    spread = [told(rewards, 200, reward_range=UNIT, prior=with_spread(plain, value)) for value in (1.0, 1.5)]
    past, behind = [[each.band.high[k] - each.band.low[k] for each in spread] for k in (5, 9)]
    assert past[0] == past[1]
    assert behind[0] == behind[1]
    ends = [each.high - each.median for each in spread]
    assert ends[1] == pytest.approx(min(1.5 * ends[0], 1.0 - spread[0].median), rel=0.05)
    assert spread[0].median == pytest.approx(spread[1].median)


def with_spread(prior: Prior, value: float) -> Prior:
    return Prior(prior.part_logits, prior.class_logits, prior.drift_none, prior.drift_median, (value,) * 4)
