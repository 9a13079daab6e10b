"""Ranges and scales of rewards, and what makes one weigh more."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_fast.law import OnlinePredictor, RunFacts, StoppingRule
from tests.law.predictor.curves import STEPS, UNIT, fed, logistic, noisy, told


@pytest.mark.parametrize("rare", [0.0, 1 / 128])
def test_equal_rewards_of_an_unknown_range_foretell_nothing_and_stop_nothing(rare):
    """The first right answers may be ahead: where rewards could go is not known before two of them differ by epsilon."""
    predictor, rule = OnlinePredictor(200), StoppingRule()
    for step in range(1, 200):
        reward = rare if step % 9 == 0 else 0.0
        forecast = predictor.observe(step, step / 200, reward, num_prompts=16, num_generations=8)
        decision = rule.update(forecast)
        assert not decision.stop
    assert forecast.reason.startswith("no two rewards so far differ by 0.01, and the range of rewards is not known")
    assert decision.veto == "not identifiable"
    assert told([0.5] * 40, 200, reward_range=UNIT).identifiable, "of a known range they tell that nothing moves"


def test_a_few_rewards_of_an_unknown_range_bound_nothing():
    one = told([0.9], 100)
    assert one.high - one.low > 1.0
    for many in (4, 5):
        believed = fed(0.9 + 0.01 * np.arange(many), 100).believed()
        assert np.isfinite([believed.low, believed.high]).all() == (many == 5)


def test_a_reward_near_its_greatest_leaves_little_room():
    top, below = (told(np.full(50, level), 200, reward_range=UNIT) for level in (1.0, 0.6))
    assert top.p_gain_below_eps > below.p_gain_below_eps
    assert top.expected_gain < below.expected_gain
    assert top.high <= 1.0


@pytest.mark.parametrize("reward_range", [UNIT, None])
@pytest.mark.parametrize("start", [None, 0.1])
def test_rewards_of_any_scale_give_the_same_forecast(reward_range, start):
    rewards = noisy(logistic(STEPS), 5, 0.05)[:90]
    moved = None if reward_range is None else (-7.0, 93.0)
    facts = (
        [None, None]
        if start is None
        else [RunFacts(start=value, start_error=error) for value, error in ((start, 0.02), (3, 2))]
    )
    one = told(rewards, 200, reward_range=reward_range, facts=facts[0])
    other = told(100 * rewards - 7, 200, epsilon=1.0, reward_range=moved, facts=facts[1])
    for name in ("median", "low", "high", "plateau", "plateau_low", "plateau_high"):
        assert getattr(other, name) == pytest.approx(100 * getattr(one, name) - 7, abs=1e-5)
    for name in ("expected_gain", "trend", "trend_low", "trend_high"):
        assert getattr(other, name) == pytest.approx(100 * getattr(one, name), abs=1e-5)
    assert other.p_gain_below_eps == pytest.approx(one.p_gain_below_eps, abs=1e-9)
    assert (other.x80, other.x95, other.phase) == (one.x80, one.x95, one.phase)


def test_large_rewards_need_no_range_and_no_other_epsilon():
    rng = np.random.default_rng(6)
    forecast = told(100 * logistic(STEPS)[:150] + 3 * rng.standard_normal(150), 200)
    assert forecast.median == pytest.approx(90, abs=3)
    assert forecast.low < 90 < forecast.high


def test_more_prompts_make_a_reward_weigh_more():
    ends = []
    for last in (1024, 4):
        predictor = OnlinePredictor(100, reward_range=UNIT)
        for step, (reward, prompts) in enumerate([(0.5, 4), (0.5, 4), (0.5, 4), (0.9, last)], start=1):
            forecast = predictor.observe(step, step / 100, reward, num_prompts=prompts, num_generations=8)
        ends.append(forecast.median)
    assert ends[0] > ends[1] + 0.02


def test_within_group_spread_enters_the_noise():
    widths = []
    for spread in (0.0, 0.5):
        predictor = OnlinePredictor(100, reward_range=UNIT)
        forecast = predictor.observe(1, 0.01, 0.4, num_prompts=4, reward_std=spread)
        widths.append(forecast.band.high[0] - forecast.band.low[0])
    assert widths[0] < 0.9 * widths[1]


@pytest.mark.parametrize(("low", "high"), [(-1.0, 0.3), (0.0, 2.5), (-12.0, -5.0), (1200.0, 3500.0)])
def test_a_rise_of_unknown_range_may_not_fall_without_end(low, high):
    x = np.arange(1, 301) / 300
    rewards = low + (high - low) * (1 - np.exp(-x / 0.25) + 0.05 * np.random.default_rng(3).standard_normal(300))
    for seen in (15, 30, 60, 120):
        forecast = told(rewards[:seen], 300)
        span = np.ptp(rewards[:seen])
        assert rewards[:seen].min() - 2.5 * span <= forecast.low <= forecast.high <= rewards[:seen].max() + 2.5 * span
