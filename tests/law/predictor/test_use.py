"""What a predictor takes and refuses, how it goes on, and what it costs."""

from __future__ import annotations

import json
import math
import statistics
import time

import numpy as np
import pytest

from grpo_fast.law import OnlinePredictor, Prior, RunFacts
from grpo_fast.law.prior import FEATURES, PARTS
from grpo_fast.law.shapes import CLASSES
from tests.law.predictor.curves import STEPS, UNIT, exponential, fed, logistic, noisy, paid, told


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


def test_the_law_needs_no_torch_and_a_forecast_no_optimiser(imported_by):
    assert not {"torch", "transformers", "pydantic", "scipy.optimize"} & imported_by("import grpo_fast.law")
