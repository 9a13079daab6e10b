"""The rivals are as good as they can be: fits find the curve that made the data, and stay inside the reward's bounds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import lsq_linear
from scipy.special import expit

from benchmarks.law.baselines import BASELINES, solve_levels
from benchmarks.law.evaluate import Seen

STEPS = np.arange(1.0, 201.0)
X = STEPS / 200
BY_NAME = {baseline.name: baseline for baseline in BASELINES}
MADE = {
    "exponential + R0": 0.3 + 0.5 * (1 - np.exp(-X / 0.35)),
    "exponential from zero (v2)": 0.7 * (1 - np.exp(-X / 0.4)),
    "logistic (v1)": 0.1 + 0.6 * expit((X - 0.5) / 0.08),
    "ScaleRL sigmoid": 0.2 + 0.5 / (1 + (0.4 / X) ** 1.7),
    "Weibull": 0.2 + 0.5 * (1 - np.exp(-((X / 0.4) ** 1.8))),
    "power law in error": 1 - 0.3 * X**-0.2,
}


def seen(rewards, share: float, bounds=(0.0, 1.0)) -> Seen:
    size = round(share * rewards.size)
    return Seen(STEPS[:size], rewards[:size], 200.0, reward_range=bounds)


# Without a greatest reward there is no error whose power law could be fitted.
@pytest.mark.parametrize(("name", "bounds"), [(n, b) for n in MADE for b in [(0.0, 1.0), None] if b or "error" not in n])
def test_a_fit_finds_the_curve_that_made_the_data(name, bounds):
    truth = MADE[name][-40:].mean()
    (guess,) = BY_NAME[name].forecast(seen(MADE[name], 0.7, bounds), [STEPS[-40:]])
    assert guess.point == pytest.approx(truth, abs=0.002)


def test_recent_means_and_the_average_by_hand():
    line = seen(X, 0.5)
    assert BY_NAME["last value"].forecast(line, [STEPS[-1:]])[0].point == 0.5
    assert BY_NAME["mean of last 10 % seen"].forecast(line, [STEPS[-1:]])[0].point == pytest.approx(X[90:100].mean())
    fit, mean, both = (
        BY_NAME[name].forecast(seen(MADE["Weibull"], 0.3), [STEPS[-1:]])[0].point
        for name in ("exponential + R0", "mean of last 20 % seen", "exponential + R0, averaged with recent mean")
    )
    assert both == pytest.approx((fit + mean) / 2)


def test_a_damped_trend_goes_on_rising_for_a_while():
    (soon, late, later) = BY_NAME["Holt, damped trend"].forecast(seen(X, 0.4), [STEPS[80:81], STEPS[150:151], STEPS[-1:]])
    assert 0.39 < soon.point < late.point < later.point < 1.0


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda baseline: baseline.name)
def test_every_baseline_is_finite_and_inside_the_bounds_on_hard_data(baseline):
    rng = np.random.default_rng(0)
    for rewards in (np.zeros(200), np.full(200, 0.3), rng.random(200), np.where(X < 0.1, 0.0, 1.0)):
        for share in (0.015, 0.2, 0.6):
            for guess in baseline.forecast(seen(rewards, share), [STEPS[-40:], STEPS[-10:]]):
                assert -1e-9 <= guess.point <= 1.0 + 1e-9


@pytest.mark.parametrize("slope", [3.0, 0.4, -2.0])
def test_levels_are_the_bounded_least_squares(slope):
    rng = np.random.default_rng(1)
    rise = 1 - np.exp(-X / np.array([[0.05], [0.4], [3.0]]))
    y = 0.4 + slope * X + 0.05 * rng.standard_normal(200)
    weight = rng.uniform(0.5, 2.0, 200)
    start, end, loss = solve_levels(rise, y, weight, (0.0, 1.0))
    for row, a, b, total in zip(rise, start, end, loss, strict=True):
        root = np.sqrt(weight)
        best = lsq_linear(np.stack([1 - row, row], axis=1) * root[:, None], y * root, (0.0, 1.0), tol=1e-12)
        np.testing.assert_allclose([a, b], best.x, atol=1e-5)
        assert total == pytest.approx(2 * best.cost, rel=1e-6)
