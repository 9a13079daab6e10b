"""The row that a forecast becomes, and the small things it is made of."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from grpo_fast.law import OnlinePredictor, Spending
from grpo_fast.law.forecast import PHASES, Forecast
from grpo_fast.law.posterior import quantiles

STEPS = np.arange(1, 201) / 200
NUMBERS = ("step", "median", "low", "high", "plateau", "plateau_low", "plateau_high", "p_gain_below_eps", "expected_gain")


def fed(seen: int = 120, *, reward_range: tuple[float, float] | None = (0.0, 1.0), spent=None) -> OnlinePredictor:
    """A rise from 0.3 to 0.7 of which 120 of 200 steps were seen, and of which half is done after 21."""
    rewards = 0.7 - 0.4 * np.exp(-STEPS / 0.15) + 0.02 * np.random.default_rng(0).standard_normal(200)
    predictor = OnlinePredictor(200, reward_range=reward_range)
    for step in range(1, seen + 1):
        paid_then = None if spent is None else spent(step)
        predictor.absorb(step, step / 200, float(rewards[step - 1]), num_prompts=16, num_generations=8, spent=paid_then)
    return predictor


def forecast(seen: int = 120, **options) -> Forecast:
    return fed(seen, **options).forecast()


def even(step: int) -> Spending:
    return Spending(100.0 * step, None, 0.5 * step)


def paid(step: int) -> Spending:
    """10 tokens, 0.5 hours and 2 of money a step for 60 steps, twice as much from there on."""
    times = step + max(0, step - 60)
    return Spending(10.0 * times, 0.5 * times, 2.0 * times)


def row(one: Forecast) -> dict[str, object]:
    return json.loads(json.dumps(one.to_dict(), allow_nan=False))


def test_the_row_is_json_with_the_agreed_keys():
    known = row(forecast())
    assert list(known) == [
        *("step", "median", "low", "high", "plateau", "plateau_low", "plateau_high", "x80", "x95", "p_gain_below_eps"),
        *("expected_gain", "phase", "phase_probability", "identifiable", "reason"),
        *("x80_interval", "x95_interval", "interval50", "plateau_interval50", "phase_probabilities", "band"),
    ]
    assert list(known["band"]) == ["step", "low", "median", "high"]
    assert list(row(forecast(spent=even)))[-4:] == ["spent", "x80_spending", "x95_spending", "end_spending"]


def test_the_row_holds_what_the_forecast_says():
    one = forecast(spent=even)
    said = row(one)
    for name in NUMBERS:
        assert said[name] == getattr(one, name)
    assert said["phase"] == one.phase == PHASES[int(np.argmax(one.phase_probabilities))]
    assert said["phase_probability"] == one.phase_probability == max(one.phase_probabilities)
    assert (said["x80"], said["x80_interval"]) == (one.x80, list(one.x80_interval))
    assert said["interval50"] == list(one.interval50)
    assert said["plateau_interval50"] == list(one.plateau_interval50)
    assert said["band"]["median"] == list(one.band.median)
    assert said["end_spending"] == {"tokens": 20000.0, "device_hours": None, "money": 100.0}


@pytest.mark.parametrize("reward_range", [(0.0, 1.0), None])
@pytest.mark.parametrize("seen", [0, 1, 3, 200])
def test_rows_of_the_unknown_are_json_too(seen, reward_range):
    said = row(forecast(seen, reward_range=reward_range))
    if seen < 200:
        assert (said["x80"], said["x80_interval"], said["identifiable"]) == (None, None, False)
        assert said["reason"]
    assert "spent" not in said


def test_intervals_lie_inside_one_another():
    for seen in (0, 20, 120, 200):
        one = forecast(seen)
        assert one.interval == (one.low, one.high)
        assert one.low <= one.interval50[0] <= one.median <= one.interval50[1] <= one.high
        assert one.plateau_low <= one.plateau_interval50[0] <= one.plateau <= one.plateau_interval50[1] <= one.plateau_high


def test_the_band_holds_the_past_and_ends_in_the_forecast():
    one = forecast()
    band = one.band
    assert len(band.step) == len(band.low) == len(band.median) == len(band.high) == 25
    assert (band.step[0], band.step[-1]) == (0.0, 200.0)
    assert (band.low[-1], band.median[-1], band.high[-1]) == (one.low, one.median, one.high)
    assert all(low <= middle <= high for low, middle, high in zip(band.low, band.median, band.high, strict=True))
    past = [index for index, step in enumerate(band.step) if 20 <= step <= 120]
    mean = [0.7 - 0.4 * np.exp(-band.step[index] / 200 / 0.15) for index in past]
    np.testing.assert_allclose([band.median[index] for index in past], mean, atol=0.02)


def test_spending_is_read_off_behind_and_carried_on_ahead():
    one = forecast(spent=paid)
    assert one.spent == paid(120)
    for when, got in ((one.x80, one.x80_spending), (one.x95, one.x95_spending), (200, one.end_spending)):
        for name in ("tokens", "device_hours", "money"):
            assert getattr(got, name) == pytest.approx(getattr(paid(when), name))
    unknown = forecast()
    assert (unknown.spent, unknown.x80_spending, unknown.end_spending) == (None, None, None)
    partly = forecast(10, spent=lambda step: Spending(tokens=7.0 * step))
    assert partly.end_spending.tokens == pytest.approx(1400.0)
    assert (partly.end_spending.device_hours, partly.end_spending.money, partly.x80_spending) == (None, None, None)


def test_the_gain_path_ends_at_the_horizon_with_what_the_mean_curve_gains():
    predictor = fed(25)
    one = predictor.forecast()
    assert one.gain_path.step[-1] == 200.0
    assert list(np.diff(one.gain_path.step)) == pytest.approx([175 / 8] * 7)
    values, weight = predictor.levels(np.array([25 / 200, 1.0]))
    assert one.gain_path.gain[-1] == pytest.approx(float(weight @ (values[:, 1] - values[:, 0])), abs=0.05)
    assert one.gain_path.gain[0] > 0.01


def test_levels_are_the_curves_behind_the_band():
    predictor = fed(40)
    one = predictor.forecast()
    values, weight = predictor.levels(np.linspace(0, 1, 25))
    assert weight.sum() == pytest.approx(1.0)
    assert values.shape == (weight.size, 25)
    assert 0.0 <= values.min() <= values.max() <= 1.0
    got = quantiles(values, weight, np.array([0.05, 0.5, 0.95]))
    np.testing.assert_allclose(got, [one.band.low, one.band.median, one.band.high], rtol=1e-9)


def test_spending_comes_back_from_json():
    for spending in (Spending(), Spending(1.0, 2.5, 3.0), Spending(money=4.0)):
        assert Spending.from_dict(json.loads(json.dumps(dataclasses.asdict(spending)))) == spending
    with pytest.raises(KeyError):
        Spending.from_dict({"tokens": 1.0})
