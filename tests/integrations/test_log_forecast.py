from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from grpo_fast.integrations.forecast import forecast_log
from grpo_fast.integrations.log_forecast import LogForecast
from grpo_fast.integrations.logs import RewardLog
from grpo_fast.law import Prior, RunFacts, Spending


def fast_rise(**values: Any) -> RewardLog:
    """Forty of eighty steps of a curve that has risen to 0.8 by step 20."""
    steps = np.arange(1, 41)
    rewards = 0.2 + 0.6 * (1 - np.exp(-steps / 5)) + np.random.default_rng(0).normal(0, 0.005, 40)
    settings: dict[str, Any] = {"reward_std": None, "learning_rate": None, "max_steps": 80, "source": "CSV"}
    return RewardLog(steps, rewards, reward_column="reward", step_column="step", **settings | values)


@pytest.fixture(scope="module")
def metered() -> LogForecast:
    steps = np.arange(1.0, 41.0)
    return forecast_log(fast_rise(tokens=50_000 * steps, device_seconds=360 * steps, money=0.5 * steps))


def test_the_rise_in_steps_and_what_it_costs(metered: LogForecast) -> None:
    now, words = metered.forecast, metered.to_words()
    assert now.x80 is not None
    assert now.x80_interval is not None
    assert 6 <= now.x80 <= 11, "1.6 times 5 steps"
    low, high = now.x80_interval
    assert low is not None
    assert high is not None
    assert low <= now.x80 <= high
    told = f"step {now.x80} (90 % interval {low} to {high}), for "
    costs = f"{50_000 * now.x80} tokens, {now.x80 / 10:.3g} device hours, {now.x80 / 2:g} of money"
    assert words["80 % of the rise"] == told + costs
    assert words["spent so far"] == "2M tokens, 4 device hours, 20 of money"
    assert words["spent by the end"] == "4M tokens, 8 device hours, 40 of money"
    row = json.loads(json.dumps(metered.to_dict(), allow_nan=False))["forecast"]
    assert row["x80_interval"] == [low, high]
    assert row["x80_spending"] == {
        "tokens": pytest.approx(50_000 * now.x80),
        "device_hours": pytest.approx(now.x80 / 10),
        "money": pytest.approx(now.x80 / 2),
    }


def test_what_the_rewards_say_of_the_shape(metered: LogForecast) -> None:
    shapes = json.loads(json.dumps(metered.to_dict(), allow_nan=False))["shapes"]
    before, after = shapes["before"], shapes["after"]
    assert list(before) == list(after)
    assert (sum(before.values()), sum(after.values())) == pytest.approx((1.0, 1.0))
    assert after["exponential, early"] == max(after.values()) > before["exponential, early"]


def test_words_tell_only_what_is_known(metered: LogForecast) -> None:
    plain = forecast_log(fast_rise())
    assert not {"spent so far", "spent by the end", "prior"} & set(plain.to_words())
    assert "for" not in plain.to_words()["80 % of the rise"]
    assert plain.to_dict()["prior"] is None
    belief = replace(metered.forecast, x80=7, x80_interval=(6, None), x80_spending=Spending(device_hours=1.5), x95=None)
    words = replace(metered, forecast=belief).to_words()
    assert words["80 % of the rise"] == "step 7 (90 % interval 6 to after the end), for 1.5 device hours"
    assert words["95 % of the rise"] == "unknown, or after the end of the budget"


def test_what_the_forecast_began_from() -> None:
    mine = replace(Prior.default(), drift_median=0.2, about={"curves": 12, "figures": {"crps": 0.1}})
    facts = RunFacts(size_b=7.0, start=0.2, lora=True)
    found = forecast_log(fast_rise(), prior=mine, facts=facts, patience=4, reward_value=3.0)
    assert found.prior_origin == found.to_words()["prior"] == "curves 12"
    told = found.to_dict()
    assert (told["prior"], told["facts"]["size_b"], told["facts"]["lora"]) == ("curves 12", 7.0, True)
    settings = {"patience": 4, "min_steps": 20, "warmup_steps": 0, "reward_value": 3.0}
    assert {name: told[name] for name in settings} == settings


def test_a_collapse_is_told() -> None:
    steps = np.arange(1, 81)
    rewards = np.where(steps < 50, 0.7, 0.7 * np.exp(-(steps - 49) / 6)) + np.random.default_rng(1).normal(0, 0.02, 80)
    settings: dict[str, Any] = {"reward_std": None, "learning_rate": None, "max_steps": 120, "source": "CSV"}
    found = forecast_log(RewardLog(steps, np.clip(rewards, 0, 1), reward_column="reward", step_column="step", **settings))
    first = found.collapses[0]
    assert 50 <= first.step <= 62
    assert first.onset is not None
    assert 48 <= first.onset <= 54
    told = found.to_words()["collapse"]
    assert told.startswith("The policy is collapsing: the reward fell from 0.695 to ")
    assert f" from step {first.onset} to step {first.step}" in told
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["collapses"][0] == asdict(first)
    assert {"80 % of the fall", "95 % of the fall"} <= set(found.to_words()), "what falls does not rise"
    many = replace(found, collapses=[first] * 5).to_words()["collapse"]
    assert many == f"{first.reason}. {first.reason}. 3 more."


def test_a_run_that_does_not_collapse_says_nothing_of_it(metered: LogForecast) -> None:
    assert (metered.collapses, metered.to_dict()["collapses"]) == ([], [])
    assert "collapse" not in metered.to_words()
