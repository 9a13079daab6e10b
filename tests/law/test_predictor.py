"""Forecasts: known curves are found, odd inputs are told, equal inputs give equal bits."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy.special import expit

from grpo_fast.law import Forecast, OnlinePredictor, Prior, RunFacts, Spending, StoppingRule
from grpo_fast.law.prior import FEATURES, PARTS
from grpo_fast.law.shapes import CLASSES

UNIT = (0.0, 1.0)
STEPS = np.arange(1, 201) / 200


def fed(rewards, horizon, *, progress=None, num_prompts=16, spent=None, **options) -> OnlinePredictor:
    """A predictor that has seen ``rewards``."""
    predictor = OnlinePredictor(horizon, **options)
    for step, reward in enumerate(map(float, rewards), start=1):
        at = step / horizon if progress is None else float(progress[step - 1])
        paid = None if spent is None else spent(step)
        predictor.absorb(step, at, reward, num_prompts=num_prompts, num_generations=8, spent=paid)
    return predictor


def told(rewards, horizon, **options) -> Forecast:
    return fed(rewards, horizon, **options).forecast()


def logistic(x, start=0.1, top=0.9, middle=0.3, width=0.05):
    floor = expit(-middle / width)
    return start + (top - start) * (expit((x - middle) / width) - floor) / (1 - floor)


def exponential(x, start=0.3, top=0.7, tau=0.15):
    return top - (top - start) * np.exp(-x / tau)


def noisy(mean, seed, noise=0.03):
    return np.clip(mean + noise * np.random.default_rng(seed).standard_normal(len(mean)), 0, 1)


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


def test_the_end_of_the_budget_is_no_plateau_by_itself():
    """Nothing is left to gain there, of whatever rises too."""
    rising, flat = told(0.1 + 0.6 * STEPS, 200, reward_range=UNIT), told(noisy(0.5 + 0 * STEPS, 0), 200, reward_range=UNIT)
    assert rising.p_gain_below_eps == flat.p_gain_below_eps == pytest.approx(1.0)
    assert rising.phase == "rapid improvement"
    assert flat.phase == "plateau"


def test_a_reward_near_its_greatest_leaves_little_room():
    top, below = (told(np.full(50, level), 200, reward_range=UNIT) for level in (1.0, 0.6))
    assert top.p_gain_below_eps > below.p_gain_below_eps
    assert top.expected_gain < below.expected_gain
    assert top.high <= 1.0


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


def test_nan_rewards_are_skipped_and_counted():
    rewards = noisy(0.3 + 0.01 * np.arange(30), 4, 0.02)
    with_gaps, without = OnlinePredictor(60, reward_range=UNIT), OnlinePredictor(60, reward_range=UNIT)
    assert with_gaps.observe(1, 1 / 60, math.nan).num_skipped == 1
    for step in range(2, 31):
        reward = float(rewards[step - 1])
        if step % 5:
            without.absorb(step, step / 60, reward)
        seen = with_gaps.observe(step, step / 60, reward if step % 5 else math.nan)
    assert seen.num_skipped == 7
    assert seen.num_observations == without.num_observations == 23
    # The clock moved on with the skipped step; what was learnt did not.
    assert seen.step == 30
    assert seen.median == pytest.approx(without.forecast().median, abs=0.01)


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


def paid(step: int) -> Spending:
    """10 tokens, 0.5 hours and 2 of money a step for 60 steps, twice as much from there on."""
    times = step + max(0, step - 60)
    return Spending(10.0 * times, 0.5 * times, 2.0 * times)


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


def test_absorbing_and_observing_come_to_the_same():
    rewards = noisy(logistic(STEPS), 7, 0.05)[:40]
    online = OnlinePredictor(200, reward_range=UNIT)
    for step, reward in enumerate(rewards.tolist(), start=1):
        live = online.observe(step, step / 200, reward, num_prompts=16, num_generations=8)
    assert told(rewards, 200, reward_range=UNIT) == live


@pytest.mark.parametrize("reward_range", [UNIT, None])
@pytest.mark.parametrize("facts", [None, RunFacts(size_b=1.5, start=0.12, lora=True)])
def test_a_resumed_predictor_goes_on_bit_for_bit(reward_range, facts):
    rewards = noisy(logistic(STEPS), 7, 0.05)
    rewards[[3, 29]] = math.nan
    rng = np.random.default_rng(0)
    parts, classes = (0.3 * rng.standard_normal((size, len(FEATURES))) for size in (len(PARTS), len(CLASSES)))
    options = {"reward_range": reward_range, "facts": facts, "prior": Prior(parts, classes, 1 / 3, 0.07)}
    straight, resumed = OnlinePredictor(200, **options), OnlinePredictor(200, **options)
    for step in range(1, 61):
        extra = {
            "num_prompts": 8 + step % 3,
            "num_generations": 8,
            "reward_std": 0.3 if step % 2 else None,
            "spent": paid(step),
        }
        if step in (1, 4, 30, 31):
            resumed = OnlinePredictor.from_state_dict(json.loads(json.dumps(resumed.state_dict())))
            assert resumed.forecast() == straight.forecast()
        for predictor in (resumed, straight):
            predictor.absorb(step, step / 200, float(rewards[step - 1]), **extra)
    assert resumed.forecast() == straight.forecast()
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
    for values, words in [
        ({"num_prompts": 0}, "num_prompts=0"),
        ({"num_generations": 0}, "num_generations=0"),
        ({"reward_std": -1.0}, "reward_std=-1"),
        ({"reward_std": math.inf}, "reward_std=inf"),
    ]:
        with pytest.raises(ValueError, match=words):
            predictor.absorb(4, 0.4, 0.5, **values)
    assert predictor.state_dict() == before


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"horizon": 0}, "horizon=0"),
        ({"epsilon": 0.0}, "epsilon=0"),
        ({"epsilon": math.inf}, "epsilon=inf"),
        ({"reward_range": (1.0, 1.0)}, "reward_range="),
        ({"reward_range": (0.0, math.inf)}, "reward_range="),
        ({"reward_range": UNIT, "facts": RunFacts(start=2.0)}, r"reward=2\.0 at the start"),
    ],
)
def test_bad_settings_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        OnlinePredictor(**{"horizon": 10, **values})


def test_a_whole_budget_can_be_observed():
    predictor = OnlinePredictor(6, reward_range=UNIT)
    for step in range(1, 7):
        forecast = predictor.observe(step, min(1.0, step / 5), 0.5)
    assert forecast.p_gain_below_eps == pytest.approx(1.0)
    assert forecast.expected_gain == 0.0
    assert forecast.trend == 0.0
    assert forecast.gain_path.gain == (0.0,) * 8
    assert OnlinePredictor(1).observe(1, 1.0, 0.5).median == pytest.approx(0.5, abs=0.1)


def milliseconds(action, repeats: int) -> float:
    """CPU time of a call: the median of some."""
    taken = []
    for _ in range(repeats):
        begin = time.process_time()
        action()
        taken.append(1e3 * (time.process_time() - begin))
    return statistics.median(taken)


@pytest.fixture(scope="module")
def long_run() -> OnlinePredictor:
    """10,000 steps of 20,000 with everything known: the plateau is identified and money is told."""
    x = np.arange(1, 10_001) / 20_000
    return fed(noisy(exponential(x, tau=0.1), 8, 0.02), 20_000, reward_range=UNIT, spent=paid)


def test_a_forecast_costs_at_most_50_ms_after_ten_thousand_steps(long_run, untraced):
    assert long_run.forecast().x95_spending is not None, "the dear case"
    assert milliseconds(long_run.forecast, repeats=7) < 50.0


def test_a_step_costs_at_most_10_ms_after_ten_thousand(long_run, untraced):
    steps = iter(range(10_001, 10_051))

    def take() -> None:
        step = next(steps)
        long_run.absorb(step, step / 20_000, 0.7, num_prompts=16, num_generations=8)

    assert milliseconds(take, repeats=50) < 10.0


@pytest.mark.parametrize(("low", "high"), [(-1.0, 0.3), (0.0, 2.5), (-12.0, -5.0), (1200.0, 3500.0)])
def test_a_rise_of_unknown_range_may_not_fall_without_end(low, high):
    x = np.arange(1, 301) / 300
    rewards = low + (high - low) * (1 - np.exp(-x / 0.25) + 0.05 * np.random.default_rng(3).standard_normal(300))
    for seen in (15, 30, 60, 120):
        forecast = told(rewards[:seen], 300)
        span = np.ptp(rewards[:seen])
        assert rewards[:seen].min() - 2.5 * span <= forecast.low <= forecast.high <= rewards[:seen].max() + 2.5 * span


def test_the_law_needs_no_torch_and_a_forecast_no_optimiser():
    code = (
        "import sys, grpo_fast.law\n"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'scipy.optimize') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"
