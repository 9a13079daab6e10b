"""The rule: what counts, what forbids, and what it does to whole runs."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy.special import expit

from grpo_fast.law import Band, Forecast, OnlinePredictor, StoppingRule

READY = Forecast(
    step=100,
    horizon=200,
    median=0.9,
    low=0.88,
    high=0.93,
    interval50=(0.89, 0.91),
    plateau=0.91,
    plateau_low=0.88,
    plateau_high=0.94,
    x80=50,
    x95=70,
    p_gain_below_eps=0.95,
    expected_gain=0.002,
    epsilon=0.01,
    trend=0.001,
    trend_low=-0.01,
    trend_high=0.02,
    phase="plateau",
    phase_probabilities=(0.0, 0.1, 0.9),
    identifiable=True,
    reason="",
    num_observations=100,
    num_skipped=0,
    band=Band((0.0,), (0.1,), (0.2,), (0.3,)),
)


def changed(**values: object) -> Forecast:
    return dataclasses.replace(READY, **values)


def test_stops_only_after_patience_in_a_row():
    rule = StoppingRule(patience=3)
    assert [rule.update(READY).stop for _ in range(2)] == [False, False]
    assert not rule.update(changed(p_gain_below_eps=0.85)).stop  # breaks the row
    decisions = [rule.update(READY) for _ in range(3)]
    assert [decision.stop for decision in decisions] == [False, False, True]
    assert "2 of 3" in decisions[1].reason
    for number in ("step 100", "0.01", "95.0%", "3 steps", "0.900", "0.880", "0.930"):
        assert number in decisions[2].reason
    assert "in a row" not in StoppingRule(patience=1).update(READY).reason


@pytest.mark.parametrize(
    ("veto", "values", "words"),
    [
        ("min_steps", {"step": 19}, "before step 20"),
        ("not identifiable", {"identifiable": False, "reason": "only 3 rewards so far"}, "only 3 rewards"),
        ("inflection ahead", {"phase_probabilities": (0.3, 0.1, 0.6)}, "30%"),
        ("rising slope", {"trend": 0.05, "trend_low": 0.01}, "0.050"),
        ("warm-up", {"step": 25}, "rises until step 25"),
    ],
)
def test_each_veto_breaks_the_row_and_says_why(veto, values, words):
    rule = StoppingRule(patience=2, warmup_steps=25 if veto == "warm-up" else 0)
    rule.update(READY)
    decision = rule.update(changed(**values))
    assert (decision.stop, decision.veto) == (False, veto)
    assert words in decision.reason
    assert not rule.update(READY).stop
    assert rule.update(READY).stop


def test_a_slope_that_is_clear_but_too_small_is_no_veto():
    assert StoppingRule(patience=1).update(changed(trend=0.005, trend_low=0.001)).stop


def test_groups_that_are_all_wrong_forbid_a_stop_by_their_mean_over_ten_steps():
    rule = StoppingRule(patience=1)
    decision = rule.update(READY, all_wrong=0.75)
    assert (decision.stop, decision.veto) == (False, "all wrong")
    assert "75%" in decision.reason
    assert rule.update(READY, all_wrong=0.4).stop, "a mean of 57.5 %"
    assert rule.update(READY).stop, "unknown is no news"
    assert rule.update(READY, all_wrong=math.nan).stop
    for _ in range(9):
        rule.update(READY, all_wrong=0.7)
    assert rule.update(READY, all_wrong=0.1).veto == "all wrong"
    assert rule.update(READY, all_wrong=0.1).stop, "ten steps are remembered: 8 of 0.7, 2 of 0.1"


def test_the_last_step_is_the_end_of_the_budget_not_a_stop():
    decision = StoppingRule(patience=1).update(changed(step=200))
    assert not decision.stop
    assert "budget ends with step 200" in decision.reason


def test_state_survives_json_in_the_middle_of_a_row():
    rule = StoppingRule(0.01, confidence=0.8, patience=2, min_steps=7, warmup_steps=3)
    rule.update(READY, all_wrong=0.5)
    again = StoppingRule.from_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert again.state_dict() == rule.state_dict()
    assert again.update(READY).stop
    other = StoppingRule(0.01, patience=2)
    other.take_up(rule.state_dict())
    assert (other.count, other.patience) == (1, 2)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="epsilon=0"):
        StoppingRule(0.0)
    with pytest.raises(ValueError, match="confidence=1"):
        StoppingRule(confidence=1.0)
    with pytest.raises(ValueError, match="patience=0"):
        StoppingRule(patience=0)
    with pytest.raises(ValueError, match="warmup_steps=-1"):
        StoppingRule(warmup_steps=-1)
    with pytest.raises(ValueError, match=r"epsilon=0\.01, the rule for 0\.02"):
        StoppingRule(0.02).update(READY)


def small_run(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean curve and batch means of a run like the embedded one: 16 prompts of mixed difficulty, 8 completions each."""
    rng = np.random.default_rng(seed)
    steps, start, top = int(rng.integers(150, 251)), rng.uniform(0.1, 0.15), rng.uniform(0.965, 0.985)
    middle, there = rng.uniform(0.2, 0.35), rng.uniform(0.45, 0.55)
    width = (there - middle) / np.log(50)
    x = np.arange(1, steps + 1) / steps
    share = (expit((x - middle) / width) - expit(-middle / width)) / (1 - expit(-middle / width))
    mean = start + (top - start) * share
    difficulty = rng.beta(4 * mean[:, None], 4 * (1 - mean[:, None]), (steps, 16))
    return mean, rng.binomial(8, difficulty).mean(axis=1) / 8


def replay(rewards: np.ndarray, **options: object) -> int | None:
    predictor, rule = OnlinePredictor(len(rewards), **options), StoppingRule()
    for step, reward in enumerate(rewards.tolist(), start=1):
        forecast = predictor.observe(step, step / len(rewards), reward, num_prompts=16, num_generations=8)
        if rule.update(forecast).stop:
            return step
    return None


@pytest.mark.slow
@pytest.mark.parametrize("reward_range", [(0.0, 1.0), None])
def test_small_runs_stop_at_their_plateau_and_not_before(reward_range):
    used = []
    for seed in range(500, 508):
        mean, rewards = small_run(seed)
        stop = replay(rewards, reward_range=reward_range)
        assert stop is not None
        assert mean[stop - 1] >= 0.98 * mean[-1]
        used.append(stop / len(rewards))
    assert max(used) <= 0.85
    assert np.median(used) <= 0.7


def test_a_flat_start_and_a_steady_rise_do_not_stop():
    rng = np.random.default_rng(3)
    flat = np.clip(0.12 + 0.035 * rng.standard_normal(200), 0, 1)
    assert replay(np.concatenate([flat[:60], np.linspace(0.12, 0.8, 140)]), reward_range=(0.0, 1.0)) in (None, 198, 199)
