"""Forecasts: known curves are found, odd inputs are told, equal inputs give equal bits."""

from __future__ import annotations

import csv
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from grpo_fast.law import Forecast, OnlinePredictor

CURVES = Path(__file__).resolve().parents[3] / "shared" / "data" / "reward_curves"
UNIT = (0.0, 1.0)


def feed(rewards, horizon, *, progress=None, num_prompts=16, **options) -> tuple[OnlinePredictor, Forecast]:
    """A predictor that has seen ``rewards``; all but the last are put in at once, through the state."""
    predictor = OnlinePredictor(horizon, **options)
    at = [(step + 1) / horizon for step in range(len(rewards))] if progress is None else [float(x) for x in progress]
    state = predictor.state_dict()
    rows = list(enumerate(zip(at, map(float, rewards), strict=True), start=1))
    state["rows"] = [[step, x, y, num_prompts, 8, None] for step, (x, y) in rows[:-1]]
    state["last"] = [rows[-2][0], rows[-2][1][0]] if len(rows) > 1 else [0, 0.0]
    predictor = OnlinePredictor.from_state_dict(state)
    step, (x, y) = rows[-1]
    return predictor, predictor.observe(step, x, y, num_prompts=num_prompts, num_generations=8)


def logistic(x, start=0.1, top=0.9, middle=0.3, width=0.05):
    floor = expit(-middle / width)
    return start + (top - start) * (expit((x - middle) / width) - floor) / (1 - floor)


def exponential(x, start=0.3, top=0.7, tau=0.15):
    return top - (top - start) * np.exp(-x / tau)


STEPS = np.arange(1, 201) / 200


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
    rng = np.random.default_rng(1)
    rewards = np.clip(curve(STEPS) + noise * rng.standard_normal(200), 0, 1)[:140]
    _, forecast = feed(rewards, 200, reward_range=UNIT)
    assert forecast.identifiable
    assert forecast.median == pytest.approx(end, abs=0.015)
    assert forecast.plateau == pytest.approx(end, abs=0.02)
    assert forecast.low <= end <= forecast.high
    assert forecast.x80 == pytest.approx(x80, abs=8)
    assert forecast.x95 == pytest.approx(x95, abs=16)
    assert forecast.p_gain_below_eps > (0.5 if curve is exponential else 0.85)


def test_the_interval_narrows_as_a_rise_unfolds():
    rng = np.random.default_rng(2)
    rewards = np.clip(logistic(STEPS) + 0.05 * rng.standard_normal(200), 0, 1)
    forecasts = [feed(rewards[:seen], 200, reward_range=UNIT)[1] for seen in (10, 70, 100, 150, 200)]
    widths = [forecast.high - forecast.low for forecast in forecasts]
    assert widths[0] > 0.5
    assert widths[-1] < 0.05
    assert widths == sorted(widths, reverse=True)
    assert [forecast.identifiable for forecast in forecasts] == [False, True, True, True, True]
    assert forecasts[1].phase == "rapid improvement"
    assert forecasts[3].phase == "plateau"
    assert forecasts[1].p_gain_below_eps < 0.01
    assert forecasts[1].expected_gain > 0.1


def test_nine_of_ten_intervals_hold_the_end_of_a_logistic_run():
    held = []
    for seed in range(15):
        noise = 0.05 * np.random.default_rng(seed).standard_normal(200)
        rewards = np.clip(logistic(STEPS, top=0.85) + noise, 0, 1)
        for seen in (60, 80, 120, 160):
            _, forecast = feed(rewards[:seen], 200, reward_range=UNIT)
            held.append(forecast.low <= 0.85 <= forecast.high)
    assert np.mean(held) >= 0.9


def test_slow_start_is_called_so_and_gives_no_certainty():
    rng = np.random.default_rng(0)
    rewards = np.clip(0.12 + 0.035 * rng.standard_normal(30), 0, 1)
    _, forecast = feed(rewards, 200, reward_range=UNIT)
    assert forecast.phase == "slow start"
    assert not forecast.identifiable
    assert "width before the first step" in forecast.reason
    assert forecast.p_gain_below_eps < 0.7
    assert forecast.high > 0.5
    assert forecast.x80 is None
    assert forecast.x95 is None


def test_a_constant_curve_has_nothing_left_to_gain():
    for level in (0.0, 0.4, 1.0):
        _, forecast = feed(np.full(190, level), 200, reward_range=UNIT)
        assert forecast.identifiable
        assert forecast.phase == "plateau"
        assert forecast.p_gain_below_eps > 0.9
        assert forecast.median == pytest.approx(level, abs=0.01)
        assert forecast.x80 is None


def test_a_reward_at_its_greatest_leaves_no_room_for_a_surprise():
    _, top = feed(np.ones(50), 200, reward_range=UNIT)
    _, below = feed(np.full(50, 0.9), 200, reward_range=UNIT)
    assert top.p_gain_below_eps > 0.9 > below.p_gain_below_eps


def test_short_histories_are_wide_and_say_so():
    predictor = OnlinePredictor(100, reward_range=UNIT)
    prior = predictor.forecast()
    assert (prior.step, prior.num_observations, prior.identifiable) == (0, 0, False)
    assert prior.high - prior.low > 0.6
    for step in range(1, 5):
        forecast = predictor.observe(step, step / 100, 0.3, num_prompts=8, num_generations=8)
        assert not forecast.identifiable
        assert f"only {step} rewards" in forecast.reason
        assert forecast.high - forecast.low > 0.4
        assert (forecast.trend_low, forecast.trend_high) == (-1.0, 1.0)


def test_nan_rewards_are_skipped_and_counted():
    rng = np.random.default_rng(4)
    with_gaps, without = OnlinePredictor(60, reward_range=UNIT), OnlinePredictor(60, reward_range=UNIT)
    assert with_gaps.observe(1, 1 / 60, math.nan).num_skipped == 1
    for step in range(2, 31):
        reward = float(np.clip(0.3 + 0.01 * step + 0.02 * rng.standard_normal(), 0, 1))
        if step % 5:
            without.observe(step, step / 60, reward)
        seen = with_gaps.observe(step, step / 60, reward if step % 5 else math.nan)
    assert seen.num_skipped == 7
    assert seen.num_observations == without.num_observations == 23
    # The clock moved on with the skipped step; what was learnt did not.
    assert seen.step == 30
    assert seen.median == pytest.approx(without.forecast().median, abs=0.01)


@pytest.mark.parametrize("reward_range", [UNIT, None])
def test_rewards_of_any_scale_give_the_same_forecast(reward_range):
    rng = np.random.default_rng(5)
    rewards = np.clip(logistic(STEPS) + 0.05 * rng.standard_normal(200), 0, 1)[:90]
    moved = None if reward_range is None else (-7.0, 93.0)
    _, one = feed(rewards, 200, reward_range=reward_range)
    _, other = feed(100 * rewards - 7, 200, epsilon=1.0, reward_range=moved)
    for name in ("median", "low", "high", "plateau", "plateau_low", "plateau_high"):
        assert getattr(other, name) == pytest.approx(100 * getattr(one, name) - 7, abs=1e-5)
    assert other.p_gain_below_eps == pytest.approx(one.p_gain_below_eps, abs=1e-9)
    assert (other.x80, other.x95, other.phase) == (one.x80, one.x95, one.phase)


def test_large_rewards_need_no_range_and_no_other_epsilon():
    rng = np.random.default_rng(6)
    _, forecast = feed(100 * logistic(STEPS)[:150] + 3 * rng.standard_normal(150), 200)
    assert forecast.median == pytest.approx(90, abs=3)
    assert forecast.low < 90 < forecast.high


def test_more_prompts_make_a_reward_weigh_more():
    rewards = np.array([0.5, 0.5, 0.5, 0.9])
    heavy, light = OnlinePredictor(100, reward_range=UNIT), OnlinePredictor(100, reward_range=UNIT)
    for step, reward in enumerate(rewards.tolist(), start=1):
        many = heavy.observe(step, step / 100, reward, num_prompts=1024 if step == 4 else 4, num_generations=8)
        few = light.observe(step, step / 100, reward, num_prompts=4, num_generations=8)
    assert many.median > few.median + 0.02


def test_within_group_spread_enters_the_noise():
    certain, doubtful = OnlinePredictor(100, reward_range=UNIT), OnlinePredictor(100, reward_range=UNIT)
    for step in range(1, 7):
        sure = certain.observe(step, step / 100, 0.4, num_prompts=4, reward_std=0.0)
        unsure = doubtful.observe(step, step / 100, 0.4, num_prompts=4, reward_std=0.5)
    assert sure.band.high[0] - sure.band.low[0] < unsure.band.high[0] - unsure.band.low[0]


def test_steps_follow_the_course_of_the_learning_rate():
    # Linear decay: progress p = 2u - u^2, so the step of progress p is horizon * (1 - sqrt(1 - p)).
    u = STEPS
    progress = 2 * u - u**2
    _, forecast = feed(logistic(progress)[:80], 200, progress=progress[:80], reward_range=UNIT)
    expected = 200 * (1 - math.sqrt(1 - (0.3 + 0.05 * 2.9444)))
    assert forecast.x95 == pytest.approx(expected, abs=6)
    # The same rewards believed to come at a constant rate reach it at another step.
    _, other = feed(logistic(progress)[:80], 200, reward_range=UNIT)
    assert forecast.band.step == other.band.step
    assert forecast.band.step[0] == 0.0
    assert forecast.band.step[-1] == 200.0


def test_band_holds_the_past_and_ends_in_the_forecast():
    _, forecast = feed(exponential(STEPS)[:120], 200, reward_range=UNIT)
    band = forecast.band
    assert len(band.step) == len(band.low) == len(band.median) == len(band.high) == 25
    assert (band.low[-1], band.median[-1], band.high[-1]) == (forecast.low, forecast.median, forecast.high)
    assert all(low <= middle <= high for low, middle, high in zip(band.low, band.median, band.high, strict=True))
    past = [i for i, step in enumerate(band.step) if 20 <= step <= 120]
    np.testing.assert_allclose(
        [band.median[i] for i in past], exponential(np.array([band.step[i] for i in past]) / 200), atol=0.02
    )
    assert forecast.low <= forecast.interval50[0] <= forecast.median <= forecast.interval50[1] <= forecast.high
    assert forecast.interval == (forecast.low, forecast.high)


def test_the_row_is_json_with_the_agreed_keys():
    _, forecast = feed(logistic(STEPS)[:50], 200, reward_range=UNIT)
    row = json.loads(json.dumps(forecast.to_dict(), allow_nan=False))
    assert list(row) == [
        *("step", "median", "low", "high", "plateau", "plateau_low", "plateau_high", "x80", "x95", "p_gain_below_eps"),
        *("phase", "phase_probability", "identifiable", "reason", "band"),
    ]
    assert list(row["band"]) == ["step", "low", "median", "high"]
    assert row["phase_probability"] == max(forecast.phase_probabilities)
    assert sum(forecast.phase_probabilities) == pytest.approx(1.0)


@pytest.mark.parametrize("reward_range", [UNIT, None])
def test_a_resumed_predictor_goes_on_bit_for_bit(reward_range):
    rng = np.random.default_rng(7)
    rewards = np.clip(logistic(STEPS) + 0.05 * rng.standard_normal(200), 0, 1)
    rewards[[3, 29]] = math.nan
    straight = OnlinePredictor(200, reward_range=reward_range)
    resumed = OnlinePredictor(200, reward_range=reward_range)
    for step in range(1, 61):
        extra = {"num_prompts": 8 + step % 3, "num_generations": 8, "reward_std": 0.3 if step % 2 else None}
        reward = float(rewards[step - 1])
        if step in (1, 4, 30, 31):
            resumed = OnlinePredictor.from_state_dict(json.loads(json.dumps(resumed.state_dict())))
            assert resumed.forecast() == straight.forecast()
        assert resumed.observe(step, step / 200, reward, **extra) == straight.observe(step, step / 200, reward, **extra)
    assert resumed.state_dict() == straight.state_dict()


def test_what_cannot_be_meant_is_refused_and_changes_nothing():
    predictor = OnlinePredictor(10, reward_range=UNIT)
    predictor.observe(3, 0.3, 0.5)
    before = predictor.state_dict()
    for arguments, words in [
        ((3, 0.4, 0.5), "step=3"),
        ((2, 0.4, 0.5), "step=2"),
        ((11, 0.4, 0.5), "horizon=10"),
        ((4, 0.2, 0.5), r"progress=0\.2"),
        ((4, 1.1, 0.5), r"progress=1\.1"),
        ((4, math.nan, 0.5), "progress=nan"),
        ((4, 0.4, math.inf), "infinite"),
        ((4, 0.4, 1.5), r"reward=1\.5 at step 4 is outside"),
    ]:
        with pytest.raises(ValueError, match=words):
            predictor.observe(*arguments)
    with pytest.raises(ValueError, match="num_prompts=0"):
        predictor.observe(4, 0.4, 0.5, num_prompts=0)
    with pytest.raises(ValueError, match="reward_std=-1"):
        predictor.observe(4, 0.4, 0.5, reward_std=-1.0)
    assert predictor.state_dict() == before


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="horizon=0"):
        OnlinePredictor(0)
    with pytest.raises(ValueError, match="epsilon=0"):
        OnlinePredictor(10, epsilon=0.0)
    with pytest.raises(ValueError, match="reward_range="):
        OnlinePredictor(10, reward_range=(1.0, 1.0))


def test_a_whole_budget_can_be_observed():
    predictor = OnlinePredictor(6, reward_range=UNIT)
    for step in range(1, 7):
        forecast = predictor.observe(step, min(1.0, step / 5), 0.5)
    assert forecast.p_gain_below_eps == 1.0
    assert forecast.expected_gain == 0.0
    assert forecast.trend == 0.0


def test_a_step_costs_the_same_after_thousands():
    def seconds(predictor: OnlinePredictor) -> float:
        times = []
        for step in range(predictor.num_observations + 1, predictor.num_observations + 16):
            begin = time.perf_counter()
            predictor.observe(step, step / 10_000, 0.5, num_prompts=16, num_generations=8)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    rewards = 0.5 + 0.02 * np.random.default_rng(8).standard_normal(5000)
    early, late = (feed(rewards[:size], 10_000, reward_range=UNIT)[0] for size in (100, 5000))
    assert seconds(late) < 3 * seconds(early) + 0.005
    assert seconds(late) < 0.1  # 4 ms on an idle core; the bound leaves room for a busy machine


def test_the_law_needs_no_torch():
    code = "import sys, grpo_fast.law; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


@pytest.mark.skipif(not CURVES.is_dir(), reason="the published reward curves are not beside this checkout")
def test_intervals_hold_on_published_curves():
    with (CURVES / "index.csv").open() as handle:
        chosen = [row for row in csv.DictReader(handle) if row["unit_interval"] == "1" and int(row["n_points"]) >= 40][::4]
    assert len(chosen) >= 30
    hits: dict[float, list[bool]] = {0.2: [], 0.4: [], 0.6: [], 0.8: []}
    for entry in chosen:
        with (CURVES / entry["file"]).open() as handle:
            rewards = np.array([float(row["reward"] or "nan") for row in csv.DictReader(handle)])
        rewards = np.clip(rewards[np.isfinite(rewards)], 0, 1)
        size = -(-len(rewards) // 150)
        rewards = rewards[: len(rewards) // size * size].reshape(-1, size).mean(axis=1)
        end = rewards[-math.ceil(0.2 * len(rewards)) :].mean()
        for share, held in hits.items():
            _, forecast = feed(rewards[: int(share * len(rewards))], len(rewards), num_prompts=1, reward_range=UNIT)
            held.append(bool(forecast.low <= end <= forecast.high))
    coverage = {share: float(np.mean(held)) for share, held in hits.items()}
    assert all(0.8 <= value <= 1.0 for value in coverage.values()), coverage
    assert 0.85 <= np.mean(list(coverage.values())) <= 0.98, coverage
